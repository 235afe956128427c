"""Workers as jobs of a real SLURM."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.processes import until
from tests.slurm.test_slurm import CPU
from tests.sweeps import trivial_worker
from tests.sweeps.application import count, launch_trivial, statuses, the_sweep

pytestmark = [
    pytest.mark.usefixtures("cluster"),
    pytest.mark.xdist_group("slurm"),
    pytest.mark.timeout(600),
]
SLOW = trivial_worker.SLOW
NODE = os.uname().nodename.partition(".")[0]


def node_is(state: str) -> None:
    reason = ["reason=test"] if state == "drain" else []
    command = ["scontrol", "update", f"nodename={NODE}", f"state={state}", *reason]
    subprocess.run(command, check=True, timeout=60)


def jobs() -> list[str]:
    return [n for e in the_sweep().journal.read() if e["event"] == "workers" for n in e["workers"]]


def metrics(sweep: Path) -> dict[str, object]:
    return {f.parent.name: json.loads(f.read_text()) for f in sweep.glob("*/metrics.json")}


def test_a_worker_is_killed_and_the_node_is_drained_and_resumed(runs, tmp_path):
    """The sweep is complete, and its numbers are those of a local run."""
    seeds = f"seed={','.join(str(SLOW + i) for i in range(6))}"
    process = launch_trivial("-m", seeds, *CPU, "hydra.launcher.workers=2", "sweep.name=s")
    until(lambda: list(statuses(runs).values()).count("running") == 2)
    (pid, *_) = [e["pid"] for e in the_sweep().journal.read() if e["event"] == "started"]
    cell = psutil.Process(pid)
    worker = cell.parent()
    assert worker is not None
    node_is("drain")
    worker.kill()
    cell.kill()
    until(lambda: len(statuses(runs)) == 4)  # the other one goes on
    node_is("resume")
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert "6 of 6 cells completed" in out
    assert count(the_sweep(), "completed") == 6
    table = (tmp_path / "results/s/table.csv").read_text()
    assert launch_trivial("-m", seeds, "hydra/launcher=local", "hydra.launcher.n_jobs=6",
                          "sweep.name=local").wait(300) == 0  # fmt: skip
    assert metrics(tmp_path / "results/s") == metrics(tmp_path / "results/local")
    assert table == (tmp_path / "results/local/table.csv").read_text()


def test_a_worker_hands_back_what_it_holds_and_comes_back(runs):
    """As before the time limit: the cell is no failure, and one worker is enough for all."""
    process = launch_trivial("-m", f"seed={SLOW},1,2", *CPU, "hydra.launcher.workers=1")
    until(lambda: statuses(runs).get(SLOW) == "running")
    (job,) = jobs()
    subprocess.run(["scancel", f"--signal={signal.SIGUSR2.name}", job], check=True, timeout=60)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert jobs() == [job]  # which was queued again
    assert (count(the_sweep(), "preempted"), count(the_sweep(), "completed")) == (1, 3)


def test_workers_that_are_cancelled_leave_their_cells(runs):
    """The user wants no workers any more: nothing has failed, and the same command goes on."""
    waits = trivial_worker.WAITS
    process = launch_trivial("-m", f"seed={waits},1", *CPU, "hydra.launcher.workers=1")
    until(lambda: statuses(runs).get(waits) == "running")
    subprocess.run(["scancel", *jobs()], check=True, timeout=60)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 1, out
    assert "did not come to an end" in out
    assert count(the_sweep(), "failed") == 0
