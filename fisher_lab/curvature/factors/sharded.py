"""Token columns of which every rank holds some outputs (``docs/math.md``, section 7, ``gram``).

Rank ``r`` holds ``g[:, o_r]``: its share of the outputs, of the tokens of *all* ranks. Products
over the outputs are summed over the ranks; every rank forms its own rows of ``g^T z``, and these
are put together. No rank ever holds ``[T, out]``. All products are collective.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..reduce import Communicator, share, shares
from .gram import Columns


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
        return self.communicator.all_reduce(self.local.times(y[self.mine]))

    def transposed_times(self, z: Tensor) -> Tensor:
        """See :meth:`Columns.transposed_times`."""
        rows = shares(self.out, self.communicator.size)
        return self.communicator.all_gather(self.local.transposed_times(z), rows)

    def gram(self, dtype: torch.dtype) -> Tensor:
        """See :meth:`Columns.gram`."""
        return self.communicator.all_reduce(self.local.gram(dtype))

    def weighted_gram(self, weights: Tensor, dtype: torch.dtype) -> Tensor:
        """See :meth:`Columns.weighted_gram`."""
        return self.communicator.all_reduce(self.local.weighted_gram(weights[self.mine], dtype))

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
