"""What ``status`` and ``cancel`` make of what they find; the queue is a table."""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

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


def everything(layout: Layout) -> dict[str, bytes]:
    """Every file of a sweep, and the time of every directory."""
    found = {}
    for path in sorted(layout.directory.rglob("*")):
        about = path.read_bytes() if path.is_file() else str(path.stat().st_mtime_ns).encode()
        found[str(path)] = about
    return found


@pytest.mark.parametrize(
    ("job_state", "state", "reason"),
    [
        ("NODE_FAIL", "lost", "the job 7 ended as NODE_FAIL and left no result: out of memory"),
        (slurm.GONE, "unknown", "its job 7 is not known here"),
        ("CANCELLED", "cancelled", None),
    ],
)
def test_a_look_writes_nothing_whatever_the_queue_says(job_state, state, reason, door, queue):
    """Another user's queue, another cluster's, or none at all: a healthy cell stays as it is."""
    begun, missing = submitted(1, 2)
    begin(begun)
    put(begun.layout, seed1="7", seed2="7")
    log = begun.submission / "slurm" / "7" / "7_0_log.err"
    log.parent.mkdir(parents=True)
    log.write_text("slurmstepd: error\nout of memory\n")
    queue["7"] = job_state
    before = everything(begun.layout)
    for cell in shown(door).values():
        assert (cell["state"], cell["reason"]) == (state, reason)
    assert everything(begun.layout) == before
    # So that its job, wherever it is, or the next launch of the sweep, can still run it.
    assert begun.state == "interrupted"
    assert missing.state == "missing"


def test_a_job_of_another_cluster_is_not_asked_for_here(queue, monkeypatch):
    """Here its number is that of somebody else's job."""
    (frozen,) = submitted(1)
    frozen.layout.journal.append("submitted", jobs={"seed1": "7"}, cluster="far")
    queue["7"] = "RUNNING"
    monkeypatch.setattr(slurm, "cluster", lambda: "here")
    (cell,) = stand.look(frozen.layout)
    assert (cell.state, cell.job) == ("unknown", None)
    assert cell.reason == "its job 7 is not known here (it was submitted to the cluster far)"
    monkeypatch.setattr(slurm, "cluster", lambda: "far")
    assert states(frozen.layout) == {"seed1": "queued"}


def test_a_lost_cell_is_looked_at_twice(queue, monkeypatch):
    """Its record comes over the network in the meantime."""
    (frozen,) = submitted(1)
    put(frozen.layout, seed1="7")
    queue["7"] = "COMPLETED"
    assert [cell.state for cell in stand.look_twice(frozen.layout)] == ["lost"]
    monkeypatch.setattr(stand.time, "sleep", lambda seconds: begin(frozen, "completed"))
    assert [cell.state for cell in stand.look_twice(frozen.layout)] == ["completed"]


def test_lines_of_others_in_the_journal_are_passed_over(queue):
    (frozen,) = submitted(1)
    put(frozen.layout, seed1="7")
    queue["7"] = "PENDING"
    lines = ['{"a": 1}', "[]", '{"event": 3}', '{"event": "submitted"}', '{"event": "launched"}',
             '{"event": "submitted", "jobs": {"seed1": 8}}', "[" * 20_000, "not JSON"]  # fmt: skip
    with frozen.layout.journal.path.open("a") as file:
        file.write("\n".join(lines) + "\n")
    assert states(frozen.layout) == {"seed1": "queued"}


def test_the_last_launch_is_the_last_one_in_the_journal_whatever_its_clock_said():
    """A launch from a host whose clock is ahead was cancelled; the sweep goes on from another."""
    (before,) = submitted(1)
    later = before.submission.with_name("99991231T000000.000000-abcdef")
    before.submission.rename(later)
    (later / CANCELLED_FILE).touch()
    before.layout.journal.append("launched", launcher="local", cells=1, submission=later.name)
    (now,) = submitted(1)
    now.layout.journal.append("launched", launcher="local", cells=1, submission=now.launch)
    assert now.layout.frozen() == {"seed1": now.path}
    assert states(now.layout) == {"seed1": "missing"}


def test_a_sweep_that_names_directories_elsewhere_is_refused(door):
    (frozen,) = submitted(1)
    file = frozen.layout.sweep_file
    file.write_text(file.read_text().replace('"seed1"', '"../../x"'))
    answer = door("status", "made")
    assert (answer.code, answer.out) == (2, "")
    assert "cannot be read" in answer.err


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
    assert states(layout) == {"seed1": "unknown"}
    queue["8"] = "FAILED"
    assert states(layout) == {"seed1": "lost"}
    layout.journal.append("cancel", cells=["seed1"])
    assert states(layout) == {"seed1": "missing"}
    (frozen.submission / CANCELLED_FILE).touch()
    assert states(layout) == {"seed1": "cancelled"}


class Screens:
    """How often ``--watch`` has looked; something happens in between."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *between) -> None:
        self.between, self.slept = list(between), 0
        # The module's own clock: a wait for a subprocess sleeps as well.
        monkeypatch.setattr(stand, "time", SimpleNamespace(**{**vars(time), "sleep": self.sleep}))

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


def test_watch_waits_for_the_queue_and_ends_with_what_is_lost(door, queue, monkeypatch):
    one, two = submitted(1, 2)
    begin(one, "preempted")
    put(one.layout, seed1="7", seed2="8")
    queue.update({"7": "PENDING", "8": "RUNNING"})

    def run_out() -> None:
        queue["7"] = "COMPLETED"
        begin(one, "completed")
        queue["8"] = "NODE_FAIL"

    screens = Screens(monkeypatch, lambda: None, run_out, lambda: None)
    answer = door("status", "made", "--watch")
    assert (answer.code, screens.slept) == (0, 3)
    assert "run the sweep's command again" in answer.out
    assert record.status_of(two.directory) is None


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


def claimed(layout: Layout, *metrics: str) -> None:
    about = json.loads(layout.sweep_file.read_text())
    about["claims"] = [{"type": "bounded", "metric": metric, "at_most": 1} for metric in metrics]
    layout.sweep_file.write_text(json.dumps(about))


def test_status_shows_the_swept_settings_and_the_claims_metrics_in_eighty_columns(door):
    one, two = submitted(1, 2)
    begin(one, "completed")
    begin(two, "failed", error={"type": "E", "message": "no room " * 20, "traceback": ""})
    measured = {"step/natural/gain": 0.00812, "kfac/total_s": 1.25, "ng/norm": 3.0}
    (one.directory / "metrics.json").write_text(json.dumps(measured))
    claimed(one.layout, "step/natural/gain", "kfac/total_s", "never/measured")
    answer = door("status", "made")
    table, _, said = answer.out.partition("2 cells:")
    rows = [line.split() for line in table.splitlines()]
    assert ["1", "completed"] in [row[:2] for row in rows]
    done = next(row for row in rows if row[:2] == ["1", "completed"])
    assert done[-2:] == ["0.00812", "1.25"]
    heading = table.partition("completed")[0]
    assert "seed" in heading
    assert "natural" in heading
    assert "never" not in heading
    assert "seed=2: failed: E: no room" in said
    lines = [line for line in answer.out.splitlines() if "results/made" not in line]
    assert max(map(len, lines)) <= 80
    chosen = door("status", "made", "--metrics", "ng/norm").out
    assert "3" in chosen
    assert "0.00812" not in chosen
