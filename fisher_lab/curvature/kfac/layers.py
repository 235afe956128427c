"""What a K-FAC layer is, and its parameters as one matrix.

A layer is ``s = W a + b`` with ``W`` of shape ``[out, in]``. Hugging Face's ``Conv1D`` and
``nn.Embedding`` store the transpose, a convolution ``[out, in, *kernel]``; results go back in the
stored layout. A layer is known by its module's path, its parameters by *identity*, under their
name in ``named_parameters()`` (``docs/math.md``, section 1).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor


class Kind(StrEnum):
    """What a layer is; the names appear in ``layers.csv``."""

    LINEAR = "Linear"
    CONV1D = "Conv1D"
    EMBEDDING = "Embedding"
    COLUMNS = "Columns"
    NORM = "Norm"
    CONV = "Conv"
    DEPTHWISE = "Depthwise"
    BIAS = "Bias"

    @property
    def looks_up(self) -> bool:
        """Whether it looks up rows of its weight, or columns, by their numbers."""
        return self in (Kind.EMBEDDING, Kind.COLUMNS)


_CONVOLUTIONS = (Kind.CONV, Kind.DEPTHWISE)


@dataclass(frozen=True)
class Layer:
    """A K-FAC layer of a model.

    Attributes:
        name: path of the module ("" for a bare module).
        kind: what it is.
        labels: names of the modules whose uses of the weight add up: several where they share it.
        weight: name of its weight in ``named_parameters()``.
        bias: name of its bias, or None.
        n_in: inputs, without the bias column; of a convolution the numbers under its kernel.
        n_out: outputs.
        kernel: shape of one output's weights, as they are stored, of a convolution.
        tied: whether another use of the weight is not among these modules (embedding and head
            share it, or the other use is excluded): its gradient is more than these tokens'.
        partner: the other use of a tied weight where both are pooled (``tied=sum``).
        marked: names of the biases where the weight's uses have unlike ones, or some none: each has
            a column in the inputs, 1 in the rows of its uses and else 0; ``bias`` is None then.
    """

    name: str
    kind: Kind
    labels: tuple[str, ...] = field(repr=False)
    weight: str
    bias: str | None
    n_in: int
    n_out: int
    kernel: tuple[int, ...] = ()
    tied: bool = False
    partner: Layer | None = field(default=None, repr=False)
    marked: tuple[str, ...] = ()

    @property
    def biases(self) -> tuple[str, ...]:
        """Names of the biases that are added to its outputs, all or some."""
        return self.marked if self.bias is None else (self.bias,)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of its weight and its biases."""
        return (self.weight, *self.biases)

    @property
    def elementwise(self) -> bool:
        """Whether it scales and shifts, or only shifts, feature by feature."""
        return self.kind in (Kind.NORM, Kind.BIAS)

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored as ``[in, out]``."""
        return self.kind in (Kind.CONV1D, Kind.EMBEDDING)

    @property
    def one_block(self) -> bool:
        """Whether all of its numbers have one factor G, and there is no A."""
        return self.elementwise or self.kind is Kind.DEPTHWISE

    @property
    def augmented(self) -> bool:
        """Whether A carries a row and a column for the bias."""
        return self.bias is not None and not self.one_block

    @property
    def n_parameters(self) -> int:
        """Numbers in its weight and its bias."""
        weight = self.n_out if self.elementwise else self.n_out * self.n_in
        return weight + self.n_out * len(self.biases)

    @property
    def width(self) -> int:
        """Numbers in each row of its inputs: a bias that only some rows have is one of them."""
        return self.n_in + len(self.marked)

    @property
    def dim_a(self) -> int:
        """Dimension of the A factor."""
        return self.width + int(self.augmented)

    @property
    def dim_g(self) -> int:
        """Dimension of the G factor."""
        if not self.one_block:
            return self.n_out
        each = self.n_in if self.kind is Kind.DEPTHWISE else 1
        return self.n_out * (each + int(self.bias is not None))

    @property
    def stored(self) -> tuple[int, ...]:
        """Shape of the weight as it is stored."""
        if self.elementwise:
            return (self.n_out,)
        if self.kernel:
            return (self.n_in if self.transposed else self.n_out, *self.kernel)
        return (self.n_in, self.n_out) if self.transposed else (self.n_out, self.n_in)

    def to_matrix(self, named: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Returns the gradients as ``[out, in]``, with a column more for each bias.

        Of a norm layer scale, then shift, as ``[n, 1]`` or ``[2n, 1]``; of a bias by itself
        ``[n, 1]``; of a depthwise convolution the weights and the bias of each output, one output
        after the other, as a column as well.

        Args:
            named: by parameter; a bias without a gradient counts as zero.
            dtype: of the result.
        """
        matrix = named[self.weight].detach().to(dtype)
        biases = [named.get(name) for name in self.biases]
        zero = matrix.new_zeros(self.n_out)
        columns = [zero if bias is None else bias.detach().to(matrix) for bias in biases]
        if self.elementwise:
            return torch.cat([matrix, *columns])[:, None]
        matrix = matrix.flatten(1)
        matrix = matrix.T if self.transposed else matrix
        if columns:
            matrix = torch.cat([matrix, torch.stack(columns, dim=1)], dim=1)
        return matrix.reshape(-1, 1) if self.one_block else matrix

    def from_matrix(self, matrix: Tensor) -> dict[str, Tensor]:
        """Cuts a matrix of :meth:`to_matrix`'s shape into weight and biases, by name, as stored."""
        if self.elementwise:
            parts = matrix[:, 0].split(self.n_out)
            return dict(zip(self.names, parts, strict=True))
        matrix = matrix.reshape(self.n_out, -1) if self.one_block else matrix
        weight = matrix[:, : self.n_in]
        weight = weight.T if self.transposed else weight
        biases = {name: matrix[:, self.n_in + k] for k, name in enumerate(self.biases)}
        return {self.weight: weight.reshape(self.stored) if self.kernel else weight} | biases


