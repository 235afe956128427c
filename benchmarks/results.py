"""Loading and tabulating many runs: 1,000 and 10,000 synthetic run directories.

    python benchmarks/results.py [--runs 1000 10000] [--json FILE] [--keep DIRECTORY]

The directories have the content of real runs: a configuration of some 130 settings, provenance, 33
metrics, and (with ``--layers``) ``layers.csv``. Every step runs in a fresh process: ``load`` reads
the runs, ``table`` reads them and makes the ablation table, ``layers`` reads the layers. Times are
wall clock and CPU seconds, memory is the peak resident set; the files are in the page cache.
`benchmarks/results/results.json` has the last measurement.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from fisher_lab.runs import provenance

DAMPINGS = [10.0 ** -(i / 4) for i in range(20)]
POLICIES = ["all", "auto", "hybrid", "small_only"]
KAPPAS = [1e5, 1e6, 1e7, None, 1e4]

METRICS = 33
SETTINGS = 130


def template() -> dict[str, Any]:
    """A record as large as a real one."""
    filler = {
        f"section_{i}": {f"key_{j}": [j, 0.5, "word", None, True][j % 5] for j in range(13)}
        for i in range(SETTINGS // 13)
    }
    return {
        "schema": "fisher_lab.run/1", "run_id": "", "status": "completed", "reason": None,
        "started": "2026-01-01T00:00:00.000+00:00", "finished": "2026-01-01T00:01:00.000+00:00",
        "config": {"seed": 0, "kfac": {}, **filler}, "overrides": [], "error": None,
        "provenance": {
            "git": {"commit": "0" * 40, "dirty": False},
            "versions": {f"package-{i}": f"1.{i}.0" for i in range(12)},
            "host": {"name": "machine", "cpu": "a processor", "cpus": 2, "memory_mb": 16000},
            "workbench": {f"key_{i}": i for i in range(20)},
        },
    }  # fmt: skip


def make(root: Path, runs: int, layers: bool) -> None:
    """Write the directories: a grid of settings with seeds; 1 % have failed."""
    rng = random.Random(0)
    base = template()
    cells = [(d, p, k) for d in DAMPINGS for p in POLICIES for k in KAPPAS]
    for i in range(runs):
        damping, policy, kappa = cells[i % len(cells)]
        record = copy.copy(base)
        seed = i // len(cells)
        kfac = {"damping": damping, "policy": policy, "max_condition_number": kappa}
        record["config"] = {**base["config"], "seed": seed, "kfac": kfac}
        record["run_id"] = f"{i:016x}"
        record["overrides"] = [f"seed={seed}", *(f"kfac.{k}={v}" for k, v in kfac.items())]
        if i % 100 == 99:
            record |= {"status": "failed", "error": {"type": "MemoryError", "message": "full"}}
        folder = root / f"{i:016x}"
        folder.mkdir()
        (folder / "run.json").write_text(json.dumps(record, indent=2))
        metrics = {f"ng/metric_{j}": rng.gauss(j, 1.0) for j in range(METRICS)}
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=2))
        if layers:
            lines = ["name,dim_A,clipped_A,kappa_A"]
            lines += [f"h.{j},128,{j},{rng.random() * 1e6}" for j in range(26)]
            (folder / "layers.csv").write_text("\n".join(lines) + "\n")
    (root / "sweep.json").write_text(json.dumps({"name": "many", "claims": []}))


def step(name: str, root: Path) -> dict[str, Any]:
    """Run one step in this process."""
    from fisher_lab import results

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, cpu = time.perf_counter(), time.process_time()
    if name == "layers":
        frame = results.load_layers(root)
    else:
        frame = results.load(root)
        if name == "table":
            metrics = [f"ng/metric_{j}" for j in range(4)]
            table = results.tabulate(frame, metrics=metrics)
            assert len(table.rows) == min(len(frame), len(DAMPINGS) * len(POLICIES) * len(KAPPAS))
    return {
        "step": name,
        "rows": len(frame),
        "seconds": round(time.perf_counter() - start, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "peak_before_mib": round(before / 1024),
    }


def measure(root: Path, layers: bool) -> list[dict[str, Any]]:
    """Run each step in a process of its own."""
    found = []
    names = ("load", "table", "layers") if layers else ("load", "table")
    for name in names:
        command = [sys.executable, __file__, "--step", name, "--keep", str(root)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
        found.append(json.loads(done.stdout))
    return found


def machine() -> dict[str, Any]:
    """Describes the machine, without its name."""
    return {**provenance.machine(), "pandas": metadata.version("pandas")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, nargs="+", default=[1_000, 10_000])
    parser.add_argument("--layers", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", type=Path, help="make the directories here and leave them")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        print(json.dumps(step(args.step, args.keep)))
        return
    found: dict[str, Any] = {"machine": machine(), "sizes": []}
    print(", ".join(f"{key} {value}" for key, value in found["machine"].items()))
    for runs in args.runs:
        with tempfile.TemporaryDirectory() as folder:
            root = (args.keep or Path(folder)) / str(runs)
            root.mkdir(parents=True)
            make(root, runs, args.layers)
            steps = measure(root, args.layers)
        found["sizes"].append({"runs": runs, "steps": steps})
        for one in steps:
            print(
                f"{runs:>6} runs {one['step']:8} {one['rows']:>8} rows {one['seconds']:>7.2f} s "
                f"wall {one['cpu_seconds']:>7.2f} s CPU {one['peak_mib']:>6} MiB peak",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
