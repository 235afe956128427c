"""What a refresh did to each layer, for ``layers.csv`` and for the log."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace

import torch

from fisher_lab.curvature.kfac.factors import FactorReport
from fisher_lab.curvature.kfac.inverses import Inverses
from fisher_lab.curvature.kfac.layer_factors import LayerFactors
from fisher_lab.curvature.kfac.layers import Kind
from fisher_lab.curvature.kfac.numerics import EngineSettings
from fisher_lab.curvature.linalg import full_precision


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


log = logging.getLogger(f"{__package__}.kfac")  # the engine speaks, whichever module sees it

STORAGE_ERROR_WARNING = 1e-2
"""Relative error of the natural gradient past which rounding the columns is warned about."""

STORAGE_PROBES = 8
"""Columns on which that error is estimated."""


@full_precision()
def measure_storage_error(factors: LayerFactors, settings: EngineSettings) -> None:
    """Finds the relative error of ``G^-1 dW`` on a layer's own gradient that rounding costs.

    Estimated on ``dW Z`` with a few seeded normal columns ``Z``: the whole of ``dW`` would
    cost as much as applying the inverse, twice. Past a limit it is warned about.

    Args:
        factors: of the layer; takes ``storage_error``, and lets go of the unrounded columns.
        settings: all choices.
    """
    exact, g = factors.exact, factors.G
    factors.exact = None
    if exact is None or factors.a is None:
        return
    numerics, lam, kappa = settings.numerics, settings.lam_G, settings.kappa_max
    if lam <= 0 or g.n_columns != factors.tokens:
        return
    if factors.layer.kind is Kind.EMBEDDING:
        return
    a = factors.a.to(numerics.apply_dtype)
    generator = torch.Generator().manual_seed(0)
    probes = a @ torch.randn(a.shape[1], STORAGE_PROBES, generator=generator).to(a)
    if factors.spread is not None:
        probes = factors.spread.gather(probes)
    probes = probes.to(exact.device)
    dw = exact.columns.transposed_times(probes)
    reference = exact.damped(lam, kappa, numerics).power(dw, -1)
    stored = g.damped(lam, kappa, numerics).power(dw, -1)
    norm = float(reference.norm())
    factors.storage_error = float((stored - reference).norm()) / norm if norm else 0.0
    if factors.storage_error > STORAGE_ERROR_WARNING:
        log.warning(
            "layer %s: storing its columns in %s changes the natural gradient by %.1e "
            "(relative, at damping %g)",
            factors.layer.name, g.tensors()["columns"].dtype, factors.storage_error, lam,
        )  # fmt: skip
