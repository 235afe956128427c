"""Ranks that a run starts itself: complete, failing, killed; the environment of several nodes."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pytest

from fisher_lab.distributed import launch
from fisher_lab.distributed.launch import LaunchError
from fisher_lab.distributed.nodes import Place
from tests.processes import is_gone

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "model.init=random", "model.layers=1", "model.width=32", "model.heads=2",
    "data.batch_size=4", "data.seq_len=16", "task.heldout_batches=1", "device=cpu",
)  # fmt: skip
SOON_S = 15
"""What "the others are stopped within seconds" means on a busy machine."""

TIMES = ("_s", "seconds", "_mb", "bytes")


def record_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "run.json").read_text())


def metrics_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "metrics.json").read_text())


@contextmanager
def program(
    *arguments: str, module: tuple[str, ...] = ("fisher_lab",), **variables: str
) -> Iterator[Any]:
    """`python -m fisher_lab` in a process group of its own, which is gone afterwards."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    process = subprocess.Popen(
        [sys.executable, "-m", *module, *arguments],
        env=environment, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=20)


def until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        threading.Event().wait(0.05)
    raise AssertionError(f"{what}: not within {seconds} s")


def at_work(directory: Path, *programs: Any) -> Callable[[], list[dict[str, Any]] | None]:
    """Gives the record's ranks, once they compute."""

    def found() -> list[dict[str, Any]] | None:
        for one in programs:
            if one.poll() is not None:
                raise AssertionError(one.communicate()[0])
        try:
            about = record_of(directory)["provenance"]
        except (OSError, ValueError):
            return None
        return about["distributed"]["ranks"] if "workbench" in about else None

    return found


