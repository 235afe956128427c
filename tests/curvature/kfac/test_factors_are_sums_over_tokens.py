"""What goes into the factors: tokens, padding, batches, scales; read through products."""

import pytest
import torch
from torch import nn

from fisher_lab import KFACNaturalGradient
from tests import models, reference
from tests.capturing import (
    Captured,
    assert_natural,
    captured,
    cross_entropy,
    engine,
    inputs_of,
    own_collect,
    random_like,
    shared_capture,
)
from tests.models import CASES
from tests.reference import Damping, Truth

DOUBLE = torch.float64
PADDED = {
    "gpt2_right": (models.gpt2, lambda: models.language_batch(models.FEW)),
    "gpt2_left": (models.gpt2, lambda: models.language_batch(models.FEW, "left")),
    "llama_left": (models.llama, lambda: models.language_batch((5, 8, 3), "left")),
    "bert_right": (models.bert, lambda: models.language_batch(models.FEW)),
    "bert_left": (models.bert, lambda: models.language_batch(models.FEW, "left")),
    "t5_lengths": (models.t5, lambda: models.t5_batch((8, 5), (4, 7))),
    "t5_masks": (models.t5, lambda: models.t5_batch((8, 5), (3, 8))),
}


def label_count(model, batch):
    return int((reference.counting_labels(model, batch) != -100).sum())


@pytest.mark.parametrize("policy", ["all", "small_only"])
@pytest.mark.parametrize("name", PADDED)
def test_padding_changes_nothing(name, policy):
    """A padded batch, and its sequences one by one without padding: the same factors.

    LLaMA and T5 norms compute in float32 whatever the model, so other batch shapes may round
    differently there; they do not for these sizes on CPU (the bound would show it).
    """
    build, make = PADDED[name]
    batch, model = make(), models.seeded(build, DOUBLE)
    vectors = random_like(dict(model.named_parameters()))
    together, apart = engine(policy), engine(policy)
    together.collect_kfac_factors(model, batch)
    apart.collect_kfac_factors(model, models.one_by_one(batch))
    assert set(together.kfac_factors) == set(apart.kfac_factors)
    for layer, factors in together.kfac_factors.items():
        assert factors["tokens"] == apart.kfac_factors[layer]["tokens"], layer
    for compute, more in (
        (KFACNaturalGradient.compute_fisher_vector_product, ()),
        (KFACNaturalGradient.compute_powered_natural_gradient, (1.0,)),
    ):
        first, second = (compute(kfac, vectors, model, *more) for kfac in (together, apart))
        assert set(first) == set(second)
        reference.assert_close(first, second, 1e-10, name)


@pytest.mark.parametrize("name", CASES)
def test_own_forward_pass_uses_every_tokens_own_loss(name):
    """Without `loss=`: labels under the padding do not count, logits keep their dtype.

    The head's token gradients must be `softmax - onehot` of the labels that count, in float64;
    Hugging Face's own loss would round the logits to float32 and count padding.
    """
    case = CASES[name]
    model, batch = case.model(DOUBLE), case.batch("few")
    labels = reference.counting_labels(model, batch)
    kfac = engine("all", Damping(1e-3, 1e-3, None))
    truth = own_collect(kfac, model, [batch], labels=int((labels != -100).sum()))
    with torch.no_grad():
        logits = model(**inputs_of(batch)).logits
    assert head_error(truth, batch, logits, labels) < 1e-12
    assert_natural(kfac, model, truth, Damping(1e-3, 1e-3, None))


def head_error(truth, batch, logits, labels):
    """How far the head's token gradients are off `softmax - onehot` of the labels that count."""
    head = next(t for n, t in truth.tokens.items() if n in ("lm_head", "cls.predictions.decoder"))
    mask = batch.get("decoder_attention_mask", batch["attention_mask"]).bool()
    p, counted = torch.softmax(logits.detach().double(), -1), labels != -100
    p[counted] -= nn.functional.one_hot(labels[counted], models.VOCAB)
    p[~counted] = 0
    return reference.relative(head.g[0], p[mask])


