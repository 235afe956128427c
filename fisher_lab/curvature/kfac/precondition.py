"""Applies the factors of a refresh: powers, push-through, products."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fisher_lab.curvature.errors import CurvatureError, LayerError
from fisher_lab.curvature.kfac import ekfac
from fisher_lab.curvature.kfac.inverses import Inverses
from fisher_lab.curvature.kfac.layer_factors import LayerFactors
from fisher_lab.curvature.kfac.layers import Kind, Layer
from fisher_lab.curvature.kfac.numerics import EngineSettings
from fisher_lab.curvature.linalg import all_finite
from fisher_lab.curvature.wrappers import unwrap

log = logging.getLogger(f"{__package__}.kfac")  # the engine speaks, whichever module sees it


def check_model(factors: Mapping[str, LayerFactors], model: nn.Module) -> None:
    """Checks that factors belong to a model.

    Args:
        factors: by layer name.
        model: the model, in its wrappers or without.

    Raises:
        CurvatureError: there are no factors yet.
        LayerError: a layer is missing, or has other sizes; names the layer and both sides.
    """
    if not factors:
        raise CurvatureError("factors: none collected yet; call collect_kfac_factors first")
    modules = dict(unwrap(model).named_modules())
    parameters = dict(unwrap(model).named_parameters())
    for name, f in factors.items():
        layer = f.layer
        if name not in modules or layer.weight not in parameters:
            raise LayerError(
                f"layer {name}: the factors have it ({layer.n_out} x {layer.n_in}), the model "
                "does not"
            )
        shape = tuple(parameters[layer.weight].shape)
        expected = _stored_shape(layer)
        if shape != expected:
            raise LayerError(
                f"layer {name}: factors for a weight of shape {expected}, the model's has {shape}"
            )
        has_bias = getattr(modules[name], "bias", None) is not None
        if has_bias != (layer.bias is not None):
            raise LayerError(
                f"layer {name}: factors {'with' if layer.bias else 'without'} a bias column, "
                f"the model's layer {'has a' if has_bias else 'has no'} bias"
            )


def check_vectors(vectors: Mapping[str, Tensor], model: nn.Module) -> None:
    """Checks that vectors are tensors over parameters of a model.

    Args:
        vectors: parameter name -> vector of the parameter's shape.
        model: the model, in its wrappers or without.

    Raises:
        LayerError: one is not; names it.
    """
    known = dict(unwrap(model).named_parameters())
    for name in vectors:
        if name not in known:
            raise LayerError(
                f"gradient {name}: the model has no such parameter; allowed: the names in "
                "named_parameters()"
            )
        if not isinstance(vectors[name], Tensor):
            raise LayerError(
                f"gradient {name}: {vectors[name]!r}; allowed: a tensor (leave the name out "
                "where there is no gradient)"
            )


def matrix_of(layer: Layer, vectors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """Returns a layer's vectors as one matrix; a bias without a vector counts as zero.

    Args:
        layer: the layer.
        vectors: parameter name -> vector, that of the layer's weight among them.
        dtype: of the result.

    Returns:
        ``[out, dim_a]``; ``[n, 1]`` (scale, then shift) for a norm layer.

    Raises:
        LayerError: a shape is not that of the layer's parameter.
    """
    _check_shapes(layer, vectors)
    weight = vectors[layer.weight]
    bias = vectors.get(layer.bias) if layer.bias is not None else None
    return layer.to_matrix(weight, bias, dtype)


def named_of(layer: Layer, matrix: Tensor) -> dict[str, Tensor]:
    """Returns a matrix of :func:`matrix_of`'s shape as the layer's parameters, by name.

    Args:
        layer: the layer.
        matrix: ``[out, dim_a]``, or ``[n, 1]`` for a norm layer.
    """
    weight, bias = layer.from_matrix(matrix)
    named = {layer.weight: weight}
    if layer.bias is not None and bias is not None:
        named[layer.bias] = bias
    return named


class Narrowing:
    """Gives results the dtype of the gradients; says once for each parameter where it cannot."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def __call__(self, name: str, value: Tensor, like: Tensor) -> Tensor:
        """A result as its gradient was: dtype, device; in float32 where float16 cannot hold it.

        Args:
            name: of the parameter.
            value: the result.
            like: the gradient.

        Raises:
            CurvatureError: float32 cannot hold it either; names the parameter.
        """
        narrow = value.to(like).contiguous()
        if value.dtype == like.dtype or all_finite(narrow):
            return narrow
        wide = value.to(device=like.device, dtype=torch.float32).contiguous()
        largest = float(value.abs().max())
        if not all_finite(wide):
            raise CurvatureError(
                f"parameter {name}: the result is beyond {like.dtype} and float32 (largest "
                f"{largest:.1e}); allowed: gradients in float64, a larger damping"
            )
        if name not in self._told:
            self._told.add(name)
            log.warning(
                "parameter %s: the result is beyond %s (largest %.1e); it comes in float32",
                name, like.dtype, largest,
            )  # fmt: skip
        return wide


