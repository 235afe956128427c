"""The exact damped inverse by conjugate gradients, against dense solves."""

import copy
import math

import numpy as np
import pytest
import torch

from fisher_lab.curvature.errors import CurvatureError, NonFiniteError
from fisher_lab.curvature.spectra.conjugate_gradients import conjugate_gradients
from fisher_lab.curvature.spectra.lanczos import FisherLanczos
from tests.curvature.spectra.reference import batch_of, tiny


def drawn(n, seed, spread=6.0):
    """A positive definite matrix with eigenvalues over ``spread`` decades, and a vector."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator)).Q
    values = torch.logspace(0, -spread, n, dtype=torch.float64)
    return basis @ torch.diag(values) @ basis.T, torch.randn(
        n, dtype=torch.float64, generator=generator
    )


def dense(matrix, lam, rhs):
    return torch.from_numpy(np.linalg.solve(matrix.numpy() + lam * np.eye(len(rhs)), rhs.numpy()))


def error(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


def named(model, flat):
    shapes = {name: p.shape for name, p in model.named_parameters()}
    parts = flat.split([shape.numel() for shape in shapes.values()])
    return {name: x.reshape(shapes[name]) for name, x in zip(shapes, parts, strict=True)}


@pytest.mark.parametrize("lam", [1e-1, 1e-4])
def test_it_solves_what_a_dense_solve_does(lam):
    matrix, rhs = drawn(60, 0)
    found = conjugate_gradients(lambda v: matrix @ v, rhs, lam=lam, tol=1e-12)
    assert found.converged
    wanted = dense(matrix, lam, rhs)
    assert error(found.x, wanted) < 1e-9
    left = rhs - (matrix @ found.x + lam * found.x)
    assert found.residual == pytest.approx(float(left.norm() / rhs.norm()), rel=1e-6)
    assert len(found.history) < found.n_products <= 1000


def test_a_good_preconditioner_saves_products_and_changes_no_digit():
    matrix, rhs = drawn(80, 1)
    lam = 1e-5
    plain = conjugate_gradients(lambda v: matrix @ v, rhs, lam=lam)
    # The inverse of a matrix that is a little off, rounded to float32: not quite symmetric.
    generator = torch.Generator().manual_seed(2)
    off = 0.2 * torch.randn(80, 80, dtype=torch.float64, generator=generator)
    root = torch.linalg.cholesky(matrix + lam * torch.eye(80, dtype=torch.float64))
    near = root @ (torch.eye(80, dtype=torch.float64) + 0.1 * (off @ off.T) / 80) @ root.T
    inverse = torch.linalg.inv(near).float()
    helped = conjugate_gradients(
        lambda v: matrix @ v, rhs, lam=lam, precondition=lambda v: inverse @ v.float()
    )
    assert plain.converged
    assert helped.converged
    assert helped.n_products < 0.3 * plain.n_products
    assert error(helped.x, dense(matrix, lam, rhs)) < 1e-7


def test_what_it_cannot_reach_is_said():
    matrix, rhs = drawn(60, 3, spread=8.0)
    rounded = matrix.float()
    # Products in float32: the recurrence would say 1e-10, the matrix in use does not bear it out.
    found = conjugate_gradients(lambda v: rounded @ v.float(), rhs, lam=1e-6, tol=1e-10)
    assert not found.converged
    left = rhs - (rounded @ found.x.float()).double() - 1e-6 * found.x
    assert found.residual == pytest.approx(float(left.norm() / rhs.norm()), rel=1e-6)
    assert found.residual > 1e-10
    short = conjugate_gradients(lambda v: matrix @ v, rhs, lam=1e-8, max_products=7)
    assert not short.converged
    assert short.n_products == 7
    nothing = conjugate_gradients(lambda v: matrix @ v, 0 * rhs, lam=1e-8)
    assert nothing.converged
    assert nothing.residual == 0.0
    assert nothing.n_products == 0


def test_errors_name_what_is_wrong():
    matrix, rhs = drawn(10, 0)
    indefinite = matrix - 0.5 * torch.eye(10, dtype=torch.float64)
    for run, kind, text in (
        (lambda: conjugate_gradients(lambda v: v, rhs, lam=-1.0), CurvatureError, "lam: -1"),
        (lambda: conjugate_gradients(lambda v: v, rhs, lam=1.0, tol=0.0), CurvatureError, "tol"),
        (
            lambda: conjugate_gradients(lambda v: indefinite @ v, rhs, lam=1e-3),
            CurvatureError,
            "the operator with lam = 0.001 is not positive definite",
        ),
        (
            lambda: conjugate_gradients(
                lambda v: matrix @ v, rhs, lam=1e-3, precondition=lambda v: -v
            ),
            CurvatureError,
            "the preconditioner is not positive definite",
        ),
        (
            lambda: conjugate_gradients(lambda v: v * math.nan, rhs, lam=1.0),
            NonFiniteError,
            "product 1",
        ),
    ):
        with pytest.raises(kind, match=text):
            run()


@pytest.mark.parametrize("operator", ["empirical", "true"])
def test_the_fisher_of_a_model_against_its_explicit_matrix(case, operator):
    matrix = case.matrices[operator]
    generator = torch.Generator().manual_seed(5)
    rhs = torch.randn(len(matrix), dtype=torch.float64, generator=generator)
    lam = 1e-3 * float(torch.linalg.eigvalsh(matrix)[-1])
    engine, vector = FisherLanczos(operator=operator), named(case.model, rhs)
    found = engine.damped_inverse(case.model, case.batch, vector, lam)
    flat = torch.cat([found["solution"][name].flatten() for name in vector])
    slack = 3e-3 if case.rounds_to_float32 else 1e-8
    assert error(flat, dense(matrix, lam, rhs)) < slack
    assert found["n_params"] == len(matrix)
    assert found["residual"] <= 1e-10 or case.rounds_to_float32

    def inverse(v):
        return named(case.model, dense(matrix, lam, torch.cat([x.flatten() for x in v.values()])))

    helped = engine.damped_inverse(case.model, case.batch, vector, lam, preconditioner=inverse)
    assert helped["n_products"] < found["n_products"]
    assert helped["n_products"] <= 4 or case.rounds_to_float32


def test_a_float32_model_is_solved_in_float64_and_left_alone():
    model, batch = tiny("gpt2").float(), batch_of("gpt2")
    before = copy.deepcopy(model.state_dict())
    block = "transformer.h.0.ln_1"
    vector = {f"{block}.weight": torch.ones(6), f"{block}.bias": torch.arange(6.0)}
    engine = FisherLanczos()
    wide = engine.damped_inverse(model, batch, vector, 1e-7, block)
    assert wide["converged"]
    narrow = engine.damped_inverse(model, batch, vector, 1e-7, block, float64=False)
    assert narrow["residual"] > wide["residual"]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training
    with pytest.raises(CurvatureError, match=r"vector: transformer.h.0.ln_1.bias: none; allowed"):
        engine.damped_inverse(model, batch, {f"{block}.weight": torch.ones(6)}, 1e-3, block)
