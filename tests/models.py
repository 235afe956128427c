"""Tiny models and batches, built from configurations alone (no hub, no files).

Every `Case` is a model family with a batch that is awkward on purpose: padding on one side, labels
partly -100, labels left *in place* under the padding (Hugging Face would count them), token counts
that are no power of four and lie below or above every layer's output width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

VOCAB = 53
WIDTH = 16
IGNORE = -100
Batch = dict[str, Tensor]

# Sequence lengths of a batch: 13 tokens are fewer than any output width (16 at the least), 89 are
# more than any (64 at the most).
FEW = (5, 8)
MANY = (17, 23, 30, 19)


FAMILIES = {
    "gpt2": (GPT2LMHeadModel, GPT2Config),
    "llama": (LlamaForCausalLM, LlamaConfig),
    "bert": (BertForMaskedLM, BertConfig),
    "bert_classifier": (BertForSequenceClassification, BertConfig),
    "t5": (T5ForConditionalGeneration, T5Config),
}


def built(family: str, attention: str | None = "eager", **config) -> PreTrainedModel:
    """A model of one of the `FAMILIES`, with fresh weights."""
    model_class, config_class = FAMILIES[family]
    made = config_class(**{"vocab_size": VOCAB, **config})
    made._attn_implementation = attention
    return model_class(made)


def gpt2(tied: bool = True, *, width: int = WIDTH, layers: int = 2) -> PreTrainedModel:
    """GPT-2: `Conv1D` layers, biases, a head tied to the token embedding or not."""
    return built(
        "gpt2", tie_word_embeddings=tied, n_embd=width, n_layer=layers, n_head=2, n_positions=40,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip


def llama(tied: bool = False, *, width: int = WIDTH, inner: int = 24) -> PreTrainedModel:
    """LLaMA: no biases, RMSNorm, a gated MLP whose gate and up share an input.

    Its eager attention takes the softmax in float32, where a float64 mask overflows and a row of
    padding (left) turns into nan; the fused one stays in the model's dtype.
    """
    return built(
        "llama", "sdpa", tie_word_embeddings=tied, hidden_size=width, intermediate_size=inner,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        max_position_embeddings=40,
    )  # fmt: skip


def bert(family: str = "bert", **more) -> PreTrainedModel:
    """BERT with its masked-language-model head (tied weight, bias of its own)."""
    return built(
        family, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=40, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, **more,
    )  # fmt: skip


def bert_classifier() -> PreTrainedModel:
    """BERT with a pooler: the pooler and the classifier have one token per example."""
    return bert("bert_classifier", num_labels=3)


def t5(tied: bool = True) -> PreTrainedModel:
    """T5: encoder, decoder and cross-attention, each token with the mask of its own origin."""
    return built(
        "t5", tie_word_embeddings=tied, d_model=WIDTH, d_kv=8, d_ff=24, num_layers=1,
        num_decoder_layers=1, num_heads=2, dropout_rate=0.0, decoder_start_token_id=0,
    )  # fmt: skip


class MLP(nn.Module):
    """Two linear layers; a plain module whose output is a tensor of logits, without `.loss`."""

    def __init__(self, sizes: Sequence[int] = (7, 9, 4), bias: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(sizes[0], sizes[1], bias=bias)
        self.second = nn.Linear(sizes[1], sizes[2], bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Twice(nn.Module):
    """One linear layer called twice in a forward pass: its tokens add up."""

    def __init__(self, width: int = 6, classes: int = 4) -> None:
        super().__init__()
        self.shared = nn.Linear(width, width)
        self.head = nn.Linear(width, classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.shared(torch.tanh(self.shared(x)))))


class Gated(nn.Module):
    """A side layer that is always called, and reaches the loss only where `open` is true."""

    def __init__(self, width: int = 6, classes: int = 4) -> None:
        super().__init__()
        self.main = nn.Linear(width, classes)
        self.side = nn.Linear(width, classes)
        self.open = True

    def forward(self, x: Tensor) -> Tensor:
        side = self.side(x)
        return self.main(x) + (side if self.open else side.detach())


def seeded(build: Callable[[], nn.Module], dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """A model in eval mode with seeded weights, made less symmetrical than a fresh one.

    Fresh Hugging Face weights have a deviation of 0.02, unit norms and zero biases: logits are
    next to uniform and mistakes in norms and biases hide. The weights are drawn anew, wider.
    """
    generator = torch.Generator().manual_seed(seed)
    model = build().to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim == 1:
                is_scale = "bias" not in name
                parameter.copy_((1.0 if is_scale else 0.0) + 0.2 * noise)
            else:
                parameter.copy_(0.2 * noise)
    return model


def masks(lengths: Sequence[int], side: str = "right") -> Tensor:
    """Attention mask `[batch, max(lengths)]` for sequences of these lengths, padded on `side`."""
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return mask.flip(1) if side == "left" else mask


def _ids(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    # 0 is padding (BERT's padding row has no gradient) and 1 T5's end of sequence.
    return torch.randint(2, VOCAB, tuple(shape), generator=generator)


def _some(ids: Tensor, share: float, generator: torch.Generator) -> Tensor:
    keep = torch.rand(ids.shape, generator=generator) < share
    return torch.where(keep, ids, torch.full_like(ids, IGNORE))


def language_batch(
    lengths: Sequence[int] = MANY, side: str = "right", share: float = 0.6, seed: int = 1
) -> Batch:
    """Token batch with padding; labels partly -100, and *not* -100 under the padding."""
    generator = torch.Generator().manual_seed(seed)
    mask = masks(lengths, side)
    ids = _ids(mask.shape, generator) * mask
    labels = _some(_ids(mask.shape, generator), share, generator)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if side == "left":  # positions that a sequence would have on its own
        batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return batch


def classifier_batch(lengths: Sequence[int] = MANY, side: str = "right", seed: int = 1) -> Batch:
    """Padded token batch with one label a sequence."""
    batch = language_batch(lengths, side, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    batch["labels"] = torch.randint(0, 3, (len(lengths),), generator=generator)
    return batch


def rows_batch(n: int = 6, width: int = 7, classes: int = 4, seed: int = 0) -> Batch:
    """Rows and labels for a plain model."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, width, generator=generator, dtype=torch.float64)
    return {"x": x, "labels": torch.randint(0, classes, (n,), generator=generator)}


