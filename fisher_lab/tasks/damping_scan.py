"""The damping scan of ``task=analyze``: many dampings from one set of factors.

Only the solves repeat. For every pair of dampings of the two sides the natural gradient is made
anew, and its step is chosen on one half of the held-out batches and judged on the other, as in the
step curves. ``damping_scan.csv`` has a row for every pair, ``damping_scan.png`` is the map.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from typing_extensions import override

from fisher_lab.curvature import step_curve
from fisher_lab.curvature.kfac.engine import KFACNaturalGradient
from fisher_lab.curvature.step_curve import CHOOSING, JUDGING, StepCurves
from fisher_lab.distributed.process_group import Ranks
from fisher_lab.runs.record import Run
from fisher_lab.tasks.progress import Progress
from fisher_lab.tasks.spectra import draw
from fisher_lab.workload.build import Workload

SCAN_FILE = "damping_scan.csv"
OWN = "1 x 1"
"""The pair of the run's own dampings."""

UNITS = {"absolute": "", "relative": ", of its mean eigenvalue", "pi": ", before its pi"}


class DampedDirections(Mapping[str, Mapping[str, Tensor]]):
    """Pair of multiples -> the natural gradient with them, made when it is asked for.

    Args:
        engine: with its factors and their own gradient; its damping follows what is asked for.
        workload: of the factors.
        names: of the parameters that move.
        multiples: of the run's own dampings, for either side.
    """

    def __init__(
        self,
        engine: KFACNaturalGradient,
        workload: Workload,
        names: Sequence[str],
        multiples: Sequence[float],
    ) -> None:
        self._engine, self._model, self._names = engine, workload.model, names
        # The G sides are the larger ones (a head has its vocabulary there): they change last.
        pairs = [(a, g) for g, a in itertools.product(sorted({*multiples, 1.0}), repeat=2)]
        self.pairs = {f"{a:g} x {g:g}": (a, g) for a, g in pairs}

    @override
    def __getitem__(self, key: str) -> Mapping[str, Tensor]:
        self._engine.scale_damping(*self.pairs[key])
        natural = self._engine.compute_natural_gradient(None, self._model)
        return {name: natural[name] for name in self._names}

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self.pairs)

    @override
    def __len__(self) -> int:
        return len(self.pairs)


def run_scan(
    engine: KFACNaturalGradient,
    workload: Workload,
    names: Sequence[str],
    multiples: Sequence[float],
    heldout: Sequence[Any],
    run: Run,
    progress: Progress,
    ranks: Ranks,
) -> None:
    """Scans the dampings, and writes metrics, table and figure.

    Args:
        engine: with its factors and their own gradient; has the run's own damping afterwards.
        workload: of the factors.
        names: of the parameters that move.
        multiples: of the run's own dampings; 1 is always among them.
        heldout: the held-out batches; on ranks this rank's parts.
        run: gets the metrics, ``damping_scan.csv`` and the figure.
        progress: shows the pairs.
        ranks: those of the run; collective.
    """
    own = engine.settings.lam_A, engine.settings.lam_G
    directions = DampedDirections(engine, workload, names, multiples)
    try:
        curves = step_curve.step_curves(
            workload.model, directions, heldout, loss_fn=workload.loss_fn, ranks=ranks.reduced,
            progress=progress.track,
        )  # fmt: skip
    finally:
        engine.scale_damping(1.0, 1.0)
    rows = scan_rows(curves, directions.pairs, own)
    run.table(SCAN_FILE, rows)
    (best,) = [row for row in rows if row["chosen"]]
    found = {f"scan/best_{key}": best[key] for key in ("damping_A", "damping_G")}
    found |= {f"scan/{key}": best[key] for key in ("gain", "gain_se")}
    run.metrics({key: value for key, value in found.items() if not math.isnan(value)})
    if ranks.is_rank_zero:
        unit = UNITS[engine.settings.damping_mode]
        draw("damping_scan", {"rows": rows, "unit": unit}, run)


def scan_rows(
    curves: StepCurves, pairs: Mapping[str, tuple[float, float]], own: tuple[float, float]
) -> list[dict[str, Any]]:
    """Returns a row for every pair: dampings, step, changes, and the gain over the run's own pair.

    Args:
        curves: by pair.
        pairs: name of a pair -> its multiples for A and G.
        own: dampings of the run, of A and of G.
    """
    first = curves.lead().first
    rows = []
    for name, (a, g) in pairs.items():
        curve = curves.curves[name]
        row: dict[str, Any] = {
            "factor_A": a, "factor_G": g, "damping_A": a * own[0], "damping_G": g * own[1],
            "length": curve.length, "edge": curve.edge, "default": name == OWN,
            "chosen": name == first,
        }  # fmt: skip
        for part in (CHOOSING, JUDGING):
            change = curve.change(part)
            row |= {f"{part}_change": change.mean, f"{part}_se": change.se}
        gain = curves.difference(OWN, name)
        rows.append(row | {"gain": gain.mean, "gain_se": gain.se})
    return rows
