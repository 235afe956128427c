"""The factors of one layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fisher_lab.curvature.collectives import Spread, dtype_name
from fisher_lab.curvature.kfac.factors import Factor
from fisher_lab.curvature.kfac.layers import Layer

_VIEW: dict[str, Callable[[LayerFactors], Any]] = {
    "G_type": lambda f: f.method,
    "A_bias_augmented": lambda f: f.layer.augmented,
    "tokens": lambda f: f.tokens,
    "n_labels": lambda f: f.n_labels,
    "A": lambda f: f.A,
    "G": lambda f: f.G,
    "columns": lambda f: f.G.n_columns,
    "reduction": lambda f: f.G.reduction,
    "discarded": lambda f: f.G.discarded,
    "storage_error": lambda f: f.storage_error,
}
"""The factors of a layer as a mapping."""


@dataclass
class LayerFactors(Mapping[str, Any]):
    """The factors of one layer, with what they were made from.

    Also a mapping, with the keys ``G_type`` (the method), ``A_bias_augmented``, ``tokens``,
    ``n_labels``, ``A``, ``G``, ``columns``, ``reduction``, ``discarded`` and ``storage_error``.

    Attributes:
        layer: the layer.
        A: input factor, or None where G is one matrix over all numbers (a norm, depthwise).
        G: output factor.
        method: how G is formed, as in ``layers.csv``: ``woodbury`` (from token columns), ``eig`` (a
            matrix), ``true_head``, ``norm`` or ``channels`` (depthwise). A factor's ``structure``
            says how it is stored.
        tokens: ``T``.
        n_labels: ``N``.
        n_draws: draws of Monte-Carlo labels.
        fisher: kind of Fisher matrix that this layer got.
        sharing: ``expand`` where its rows are tokens, ``reduce`` where they are examples.
        a: token inputs ``[T, in]`` for push-through and EKFAC, where they are kept.
        own: the factors' own mean gradient ``[out, in (+ 1)]``, where it was asked for.
        push: whether push-through holds for these factors.
        tokens_g: token gradients ``[T n, out]``, where EKFAC needs them; of a true-Fisher head what
            :attr:`hessian` says of its labelled tokens.
        storage_error: relative error of ``G^-1 dW`` that rounding the columns costs.
        spread: the other ranks' ``a`` and ``tokens_g``, where these are this rank's own only.
        order: ``[T n]`` which row of ``a`` each row of ``tokens_g`` belongs to.
        sequences: ``[T n]`` numbers of the sequences, one a draw, that the rows of ``tokens_g``
            belong to, where EKFAC's moments are those of sequences.
        hessian: what the Hessians behind a true-Fisher head are, where EKFAC needs them:
            ``softmax``, of the probabilities in ``tokens_g``, or ``diagonal``, its rows; else "".
    """

    layer: Layer
    A: Factor | None
    G: Factor
    method: str
    tokens: int
    n_labels: int
    n_draws: int = 1
    fisher: str = "empirical"
    sharing: str = "expand"
    a: Tensor | None = field(default=None, repr=False)
    own: Tensor | None = field(default=None, repr=False)
    push: bool = False
    tokens_g: Tensor | None = field(default=None, repr=False)
    storage_error: float | None = None
    spread: Spread | None = field(default=None, repr=False)
    order: Tensor | None = field(default=None, repr=False)
    sequences: Tensor | None = field(default=None, repr=False)
    hessian: str = ""

    def __getitem__(self, key: str) -> Any:
        return _VIEW[key](self)

    def __iter__(self) -> Iterator[str]:
        return iter(_VIEW)

    def __len__(self) -> int:
        return len(_VIEW)

    def __post_init__(self) -> None:
        for side, dim, factor in (("G", "out", self.G), ("A", "in", self.A)):
            if factor is not None and not factor.label:  # layers may share an A
                seen = ("columns", n) if (n := factor.n_columns) else ("tokens", self.tokens)
                sizes = f"{dim}={factor.dim}, {seen[0]}={seen[1]}"
                factor.label = f"layer {self.layer.name}: {side} side ({sizes})"

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    @property
    def ratio(self) -> float:
        """``T / N``, by which products, traces and log-determinants are multiplied."""
        return self.tokens / self.n_labels

    def gathered(self, key: str) -> Tensor | None:
        """Returns a tensor of the tokens of all ranks, or ``own``; collective."""
        value: Tensor | None = getattr(self, key)
        if value is None or self.spread is None or key == "own":
            return value
        if key == "a":
            return self.spread.gather(value)
        communicator = self.spread.communicator
        if key == "order":
            value = value + sum(self.spread.rows[: communicator.rank])
        if key == "sequences":  # those of different ranks are different ones
            last = communicator.all_gather_objects(int(value.max()) + 1 if len(value) else 0)
            value = value + sum(last[: communicator.rank])
        return communicator.all_gather(value, communicator.all_gather_objects(len(value)))

    def stored(self) -> tuple[str, str]:
        """Returns dtype and device of what the G side is kept as: columns, else its matrix."""
        tensors = self.G.tensors()
        kept = tensors.get("columns", next(iter(tensors.values())))
        return dtype_name(kept.dtype), kept.device.type

    def nbytes(self) -> int:
        """Returns the bytes that both factors take."""
        return self.G.nbytes() + (0 if self.A is None else self.A.nbytes())

    @property
    def correctable(self) -> bool:
        """Whether EKFAC's second moments can be formed: its tokens are kept."""
        return self.order is not None

    def trace(self) -> float:
        """Returns the trace ``(T/N) tr(G) tr(A)`` of the Kronecker product."""
        return self.ratio * self.G.trace() * (1.0 if self.A is None else self.A.trace())

    def top_eigenvalues(self, k: int) -> Tensor:
        """Returns the ``k`` largest eigenvalues of the Kronecker product ``(T/N) G (x) A``.

        By Lanczos where a side has no decomposition (a true-Fisher head, ``tied=sum``).

        Returns:
            ``[min(k, dim)]``, float64, descending.
        """
        top = self.G.top(k)
        if self.A is not None:
            top = torch.outer(top, self.A.top(k)).flatten()
        return (self.ratio * top).sort(descending=True).values[:k]
