"""How a loop that takes long is shown: the caller's affair."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

Progress = Callable[[Iterable[Any], str, int | None], Iterable[Any]]
"""``progress(items, label, total)`` yields the items; how it shows them is the caller's affair."""


def no_progress(items: Iterable[Any], label: str, total: int | None) -> Iterable[Any]:
    """Shows nothing."""
    return items
