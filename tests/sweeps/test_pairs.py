"""Cells whose times are compared: their order, their controls, and pairs that run once more."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fisher_lab.results import evaluate, load
from fisher_lab.results.verify import verify
from fisher_lab.runs.record import Run
from fisher_lab.sweeps.pairs import APART, MOST, Pairs
from tests.sweeps.application import own_sweep, planned

TIMES = """
title: T
alone: true
params: {kfac.policy: 'all,auto,hybrid', seed: '0,1,2'}
claims:
  - {type: faster, metric: kfac/total_s, a: {kfac.policy: auto}, b: {kfac.policy: all}}
  - {type: faster, metric: kfac/total_s, a: {kfac/policy: auto}, b: {kfac.policy: hybrid}}
  - {type: bounded, metric: loss, at_most: 3}
"""


@pytest.fixture
def plan(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own_sweep("times", TIMES)
    (one,) = planned("+sweeps=times")
    return one


def test_every_second_seed_runs_the_other_way_round_with_its_control(plan):
    order = [(cell.config.seed, cell.label) for cell in plan.launched]
    cells = [f"kfac.policy={name}" for name in ("all", "auto", "hybrid", "auto")]

    def of_seed(seed):
        found = [f"{name} seed={seed}" for name in cells]
        return [(seed, label) for label in [*found[:3], f"{found[3]} (control)"]]

    assert order == [*of_seed(0), *of_seed(1)[::-1], *of_seed(2)]
    assert len(plan.cells) == 9


def test_a_control_is_the_same_cell_in_another_place(plan):
    cells = {cell.run_id: cell for cell in plan.cells}
    for control in plan.controls:
        cell = cells[control.run_id]
        assert control.config == cell.config
        assert control.config.kfac.policy == "auto"
        assert control.directory == cell.layout.directory / "controls" / cell.run_id
        assert control.layout.sweep == cell.layout.directory


def test_sweeps_that_compare_no_times_have_no_controls(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own_sweep("plain", TIMES.replace("alone: true\n", ""))
    (one,) = planned("+sweeps=plain")
    assert one.controls == []
    assert one.launched == one.cells


def complete(cell, others: float | None, seconds: float = 1.0) -> None:
    """The record of a cell beside which other processes took some processors."""
    run = Run.start(cell.directory, config={"seed": cell.config.seed, "kfac": {
        "policy": cell.config.kfac.policy}}, overrides=[])  # fmt: skip
    run.record["run_id"] = cell.run_id
    run.metrics({"kfac/total_s": seconds})
    if others is not None:
        run.note(load={"others": others})
    run.complete()
    cell.layout.journal_end(cell.run_id, run.status)


def of_one_seed(plan):
    return [cell for cell in plan.launched if cell.config.seed == 0]


def test_a_seed_whose_cells_had_other_loads_runs_again_and_nothing_is_lost(plan):
    cells = of_one_seed(plan)
    pairs = Pairs(plan.launched)
    why = ""
    for attempt in range(1, MOST + 2):
        for i, cell in enumerate(cells):
            complete(cell, 0.1 + (APART + 0.1) * (i == 1))
            again, why = pairs.ended(cell)
            assert (again == cells[::-1]) == (i == len(cells) - 1 and attempt <= MOST)
        assert ("0.10 to 0.40 processors" in why) == (attempt <= MOST)
    kept = sorted(path.name for path in cells[0].layout.repeated.iterdir())
    assert len(kept) == 3 * MOST
    assert (cells[0].layout.repeated / kept[0] / "metrics.json").exists()
    events = [e for e in cells[1].layout.journal.read() if e.get("run_id") == cells[1].run_id]
    assert [e["event"] for e in events] == ["completed", "repeated"] * MOST + ["completed"]
    assert events[1]["others"] == pytest.approx(0.4)
    found = verify(plan.layout.directory)
    assert (found.deviations, found.runs) == ([], len(cells))


@pytest.mark.parametrize("loads", [(0.1, 0.25, 0.1, 0.2), (0.1, None, 0.9, 0.1)])
def test_equal_loads_and_unknown_ones_repeat_nothing(loads, plan):
    cells = of_one_seed(plan)
    pairs = Pairs(cells)
    for cell, others in zip(cells, loads, strict=True):
        complete(cell, others)
        assert pairs.ended(cell) == ([], "")
    assert not cells[0].layout.repeated.exists()


@pytest.mark.parametrize(("slower", "words"), [
    (1.0, "the control is not called different"),
    (1.3, "THE CONTROL IS CALLED DIFFERENT"),
])  # fmt: skip
def test_the_verdict_says_what_the_control_says(slower, words, plan):
    for i, cell in enumerate(plan.launched):
        base = 2.0 if cell.config.kfac.policy == "all" else 1.0
        noise = 1 + 0.01 * ((i * 7) % 5)
        complete(cell, 0.0, base * noise * (slower if cell.layout.is_of_controls else 1.0))
    about = {"name": "times", "axes": plan.axes, "claims": plan.file.claims}
    Path(plan.layout.directory, "sweep.json").write_text(json.dumps(about))
    frame = load(plan.layout.directory)
    assert len(frame) == 9  # controls are no further runs of their cells
    verdicts = evaluate(frame)
    assert [words in verdict.why for verdict in verdicts] == [True, True, False]
    assert verdicts[0].verdict == "holds"
