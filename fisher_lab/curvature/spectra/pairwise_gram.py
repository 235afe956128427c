"""Matrices of a block whose samples are spread over ranks (``docs/math.md``, sections 7 and 8).

Rank ``r`` holds its own rows of ``J``, ``J_r``. The Gram matrix is made by pairs of ranks: of ``r``
and ``s`` one passes its rows on, a tile or a piece at a time, and the other forms
``J_r J_s^T``. A rank keeps its own rows and one tile of another's; the blocks are then sent to the
one rank that decomposes the matrix. Covariances are summed up over the ranks.

All functions are collective, and every rank has the same blocks, tiles and parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fisher_lab.curvature.collectives import Communicator, dtype_name
from fisher_lab.curvature.spectra.block_matrices import (
    BlockMatrix,
    CovarianceMatrix,
    GramMatrix,
    RowMatrix,
    add_gram,
    double_center,
    factored_gram,
    mirror,
)
from fisher_lab.curvature.spectra.spill import TILE_BYTES, FactoredRows


@dataclass(frozen=True)
class Meeting:
    """One exchange in which every rank meets two others.

    Attributes:
        to: the rank that this one's rows go to.
        source: the rank whose rows come.
        gives: whether this rank sends.
        takes: whether this rank receives, and so forms the pair's block.
    """

    to: int
    source: int
    gives: bool
    takes: bool


def meetings(rank: int, size: int, turn: int) -> list[Meeting]:
    """Returns the exchanges after which every pair of ranks has met once.

    With an even number of ranks the last exchange pairs opposite ones, of which only one takes.

    Args:
        rank: this rank.
        size: number of ranks.
        turn: 0 or 1: whether the lower or the upper rank of opposite ones takes.
    """
    found = []
    for shift in range(1, size // 2 + 1):
        opposite = 2 * shift == size
        takes = not opposite or (rank < shift) == (turn == 0)
        gives = not opposite or not takes
        found.append(Meeting((rank + shift) % size, (rank - shift) % size, gives, takes))
    return found


def joined_matrix(
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
        turn: as for :func:`meetings`.
        center: whether the mean row of all ranks is subtracted.

    Returns:
        The matrix on the owner, None elsewhere.
    """
    n = sum(rows)
    owns = communicator.rank == owner
    match collector:
        case CovarianceMatrix():
            whole = _covariance(collector, n, communicator)
            return whole if owns else None
        case RowMatrix() if collector.p < n:
            whole = _small_side(collector, n, communicator, center=center)
            return whole if owns else None
        case RowMatrix() | GramMatrix():
            pairs = PairGram(communicator, rows, turn, collector.device)
            for tile in _tiles(collector, max(rows)):
                pairs.add_tile(tile, center=center)
            weights = collector.factored.values() if isinstance(collector, GramMatrix) else ()
            for weight in weights:
                pairs.add_products(weight)
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
    joint = communicator.all_reduce(mean * own) / n
    delta = mean - joint
    return communicator.all_reduce(total + torch.outer(delta, delta) * own) / n


