"""Running a sweep again runs what is missing, and nothing else."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from fisher_lab.config.launchers import LocalSettings
from fisher_lab.sweeps import queue
from fisher_lab.sweeps.cell import CANCELLED_FILE
from fisher_lab.sweeps.directory import Layout
from fisher_lab.sweeps.local import LocalProcesses
from fisher_lab.sweeps.queue import Queue, Tally
from tests.cli.conftest import install_task
from tests.sweeps.application import count, own_sweep
from tests.sweeps.submitted_cells import begin, submitted


def sweeps() -> list[Layout]:
    return [Layout(file.parent) for file in sorted(Path.cwd().glob("results/*/sweep.json"))]


def content(sweep: Layout) -> dict[str, Any]:
    return json.loads((sweep.directory / "sweep.json").read_text())


def test_again_runs_nothing(door, seen, runs):
    assert door("-m", "seed=1,2,3").code == 0
    before = {directory: (directory / "run.json").read_bytes() for directory, _ in runs()}
    answer = door("-m", "seed=1,2,3")
    assert answer.code == 0
    assert "3 of 3 cells completed" in answer.out
    assert len(seen) == 3
    assert {directory: (directory / "run.json").read_bytes() for directory, _ in runs()} == before


MADE = ("table.csv", "table.md", "table.tex", "claims.json", ".finished.json")


def forget(directory: Path) -> None:
    """What a launcher leaves that is killed after its last cell and before the tables."""
    for name in MADE:
        (directory / name).unlink()


def test_tables_that_a_killed_launcher_owes_are_written_by_the_next(door, seen):
    own_sweep("one", "params: {seed: '1,2'}\n")
    own_sweep("two", "params: {seed: '3,4'}\n")
    one, two = Path("results/one"), Path("results/two")
    assert door("-m", "+sweeps=one").code == 0
    forget(one)
    assert "K-FAC's time" in door("-m", "+sweeps=one").out  # nothing was to be run
    assert all((one / name).is_file() for name in MADE)
    forget(one)
    assert door("-m", "+sweeps=[one,two]").code == 0  # cells of the other alone
    assert all((directory / name).is_file() for directory in (one, two) for name in MADE)
    assert len(seen) == 4


def test_claims_that_were_edited_are_judged_anew_and_else_nothing_is_written(door, seen):
    claims = "params: {seed: '1,2'}\nclaims: [{type: bounded, metric: loss, at_most: %s}]\n"
    directory = Path("results/own")

    def written() -> dict[Path, int]:
        return {f: f.stat().st_mtime_ns for f in directory.rglob("*") if f.is_file()}

    for bound, verdict in ((2, "holds"), (1, "does not hold")):
        own_sweep("own", claims % bound)
        door("-m", "+sweeps=own")
        found, *_ = json.loads((directory / "claims.json").read_text())
        assert found["verdict"] == verdict
    before = written()
    door("-m", "+sweeps=own")
    assert written() == before
    assert len(seen) == 2


def test_a_look_does_not_write_the_table_that_a_launcher_owes(door, seen):
    door("-m", "seed=1,2", "sweep.name=own")
    forget(Path("results/own"))
    before = sorted(Path("results").rglob("*"))
    assert door("status", "own").code == door("table", "results/own").code == 0
    assert sorted(Path("results").rglob("*")) == before


def test_a_widened_grid_runs_the_new_cells_alone(door, seen):
    door("-m", "seed=1,2", "kfac.ekfac=true")
    door("-m", "seed=1,2,3", "kfac.ekfac=true", "progress=false")
    assert [config.seed for config in seen] == [1, 2, 3]
    (sweep,) = sweeps()
    assert content(sweep)["axes"] == {"seed": ["1", "2", "3"]}
    assert len(content(sweep)["cells"]) == 3
    assert count(sweep, "completed") == 3


def test_two_sweeps_may_hold_the_same_cell(door, seen):
    own_sweep("first", "params: {seed: '1,2'}\n")
    own_sweep("second", "params: {seed: '2,3'}\n")
    assert door("-m", "+sweeps=second").code == 0
    answer = door("-m", "+sweeps=[first,second]")
    assert answer.code == 0
    assert "4 cells: 2 completed, 2 missing" in answer.out
    assert [config.seed for config in seen] == [2, 3, 1, 2]
    assert [count(sweep, "completed") for sweep in sweeps()] == [2, 2]


def test_what_is_fixed_names_the_directory(door, seen):
    door("-m", "seed=1,2", "kfac.ekfac=true")
    door("-m", "seed=1,2", "kfac.ekfac=false")
    assert len(sweeps()) == 2
    assert len(seen) == 4


def test_a_narrowed_grid_forgets_nothing(door, seen):
    door("-m", "seed=1,2,3")
    door("-m", "seed=2,3")
    (sweep,) = sweeps()
    assert len(content(sweep)["cells"]) == 2
    assert [cell["axes"] for cell in content(sweep)["earlier"]] == [{"seed": "1"}]
    assert len(seen) == 3


@pytest.mark.parametrize("retry", [True, False])
def test_failed_cells(retry, door, seen, runs):
    assert door("-m", "seed=12,13").code == 1
    answer = door("-m", "seed=12,13", f"resume.retry_failed={str(retry).lower()}")
    assert answer.code == 1  # it is still failed
    (line,) = answer.lines
    assert "seed=13" in line
    assert "thirteen is" in line
    assert [config.seed for config in seen] == [12, 13, *([13] if retry else [])]
    assert "1 of 2 cells completed" in answer.out


def test_the_same_cell_twice_runs_once(door, seen):
    answer = door("-m", "kfac.damping=1e-4,0.0001,1e-3")
    assert answer.code == 0
    assert len(seen) == 2


def test_an_interrupted_cell_is_run_again(door, seen, runs):
    door("-m", "seed=1,2")
    directory, record = runs()[0]
    record.update(status="running", finished=None)
    (directory / "run.json").write_text(json.dumps(record))
    assert door("-m", "seed=1,2").code == 0
    assert len(seen) == 3


@pytest.mark.parametrize("ends", ["completed", "interrupted"])
def test_a_cell_that_another_launcher_runs_is_waited_for(ends, monkeypatch):
    """It is run where that launcher has not brought it to a result."""
    monkeypatch.setattr(queue, "LOOK_EVERY_S", 0.0)
    (cell,) = submitted(1)
    begin(cell)
    lock = cell.lock
    assert lock.acquire()
    started: list[object] = []
    monkeypatch.setattr(LocalProcesses, "start", lambda self, cells: started.extend(cells))
    tally = Tally(1)
    one = Queue([cell], LocalProcesses(LocalSettings()), tally)
    one.step()
    one.step()
    assert (started, tally.ended) == ([], {})
    if ends == "completed":
        begin(cell, ends)
    lock.release()
    one.step()
    assert started == ([] if ends == "completed" else [cell])
    assert [outcome.status for outcome in tally.ended.values()] == ["completed"] * (not started)


def test_the_serial_launcher_shows_that_it_lives_and_starts_nothing_once_cancelled(
    door, seen, monkeypatch
):
    normal, lives = sys.modules["fake_task"].run, []

    def run(config, run):
        normal(config, run)
        layout = Layout(run.directory.parent)
        lives.append(layout.has_launcher())
        for submission in layout.submissions.iterdir():
            (submission / CANCELLED_FILE).touch()

    install_task(monkeypatch, run)
    answer = door("-m", "seed=1,2,3")
    assert answer.code == 1
    assert "1 of 3 cells completed" in answer.out
    assert "2 cells did not come to an end" in answer.err
    assert "failed" not in answer.out
    assert [config.seed for config in seen] == [1]
    assert lives == [True]
    (sweep,) = sweeps()
    assert not sweep.has_launcher()


def test_a_completed_event_that_a_killed_worker_owes_is_noted_once(door, seen):
    door("-m", "seed=1,2")
    (sweep,) = sweeps()
    journal = sweep.directory / "events.jsonl"
    kept = [line for line in journal.read_text().splitlines() if '"completed"' not in line]
    journal.write_text("\n".join([*kept, '{"event": "compl']))  # and a line that was cut short
    for _ in range(2):
        assert door("-m", "seed=1,2").code == 0
    ended = [e["run_id"] for e in sweep.journal.read() if e["event"] == "completed"]
    assert len(ended) == len(set(ended)) == len(seen) == 2


def test_another_version_of_the_code_is_said_and_kept(door, seen, runs):
    door("-m", "seed=1,2")
    directory, record = runs()[0]
    record["provenance"]["code"] = "0123456789ab+feedbeefcafe"
    (directory / "run.json").write_text(json.dumps(record))
    answer = door("-m", "seed=1,2")
    assert answer.code == 0
    assert len(seen) == 2
    assert "another version of the code (0123456789ab+feedbeefcafe; now " in answer.err
    # Of a record of before, its commit.
    del record["provenance"]["code"]
    record["provenance"]["git"] = {"commit": "0123456789abcdef", "dirty": True}
    (directory / "run.json").write_text(json.dumps(record))
    answer = door("-m", "seed=1,2")
    assert "another version of the code (0123456789ab+unknown; now " in answer.err


def test_a_text_that_changed_after_submission_fails_with_a_clear_message(
    door, seen, runs, monkeypatch
):
    from fisher_lab.tasks import runner

    monkeypatch.setattr(runner, "_content", lambda config: ({"data": "changed"}, None))
    answer = door("-m", "seed=1,2")
    assert answer.code == 1
    assert "data changed since this cell was submitted" in answer.lines[0]
    assert seen == []


@pytest.mark.parametrize(
    ("signum", "status"), [(signal.SIGUSR2, "preempted"), (signal.SIGTERM, "cancelled")]
)
def test_a_signal_to_the_launching_process_ends_the_sweep(
    signum, status, door, seen, runs, monkeypatch
):
    def run(config, run):
        seen.append(config)
        os.kill(os.getpid(), signum)

    normal = sys.modules["fake_task"].run
    install_task(monkeypatch, run)
    assert door("-m", "seed=1,2").code == 128 + signum
    assert [record["status"] for _, record in runs()] == [status]
    install_task(monkeypatch, normal)
    assert door("-m", "seed=1,2").code == 0
    assert [config.seed for config in seen] == [1, 1, 2]


def test_a_cell_is_frozen(door, seen):
    """Its file holds the resolved configuration; nothing is composed again."""
    door("-m", "seed=1,2", "kfac.damping=1e-3")
    (sweep,) = sweeps()
    files = list(sweep.submissions.glob("*/cells/*.json"))
    assert len(files) == 2
    for file in files:
        frozen = json.loads(file.read_text())
        assert frozen["config"]["kfac"]["damping"] == 1e-3
        assert file.stem == frozen["run_id"]
