"""The natural gradient against dense float64, on one shared capture, in the batch's own gradient.

The batch's own gradient lies in the span of the token gradients: the direction in which the
Woodbury formula subtracts nearly equal numbers (`docs/math.md`, section 3).
"""

from __future__ import annotations

import pytest
import torch

from tests import models, reference
from tests.capturing import POLICIES, engine, inputs_of, random_like, shared_capture
from tests.reference import Damping

BOUNDS = {
    (torch.float32, 1e-3): 1e-5,
    (torch.float32, 1e-5): 1e-3,
    (torch.float64, 1e-3): 1e-9,
    (torch.float64, 1e-5): 1e-7,
}
DTYPES = [torch.float32, torch.float64]
CASES = {case.name: case for case in models.CASES}


def held_to_truth(case, tokens, dtype, policy, damping, *, gradients=None, **settings) -> dict:
    """Collect, compare every covered parameter on the batch's own gradient, return the errors."""
    model, batch = case.model(dtype), case.batch(tokens)
    kfac = engine(policy, damping, **settings)
    truth, labels = shared_capture(kfac, model, batch)
    own = truth.own_gradient(labels)
    result = kfac.compute_natural_gradient(own, model)
    expected = truth.natural_gradient(own, damping)
    assert set(expected) == truth.covered()
    what = f"{case.name} {tokens} {policy} damping {damping.A:.0e} kappa {damping.kappa}"
    reference.assert_close(result, expected, BOUNDS[dtype, damping.A], what)
    return reference.errors(result, expected)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("tokens", ["few", "many"])
@pytest.mark.parametrize("name", CASES)
def test_own_gradient(name, tokens, dtype, policy):
    """Both dampings of the bounds, without clipping and with a clipping that binds."""
    for lam in (1e-3, 1e-5):
        for kappa in (None, 50.0):
            held_to_truth(CASES[name], tokens, dtype, policy, Damping(lam, lam, kappa))


@pytest.mark.parametrize("policy", POLICIES)
def test_own_gradient_without_push_through(policy):
    """The general formula alone, where the cancellation is."""
    for lam in (1e-3, 1e-5):
        for kappa in (None, 1e6):
            for dtype in DTYPES:
                held_to_truth(
                    CASES["gpt2_untied"],
                    "few",
                    dtype,
                    policy,
                    Damping(lam, lam, kappa),
                    push_through=False,
                )


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["gpt2_tied", "llama", "bert_right", "t5_lengths"])
def test_gradient_left_by_autograd(name, policy):
    """`.grad` of the caller's own backward pass, not an array made by the reference."""
    case, damping = CASES[name], Damping(1e-3, 1e-3, 1e6)
    model, batch = case.model(torch.float32), case.batch("few")
    kfac = engine(policy, damping)
    truth, _ = shared_capture(kfac, model, batch)
    loss, labels = reference.summed_loss(model, model(**inputs_of(batch)).logits, batch)
    (loss / labels).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    result = kfac.compute_natural_gradient(gradients, model)
    reference.assert_close(result, truth.natural_gradient(gradients, damping), 1e-5, name)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("tokens", ["few", "many"])
def test_any_other_gradient(tokens, policy):
    """A gradient of something else than the factors' batch: the general formula must be used."""
    case, damping = CASES["gpt2_untied"], Damping(1e-4, 1e-3, 1e6)
    model = case.model(torch.float64)
    kfac = engine(policy, damping)
    truth, labels = shared_capture(kfac, model, case.batch(tokens))
    vectors = random_like(truth.own_gradient(labels))
    mixed = {n: v + 0.1 * vectors[n] for n, v in truth.own_gradient(labels).items()}
    for gradients in (vectors, mixed):
        result = kfac.compute_natural_gradient(gradients, model)
        reference.assert_close(result, truth.natural_gradient(gradients, damping), 1e-9)


def test_scaled_and_decayed_gradients():
    """Clipped gradients are a multiple of the batch's own; weight decay leaves the span."""
    case, damping = CASES["llama"], Damping(1e-5, 1e-5, None)
    model = case.model(torch.float64)
    kfac = engine("all", damping)
    truth, labels = shared_capture(kfac, model, case.batch("few"))
    parameters = dict(model.named_parameters())
    for scale, decay in ((0.01, 0.0), (1.0, 1e-2), (1.0, 1e-9)):
        gradients = {
            n: scale * g + decay * parameters[n].detach()
            for n, g in truth.own_gradient(labels).items()
        }
        result = kfac.compute_natural_gradient(gradients, model)
        reference.assert_close(result, truth.natural_gradient(gradients, damping), 1e-7)


