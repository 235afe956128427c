"""What storing the columns in fewer bits costs the natural gradient."""

from __future__ import annotations

import logging

import torch

from .factors import GramFactor
from .layer_factors import LayerFactors
from .layers import Kind
from .linalg import full_precision
from .settings import KFACSettings

log = logging.getLogger(f"{__package__}.kfac")  # the engine speaks, whichever module sees it

STORAGE_ERROR_WARNING = 1e-2
"""Relative error of the natural gradient past which rounding the columns is warned about."""

STORAGE_PROBES = 8
"""Columns on which that error is estimated."""


@full_precision()
def measure_storage_error(factors: LayerFactors, settings: KFACSettings) -> None:
    """Finds the relative error of ``G^-1 dW`` on a layer's own gradient that rounding costs.

    Estimated on ``dW Z`` with a few seeded normal columns ``Z``: the whole of ``dW`` would
    cost as much as applying the inverse, twice. Past a limit it is warned about.

    Args:
        factors: of the layer; takes ``storage_error``, and lets go of the unrounded columns.
        settings: all choices.
    """
    exact, g = factors.exact, factors.G
    factors.exact = None
    if exact is None or not isinstance(g, GramFactor) or factors.a is None:
        return
    numerics, damping = settings.numerics, settings.damping
    if damping.G <= 0 or g.n_columns != factors.tokens:
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
    reference = exact.damped(damping.G, damping.kappa_max, numerics).power(dw, -1)
    stored = g.damped(damping.G, damping.kappa_max, numerics).power(dw, -1)
    norm = float(reference.norm())
    factors.storage_error = float((stored - reference).norm()) / norm if norm else 0.0
    if factors.storage_error > STORAGE_ERROR_WARNING:
        log.warning(
            "layer %s: storing its columns in %s changes the natural gradient by %.1e "
            "(relative, at damping %g)",
            factors.layer.name, g.columns.data.dtype, factors.storage_error, damping.G,
        )  # fmt: skip
