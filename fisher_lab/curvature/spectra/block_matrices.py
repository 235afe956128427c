"""From chunks of ``J`` to the matrix whose eigenvalues are the block's: Gram, covariance, rows.

Every collector takes chunks (:meth:`add`) and gives ``(1/N)``-scaled float64 matrices. Centring
subtracts the mean row: from the rows themselves where they are kept, by Chan's update where they
are summed up, and as ``H K H`` (``H = I - 11^T/N``) where only products exist.

Where the samples lie on several ranks (``docs/math.md``, sections 7 and 8), each has collected its
own rows, and the matrix is that of all of them: the ranks exchange columns for rows, tile by tile,
so that each multiplies all rows of its columns, and what they have is added up.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor
from typing_extensions import override

from fisher_lab.curvature.collectives import Spread, exchange_tokens_for_outputs
from fisher_lab.curvature.spectra.per_sample_gradients import Chunk
from fisher_lab.curvature.spectra.spill import DenseRows, FactoredRows, FileBytes

_ROWS = 128  # rows of a Gram panel; only panels up to the diagonal are computed


class BlockMatrix(ABC):
    """Collects one block's chunks.

    Args:
        spread: the ranks and how many samples each has.
        sizes: parameters whose rows are joined, and their numbers of elements.
        method: how the matrix is formed, for the record.

    Attributes:
        touched: whether the loss reaches one of the parameters.
    """

    def __init__(self, spread: Spread, sizes: Mapping[str, int], method: str) -> None:
        self._spread, self._sizes, self.method = spread, dict(sizes), method
        self._ranks, self._n = spread.communicator, sum(spread.rows)
        self._n_own, self._p = spread.rows[self._ranks.rank], sum(sizes.values())
        self.touched = False

    @abstractmethod
    def add(self, chunk: Chunk) -> None:
        """Takes the block's columns out of a chunk."""

    @abstractmethod
    def matrix(self, *, center: bool) -> Tensor:
        """Returns the symmetric float64 matrix with the block's nonzero eigenvalues; collective."""

    @abstractmethod
    def close(self) -> None:
        """Gives memory and files back."""

    def _columns(self, chunk: Chunk) -> Tensor | None:
        """Joins the columns ``[c, P]``; zeros where the loss does not reach, None if nowhere."""
        parts = {name: chunk.rows(name) for name in self._sizes}
        known = next((part for part in parts.values() if part is not None), None)
        if known is None:
            return None
        self.touched = True
        zeros = {n: known.new_zeros(chunk.n, m) for n, m in self._sizes.items() if parts[n] is None}
        return torch.cat([zeros[n] if x is None else x for n, x in parts.items()], dim=1)


def add_gram(gram: Tensor, rows: Tensor) -> None:
    """Adds ``rows rows^T`` to the lower triangle of ``gram``, panel by panel."""
    n = rows.shape[0]
    for start in range(0, n, _ROWS):
        stop = min(start + _ROWS, n)
        gram[start:stop, :stop] += rows[start:stop] @ rows[:stop].T


def from_lower_triangle(lower: Tensor) -> Tensor:
    """Returns the symmetric matrix whose lower triangle is given."""
    return lower.tril() + lower.tril(-1).T


def factored_gram(weight: FactoredRows, spread: Spread, device: torch.device) -> Tensor:
    """Returns this rank's part of a weight's ``J J^T``, ``[N, N]``; the sum of all is the whole.

    ``<J_n, J_m> = <g_n, M g_m>`` with ``M = a_b a_b'^T``, by pairs of pieces. Every rank gets each
    piece of the others once and multiplies its own by half of them.
    """
    ranks, starts = spread.communicator, [0, *accumulate(spread.rows)]
    gram = torch.zeros(starts[-1], starts[-1], dtype=torch.float64, device=device)
    for source, pieces in enumerate(ranks.all_gather_objects(weight.described())):
        for index, (first, like) in enumerate(pieces):
            parts = (
                weight.piece(index)[1:]
                if source == ranks.rank
                else [torch.empty(shape, dtype=getattr(torch, dtype)) for shape, dtype in like]
            )
            other = [ranks.broadcast(x, source).double().to(device) for x in parts]
            # Of two ranks one multiplies, the lower one where both are even or both are odd.
            multiplies = (source > ranks.rank) == ((source + ranks.rank) % 2 == 0)
            begin = index if source == ranks.rank else 0 if multiplies else len(weight)
            for i in range(begin, len(weight)):
                row, *own = weight.piece(i)
                inputs, outputs = (x.double().to(device) for x in own)
                mixed = torch.matmul(inputs @ other[0].T, other[1])
                block = outputs.flatten(1) @ mixed.flatten(1).T
                at, to = starts[ranks.rank] + row, starts[source] + first
                if at < to:
                    at, to, block = to, at, block.T
                gram[at : at + block.shape[0], to : to + block.shape[1]] = block
    return from_lower_triangle(gram)


