"""Labels that are easy to take for others: image tokens, prompts, transcriptions, losses apart."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import PromptTuningConfig, TaskType, get_peft_model
from torch import Tensor, nn

from fisher_lab import KFACNaturalGradient
from fisher_lab.curvature.errors import BatchError, LossError
from fisher_lab.curvature.losses import compute_loss, prepare, shift_of
from tests.curvature.test_labels import Wrapped
from tests.models import VOCAB, gpt2, language_batch, masks, seeded

DOUBLE, IMAGE = torch.float64, 7


def checked(model: nn.Module, batch: dict[str, Tensor], **settings: Any) -> KFACNaturalGradient:
    """Factors whose gradient is autograd's of the model's own mean loss."""
    kfac = KFACNaturalGradient(damping=1e-2, **settings)
    kfac.collect_kfac_factors(model, batch, keep_gradient=True, verify=True)
    own = kfac.own_gradients(model)
    out = model(**batch)
    loss = out["loss"] if isinstance(out, dict) else out.loss
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    compared = 0
    for name, gradient in zip(trained, grads, strict=True):
        if gradient is not None and name in own:
            # Hugging Face's loss is float32.
            torch.testing.assert_close(own[name], gradient, rtol=1e-4, atol=1e-7, msg=name)
            compared += 1
    assert compared > 2
    return kfac


# ---- image tokens --------------------------------------------------------------------------------


def llava() -> nn.Module:
    sees = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        image_size=8, patch_size=4, projection_dim=16,
    )  # fmt: skip
    reads = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=40,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=sees, text_config=reads, image_token_index=IMAGE, image_seq_length=4
    )
    return transformers.LlavaForConditionalGeneration(config)


def picture_batch(first: bool) -> dict[str, Tensor]:
    """The processor's image token is repeated: four of them, at the beginning or later on."""
    batch = language_batch((9, 7), share=1.0)
    ids = batch["input_ids"]
    ids[ids == IMAGE] = IMAGE + 1
    start = 0 if first else 2
    ids[:, start : start + 4] = IMAGE
    labels = batch["labels"].where(ids != IMAGE, torch.tensor(-100))
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    mask = batch["attention_mask"]
    labels = labels.where(mask > 0, torch.tensor(-100))
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": pixels}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("wrapped", [False, True])
def test_image_tokens_that_the_processor_has_repeated(first, wrapped):
    model, batch = seeded(llava, DOUBLE), picture_batch(first)

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = model

        def forward(self, input_ids, pixel_values, attention_mask=None, labels=None):
            return self.base(
                input_ids=input_ids, pixel_values=pixel_values, attention_mask=attention_mask,
                labels=labels,
            )  # fmt: skip

    kfac = checked(Holder() if wrapped else model, batch)
    count = int((batch["labels"][:, 1:] != -100).sum())
    assert str(kfac.labels) == f"labels: shifted, {count} of {int((batch['labels'] >= 0).sum())}"


class Expands(nn.Module):
    """Puts three vectors in the place of each image token: logits are longer than labels."""

    def __init__(self, smoothing: float = 0.0) -> None:
        super().__init__()
        self.words, self.sees = nn.Embedding(VOCAB, 8), nn.Linear(5, 8)
        self.mixes, self.head = nn.Linear(8, 8), nn.Linear(8, VOCAB)
        self.smoothing = smoothing

    def forward(self, input_ids, pictures, labels=None):
        words, seen = self.words(input_ids), self.sees(pictures)
        place = int((input_ids[0] == IMAGE).nonzero()[0, 0])

        def put(x, y):
            return torch.cat([x[:, :place], y, x[:, place + 1 :]], 1)

        x = put(words, seen)
        x = x + torch.tanh(self.mixes(x)).cumsum(1)
        logits, loss = self.head(torch.tanh(x)), None
        if labels is not None:
            longer = put(labels, labels.new_full((len(labels), 3), -100))
            rows = logits[:, :-1].reshape(-1, VOCAB), longer[:, 1:].reshape(-1)
            loss = F.cross_entropy(*rows, label_smoothing=self.smoothing)
        return {"logits": logits, "loss": loss}


@pytest.mark.parametrize("place", [0, 1, 4])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_image_tokens_that_the_model_expands_itself(place, smoothing):
    torch.manual_seed(0)
    model = Expands(smoothing).double()
    ids = torch.randint(8, VOCAB, (2, 7))
    ids[:, place] = IMAGE
    labels = ids.where(ids != IMAGE, torch.tensor(-100))
    labels[0, 5] = -100
    batch = {"input_ids": ids, "pictures": torch.randn(2, 3, 5, dtype=DOUBLE), "labels": labels}
    kfac = checked(model, batch)
    assert kfac.labels.counted == int((labels[:, 1:] != -100).sum())
    assert "by the model's own loss" in str(kfac.labels)


