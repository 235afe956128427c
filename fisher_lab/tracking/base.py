"""The interface of a sink, the sink that does nothing, and the wrapper that no failure passes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """What a sink takes. Calls come in this order: start, any of the others, finish."""

    def start(self, run_id: str, config: Mapping[str, Any], directory: Path) -> None:
        """Begin.

        Args:
            run_id: the run's identity.
            config: the resolved configuration.
            directory: the run directory, under which the sink may keep files of its own.
        """
        ...

    def log(self, values: Mapping[str, float | None], step: int | None = None) -> None:
        """Numbers at a step of the run."""
        ...

    def summary(self, values: Mapping[str, float | None]) -> None:
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

    def start(self, run_id: str, config: Mapping[str, Any], directory: Path) -> None:
        """Nothing."""

    def log(self, values: Mapping[str, float | None], step: int | None = None) -> None:
        """Nothing."""

    def summary(self, values: Mapping[str, float | None]) -> None:
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
    """Hands every call on; after the first one that raises, warns once and hands on no more.

    Args:
        inner: the sink.
    """

    def __init__(self, inner: Tracker) -> None:
        self._inner: Tracker | None = inner

    def start(self, run_id: str, config: Mapping[str, Any], directory: Path) -> None:
        """Begin; see :class:`Tracker`."""
        self._try(lambda sink: sink.start(run_id, config, directory))

    def log(self, values: Mapping[str, float | None], step: int | None = None) -> None:
        """Numbers at a step; see :class:`Tracker`."""
        self._try(lambda sink: sink.log(values, step))

    def summary(self, values: Mapping[str, float | None]) -> None:
        """Numbers of the whole run; see :class:`Tracker`."""
        self._try(lambda sink: sink.summary(values))

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """A table; see :class:`Tracker`."""
        self._try(lambda sink: sink.table(name, rows))

    def image(self, name: str, path: Path) -> None:
        """A picture; see :class:`Tracker`."""
        self._try(lambda sink: sink.image(name, path))

    def artifact(self, name: str, path: Path, kind: str) -> None:
        """A file or directory; see :class:`Tracker`."""
        self._try(lambda sink: sink.artifact(name, path, kind))

    def finish(self, status: str) -> None:
        """End; see :class:`Tracker`."""
        self._try(lambda sink: sink.finish(status))

    def _try(self, call: Callable[[Tracker], None]) -> None:
        if self._inner is None:
            return
        try:
            call(self._inner)
        except Exception as error:
            name = type(self._inner).__name__
            self._inner = None
            log.warning("the tracker %s failed and is left out from here on: %s", name, error)
            log.info("how the tracker failed", exc_info=error)
