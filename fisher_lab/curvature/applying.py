"""Applies the factors of a refresh: powers, push-through, products."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from . import ekfac
from .errors import CurvatureError
from .inverses import Inverses
from .layer_factors import LayerFactors
from .layers import Kind
from .linalg import all_finite
from .parameters import Narrowing, matrix_of, named_of
from .settings import Damping, KFACSettings


def powered(inverses: Inverses, factors: LayerFactors, y: Tensor, power: float) -> Tensor:
    """Returns ``G^p y A^p`` of a layer, with damping and clipping, or as EKFAC corrects it.

    Args:
        inverses: of the refresh.
        factors: the layer's.
        y: ``[out, dim_a]`` in the apply dtype.
        power: ``p``.
    """
    if inverses.corrects(factors):
        y = ekfac.apply(inverses.basis(factors.layer.name), y, power)
    else:
        y = inverses.G(factors).power(y, power)
        a = inverses.A(factors)
        if a is not None:
            y = a.power(y.T, power).T
    return y * _scale(inverses.settings, factors, power)


def own_powered(inverses: Inverses, factors: LayerFactors, power: float) -> Tensor:
    """Returns ``G^p dW A^p`` of a layer's own gradient, by push-through where that holds.

    Args:
        inverses: of the refresh.
        factors: the layer's, with its own gradient kept.
        power: ``p``.
    """
    pushes = factors.push and not inverses.settings.ekfac
    if pushes and factors.layer.kind is not Kind.EMBEDDING:
        return _push_through(inverses, factors, power)
    assert factors.own is not None
    y = factors.own.to(inverses.settings.numerics.apply_dtype)
    return powered(inverses, factors, y, power)


def _push_through(inverses: Inverses, factors: LayerFactors, power: float) -> Tensor:
    """``G^p U B A^p`` without forming ``U B`` (``docs/math.md``, section 3)."""
    a: Any = inverses.A(factors)
    assert factors.a is not None
    b = factors.a.to(inverses.settings.numerics.apply_dtype)
    if factors.layer.augmented:
        b = torch.cat([b, b.new_ones(b.shape[0], 1)], dim=1)
    b = a.power(b.T, power).T / factors.n_labels
    if factors.spread is not None:
        b = factors.spread.gather(b)
    side: Any = inverses.G(factors)
    return side.push_through(b, power) * _scale(inverses.settings, factors, power)


def _scale(settings: KFACSettings, factors: LayerFactors, power: float) -> float:
    return factors.ratio**power if settings.fisher.scale == "exact" else 1.0


def product(factors: LayerFactors, y: Tensor, damping: Damping | None) -> Tensor:
    """Returns ``(T/N) (G + lam_G I) y (A + lam_A I)`` of a layer, without any floor.

    Args:
        factors: the layer's.
        y: ``[out, dim_a]`` in the apply dtype.
        damping: of both sides; None for none.
    """
    left, right = (0.0, 0.0) if damping is None else (damping.G, damping.A)
    y = factors.G.product(y) + left * y
    if factors.A is not None:
        y = factors.A.product(y.T).T + right * y
    return y * factors.ratio


def diagonal_power(
    diagonal: Tensor | None, vector: Tensor, power: float, settings: KFACSettings
) -> Tensor | None:
    """Returns ``(d + lam_G)^p v`` for a parameter that no layer covers.

    Args:
        diagonal: ``d``, the diagonal Fisher of the parameter, where it is known.
        vector: ``v``, of the parameter's shape.
        power: ``p``.
        settings: all choices.

    Returns:
        In the apply dtype; None where the vector is to be passed through as it is.
    """
    if settings.coverage.uncovered != "diagonal" or diagonal is None:
        return None
    used = (diagonal + settings.damping.G).to(settings.numerics.apply_dtype)
    return vector.to(used) * used.pow(power)


def to_covered(
    factors: Mapping[str, LayerFactors],
    vectors: Mapping[str, Tensor],
    function: Callable[[LayerFactors, Tensor], Tensor],
    settings: KFACSettings,
    narrowed: Narrowing,
) -> dict[str, Tensor]:
    """Applies a function to the matrix of each layer whose weight has a vector.

    Args:
        factors: by layer name.
        vectors: parameter name -> vector of the parameter's shape.
        function: of a layer's factors and its matrix ``[out, dim_a]`` in the apply dtype.
        settings: all choices.
        narrowed: gives a result the dtype of its vector.

    Returns:
        By parameter name, as the vectors were; no bias is invented.

    Raises:
        LayerError: a vector has another shape than its parameter.
        CurvatureError: a result is not finite.
    """
    result: dict[str, Tensor] = {}
    for name, f in factors.items():
        if f.layer.weight not in vectors:
            continue
        y = function(f, matrix_of(f.layer, vectors, settings.numerics.apply_dtype))
        check_finite(name, y, settings.damping)
        for parameter, value in named_of(f.layer, y).items():
            if parameter in vectors:
                result[parameter] = narrowed(parameter, value, vectors[parameter])
    return result


def check_finite(name: str, y: Tensor, damping: Damping) -> None:
    """Checks the result of a layer.

    Raises:
        CurvatureError: it is not finite; names layer and damping.
    """
    if not all_finite(y):
        raise CurvatureError(
            f"layer {name}: the result is not finite at damping "
            f"A {damping.A:g}, G {damping.G:g}; allowed: finite "
            "gradients, a larger damping, core_dtype=float64"
        )
