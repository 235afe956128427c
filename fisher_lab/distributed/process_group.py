"""The process group of a run: joining and leaving it, each rank's part of the data, the traffic."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from fisher_lab.curvature.collectives import (
    Alone,
    Communicator,
    TorchCommunicator,
    slice_of_rank,
    world,
)
from fisher_lab.distributed import launch

if TYPE_CHECKING:
    from fisher_lab.config.schema import Config

_SOONER = 0.9


def make_errors_raise(environment: MutableMapping[str, str], *, watchdog: bool) -> None:
    """Asks nccl to raise an error where a collective is waited for, unless the user has said else.

    By default a watchdog thread of torch aborts the process (SIGABRT), and nobody learns which
    collective it was. A blocking wait does without the watchdog; collectives that are never waited
    for on the host, as those of ``fully_shard``, would then have no time-out at all.

    Args:
        environment: usually ``os.environ``; read by torch when the group is made.
        watchdog: leave the watchdog on.
    """
    known = ("TORCH_NCCL_BLOCKING_WAIT", "NCCL_BLOCKING_WAIT")
    if not watchdog and not any(name in environment for name in known):
        environment[known[0]] = "1"


@contextmanager
def session(
    backend: str, device: str = "auto", *, timeout_s: float = 600.0, watchdog: bool = False
) -> Iterator[TorchCommunicator]:
    """Joins the process group that the environment names (``RANK``, ``WORLD_SIZE``, ...).

    Args:
        backend: ``gloo``, ``nccl``, or ``auto``: nccl where the ranks compute on CUDA devices.
        device: ``cpu``, ``cuda`` or ``auto``; a rank on CUDA takes the device of its local rank.
        timeout_s: a collective that waits longer than this fails.
        watchdog: see :func:`make_errors_raise`.

    Yields:
        The communicator of all ranks.
    """
    cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    chosen = backend if backend != "auto" else "nccl" if cuda else "gloo"
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(local % torch.cuda.device_count())
    one_node = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    if chosen == "gloo" and one_node and sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # no name look-up, no network
    if "nccl" in chosen:
        make_errors_raise(os.environ, watchdog=watchdog)
    dist.init_process_group(chosen, timeout=timedelta(seconds=timeout_s))
    communicator = world() or TorchCommunicator()
    if "nccl" in chosen:
        # Before the watchdog's time, where there is one: the error names the collective.
        communicator.patience = timedelta(seconds=_SOONER * timeout_s)
    try:
        yield communicator
        # A rank that leaves while another is still talking aborts it.
        communicator.all_gather_objects(None)
    finally:
        dist.destroy_process_group()


COLLECTIVES = ("all_reduce", "all_gather", "exchange", "broadcast")
TOTALS = ("comm_s", "sent_bytes", "received_bytes")


class Ranks:
    """The ranks of a run as a task sees them; a single process is rank 0 of one.

    Args:
        communicator: of the ranks; None for a single process.
        reduces: whether K-FAC's numbers are those of all ranks (``kfac.reduce`` is not ``none``).

    Attributes:
        communicator: the same.
        world: of all ranks.
        reduced: of the ranks whose tokens K-FAC reduces: all of them, or this one alone.
    """

    def __init__(self, communicator: TorchCommunicator | None = None, reduces: bool = True) -> None:
        self.communicator = communicator
        self.world: Communicator = communicator or Alone()
        self.reduced: Communicator = self.world if reduces else Alone()

    @classmethod
    def of(cls, config: Config) -> Ranks:
        """Returns the ranks that this process is one of, for a validated configuration."""
        return cls(world() if launch.inside() else None, config.kfac.reduce != "none")

    def __len__(self) -> int:
        return self.world.size

    @property
    def is_rank_zero(self) -> bool:
        """Whether this process writes the run directory."""
        return self.world.rank == 0

    def own_batches(self, batches: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Returns this rank's sequences of every batch; batches without any are left out."""
        return [own for own in self.own_parts(batches) if own is not None]

    def own_parts(self, batches: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor] | None]:
        """Returns this rank's sequences of every batch, None for a batch without any."""
        found: list[dict[str, Tensor] | None] = []
        for batch in batches:
            rows = slice_of_rank(len(next(iter(batch.values()))), self.world.rank, self.world.size)
            own = {key: value[rows] for key, value in batch.items()}
            found.append(own if rows.start < rows.stop else None)
        return found

    def total(self, *values: float) -> tuple[float, ...]:
        """Returns sums over the ranks that K-FAC reduces; collective."""
        return tuple(map(sum, zip(*self.reduced.all_gather_objects(list(values)), strict=True)))

    def reset_traffic(self) -> None:
        """Sets the counters of bytes and seconds to zero."""
        if self.communicator is not None:
            self.communicator.reset()

    def traffic_metrics(self, prefix: str) -> dict[str, float]:
        """Returns the traffic since :meth:`reset_traffic` of the busiest rank; collective.

        There are no metrics for a single process.
        """
        if self.communicator is None:
            return {}
        own = _traffic(self.communicator)
        rows = self.communicator.all_gather_objects({key: own[key] for key in TOTALS})
        return _maxima(prefix, rows)

    def report(
        self, tokens: int, labels: int, peak_mb: float
    ) -> tuple[list[dict[str, Any]], dict[str, float]]:
        """Returns one row of ``ranks.csv`` per rank, and metrics; collective.

        Args:
            tokens: of this rank.
            labels: of this rank.
            peak_mb: growth of this rank's peak memory, MiB.
        """
        own: dict[str, Any] = {"tokens": tokens, "labels": labels, "peak_mb": peak_mb}
        if self.communicator is not None:
            own |= _traffic(self.communicator)
        rows = [{"rank": r, **row} for r, row in enumerate(self.world.all_gather_objects(own))]
        metrics: dict[str, float] = {"kfac/peak_mb": max(row["peak_mb"] for row in rows)}
        if self.communicator is not None:
            metrics |= {"dist/world_size": len(rows), **_maxima("dist", rows)}
        return rows, metrics


def _maxima(prefix: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {f"{prefix}/{key}_max": max(row[key] for row in rows) for key in TOTALS}


def _traffic(communicator: TorchCommunicator) -> dict[str, Any]:
    """Bytes and seconds so far: in all, and by collective."""
    totals = communicator.totals()
    row: dict[str, Any] = {
        "comm_s": totals.seconds,
        "sent_bytes": totals.sent,
        "received_bytes": totals.received,
    }
    for name in COLLECTIVES:
        entry = communicator.traffic.get(name)
        for key in ("calls", "sent", "received", "seconds"):
            row[f"{name}_{key}"] = 0 if entry is None else getattr(entry, key)
    return row
