"""Which directories under some paths are runs, which sweep each is of, and what was left out."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fisher_lab.runs.record import METRICS_FILE, RUN_FILE

from .errors import ResultsError

SWEEP_FILE = "sweep.json"
MULTIRUN_FILE = "multirun.yaml"
OURS = ("figures",)
"""Directories that this package writes beside the runs."""


@dataclass(frozen=True)
class LeftOut:
    """A directory that could not be read, or a part of one, and why."""

    directory: str
    reason: str


@dataclass
class Sweep:
    """What is known of a sweep.

    Attributes:
        name: its directory's name, or what ``sweep.json`` says.
        directory: where its runs lie.
        about: the contents of ``sweep.json``; empty for an ad-hoc multirun.
        problem: why ``sweep.json`` could not be read, if it could not.
    """

    name: str
    directory: Path
    about: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Sweep:
        """Itself: pandas copies the ``attrs`` of a frame with every column that it hands out."""
        return self

    @property
    def claims(self) -> list[Any]:
        """The claims as the sweep file states them."""
        stated = self.about.get("claims")
        return stated if isinstance(stated, list) else []


@dataclass(frozen=True)
class Found:
    """A run directory and the sweep that it belongs to (the sweep's directory)."""

    directory: Path
    sweep: Path


def find(paths: Iterable[str | os.PathLike[str]]) -> tuple[list[Found], list[LeftOut]]:
    """All run directories under some paths, each once, in the order of their names.

    Args:
        paths: run directories, sweep directories, or directories of these.

    Raises:
        ResultsError: a path that does not exist or is no directory.
    """
    runs: dict[str, Found] = {}
    left: dict[str, LeftOut] = {}
    for path in paths:
        root = Path(path)
        if not root.is_dir():
            raise ResultsError(f"{root}: there is no such directory")
        for item in _walk(root, _marked(root.resolve().parent)):
            if isinstance(item, Found):
                runs.setdefault(os.path.realpath(item.directory), item)
            else:
                left.setdefault(os.path.realpath(item.directory), item)
    return list(runs.values()), list(left.values())


def _marked(directory: Path) -> Path | None:
    """The directory, if it says that it holds a sweep."""
    files = (SWEEP_FILE, MULTIRUN_FILE)
    return directory if any((directory / name).is_file() for name in files) else None


def _walk(directory: Path, sweep: Path | None) -> Iterator[Found | LeftOut]:
    """Everything under a directory; ``sweep`` is the nearest one above that holds a sweep."""
    try:
        entries = sorted(os.scandir(directory), key=lambda entry: _natural(entry.name))
    except OSError as error:
        yield LeftOut(str(directory), f"cannot be listed: {error.strerror or error}")
        return
    files = {entry.name for entry in entries if entry.is_file()}
    if RUN_FILE in files:
        yield Found(directory, sweep or directory.parent)
        return
    folders = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    if files & {SWEEP_FILE, MULTIRUN_FILE}:
        sweep = directory
    elif METRICS_FILE in files or ".hydra" in folders:
        yield LeftOut(str(directory), f"no {RUN_FILE}: the run died before its record began")
        return
    for name in folders:
        if not name.startswith(".") and name not in OURS:
            yield from _walk(directory / name, sweep)


def _natural(name: str) -> tuple[int, int, str]:
    """``10`` after ``9``: Hydra numbers the cells of a sweep."""
    return (0, int(name), name) if name.isdecimal() else (1, 0, name)


def describe(directory: Path) -> Sweep:
    """What the directory of a sweep says of it."""
    sweep = Sweep(directory.resolve().name, directory)
    file = directory / SWEEP_FILE
    if not file.is_file():
        return sweep
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        sweep.problem = f"{SWEEP_FILE} cannot be read: {error}"
        return sweep
    if not isinstance(about, dict):
        sweep.problem = f"{SWEEP_FILE} is not an object"
        return sweep
    sweep.about = about
    sweep.name = str(about.get("name") or sweep.name)
    return sweep