def _check_shapes(layer: Layer, vectors: Mapping[str, Tensor]) -> None:
    given = tuple(vectors[layer.weight].shape)
    if given != _stored_shape(layer):
        raise LayerError(
            f"layer {layer.name}: the gradient of {layer.weight} has shape {given}, the "
            f"factors are for {_stored_shape(layer)}"
        )
    bias = vectors.get(layer.bias) if layer.bias is not None else None
    if bias is not None and tuple(bias.shape) != (layer.n_out,):
        raise LayerError(
            f"layer {layer.name}: the gradient of {layer.bias} has shape "
            f"{tuple(bias.shape)}, the factors are for {(layer.n_out,)}"
        )


def _stored_shape(layer: Layer) -> tuple[int, ...]:
    if layer.kind is Kind.NORM:
        return (layer.n_out,)
    return (layer.n_in, layer.n_out) if layer.transposed else (layer.n_out, layer.n_in)


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


def _scale(settings: EngineSettings, factors: LayerFactors, power: float) -> float:
    return factors.ratio**power if settings.fisher_scale == "exact" else 1.0


def product(factors: LayerFactors, y: Tensor, lam_g: float, lam_a: float) -> Tensor:
    """Returns ``(T/N) (G + lam_G I) y (A + lam_A I)`` of a layer, without any floor.

    Args:
        factors: the layer's.
        y: ``[out, dim_a]`` in the apply dtype.
        lam_g: damping of G.
        lam_a: damping of A.
    """
    y = factors.G.product(y) + lam_g * y
    if factors.A is not None:
        y = factors.A.product(y.T).T + lam_a * y
    return y * factors.ratio


def diagonal_power(
    diagonal: Tensor | None, vector: Tensor, power: float, settings: EngineSettings
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
    if settings.uncovered != "diagonal" or diagonal is None:
        return None
    used = (diagonal + settings.lam_G).to(settings.numerics.apply_dtype)
    return vector.to(used) * used.pow(power)


def to_covered(
    factors: Mapping[str, LayerFactors],
    vectors: Mapping[str, Tensor],
    function: Callable[[LayerFactors, Tensor], Tensor],
    settings: EngineSettings,
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
        check_finite(name, y, settings)
        for parameter, value in named_of(f.layer, y).items():
            if parameter in vectors:
                result[parameter] = narrowed(parameter, value, vectors[parameter])
    return result


def check_finite(name: str, y: Tensor, settings: EngineSettings) -> None:
    """Checks the result of a layer.

    Raises:
        CurvatureError: it is not finite; names layer and damping.
    """
    if not all_finite(y):
        raise CurvatureError(
            f"layer {name}: the result is not finite at damping "
            f"A {settings.lam_A:g}, G {settings.lam_G:g}; allowed: finite "
            "gradients, a larger damping, core_dtype=float64"
        )
