"""Data-parallel training: one process, or the ranks of a process group under DDP or FSDP2.

The training loop is written against :class:`DataParallel`, whatever the number of processes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fisher_lab.curvature import wrappers
from fisher_lab.curvature.collectives import TorchCommunicator, slice_of_rank, slice_sizes, together
from fisher_lab.curvature.errors import CurvatureError
from fisher_lab.curvature.losses import IGNORE_INDEX
from fisher_lab.workload import snapshot
from fisher_lab.workload.objectives import Batch

_DDP = nn.parallel.DistributedDataParallel
# Renamed in torch 2.13.
_NEW = "forward_sync_buffers" in inspect.signature(_DDP).parameters
_BUFFERS = "forward_sync_buffers" if _NEW else "broadcast_buffers"
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class DataParallel:
    """The processes that train one model: one alone, or the ranks of a process group.

    Each rank takes its slice of the sequences of every batch, and as many micro-batches as the
    others: a rank without sequences runs the first one of the batch with all labels ignored, a
    loss of zero. All methods are collective: every rank calls them, in one order.

    Args:
        communicator: of the ranks; None for one process.
        wrapper: ``ddp`` (every rank has the whole model) or ``fsdp`` (each has shards of it).
        unused: whether the model may have parameters that get no gradient (``ddp`` has to know).

    Attributes:
        rank: of this process, from 0; rank 0 writes the files.
        size: number of processes.
        sharded: whether a rank has shards of the model only.
        tokens: that this rank has trained on in this attempt.
        labels: of these tokens, those that count.
    """

    def __init__(
        self,
        communicator: TorchCommunicator | None = None,
        wrapper: str = "ddp",
        *,
        unused: bool = False,
    ) -> None:
        self.communicator, self.unused = communicator, unused
        self.rank = 0 if communicator is None else communicator.rank
        self.size = 1 if communicator is None else communicator.size
        self.sharded = communicator is not None and wrapper == "fsdp"
        self.tokens, self.labels = 0, 0

    @property
    def is_rank_zero(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    # ---- the model ---------------------------------------------------------------------------

    def prepare(self, model: nn.Module) -> None:
        """Compare the weights over the ranks, then cut them into shards where asked for.

        Call it before an optimiser is made of the model's parameters.

        Raises:
            fisher_lab.curvature.errors.CurvatureError: the ranks' weights differ.
        """
        if self.communicator is None:
            return
        self._compare(self.communicator, model)
        if self.sharded:
            from torch.distributed.device_mesh import DeviceMesh

            kind = next(model.parameters()).device.type
            wrappers.shard(model, DeviceMesh.from_group(self.communicator.group, kind))

    def wrap(self, model: nn.Module) -> nn.Module:
        """Returns the module whose backward pass gives the gradient of all ranks."""
        if self.communicator is None or self.sharded:
            return model
        buffers: Any = {_BUFFERS: False}
        return _DDP(
            model,
            process_group=self.communicator.group,
            # Without it the layout of DDP's buckets changes after the first step. That changes the
            # order of sums over three ranks or more, and a training that goes on would no longer
            # end bit-identical.
            find_unused_parameters=self.unused or self.size > 2,
            **buffers,
        )

    def check_weights(self, model: nn.Module) -> None:
        """Make sure that all ranks have the same weights, where each has a copy.

        Raises:
            fisher_lab.curvature.errors.CurvatureError: they differ.
        """
        if self.communicator is not None and not self.sharded:
            self._compare(self.communicator, model)

    def _compare(self, communicator: TorchCommunicator, model: nn.Module) -> None:
        sums = {name: _checksum(parameter) for name, parameter in model.named_parameters()}
        for rank, found in enumerate(communicator.all_gather_objects(sums)):
            unlike = next((name for name in sums if found.get(name) != sums[name]), None)
            if unlike is not None:
                raise CurvatureError(
                    f"weights: {unlike} of rank {rank} is not that of rank {self.rank}; allowed: "
                    "the same to the last bit on all ranks"
                )

    def reshard(self, model: nn.Module) -> None:
        """Cut the model into its shards again, after passes that did not end in a step."""
        if self.sharded:
            wrappers.at_rest(model)

    # ---- data --------------------------------------------------------------------------------

    def micro_batches(self, batch: Batch, count: int) -> list[Batch]:
        """Returns this rank's micro-batches, equally many on every rank.

        Args:
            batch: of all ranks; nothing in it is changed.
            count: how many the batch is cut into, as far as its sequences go.
        """
        count = max(1, min(count, slice_sizes(_length(batch), self.size)[0]))
        own = self._slice(batch)
        found = [] if own is None else _cut(own, count)
        return [*found, *([_without_labels(batch)] * (count - len(found)))]

    def own_sequences(self, batches: Iterable[Batch]) -> list[Batch]:
        """Returns this rank's sequences of some batches, for factors or for a loss.

        A batch without a sequence for this rank is left out. Under ``fully_shard``, where the
        forward pass is collective, one without labels takes its place.
        """
        found = []
        for batch in batches:
            own = self._slice(batch)
            if own is not None:
                found.append(own)
            elif self.sharded:
                found.append(_without_labels(batch))
        return found

    def _slice(self, batch: Batch) -> Batch | None:
        """This rank's sequences of a batch, or None where it has none."""
        rows = slice_of_rank(_length(batch), self.rank, self.size)
        if rows.start >= rows.stop:
            return None
        return {key: value[rows] for key, value in batch.items()}

    def count_tokens(self, batch: Batch, labels: int) -> None:
        """Count this rank's tokens of a training batch, and its labels; one process does not."""
        if self.communicator is None:
            return
        first = next(iter(batch.values()))
        self.tokens += first[slice_of_rank(len(first), self.rank, self.size)].numel()
        self.labels += labels

    def gradient_sync(self, wrapped: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """A context for one micro-batch; after the ``last`` one the gradients are reduced."""
        if self.sharded:
            wrapped.set_requires_gradient_sync(last)  # type: ignore[operator]
            return nullcontext()
        if self.communicator is None or last:
            return nullcontext()
        return wrapped.no_sync()  # type: ignore[operator]

    # ---- numbers -----------------------------------------------------------------------------

    def sum(self, *values: float) -> tuple[float, ...]:
        """Returns sums over the ranks, added in their order and so the same everywhere."""
        return tuple(map(sum, zip(*self._gather_rows(values), strict=True)))

    def clip(self, parameters: Iterable[nn.Parameter], limit: float) -> float:
        """Cut the norm of the gradients to a limit; returns what it was."""
        norm = nn.utils.clip_grad_norm_(parameters, limit)
        return float(wrappers.whole({"norm": norm})["norm"])

    def agree(self, signum: int, due: bool) -> tuple[int, bool]:
        """Returns what all ranks go by: the first signal of any, and whether rank 0 is due."""
        rows = self._gather_rows((signum, due))
        return next((int(row[0]) for row in rows if row[0]), 0), bool(rows[0][1])

    def _gather_rows(self, values: Sequence[float]) -> list[list[float]]:
        if self.communicator is None:
            return [list(values)]
        mine = torch.tensor([values], dtype=torch.float64)
        return self.communicator.all_gather(mine, [1] * self.size).tolist()

    def first_problem(self, text: str | None) -> str | None:
        """Returns the first problem of any rank."""
        if self.communicator is None:
            return text
        return next((t for t in self.communicator.all_gather_objects(text) if t is not None), None)

    # ---- state -------------------------------------------------------------------------------

    def from_rank_zero(self, function: Callable[[], Any]) -> Any:
        """Returns what a function returns on rank 0 (tensors and JSON values).

        An error of rank 0 is raised on all ranks.
        """
        if self.communicator is None:
            return function()
        found: list[bytes] = []

        def step() -> None:
            if self.rank == 0:
                found.append(snapshot.to_bytes(function()))

        together(self.communicator, step)
        sizes = self.communicator.all_gather_objects(len(found[0]) if found else 0)
        data = _tensor(found[0]) if found else torch.empty(sizes[0], dtype=torch.uint8)
        return snapshot.from_bytes(self.communicator.broadcast(data, 0).numpy().tobytes())

    def gather_states(self, state: Any) -> list[Any]:
        """Returns a state (tensors and JSON values) of every rank."""
        if self.communicator is None:
            return [state]
        data = _tensor(snapshot.to_bytes(state))
        sizes = self.communicator.all_gather_objects(len(data))
        pieces = self.communicator.all_gather(data, sizes).split(sizes)
        return [snapshot.from_bytes(piece.numpy().tobytes()) for piece in pieces]

    def gather_shards(self, state: Any) -> Any:
        """Returns a state with whole tensors in the place of shards, on rank 0."""
        return wrappers.gathered(state, self.rank == 0) if self.sharded else state

    def scatter_state(
        self, state: dict[str, Any], optimizer: torch.optim.Optimizer
    ) -> dict[str, Any]:
        """Returns a whole state of an optimiser as this rank holds it."""
        if not self.sharded:
            return state
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        return wrappers.scattered(state, parameters)

    def full_weights(self, model: nn.Module) -> dict[str, Tensor] | None:
        """Returns the whole state dict of a model in shards, on rank 0; else None."""
        if not self.sharded:
            return None
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            get_model_state_dict,
        )

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        found: dict[str, Any] = get_model_state_dict(model, options=options)
        shared: dict[int, Tensor] = {}  # a tied weight is one tensor again, and written once
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name in found:
                found[name] = shared.setdefault(id(parameter), found[name])
        return found

    def set_tensor(self, tensor: Tensor, value: Tensor) -> None:
        """Set a parameter or buffer to a whole value."""
        tensor.copy_(wrappers.like(value, tensor))

    def describe(self) -> dict[str, Any]:
        """What an exact resume needs again: the number of ranks and their wrapper."""
        if self.communicator is None:
            return {}
        return {"ranks": self.size, "wrapper": "fsdp" if self.sharded else "ddp"}


ONE_PROCESS = DataParallel()


def _length(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def _cut(batch: Batch, parts: int) -> list[Batch]:
    """Micro-batches of equal numbers of sequences, as far as that goes."""
    if parts == 1:
        return [batch]
    pieces = {key: value.tensor_split(parts) for key, value in batch.items()}
    found = ({key: value[index] for key, value in pieces.items()} for index in range(parts))
    return [part for part in found if _length(part)]


def _without_labels(batch: Batch) -> Batch:
    """The first sequence with all labels ignored."""
    first = {key: value[:1] for key, value in batch.items()}
    return {**first, "labels": torch.full_like(first["labels"], IGNORE_INDEX)}


def _tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _checksum(tensor: Tensor) -> int:
    """Of the bits, not of the values: no difference is small."""
    flat = tensor.detach().contiguous().flatten()
    return int(flat.view(INTEGERS[tensor.element_size()]).sum(dtype=torch.int64))
