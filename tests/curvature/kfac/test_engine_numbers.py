"""What the engine derives from its factors, and what it stands: against dense float64."""

import logging
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from fisher_lab.curvature.kfac.factors import base, woodbury
from fisher_lab.curvature.kfac.inverses import Inverses
from tests import models, reference
from tests.capturing import Captured, captured, engine, inputs_of, random_like
from tests.models import CASES
from tests.reference import Damping


def dense_logdet(matrix: torch.Tensor, lam: float, kappa: float | None) -> float:
    used, _ = reference.used_eigenvalues(torch.linalg.eigvalsh(matrix), lam, kappa)
    return float(used.log().sum())


@pytest.mark.parametrize("kappa", [None, 50.0])
def test_log_determinant(policy, tokens, kappa):
    damping = Damping(1e-3, 1e-2, kappa)
    one = captured("gpt2_untied", tokens, policy, damping)
    found = one.kfac.log_determinant()
    checked = 0
    for factors, layer_tokens in one.truth.weight_factors().values():
        if layer_tokens.name not in found:
            continue
        n_a, n_g = len(factors.A), len(factors.G)
        expected = n_g * dense_logdet(factors.A, damping.A, kappa)
        expected += n_a * dense_logdet(factors.G, damping.G, kappa)
        expected += n_a * n_g * math.log(factors.tokens / one.labels)
        assert found[layer_tokens.name] == pytest.approx(expected, rel=1e-8), layer_tokens.name
        checked += 1
    assert checked >= 5


def test_the_tokens_for_each_label_are_not_rounded():
    """``log(T/N)`` of 512 tokens and 508 labels, in float64, in every element of a layer."""
    one = captured("gpt2_untied", "many", "auto", Damping(1e-3, 1e-2, None))
    inverses = one.kfac._inverses
    factors, a = next((f, f.A) for f in one.kfac.kfac_factors.values() if f.A is not None)
    elements = factors.G.dim * a.dim
    found = [
        inverses.block(replace(factors, tokens=tokens, n_labels=labels)).logdet()
        for tokens, labels in ((512, 508), (512, 512))
    ]
    exact = elements * (math.log(512) - math.log(508))
    assert found[0] - found[1] == pytest.approx(exact, rel=1e-9)


def test_uncovered_parameters_by_their_diagonal():
    """`(1/T) sum over sequences of squared gradients`, plus damping of G, for what remains."""
    case = CASES["gpt2_untied"]
    model, batch = case.model(torch.float64), case.batch("many")
    lam = 1e-2
    kfac = engine("all", Damping(1e-3, lam, None), uncovered="diagonal", norm_layers=False)
    kfac.collect_kfac_factors(model, batch)
    parameters = {n: p for n, p in model.named_parameters() if "ln_" in n}
    squares = {n: torch.zeros_like(p) for n, p in parameters.items()}
    for one in models.one_by_one(batch):
        loss, _ = reference.summed_loss(model, model(**inputs_of(one)).logits, one)
        grads = torch.autograd.grad(loss, list(parameters.values()))
        for n, g in zip(parameters, grads, strict=True):
            squares[n] += g**2
    tokens = int(batch["attention_mask"].sum())
    given = random_like(parameters, 3)
    result = kfac.compute_natural_gradient(given, model)
    assert parameters
    for n in parameters:
        expected = given[n] / (squares[n] / tokens + lam)
        torch.testing.assert_close(result[n], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_storage_error_is_estimated_and_warned_about(dtype, caplog):
    """Eight probes against the whole of it: within a factor of two, and the warning follows."""
    lam = 1e-4
    more = {"dtype": torch.float32, "woodbury_dtype": dtype, "norm_layers": False}
    with caplog.at_level("WARNING"):
        one = captured("gpt2_untied", "few", "all", Damping(lam, lam, None), **more)
    checked = 0
    for factors, tokens in one.truth.weight_factors().values():
        given = one.kfac.kfac_factors[tokens.name]
        if given.storage_error is None:
            continue
        g, t = tokens.g[0], tokens.count
        columns: Any = given.G
        rounded = columns.columns.data.double() * columns.columns.scale
        a = tokens.a
        eye = lam * torch.eye(g.shape[1], dtype=torch.float64)
        exact = torch.linalg.solve(factors.G + eye, g.T @ a)
        stored = torch.linalg.solve(rounded.T @ rounded / t + eye, g.T @ a)
        expected = float((stored - exact).norm() / exact.norm())
        assert expected / 2 < given.storage_error < 2 * expected, tokens.name
        warned = any(f"layer {tokens.name}:" in r.getMessage() for r in caplog.records)
        assert warned == (given.storage_error > 1e-2), tokens.name
        checked += 1
    assert checked >= 5


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, dict]:
    """GPT-2 after some steps on one batch: eigenvalues over many orders of magnitude."""
    case = CASES["gpt2_untied"]
    model, batch = case.model(torch.float32), case.batch("many")
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss, labels = reference.summed_loss(model, model(**inputs_of(batch)).logits, batch)
        optimiser.zero_grad()
        (loss / labels).backward()
        optimiser.step()
    model.zero_grad(set_to_none=True)
    return model, batch


