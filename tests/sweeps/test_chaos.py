"""Launchers, cells, ranks and writers are killed at random moments; nothing shows it at the end.

Every third cell runs on two ranks. The undisturbed sweep runs in one process, so that also the
launchers are compared.
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from fisher_lab.sweeps.directory import Layout
from fisher_lab.tasks import ranks
from tests.processes import no_child_is_left
from tests.sweeps.application import ANALYSIS, ORDERED_WORKER, launch

pytestmark = [pytest.mark.slow, pytest.mark.longest]

CELLS, KILLS = 21, 10
TIMEOUT_S = 900
"""Of every wait."""
TEXT = "It is a truth universally acknowledged, that a single man in possession of a good fortune "
# The backend is nothing to one rank; it makes another cell.
RANKS = "distributed={nproc:1},{nproc:1,backend:gloo},{nproc:2}"
SWEEP = ["-m", *ANALYSIS, "data.batch_size=2", f"seed=range({CELLS // 3})", RANKS]
LOCAL = ["hydra/launcher=local", "hydra.launcher.n_jobs=2"]
MEASURED = ("_s", "_s_max", "_bytes_max", "_mb", "_mib", "seconds", "per_s")
"""Ends of the names of numbers that differ between two runs of the same cell (ranks also tell each
other how long things took, in more or fewer digits)."""


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    with no_child_is_left():
        yield


def start(*arguments: str, worker: Path | None = None) -> subprocess.Popen[str]:
    with open("launcher.txt", "a") as log:
        return launch(*arguments, worker=worker, output=log)


def numbers(directory: Path) -> dict[str, dict[str, object]]:
    """Cell -> what it has measured, without what time and memory make of it."""
    found = {}
    for file in directory.glob("*/metrics.json"):
        metrics = json.loads(file.read_text()).items()
        found[file.parent.name] = {name: v for name, v in metrics if not name.endswith(MEASURED)}
    return found


class Chaos:
    """Kills one thing after the other, as its seed says."""

    def __init__(self, layout: Layout, seed: int) -> None:
        self.random = random.Random(seed)
        self.layout = layout
        self.done: list[str] = []
        self.victims = {
            "cell": self.kill_a_cell,
            "launcher": self.kill_the_launcher,
            "rank": self.kill_a_rank,
            "writer": self.kill_a_writer,
        }
        self.launcher = self.start()

    def start(self) -> subprocess.Popen[str]:
        return start(*SWEEP, "sweep.name=chaos", *LOCAL, worker=ORDERED_WORKER)

    def workers(self) -> list[int]:
        """Processes that hold the lock of a cell."""
        found = []
        for file in self.layout.locks.glob("*.lock.*"):
            if file.name.startswith("events"):
                continue
            try:
                found.append(int(json.loads(file.read_text())["pid"]))
            except (OSError, ValueError, KeyError):
                continue
        return [pid for pid in found if _is_worker(pid)]

    def strike(self) -> None:
        """Kill something that is there; the launcher is started again where it has ended.

        What was killed least often comes first, so that each kind gets its turn; none more often
        than its share, so that the sweep comes far enough for there to be every kind.
        """
        if self.launcher.poll() is not None:
            self.launcher = self.start()
        counted = Counter(self.done)
        share = math.ceil(KILLS / len(self.victims))
        kinds = [kind for kind in self.victims if counted[kind] < share]
        self.random.shuffle(kinds)
        for kind in sorted(kinds, key=counted.__getitem__):
            if self.victims[kind]():
                self.done.append(kind)
                return

    def kill_a_cell(self) -> bool:
        workers = self.workers()
        return bool(workers) and _kill(self.random.choice(workers))

    def kill_a_rank(self) -> bool:
        """One rank of a cell; the other one and their watcher are left to find out."""
        found = [rank for worker in self.workers() for rank in _ranks_of(worker)]
        return bool(found) and _kill(self.random.choice(found))

    def kill_the_launcher(self) -> bool:
        if not self.workers():
            return False
        self.launcher.kill()
        self.launcher.wait(timeout=30)
        return True

    def kill_a_writer(self) -> bool:
        """The next worker that has written a temporary file dies before it renames it."""
        if not self.workers() or Path("kill-a-writer").exists():
            return False
        Path("kill-a-writer").touch()
        return True


def _kill(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def _ranks_of(worker: int) -> list[int]:
    """The ranks that a worker has started, once they are ranks and not yet copies of it."""
    try:
        children = psutil.Process(worker).children(recursive=True)
        return [child.pid for child in children if ranks.MODULE in child.cmdline()]
    except psutil.Error:
        return []


def _is_worker(pid: int) -> bool:
    """Whether a number is still that of a worker of ours: nothing else may be killed."""
    try:
        return ORDERED_WORKER.name.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


@pytest.mark.timeout(3 * TIMEOUT_S)
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")
def test_a_sweep_survives_ten_kills():
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed of the chaos: {seed}")
    Path("text.txt").write_text(TEXT * 200)
    quiet = start(*SWEEP, "sweep.name=quiet", "hydra/launcher=serial")
    assert quiet.wait(timeout=TIMEOUT_S) == 0, Path("launcher.txt").read_text()

    chaos, pause = Chaos(Layout(Path.cwd() / "results" / "chaos"), seed), threading.Event()
    until = time.monotonic() + TIMEOUT_S
    while len(chaos.done) < KILLS or set(chaos.done) != set(chaos.victims):
        assert time.monotonic() < until, f"only {chaos.done} could be killed"
        pause.wait(chaos.random.uniform(0.2, 2.5))
        chaos.strike()
    print(f"killed: {', '.join(chaos.done)}")
    code = chaos.launcher.wait(timeout=TIMEOUT_S)
    Path("kill-a-writer").unlink(missing_ok=True)
    for _ in range(3):  # as a user would: until it says that all is well
        if code == 0:
            break
        chaos.launcher = chaos.start()
        code = chaos.launcher.wait(timeout=TIMEOUT_S)
    assert code == 0, Path("launcher.txt").read_text()
    assert list(Path.cwd().glob("kill-a-writer.*")), "no writer took its order"
    check(chaos.layout, Layout(Path.cwd() / "results" / "quiet"))


def check(disturbed: Layout, quiet: Layout) -> None:
    """Complete, once each, readable, and the same numbers."""
    events = disturbed.journal.read()
    completed = Counter(entry["run_id"] for entry in events if entry["event"] == "completed")
    assert len(completed) == CELLS
    assert set(completed.values()) == {1}
    last = {entry["run_id"]: entry["event"] for entry in events if "run_id" in entry}
    assert set(last.values()) == {"completed"}  # nothing was begun after it
    for file in disturbed.directory.rglob("*.json"):
        json.loads(file.read_text())
    for file in disturbed.directory.glob("*/run.json"):
        assert json.loads(file.read_text())["status"] == "completed"
    for run_id in completed:
        assert list(disturbed.run_directory(run_id).rglob(".*.tmp")) == []
    assert list(disturbed.locks.glob("*.lock.*")) == []
    assert numbers(disturbed.directory) == numbers(quiet.directory)
    assert len(numbers(disturbed.directory)) == CELLS
