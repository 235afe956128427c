"""Token columns ``g`` (``[T, out]``, one token gradient per row), of one process or of all ranks.

:class:`Columns` has all outputs on this process. Of :class:`ShardedColumns` rank ``r`` holds
``g[:, o_r]``: its slice of the outputs, for the tokens of *all* ranks (``docs/math.md``, section 7,
``gram``). Products over the outputs are summed over the ranks; every rank forms its own rows of
``g^T z``, and these are gathered. No rank ever holds ``[T, out]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from typing_extensions import override

from fisher_lab.curvature.collectives import Communicator, slice_of_rank, slice_sizes
from fisher_lab.curvature.linalg import blocks, gram, power_of_two_scale
from fisher_lab.curvature.memory import HOST, on_device


class Columns:
    """Token columns as stored: any dtype, in device or host memory, scaled by a power of two.

    Args:
        data: ``[T, out]`` stored values, ``g / scale`` rounded to their dtype.
        scale: power of two by which they are multiplied on use.
        device: where products are formed; the data are moved there in blocks when they are stored
            in another place.
    """

    sharded = False
    """Whether each rank holds a slice of the outputs only, so that products are collective."""

    def __init__(self, data: Tensor, scale: float, device: torch.device) -> None:
        self.data, self.scale, self.device = data, scale, device

    @classmethod
    def store(cls, g: Tensor, dtype: torch.dtype | None, device: torch.device | None) -> Columns:
        """Rounds and places token gradients ``[T, out]``; None keeps their own dtype or device.

        Host memory is pinned where it can be.
        """
        dtype, device = dtype or g.dtype, device or g.device
        up = power_of_two_scale(g, dtype)
        if up == 1.0 and dtype == g.dtype and device == g.device:
            return cls(g, 1.0, g.device)
        pinned = device.type == "cpu" and g.device.type == "cuda"
        data = torch.empty(g.shape, dtype=dtype, device=device, pin_memory=pinned)
        # Moved first, scaled and rounded there: a device that is full has no room for a copy.
        for rows in blocks(g.shape[0], g.shape[1] * g.element_size()):
            part = g[rows].to(device)
            data[rows].copy_(part if up == 1.0 else part * up)
        return cls(data, 1.0 / up, g.device)

    @property
    def shape(self) -> torch.Size:
        """``[T, out]``, over all ranks."""
        return self.data.shape

    def to(self, device: torch.device) -> Columns:
        """Returns the columns stored and used on a device."""
        return Columns(self.data.to(device), self.scale, device)

    def _block(self, columns: slice, dtype: torch.dtype) -> Tensor:
        return self.data[:, columns].to(device=self.device, dtype=dtype, non_blocking=True)

    def _direct(self, dtype: torch.dtype) -> bool:
        return self.data.dtype == dtype and self.data.device == self.device and self.scale == 1.0

    def _blocks(self, dtype: torch.dtype) -> Iterator[slice]:
        return blocks(self.shape[1], self.shape[0] * dtype.itemsize)

    def times(self, y: Tensor) -> Tensor:
        """Returns ``g y`` (``[T, m]``) for ``y`` of shape ``[out, m]``, in its dtype."""
        if self._direct(y.dtype):
            return self.data @ y
        result = y.new_zeros(self.shape[0], y.shape[1])
        # The scale goes onto the small side: it is a power of two, so nothing is rounded.
        for columns in self._blocks(y.dtype):
            result.addmm_(self._block(columns, y.dtype), y[columns])
        return result.mul_(self.scale)

    def transposed_times(self, z: Tensor) -> Tensor:
        """Returns ``g^T z`` (``[out, m]``) for ``z`` of shape ``[T, m]``, in its dtype."""
        if self._direct(z.dtype):
            return self.data.T @ z
        result = z.new_empty(self.shape[1], z.shape[1])
        z = z * self.scale
        for columns in self._blocks(z.dtype):
            torch.mm(self._block(columns, z.dtype).T, z, out=result[columns])
        return result

    def gram(self, dtype: torch.dtype) -> Tensor:
        """Returns ``g g^T`` (``[T, T]``) in ``dtype``."""
        if self.data.device == self.device:
            product = gram(self.data, dtype)
            return product if self.scale == 1.0 else product.mul_(self.scale**2)
        result = torch.zeros(self.shape[0], self.shape[0], dtype=dtype, device=self.device)
        for columns in self._blocks(dtype):
            part = self._block(columns, dtype)
            result.addmm_(part, part.T)
        return result.mul_(self.scale**2)

    def weighted_gram(self, weights: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns ``g diag(weights) g^T`` (``[T, T]``) in ``dtype``; ``weights`` is ``[out]``."""
        result = torch.zeros(self.shape[0], self.shape[0], dtype=dtype, device=self.device)
        for columns in self._blocks(dtype):
            part = self._block(columns, dtype)
            part = part if self.scale == 1.0 else part * self.scale
            result.addmm_(part * weights[columns], part.T)
        return result

    def combined(self, z: Tensor) -> Columns:
        """Returns ``g^T z`` for ``z`` of shape ``[T, m]`` as ``m`` columns, sharded like these."""
        return Columns(self.transposed_times(z).T, 1.0, self.device)

    def cast(self, dtype: torch.dtype) -> Columns:
        """Returns the columns in another dtype, where they are."""
        return Columns(self.data.to(dtype), self.scale, self.device)

    def squared_norm(self) -> float:
        """Returns the sum of all squares, in float64."""
        total = 0.0
        for rows in blocks(self.shape[0], self.shape[1] * 8):
            total += float(self.data[rows].double().square().sum())
        return total * self.scale**2

    def whole(self) -> Columns:
        """Returns the columns with all outputs on this process; collective where sharded."""
        return self

    def shard(self, communicator: Communicator) -> ShardedColumns:
        """Cuts this rank's slice of the outputs out of columns that all ranks have whole."""
        out = self.shape[1]
        own = self.data[:, slice_of_rank(out, communicator.rank, communicator.size)].contiguous()
        return ShardedColumns(Columns(own, self.scale, self.device), out, communicator)

    def any_rank(self, decision: bool) -> bool:
        """Makes one decision of those of the ranks that hold the columns: whether any is true."""
        return decision


