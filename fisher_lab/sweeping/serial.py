"""``hydra/launcher=serial``: one cell after the other, in the launching process.

The libraries are imported once, a debugger works, and nothing has to be set up: the default. A cell
that takes the process down takes the sweep with it, until it is started again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from fisher_lab.runs import record
from fisher_lab.runs.signals import Watch

from . import worker
from .cell import Cell, Frozen
from .elsewhere import Elsewhere
from .progress import Tally, say
from .supervisor import brief


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
            if tally.exhausted or (cell.config.sweep.fail_fast and tally.failures):
                tally.end(cell, "not started", None, None)
                continue
            say(f"#{number} : {cell.label}")
            began = time.monotonic()
            if worker.run(file) == worker.HELD:
                elsewhere.add(cell, file)
                continue
            directory = cell.layout.run_directory(cell.run_id)
            status = record.status_of(directory) or "failed"
            message = brief(directory) if status == "failed" else None
            tally.end(cell, status, message, time.monotonic() - began)
        while elsewhere.cells:
            for cell, file in elsewhere.look(tally):
                worker.run(file)
                status = record.status_of(cell.layout.run_directory(cell.run_id)) or "failed"
                tally.end(cell, status, None, None)
            elsewhere.wait()
