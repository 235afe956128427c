"""Sums over tokens, batches and draws from which the factors are made.

One accumulator per side of a layer. They take tokens as they come, ``[T, features]`` in the
model's own dtype, and keep sums in the core dtype (so float32 tokens give a float64 factor). A sum
moves to host memory when the device is full.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from fisher_lab.curvature.collectives import Alone, Communicator, chosen_rows
from fisher_lab.curvature.errors import LayerError, NonFiniteError
from fisher_lab.curvature.kfac.examples import ByExample
from fisher_lab.curvature.kfac.factors import (
    BlockDiagonalFactor,
    Columns,
    DenseFactor,
    DiagonalFactor,
    Factor,
    ShardedColumns,
    WoodburyFactor,
)
from fisher_lab.curvature.kfac.factors.woodbury import lossless_columns
from fisher_lab.curvature.kfac.numerics import EngineSettings
from fisher_lab.curvature.kfac.policy import storage_dtype, store_columns, wants_woodbury
from fisher_lab.curvature.linalg import (
    add_second_moment,
    all_finite,
    blocks,
    gram,
    mirror,
    symmetric_eigen,
)
from fisher_lab.curvature.memory import on_device

T = TypeVar("T")


def check_finite(x: Tensor, layer: str, batch: int, what: str) -> None:
    """Checks that a layer's ``what`` (``activations``, ``gradients``) in a batch are finite.

    Raises:
        NonFiniteError: they are not; names layer, batch and what they are.
    """
    if not all_finite(x):
        bad = int((~torch.isfinite(x)).sum())
        raise NonFiniteError(
            f"layer {layer or '(the model)'}, batch {batch}: {bad} of {x.numel()} "
            f"{what} are not finite"
        )


class MomentAccumulator:
    """``sum a a^T`` for the A side; a constant 1 is appended to each ``a`` where ``augmented``."""

    def __init__(
        self, n: int, augmented: bool, dtype: torch.dtype, device: torch.device, side: str
    ) -> None:
        self.n, self.tokens, self._side = n, 0, side
        size = n + int(augmented)

        def room(device: torch.device) -> tuple[Tensor, Tensor | None]:
            sums = torch.zeros(n, dtype=dtype, device=device) if augmented else None
            return torch.zeros(size, size, dtype=dtype, device=device), sums

        self.total, self._sums = on_device(room, device, self._what())

    def _what(self) -> str:
        return f"{self._side} (in={self.n}, tokens={self.tokens}), sum"

    def add(self, a: Tensor) -> None:
        """Adds tokens ``[T, n]``."""
        on_device(lambda device: self._add(a.to(device)), self.total.device, self._what())

    def _add(self, a: Tensor) -> None:
        self.total = self.total.to(a.device)
        self._sums = None if self._sums is None else self._sums.to(a.device)
        # What is taken comes first: a sum that fails on a full device is as it was.
        sums = None if self._sums is None else a.sum(dim=0, dtype=self.total.dtype)
        add_second_moment(self.total[: self.n, : self.n], a)
        if self._sums is not None and sums is not None:
            self._sums += sums
        self.tokens += a.shape[0]

    def absorb(self, other: MomentAccumulator) -> None:
        """Adds another sum of the same kind."""
        self.total = self.total + other.total.to(self.total.device)
        if self._sums is not None and other._sums is not None:
            self._sums = self._sums + other._sums.to(self._sums.device)
        self.tokens += other.tokens

    def reduce(self, ranks: Communicator, tokens: int) -> None:
        """Makes the sums those of all ranks, which have ``tokens`` together; collective."""
        self.total = ranks.all_reduce(self.total)
        self._sums = None if self._sums is None else ranks.all_reduce(self._sums)
        self.tokens = tokens

    def factor(self) -> DenseFactor:
        """Returns ``A = (1/T) sum a a^T``; takes the sum along, nothing can be added after it."""
        n, total = self.n, self.total
        mirror(total[:n, :n])
        if self._sums is not None:
            total[n, :n] = total[:n, n] = self._sums
            total[n, n] = self.tokens
        return DenseFactor(total.div_(self.tokens))


class CountAccumulator:
    """Token counts, for the A side of an embedding."""

    def __init__(self, n: int, dtype: torch.dtype, device: torch.device) -> None:
        self.tokens = 0
        self.total = torch.zeros(n, dtype=dtype, device=device)

    def add(self, indices: Tensor) -> None:
        """Adds token indices ``[T]``."""
        self.total += torch.bincount(indices, minlength=self.total.numel())
        self.tokens += indices.numel()

    def absorb(self, other: CountAccumulator) -> None:
        """Adds other counts."""
        self.total, self.tokens = self.total + other.total, self.tokens + other.tokens

    def reduce(self, ranks: Communicator, tokens: int) -> None:
        """Makes the counts those of all ranks, as :meth:`MomentAccumulator.reduce`."""
        self.total, self.tokens = ranks.all_reduce(self.total), tokens

    def factor(self) -> DiagonalFactor:
        """Returns ``A = diag(counts) / T``."""
        return DiagonalFactor(self.total / self.tokens)


class GradientAccumulator:
    """Token gradients of the G side: columns as long as the policy says so, else a matrix.

    ``auto`` compares the number of columns that have come so far, so that the whole of T decides
    although the batches are seen one by one: what begins as columns becomes a matrix when there
    are too many. Past ``max_columns`` the columns are reduced (``docs/math.md``, section 3), by
    subsampling with ``seed`` for one way.

    Attributes:
        parts: the columns, ``[n, out]`` each; none once there is a matrix.
        total: the matrix ``sum g g^T``, or None.
        seen: columns that have come.
        kept: columns that are in ``parts``.
        lost: trace that a low-rank reduction left out.
        discarded: fraction of the trace (of the columns, by subsampling) that was left out.
        reduction: how columns were reduced, or "".
        ranks: the ranks of which each holds a slice of the outputs, where that is so.
        eigen: eigenvalues and eigenvectors of ``total``, where another rank may have found them.
    """

    def __init__(self, name: str, out: int, settings: EngineSettings, seed: int) -> None:
        self.name, self.out, self.settings = name, out, settings
        self.parts: list[Tensor] = []
        self.total: Tensor | None = None
        self.seen = self.kept = 0
        self.lost = self.discarded = 0.0
        self.reduction = ""
        self.ranks: Communicator | None = None
        self.eigen: tuple[Tensor, Tensor] | None = None
        self._compute: torch.device | None = None  # where products will be formed
        self._keys: Tensor | None = None
        self._generator = torch.Generator().manual_seed(seed)

    @property
    def label(self) -> str:
        """Layer, side and both dimensions, for the log."""
        return f"layer {self.name}: G side (out={self.out}, columns={self.seen})"

    @property
    def dense_allowed(self) -> bool:
        """Whether an ``out x out`` matrix may be formed."""
        return self.out <= self.settings.max_dense_dim

    def on_device(self, work: Callable[[], T], *, collective: bool = False) -> T:
        """Does an operation on the sum; both move to host memory when the device is full.

        ``work`` changes nothing when it fails. No rank repeats it by itself where it is
        ``collective``.
        """

        def there(device: torch.device) -> T:
            self.parts = [part.to(device) for part in self.parts]
            self.total = None if self.total is None else self.total.to(device)
            if self.eigen is not None:
                self.eigen = self.eigen[0].to(device), self.eigen[1].to(device)
            return work()

        held = self.parts[0] if self.total is None else self.total
        return on_device(there, held.device, f"{self.label}, sum", collective=collective)

    def absorb(self, other: GradientAccumulator) -> None:
        """Adds the token gradients of another layer of as many outputs; they stay the other's too.

        Raises:
            LayerError: columns of either have been reduced already.
        """
        if self.reduction or other.reduction:
            raise LayerError(
                f"layer {self.name}: more than max_columns={self.settings.max_columns} columns "
                "with experts=pooled; allowed: a larger max_columns, or experts=each"
            )
        if self.total is not None and other.total is not None:
            self.total = self.total + other.total.to(self.total.device)
            self.seen += other.seen
            return
        if other.total is not None:
            self.to_matrix()
            self.absorb(other)
            return
        for part in other.parts:
            self.add(part)

    def add(self, g: Tensor, *, expected: bool = False) -> None:
        """Adds token gradients ``[T, out]`` of one draw.

        Where they are one of the many terms of an expectation, columns beyond the outputs are put
        together without loss.
        """
        self.seen += g.shape[0]
        self._compute = self._compute or g.device
        self.parts.append(g.to(self.parts[0].device) if self.parts else g)
        self.kept += g.shape[0]
        woodbury = wants_woodbury(self.settings, self.out, self.seen)
        together = expected and self.dense_allowed
        if self.total is not None or (self.dense_allowed and not woodbury):
            self.to_matrix()
        elif self.kept <= min(self.settings.max_columns, self.out if together else math.inf):
            return
        elif self.dense_allowed:
            self.reduction = "lossless"
            self.to_matrix()
        elif self.settings.column_reduction == "subsample":
            (self.kept,) = self.subsample([self.kept], Alone())
        else:
            self.truncate(self.lost, Alone())

    def to_matrix(self) -> None:
        """Puts the summed matrix, to which later columns are added, in the place of the columns."""
        self.total = self.on_device(self._matrix)
        self.parts.clear()

    def _matrix(self) -> Tensor:
        total, core = self.total, self.settings.numerics.core_dtype
        if total is None:
            total = torch.zeros(self.out, self.out, dtype=core, device=self.parts[0].device)
        for part in self.parts:
            add_second_moment(total, part)
        return total

    def joined(self) -> Tensor:
        """Returns all columns at hand, ``[kept, out]``."""
        return self.on_device(self._joined)

    def _joined(self) -> Tensor:
        return self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts)

    def subsample(self, rows: list[int], ranks: Communicator) -> list[int]:
        """Keeps the columns with the smallest keys: uniform over all tokens of all ranks.

        Each rank, of which ``rows`` are the numbers of columns, keeps what is chosen of its own.
        Returns how many each keeps.
        """
        fresh = rows[ranks.rank] - (0 if self._keys is None else self._keys.numel())
        keys = torch.rand(fresh, generator=self._generator, dtype=torch.float64)
        keys = keys if self._keys is None else torch.cat([self._keys, keys])
        keys = ranks.all_gather(keys, rows)
        most = min(self.settings.max_columns, len(keys))
        chosen = keys.topk(most, largest=False).indices.sort().values
        self._keys = keys[chosen]
        self.reduction, self.discarded = "subsample", 1.0 - most / self.seen
        kept, rows = self.on_device(lambda: chosen_rows(self._joined(), rows, chosen, ranks))
        self.parts = [kept]
        return rows

    def truncate(self, lost: float, ranks: Communicator) -> None:
        """Puts the leading directions in the place of the columns.

        ``lost`` is the trace that earlier reductions left out. The ``ranks`` have the columns, or
        (:attr:`ranks`) a slice of the outputs each.
        """
        most = self.settings.max_columns
        values, kept = self.on_device(lambda: self._leading(ranks), collective=ranks.size > 1)
        self.lost = lost + float(values[:-most].sum())
        total = self.lost + float(values[-most:].sum())
        self.parts, self.kept, self.reduction = [kept], len(kept), "lowrank"
        self.discarded = self.lost / total if total > 0 else 0.0

    def _leading(self, ranks: Communicator) -> tuple[Tensor, Tensor]:
        """All eigenvalues of the columns' Gram matrix, and the columns in the leading ones."""
        joined = self._joined()
        kernel = gram(joined, self.settings.numerics.core_dtype)
        kernel = kernel if self.ranks is None else self.ranks.all_reduce(kernel)
        values, vectors = symmetric_eigen(kernel)
        vectors = ranks.broadcast(vectors, 0)
        return values, vectors[:, -self.settings.max_columns :].to(joined).T @ joined

    def tokens_in_order(self) -> bool:
        """Says whether the columns are the tokens as they came (push-through needs that)."""
        return self.total is None and not self.reduction

    def factor(self, weight: float) -> Factor:
        """Returns ``G = weight * sum g g^T``, with columns stored as the settings say.

        Takes the sum along: nothing can be added after it.
        """
        if self.total is not None and self.reduction != "lossless":
            return DenseFactor(mirror(self.total).mul_(weight))
        if self.total is None:
            columns, weight = self.joined(), self._weight(weight)
        else:
            self._compute = self._compute or self.total.device
            columns = self.on_device(lambda: lossless_columns(*self.decomposed()))
        core = self.settings.numerics.core_dtype
        stored = store_columns(columns, self.out, self.settings, core, self.name, self._compute)
        factor = WoodburyFactor(self._of_all_ranks(stored), weight, core)
        factor.discarded, factor.reduction = self.discarded, self.reduction
        return factor

    def decomposed(self) -> tuple[Tensor, Tensor]:
        """Returns eigenvalues and eigenvectors of the summed matrix, computed once."""
        assert self.total is not None
        if self.eigen is None:
            self.eigen = symmetric_eigen(mirror(self.total))
        return self.eigen

    def exact_factor(self, weight: float) -> WoodburyFactor | None:
        """Returns the same factor with unrounded columns, where the stored ones are rounded."""
        if self.total is not None or not self.parts:
            return None
        dtype = self.parts[0].dtype
        if storage_dtype(self.settings, dtype, (self.kept, self.out)) == dtype:
            return None
        columns = self.joined()
        exact = self._of_all_ranks(Columns(columns, 1.0, self._compute or columns.device))
        return WoodburyFactor(exact, self._weight(weight), self.settings.numerics.core_dtype)

    def _weight(self, weight: float) -> float:
        return weight * self.seen / self.kept if self.reduction == "subsample" else weight

    def _of_all_ranks(self, columns: Columns) -> Columns:
        return columns if self.ranks is None else ShardedColumns(columns, self.out, self.ranks)