class ShardedColumns(Columns):
    """This rank's outputs of the token columns of all ranks; all products are collective.

    What a rank does by itself moves to its host memory when its device is full, and the other
    ranks need not know.

    Args:
        local: ``[T, out_r]`` as stored.
        out: outputs of the layer, over all ranks.
        communicator: of the ranks.
    """

    sharded = True

    def __init__(self, local: Columns, out: int, communicator: Communicator) -> None:
        super().__init__(local.data, local.scale, local.device)
        self.local, self.out, self.communicator = local, out, communicator
        self._slice = slice_of_rank(out, communicator.rank, communicator.size)

    @property
    @override
    def shape(self) -> torch.Size:
        return torch.Size((self.local.shape[0], self.out))

    @override
    def to(self, device: torch.device) -> ShardedColumns:
        return ShardedColumns(self.local.to(device), self.out, self.communicator)

    def of_own(self, product: Callable[[Columns], Tensor]) -> Tensor:
        """Returns what a function makes of this rank's ``[T, out_r]``, in host memory if need be.

        The function makes no collective call.
        """
        what = f"token columns (out={self.out}, columns={self.shape[0]}), this rank's slice"
        return on_device(lambda _: product(self.local), self.local.device, what, self._to_host)

    def _to_host(self) -> None:
        self.local = self.local.to(HOST)
        self.data = self.local.data

    def _summed(self, product: Callable[[Columns], Tensor], device: torch.device) -> Tensor:
        return self.communicator.all_reduce(self.of_own(product)).to(device)

    @override
    def times(self, y: Tensor) -> Tensor:
        return self._summed(lambda g: g.times(y[self._slice].to(g.device)), y.device)

    @override
    def transposed_times(self, z: Tensor) -> Tensor:
        rows = slice_sizes(self.out, self.communicator.size)
        own = self.of_own(lambda g: g.transposed_times(z.to(g.device)))
        return self.communicator.all_gather(own, rows).to(z.device)

    @override
    def gram(self, dtype: torch.dtype) -> Tensor:
        return self._summed(lambda g: g.gram(dtype), self.device)

    @override
    def weighted_gram(self, weights: Tensor, dtype: torch.dtype) -> Tensor:
        mine = weights[self._slice]
        return self._summed(lambda g: g.weighted_gram(mine.to(g.device), dtype), self.device)

    @override
    def combined(self, z: Tensor) -> ShardedColumns:
        rows = self.of_own(lambda g: g.transposed_times(z.to(g.device)))
        own = Columns(rows.to(self.device).T, 1.0, self.device)
        return ShardedColumns(own, self.out, self.communicator)

    @override
    def cast(self, dtype: torch.dtype) -> ShardedColumns:
        return ShardedColumns(self.local.cast(dtype), self.out, self.communicator)

    @override
    def squared_norm(self) -> float:
        own = torch.tensor([self.local.squared_norm()], dtype=torch.float64)
        return float(self.communicator.all_reduce(own))

    @override
    def whole(self) -> Columns:
        rows, data = slice_sizes(self.out, self.communicator.size), self.local.data
        # Each rank has its own power of two; the largest one is what one process would have taken.
        scale = max(self.communicator.all_gather_objects(self.local.scale))
        factor = self.local.scale / scale
        data = data if factor == 1.0 else data * factor
        every = self.communicator.all_gather(data.T.contiguous(), rows)
        return Columns(every.T.contiguous(), scale, self.device)

    @override
    def any_rank(self, decision: bool) -> bool:
        every = self.communicator.all_reduce(torch.tensor([float(decision)], dtype=torch.float64))
        return bool(every[0] > 0)
