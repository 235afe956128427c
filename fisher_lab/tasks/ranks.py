"""One run on several ranks: starting them, what each of them does, and the verdict on all.

``distributed.nproc=2`` makes the process that Hydra has called the watcher: it starts the ranks
(``python -m fisher_lab.tasks.ranks``), waits, and where one of them failed writes its error into
the record. Under ``torchrun`` every process is a rank from the start. Only rank 0 writes the run
directory, but for what is in ``ranks/``: a log of each other rank, and the error of any.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import logging.config
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from fisher_lab.distributed import launch
from fisher_lab.runs import atomic, provenance, record
from fisher_lab.runs.leaving import leave
from fisher_lab.runs.record import Run
from fisher_lab.runs.signals import STATUS, Interrupted

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from fisher_lab.config.schema import Config
    from fisher_lab.distributed.communicator import TorchCommunicator
    from fisher_lab.tasks.job import Work

log = logging.getLogger(__name__)

MODULE = "fisher_lab.tasks.ranks"
FOLDER = "ranks"
WORK_FILE = "work.json"

CONSEQUENCES = ("CommunicationError", "RankError", "DistBackendError", "DistNetworkError")
"""Errors that a rank has because another one has failed; that one's error is the run's."""

GRACE_S = 5.0
"""A rank with such an error stays this long, so that the other one is seen to have ended first."""


def wanted(config: Config) -> bool:
    """Says whether this process has to start ranks (``task=plan`` computes nothing to share)."""
    several = config.distributed.nproc * config.distributed.nodes > 1
    return several and config.task.name != "plan" and not launch.inside()


# ---- the watcher ---------------------------------------------------------------------------------


def start(work: Work, logging_config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Starts the ranks of a run and waits for them.

    Args:
        work: what is to be done.
        logging_config: Hydra's, resolved; rank 0 logs as this process does.

    Returns:
        The error that ended the run, as in ``run.json``; None where it is complete.

    Raises:
        Interrupted: this process got a signal, and handed it on.
        launch.LaunchError: the environment does not say which node this is.
    """
    d = work.config.distributed
    where = launch.place(d.nproc, d.nodes, os.environ)
    folder = work.directory / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("rank*.error.json"):
        old.unlink()
    path = folder / WORK_FILE
    atomic.write_json(path, {**work.plain(), "logging": logging_config})
    log.info("starting %d ranks on this node (%d of %d)", d.nproc, where.node + 1, d.nodes)
    try:
        launch.start(MODULE, [str(path)], where)
    except launch.Stopped as stop:
        _end(work, STATUS.get(signal.Signals(stop.signum), "cancelled"), stop)
        raise Interrupted(stop.signum) from None
    except launch.RanksFailed as failed:
        signum = stopped_by(failed)
        if signum is not None:
            # Whatever rank 0 has made of being stopped because another rank had ended.
            _reopened(work).end(STATUS[signum], signum.name)
            raise Interrupted(signum) from None
        error = verdict(folder, failed)
        if where.node == 0:
            _fail(work, error)
        return error
    return None


def verdict(folder: Path, failed: launch.RanksFailed) -> dict[str, Any]:
    """Finds the error that the others followed from.

    The first error that is no consequence of another one; else a rank that was killed. (Those
    that were only asked to end, SIGTERM, are the ranks that were stopped for another's error.)

    Args:
        folder: with the ranks' ``rank<r>.error.json``.
        failed: who ended first.
    """
    errors = [json.loads(file.read_text("utf-8")) for file in folder.glob("rank*.error.json")]
    errors.sort(key=lambda e: (e["time"], e["rank"]))
    first = [e for e in errors if not _is_consequence(e["type"], e["message"])]
    killed = [f for f in failed.failures if f.exitcode < 0 and f.exitcode != -signal.SIGTERM]
    if first or (errors and not killed):
        chosen = (first or errors)[0]
        return {key: chosen[key] for key in ("type", "message", "traceback", "rank")}
    ended = (killed or failed.failures)[0]
    kind = "RankKilled" if ended.exitcode < 0 else "RankFailed"
    return {"type": kind, "message": ended.text, "traceback": "", "rank": ended.rank}


def stopped_by(failed: launch.RanksFailed) -> signal.Signals | None:
    """Finds the signal that the ranks have agreed to end for, whichever of them it had reached.

    Args:
        failed: who ended first.
    """
    codes = {failure.exitcode for failure in failed.failures} - {-signal.SIGTERM}
    return next((signum for signum in STATUS if codes == {128 + signum}), None)


def _is_consequence(kind: str, message: str) -> bool:
    known = kind.rpartition(".")[2] in CONSEQUENCES
    return known or any(word in message for word in ("gloo", "NCCL", "TCPStore"))


def _fail(work: Work, error: Mapping[str, Any]) -> None:
    """The record says what ended the run, whatever rank 0 still made of it."""
    _reopened(work).fail_with(error)


def _end(work: Work, status: str, stop: launch.Stopped) -> None:
    """Ends a record that rank 0 had no time to end."""
    run = _reopened(work, keep=True)
    if run.status == "running":
        run.end(status, str(stop))


def _reopened(work: Work, *, keep: bool = False) -> Run:
    try:
        found = record.read(work.directory)
    except (OSError, ValueError):
        return Run.start(
            work.directory,
            config=dataclasses.asdict(work.config),
            overrides=work.overrides,
            provenance=provenance.collect(),
        )
    return Run(work.directory, found) if keep else Run.reopen(work.directory)


# ---- a rank --------------------------------------------------------------------------------------