def norm_gradients(xhat: Tensor, g: Tensor, shift: bool, dtype: torch.dtype) -> Tensor:
    """Returns ``[g * xhat; g]``, the gradients by token, ``[T, n]`` or ``[T, 2n]``."""
    xhat, g = xhat.to(dtype), g.to(dtype)
    return torch.cat([g * xhat, g], dim=1) if shift else g * xhat


class BlockAccumulator(ABC):
    """The sum of ``v v^T`` over tokens, ``v`` the gradient of all numbers of a layer by a token.

    Attributes:
        total: the sum, or the part of it that is kept.
        dim: how many numbers the layer has.
        tokens: how many have come.
    """

    total: Tensor
    dim: int
    tokens: int

    @abstractmethod
    def add(self, a: Tensor, g: Tensor, examples: ByExample | None = None) -> None:
        """Adds tokens: what the layer reads and the gradients of what it gives, ``[T, ...]``.

        With ``examples``, the sums of their ``v`` over each example (K-FAC-reduce).
        """

    def absorb(self, other: BlockAccumulator) -> None:
        """Adds the sum of another layer of the same kind and sizes."""
        self.total = self.total + other.total.to(self.total.device)
        self.tokens += other.tokens

    @abstractmethod
    def own(self, a: Tensor, g: Tensor) -> Tensor:
        """Returns ``sum v`` of tokens, ``[dim, 1]`` in the dtype of the sum."""

    @abstractmethod
    def factor(self, weight: float) -> Factor:
        """Returns ``weight * sum v v^T``, or what is kept of it; nothing can be added after it."""


