"""``hydra/launcher=serial``: one cell after the other, in the launching process.

The libraries are imported once, a debugger works, and nothing has to be set up: the default. A cell
that takes the process down takes the sweep with it, until it is started again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from fisher_lab.runs import record
from fisher_lab.runs.signals import Watch
from fisher_lab.sweeps import worker
from fisher_lab.sweeps.cell import Cell, Frozen
from fisher_lab.sweeps.directory import RUN_LOG
from fisher_lab.sweeps.elsewhere import Elsewhere
from fisher_lab.sweeps.tally import Tally, say
from fisher_lab.sweeps.worker_process import brief, keep_tail, tail


def run(cells: Sequence[Cell], frozen: Sequence[Frozen], tally: Tally) -> None:
    """Run cells.

    Args:
        cells: what is to be done, in this order.
        frozen: the same, as submitted.
        tally: is told how each ended.

    Raises:
        Interrupted: a signal; the cells that were not started are left as they are.
    """
    elsewhere = Elsewhere()
    with Watch():
        for number, (cell, file) in enumerate(zip(cells, frozen, strict=True)):
            stopped = tally.exhausted or (cell.config.sweep.fail_fast and tally.failures)
            if stopped or file.cancelled:
                tally.end(cell, "not started", None, None)
                continue
            say(f"#{number} : {cell.label}")
            began = time.monotonic()
            if not _run(cell, file, tally, began):
                elsewhere.add(cell, file)
        while elsewhere.cells:
            for cell, file in elsewhere.look(tally):
                if not _run(cell, file, tally, time.monotonic()):
                    elsewhere.add(cell, file)
            elsewhere.wait()


def _run(cell: Cell, file: Frozen, tally: Tally, began: float) -> bool:
    """Run a cell to its end; false where somebody else holds it."""
    code = worker.run(file)
    if code == worker.HELD:
        return False
    if code == worker.CANCELLED:  # the user has cancelled the sweep in this moment
        tally.end(cell, "not started", None, None)
        return True
    status = record.status_of(file.directory) or "failed"
    message = None
    if status == "failed":
        message = brief(file.directory)
        _keep_tail(file)
    tally.end(cell, status, message, time.monotonic() - began)
    return True


def _keep_tail(file: Frozen) -> None:
    claim = file.layout.claim(file.run_id, file.stale_after_s)
    if claim.acquire():
        with claim:
            keep_tail(file.directory, tail(file.directory / RUN_LOG))
