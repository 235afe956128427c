"""Run directories as data frames: one row per run, or one row per line of the runs' tables.

A directory that cannot be read is left out and named with the reason, never silently.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import shlex
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd

from fisher_lab.results.values import ResultsError, Shared, column
from fisher_lab.runs import atomic, identity
from fisher_lab.runs.provenance import code_of
from fisher_lab.runs.record import METRICS_FILE, RUN_FILE, SCHEMA, headline
from fisher_lab.runs.status import Status

SWEEP_FILE = "sweep.json"
MULTIRUN_FILE = "multirun.yaml"
Paths = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]

MOST_DEEP = 32
"""How many directories below the one that is named runs are looked for."""

CONTROLS = "controls"
"""The directory beside the runs of a sweep in which some of its cells lie once more."""

WRITTEN_HERE = ("figures", CONTROLS)
"""Directories beside the runs of a sweep that hold none of its runs."""


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
        about: the contents of ``sweep.json``; empty for a plain multirun.
        problem: why ``sweep.json`` could not be read, if it could not.
    """

    name: str
    directory: Path
    about: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Sweep:
        """Itself: pandas copies the ``attrs`` of a frame with every column that it returns."""
        return self

    @property
    def axes(self) -> list[str]:
        """The swept keys, in order."""
        axes = self.about.get("axes")
        return [str(name) for name in axes] if isinstance(axes, dict | list) else []

    @property
    def claims(self) -> list[Any]:
        """The claims as the sweep file states them."""
        stated = self.about.get("claims")
        return stated if isinstance(stated, list) else []

    @property
    def design(self) -> Any:
        """The design of the claims that state none, as the sweep file has it."""
        return self.about.get("design") or {}

    @property
    def cells(self) -> dict[str, dict[str, Any]]:
        """``run_id`` -> what ``sweep.json`` says of a cell: its overrides and settings."""
        cells = [c for c in self.about.get("cells") or [] if isinstance(c, dict)]
        return {c["run_id"]: c for c in cells if atomic.is_name(c.get("run_id"))}


@dataclass(frozen=True)
class Found:
    """A run directory and the sweep that it belongs to (the sweep's directory)."""

    directory: Path
    sweep: Path


def find(paths: Paths) -> tuple[list[Found], list[LeftOut]]:
    """All run directories under some paths, each once, in the order of their names.

    Args:
        paths: run directories, sweep directories, or directories of these.

    Returns:
        The runs, and the directories that should hold one and do not.

    Raises:
        ResultsError: a path that does not exist or is no directory.
    """
    runs: dict[str, Found] = {}
    left: dict[str, LeftOut] = {}
    for root in map(Path, [paths] if isinstance(paths, str | os.PathLike) else paths):
        if not root.is_dir():
            raise ResultsError(f"{root}: there is no such directory")
        above = root.resolve().parent
        marked = any((above / name).is_file() for name in (SWEEP_FILE, MULTIRUN_FILE))
        for item in _walk(root, above if marked else None):
            if isinstance(item, Found):
                runs.setdefault(os.path.realpath(item.directory), item)
            else:
                left.setdefault(os.path.realpath(item.directory), item)
    return list(runs.values()), list(left.values())


def controls_of(sweeps: Iterable[Path]) -> list[Found]:
    """The controls of some sweeps: cells that are compared with themselves."""
    folders = [sweep / CONTROLS for sweep in sweeps if (sweep / CONTROLS).is_dir()]
    return find(folders)[0]


def _walk(directory: Path, sweep: Path | None, depth: int = 0) -> Iterator[Found | LeftOut]:
    """Everything under a directory; ``sweep`` is the nearest one above that holds a sweep."""
    if depth > MOST_DEEP:
        yield LeftOut(str(directory), f"more than {MOST_DEEP} directories deep")
        return
    try:
        entries = sorted(os.scandir(directory), key=_natural)
    except OSError as error:
        yield LeftOut(str(directory), f"cannot be listed: {error.strerror or error}")
        return
    files = {entry.name for entry in entries if not entry.is_dir(follow_symlinks=False)}
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
        if not name.startswith(".") and name not in WRITTEN_HERE:
            yield from _walk(directory / name, sweep, depth + 1)


