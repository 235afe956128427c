"""Sums over tokens, batches and draws from which the factors are made.

One accumulator a side of a layer. They take tokens as they come, ``[T, features]`` in the
model's own dtype, and keep sums in the core dtype (so float32 tokens give a float64 factor).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fisher_lab.curvature.collectives import Communicator
from fisher_lab.curvature.errors import NonFiniteError
from fisher_lab.curvature.kfac.factors import Columns, DenseFactor, DiagonalFactor, GramFactor
from fisher_lab.curvature.kfac.numerics import EngineSettings
from fisher_lab.curvature.kfac.policy import storage_dtype, store_columns, wants_woodbury
from fisher_lab.curvature.linalg import add_second_moment, all_finite, gram, mirror, symmetric_eigen
from fisher_lab.curvature.memory import HOST, on_host_if_full

T = TypeVar("T")


@dataclass(frozen=True)
class Where:
    """Names a piece of data in an error message.

    Attributes:
        layer: name of the layer.
        batch: index of the batch.
        side: ``activations`` or ``gradients``.
    """

    layer: str
    batch: int
    side: str

    def check(self, x: Tensor) -> None:
        """Checks that data are finite.

        Raises:
            NonFiniteError: they are not; names layer, batch and side.
        """
        if not all_finite(x):
            bad = int((~torch.isfinite(x)).sum())
            raise NonFiniteError(
                f"layer {self.layer or '(the model)'}, batch {self.batch}: {bad} of {x.numel()} "
                f"{self.side} are not finite"
            )


class _Summing:
    """A sum that goes on on the host where the device is full.

    Attributes:
        hosted: whether it had to leave the device.
        label: layer and side, for the log.
    """

    hosted: bool = False
    label: str = ""

    def what(self) -> str:
        """Names layer, side and both dimensions."""
        raise NotImplementedError

    def move(self) -> None:
        """Moves the sum to the host."""
        raise NotImplementedError

    def guarded(self, work: Callable[[], T]) -> T:
        """Runs ``work``, which changes nothing when it fails, on the host where it has to."""
        return on_host_if_full(work, self._retreat, f"{self.what()}, sum")

    def _retreat(self) -> bool:
        if self.hosted:
            return False
        self.hosted = True
        self.move()
        return True

    def _room(self, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(size, size, dtype=dtype, device=HOST if self.hosted else device)


class MomentAccumulator(_Summing):
    """``sum a a^T`` with the bias column, for the A side.

    Args:
        n: features, without the bias column.
        augmented: whether a constant 1 is appended to each token.
        dtype: core dtype.
        device: where the sum lives.
        label: layer and side, for the log.
    """

    def __init__(
        self,
        n: int,
        augmented: bool,
        dtype: torch.dtype,
        device: torch.device,
        label: str = "an A side",
    ) -> None:
        size = n + int(augmented)
        self.label = label
        self.n, self.augmented, self.tokens = n, augmented, 0
        self._sums: Tensor | None = None
        self.total = torch.empty(0)
        self.total = self.guarded(lambda: self._room(size, dtype, device))
        if augmented:
            self._sums = self.guarded(
                lambda: torch.zeros(n, dtype=dtype, device=HOST if self.hosted else device)
            )
        self._fresh = True

    def what(self) -> str:
        """See :class:`_Summing`."""
        return f"{self.label} (in={self.n}, tokens={self.tokens})"

    def move(self) -> None:
        """See :class:`_Summing`."""
        self.total = self.total.to(HOST)
        self._sums = None if self._sums is None else self._sums.to(HOST)

    def add(self, a: Tensor) -> None:
        """Adds tokens ``[T, n]``."""
        self.guarded(lambda: self._add(a.to(self.total.device)))

    def _add(self, a: Tensor) -> None:
        n = self.n
        # What is taken comes first: a sum that fails for want of room is as it was.
        sums = None if self._sums is None else a.sum(dim=0, dtype=self.total.dtype)
        add_second_moment(self.total[:n, :n], a, fresh=self._fresh)
        if self._sums is not None and sums is not None:
            self._sums += sums
        self.tokens += a.shape[0]
        self._fresh = False

    def join(self, communicator: Communicator, tokens: int) -> None:
        """Makes the sums those of all ranks; collective.

        Args:
            communicator: of the ranks.
            tokens: of all of them.
        """
        if self._fresh:
            self.total.zero_()
        self.total, self._fresh = communicator.all_reduce(self.total), False
        if self._sums is not None:
            self._sums = communicator.all_reduce(self._sums)
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

    def join(self, communicator: Communicator, tokens: int) -> None:
        """Makes the counts those of all ranks; collective."""
        self.total, self.tokens = communicator.all_reduce(self.total), tokens

    def factor(self) -> DiagonalFactor:
        """Returns ``A = diag(counts) / T``."""
        return DiagonalFactor(self.total / self.tokens)


class GradientAccumulator(_Summing):
    """Token gradients of the G side: columns as long as the policy says so, else a matrix.

    ``auto`` compares the number of columns that have come so far, so that the whole of T decides
    although the batches are seen one by one: what begins as columns becomes a matrix when there
    are too many. Past ``max_columns`` the columns are reduced (``docs/math.md``, section 3).

    Args:
        name: of the layer.
        out: outputs of the layer.
        settings: policy, core dtype, where and how columns are kept.
        seed: of the subsampling.

    Attributes:
        spread: makes of stored columns those of several ranks, where a rank has its share only.
        eigen: eigenvalues and eigenvectors of the sum, where another rank may have found them.
    """

    def __init__(self, name: str, out: int, settings: EngineSettings, seed: int) -> None:
        self.name, self.out, self.settings = name, out, settings
        self.parts: list[Tensor] = []
        self.total: Tensor | None = None
        self.seen = 0
        self.kept = 0
        self.discarded = 0.0
        self.reduction = ""
        self.spread: Callable[[Columns], Columns] = as_they_are
        self._device: torch.device | None = None
        self.eigen: tuple[Tensor, Tensor] | None = None
        self._keys: Tensor | None = None
        self._generator = torch.Generator().manual_seed(seed)

    @property
    def dense_allowed(self) -> bool:
        """Whether an ``out x out`` matrix may be formed."""
        return self.out <= self.settings.max_dense_dim

    def add(self, g: Tensor) -> None:
        """Adds token gradients ``[T, out]`` of one draw."""
        self.seen += g.shape[0]
        if self.total is not None:
            self.guarded(lambda: self._add(g))
            return
        self._device = self._device or g.device
        self.parts.append(g.to(HOST) if self.hosted else g)
        self.kept += g.shape[0]
        if self.dense_allowed and not wants_woodbury(self.settings, self.out, self.seen):
            self._to_matrix()
        elif self.kept > self.settings.max_columns:
            self._reduce()

    def _to_matrix(self) -> None:
        self.total = self.guarded(self._matrix)
        self.parts.clear()

    def _matrix(self) -> Tensor:
        total = self._room(self.out, self.settings.numerics.core_dtype, self.parts[0].device)
        for index, part in enumerate(self.parts):
            add_second_moment(total, part.to(total.device), fresh=index == 0)
        return total

    def _add(self, g: Tensor) -> None:
        assert self.total is not None
        add_second_moment(self.total, g.to(self.total.device))

    def move(self) -> None:
        """See :class:`_Summing`."""
        self.total = None if self.total is None else self.total.to(HOST)
        self.parts = [part.to(HOST) for part in self.parts]
        if self.eigen is not None:
            self.eigen = self.eigen[0].to(HOST), self.eigen[1].to(HOST)

    def joined(self) -> Tensor:
        """Returns all columns at hand, ``[kept, out]``."""
        return self.guarded(self._joined)

    def _joined(self) -> Tensor:
        return self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts)

    def what(self) -> str:
        """See :class:`_Summing`."""
        return f"layer {self.name}: G side (out={self.out}, columns={self.seen})"

    def _reduce(self) -> None:
        if self.dense_allowed:
            self.reduction = "lossless"
            self._to_matrix()
        elif self.settings.column_reduction == "subsample":
            self.reduction = "subsample"
            self._subsample()
        else:
            self.reduction = "lowrank"
            self._truncate()

    def _subsample(self) -> None:
        """Keeps the columns with the smallest keys: uniform over all that have come so far."""
        keys = self.keys(self.kept)
        chosen = keys.topk(self.settings.max_columns, largest=False).indices.sort().values
        self._keys = keys[chosen]
        self.parts = [self.guarded(lambda: self._chosen(chosen))]
        self.kept = self.settings.max_columns
        self.discarded = 1.0 - self.kept / self.seen

    def _chosen(self, chosen: Tensor) -> Tensor:
        joined = self._joined()
        return joined[chosen.to(joined.device)]

    def keys(self, kept: int) -> Tensor:
        """Returns the random keys of the columns at hand, ``[kept]``: the smallest ones stay."""
        fresh = kept - (0 if self._keys is None else self._keys.numel())
        keys = torch.rand(fresh, generator=self._generator, dtype=torch.float64)
        return keys if self._keys is None else torch.cat([self._keys, keys])

    def _truncate(self) -> None:
        """Keeps the leading directions; the trace that goes is added up."""
        values, kept = self.guarded(self._leading)
        self._lost = getattr(self, "_lost", 0.0) + float(values[: -self.settings.max_columns].sum())
        self.parts = [kept]
        self.kept = self.settings.max_columns
        total = self._lost + float(values[-self.settings.max_columns :].sum())
        self.discarded = self._lost / total if total > 0 else 0.0

    def _leading(self) -> tuple[Tensor, Tensor]:
        """All eigenvalues of the columns' Gram matrix, and the columns in the leading ones."""
        joined = self._joined()
        values, vectors = symmetric_eigen(gram(joined, self.settings.numerics.core_dtype))
        return values, vectors[:, -self.settings.max_columns :].to(joined).T @ joined

    def tokens_in_order(self) -> bool:
        """Says whether the columns are the tokens as they came (push-through needs that)."""
        return self.total is None and not self.reduction

    def factor(self, weight: float) -> DenseFactor | GramFactor:
        """Returns ``G = weight * sum g g^T``, with columns stored as the settings say.

        Takes the sum along: nothing can be added after it.
        """
        if self.total is not None and self.reduction != "lossless":
            return DenseFactor(mirror(self.total).mul_(weight))
        if self.total is not None:
            self._device = self._device or self.total.device
            return self._gram(self.guarded(self._lossless), weight)
        columns = self.joined()
        if self.reduction == "subsample":
            weight = weight * self.seen / self.kept
        return self._gram(columns, weight)

    def _lossless(self) -> Tensor:
        """Columns with the very same sum: as many as it has eigenvalues above rounding."""
        values, vectors = self.decomposed()
        keep = values > values.numel() * torch.finfo(values.dtype).eps * values.max()
        return (vectors[:, keep] * values[keep].sqrt()).T.contiguous()

    def decomposed(self) -> tuple[Tensor, Tensor]:
        """Returns eigenvalues and eigenvectors of the summed matrix, computed once."""
        assert self.total is not None
        if self.eigen is None:
            self.eigen = symmetric_eigen(mirror(self.total))
        return self.eigen

    def _gram(self, columns: Tensor, weight: float) -> GramFactor:
        core = self.settings.numerics.core_dtype
        stored = store_columns(columns, self.out, self.settings, core, self.name, self._device)
        return GramFactor(
            self.spread(stored),
            weight,
            core,
            discarded=self.discarded,
            reduction=self.reduction,
        )

    def exact_factor(self, weight: float) -> GramFactor | None:
        """Returns the same factor with unrounded columns, where the stored ones are rounded."""
        if self.total is not None or not self.parts:
            return None
        dtype = self.parts[0].dtype
        if storage_dtype(self.settings, dtype, (self.kept, self.out)) == dtype:
            return None
        columns = self.joined()
        if self.reduction == "subsample":
            weight = weight * self.seen / self.kept
        exact = self.spread(Columns(columns, 1.0, self._device or columns.device))
        return GramFactor(exact, weight, self.settings.numerics.core_dtype)


