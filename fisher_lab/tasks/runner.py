"""One run from its configuration to its record: what the doors and every launcher call."""

from __future__ import annotations

import dataclasses
import logging
import os
import random
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from fisher_lab import tracking
from fisher_lab.config.schema import TrackerConfig
from fisher_lab.config.validate import validate
from fisher_lab.runs import provenance, record
from fisher_lab.runs.record import Run
from fisher_lab.runs.signals import Interrupted
from fisher_lab.runs.status import Status
from fisher_lab.tasks.run_spec import Work
from fisher_lab.tracking import send

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from fisher_lab.config.schema import Config
    from fisher_lab.curvature.collectives import TorchCommunicator
    from fisher_lab.tasks.endings import Endings

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


def prepare(config: Config) -> dict[str, Any]:
    """Set threads, seeds and determinism as configured.

    Args:
        config: the typed configuration.

    Returns:
        What was set, for the record: ``device``, ``device_name``, ``threads``, ``seed``,
        ``deterministic``, ``default_dtype``.
    """
    import numpy as np
    import torch  # which the record is not to wait for

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if config.deterministic:
        # cuBLAS reads it when it is first used; without it, it is not deterministic.
        os.environ.setdefault(_CUBLAS, ":4096:8")
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


log = logging.getLogger(__name__)

TASKS = {
    "analyze": "fisher_lab.tasks.analyze",
    "plan": "fisher_lab.tasks.plan",
    "train": "fisher_lab.tasks.train",
}
"""Task -> the module whose ``run(config, run)`` does it."""


class RunFailed(RuntimeError):
    """A run failed; its record and its log say how. The text is the line for the screen."""


