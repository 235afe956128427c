"""One run from its configuration to its record: what the doors and every launcher call."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig

from fisher_lab import tracking
from fisher_lab.config.validate import validate
from fisher_lab.runs import provenance
from fisher_lab.runs.record import Run
from fisher_lab.runs.signals import Interrupted
from fisher_lab.tasks import screen
from fisher_lab.tracking import sending

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from fisher_lab.config.schema import Config

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


def execute(cfg: DictConfig) -> Outcome:
    """Run the task of a composed configuration in Hydra's output directory.

    An error of the task is recorded and logged in full, and not raised.

    Raises:
        Interrupted: a signal ended the run; its record says so.
    """
    hydra = HydraConfig.get()
    return perform(validate(cfg), Path(hydra.runtime.output_dir), list(hydra.overrides.task))


def perform(
    config: Config,
    directory: Path,
    overrides: Sequence[str],
    *,
    frozen: Mapping[str, Any] | None = None,
) -> Outcome:
    """Run the task of a configuration in a directory.

    An error of the task is recorded and logged in full, and not raised.

    Args:
        config: the validated configuration.
        directory: the run directory.
        overrides: as typed.
        frozen: hashes of text and model as they were when the run was submitted; it fails where
            they have changed since.

    Raises:
        Interrupted: a signal ended the run; its record says so.
    """
    logging.captureWarnings(True)
    content, problem = _content(config)
    if frozen is not None and problem is None and content != frozen:
        problem = RunFailed(_changed(content, frozen))
    content = content if frozen is None else dict(frozen)
    run = Run.start(
        directory,
        config=dataclasses.asdict(config),
        overrides=overrides,
        identity=content,
        provenance=provenance.collect(),
    )
    log.info("run %s in %s: task %s", run.run_id, directory, config.task.name)
    tracker = tracking.make(config.tracker)
    tracker.start(
        sending.start_of(
            run,
            config.tracker,
            task=config.task.name,
            overrides=run.record["overrides"],
        )
    )
    try:
        with run.signals:
            if problem is not None:
                raise problem
            run.note(**_prepare(config))
            with tracking.current(tracker):
                import_module(TASKS[config.task.name]).run(config, run)
    except Interrupted as stop:
        run.end(stop.status, stop.signum.name)
        log.warning("%s; the run directory is %s", stop, directory)
        raise
    except Exception as error:
        run.fail(error)
        _log_in_full(error)
        return Outcome(directory, "failed", _first_line(error))
    else:
        run.complete()
        log.info("completed")
    finally:
        sending.send(run, config.tracker, tracker)
    screen.show(run)
    return Outcome(directory, "completed")


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
