"""Digits: the base term where nothing has it, columns of expectations, and results without any."""

# pyright: reportCallIssue=false, reportAttributeAccessIssue=false

import pytest
import torch
from torch import nn

from fisher_lab.curvature.kfac.factors import Columns, WoodburyFactor
from fisher_lab.curvature.kfac.factors.woodbury import lossless_columns
from fisher_lab.curvature.kfac.numerics import Numerics
from fisher_lab.curvature.losses import CrossEntropy
from tests import models, reference
from tests.capturing import engine, inputs_of, own_collect, random_like
from tests.reference import Damping

DOUBLE = torch.float64


def spanning(tokens: int, out: int, low: float) -> torch.Tensor:
    """Token columns that span all outputs; eigenvalues of `g^T g / T` from `low` to 1."""
    generator = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(tokens, out, generator=generator, dtype=DOUBLE))
    v, _ = torch.linalg.qr(torch.randn(out, out, generator=generator, dtype=DOUBLE))
    s = torch.logspace(0, torch.tensor(low).log10().item(), out, dtype=DOUBLE)
    return q * (s * tokens).sqrt() @ v.T


@pytest.mark.parametrize("power", [-2, -1, -0.5, 0.5, 1])
@pytest.mark.parametrize("tokens", [5, 9])
def test_columns_that_span_all_outputs_lose_no_digit_to_a_base(power, tokens):
    """`p = -2` at 1e-8: `base^p` is 1e16, of which nothing may be left."""
    g, lam = spanning(tokens, 5, 1e-1), 1e-8
    numerics = Numerics(DOUBLE, DOUBLE, 1e-6)
    factor = WoodburyFactor(Columns(g, 1.0, g.device), 1.0 / tokens, DOUBLE)
    y = torch.randn(5, 3, dtype=DOUBLE)
    found = factor.damped(lam, None, numerics).power(y, power)
    expected = reference.power(g.T @ g / tokens, power, lam, None) @ y
    assert reference.relative(found, expected) < 1e-12


def test_a_null_space_has_the_base_still():
    g, lam = spanning(9, 5, 1e-1), 1e-3
    g = nn.functional.pad(g, (0, 2))  # two outputs without a gradient
    factor = WoodburyFactor(Columns(g, 1.0, g.device), 1.0 / 9, DOUBLE)
    y = torch.randn(7, 3, dtype=DOUBLE)
    for power in (-2, -1, 0.5):
        found = factor.damped(lam, None, Numerics(DOUBLE, DOUBLE, 1e-6)).power(y, power)
        expected = reference.power(g.T @ g / 9, power, lam, None) @ y
        assert reference.relative(found, expected) < 1e-11


def test_columns_of_an_expectation_are_put_together_as_they_come():
    """A pass for each position and class: never more columns than outputs, and the same G."""
    model, batch = models.seeded(models.MLP, DOUBLE), models.rows_batch(6, seed=3)
    labels = batch["labels"]
    kfac = engine("all", Damping(1e-3, 1e-3, None), fisher="true", track_diagonal=False)
    kfac.collect_kfac_factors(model, batch, loss=CrossEntropy())
    columns = kfac.kfac_factors["first"]["columns"]
    assert columns <= 9 < 4 * len(labels)
    assert kfac.kfac_factors["first"]["reduction"] == "lossless"
    hidden = model.first(batch["x"]).detach().requires_grad_()
    p = torch.softmax(model.second(torch.tanh(hidden)), -1)
    J = model.second.weight.detach()[None] * (1 - torch.tanh(hidden.detach()) ** 2)[:, None, :]
    H = torch.diag_embed(p.detach()) - p.detach()[:, :, None] * p.detach()[:, None, :]
    G = (J.mT @ H @ J).mean(0)
    assert reference.relative(kfac.kfac_factors["first"].G.to_dense(), G) < 1e-12


