"""What a sweep costs beside its cells: ``python benchmarks/sweeps.py --cells 200``.

The task is replaced by one that records a number and ends, so that what is left is the framework:
composing and validating the cells, freezing them, claims, the journal and the records. With
``local`` every cell also pays for a process and its imports, which are measured apart, by a process
that imports what a worker does and ends.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WORKER = """
import sys, types
from fisher_lab.tasks import job
from fisher_lab.sweeping import worker
module = types.ModuleType("nothing")
module.run = lambda config, run: run.metrics({"loss": 1.0})
sys.modules["nothing"] = module
job.TASKS = dict.fromkeys(job.TASKS, "nothing")
job._prepare = lambda config: {}
if len(sys.argv) > 1:
    worker.leave(worker.main(sys.argv[1:]))
"""


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
    print("| sweep | cells | seconds | composing | imports | the framework's own |")
    print("|---|---|---|---|---|---|")
    for name, total, composing, imports in rows:
        own = total - composing - imports
        print(
            f"| {name} | {chosen.cells} | {total:.1f} | {composing:.1f} | {imports:.1f} "
            f"| {own:.1f} |"
        )


def sweep(cells: int, *arguments: str) -> tuple[float, float]:
    """Run one; returns the seconds of all of it and of composing."""
    from fisher_lab import cli
    from fisher_lab.config import compose
    from fisher_lab.config import sweep as sweeps

    spent = [0.0]
    _timed(sweeps.Composer, "__call__", spent)
    _timed(compose, "load", spent)
    began = time.perf_counter()
    sys.stdout.flush()
    with open(os.devnull, "w") as nowhere:
        kept, sys.stdout = sys.stdout, nowhere
        try:
            code = cli.main(["-m", f"seed=range({cells})", *arguments])
        finally:
            sys.stdout = kept
    assert code == 0, "the sweep failed"
    return time.perf_counter() - began, spent[0]


def _timed(owner: Any, name: str, spent: list[float]) -> None:
    before = getattr(owner, name)
    before = getattr(before, "__wrapped__", before)

    def call(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return before(*args, **kwargs)
        finally:
            spent[0] += time.perf_counter() - began

    call.__wrapped__ = before  # type: ignore[attr-defined]
    setattr(owner, name, call)


def serial(cells: int) -> tuple[str, float, float, float]:
    """In the launching process, whose imports are paid before the clock starts."""
    import hydra.core.utils  # noqa: F401

    from fisher_lab.sweeping import session  # noqa: F401
    from fisher_lab.tasks import job

    module = types.ModuleType("nothing")
    module.run = lambda config, run: run.metrics({"loss": 1.0})  # type: ignore[attr-defined]
    sys.modules["nothing"] = module
    job.TASKS = dict.fromkeys(job.TASKS, "nothing")
    job._prepare = lambda config: {}
    return ("serial", *sweep(cells, "sweep.name=serial"), 0.0)


def local(cells: int, n_jobs: int) -> tuple[str, float, float, float]:
    """In processes of their own."""
    from fisher_lab.sweeping import supervisor

    supervisor.WORKER = (str(Path("worker.py").resolve()),)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    tries = 5
    began = time.perf_counter()
    for _ in range(tries):
        subprocess.run([sys.executable, "worker.py"], env=environment, check=True)
    imports = (time.perf_counter() - began) / tries * cells / n_jobs
    arguments = ("sweep.name=local", "hydra/launcher=local", f"hydra.launcher.n_jobs={n_jobs}")
    return (f"local, {n_jobs} jobs", *sweep(cells, *arguments), imports)


def again(cells: int) -> tuple[str, float, float, float]:
    """A sweep of which nothing is left to do."""
    return ("again, nothing to do", *sweep(cells, "sweep.name=serial"), 0.0)


if __name__ == "__main__":
    main()
