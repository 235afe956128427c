"""Token columns of which every rank holds some outputs (``docs/math.md``, section 7, ``gram``).

Rank ``r`` holds ``g[:, o_r]``: its share of the outputs, of the tokens of *all* ranks. Products
over the outputs are summed over the ranks; every rank forms its own rows of ``g^T z``, and these
are put together. No rank ever holds ``[T, out]``. All products are collective; what a rank does by
itself goes on on its host where its device is full, so that the others need not know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fisher_lab.curvature.collectives import Communicator, share, shares
from fisher_lab.curvature.kfac.factors.woodbury import Columns
from fisher_lab.curvature.memory import HOST, on_host_if_full


class ShardedColumns(Columns):
    """This rank's outputs of everybody's token columns.

    Args:
        local: ``[T, out_r]`` as stored.
        out: outputs of the layer, over all ranks.
        communicator: of the ranks.
    """

    def __init__(self, local: Columns, out: int, communicator: Communicator) -> None:
        super().__init__(local.data, local.scale, local.device)
        self.local, self.out, self.communicator = local, out, communicator
        self.mine = share(out, communicator.rank, communicator.size)
        self._hosted = False

    @property
    def shape(self) -> torch.Size:
        """``[T, out]``, of the whole."""
        return torch.Size((self.local.shape[0], self.out))

    def converted(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """See :class:`Columns`: not at hand here.

        Raises:
            TypeError: always; no rank has all outputs.
        """
        raise TypeError("columns that are spread over ranks have no blocks; use their products")

    def times(self, y: Tensor) -> Tensor:
        """See :meth:`Columns.times`."""
        own = self.own(lambda local: local.times(y[self.mine].to(local.device)))
        return self.communicator.all_reduce(own).to(y.device)

    def transposed_times(self, z: Tensor) -> Tensor:
        """See :meth:`Columns.transposed_times`."""
        rows = shares(self.out, self.communicator.size)
        own = self.own(lambda local: local.transposed_times(z.to(local.device)))
        return self.communicator.all_gather(own, rows).to(z.device)

    def gram(self, dtype: torch.dtype) -> Tensor:
        """See :meth:`Columns.gram`."""
        own = self.own(lambda local: local.gram(dtype))
        return self.communicator.all_reduce(own).to(self.device)

    def weighted_gram(self, weights: Tensor, dtype: torch.dtype) -> Tensor:
        """See :meth:`Columns.weighted_gram`."""
        mine = weights[self.mine]
        own = self.own(lambda local: local.weighted_gram(mine.to(local.device), dtype))
        return self.communicator.all_reduce(own).to(self.device)

    def own(self, product: Callable[[Columns], Tensor]) -> Tensor:
        """Returns what a function makes of this rank's share, on the host where its device is full.

        Args:
            product: takes this rank's columns, ``[T, out_r]``; makes no collective call.
        """
        what = f"token columns (out={self.out}, columns={self.shape[0]}), this rank's share"
        return on_host_if_full(lambda: product(self.local), self._retreat, what)

    def agreed(self, decision: bool) -> bool:
        """Makes one decision of those of all ranks; collective.

        Args:
            decision: this rank's.
        """
        every = self.communicator.all_reduce(torch.tensor([float(decision)], dtype=torch.float64))
        return bool(every[0] > 0)

    def share_of(self, z: Tensor) -> ShardedColumns:
        """Returns this rank's rows of ``g^T z`` as columns: ``[m, out]`` spread like these.

        Args:
            z: ``[T, m]``, the same on all ranks.
        """
        rows = self.own(lambda local: local.transposed_times(z.to(local.device))).to(self.device)
        return ShardedColumns(Columns(rows.T, 1.0, self.device), self.out, self.communicator)

    def cast(self, dtype: torch.dtype) -> ShardedColumns:
        """See :meth:`Columns.cast`."""
        return ShardedColumns(self.local.cast(dtype), self.out, self.communicator)

    def _retreat(self) -> bool:
        if self._hosted:
            return False
        self._hosted = True
        self.local = Columns(self.local.data.to(HOST), self.local.scale, HOST)
        self.data = self.local.data
        return True

    def squared_norm(self) -> float:
        """See :meth:`Columns.squared_norm`."""
        own = torch.tensor([self.local.squared_norm()], dtype=torch.float64)
        return float(self.communicator.all_reduce(own))

    def whole(self) -> Columns:
        """Returns all outputs on this rank, for files; collective."""
        scales = self.communicator.share(self.local.scale)
        rows = shares(self.out, self.communicator.size)
        data = self.local.data
        # Each rank has its own power of two; the largest one is what one process would have taken.
        scale = max(scales)
        factor = self.local.scale / scale
        data = data if factor == 1.0 else data * factor
        every = self.communicator.all_gather(data.T.contiguous(), rows)
        return Columns(every.T.contiguous(), scale, self.device)
