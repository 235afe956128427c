"""The factors' own gradient (`gradients=None`), storage dtypes, and odd ways to run a model."""

import pytest
import torch

from tests import models, reference
from tests.capturing import Captured, captured, engine, own_collect, random_like
from tests.reference import Damping

DOUBLE = torch.float64


def own_captured(name, tokens, policy, damping, **more):
    """A capture that keeps its gradient, and truth on the unrounded own gradient."""
    one = captured(name, tokens, policy, damping, keep_gradient=True, **more)
    one.own = one.truth.own_gradient(one.labels, unrounded=True)
    return one, one.natural(None), one.truth.natural_gradient(one.own, damping)


@pytest.mark.parametrize("push_through", [True, False])
@pytest.mark.parametrize("name", ["gpt2_untied", "gpt2_tied", "bert_left", "t5_masks"])
def test_own_gradient_is_the_batches_own(name, tokens, policy, push_through):
    """Tied weights too, where the identity does not hold and the general formula steps in."""
    damping = Damping(1e-5, 1e-5, 1e4)
    _, result, expected = own_captured(name, tokens, policy, damping, push_through=push_through)
    reference.assert_close(result, expected, 1e-7)
    positions = {n for n in result if any(p in n for p in reference.POSITIONS)}
    assert set(result) == set(expected) | positions


@pytest.mark.parametrize("p", [-0.5, 1.0])
def test_own_gradient_with_other_powers(p):
    damping = Damping(1e-4, 1e-4, 100.0)
    one, _, _ = own_captured("gpt2_untied", "few", "all", damping)
    result = one.kfac.compute_powered_natural_gradient(None, one.model, p)
    reference.assert_close(result, one.truth.powered(one.own, p, damping), 1e-9)


@pytest.mark.parametrize("lam", [1e-5, 1e-8])
def test_own_gradient_at_small_damping_against_many_digits(lam):
    """float32 model and storage: what is stored is `g` itself, and push-through cancels nothing.

    Against 50 decimal digits, since dense float64 is the less accurate of the two here.
    """
    damping = Damping(lam, lam, None)
    more = {"dtype": torch.float32, "woodbury_dtype": "fp32", "norm_layers": False}
    one, result, dense = own_captured("gpt2_untied", "few", "all", damping, **more)
    for layer in ("transformer.h.1.mlp.c_proj", "lm_head"):
        tokens = one.truth.tokens[layer]
        exact = reference.many_digits_own(tokens, damping, one.labels)
        weight = exact[:, : tokens.a.shape[1]]
        name = f"{layer}.weight"
        expected = {name: weight.T if tokens.kind == "conv1d" else weight}
        if tokens.bias is not None:
            expected[f"{layer}.bias"] = exact[:, -1]
        reference.assert_close(result, expected, 1e-6)
        if lam == 1e-8:
            assert reference.relative(dense[name], expected[name]) > 1e-4


@pytest.mark.parametrize(
    ("storage", "bound"), [("fp64", 1e-9), ("fp32", 1e-4), ("fp16", 5e-3), ("bf16", 4e-2)]
)
def test_push_through_with_rounded_columns(storage, bound):
    """Rounding the columns costs little in the own gradient; far more in the general formula."""
    more = {"woodbury_dtype": storage, "norm_layers": False}
    damping = Damping(1e-4, 1e-4, None)
    one, result, expected = own_captured("gpt2_untied", "few", "all", damping, **more)
    # Embeddings go by the general formula: their inputs are no matrix to push through.
    expected = {n: value for n, value in expected.items() if "wte" not in n}
    reference.assert_close(result, expected, bound, storage)
    general = one.natural({n: one.own[n] for n in expected})
    worst = max(reference.errors(result, expected).values())
    if storage in ("fp16", "bf16"):
        assert max(reference.errors(general, expected).values()) > 3 * worst


@pytest.mark.parametrize("storage", ["fp16", "bf16"])
def test_columns_that_outnumber_the_outputs_are_not_rounded(storage):
    """Rounding those would perturb G itself; policy `all` stays as exact there as unrounded."""
    more = {"woodbury_dtype": storage, "norm_layers": False}
    damping = Damping(1e-4, 1e-4, None)
    one, result, expected = own_captured("gpt2_untied", "many", "all", damping, **more)
    layers = {n: t.g[0].shape for n, t in one.truth.tokens.items() if "norm" not in t.kind}
    many = [layer for layer, (tokens, out) in layers.items() if tokens >= out]
    few = [layer for layer in layers if layer not in many]
    assert many
    for layer in many:
        names = [n for n in expected if n.startswith(f"{layer}.")]
        reference.assert_close(result, {n: expected[n] for n in names}, 1e-9, layer)
    kept = {f.layer.name: f.G.columns.data.dtype for f in one.kfac.kfac_factors.values()}
    assert all(kept[layer] == DOUBLE for layer in many)
    assert all(kept[layer].itemsize == 2 for layer in few)


def test_tiny_gradients_do_not_underflow_in_16_bits():
    """Columns are scaled by a power of two before they are rounded."""
    case = models.CASES["gpt2_untied"]
    model, batch = case.model(DOUBLE), case.batch("few")
    kfac = engine("all", Damping(1e-3, 1e-18, None), woodbury_dtype="fp16", norm_layers=False)
    scale = 1e-8
    with reference.record(model) as rec, kfac.capture(model):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss, labels = reference.summed_loss(model, logits, batch)
    kfac.collect_kfac_factors(
        model, batch, loss=scale * loss, n_labels=labels, loss_reduction="sum"
    )
    truth = reference.Truth(model, rec, [batch], labels=labels, norms=False)
    own = truth.own_gradient(labels)
    product = kfac.compute_fisher_vector_product(own, model)
    reference.assert_close(product, truth.fisher_vector_product(own), 2e-3)


@pytest.mark.parametrize("policy", ["all", "small_only"])
def test_bfloat16_model_accumulates_wider(policy):
    """Factors from the 16-bit captures in float64; only the result is rounded to the model's."""
    model = models.seeded(lambda: models.gpt2(tied=False), torch.bfloat16)
    batch, damping = models.language_batch(models.FEW), Damping(1e-2, 1e-2, None)
    one = Captured(model, batch, policy, damping, norm_layers=False)
    assert {v.dtype for v in one.natural(one.own).values()} == {torch.bfloat16}
    one.check_natural(2**-8)


def test_a_second_engine_sees_the_same_model():
    """Two engines on one model do not meet each other's hooks or factors."""
    model = models.seeded(models.gpt2, DOUBLE)
    first, second = engine("all"), engine("small_only")
    batches = [models.language_batch(models.FEW, seed=s) for s in (1, 2)]
    truths = [
        own_collect(kfac, model, [batch], labels=1)
        for kfac, batch in zip((first, second), batches, strict=True)
    ]
    vectors = random_like(dict(model.named_parameters()))
    for kfac, truth in zip((first, second), truths, strict=True):
        result = kfac.compute_natural_gradient(vectors, model)
        reference.assert_close(result, truth.natural_gradient(vectors, Damping()), 1e-8)