def as_they_are(columns: Columns) -> Columns:
    """Returns the columns: those of one process are at hand."""
    return columns


def normalised(module: nn.Module, x: Tensor) -> Tensor:
    """Returns the normalised input of a norm layer exactly as the layer itself computes it.

    The output is linear in scale and shift, so this is the output at scale 1 and shift 0 less
    that at scale 0: each architecture keeps its own precision, and those that scale by ``1 + w``
    come out right too.

    Args:
        module: the norm layer.
        x: its input, ``[T, features]``.
    """
    # Plain tensors, whatever the parameters are (they may be sharded over ranks).
    values = {
        name: torch.zeros(p.shape, dtype=p.dtype, device=x.device)
        for name, p in module.named_parameters(recurse=False)
    }
    with torch.no_grad():
        at_zero = functional_call(module, values, (x,))
        return functional_call(module, {**values, "weight": values["weight"] + 1}, (x,)) - at_zero


def norm_gradients(xhat: Tensor, g: Tensor, shift: bool, dtype: torch.dtype) -> Tensor:
    """Returns per-token gradients ``[g * xhat; g]`` of scale and shift, ``[T, n]`` or ``[T, 2n]``.

    Args:
        xhat: normalised inputs, ``[T, n]``.
        g: gradients of the layer's outputs, ``[T, n]``.
        shift: whether the layer has one.
        dtype: of the result.
    """
    xhat, g = xhat.to(dtype), g.to(dtype)
    return torch.cat([g * xhat, g], dim=1) if shift else g * xhat


