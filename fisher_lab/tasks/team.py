"""The ranks of a run as a task sees them: who takes which sequences, and what is told of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fisher_lab.curvature.collectives import Alone, share

if TYPE_CHECKING:
    from fisher_lab.config.schema import Config
    from fisher_lab.curvature.collectives import Communicator, TorchCommunicator

COLLECTIVES = ("all_reduce", "all_gather", "exchange", "broadcast")
TOTALS = ("comm_s", "sent_bytes", "received_bytes")


class Team:
    """The ranks that work on one run; one process alone is a team of one.

    Args:
        communicator: of the ranks; None for one process.
        joins: whether numbers are those of all ranks together (``kfac.reduce`` is not ``none``).
    """

    def __init__(self, communicator: TorchCommunicator | None = None, joins: bool = True) -> None:
        self.ranks = communicator
        self.everyone: Communicator = communicator or Alone()
        self.joined: Communicator = self.everyone if joins else Alone()

    @classmethod
    def of(cls, config: Config) -> Team:
        """The team of this process."""
        from fisher_lab.tasks import ranks

        return cls(ranks.current(), config.kfac.reduce != "none")

    def share(self, batches: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Returns this rank's sequences of every batch; batches without any are left out."""
        return [own for own in self.shares(batches) if own is not None]

    def shares(self, batches: Sequence[Mapping[str, Tensor]]) -> list[dict[str, Tensor] | None]:
        """Returns this rank's sequences of every batch, None where it has none of it."""
        found: list[dict[str, Tensor] | None] = []
        for batch in batches:
            rows = share(len(next(iter(batch.values()))), self.everyone.rank, self.everyone.size)
            own = {key: value[rows] for key, value in batch.items()}
            found.append(own if rows.start < rows.stop else None)
        return found

    def __len__(self) -> int:
        return self.everyone.size

    @property
    def leads(self) -> bool:
        """Whether this process writes the run directory."""
        return self.everyone.rank == 0

    def total(self, *values: float) -> tuple[float, ...]:
        """Returns sums over the ranks whose tokens are joined."""
        return tuple(map(sum, zip(*self.joined.share(list(values)), strict=True)))

    def reset(self) -> None:
        """Begins to count what is moved."""
        if self.ranks is not None:
            self.ranks.reset()

    def moved(self, prefix: str) -> dict[str, float]:
        """Returns what was moved since :meth:`reset`, of the rank that moved most; collective.

        Args:
            prefix: of the metrics' names; there are none for one process.
        """
        if self.ranks is None:
            return {}
        rows = self.ranks.share({key: _traffic(self.ranks)[key] for key in TOTALS})
        return {f"{prefix}/{key}_max": max(row[key] for row in rows) for key in TOTALS}

    def report(
        self, tokens: int, labels: int, peak_mb: float
    ) -> tuple[list[dict[str, Any]], dict[str, float]]:
        """Returns a row of ``ranks.csv`` for each rank, and metrics; collective.

        Args:
            tokens: of this rank.
            labels: of this rank.
            peak_mb: growth of this rank's peak memory, MiB.
        """
        own: dict[str, Any] = {"tokens": tokens, "labels": labels, "peak_mb": peak_mb}
        if self.ranks is not None:
            own |= _traffic(self.ranks)
        rows = [{"rank": r, **row} for r, row in enumerate(self.everyone.share(own))]
        metrics: dict[str, float] = {"kfac/peak_mb": max(row["peak_mb"] for row in rows)}
        if self.ranks is not None:
            metrics["dist/world_size"] = len(rows)
            for key in TOTALS:
                metrics[f"dist/{key}_max"] = max(row[key] for row in rows)
        return rows, metrics


def _traffic(communicator: TorchCommunicator) -> dict[str, Any]:
    """Bytes and seconds so far, in all and by collective."""
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