def test_several_batches_are_one_set_of_tokens(policy):
    """Batches of unequal size and label share: tokens weigh alike, not batches."""
    model = models.seeded(models.gpt2, DOUBLE)
    batches = [
        models.language_batch((4, 9), seed=2),
        models.language_batch((17,), share=0.2, seed=3),
        models.language_batch((3, 3, 5), "left", seed=4),
    ]
    counts = [label_count(model, batch) for batch in batches]
    n, damping = sum(counts), Damping(1e-3, 1e-3, 1e4)
    assert len(set(counts)) > 1
    kfac = engine(policy, damping)
    truth = own_collect(kfac, model, batches, labels=n, keep_gradient=True)
    assert kfac.kfac_factors["transformer.h.0.mlp.c_fc"]["tokens"] == 41
    own = truth.own_gradient(n)
    for gradients in (own, random_like(own)):
        result = kfac.compute_natural_gradient(gradients, model)
        reference.assert_close(result, truth.natural_gradient(gradients, damping), 1e-9)
        product = kfac.compute_fisher_vector_product(gradients, model)
        reference.assert_close(product, truth.fisher_vector_product(gradients), 1e-9)
    # Their own gradient is `sum g a^T / N` over all of them, and not the mean of their means.
    expected = truth.natural_gradient(truth.own_gradient(n, unrounded=True), damping)
    reference.assert_close(kfac.compute_natural_gradient(None, model), expected, 1e-9)


def test_an_iterator_of_batches_is_consumed_once():
    model = models.seeded(models.gpt2, DOUBLE)
    batches = [models.language_batch((4, 9), seed=2), models.language_batch((7,), seed=3)]
    kfac = engine()
    kfac.collect_kfac_factors(model, iter(batches))
    assert kfac.kfac_factors["transformer.h.0.mlp.c_fc"]["tokens"] == 20


@pytest.mark.parametrize("name", ["gpt2_untied", "bert_left", "t5_lengths"])
def test_fisher_vector_product(name, tokens, policy):
    """`(T / N) G V A`: undamped, unclipped, whatever the engine's damping and kappa are."""
    one = captured(name, tokens, policy, Damping(0.3, 0.2, 5.0))
    assert one.labels < min(t.count for t in one.truth.tokens.values())  # so that T / N is seen
    one.check_product(1e-10, one.random())


@pytest.mark.parametrize("p", [-1.0, -0.5, 0.5, 1.0, 2.0])
def test_powers(p, policy):
    """`G^p dW A^p` with the used eigenvalues; the floor binds."""
    damping = Damping(1e-3, 1e-2, 100.0)
    for tokens in ("few", "many"):
        one = captured("gpt2_untied", tokens, policy, damping)
        for vectors in (one.own, one.random()):
            result = one.kfac.compute_powered_natural_gradient(vectors, one.model, p)
            reference.assert_close(result, one.truth.powered(vectors, p, damping), 1e-9)


def test_mean_and_sum_of_the_loss_give_the_same_factors():
    damping = Damping(1e-3, 1e-3, 1e6)
    mean, summed = (
        captured("gpt2_untied", "few", "all", damping, reduction=reduction)
        for reduction in ("mean", "sum")
    )
    vectors = mean.random()
    reference.assert_close(mean.natural(vectors), summed.natural(vectors), 1e-12)


def test_one_datum_kfac_is_the_fisher_matrix():
    """With one token `G (x) A` is `dW dW^T` itself: the product is `<dW, V> dW`."""
    torch.manual_seed(0)
    model = models.MLP().double().eval()
    batch = {"x": torch.randn(1, 7, dtype=DOUBLE), "labels": torch.tensor([2])}
    kfac = engine("all")
    kfac.collect_kfac_factors(model, batch, loss=cross_entropy)
    cross_entropy(model(batch["x"]), batch).backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    vectors = random_like(gradients)
    product = kfac.compute_fisher_vector_product(vectors, model)
    for layer in ("first", "second"):
        names = [f"{layer}.weight", f"{layer}.bias"]
        inner = sum((gradients[n] * vectors[n]).sum() for n in names)
        expected = {n: inner * gradients[n] for n in names}
        reference.assert_close(product, expected, 1e-12)


@pytest.mark.parametrize("rows", [3, 23])
@pytest.mark.parametrize("bias", [True, False])
def test_plain_mlp(bias, rows, policy):
    model = models.seeded(lambda: models.MLP(bias=bias), DOUBLE)
    one = Captured(model, models.rows_batch(rows), policy, Damping(1e-3, 1e-3, 1e3))
    one.check_natural(1e-9)
    assert [f["A_bias_augmented"] for f in one.kfac.kfac_factors.values()] == [bias, bias]


