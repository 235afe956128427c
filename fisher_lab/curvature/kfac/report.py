"""What a refresh did to each layer, for ``layers.csv`` and for the log."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from fisher_lab.curvature.kfac.factors import FactorReport
from fisher_lab.curvature.kfac.inverses import Inverses
from fisher_lab.curvature.kfac.layer_factors import LayerFactors


@dataclass(frozen=True)
class PairsReport:
    """What EKFAC's damping and floor did to the pairs of eigenvectors of a layer.

    Attributes:
        dim: their number, outputs times inputs with the bias column.
        clipped: how many the floor raised.
        kappa_before: condition number of the damped eigenvalues.
        kappa_after: condition number of those in use.
    """

    dim: int
    clipped: int
    kappa_before: float
    kappa_after: float


@dataclass(frozen=True)
class LayerReport:
    """What a refresh did to one layer: a row of ``layers.csv``.

    Attributes:
        factors: the layer's factors.
        A: report of the input side, None for norm layers.
        G: report of the output side.
        seconds: spent on decomposing both sides.
        kappa_max: largest condition number that the floor allows, None for no floor.
        pairs: what EKFAC did to the eigenvalues of the layer's block, where it is in use: its
            floor is one on the pairs, and the sides are as they come then.
    """

    factors: LayerFactors
    A: FactorReport | None
    G: FactorReport
    seconds: float
    kappa_max: float | None = None
    pairs: PairsReport | None = None


def report_of(inverses: Inverses, name: str, *, kappa: bool = True) -> LayerReport:
    """Returns what was done to a layer.

    Args:
        inverses: of the refresh.
        name: of the layer.
        kappa: False leaves out condition numbers that would have to be computed.
    """
    factors = inverses.factors[name]
    sides = [s.report(kappa=kappa) for s in inverses.sides(factors)]
    pairs = None
    if inverses.corrects(factors):
        basis = inverses.basis(name)
        n = factors.layer.n_out * factors.layer.dim_a
        pairs = PairsReport(n, basis.clipped, basis.kappa_before, basis.kappa_after)
        # The floor is the pairs': no eigenvalue of a side is raised.
        sides = [
            replace(s, clipped=0, kappa_after=s.kappa_before, floor_applied=False) for s in sides
        ]
    a = sides[1] if len(sides) > 1 else None
    seconds, kappa_max = inverses.seconds.get(name, 0.0), inverses.settings.kappa_max
    return LayerReport(factors, a, sides[0], seconds, kappa_max, pairs)


def layer_line(report: LayerReport) -> str:
    """Returns what was done to a layer in one line, for the log."""
    f = report.factors
    told = [f"layer {f.layer.name or '(the model)'}: T={f.tokens} {f.method} ({f.fisher})"]
    for side, r in (("A", report.A), ("G", report.G)):
        if r is not None:
            told.append(f"{side}: lambda {r.damping:g}, {_clipping(r)}, {r.route}" + _events(r))
    if report.pairs is not None:
        told.append(f"EKFAC: {_clipping(report.pairs)} of pairs")
    return "; ".join(told)


def _clipping(r: FactorReport | PairsReport) -> str:
    kappa = (
        "" if math.isnan(r.kappa_before) else f", kappa {r.kappa_before:.2e} -> {r.kappa_after:.2e}"
    )
    return f"clipped {r.clipped}/{r.dim}{kappa}"


def _events(r: FactorReport) -> str:
    jitter = f", jitter {r.jitter:.1e}" if r.jitter else ""
    return jitter + (f", fallback {r.fallback}" if r.fallback else "")
