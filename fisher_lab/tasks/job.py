"""One run from its configuration to its record: what the doors and every launcher call."""

from __future__ import annotations

import dataclasses
import logging
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
from fisher_lab.tracking import sending

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from fisher_lab.config.schema import Config
    from fisher_lab.distributed.communicator import TorchCommunicator

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
    status: str
    message: str | None = None
    error: Exception | None = None

    @property
    def line(self) -> str:
        """The line for the screen where the run failed."""
        return f"failed: {self.message}; the log is {self.directory / LOG_FILE}"

    def report(self) -> int:
        """Print what has to be said; returns the exit code."""
        if self.status == "completed":
            return 0
        print(f"fisher_lab: {self.line}", file=sys.stderr)
        return 1


@dataclass(frozen=True)
class Work:
    """What a run is to do, and where.

    Attributes:
        config: the validated configuration.
        directory: the run directory.
        overrides: as typed.
        frozen: hashes of text and model as they were when the run was submitted; it fails where
            they have changed since.
    """

    config: Config
    directory: Path
    overrides: tuple[str, ...]
    frozen: Mapping[str, Any] | None = None

    def plain(self) -> dict[str, Any]:
        """As JSON-able values, for the ranks."""
        return {
            "config": dataclasses.asdict(self.config),
            "directory": str(self.directory),
            "overrides": list(self.overrides),
            "frozen": None if self.frozen is None else dict(self.frozen),
        }

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Work:
        """From what :meth:`plain` gave."""
        config = validate(plain["config"])
        directory, overrides = Path(plain["directory"]), tuple(plain["overrides"])
        return cls(config, directory, overrides, plain["frozen"])


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
        communicator = ranks.current()
        outcome = perform(work, communicator)
        if outcome.error is not None and communicator is not None:
            folder = work.directory / ranks.FOLDER
            ranks.write_error(folder, communicator.rank, outcome.error)
        return outcome
    error = ranks.start(work, told)
    if error is None:
        return Outcome(work.directory, "completed")
    return Outcome(work.directory, "failed", _brief(error["type"], error["message"]))


def perform(work: Work, communicator: TorchCommunicator | None = None) -> Outcome:
    """Run a task in this process, as one of several ranks or alone.

    Only rank 0 writes the run directory; the others keep their record in a temporary one.

    Args:
        work: what to do.
        communicator: of the ranks; None for one process alone.

    Raises:
        Interrupted: a signal ended the run; its record says so.
    """
    leads = communicator is None or communicator.rank == 0
    with ExitStack() as stack:
        directory = work.directory
        if not leads:
            directory = Path(stack.enter_context(TemporaryDirectory(prefix="fisher_lab-rank-")))
        return _perform(dataclasses.replace(work, directory=directory), communicator, leads)


def _perform(work: Work, communicator: TorchCommunicator | None, leads: bool) -> Outcome:
    config, directory = work.config, work.directory
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
        sending.start_of(
            run,
            told_to,
            task=config.task.name,
            overrides=run.record["overrides"],
        )
    )
    try:
        with run.signals:
            if communicator is not None:
                from fisher_lab.tasks import ranks

                run.note(distributed=ranks.about(communicator))
            if problem is not None:
                raise problem
            run.note(**_prepare(config))
            with tracking.current(tracker):
                import_module(TASKS[config.task.name]).run(config, run)
    except Interrupted as stop:
        told = _of_another_rank(stop, directory, communicator)
        if told is None:
            run.end(stop.status, stop.signum.name)
        else:
            run.fail_with(told)
        log.warning("%s; the run directory is %s", stop, directory)
        raise
    except Exception as error:
        told = _of_another_rank(error, directory, communicator)
        run.fail_with(record.describe(error) if told is None else told)
        _log_in_full(error)
        return Outcome(directory, "failed", _first_line(error), error)
    else:
        run.complete()
        log.info("completed")
    finally:
        sending.send(run, told_to, tracker)
    if leads:
        from fisher_lab.tasks import screen

        screen.show(run)
    return Outcome(directory, "completed")


def _of_another_rank(
    error: BaseException, directory: Path, communicator: TorchCommunicator | None
) -> dict[str, Any] | None:
    if communicator is None or communicator.rank > 0:
        return None
    from fisher_lab.tasks import ranks

    return ranks.cause(directory / ranks.FOLDER, 0, error)


def _changed(content: Mapping[str, Any], frozen: Mapping[str, Any]) -> str:
    names = [name for name in {**frozen, **content} if content.get(name) != frozen.get(name)]
    return (
        f"{' and '.join(names)} changed since this cell was submitted; start the sweep again, and "
        "the cell gets an identity of its own"
    )


def _content(config: Config) -> tuple[dict[str, Any], Exception | None]:
    """Hashes of data and model; an error is kept, so that there is a record that can hold it."""
    try:
        from fisher_lab.workbench import content_identity

        return content_identity(config), None
    except Exception as error:
        return {}, error


def _prepare(config: Config) -> dict[str, Any]:
    from fisher_lab.tasks import machine  # torch, which the record is not to wait for

    return machine.prepare(config)


def _log_in_full(error: Exception) -> None:
    """Into the log file alone: the screen gets one line."""
    details = (type(error), error, error.__traceback__)
    entry = log.makeRecord(log.name, logging.ERROR, __file__, 0, "the run failed", (), details)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(entry)


def _first_line(error: Exception) -> str:
    return _brief(type(error).__name__, str(error))


def _brief(kind: str, message: str) -> str:
    lines = message.strip().splitlines()
    return f"{kind.rpartition('.')[2]}: {lines[0] if lines else '(no message)'}"
