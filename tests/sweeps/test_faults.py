"""A sweep on a simulated cluster keeps its promises under faults (`benchmarks/faults.py`)."""

from __future__ import annotations

import pytest

from benchmarks import faults
from benchmarks.simulated.course import trial
from fisher_lab.runs import record
from fisher_lab.sweeps import slurm
from tests.sweeps.submitted_cells import begin, submitted


@pytest.mark.parametrize("first", range(0, 120, 20))
def test_no_promise_is_broken(first):
    results = faults.run_seeds(range(first, first + 20))
    assert [one for one in results if one.problems] == []
    assert sum(len(one.kinds) for one in results) >= 10


def test_a_seed_gives_the_same_course_again():
    one, other = trial(2057), trial(2057)
    assert (one.calls, one.seconds, one.kinds) == (other.calls, other.seconds, other.kinds)


def test_a_planted_bug_is_found():
    with faults.planted("records are written in place"):
        assert any(trial(seed).problems for seed in range(200))


def test_a_job_that_found_its_cell_held_is_no_failure():
    (cell,) = submitted(1)
    begin(cell)
    assert slurm.end_cell(cell, "7", "COMPLETED") == "interrupted"
    assert record.read(cell.directory)["status"] == "running"
