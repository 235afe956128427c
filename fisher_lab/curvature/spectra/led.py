"""Products with an operator whose samples are spread over ranks, led by rank 0.

Rank 0 runs the algorithm and holds its vectors; the others only answer. A product is a broadcast of
the vector, each rank's own samples' share of it, and an all-reduce. What the algorithm does next is
decided on one rank alone: ranks whose arithmetic differs in the last bit cannot come apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..reduce import Communicator, raise_others

Answer = Callable[[Tensor], Tensor]


class Led:
    """A sum over the ranks of functions of one vector.

    Args:
        answer: this rank's share, ``[n]`` to ``[n]``.
        n: length of the vectors.
        dtype: of the vectors that travel.
        device: of the vectors that ``answer`` takes.
        communicator: of the ranks.
    """

    def __init__(
        self,
        answer: Answer,
        n: int,
        dtype: torch.dtype,
        device: torch.device,
        communicator: Communicator,
    ) -> None:
        self._answer, self._n = answer, n
        self._dtype, self._device = dtype, device
        self._communicator = communicator
        self._failed = False

    def __call__(self, vector: Tensor) -> Tensor:
        """Returns the sum of all ranks' shares; on rank 0, within :meth:`run`.

        Args:
            vector: ``[n]`` in the dtype and on the device that were given.

        Raises:
            RankError: another rank has an error.
        """
        self._communicator.broadcast(torch.cat([vector, vector.new_ones(1)]), 0)
        return self._together(vector)

    def run(self, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Does the work on rank 0, while the other ranks answer; collective.

        Args:
            work: what rank 0 does; it may call this object. Its result is told to all.

        Returns:
            The result of the work, on every rank.

        Raises:
            RankError: another rank has an error.
        """
        if self._communicator.rank > 0:
            self._serve()
            error, result = self._communicator.share(None)[0]
            raise_others([error])
            return result
        try:
            result = work()
        except Exception as error:
            if not self._failed:  # else all know already
                self._end()
                self._communicator.share([f"{type(error).__name__}: {error}", None])
            raise
        self._end()
        self._communicator.share([None, result])
        return result

    def _serve(self) -> None:
        while True:
            empty = torch.empty(self._n + 1, dtype=self._dtype, device=self._device)
            message = self._communicator.broadcast(empty, 0)
            if not bool(message[-1]):
                return
            self._together(message[:-1])

    def _end(self) -> None:
        nothing = torch.zeros(self._n + 1, dtype=self._dtype, device=self._device)
        self._communicator.broadcast(nothing, 0)

    def _together(self, vector: Tensor) -> Tensor:
        """The last element counts the ranks that have an error."""
        total = torch.zeros(self._n + 1, dtype=self._dtype, device=self._device)
        own: Exception | None = None
        try:
            total[:-1] = self._answer(vector)
        except Exception as error:
            own = error
            total[-1] = 1
        total = self._communicator.all_reduce(total)
        if bool(total[-1]):
            self._failed = True
            text = None if own is None else f"{type(own).__name__}: {own}"
            errors = self._communicator.share(text)
            if own is not None:
                raise own
            raise_others(errors)
        return total[:-1]


__all__ = ["Led"]