def test_a_module_called_twice(policy):
    model = models.seeded(models.Twice, DOUBLE)
    one = Captured(model, models.rows_batch(5, 6), policy, Damping(1e-3, 1e-3, 1e3))
    assert one.kfac.kfac_factors["shared"]["tokens"] == 10
    one.check_natural(1e-9)


@pytest.mark.parametrize("side", ["left", "right"])
def test_pooled_layers_have_one_token_per_example(side):
    """BERT's pooler and classifier see `[batch, features]`: the mask is not theirs."""
    model = models.seeded(models.bert_classifier, DOUBLE)
    batch = models.classifier_batch((5, 8, 8, 3, 8), side)  # sequences of width 8
    one = Captured(model, batch, "all", Damping(1e-3, 1e-3, 1e6))
    assert one.labels == 5
    tokens = {name: f["tokens"] for name, f in one.kfac.kfac_factors.items()}
    assert tokens["classifier"] == tokens["bert.pooler.dense"] == 5
    assert tokens["bert.encoder.layer.0.output.dense"] == 32
    one.check_natural(1e-9)


@pytest.mark.parametrize("lengths", [(8,), (3, 5, 5, 4, 2)], ids=["one_row", "rows_as_wide"])
@pytest.mark.parametrize("build", [models.gpt2, models.bert, models.t5], ids=lambda b: b.__name__)
def test_position_embeddings_are_never_layers(build, lengths):
    """Also where a batch of one, or one as high as wide, makes them look like token embeddings."""
    model = models.seeded(build, DOUBLE)
    if build is models.t5:
        batch = models.t5_batch(lengths, lengths)
    else:
        batch = models.language_batch(lengths)
    one = Captured(model, batch, "all", Damping(1e-3, 1e-3, 1e6))
    everything = random_like(dict(model.named_parameters()))
    result = one.natural(everything)
    positions = {n for n in everything if any(p in n for p in reference.POSITIONS)}
    assert positions
    assert positions == set(one.kfac.uncovered)
    for name in positions:
        assert torch.equal(result[name], everything[name])
    assert not [n for n in one.kfac.kfac_factors if any(p in n for p in reference.POSITIONS)]
    one.check_natural(1e-9, everything)


@pytest.mark.parametrize("given", ["position ids", "none", "ids that count up"])
def test_positions_make_no_layer(given):
    """Token ids `0, 1, 2, ...` in a batch of one equal the position ids, value for value."""
    model, batch = models.seeded(models.gpt2, DOUBLE), models.language_batch(models.FEW, "left")
    if given == "none":
        del batch["position_ids"]
    if given == "ids that count up":
        batch = dict.fromkeys(("input_ids", "labels"), torch.arange(8)[None])
    kfac = engine()
    kfac.collect_kfac_factors(model, batch)
    assert "transformer.wpe" not in kfac.kfac_factors


def test_decoder_inputs_made_from_labels_are_not_changed_by_the_mask():
    """T5 makes its decoder inputs from the labels; masking labels must not alter those."""
    model = models.seeded(models.t5, DOUBLE)
    batch = models.t5_batch((8, 5), (4, 7), share=1.0)
    explicit = dict(batch, decoder_input_ids=model._shift_right(batch["labels"]))
    implicit = {k: v for k, v in batch.items() if k != "decoder_input_ids"}
    # A hole in the middle: the label under it is dropped, the input made from it stays.
    for given in (explicit, implicit):
        given["decoder_attention_mask"] = batch["decoder_attention_mask"].clone()
        given["decoder_attention_mask"][1, 2] = 0
    results = []
    vectors = random_like(dict(model.named_parameters()))
    for given in (explicit, implicit):
        kfac = engine()
        kfac.collect_kfac_factors(model, given)
        results.append(kfac.compute_fisher_vector_product(vectors, model))
    reference.assert_close(results[1], results[0], 1e-12)


