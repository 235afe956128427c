"""The application with a task that costs nothing, and that is killed where a file orders it.

The orders are the names of files in the working directory, each taken once: ``kill-in-task-N`` in
the task of the N-th cell, ``kill-after-N`` when its metrics are written and its record is not
ended, ``kill-in-ledger-N`` in the middle of the N-th line of the ledger of looks.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np

from fisher_lab import cli
from fisher_lab.results.looks import LEDGER_FILE
from fisher_lab.runs import journal
from fisher_lab.tasks import preflight, runner

OFFSETS = {"all": 0.0, "auto": 0.1, "hybrid": 1.0}
cells, lines = itertools.count(1), itertools.count(1)
write = journal.Journal._write


def die_where_ordered(order: str) -> None:
    try:
        os.rename(order, f"{order}.taken")
    except FileNotFoundError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


def run(config: Any, run: Any) -> None:
    """One number: the policy's, with noise that the seed and the policy draw."""
    number = next(cells)
    die_where_ordered(f"kill-in-task-{number}")
    policy = config.kfac.policy
    noise = np.random.default_rng([config.seed, len(policy)]).normal()
    run.metrics({"m": 5.0 + OFFSETS[policy] + 0.25 * float(noise)})
    die_where_ordered(f"kill-after-{number}")


def torn(self: journal.Journal, entries: Any) -> None:
    for entry in entries:
        if self.path.name == LEDGER_FILE:
            order = f"kill-in-ledger-{next(lines)}"
            if Path(order).exists():
                with open(self.path, "a") as file:
                    file.write('{"time": "2026-01-01", "claim": "')
                die_where_ordered(order)
        write(self, [entry])


if __name__ == "__main__":
    module = types.ModuleType("small_task")
    module.run = run  # type: ignore[attr-defined]
    sys.modules["small_task"] = module
    runner.TASKS = dict.fromkeys(runner.TASKS, "small_task")
    runner._content = lambda config: ({"data": "abc"}, None)
    runner.prepare = lambda config: {}
    preflight.preflight = lambda config: {"data": "abc"}
    journal.Journal._write = torn
    sys.exit(cli.main(sys.argv[1:]))
