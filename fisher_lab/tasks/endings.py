"""How each rank of a run ended: what it leaves for the others, and what they find out without it.

A rank that is killed leaves nothing. Another rank on its host sees that its process is gone; that,
and not the broken connection which it noticed first, is then the run's error.
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

GRACE_S = 5.0
"""A rank with such an error stays this long, so that the other one is seen to have ended first."""

_TOLD = ("type", "message", "traceback", "rank")


class Endings:
    """What one rank tells of its end, and learns of that of the others.

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
            "ranks": self.communicator.share(own),
        }

    def completed(self) -> None:
        """Tells the others that this rank is done; its process may go at any time."""
        _write_status(self.folder, self.rank, Status.COMPLETED)

    def failed(self, run: Run, error: Exception) -> None:
        """Ends the record of a rank that has an error; first of all with that error.

        Args:
            run: the rank's record.
            error: that ended it; another rank's takes its place where it followed from that.
        """
        run.fail_with(record.describe(error))  # looking for the cause takes seconds
        write_error(self.folder, self.rank, error)
        told = cause(self.folder, self.rank, error, _ranks_of(run))
        if told is not None:
            run.amend(told)
            self._stand_in(run, told)

    def stopped(self, run: Run, stop: Interrupted) -> None:
        """Ends the record of a rank that got a signal: its own, or because another one is gone.

        Args:
            run: the rank's record.
            stop: the signal.
        """
        told = cause(self.folder, self.rank, stop, _ranks_of(run))
        if told is None:
            run.end(stop.status, stop.signum.name)
        else:
            run.fail_with(told)
            self._stand_in(run, told)
        _write_status(self.folder, self.rank, stop.status)

    def _stand_in(self, run: Run, told: Mapping[str, Any]) -> None:
        """Writes the run's record where rank 0 no longer can: the first rank that is left does."""
        before = [entry for entry in _ranks_of(run) if entry["rank"] < self.rank]
        if not before or not all(_is_gone(self.folder, entry) for entry in before):
            return
        if record.status_of(self.directory) == Status.RUNNING:
            record.end_from_outside(self.directory, Status.FAILED, str(told["type"]), error=told)


def cause(
    folder: Path, rank: int, error: BaseException, known: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any] | None:
    """Returns another rank's error that this rank's error follows from, where there is one.

    Args:
        folder: where the ranks leave their errors.
        rank: this rank.
        error: of this rank; a consequence of another's, or a signal.
        known: the record's list of ranks; one whose process is gone without a word was killed.
    """
    follows = is_consequence(type(error).__name__, str(error))
    if not (follows or isinstance(error, Interrupted)):
        return None
    waiting = threading.Event()
    for _ in range(20):
        # Those that are gone first: what a rank has told was written before it went.
        gone = [one for one in known if one["rank"] != rank and _is_gone(folder, one)]
        for found in read_errors(folder):
            if found["rank"] != rank and not is_consequence(found["type"], found["message"]):
                return {key: found[key] for key in _TOLD}
        if gone:
            return _killed(gone[0])
        if isinstance(error, Interrupted):
            return None
        waiting.wait(GRACE_S / 40)
    return None


def is_consequence(kind: str, message: str) -> bool:
    """Says whether an error is one that a rank has because another one has failed."""
    known = kind.rpartition(".")[2] in CONSEQUENCES
    return known or any(word in message for word in ("gloo", "NCCL", "TCPStore"))


def clear(folder: Path) -> None:
    """Makes the folder, and removes what the ranks of an earlier start have told."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind in ("error", "status"):
        for old in folder.glob(f"rank*.{kind}.json"):
            old.unlink()


def read_errors(folder: Path) -> list[dict[str, Any]]:
    """Returns the errors that ranks have left, the first one first."""
    found = [json.loads(file.read_text("utf-8")) for file in folder.glob("rank*.error.json")]
    return sorted(found, key=lambda e: (e["time"], e["rank"]))


def write_error(folder: Path, rank: int, error: BaseException) -> None:
    """Leaves a rank's error where the watcher and the other ranks find it."""
    told = {**record.describe(error), "rank": rank, "time": datetime.now(UTC).isoformat()}
    atomic.write_json(_error_file(folder, rank), told)


def has_told_error(folder: Path, rank: int) -> bool:
    """Says whether a rank has left its error."""
    return _error_file(folder, rank).exists()


def _error_file(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.error.json"


def _status_file(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.status.json"


def _write_status(folder: Path, rank: int, status: str) -> None:
    atomic.write_json(_status_file(folder, rank), {"rank": rank, "status": status})


def _ranks_of(run: Run) -> list[dict[str, Any]]:
    return run.record["provenance"].get("distributed", {}).get("ranks", [])


def _is_gone(folder: Path, entry: Mapping[str, Any]) -> bool:
    """Whether a rank of this host has no process any more and has not said why.

    Of other hosts nothing is known here: the watcher of their node tells.
    """
    if entry["host"] != socket.gethostname():
        return False
    try:
        alive = psutil.Process(entry["pid"]).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        alive = False
    rank = entry["rank"]
    return not (alive or _status_file(folder, rank).exists() or _error_file(folder, rank).exists())


def _killed(entry: Mapping[str, Any]) -> dict[str, Any]:
    message = (
        f"rank {entry['rank']} (process {entry['pid']}) is gone without a word: it was killed, or "
        "crashed"
    )
    return {"type": "RankKilled", "message": message, "traceback": "", "rank": entry["rank"]}
