"""Tokens that are spread over ranks: who holds which, and how they are exchanged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .reduce import Communicator, shares


@dataclass(frozen=True)
class Spread:
    """Tokens of which every rank holds its own.

    Attributes:
        communicator: of the ranks.
        rows: tokens of each rank.
    """

    communicator: Communicator
    rows: tuple[int, ...]

    def gather(self, x: Tensor) -> Tensor:
        """Returns the rows of all ranks, ``[T, ...]``; collective."""
        return self.communicator.all_gather(x, self.rows)


def rank_seed(seed: int, rank: int) -> int:
    """Returns the seed of a rank's own draws: rank 0 draws what one process draws."""
    return (seed + rank * 0x9E3779B1) % 2**63


def columns_for_rows(x: Tensor, rows: Sequence[int], communicator: Communicator) -> Tensor:
    """Exchanges a rank's tokens of all outputs for all tokens of its share of the outputs.

    Args:
        x: ``[rows[rank], out]``.
        rows: tokens of each rank.
        communicator: of the ranks.

    Returns:
        ``[sum(rows), out_r]``.
    """
    widths = shares(x.shape[1], communicator.size)
    mine = widths[communicator.rank]
    flat = torch.cat([piece.reshape(-1) for piece in x.split(widths, dim=1)])
    sent = [len(x) * width for width in widths]
    received = [n * mine for n in rows]
    return communicator.exchange(flat, sent, received).view(sum(rows), mine)
