"""Who trains a model together; here, one process alone.

The training loop is written against :class:`Crew`. The ranks of ``torch.distributed`` are another
crew (``fisher_lab.tasks.crew``): this package knows no process group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fisher_lab.workload.objectives import Batch


class Crew:
    """One process that trains alone; several ranks override what they do together.

    All methods are collective: every rank calls them, in one order.

    Attributes:
        rank: of this process, from 0; rank 0 writes the files.
        size: number of processes.
    """

    rank = 0
    size = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    # ---- the model ---------------------------------------------------------------------------

    def adopt(self, model: nn.Module) -> None:
        """Prepare a model, before an optimiser is made of its parameters."""

    def called(self, model: nn.Module) -> nn.Module:
        """Returns what is called in a step whose backward pass gives the joined gradient."""
        return model

    def check(self, model: nn.Module) -> None:
        """Make sure that every process has the same weights.

        Raises:
            fisher_lab.curvature.errors.CurvatureError: they differ.
        """

    def settle(self, model: nn.Module) -> None:
        """Bring a model back to rest, after passes that did not end in a step."""

    # ---- data --------------------------------------------------------------------------------

    def parts(self, batch: Batch, count: int) -> Sequence[Batch]:
        """Returns this process's micro-batches, equally many on every rank.

        Args:
            batch: of all ranks; nothing in it is changed.
            count: how many the batch is cut into, as far as its sequences go.
        """
        return list(cut(batch, count))

    def own(self, batches: Iterable[Batch]) -> list[Batch]:
        """Returns this process's sequences of some batches, for factors or for a loss."""
        return list(batches)

    def saw(self, batch: Batch, labels: int) -> None:
        """Count this process's share of a training batch, and its labels."""

    def syncing(self, called: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Within it a micro-batch goes forward and backward; ``last`` joins the gradients."""
        return nullcontext()

    # ---- numbers -----------------------------------------------------------------------------

    def total(self, *values: float) -> tuple[float, ...]:
        """Returns sums over the ranks."""
        return values

    def clip(self, parameters: Iterable[nn.Parameter], limit: float) -> float:
        """Cuts the norm of the gradients to a limit; returns what it was."""
        return float(nn.utils.clip_grad_norm_(parameters, limit))

    def agree(self, signum: int, due: bool) -> tuple[int, bool]:
        """Returns what all ranks go by: the first signal of any, and whether rank 0 is due."""
        return signum, due

    def problem(self, text: str | None) -> str | None:
        """Returns the first problem of any rank."""
        return text

    # ---- state -------------------------------------------------------------------------------

    def lead(self, function: Callable[[], Any]) -> Any:
        """Returns what a function returns on rank 0 (tensors and JSON values)."""
        return function()

    def every(self, state: Any) -> list[Any]:
        """Returns a state (tensors and JSON values) of every rank."""
        return [state]

    def whole(self, state: Any) -> Any:
        """Returns a state with whole tensors in the place of shards, on rank 0."""
        return state

    def weights(self, model: nn.Module) -> dict[str, Tensor] | None:
        """Returns the whole state dict of a model that has shards only, on rank 0; else None."""
        return None

    def fill(self, tensor: Tensor, value: Tensor) -> None:
        """Sets a parameter or buffer to a whole value."""
        tensor.copy_(value)

    def held(self, state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Returns a whole state of an optimiser as this process holds it."""
        return state


ALONE = Crew()


def cut(batch: Batch, parts: int) -> Iterable[Batch]:
    """Micro-batches of equal numbers of sequences, as far as that goes."""
    if parts == 1:
        yield batch
        return
    pieces = {key: value.tensor_split(parts) for key, value in batch.items()}
    for index in range(parts):
        part = {key: value[index] for key, value in pieces.items()}
        if next(iter(part.values())).shape[0]:
            yield part