def test_a_prompt_before_the_words_predicts_the_first_of_them():
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3)
    torch.manual_seed(0)
    model = get_peft_model(seeded(gpt2, DOUBLE), config).double()
    batch = language_batch((6, 6), share=1.0)
    found = compute_loss(model, prepare(model, batch))
    assert found.n_labels == 12
    torch.testing.assert_close(found.loss, model(**batch).loss * 12)


# ---- transcriptions ------------------------------------------------------------------------------


def wav2vec2(reduction: str) -> nn.Module:
    config = transformers.Wav2Vec2Config(
        vocab_size=6, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, conv_dim=(8, 8), conv_stride=(4, 2), conv_kernel=(4, 2),
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        feat_extract_norm="layer", ctc_loss_reduction=reduction, pad_token_id=0,
        hidden_dropout=0.0, attention_dropout=0.0, feat_proj_dropout=0.0, final_dropout=0.0,
        apply_spec_augment=False,
    )  # fmt: skip
    return transformers.Wav2Vec2ForCTC(config)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("lengths", [(4, 2, 3), (3, 3, 3), (2, 2, 1)])
def test_a_transcription_is_one_label_an_example(reduction, lengths):
    model = seeded(lambda: wav2vec2(reduction), DOUBLE)
    generator = torch.Generator().manual_seed(0)
    labels = torch.full((3, max(lengths)), -100)
    for row, n in enumerate(lengths):
        labels[row, :n] = torch.randint(1, 6, (n,), generator=generator)
    sounds = torch.randn(3, 96, generator=generator, dtype=DOUBLE)
    batch = {"input_values": sounds, "labels": labels}
    found = compute_loss(model, prepare(model, batch))
    assert found.n_labels == 3
    own = model(**batch).loss
    torch.testing.assert_close(found.loss, own * (1 if reduction == "sum" else 3))


class Frames(nn.Module):
    """Transcriptions that are padded to as many places as there are frames."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 5)

    def forward(self, features, attention_mask, labels=None):
        logits, loss = self.head(features), None
        if labels is not None:
            steps, many = attention_mask.sum(1), (labels > 0).sum(1)
            logs = logits.log_softmax(-1).transpose(0, 1)
            loss = F.ctc_loss(logs, labels[labels > 0], steps, many, reduction="sum")
        return SimpleNamespace(logits=logits, loss=loss)


def test_a_transcription_has_no_place_among_the_frames():
    """Its labels are not those of the positions whose mask has the same shape."""
    torch.manual_seed(0)
    model = Frames().double()
    labels = torch.full((2, 7), -100)
    labels[0, :3], labels[1, 4:] = torch.tensor([1, 2, 3]), torch.tensor([3, 4, 1])
    mask = masks((7, 5))
    batch = {"features": torch.randn(2, 7, 4).double(), "attention_mask": mask, "labels": labels}
    found = compute_loss(model, prepare(model, batch))
    assert found.n_labels == 2
    torch.testing.assert_close(found.loss, model(**batch).loss)


# ---- losses that are almost a mean over the labels -----------------------------------------------


class Losses(nn.Module):
    """A causal model with a loss of its own."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.base, self.kind = seeded(gpt2, DOUBLE), kind

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.base(input_ids=input_ids, attention_mask=attention_mask).logits
        loss = None if labels is None else getattr(self, self.kind)(logits, labels)
        return {"logits": logits, "loss": loss}

    def weighted(self, logits, labels):
        """Class weights: labels count unequally."""
        weight = torch.linspace(0.5, 2.0, VOCAB, dtype=DOUBLE)
        rows = logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1)
        return F.cross_entropy(*rows, weight=weight)

    def regularised(self, logits, labels):
        """A term over all positions, whether they have a label or not."""
        rows = logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1)
        return F.cross_entropy(*rows) + 1e-2 * logits.logsumexp(-1).square().mean()

    def padded(self, logits, labels):
        """Another value than -100 for what does not count."""
        rows = logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].clamp(min=0).reshape(-1)
        return F.cross_entropy(*rows, ignore_index=0)

    def by_sequence(self, logits, labels):
        """The mean over sequences of the mean over their labels."""
        rows = logits[:, :-1].transpose(1, 2), labels[:, 1:]
        losses, many = F.cross_entropy(*rows, reduction="none"), (labels[:, 1:] >= 0).sum(1)
        return (losses.sum(1) / many).mean()

    def backwards(self, logits, labels):
        """Every position predicts the label before it."""
        rows = logits[:, 1:].reshape(-1, VOCAB), labels[:, :-1].reshape(-1)
        return F.cross_entropy(*rows)


