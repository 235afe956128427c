"""Worker processes on this machine: what one dies of is recorded, and the others go on."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from fisher_lab.config.launchers import LocalSettings
from fisher_lab.sweeps import local, worker_process
from tests.processes import until
from tests.sweeps import trivial_worker
from tests.sweeps.application import by_seed, count, launch_trivial, statuses, the_sweep

pytestmark = pytest.mark.usefixtures("trivial_workers")

LOCAL = ("hydra/launcher=local", "hydra.launcher.n_jobs=2", "hydra.launcher.grace_s=0.5")


def test_every_death_is_recorded_and_the_others_complete(door, runs):
    seeds = (1, trivial_worker.RAISES, 2, trivial_worker.KILLED, trivial_worker.CRASHES, 16, 3)
    answer = door("-m", f"seed={','.join(map(str, seeds))}", *LOCAL)
    assert answer.code == 1
    assert "3 of 7 cells completed" in answer.out
    found, dead = by_seed(runs), (13, 14, 15, 16)
    ended = {**dict.fromkeys((1, 2, 3), "completed"), **dict.fromkeys(dead, "failed")}
    assert statuses(runs) == ended
    assert found[13]["error"]["type"] == "RuntimeError"
    assert "thirteen is no seed" in found[13]["error"]["traceback"]
    for seed, reason, name, code in (
        (14, "SIGKILL", "SIGKILL", None),
        (15, "SIGSEGV", "SIGSEGV", None),
        (16, "exit", None, 7),
    ):
        record = found[seed]
        assert record["reason"] == reason
        assert (record["error"]["signal"], record["error"]["exit_code"]) == (name, code)
        assert record["error"]["log_tail"] == f"the seed is {seed}"
        assert record["finished"] >= record["started"]
    assert len(answer.lines) == 4
    for seed, line in zip(dead, answer.lines, strict=True):
        assert line.startswith(f"fisher_lab: seed={seed}: failed: ")
    assert (count(the_sweep(), "completed"), count(the_sweep(), "failed")) == (3, 4)


def test_a_cell_past_its_time_is_killed_and_failed(door, runs, monkeypatch):
    """The one that hangs; its time begins when it does: starting a process may take long too."""
    deaf: dict[str, float] = {}

    def seconds(process: worker_process.WorkerProcess) -> float:
        log = process.cell.layout.job_log(process.cell.run_id)
        if "deaf" not in log.read_text():
            return 0.0
        return time.monotonic() - deaf.setdefault(process.cell.run_id, time.monotonic())

    monkeypatch.setattr(worker_process.WorkerProcess, "seconds", property(seconds))
    answer = door("-m", f"seed=1,{trivial_worker.HANGS}", "sweep.timeout_s=1", *LOCAL)
    assert answer.code == 1
    found = by_seed(runs)
    assert found[1]["status"] == "completed"
    assert (found[17]["status"], found[17]["reason"]) == ("failed", "timeout")
    assert "sweep.timeout_s=1" in found[17]["error"]["message"]
    assert found[17]["error"]["signal"] == "SIGKILL"  # it was deaf to the other one


def test_a_preempted_cell_comes_back_at_most_so_often(door, runs):
    answer = door("-m", f"seed=1,{trivial_worker.PREEMPTED}", "sweep.max_requeues=2", *LOCAL)
    assert answer.code == 1
    record = by_seed(runs)[19]
    assert (record["status"], record["reason"]) == ("failed", "max_requeues")
    assert count(the_sweep(), "preempted") == 3


ONE = ("hydra/launcher=local",)


@pytest.mark.parametrize(
    ("launcher", "seeds", "limit", "ended"),
    [
        ((), "13,1,2", "sweep.max_failures=1", {13: "failed"}),  # in the launching process
        ((), "13,1,2", "sweep.fail_fast=true", {13: "failed"}),
        (ONE, "13,1,2,3", "sweep.max_failures=1", {13: "failed"}),
        (LOCAL, "18,13,2", "sweep.fail_fast=true", {13: "failed", 18: "cancelled"}),
    ],
)
def test_a_limit_on_failures(launcher, seeds, limit, ended, door, runs):
    """No further cell is begun; `fail_fast` also stops those that run."""
    answer = door("-m", f"seed={seeds}", *launcher, limit)
    assert answer.code == 1
    assert f"{seeds.count(',')} cells did not come to an end" in answer.err
    assert statuses(runs) == ended
    no_seed = " no seed" if launcher else ""
    assert by_seed(runs)[13]["reason"] == f"RuntimeError: thirteen is{no_seed}"


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_launcher_ends_its_jobs_and_the_sweep_goes_on_later(signum, runs):
    process = launch_trivial("-m", f"seed={trivial_worker.WAITS},2", "hydra/launcher=local")
    until(lambda: "running" in statuses(runs).values())
    process.send_signal(signum)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signum, out
    assert statuses(runs) == {18: "cancelled"}


def test_a_closed_terminal_does_not_matter(runs):
    """The launcher stays, sees how the cell ends that runs, and starts the next one."""
    process = launch_trivial("-m", f"seed={trivial_worker.WAITS},2", "hydra/launcher=local")
    until(lambda: "running" in statuses(runs).values())
    process.send_signal(signal.SIGHUP)
    (begun,) = [e for e in the_sweep().journal.read() if e["event"] == "started"]
    os.kill(begun["pid"], signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1, out
    assert statuses(runs) == {2: "completed", 18: "cancelled"}


def test_detach_status_and_cancel(door, runs):
    process = launch_trivial(
        "-m", f"seed={trivial_worker.WAITS},2", "hydra/launcher=local", "sweep.detach=true",
        "sweep.name=away",
    )  # fmt: skip
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    assert "fisher-lab status" in out
    until(lambda: "running" in statuses(runs).values())
    answer = door("status", "away", "--json")
    found = {cell["label"]: cell for cell in json.loads(answer.out)}
    assert found["seed=18"]["state"] == "running"
    assert found["seed=2"]["state"] == "missing"
    assert found["seed=18"]["log"].endswith(".log")
    answer = door("cancel", "away")
    assert answer.code == 0
    assert "cancelled 1 cells of away" in answer.out
    until(lambda: statuses(runs) == {18: "cancelled"})
    assert "seed=18" in door("status", "results/away").out
    log = next(Path("results/away/.sweep/submissions").glob("*/launcher.log"))
    until(lambda: "0 of 2 cells completed" in log.read_text())
    assert set(by_seed(runs)) == {18}
    assert door("status", "nowhere").code == 2


def test_two_launchers_at_once_run_every_cell_once(runs):
    arguments = ("-m", "seed=range(20,32)", "hydra/launcher=local", "hydra.launcher.n_jobs=2")
    processes = [launch_trivial(*arguments) for _ in range(2)]
    for process in processes:
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0, out
    assert len(runs()) == 12
    journal = the_sweep().journal.read()
    for event in ("started", "completed"):
        found = sorted(entry["run_id"] for entry in journal if entry["event"] == event)
        assert found == sorted(directory.name for directory, _ in runs())


def test_threads_of_a_job(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert local.threads_for(LocalSettings(n_jobs=3)) == 2
    assert local.threads_for(LocalSettings(n_jobs=16)) == 1
    assert local.threads_for(LocalSettings(n_jobs=3, threads=5)) == 5
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert local.threads_for(LocalSettings(n_jobs=3)) == 4
