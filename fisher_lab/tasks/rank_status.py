"""How each rank of a run ended: what it writes into ``ranks/``, and what it finds there.

A launcher says of a rank that was killed that it was. Under ``torchrun`` there is no launcher of
ours: there the other ranks find out, from the files in ``ranks/`` and from the processes of their
host, before ``torchrun`` stops them. (Torch elastic's own error files lack the module of an error's
type, and only the agent knows where they lie.)
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from fisher_lab.runs import atomic, record
from fisher_lab.runs.signals import Interrupted
from fisher_lab.runs.status import Status

if TYPE_CHECKING:
    from fisher_lab.curvature.collectives import TorchCommunicator
    from fisher_lab.runs.record import Run

FOLDER = "ranks"

CONSEQUENCES = ("CommunicationError", "RankError", "DistBackendError", "DistNetworkError")
"""Errors that a rank has because another one has failed; that one's error is the run's."""

_IN_MESSAGES = ("gloo", "NCCL", "TCPStore", "SIGABRT")

GRACE_S = 5.0
"""A rank with such an error stays this long, so that the other one is seen to have ended first."""


class RankStatus:
    """One rank's part of the record of how the ranks ended.

    Args:
        communicator: of the ranks.
        directory: the run directory, of which ranks other than 0 write ``ranks/`` alone.
    """

    def __init__(self, communicator: TorchCommunicator, directory: Path) -> None:
        self.communicator = communicator
        self.directory = directory
        self.folder = directory / FOLDER
        self.rank = communicator.rank

    def about(self) -> dict[str, Any]:
        """Returns what the record says of the ranks; collective."""
        import torch.distributed as dist

        own: dict[str, Any] = {
            "rank": self.rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "device": str(self.communicator.device),
        }
        return {
            "world_size": self.communicator.size,
            "backend": dist.get_backend(),
            "ranks": self.communicator.all_gather_objects(own),
        }

    def completed(self) -> None:
        """Records that this rank has done its work; its process may go at any time."""
        self._write(Status.COMPLETED)

    def failed(self, run: Run, error: Exception) -> None:
        """Ends the record of a rank that has an error; first of all with that error.

        Args:
            run: the rank's record.
            error: that ended it; the error of another rank from which it followed replaces it.
        """
        run.fail_with(record.describe(error))  # looking for the cause takes seconds
        write_error(self.folder, self.rank, error)
        found = cause(self.folder, self.rank, error, _ranks_of(run))
        if found is not None:
            run.amend(found)
            self._write_for_rank_zero(run, found)

    def stopped(self, run: Run, stop: Interrupted) -> None:
        """Ends the record of a rank that got a signal: its own, or because another rank is gone.

        Args:
            run: the rank's record.
            stop: the signal.
        """
        found = cause(self.folder, self.rank, stop, _ranks_of(run))
        if found is None:
            run.end(stop.status, stop.signum.name)
        else:
            run.fail_with(found)
            self._write_for_rank_zero(run, found)
        self._write(stop.status)

    def _write(self, status: Status) -> None:
        atomic.write_json(
            _file(self.folder, self.rank, "status"), {"rank": self.rank, "status": status}
        )

    def _write_for_rank_zero(self, run: Run, error: Mapping[str, Any]) -> None:
        """Ends the run's record where rank 0 no longer can: the first rank that is left does."""
        before = [entry for entry in _ranks_of(run) if entry["rank"] < self.rank]
        if not before or not all(_is_gone(self.folder, entry) for entry in before):
            return
        if record.status_of(self.directory) == Status.RUNNING:
            record.end_from_outside(self.directory, Status.FAILED, str(error["type"]), error=error)


def cause(
    folder: Path, rank: int, error: BaseException, known: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any] | None:
    """Returns another rank's error from which this rank's error follows, where there is one.

    Args:
        folder: where the ranks leave their errors.
        rank: this rank.
        error: of this rank: one that follows from another rank's, or a signal.
        known: the record's list of ranks; one whose process is gone without a word was killed.
    """
    interrupted = isinstance(error, Interrupted)
    if not (interrupted or is_consequence(type(error).__name__, str(error))):
        return None
    waiting = threading.Event()
    for _ in range(20):
        # Those that are gone first: what a rank has written was written before it went.
        gone = [one for one in known if one["rank"] != rank and _is_gone(folder, one)]
        for found in read_errors(folder):
            if found["rank"] != rank and not is_consequence(found["type"], found["message"]):
                return without_time(found)
        if gone:
            return _killed(gone[0])
        if interrupted:
            return None
        waiting.wait(GRACE_S / 40)
    return None


def is_consequence(kind: str, message: str) -> bool:
    """Says whether an error is one that a rank has because another one has failed."""
    known = kind.rpartition(".")[2] in CONSEQUENCES
    return known or any(word in message for word in _IN_MESSAGES)


def clear(folder: Path) -> None:
    """Makes the folder, and removes what the ranks of an earlier start have written."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind in ("error", "status"):
        for old in folder.glob(f"rank*.{kind}.json"):
            old.unlink()


def read_errors(folder: Path) -> list[dict[str, Any]]:
    """Returns the errors that ranks have left, the first one first."""
    found = [json.loads(file.read_text("utf-8")) for file in folder.glob("rank*.error.json")]
    return sorted(found, key=lambda e: (e["time"], e["rank"]))


def write_error(folder: Path, rank: int, error: BaseException) -> None:
    """Leaves a rank's error where its launcher and the other ranks find it."""
    about = {**record.describe(error), "rank": rank, "time": datetime.now(UTC).isoformat()}
    atomic.write_json(_file(folder, rank, "error"), about)


def has_written_error(folder: Path, rank: int) -> bool:
    """Says whether a rank has left its error."""
    return _file(folder, rank, "error").exists()


def without_time(error: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an error that a rank has left, as it stands in ``run.json``."""
    return {key: error[key] for key in ("type", "message", "traceback", "rank")}


def _file(folder: Path, rank: int, kind: str) -> Path:
    return folder / f"rank{rank}.{kind}.json"


def _ranks_of(run: Run) -> list[dict[str, Any]]:
    return run.record["provenance"].get("distributed", {}).get("ranks", [])


def _is_gone(folder: Path, entry: Mapping[str, Any]) -> bool:
    """Whether a rank of this host has no process any more and has not said why.

    Nothing is known here of other hosts.
    """
    if entry["host"] != socket.gethostname():
        return False
    try:
        alive = psutil.Process(entry["pid"]).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        alive = False
    kinds = ("status", "error")
    return not (alive or any(_file(folder, entry["rank"], kind).exists() for kind in kinds))


def _killed(entry: Mapping[str, Any]) -> dict[str, Any]:
    message = (
        f"rank {entry['rank']} (process {entry['pid']}) is gone without a word: it was killed, or "
        "crashed"
    )
    return {"type": "RankKilled", "message": message, "traceback": "", "rank": entry["rank"]}
