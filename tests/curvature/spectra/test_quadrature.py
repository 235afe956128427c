"""Brackets, intervals and what is zero, against dense computations."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fisher_lab.curvature.evaluation_mode import isolated
from fisher_lab.curvature.losses import CrossEntropy
from fisher_lab.curvature.spectra import matrix_free
from fisher_lab.curvature.spectra.blocks import select_parameters
from fisher_lab.curvature.spectra.estimates import SignSpread, estimate, rademacher
from fisher_lab.curvature.spectra.lanczos import FisherLanczos
from fisher_lab.curvature.spectra.operators import CurvatureOperator, RowOperator
from fisher_lab.curvature.spectra.quadrature import (
    Closing,
    Probing,
    ProductsExceeded,
    damped_share,
    log_share,
    quadrature,
)
from tests.curvature.spectra.reference import through

CPU: dict[str, Any] = {"dtype": torch.float64, "device": torch.device("cpu")}


def drawn(n, values, seed=0):
    """A matrix ``[n, n]`` with these eigenvalues and zeros beside them."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(n, len(values), dtype=torch.float64, generator=generator)
    basis = torch.linalg.qr(basis).Q
    return basis @ torch.as_tensor(values).diag() @ basis.T


def applied(function, matrix):
    """``f`` of a symmetric matrix by numpy's decomposition."""
    values, vectors = np.linalg.eigh(matrix.numpy())
    return torch.from_numpy((vectors * function(values.clip(min=0))) @ vectors.T)


