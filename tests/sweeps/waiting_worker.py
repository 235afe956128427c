"""A real worker whose training waits, at a step, for a signal, where it is told to.

One worker takes the order, a file named ``hold`` in the working directory, and says so by a file
``held`` with its run's directory in it. So a signal comes in the middle of a training, however fast
that is and however late the signal.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

from fisher_lab.runs import atomic
from fisher_lab.runs.signals import leave
from fisher_lab.sweeps import worker
from fisher_lab.workload import training_loop

ORDER, HELD = Path("hold"), Path("held")
AT_STEP = 50
_train = training_loop.train


def held(
    model: Any, objective: Any, run: Any, directory: Path, *, signals: Any, **more: Any
) -> Any:
    """What `training.train` does, with a wait for a signal after a step."""

    def after_step(done: int) -> None:
        if done < AT_STEP or not ORDER.exists():
            return
        try:
            ORDER.rename(f"{ORDER}.taken")
        except FileNotFoundError:
            return  # another worker took it
        atomic.write_text(HELD, str(directory))
        with signals.deferred() as pending:  # the training's own
            while not pending():
                threading.Event().wait(0.01)

    return _train(
        model, objective, run, directory, signals=signals, after_step=after_step, **more
    )  # fmt: skip


if __name__ == "__main__":
    training_loop.train = held
    leave(worker.main(sys.argv[1:]))
