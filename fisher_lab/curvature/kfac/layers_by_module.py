"""The K-FAC layers that a model's modules promise, before a forward pass shows them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from fisher_lab.config.kfac import KFACSettings
from fisher_lab.curvature.errors import LayerError
from fisher_lab.curvature.kfac.layers import Kind, Layer, groups_of
from fisher_lab.curvature.kfac.layers_by_use import (
    Layers,
    UseOf,
    from_uses,
    trains_bias_alone,
)
from fisher_lab.curvature.kfac.parts import base_of, part_text
from fisher_lab.curvature.wrappers import class_name, is_conv1d, unwrap


def is_norm(module: nn.Module) -> bool:
    """Says whether a module is a norm layer with a scale for each feature.

    Known are ``nn.LayerNorm`` over the last dimension, the norms of torch by channel, and the RMS
    norms, those by class name (``LlamaRMSNorm``, ``T5LayerNorm``, ``nn.RMSNorm``): each
    architecture has its own class.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1:
        return False
    name = class_name(module)
    known = isinstance(module, nn.LayerNorm | nn.GroupNorm | _NormBase)
    return known or name.endswith("RMSNorm") or name == "T5LayerNorm"


def _kind_of(module: nn.Module) -> Kind | None:
    if isinstance(module, nn.Linear):
        return Kind.LINEAR
    if is_conv1d(module):
        return Kind.CONV1D
    if isinstance(module, nn.Embedding):
        return Kind.EMBEDDING
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return groups_of(module.weight.shape, module.groups)[0]
    return Kind.NORM if is_norm(module) else None


def parameter_names(model: nn.Module) -> dict[int, str]:
    """Returns the identity of each parameter -> its name in ``named_parameters()``."""
    return {id(p): name for name, p in unwrap(model).named_parameters()}


def discover(model: nn.Module, settings: KFACSettings | None = None) -> Layers:
    """Finds the K-FAC layers that a model's modules promise, before a forward pass shows them.

    Args:
        model: any module; wrappers are looked through.
        settings: which layers to take.

    Raises:
        LayerError: no supported layer is found, and no pass can show one.
    """
    settings = settings or KFACSettings()
    names, named = parameter_names(model), dict(unwrap(model).named_parameters())
    uses = []
    for name, module in unwrap(model).named_modules():
        kind = _kind_of(module)
        weight = None if kind is None else names.get(id(module.weight))
        if kind is None or weight is None:  # a weight that others are made into has no name
            continue
        bias = names.get(id(getattr(module, "bias", None)))
        alone = bias is not None and trains_bias_alone(named[weight], named[bias])
        parts: Sequence[tuple[int, int] | None] = [None]
        if kind is Kind.CONV:
            parts = groups_of(module.weight.shape, module.groups)[1]  # type: ignore[arg-type]
        for text in map(part_text, parts):
            added = None if bias is None else bias + text
            uses.append(UseOf(name + text, kind, weight + text, None if alone else added))
            if alone and added is not None:
                label = f"{name}.bias{text}" if name else f"bias{text}"
                uses.append(UseOf(label, Kind.BIAS, added, None))
    layers = from_uses(model, uses, settings)
    known = {name for use in uses for name in (use.weight, use.bias)}
    others = [n for n, p in named.items() if p.requires_grad and n not in known]
    if not others and all(layer.kind is Kind.NORM for layer in layers.layers.values()):
        raise LayerError(_nothing_found(model, settings, layers.skipped))
    marked = _mark_shared(model, layers.layers.values())
    return replace(layers, layers={layer.name: layer for layer in marked})


def _nothing_found(model: nn.Module, settings: KFACSettings, skipped: dict[str, str]) -> str:
    kind = type(unwrap(model)).__name__
    reasons = "; ".join(
        f"{name or '(the model)'}: {why}" for name, why in list(skipped.items())[:3]
    )
    return (
        f"model: no K-FAC layer found in {kind} (linear layers, convolutions and embeddings are "
        "supported; "
        f"include={settings.include}, exclude={settings.exclude})"
        + (f"; left out: {reasons}" if reasons else "")
    )


def _mark_shared(model: nn.Module, layers: Iterable[Layer]) -> list[Layer]:
    """Marks layers whose weight or bias another module has too, which is not theirs."""
    parameters = dict(unwrap(model).named_parameters())
    holders: dict[int, set[str]] = {}
    for path, module in unwrap(model).named_modules():
        # A module that names its layer's bias as its own (BERT's head) is not another use of it.
        alone = getattr(module, "weight", None) is None
        for name, parameter in module.named_parameters(recurse=False):
            if not (alone and name == "bias"):
                holders.setdefault(id(parameter), set()).add(path)
    marked = []
    for layer in layers:
        labels = (*layer.labels, *(layer.partner.labels if layer.partner else ()))
        own = set(map(base_of, labels))
        held = (parameters[base_of(name)] for name in layer.names)
        shared = any(holders.get(id(p), own) - own for p in held)
        marked.append(replace(layer, tied=True) if shared else layer)
    return marked
