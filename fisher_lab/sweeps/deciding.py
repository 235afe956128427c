"""``sweep.until=decided``: which cells a sweep needs next, until its claims are decided.

The looks at a claim are a function of the completed runs and of the registration
(:mod:`fisher_lab.results.looks`), so that a launcher that was killed, or two launchers together,
come to the same ones. Only the order in which seeds are run depends on how long runs take: first
those of the claim that is expected to be decided soonest.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fisher_lab.runs import record
from fisher_lab.runs.status import Status
from fisher_lab.sweeps.cell import Cell
from fisher_lab.sweeps.plan import Family, SweepPlan

if TYPE_CHECKING:
    import pandas as pd

    from fisher_lab.results.looks import Course
    from fisher_lab.results.registration import Registration


@dataclass
class Deciding:
    """The claims of one sweep, and the cells that they need.

    Attributes:
        plan: of the sweep; its cells are those that were chosen so far.
        registered: what says in which order seeds are looked at.
    """

    plan: SweepPlan
    registered: Registration
    _made: dict[tuple[Family, int], Cell] = field(default_factory=dict)
    _family_of: dict[str, Family] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Choose the cells of the first look, and those that earlier launches have run."""
        from fisher_lab.results.looks import seeds_in_order

        claims = self.plan.hypotheses()
        first = min(claim.design.first for claim in claims)
        self._seeds = seeds_in_order(
            self.registered.seeds, max(claim.design.max_seeds for claim in claims)
        )
        chosen: list[Cell] = []
        for number, seed in enumerate(self._seeds):
            cells = [self._cell(family, seed) for family in self.plan.families]
            known = cells if number < first else [c for c in cells if _is_recorded(c)]
            if not known:
                break
            chosen += known
        self.plan.choose(chosen)
        self._begun = chosen

    def wanted(self) -> list[Cell]:
        """Look at the claims, note the looks, and choose what is to be run: in this order.

        Cells that run already are among them.
        """
        from fisher_lab.results import claims, load

        frame = load(self.plan.layout.directory)
        verdicts = claims.evaluate(frame)
        claims.note_looks(self.plan.layout.directory, verdicts)
        ended = set(frame.loc[frame["status"].isin([s for s in Status if s.is_final]), "run_id"])
        seconds = _Seconds(frame, self._family_of)
        needs = [
            (verdict.course, self._needed(verdict.course, ended))
            for verdict in verdicts
            if verdict.course is not None and verdict.course.goes_on
        ]
        needs.sort(key=lambda one: one[0].expected() * sum(map(seconds.of, one[1])))
        first = [cell for cell in self._begun if cell.run_id not in ended]
        found = _once([*first, *itertools.chain(*(cells for _, cells in needs))])
        chosen = _once([*self.plan.cells, *found])
        if len(chosen) > len(self.plan.cells):
            self.plan.choose(chosen)
            self.plan.write()
        return found

    def _needed(self, course: Course, ended: set[str]) -> list[Cell]:
        """The cells of the next look at a claim that have not come to an end."""
        families = dict.fromkeys(
            self._family_of[one] for one in sorted(course.run_ids) if one in self._family_of
        )
        found: list[Cell] = []
        for number, seed in enumerate(self._seeds):
            if found and number >= course.hypothesis.design.first:
                break
            cells = [self._cell(family, seed) for family in families]
            found += [cell for cell in cells if cell.run_id not in ended]
        return found

    def _cell(self, family: Family, seed: int) -> Cell:
        if (family, seed) not in self._made:
            assert self.plan.further is not None
            made = self.plan.further(family, seed)
            self._made[family, seed] = made
            self._family_of[made.run_id] = family
        return self._made[family, seed]


def _is_recorded(cell: Cell) -> bool:
    return record.status_of(cell.directory) is not None


def _once(cells: Iterable[Cell]) -> list[Cell]:
    return list({cell.run_id: cell for cell in cells}.values())


class _Seconds:
    """How long a cell takes: as those of its family did, else as any."""

    def __init__(self, frame: pd.DataFrame, family_of: dict[str, Family]) -> None:
        done = frame.loc[frame["status"] == Status.COMPLETED]
        self._family_of = family_of
        self._known: dict[Family | None, list[float]] = {}
        for run_id, took in zip(done["run_id"], done["seconds"], strict=True):
            if took == took:
                for group in {family_of.get(run_id), None}:
                    self._known.setdefault(group, []).append(float(took))

    def of(self, cell: Cell) -> float:
        some = self._known.get(self._family_of.get(cell.run_id)) or self._known.get(None) or [1.0]
        return sum(some) / len(some)
