"""Traces, norms and diagonals by random vectors, against dense matrices and loops."""

from typing import Any

import numpy as np
import pytest
import torch

from fisher_lab.curvature.errors import CurvatureError
from fisher_lab.curvature.spectra import estimates
from fisher_lab.curvature.spectra.estimates import rademacher
from fisher_lab.curvature.spectra.lanczos import FisherLanczos

CPU: dict[str, Any] = {"dtype": torch.float64, "device": torch.device("cpu")}


def drawn(n, values, seed=0):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator)).Q
    values = torch.cat([torch.as_tensor(values).double(), torch.zeros(n - len(values)).double()])
    return basis @ values.diag() @ basis.T


DECAYS = {
    "flat": torch.linspace(1, 0.5, 40, dtype=torch.float64),
    "steep": 10.0 ** -torch.linspace(0, 6, 40, dtype=torch.float64),
}


def by_loops(matrix, m, seed):
    """XTrace and XDiag as they are defined: a range and a probe for each vector left out."""
    n, generator = len(matrix), torch.Generator().manual_seed(seed)
    omega = np.stack([rademacher(n, generator).numpy() for _ in range(m)], axis=1)
    a = matrix.numpy()
    traces, diagonals = [], []
    for i in range(m):
        q, _ = np.linalg.qr(np.delete(a @ omega, i, axis=1))
        onto, w = q @ q.T, omega[:, i]
        rest = np.eye(n) - onto
        traces.append(np.trace(q.T @ a @ q) + w @ rest @ a @ rest @ w)
        diagonals.append(np.diag(onto @ a) + w * (rest @ a @ w))
    return np.mean(traces), np.mean(diagonals, axis=0)


@pytest.mark.parametrize("decay", DECAYS)
def test_xtrace_and_xdiag_are_what_their_definitions_say(decay):
    matrix = drawn(40, DECAYS[decay])
    trace, diagonal = by_loops(matrix, 8, seed=4)
    options: dict[str, Any] = {"n_products": 16, "seed": 4, **CPU}
    found = estimates.xtrace(lambda v: matrix @ v, 40, **options)
    assert found.value == pytest.approx(trace, rel=1e-9)
    assert found.n_products == 16
    entries = estimates.xdiag(lambda v: matrix @ v, 40, **options)
    np.testing.assert_allclose(entries.values.numpy(), diagonal, atol=1e-9)
    # The jackknife: the estimate of all vectors but one, each by loops of its own.
    assert found.standard_error > 0


def test_low_ranks_are_found_exactly():
    matrix = drawn(50, torch.tensor([3.0, 2.0, 1.0]))
    options: dict[str, Any] = {"n_products": 24, "seed": 0, **CPU}

    def product(v):
        return matrix @ v

    for method in (estimates.xtrace, estimates.hutch_plus_plus):
        found = method(product, 50, **options)
        assert found.value == pytest.approx(6.0, rel=1e-10)
        assert found.high - found.low < 1e-8
    norm = estimates.frobenius_norm(estimates.hutch_plus_plus(product, 50, squared=True, **options))
    assert norm.value == pytest.approx(14**0.5, rel=1e-10)
    entries = estimates.xdiag(product, 50, **options)
    np.testing.assert_allclose(entries.values.numpy(), matrix.diagonal().numpy(), atol=1e-10)
    zero = estimates.xtrace(lambda v: 0 * v, 50, **options)
    assert (zero.value, zero.standard_error) == (0.0, 0.0)
    whole = estimates.xtrace(product, 50, n_products=100, seed=0, **CPU)
    assert whole.value == pytest.approx(6.0, rel=1e-12)
    assert (whole.standard_error, whole.n_probes) == (0.0, 0)


