"""Cells that failed run again by the kind of their failure."""

from __future__ import annotations

import json
import signal

import pytest

from fisher_lab.config.launchers import SlurmSettings
from fisher_lab.config.schema import RetryConfig, RetryPolicy
from fisher_lab.runs.status import Status
from fisher_lab.sweeps import retry, slurm
from fisher_lab.sweeps.remaining import Remaining
from fisher_lab.sweeps.slurm import SubmititJobs
from tests.sweeps import trivial_worker
from tests.sweeps.application import count, the_sweep
from tests.sweeps.submitted_cells import begin, submitted

LOCAL = ("hydra/launcher=local", "hydra.launcher.n_jobs=2")


@pytest.mark.parametrize(
    ("reason", "error", "kind"),
    [
        ("SIGKILL", None, "oom"),
        ("OUT_OF_MEMORY", None, "oom"),
        ("OutOfMemoryError: x", {"type": "torch.OutOfMemoryError", "message": "CUDA"}, "oom"),
        ("RuntimeError: x", {"type": "RuntimeError", "message": "can't allocate memory"}, "oom"),
        ("MemoryError: ", {"type": "MemoryError", "message": ""}, "oom"),
        ("timeout", None, "time"),
        ("TIMEOUT", None, "time"),
        ("NODE_FAIL", None, "node"),
        ("SIGSEGV", {"type": "JobDied", "message": "the process died of SIGSEGV"}, "code"),
        ("ValueError: x", {"type": "ValueError", "message": "x"}, "code"),
        ("max_requeues", None, ""),
    ],
)
def test_kinds_of_failures(reason, error, kind):
    assert retry.kind_of({"reason": reason, "error": error}) == kind


def test_what_failures_come_to():
    """Factors multiply, attempts are counted by kind, and the last failure decides."""
    policies = RetryConfig(
        oom=RetryPolicy(times=2, mem_gb="x2"), time=RetryPolicy(times=1, timeout_min="x1.5")
    )
    once = retry.after(["oom"], policies)
    assert (once.is_due, once.memory, once.time, once.said) == (True, 2.0, 1.0, "oom 1 of 3")
    both = retry.after(["oom", "time", "oom"], policies)
    assert (both.is_due, both.memory, both.time) == (True, 4.0, 1.5)
    assert not retry.after(["oom"] * 3, policies).is_due
    assert retry.after(["oom"] * 3, policies).memory == 4.0
    assert not retry.after(["code"], policies).is_due
    assert not retry.after([], policies).is_due
    settings = slurm.raised(SlurmSettings(mem_gb=3, timeout_min=5), both)
    assert (settings.mem_gb, settings.timeout_min) == (12.0, 8)


@pytest.mark.usefixtures("trivial_workers")
def test_a_kind_with_a_policy_runs_again_and_the_others_do_not(door, runs):
    """And the status says of every attempt why it failed; the next launch counts anew."""
    seeds = f"seed=1,{trivial_worker.KILLED},{trivial_worker.RAISES}"
    command = ("-m", seeds, *LOCAL, "sweep.name=s", "sweep.retry.oom.times=2")
    answer = door(*command)
    assert answer.code == 1
    assert answer.out.count("runs again") == 2
    assert count(the_sweep(), "started") == 1 + 3 + 1
    cells = {one["label"]: one for one in json.loads(door("status", "s", "--json").out)}
    killed = cells[f"seed={trivial_worker.KILLED}"]["failures"]
    assert [(one["kind"], one["reason"]) for one in killed] == [("oom", "SIGKILL")] * 3
    assert all("killed by SIGKILL" in one["message"] for one in killed)
    (raised,) = cells[f"seed={trivial_worker.RAISES}"]["failures"]
    assert (raised["kind"], "thirteen" in raised["message"]) == ("code", True)
    assert "attempt 2 failed (oom): JobDied" in door("status", "s").out
    door(*command, "sweep.retry.oom.times=0")
    assert count(the_sweep(), "started") == 5 + 2


def test_workers_see_from_the_journal_what_runs_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    policies = RetryConfig(code=RetryPolicy(times=1))
    (cell,) = submitted(1, retry=policies)
    (cell.submission / "launch.json").write_text(json.dumps({"cells": [cell.run_id]}))
    layout = cell.layout
    layout.journal.append("launched", launcher="workers", submission=cell.launch)
    begin(cell, "failed", reason="ValueError: x")
    sweep = Remaining(layout)
    for expected in ([cell.run_id], []):
        layout.journal_end(cell.run_id, Status.FAILED)
        sweep.read()
        assert list(sweep.open) == expected
    assert not cell.again.is_due


def test_a_job_is_submitted_again_with_more_memory(tmp_path, monkeypatch):
    """Those cells alone that have failed for want of it."""
    monkeypatch.chdir(tmp_path)
    cells = submitted(1, 2, 3, retry=RetryConfig(oom=RetryPolicy(times=2, mem_gb="x2")))
    begin(cells[1], "failed", reason="OUT_OF_MEMORY")
    cells[1].layout.journal_end(cells[1].run_id, Status.FAILED)
    made = SubmititJobs(SlurmSettings(mem_gb=2, max_array_size=9))
    arrays = [([c.run_id for c in own], s.mem_gb) for own, s in made._batches(cells)]
    assert arrays == [(["seed1", "seed3"], 2.0), (["seed2"], 4.0)]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["sweep.retry.oom.mem_gb=2", "sweep.retry.oom.times=1"], "such as x2"),
        (["sweep.retry.oom.mem_gb=x1", "sweep.retry.oom.times=1"], "more than 1"),
        (["sweep.retry.oom.mem_gb=x2"], "sweep.retry.oom.times"),
        (["sweep.retry.oom.times=-1"], "at least 0"),
        (["sweep.retry.oom={mem_gb:x2,times:1}"], "hydra.launcher.mem_gb"),
        (["sweep.retry.time={timeout_min:x2,times:1}"], "sweep.timeout_s"),
        (["sweep.retry.disk.times=1"], "disk"),
        (
            ["sweep.retry.node.times=1", "hydra/launcher=slurm_cpu", "sweep.detach=true"],
            "no launcher stays",
        ),
    ],
)
def test_a_bad_policy_is_one_line(given, said, door, tmp_path):
    answer = door("-m", "seed=1,2", *given)
    assert answer.code == 2
    assert len(answer.err.strip().splitlines()) == 1
    assert said in answer.err
    assert not list(tmp_path.glob("results/*"))


@pytest.mark.usefixtures("trivial_workers")
def test_a_time_limit_is_raised(door, runs):
    """`timeout_min` is about the limit of the cell, too."""
    more = ("sweep.timeout_s=0.2", "sweep.retry.time={timeout_min:x2,times:1}")
    answer = door("-m", f"seed={trivial_worker.WAITS}", *LOCAL, "sweep.name=s", *more)
    assert answer.code == 1
    ((_, found),) = runs()
    assert "sweep.timeout_s=0.4" in found["error"]["message"]
    assert found["error"]["signal"] in (None, signal.SIGTERM.name)