class GramMatrix(BlockMatrix):
    """``(1/N) J J^T``, ``N x N``, from rows kept by column tiles and products (mode ``chunked``).

    Args:
        spread: as for :class:`BlockMatrix`.
        sizes: the dense parameters.
        weights: weights that come as products.
        space: makes room for one array; in memory or spilled.
        device: where tiles are multiplied.
        dtype: of the rows where the loss does not reach the block.
    """

    def __init__(
        self,
        spread: Spread,
        sizes: Mapping[str, int],
        weights: Sequence[str],
        space: Callable[[], FileBytes],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        method = "gram" if not weights else "gram+factored" if sizes else "gram_factored"
        super().__init__(spread, sizes, method)
        self._device, self._dtype = device, dtype
        self._rows: DenseRows | None = None
        if sizes:
            self._rows = DenseRows(space(), self._n_own, self._p, dtype, max(spread.rows))
        self._factored = {name: FactoredRows(space()) for name in weights}

    @override
    def add(self, chunk: Chunk) -> None:
        if self._rows is not None:
            columns = self._columns(chunk)
            if columns is None:
                columns = torch.zeros(chunk.n, self._p, dtype=self._dtype)
            self._rows.write(chunk.first, columns)
        for name, rows in self._factored.items():
            if name in chunk.factored:
                self.touched = True
                one = chunk.factored[name]
                rows.write(chunk.first, chunk.sequence, one.inputs, one.outputs)

    @override
    def matrix(self, *, center: bool) -> Tensor:
        gram = torch.zeros(self._n, self._n, dtype=torch.float64, device=self._device)
        if self._rows is not None:
            for own in self._rows.tiles():
                tile = exchange_tokens_for_outputs(own, self._spread.rows, self._ranks)
                tile = tile.double().to(self._device)
                add_gram(gram, tile - tile.mean(0) if center else tile)
        gram = from_lower_triangle(gram)
        for weight in self._factored.values():
            one = factored_gram(weight, self._spread, self._device)
            if center:  # H K H
                one = one - one.mean(0, keepdim=True)
                one = one - one.mean(1, keepdim=True)
            gram += one
        return self._ranks.all_reduce(gram) / self._n

    @override
    def close(self) -> None:
        for store in (self._rows, *self._factored.values()):
            if store is not None:
                store.close()


class CovarianceMatrix(BlockMatrix):
    """``(1/N) J^T J``, ``P x P``, summed up chunk by chunk (mode ``streaming``, ``P < N``).

    With ``center`` deviations from the mean row are summed (Chan et al. 1979).
    """

    def __init__(self, spread: Spread, sizes: Mapping[str, int], center: bool) -> None:
        super().__init__(spread, sizes, "covariance")
        self._center, self._count = center, 0
        self._mean = torch.zeros(self._p, dtype=torch.float64)
        self._sum = torch.zeros(self._p, self._p, dtype=torch.float64)

    @override
    def add(self, chunk: Chunk) -> None:
        columns = self._columns(chunk)
        rows = torch.zeros(chunk.n, self._p) if columns is None else columns
        rows = rows.double()
        mean = rows.mean(0) if self._center else torch.zeros_like(rows[0])
        part = (rows - mean).T @ (rows - mean)
        if self._count == 0:
            self._sum, self._mean, self._count = part, mean, chunk.n
            return
        total = self._count + chunk.n
        delta = mean - self._mean.to(mean.device)
        self._sum = self._sum.to(part.device) + part
        self._sum += torch.outer(delta, delta) * (self._count * chunk.n / total)
        self._mean = self._mean.to(mean.device) + delta * (chunk.n / total)
        self._count = total

    @override
    def matrix(self, *, center: bool) -> Tensor:
        total = self._sum
        if self._ranks.size > 1:  # about the mean of all rows; zero where nothing is centred
            delta = self._mean - self._ranks.all_reduce(self._mean * self._count) / self._n
            total = self._ranks.all_reduce(total + torch.outer(delta, delta) * self._count)
        return total / self._n

    @override
    def close(self) -> None:
        self._sum = self._sum[:0]


class RowMatrix(BlockMatrix):
    """``J`` itself, ``N x P`` in memory (modes ``full`` and ``sketch``).

    With the method ``sketch`` the rows take the matrix's place (on one rank). ``device`` and
    ``dtype`` are those of the rows where the loss does not reach the block.
    """

    def __init__(
        self,
        spread: Spread,
        sizes: Mapping[str, int],
        method: str,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(spread, sizes, method)
        self._rows = torch.zeros(self._n_own, self._p, dtype=dtype, device=device)

    @override
    def add(self, chunk: Chunk) -> None:
        first = not self.touched
        columns = self._columns(chunk)
        if columns is not None:
            self._rows = self._rows.to(columns) if first else self._rows
            self._rows[chunk.first : chunk.first + chunk.n] = columns

    @override
    def matrix(self, *, center: bool) -> Tensor:
        """Returns the smaller of ``(1/N) J J^T`` and ``(1/N) J^T J``."""
        if self.method == "full" and self._p >= self._n:
            rows = exchange_tokens_for_outputs(self._rows, self._spread.rows, self._ranks).double()
            rows = rows - rows.mean(0) if center else rows
            return self._ranks.all_reduce(rows @ rows.T) / self._n
        rows = self._rows.double()
        rows = rows - self._ranks.all_reduce(rows.sum(0)) / self._n if center else rows
        if self.method == "sketch":
            return rows
        return self._ranks.all_reduce(rows.T @ rows) / self._n

    @override
    def close(self) -> None:
        self._rows = self._rows[:0]