def _natural(entry: os.DirEntry[str]) -> tuple[int, int, str]:
    """``10`` after ``9``: Hydra numbers the cells of a sweep."""
    return (0, int(entry.name), entry.name) if entry.name.isdecimal() else (1, 0, entry.name)


LAYERS_FILE = "layers.csv"

META = (
    "sweep", "directory", "run_id", "status", "reason", "started", "finished", "seconds",
    "overrides", "not_finite",
)  # fmt: skip
"""Columns that every frame has. ``seconds`` is the wall time of the run, ``overrides`` are quoted
for a shell, ``not_finite`` names the metrics that are NaN or infinite."""

Run = dict[str, dict[str, Any]]
Row = tuple[Found, Run]


def load(paths: Paths, *, use_cache: bool | None = None) -> pd.DataFrame:
    """Read run directories, one row per run.

    Args:
        paths: a run, a sweep, a directory of sweeps, or several of these.
        use_cache: without effect, and gone in the next release.

    Returns:
        Columns: :data:`META`; the resolved configuration, such as ``kfac.damping``; the metrics,
        such as ``ng/norm`` (``metric/`` stands before a name that is taken); ``provenance.*``. A
        cell of a sweep that was never run is a row with the status ``missing``. The frame's
        ``attrs`` hold ``config`` and ``metrics``, the names of these columns; ``sweeps``: directory
        to :class:`Sweep`; ``left_out``: a list of :class:`LeftOut`; ``paths``: what was read.

    Raises:
        ResultsError: a path that does not exist.
    """
    paths = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    if use_cache is not None:
        what = "use_cache: without effect; nothing is cached any more"
        warnings.warn(what, DeprecationWarning, stacklevel=2)
    found, left = find(paths)
    sweeps = _sweeps(found)
    left += [LeftOut(d, s.problem) for d, s in sweeps.items() if s.problem]
    rows: list[Row] = []
    for one in found:
        try:
            rows.append((one, read_run(one.directory)))
        except ResultsError as error:
            left.append(LeftOut(str(one.directory), str(error)))
        except (TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
            why = f"{RUN_FILE}: not the record of a run ({type(error).__name__})"
            left.append(LeftOut(str(one.directory), why))
    frame = _frame([*rows, *_not_run(rows, sweeps)], sweeps)
    frame.attrs.update(left_out=Shared(left), sweeps=sweeps, paths=Shared(map(str, paths)))
    return frame


def _sweeps(found: Iterable[Found]) -> dict[str, Sweep]:
    """The sweeps of some runs, by their directories, with what ``sweep.json`` says of them."""
    sweeps = {}
    for directory in {one.sweep: None for one in found}:
        sweep = Sweep(directory.resolve().name, directory)
        try:
            sweep.about = atomic.read_object(directory / SWEEP_FILE)
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            sweep.problem = f"{SWEEP_FILE} cannot be read: {error}"
        sweep.name = str(sweep.about.get("name") or sweep.name)
        sweeps[str(directory)] = sweep
    return sweeps


def load_layers(paths: Paths) -> pd.DataFrame:
    """Read ``layers.csv`` of every run, one row per layer and run; see :func:`load_table`."""
    return load_table(paths, LAYERS_FILE)


def load_table(paths: Paths, name: str) -> pd.DataFrame:
    """Read one of the runs' tables, such as ``curve.csv``: one row per line and run.

    Args:
        paths: as for :func:`load`.
        name: the file's name in the run directory. Runs without it have no rows.

    Returns:
        Columns ``sweep``, ``directory``, ``run_id``, ``status``, the position ``row`` in the file,
        and those of the files; numbers as numbers. ``attrs["left_out"]`` as for :func:`load`.
    """
    found, left = find(paths)
    names = {directory: sweep.name for directory, sweep in _sweeps(found).items()}
    rows: list[dict[str, Any]] = []
    for one in found:
        file = one.directory / name
        try:
            record = atomic.read_object(one.directory / RUN_FILE)
            about = {"sweep": names[str(one.sweep)], "directory": str(one.directory)}
            about |= {key: record.get(key) for key in ("run_id", "status")}
            rows += [{**about, **row} for row in _csv(file)] if file.is_file() else []
        except (OSError, ValueError, csv.Error) as error:
            left.append(LeftOut(str(one.directory), f"{name}: {error}"))
    frame = pd.DataFrame(rows)
    for name in frame.columns:
        frame[name] = _numbers(column(frame, name))
    frame.attrs["left_out"] = left
    return frame


def read_run(directory: Path) -> dict[str, dict[str, Any]]:
    """The run of a directory as plain values: ``meta``, ``config``, ``metrics``, ``provenance``.

    Each is flat.

    Raises:
        ResultsError: ``run.json`` is not there, or is not the record of a run.
    """
    record = _record(directory)
    error = record.get("error")
    reason = headline({"type": "", "message": "", **error}) if error else record.get("reason")
    meta = {
        "run_id": record["run_id"],
        "status": record["status"],
        "reason": reason,
        "started": record.get("started"),
        "finished": record.get("finished"),
        "seconds": _seconds(record.get("started"), record.get("finished")),
        "overrides": shlex.join(map(str, record.get("overrides") or [])),
    }
    numbers: dict[str, float] = {}
    try:
        numbers = _metrics(directory / METRICS_FILE)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as problem:
        if record["status"] == Status.COMPLETED:
            meta |= {"status": Status.CORRUPT, "reason": f"{METRICS_FILE}: {problem}"}
    meta["not_finite"] = " ".join(n for n, v in numbers.items() if not math.isfinite(v))
    finite = {n: v if math.isfinite(v) else math.nan for n, v in numbers.items()}
    return {
        "meta": meta,
        "config": identity.in_present_words(_flat(record["config"])),
        "metrics": finite,
        "provenance": _provenance(record.get("provenance")),
    }


def _provenance(recorded: Any) -> dict[str, Any]:
    known = recorded if isinstance(recorded, dict) else {}
    code = code_of(known)
    return _flat({**known, "code": code} if code else known, "provenance.")


# ---- one run -------------------------------------------------------------------------------------


def _record(directory: Path) -> dict[str, Any]:
    try:
        record = atomic.read_object(directory / RUN_FILE)
    except OSError as error:
        raise ResultsError(f"{RUN_FILE} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ResultsError(f"{RUN_FILE}: {error}") from error
    if record.get("schema") != SCHEMA:
        raise ResultsError(f"{RUN_FILE}: schema {record.get('schema')!r} is not one of {SCHEMA}")
    if record.get("status") not in [one for one in Status if one.is_recorded]:
        raise ResultsError(f"{RUN_FILE}: there is no status {record.get('status')!r}")
    if not isinstance(record.get("config"), dict) or not isinstance(record.get("run_id"), str):
        raise ResultsError(f"{RUN_FILE}: no configuration or no run_id")
    return record


def _metrics(path: Path) -> dict[str, float]:
    """Names to numbers. The record writes what is not finite as null."""
    values = {k: math.nan if v is None else v for k, v in atomic.read_object(path).items()}
    for name, value in values.items():
        if not isinstance(value, int | float):
            raise ValueError(f"{name} is not a number")
    try:
        return {name: float(value) for name, value in values.items()}
    except OverflowError as error:
        raise ValueError("a number is too large") from error


def _csv(path: Path) -> list[dict[str, Any]]:
    lines = list(csv.reader(io.StringIO(atomic.read_text(path), newline="")))
    if not lines:
        return []
    for number, line in enumerate(lines[1:], 2):
        if len(line) != len(lines[0]):
            raise ValueError(f"line {number} has {len(line)} fields, the first {len(lines[0])}")
    return [
        {"row": i, **dict(zip(lines[0], line, strict=True))} for i, line in enumerate(lines[1:])
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            flat.update(_flat(value, f"{prefix}{name}."))
        elif isinstance(value, list | dict):
            flat[f"{prefix}{name}"] = json.dumps(value, ensure_ascii=False)
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _seconds(started: Any, finished: Any) -> float | None:
    try:
        between = datetime.fromisoformat(finished) - datetime.fromisoformat(started)
    except (TypeError, ValueError):
        return None
    return between.total_seconds()


# ---- all of them ---------------------------------------------------------------------------------


def _not_run(rows: Sequence[Row], sweeps: Mapping[str, Sweep]) -> list[Row]:
    """The cells that ``sweep.json`` lists and that have left no record that can be read.

    A record without a configuration (of a cell that died early) gets that of its cell.
    """
    added: list[Row] = []
    for sweep in sweeps.values():
        mine = {r["meta"]["run_id"]: r for one, r in rows if one.sweep == sweep.directory}
        for name, cell in sweep.cells.items():
            if name in mine and mine[name]["config"]:
                continue
            shared = sweep.about.get("settings") or {}
            config = _flat({**shared, **(cell.get("settings") or {})})
            if name in mine:
                mine[name]["config"] = config
                continue
            found = Found(sweep.directory / name, sweep.directory)
            unread = (found.directory / RUN_FILE).exists()
            meta = {
                "run_id": name,
                "status": Status.CORRUPT if unread else Status.MISSING,
                "reason": "its record cannot be read" if unread else "it has not been run",
                "not_finite": "",
                "overrides": shlex.join(map(str, cell.get("overrides") or [])),
            }
            added.append((found, {"meta": meta, "config": config, "metrics": {}, "provenance": {}}))
    return added


def _frame(rows: Sequence[Row], sweeps: Mapping[str, Sweep]) -> pd.DataFrame:
    settings = dict.fromkeys(name for _, run in rows for name in run["config"])
    metrics = {
        name: f"metric/{name}" if name in META or name in settings else name
        for _, run in rows
        for name in run["metrics"]
    }
    # Runs of an earlier version lack keys that came later, and were made with what these are now.
    known = {name: later for name in settings if (later := identity.before(name)) is not None}
    lines = []
    for found, run in rows:
        about = {"sweep": sweeps[str(found.sweep)].name, "directory": str(found.directory)}
        lost = " ".join(metrics[name] for name in (run["meta"]["not_finite"] or "").split())
        numbers = {metrics[name]: value for name, value in run["metrics"].items()}
        lines.append(
            {
                **(known if run["config"] else {}),
                **run["config"],
                **numbers,
                **run["provenance"],
                **run["meta"],
                **about,
            }
            | {"not_finite": lost}
        )
    provenance = dict.fromkeys(name for _, run in rows for name in run["provenance"])
    measured = {"seconds", *metrics.values()}
    frame = pd.DataFrame(
        {
            name: _column([line.get(name) for line in lines], name in measured)
            for name in (*META, *settings, *metrics.values(), *provenance)
        }
    )
    frame.attrs.update(config=Shared(settings), metrics=Shared(metrics.values()))
    return frame


def _column(values: list[Any], measured: bool) -> pd.Series:
    """Numbers as numbers; a setting that is null here and a number there keeps its null."""
    if measured:
        return pd.Series(values, dtype=float)
    kinds = set(map(type, values))
    if kinds and kinds <= {int, float}:
        return pd.Series(values)
    return pd.Series(values, dtype=bool if kinds == {bool} else object)


def _numbers(texts: pd.Series) -> pd.Series:
    """A column of texts as numbers, where all of them are (an empty one is missing)."""
    if texts.dtype.kind in "fiub":
        return texts
    bare = texts.replace("", None)
    try:
        return pd.Series(pd.to_numeric(bare))
    except (ValueError, TypeError):
        return bare