def left_of(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that still run, but for a moment in which the kernel takes them down."""
    _, alive = psutil.wait_procs(processes, timeout=5)
    return [process for process in alive if not is_gone(process.pid)]


def run(directory: Path, *arguments: str) -> tuple[int, str]:
    with program(*SMALL, f"hydra.run.dir={directory}", *arguments) as process:
        out, _ = process.communicate(timeout=270)
        return process.returncode, out


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_modes_as_a_sweep(tmp_path: Path) -> None:
    """`gather` and `gram` give every number alike; `none` does not."""
    sweep = tmp_path / "sweep"
    with program(
        "-m", *SMALL, "distributed.nproc=2", "kfac/reduce=none,gather,gram",
        f"sweep.dir={sweep}",
    ) as process:  # fmt: skip
        out, _ = process.communicate(timeout=550)
    assert process.returncode == 0, out
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
    with (spread / "ranks.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["rank"] for row in rows] == ["0", "1"]
    assert sum(int(row["tokens"]) for row in rows) == first["tokens"]
    assert sum(int(row["labels"]) for row in rows) == first["labels"]
    assert all(int(row["exchange_sent"]) > 0 for row in rows)
    assert int(rows[0]["exchange_sent"]) == int(rows[1]["exchange_received"])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_error_of_any_rank_fails_the_run_with_its_traceback(tmp_path: Path) -> None:
    """One sequence for two ranks, each on its own: rank 1 has nothing to make factors of."""
    directory = tmp_path / "run"
    arguments = ("distributed.nproc=2", "kfac/reduce=none", "data.batch_size=1")
    code, out = run(directory, *arguments)
    ended = datetime.now(UTC)
    found = record_of(directory)
    assert (code, found["status"]) == (1, "failed"), out
    told = json.loads((directory / "ranks" / "rank1.error.json").read_text())
    # Rank 0 stays a while, so that the other one is seen to have ended first, and is stopped.
    assert (ended - datetime.fromisoformat(told["time"])).total_seconds() < SOON_S
    assert found["error"]["rank"] == 1
    assert found["error"]["message"] == "batches: none given; allowed: at least one"
    assert "in collect" in found["error"]["traceback"]
    assert "BatchError: batches: none given" in out
    # Nothing of the failure stays in the way.
    code, out = run(directory, "distributed.nproc=2")
    assert (code, record_of(directory)["status"]) == (0, "completed"), out
    assert record_of(directory)["error"] is None


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_fails_the_run_and_leaves_no_process(tmp_path: Path, rank: int) -> None:
    """Rank 0 too, which is the one that writes the record."""
    directory = tmp_path / "run"
    arguments = (*SMALL, "distributed.nproc=2", "kfac.n_batches=4000", "data.batch_size=2")
    with program(*arguments, f"hydra.run.dir={directory}", CUDA_VISIBLE_DEVICES="5,3") as process:
        pids = [one["pid"] for one in until(at_work(directory, process), 250, "the ranks at work")]
        # Which devices there are is never changed; nothing of it depends on a GPU.
        assert [psutil.Process(pid).environ()["CUDA_VISIBLE_DEVICES"] for pid in pids] == [
            "5,3",
            "5,3",
        ]
        everyone = psutil.Process(process.pid).children(recursive=True)
        os.kill(pids[rank], signal.SIGKILL)
        killed = time.monotonic()
        out, _ = process.communicate(timeout=60)
        seconds = time.monotonic() - killed
    found = record_of(directory)
    assert found["status"] == "failed", out
    assert found["error"]["rank"] == rank
    expected = f"rank {rank} (process {pids[rank]}) was ended by SIGKILL"
    assert found["error"]["message"] == expected
    assert seconds < 30
    assert not left_of(everyone)
    assert not list(directory.rglob("*.tmp*"))
    if rank == 1:
        return
    code, out = run(directory, "distributed.nproc=2")
    assert (code, record_of(directory)["status"]) == (0, "completed"), out


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_to_the_launcher_ends_all_ranks(tmp_path: Path, signum: int) -> None:
    directory = tmp_path / "run"
    arguments = (*SMALL, "distributed.nproc=2", "kfac.n_batches=4000", "data.batch_size=2")
    with program(*arguments, f"hydra.run.dir={directory}") as process:
        until(lambda: "workbench" in _provenance(directory), 250, "the ranks at work")
        everyone = psutil.Process(process.pid).children(recursive=True)
        assert len(everyone) >= 2
        process.send_signal(signum)
        process.communicate(timeout=60)
    assert process.returncode == 128 + signum
    expected = "cancelled" if signum == signal.SIGTERM else "preempted"
    assert record_of(directory)["status"] == expected
    assert not left_of(everyone)


def _provenance(directory: Path) -> dict[str, Any]:
    try:
        return record_of(directory)["provenance"]
    except (OSError, ValueError):
        return {}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_torchrun_is_honoured(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    flags = ("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "fisher_lab")
    plain = "model=mlp"  # without transformers, whose import takes longer than the run
    with program(*SMALL, plain, f"hydra.run.dir={directory}", module=flags) as process:
        out, _ = process.communicate(timeout=270)
    assert process.returncode == 0, out
    found = record_of(directory)
    assert found["status"] == "completed"
    assert [r["rank"] for r in found["provenance"]["distributed"]["ranks"]] == [0, 1]
    assert out.count("run directory") == 1
    assert metrics_of(directory)["tokens"] == 64


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "fisher_lab")


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_and_a_killed_rank(tmp_path: Path, rank: int) -> None:
    """torchrun stops the rank that is left, which has to say first what happened."""
    directory = tmp_path / "run"
    arguments = (*SMALL, "kfac.n_batches=4000", "data.batch_size=2", f"hydra.run.dir={directory}")
    with program(*arguments, module=TORCHRUN) as process:
        pids = [one["pid"] for one in until(at_work(directory, process), 300, "the ranks at work")]
        everyone = [psutil.Process(pid) for pid in pids]
        os.kill(pids[rank], signal.SIGKILL)
        out, _ = process.communicate(timeout=60)
    found = record_of(directory)
    assert found["status"] == "failed", out
    assert (found["error"]["type"], found["error"]["rank"]) == ("RankKilled", rank)
    assert found["error"]["message"].startswith(f"rank {rank} (process {pids[rank]}) is gone")
    assert process.returncode == 1
    assert not left_of(everyone)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_torchrun_and_an_error_of_one_rank(tmp_path: Path) -> None:
    """The other one is in a collective, which the rank with the error must not take for its own."""
    directory = tmp_path / "run"
    arguments = ("kfac/reduce=none", "data.batch_size=1", f"hydra.run.dir={directory}")
    with program(*SMALL, *arguments, module=TORCHRUN) as process:
        out, _ = process.communicate(timeout=300)
        ended = datetime.now(UTC)
    found = record_of(directory)
    assert found["status"] == "failed", out
    assert found["error"]["rank"] == 1
    assert found["error"]["message"] == "batches: none given; allowed: at least one"
    assert "in collect" in found["error"]["traceback"]
    told = json.loads((directory / "ranks" / "rank1.error.json").read_text())
    assert (ended - datetime.fromisoformat(told["time"])).total_seconds() < SOON_S
    assert process.returncode == 1


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


def test_a_rank_that_does_not_end_when_asked_to_is_killed() -> None:
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
        ("gpu07", "gpu07"),
        ("gpu[07-09,12],login", "gpu07"),
        ("node1,node2", "node1"),
        ("a[3]b", "a3b"),
        ("rack-2-n[001,007]", "rack-2-n001"),
    ],
)
def test_first_host_of_a_slurm_list(hosts: str, first: str) -> None:
    assert launch.first_host(hosts) == first


def test_place_among_several_nodes() -> None:
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
