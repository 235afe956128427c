"""The plan of a multirun: which cells there are, how each stands, and what is to be done."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.config_loader import ConfigLoader
from omegaconf import DictConfig, OmegaConf
from rich.table import Table

from fisher_lab.config import compose as cells_of
from fisher_lab.config import sweep_files
from fisher_lab.config.compose import load, parse
from fisher_lab.config.errors import ConfigError
from fisher_lab.config.schema import Config
from fisher_lab.config.sweep_files import SweepFile
from fisher_lab.runs import atomic
from fisher_lab.runs.identity import LEFT_OUT, run_id
from fisher_lab.runs.record import strict as plain
from fisher_lab.runs.status import Status
from fisher_lab.sweeps.cell import Cell
from fisher_lab.sweeps.directory import SCHEMA, Layout
from fisher_lab.sweeps.pairs import controls, interleaved

if TYPE_CHECKING:
    from fisher_lab.results.hypotheses import Hypothesis
    from fisher_lab.results.registration import Registration

Identify = Callable[[Config], Mapping[str, Any]]
"""A configuration's content hashes; raises ConfigError for what cannot be."""

_OF_THE_LAUNCH = ("sweep.dry_run=", "sweep.detach=", "sweep.register=", "sweep.until=")
"""Overrides that say what this launch does, and nothing of its cells."""


SEED = "seed"
MARK = "seed=?"
"""Stands for the seed among the overrides of a family."""


@dataclass(frozen=True)
class Family:
    """The cells that differ in the seed alone.

    Attributes:
        marked: their overrides, with :data:`MARK` for the seed.
        settings: their axes but for the seed.
    """

    marked: tuple[str, ...]
    settings: tuple[tuple[str, str], ...]

    def overrides(self, seed: int) -> list[str]:
        """The overrides of the cell with a seed."""
        return [f"{SEED}={seed}" if text == MARK else text for text in self.marked]

    def axes(self, seed: int) -> dict[str, str]:
        """The axes of that cell."""
        return {**dict(self.settings), SEED: str(seed)}


