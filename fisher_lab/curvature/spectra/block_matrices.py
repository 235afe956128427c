"""From chunks of ``J`` to the matrix whose eigenvalues are the block's: Gram, covariance, rows.

Every collector takes chunks (:meth:`add`) and gives ``(1/N)``-scaled float64 matrices. Centring
subtracts the mean row: from the rows themselves where they are kept, by Chan's update where they
are summed up, and as ``H K H`` (``H = I - 11^T/N``) where only products exist.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor
from typing_extensions import override

from fisher_lab.curvature.spectra.per_sample_gradients import Chunk
from fisher_lab.curvature.spectra.spill import Bytes, DenseRows, FactoredRows

_ROWS = 128  # rows of a Gram panel; only panels up to the diagonal are computed


class BlockMatrix(Protocol):
    """Collects one block's chunks."""

    touched: bool
    method: str

    def add(self, chunk: Chunk) -> None:
        """Takes the block's columns out of a chunk."""
        ...

    def matrix(self, *, center: bool) -> Tensor:
        """Returns the symmetric float64 matrix with the block's nonzero eigenvalues."""
        ...

    def close(self) -> None:
        """Gives memory and files back."""
        ...


def columns_of(chunk: Chunk, sizes: Mapping[str, int]) -> Tensor | None:
    """Joins a block's columns of a chunk, ``[c, P]``; zeros where the loss does not reach.

    Returns:
        None where the loss reaches none of the parameters.
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


def factored_gram(pieces: FactoredRows, n: int, device: torch.device) -> Tensor:
    """Returns ``J J^T`` of one weight from its inputs and output gradients.

    ``<J_n, J_m> = <g_n, M g_m>`` with ``M = a_b a_b'^T``, by pairs of pieces.
    """
    gram = torch.zeros(n, n, dtype=torch.float64, device=device)
    for i in range(len(pieces)):
        first, inputs, outputs = pieces.piece(i)
        inputs, outputs = inputs.to(device), outputs.to(device)
        for j in range(i + 1):
            start, other_inputs, other_outputs = pieces.piece(j)
            mix = inputs @ other_inputs.to(device).T
            mixed = torch.matmul(mix, other_outputs.to(device))
            block = outputs.flatten(1) @ mixed.flatten(1).T
            gram[first : first + len(outputs), start : start + len(mixed)] = block
    return from_lower_triangle(gram)


class GramMatrix(BlockMatrix):
    """``(1/N) J J^T``, ``N x N``, from rows kept by column tiles and products (mode ``chunked``).

    Args:
        n: samples, ``N``; on several ranks this rank's.
        sizes: dense parameters of the block and their numbers of elements.
        weights: weights that come as products.
        space: makes room for one array; in memory or spilled.
        device: where tiles are multiplied.
        dtype: of the rows where the loss does not reach the block.
        longest: rows of the rank that has most.

    Attributes:
        rows: what is kept of the dense parameters; None where there are none.
        factored: what is kept of each weight that comes as products.
    """

    def __init__(
        self,
        n: int,
        sizes: Mapping[str, int],
        weights: Sequence[str],
        space: Callable[[], Bytes],
        device: torch.device,
        *,
        dtype: torch.dtype,
        longest: int,
    ) -> None:
        self._n, self._sizes, self.device, self._dtype = n, dict(sizes), device, dtype
        p = sum(sizes.values())
        self.rows = DenseRows(space(), n, p, dtype, longest) if sizes else None
        self.factored = {name: FactoredRows(space()) for name in weights}
        self.touched = False
        self.method = "gram" if not weights else "gram+factored" if sizes else "gram_factored"

    @override
    def add(self, chunk: Chunk) -> None:
        if self.rows is not None:
            columns = columns_of(chunk, self._sizes)
            self.touched |= columns is not None
            if columns is None:
                columns = torch.zeros(chunk.n, self.rows.p, dtype=self._dtype)
            self.rows.write(chunk.first, columns)
        for name, rows in self.factored.items():
            if name in chunk.factored:
                self.touched = True
                one = chunk.factored[name]
                rows.write(chunk.first, chunk.sequence, one.inputs, one.outputs)

    @override
    def matrix(self, *, center: bool) -> Tensor:
        gram = torch.zeros(self._n, self._n, dtype=torch.float64, device=self.device)
        if self.rows is not None:
            for tile in self.rows.tiles():
                tile = tile.to(self.device)
                add_gram(gram, tile - tile.mean(0) if center else tile)
        gram = from_lower_triangle(gram)
        for rows in self.factored.values():
            one = factored_gram(rows, self._n, self.device)
            gram += double_center(one) if center else one
        return gram / self._n

    @override
    def close(self) -> None:
        for store in (self.rows, *self.factored.values()):
            if store is not None:
                store.close()


class CovarianceMatrix(BlockMatrix):
    """``(1/N) J^T J``, ``P x P``, summed up chunk by chunk (mode ``streaming``, ``P < N``).

    Args:
        sizes: parameters of the block and their numbers of elements.
        center: whether deviations from the mean row are summed (Chan et al. 1979).
    """

    method = "covariance"

    def __init__(self, sizes: Mapping[str, int], center: bool) -> None:
        self._sizes, self._center = dict(sizes), center
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
        if self._sum is None or center != self._center:
            raise ValueError("center: another value than the matrix was collected with")
        return self._sum / self._n

    def moments(self) -> tuple[int, Tensor, Tensor]:
        """Returns the number of rows, their mean ``[P]`` and the sum ``[P, P]`` about it.

        The mean is zero where nothing is centred; all is zero where no row came.
        """
        p = sum(self._sizes.values())
        if self._sum is None or self._mean is None:
            zeros = torch.zeros(p, p, dtype=torch.float64)
            return 0, zeros[:, 0].clone(), zeros
        return self._n, self._mean, self._sum

    @override
    def close(self) -> None:
        self._sum = self._mean = None


class RowMatrix(BlockMatrix):
    """``J`` itself, ``N x P`` in memory (modes ``full`` and ``sketch``).

    Args:
        n: samples, ``N``; on several ranks this rank's.
        sizes: parameters of the block and their numbers of elements.
        device: of the rows where the loss does not reach the block.
        dtype: of these.
    """

    method = "full"

    def __init__(
        self, n: int, sizes: Mapping[str, int], device: torch.device, dtype: torch.dtype
    ) -> None:
        self._n, self._sizes, self.device, self._dtype = n, dict(sizes), device, dtype
        self.p = sum(sizes.values())
        self._rows: Tensor | None = None
        self.touched = False

    @override
    def add(self, chunk: Chunk) -> None:
        columns = columns_of(chunk, self._sizes)
        if columns is None:
            return
        self.touched = True
        if self._rows is None:
            self._rows = columns.new_zeros(self._n, columns.shape[1])
        self._rows[chunk.first : chunk.first + chunk.n] = columns

    def stored(self) -> Tensor:
        """Returns ``J`` ``[N, P]`` as it is kept."""
        if self._rows is None:
            return torch.zeros(self._n, self.p, dtype=self._dtype, device=self.device)
        return self._rows

    def rows(self, *, center: bool) -> Tensor:
        """Returns ``J`` ``[N, P]`` in float64, less its mean row if asked for."""
        rows = self.stored().double()
        return rows - rows.mean(0) if center else rows

    def matrix(self, *, center: bool) -> Tensor:
        """Returns the smaller of ``(1/N) J J^T`` and ``(1/N) J^T J``."""
        rows = self.rows(center=center)
        n, p = rows.shape
        return (rows @ rows.T if n <= p else rows.T @ rows) / self._n

    @override
    def close(self) -> None:
        self._rows = None