def uneven_batch() -> dict[str, Tensor]:
    batch = language_batch((8, 8), share=1.0)
    batch["labels"][0, 2:5] = -100
    return batch


@pytest.mark.parametrize("kind", ["weighted", "regularised"])
def test_a_loss_that_counts_labels_unequally_is_asked_for_its_count(kind):
    model, batch = Losses(kind), uneven_batch()
    with pytest.raises(LossError, match="n_labels: what the loss of Losses is a mean over"):
        compute_loss(model, prepare(model, batch))
    found = compute_loss(model, prepare(model, batch), n_labels=11)
    torch.testing.assert_close(found.loss, model(**batch)["loss"] * 11)


def test_a_mean_over_sequences_has_sequences_for_labels():
    model, batch = Losses("by_sequence"), uneven_batch()
    found = compute_loss(model, prepare(model, batch))
    assert found.n_labels == 2
    torch.testing.assert_close(found.loss, model(**batch)["loss"] * 2)


def test_another_value_that_does_not_count_is_not_taken_for_a_label():
    model, batch = Losses("padded"), uneven_batch()
    batch["labels"] = batch["labels"].clamp(min=0)  # as the loss has it
    batch["labels"][1, 3] = 0
    with pytest.raises(LossError, match="n_labels: what the loss of Losses is a mean over"):
        compute_loss(model, prepare(model, batch))


def test_a_loss_that_predicts_the_word_before_is_no_shifted_one():
    model, batch = Losses("backwards"), uneven_batch()
    try:
        found = compute_loss(model, prepare(model, batch))
    except LossError:
        return
    assert found.n_labels == int((batch["labels"][:, :-1] >= 0).sum())
    torch.testing.assert_close(found.loss, model(**batch)["loss"] * found.n_labels)


class Teaches(nn.Module):
    """With labels, its decoder reads them; without, it reads the words."""

    def __init__(self) -> None:
        super().__init__()
        self.base = seeded(gpt2, DOUBLE)

    def forward(self, input_ids, labels=None):
        read = input_ids if labels is None else labels.clamp(min=0).roll(1, 1)
        logits, loss = self.base(input_ids=read).logits, None
        if labels is not None:
            loss = F.cross_entropy(logits.reshape(-1, VOCAB), labels.reshape(-1))
        return {"logits": logits, "loss": loss}


def test_logits_that_labels_change_are_not_those_of_the_pass_without_labels():
    model, batch = Teaches(), language_batch((7, 7), share=1.0)
    del batch["attention_mask"]
    with pytest.raises(LossError, match="n_labels: what the loss of Teaches is a mean over"):
        compute_loss(model, prepare(model, batch))


class Insists(nn.Module):
    """Computes its loss whatever it is given, as many training scripts' models do."""

    def __init__(self) -> None:
        super().__init__()
        self.base = seeded(gpt2, DOUBLE)

    def forward(self, input_ids, attention_mask, labels: Any = None):
        logits = self.base(input_ids=input_ids, attention_mask=attention_mask).logits
        every = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"logits": logits, "loss": every}


class Demands(Insists):
    def forward(self, input_ids, attention_mask, labels):  # type: ignore[override]
        return super().forward(input_ids, attention_mask, labels)


@pytest.mark.parametrize("kind", [Insists, Demands])
@pytest.mark.parametrize("fisher", ["empirical", "mc", "true"])
def test_a_model_that_cannot_run_without_labels_has_them(kind, fisher):
    model, batch = kind(), language_batch((7, 7))
    kfac = checked(model, batch, fisher=fisher, true_max_classes=VOCAB)
    assert kfac.labels.labelling == "shifted"
    other = KFACNaturalGradient(damping=1e-2, fisher=fisher, true_max_classes=VOCAB)
    other.collect_kfac_factors(model.base, batch)
    for name, factors in other.kfac_factors.items():
        mine = kfac.kfac_factors[f"base.{name}"]
        torch.testing.assert_close(mine.G.to_dense(), factors.G.to_dense(), rtol=1e-5, atol=1e-9)


# ---- real-valued labels, several in a row --------------------------------------------------------


