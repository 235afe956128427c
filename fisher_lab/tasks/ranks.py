"""One run on several ranks: the launcher that starts them, and the processes that are ranks.

``distributed.nproc=2`` makes the process that Hydra has called the launcher: it starts the ranks
(``python -m fisher_lab.tasks.rank_main``), waits, and where one of them failed writes its error
into the record. On several nodes each has a launcher; that of node 0 alone writes. Under
``torchrun`` every process is a rank from the start. Only rank 0 writes the run directory, except
for ``ranks/``: a log of each other rank and node, and how each rank ended.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from fisher_lab.distributed import launch, nodes
from fisher_lab.distributed.nodes import NodeError, Nodes, Place, RunEnd, RunEnded
from fisher_lab.runs import atomic, identity, provenance, record
from fisher_lab.runs.signals import STATUS, Interrupted, Watch
from fisher_lab.runs.status import Status
from fisher_lab.tasks.rank_status import (
    FOLDER,
    GRACE_S,
    KILLED,
    clear,
    is_consequence,
    read_errors,
    without_time,
)

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    from fisher_lab.config.schema import Config
    from fisher_lab.curvature.collectives import TorchCommunicator
    from fisher_lab.tasks.run_spec import RunSpec

log = logging.getLogger(__name__)

MODULE = "fisher_lab.tasks.rank_main"
"""What every rank runs, with the path of the file that says what is to be done."""

WORK_FILE = "spec.json"

ENDED_BADLY = "RankFailed"
"""The error of a run of which a rank has ended, and has not said why."""

NODES_WAIT_S = 300.0
"""Nodes wait for each other this long, or ``distributed.timeout_s`` where that is less."""


def wanted(config: Config) -> bool:
    """Says whether this process has to start ranks (``task=plan`` computes too little for them)."""
    several = config.distributed.nproc * config.distributed.nodes > 1
    return several and config.task.name != "plan" and not launch.inside()


# ---- the launcher --------------------------------------------------------------------------------


def start(spec: RunSpec, logging_config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Starts the ranks of a run and waits for them.

    Args:
        spec: what is to be done.
        logging_config: Hydra's, resolved; rank 0 logs as this process does.

    Returns:
        The error that ended the run, as in ``run.json``; None where it is complete.

    Raises:
        Interrupted: this process, or that of another node, got a signal, and handed it on.
        launch.LaunchError: the environment does not say which node this is.
    """
    d = spec.config.distributed
    where = launch.place(d.nproc, d.nodes, os.environ)
    folder = spec.directory / FOLDER
    if where.node == 0:
        clear(folder)
    path = folder / (WORK_FILE if where.node == 0 else f"node{where.node}.{WORK_FILE}")
    atomic.write_json(path, {**spec.plain(), "logging": logging_config})
    log.info("starting %d ranks on this node (%d of %d)", d.nproc, where.node + 1, d.nodes)
    with Watch() as signals:
        end = _run_ranks(path, where, nodes.current() if where.nodes > 1 else None, signals)
        if end is None:
            return None
        if signals.received and _follows(end.error):  # a rank's end was seen before the signal
            end = RunEnd(signum=signals.received)
        if where.node == 0:
            _record_end(spec, end)
    if end.signum is not None:
        raise Interrupted(end.signum)
    return end.error


def _run_ranks(path: Path, where: Place, group: Nodes | None, signals: Watch) -> RunEnd | None:
    """Runs this node's ranks; returns how the run ended, None where it is complete.

    A signal ends the run whenever it comes until then, also between two of these steps.
    """
    try:
        try:
            if group is not None and group.is_first:
                group.publish(path.absolute().parent.parent)
            end = _run_own_ranks(path, where, group)
            signals.ending()
        except Interrupted as stop:
            signals.ending()
            end = RunEnd(signum=stop.signum)
        if group is not None:
            end = group.agree(end, GRACE_S if end is not None and _is_lost(end.error) else 0.0)
        return end
    except NodeError as error:
        signals.ending()
        return RunEnd(record.describe(error))