@pytest.mark.parametrize("core", ["float32", "float64"])
@pytest.mark.parametrize("kappa", [None, 1e6])
def test_any_damping_gives_finite_numbers(policy, kappa, core, trained):
    model, batch = trained
    for exponent in range(-10, 1):
        lam = 10.0**exponent
        dtypes = {"core_dtype": core, "apply_dtype": core}
        kfac = engine(policy, Damping(lam, lam, kappa), track_diagonal=False, **dtypes)
        kfac.collect_kfac_factors(model, batch, keep_gradient=True)
        for name, value in kfac.compute_natural_gradient(None, model).items():
            assert bool(torch.isfinite(value).all()), (lam, name)
        assert all(math.isfinite(x) for x in kfac.log_determinant().values()), lam


def test_a_trained_model_at_damping_1e_8(policy, trained):
    """kappa null: within 1e-5 of dense float64 (float64 core over float32 token gradients)."""
    model, batch = trained
    damping = Damping(1e-8, 1e-8, None)
    one = Captured(model, batch, policy, damping, keep_gradient=True, norm_layers=False)
    own = one.truth.own_gradient(one.labels, unrounded=True)
    reference.assert_close(one.natural(None), one.truth.natural_gradient(own, damping), 1e-5)


def test_each_refresh_is_logged_once_and_nothing_is_computed_for_it(caplog, monkeypatch):
    """One line a layer, whether the inverses are prepared first or made by the application."""
    case = CASES["gpt2_untied"]
    model, batch = case.model(torch.float32), case.batch("few")
    kfac = engine("all", Damping(1e-3, 1e-3, 1e6))
    asked, report = [], Inverses.report

    def spied(inverses, name, **kwargs):
        asked.append(name)
        return report(inverses, name, **kwargs)

    monkeypatch.setattr(Inverses, "report", spied)
    kfac.collect_kfac_factors(model, batch, keep_gradient=True)
    kfac.compute_natural_gradient(None, model)
    assert asked == []
    for module in (base, woodbury):
        monkeypatch.setattr(module, "largest_eigenvalue", lambda *_: pytest.fail("by Lanczos"))
    with caplog.at_level(logging.INFO, "fisher_lab.curvature.kfac.engine"):
        for prepare in (False, True):
            caplog.clear()
            kfac.collect_kfac_factors(model, batch, keep_gradient=True)
            if prepare:
                kfac.prepare_inverses()
            for _ in range(2):
                kfac.compute_natural_gradient(None, model)
            logged = [r.getMessage().split(":")[0] for r in caplog.records]
            assert logged == [f"layer {name}" for name in kfac.kfac_factors]
