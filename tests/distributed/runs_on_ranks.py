"""Runs on ranks through the real command line: start them, see them at work, check how they end."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from tests.processes import is_gone, until

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "model.init=random", "model.layers=1", "model.width=32", "model.heads=2",
    "data.batch_size=4", "data.seq_len=16", "task.heldout_batches=1", "device=cpu",
    "kfac/damping=paper",
)  # fmt: skip
DEVICES = "5,3"
"""`CUDA_VISIBLE_DEVICES` of all programs."""

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
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment |= {"CUDA_VISIBLE_DEVICES": DEVICES, **variables}
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


def finished(*arguments: str, timeout: float = 280, **options: Any) -> tuple[int, str]:
    """A program that has come to its end: exit code and output."""
    with program(*arguments, **options) as process:
        out, _ = process.communicate(timeout=timeout)
    return process.returncode, out


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


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


LONG = ("kfac.n_batches=4000", "data.batch_size=2")
"""The ranks are at work for long, and each for itself: the next collective is far away."""

FAILING = ("kfac/reduce=none", "data.batch_size=1")
"""One sequence for two ranks, each on its own: rank 1 has nothing to make factors of."""


def check_failed(directory: Path, out: object) -> None:
    """The record has the error of rank 1 in a run that is :data:`FAILING`."""
    found = record_of(directory)
    assert found["status"] == "failed", out
    assert found["error"]["rank"] == 1
    assert found["error"]["message"] == "batches: none given; allowed: at least one"
    assert "in collect" in found["error"]["traceback"]


def check_killed(directory: Path, rank: int, message: str, out: object) -> None:
    """The record names the rank that was killed, and nothing is half written."""
    found = record_of(directory)
    assert found["status"] == "failed", out
    assert (found["error"]["type"], found["error"]["rank"]) == ("RankKilled", rank)
    assert found["error"]["message"].startswith(message)
    assert not list(directory.rglob("*.tmp*"))


def kill_rank(
    rank: int, directory: Path, programs: list[Any], seconds: float = 30
) -> tuple[int, list[int], list[str]]:
    """Kills a rank at work; every process is gone soon. Its pid, the exit codes, the outputs.

    Which devices there are is never changed; nothing of it depends on a GPU.
    """
    pids = [one["pid"] for one in until(at_work(directory, *programs), 300)]
    everyone = [p for one in programs for p in psutil.Process(one.pid).children(recursive=True)]
    assert set(pids) <= {process.pid for process in everyone}
    assert {psutil.Process(pid).environ().get("CUDA_VISIBLE_DEVICES") for pid in pids} == {DEVICES}
    os.kill(pids[rank], signal.SIGKILL)
    killed = time.monotonic()
    outputs = [one.communicate(timeout=60)[0] for one in programs]
    assert time.monotonic() - killed < seconds
    assert not left_of(everyone)
    return pids[rank], [one.returncode for one in programs], outputs
