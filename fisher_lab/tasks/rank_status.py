"""How each rank of a run ended: what it writes into ``ranks/``, and what it finds there.

A launcher says of a rank that was killed that it was. Under ``torchrun`` there is no launcher of
ours: there the other ranks find out, from the files in ``ranks/`` and from the processes of their
host, before ``torchrun`` stops them. (Torch elastic's own error files lack the module of an error's
type, and only the agent knows where they lie.)
"""

from __future__ import annotations

import json
import os
import signal
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

KILLED = "RankKilled"
"""The error of a run of which a rank is gone without a word."""

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

        device = str(self.communicator.device)
        own = {"rank": self.rank, "host": socket.gethostname(), "pid": os.getpid()}
        ranks = self.communicator.all_gather_objects({**own, "device": device})
        return {
            "world_size": self.communicator.size,
            "backend": dist.get_backend(),
            "ranks": ranks,
        }

    def completed(self) -> None:
        """Records that this rank has done its work; its process may go at any time."""
        self._write(Status.COMPLETED)

    def failed(self, run: Run, error: Exception) -> None:
        """Ends the record of a rank with its error, or with that of another rank that led to it."""
        run.fail(error)  # first of all: looking for the cause takes seconds
        write_error(self.folder, self.rank, error)
        found = cause(self.folder, self.rank, error, _ranks_of(run))
        if found is not None:
            run.amend(found)
            self._write_for_rank_zero(run, found)

    def stopped(self, run: Run, stop: Interrupted) -> None:
        """Ends the record of a rank that got a signal: its own, or because another rank is gone."""
        found = cause(self.folder, self.rank, stop, _ranks_of(run))
        if found is None:
            run.end(stop.status, stop.signum.name)
        else:
            run.fail_with(found)
            self._write_for_rank_zero(run, found)
        self._write(stop.status)

    def _write(self, status: Status) -> None:
        about = {"rank": self.rank, "status": status}
        atomic.write_json(_file(self.folder, self.rank, "status"), about)

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
    """Returns another rank's error from which the error of ``rank`` (or a signal) follows, if any.

    Args:
        folder: where the ranks leave their errors.
        rank: this rank.
        error: of this rank.
        known: the record's list of ranks; one whose process is gone without a word was killed.
    """
    interrupted = isinstance(error, Interrupted)
    if interrupted and error.signum != signal.SIGTERM:  # what stops ranks for another one's error
        return None
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
            message = (
                f"rank {gone[0]['rank']} (process {gone[0]['pid']}) is gone without a word: it was "
                "killed, or crashed"
            )
            about = {"type": KILLED, "message": message, "traceback": ""}
            return {**about, "rank": gone[0]["rank"]}
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
    """Leaves the first error of a rank where its launcher and the other ranks find it."""
    path = _file(folder, rank, "error")
    if not path.exists():
        about = {**record.describe(error), "rank": rank, "time": datetime.now(UTC).isoformat()}
        atomic.write_json(path, about)


def without_time(error: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an error that a rank has left, as it stands in ``run.json``."""
    return {key: error[key] for key in ("type", "message", "traceback", "rank")}


def _file(folder: Path, rank: int, kind: str) -> Path:
    return folder / f"rank{rank}.{kind}.json"


def _ranks_of(run: Run) -> list[dict[str, Any]]:
    return run.record["provenance"].get("distributed", {}).get("ranks", [])


def _is_gone(folder: Path, entry: Mapping[str, Any]) -> bool:
    """Whether a rank of this host (of others nothing is known) is gone and has not said why."""
    if entry["host"] != socket.gethostname():
        return False
    try:
        alive = psutil.Process(entry["pid"]).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        alive = False
    left = (_file(folder, entry["rank"], kind) for kind in ("status", "error"))
    return not (alive or any(file.exists() for file in left))
