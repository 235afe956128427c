"""The step curves of ``task=analyze``: what a step along each direction is worth, in the record.

``step_curve.csv`` has a row for every length that was tried, ``step_curve.png`` draws them,
``step/<direction>/...`` are the metrics, and the record says which direction is ahead.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from fisher_lab.config.schema import Config
from fisher_lab.curvature import step_curve
from fisher_lab.curvature.kfac.engine import KFACNaturalGradient
from fisher_lab.curvature.step_curve import CHOOSING, JUDGING, OWN, StepCurves
from fisher_lab.distributed.process_group import Ranks
from fisher_lab.runs.record import Run
from fisher_lab.tasks.progress import Progress
from fisher_lab.tasks.spectra import draw
from fisher_lab.workload.build import Workload

log = logging.getLogger(__name__)

CURVE_FILE = "step_curve.csv"

MODEL_DECREASE = 0.01
"""The quadratic term of K-FAC's model at the step ``ng/eta``, in nats."""

OWN_BATCHES = 8
"""Of the batches of the factors, so many are evaluated at every length."""

KEPT = 0.9
"""Rounding that leaves less of a chosen step than this is warned about."""

NATURAL, EKFAC, GRADIENT, SIGN = "natural", "ekfac", "gradient", "sign"
"""The directions; the sign of the gradient is Adam's first step."""

Vectors = Mapping[str, Tensor]


def directions_of(
    engine: KFACNaturalGradient, gradient: Vectors, natural: Vectors, workload: Workload
) -> dict[str, Vectors]:
    """Returns the directions by name, over the parameters that K-FAC covers.

    With ``kfac.ekfac`` there are two natural gradients, with and without the correction of the
    eigenvalues, from the same factors.
    """
    found: dict[str, Vectors] = {NATURAL: natural}
    if engine.settings.ekfac:
        plain = engine.uncorrected_natural_gradient(workload.model)
        found = {NATURAL: {n: plain[n] for n in natural}, EKFAC: natural}
    sign = {name: value.sign() for name, value in gradient.items()}
    return {**found, GRADIENT: gradient, SIGN: sign}


def heldout_parts(config: Config, workload: Workload, ranks: Ranks) -> list[Any]:
    """Returns the held-out batches, on several ranks this rank's part of each.

    No window comes twice: it would be in the half that chooses and in the half that judges.
    """
    wanted = config.task.heldout_batches
    most = workload.objective.distinct_batches(config.data.batch_size, config.data.seq_len)
    n = wanted if most is None else min(wanted, max(most, 1))
    if n < wanted:
        log.warning("the held-out text has %d batches; task.heldout_batches asks for %d", n, wanted)
    batches = workload.batches("heldout", n, config.seed)
    return ranks.own_parts(batches) if ranks.reduced.size > 1 else batches


def run_steps(
    workload: Workload,
    directions: Mapping[str, Vectors],
    own: Sequence[Any],
    heldout: Sequence[Any],
    eta: float,
    run: Run,
    progress: Progress,
    ranks: Ranks,
) -> StepCurves:
    """Measures the curves, and writes metrics, table, figure and what came out.

    Args:
        workload: the model and its loss.
        directions: by name; the first is the one that ``eta`` belongs to.
        own: the batches that the directions were computed from; the first few are shown.
        heldout: the held-out batches; on ranks both are this rank's parts.
        eta: ``ng/eta``, drawn as a mark; NaN where there is none.
        run: gets the metrics, ``step_curve.csv``, the figure and the note ``step``.
        progress: shows the directions.
        ranks: those of the run; collective.
    """
    curves = step_curve.step_curves(
        workload.model, directions, heldout, own[:OWN_BATCHES], loss_fn=workload.loss_fn,
        ranks=ranks.reduced, progress=progress.track,
    )  # fmt: skip
    run.metrics(step_metrics(curves))
    rows = step_rows(curves)
    run.table(CURVE_FILE, rows)
    about = outcome(curves)
    run.note(step=about)
    for name, curve in curves.curves.items():
        kept = curve.at(curve.length).kept
        if kept < KEPT:
            log.warning("direction %s: rounding leaves %.0f%% of the chosen step", name, 100 * kept)
    if ranks.is_rank_zero:
        named = next(iter(curves.curves))
        mark = eta * curves.curves[named].norm if math.isfinite(eta) else None
        draw("step_curve", {"rows": rows, "eta": mark}, run)
    return curves


def step_metrics(curves: StepCurves) -> dict[str, float]:
    """Returns the flat numbers; those that a single held-out batch cannot give are left out."""
    judging = curves.before[JUDGING]
    both = [curves.before[half] for half in (CHOOSING, JUDGING)]
    labels = sum(float(half.labels.sum()) for half in both)
    metrics = {
        "ng/heldout_loss": sum(float(half.losses.sum()) for half in both) / labels,
        "step/batches": float((judging.labels > 0).sum()),
    }
    for name, curve in curves.curves.items():
        judged = curve.change(JUDGING)
        metrics |= {
            f"step/{name}/length": curve.length,
            f"step/{name}/heldout_change": judged.mean,
            f"step/{name}/se": judged.se,
            f"step/{name}/own_change": curve.change(OWN).mean,
        }
        if name != GRADIENT and GRADIENT in curves.curves:
            against = curves.difference(name, GRADIENT)
            metrics[f"step/{name}/gain"] = -against.mean
            metrics[f"step/{name}/gain_se"] = against.se
            metrics[f"step/{name}/gain_low"] = -against.interval()[1]
    return {key: value for key, value in metrics.items() if not math.isnan(value)}


def step_rows(curves: StepCurves) -> list[dict[str, Any]]:
    """Returns a row for every direction and length: changes in nats a label, standard errors."""
    rows = []
    for name, curve in curves.curves.items():
        for point in curve.points:
            row: dict[str, Any] = {
                "direction": name,
                "length": point.length,
                "distance": point.length * curve.norm,
                "chosen": point.length == curve.length,
                "kept": point.kept,
            }
            for part in (OWN, CHOOSING, JUDGING):
                change = curve.change(part, point.length)
                row |= {f"{part}_change": change.mean, f"{part}_se": change.se}
            row["judging_low"], row["judging_high"] = change.interval()
            rows.append(row)
    return rows


def outcome(curves: StepCurves) -> dict[str, Any]:
    """Returns what the record says of the curves: who is ahead, by how much, and what was odd."""
    lead = curves.lead()
    low, high = lead.margin.interval()
    return {
        "first": lead.first,
        "rival": lead.rival,
        "margin": lead.margin.mean,
        "low": low,
        "high": high,
        "confidence": step_curve.CONFIDENCE,
        "certain": lead.certain,
        "batches": lead.margin.n,
        "edges": {n: c.edge for n, c in curves.curves.items() if c.edge},
        "kept": {n: c.at(c.length).kept for n, c in curves.curves.items()},
    }


def eta_of(decrement: float) -> float:
    """Returns the length at which the quadratic term of K-FAC's model is 0.01 nats; NaN if none.

    The term is a KL divergence times N/T where not every token is labelled (``docs/math.md``,
    section 1).
    """
    return math.sqrt(2.0 * MODEL_DECREASE / decrement) if decrement > 0 else math.nan