def groups_of(shape: Sequence[int], groups: int) -> tuple[Kind, Sequence[tuple[int, int] | None]]:
    """Returns what layers a convolution makes, and which rows of its weight are each one's.

    Where a group reads one channel (a depthwise convolution) all groups are one layer, else each
    is a layer of its own.

    Args:
        shape: of the weight, ``[out, in / groups, *kernel]``.
        groups: how many there are.
    """
    if groups == 1:
        return Kind.CONV, [None]
    if shape[1] == 1:
        return Kind.DEPTHWISE, [None]
    size = shape[0] // groups
    return Kind.CONV, [(start, start + size) for start in range(0, shape[0], size)]


def sizes(kind: Kind, weight: Tensor) -> tuple[int, int]:
    """Inputs and outputs of a layer."""
    if kind in (Kind.NORM, Kind.BIAS):
        return weight.numel(), weight.numel()
    rows, columns = weight.flatten(1).shape
    return (rows, columns) if kind in (Kind.CONV1D, Kind.EMBEDDING) else (columns, rows)


def kernel_of(kind: Kind, weight: Tensor) -> tuple[int, ...]:
    """Shape of what lies under one index of a weight's first dimension, where it is no vector."""
    matrix = weight.dim() <= 2 and kind not in _CONVOLUTIONS
    return () if matrix else tuple(weight.shape[1:])


def plain(layer: Layer) -> dict[str, Any]:
    """Returns a layer as strings, numbers and lists, for files and for other ranks."""
    values = {f.name: getattr(layer, f.name) for f in fields(layer)}
    partner = None if layer.partner is None else plain(layer.partner)
    lists = {name: list(getattr(layer, name)) for name in ("labels", "kernel", "marked")}
    return {**values, **lists, "kind": str(layer.kind), "partner": partner}


def layer_of(entry: Mapping[str, Any]) -> Layer:
    """Returns a layer from what :func:`plain` made of it."""
    partner = entry["partner"]
    return Layer(
        **{
            **entry,
            "kind": Kind(entry["kind"]),
            "labels": tuple(entry["labels"]),
            "kernel": tuple(entry.get("kernel", ())),
            "marked": tuple(entry.get("marked", ())),
            "partner": None if partner is None else layer_of(partner),
        }
    )


def every_layer(layers: Iterable[Layer]) -> list[Layer]:
    """Returns each layer once, tied partners too, in the order in which they come."""
    pairs = ((layer, layer.partner) for layer in layers)
    return [layer for pair in pairs for layer in pair if layer is not None]