@contextmanager
def joined(config: Config) -> Iterator[TorchCommunicator]:
    """This process as a rank: in the process group, with its share of the processors."""
    from fisher_lab.distributed.session import session

    d = config.distributed
    _share_processors(config)
    with session(d.backend, config.device, timeout_s=d.timeout_s) as communicator:
        yield communicator


@contextmanager
def under_torchrun(config: Config, cfg: DictConfig, claim: Callable[[], Path]) -> Iterator[None]:
    """Makes of a process that ``torchrun`` has started a rank of one run; else only claims.

    Rank 0 claims the run directory and tells the others; these write their own log and nothing
    of Hydra's.

    Args:
        config: the validated configuration.
        cfg: the composed one; Hydra's node in it is changed.
        claim: makes the run directory and returns it.
    """
    if not launch.inside():
        claim()
        yield
        return
    with joined(config) as communicator:
        rank = communicator.rank
        directory = communicator.share(str(claim()) if rank == 0 else None)[0]
        folder = Path(directory) / FOLDER
        if rank == 0:
            folder.mkdir(exist_ok=True)
            for old in folder.glob("rank*.error.json"):
                old.unlink()
        communicator.share(None)
        if rank > 0:
            cfg.hydra.run.dir, cfg.hydra.output_subdir = directory, None
            given: Any = OmegaConf.to_container(cfg.hydra.job_logging, resolve=False)
            cfg.hydra.job_logging = log_config(given, folder, rank)
        yield


def current() -> TorchCommunicator | None:
    """Returns the communicator of the ranks that this process is one of, if it is one."""
    if not launch.inside():
        return None
    from fisher_lab.distributed.communicator import world

    return world()


def _share_processors(config: Config) -> None:
    """Ranks of one node that all take all processors would wait for each other."""
    import torch

    if config.threads is None and "OMP_NUM_THREADS" not in os.environ:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
        torch.set_num_threads(max(1, (allowed or os.cpu_count() or 1) // here))


def about(communicator: TorchCommunicator) -> dict[str, Any]:
    """Returns what the record says of the ranks; collective."""
    import torch.distributed as dist

    own: dict[str, Any] = {
        "rank": communicator.rank,
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }
    own["device"] = str(communicator.device)
    return {
        "world_size": communicator.size,
        "backend": dist.get_backend(),
        "ranks": communicator.share(own),
    }


def cause(folder: Path, rank: int, error: BaseException) -> dict[str, Any] | None:
    """Returns another rank's error that this rank's error follows from, where there is one.

    Args:
        folder: where the ranks leave their errors.
        rank: this rank.
        error: of this rank; a consequence of another's, or a signal.
    """
    follows = _is_consequence(type(error).__name__, str(error))
    if not (follows or isinstance(error, Interrupted)):
        return None
    waiting = threading.Event()
    for _ in range(20):
        for file in sorted(folder.glob("rank*.error.json")):
            found = json.loads(file.read_text("utf-8"))
            if found["rank"] != rank and not _is_consequence(found["type"], found["message"]):
                return {key: found[key] for key in ("type", "message", "traceback", "rank")}
        if isinstance(error, Interrupted):
            return None
        waiting.wait(GRACE_S / 40)
    return None


def write_error(folder: Path, rank: int, error: BaseException) -> None:
    """Leaves a rank's error where the watcher (or rank 0) finds it."""
    from datetime import UTC, datetime

    told = {**record.describe(error), "rank": rank, "time": datetime.now(UTC).isoformat()}
    atomic.write_json(folder / f"rank{rank}.error.json", told)


def main(path: str) -> int:
    """A rank that :func:`start` has started.

    Args:
        path: of the file that says what is to be done.

    Returns:
        The exit code.
    """
    launch.end_with_parent()
    rank = int(os.environ["RANK"])
    folder = Path(path).parent
    given = json.loads(Path(path).read_text("utf-8"))
    if rank > 0:
        _redirect(folder / f"rank{rank}.log")
    logging.config.dictConfig(log_config(given["logging"], folder, rank))
    from fisher_lab.tasks.job import Work, perform

    try:
        work = Work.of(given)
        with joined(work.config) as communicator:
            outcome = perform(work, communicator)
            if outcome.error is not None:
                raise outcome.error
    except Interrupted as stop:
        return 128 + stop.signum
    except Exception as error:
        write_error(folder, rank, error)
        if rank > 0:
            log.exception("rank %d failed", rank)
        if _is_consequence(type(error).__name__, str(error)):
            threading.Event().wait(GRACE_S)
        return 1
    return 0


def _redirect(path: Path) -> None:
    """Standard output and error of ranks other than 0, native code's included, go to their log."""
    stream = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for target in (1, 2):
        os.dup2(stream, target)
    os.close(stream)


def log_config(given: Mapping[str, Any], folder: Path, rank: int) -> dict[str, Any]:
    """Returns the logging configuration of a rank: rank 0 as given, the others one file each."""
    if rank == 0:
        return dict(given)
    formatters = dict(given.get("formatters", {}))
    handler = {"class": "logging.FileHandler", "filename": str(folder / f"rank{rank}.log")}
    if formatters:
        handler["formatter"] = next(iter(formatters))
    return {
        "version": 1,
        "formatters": formatters,
        "handlers": {"file": {**handler, "encoding": "utf-8"}},
        "root": {"level": "INFO", "handlers": ["file"]},
        "disable_existing_loggers": False,
    }


if __name__ == "__main__":
    leave(main(sys.argv[1]))
