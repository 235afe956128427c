"""Data-parallel training: one process, or the ranks of a process group under DDP or FSDP2.

The training loop is written against :class:`DataParallel` for any number of processes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fisher_lab.curvature import wrappers
from fisher_lab.curvature.collectives import (
    Alone,
    Communicator,
    TorchCommunicator,
    slice_of_rank,
    slice_sizes,
    together,
)
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
    """The processes that train one model: a single one, or the ranks of a process group.

    Each rank takes its slice of the sequences of every batch. All ranks run the same number of
    micro-batches: a rank without sequences runs the first one of the batch with all labels ignored,
    which gives a loss of zero. All methods are collective: every rank calls them in the same order.

    Args:
        communicator: connects the ranks; None for one process.
        wrapper: ``ddp`` (every rank has the whole model) or ``fsdp`` (each has shards of it).
        unused: whether the model may have parameters without a gradient (``ddp`` has to know).

    Attributes:
        rank: number of this process, from 0; rank 0 writes the files.
        size: number of processes.
        sharded: whether a rank has only shards of the model.
        tokens: tokens that this rank has trained on in this attempt.
        labels: number of labels among them that count.
    """

    def __init__(
        self,
        communicator: TorchCommunicator | None = None,
        wrapper: str = "ddp",
        *,
        unused: bool = False,
    ) -> None:
        self.communicator, self.unused = communicator, unused
        self._ranks: Communicator = communicator or Alone()
        self.rank, self.size = self._ranks.rank, self._ranks.size
        self.sharded = communicator is not None and wrapper == "fsdp"
        self.tokens, self.labels = 0, 0

    @property
    def is_rank_zero(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    # ---- the model ---------------------------------------------------------------------------

    def prepare(self, model: nn.Module) -> None:
        """Check that all ranks have the same weights, and shard the model with ``fsdp``.

        Call it before an optimiser takes the model's parameters.

        Raises:
            fisher_lab.curvature.errors.CurvatureError: the ranks' weights differ.
        """
        if self.communicator is None:
            return
        self._compare(model)
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
            # Without it the layout of DDP's buckets changes after the first step, and with it the
            # order of sums over three or more ranks: a resumed training would differ in bits.
            find_unused_parameters=self.unused or self.size > 2,
            **buffers,
        )

    def check_weights(self, model: nn.Module) -> None:
        """Check that all ranks have the same weights, if each has a copy.

        Raises:
            fisher_lab.curvature.errors.CurvatureError: they differ.
        """
        if self.communicator is not None and not self.sharded:
            self._compare(model)

    def _compare(self, model: nn.Module) -> None:
        sums = {name: _checksum(parameter) for name, parameter in model.named_parameters()}
        for rank, found in enumerate(self._ranks.all_gather_objects(sums)):
            unlike = next((name for name in sums if found.get(name) != sums[name]), None)
            if unlike is not None:
                raise CurvatureError(
                    f"weights: {unlike} of rank {rank} is not that of rank {self.rank}; allowed: "
                    "the same to the last bit on all ranks"
                )

    # ---- data --------------------------------------------------------------------------------

    def micro_batches(self, batch: Batch, count: int) -> tuple[list[Batch], int]:
        """Returns micro-batches, as many on every rank, and how many are of this rank's share.

        Args:
            batch: the batch of all ranks; it is not changed.
            count: number of micro-batches, limited by the number of sequences.
        """
        count = max(1, min(count, slice_sizes(_length(batch), self.size)[0]))
        own = self._slice(batch)
        found = [] if own is None else _cut(own, count)
        return [*found, *([_without_labels(batch)] * (count - len(found)))], len(found)

    def own_sequences(self, batches: Iterable[Batch], count: int = 1) -> list[Batch]:
        """Returns this rank's sequences of some batches, for factors or for a loss.

        A batch without a sequence for this rank is left out. Under ``fully_shard``, whose forward
        pass is collective, a batch without labels takes its place.

        Args:
            batches: of all ranks.
            count: number of pieces that each is cut into, limited by the number of sequences.
        """
        found: list[Batch] = []
        for batch in batches:
            own, sizes = self._slice(batch), slice_sizes(_length(batch), self.size)
            if own is not None:
                # Passes of shards are collective: as many on the rank with the fewest sequences.
                most = max(sizes[-1], 1) if self.sharded else sizes[self.rank]
                found += _cut(own, min(count, most))
            elif self.sharded:
                found.append(_without_labels(batch))
        return found

    def _slice(self, batch: Batch) -> Batch | None:
        """This rank's sequences of a batch, or None if it has none."""
        rows = slice_of_rank(_length(batch), self.rank, self.size)
        if rows.start >= rows.stop:
            return None
        return {key: value[rows] for key, value in batch.items()}

    def count_tokens(self, batch: Batch, labels: int) -> None:
        """Count this rank's tokens of a training batch, and its labels."""
        first = next(iter(batch.values()))
        self.tokens += first[slice_of_rank(len(first), self.rank, self.size)].numel()
        self.labels += labels

    def gradient_sync(self, wrapped: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """The context of one micro-batch; gradients are reduced after the ``last`` one."""
        if self.sharded:
            wrapped.set_requires_gradient_sync(last)  # type: ignore[operator]
            return nullcontext()
        if self.communicator is None or last:
            return nullcontext()
        return wrapped.no_sync()  # type: ignore[operator]

    # ---- numbers -----------------------------------------------------------------------------

    def sum(self, *values: float) -> tuple[float, ...]:
        """Returns sums over the ranks, added in their order: the same on all ranks."""
        return tuple(map(sum, zip(*self._gather_rows(values), strict=True)))

    def clip(self, parameters: Iterable[nn.Parameter], limit: float) -> float:
        """Limit the norm of the gradients; returns the norm before."""
        norm = nn.utils.clip_grad_norm_(parameters, limit)
        return float(wrappers.whole({"norm": norm})["norm"])

    def agree(self, signum: int, due: bool) -> tuple[int, bool]:
        """Returns the first signal of any rank, and whether a save is due on rank 0."""
        rows = self._gather_rows((signum, due))
        return next((int(row[0]) for row in rows if row[0]), 0), bool(rows[0][1])

    def _gather_rows(self, values: Sequence[float]) -> list[list[float]]:
        mine = torch.tensor([values], dtype=torch.float64)
        return self._ranks.all_gather(mine, [1] * self.size).tolist()

    def first_problem(self, text: str | None) -> str | None:
        """Returns the first problem of any rank, or None."""
        return next((t for t in self._ranks.all_gather_objects(text) if t is not None), None)

    # ---- state -------------------------------------------------------------------------------

    def from_rank_zero(self, function: Callable[[], Any]) -> Any:
        """Returns what a function returns on rank 0 (tensors and JSON values).

        An error of rank 0 is raised on all ranks.
        """
        if self.size == 1:
            return function()
        data = torch.empty(0, dtype=torch.uint8)

        def step() -> None:
            nonlocal data
            if self.rank == 0:
                data = snapshot.to_tensor(function())

        together(self._ranks, step)
        size = self._ranks.all_gather_objects(len(data))[0]
        data = data if self.rank == 0 else data.new_empty(size)
        return snapshot.from_tensor(self._ranks.broadcast(data, 0))

    def gather_states(self, state: Any) -> list[Any]:
        """Returns a state (tensors and JSON values) of every rank."""
        data = snapshot.to_tensor(state)
        sizes = self._ranks.all_gather_objects(len(data))
        pieces = self._ranks.all_gather(data, sizes).split(sizes)
        return [snapshot.from_tensor(piece) for piece in pieces]

    def gather_shards(self, state: Any) -> Any:
        """Returns a state with whole tensors instead of shards, on rank 0."""
        return wrappers.gathered(state, self.rank == 0) if self.sharded else state

    def scatter_state(self, state: dict[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
        """Returns this rank's part of the whole state of an optimiser.

        Args:
            state: as ``state_dict`` returned it, with whole tensors.
            parameters: in the order of the state's groups.
        """
        return wrappers.scattered(state, parameters) if self.sharded else state

    def full_weights(self, model: nn.Module) -> dict[str, Tensor] | None:
        """Returns the whole state dict of a sharded model, on rank 0; else None."""
        if not self.sharded:
            return None
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        found: dict[str, Any] = get_model_state_dict(model, options=options)
        shared: dict[int, Tensor] = {}  # a tied weight is one tensor again and written once
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name in found:
                found[name] = shared.setdefault(id(parameter), found[name])
        return found


ONE_PROCESS = DataParallel()


def _length(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def _cut(batch: Batch, parts: int) -> list[Batch]:
    """Micro-batches with numbers of sequences that differ by one at most."""
    pieces = {key: value.tensor_split(parts) for key, value in batch.items()}
    found = ({key: value[index] for key, value in pieces.items()} for index in range(parts))
    return [part for part in found if _length(part)]


def _without_labels(batch: Batch) -> Batch:
    """The first sequence with all labels ignored."""
    first = {key: value[:1] for key, value in batch.items()}
    return {**first, "labels": torch.full_like(first["labels"], IGNORE_INDEX)}


def _checksum(tensor: Tensor) -> int:
    """The sum of the bits, not of the values, so that the smallest difference shows."""
    flat = tensor.detach().contiguous().flatten()
    return int(flat.view(INTEGERS[tensor.element_size()]).sum(dtype=torch.int64))
