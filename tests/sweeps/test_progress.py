"""The bar of a sweep and the lines of its cells."""

from __future__ import annotations

import io
import json
import time

import pytest
from rich.console import Console

from fisher_lab.runs.status import Status
from fisher_lab.sweeps.cell import Outcome
from fisher_lab.sweeps.progress import CellsBar, time_left
from fisher_lab.sweeps.queue import Tally
from tests.sweeps.submitted_cells import begin, submitted
from tests.sweeps.test_status import claimed


def test_a_cell_that_has_ended_says_what_its_claims_are_about_and_the_time_left(capsys):
    one, two = submitted(1, 2)
    begin(one, "completed")
    (one.directory / "metrics.json").write_text(json.dumps({"step/natural/gain": 0.00812}))
    claimed(one.layout, "step/natural/gain", "ng/norm")
    tally = Tally(2)
    tally.began = time.monotonic() - 30
    tally.end(one, Outcome(Status.COMPLETED, None, 30.0))
    line = capsys.readouterr().out.strip()
    assert line.startswith("[1/2] completed in 30.0 s, about 30 s left  seed=1; ")
    assert line.endswith("gain, natural gradient 0.0081")
    tally.end(two, Outcome(Status.FAILED, "E: no room", 1.0))
    assert capsys.readouterr().out.strip() == "[2/2] failed in 1.0 s  seed=2: E: no room"


@pytest.mark.parametrize(
    ("ago", "done", "total", "words"),
    [
        (10.0, 1, 4, ", about 30 s left"), (100.0, 1, 4, ", about 5 min left"),
        (3600.0, 1, 5, ", about 4.0 h left"), (10.0, 0, 4, ""), (10.0, 4, 4, ""),
    ],
)  # fmt: skip
def test_the_time_left(ago, done, total, words):
    assert time_left(time.monotonic() - ago, done, total) == words


def test_the_bar_names_what_runs_on_a_terminal_and_is_silent_elsewhere():
    cells = submitted(1, 2, 3)
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100)
    with CellsBar(5, console) as bar:
        bar.show(2, cells)
        bar._bar.refresh()
    assert "2/5" in out.getvalue()
    assert "running: seed=1, seed=2 and 1 more" in out.getvalue()
    silent = io.StringIO()
    with CellsBar(5, Console(file=silent, width=100)) as bar:
        bar.show(2, cells)
    assert silent.getvalue() == ""
