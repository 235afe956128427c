"""What the engine derives from its factors, and what it stands: against dense float64."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from torch import nn

from fisher_lab.curvature.kfac.factors import base, woodbury
from fisher_lab.curvature.kfac.inverses import Inverses
from tests import models, reference
from tests.capturing import POLICIES, engine, inputs_of, shared_capture
from tests.reference import Damping

CASES = {case.name: case for case in models.CASES}


def natural(kfac, model, gradients):
    return kfac.compute_natural_gradient(gradients, model)


# --------------------------------------------------------------------------- log-determinant


def dense_logdet(matrix: torch.Tensor, lam: float, kappa: float | None) -> float:
    values = torch.linalg.eigvalsh(matrix) + lam
    if kappa is not None:
        values = values.clamp(min=float(values.max()) / kappa)
    return float(values.log().sum())


@pytest.mark.parametrize("kappa", [None, 50.0])
@pytest.mark.parametrize("tokens", ["few", "many"])
@pytest.mark.parametrize("policy", POLICIES)
def test_log_determinant(policy, tokens, kappa):
    case = CASES["gpt2_untied"]
    model, batch = case.model(torch.float64), case.batch(tokens)
    damping = Damping(1e-3, 1e-2, kappa)
    kfac = engine(policy, damping)
    truth, labels = shared_capture(kfac, model, batch)
    found = kfac.log_determinant()
    checked = 0
    for factors, layer_tokens in truth.weight_factors().values():
        if layer_tokens.name not in found:
            continue
        sides = [
            dense_logdet(factors.A, damping.A, kappa),
            dense_logdet(factors.G, damping.G, kappa),
        ]
        n_a, n_g = len(factors.A), len(factors.G)
        expected = n_g * sides[0] + n_a * sides[1]
        expected += n_a * n_g * math.log(factors.tokens / labels)
        assert found[layer_tokens.name] == pytest.approx(expected, rel=1e-8), layer_tokens.name
        checked += 1
    assert checked >= 5


# --------------------------------------------------------------------------- uncovered parameters


def test_uncovered_parameters_by_their_diagonal():
    """`(1/T) sum over sequences of squared gradients`, plus damping of G, for what remains."""
    case = CASES["gpt2_untied"]
    model, batch = case.model(torch.float64), case.batch("many")
    lam = 1e-2
    kfac = engine("all", Damping(1e-3, lam, None), uncovered="diagonal", norm_layers=False)
    kfac.collect_kfac_factors(model, batch)
    names = [n for n, _ in model.named_parameters() if "ln_" in n]
    parameters = [dict(model.named_parameters())[n] for n in names]
    squares = {n: torch.zeros_like(p) for n, p in zip(names, parameters, strict=True)}
    for one in models.one_by_one(batch):
        loss, _ = reference.summed_loss(model, model(**inputs_of(one)).logits, one)
        for n, g in zip(names, torch.autograd.grad(loss, parameters), strict=True):
            squares[n] += g**2
    tokens = int(batch["attention_mask"].sum())
    generator = torch.Generator().manual_seed(3)
    given = {
        n: torch.randn(p.shape, generator=generator, dtype=torch.float64)
        for n, p in zip(names, parameters, strict=True)
    }
    result = natural(kfac, model, given)
    for n in names:
        expected = given[n] / (squares[n] / tokens + lam)
        torch.testing.assert_close(result[n], expected, rtol=1e-9, atol=1e-12)


# --------------------------------------------------------------------------- storage error


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_storage_error_is_estimated_and_warned_about(dtype, caplog):
    """Eight probes against the whole of it: within a factor of two, and the warning follows."""
    case = CASES["gpt2_untied"]
    model, batch = case.model(torch.float32), case.batch("few")
    lam = 1e-4
    kfac = engine("all", Damping(lam, lam, None), woodbury_dtype=dtype, norm_layers=False)
    with caplog.at_level("WARNING"):
        truth, _ = shared_capture(kfac, model, batch)
    checked = 0
    for factors, tokens in truth.weight_factors().values():
        given = kfac.kfac_factors[tokens.name]
        if given.storage_error is None:
            continue
        g, t = tokens.g[0], tokens.count
        rounded = given.G.columns.data.double() * given.G.columns.scale
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


# --------------------------------------------------------------------------- any damping, trained


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
@pytest.mark.parametrize("policy", POLICIES)
def test_any_damping_gives_finite_numbers(policy, kappa, core, trained):
    model, batch = trained
    for exponent in range(-10, 1):
        lam = 10.0**exponent
        kfac = engine(
            policy,
            Damping(lam, lam, kappa),
            core_dtype=core,
            apply_dtype=core,
            track_diagonal=False,
        )
        kfac.collect_kfac_factors(model, batch, keep_gradient=True)
        for name, value in natural(kfac, model, None).items():
            assert bool(torch.isfinite(value).all()), (lam, name)
        assert all(math.isfinite(x) for x in kfac.log_determinant().values()), lam


@pytest.mark.parametrize("policy", POLICIES)
def test_a_trained_model_at_damping_1e_8(policy, trained):
    """kappa null: within 1e-5 of dense float64 (float64 core over float32 token gradients)."""
    model, batch = trained
    damping = Damping(1e-8, 1e-8, None)
    kfac = engine(policy, damping, norm_layers=False)
    truth, labels = shared_capture(kfac, model, batch, keep_gradient=True, norms=False)
    own = truth.own_gradient(labels, unrounded=True)
    expected = truth.natural_gradient(own, damping)
    result = natural(kfac, model, None)
    reference.assert_close({n: result[n] for n in expected}, expected, 1e-5, policy)


# --------------------------------------------------------------------------- compiled models


def test_a_compiled_model_gives_the_factors_of_the_plain_one():
    """Hooks sit on the inner modules; the compiled wrapper is looked through."""
    case = CASES["gpt2_untied"]
    model, batch = case.model(torch.float64), case.batch("few")
    damping = Damping(1e-3, 1e-3, None)
    plain = engine("all", damping)
    plain.collect_kfac_factors(model, batch, keep_gradient=True)
    expected = natural(plain, model, None)
    compiled = torch.compile(model, backend="eager")
    kfac = engine("all", damping)
    kfac.collect_kfac_factors(compiled, batch, keep_gradient=True)
    reference.assert_close(natural(kfac, compiled, None), expected, 1e-9)
    assert set(kfac.kfac_factors) == set(plain.kfac_factors)


# --------------------------------------------------------------------------- the log


def test_each_refresh_is_logged_once_and_nothing_is_computed_for_it(caplog, monkeypatch):
    """One line a layer, whether the inverses are prepared first or made by the application."""
    case = CASES["gpt2_untied"]
    model, batch = case.model(torch.float32), case.batch("few")
    kfac = engine("all", Damping(1e-3, 1e-3, 1e6))
    asked = []
    monkeypatch.setattr(Inverses, "report", spied(Inverses.report, asked))
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
            told = [r.getMessage().split(":")[0] for r in caplog.records]
            assert told == [f"layer {name}" for name in kfac.kfac_factors]


def spied(original, calls):
    def call(inverses, name, **kwargs):
        calls.append(name)
        return original(inverses, name, **kwargs)

    return call
