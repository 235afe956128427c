"""Ranks that a run starts itself: complete, failing, killed; the environment of several nodes."""

import json
import os
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pytest

from fisher_lab.distributed import launch
from fisher_lab.distributed.launch import LaunchError
from fisher_lab.distributed.nodes import Place
from tests.distributed.runs_on_ranks import (
    FAILING,
    LONG,
    ROOT,
    SMALL,
    TIMES,
    at_work,
    check_failed,
    check_killed,
    finished,
    kill_rank,
    left_of,
    metrics_of,
    program,
    record_of,
    rows_of,
)
from tests.processes import until

TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "fisher_lab")
SOON_S = 15
"""What "the others are stopped within seconds" means on a busy machine."""


def run(directory: Path, *arguments: str, **options: Any) -> tuple[int, str]:
    return finished(*SMALL, f"hydra.run.dir={directory}", *arguments, **options)


@pytest.mark.slow
@pytest.mark.longest
def test_modes_as_a_sweep(tmp_path):
    """`gather` and `gram` give every number alike; `none` does not."""
    sweep = tmp_path / "sweep"
    modes = ("distributed.nproc=2", "kfac/reduce=none,gather,gram")
    code, out = finished("-m", *SMALL, *modes, f"sweep.dir={sweep}", timeout=550)
    assert code == 0, out
    assert "3 of 3 cells completed" in out
    cells = {
        json.loads(file.read_text())["config"]["kfac"]["reduce"]: file.parent
        for file in sweep.glob("*/*/run.json")
    }
    none, gathered, spread = (cells[mode] for mode in ("none", "gather", "gram"))
    for directory in (none, gathered, spread):
        found = record_of(directory)
        assert found["status"] == "completed"
        assert found["provenance"]["distributed"]["world_size"] == 2
        assert "completed" in (directory / "ranks" / "rank1.log").read_text()
        assert "completed" in (directory / "fisher_lab.log").read_text()
    first, second = metrics_of(gathered), metrics_of(spread)
    compared = [name for name in first if not name.endswith((*TIMES, "bytes_max", "_s_max"))]
    assert {"ng/norm", "ng/decrement", "kfac/trace", "loss", "tokens"} <= set(compared)
    for name in compared:
        assert second[name] == pytest.approx(first[name], rel=1e-5), name
    assert metrics_of(none)["tokens"] == first["tokens"] / 2
    assert metrics_of(none)["ng/norm"] != pytest.approx(first["ng/norm"], rel=1e-2)
    rows = rows_of(spread / "ranks.csv")
    assert [row["rank"] for row in rows] == ["0", "1"]
    assert sum(int(row["tokens"]) for row in rows) == first["tokens"]
    assert sum(int(row["labels"]) for row in rows) == first["labels"]
    assert all(int(row["exchange_sent"]) > 0 for row in rows)
    assert int(rows[0]["exchange_sent"]) == int(rows[1]["exchange_received"])


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [("fisher_lab",), TORCHRUN], ids=["own", "torchrun"])
def test_an_error_of_any_rank_fails_the_run_with_its_traceback(tmp_path, launcher):
    """Under torchrun the other rank is in a collective: its error is not the run's."""
    directory = tmp_path / "run"
    own = ("distributed.nproc=2",) if launcher != TORCHRUN else ()
    code, out = run(directory, *own, *FAILING, module=launcher)
    ended = datetime.now(UTC)
    assert code == 1
    check_failed(directory, out)
    left = json.loads((directory / "ranks" / "rank1.error.json").read_text())
    # Rank 0 stays a while, so that the other one is seen to have ended first, and is stopped.
    assert (ended - datetime.fromisoformat(left["time"])).total_seconds() < SOON_S
    if launcher == TORCHRUN:
        return
    assert "BatchError: batches: none given" in out
    # Nothing of the failure stays in the way.
    code, out = run(directory, "distributed.nproc=2")
    assert (code, record_of(directory)["status"]) == (0, "completed"), out
    assert record_of(directory)["error"] is None


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [("fisher_lab",), TORCHRUN], ids=["own", "torchrun"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_fails_the_run_and_leaves_no_process(tmp_path, rank, launcher):
    """Rank 0 too, which writes the record: under torchrun the rank that is left does so for it."""
    directory = tmp_path / "run"
    own = ("distributed.nproc=2",) if launcher != TORCHRUN else ()
    arguments = (*SMALL, *own, *LONG, f"hydra.run.dir={directory}")
    with program(*arguments, module=launcher) as process:
        pid, codes, outputs = kill_rank(rank, directory, [process], 30 if own else 60)
    assert codes == [1], outputs
    end = "was ended by SIGKILL" if own else "is gone"
    check_killed(directory, rank, f"rank {rank} (process {pid}) {end}", outputs)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_to_the_launcher_ends_all_ranks(tmp_path, signum):
    directory = tmp_path / "run"
    arguments = (*SMALL, "distributed.nproc=2", *LONG)
    with program(*arguments, f"hydra.run.dir={directory}") as process:
        until(at_work(directory, process), 250)
        everyone = psutil.Process(process.pid).children(recursive=True)
        assert len(everyone) >= 2
        process.send_signal(signum)
        process.communicate(timeout=60)
    assert process.returncode == 128 + signum
    expected = "cancelled" if signum == signal.SIGTERM else "preempted"
    assert record_of(directory)["status"] == expected
    assert not left_of(everyone)


@pytest.mark.slow
def test_torchrun_is_honoured(tmp_path):
    directory = tmp_path / "run"
    # Without transformers, whose import takes longer than the run.
    code, out = run(directory, "model=mlp", module=TORCHRUN)
    assert code == 0, out
    found = record_of(directory)
    assert found["status"] == "completed"
    assert [r["rank"] for r in found["provenance"]["distributed"]["ranks"]] == [0, 1]
    assert out.count("run directory") == 1
    assert metrics_of(directory)["tokens"] == 64


STUBBORN = """
import signal, threading, time
from fisher_lab.distributed.launch import end_in_time
signal.signal(signal.SIGTERM, lambda *_: None)
end_in_time(0.2)
print("ready", flush=True)
until = time.monotonic() + 60
while time.monotonic() < until:
    threading.Event().wait(60)
"""


def test_a_rank_that_does_not_end_when_asked_to_is_killed():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", STUBBORN], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            process.terminate()
            assert process.wait(timeout=30) == -signal.SIGKILL
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("gpu07", "gpu07"), ("gpu[07-09,12],login", "gpu07"), ("node1,node2", "node1"),
        ("a[3]b", "a3b"), ("rack-2-n[001,007]", "rack-2-n001"),
    ],
)  # fmt: skip
def test_first_host_of_a_slurm_list(hosts, first):
    assert launch.first_host(hosts) == first


def test_place_among_several_nodes():
    assert launch.place(4, 1, {"SLURM_NODEID": "3"}) == Place(4)
    slurm = {"SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "n[3-4]", "SLURM_NNODES": "2",
             "SLURM_JOB_ID": "20007"}  # fmt: skip
    assert launch.place(4, 2, slurm) == Place(4, 2, 1, "n3", 20007)
    own = {"NODE_RANK": "0", "MASTER_ADDR": "here", "MASTER_PORT": "1234"}
    assert launch.place(1, 2, {**slurm, **own}) == Place(1, 2, 0, "here", 1234)
    with pytest.raises(LaunchError, match="neither SLURM_NODEID"):
        launch.place(1, 2, {})
    with pytest.raises(LaunchError, match="but SLURM has given 2"):
        launch.place(1, 4, slurm)
