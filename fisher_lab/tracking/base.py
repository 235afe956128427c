"""The interface of a sink, the sink that does nothing, and the wrapper that no failure passes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

log = logging.getLogger(__name__)

Numbers = Mapping[str, float | None]


@dataclass(frozen=True)
class Start:
    """What a sink is told when a run begins.

    Attributes:
        run_id: the run's identity: the same for every repeat of the run.
        tracker_id: the run's name towards sinks: its own for every repeat, the same when it goes
            on in its directory (`identity.py`).
        attempt: how often this directory has been started, from 1.
        config: the resolved configuration, nested as in the YAML.
        directory: where a sink may keep files of its own; it need not exist.
        name: for people: the overrides.
        cell: what runs that differ in nothing but the seed have in common: the other overrides.
        group: the sweep that the run belongs to, or None.
        job_type: the task.
        tags: of the configuration.
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
    tags: Sequence[str] = field(default_factory=tuple)


class Say(Protocol):
    """Tells the run something from the process of a sink."""

    def __call__(self, text: str, *, warning: bool = False) -> None:
        """A line for the run's log.

        Args:
            text: the line.
            warning: whether it says that something went wrong.
        """
        ...


class Tracker(Protocol):
    """What a sink takes. Calls come in this order: start, any of the others, finish."""

    def start(self, start: Start) -> None:
        """Begin."""
        ...

    def log(self, values: Numbers, step: int | None = None) -> None:
        """Numbers at a step of the run; None stands for a number that is not finite."""
        ...

    def summary(self, values: Numbers) -> None:
        """Numbers of the whole run."""
        ...

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """A table, one mapping a row."""
        ...

    def image(self, name: str, path: Path) -> None:
        """A picture that lies in a file."""
        ...

    def artifact(self, name: str, path: Path, kind: str) -> None:
        """A file or directory to keep."""
        ...

    def finish(self, status: str) -> None:
        """End, with the status of the run."""
        ...


class NoTracker:
    """Sends nothing anywhere."""

    def start(self, start: Start) -> None:
        """Nothing."""

    def log(self, values: Numbers, step: int | None = None) -> None:
        """Nothing."""

    def summary(self, values: Numbers) -> None:
        """Nothing."""

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Nothing."""

    def image(self, name: str, path: Path) -> None:
        """Nothing."""

    def artifact(self, name: str, path: Path, kind: str) -> None:
        """Nothing."""

    def finish(self, status: str) -> None:
        """Nothing."""


class Guarded:
    """Hands every call on to all sinks; one that raises is warned of once and left out.

    Args:
        sinks: the sinks; with none of them nothing is sent anywhere.
    """

    def __init__(self, *sinks: Tracker) -> None:
        self._sinks: list[Tracker] = list(sinks)

    def start(self, start: Start) -> None:
        """Begin; see :class:`Tracker`."""
        self._each(lambda sink: sink.start(start))

    def log(self, values: Numbers, step: int | None = None) -> None:
        """Numbers at a step; see :class:`Tracker`."""
        self._each(lambda sink: sink.log(values, step))

    def summary(self, values: Numbers) -> None:
        """Numbers of the whole run; see :class:`Tracker`."""
        self._each(lambda sink: sink.summary(values))

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """A table; see :class:`Tracker`."""
        self._each(lambda sink: sink.table(name, rows))

    def image(self, name: str, path: Path) -> None:
        """A picture; see :class:`Tracker`."""
        self._each(lambda sink: sink.image(name, path))

    def artifact(self, name: str, path: Path, kind: str) -> None:
        """A file or directory; see :class:`Tracker`."""
        self._each(lambda sink: sink.artifact(name, path, kind))

    def finish(self, status: str) -> None:
        """End; see :class:`Tracker`."""
        self._each(lambda sink: sink.finish(status))

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for sink in list(self._sinks):
            try:
                call(sink)
            except Exception as error:
                self._sinks.remove(sink)
                name = getattr(sink, "name", type(sink).__name__)
                log.warning("the tracker %s failed and is left out from here on: %s", name, error)
                log.info("how the tracker failed", exc_info=error)