def t5_batch(
    encoder: Sequence[int], decoder: Sequence[int], share: float = 0.6, seed: int = 1
) -> Batch:
    """Encoder-decoder batch, both sides padded on the right with masks of their own."""
    generator = torch.Generator().manual_seed(seed)
    mask, decoder_mask = masks(encoder), masks(decoder)
    return {
        "input_ids": _ids(mask.shape, generator) * mask,
        "attention_mask": mask,
        "decoder_input_ids": _ids(decoder_mask.shape, generator) * decoder_mask,
        "decoder_attention_mask": decoder_mask,
        "labels": _some(_ids(decoder_mask.shape, generator), share, generator),
    }


def one_by_one(batch: Batch) -> list[Batch]:
    """The sequences of a padded batch as batches of one, padding cut away."""
    singles = []
    for row in range(len(batch["input_ids"])):
        kept = batch["attention_mask"][row].bool()
        decoder_kept = batch.get("decoder_attention_mask", batch["attention_mask"])[row].bool()
        single = {}
        for key, value in batch.items():
            of_decoder = key.startswith("decoder_") or key == "labels"
            single[key] = value[row][decoder_kept if of_decoder else kept][None]
        singles.append(single)
    return singles


@dataclass(frozen=True)
class Case:
    """A model family with its batch for few and for many tokens."""

    name: str
    build: Callable[[], nn.Module]
    few: Callable[[], Batch]
    many: Callable[[], Batch]

    def model(self, dtype: torch.dtype) -> nn.Module:
        return seeded(self.build, dtype)

    def batch(self, tokens: str) -> Batch:
        return {"few": self.few, "many": self.many}[tokens]()


CASES = {
    case.name: case
    for case in (
        Case("gpt2_tied", gpt2, lambda: language_batch(FEW), lambda: language_batch(MANY, "left")),
        Case(
            "gpt2_untied",
            lambda: gpt2(tied=False),
            lambda: language_batch(FEW, "left"),
            lambda: language_batch(MANY),
        ),
        Case("llama", llama, lambda: language_batch(FEW), lambda: language_batch(MANY)),
        Case("bert_right", bert, lambda: language_batch(FEW), lambda: language_batch(MANY)),
        Case(
            "bert_left",
            bert,
            lambda: language_batch(FEW, "left"),
            lambda: language_batch(MANY, "left"),
        ),
        Case(
            "t5_lengths",
            t5,
            lambda: t5_batch((8, 5), (4, 7)),
            lambda: t5_batch((30, 17, 24), (25, 20, 27)),
        ),
        Case(
            "t5_masks",
            lambda: t5(tied=False),
            lambda: t5_batch((8, 5), (3, 8)),
            lambda: t5_batch((30, 17, 24), (21, 30, 20)),
        ),
    )
}
