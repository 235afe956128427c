"""The workloads of the K-FAC benchmarks: models from a seed, one batch, and the layers to measure.

Every library gets the same model, batch, layers and Fisher kind: the empirical Fisher of the
token-summed loss, all positions labelled and active, KFAC-expand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class Causal(nn.Module):
    """A causal language model with the libraries' interface: token indices to logits ``[N, C]``.

    The label of a position is the next token; the last position of a sequence is cut off, so
    that every position counts and no library has to know about masks.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        """Returns logits ``[B * S, C]``."""
        logits = self.model(input_ids=ids, use_cache=False).logits
        return logits.reshape(-1, logits.shape[-1])


@dataclass
class Workload:
    """A model with one batch.

    Attributes:
        model: inputs to logits ``[T, C]``.
        inputs: of the model.
        labels: ``[T]``.
        layers: names of the linear layers that are measured.
    """

    model: nn.Module
    inputs: Tensor
    labels: Tensor
    layers: list[str]

    def loss(self) -> Tensor:
        """The token-summed loss, with its graph."""
        return nn.functional.cross_entropy(self.model(self.inputs), self.labels, reduction="sum")


def _linear(model: nn.Module, *, head: bool) -> list[str]:
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    return [n for n in names if head or not n.endswith("lm_head")]


def llama(*, head: bool, batch: int = 8, length: int = 128, vocabulary: int = 32000) -> Workload:
    """LLaMA, 4 layers, width 256 (28 linear layers), 32000 tokens untied."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=256, intermediate_size=1024, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=False,
    )  # fmt: skip
    model = Causal(LlamaForCausalLM(config).eval())
    ids = torch.randint(0, vocabulary, (batch, length + 1))
    return Workload(model, ids[:, :-1], ids[:, 1:].reshape(-1), _linear(model, head=head))


def gpt2(*, batch: int = 4, length: int = 128) -> Workload:
    """GPT-2, 4 layers, width 256, a tied head of 50257 tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_embd=256, n_layer=4, n_head=4, n_positions=length, vocab_size=50257)
    model = Causal(GPT2LMHeadModel(config).eval())
    ids = torch.randint(0, 50257, (batch, length + 1))
    names = [
        n
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"
    ]
    return Workload(model, ids[:, :-1], ids[:, 1:].reshape(-1), names)


def head(width: int, out: int, tokens: int) -> Workload:
    """A head alone: one linear layer over random features."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, out, bias=False))
    with torch.no_grad():
        model[0].weight.mul_(0.5)
    features = torch.randn(tokens, width)
    return Workload(model, features, torch.randint(0, out, (tokens,)), ["0"])


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "llama": lambda: llama(head=False),
    "llama+head": lambda: llama(head=True),
    "llama+head, T=512": lambda: llama(head=True, batch=4),
    "gpt2+head": gpt2,
    "head 4096x50257, T=512": lambda: head(4096, 50257, 512),
    "head 4096x50257, T=8192": lambda: head(4096, 50257, 8192),
    "head 256x50257, T=512": lambda: head(256, 50257, 512),
    "head 256x50257, T=6144": lambda: head(256, 50257, 6144),
    "head 256x128256, T=512": lambda: head(256, 128256, 512),
}


def describe(workload: Workload) -> dict[str, Any]:
    """Says how large a workload is."""
    return {
        "parameters": sum(p.numel() for p in workload.model.parameters()),
        "tokens": workload.labels.numel(),
        "layers": len(workload.layers),
    }
