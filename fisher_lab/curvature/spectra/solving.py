"""The spectra of all blocks, in this process or spread over ranks.

Every block's matrix is decomposed once. On ``R`` ranks the blocks are taken ``R`` at a time, the
costliest first: each rank gets one block's matrix (:mod:`.pairs`), all decompose at once, and what
they find is told to all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..reduce import Communicator, together
from .matrices import BlockMatrix
from .pairs import joined_matrix
from .records import Solved, SolveError

Solver = Callable[[str, Tensor | None], Solved]
"""``solver(block, matrix)``; the matrix is None where the block's own collector forms it."""

Found = Solved | str
"""A block's spectrum, or why there is none."""


def solve_blocks(
    collectors: Mapping[str, BlockMatrix],
    sizes: Mapping[str, int],
    rows: Sequence[int],
    communicator: Communicator,
    solver: Solver,
    *,
    center: bool,
) -> dict[str, Found]:
    """Decomposes the matrices of all blocks; collective.

    Args:
        collectors: block to what was collected of it on this rank.
        sizes: block to its number of parameters, ``P``.
        rows: samples of each rank.
        communicator: of the ranks.
        solver: gives a block's spectrum.
        center: whether the mean row is subtracted.

    Returns:
        Block to its spectrum or the reason why there is none; the same on every rank. Blocks that
        no rank's loss reaches are left out.
    """
    told = communicator.share({name: c.touched for name, c in collectors.items()})
    reached = [name for name in collectors if any(other[name] for other in told)]
    if communicator.size == 1:
        return {name: _attempt(solver, name, None) for name in reached}
    found: dict[str, Found] = {}
    order = sorted(reached, key=lambda name: -sizes[name])
    turns = _turns(order, sizes)
    for start in range(0, len(order), communicator.size):
        mine: list[tuple[str, Tensor]] = []
        for owner, name in enumerate(order[start : start + communicator.size]):
            matrix = joined_matrix(
                collectors[name], rows, communicator, owner=owner, turn=turns[name], center=center
            )
            if matrix is not None:
                mine.append((name, matrix))
        together(communicator, partial(_decompose, solver, mine, found))
    return _told_to_all(order, found, communicator)


def _decompose(solver: Solver, mine: Sequence[tuple[str, Tensor]], found: dict[str, Found]) -> None:
    found.update({name: _attempt(solver, name, matrix) for name, matrix in mine})


def _attempt(solver: Solver, name: str, matrix: Tensor | None) -> Found:
    try:
        return solver(name, matrix)
    except SolveError as error:
        return str(error)


def _turns(order: Sequence[str], sizes: Mapping[str, int]) -> dict[str, int]:
    """Which of two opposite ranks forms their block of the Gram matrix: as much work for each."""
    loads, turns = [0, 0], {}
    for name in order:
        turn = turns[name] = loads.index(min(loads))
        loads[turn] += sizes[name]
    return turns


def _told_to_all(
    order: Sequence[str], own: Mapping[str, Found], communicator: Communicator
) -> dict[str, Found]:
    """Returns all ranks' spectra: the eigenvalues as they are, the rest as JSON."""
    told = communicator.share({name: _plain(one) for name, one in own.items()})
    result: dict[str, Found] = {}
    for index, name in enumerate(order):
        owner = index % communicator.size
        about = told[owner][name]
        if isinstance(about, str):
            result[name] = about
            continue
        here = own.get(name)
        empty = torch.empty(about["size"], dtype=torch.float64)
        values = communicator.broadcast(
            here.eigenvalues if isinstance(here, Solved) else empty, owner
        )
        result[name] = Solved(values, about["trace"], about["regularization"])
    return result


def _plain(found: Found) -> dict[str, Any] | str:
    if isinstance(found, str):
        return found
    return {
        "size": len(found.eigenvalues),
        "trace": found.trace,
        "regularization": found.regularization,
    }


__all__ = ["solve_blocks"]
