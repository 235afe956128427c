"""Cells that are submitted without composing anything, for what does not look into them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from fisher_lab.config.schema import Config, ResumeConfig, SweepConfig
from fisher_lab.runs.record import Run
from fisher_lab.sweeps.cell import Cell, submit
from fisher_lab.sweeps.directory import LAUNCH_FILE, SWEEP_FILE, Layout


def submitted(
    *seeds: int, alone: bool = False, stale_after_s: float = 60.0, **sweep: Any
) -> list[Cell]:
    """Cells of ``results/made``, one a seed, as one launch submits them.

    Args:
        seeds: of the cells.
        alone: whether no other cell may run beside one.
        stale_after_s: of their locks.
        sweep: settings of the section ``sweep``.
    """
    layout = Layout(Path("results/made").resolve())
    config = dataclasses.replace(
        Config(), sweep=SweepConfig(**sweep), resume=ResumeConfig(stale_after_s=stale_after_s)
    )
    cells = [
        Cell(
            layout=layout,
            run_id=f"seed{seed}",
            overrides=(f"seed={seed}",),
            axes={"seed": str(seed)},
            config=dataclasses.replace(config, seed=seed),
            content={"data": "abc"},
            alone=alone,
        )
        for seed in seeds
    ]
    made = submit(cells, {"version": 1})
    (made[0].submission / LAUNCH_FILE).write_text("{}")
    entries = [{"run_id": c.run_id, "axes": c.axes, "overrides": c.overrides} for c in cells]
    (layout.directory / SWEEP_FILE).write_text(json.dumps({"cells": entries}))
    return made


def begin(cell: Cell, status: str = "running", **fields: object) -> None:
    """Leave a record, as a worker that is gone would have."""
    run = Run.start(cell.directory, config=dataclasses.asdict(cell.config), overrides=[])
    about = {"run_id": cell.run_id, "status": status, "provenance": {}, **fields}
    (cell.directory / "run.json").write_text(json.dumps({**run.record, **about}))
