"""How a model aligns labels with logits is measured against its own loss."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from transformers import (
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertForPreTraining,
    BertForQuestionAnswering,
    M2M100Config,
    M2M100ForConditionalGeneration,
    MBartConfig,
    MBartForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForTokenClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
    XLMRobertaConfig,
    XLMRobertaForCausalLM,
    XLNetConfig,
    XLNetLMHeadModel,
)

from fisher_lab import KFACNaturalGradient
from fisher_lab.config.errors import SettingError
from fisher_lab.curvature.errors import BatchError, LossError
from fisher_lab.curvature.group_fisher.collector import FisherCollector
from fisher_lab.curvature.labelling import has_decoder, is_certain
from fisher_lab.curvature.labels import tokens_of_attention
from fisher_lab.curvature.losses import (
    CrossEntropy,
    compute_loss,
    gradients_of,
    prepare,
    shift_of,
)
from fisher_lab.curvature.spectra.operators import CurvatureOperator
from fisher_lab.curvature.spectra.samples import draw_samples
from tests.models import VOCAB, bert, gpt2, language_batch, masks, rows_batch, seeded, t5


def bart() -> BartForCausalLM:
    """A decoder alone, whose class says causal and whose loss does not shift."""
    config = BartConfig(
        vocab_size=VOCAB, d_model=16, decoder_layers=1, decoder_attention_heads=2,
        decoder_ffn_dim=24, max_position_embeddings=40, dropout=0.0, is_decoder=True,
        is_encoder_decoder=False,
    )  # fmt: skip
    return BartForCausalLM(config)


def xlnet() -> XLNetLMHeadModel:
    """Labels in place; nothing in the class says so."""
    config = XLNetConfig(vocab_size=VOCAB, d_model=16, n_layer=1, n_head=2, d_inner=24, dropout=0.0)
    return XLNetLMHeadModel(config)


def xlm_roberta() -> XLMRobertaForCausalLM:
    """Shifts, though its name begins like XLNet's."""
    return XLMRobertaForCausalLM(XLMRobertaConfig(**BERT, is_decoder=True))


