"""One run on several ranks: starting them, what each of them does, and the verdict on all.

``distributed.nproc=2`` makes the process that Hydra has called the watcher: it starts the ranks
(``python -m fisher_lab.tasks.rank_main``), waits, and where one of them failed writes its error
into the record. On several nodes each has a watcher; that of node 0 alone writes, and the others
tell it how their ranks ended. Under ``torchrun`` every process is a rank from the start. Only rank
0 writes the run directory, but for what is in ``ranks/``: a log of each other rank and node, and
how each rank ended.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from fisher_lab.distributed import launch, nodes
from fisher_lab.runs import atomic, provenance, record
from fisher_lab.runs.record import Run
from fisher_lab.runs.signals import STATUS, Interrupted, Watch
from fisher_lab.runs.status import Status
from fisher_lab.tasks.endings import FOLDER, clear, is_consequence, read_errors

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from fisher_lab.config.schema import Config
    from fisher_lab.curvature.collectives import TorchCommunicator
    from fisher_lab.tasks.run_spec import Work

log = logging.getLogger(__name__)

MODULE = "fisher_lab.tasks.rank_main"
"""What every rank runs, with the path of the file that says what is to be done."""

WORK_FILE = "work.json"

MEET_S = 300.0
"""Nodes wait for each other this long, or ``distributed.timeout_s`` where that is less."""


class RunFailed(Exception):
    """A rank under ``torchrun`` leaves without waiting for the others; its record says why.

    Attributes:
        code: the exit code.
    """

    def __init__(self, code: int) -> None:
        self.code = code
        super().__init__(str(code))


def wanted(config: Config) -> bool:
    """Says whether this process has to start ranks (``task=plan`` computes nothing to share)."""
    several = config.distributed.nproc * config.distributed.nodes > 1
    return several and config.task.name != "plan" and not launch.inside()


# ---- the watcher ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """How the ranks of one node ended.

    Attributes:
        failures: of those that ended first.
        errors: what this node's ranks have left.
        stop: the signal that their watcher got.
        elsewhere: why they were stopped, where another node was the reason.
    """

    failures: tuple[launch.Failure, ...] = ()
    errors: tuple[dict[str, Any], ...] = ()
    stop: int | None = None
    elsewhere: str | None = None

    @property
    def well(self) -> bool:
        """Whether they did what they were to do."""
        return self == Ended()

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Ended:
        """From what ``dataclasses.asdict`` gave."""
        failures = tuple(launch.Failure(**one) for one in plain["failures"])
        return cls(failures, tuple(plain["errors"]), plain["stop"], plain["elsewhere"])


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
    if where.node == 0:
        clear(folder)
    path = folder / (WORK_FILE if where.node == 0 else f"{_node_name(where.node)}.{WORK_FILE}")
    atomic.write_json(path, {**work.plain(), "logging": logging_config})
    log.info("starting %d ranks on this node (%d of %d)", d.nproc, where.node + 1, d.nodes)
    meeting = nodes.current() if where.nodes > 1 else None
    if meeting is None:
        with Watch() as signals:
            own = _watch(path, where, None)
            signals.ending()
            return _conclude(work, own, [own])
    with Watch() as signals:
        if meeting.leads:
            meeting.announce({"directory": str(work.directory.absolute())})
        own = _watch(path, where, meeting)
        signals.ending()
        return (_lead if meeting.leads else _follow)(work, own, meeting)


def _watch(path: Path, where: nodes.Place, meeting: nodes.Meeting | None) -> Ended:
    """Starts this node's ranks and waits for them."""
    failures: tuple[launch.Failure, ...] = ()
    try:
        launch.start(MODULE, [str(path)], where, meeting)
    except launch.RanksFailed as failed:
        failures = failed.failures
    except launch.Stopped as stop:
        return Ended(stop=stop.signum)
    except Interrupted as stop:  # before there were ranks
        return Ended(stop=stop.signum)
    except nodes.NodeError as error:
        return Ended(errors=({**record.describe(error), "rank": None},))
    except nodes.Elsewhere as other:
        return Ended(errors=_errors_here(path.parent, where), elsewhere=str(other))
    else:
        return Ended()
    return Ended(failures, _errors_here(path.parent, where))


