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
    from fisher_lab.results.axes import Axes, find_axes
    from fisher_lab.results.claims import evaluate
    from fisher_lab.results.commands import diff
    from fisher_lab.results.finishing import at_end, finish
    from fisher_lab.results.loading import load, load_layers, load_table
    from fisher_lab.results.report import write_report
    from fisher_lab.results.table import Table, tabulate

_MODULES = {
    "load": "loading",
    "load_layers": "loading",
    "load_table": "loading",
    "Axes": "axes",
    "find_axes": "axes",
    "Table": "table",
    "tabulate": "table",
    "evaluate": "claims",
    "finish": "finishing",
    "at_end": "finishing",
    "write_report": "report",
    "diff": "commands",
}
__all__ = [
    "load",
    "load_layers",
    "load_table",
    "Axes",
    "find_axes",
    "Table",
    "tabulate",
    "evaluate",
    "finish",
    "at_end",
    "write_report",
    "diff",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
