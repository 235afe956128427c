"""A worker of one cell, or of sweeps, whose task is over at once, or dies as the seed says."""

from __future__ import annotations

import os
import signal
import sys
import threading
import types
from typing import Any

from fisher_lab.runs.signals import leave
from fisher_lab.sweeps import work, worker
from fisher_lab.tasks import runner

RAISES, KILLED, CRASHES, EXITS, HANGS, WAITS, PREEMPTED = 13, 14, 15, 16, 17, 18, 19
"""Seeds for which the task does something else than to succeed."""


SLOW = 100
"""From this seed on a cell takes three seconds."""


def run(config: Any, run: Any) -> None:
    """Write one number, or die."""
    print(f"the seed is {config.seed}", flush=True)
    match config.seed:
        case 13:
            raise RuntimeError("thirteen is no seed")
        case 14:
            os.kill(os.getpid(), signal.SIGKILL)
        case 15:
            os.kill(os.getpid(), signal.SIGSEGV)
        case 16:
            os._exit(7)
        case 17:
            # Deaf to everything but SIGKILL.
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGUSR2])
            print("and deaf", flush=True)
            threading.Event().wait(60)
        case 18:
            threading.Event().wait(60)
        case 19:
            os.kill(os.getpid(), signal.SIGUSR2)
    if config.seed >= SLOW:
        threading.Event().wait(3)
    print(f"GPUs: {os.environ.get('CUDA_VISIBLE_DEVICES')}", flush=True)
    run.metrics({"loss": 1.0 / (1 + config.seed)})


if __name__ == "__main__":
    module = types.ModuleType("small_task")
    module.run = run  # type: ignore[attr-defined]
    sys.modules["small_task"] = module
    runner.TASKS = dict.fromkeys(runner.TASKS, "small_task")
    runner._content = lambda config: ({"data": "abc"}, None)
    runner.prepare = lambda config: {}
    is_cell = sys.argv[1].endswith(".json")
    leave((worker if is_cell else work).main(sys.argv[1:]))