LAM = 1e-2
FUNCTIONS = {
    "dimension": (partial(damped_share, lam=LAM), lambda x: x / (x + LAM)),
    "log-determinant": (partial(log_share, lam=LAM), lambda x: np.log((x + LAM) / LAM)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("steps", [1, 2, 5, 12, 40])
@pytest.mark.parametrize("rank", [40, 12])
def test_gauss_is_above_and_radau_is_below(name, steps, rank):
    """Probe by probe, whatever the number of steps; both are the integral in the end."""
    ours, numpys = FUNCTIONS[name]
    matrix = drawn(40, torch.logspace(1, -5, rank, dtype=torch.float64))
    exact = applied(numpys, matrix)
    for seed in range(6):
        rule = quadrature(lambda v: matrix @ v, 40, Probing(1, steps), seed=seed, **CPU)
        probe = rademacher(40, torch.Generator().manual_seed(seed))
        truth = float(probe @ exact @ probe)
        high, low = (
            40 * one.of(lambda x: ours(x.clamp(min=0))) for one in (*rule.gauss, *rule.radau)
        )
        assert low - 1e-6 * truth <= truth <= high + 1e-9 * truth
        if steps > rank:
            assert high == pytest.approx(low, rel=1e-6)
        elif steps <= 2:
            assert high > 1.1 * truth  # Gauss alone would be far off


def test_steps_are_added_until_the_bracket_closes():
    values = torch.logspace(1, -4, 60, dtype=torch.float64)
    matrix = drawn(60, values)
    share = partial(damped_share, lam=LAM)
    closing = Closing.of(share, values[:0], 1e-3)
    options: dict[str, Any] = {"seed": 0, "closing": closing, **CPU}
    short = quadrature(lambda v: matrix @ v, 60, Probing(4, 3, 3), **options)
    assert not short.bracket_of(share, floor=0.0).closed(1e-3)
    rule = quadrature(lambda v: matrix @ v, 60, Probing(4, 3, 60), **options)
    found = rule.bracket_of(share, floor=0.0)
    assert found.closed(1e-3)
    assert 3 < max(rule.steps) < 60
    assert found.low <= float(np.sum(values.numpy() / (values.numpy() + LAM))) <= found.high
    with pytest.raises(ProductsExceeded, match="more than 60 products"):
        quadrature(lambda v: matrix @ v, 60, Probing(10, 3, 60), max_products=60, **options)


def test_no_dimension_is_above_the_rank():
    """In the space of parameters, after few steps, Gauss alone is; the interval knows better."""
    matrix = drawn(300, torch.full((12,), 1.0, dtype=torch.float64))
    matrix += drawn(300, 1e-3 * torch.ones(3, dtype=torch.float64), 1)
    share = partial(damped_share, lam=1e-4)
    rule = quadrature(lambda v: matrix @ v, 300, Probing(10, 1), seed=0, **CPU)
    assert rule.trace_of(share).value > 250
    found = rule.bracket_of(share, floor=0.0, limit=15)
    assert found.high == 15
    assert found.low <= float(applied(lambda x: x / (x + 1e-4), matrix).trace())


def test_the_spread_of_signs_follows_from_their_products():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(7, 7, dtype=torch.float64, generator=generator)
    matrix = matrix + matrix.T
    every = torch.tensor(np.array(np.meshgrid(*[[-1.0, 1.0]] * 7)).reshape(7, -1).T)
    variance = float(((every @ matrix) * every).sum(1).var(correction=0))
    found = []
    for seed in range(400):
        generator.manual_seed(seed)
        spread = SignSpread(7, torch.device("cpu"))
        for _ in range(5):
            probe = rademacher(7, generator)
            spread.add(probe, matrix @ probe)
        found.append(5 * spread.error() ** 2)
    assert float(np.mean(found)) == pytest.approx(variance, rel=0.05)


@pytest.mark.parametrize("steps", [1, 4])
def test_intervals_cover_where_one_eigenvalue_outweighs_the_others(steps):
    """The values of the probes are skewed; Student's t over them alone covers 0.88."""
    matrix = drawn(40, torch.tensor([10.0, *[0.01] * 39], dtype=torch.float64))
    exact, alone, found = float(np.trace(matrix.numpy())), 0, 0
    for seed in range(150):
        rule = quadrature(lambda v: matrix @ v, 40, Probing(10, steps), seed=seed, **CPU)
        one = rule.trace()
        found += one.low <= exact <= one.high
        plain = estimate([40 * each.of(lambda x: x) for each in rule.gauss], 0, seed)
        alone += plain.low <= exact <= plain.high
    assert found / 150 >= 0.92 > alone / 150


def embedded(n_tokens, width=3, seed=0):
    """A model of many parameters whose products are cheap: a table and a small head."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Embedding(n_tokens, width), nn.Linear(width, 4))
    inputs = torch.randint(0, n_tokens, (12,))
    return model, (inputs, torch.randint(0, 4, (12,)))


def test_nothing_is_zero_because_there_are_many_parameters():
    """Nine million float32 parameters: ``n eps`` of the largest is above the largest."""
    model, batch = embedded(3_000_000)
    table, weight, bias = (p.detach().double() for p in model.parameters())
    rows = []
    for x, y in zip(*batch, strict=True):
        p = torch.softmax(table[x] @ weight.T + bias, -1) - torch.nn.functional.one_hot(y, 4)
        rows.append((x, p @ weight, p, table[x]))
    gram = torch.tensor(
        [
            [float((x == u) * (a @ b) + (p @ q) * (h @ k + 1)) for u, b, q, k in rows]
            for x, a, p, h in rows
        ]
    ).double()
    truth = np.linalg.eigvalsh(gram.numpy() / 12)
    engine = FisherLanczos(k=1, max_vectors=3, loss_fn=CrossEntropy(), say=lambda line: None)
    found = engine.spectral_density(model, batch, n_probes=10, steps=2, log=True)
    n = found["n_params"]
    assert n > 2**23
    nonzero = n * (1 - found["mass_at_zero"])
    assert nonzero == pytest.approx(int((truth > found["zero_floor"]).sum()), abs=1e-3)
    assert nonzero == pytest.approx(12, abs=1e-3)
    assert max(found["density"]) > 0
    assert found["trace"]["value"] == pytest.approx(float(truth.sum()), rel=1e-5)


def test_the_rounding_of_the_products_counts_beside_that_of_the_vectors():
    model, batch = embedded(50)
    engine = FisherLanczos(
        operator="hessian", vector_dtype="float64", loss_fn=CrossEntropy(), say=lambda line: None
    )
    found = engine.spectral_density(model, batch, n_probes=3, steps=6)
    largest = max(abs(x) for nodes in found["nodes"] for x in nodes)
    assert found["zero_floor"] >= 10 * 6 * 2.0**-23 * largest


@pytest.mark.parametrize("case", ["gpt2"], indirect=True)
@pytest.mark.parametrize("operator", ["empirical", "true"])
def test_the_matrix_of_the_samples_has_the_same_eigenvalues(case, operator):
    wanted = np.linalg.eigvalsh(case.matrices[operator].numpy())[::-1]
    with isolated(case.model, seed=0):
        matrix = CurvatureOperator(
            operator, case.model, case.batch, select_parameters(case.model, None)
        )
        rows = RowOperator(matrix)
        formed = torch.stack([rows(row) for row in torch.eye(rows.n, dtype=torch.float64)])
        vector = torch.randn(matrix.n, dtype=torch.float64)
        image = rows.images(vector[None])[0]
    torch.testing.assert_close(formed, formed.T)
    values = np.linalg.eigvalsh(formed.numpy())[::-1]
    k = int((wanted > 1e-10 * wanted[0]).sum())
    np.testing.assert_allclose(values[:k], wanted[:k], atol=1e-10 * wanted[0])
    assert k <= matrix.rank <= rows.n == len(values)
    assert matrix.rank == (7 if operator == "empirical" else 7 * 12)
    assert float(image @ image) == pytest.approx(
        float(vector @ case.matrices[operator] @ vector), rel=1e-10
    )


@pytest.mark.parametrize("case", ["gpt2"], indirect=True)
def test_the_record_says_what_is_left_open(case, monkeypatch):
    values = np.linalg.eigvalsh(case.matrices["true"].numpy()).clip(min=0)
    lam = 1e-3 * values[-1]
    exact = float(np.sum(values / (values + lam)))
    engine = FisherLanczos(k=3, operator="true", say=lambda line: None)
    formed = engine.analyze(case.model, case.batch, lam=lam)
    assert formed["effective_dimension"]["exact"]
    assert formed["effective_dimension"]["space"] == "samples"
    assert formed["effective_dimension"]["value"] == pytest.approx(exact, rel=1e-9)
    assert formed["density"]["standard_error"] == [0.0] * 256
    monkeypatch.setattr(matrix_free, "MOST_ROWS", 0)
    options: dict[str, Any] = {"lam": lam, "n_probes": 10, "steps": 2}
    open_, closed = (
        engine.analyze(case.model, case.batch, max_steps=steps, **options)["effective_dimension"]
        for steps in (2, None)
    )
    assert not open_["closed"]
    assert closed["closed"]
    assert open_["steps"] == 2 < closed["steps"]
    for one in (open_, closed):
        assert one["low"] <= one["bracket_low"] <= exact <= one["high"] <= one["rank_bound"] == 84
    assert closed["high"] - closed["low"] < 0.5 * (open_["high"] - open_["low"])


def test_a_product_that_is_zero_by_a_lost_derivative_is_noticed():
    """All of J v is lost where the block lies below the operation; no product may be zero."""

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # pyright: ignore[reportIncompatibleMethodOverride]
            ctx.save_for_backward(x)
            ctx.save_for_forward(x)
            return x * x

        @staticmethod
        def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
            (x,) = ctx.saved_tensors
            return (2 * x * grad).detach()

        @staticmethod
        def jvp(ctx, tangent):  # pyright: ignore[reportIncompatibleMethodOverride]
            (x,) = ctx.saved_for_forward
            return 2 * x * tangent

    model = through(Square)
    inputs, labels = torch.randn(5, 3).double(), torch.tensor([0, 1, 2, 3, 1])
    rows = []
    for x, y in zip(inputs, labels, strict=True):
        loss = -torch.log_softmax(model(x), -1)[y]
        below = [p for name, p in model.named_parameters() if name.startswith("inner.")]
        grads = torch.autograd.grad(loss, below)
        rows.append(torch.cat([g.flatten() for g in grads]))
    wanted = np.linalg.eigvalsh((torch.stack(rows).T @ torch.stack(rows) / 5).numpy())[::-1]
    engine = FisherLanczos(k=3, loss_fn=CrossEntropy(), say=lambda line: None)
    found = engine.top_eigenpairs(model, (inputs, labels), "inner")
    assert found["products"] == "forward"
    assert found["eigenvalues"] == pytest.approx(wanted[:3].tolist(), rel=1e-8)