def _small_side(
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
        turn: as for :func:`meetings`.
        device: where tiles are multiplied.
    """

    def __init__(
        self, communicator: Communicator, rows: Sequence[int], turn: int, device: torch.device
    ) -> None:
        self._communicator, self._counts, self._device = communicator, list(rows), device
        self._n, self._turn = sum(rows), turn
        self._meetings = meetings(communicator.rank, communicator.size, turn)
        mine = rows[communicator.rank]
        self._own = torch.zeros(mine, mine, dtype=torch.float64, device=device)
        self._cross = {
            m.source: torch.zeros(mine, rows[m.source], dtype=torch.float64, device=device)
            for m in self._meetings
            if m.takes
        }

    def add_tile(self, tile: Tensor, *, center: bool) -> None:
        """Takes in some columns of the rows.

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
        for meeting in self._meetings:
            like = tile.new_empty(self._counts[meeting.source], width, device="meta")
            for other in self._pass([tile], meeting, [like]):
                self._cross[meeting.source] += own @ (self._wide(other) - mean).T

    def add_products(self, weight: FactoredRows) -> None:
        """Takes in a weight whose rows come as products (``factored_gram`` of all ranks)."""
        self._own += factored_gram(weight, len(self._own), self._device).tril()
        told = self._communicator.all_gather_objects(
            [_tell(*piece) for piece in weight.described()]
        )
        for index in range(max(len(pieces) for pieces in told)):
            own = weight.stored(index)[1:] if index < len(weight) else ()
            for meeting in self._meetings:
                pieces = told[meeting.source]
                about = pieces[index] if index < len(pieces) else {"first": 0, "like": []}
                other = self._pass(own, meeting, [_like(*x) for x in about["like"]])
                if other:
                    inputs, outputs = other
                    there = slice(about["first"], about["first"] + len(outputs))
                    self._mix(weight, inputs, outputs, self._cross[meeting.source][:, there])

    def _mix(self, weight: FactoredRows, inputs: Tensor, outputs: Tensor, block: Tensor) -> None:
        """Adds the products of this rank's pieces with another's piece."""
        inputs, outputs = self._wide(inputs), self._wide(outputs)
        for index in range(len(weight)):
            first, *own = weight.piece(index)
            own_inputs, own_outputs = (x.to(self._device) for x in own)
            mixed = torch.matmul(own_inputs @ inputs.T, outputs)
            block[first : first + len(own_outputs)] += own_outputs.flatten(1) @ mixed.flatten(1).T

    def _wide(self, x: Tensor) -> Tensor:
        return x.to(device=self._device, dtype=torch.float64)

    def _pass(
        self, own: Sequence[Tensor], meeting: Meeting, coming: Sequence[Tensor]
    ) -> list[Tensor]:
        """Sends tensors on and returns those that come, none where this rank does not take.

        Args:
            own: what is sent, if this rank gives.
            meeting: with whom.
            coming: tensors without numbers, of the shapes and dtypes of what comes.
        """
        sent, received = [0] * len(self._counts), [0] * len(self._counts)
        going = [_as_bytes(x) for x in own] if meeting.gives else []
        flat = torch.cat(going) if going else torch.empty(0, dtype=torch.uint8)
        sent[meeting.to] = flat.numel()
        coming = coming if meeting.takes else []
        sizes = [x.numel() * x.element_size() for x in coming]
        received[meeting.source] = sum(sizes)
        came = self._communicator.exchange(flat, sent, received)
        # A copy of each: a view as another dtype has to begin at a multiple of its size.
        return [
            piece.clone().view(x.dtype).view(x.shape)
            for piece, x in zip(came.split(sizes), coming, strict=True)
        ]

    def assemble(self, owner: int) -> Tensor | None:
        """Returns the whole ``[N, N]`` matrix on the owner, None elsewhere."""
        size, rank = self._communicator.size, self._communicator.rank
        parts = [mirror(self._own), *self._cross.values()]
        flat = torch.cat([part.flatten() for part in parts])
        sent, received = [0] * size, [0] * size
        sent[owner] = flat.numel()
        if rank == owner:
            received = [self._numbers(r) for r in range(size)]
        came = self._communicator.exchange(flat, sent, received)
        return self._put_together(came.split(received)) if rank == owner else None

    def _partners(self, rank: int) -> list[int]:
        found = meetings(rank, self._communicator.size, self._turn)
        return [rank, *(m.source for m in found if m.takes)]

    def _numbers(self, rank: int) -> int:
        return self._counts[rank] * sum(self._counts[other] for other in self._partners(rank))

    def _put_together(self, came: Sequence[Tensor]) -> Tensor:
        starts = [sum(self._counts[:r]) for r in range(len(self._counts))]
        gram = came[0].new_empty(self._n, self._n)
        for rank, numbers in enumerate(came):
            here = slice(starts[rank], starts[rank] + self._counts[rank])
            partners = self._partners(rank)
            sizes = [self._counts[rank] * self._counts[other] for other in partners]
            for other, part in zip(partners, numbers.split(sizes), strict=True):
                there = slice(starts[other], starts[other] + self._counts[other])
                block = part.view(self._counts[rank], self._counts[other])
                gram[here, there] = block
                gram[there, here] = block.T
        return gram


def _tell(first: int, inputs: Tensor, outputs: Tensor) -> dict[str, Any]:
    """What the others have to know of a piece before it comes."""
    like = [(list(x.shape), dtype_name(x.dtype)) for x in (inputs, outputs)]
    return {"first": first, "like": like}


def _like(shape: Sequence[int], dtype: str) -> Tensor:
    return torch.empty(tuple(shape), dtype=getattr(torch, dtype), device="meta")


def _as_bytes(x: Tensor) -> Tensor:
    return x.contiguous().reshape(-1).view(torch.uint8)


__all__ = ["Meeting", "PairGram", "joined_matrix", "meetings"]
