"""From chunks of ``J`` to the matrix whose eigenvalues are the block's: Gram, covariance, rows.

Every collector takes chunks (:meth:`add`) and gives ``(1/N)``-scaled float64 matrices. Centring
subtracts the mean row: from the rows themselves where they are kept, by Chan's update where they
are summed up, and as ``H K H`` (``H = I - 11^T/N``) where only products exist.

Where the samples lie on several ranks (``docs/math.md``, sections 7 and 8), each has collected its
own rows, and the matrix is that of all of them: the ranks exchange columns for rows, tile by tile,
so that each multiplies all rows of its columns, and what they have is added up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor
from typing_extensions import override

from fisher_lab.curvature.collectives import Spread, exchange_tokens_for_outputs
from fisher_lab.curvature.spectra.per_sample_gradients import Chunk
from fisher_lab.curvature.spectra.spill import DenseRows, FactoredRows, FileBytes

_ROWS = 128  # rows of a Gram panel; only panels up to the diagonal are computed


class BlockMatrix(Protocol):
    """Collects one block's chunks."""

    touched: bool
    method: str

    def add(self, chunk: Chunk) -> None:
        """Takes the block's columns out of a chunk."""
        ...

    def matrix(self, *, center: bool) -> Tensor:
        """Returns the symmetric float64 matrix with the block's nonzero eigenvalues; collective."""
        ...

    def close(self) -> None:
        """Gives memory and files back."""
        ...


def columns_of(chunk: Chunk, sizes: Mapping[str, int]) -> Tensor | None:
    """Joins a block's columns of a chunk, ``[c, P]``; zeros where the loss does not reach.

    None where it reaches none of the parameters.
    """
    parts = {name: chunk.rows(name) for name in sizes}
    known = next((part for part in parts.values() if part is not None), None)
    if known is None:
        return None
    return torch.cat(
        [
            known.new_zeros(chunk.n, size) if (part := parts[name]) is None else part
            for name, size in sizes.items()
        ],
        dim=1,
    )


def add_gram(gram: Tensor, rows: Tensor) -> None:
    """Adds ``rows rows^T`` to the lower triangle of ``gram``, panel by panel."""
    n = rows.shape[0]
    for start in range(0, n, _ROWS):
        stop = min(start + _ROWS, n)
        gram[start:stop, :stop] += rows[start:stop] @ rows[:stop].T


def from_lower_triangle(lower: Tensor) -> Tensor:
    """Returns the symmetric matrix whose lower triangle is given."""
    return lower.tril() + lower.tril(-1).T


def double_center(gram: Tensor) -> Tensor:
    """Returns ``H K H`` with ``H = I - 11^T/N``."""
    gram = gram - gram.mean(0, keepdim=True)
    return gram - gram.mean(1, keepdim=True)


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
        spread: the ranks and how many samples each has.
        sizes: dense parameters of the block and their numbers of elements.
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
        self._spread, self._sizes, self._device, self._dtype = spread, dict(sizes), device, dtype
        n, p = spread.rows[spread.communicator.rank], sum(sizes.values())
        self._rows = DenseRows(space(), n, p, dtype, max(spread.rows)) if sizes else None
        self._factored = {name: FactoredRows(space()) for name in weights}
        self.touched = False
        self.method = "gram" if not weights else "gram+factored" if sizes else "gram_factored"

    @override
    def add(self, chunk: Chunk) -> None:
        if self._rows is not None:
            columns = columns_of(chunk, self._sizes)
            self.touched |= columns is not None
            if columns is None:
                columns = torch.zeros(chunk.n, self._rows.p, dtype=self._dtype)
            self._rows.write(chunk.first, columns)
        for name, rows in self._factored.items():
            if name in chunk.factored:
                self.touched = True
                one = chunk.factored[name]
                rows.write(chunk.first, chunk.sequence, one.inputs, one.outputs)

    @override
    def matrix(self, *, center: bool) -> Tensor:
        ranks, rows = self._spread.communicator, self._spread.rows
        n = sum(rows)
        gram = torch.zeros(n, n, dtype=torch.float64, device=self._device)
        if self._rows is not None:
            for own in self._rows.tiles():
                tile = exchange_tokens_for_outputs(own, rows, ranks).double().to(self._device)
                add_gram(gram, tile - tile.mean(0) if center else tile)
        gram = from_lower_triangle(gram)
        for weight in self._factored.values():
            one = factored_gram(weight, self._spread, self._device)
            gram += double_center(one) if center else one
        return ranks.all_reduce(gram) / n

    @override
    def close(self) -> None:
        for store in (self._rows, *self._factored.values()):
            if store is not None:
                store.close()


