"""A real worker that dies or waits where a file in the working directory orders it.

One worker takes an order. ``kill-a-writer`` kills it between a temporary file and its rename.
``hold`` makes its training wait, at a step, for a signal, so that the signal comes in the middle of
a training, however fast that is and however late the signal; ``held`` then has the run's directory.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from fisher_lab.runs import atomic
from fisher_lab.runs.signals import leave
from fisher_lab.sweeps import worker

DIE, HOLD, HELD = Path("kill-a-writer"), Path("hold"), Path("held")
AT_STEP = 50
_flush = atomic._flush


def takes(order: Path) -> bool:
    """Whether this worker is the one that takes an order."""
    try:
        order.rename(f"{order}.{os.getpid()}")
    except FileNotFoundError:
        return False
    return True


def flush_or_die(path: Path) -> None:
    """What `atomic` calls when the temporary file is written and not yet renamed."""
    _flush(path)
    if path.name.endswith(".tmp") and takes(DIE):
        os.kill(os.getpid(), signal.SIGKILL)


def hold_trainings() -> None:
    """Make `training_loop.train` wait for a signal after a step."""
    from fisher_lab.workload import training_loop

    train = training_loop.train

    def held(model: Any, objective: Any, run: Any, directory: Path, **more: Any) -> Any:
        def after_step(done: int) -> None:
            if done < AT_STEP or not takes(HOLD):
                return
            atomic.write_text(HELD, str(directory))
            with more["signals"].deferred() as pending:  # the training's own
                while not pending():
                    threading.Event().wait(0.01)

        return train(model, objective, run, directory, after_step=after_step, **more)

    training_loop.train = held


if __name__ == "__main__":
    atomic._flush = flush_or_die
    if HOLD.exists():
        hold_trainings()
    leave(worker.main(sys.argv[1:]))