BERT = {
    "vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 40, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0, "pad_token_id": 0,
}  # fmt: skip
SEQ2SEQ = {
    "vocab_size": VOCAB, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24, "max_position_embeddings": 40, "dropout": 0.0, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip


class Wrapped(nn.Module):
    """Returns what the model inside returns; has no configuration."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, input_ids, attention_mask=None, labels=None):
        return self.base(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


class ValueHead(nn.Module):
    """Logits, loss and a value a position, as reinforcement learning wraps a model."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.pretrained_model = base
        self.v_head = nn.Linear(VOCAB, 1, dtype=torch.float64)

    def forward(self, input_ids, attention_mask=None, labels=None):
        out = self.pretrained_model(input_ids, attention_mask=attention_mask, labels=labels)
        return out.logits, out.loss, self.v_head(out.logits)[..., 0]


def lora(base: nn.Module) -> nn.Module:
    """Adapters of an attention's projections."""
    names = ("c_attn", "q_proj", "query", "SelfAttention.q", "ff.layer_1")
    paths = [path for path, _ in base.named_modules()]
    found = next(n for n in names if any(path.endswith(n) for path in paths))
    return get_peft_model(base, LoraConfig(target_modules=[found]))


MODELS = {
    "bart": (bart, False),
    "xlnet": (xlnet, False),
    "gpt2": (gpt2, True),
    "xlm_roberta": (xlm_roberta, True),
}
WRAPPERS = {
    "bare": lambda base: base,
    "module": Wrapped,
    "value head": ValueHead,
    "average": AveragedModel,
    "peft": lora,
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_loss_is_the_models_own(name, wrapper):
    build, shift = MODELS[name]
    model = WRAPPERS[wrapper](seeded(build, torch.float64))
    batch = language_batch((7, 7))
    loss = compute_loss(model, prepare(model, batch))
    assert shift_of(model) is shift
    labels = batch["labels"][:, 1:] if shift else batch["labels"]
    count = int((labels != -100).sum())
    own = model(**batch)
    own = float(own[1] if isinstance(own, tuple) else own.loss)
    assert loss.n_labels == count
    assert loss.scored is not None
    # Hugging Face computes the loss in float32.
    torch.testing.assert_close(float(loss.loss), own * count, rtol=1e-6, atol=0)


def test_a_loss_that_is_no_mean_of_the_labels_is_the_models_own():
    class Smoothed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.config = gpt2().double(), gpt2().config
            self.loss_type = "ForCausalLM"

        def loss_function(self) -> None: ...

        def forward(self, input_ids, attention_mask=None, labels=None):
            logits = self.base(input_ids=input_ids, attention_mask=attention_mask).logits
            if labels is None:
                return SimpleNamespace(logits=logits, loss=None)
            inner = logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1)
            loss = F.cross_entropy(*inner, label_smoothing=0.2)
            return SimpleNamespace(logits=logits, loss=loss)

    model, batch = Smoothed(), language_batch((7, 7))
    found = compute_loss(model, prepare(model, batch))
    assert shift_of(model) is None
    assert found.n_labels == int((batch["labels"][:, 1:] != -100).sum())
    torch.testing.assert_close(found.loss, model(**batch).loss * found.n_labels)


def test_the_measurement_leaves_no_trace():
    model = gpt2().train()
    first = model.get_submodule("transformer.h.0").eval()
    before = torch.get_rng_state()
    prepare(model, language_batch((7, 5)))
    assert torch.equal(before, torch.get_rng_state())
    assert model.training
    assert not first.training
    assert all(p.grad is None for p in model.parameters())


def test_a_captured_pass_is_not_repeated():
    model, batch, calls = seeded(gpt2, torch.float64), language_batch((7, 5)), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    kfac = KFACNaturalGradient(damping=1e-3)
    with kfac.capture(model):
        loss = model(**batch).loss
    kfac.collect_kfac_factors(model, batch, loss=loss)
    assert len(calls) == 1


# ---- encoder-decoders ----------------------------------------------------------------------------


def m2m100() -> nn.Module:
    return M2M100ForConditionalGeneration(M2M100Config(**SEQ2SEQ, scale_embedding=False))


def mbart() -> nn.Module:
    return MBartForConditionalGeneration(MBartConfig(**SEQ2SEQ))


def whisper() -> nn.Module:
    config = WhisperConfig(
        **{k: v for k, v in SEQ2SEQ.items() if k != "max_position_embeddings"},
        max_source_positions=8, max_target_positions=20, num_mel_bins=5,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config)


def translation_batch() -> dict[str, Tensor]:
    batch = language_batch((7, 5))
    batch["labels"] = language_batch((6, 6), share=1.0, seed=4)["labels"]
    batch["labels"][1, 4:] = -100
    return batch


def speech_batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 5, 16, generator=generator, dtype=torch.float64)
    return {"input_features": features, "labels": translation_batch()["labels"]}


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "peft"])
@pytest.mark.parametrize(
    ("build", "make"),
    [
        (t5, translation_batch),
        (m2m100, translation_batch),
        (mbart, translation_batch),
        (whisper, speech_batch),
    ],
)
def test_labels_alone_are_enough_for_an_encoder_decoder(build, make, wrapped):
    model, batch = seeded(build, torch.float64), make()
    own = model(**batch).loss
    model = lora(model) if wrapped else model
    loss = compute_loss(model, prepare(model, batch))
    assert loss.n_labels == 10
    torch.testing.assert_close(float(loss.loss.detach()), float(own) * 10, rtol=1e-6, atol=0)
    assert "decoder_input_ids" not in batch


def test_a_classifier_of_an_encoder_has_its_mask():
    config = T5Config(
        vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2,
        dropout_rate=0.0, classifier_dropout=0.0,
    )  # fmt: skip
    config.num_labels = 3
    model = seeded(lambda: T5ForTokenClassification(config), torch.float64)
    batch = language_batch((7, 4))
    batch["labels"] = batch["input_ids"] % 3
    assert not has_decoder(model)
    assert compute_loss(model, prepare(model, batch)).n_labels == 11


# ---- losses without logits -----------------------------------------------------------------------


