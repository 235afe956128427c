"""K-FAC on tiny random models of transformers' architectures, against references of their own.

python -m benchmarks.zoo [--task causal ...] [--out FOLDER] [NAME ...]
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.zoo.examine import examine
from benchmarks.zoo.mappings import TASKS
from benchmarks.zoo.table import write

SECONDS = 120


class Late(BaseException):
    """An architecture took too long."""


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="types of models; all without any")
    parser.add_argument("--task", action="append", choices=TASKS, help="all without any")
    parser.add_argument("--out", type=Path, help="folder for a JSON file a mapping")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for task in options.task or TASKS:
        rows = run(task, options.names)
        print(task, dict(Counter(row["status"] for row in rows.values())))
        if options.out:
            keep(options.out / f"{task}.json", rows)
            write(options.out)


def run(task: str, names: list[str]) -> dict[str, dict[str, Any]]:
    """Examines the architectures of a mapping, each within a limit of time."""
    rows = {}

    def late(*_: object) -> None:
        raise Late(f"more than {SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    for kind, name in TASKS[task].classes.items():
        if names and kind not in names:
            continue
        start = time.monotonic()
        signal.alarm(SECONDS)
        try:
            row = examine(task, kind)
        except Late as error:
            row = {"status": "crashed", "why": str(error)}
        signal.alarm(0)
        rows[kind] = row = {"class": name, **row}
        row["seconds"] = round(time.monotonic() - start, 1)
        share = f"{row['coverage']:.0%} {row['of_reached']:.0%}" if "coverage" in row else ""
        print(
            f"{kind:28} {row['status']:10} {share:>9} {row['seconds']:5} {row['why'][:110]}",
            flush=True,
        )
    return rows


def keep(path: Path, rows: dict[str, dict[str, Any]]) -> None:
    """Writes the rows of a mapping beside those that are there already."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(path.read_text()) if path.is_file() else {}
    text = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in {**before, **rows}.items())
    path.write_text(f"{{\n{text}\n}}\n")


if __name__ == "__main__":
    main()
