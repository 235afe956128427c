"""Cells whose times are compared: the order in which they run, and those that run once more.

Drift of the machine falls on every setting alike where the settings of a seed run one after the
other, and the next seed has them the other way round (A B, B A). Where other processes took more of
the machine from one of them than from another, all of that seed are run again. What decides is the
load, which does not know of the times; what was measured first is kept in ``.sweep/repeated``.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fisher_lab.results.values import same
from fisher_lab.runs import record
from fisher_lab.runs.status import Status
from fisher_lab.sweeps.cell import LOCK_TIMEOUT_S, Cell

APART = 0.2
"""Processors by which the loads of cells of one seed may differ."""
MOST = 2
"""How often a seed is run again in one launch."""

Pair = tuple[Path, int]
"""Directory of a sweep, and a seed: the cells that are compared with each other."""


def interleaved(cells: Iterable[Cell]) -> list[Cell]:
    """The cells by seed, those of every second seed in reverse order."""
    by_seed = sorted(cells, key=lambda cell: cell.config.seed)
    found: list[Cell] = []
    for i, (_, group) in enumerate(itertools.groupby(by_seed, lambda cell: cell.config.seed)):
        found += list(group)[:: -1 if i % 2 else 1]
    return found


def controls(cells: Iterable[Cell], claims: Iterable[Any]) -> list[Cell]:
    """The cells ``a`` of claims about times once more: each is compared with itself."""
    faster = [one for one in claims if isinstance(one, Mapping) and one.get("type") == "faster"]
    return [
        replace(cell, layout=cell.layout.controls)
        for cell in cells
        if any(_is_about(cell, one) for one in faster)
    ]


def _is_about(cell: Cell, claim: Mapping[str, Any]) -> bool:
    parts = [part for key in ("where", "a") if isinstance(part := claim.get(key), Mapping)]
    wanted = {name: value for part in parts for name, value in part.items()}
    return all(_has(cell, str(name), value) for name, value in wanted.items())


def _has(cell: Cell, name: str, wanted: Any) -> bool:
    """Whether a setting of a cell is one of some values."""
    found: Any = asdict(cell.config)
    for part in name.replace("/", ".").split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    values = wanted if isinstance(wanted, list | tuple) else [wanted]
    return any(same(cell.axes.get(name, found), value) for value in values)


class Pairs:
    """The cells of a launch that run alone, by sweep and seed.

    Args:
        cells: of the launch; others than those that run alone are passed over.
    """

    def __init__(self, cells: Iterable[Cell]) -> None:
        self._cells: dict[Pair, list[Cell]] = {}
        for cell in cells:
            if cell.alone:
                self._cells.setdefault(_pair(cell), []).append(cell)
        self._left = {pair: set(group) for pair, group in self._cells.items()}
        self._repeated: Counter[Pair] = Counter()

    def ended(self, cell: Cell) -> tuple[list[Cell], str]:
        """Note that a cell has ended; those that are to run again, and why."""
        pair = _pair(cell)
        if pair not in self._left:
            return [], ""
        self._left[pair].discard(cell)
        group = self._cells[pair]
        if self._left[pair] or self._repeated[pair] >= MOST:
            return [], ""
        loads = [load for one in group if (load := load_of(one)) is not None]
        if len(loads) < len(group) or max(loads) - min(loads) <= APART:
            return [], ""
        if not all(list(map(_set_aside, group))):
            return [], ""
        self._repeated[pair] += 1
        self._left[pair] = set(group)
        words = f"other processes took {min(loads):.2f} to {max(loads):.2f} processors"
        return group[::-1], f"seed {pair[1]} is run again: {words}"


def _pair(cell: Cell) -> Pair:
    return cell.layout.sweep, cell.config.seed


def load_of(cell: Cell) -> float | None:
    """Processors that were busy with other processes while a completed cell ran."""
    if record.status_of(cell.directory) is not Status.COMPLETED:
        return None
    found = record.read(cell.directory)["provenance"].get("load")
    return None if found is None else float(found["others"])


def _set_aside(cell: Cell) -> bool:
    """Move the run directory of a cell away; false where another launcher has it."""
    lock = cell.lock
    if not lock.acquire_within(LOCK_TIMEOUT_S):
        return False
    with lock:
        folder = cell.layout.repeated
        folder.mkdir(parents=True, exist_ok=True)
        number = sum(1 for _ in folder.glob(f"{cell.run_id}-*")) + 1
        kept = folder / f"{cell.run_id}-{number}"
        load = load_of(cell)
        os.rename(cell.directory, kept)
        cell.layout.journal.append("repeated", run_id=cell.run_id, others=load, kept=kept.name)
    return True
