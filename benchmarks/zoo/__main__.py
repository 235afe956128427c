"""K-FAC on tiny random models of transformers' architectures, against references of their own.

python -m benchmarks.zoo [--task causal ...] [--jobs N] [--out FOLDER] [NAME ...]

The rows of a run that covers a whole mapping take the place of those that were there; others are
written among them, and the table says so if they come from another commit.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import time
from collections import Counter
from importlib import metadata
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

from benchmarks.zoo.mappings import TASKS
from benchmarks.zoo.table import write
from benchmarks.zoo.timed import quiet, timed
from fisher_lab.runs import provenance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="types of models; all without any")
    parser.add_argument("--task", action="append", choices=TASKS, help="all without any")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--out", type=Path, help="folder for a JSON file a mapping")
    options = parser.parse_args()
    start, source = time.monotonic(), code()
    with multiprocessing.get_context("spawn").Pool(options.jobs, quiet) as pool:
        for task in options.task or TASKS:
            rows = run(task, options.names, pool)
            print(task, dict(Counter(row["status"] for row in rows.values())))
            if options.out:
                found = {kind: {**row, "code": source} for kind, row in rows.items()}
                keep(options.out / f"{task}.json", found, whole=not options.names)
                write(options.out)
    print(f"{(time.monotonic() - start) / 60:.0f} minutes")


def run(task: str, names: list[str], pool: Pool) -> dict[str, dict[str, Any]]:
    """Examines the architectures of a mapping, each within a limit of time."""
    kinds = [kind for kind in TASKS[task].classes if not names or kind in names]
    rows = {}
    for kind, row in pool.imap(functools.partial(timed, task), kinds):
        rows[kind] = row
        share = f"{row['coverage']:.0%} {row['of_reached']:.0%}" if "coverage" in row else ""
        print(
            f"{kind:28} {row['status']:10} {share:>9} {row['seconds']:5} {row['why'][:110]}",
            flush=True,
        )
    return rows


def code() -> str:
    """The commit of this checkout and the versions that a row comes from."""
    about = provenance.git()
    changed = " with changes" if about.get("dirty") else ""
    found = [f"commit {str(about.get('commit'))[:10]}{changed}"]
    return ", ".join([*found, *(f"{n} {metadata.version(n)}" for n in ("torch", "transformers"))])


def keep(path: Path, rows: dict[str, dict[str, Any]], whole: bool) -> None:
    """Writes the rows of a mapping, unless it is whole among those that are there already."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(path.read_text()) if path.is_file() and not whole else {}
    text = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in {**before, **rows}.items())
    path.write_text(f"{{\n{text}\n}}\n")


if __name__ == "__main__":
    main()