class Fused(nn.Module):
    """Gives a loss, and logits only where they are asked for; the loss is of another kind."""

    def __init__(self, smoothing: float = 0.0, *, logits: bool = True, shift: bool = True) -> None:
        super().__init__()
        self.base = seeded(gpt2, torch.float64)
        self.smoothing, self.logits, self.shift = smoothing, logits, shift

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.base(input_ids=input_ids, attention_mask=attention_mask).logits
        if labels is None:
            return SimpleNamespace(loss=None, logits=logits if self.logits else None)
        if self.shift:
            logits, labels = logits[:, :-1], labels[:, 1:]
        rows = logits.reshape(-1, VOCAB), labels.reshape(-1)
        return SimpleNamespace(loss=F.cross_entropy(*rows, label_smoothing=self.smoothing))


@pytest.mark.parametrize("shift", [False, True], ids=["in place", "shifted"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("logits", [False, True], ids=["none", "logits"])
def test_a_loss_without_logits_is_the_models_own(shift, smoothing, logits):
    model, batch = Fused(smoothing, logits=logits, shift=shift), language_batch((7, 7))
    count = int((batch["labels"][:, int(shift) :] != -100).sum())
    found = compute_loss(model, prepare(model, batch))
    torch.testing.assert_close(found.loss, model(**batch).loss * count)
    assert found.n_labels == count
    assert (found.scored is not None) is (logits and smoothing == 0)
    kfac = KFACNaturalGradient(damping=1e-3)
    kfac.collect_kfac_factors(model, batch, keep_gradient=True, verify=True)
    own = kfac.own_gradients(model)["base.transformer.h.0.mlp.c_fc.weight"]
    weight = model.get_parameter("base.transformer.h.0.mlp.c_fc.weight")
    torch.testing.assert_close(own, torch.autograd.grad(model(**batch).loss, weight)[0])


def test_a_kind_that_needs_logits_is_refused_in_one_line():
    model, batch = Fused(logits=False), language_batch((7, 7))
    with pytest.raises(SettingError, match=r"fisher: 'mc' needs the logits"):
        KFACNaturalGradient(damping=1e-3, fisher="mc").collect_kfac_factors(model, batch)


def test_answers_have_examples_for_labels():
    model = seeded(lambda: BertForQuestionAnswering(BertConfig(**BERT)), torch.float64)
    batch = language_batch((7, 7, 7))
    del batch["labels"]
    batch |= {"start_positions": torch.tensor([1, 2, 0]), "end_positions": torch.tensor([3, 5, 6])}
    found = compute_loss(model, prepare(model, batch))
    assert (found.n_labels, found.scored) == (3, None)
    torch.testing.assert_close(found.loss, model(**batch).loss * 3)


def test_several_losses_are_asked_for_their_count():
    model = seeded(lambda: BertForPreTraining(BertConfig(**BERT)), torch.float64)
    batch = {**language_batch((7, 5)), "next_sentence_label": torch.tensor([0, 1])}
    with pytest.raises(LossError, match="n_labels: what the loss of BertForPreTraining"):
        compute_loss(model, prepare(model, batch))
    assert compute_loss(model, prepare(model, batch), n_labels=5).n_labels == 5


def test_no_label_is_a_zero_without_logits():
    model, batch = Fused(logits=False), language_batch((7, 7))
    prepare(model, batch)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    found = compute_loss(model, prepare(model, batch))
    assert (found.n_labels, float(found.loss.detach())) == (0, 0.0)
    found.loss.backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)


def test_a_routers_loss_is_left_out_and_said():
    config = MixtralConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
        output_router_logits=True, router_aux_loss_coef=0.02,
    )  # fmt: skip
    config._experts_implementation = "eager"
    model, batch = seeded(lambda: MixtralForCausalLM(config), torch.float64), language_batch((7, 7))
    found = compute_loss(model, prepare(model, batch))
    assert found.labelling == "shifted (aux_loss is left out)"
    logits = model(**batch).logits[:, :-1].reshape(-1, VOCAB)
    expected = F.cross_entropy(logits, batch["labels"][:, 1:].reshape(-1), reduction="sum")
    torch.testing.assert_close(found.loss, expected)


