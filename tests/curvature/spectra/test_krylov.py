"""Lanczos, quadrature and Hutch++ on explicit symmetric matrices."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fisher_lab.curvature.linalg import KrylovBasis
from fisher_lab.curvature.spectra.estimates import hutch_plus_plus
from fisher_lab.curvature.spectra.lanczos import lanczos_algorithm
from fisher_lab.curvature.spectra.quadrature import Probing, quadrature

CPU = {"dtype": torch.float64, "device": torch.device("cpu")}


def symmetric(n, seed, decay=0.7):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator)).Q
    values = decay ** torch.arange(n, dtype=torch.float64)
    return basis @ torch.diag(values) @ basis.T, values


@given(n=st.integers(1, 60), k=st.integers(1, 8), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_any_operator_any_size(n, k, seed):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(n, n, dtype=torch.float64, generator=generator)
    matrix = matrix + matrix.T
    found = lanczos_algorithm(lambda v: matrix @ v, n, k, tol=1e-9, seed=seed)
    wanted = torch.linalg.eigvalsh(matrix).flip(0)[: min(k, n)]
    assert all(found.converged)
    torch.testing.assert_close(found.eigenvalues, wanted, atol=1e-7, rtol=1e-7)


def test_restarts_keep_to_the_memory_and_converge():
    # Evenly spaced eigenvalues: hard, and far more Lanczos steps than the basis holds.
    n, k, m = 400, 4, 12
    values = torch.linspace(0, 1, n, dtype=torch.float64)
    found = lanczos_algorithm(
        lambda v: values * v, n, k, max_vectors=m, max_products=4000, tol=1e-8, eigenvectors=True
    )
    assert found.n_restarts > 3
    assert found.n_vectors == m
    assert found.memory_bytes == m * n * 8
    assert all(found.converged)
    torch.testing.assert_close(found.eigenvalues, values.flip(0)[:k], atol=1e-10, rtol=0)
    assert found.eigenvectors is not None
    residual = (found.eigenvectors * values - found.eigenvalues[:, None] * found.eigenvectors).norm(
        dim=1
    )
    torch.testing.assert_close(residual, found.residuals, atol=1e-9, rtol=0)


def test_what_has_not_converged_says_so():
    values = torch.linspace(0, 1, 400, dtype=torch.float64)
    found = lanczos_algorithm(lambda v: values * v, 400, 4, max_vectors=10, max_products=12)
    assert not all(found.converged)
    assert found.n_products <= 12


def test_low_rank_and_repeated_eigenvalues():
    n = 50
    rank_two = torch.zeros(n, dtype=torch.float64)
    rank_two[:2] = torch.tensor([3.0, 1.0])
    found = lanczos_algorithm(lambda v: rank_two * v, n, 5)
    torch.testing.assert_close(
        found.eigenvalues, torch.tensor([3.0, 1.0, 0, 0, 0]).double(), atol=1e-12, rtol=0
    )
    assert found.n_products < 15
    twice = torch.cat([torch.ones(2), torch.zeros(n - 2)]).double()
    found = lanczos_algorithm(lambda v: twice * v, n, 3)
    torch.testing.assert_close(
        found.eigenvalues, torch.tensor([1.0, 1.0, 0.0]).double(), atol=1e-12, rtol=0
    )
    zero = lanczos_algorithm(lambda v: 0 * v, 7, 2)
    assert zero.eigenvalues.tolist() == [0.0, 0.0]


def test_reorthogonalisation_is_what_keeps_ghosts_away():
    matrix, values = symmetric(200, 0)
    run = {"max_vectors": 120, "tol": 1e-15, "max_products": 120}
    full = lanczos_algorithm(lambda v: matrix @ v, 200, 5, **run)
    torch.testing.assert_close(full.eigenvalues, values[:5], atol=1e-12, rtol=0)
    # Without it the Ritz values hold copies of the largest eigenvalues ...
    generator = torch.Generator().manual_seed(0)
    basis = KrylovBasis(
        lambda v: matrix @ v, 200, 120, generator=generator, reorthogonalize=False, **CPU
    )
    basis.start(torch.randn(200, generator=generator, dtype=torch.float64))
    while basis.size < 120:
        basis.grow()
    ritz = basis.ritz()[0].flip(0)
    assert float((ritz[:2] - values[0]).abs().max()) < 1e-8
    # ... which the algorithm leaves out.
    plain = lanczos_algorithm(lambda v: matrix @ v, 200, 5, reorthogonalize=False, **run)
    torch.testing.assert_close(plain.eigenvalues, values[:5], atol=1e-10, rtol=0)


def test_eigenvalues_that_lie_close_are_no_copies():
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(60, dtype=torch.float64, generator=generator)
    values[:4] = torch.tensor([2.0, 2.0 - 1e-4, 1.5, 1.5 - 1e-5])
    found = lanczos_algorithm(
        lambda v: values * v, 60, 4, reorthogonalize=False, max_vectors=60, tol=1e-9
    )
    wanted = values.sort(descending=True).values[:4]
    torch.testing.assert_close(found.eigenvalues, wanted, atol=1e-10, rtol=0)


def test_float32_vectors():
    matrix, values = symmetric(80, 1)
    matrix = matrix.float()
    found = lanczos_algorithm(lambda v: matrix @ v, 80, 5, dtype=torch.float32, tol=1e-5)
    torch.testing.assert_close(found.eigenvalues, values[:5], atol=1e-5, rtol=0)
    assert found.memory_bytes == found.n_vectors * 80 * 4


def test_standard_errors_are_honest():
    """Of 80 seeds, about two thirds lie within one standard error and nearly all within three."""
    matrix, values = symmetric(40, 2, decay=0.93)
    exact = float(values.sum())
    lam = 0.1
    dimension = float((values / (values + lam)).sum())
    vectors = torch.linalg.eigh(matrix).eigenvectors.flip(1)[:, :5].T.contiguous()

    def ratios(run, wanted):
        found = [run(seed) for seed in range(80)]
        return torch.tensor([abs(f.value - wanted) / f.standard_error for f in found])

    def product(v):
        return matrix @ v

    runs = [
        (
            lambda s: quadrature(
                product, 40, Probing(8, 1), seed=s, **CPU
            ).trace_of(lambda x: x),
            exact,
        ),
        (lambda s: hutch_plus_plus(product, 40, n_products=24, seed=s, **CPU), exact),
        (
            lambda s: quadrature(
                product, 40, Probing(8, 15), seed=s, deflate=vectors, **CPU
            ).with_known(values[:5]).trace_of(lambda x: x / (x + lam)),
            dimension,
        ),
    ]  # fmt: skip
    for run, wanted in runs:
        found = ratios(run, wanted)
        assert 0.5 < float((found < 1).double().mean()) < 0.9
        assert float((found < 3).double().mean()) > 0.92


def test_hutch_plus_plus_is_exact_on_its_range_and_better_than_probes():
    matrix, values = symmetric(60, 4, decay=0.6)
    exact = float(values.sum())
    low_rank = values.clone()
    low_rank[5:] = 0
    found = hutch_plus_plus(lambda v: low_rank * v, 60, n_products=24, seed=0, **CPU)
    assert found.value == pytest.approx(float(low_rank.sum()), rel=1e-12)
    hutch = hutch_plus_plus(lambda v: matrix @ v, 60, n_products=30, seed=0, **CPU)
    plain = quadrature(lambda v: matrix @ v, 60, Probing(30, 1), seed=0, **CPU)
    assert hutch.standard_error < 0.1 * plain.trace_of(lambda x: x).standard_error
    whole = hutch_plus_plus(lambda v: matrix @ v, 60, n_products=180, seed=0, **CPU)
    assert whole.value == pytest.approx(exact, rel=1e-12)
    assert whole.standard_error == 0.0


def test_one_probe_states_no_error():
    found = quadrature(lambda v: v, 4, Probing(1, 1), seed=0, **CPU).trace_of(lambda x: x)
    assert found.value == pytest.approx(4.0)
    assert math.isnan(found.standard_error)
