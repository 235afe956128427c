"""From run directories to tables, tested claims, figures and one report.

    from fisher_lab import results

    frame = results.load("results/damping")
    table = results.tabulate(frame, metrics=["kfac/total_s"])

Nothing here imports torch. The names below are imported when they are first used, so that a command
which needs one of them does not wait for the others.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fisher_lab.results.claims import evaluate as evaluate
    from fisher_lab.results.commands import diff as diff
    from fisher_lab.results.finishing import at_end as at_end
    from fisher_lab.results.finishing import finish as finish
    from fisher_lab.results.loading import load as load
    from fisher_lab.results.loading import load_layers as load_layers
    from fisher_lab.results.loading import load_table as load_table
    from fisher_lab.results.report import write_report as write_report
    from fisher_lab.results.table import Table as Table
    from fisher_lab.results.table import tabulate as tabulate
    from fisher_lab.results.values import Axes as Axes
    from fisher_lab.results.values import SweptSettings as SweptSettings
    from fisher_lab.results.values import find_axes as find_axes

_NAMES = {
    "claims": ("evaluate",),
    "commands": ("diff",),
    "finishing": ("at_end", "finish"),
    "loading": ("load", "load_layers", "load_table"),
    "report": ("write_report",),
    "table": ("Table", "tabulate"),
    "values": ("Axes", "SweptSettings", "find_axes"),
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}
__all__ = [*_MODULES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
