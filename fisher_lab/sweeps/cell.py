"""A cell of a sweep: how it stands, and the file in which it is frozen for its process."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fisher_lab.config.schema import Config, RetryConfig
from fisher_lab.config.validate import build
from fisher_lab.runs import atomic, record
from fisher_lab.runs.lock import Lock
from fisher_lab.runs.status import Status
from fisher_lab.sweeps import retry
from fisher_lab.sweeps.directory import LAUNCH_FILE, Layout
from fisher_lab.sweeps.retry import Again

SCHEMA = "fisher_lab.cell/1"
CANCELLED_FILE = "cancelled"
RUN_DIRECTORY = "@RUN_DIRECTORY@"
"""Stands for the run directory in the frozen configuration of the logging."""
LOCK_TIMEOUT_S = 30.0
ARRIVES_S = 90.0
"""What another host has written is there by then: NFS may take a name for missing for a minute."""


@dataclass(frozen=True)
class Outcome:
    """How a cell has ended for its launcher.

    Attributes:
        status: of its record, or ``held`` where another launcher runs it, or ``not started``.
        message: why it failed, in one line.
        seconds: that it took, where that is known.
    """

    status: Status
    message: str | None = None
    seconds: float | None = None


@dataclass(frozen=True, eq=False)
class Cell:
    """One cell, composed and validated.

    Attributes:
        layout: of its sweep.
        run_id: its identity.
        overrides: as given to Hydra, those that all cells share among them.
        axes: what tells it from the other cells: key -> value as text.
        config: the configuration.
        content: hashes of text and model.
        alone: whether no other cell may run beside it.
        launch: name of the submission in which it is frozen; empty before that.
        logging: the configuration of the logging, with a name in the place of the run directory.
        cwd: the directory from which relative paths are meant.
        code: the name of the copy of the code that runs it; empty where it runs with its launcher.
    """

    layout: Layout
    run_id: str
    overrides: Sequence[str]
    axes: Mapping[str, str]
    config: Config
    content: Mapping[str, Any]
    alone: bool = False
    launch: str = ""
    logging: Mapping[str, Any] = field(default_factory=dict)
    cwd: str = ""
    code: str = ""

    @classmethod
    def load(cls, path: Path) -> Cell:
        """Read a frozen cell; its sweep is the one that it lies in, wherever that has been moved.

        Raises:
            ValueError: the file is none, or of another version of the code.
        """
        until = time.monotonic() + ARRIVES_S
        while not path.exists() and time.monotonic() < until:
            time.sleep(1.0)
        data = atomic.read_object(path)
        if data.pop("schema", None) != SCHEMA:
            raise ValueError(f"{path} is no frozen cell of this version ({SCHEMA})")
        data["config"] = build(Config, data["config"])
        return cls(layout=Layout(path.parents[4]), launch=path.parents[1].name, **data)

    def freeze(self, launch: str, logging: Mapping[str, Any], code: str = "") -> Cell:
        """Write the cell as it is now, so that a later change of a YAML file does not reach it."""
        cell = replace(self, launch=launch, logging=logging, cwd=os.getcwd(), code=code)
        data = {
            name: value for name, value in vars(cell).items() if name not in ("layout", "launch")
        }
        atomic.write_json(cell.path, {"schema": SCHEMA, **data, "config": asdict(cell.config)})
        return cell

    @property
    def submission(self) -> Path:
        """The directory of its launch."""
        return self.layout.submissions / self.launch

    @property
    def path(self) -> Path:
        """The file in which it is frozen."""
        return self.submission / "cells" / f"{self.run_id}.json"

    @property
    def directory(self) -> Path:
        """The run directory."""
        return self.layout.run_directory(self.run_id)

    @property
    def code_root(self) -> Path | None:
        """Where the copy of the code lies that runs it, if there is one."""
        return self.layout.code / self.code if self.code else None

    @property
    def label(self) -> str:
        """Its axes as they are written on the command line."""
        control = " (control)" if self.layout.is_of_controls else ""
        return f"{label_of(self.axes) or self.run_id}{control}"

    @property
    def lock(self) -> Lock:
        """A new lock object, for whoever wants to run the cell or to end its record."""
        return self.layout.lock(self.run_id, self.config.resume.stale_after_s)

    @property
    def state(self) -> Status:
        """How the cell stands (``Layout.state``)."""
        return self.layout.state(self.run_id, self.config.resume.stale_after_s, probe=True)

    @property
    def cancelled(self) -> bool:
        """Whether the user has cancelled the launch that this cell belongs to."""
        return (self.submission / CANCELLED_FILE).exists()

    def own_logging(self) -> dict[str, Any]:
        """The configuration of the logging, for the run directory."""
        text = json.dumps(self.logging)
        return json.loads(text.replace(RUN_DIRECTORY, json.dumps(str(self.directory))[1:-1]))

    def end_record(
        self, status: Status, reason: str, error: Mapping[str, Any] | None = None
    ) -> None:
        """End ``run.json`` where the process has not; only for the holder of the lock.

        Nothing that comes after its completion changes the status of a cell.
        """
        if record.status_of(self.directory) is Status.COMPLETED:
            return
        otherwise = {
            "run_id": self.run_id,
            "config": asdict(self.config),
            "overrides": list(self.overrides),
            "provenance": {"content": self.content},
        }
        record.end_from_outside(self.directory, status, reason, error=error, otherwise=otherwise)

    def settle(self, status: Status, reason: str, error: Mapping[str, Any] | None = None) -> None:
        """End ``run.json`` and note it in the journal; only for the holder of the lock."""
        if record.status_of(self.directory) is Status.COMPLETED:
            return
        self.end_record(status, reason, error)
        self.layout.journal_end(self.run_id, status, reason=reason)

    def settle_lost(
        self, status: Status, reason: str, error: Mapping[str, Any] | None = None
    ) -> bool:
        """:meth:`settle` a cell that nobody runs; false where one runs or has completed it."""
        lock = self.lock
        if not lock.acquire_within(LOCK_TIMEOUT_S):
            return False
        with lock:
            if record.status_of(self.directory) is Status.COMPLETED:
                return False
            self.settle(status, reason, error)
        return True

    @property
    def again(self) -> Again:
        """What its failures since the last launch come to."""
        policies = self.config.sweep.retry
        if policies == RetryConfig():  # nothing is read for it
            return Again()
        found = retry.failures(self.layout.journal.read()).get(self.run_id, [])
        return retry.after([str(one["kind"]) for one in found], policies)

    def give_up(self, reason: str, message: str) -> Outcome:
        """Make a cell that nobody runs ``failed``; returns what has become of it."""
        self.settle_lost(Status.FAILED, reason, death(message))
        return Outcome(Status.FAILED, message)


def death(message: str, **details: Any) -> dict[str, Any]:
    """The error of a cell whose process could not say it itself."""
    return {"type": "JobDied", "message": message, "traceback": "", **details}


def label_of(axes: Mapping[str, str]) -> str:
    """The axes of a cell as they are written on the command line."""
    return " ".join(f"{key}={value}" for key, value in axes.items())


def launch_name() -> str:
    """The name of a new launch, which sorts by time."""
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%f")
    return f"{stamp}-{secrets.token_hex(3)}"


@dataclass
class Submission:
    """A launch of a sweep: who launches what, and the frozen cells.

    Attributes:
        layout: of the sweep.
        logging: the configuration of the logging.
        about: what its file says beside the cells.
        code: the copy of the package that its cells run; empty for the package itself.
        launch: its name.
        cells: that are frozen in it, by run directory.
    """

    layout: Layout
    logging: Mapping[str, Any]
    about: Mapping[str, Any] = field(default_factory=dict)
    code: str = ""
    launch: str = field(default_factory=launch_name)
    cells: dict[Path, Cell] = field(default_factory=dict)

    @property
    def directory(self) -> Path:
        """Where its files are."""
        return self.layout.submissions / self.launch

    def freeze(self, cells: Sequence[Cell]) -> list[Cell]:
        """The frozen cells, those of them that were not frozen before as they are now."""
        new = [cell for cell in cells if cell.directory not in self.cells]
        self.cells |= {
            cell.directory: cell.freeze(self.launch, self.logging, self.code) for cell in new
        }
        if new or not self.cells:
            run_ids = [cell.run_id for cell in self.cells.values()]
            atomic.write_json(self.directory / LAUNCH_FILE, {**self.about, "cells": run_ids})
        return [self.cells[cell.directory] for cell in cells]


def submit(cells: Sequence[Cell], logging: Mapping[str, Any], code: str = "") -> list[Cell]:
    """Freeze cells of one sweep in the directory of a new launch."""
    return Submission(cells[0].layout, logging, code=code).freeze(cells)