def test_include_and_exclude_choose_layers():
    model = models.seeded(models.llama, DOUBLE)
    batch = models.language_batch(models.FEW)
    kfac = engine(include=["*mlp*"])
    kfac.collect_kfac_factors(model, batch)
    mlp = {f"model.layers.0.mlp.{n}_proj" for n in ("gate", "up", "down")}
    assert set(kfac.kfac_factors) == mlp
    kfac = engine(exclude=["lm_head"])
    kfac.collect_kfac_factors(model, batch)
    assert "lm_head" not in kfac.kfac_factors
    assert mlp < set(kfac.kfac_factors)


def test_default_settings_are_the_documented_ones():
    """Both dampings default to `damping`; `all`, kappa 1e6."""
    model, batch = CASES["gpt2_untied"].model(DOUBLE), CASES["gpt2_untied"].batch("few")
    kfac = KFACNaturalGradient(damping=3e-3)
    truth, _ = shared_capture(kfac, model, batch)
    assert_natural(kfac, model, truth, Damping(3e-3, 3e-3, 1e6))
    types = {n: f["G_type"] for n, f in kfac.kfac_factors.items()}
    assert types["lm_head"] == types["transformer.h.1.attn.c_attn"] == "woodbury"


@pytest.mark.parametrize("name", ["gpt2_untied", "llama", "bert_right", "t5_lengths"])
def test_the_models_own_mean_loss_has_the_right_scale(name):
    """The documented lines: `loss = model(**batch).loss` in a capture, then collect with it.

    The head's token gradients must be `softmax - onehot`: no `1/N` left, no `N` too many.
    """
    case = CASES[name]
    model, batch = case.model(torch.float32), case.batch("few")
    # Hugging Face wants the labels that must not count as -100: it looks at no mask.
    labels = reference.counting_labels(model, batch)
    batch["labels"] = labels.clone()
    if reference.is_causal(model):
        batch["labels"][:, 1:] = labels[:, :-1]
    damping = Damping(1e-3, 1e-3, 1e6)
    kfac = engine("all", damping)
    with reference.record(model) as rec, kfac.capture(model):
        outputs = model(**batch)
    kfac.collect_kfac_factors(model, batch, loss=outputs.loss)
    truth = Truth(model, rec, [batch], labels=int((labels != -100).sum()))
    assert head_error(truth, batch, outputs.logits, labels) < 1e-5
    assert_natural(kfac, model, truth, damping, 1e-5)
    own = truth.own_gradient(truth.labels)
    product = kfac.compute_fisher_vector_product(own, model)
    reference.assert_close(product, truth.fisher_vector_product(own), 1e-5)


def test_two_modules_with_one_weight_are_one_layer(policy):
    """Keyed by parameter identity: both modules' tokens are pooled under one entry."""

    class Siamese(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(6, 6), nn.Linear(6, 6)
            self.right.weight, self.right.bias = self.left.weight, self.left.bias
            self.head = nn.Linear(6, 4)

        def forward(self, x):
            return self.head(torch.tanh(self.right(torch.tanh(self.left(x)))))

    model = models.seeded(Siamese, DOUBLE)
    one = Captured(model, models.rows_batch(7, 6), policy, Damping(1e-3, 1e-3, 1e3))
    assert set(one.own) == {"left.weight", "left.bias", "head.weight", "head.bias"}
    assert set(one.natural(one.own)) == set(one.own)
    one.check_natural(1e-9)


def test_encoder_outputs_from_the_caller():
    """T5 given its encoder's output: the cross-attention still sees encoder positions."""
    model = models.seeded(models.t5, DOUBLE)
    batch = models.t5_batch((8, 5), (3, 8))
    with torch.no_grad():
        encoded = model.encoder(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    short = {k: v for k, v in batch.items() if k != "input_ids"}
    short["encoder_outputs"] = (encoded,)
    whole, part = engine(norm_layers=False), engine(norm_layers=False, exclude=["encoder.*"])
    whole.collect_kfac_factors(model, batch)
    part.collect_kfac_factors(model, short)
    prefix = "decoder.block.0.layer.1.EncDecAttention."
    names = {prefix + n for n in "qkvo"}
    vectors = random_like({n: p for n, p in model.named_parameters() if n[:-7] in names})
    assert len(vectors) == 4
    expected = whole.compute_fisher_vector_product(vectors, model)
    result = part.compute_fisher_vector_product(vectors, model)
    reference.assert_close(result, expected, 1e-12)
