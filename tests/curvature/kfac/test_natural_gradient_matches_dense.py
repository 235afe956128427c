"""The natural gradient against dense float64, on one shared capture, in the batch's own gradient.

The batch's own gradient lies in the span of the token gradients: the direction in which the
Woodbury formula subtracts nearly equal numbers (`docs/math.md`, section 3).
"""

import pytest
import torch

from tests import reference
from tests.capturing import POLICIES, captured, inputs_of
from tests.models import CASES
from tests.reference import Damping

BOUNDS = {
    (torch.float32, 1e-3): 1e-5,
    (torch.float32, 1e-5): 1e-3,
    (torch.float64, 1e-3): 1e-9,
    (torch.float64, 1e-5): 1e-7,
}
DTYPES = [torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("name", CASES)
def test_own_gradient(name, tokens, dtype, policy):
    """Both dampings of the bounds, without clipping and with a clipping that binds."""
    for lam in (1e-3, 1e-5):
        for kappa in (None, 50.0):
            one = captured(name, tokens, policy, Damping(lam, lam, kappa), dtype=dtype)
            assert set(one.truth.natural_gradient(one.own, one.damping)) == one.truth.covered()
            one.check_natural(BOUNDS[dtype, lam])


def test_own_gradient_without_push_through(policy):
    """The general formula alone, where the cancellation is."""
    for (dtype, lam), bound in BOUNDS.items():
        for kappa in (None, 1e6):
            more = {"dtype": dtype, "push_through": False}
            captured("gpt2_untied", "few", policy, Damping(lam, lam, kappa), **more).check_natural(
                bound
            )


@pytest.mark.parametrize("name", ["gpt2_tied", "llama", "bert_right", "t5_lengths"])
def test_gradient_left_by_autograd(name, policy):
    """`.grad` of the caller's own backward pass, not an array made by the reference."""
    one = captured(name, "few", policy, Damping(1e-3, 1e-3, 1e6), dtype=torch.float32)
    batch = CASES[name].batch("few")
    logits = one.model(**inputs_of(batch)).logits
    loss, labels = reference.summed_loss(one.model, logits, batch)
    (loss / labels).backward()
    gradients = {n: p.grad for n, p in one.model.named_parameters() if p.grad is not None}
    one.check_natural(1e-5, gradients)


def test_any_other_gradient(tokens, policy):
    """A gradient of something else than the factors' batch: the general formula must be used."""
    one = captured("gpt2_untied", tokens, policy, Damping(1e-4, 1e-3, 1e6))
    other = one.random()
    one.check_natural(1e-9, other, {n: v + 0.1 * other[n] for n, v in one.own.items()})


def test_scaled_and_decayed_gradients():
    """Clipped gradients are a multiple of the batch's own; weight decay leaves the span."""
    one = captured("llama", "few", "all", Damping(1e-5, 1e-5, None))
    parameters = dict(one.model.named_parameters())
    for scale, decay in ((0.01, 0.0), (1.0, 1e-2), (1.0, 1e-9)):
        gradients = {n: scale * g + decay * parameters[n].detach() for n, g in one.own.items()}
        one.check_natural(1e-7, gradients)


@pytest.mark.parametrize("name", ["gpt2_tied", "t5_masks"])
def test_all_policies_agree_with_clipping_on(name, tokens):
    """One gradient through four policies; the clipping binds on both sides."""
    for lam, bound in ((1e-3, 1e-9), (1e-5, 1e-7)):
        damping = Damping(lam, lam, 20.0)
        ones = {policy: captured(name, tokens, policy, damping) for policy in POLICIES}
        for one in ones.values():
            counts = one.truth.clipped(damping).values()
            assert sum(a for a, _ in counts) > 0
            assert sum(g for _, g in counts) > 0
        gradients = ones["all"].own
        expected = {n: r.double() for n, r in ones["small_only"].natural(gradients).items()}
        for policy in ("all", "auto", "hybrid"):
            reference.assert_close(ones[policy].natural(gradients), expected, bound, policy)


def test_the_policies_take_different_paths():
    """The grid above would show nothing if every policy chose the same structure."""

    def chosen(policy, tokens="many"):
        factors = captured("gpt2_untied", tokens, policy).kfac.kfac_factors
        return {n: f["G_type"] for n, f in factors.items() if ".mlp." in n}

    assert set(chosen("all").values()) == {"woodbury"}
    assert set(chosen("small_only").values()) == {"eig"}
    assert chosen("hybrid")["transformer.h.0.mlp.c_fc"] == "woodbury"  # 64 outputs
    assert chosen("hybrid")["transformer.h.0.mlp.c_proj"] == "eig"  # 16 outputs
    assert set(chosen("auto").values()) == {"eig"}  # 89 tokens, more than any output width
    assert chosen("auto", "few")["transformer.h.0.mlp.c_proj"] == "woodbury"


def test_dampings_of_both_sides_are_kept_apart(policy):
    for damping in (Damping(1e-1, 1e-4, None), Damping(1e-4, 1e-1, 50.0)):
        one = captured("gpt2_untied", "few", policy, damping)
        one.check_natural(1e-9)
        swapped = Damping(damping.G, damping.A, damping.kappa)
        expected, other = (one.truth.natural_gradient(one.own, d) for d in (damping, swapped))
        assert max(reference.errors(other, expected).values()) > 0.1


def test_float32_core_is_what_the_setting_says():
    """`core_dtype=apply_dtype=float32` is another, less accurate algorithm, and still close."""
    damping, errors = Damping(1e-3, 1e-3, None), {}
    for core in ("float32", "float64"):
        more = {"core_dtype": core, "apply_dtype": core, "push_through": False}
        one = captured("gpt2_untied", "few", "small_only", damping, dtype=torch.float32, **more)
        expected = one.truth.natural_gradient(one.own, damping)
        errors[core] = max(reference.errors(one.natural(one.own), expected).values())
    assert errors["float64"] < 1e-5
    assert 3 * errors["float64"] < errors["float32"] < 0.2
