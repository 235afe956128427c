"""A cell of a sweep, and the file in which it is frozen for the process that runs it."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from fisher_lab.config.schema import Config
from fisher_lab.config.validate import validate_plain
from fisher_lab.distributed import launch
from fisher_lab.runs import atomic
from fisher_lab.sweeps.directory import Layout

SCHEMA = "fisher_lab.cell/1"
CANCELLED_FILE = "cancelled"
RUN_DIRECTORY = "@RUN_DIRECTORY@"
"""Stands for the run directory in the frozen configuration of the logging."""


@dataclass(frozen=True)
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
    """

    layout: Layout
    run_id: str
    overrides: tuple[str, ...]
    axes: Mapping[str, str]
    config: Config
    content: Mapping[str, Any]
    alone: bool = False

    @property
    def directory(self) -> Path:
        """The run directory."""
        return self.layout.run_directory(self.run_id)

    @property
    def line(self) -> str:
        """The overrides that give this cell, and no other, with ``python -m fisher_lab -m``."""
        return " ".join(self.overrides)


@dataclass(frozen=True, eq=False)
class FrozenCell:
    """A cell as it was when it was submitted.

    Attributes:
        path: the file.
        data: its contents.
    """

    path: Path
    data: Mapping[str, Any]

    @classmethod
    def load(cls, path: Path) -> FrozenCell:
        """Read a frozen cell.

        Raises:
            ValueError: the file is none, or of another version.
        """
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        if data.get("schema") != SCHEMA:
            raise ValueError(f"{path} is no frozen cell of this version ({SCHEMA})")
        return cls(Path(path), data)

    @property
    def run_id(self) -> str:
        """The cell's identity."""
        return self.data["run_id"]

    @property
    def label(self) -> str:
        """Its axes as they are written on the command line."""
        return label_of(self.data["axes"]) or self.run_id

    @property
    def line(self) -> str:
        """The overrides that give this cell, and no other, with ``python -m fisher_lab -m``."""
        return " ".join(self.data["overrides"])

    @property
    def alone(self) -> bool:
        """Whether no other cell may run beside it."""
        return self.data["alone"]

    @property
    def submission(self) -> Path:
        """The directory of its launch."""
        return self.path.parents[1]

    @property
    def layout(self) -> Layout:
        """Of its sweep, wherever that has been moved to."""
        return Layout(self.path.parents[4])

    @property
    def directory(self) -> Path:
        """The run directory."""
        return self.layout.run_directory(self.run_id)

    @cached_property
    def config(self) -> Config:
        """The typed configuration.

        Raises:
            ConfigError: this version of the code does not take it.
        """
        return validate_plain(self.data["config"])

    @property
    def sweep(self) -> Mapping[str, Any]:
        """The section ``sweep`` of the configuration."""
        return self.data["config"]["sweep"]

    @property
    def stale_after_s(self) -> float:
        """Seconds without a heartbeat after which its lock is stale."""
        return self.data["config"]["resume"]["stale_after_s"]

    @property
    def nodes(self) -> int:
        """Nodes on which its ranks run."""
        return self.data["config"]["distributed"]["nodes"]

    @property
    def node(self) -> int:
        """This node among them, as the environment says.

        Raises:
            LaunchError: it does not say it.
        """
        given = self.data["config"]["distributed"]
        return launch.place(given["nproc"], given["nodes"], os.environ).node

    @property
    def cancelled(self) -> bool:
        """Whether the user has cancelled the launch that this cell belongs to."""
        return (self.submission / CANCELLED_FILE).exists()

    def logging(self) -> dict[str, Any]:
        """The configuration of the logging, for the run directory."""
        text = json.dumps(self.data["logging"])
        return json.loads(text.replace(RUN_DIRECTORY, json.dumps(str(self.directory))[1:-1]))

    def record(self) -> dict[str, object]:
        """What ``run.json`` says of the run where its process did not come to write one."""
        return {
            "run_id": self.run_id,
            "config": self.data["config"],
            "overrides": self.data["overrides"],
            "provenance": {"content": self.data["content"]},
        }


def label_of(axes: Mapping[str, str]) -> str:
    """The axes of a cell as they are written on the command line."""
    return " ".join(f"{key}={value}" for key, value in axes.items())


def new_submission(layout: Layout) -> Path:
    """Make the directory of a new launch; its name sorts by time."""
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%f")
    directory = layout.submissions / f"{stamp}-{secrets.token_hex(3)}"
    directory.mkdir(parents=True)
    return directory


def freeze(submission: Path, cells: Sequence[Cell], logging: Mapping[str, Any]) -> list[FrozenCell]:
    """Write cells as they are now, so that a later change of a YAML file does not reach them."""
    (submission / "cells").mkdir()
    return [_freeze(submission / "cells" / f"{cell.run_id}.json", cell, logging) for cell in cells]


def _freeze(path: Path, cell: Cell, logging: Mapping[str, Any]) -> FrozenCell:
    data = {
        "schema": SCHEMA,
        "run_id": cell.run_id,
        "overrides": list(cell.overrides),
        "axes": dict(cell.axes),
        "alone": cell.alone,
        "cwd": os.getcwd(),
        "config": dataclasses.asdict(cell.config),
        "content": dict(cell.content),
        "logging": dict(logging),
    }
    atomic.write_json(path, data)
    return FrozenCell(path, data)
