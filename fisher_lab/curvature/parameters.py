"""Between a model's parameters, by name, and the matrices of its K-FAC layers."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .errors import CurvatureError, LayerError
from .layer_factors import LayerFactors
from .layers import Kind, Layer
from .linalg import all_finite
from .losses import unwrap

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