class NormAccumulator(_Summing):
    """``sum v v^T`` with ``v = [g * xhat; g]``, the per-token gradient of scale and shift.

    Args:
        n: features.
        shift: whether the layer has a shift beside its scale.
        dense: whether the matrix is kept, else its diagonal.
        dtype: core dtype.
        device: where the sum lives.
        label: the layer, for the log.
    """

    def __init__(
        self, n: int, shift: bool, dense: bool, dtype: torch.dtype, device: torch.device, label: str
    ) -> None:
        self.dense, self.shift, self.tokens, self.label = dense, shift, 0, label
        dim = 2 * n if shift else n
        self._shape = (dim, dim) if dense else (dim,)
        self.total = torch.empty(0)
        self.total = self.guarded(
            lambda: torch.zeros(self._shape, dtype=dtype, device=HOST if self.hosted else device)
        )

    def what(self) -> str:
        """See :class:`_Summing`."""
        return f"{self.label}: scale and shift (entries={self._shape[0]}, tokens={self.tokens})"

    def move(self) -> None:
        """See :class:`_Summing`."""
        self.total = self.total.to(HOST)

    def add(self, xhat: Tensor, g: Tensor) -> None:
        """Adds tokens: normalised inputs and gradients of the outputs, ``[T, n]`` each."""
        self.guarded(lambda: self._add(xhat, g))
        self.tokens += len(g)

    def _add(self, xhat: Tensor, g: Tensor) -> None:
        xhat, g = xhat.to(self.total.device), g.to(self.total.device)
        v = norm_gradients(xhat, g, self.shift, self.total.dtype)
        if self.dense:
            add_second_moment(self.total, v)
        else:
            self.total += v.square().sum(dim=0)

    def factor(self, weight: float) -> DenseFactor | DiagonalFactor:
        """Returns ``weight * sum v v^T``, or its diagonal; nothing can be added after it."""
        if self.dense:
            return DenseFactor(mirror(self.total).mul_(weight))
        return DiagonalFactor(self.total.mul_(weight))