def _run_own_ranks(path: Path, where: Place, group: Nodes | None) -> RunEnd | None:
    """Runs this node's ranks; returns how they ended, but for a signal, which is raised.

    None where they did their work, or were stopped because the run had ended on another node.
    """
    try:
        launch.start(MODULE, [str(path)], where, group)
    except RunEnded:
        return None
    except NodeError as error:
        return RunEnd({**record.describe(error), "rank": None})
    except launch.RanksFailed as failed:
        errors = [e for e in read_errors(path.parent) if e["rank"] // where.nproc == where.node]
        signum = stopped_by(failed.failures, errors)
        if signum is not None:
            return RunEnd(signum=signum)
        return RunEnd(first_error(errors, failed.failures))
    return None


def first_error(
    errors: Sequence[Mapping[str, Any]], failures: Mapping[int, ProcessFailure]
) -> dict[str, Any]:
    """Finds the error from which those of the other ranks followed.

    It is the first one that is no consequence of another, else that of a rank that was killed. (A
    rank that was only asked to end, by SIGTERM, was stopped for another's error.)

    Args:
        errors: that ranks have left, the first one first.
        failures: rank -> how it ended, of the ranks that ended first; at least one.
    """
    causes = [error for error in errors if not _is_lost(error)]
    # An abort, as native code does it when another rank is gone, comes last.
    codes = {rank: failures[rank].exitcode for rank in sorted(failures)}
    killed = sorted(
        (rank for rank, code in codes.items() if code < 0 and code != -signal.SIGTERM),
        key=lambda rank: codes[rank] == -signal.SIGABRT,
    )
    if causes or (errors and not killed):
        return without_time((causes or errors)[0])
    rank = (killed or list(codes))[0]
    message = f"rank {rank} (process {failures[rank].pid}) "
    if codes[rank] < 0:
        kind, message = KILLED, f"{message}was ended by {failures[rank].signal_name()}"
    else:
        kind, message = ENDED_BADLY, f"{message}ended with exit code {codes[rank]}"
    return {"type": kind, "message": message, "traceback": "", "rank": rank}


def stopped_by(
    failures: Mapping[int, ProcessFailure], errors: Sequence[Mapping[str, Any]] = ()
) -> signal.Signals | None:
    """Finds the signal for which the ranks have ended, whichever of them it had reached.

    Args:
        failures: rank -> how it ended, of the ranks that ended first.
        errors: that ranks have left. Where each says only that another rank was gone, these ranks
            have ended for those that the signal had reached.
    """
    codes = {failure.exitcode for failure in failures.values()} - {-signal.SIGTERM}
    if errors and all(map(_is_lost, errors)):
        codes -= {1}
    # A rank that has no handler yet dies of the signal itself (of SIGTERM where others failed).
    return next((s for s in STATUS if codes and codes <= {128 + s, -s}), None)


def _record_end(spec: RunSpec, end: RunEnd) -> None:
    """Makes the record say how the run ended, whatever rank 0 has made of it."""
    config = record.strict(dataclasses.asdict(spec.config))
    otherwise = {
        "run_id": identity.run_id(config, spec.frozen or {}),
        "config": config,
        "overrides": list(spec.overrides),
        "provenance": provenance.collect(),
    }
    if end.error is not None:
        reason = record.headline(end.error)
        record.end_from_outside(
            spec.directory, Status.FAILED, reason, error=end.error, otherwise=otherwise
        )
    elif end.signum is not None and not _has_ended(spec.directory):
        signum = signal.Signals(end.signum)
        record.end_from_outside(spec.directory, STATUS[signum], signum.name, otherwise=otherwise)


def _has_ended(directory: Path) -> bool:
    """Whether rank 0 has ended the record, and not only because another rank was gone."""
    status = record.status_of(directory)
    ended = status is not None and status.has_ended
    return ended and not _follows(record.read(directory)["error"])


def _is_lost(error: Mapping[str, Any] | None) -> bool:
    """Whether an error says only that another rank is gone."""
    return error is not None and is_consequence(error["type"], error["message"])


def _follows(error: Mapping[str, Any] | None) -> bool:
    """Whether an error may follow from a signal to all ranks: none of them reported it itself."""
    return _is_lost(error) or (error is not None and error["type"] in (KILLED, ENDED_BADLY))


# ---- several nodes -------------------------------------------------------------------------------


@contextmanager
def connected_nodes(config: Config) -> Iterator[Nodes | None]:
    """Connects this node with the others that run the same, where there are several.

    Args:
        config: the validated configuration.

    Yields:
        The nodes; None where this is the only one.

    Raises:
        nodes.NodeError: node 0 cannot be reached.
        launch.LaunchError: the environment does not say which node this is.
    """
    d = config.distributed
    if d.nodes == 1 or not wanted(config):
        yield None
    else:
        where = launch.place(d.nproc, d.nodes, os.environ)
        with nodes.connect(where, min(NODES_WAIT_S, d.timeout_s)) as group:
            yield group


def node_log(node: int, directory: Path) -> Path:
    """Returns the path of a node's log in ``ranks/`` of a run directory, which is made."""
    folder = directory / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"node{node}.log"


def _log_only(cfg: DictConfig, directory: Path, path: Path) -> None:
    """Takes everything of Hydra's from a process, except for one log of its own."""
    cfg.hydra.run.dir, cfg.hydra.output_subdir = str(directory), None
    given: Any = OmegaConf.to_container(cfg.hydra.job_logging, resolve=False)
    cfg.hydra.job_logging = log_of(given, path)


@contextmanager
def of_one_run(
    config: Config, cfg: DictConfig, make_directory: Callable[[], Path]
) -> Iterator[None]:
    """Makes this process one of those that work on a run, of which one makes the directory.

    Args:
        config: the validated configuration.
        cfg: the composed one; Hydra's node in it is changed.
        make_directory: makes the run directory and returns it.

    Raises:
        nodes.NodeError: the nodes did not find each other.
    """
    if launch.inside():
        with joined(config) as communicator:
            rank = communicator.rank
            made = str(make_directory()) if rank == 0 else None
            directory = Path(communicator.all_gather_objects(made)[0])
            if rank == 0:
                clear(directory / FOLDER)
            communicator.all_gather_objects(None)
            if rank > 0:
                _log_only(cfg, directory, directory / FOLDER / f"rank{rank}.log")
            yield
        return
    with connected_nodes(config) as group:
        if group is None or group.is_first:
            make_directory()
        else:
            directory = group.directory()
            if directory is None:
                raise NodeError("node 0 ended before it started a run")
            _log_only(cfg, directory, node_log(group.where.node, directory))
        yield


# ---- a rank --------------------------------------------------------------------------------------


@contextmanager
def joined(config: Config) -> Iterator[TorchCommunicator]:
    """Makes this process a rank: in the process group, with its part of the processors."""
    import torch

    from fisher_lab.distributed.process_group import session

    d = config.distributed
    if config.threads is None and "OMP_NUM_THREADS" not in os.environ:
        # Ranks of one node that all take all processors would wait for each other.
        allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, (allowed or os.cpu_count() or 1) // here))
    shards = config.task.name == "train" and d.wrapper == "fsdp"
    with session(d.backend, config.device, timeout_s=d.timeout_s, watchdog=shards) as communicator:
        yield communicator


def log_of(given: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Returns a logging configuration that writes one file alone, in the format that is given."""
    formatters = dict(given.get("formatters", {}))
    handler = {"class": "logging.FileHandler", "filename": str(path), "encoding": "utf-8"}
    if formatters:
        handler["formatter"] = next(iter(formatters))
    return {
        "version": 1,
        "formatters": formatters,
        "handlers": {"file": handler},
        "root": {"level": "INFO", "handlers": ["file"]},
        "disable_existing_loggers": False,
    }
