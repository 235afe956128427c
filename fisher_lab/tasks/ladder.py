"""``task=ladder``: how near K-FAC and its like come to the exact Fisher matrix, rung by rung.

``ladder.csv`` has a row for every rung and layer, and one for all layers together; ``ladder.png``
draws them. What a step along each rung's answer is worth is measured as in ``task=analyze``
(``step_curve.csv``). See ``docs/ladder.md``.
"""

from __future__ import annotations

import logging
import math
from typing import Any

from fisher_lab.config.schema import Config
from fisher_lab.curvature.ladder import BLOCKS, EXACT, RUNGS, SPLIT, Ladder, ladder
from fisher_lab.distributed.process_group import Ranks
from fisher_lab.runs.record import Run
from fisher_lab.tasks.progress import Progress
from fisher_lab.tasks.spectra import draw
from fisher_lab.tasks.steps import heldout_parts, run_steps
from fisher_lab.workload.build import build

log = logging.getLogger(__name__)

LADDER_FILE = "ladder.csv"
ALL = "all"
"""The row of all layers together."""


def run(config: Config, run: Run) -> None:
    """Compare the damped inverses of the exact Fisher matrix and of its approximations.

    Args:
        config: the validated configuration.
        run: the run's record; gets ``metrics.json``, ``ladder.csv``, ``step_curve.csv`` and their
            figures.

    Raises:
        ConfigError: text or model cannot be had as configured.
        fisher_lab.curvature.errors.CurvatureError: a matrix cannot be formed or applied.
    """
    progress, ranks, task = Progress(config.progress), Ranks(), config.task
    workload = build(config, progress.track, run.signals)
    run.note(workbench=workload.record)
    batches = workload.batches("train", config.kfac.n_batches, config.seed)
    found = ladder(
        workload.model, batches, config.kfac, damping=task.ladder_damping, tol=task.ladder_tol,
        max_products=task.ladder_products, seed=config.seed, loss_fn=workload.loss_fn,
        progress=progress.track,
    )  # fmt: skip
    rows = ladder_rows(found)
    run.table(LADDER_FILE, rows)
    run.metrics(ladder_metrics(found))
    run.note(ladder={"operator": found.operator, "left_out": dict(found.left_out)})
    for name, why in found.left_out.items():
        log.warning("%s is left out: %s", RUNGS[name], why)
    for name in (EXACT, BLOCKS):
        if found.rungs[name].residual > task.ladder_tol:
            log.warning(
                "%s: residual %.1e after %d products; its rungs are compared with that "
                "(task.ladder_products)", RUNGS[name], found.rungs[name].residual,
                found.rungs[name].products,
            )  # fmt: skip
    draw("ladder", {"rows": rows}, run)
    if not task.heldout_batches:
        return
    heldout = heldout_parts(config, workload, ranks)
    directions = {name: rung.solution for name, rung in found.rungs.items()}
    run_steps(workload, directions, batches, heldout, math.nan, run, progress, ranks)


def ladder_rows(found: Ladder) -> list[dict[str, Any]]:
    """Returns a row for every rung over all layers, and then for every layer and rung."""
    rows = []
    for layer in (None, *found.layers):
        for name, rung in found.rungs.items():
            near = found.closeness(name, layer)
            row = {
                "layer": ALL if layer is None else layer, "rung": name,
                "error": None if name == SPLIT else near.error,  # of another damping
                "cosine": near.cosine, "share": near.share,
            }  # fmt: skip
            whole = layer is None
            row |= {"products": rung.products if whole else None}
            row |= {"residual": rung.residual if whole else None}
            rows.append(row | {"seconds": rung.seconds if whole else None})
    return rows


def ladder_metrics(found: Ladder) -> dict[str, float]:
    """Returns the flat numbers, over all layers."""
    metrics = {
        "labels": float(found.n_labels),
        "ladder/damping": found.lam,
        "ladder/mean_eigenvalue": found.mean_eigenvalue,
        "ladder/products": float(found.rungs[EXACT].products),
        "ladder/residual": max(found.rungs[name].residual for name in (EXACT, BLOCKS)),
    }
    for name in found.rungs:
        near = found.closeness(name)
        metrics[f"ladder/{name}/cosine"] = near.cosine
        if name != SPLIT:
            metrics[f"ladder/{name}/error"] = near.error
    return metrics
