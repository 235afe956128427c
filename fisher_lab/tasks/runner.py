"""One run from its configuration to its record: what the entry points and every launcher call."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from fisher_lab import tracking
from fisher_lab.config.schema import TrackerConfig
from fisher_lab.config.validate import validate
from fisher_lab.distributed import launch
from fisher_lab.runs import provenance, record
from fisher_lab.runs.load import Load
from fisher_lab.runs.record import Run
from fisher_lab.runs.signals import Interrupted, interruption
from fisher_lab.runs.status import Status
from fisher_lab.tasks.run_spec import RunSpec
from fisher_lab.tracking import send

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from fisher_lab.config.schema import Config
    from fisher_lab.curvature.collectives import TorchCommunicator
    from fisher_lab.tasks.rank_status import RankStatus

log = logging.getLogger(__name__)

TASKS = {
    "analyze": "fisher_lab.tasks.analyze",
    "ladder": "fisher_lab.tasks.ladder",
    "plan": "fisher_lab.tasks.plan",
    "train": "fisher_lab.tasks.train",
}
"""Task -> the module whose ``run(config, run)`` does it."""

LOG_FILE = "fisher_lab.log"
"""Named after ``hydra.job.name``."""


class InputsChanged(RuntimeError):
    """Text or model are not what they were when the run was submitted."""


def warm() -> None:
    """Look up what a process keeps for all of its runs; imports no numerical library."""
    from fisher_lab.results import labels
    from fisher_lab.tasks import ranks, summary  # noqa: F401
    from fisher_lab.workload import content_identity  # noqa: F401

    provenance.collect()
    with contextlib.suppress(labels.LabelError):  # which every run says itself
        labels.catalogue()


def prepare(config: Config) -> dict[str, Any]:
    """Set threads, seeds and determinism as configured; returns what was set, for the record."""
    import numpy as np
    import torch  # which the record is not to wait for

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if config.deterministic:
        # cuBLAS reads it when it is first used; without it, it is not deterministic.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if torch.are_deterministic_algorithms_enabled() != config.deterministic:
        # Only then: the call imports the compiler, which takes two seconds.
        torch.use_deterministic_algorithms(config.deterministic)
    random.seed(config.seed)
    np.random.seed(config.seed)
    torch.manual_seed(config.seed)
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "device": device,
        "device_name": torch.cuda.get_device_name() if device == "cuda" else None,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "seed": config.seed,
        "deterministic": config.deterministic,
        "default_dtype": str(torch.get_default_dtype()).removeprefix("torch."),
    }


@dataclass(frozen=True)
class RunOutcome:
    """How a run ended."""

    directory: Path
    status: Status
    message: str | None = None
    error: Exception | None = None

    def report(self) -> int:
        """Prints the line that says why the run failed, if it did; returns the exit code."""
        if self.status == Status.COMPLETED:
            return 0
        path = self.directory / LOG_FILE
        print(f"fisher_lab: failed: {self.message}; the log is {path}", file=sys.stderr)
        return 1


def execute(cfg: DictConfig) -> RunOutcome:
    """Run the task of a composed configuration in Hydra's output directory.

    An error of the task is recorded and logged in full, and not raised.

    Raises:
        Interrupted: a signal ended the run; its record says so.
    """
    from hydra.core.hydra_config import HydraConfig  # not needed by the workers of a sweep
    from omegaconf import OmegaConf

    hydra = HydraConfig.get()
    directory, overrides = Path(hydra.runtime.output_dir), tuple(hydra.overrides.task)
    logging_config: Any = OmegaConf.to_container(hydra.job_logging, resolve=True)
    return begin(RunSpec(validate(cfg), directory, overrides), logging_config)


def begin(spec: RunSpec, logging_config: Mapping[str, Any]) -> RunOutcome:
    """Run a task: in this process, or in ranks that are started for it.

    Args:
        spec: what to do.
        logging_config: how the ranks are to log.

    Raises:
        Interrupted: a signal ended the run; its record says so.
    """
    from fisher_lab.tasks import ranks

    logging.captureWarnings(True)
    if not ranks.wanted(spec.config):
        if not launch.inside():
            return perform(spec)
        from fisher_lab.curvature.collectives import world

        return perform(spec, world())
    error = ranks.start(spec, logging_config)
    if error is None:
        return RunOutcome(spec.directory, Status.COMPLETED)
    return RunOutcome(spec.directory, Status.FAILED, record.headline(error))


def perform(spec: RunSpec, communicator: TorchCommunicator | None = None) -> RunOutcome:
    """Run a task in this process, as one of several ranks or alone.

    Only rank 0 writes the run directory; the others keep their record in a temporary one.

    Args:
        spec: what to do.
        communicator: of the ranks; None for one process alone.

    Raises:
        Interrupted: a signal ended the run; its record says so.
    """
    if communicator is None:
        return _perform(spec, None)
    from fisher_lab.tasks.rank_status import RankStatus

    rank = RankStatus(communicator, spec.directory)
    if rank.rank == 0:
        return _perform(spec, rank)
    with TemporaryDirectory(prefix="fisher_lab-rank-") as directory:
        return _perform(replace(spec, directory=Path(directory)), rank)


def _perform(spec: RunSpec, rank: RankStatus | None) -> RunOutcome:
    run, problem = _start_record(spec)
    is_rank_zero = rank is None or rank.rank == 0
    to = spec.config.tracker if is_rank_zero else TrackerConfig()
    tracker = tracking.make(to)
    task, overrides = spec.config.task.name, run.record["overrides"]
    tracker.start(send.start_of(run, to, task=task, overrides=overrides))
    try:
        with run.signals:
            _run_task(spec.config, run, rank, problem, tracker)
    except Interrupted as stop:
        log.warning("%s; the run directory is %s", stop, spec.directory)
        raise
    except Exception as error:
        _log_in_full(error)
        headline = record.headline(run.record["error"] or record.describe(error))
        return RunOutcome(spec.directory, Status.FAILED, headline, error)
    else:
        log.info("completed")
    finally:
        _send(run, to, tracker)
    if is_rank_zero:
        _show(run)
    return RunOutcome(spec.directory, Status.COMPLETED)


def _show(run: Run) -> None:
    """Prints the summary of a completed run, which is complete without it."""
    try:
        from fisher_lab.tasks import summary

        summary.show(run)
    except Exception:
        log.exception("the summary cannot be shown")


def _send(run: Run, to: TrackerConfig, tracker: tracking.Tracker) -> None:
    """Hands what a run has produced to its trackers, whose end does not depend on them."""
    try:
        send.send(run, to, tracker)
    except Exception:
        log.exception("the trackers did not get everything")


def _start_record(spec: RunSpec) -> tuple[Run, Exception | None]:
    """Begins the record; also returns what is wrong with text or model, for the record to hold."""
    content, problem = _content(spec.config)
    frozen = spec.frozen
    if frozen is not None:
        changed = [name for name in {**frozen, **content} if content.get(name) != frozen.get(name)]
        if problem is None and changed:
            problem = InputsChanged(
                f"{' and '.join(changed)} changed since this cell was submitted; start the sweep "
                "again, and the cell gets an identity of its own"
            )
        content = dict(frozen)
    run = Run.start(
        spec.directory,
        config=asdict(spec.config),
        overrides=spec.overrides,
        identity=content,
        provenance=provenance.collect(),
    )
    log.info("run %s in %s: task %s", run.run_id, spec.directory, spec.config.task.name)
    return run, problem


def _run_task(
    config: Config,
    run: Run,
    rank: RankStatus | None,
    problem: Exception | None,
    tracker: tracking.Tracker,
) -> None:
    """Runs the task and ends the record, whether the task succeeds or not."""
    try:
        try:
            if rank is not None:
                run.note(distributed=rank.about())
            if problem is not None:
                raise problem
            run.note(**prepare(config))
            load = Load()
            with tracking.current(tracker):
                import_module(TASKS[config.task.name]).run(config, run)
            if rank is None:  # other ranks are none of "others", and cannot be told from them
                run.note(load=load.about())
        finally:
            # Whoever started the ranks stops those that are left: it must not break in here.
            run.signals.ending()
        run.complete()
        if rank is not None:
            rank.completed()
    except (Exception, Interrupted) as error:
        if run.status != Status.RUNNING:  # a second SIGINT, while the end was being written
            raise
        stop = _stopped_by(error, run)
        if stop is not None:
            if rank is None:
                run.end(stop.status, stop.signum.name)
            else:
                rank.stopped(run, stop)
            raise stop from (None if stop is error else error)
        if rank is None or isinstance(error, Interrupted):
            run.fail(error)
        else:
            rank.failed(run, error)
        raise


def _stopped_by(error: BaseException, run: Run) -> Interrupted | None:
    """The signal that ended a task, whatever error came of it.

    A signal to all ranks reaches one before the other, whose next collective then fails; and its
    own signal may come only while that error is on its way.
    """
    from fisher_lab.tasks.rank_status import is_consequence

    stop = interruption(error)
    if stop is None and run.signals.received and is_consequence(type(error).__name__, str(error)):
        stop = Interrupted(run.signals.received)
    return stop


def _content(config: Config) -> tuple[dict[str, Any], Exception | None]:
    """Hashes of data and model; an error is kept, so that there is a record that can hold it."""
    try:
        from fisher_lab.workload.content_identity import content_identity

        return content_identity(config), None
    except Exception as error:
        return {}, error


def _log_in_full(error: Exception) -> None:
    """Writes the traceback into the log file alone; standard error gets one line."""
    details = (type(error), error, error.__traceback__)
    entry = log.makeRecord(log.name, logging.ERROR, __file__, 0, "the run failed", (), details)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(entry)
