"""`fisher-lab work`: workers that take the cells of a sweep, and what ends them."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from typing import Any

import psutil
import pytest

from fisher_lab.runs import journal
from fisher_lab.runs.status import Status
from fisher_lab.sweeps import work
from fisher_lab.sweeps.cell import CANCELLED_FILE, Cell, submit
from fisher_lab.sweeps.remaining import Remaining
from tests.processes import start_python, until
from tests.sweeps import trivial_worker
from tests.sweeps.application import (
    ANALYSIS,
    TEXT,
    TRIVIAL_WORKER,
    count,
    launch,
    launch_trivial,
    statuses,
    the_sweep,
)
from tests.sweeps.submitted_cells import begin, submitted

pytestmark = pytest.mark.timeout(120)
WAITS = trivial_worker.WAITS
TO_WORKERS = ("hydra/launcher=workers", "hydra.launcher.poll_s=0.1", "sweep.name=s")


PIPES: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}


def start(*options: str) -> subprocess.Popen[str]:
    """A worker of the sweep whose task costs nothing."""
    return start_python(str(TRIVIAL_WORKER), "results/s", "--poll", "0.1", *options, **PIPES)


def left_to_workers(seeds: str, launches: int = 1) -> subprocess.Popen[str]:
    """A launcher that waits for workers, with its cells frozen, the last of so many."""
    process = launch_trivial("-m", f"seed={seeds}", *TO_WORKERS)
    until(lambda: [one["event"] for one in _events()].count("launched") == launches)
    return process


def _events():
    try:
        return the_sweep().journal.read()
    except ValueError:  # there is none yet
        return []


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, _ = process.communicate(timeout=60)
    return process.returncode, out


def test_what_ends_a_cell_ends_no_worker(runs):
    """Each failure is recorded as `hydra/launcher=local` records it, and the table is written."""
    launcher = left_to_workers("1,2,13,14,15,16")
    code, out = end(start())
    assert (code, "2 completed, 4 failed" in out) == (1, True), out
    ended = dict.fromkeys((1, 2), "completed") | dict.fromkeys((13, 14, 15, 16), "failed")
    assert statuses(runs) == ended
    reasons = {record["config"]["seed"]: record["reason"] for _, record in runs()}
    assert [reasons[n] for n in (14, 15, 16)] == ["SIGKILL", "SIGSEGV", "exit"]
    code, out = end(launcher)
    assert (code, "2 of 6 cells completed" in out) == (1, True), out
    assert (the_sweep().directory / "table.csv").is_file()
    assert count(the_sweep(), "started") == 6


def test_the_cell_of_a_dead_worker_is_taken_over(runs):
    """Also the worker itself was killed, so that nobody has said anything."""
    launcher = left_to_workers(f"{WAITS}")
    first = start()
    until(lambda: statuses(runs) == {WAITS: "running"} and count(the_sweep(), "started"))
    (pid,) = [entry["pid"] for entry in _events() if entry["event"] == "started"]
    second = start()
    cell = psutil.Process(pid)
    first.kill()
    cell.kill()
    until(lambda: count(the_sweep(), "started") == 2)
    second.terminate()
    code, out = end(second)
    assert code == 128 + signal.SIGTERM, out
    assert statuses(runs) == {WAITS: "preempted"}
    launcher.terminate()
    end(launcher)
    end(first)


def test_a_worker_whose_time_is_over_hands_its_cell_back(runs):
    """It is told to save before, and another worker may take it; exit code 75 says so."""
    launcher = left_to_workers(f"{WAITS}")
    code, out = end(start("--minutes", "0.05", "--notice", "2.5", "--grace", "5"))
    assert (code, statuses(runs)) == (work.LEFT, {WAITS: "failed"}), out  # it had all the time
    assert "time limit" in out
    end(launcher)


def test_cells_come_while_workers_run(runs):
    """More values of the grid, by the same command, and a worker that finds nothing to do."""
    for launches, seeds, said in ((1, "1", "worker: 1 completed"), (2, "1,2,3", "2 completed")):
        launcher = left_to_workers(seeds, launches)
        code, out = end(start())
        assert (code, said in out) == (0, True), out
        assert end(launcher)[0] == 0
    assert end(start())[1].strip() == "worker: there was nothing to do"
    assert count(the_sweep(), "completed") == 3


def test_a_worker_runs_the_code_that_was_submitted(runs):
    """It starts again as that code; code without workers is left to others."""
    launcher = left_to_workers("1,2")
    codes = the_sweep().directory / ".sweep" / "code"
    (copy,) = codes.iterdir()
    for name, file in zip(("older", "none"), sorted(the_sweep().frozen().values()), strict=True):
        shutil.copytree(copy, codes / name)
        about = json.loads((copy / "code.json").read_text())
        (codes / name / "code.json").write_text(json.dumps({**about, "code": name}))
        file.write_text(json.dumps({**json.loads(file.read_text()), "code": name}))
    module = codes / "older" / "fisher_lab" / "sweeps" / "work.py"
    module.write_text(module.read_text() + "\nprint('the copy runs')\n")
    (codes / "none" / "fisher_lab" / "sweeps" / "work.py").unlink()
    code, out = end(start())
    assert code == 0, out
    assert "the copy runs" in out
    assert "the code none, which has no workers" in out
    assert list(statuses(runs).values()) == ["completed"]
    launcher.terminate()
    end(launcher)


def test_a_real_cell_is_the_same_as_with_the_local_launcher(runs, tmp_path):
    """Cells that follow each other in one worker do not see each other."""
    (tmp_path / "text.txt").write_text(TEXT)
    values = {}
    for kind in ("local", "workers"):
        name = f"sweep.name={kind}"
        detached = [f"sweep.detach={str(kind == 'workers').lower()}"]
        launcher = launch("-m", *ANALYSIS, "seed=0,1", f"hydra/launcher={kind}", name, *detached)
        assert end(launcher)[0] == 0
        if kind == "workers":
            options = ("workers", "--threads", "1", "--poll", "0.2")
            code, out = end(start_python("-m", "fisher_lab", "work", *options, **PIPES))
            assert code == 0, out
        folder = tmp_path / "results" / kind
        values[kind] = {
            path.parent.name: {
                key: value
                for key, value in json.loads(path.read_text()).items()
                if not key.endswith(("_s", "_mb")) and "seconds" not in key
            }
            for path in folder.glob("*/metrics.json")
        }
    assert len(values["local"]) == 2
    assert values["local"] == values["workers"]


def test_no_cell_completes_twice_in_the_journal(tmp_path, monkeypatch):
    """Somebody may note a completed cell before its worker has written down what it heard."""
    monkeypatch.chdir(tmp_path)
    (cell,) = submitted(1)
    layout = cell.layout
    layout.journal.append("launched", launcher="workers", submission=cell.launch)
    sweep = Remaining(layout)
    sweep.read()
    begin(cell, "completed")
    sweep.close(cell.run_id, Status.COMPLETED)
    late = {"time": journal.now(), **layout.end_of(cell.run_id, Status.COMPLETED)}
    layout.note(cell.run_id, Status.COMPLETED)
    layout.journal.append_all(lambda: work._unsaid(sweep, [late]))
    assert [e["event"] for e in layout.journal.read()] == ["launched", "completed"]


def test_a_completion_that_a_killed_worker_has_not_written_down_is_noted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (cell,) = submitted(1)
    (cell.submission / "launch.json").write_text(json.dumps({"cells": [cell.run_id]}))
    cell.layout.journal.append("launched", launcher="workers", submission=cell.launch)
    begin(cell, "completed")
    for _ in range(2):
        assert work.Worker([cell.layout]).run() == work.OK
        assert [e["event"] for e in cell.layout.journal.read()] == ["launched", "completed"]


def test_what_is_left_follows_from_the_journal(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells = submitted(1, 2, 3, 4)
    layout, launch_name = cells[0].layout, cells[0].launch
    names = [cell.run_id for cell in cells]
    file = cells[0].submission / "launch.json"
    file.write_text(json.dumps({"cells": names[:3]}))
    layout.journal.append("launched", launcher="workers", submission=launch_name)
    sweep = Remaining(layout, start=0.4)
    sweep.read()
    assert list(sweep.in_turn()) == ["seed2", "seed3", "seed1"]
    layout.journal.append(Status.FAILED, run_id="seed1")
    layout.journal.append(Status.PREEMPTED, run_id="seed2")
    file.write_text(json.dumps({"cells": names}))  # the claims want one more
    sweep.read()
    assert sorted(sweep.open) == ["seed2", "seed3", "seed4"]
    assert sweep.begun["seed2", Status.PREEMPTED] == 1
    (second,) = submit([Cell.load(cells[0].path)], {"version": 1})
    layout.journal.append("launched", launcher="workers", submission=second.launch)
    sweep.read()  # what had failed is wanted again
    assert sweep.file("seed1") == second.path
    (second.submission / CANCELLED_FILE).touch()
    layout.journal.append("cancel")
    sweep.read()
    assert not sweep.open
    shutil.rmtree(layout.directory)
    sweep.read()
    assert not sweep.open


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing"], "nothing is no sweep"),
        (["s", "--threads", "0"], "--threads"),
        (["s", "--minutes", "inf"], "--minutes"),
        ([], "SWEEP"),
    ],
)
def test_bad_arguments_are_one_line(arguments, said, door, tmp_path):
    answer = door("work", *arguments)
    assert answer.code == 2
    assert len(answer.err.strip().splitlines()) == 1
    assert said in answer.err


@pytest.mark.parametrize(
    "more", [["hydra/launcher=workers"], ["hydra/launcher=slurm_cpu", "hydra.launcher.workers=2"]]
)
def test_cells_whose_times_are_compared_are_none_for_workers(more, door):
    answer = door("-m", "+sweeps=large_head", *more)
    assert answer.code == 2
    assert "alone: true" in answer.err


def test_processes_of_this_machine_are_no_workers(door):
    answer = door("-m", "seed=1", "hydra/launcher=slurm_debug", "hydra.launcher.workers=2")
    assert answer.code == 2
    assert "array_parallelism" in answer.err
