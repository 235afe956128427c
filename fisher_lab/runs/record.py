"""The run directory: ``run.json``, ``metrics.json``, tables; every file whole or not there.

JSON is strict: what is not a finite number is ``null``.
"""

from __future__ import annotations

import csv
import io
import json
import math
import traceback
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fisher_lab.runs import atomic, digests
from fisher_lab.runs.identity import run_id
from fisher_lab.runs.signals import Watch
from fisher_lab.runs.status import Status

SCHEMA = "fisher_lab.run/1"
RUN_FILE = digests.RUN_FILE
METRICS_FILE = "metrics.json"


class Run:
    """The record of one run, written as it goes. Made by :meth:`start`.

    Attributes:
        directory: where everything of the run lies.
        record: what ``run.json`` holds.
        values: all metrics so far.
        tables: the rows of every table so far, by file name.
        signals: lets a task save its state before a signal ends it (``signals.py``).
    """

    def __init__(self, directory: Path, record: dict[str, Any]) -> None:
        self.directory = directory
        self.record = record
        self.signals = Watch()
        self.values: dict[str, Any] = {}
        self.tables: dict[str, list[dict[str, Any]]] = {}

    @classmethod
    def start(
        cls,
        directory: Path,
        *,
        config: Mapping[str, Any],
        overrides: Iterable[str] = (),
        identity: Mapping[str, Any] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> Run:
        """Begin a record with the status ``running``.

        Metrics of an earlier run in the same directory are replaced by none.

        Args:
            directory: the run directory; made where it is missing.
            config: the resolved configuration.
            overrides: as typed.
            identity: content hashes of data and model, part of ``run_id``.
            provenance: from :func:`fisher_lab.runs.provenance.collect`.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        content = strict(identity or {})
        run = cls(
            directory,
            {
                "schema": SCHEMA,
                "run_id": run_id(config, content),
                "status": Status.RUNNING,
                "reason": None,
                "started": _now(),
                "finished": None,
                "config": strict(config),
                "overrides": list(overrides),
                "error": None,
                "provenance": {**strict(provenance or {}), "content": content},
            },
        )
        run._write()
        if (directory / METRICS_FILE).exists():  # replaced, as nothing can be removed under a fence
            run.metrics({})
        return run

    @property
    def run_id(self) -> str:
        """The identity of the run (``identity.py``)."""
        return self.record["run_id"]

    @property
    def status(self) -> Status:
        """How the run stands."""
        return Status(self.record["status"])

    def metrics(self, values: Mapping[str, Any]) -> None:
        """Merge numbers into ``metrics.json``.

        Args:
            values: flat name to number, such as ``kfac/total_s``; numpy and torch scalars are
                fine, non-finite numbers become null.

        Raises:
            TypeError: a value that is not one number.
        """
        for name, value in values.items():
            number = strict(value)
            if number is not None and not isinstance(number, int | float):
                raise TypeError(f"metric {name!r} must be one number, got {type(value).__name__}")
            self.values[name] = number
        atomic.write_json(self.directory / METRICS_FILE, self.values)

    def table(self, name: str, rows: Iterable[Mapping[str, Any]]) -> Path:
        """Write a CSV file; columns in the order in which they first occur.

        Args:
            name: the file's name, such as ``layers.csv``.
            rows: one mapping a row; a missing value, None and NaN are written as nothing.

        Returns:
            The file's path.
        """
        plain = [{key: strict(value) for key, value in row.items()} for row in rows]
        self.tables[name] = plain
        columns = list(dict.fromkeys(key for row in plain for key in row))
        text = io.StringIO(newline="")
        lines = [columns, *([_cell(row.get(column)) for column in columns] for row in plain)]
        csv.writer(text, lineterminator="\n").writerows(lines)
        path = self.directory / name
        atomic.write_text(path, text.getvalue())
        return path

    def note(self, **extra: Any) -> None:
        """Add to the provenance: device, threads, dtypes, what the workbench built."""
        self.record["provenance"].update(strict(extra))
        self._write()

    def complete(self) -> None:
        """End with the status ``completed``."""
        self.end(Status.COMPLETED)

    def fail(self, error: BaseException) -> None:
        """End with the status ``failed`` and the error in full."""
        self.fail_with(describe(error))

    def fail_with(self, error: Mapping[str, Any]) -> None:
        """End with the status ``failed`` and an error that :func:`describe` made elsewhere."""
        self.record["error"] = dict(error)
        self.end(Status.FAILED, headline(error))

    def amend(self, error: Mapping[str, Any]) -> None:
        """Replace the error of a run that has failed by the one that it came from."""
        self.record["error"] = dict(error)
        self._write()

    def end(self, status: str, reason: str | None = None) -> None:
        """End with any status.

        Args:
            status: one that :attr:`Status.has_ended`.
            reason: why, where the status alone does not say it.

        Raises:
            ValueError: an unknown status, or a run that has ended before.
        """
        allowed = [one for one in Status if one.has_ended]
        if status not in allowed:
            raise ValueError(f"status={status} is not allowed: one of {', '.join(allowed)}")
        if self.status is not Status.RUNNING:
            raise ValueError(f"{self.directory} has ended before, as {self.record['status']}")
        self.record.update(status=status, reason=reason, finished=_now())
        self._write()

    def _write(self) -> None:
        self.record = digests.sealed(self.directory, self.record)
        atomic.write_json(self.directory / RUN_FILE, self.record)


def describe(error: BaseException) -> dict[str, Any]:
    """An error as it stands in ``run.json``: ``type``, ``message`` and ``traceback``."""
    kind = f"{type(error).__module__}.{type(error).__qualname__}"
    return {
        "type": kind.removeprefix("builtins."),
        "message": str(error),
        "traceback": "".join(traceback.format_exception(error)),
    }


def headline(error: Mapping[str, Any]) -> str:
    """An error in one line: its type and the first line of its message."""
    lines = str(error["message"]).strip().splitlines()
    return f"{str(error['type']).rpartition('.')[2]}: {lines[0] if lines else '(no message)'}"


def brief(directory: Path) -> str:
    """Why the run of a directory failed, in one line."""
    try:
        found = read(directory)
        return headline(found["error"] or {"type": str(found["reason"]), "message": ""})
    except (OSError, ValueError, KeyError, TypeError):
        return "it left no record"


def read(directory: Path) -> dict[str, Any]:
    """The contents of ``run.json`` in a run directory."""
    return atomic.read_object(Path(directory) / RUN_FILE)


def status_of(directory: Path) -> Status | None:
    """The status in a run directory's record; None where there is no record that can be read."""
    try:
        status = Status(atomic.read_json(Path(directory) / RUN_FILE).get("status"))
    except ValueError:
        return None
    return status if status.is_recorded else None


def end_from_outside(
    directory: Path,
    status: str,
    reason: str,
    *,
    error: Mapping[str, Any] | None = None,
    otherwise: Mapping[str, Any] | None = None,
) -> None:
    """End a run whose process is gone; only for the holder of its lock.

    Args:
        directory: the run directory.
        status: what the run came to, one that :attr:`Status.has_ended`.
        reason: why.
        error: ``type``, ``message``, ``traceback`` and whatever else is known.
        otherwise: ``run_id``, ``config`` and so on, where the process left no record.
    """
    empty = {"config": {}, "overrides": [], "provenance": {}}
    found = atomic.read_json(Path(directory) / RUN_FILE) or {
        "schema": SCHEMA, "run_id": None, "started": _now(), **empty, **(otherwise or {})
    }  # fmt: skip
    found.update(status=status, reason=reason, finished=_now())
    # The error of an earlier attempt is none of a run that was cancelled or preempted.
    kept = found.get("error") if status == Status.FAILED else None
    found["error"] = kept if error is None else strict(error)
    atomic.write_json(Path(directory) / RUN_FILE, digests.sealed(Path(directory), found))


def strict(value: Any) -> Any:
    """Plain JSON values: scalars of numpy and torch become numbers, non-finite ones None."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value, key=str) if isinstance(value, set | frozenset) else value
        return [strict(item) for item in items]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        return strict(value.item())
    if hasattr(value, "tolist"):
        return strict(value.tolist())
    raise TypeError(f"{type(value).__name__} cannot be written as JSON: {value!r}")


def _cell(value: Any) -> Any:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | dict):
        return json.dumps(value, allow_nan=False, ensure_ascii=False)
    return "" if value is None else value


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
