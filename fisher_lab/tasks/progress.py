"""Progress bars on standard error: on a terminal only, and only where they were asked for."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

Item = TypeVar("Item")


class Progress:
    """Bars for what takes over a second.

    Args:
        enabled: what ``progress`` in the configuration says; off anyway where standard error is
            not a terminal.
        console: for tests; by default standard error.
    """

    def __init__(self, enabled: bool = True, *, console: Console | None = None) -> None:
        self._console = console or Console(file=sys.stderr, markup=False)
        self.enabled = enabled and self._console.is_terminal

    def track(
        self, iterable: Iterable[Item], label: str, total: int | None = None
    ) -> Iterator[Item]:
        """Hand on the items of an iterable and show how far it is.

        Args:
            iterable: the items.
            label: what is done, in a few words.
            total: how many items there are, where the iterable has no length.
        """
        if not self.enabled:
            yield from iterable
            return
        with self._bar() as bar:
            yield from bar.track(iterable, total, description=label)

    @contextlib.contextmanager
    def step(self, label: str) -> Iterator[None]:
        """Show that one thing without countable parts is being done."""
        if not self.enabled:
            yield
            return
        with self._bar() as bar:
            bar.add_task(label, total=None)
            yield

    def _bar(self) -> RichProgress:
        return RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
