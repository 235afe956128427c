"""Cells that another version of fisher_lab has completed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fisher_lab.runs.status import Status
from fisher_lab.sweeps.cell import Cell
from tests.sweeps import application
from tests.sweeps.application import planned

RECORD = Path(__file__).with_name("earlier_record.json")
"""Of a version that had fewer keys than this one."""


@pytest.fixture
def record(tmp_path, monkeypatch) -> dict:
    monkeypatch.chdir(tmp_path)
    found = json.loads(RECORD.read_text())
    monkeypatch.setattr(application, "CONTENT", found["provenance"]["content"])
    return found


def cells_with(record: dict, *more: str) -> list[Cell]:
    """The cells of its sweep, of which another version has left its record."""
    place = Path("results/up") / record["run_id"] / "run.json"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(record))
    overrides = [o for o in record["overrides"] if not o.startswith("seed=")]
    (plan,) = planned(*overrides, "seed=0,1,2", "sweep.name=up", *more)
    return plan.cells


@pytest.mark.parametrize("name", ["88957798c5cd48a0", "0123456789abcdef"])
def test_what_an_earlier_version_has_completed_is_not_run_again(name, record):
    """Also where that version has identified it in another way."""
    record = {**record, "run_id": name}
    states = {cell.run_id: cell.state for cell in cells_with(record)}
    assert states.pop(record["run_id"]) is Status.COMPLETED
    assert list(states.values()) == [Status.MISSING] * 2


def test_other_settings_are_another_run(record):
    assert {c.state for c in cells_with(record, "kfac.damping=7e-5")} == {Status.MISSING}


def test_what_an_earlier_version_has_not_completed_is_run_anew(record):
    other = {**record, "run_id": "0123456789abcdef", "status": "failed"}
    assert {cell.state for cell in cells_with(other)} == {Status.MISSING}
