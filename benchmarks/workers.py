"""Workers of a sweep: ``python benchmarks/workers.py --cells 10000 --workers 64``.

The task is one that records a number and ends (as in `benchmarks/sweeps.py`); everything else is
the framework: cells are planned and frozen by a launcher, and taken, run and recorded by workers,
each a process of its own. A cell whose worker is killed is taken over by the others meanwhile.
Seconds of processors are the sum of all processes; on a shared machine they are more reliable than
wall clock. Each worker's imports are measured by a worker that finds nothing to do.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmarks" / "results" / "workers.json"
CHEAP_TASK = """
import sys, types
from fisher_lab.tasks import preflight, runner
module = types.ModuleType("nothing")
module.run = lambda config, run: run.metrics({"loss": 1.0})
sys.modules["nothing"] = module
runner.TASKS = dict.fromkeys(runner.TASKS, "nothing")
runner.prepare = lambda config: {}
"""
LAUNCHER = f"{CHEAP_TASK}\nfrom fisher_lab import cli\ncli.entry()\n"
WORKER = f"{CHEAP_TASK}\nfrom fisher_lab.sweeps import work\nwork.leave(work.main(sys.argv[1:]))\n"


def main() -> None:
    """Run the benchmark, and write its figures."""
    parser = argparse.ArgumentParser(
        description="Workers of a sweep, with a task that does nothing."
    )
    parser.add_argument("--cells", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--output", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        found = measure(chosen.cells, chosen.workers)
    from fisher_lab.runs import atomic, provenance

    found["machine"] = provenance.machine()
    atomic.write_json(chosen.output, found)
    print(json.dumps(found, indent=2))


def measure(cells: int, workers: int) -> dict[str, Any]:
    """Plan the cells, run them with workers of which one is killed, and count."""
    Path("launcher.py").write_text(LAUNCHER)
    Path("worker.py").write_text(WORKER)
    plan = [sys.executable, "launcher.py", "-m", f"seed=range({cells})", "sweep.name=s"]
    launched = spent(lambda: freeze(plan))
    sweep = Path("results/s")
    began, before = time.perf_counter(), children()
    running = [subprocess.Popen([sys.executable, "worker.py", "s"], stdout=subprocess.DEVNULL)
               for _ in range(workers)]  # fmt: skip
    name, killed = kill_at_half(sweep, cells, running[0])
    memory = sum(resident(one.pid) for one in running[1:]) / max(1, len(running) - 1)
    codes = [one.wait(3600) for one in running]
    wall, processors = time.perf_counter() - began, children() - before
    imports = spent(lambda: subprocess.run([sys.executable, "worker.py", "s"], check=True))
    events = [json.loads(line) for line in (sweep / "events.jsonl").read_text().splitlines()]
    ended = Counter(one["run_id"] for one in events if one["event"] == "completed")
    assert codes[1:] == [0] * (workers - 1), codes
    own = processors - workers * imports["processor_s"]
    return {
        "cells": cells,
        "workers": workers,
        "completed": len(ended),
        "completed_twice": sum(number > 1 for number in ended.values()),
        "killed_worker_s_until_taken_over": taken_over(events, name, killed),
        "planned": launched,
        "wall_s": round(wall, 1),
        "processor_s": round(processors, 1),
        "imports_of_a_worker": imports,
        "wall_ms_per_cell": round(1e3 * wall / cells, 2),
        "framework_processor_ms_per_cell": round(1e3 * own / cells, 2),
        "memory_mib_of_a_worker": round(memory, 1),
    }


def freeze(plan: list[str]) -> None:
    """Plan and freeze the cells; the launcher that would wait for the workers is ended."""
    output = Path("launcher.log")
    with output.open("w") as log:
        process = subprocess.Popen([*plan, "hydra/launcher=workers"], stdout=log, stderr=log)
        while "left to workers" not in output.read_text():
            assert process.poll() is None, output.read_text()
            time.sleep(0.1)
        process.terminate()
        process.wait(60)


def kill_at_half(sweep: Path, cells: int, victim: subprocess.Popen[bytes]) -> tuple[str, float]:
    """Kill a worker and the cell that it runs when half of the cells are done: which, and when."""
    import psutil

    while (sweep / "events.jsonl").read_bytes().count(b'"completed"') < cells // 2:
        time.sleep(0.5)
    process = psutil.Process(victim.pid)
    while True:
        process.suspend()
        pids = {child.pid for child in process.children()}
        for file in (sweep / ".sweep" / "locks").glob("*.lock.*"):
            with contextlib.suppress(OSError, ValueError):
                held, name = json.loads(file.read_text())["pid"], file.name.partition(".")[0]
                if held in pids and (sweep / name / "run.json").is_file():
                    for child in process.children():
                        child.kill()
                    process.kill()
                    return name, time.time()
        process.resume()
        time.sleep(0.01)


def taken_over(events: list[dict[str, Any]], name: str, killed: float) -> float | None:
    """Seconds until the cell of the killed worker was begun by another one."""
    begun = [
        datetime.fromisoformat(one["time"]).timestamp()
        for one in events
        if (one["event"], one.get("run_id")) == ("started", name)
    ]
    after = [moment - killed for moment in begun if moment > killed]
    return round(min(after), 2) if after else None


def children() -> float:
    """Processor seconds of the children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def spent(call: Any) -> dict[str, float]:
    """Seconds by the clock and of processors that a call's children take."""
    began, before = time.perf_counter(), children()
    call()
    return {
        "wall_s": round(time.perf_counter() - began, 2),
        "processor_s": round(children() - before, 2),
    }


def resident(pid: int) -> float:
    """MiB of its own and shared with its parent, of a process."""
    import psutil

    return psutil.Process(pid).memory_info().rss / 2**20


if __name__ == "__main__":
    main()