class CovarianceMatrix(BlockMatrix):
    """``(1/N) J^T J``, ``P x P``, summed up chunk by chunk (mode ``streaming``, ``P < N``).

    Args:
        spread: the ranks and how many samples each has.
        sizes: parameters of the block and their numbers of elements.
        center: whether deviations from the mean row are summed (Chan et al. 1979).
    """

    method = "covariance"

    def __init__(self, spread: Spread, sizes: Mapping[str, int], center: bool) -> None:
        self._spread, self._sizes, self._center = spread, dict(sizes), center
        self._n = 0
        self._mean: Tensor | None = None
        self._sum: Tensor | None = None
        self.touched = False

    @override
    def add(self, chunk: Chunk) -> None:
        columns = columns_of(chunk, self._sizes)
        self.touched |= columns is not None
        rows = torch.zeros(chunk.n, sum(self._sizes.values())) if columns is None else columns
        rows = rows.double()
        mean = rows.mean(0) if self._center else torch.zeros_like(rows[0])
        part = (rows - mean).T @ (rows - mean)
        if self._sum is None or self._mean is None:
            self._sum, self._mean, self._n = part, mean, chunk.n
            return
        total = self._n + chunk.n
        delta = mean - self._mean.to(mean.device)
        self._sum = self._sum.to(part.device) + part
        self._sum += torch.outer(delta, delta) * (self._n * chunk.n / total)
        self._mean = self._mean.to(mean.device) + delta * (chunk.n / total)
        self._n = total

    @override
    def matrix(self, *, center: bool) -> Tensor:
        ranks, n = self._spread.communicator, sum(self._spread.rows)
        p = sum(self._sizes.values())
        total = torch.zeros(p, p, dtype=torch.float64) if self._sum is None else self._sum
        if ranks.size > 1:  # from the rank's own mean, zero where nothing is centred, to all rows'
            mean = total.new_zeros(p) if self._mean is None else self._mean
            delta = mean - ranks.all_reduce(mean * self._n) / n
            total = ranks.all_reduce(total + torch.outer(delta, delta) * self._n)
        return total / n

    @override
    def close(self) -> None:
        self._sum = self._mean = None


class RowMatrix(BlockMatrix):
    """``J`` itself, ``N x P`` in memory (modes ``full`` and ``sketch``).

    Args:
        spread: the ranks and how many samples each has.
        sizes: parameters of the block and their numbers of elements.
        device: of the rows where the loss does not reach the block.
        dtype: of these.
        method: ``full``, or ``sketch``: then the rows take the matrix's place (on one rank).
    """

    def __init__(
        self,
        spread: Spread,
        sizes: Mapping[str, int],
        device: torch.device,
        dtype: torch.dtype,
        method: str,
    ) -> None:
        self._spread, self._sizes, self.method = spread, dict(sizes), method
        n = spread.rows[spread.communicator.rank]
        self._rows = torch.zeros(n, sum(sizes.values()), dtype=dtype, device=device)
        self.touched = False

    @override
    def add(self, chunk: Chunk) -> None:
        columns = columns_of(chunk, self._sizes)
        if columns is None:
            return
        if not self.touched:
            self._rows = self._rows.to(columns)
        self.touched = True
        self._rows[chunk.first : chunk.first + chunk.n] = columns

    @override
    def matrix(self, *, center: bool) -> Tensor:
        """Returns the smaller of ``(1/N) J J^T`` and ``(1/N) J^T J``; less the mean row."""
        ranks, counts = self._spread.communicator, self._spread.rows
        n, p = sum(counts), self._rows.shape[1]
        if self.method == "sketch" or p < n:
            rows = self._rows.double()
            rows = rows - ranks.all_reduce(rows.sum(0)) / n if center else rows
            if self.method == "sketch":
                return rows
            return ranks.all_reduce(rows.T @ rows) / n
        rows = exchange_tokens_for_outputs(self._rows, counts, ranks).double()
        rows = rows - rows.mean(0) if center else rows
        return ranks.all_reduce(rows @ rows.T) / n

    @override
    def close(self) -> None:
        self._rows = self._rows[:0]
