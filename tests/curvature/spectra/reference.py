"""Tiny models of four architectures, and dense references written from docs/math.md by loops."""

from __future__ import annotations

import json
import math

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from fisher_lab.curvature.spectra import eigensolve
from fisher_lab.curvature.spectra.spectrum import FisherSpectral, SpectralConfig

EXACT_MODES = ("full", "chunked", "streaming")
ARCHITECTURES = ("gpt2", "llama", "bert", "t5")
VOCAB = 13


def tiny(architecture: str, *, tied: bool = True, seed: int = 0, scale: float = 1.0) -> nn.Module:
    """A float64 model of two layers; its weights are spread out so that spectra are not flat."""
    torch.manual_seed(seed)
    match architecture:
        case "gpt2":
            model = GPT2LMHeadModel(
                GPT2Config(
                    vocab_size=VOCAB, n_embd=6, n_layer=2, n_head=2, n_positions=8,
                    tie_word_embeddings=tied, bos_token_id=0, eos_token_id=0,
                )
            )  # fmt: skip
        case "llama":
            model = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=VOCAB, hidden_size=8, intermediate_size=10, num_hidden_layers=2,
                    num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=8,
                    tie_word_embeddings=not tied,
                )
            )  # fmt: skip
        case "bert":
            model = BertForMaskedLM(
                BertConfig(
                    vocab_size=VOCAB, hidden_size=6, num_hidden_layers=2, num_attention_heads=2,
                    intermediate_size=10, max_position_embeddings=8, tie_word_embeddings=tied,
                )
            )  # fmt: skip
        case "t5":
            model = T5ForConditionalGeneration(
                T5Config(
                    vocab_size=VOCAB, d_model=6, d_kv=3, d_ff=10, num_layers=2, num_heads=2,
                    decoder_start_token_id=0, pad_token_id=0, tie_word_embeddings=tied,
                    relative_attention_num_buckets=4,
                )
            )  # fmt: skip
        case _:
            raise ValueError(architecture)
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0 * scale)
    return model.train()


def batch_of(architecture: str, seed: int = 1) -> dict[str, Tensor]:
    """Three sequences: padded right, padded left, full; some labels at -100."""
    generator = torch.Generator().manual_seed(seed)
    length = 5
    ids = torch.randint(1, VOCAB, (3, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 3:] = 0
    mask[1, :2] = 0
    if architecture == "t5":
        labels = torch.randint(1, VOCAB, (3, 3), generator=generator)
        labels[0, 2:] = -100
        labels[1, 1] = -100
    else:
        labels = ids.clone()
        labels[2, 1] = -100
        if architecture == "bert":
            labels[torch.rand(labels.shape, generator=generator) < 0.3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def labelled(architecture: str, batch: dict[str, Tensor]) -> list[tuple[int, int, int]]:
    """(sequence, predicting position, label) of every token that has a loss."""
    ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
    found = []
    for row in range(len(ids)):
        for t in range(labels.shape[1]):
            if architecture == "t5":
                counts, where = True, t
            elif architecture == "bert":
                counts, where = mask[row, t] == 1, t
            else:
                counts, where = t > 0 and mask[row, t] == 1 and mask[row, t - 1] == 1, t - 1
            if counts and labels[row, t] != -100:
                found.append((row, where, int(labels[row, t])))
    return found


def forward_logits(model: nn.Module, batch: dict[str, Tensor], architecture: str) -> Tensor:
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    if architecture == "t5":
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    return model(**inputs).logits


def reference_rows(
    model: nn.Module, batch: dict[str, Tensor], architecture: str, unit: str = "token"
) -> tuple[list[str], dict[str, Tensor]]:
    """One backward a token: the rows of J by parameter, ``[N, numel]``; zeros where unreached."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    named = dict(model.named_parameters())
    rows: dict[str, list[Tensor]] = {name: [] for name in named}
    where = labelled(architecture, batch)
    groups = [[one] for one in where]
    if unit == "sequence":
        groups = [[w for w in where if w[0] == row] for row in sorted({w[0] for w in where})]
    for group in groups:
        logits = forward_logits(model, batch, architecture)
        loss = sum(-torch.log_softmax(logits[b, t], -1)[y] for b, t, y in group)
        grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        for (name, parameter), grad in zip(named.items(), grads, strict=True):
            rows[name].append((torch.zeros_like(parameter) if grad is None else grad).flatten())
    for module, training in modes:
        module.training = training
    return list(named), {name: torch.stack(parts) for name, parts in rows.items()}


def reference_fisher(rows: dict[str, Tensor], names: list[str], *, center: bool = False) -> Tensor:
    """The explicit ``P x P`` matrix ``(1/N) J^T J``."""
    matrix = torch.cat([rows[name] for name in names], dim=1)
    if center:
        matrix = matrix - matrix.mean(0)
    return matrix.T @ matrix / len(matrix)


def reference_spectrum(
    rows: dict[str, Tensor], names: list[str], *, center: bool = False
) -> Tensor:
    """Eigenvalues of the Fisher matrix, descending, from the singular values of ``J/sqrt(N)``."""
    matrix = torch.cat([rows[name] for name in names], dim=1)
    if center:
        matrix = matrix - matrix.mean(0)
    return torch.linalg.svdvals(matrix / math.sqrt(len(matrix))).square()


def assert_same_spectrum(
    found: list[float], wanted: Tensor | list[float], relative: float = 1e-8
) -> None:
    """Every eigenvalue to ``relative``; those below 1e-7 of the largest against that largest.

    A float64 matrix product fixes an eigenvalue only to about 1e-16 of the largest, so a relative
    1e-8 can be asked of those above 1e-7 of it.
    """
    values = torch.tensor(found, dtype=torch.float64)
    wanted = torch.as_tensor(wanted, dtype=torch.float64)
    assert len(values) == len(wanted), (len(values), len(wanted))
    scale = wanted.clamp(min=1e-7 * float(wanted[0]))
    worst = float(((values - wanted).abs() / scale).max())
    assert worst <= relative, worst


def spectrum(model, batch, *, structure="layer", center=False, n_samples=None, **config):
    config = SpectralConfig(**{"chunk_size": 4, **config})
    return FisherSpectral(config).compute_fisher_spectrum(
        model, batch, n_samples, structure, center
    )


def assert_no_number(record):
    assert record["status"] == "degenerate"
    assert record["eigenvalues"] == []
    assert record["reason"]
    assert all(record[key] is None for key in eigensolve.NUMBERS)
    json.dumps(record, allow_nan=False)