class NormAccumulator(BlockAccumulator):
    """``sum v v^T`` with ``v = [g * xhat; g]``, the per-token gradient of scale and shift.

    Where it is not ``dense``, only its diagonal is kept; without ``shift``, ``v = g * xhat``.
    """

    def __init__(
        self, n: int, shift: bool, dense: bool, dtype: torch.dtype, device: torch.device, layer: str
    ) -> None:
        self.dense, self.shift, self.tokens, self._layer = dense, shift, 0, layer
        self.dim = 2 * n if shift else n
        shape = (self.dim, self.dim) if dense else (self.dim,)
        self.total = on_device(
            lambda device: torch.zeros(shape, dtype=dtype, device=device), device, self._what()
        )

    def _what(self) -> str:
        return f"{self._layer}: scale and shift (entries={self.dim}, tokens={self.tokens}), sum"

    def add(self, a: Tensor, g: Tensor, examples: ByExample | None = None) -> None:
        """Adds tokens: normalised inputs and gradients of the outputs, ``[T, n]`` each."""

        def there(device: torch.device) -> None:
            self.total = self.total.to(device)
            v = norm_gradients(a.to(device), g.to(device), self.shift, self.total.dtype)
            v = v if examples is None else examples.sums(v)
            if self.dense:
                add_second_moment(self.total, v)
            else:
                self.total += v.square().sum(dim=0)

        on_device(there, self.total.device, self._what())
        self.tokens += len(g if examples is None else examples)

    def own(self, a: Tensor, g: Tensor) -> Tensor:
        """Returns the gradients of scale and shift, ``[dim, 1]``."""
        return norm_gradients(a, g, self.shift, self.total.dtype).sum(dim=0)[:, None]

    def factor(self, weight: float) -> DenseFactor | DiagonalFactor:
        """Returns ``weight * sum v v^T``, or its diagonal; nothing can be added after it."""
        if self.dense:
            return DenseFactor(mirror(self.total).mul_(weight))
        return DiagonalFactor(self.total.mul_(weight))


