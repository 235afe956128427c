"""What the engine needs of other ranks, and its implementation for one process.

The mathematics of several ranks (``docs/math.md``, section 7) is written against
:class:`Communicator`; who moves the data is the caller's affair (:mod:`fisher_lab.distributed`
does it with ``torch.distributed``). Every method is collective: all ranks call it, in one order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .errors import CurvatureError, RankError


class Communicator(Protocol):
    """Moves tensors between ranks."""

    @property
    def rank(self) -> int:
        """This rank, from 0."""
        ...

    @property
    def size(self) -> int:
        """Number of ranks."""
        ...

    def all_reduce(self, x: Tensor) -> Tensor:
        """Returns the sum of ``x`` over the ranks; ``x`` itself may hold it afterwards."""
        ...

    def all_gather(self, x: Tensor, rows: Sequence[int]) -> Tensor:
        """Returns the ranks' ``x`` one under the other, in the order of the ranks.

        Args:
            x: ``[rows[rank], ...]``.
            rows: what each rank brings; the remaining dimensions are alike.
        """
        ...

    def exchange(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Sends consecutive pieces of a flat tensor to the ranks (all-to-all).

        Args:
            x: ``[sum(sent)]``.
            sent: elements for each rank.
            received: elements from each rank.

        Returns:
            ``[sum(received)]``, in the order of the ranks.
        """
        ...

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        """Returns ``source``'s ``x``; the other ranks bring a tensor of the same shape."""
        ...

    def share(self, value: Any) -> list[Any]:
        """Returns the JSON-able values of all ranks, in the order of the ranks."""
        ...


class Alone:
    """One process: everything is at hand already."""

    rank = 0
    size = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        """See :class:`Communicator`."""
        return x

    def all_gather(self, x: Tensor, rows: Sequence[int]) -> Tensor:
        """See :class:`Communicator`."""
        return x

    def exchange(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """See :class:`Communicator`."""
        return x

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        """See :class:`Communicator`."""
        return x

    def share(self, value: Any) -> list[Any]:
        """See :class:`Communicator`."""
        return [value]


def share(length: int, rank: int, size: int) -> slice:
    """Returns a rank's share of ``range(length)``: contiguous, sizes differ by one at most."""
    base, more = divmod(length, size)
    start = rank * base + min(rank, more)
    return slice(start, start + base + int(rank < more))


def shares(length: int, size: int) -> list[int]:
    """Returns the sizes of all ranks' shares of ``range(length)``."""
    return [len(range(length)[share(length, rank, size)]) for rank in range(size)]


def dtype_name(dtype: torch.dtype) -> str:
    """Returns ``float32`` for ``torch.float32``, to be told to other ranks."""
    return str(dtype).removeprefix("torch.")


def together(communicator: Communicator, step: Callable[[], None]) -> None:
    """Does a step on every rank; an error of one is raised on all, so that none waits in vain.

    Args:
        communicator: of the ranks.
        step: what this rank does by itself, without collectives.

    Raises:
        RankError: another rank has an error; names the rank.
        Exception: this rank's own.
    """
    if communicator.size == 1:
        step()
        return
    try:
        step()
    except Exception as error:
        communicator.share(f"{type(error).__name__}: {error}")
        raise
    raise_others(communicator.share(None))


def raise_others(errors: Sequence[str | None]) -> None:
    """Raises where a rank told of an error.

    Raises:
        RankError: names the first such rank.
    """
    for rank, text in enumerate(errors):
        if text is not None:
            raise RankError(f"rank {rank}: {text}")


def same_everywhere(communicator: Communicator, what: str, value: Any) -> None:
    """Checks that all ranks bring the same JSON-able value.

    Raises:
        CurvatureError: they do not; names the ranks and both values.
    """
    if communicator.size == 1:
        return
    found = communicator.share(value)
    for rank, other in enumerate(found):
        if other != found[0]:
            raise CurvatureError(
                f"{what}: rank 0 has {found[0]!r}, rank {rank} has {other!r}; allowed: the same "
                "on all ranks"
            )
