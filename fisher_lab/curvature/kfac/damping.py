"""The dampings of one layer's sides, from those of all layers (``docs/math.md``, section 2)."""

from __future__ import annotations

import math

from torch import Tensor

from fisher_lab.curvature.kfac.factors import Factor
from fisher_lab.curvature.kfac.layer_factors import LayerFactors
from fisher_lab.curvature.kfac.numerics import EngineSettings


def dampings(factors: LayerFactors, settings: EngineSettings) -> tuple[float, float]:
    """Returns ``lam_A`` and ``lam_G`` of a layer; collective where its columns are sharded.

    ``pi`` is the split of Martens and Grosse 2015, section 6.3, by the trace norm. A layer that is
    one block (a norm layer) has no A side: its block is damped as the product would be.
    """
    lam_a, lam_g = settings.lam_A, settings.lam_G
    match settings.damping_mode:
        case "relative":
            a = 1.0 if factors.A is None else mean_eigenvalue(factors.A)
            return lam_a * a, lam_g * mean_eigenvalue(factors.G)
        case "pi":
            if factors.A is None:
                return lam_a, lam_a * lam_g
            pi = math.sqrt(mean_eigenvalue(factors.A) / mean_eigenvalue(factors.G))
            return lam_a * pi, lam_g / pi
        case _:
            return lam_a, lam_g


def damping_of_diagonal(diagonal: Tensor, settings: EngineSettings) -> float:
    """Returns the damping of the diagonal Fisher of one parameter that no layer covers."""
    match settings.damping_mode:
        case "relative":
            return settings.lam_G * (float(diagonal.double().mean()) or 1.0)
        case "pi":
            return settings.lam_A * settings.lam_G
        case _:
            return settings.lam_G


def mean_eigenvalue(factor: Factor) -> float:
    """Returns ``tr M / dim``; 1 for a matrix of zeros, which says nothing of its size."""
    return factor.trace() / factor.dim or 1.0