def test_num_items_in_batch_does_not_change_the_loss():
    model = lora(seeded(gpt2, torch.float64))
    batch = {**language_batch((7, 7)), "num_items_in_batch": 1000}
    found = compute_loss(model, prepare(model, batch))
    del batch["num_items_in_batch"]
    expected = compute_loss(model, prepare(model, batch))
    assert found.n_labels == expected.n_labels
    torch.testing.assert_close(found.loss, expected.loss)


# ---- loss functions and loss tensors -------------------------------------------------------------


def shifted(outputs: Any, batch: Any, **options: Any) -> Tensor:
    logits, labels = outputs.logits[:, :-1], batch["labels"][:, 1:]
    return F.cross_entropy(logits.reshape(-1, VOCAB), labels.reshape(-1), **options)


def smoothed(outputs: Any, batch: Any) -> Tensor:
    return shifted(outputs, batch, label_smoothing=0.1)


def padded(outputs: Any, batch: Any) -> Tensor:
    """Unreduced, in the shape of the labels, with nothing at the last position."""
    logits, labels = outputs.logits, F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    losses = F.cross_entropy(logits.reshape(-1, VOCAB), labels.reshape(-1), reduction="none")
    return losses.reshape(labels.shape)


def unreduced(outputs: Any, batch: Any) -> Tensor:
    return shifted(outputs, batch, reduction="none")


def cut(outputs: Any, batch: Any) -> Tensor:
    return unreduced(outputs, batch).reshape(len(batch["labels"]), -1)


def in_place(outputs: Any, batch: Any) -> Tensor:
    return F.cross_entropy(outputs.logits.reshape(-1, VOCAB), batch["labels"].reshape(-1))


@pytest.mark.parametrize("function", [shifted, smoothed, padded, unreduced, cut, in_place])
def test_a_loss_function_counts_the_labels_that_it_uses(function):
    model, batch = seeded(gpt2, torch.float64), language_batch((7, 7), share=1.0)
    batch["labels"][0, 3] = -100
    found = compute_loss(model, prepare(model, batch, function), function)
    count = 13 if function is in_place else 11
    assert found.n_labels == count
    value = function(model(**batch), batch)
    torch.testing.assert_close(found.loss, value * count if value.dim() == 0 else value.sum())


@pytest.mark.parametrize("function", [shifted, smoothed, in_place])
def test_a_loss_tensor_counts_the_labels_that_it_used(function):
    model, batch = Wrapped(seeded(gpt2, torch.float64)), language_batch((7, 7), share=1.0)
    kfac = KFACNaturalGradient(damping=1e-3)
    with kfac.capture(model):
        loss = function(model(input_ids=batch["input_ids"]), batch)
    if function is smoothed:
        with pytest.raises(LossError, match=r"n_labels: whether the loss shifts .* \(14 or 12"):
            kfac.collect_kfac_factors(model, batch, loss=loss)
        return
    kfac.collect_kfac_factors(model, batch, loss=loss)
    assert kfac.labels.counted == (14 if function is in_place else 12)


def test_a_function_that_hides_its_labels_is_asked_for_a_count():
    model, batch = seeded(gpt2, torch.float64), language_batch((7, 7), share=1.0)
    prepared, labels = prepare(model, batch), batch["labels"]

    def hidden(outputs: Any, _: Any) -> Tensor:
        return in_place(outputs, {"labels": labels})

    with pytest.raises(LossError, match=r"n_labels: whether the loss shifts .* \(14 or 12 count\)"):
        compute_loss(model, prepared, hidden)
    assert compute_loss(model, prepared, hidden, n_labels=14).n_labels == 14


def test_every_number_of_a_dense_target_is_a_label():
    batch = rows_batch(3, 7)
    batch["labels"] = torch.randn(3, 5, dtype=torch.float64)
    model = seeded(lambda: nn.Linear(7, 5), torch.float64)
    losses = [
        compute_loss(model, batch, lambda y, b, how=how: F.mse_loss(y, b["labels"], reduction=how))
        for how in ("none", "mean")
    ]
    assert [one.n_labels for one in losses] == [15, 15]
    torch.testing.assert_close(losses[0].loss, losses[1].loss)