@dataclass
class SweepPlan:
    """One sweep of a multirun.

    Attributes:
        layout: where it lies.
        cells: those that can run, in the order in which they are run; each identity once.
        axes: swept key -> its values, as text.
        overrides: what all cells have in common, as typed.
        arguments: the overrides of the command line that give this sweep, as typed.
        file: the sweep file, where there is one.
        controls: cells that are run once more, to be compared with themselves.
        invalid: axes of the cells that cannot run, and why.
        repeated: how many cells were the same as an earlier one.
        families: of the cells that differ in the seed alone.
        seeds: that were given, in their order.
        until: ``decided`` where further seeds are run until the claims are decided; ``cells`` are
            then those of the first look.
        further: makes the cell of a family with any seed; raises ConfigError.
    """

    layout: Layout
    cells: list[Cell]
    axes: dict[str, list[str]]
    overrides: list[str]
    arguments: list[str]
    file: SweepFile | None = None
    controls: list[Cell] = field(default_factory=list)
    invalid: list[tuple[Mapping[str, str], str]] = field(default_factory=list)
    repeated: int = 0
    families: list[Family] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    until: str | None = None
    further: Callable[[Family, int], Cell] | None = None

    def refuse(self, cell: Cell, reason: str) -> None:
        """Take a cell out that cannot run."""
        self.cells.remove(cell)
        self.controls = [one for one in self.controls if one.run_id != cell.run_id]
        self.invalid.append((cell.axes, reason))

    @property
    def launched(self) -> list[Cell]:
        """The cells and the controls, in the order in which they are run."""
        if self.file is None or not self.file.alone:
            return self.cells
        return interleaved([*self.cells, *self.controls])

    def write(self) -> None:
        """Write ``sweep.json``; cells of earlier launches that are no longer swept are kept."""
        path = self.layout.sweep_file
        current = {cell.run_id for cell in self.cells}
        before = atomic.read_json(path)
        earlier = [
            {key: value for key, value in one.items() if key != "settings"}
            for one in [*before.get("earlier", []), *before.get("cells", [])]
            if one["run_id"] not in current
        ]
        shared, cells = _settings(self.cells)
        content = {
            "schema": SCHEMA,
            "name": self.layout.directory.name,
            "title": self.file.title if self.file else "",
            "file": str(self.file.path) if self.file else None,
            "alone": self.file.alone if self.file else False,
            "axes": self.axes,
            "claims": self.file.claims if self.file else [],
            "design": self.file.design if self.file else {},
            "until": self.until or before.get("until"),
            "config": self.file.config if self.file else {},
            "overrides": self.overrides,
            "arguments": self.arguments,
            "settings": shared,
            "cells": cells,
            "earlier": earlier,
        }
        if {**before, "updated": None} == {**content, "updated": None}:
            return
        content["updated"] = datetime.now(UTC).isoformat(timespec="seconds")
        atomic.write_json(path, content)

    def hypotheses(self) -> list[Hypothesis]:
        """The claims of the sweep file, checked.

        Raises:
            ConfigError: one is wrong.
        """
        if self.file is None or not self.file.claims:
            return []
        from fisher_lab.results.hypotheses import parse
        from fisher_lab.results.values import ResultsError

        try:
            stated = enumerate(self.file.claims, 1)
            return [parse(claim, number, self.file.design) for number, claim in stated]
        except ResultsError as error:
            raise ConfigError(f"{self.file.path}: {error}") from None

    def first_cells(self, seeds: Sequence[int]) -> list[Cell]:
        """The cells of the first look that any claim has; the seeds are given in their order."""
        from fisher_lab.results.looks import seeds_in_order

        assert self.further is not None
        first = min(claim.design.first for claim in self.hypotheses())
        return [
            self.further(f, seed) for seed in seeds_in_order(seeds, first) for f in self.families
        ]

    def choose(self, cells: Sequence[Cell]) -> None:
        """Make these the cells of the sweep."""
        self.cells = list(cells)
        self.axes[SEED] = [str(s) for s in dict.fromkeys(cell.config.seed for cell in cells)]

    def register(self) -> Registration | None:
        """Write ``registration.json`` if there are claims and no results; the one that counts.

        Raises:
            ConfigError: a claim is wrong, or the file that is there cannot be read.
        """
        claims = self.hypotheses()
        if not claims:
            return None
        from fisher_lab.results import registration
        from fisher_lab.results.values import ResultsError

        about = {
            "sweep": self.layout.directory.name,
            "until": self.until,
            "seeds": self.seeds,
            "axes": self.axes,
            "overrides": self.overrides,
            "cells": [cell.run_id for cell in self.cells],
        }
        try:
            found, written = registration.register(self.layout.directory, claims, about)
        except ResultsError as error:
            raise ConfigError(str(error)) from None
        if written:
            sha256 = found.content["sha256"]
            self.layout.journal.append("registered", claims=len(claims), sha256=sha256)
        return found


