"""The overhead of a sweep: ``python benchmarks/sweeps.py --cells 200``.

The task is replaced by one that records a number and ends. What remains is the framework: cells are
composed, validated and frozen, and there are locks, the journal and the records. With ``local``,
every cell also takes a process and its imports, which are measured separately by a process that
imports what a worker imports. CPU seconds are the sum of all processes; on a shared machine they
are more reliable than wall clock.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WORKER = """
import sys, types
from fisher_lab.tasks import ranks, runner, summary
from fisher_lab.sweeps import worker
from fisher_lab.workload import content_identity
module = types.ModuleType("nothing")
module.run = lambda config, run: run.metrics({"loss": 1.0})
sys.modules["nothing"] = module
runner.TASKS = dict.fromkeys(runner.TASKS, "nothing")
runner.prepare = lambda config: {}
if len(sys.argv) > 1:
    worker.leave(worker.main(sys.argv[1:]))
"""


@dataclass
class Spent:
    """Seconds by the clock and of processors, this process's and its children's."""

    wall: float = 0.0
    cpu: float = 0.0

    @classmethod
    def now(cls) -> Spent:
        """Since whenever; of use in differences."""
        times = os.times()
        cpu = times.user + times.system + times.children_user + times.children_system
        return cls(time.perf_counter(), cpu)

    def __sub__(self, other: Spent) -> Spent:
        return Spent(self.wall - other.wall, self.cpu - other.cpu)

    def __str__(self) -> str:
        return f"{self.wall:.1f} | {self.cpu:.1f}"


@dataclass
class Row:
    """One sweep: all of it, and of that what is not the framework's own."""

    name: str
    total: Spent
    composing: Spent
    imports: Spent

    def line(self, cells: int) -> str:
        """A row of the table."""
        own = self.total - self.composing - self.imports
        each = f"{1e3 * own.cpu / cells:.1f}"
        parts = (self.name, cells, self.total, self.composing, self.imports, own, each)
        return f"| {' | '.join(map(str, parts))} |"


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=200)
    parser.add_argument("--n-jobs", type=int, default=2)
    chosen = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("worker.py").write_text(WORKER)
        rows = [serial(chosen.cells), local(chosen.cells, chosen.n_jobs), again(chosen.cells)]
    names = ("total", "composing", "imports", "own")
    print("| sweep | cells |", " | ".join(f"{name}, s | cpu, s" for name in names), "| ms a cell |")
    print("|---" * (3 + 2 * len(names)) + "|")
    for row in rows:
        print(row.line(chosen.cells))


def sweep(cells: int, *arguments: str) -> tuple[Spent, Spent]:
    """Run one; returns what all of it and what composing took."""
    from fisher_lab import cli
    from fisher_lab.config import compose
    from fisher_lab.config import compose as sweeps

    composing = Spent()
    _timed(sweeps.Composer, "__call__", composing)
    _timed(compose, "load", composing)
    began = Spent.now()
    sys.stdout.flush()
    with open(os.devnull, "w") as nowhere:
        kept, sys.stdout = sys.stdout, nowhere
        try:
            code = cli.main(["-m", f"seed=range({cells})", *arguments])
        finally:
            sys.stdout = kept
    assert code == 0, "the sweep failed"
    return Spent.now() - began, composing


def _timed(owner: Any, name: str, spent: Spent) -> None:
    before = getattr(owner, name)
    before = getattr(before, "__wrapped__", before)

    def call(*args: Any, **kwargs: Any) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            return before(*args, **kwargs)
        finally:
            spent.wall += time.perf_counter() - wall
            spent.cpu += time.process_time() - cpu

    call.__wrapped__ = before  # type: ignore[attr-defined]
    setattr(owner, name, call)


def serial(cells: int) -> Row:
    """In the launching process, whose imports are paid before the clock starts."""
    import hydra.core.utils  # noqa: F401

    from fisher_lab.results import finishing  # noqa: F401
    from fisher_lab.sweeps import run as session  # noqa: F401
    from fisher_lab.tasks import runner, summary  # noqa: F401

    module = types.ModuleType("nothing")
    module.run = lambda config, run: run.metrics({"loss": 1.0})  # type: ignore[attr-defined]
    sys.modules["nothing"] = module
    runner.TASKS = dict.fromkeys(runner.TASKS, "nothing")
    runner.prepare = lambda config: {}
    return Row("serial", *sweep(cells, "sweep.name=serial"), Spent())


def local(cells: int, n_jobs: int) -> Row:
    """In processes of their own, whose imports run side by side."""
    from fisher_lab.sweeps import worker_process

    worker_process.WORKER = (str(Path("worker.py").resolve()),)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    tries = 5
    began = Spent.now()
    for _ in range(tries):
        subprocess.run([sys.executable, "worker.py"], env=environment, check=True)
    each = Spent.now() - began
    imports = Spent(each.wall / tries * cells / n_jobs, each.cpu / tries * cells)
    arguments = ("sweep.name=local", "hydra/launcher=local", f"hydra.launcher.n_jobs={n_jobs}")
    return Row(f"local, {n_jobs} jobs", *sweep(cells, *arguments), imports)


def again(cells: int) -> Row:
    """A sweep of which nothing is left to do."""
    return Row("again, nothing to do", *sweep(cells, "sweep.name=serial"), Spent())


if __name__ == "__main__":
    main()
