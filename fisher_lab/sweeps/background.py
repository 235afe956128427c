"""The launcher of a detached sweep: ``python -m fisher_lab.sweeps.background FILE``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fisher_lab.config import launchers
from fisher_lab.runs.signals import Interrupted
from fisher_lab.sweeps.cell import Frozen, thaw
from fisher_lab.sweeps.run import finish, launch
from fisher_lab.sweeps.tally import Tally, report


def main(arguments: list[str]) -> int:
    """Launch the frozen cells that a file lists; returns the exit code."""
    listing = Path(arguments[0])
    data = json.loads(listing.read_text(encoding="utf-8"))
    frozen = [Frozen.load(listing.parent / name) for name in data["cells"]]
    cells = [thaw(one) for one in frozen]
    settings = launchers.check(data["kind"], data["settings"])
    tally = Tally(len(cells), cells[0].config.sweep.max_failures)
    try:
        launch(cells, frozen, tally, settings)
    except Interrupted as stop:
        return 128 + stop.signum
    finish(cells)
    return report(cells, tally)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