def test_one_loss_a_row_of_several_labels_is_asked_for_a_count():
    model, batch = seeded(gpt2, torch.float64), language_batch((7, 7), share=1.0)

    def rows(outputs: Any, batch: Any) -> Tensor:
        return cut(outputs, batch).mean(dim=1)

    with pytest.raises(LossError, match=r"n_labels: losses of shape \(2,\) for labels of shape"):
        compute_loss(model, prepare(model, batch), rows)


# ---- masks and packed sequences ------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("added", [False, True], ids=["bool", "added to the scores"])
def test_a_mask_of_who_attends_to_whom_says_which_positions_are_tokens(side, added):
    model, batch = seeded(gpt2, torch.float64), language_batch((7, 5), side)
    flat = batch["attention_mask"]
    attends = torch.ones(7, 7, dtype=torch.bool).tril() & (flat[:, None, None, :] != 0)
    four = torch.where(attends, 0.0, torch.finfo(torch.float32).min) if added else attends
    found = prepare(model, {**batch, "attention_mask": four})
    expected = prepare(model, batch)
    assert torch.equal(found["token_mask"] != 0, flat != 0)
    assert torch.equal(found["labels"], expected["labels"])
    assert found["attention_mask"] is not expected["attention_mask"]


def test_a_mask_that_does_not_say_what_is_padding_is_refused():
    mask = torch.ones(5, 5, dtype=torch.bool).tril()[None, None].repeat(2, 1, 1, 1)
    mask[1, :, :, 4] = False
    mask[1, :, 4, 4] = True  # sees itself alone, and nobody sees it
    mask[1, :, 4, :4] = False
    with pytest.raises(
        BatchError, match=r"attention_mask: which positions are padding .*token_mask"
    ):
        tokens_of_attention(mask, "attention_mask")
    model, batch = seeded(gpt2, torch.float64), language_batch((5, 5))
    given = {**batch, "attention_mask": mask, "token_mask": masks((5, 4))}
    assert torch.equal(prepare(model, given)["token_mask"], masks((5, 4)))


@pytest.mark.parametrize("way", ["numbered mask", "positions", "blocks"])
def test_the_first_label_of_a_packed_sequence_is_predicted_by_nobody(way):
    model, batch = seeded(gpt2, torch.float64), language_batch((7,), share=1.0)
    of = torch.tensor([[1, 1, 1, 2, 2, 2, 2]])
    if way == "numbered mask":
        batch["attention_mask"] = of
    elif way == "positions":
        del batch["attention_mask"]
        batch["position_ids"] = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    else:
        same = of[:, :, None] == of[:, None, :]
        batch["attention_mask"] = (same & torch.ones(7, 7, dtype=torch.bool).tril())[:, None]
    labels = prepare(model, batch)["labels"]
    assert labels[0, 1:].eq(-100).tolist() == [False, False, True, False, False, False]


# ---- the measurement itself ----------------------------------------------------------------------


def test_a_class_that_says_it_is_not_asked():
    for build in (gpt2, bert, t5):
        model, batch, calls = seeded(build, torch.float64), translation_batch(), []
        batch["labels"] = batch["input_ids"]
        model.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        assert is_certain(model, batch)
        prepare(model, batch)
        assert not calls


def test_a_model_is_asked_once_for_a_kind_of_batch():
    model, calls = lora(seeded(gpt2, torch.float64)), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    for seed in range(3):
        prepare(model, language_batch((7, 5), seed=seed))
    assert len(calls) == 3  # two orders of the labels, and a pass without any