def _errors_here(folder: Path, where: nodes.Place) -> tuple[dict[str, Any], ...]:
    """The errors of this node's ranks."""
    return tuple(e for e in read_errors(folder) if e["rank"] // where.nproc == where.node)


def _lead(work: Work, own: Ended, meeting: nodes.Meeting) -> dict[str, Any] | None:
    """Node 0: hears how the others' ranks ended, writes what follows, and tells it."""
    stop: Interrupted | None = None
    error: dict[str, Any] | None = None
    if not own.well:
        meeting.alarm()
    others = {node: Ended.of(told) for node, told in meeting.reports().items()}
    silent = [str(node) for node in range(1, meeting.where.nodes) if node not in others]
    if silent:
        log.warning("node %s did not say how its ranks ended", " and ".join(silent))
    try:
        error = _conclude(work, own, [own, *others.values()])
    except Interrupted as caught:
        stop = caught
    meeting.decide({"status": record.status_of(work.directory), "error": error,
                    "stop": None if stop is None else int(stop.signum)})  # fmt: skip
    if stop is not None:
        raise stop
    return error


def _follow(work: Work, own: Ended, meeting: nodes.Meeting) -> dict[str, Any] | None:
    """Another node: tells node 0 how its ranks ended, and ends as that says."""
    try:
        if not own.well:
            meeting.alarm()
        meeting.report(dataclasses.asdict(own))
        told = meeting.verdict()
    except nodes.NodeError as error:
        return record.describe(error)
    if told.get("stop") is not None:
        raise Interrupted(told["stop"])
    return told.get("error")


def _conclude(work: Work, own: Ended, every: Sequence[Ended]) -> dict[str, Any] | None:
    """Makes the record say how the ranks of all nodes ended, whatever rank 0 has made of it.

    Raises:
        Interrupted: they ended for a signal.
    """
    failures = [failure for ended in every for failure in ended.failures]
    errors = [error for ended in every for error in ended.errors]
    if all(ended.well for ended in every):
        return None
    signum = stopped_by(failures) if failures else None
    if signum is None and not _causes(errors, failures):
        signum = next((ended.stop for ended in every if ended.stop is not None), None)
    if signum is None:
        error = choose(errors, failures) or _without_reason(every)
        _reopened(work).fail_with(error)
        return error
    name = signal.Signals(signum)
    run = _reopened(work, keep=own.stop is not None)
    if run.status == Status.RUNNING:
        run.end(STATUS.get(name, Status.CANCELLED), name.name)
    raise Interrupted(signum)


def _without_reason(every: Sequence[Ended]) -> dict[str, Any]:
    message = next((ended.elsewhere for ended in every if ended.elsewhere), "a node failed")
    return {"type": "NodeError", "message": message, "traceback": "", "rank": None}


def verdict(folder: Path, failed: launch.RanksFailed) -> dict[str, Any]:
    """Finds the error that the others followed from, among the ranks of one node.

    Args:
        folder: with the ranks' ``rank<r>.error.json``.
        failed: who ended first.
    """
    found = choose(read_errors(folder), failed.failures)
    assert found is not None
    return found


def choose(
    errors: Sequence[Mapping[str, Any]], failures: Sequence[launch.Failure]
) -> dict[str, Any] | None:
    """Finds the error that the others followed from.

    The first error that is no consequence of another one; else a rank that was killed. (Those
    that were only asked to end, SIGTERM, are the ranks that were stopped for another's error.)

    Args:
        errors: that ranks have left.
        failures: the ranks that ended first, of every node.
    """
    first, killed = _first_causes(errors), _killed(failures)
    if first or (errors and not killed):
        chosen = (first or sorted(errors, key=_when))[0]
        return {key: chosen[key] for key in ("type", "message", "traceback", "rank")}
    if not failures:
        return None
    ended = (killed or failures)[0]
    kind = "RankKilled" if ended.exitcode < 0 else "RankFailed"
    return {"type": kind, "message": ended.text, "traceback": "", "rank": ended.rank}


def _causes(errors: Sequence[Mapping[str, Any]], failures: Sequence[launch.Failure]) -> bool:
    """Whether something has gone wrong that is no consequence of anything else."""
    return bool(_first_causes(errors) or _killed(failures))


def _first_causes(errors: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return sorted((e for e in errors if not is_consequence(e["type"], e["message"])), key=_when)


def _killed(failures: Sequence[launch.Failure]) -> list[launch.Failure]:
    """Those ended by a signal; an abort, as native code does it at another's end, comes last."""
    found = [f for f in failures if f.exitcode < 0 and f.exitcode != -signal.SIGTERM]
    return sorted(found, key=lambda f: f.exitcode == -signal.SIGABRT)


def _when(error: Mapping[str, Any]) -> tuple[str, int]:
    rank = error["rank"]
    return error.get("time", ""), -1 if rank is None else rank


def stopped_by(failures: Sequence[launch.Failure]) -> signal.Signals | None:
    """Finds the signal that the ranks have agreed to end for, whichever of them it had reached.

    Args:
        failures: the ranks that ended first.
    """
    codes = {failure.exitcode for failure in failures} - {-signal.SIGTERM}
    return next((signum for signum in STATUS if codes == {128 + signum}), None)


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


# ---- several nodes -------------------------------------------------------------------------------


@contextmanager
def meeting_of(config: Config) -> Iterator[nodes.Meeting | None]:
    """Brings this node together with the others that run the same, where there are several.

    Args:
        config: the validated configuration.

    Yields:
        What the nodes tell each other; None where this is the only one.

    Raises:
        nodes.NodeError: node 0 cannot be reached.
        launch.LaunchError: the environment does not say which node this is.
    """
    d = config.distributed
    if d.nodes == 1 or not wanted(config):
        yield None
        return
    where = launch.place(d.nproc, d.nodes, os.environ)
    with nodes.meeting(where, min(MEET_S, d.timeout_s)) as found:
        yield found


def folder_on(node: int, directory: Path) -> tuple[Path, str]:
    """Makes ``ranks/`` in a run directory; returns it, and the name of this node's files in it."""
    folder = directory / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    return folder, _node_name(node)


def _node_name(node: int) -> str:
    return f"node{node}"


def _writes_nothing(cfg: DictConfig, directory: Path, folder: Path, name: str) -> None:
    """Takes everything of Hydra's but one log of its own from a process that does not lead."""
    cfg.hydra.run.dir, cfg.hydra.output_subdir = str(directory), None
    given: Any = OmegaConf.to_container(cfg.hydra.job_logging, resolve=False)
    cfg.hydra.job_logging = log_of(given, folder / f"{name}.log")


@contextmanager
def of_one_run(config: Config, cfg: DictConfig, claim: Callable[[], Path]) -> Iterator[None]:
    """Makes of this process what it is among those of one run, of which one makes the directory.

    Args:
        config: the validated configuration.
        cfg: the composed one; Hydra's node in it is changed.
        claim: makes the run directory and returns it.

    Raises:
        nodes.NodeError: the nodes did not come together.
    """
    if launch.inside():
        with _under_torchrun(config, cfg, claim):
            yield
        return
    with meeting_of(config) as meeting:
        if meeting is None or meeting.leads:
            claim()
        else:
            told = meeting.announced()
            if told is None:
                raise nodes.NodeError("node 0 ended before it started a run")
            directory = Path(told["directory"])
            _writes_nothing(cfg, directory, *folder_on(meeting.where.node, directory))
        yield


# ---- a rank --------------------------------------------------------------------------------------


@contextmanager
def joined(config: Config) -> Iterator[TorchCommunicator]:
    """This process as a rank: in the process group, with its share of the processors."""
    from fisher_lab.distributed.process_group import session

    d = config.distributed
    _share_processors(config)
    shards = config.task.name == "train" and d.wrapper == "fsdp"
    with session(d.backend, config.device, timeout_s=d.timeout_s, watchdog=shards) as communicator:
        yield communicator


@contextmanager
def _under_torchrun(config: Config, cfg: DictConfig, claim: Callable[[], Path]) -> Iterator[None]:
    """Makes of a process that ``torchrun`` has started a rank of one run.

    Rank 0 claims the run directory and tells the others; these write their own log and nothing
    of Hydra's.
    """
    with joined(config) as communicator:
        rank = communicator.rank
        directory = Path(communicator.share(str(claim()) if rank == 0 else None)[0])
        folder = directory / FOLDER
        if rank == 0:
            clear(folder)
        communicator.share(None)
        if rank > 0:
            _writes_nothing(cfg, directory, folder, f"rank{rank}")
        yield


def current() -> TorchCommunicator | None:
    """Returns the communicator of the ranks that this process is one of, if it is one."""
    if not launch.inside():
        return None
    from fisher_lab.curvature.collectives import world

    return world()


def _share_processors(config: Config) -> None:
    """Ranks of one node that all take all processors would wait for each other."""
    import torch

    if config.threads is None and "OMP_NUM_THREADS" not in os.environ:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
        torch.set_num_threads(max(1, (allowed or os.cpu_count() or 1) // here))


def log_of(given: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Returns a logging configuration that writes one file alone, in the format that is given."""
    formatters = dict(given.get("formatters", {}))
    handler = {"class": "logging.FileHandler", "filename": str(path)}
    if formatters:
        handler["formatter"] = next(iter(formatters))
    return {
        "version": 1,
        "formatters": formatters,
        "handlers": {"file": {**handler, "encoding": "utf-8"}},
        "root": {"level": "INFO", "handlers": ["file"]},
        "disable_existing_loggers": False,
    }