@pytest.mark.parametrize("name", ["gpt2_tied", "t5_masks"])
@pytest.mark.parametrize("tokens", ["few", "many"])
def test_all_policies_agree_with_clipping_on(name, tokens):
    """One gradient through four policies; the clipping binds on both sides."""
    case = CASES[name]
    batch = case.batch(tokens)
    for lam, bound in ((1e-3, 1e-9), (1e-5, 1e-7)):
        damping = Damping(lam, lam, 20.0)
        results, gradients = {}, None
        for policy in POLICIES:
            model = case.model(torch.float64)
            kfac = engine(policy, damping)
            truth, labels = shared_capture(kfac, model, batch)
            gradients = truth.own_gradient(labels) if gradients is None else gradients
            results[policy] = kfac.compute_natural_gradient(gradients, model)
            counts = truth.clipped(damping).values()
            assert sum(a for a, _ in counts) > 0
            assert sum(g for _, g in counts) > 0
        expected = {n: r.double() for n, r in results["small_only"].items()}
        for policy in ("all", "auto", "hybrid"):
            reference.assert_close(results[policy], expected, bound, policy)


def test_the_policies_take_different_paths():
    """The grid above would show nothing if every policy chose the same structure."""
    case = CASES["gpt2_untied"]
    chosen = {}
    for policy in POLICIES:
        model = case.model(torch.float64)
        kfac = engine(policy, Damping())
        shared_capture(kfac, model, case.batch("many"))
        chosen[policy] = {n: f["G_type"] for n, f in kfac.kfac_factors.items() if ".mlp." in n}
    assert set(chosen["all"].values()) == {"woodbury"}
    assert set(chosen["small_only"].values()) == {"eig"}
    assert chosen["hybrid"]["transformer.h.0.mlp.c_fc"] == "woodbury"  # 64 outputs
    assert chosen["hybrid"]["transformer.h.0.mlp.c_proj"] == "eig"  # 16 outputs
    assert set(chosen["auto"].values()) == {"eig"}  # 89 tokens, more than any output width
    model = case.model(torch.float64)
    kfac = engine("auto", Damping())
    shared_capture(kfac, model, case.batch("few"))
    assert kfac.kfac_factors["transformer.h.0.mlp.c_proj"]["G_type"] == "woodbury"


@pytest.mark.parametrize("policy", POLICIES)
def test_dampings_of_both_sides_are_kept_apart(policy):
    case = CASES["gpt2_untied"]
    for damping in (Damping(1e-1, 1e-4, None), Damping(1e-4, 1e-1, 50.0)):
        model = case.model(torch.float64)
        kfac = engine(policy, damping)
        truth, labels = shared_capture(kfac, model, case.batch("few"))
        own = truth.own_gradient(labels)
        expected = truth.natural_gradient(own, damping)
        reference.assert_close(kfac.compute_natural_gradient(own, model), expected, 1e-9)
        swapped = truth.natural_gradient(own, Damping(damping.G, damping.A, damping.kappa))
        assert max(reference.errors(swapped, expected).values()) > 0.1


def test_float32_core_is_what_the_setting_says():
    """`core_dtype=apply_dtype=float32` is another, less accurate algorithm, and still close."""
    case, damping = CASES["gpt2_untied"], Damping(1e-3, 1e-3, None)
    errors = {}
    for core in ("float32", "float64"):
        model = case.model(torch.float32)
        kfac = engine("small_only", damping, core_dtype=core, apply_dtype=core, push_through=False)
        truth, labels = shared_capture(kfac, model, case.batch("few"))
        own = truth.own_gradient(labels)
        result = kfac.compute_natural_gradient(own, model)
        found = reference.errors(result, truth.natural_gradient(own, damping))
        errors[core] = max(found.values())
    assert errors["float64"] < 1e-5
    assert 3 * errors["float64"] < errors["float32"] < 0.2
