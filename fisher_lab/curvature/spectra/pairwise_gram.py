"""Matrices of a block whose samples lie on several ranks (``docs/math.md``, sections 7 and 8).

Rank ``r`` holds its own rows of ``J``, ``J_r``. The Gram matrix is made by pairs of ranks: of ``r``
and ``s`` one sends its rows, one tile or piece at a time, and the other forms ``J_r J_s^T``. A rank
keeps its own rows and one tile of another rank's. The blocks are then sent to the rank that
decomposes the matrix. Covariances are summed over the ranks.

All functions are collective, and every rank has the same blocks, tiles and parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fisher_lab.curvature.collectives import Communicator
from fisher_lab.curvature.spectra.block_matrices import (
    BlockMatrix,
    CovarianceMatrix,
    GramMatrix,
    RowMatrix,
    add_gram,
    double_center,
    factored_gram,
    from_lower_triangle,
)
from fisher_lab.curvature.spectra.spill import TILE_BYTES, FactoredRows


@dataclass(frozen=True)
class Exchange:
    """One exchange of rows with two other ranks.

    Attributes:
        to: the rank that this rank's rows go to.
        source: the rank whose rows come.
        sends: whether this rank sends.
        receives: whether this rank receives, and so forms the pair's block.
    """

    to: int
    source: int
    sends: bool
    receives: bool


def exchanges(rank: int, size: int, turn: int) -> list[Exchange]:
    """Returns a rank's exchanges, after which each pair of ranks has its block once.

    With an even number of ranks the last exchange pairs opposite ones, of which one receives.

    Args:
        rank: this rank.
        size: number of ranks.
        turn: 0 or 1: whether the lower or the upper one of opposite ranks receives.
    """
    found = []
    for shift in range(1, size // 2 + 1):
        opposite = 2 * shift == size
        receives = not opposite or (rank < shift) == (turn == 0)
        sends = not opposite or not receives
        found.append(Exchange((rank + shift) % size, (rank - shift) % size, sends, receives))
    return found


def matrix_on_owner(
    collector: BlockMatrix,
    rows: Sequence[int],
    communicator: Communicator,
    *,
    owner: int,
    turn: int,
    center: bool,
) -> Tensor | None:
    """Returns what one process with all rows gets from ``collector.matrix``, on one rank.

    Args:
        collector: with this rank's rows.
        rows: samples of each rank.
        communicator: of the ranks.
        owner: the rank that gets the matrix.
        turn: as for :func:`exchanges`.
        center: whether the mean row of all ranks is subtracted.

    Returns:
        The matrix on the owner, None on the other ranks.
    """
    n = sum(rows)
    owns = communicator.rank == owner
    match collector:
        case CovarianceMatrix():
            whole = _covariance(collector, n, communicator)
            return whole if owns else None
        case RowMatrix() if collector.p < n:
            whole = _covariance_of_rows(collector, n, communicator, center=center)
            return whole if owns else None
        case RowMatrix() | GramMatrix():
            pairs = PairGram(communicator, rows, turn, collector.device)
            for tile in _tiles(collector, max(rows)):
                pairs.add_tile(tile, center=center)
            weights = collector.factored.values() if isinstance(collector, GramMatrix) else ()
            for weight in weights:
                pairs.add_factored(weight)
            gram = pairs.assemble(owner)
            if gram is None:
                return None
            return (double_center(gram) if center and weights else gram) / n
        case _:
            raise TypeError(f"{type(collector).__name__} has no form for several ranks")


def _tiles(collector: RowMatrix | GramMatrix, longest: int) -> Iterator[Tensor]:
    """Yields this rank's rows by column tiles, as stored; as many on every rank."""
    if isinstance(collector, GramMatrix):
        if collector.rows is not None:
            yield from collector.rows.stored()
        return
    width = max(1, TILE_BYTES // (8 * max(longest, 1)))
    yield from collector.stored().split(width, dim=1)


def _covariance(collector: CovarianceMatrix, n: int, communicator: Communicator) -> Tensor:
    """Chan et al. 1979: the sums about the ranks' own means, moved to the mean of all."""
    own, mean, total = collector.moments()
    # The mean is zero where nothing is centred.
    whole_mean = communicator.all_reduce(mean * own) / n
    delta = mean - whole_mean
    return communicator.all_reduce(total + torch.outer(delta, delta) * own) / n


def _covariance_of_rows(
    collector: RowMatrix, n: int, communicator: Communicator, *, center: bool
) -> Tensor:
    """``(1/N) J^T J`` of rows that are kept whole."""
    rows = collector.rows(center=False)
    if center:
        rows = rows - communicator.all_reduce(rows.sum(0)) / n
    return communicator.all_reduce(rows.T @ rows) / n


class PairGram:
    """``J J^T`` by pairs of ranks.

    Args:
        communicator: of the ranks.
        rows: samples of each rank.
        turn: as for :func:`exchanges`.
        device: where tiles are multiplied.
    """

    def __init__(
        self, communicator: Communicator, rows: Sequence[int], turn: int, device: torch.device
    ) -> None:
        self._communicator, self._counts, self._device = communicator, list(rows), device
        self._n, self._turn = sum(rows), turn
        self._exchanges = exchanges(communicator.rank, communicator.size, turn)
        mine = rows[communicator.rank]
        self._own = torch.zeros(mine, mine, dtype=torch.float64, device=device)
        self._cross = {
            one.source: torch.zeros(mine, rows[one.source], dtype=torch.float64, device=device)
            for one in self._exchanges
            if one.receives
        }

    def add_tile(self, tile: Tensor, *, center: bool) -> None:
        """Adds the products of some columns of the rows.

        Args:
            tile: ``[N_r, w]`` as stored, this rank's rows.
            center: whether the mean row of all ranks is subtracted.
        """
        own, width = self._wide(tile), tile.shape[1]
        mean = own.new_zeros(width)
        if center:
            mean = self._communicator.all_reduce(own.sum(0)) / self._n
        own = own - mean
        add_gram(self._own, own)
        for one in self._exchanges:
            like = tile.new_empty(self._counts[one.source], width, device="meta")
            for other in self._exchange([tile], one, [like]):
                self._cross[one.source] += own @ (self._wide(other) - mean).T

    def add_factored(self, weight: FactoredRows) -> None:
        """Adds a weight whose rows come as products (``factored_gram`` of all ranks)."""
        self._own += factored_gram(weight, len(self._own), self._device).tril()
        by_rank = self._communicator.all_gather_objects(weight.described())
        for index in range(max(len(pieces) for pieces in by_rank)):
            own = weight.stored(index)[1:] if index < len(weight) else ()
            for one in self._exchanges:
                pieces = by_rank[one.source]
                about = pieces[index] if index < len(pieces) else {"first": 0, "like": []}
                like = [
                    torch.empty(tuple(shape), dtype=getattr(torch, dtype), device="meta")
                    for shape, dtype in about["like"]
                ]
                other = self._exchange(own, one, like)
                if other:
                    inputs, outputs = other
                    there = slice(about["first"], about["first"] + len(outputs))
                    self._mix(weight, inputs, outputs, self._cross[one.source][:, there])

    def _mix(self, weight: FactoredRows, inputs: Tensor, outputs: Tensor, block: Tensor) -> None:
        """Adds the products of this rank's pieces with another rank's piece."""
        inputs, outputs = self._wide(inputs), self._wide(outputs)
        for index in range(len(weight)):
            first, *own = weight.piece(index)
            own_inputs, own_outputs = (x.to(self._device) for x in own)
            mixed = torch.matmul(own_inputs @ inputs.T, outputs)
            block[first : first + len(own_outputs)] += own_outputs.flatten(1) @ mixed.flatten(1).T

    def _wide(self, x: Tensor) -> Tensor:
        return x.to(device=self._device, dtype=torch.float64)

    def _exchange(
        self, own: Sequence[Tensor], one: Exchange, coming: Sequence[Tensor]
    ) -> list[Tensor]:
        """Sends tensors and returns those that come, none where this rank does not receive.

        Args:
            own: what is sent, if this rank sends.
            one: with which ranks.
            coming: tensors without numbers, of the shapes and dtypes of what comes.
        """
        sent, received = [0] * len(self._counts), [0] * len(self._counts)
        going = [x.contiguous().reshape(-1).view(torch.uint8) for x in own] if one.sends else []
        flat = torch.cat(going) if going else torch.empty(0, dtype=torch.uint8)
        sent[one.to] = flat.numel()
        coming = coming if one.receives else []
        sizes = [x.numel() * x.element_size() for x in coming]
        received[one.source] = sum(sizes)
        came = self._communicator.exchange(flat, sent, received)
        # A copy of each: a view as another dtype has to begin at a multiple of its size.
        return [
            piece.clone().view(x.dtype).view(x.shape)
            for piece, x in zip(came.split(sizes), coming, strict=True)
        ]

    def assemble(self, owner: int) -> Tensor | None:
        """Returns the whole ``[N, N]`` matrix on the owner, None on the other ranks."""
        size, rank = self._communicator.size, self._communicator.rank
        parts = [from_lower_triangle(self._own), *self._cross.values()]
        flat = torch.cat([part.flatten() for part in parts])
        sent, received = [0] * size, [0] * size
        sent[owner] = flat.numel()
        if rank == owner:
            received = [sum(self._block_sizes(r)) for r in range(size)]
        came = self._communicator.exchange(flat, sent, received)
        return self._put_together(came.split(received)) if rank == owner else None

    def _partners(self, rank: int) -> list[int]:
        """The ranks whose blocks with a rank that rank forms, itself first."""
        found = exchanges(rank, self._communicator.size, self._turn)
        return [rank, *(one.source for one in found if one.receives)]

    def _block_sizes(self, rank: int) -> list[int]:
        return [self._counts[rank] * self._counts[other] for other in self._partners(rank)]

    def _put_together(self, came: Sequence[Tensor]) -> Tensor:
        starts = [sum(self._counts[:r]) for r in range(len(self._counts))]
        gram = came[0].new_empty(self._n, self._n)
        for rank, numbers in enumerate(came):
            here = slice(starts[rank], starts[rank] + self._counts[rank])
            parts = numbers.split(self._block_sizes(rank))
            for other, part in zip(self._partners(rank), parts, strict=True):
                there = slice(starts[other], starts[other] + self._counts[other])
                block = part.view(self._counts[rank], self._counts[other])
                gram[here, there] = block
                gram[there, here] = block.T
        return gram