def test_the_exact_scale_takes_the_diagonal_of_uncovered_parameters_along():
    """All of it belongs to the mean loss: `T/N` in front of the diagonal too."""
    case = models.CASES["gpt2_untied"]
    model, batch = case.model(DOUBLE), case.batch("many")
    lam, results = 1e-9, {}
    for scale in ("natural", "exact"):
        kfac = engine(
            "all", Damping(lam, lam, None), uncovered="diagonal", norm_layers=False,
            fisher_scale=scale,
        )  # fmt: skip
        kfac.collect_kfac_factors(model, batch)
        given = random_like({n: p for n, p in model.named_parameters() if "ln_f" in n}, 3)
        results[scale] = kfac.compute_natural_gradient(given, model)
    assert list(results["exact"]) == ["transformer.ln_f.weight", "transformer.ln_f.bias"]
    squares = {n: torch.zeros_like(v) for n, v in given.items()}
    named, labels = dict(model.named_parameters()), 0
    for one in models.one_by_one(batch):
        loss, count = reference.summed_loss(model, model(**inputs_of(one)).logits, one)
        labels += count
        for n, g in zip(given, torch.autograd.grad(loss, [named[n] for n in given]), strict=True):
            squares[n] += g**2
    for n, y in given.items():  # the Fisher matrix of the mean loss, `sum / N`
        assert reference.relative(results["exact"][n], y / (squares[n] / labels)) < 1e-4
        assert reference.relative(results["natural"][n], results["exact"][n]) > 0.1


@pytest.mark.parametrize("ekfac", [False, True])
def test_residuals_say_how_well_the_systems_are_solved(ekfac):
    case = models.CASES["gpt2_untied"]
    model, batch = case.model(DOUBLE), case.batch("few")
    damping = Damping(1e-3, 1e-2, 50.0)
    kfac = engine("all", damping, track_diagonal=False, ekfac=ekfac, fisher_scale="exact")
    labels = int((reference.counting_labels(model, batch) != -100).sum())
    truth = own_collect(kfac, model, [batch], labels=labels)
    given = truth.own_gradient(labels)
    natural = kfac.compute_natural_gradient(given, model)
    found = kfac.residuals(given, natural, model)
    assert set(found) == set(kfac.kfac_factors)
    assert max(found.values()) < 1e-9
    # A wrong answer is not taken for a right one: 1 % too long, or in one layer 1 % too short.
    longer = {n: 1.01 * x for n, x in natural.items()}
    assert all(abs(r - 0.01) < 1e-9 for r in kfac.residuals(given, longer, model).values())
    assert "lm_head" in kfac.residuals({"lm_head.weight": given["lm_head.weight"]}, natural, model)


def test_a_result_without_a_digit_says_so(caplog):
    """Singular values over many decades, no floor, a damping under the rounding of the largest."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, bias=False)).double()
    x = torch.randn(7, 6, dtype=DOUBLE) * torch.logspace(0, -9, 6, dtype=DOUBLE)
    labels = torch.randint(5, (7,))
    for lam, worst in ((1e-2, 1e-10), (1e-17, None)):
        kfac = engine("small_only", Damping(lam, lam, None), track_diagonal=False)
        caplog.clear()
        kfac.collect_kfac_factors(model, (x, labels), CrossEntropy())
        y = {"0.weight": torch.randn(5, 6, dtype=DOUBLE)}
        found = kfac.residuals(y, kfac.compute_natural_gradient(y, model), model)
        assert found["0"] < worst if worst else found["0"] > 1e-2
        assert ("layer 0: the natural gradient solves its system to" in caplog.text) != bool(worst)


def test_eigenvalues_far_above_rounding_are_kept_on_large_sides():
    """``n eps`` is 2.4e-4 at 2048 in float32, where a solver's error is 2e-6 of the largest."""
    values = torch.full((2048,), 1e-4)
    values[-1] = 1.0
    columns = lossless_columns(values, torch.eye(2048))
    assert columns.shape == (2048, 2048)
    assert torch.equal(columns.diagonal(), values.sqrt())
    values[0] = 1e-6  # under 10 n^(1/2) eps
    assert len(lossless_columns(values, torch.eye(2048))) == 2047