class ChannelAccumulator(BlockAccumulator):
    """``sum v_c v_c^T`` of every output ``c`` of a depthwise convolution.

    ``v_c = g_c [p_c; 1]``, with ``p_c`` the patch of the one channel that the output reads: the
    Fisher matrix of the output's own weights and bias, which no product of factors approximates.
    """

    def __init__(
        self,
        n_out: int,
        size: int,
        shift: bool,
        dtype: torch.dtype,
        device: torch.device,
        layer: str,
    ) -> None:
        self.n_out, self.size, self.shift, self.tokens, self._layer = n_out, size, shift, 0, layer
        side = size + int(shift)
        self.dim = n_out * side
        self.total = on_device(
            lambda device: torch.zeros(n_out, side, side, dtype=dtype, device=device),
            device,
            self._what(),
        )

    def _what(self) -> str:
        return f"{self._layer}: weights by channel (entries={self.dim}, tokens={self.tokens}), sum"

    def _gradients(self, a: Tensor, g: Tensor) -> Tensor:
        """``v`` of tokens, ``[out, T, k]`` or ``[out, T, k + 1]``."""
        patches = a.reshape(len(a), -1, self.size).transpose(0, 1).to(self.total.dtype)
        patches = patches.repeat_interleave(self.n_out // len(patches), dim=0)
        if self.shift:
            patches = torch.cat([patches, torch.ones_like(patches[..., :1])], dim=-1)
        return patches * g.T[..., None].to(patches)

    def _in_blocks(self, a: Tensor, g: Tensor, device: torch.device) -> Iterator[Tensor]:
        for rows in blocks(len(g), 3 * self.dim * self.total.element_size()):
            yield self._gradients(a[rows].to(device), g[rows].to(device))

    def add(self, a: Tensor, g: Tensor, examples: ByExample | None = None) -> None:
        """Adds patches ``[T, channels * k]`` and gradients ``[T, out]``."""

        def there(device: torch.device) -> None:
            self.total = self.total.to(device)
            more = torch.zeros_like(self.total)
            for v in self._in_blocks(a, g, device):
                more.baddbmm_(v.mT, v)
            self.total += more

        def by_example(device: torch.device) -> None:
            assert examples is not None
            self.total = self.total.to(device)
            sums = self.total.new_zeros(self.n_out, len(examples), self.total.shape[-1])
            start = 0
            for v in self._in_blocks(a, g, device):
                stop = start + v.shape[1]
                sums.index_add_(1, examples.index[start:stop].to(device), v)
                start = stop
            self.total += sums.mT @ sums

        on_device(there if examples is None else by_example, self.total.device, self._what())
        self.tokens += len(g if examples is None else examples)

    def own(self, a: Tensor, g: Tensor) -> Tensor:
        """Returns the gradients of weights and biases, output by output, ``[dim, 1]``."""
        sums = [v.sum(dim=1) for v in self._in_blocks(a, g, g.device)]
        return torch.stack(sums).sum(dim=0).reshape(-1, 1)

    def factor(self, weight: float) -> BlockDiagonalFactor:
        """Returns the matrices of the outputs; nothing can be added after it."""
        return BlockDiagonalFactor(self.total.mul_(weight))