class Noisy(nn.Module):
    """Draws in eval mode too, and counts its passes in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.base = seeded(gpt2, torch.float64)
        self.norm = nn.BatchNorm1d(VOCAB, dtype=torch.float64)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, input_ids, labels=None):
        self.passes += 1
        out = self.base(input_ids=input_ids, labels=labels)
        noise = torch.rand((), dtype=torch.float64)
        logits = self.norm(out.logits.transpose(1, 2)).transpose(1, 2) + noise
        out = SimpleNamespace(logits=logits, loss=None)
        out.loss = None if labels is None else shifted(out, {"labels": labels})
        return out


def test_asking_changes_nothing():
    model = Noisy().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    prepare(model, language_batch((7, 5)))
    assert shift_of(model) is True
    assert torch.equal(state, torch.get_rng_state())
    assert model.norm.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_batch_without_a_label_decides_nothing():
    model, batch = Wrapped(seeded(gpt2, torch.float64)), language_batch((7, 7))
    none = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    prepare(model, none)
    prepare(model, batch)
    assert shift_of(model) is True


# ---- the engines ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "make"),
    [
        (gpt2, lambda: language_batch((7, 5), "left")),
        (bart, lambda: language_batch((7, 5))),
        (lambda: lora(seeded(gpt2, torch.float64)), lambda: language_batch((7, 5))),
        (m2m100, translation_batch),
    ],
    ids=["shifted", "in place", "peft", "encoder-decoder"],
)
def test_every_engine_has_the_same_loss_and_count(build, make):
    batch = make()

    def fresh() -> nn.Module:
        torch.manual_seed(0)
        model = build()
        return model if hasattr(model, "peft_config") else seeded(lambda: model, torch.float64)

    model = fresh()
    summed = compute_loss(model, prepare(model, batch))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    expected = gradients_of(summed.loss, trained)
    model = fresh()
    kfac = KFACNaturalGradient(damping=1e-3)
    kfac.collect_kfac_factors(model, batch, keep_gradient=True)
    assert kfac.labels.counted == summed.n_labels
    own = kfac.own_gradients(model)
    model = fresh()
    collector = FisherCollector(unit="batch")
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    sums, count = collector.summed_gradient(model, batch, named)
    assert count == summed.n_labels
    for name in named:
        torch.testing.assert_close(sums[name], expected[name], msg=name)
        torch.testing.assert_close(
            own.get(name, torch.zeros_like(sums[name])) * count, expected[name], msg=name
        )
    model = fresh()
    samples = draw_samples(model, batch, unit="token", n_samples=None, seed=0)
    assert samples.total == summed.n_labels
    model = fresh()
    operator = CurvatureOperator("empirical", model, batch, dict(list(named.items())[:1]))
    assert operator.n_labels == summed.n_labels


def test_the_labels_are_said(caplog):
    model, batch = seeded(gpt2, torch.float64), language_batch((8, 8, 8), share=1.0)
    kfac = KFACNaturalGradient(damping=1e-3)
    with caplog.at_level("INFO"):
        kfac.collect_kfac_factors(model, batch)
        kfac.collect_kfac_factors(model, batch)
    assert str(kfac.labels) == "labels: shifted, 21 of 24"
    assert [r.message for r in caplog.records].count("labels: shifted, 21 of 24") == 1
    kfac.collect_kfac_factors(model, batch, loss=CrossEntropy())
    assert str(kfac.labels) == "labels: in place, 24 of 24"


class Transcribed(nn.Module):
    """Labels of another length than the logits, and a loss that is summed, as a CTC loss."""

    def __init__(self, reduction: str = "sum") -> None:
        super().__init__()
        self.head, self.reduction = nn.Linear(7, 5, dtype=torch.float64), reduction

    def forward(self, inputs, labels=None):
        logits = self.head(inputs)
        if labels is None:
            return SimpleNamespace(logits=logits, loss=None)
        lengths = (labels >= 0).sum(dim=1)
        steps, logs = torch.full((len(labels),), logits.shape[1]), logits.log_softmax(-1)
        given = logs.transpose(0, 1), labels[labels >= 0], steps, lengths
        return SimpleNamespace(logits=logits, loss=F.ctc_loss(*given, reduction=self.reduction))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_loss_over_examples_has_examples_for_labels(reduction):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3, 12, 7, generator=generator, dtype=torch.float64)
    labels = torch.tensor([[1, 2, 3, 4], [2, 1, -100, -100], [4, 3, 2, -100]])
    model, batch = Transcribed(reduction), {"inputs": inputs, "labels": labels}
    found = compute_loss(model, prepare(model, batch))
    assert found.n_labels == 3
    mean = model(**batch).loss / (3 if reduction == "sum" else 1)
    torch.testing.assert_close(found.loss, mean * 3)
