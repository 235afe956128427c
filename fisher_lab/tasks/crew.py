"""The ranks of one run as the crew of a training: DDP or FSDP2, one joined batch, one decision."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fisher_lab.config.errors import ConfigError
from fisher_lab.config.schema import Config
from fisher_lab.config.workload import CURVATURE_OPTIMIZERS
from fisher_lab.curvature import wrappers
from fisher_lab.curvature.collectives import TorchCommunicator, slice_of_rank, slice_sizes, together
from fisher_lab.curvature.errors import CurvatureError
from fisher_lab.curvature.losses import IGNORE_INDEX
from fisher_lab.tasks import ranks
from fisher_lab.workload import snapshot
from fisher_lab.workload.data_parallel import ALONE, Crew, cut
from fisher_lab.workload.objectives import Batch

_DDP = nn.parallel.DistributedDataParallel
# Renamed in torch 2.13.
_NEW = "forward_sync_buffers" in inspect.signature(_DDP).parameters
_BUFFERS = "forward_sync_buffers" if _NEW else "broadcast_buffers"
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def of(config: Config) -> Crew:
    """Returns the crew of this process: its ranks, or itself alone."""
    communicator = ranks.current()
    if communicator is None:
        return ALONE
    # What we build ourselves uses all that it has.
    unused = config.model.type == "pretrained"
    return RankCrew(communicator, config.distributed.wrapper, unused=unused)


def origin(crew: Crew, about: dict[str, Any]) -> dict[str, Any]:
    """Returns what a training starts from: exact resume needs the same ranks again."""
    if not isinstance(crew, RankCrew):
        return about
    return {**about, "ranks": crew.size, "wrapper": "fsdp" if crew.sharded else "ddp"}


def check(config: Config, crew: Crew, batch_size: int) -> None:
    """Refuses what ranks cannot do, before anything is trained.

    Args:
        config: the validated configuration.
        crew: who is to train.
        batch_size: sequences a step, of all ranks.

    Raises:
        ConfigError: see there.
    """
    if crew.size == 1 or config.distributed.wrapper != "fsdp":
        return
    if config.optimizer.name == "muon":
        raise ConfigError.value(
            "optimizer.name",
            "muon",
            "another one with distributed.wrapper=fsdp, where its steps are not those of whole "
            "matrices",
        )
    if config.optimizer.name in CURVATURE_OPTIMIZERS and batch_size < crew.size:
        raise ConfigError.value(
            "train.batch_size",
            batch_size,
            f"at least {crew.size}, the ranks, with distributed.wrapper=fsdp and a curvature "
            "optimiser",
        )


class RankCrew(Crew):
    """Ranks of one process group that train one model.

    Each takes its share of the sequences of every batch, and as many micro-batches as the others:
    one without sequences goes through the first one of the batch with no label in it, a loss of
    zero.

    Args:
        communicator: of the ranks.
        wrapper: ``ddp`` (every rank has the whole model) or ``fsdp`` (each has shards of it).
        unused: whether the model may have parameters that get no gradient (``ddp`` has to know).

    Attributes:
        tokens: that this rank has trained on in this attempt.
        labels: the same, those that count.
    """

    def __init__(
        self, communicator: TorchCommunicator, wrapper: str = "ddp", *, unused: bool = False
    ) -> None:
        self.communicator, self.unused = communicator, unused
        self.rank, self.size = communicator.rank, communicator.size
        self.sharded = wrapper == "fsdp"
        self.tokens, self.labels = 0, 0

    # ---- the model ---------------------------------------------------------------------------

    def adopt(self, model: nn.Module) -> None:
        """See :class:`Crew`: the same weights everywhere, then shards where asked for."""
        self._compare(model)
        if self.sharded:
            from torch.distributed.device_mesh import DeviceMesh

            kind = next(model.parameters()).device.type
            wrappers.shard(model, DeviceMesh.from_group(self.communicator.group, kind))

    def called(self, model: nn.Module) -> nn.Module:
        """See :class:`Crew`: the model in DDP, or itself under ``fully_shard``."""
        if self.sharded:
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

    def check(self, model: nn.Module) -> None:
        """See :class:`Crew`; under ``fully_shard`` there is one copy only."""
        if not self.sharded:
            self._compare(model)

    def _compare(self, model: nn.Module) -> None:
        sums = {name: _checksum(parameter) for name, parameter in model.named_parameters()}
        for rank, told in enumerate(self.communicator.all_gather_objects(sums)):
            unlike = next((name for name in sums if told.get(name) != sums[name]), None)
            if unlike is not None:
                raise CurvatureError(
                    f"weights: {unlike} of rank {rank} is not that of rank {self.rank}; allowed: "
                    "the same to the last bit on all ranks"
                )

    def settle(self, model: nn.Module) -> None:
        """See :class:`Crew`."""
        if self.sharded:
            wrappers.at_rest(model)

    # ---- data --------------------------------------------------------------------------------

    def parts(self, batch: Batch, count: int) -> Sequence[Batch]:
        """See :class:`Crew`."""
        length = len(next(iter(batch.values())))
        count = max(1, min(count, slice_sizes(length, self.size)[0]))
        rows = slice_of_rank(length, self.rank, self.size)
        own = {key: value[rows] for key, value in batch.items()}
        found = list(cut(own, count)) if rows.start < rows.stop else []
        return [*found, *([self._nothing(batch)] * (count - len(found)))]

    def own(self, batches: Iterable[Batch]) -> list[Batch]:
        """See :class:`Crew`: nothing of a batch without a sequence for this rank.

        Under ``fully_shard`` the forward pass is collective: one without labels takes its place.
        """
        found = []
        for batch in batches:
            rows = slice_of_rank(len(next(iter(batch.values()))), self.rank, self.size)
            if rows.start < rows.stop:
                found.append({key: value[rows] for key, value in batch.items()})
            elif self.sharded:
                found.append(self._nothing(batch))
        return found

    def saw(self, batch: Batch, labels: int) -> None:
        """See :class:`Crew`."""
        first = next(iter(batch.values()))
        self.tokens += first[slice_of_rank(len(first), self.rank, self.size)].numel()
        self.labels += labels

    @staticmethod
    def _nothing(batch: Batch) -> Batch:
        first = {key: value[:1] for key, value in batch.items()}
        return {**first, "labels": torch.full_like(first["labels"], IGNORE_INDEX)}

    def syncing(self, called: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """See :class:`Crew`."""
        if self.sharded:
            called.set_requires_gradient_sync(last)  # type: ignore[operator]
            return nullcontext()
        return nullcontext() if last else called.no_sync()  # type: ignore[operator]

    # ---- numbers -----------------------------------------------------------------------------

    def total(self, *values: float) -> tuple[float, ...]:
        """See :class:`Crew`; added up in the order of the ranks, so the same everywhere."""
        return tuple(map(sum, zip(*self._rows(values), strict=True)))

    def clip(self, parameters: Iterable[nn.Parameter], limit: float) -> float:
        """See :class:`Crew`."""
        norm = nn.utils.clip_grad_norm_(parameters, limit)
        return float(wrappers.whole({"norm": norm})["norm"])

    def agree(self, signum: int, due: bool) -> tuple[int, bool]:
        """See :class:`Crew`."""
        rows = self._rows((signum, due))
        came = next((int(row[0]) for row in rows if row[0]), 0)
        return came, bool(rows[0][1])

    def _rows(self, values: Sequence[float]) -> list[list[float]]:
        mine = torch.tensor([values], dtype=torch.float64)
        return self.communicator.all_gather(mine, [1] * self.size).tolist()

    def problem(self, text: str | None) -> str | None:
        """See :class:`Crew`."""
        return next((t for t in self.communicator.all_gather_objects(text) if t is not None), None)

    # ---- state -------------------------------------------------------------------------------

    def lead(self, function: Callable[[], Any]) -> Any:
        """See :class:`Crew`; an error of rank 0 is one of all."""
        found: list[bytes] = []

        def step() -> None:
            if self.rank == 0:
                found.append(snapshot.to_bytes(function()))

        together(self.communicator, step)
        sizes = self.communicator.all_gather_objects(len(found[0]) if found else 0)
        data = _tensor(found[0]) if found else torch.empty(sizes[0], dtype=torch.uint8)
        return snapshot.from_bytes(self.communicator.broadcast(data, 0).numpy().tobytes())

    def every(self, state: Any) -> list[Any]:
        """See :class:`Crew`."""
        data = _tensor(snapshot.to_bytes(state))
        sizes = self.communicator.all_gather_objects(len(data))
        pieces = self.communicator.all_gather(data, sizes).split(sizes)
        return [snapshot.from_bytes(piece.numpy().tobytes()) for piece in pieces]

    def whole(self, state: Any) -> Any:
        """See :class:`Crew`."""
        return wrappers.gathered(state, self.rank == 0) if self.sharded else state

    def weights(self, model: nn.Module) -> dict[str, Tensor] | None:
        """See :class:`Crew`."""
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

    def fill(self, tensor: Tensor, value: Tensor) -> None:
        """See :class:`Crew`."""
        tensor.copy_(wrappers.like(value, tensor))

    def held(self, state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """See :class:`Crew`."""
        return wrappers.scattered(state, list(_parameters(optimizer))) if self.sharded else state


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _checksum(tensor: Tensor) -> int:
    """Of the bits, not of the values: no difference is small."""
    flat = tensor.detach().contiguous().flatten()
    return int(flat.view(INTEGERS[tensor.element_size()]).sum(dtype=torch.int64))
