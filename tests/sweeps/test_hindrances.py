"""What keeps a sweep from being run: its code changes, its disk is full, its screen is gone."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest

from fisher_lab.runs import atomic, provenance
from fisher_lab.runs.status import Status
from fisher_lab.sweeps import worker_process
from fisher_lab.sweeps.cell import Cell
from fisher_lab.sweeps.directory import Layout
from fisher_lab.sweeps.worker_process import WorkerProcess
from tests.processes import start_python, until
from tests.sweeps.application import launch_trivial

SMALL_TASK = """
import sys, types
from fisher_lab import cli
from fisher_lab.tasks import preflight, runner
module = types.ModuleType("small_task")
module.run = lambda config, run: run.metrics({"caf\\u00e9 \\u2500": 1.0})
sys.modules["small_task"] = module
runner.TASKS = dict.fromkeys(runner.TASKS, "small_task")
runner._content = lambda config: ({"data": "abc"}, None)
runner.prepare = lambda config: {}
preflight.preflight = lambda config: {"data": "abc"}
cli.entry()
"""
"""The application whose task writes one number with a name that not every screen can show."""


def test_a_cell_runs_the_code_that_it_was_submitted_with(runs, monkeypatch):
    """Whatever becomes of the package while it waits; the copy is made once."""
    for _ in range(2):
        process = launch_trivial("-m", "seed=1", "hydra/launcher=local", "sweep.name=own")
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0, out
        shutil.rmtree(runs()[0][0])
    (copy,) = Path("results/own/.sweep/code").iterdir()
    now = provenance.code()
    assert provenance.code(copy / "fisher_lab") == now
    assert copy.name == now["code"]
    (file,) = Layout(Path("results/own").resolve()).frozen().values()
    cell = Cell.load(file)
    assert cell.code_root == copy.resolve()
    # The copy is edited, and so what the process imports is seen.
    module = copy / "fisher_lab" / "sweeps" / "worker.py"
    changed = module.read_text().replace("def main(", "print('the copy runs')\n\n\ndef main(")
    module.write_text(changed)
    Path("fisher_lab").mkdir()
    Path("fisher_lab", "__init__.py").write_text("raise SystemExit('the working directory runs')")
    process = WorkerProcess(cell, threads=1, grace_s=5.0, command=worker_process.WORKER)
    until(process.poll)
    assert "the copy runs" in (cell.directory / "job.log").read_text()


def test_output_that_cannot_be_written_ends_no_completed_cell(runs):
    """Nothing after its completion changes the status of a cell."""
    for name, output in (("ascii", None), ("full", Path("/dev/full"))):
        with open(output or "out.txt", "w") as stream:
            process = start_python(
                "-c", SMALL_TASK, "-m", "seed=1,2", f"sweep.name={name}", stdout=stream,
                stderr=stream, environment={"PYTHONIOENCODING": "ascii"},
            )  # fmt: skip
            process.wait(timeout=60)
        found = [one for path, one in runs() if path.parent.name == name]
        assert [one["status"] for one in found] == ["completed", "completed"]


def test_a_completed_cell_stays_completed_whatever_fails_after_it(door, seen, runs, monkeypatch):
    from fisher_lab.tasks import summary

    def show(run):
        raise UnicodeEncodeError("ascii", "é", 0, 1, "ordinal not in range(128)")

    monkeypatch.setattr(summary, "show", show)
    answer = door("-m", "seed=1,2")
    assert answer.code == 0, answer.err
    assert [record["status"] for _, record in runs()] == ["completed", "completed"]
    ((directory, _), _) = runs()
    (sweep,) = Path.cwd().glob("results/*/sweep.json")
    one = Cell.load(Layout(sweep.parent).frozen()[directory.name])
    one.settle(Status.FAILED, "too late")
    one.end_record(Status.FAILED, "too late")
    assert [record["status"] for _, record in runs()] == ["completed", "completed"]
    assert "the summary cannot be shown" in (directory / "fisher_lab.log").read_text()


@pytest.mark.parametrize("writes", [0, 3, 6, 9, 12, 15, 18, 21])
def test_a_disk_that_gets_full_ends_in_one_line_and_the_same_command_goes_on(
    writes, door, seen, runs, monkeypatch
):
    """After any number of files; what is done is intact, and is not done again."""
    left = [writes]
    flush = atomic._flush

    def full(path: Path) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        flush(path)

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "_flush", full)
        answer = door("-m", "seed=1,2", "sweep.name=own")
        if left[0] < 0:
            assert answer.code == 2
            assert answer.lines[-1].endswith("No space left on device")
            assert "Traceback" not in answer.err
    done = [record["config"]["seed"] for _, record in runs() if record["status"] == "completed"]
    ran = [config.seed for config in seen]
    assert door("-m", "seed=1,2", "sweep.name=own").code == 0
    assert [record["status"] for _, record in runs()] == ["completed", "completed"]
    again = [config.seed for config in seen][len(ran) :]
    assert not set(done) & set(again)
    assert not list(Path("results").rglob("*.tmp"))


@pytest.mark.parametrize("place", ["/dev/null/x", "/proc/x", "a-file/x"])
def test_a_place_where_nothing_can_be_written_is_one_line(place, door, seen):
    Path("a-file").write_text("")
    door("-m", "seed=1", "sweep.name=own")
    for arguments in (["-m", "seed=1,2", f"sweep.dir={place}"], [f"hydra.run.dir={place}"],
                      ["report", "results/own", "-o", f"{place}/x.html"],
                      ["table", "results/own", "-o", f"{place}/x.csv"]):  # fmt: skip
        answer = door(*arguments)
        assert (answer.code, len(answer.lines)) == (2, 1), answer
        assert answer.lines[0].startswith("fisher_lab: /") or place in answer.lines[0]
    assert len(seen) == 1
