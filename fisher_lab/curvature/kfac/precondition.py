"""Applies the factors of a refresh to gradients: powers, push-through, products.

A layer's gradients are one matrix ``[out, in (+ 1)]``, with the bias as its last column; a norm
layer's are ``[n, 1]``, the scale and then the shift. The functions of this module go from named
parameters to matrices, apply ``G`` on the left and ``A`` on the right, and go back.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from fisher_lab.config.errors import SettingError
from fisher_lab.curvature.errors import CurvatureError, LayerError
from fisher_lab.curvature.kfac.damping import damping_of_diagonal
from fisher_lab.curvature.kfac.inverses import Inverses
from fisher_lab.curvature.kfac.layer_factors import LayerFactors
from fisher_lab.curvature.kfac.layers import Layer
from fisher_lab.curvature.kfac.numerics import EngineSettings
from fisher_lab.curvature.kfac.parts import base_of, in_parts, value_of, whole_again
from fisher_lab.curvature.kfac.refresh import Refresh, most_rows
from fisher_lab.curvature.linalg import all_finite
from fisher_lab.curvature.wrappers import unwrap

log = logging.getLogger(__name__)

Applied = tuple[dict[str, Tensor], list[str]]
"""Results by parameter name, and the names of the parameters that no layer covers."""


def powered(inverses: Inverses, vectors: Mapping[str, Tensor], power: float) -> Applied:
    """Returns ``G^p V A^p`` with damping and clipping, or as EKFAC corrects it.

    The vectors ``V`` are of their parameters' shapes, by parameter name.

    Raises:
        LayerError: a vector has another shape than its parameter.
        CurvatureError: a result is not finite.
    """
    return _apply(
        inverses,
        vectors,
        lambda factors, y: _layer_powered(inverses, factors, y, power),
        lambda name, vector: _by_diagonal(inverses, name, vector, power),
    )


def own_powered(inverses: Inverses, power: float) -> Applied:
    """Returns ``G^p dW A^p`` of the factors' own gradient, by push-through where that holds.

    Raises:
        CurvatureError: there is no own gradient, or a result is not finite.
    """
    last, settings = inverses.refresh, inverses.settings
    own = own_gradients(last)
    result = {n: _by_diagonal(inverses, n, g, power) for n, g in last.gradients.items()}
    for name, factors in last.factors.items():
        assert factors.own is not None
        plain = not inverses.corrects(factors) and not factors.layer.kind.looks_up
        if factors.push and plain:
            y = _push_through(inverses, factors, power)
        else:
            y = factors.own.to(settings.numerics.apply_dtype)
            y = _layer_powered(inverses, factors, y, power)
        result |= _named(inverses, name, y, own)
    return result, sorted(last.gradients)


def products(inverses: Inverses, vectors: Mapping[str, Tensor], *, damped: bool) -> Applied:
    """Returns ``(T/N) G V A`` without any floor; ``(T/N) (G + lam_G I) V (A + lam_A I)`` damped.

    Of a layer that EKFAC corrects, the same with its own eigenvalues.

    Raises:
        LayerError: a vector has another shape than its parameter.
        CurvatureError: a result is not finite.
    """

    def product(factors: LayerFactors, y: Tensor) -> Tensor:
        return inverses.block(factors).product(y, damped=damped)

    return _apply(inverses, vectors, product, lambda _, vector: vector)


def solved(inverses: Inverses, vectors: Mapping[str, Tensor], lam: float) -> dict[str, Tensor]:
    """Returns ``(F + lam I)^-1 V`` with the blocks of ``F``, ``T/N`` included, undamped.

    What no layer covers is divided by ``lam``.
    """
    found, _ = _apply(
        inverses,
        vectors,
        lambda factors, y: inverses.block(factors).solve(y, lam),
        lambda _, vector: vector / lam,
    )
    return found


def residuals(
    inverses: Inverses, vectors: Mapping[str, Tensor], results: Mapping[str, Tensor]
) -> dict[str, float]:
    """Returns ``|G X A - Y| / |Y|`` by layer name, with ``G`` and ``A`` damped and floored.

    Args:
        inverses: that gave the results.
        vectors: ``Y``, by parameter name.
        results: ``X``, their natural gradient. Layers that lack a parameter in either are left out.
    """
    dtype, found = inverses.settings.numerics.apply_dtype, {}
    layers = [factors.layer for factors in inverses.factors.values()]
    vectors, results = in_parts(vectors, layers), in_parts(results, layers)
    for name, factors in inverses.factors.items():
        if not set(factors.layer.names) <= set(vectors) & set(results):
            continue
        y, x = (matrix_of(factors.layer, named, dtype) for named in (vectors, results))
        x = x / _scale(inverses.settings, factors, -1)
        error, norm = inverses.block(factors).in_use(x) - y, float(y.norm())
        found[name] = float(error.norm()) / norm if norm else 0.0
    return found


def own_gradients(last: Refresh) -> dict[str, Tensor]:
    """Returns the factors' own mean gradient, by parameter name, in the core dtype.

    Raises:
        CurvatureError: the factors were collected without ``keep_gradient``.
    """
    result = dict(last.gradients)
    for factors in last.factors.values():
        if factors.own is None:
            raise CurvatureError(
                "own gradient: not kept in the last refresh; collect with keep_gradient=True"
            )
        result.update(factors.layer.from_matrix(factors.own))
    return result


def _apply(
    inverses: Inverses,
    vectors: Mapping[str, Tensor],
    layer: Callable[[LayerFactors, Tensor], Tensor],
    rest: Callable[[str, Tensor], Tensor],
) -> Applied:
    """Applies ``layer`` to the matrix of each layer whose weight has a vector, ``rest`` elsewhere.

    The results have the names and the order of the vectors; no bias is invented.
    """
    dtype = inverses.settings.numerics.apply_dtype
    shapes = {name: vector.shape for name, vector in vectors.items()}
    vectors = in_parts(vectors, (f.layer for f in inverses.factors.values()))
    result: dict[str, Tensor] = {}
    for name, factors in inverses.factors.items():
        if factors.layer.weight in vectors:
            y = layer(factors, matrix_of(factors.layer, vectors, dtype))
            result |= _named(inverses, name, y, vectors)
    uncovered = [name for name in vectors if name not in result]
    result |= {name: rest(name, vectors[name]) for name in uncovered}
    return whole_again({name: result[name] for name in vectors}, shapes), uncovered


def _named(
    inverses: Inverses, name: str, y: Tensor, given: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """A layer's result by parameter name, where a vector was given, in the vector's dtype."""
    factors = inverses.factors[name]
    layer = factors.layer
    if not all_finite(y):
        lam_a, lam_g = inverses.dampings(factors)
        raise CurvatureError(
            f"layer {name}: the result is not finite at damping "
            f"A {lam_a:g}, G {lam_g:g}; allowed: finite "
            "gradients, a larger damping, core_dtype=float64"
        )
    named = {n: value for n, value in layer.from_matrix(y).items() if n in given}
    return {n: _narrowed(inverses, n, value, given[n]) for n, value in named.items()}


def _layer_powered(inverses: Inverses, factors: LayerFactors, y: Tensor, power: float) -> Tensor:
    """``G^p y A^p`` of a layer, with ``y`` ``[out, dim_a]`` in the apply dtype."""
    return inverses.block(factors).power(y, power) * _scale(inverses.settings, factors, power)


def _push_through(inverses: Inverses, factors: LayerFactors, power: float) -> Tensor:
    """``G^p U B A^p`` without forming ``U B`` (``docs/math.md``, section 3)."""
    a = inverses.A(factors)
    assert a is not None
    assert factors.a is not None
    b = factors.a.to(inverses.settings.numerics.apply_dtype)
    if factors.layer.augmented:
        b = torch.cat([b, b.new_ones(b.shape[0], 1)], dim=1)
    b = a.power(b.T, power).T / factors.n_labels
    if factors.spread is not None:
        b = factors.spread.gather(b)
    return inverses.G(factors).push_through(b, power) * _scale(inverses.settings, factors, power)


def _scale(settings: EngineSettings, factors: LayerFactors, power: float) -> float:
    return factors.ratio**power if settings.fisher_scale == "exact" else 1.0


def _by_diagonal(inverses: Inverses, name: str, vector: Tensor, power: float) -> Tensor:
    """``(d + lam_G)^p v`` for a parameter that no layer covers; ``v`` with ``passthrough``."""
    settings, diagonal = inverses.settings, inverses.refresh.diagonal.get(name)
    if settings.uncovered != "diagonal" or diagonal is None:
        return vector
    lam = damping_of_diagonal(diagonal, settings)
    used = (diagonal + lam).to(settings.numerics.apply_dtype)
    # The diagonal is divided by the rows of this layer, as its factors are.
    most = most_rows(inverses.factors.values(), settings.sharing)
    result = vector.to(used) * used.pow(power) * _scale(settings, most, power)
    return _narrowed(inverses, name, result, vector)


def _narrowed(inverses: Inverses, name: str, value: Tensor, like: Tensor) -> Tensor:
    """A result as its gradient was: dtype, device; in float32 where float16 cannot hold it."""
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
    if name not in inverses.widened:
        inverses.widened.add(name)
        log.warning(
            "parameter %s: the result is beyond %s (largest %.1e); it comes in float32",
            name, like.dtype, largest,
        )  # fmt: skip
    return wide


# ---- checks --------------------------------------------------------------------------------------


def check_damped(settings: EngineSettings, power: float) -> None:
    """Checks that a power of the damped factors exists.

    Raises:
        SettingError: a negative power without damping.
    """
    lam_a, lam_g = settings.lam_A, settings.lam_G
    if power < 0 and min(lam_a, lam_g) <= 0:
        raise SettingError(
            f"damping: A {lam_a:g}, G {lam_g:g} with power {power:g}; allowed: above 0 for "
            "powers < 0"
        )


def check_model(factors: Mapping[str, LayerFactors], model: nn.Module) -> None:
    """Checks that factors belong to a model.

    Raises:
        CurvatureError: there are no factors yet.
        LayerError: a layer is missing, or has other sizes; names the layer and both sides.
    """
    if not factors:
        raise CurvatureError("factors: none collected yet; call collect_kfac_factors first")
    parameters = dict(unwrap(model).named_parameters())
    for name, f in factors.items():
        layer = f.layer
        if base_of(layer.weight) not in parameters:
            raise LayerError(
                f"layer {name}: the factors have it ({layer.n_out} x {layer.n_in}), the model "
                "does not"
            )
        shape = tuple(value_of(parameters, layer.weight).shape)
        expected = layer.stored
        if shape != expected:
            raise LayerError(
                f"layer {name}: factors for a weight of shape {expected}, the model's has {shape}"
            )
        # Without one: the model's may be added by another operator, and is passed through.
        # One that is frozen together with its weight gets no gradient to be preconditioned.
        bias = parameters.get(base_of(layer.bias)) if layer.bias else None
        trained = parameters[base_of(layer.weight)].requires_grad
        if layer.bias and (bias is None or (trained and not bias.requires_grad)):
            raise LayerError(
                f"layer {name}: factors with a bias column, the model's layer has no bias"
            )


def check_vectors(vectors: Mapping[str, Tensor], model: nn.Module) -> None:
    """Checks that vectors are tensors over parameters of a model.

    Raises:
        LayerError: one is not; names it.
    """
    known = dict(unwrap(model).named_parameters())
    for name, vector in vectors.items():
        if name not in known:
            raise LayerError(
                f"gradient {name}: the model has no such parameter; allowed: the names in "
                "named_parameters()"
            )
        if not isinstance(vector, Tensor):
            raise LayerError(
                f"gradient {name}: {vector!r}; allowed: a tensor (leave the name out "
                "where there is no gradient)"
            )


# ---- between named parameters and matrices -----------------------------------------------------


def matrix_of(layer: Layer, vectors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """Returns a layer's vectors as one matrix; a bias without a vector counts as zero.

    Returns:
        ``[out, dim_a]``; ``[n, 1]`` (scale, then shift) for a norm layer.

    Raises:
        LayerError: a shape is not that of the layer's parameter.
    """
    shapes = {layer.weight: layer.stored} | dict.fromkeys(layer.biases, (layer.n_out,))
    for name, shape in shapes.items():
        vector = vectors.get(name)
        if vector is not None and tuple(vector.shape) != shape:
            raise LayerError(
                f"layer {layer.name}: the gradient of {name} has shape {tuple(vector.shape)}, the "
                f"factors are for {shape}"
            )
    return layer.to_matrix(vectors, dtype)