@pytest.mark.parametrize("decay", DECAYS)
def test_intervals_of_ten_vectors_cover(decay):
    matrix = drawn(60, DECAYS[decay])
    trace, norm = float(np.trace(matrix.numpy())), float(np.linalg.norm(matrix.numpy()))

    def product(v):
        return matrix @ v

    def frobenius(seed):
        return estimates.frobenius_norm(
            estimates.hutch_plus_plus(product, 60, n_products=40, seed=seed, squared=True, **CPU)
        )

    runs = {
        "hutch++": (
            trace,
            lambda s: estimates.hutch_plus_plus(product, 60, n_products=30, seed=s, **CPU),
        ),
        "xtrace": (trace, lambda s: estimates.xtrace(product, 60, n_products=20, seed=s, **CPU)),
        "frobenius": (norm, frobenius),
    }
    for name, (exact, run) in runs.items():
        found = [run(seed) for seed in range(100)]
        covered = sum(one.low <= exact <= one.high for one in found) / 100
        assert covered >= 0.92, (name, covered)


@pytest.mark.parametrize(
    ("method", "products"), [(estimates.xdiag, 20), (estimates.hutchinson_diagonal, 20)]
)
def test_standard_errors_of_a_diagonal_are_honest(method, products):
    for decay in DECAYS.values():
        matrix = drawn(60, decay)
        exact = matrix.diagonal()
        ratios, squares, errors = [], [], []
        for seed in range(40):
            found = method(lambda v, m=matrix: m @ v, 60, n_products=products, seed=seed, **CPU)
            off = found.values - exact
            ratios.append(((off / found.standard_errors).abs() < 3).double().mean())
            squares.append(off.square().mean())
            errors.append(found.standard_errors.square().mean())
        assert float(torch.stack(ratios).mean()) > 0.95
        # The jackknife is never too small; where eigenvalues fall steeply it is too large.
        assert 0.8 < float(torch.stack(errors).mean() / torch.stack(squares).mean()) < 12


@pytest.mark.parametrize("case", ["gpt2"], indirect=True)
def test_estimates_of_a_model_against_its_explicit_matrix(case):
    matrix = case.matrices["empirical"].numpy()
    engine, batch = FisherLanczos(k=3, say=lambda line: None), case.batch
    # The rank is 7: twelve vectors and more find everything.
    trace = engine.trace(case.model, batch, method="xtrace", n_products=24)
    assert trace.value == pytest.approx(np.trace(matrix), rel=1e-8)
    norm = engine.frobenius_norm(case.model, batch, n_products=48)
    assert norm.value == pytest.approx(np.linalg.norm(matrix), rel=1e-8)
    entries = engine.diagonal(case.model, batch, n_products=24)
    flat = torch.cat([x.flatten() for x in entries["diagonal"].values()])
    np.testing.assert_allclose(flat.numpy(), np.diag(matrix), atol=1e-9 * np.abs(matrix).max())
    assert entries["standard_errors"].keys() == entries["diagonal"].keys()
    rough = engine.diagonal(case.model, batch, method="hutchinson", n_products=10)
    flat = torch.cat([x.flatten() for x in rough["diagonal"].values()]).numpy()
    errors = torch.cat([x.flatten() for x in rough["standard_errors"].values()]).numpy()
    assert np.mean(np.abs(flat - np.diag(matrix)) <= 4 * errors + 1e-12) > 0.9
    lam = 1e-3
    found = engine.log_determinant(case.model, batch, lam)
    sign, exact = np.linalg.slogdet(matrix + lam * np.eye(len(matrix)))
    assert sign == 1
    assert found.value == pytest.approx(exact, rel=1e-9)
    for run in (
        lambda: engine.diagonal(case.model, batch, method="exact"),
        lambda: engine.diagonal(case.model, batch, n_products=5),
        lambda: engine.frobenius_norm(case.model, batch, n_products=7),
        lambda: engine.trace(case.model, batch, method="xtrace", n_products=5),
    ):
        with pytest.raises(
            CurvatureError, match=r"method: 'exact'|n_products: [57]; allowed: [68]"
        ):
            run()
