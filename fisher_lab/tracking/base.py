"""The interface of a sink, and the loop over all sinks that no failure passes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import override

log = logging.getLogger(__name__)

Numbers = Mapping[str, float | None]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Start:
    """What a sink gets when a run begins.

    Attributes:
        run_id: the run's identity: the same for every repeat of the run.
        tracker_id: the run's name in the trackers: every repeat has its own, and a run that is
            resumed in its directory keeps it (:func:`fisher_lab.tracking.send.name_of`).
        attempt: how often this directory has been started, from 1.
        config: the resolved configuration, nested as in the YAML.
        directory: where a sink may keep files of its own; it need not exist.
        name: for people: the overrides.
        cell: the overrides without the seed: runs that differ only in the seed share it.
        group: the sweep that the run belongs to, or None.
        job_type: the task.
        tags: from the configuration.
    """

    run_id: str
    tracker_id: str
    attempt: int
    config: Mapping[str, Any]
    directory: Path
    name: str = ""
    cell: str = ""
    group: str | None = None
    job_type: str = ""
    tags: Sequence[str] = ()


class Tracker:
    """What a sink does: ``start`` is called first and ``finish`` last. This one sends nothing."""

    def start(self, start: Start) -> None:
        """Begin a run."""
        self._call("start", start)

    def log(self, values: Numbers, step: int | None = None) -> None:
        """Take numbers at a step of the run; None stands for a number that is not finite."""
        self._call("log", values, step)

    def summary(self, values: Numbers) -> None:
        """Take numbers that describe the whole run."""
        self._call("summary", values)

    def table(self, name: str, rows: Sequence[Row]) -> None:
        """Take a table, one mapping per row."""
        self._call("table", name, rows)

    def image(self, name: str, path: Path) -> None:
        """Take a picture from a file."""
        self._call("image", name, path)

    def artifact(self, name: str, path: Path, kind: str) -> None:
        """Keep a file or a directory."""
        self._call("artifact", name, path, kind)

    def finish(self, status: str) -> None:
        """End the run with its status."""
        self._call("finish", status)

    def _call(self, name: str, *arguments: object) -> None:
        """Where every method that a subclass does not override ends up."""


class Guarded(Tracker):
    """Hands every call to all sinks; one that raises is dropped with a warning.

    Args:
        sinks: the sinks.
    """

    def __init__(self, *sinks: Tracker) -> None:
        self.sinks = list(sinks)

    @override
    def _call(self, name: str, *arguments: object) -> None:
        for sink in list(self.sinks):
            try:
                getattr(sink, name)(*arguments)
            except Exception as error:
                self.sinks.remove(sink)
                kind = getattr(sink, "name", type(sink).__name__)
                log.warning("the tracker %s failed and is not used any more: %s", kind, error)
                log.info("traceback of the tracker's failure", exc_info=error)
