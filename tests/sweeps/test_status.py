"""What ``status`` and ``cancel`` make of what they find; the queue is a table."""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from pathlib import Path

import pytest

from fisher_lab.runs import record
from fisher_lab.runs.lock import Lock
from fisher_lab.sweeps import slurm
from fisher_lab.sweeps import status as stand
from fisher_lab.sweeps.cell import CANCELLED_FILE, Cell
from fisher_lab.sweeps.directory import LAUNCHER, Layout
from tests.sweeps.submitted_cells import begin, submitted


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stand, "LOOK_AGAIN_S", 0.0)
    monkeypatch.setattr(stand, "STARTING_S", 0.0)


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Job -> state, as SLURM would tell."""
    known: defaultdict[str, str] = defaultdict(lambda: slurm.GONE)
    monkeypatch.setattr(slurm, "states", lambda jobs: {job: known[job] for job in jobs})
    return known


def put(layout: Layout, **jobs: str) -> None:
    layout.journal.append("submitted", jobs=jobs)


def states(layout: Layout) -> dict[str, str]:
    return {cell.run_id: cell.state for cell in stand.look(layout)}


def shown(door) -> dict[str, dict]:
    answer = door("status", "made", "--json")
    assert answer.code == 0
    return {cell["run_id"]: cell for cell in json.loads(answer.out)}


@pytest.mark.parametrize(
    ("job_state", "status", "message"),
    [
        ("NODE_FAIL", "failed", "the job 7 ended as NODE_FAIL and left no result"),
        (slurm.GONE, "failed", "the job 7 ended as GONE and left no result"),
        ("CANCELLED", "cancelled", None),
    ],
)
def test_a_detached_cell_whose_job_is_gone_without_a_word_ends(
    job_state, status, message, door, queue
):
    """It had begun, or not; its record says so afterwards."""
    begun, missing = submitted(1, 2)
    begin(begun)
    put(begun.layout, seed1="7", seed2="7")
    queue["7"] = job_state
    assert states(begun.layout) == {"seed1": "lost", "seed2": "lost"}
    found = shown(door)
    for file in (begun, missing):
        assert found[file.run_id]["state"] == status
        kept = record.read(file.directory)
        assert (kept["status"], kept["reason"]) == (status, job_state)
        assert (kept["error"] or {}).get("message") == message
    assert [e["event"] for e in begun.layout.journal.read()] == ["submitted", status, status]


def test_a_lost_cell_keeps_the_end_of_the_jobs_log(door, queue):
    (frozen,) = submitted(1)
    put(frozen.layout, seed1="7_0")
    log = frozen.submission / "slurm" / "7_0" / "7_0_0_log.err"
    log.parent.mkdir(parents=True)
    log.write_text("slurmstepd: error: out of memory\n")
    assert shown(door)["seed1"]["state"] == "failed"
    error = record.read(frozen.directory)["error"]
    assert (error["job"], error["log_tail"]) == ("7_0", "slurmstepd: error: out of memory")


def test_a_lost_cell_is_left_to_a_launcher_that_lives_and_to_a_second_look(queue, monkeypatch):
    (frozen,) = submitted(1)
    put(frozen.layout, seed1="7")
    launcher = Lock(frozen.submission / LAUNCHER)
    assert launcher.acquire()
    with launcher:
        assert [cell.state for cell in stand.settled(frozen.layout)] == ["lost"]
    # Its record comes over the network in the meantime.
    monkeypatch.setattr(stand.time, "sleep", lambda seconds: begin(frozen, "completed"))
    assert [cell.state for cell in stand.settled(frozen.layout)] == ["completed"]


def test_a_job_of_before_says_nothing_of_what_came_after(queue):
    """It was cancelled, or the sweep went on with another launcher."""
    (frozen,) = submitted(1)
    layout = frozen.layout
    put(layout, seed1="7")
    layout.journal.append("launched", launcher="local", cells=1, submission="b")
    assert states(layout) == {"seed1": "missing"}
    queue["7"] = "RUNNING"
    assert states(layout) == {"seed1": "queued"}
    put(layout, seed1="8")
    assert states(layout) == {"seed1": "lost"}
    layout.journal.append("cancel", cells=["seed1"])
    assert states(layout) == {"seed1": "missing"}
    (frozen.submission / CANCELLED_FILE).touch()
    assert states(layout) == {"seed1": "cancelled"}


class Screens:
    """How often ``--watch`` has looked; something happens in between."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *between) -> None:
        self.between, self.slept = list(between), 0
        monkeypatch.setattr(stand.time, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.slept += 1
        assert self.between, "it goes on for ever"
        self.between.pop(0)()


def test_watch_ends_when_all_have_ended(door, monkeypatch):
    one, two = submitted(1, 2)
    begin(one, "completed")
    lock = two.layout.lock("seed2")
    assert lock.acquire()

    def end() -> None:
        begin(two, "failed", error={"type": "E", "message": "m", "traceback": ""})
        lock.release()

    screens = Screens(monkeypatch, lambda: None, end)
    answer = door("status", "made", "--watch")
    assert (answer.code, screens.slept) == (0, 2)
    assert "2 cells: 1 completed, 1 failed" in answer.out


@pytest.mark.parametrize("status", ["cancelled", "preempted", "running", None])
def test_watch_ends_with_a_cell_that_nobody_will_run(status, door, monkeypatch):
    """And not before the launcher that might run it has gone."""
    one, two = submitted(1, 2)
    begin(one, "completed")
    if status is not None:
        begin(two, status)
    launcher = Lock(one.submission / LAUNCHER)
    assert launcher.acquire()
    screens = Screens(monkeypatch, lambda: None, launcher.release)
    answer = door("status", "made", "--watch")
    assert (answer.code, screens.slept) == (0, 2)


def test_watch_waits_for_the_queue_and_settles_what_is_lost(door, queue, monkeypatch):
    one, two = submitted(1, 2)
    begin(one, "preempted")
    put(one.layout, seed1="7", seed2="8")
    queue.update({"7": "PENDING", "8": "RUNNING"})

    def run_out() -> None:
        queue["7"] = "COMPLETED"
        begin(one, "completed")
        queue["8"] = "NODE_FAIL"

    screens = Screens(monkeypatch, lambda: None, run_out, lambda: None, lambda: None)
    assert door("status", "made", "--watch").code == 0
    assert screens.slept == 3
    assert record.status_of(two.directory) == "failed"


def test_watch_waits_for_a_launcher_that_was_only_just_started(monkeypatch):
    (frozen,) = submitted(1)
    cells = stand.look(frozen.layout)
    assert stand.is_over(frozen.layout, cells)
    monkeypatch.setattr(stand, "STARTING_S", 30.0)
    assert not stand.is_over(frozen.layout, cells)


def _ago(age: float) -> tuple[float, float]:
    return time.time() - age, time.time() - age


def old_lock(frozen: Cell, age: float) -> None:
    """A lock of a process of another machine, last touched some time ago."""
    file = frozen.layout.locks / f"{frozen.run_id}.lock.0"
    file.parent.mkdir(parents=True, exist_ok=True)
    holder = {"token": "x", "host": "far", "pid": 1, "namespace": "far", "started": "1"}
    file.write_text(json.dumps(holder))
    os.utime(file, _ago(age))


@pytest.mark.parametrize(("stale_after_s", "state"), [(60.0, "interrupted"), (600.0, "running")])
def test_status_goes_by_the_sweeps_own_stale_time(stale_after_s, state):
    (frozen,) = submitted(1, stale_after_s=stale_after_s)
    begin(frozen)
    old_lock(frozen, 200.0)
    assert states(frozen.layout) == {"seed1": state}


def test_cancel_asks_by_the_sweeps_own_stale_time(door, monkeypatch):
    """Two locks of this process that are 200 s old; one sweep gives it more time."""
    asked = []
    monkeypatch.setattr(os, "kill", lambda pid, signum: asked.append((pid, signum)))
    for stale_after_s, expected in ((60.0, 0), (600.0, 1)):
        (frozen,) = submitted(1, stale_after_s=stale_after_s)
        begin(frozen)
        lock = frozen.layout.lock("seed1", 60.0)
        assert lock.acquire()
        file = Path(f"{lock.path}.lock.0")
        os.utime(file, _ago(200.0))
        asked.clear()
        answer = door("cancel", "made")
        assert f"cancelled {expected} cells" in answer.out
        assert f"{expected} processes on this machine" in answer.out
        assert len([one for one in asked if one[1] != 0]) == expected
        lock.release()