def _settings(cells: Sequence[Cell]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The composed settings that all cells share, by dotted key, and an entry for each cell.

    An entry holds those settings in which the cells differ.
    """
    configs = [_flat(plain(dataclasses.asdict(cell.config))) for cell in cells]
    first = configs[0] if configs else {}
    shared = {k: v for k, v in first.items() if all(c.get(k) == v for c in configs)}
    entries = [
        {
            "run_id": cell.run_id,
            "axes": dict(cell.axes),
            "overrides": list(cell.overrides),
            "settings": {k: v for k, v in config.items() if k not in shared},
        }
        for cell, config in zip(cells, configs, strict=True)
    ]
    return shared, entries


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        nested = isinstance(value, Mapping) and value
        flat.update(_flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value})
    return flat


def make(
    loader: ConfigLoader,
    master: DictConfig,
    arguments: Sequence[str],
    identify: Identify,
    *,
    strict: bool = True,
) -> list[SweepPlan]:
    """Plan a multirun.

    Args:
        loader: Hydra's configuration loader.
        master: the composed configuration that was started with.
        arguments: the overrides of the command line.
        identify: hashes text and model, and refuses what this machine cannot do.
        strict: raise for the first cell that cannot run; else list such cells in the plan.

    Returns:
        One plan for each sweep that was asked for; for values on the command line alone, one.

    Raises:
        ConfigError: nothing to sweep over, or a cell that cannot run.
    """
    names, others = cells_of.requested(arguments)
    known = _once(identify)
    if not names:
        return [_one(loader, master, others, None, known, strict)]
    name = str(master.hydra.job.config_name)
    plans = []
    files = sweep_files.expand(names)
    if len(files) > 1 and (chosen := OmegaConf.select(master, "sweep.name")) is not None:
        raise ConfigError.value("sweep.name", chosen, "null for several sweeps at once")
    for file in files:
        overrides = [f"+{cells_of.GROUP}={file.name}", *others]
        own = load(loader, overrides, name=name, multirun=True)
        plans.append(_one(loader, own, overrides, file, known, strict))
    return plans


def _one(
    loader: ConfigLoader,
    master: DictConfig,
    arguments: Sequence[str],
    file: SweepFile | None,
    known: Identify,
    strict: bool,
) -> SweepPlan:
    params = OmegaConf.to_container(master.hydra.sweeper.params or OmegaConf.create({}))
    assert isinstance(params, dict)
    kept = [text for text in arguments if not text.lstrip("+").startswith(_OF_THE_LAUNCH)]
    batch = cells_of.cells({str(key): value for key, value in params.items()}, kept, loader)
    given = [dict(map(_pair, overrides)) for overrides in batch]
    by_hand = [one.key_or_group for one in parse(arguments) if one.is_sweep_override()]
    swept = {
        key: list(dict.fromkeys(values[key] for values in given if key in values))
        for key in dict.fromkeys([*map(str, params), *by_hand])
    }
    fixed = [text for text in kept if parse([text])[0].key_or_group not in swept]
    layout = _place(master, file, fixed, list(swept))
    plan = SweepPlan(layout, [], swept, fixed, kept, file)
    plan.hypotheses()  # a claim that cannot be read is found before anything runs
    alone = file is not None and file.alone
    make = _CellMaker(layout, cells_of.Composer(loader, master), known, alone)
    _fill(plan, batch, given, make, strict)
    plan.seeds = list(dict.fromkeys(cell.config.seed for cell in plan.cells))
    plan.until = OmegaConf.select(master, "sweep.until")
    if plan.until and file is not None and file.claims:
        plan.families = [Family(*one) for one in dict.fromkeys(map(_family, plan.cells))]
        plan.further = lambda family, seed: make(family.overrides(seed), family.axes(seed))
        plan.choose(plan.first_cells(plan.seeds))
    if alone:
        plan.cells.sort(key=lambda cell: cell.config.seed)
        plan.controls = controls(plan.cells, file.claims) if file is not None else []
    return plan


@dataclass(frozen=True)
class _CellMaker:
    """Composes, validates and identifies cells; raises ConfigError for one that cannot run."""

    layout: Layout
    composer: cells_of.Composer
    identify: Identify
    alone: bool

    @functools.cached_property
    def earlier(self) -> dict[str, str]:
        """Identity of now -> that of a completed run which an earlier version has identified.

        It was made with the same settings, as far as its version had them.
        """
        found: dict[str, str] = {}
        for file in sorted(self.layout.directory.glob("*/run.json")):
            record = atomic.read_json(file)
            about, config = record.get("provenance") or {}, record.get("config")
            if record.get("status") == Status.COMPLETED and isinstance(config, dict):
                found[run_id(config, about.get("content"))] = file.parent.name
        return found

    def __call__(self, overrides: Sequence[str], axes: Mapping[str, str]) -> Cell:
        config = self.composer(list(overrides))
        content = self.identify(config)
        identity = run_id(dataclasses.asdict(config), content)
        if not self.layout.run_directory(identity).exists():
            identity = self.earlier.get(identity, identity)
        return Cell(self.layout, identity, tuple(overrides), axes, config, content, self.alone)


def _fill(
    plan: SweepPlan,
    batch: Sequence[Sequence[str]],
    given: Sequence[Mapping[str, str]],
    make: _CellMaker,
    strict: bool,
) -> None:
    """Make the cells of a plan, each identity once."""
    seen: set[str] = set()
    for overrides, values in zip(batch, given, strict=True):
        axes = {key: value for key, value in values.items() if key in plan.axes}
        try:
            found = make(overrides, axes)
        except ConfigError as error:
            if strict:
                raise
            plan.invalid.append((axes, str(error)))
            continue
        if found.run_id in seen:
            plan.repeated += 1
            continue
        seen.add(found.run_id)
        plan.cells.append(found)


def _family(cell: Cell) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """What the cells have in common that differ from one in the seed alone."""
    marked = [MARK if _pair(text)[0] == SEED else text for text in cell.overrides]
    rest = tuple((key, value) for key, value in cell.axes.items() if key != SEED)
    return tuple(marked if MARK in marked else [*marked, MARK]), rest


def _once(identify: Identify) -> Identify:
    """Content hashes, taken once for all cells that point to the same text and model."""
    known: dict[str, Mapping[str, Any]] = {}

    def ask(config: Config) -> Mapping[str, Any]:
        asked = (config.model, config.data, config.train)
        key = json.dumps([config.device, *map(dataclasses.asdict, asked)], sort_keys=True)
        if key not in known:
            known[key] = identify(config)
        return known[key]

    return ask


def _pair(override: str) -> tuple[str, str]:
    key, _, value = override.partition("=")
    return key.lstrip("+~"), value


def _place(
    master: DictConfig, file: SweepFile | None, fixed: Sequence[str], swept: Sequence[str]
) -> Layout:
    """The directory of a sweep, which is named after it."""
    typed = [text.lstrip("+") for text in master.hydra.overrides.hydra]
    if any(text.startswith("hydra.sweep.subdir=") for text in typed):
        raise ConfigError(
            "hydra.sweep.subdir is not allowed: the directory of a cell is named by its identity, "
            "so that it is found again; hydra.sweep.dir and sweep.name name that of the sweep"
        )
    if any(text.startswith("hydra.sweep.dir=") for text in typed):
        return Layout(Path(str(master.hydra.sweep.dir)).absolute())
    chosen = OmegaConf.select(master, "sweep.name")
    name = chosen or (file.name if file else f"adhoc-{_digest(fixed, swept)}")
    return Layout(Path(str(master.sweep.dir)).absolute() / name)


def _digest(fixed: Sequence[str], swept: Sequence[str]) -> str:
    """Names an ad-hoc sweep: by what is fixed and by which keys are swept, not over which values.

    So a grid that is typed again with more values finds the cells that are there.
    """
    kept = []
    for override in fixed:
        key = _pair(override)[0].replace("/", ".")
        if not any(f"{key}.".startswith(f"{out}.") for out in LEFT_OUT):
            kept.append(override.lstrip("+"))
    text = json.dumps([sorted(kept), sorted(swept)])
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def to_run(cells: Iterable[Cell]) -> tuple[list[Cell], dict[Cell, Status]]:
    """What a launcher is given, and the state of every cell.

    Cells that another launcher runs now are among the former, to be waited for.
    """
    states = {cell: cell.state for cell in cells}
    wanted = [
        cell
        for cell, state in states.items()
        if state.is_resumable
        or state is Status.RUNNING
        or (state is Status.FAILED and cell.config.resume.retry_failed)
    ]
    return wanted, states


OK, BAD_INPUT = 0, 2
_WORDS = {
    Status.MISSING: "to run",
    Status.INTERRUPTED: "to run (interrupted)",
    Status.RUNNING: "running",
}


def show(plans: Sequence[SweepPlan]) -> int:
    """Print every cell with its state; returns 2 where a cell cannot run, else 0."""
    from fisher_lab.results import labels
    from fisher_lab.results.console import standard_output

    console = standard_output()
    counted: Counter[str] = Counter()
    for one in plans:
        table = Table(title=one.layout.title, title_justify="left", box=None)
        for axis in one.axes:
            table.add_column(labels.setting(axis.replace("/", ".")).short, overflow="fold")
        table.add_column("state", no_wrap=True)
        wanted, states = to_run(one.cells)
        rows = []
        for cell in one.cells:
            state = states[cell]
            text = f"{state}, to run" if cell in wanted else state
            rows.append((cell.axes, _WORDS.get(state, text)))
        for axes, state in [*rows, *((axes, "invalid") for axes, _ in one.invalid)]:
            counted[state] += 1
            table.add_row(*(axes.get(axis, "") for axis in one.axes), state)
        console.print(table)
        if one.repeated:
            console.print(f"{one.repeated} cells are the same as another one and run once")
    counts = ", ".join(f"{number} {state}" for state, number in sorted(counted.items()))
    console.print(f"{sum(counted.values())} cells: {counts}")
    reasons = [reason for one in plans for _, reason in one.invalid]
    for reason in dict.fromkeys(reasons):
        print(f"fisher_lab: {reason}", file=sys.stderr)
    return BAD_INPUT if reasons else OK
