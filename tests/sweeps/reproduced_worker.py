"""A worker process whose numbers follow from damping and seed, and from an offset that is given."""

from __future__ import annotations

import os
import sys
import types
from typing import Any

from fisher_lab.runs.signals import leave
from fisher_lab.sweeps import worker
from fisher_lab.tasks import runner

OFFSET = "REPRODUCED_OFFSET"


def run(config: Any, run: Any) -> None:
    """Write numbers, or fail where a number is asked for that is none."""
    offset = float(os.environ.get(OFFSET, "0"))
    if offset != offset:
        raise RuntimeError("no numbers any more")
    value = 1.0 + config.seed + (config.kfac.damping or 0.0)
    run.table("layers.csv", [{"name": "h.0", "kappa_A": value, "seconds": os.getpid()}])
    run.metrics({"loss": value * (1 + offset), "kfac/total_s": float(os.getpid())})


def install() -> None:
    """Put the task in the place of every other one."""
    module = types.ModuleType("small_task")
    module.run = run  # type: ignore[attr-defined]
    sys.modules["small_task"] = module
    runner.TASKS = dict.fromkeys(runner.TASKS, "small_task")
    runner._content = lambda config: ({"data": "abc"}, None)
    runner.prepare = lambda config: {"device": "cpu", "threads": 1}


if __name__ == "__main__":
    install()
    leave(worker.main(sys.argv[1:]))