class OfRows(nn.Module):
    """A model whose labels are rows of numbers, with a loss of the user's."""

    def __init__(self, loss: Any) -> None:
        super().__init__()
        self.hidden, self.head, self.loss = nn.Linear(5, 6), nn.Linear(6, 3), loss

    def forward(self, x: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        logits = self.head(self.hidden(x).tanh())
        return SimpleNamespace(
            logits=logits, loss=None if labels is None else self.loss(logits, labels)
        )


def _a_kl(logits: Tensor, labels: Tensor) -> Tensor:
    return F.kl_div(logits.log_softmax(-1), labels, reduction="batchmean")


# Four rows of three numbers. The factor turns the loss into the sum over rows or numbers.
ROWS = {
    "soft classes": (F.cross_entropy, 4, 4),
    "soft classes, summed": (lambda z, y: F.cross_entropy(z, y, reduction="sum"), 4, 1),
    "a divergence": (_a_kl, 4, 4),
    "cosines": (lambda z, y: 1 - F.cosine_similarity(z, y).mean(), 4, 4),
    "squares of a row": (lambda z, y: (z - y).square().sum(-1).mean(), 4, 4),
    "squares": (F.mse_loss, 12, 12),
    "squares, summed": (lambda z, y: (z - y).square().sum(), 12, 1),
    "half the squares": (lambda z, y: F.mse_loss(z, y) / 2, 12, 12),
    "absolute values": (F.l1_loss, 12, 12),
    "counts": (F.poisson_nll_loss, 12, 12),
}


@pytest.mark.parametrize("kind", ROWS)
def test_rows_of_numbers_are_a_label_each_where_the_loss_takes_them_together(kind):
    loss, n_labels, factor = ROWS[kind]
    torch.manual_seed(0)
    model = OfRows(loss).double()
    batch = {"x": torch.randn(4, 5).double(), "labels": torch.rand(4, 3).double().softmax(-1)}
    kfac = KFACNaturalGradient(damping=1e-2)
    kfac.collect_kfac_factors(model, batch, keep_gradient=True, verify=True)
    assert kfac.labels.counted == n_labels
    z = model(batch["x"]).logits.detach().requires_grad_()
    (g,) = torch.autograd.grad(factor * loss(z, batch["labels"]), z)
    torch.testing.assert_close(kfac.kfac_factors["head"].G.to_dense(), g.T @ g / 4)


# ---- passes of the measurement -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "passes"),
    [
        (lambda: Wrapped(seeded(gpt2, DOUBLE)), 3),  # two orders of labels, and without
        (lambda: Losses("by_sequence"), 8),  # labels left out, then examples
    ],
)
def test_the_measurement_makes_few_passes(build, passes):
    model, calls = build(), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    for seed in range(2):
        prepare(model, language_batch((8, 8), seed=seed))
    assert len(calls) <= passes


def test_a_compiled_model_is_asked_as_it_was_written():
    model, batch = Wrapped(seeded(gpt2, DOUBLE)), language_batch((7, 7))
    model.base.compile(backend=_refused)
    prepare(model, batch)
    assert shift_of(model) is True


def _refused(*_: Any) -> Any:
    raise AssertionError("compiled for a measurement")


# ---- masks ---------------------------------------------------------------------------------------


def test_a_mask_for_each_kind_of_attention_says_which_positions_are_tokens():
    model, batch = seeded(gpt2, DOUBLE), language_batch((7, 5))
    flat = batch["attention_mask"]
    four = torch.ones(7, 7, dtype=torch.bool).tril() & (flat[:, None, None, :] != 0)
    near = four & torch.ones(7, 7, dtype=torch.bool).triu(-2)
    given = {"full_attention": four, "sliding_attention": near}
    found = prepare(model, {**batch, "attention_mask": given})
    assert torch.equal(found["token_mask"] != 0, flat != 0)
    assert torch.equal(found["labels"], prepare(model, batch)["labels"])
    none = prepare(model, {**batch, "attention_mask": dict.fromkeys(given)})
    assert "token_mask" not in none


def test_a_mask_that_is_no_tensor_wants_one_beside_it():
    model, batch = seeded(gpt2, DOUBLE), language_batch((7, 5))
    given = {**batch, "attention_mask": SimpleNamespace(BLOCK_SIZE=(128, 128))}
    with pytest.raises(BatchError, match=r"attention_mask: a SimpleNamespace .* 'token_mask'"):
        prepare(model, given)
    beside = prepare(model, {**given, "token_mask": batch["attention_mask"]})
    assert torch.equal(beside["labels"], prepare(model, batch)["labels"])


def test_segments_in_any_order_and_padding_between_them():
    model, batch = seeded(gpt2, DOUBLE), language_batch((8,), share=1.0)
    batch["attention_mask"] = torch.tensor([[2, 2, 0, 1, 1, 1, 3, 3]])
    labels = prepare(model, batch)["labels"]
    counts = labels[0, 1:] != -100
    assert counts.tolist() == [True, False, False, True, True, False, True]