LOG_FILE = "fisher_lab.log"
"""Named after ``hydra.job.name``."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    directory: Path
    status: Status
    message: str | None = None
    error: Exception | None = None

    @property
    def line(self) -> str:
        """The line for the screen where the run failed."""
        return f"failed: {self.message}; the log is {self.directory / LOG_FILE}"

    def report(self) -> int:
        """Print what has to be said; returns the exit code."""
        if self.status == Status.COMPLETED:
            return 0
        print(f"fisher_lab: {self.line}", file=sys.stderr)
        return 1


def execute(cfg: DictConfig) -> Outcome:
    """Run the task of a composed configuration in Hydra's output directory.

    An error of the task is recorded and logged in full, and not raised.

    Raises:
        Interrupted: a signal ended the run; its record says so.
    """
    from hydra.core.hydra_config import HydraConfig  # not needed by the workers of a sweep
    from omegaconf import OmegaConf

    hydra = HydraConfig.get()
    directory, overrides = Path(hydra.runtime.output_dir), tuple(hydra.overrides.task)
    told: Any = OmegaConf.to_container(hydra.job_logging, resolve=True)
    return begin(Work(validate(cfg), directory, overrides), told)


def begin(work: Work, told: Mapping[str, Any]) -> Outcome:
    """Run a task: in this process, or in ranks that are started for it.

    Args:
        work: what to do.
        told: how the ranks are to log.

    Raises:
        Interrupted: a signal ended the run; its record says so.
    """
    from fisher_lab.tasks import ranks

    logging.captureWarnings(True)
    if not ranks.wanted(work.config):
        return perform(work, ranks.current())
    error = ranks.start(work, told)
    if error is None:
        return Outcome(work.directory, Status.COMPLETED)
    return Outcome(work.directory, Status.FAILED, _brief(error["type"], error["message"]))


def perform(work: Work, communicator: TorchCommunicator | None = None) -> Outcome:
    """Run a task in this process, as one of several ranks or alone.

    Only rank 0 writes the run directory; the others keep their record in a temporary one.

    Args:
        work: what to do.
        communicator: of the ranks; None for one process alone.

    Raises:
        Interrupted: a signal ended the run; its record says so.
    """
    if communicator is None:
        return _perform(work, None)
    from fisher_lab.tasks.endings import Endings

    endings = Endings(communicator, work.directory)
    with ExitStack() as stack:
        if communicator.rank > 0:
            directory = Path(stack.enter_context(TemporaryDirectory(prefix="fisher_lab-rank-")))
            work = dataclasses.replace(work, directory=directory)
        return _perform(work, endings)


def _perform(work: Work, endings: Endings | None) -> Outcome:
    config, directory = work.config, work.directory
    leads = endings is None or endings.rank == 0
    content, problem = _content(config)
    if work.frozen is not None:
        if problem is None and content != work.frozen:
            problem = RunFailed(_changed(content, work.frozen))
        content = dict(work.frozen)
    run = Run.start(
        directory,
        config=dataclasses.asdict(config),
        overrides=work.overrides,
        identity=content,
        provenance=provenance.collect(),
    )
    log.info("run %s in %s: task %s", run.run_id, directory, config.task.name)
    told_to = config.tracker if leads else TrackerConfig()
    tracker = tracking.make(told_to)
    tracker.start(
        send.start_of(
            run,
            told_to,
            task=config.task.name,
            overrides=run.record["overrides"],
        )
    )
    try:
        with run.signals:
            try:
                _do_task(config, run, endings, problem, tracker)
            except (Exception, Interrupted) as error:
                # Whoever started the ranks stops those that are left: it must not break in here.
                run.signals.ending()
                _end(run, error, endings)
                raise
    except Interrupted as stop:
        log.warning("%s; the run directory is %s", stop, directory)
        raise
    except Exception as error:
        _log_in_full(error)
        told = run.record["error"] or record.describe(error)
        return Outcome(directory, Status.FAILED, _brief(told["type"], told["message"]), error)
    else:
        log.info("completed")
    finally:
        send.send(run, told_to, tracker)
    if leads:
        from fisher_lab.tasks import summary

        summary.show(run)
    return Outcome(directory, Status.COMPLETED)


def _do_task(
    config: Config,
    run: Run,
    endings: Endings | None,
    problem: Exception | None,
    tracker: tracking.Tracker,
) -> None:
    """The task itself, and the record's end where all went well."""
    try:
        if endings is not None:
            run.note(distributed=endings.about())
        if problem is not None:
            raise problem
        run.note(**_prepare(config))
        with tracking.current(tracker):
            import_module(TASKS[config.task.name]).run(config, run)
    except Exception:
        run.signals.ending()  # at once: the error is to be recorded, whatever else comes
        raise
    run.signals.ending()
    run.complete()
    if endings is not None:
        endings.completed()


def _end(run: Run, error: Exception | Interrupted, endings: Endings | None) -> None:
    """The record's end where something went wrong here, or on a rank that this one noticed."""
    if run.status != Status.RUNNING:  # a second SIGINT, while the end was being written
        return
    if isinstance(error, Interrupted):
        if endings is None:
            run.end(error.status, error.signum.name)
        else:
            endings.stopped(run, error)
    elif endings is None:
        run.fail(error)
    else:
        endings.failed(run, error)


def _changed(content: Mapping[str, Any], frozen: Mapping[str, Any]) -> str:
    names = [name for name in {**frozen, **content} if content.get(name) != frozen.get(name)]
    return (
        f"{' and '.join(names)} changed since this cell was submitted; start the sweep again, and "
        "the cell gets an identity of its own"
    )


def _content(config: Config) -> tuple[dict[str, Any], Exception | None]:
    """Hashes of data and model; an error is kept, so that there is a record that can hold it."""
    try:
        from fisher_lab.workload.content_identity import content_identity

        return content_identity(config), None
    except Exception as error:
        return {}, error


def _prepare(config: Config) -> dict[str, Any]:
    return prepare(config)


def _log_in_full(error: Exception) -> None:
    """Into the log file alone: the screen gets one line."""
    details = (type(error), error, error.__traceback__)
    entry = log.makeRecord(log.name, logging.ERROR, __file__, 0, "the run failed", (), details)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(entry)


def _brief(kind: str, message: str) -> str:
    lines = message.strip().splitlines()
    return f"{kind.rpartition('.')[2]}: {lines[0] if lines else '(no message)'}"
