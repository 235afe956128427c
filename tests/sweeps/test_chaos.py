"""Launchers, cells and writers are killed at random moments; the sweep comes out as undisturbed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from fisher_lab.sweeping.layout import Layout

pytestmark = pytest.mark.slow

CELLS, KILLS = 20, 10
TIMEOUT_S = 480
"""Of every wait; half a minute is usual on an idle machine."""
TEXT = "It is a truth universally acknowledged, that a single man in possession of a good fortune "
SMALL = [
    *("task=analyze", "model=mlp", "model.init=random", "model.width=8", "model.layers=1"),
    *("data=text_file", "data.path=text.txt", "data.vocab_size=293", "data.seq_len=8"),
    *("data.batch_size=2", "task.heldout_batches=1", "threads=1"),
]
SWEEP = ["-m", *SMALL, "kfac.damping=1e-4,1e-3", f"seed=range({CELLS // 2})"]
VICTIMS = ("cell", "launcher", "writer")
MEASURED = ("_s", "_mb", "_mib", "seconds", "per_s")
"""Ends of the names of numbers that differ between two runs of the same cell."""


STARTED: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    yield
    for process in STARTED:
        if process.poll() is None:
            process.kill()
            process.wait(timeout=30)
    STARTED.clear()


def launch(*arguments: str, worker: str | None = None) -> subprocess.Popen[str]:
    chosen = f"supervisor.WORKER = ({worker!r},)" if worker else "pass"
    script = (
        "import sys; from fisher_lab import cli; from fisher_lab.sweeping import supervisor; "
        f"{chosen}; sys.exit(cli.main(sys.argv[1:]))"
    )
    with open("launcher.txt", "a") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", script, *arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
    STARTED.append(process)
    return process


def numbers(directory: Path) -> dict[str, dict[str, object]]:
    """Cell -> what it has measured, without what time and memory make of it."""
    found = {}
    for file in directory.glob("*/metrics.json"):
        metrics = json.loads(file.read_text())
        found[file.parent.name] = {
            name: value for name, value in metrics.items() if not name.endswith(MEASURED)
        }
    return found


class Chaos:
    """Kills one thing after the other, as its seed says."""

    def __init__(self, layout: Layout, seed: int) -> None:
        self.random = random.Random(seed)
        self.layout = layout
        self.done: list[str] = []
        self.launcher = self.start()

    def start(self) -> subprocess.Popen[str]:
        return launch(
            *SWEEP, "sweep.name=chaos", "hydra/launcher=local", "hydra.launcher.n_jobs=2",
            worker=str(Path(__file__).with_name("chaos_worker.py")),
        )  # fmt: skip

    def workers(self) -> list[int]:
        """Processes that hold the claim of a cell."""
        found = []
        for file in self.layout.claims.glob("*.claim.*"):
            if file.name.startswith("events"):
                continue
            try:
                found.append(int(json.loads(file.read_text())["pid"]))
            except (OSError, ValueError, KeyError):
                continue
        return [pid for pid in found if _is_worker(pid)]

    def strike(self) -> None:
        """Kill something that is there; the launcher is started again where it has ended."""
        if self.launcher.poll() is not None:
            self.launcher = self.start()
        counted = Counter(self.done)
        fewest = min(counted[kind] for kind in VICTIMS)
        victim = self.random.choice([kind for kind in VICTIMS if counted[kind] <= fewest + 1])
        if victim == "launcher" and self.workers():
            self.launcher.kill()
            self.launcher.wait(timeout=30)
            self.done.append(victim)
        elif victim == "writer":
            if not Path("kill-a-writer").exists():
                Path("kill-a-writer").touch()
                self.done.append(victim)
        elif victim == "cell" and (workers := self.workers()):
            os.kill(self.random.choice(workers), signal.SIGKILL)
            self.done.append(victim)


def _is_worker(pid: int) -> bool:
    """Whether a number is still that of a worker of ours: nothing else may be killed."""
    try:
        return b"chaos_worker.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


@pytest.mark.timeout(3 * TIMEOUT_S)
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")
def test_a_sweep_survives_ten_kills():
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed of the chaos: {seed}")
    Path("text.txt").write_text(TEXT * 200)
    quiet = launch(*SWEEP, "sweep.name=quiet")
    assert quiet.wait(timeout=TIMEOUT_S) == 0, Path("launcher.txt").read_text()

    chaos, pause = Chaos(Layout(Path.cwd() / "results" / "chaos"), seed), threading.Event()
    while len(chaos.done) < KILLS:
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
    log = Path("launcher.txt").read_text()
    assert code == 0, log
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
    assert list(disturbed.directory.glob("*/.*.tmp")) == []
    assert list(disturbed.claims.glob("*.claim.*")) == []
    assert numbers(disturbed.directory) == numbers(quiet.directory)
    assert len(numbers(disturbed.directory)) == CELLS
