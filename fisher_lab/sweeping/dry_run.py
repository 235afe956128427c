"""``sweep.dry_run=true``: the table of what would be done, and what it would take."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from fisher_lab.config.schema import Config

from . import plan
from .cell import Cell
from .plan import SweepPlan

OK, BAD_INPUT = 0, 2
WIDTH = 100
_WORDS = {"missing": "to run", "interrupted": "to run (interrupted)"}


def show(plans: Sequence[SweepPlan]) -> int:
    """Print every cell with its state; returns 2 where a cell cannot run, else 0."""
    console = Console(file=sys.stdout, highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console = Console(file=sys.stdout, highlight=False, width=WIDTH)
    memory = _Memory()
    counted: Counter[str] = Counter()
    for one in plans:
        console.print(_table(one, memory, counted))
        if one.repeated:
            console.print(f"{one.repeated} cells are the same as another one and run once")
    counts = ", ".join(f"{number} {state}" for state, number in sorted(counted.items()))
    console.print(f"{sum(counted.values())} cells: {counts}")
    for one in plans:
        for cell in one.invalid:
            print(f"fisher_lab: {cell.reason}", file=sys.stderr)
    return BAD_INPUT if any(one.invalid for one in plans) else OK


def _table(one: SweepPlan, memory: _Memory, counted: Counter[str]) -> Table:
    table = Table(title=f"{one.name}: {one.layout.directory}", title_justify="left", box=None)
    for axis in one.axes:
        table.add_column(axis, overflow="fold")
    table.add_column("state", no_wrap=True)
    table.add_column("factors, MiB", justify="right", no_wrap=True)
    wanted, states = plan.to_run(one.cells)
    for cell in one.cells:
        state = states[cell.directory]
        state = f"{state}, to run" if _again(cell, state, wanted) else _WORDS.get(state, state)
        counted[state] += 1
        table.add_row(*(cell.axes.get(axis, "") for axis in one.axes), state, memory(cell.config))
    for bad in one.invalid:
        counted["invalid"] += 1
        table.add_row(*(bad.axes.get(axis, "") for axis in one.axes), "invalid", "")
    return table


def _again(cell: Cell, state: str, wanted: Sequence[Cell]) -> bool:
    return state in ("failed", "preempted", "cancelled") and cell in wanted


class _Memory:
    """The plan's estimate of the factors' memory; once for cells that differ in nothing else."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}

    def __call__(self, config: Config) -> str:
        if config.task.name == "train":
            return ""
        plain = dataclasses.asdict(config)
        for key in ("seed", "sweep", "resume", "tracker"):
            plain.pop(key, None)
        for key in ("damping", "damping_A", "damping_G", "max_condition_number", "update_freq"):
            plain["kfac"].pop(key, None)
        key = json.dumps(plain, sort_keys=True)
        if key not in self._known:
            self._known[key] = _estimate(config)
        return self._known[key]


def _estimate(config: Config) -> str:
    from fisher_lab.tasks import plan as task  # torch, for this table alone

    try:
        return f"{task.estimate(config)['plan/bytes'] / 2**20:.1f}"
    except (RuntimeError, ValueError, OSError) as error:
        return f"? ({type(error).__name__})"
