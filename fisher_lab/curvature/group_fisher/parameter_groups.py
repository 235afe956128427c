"""How parameters fall into layers, attention heads, neurons and tensors.

A :class:`Slot` views one parameter and says which axis of that view counts the groups; a layout is
a list of slots and travels as JSON with a saved state, so that a loaded state needs no model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from fisher_lab.curvature.spectra.blocks import parameter_blocks
from fisher_lab.curvature.wrappers import is_conv1d

GROUPS = ("layer", "head", "neuron", "parameter")


@dataclass(frozen=True)
class Slot:
    """Where the elements of a parameter go.

    Attributes:
        parameter: its name.
        group: name of the group, or of the family that ``axis`` numbers.
        view: shape to view the parameter as.
        axis: axis of the view that numbers the groups; None for one group.
    """

    parameter: str
    group: str
    view: tuple[int, ...]
    axis: int | None = None


def layout_of(model: nn.Module) -> dict[str, list[Slot]]:
    """Returns the slots of every kind of group for a model's trainable parameters."""
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    layers = {
        name: block for block, names in parameter_blocks(model, "layer").items() for name in names
    }
    return {
        "layer": [Slot(n, layers[n], s) for n, s in shapes.items()],
        "parameter": [Slot(n, n, s) for n, s in shapes.items()],
        "neuron": _neurons(model, shapes),
        "head": _heads(model, shapes),
    }


def _neurons(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> list[Slot]:
    """A linear layer's output unit: weights and bias (a tied head's are the embedding's)."""
    names = {id(p): n for n, p in model.named_parameters()}
    slots: dict[str, Slot] = {}
    for path, module in model.named_modules():
        if not (isinstance(module, nn.Linear) or is_conv1d(module)):
            continue
        prefix = f"{path}." if path else ""
        axis = 1 if is_conv1d(module) else 0
        for parameter, at in ((module.weight, axis), (module.bias, 0)):
            name = names.get(id(parameter), "")
            if name in shapes and name not in slots:
                slots[name] = Slot(name, f"{prefix}neuron", shapes[name], at)
    return list(slots.values())


_ATTENTION = re.compile(
    r"(?P<site>.*(?:attn|attention|SelfAttention|EncDecAttention))\."
    r"(?P<part>c_attn|c_proj|(?:self\.)?(?:query|key|value)|output\.dense|[qkvo]_proj|[qkvo])"
    r"\.(?P<kind>weight|bias)$"
)


def _heads(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> list[Slot]:
    config = getattr(model, "config", None)
    heads = getattr(config, "num_attention_heads", None) or getattr(config, "num_heads", None)
    if not isinstance(heads, int):
        return []
    pairs = getattr(config, "num_key_value_heads", None) or heads
    found = (_head_slot(name, shape, heads, pairs) for name, shape in shapes.items())
    return [slot for slot in found if slot is not None]


def _head_slot(name: str, shape: tuple[int, ...], heads: int, pairs: int) -> Slot | None:
    match = _ATTENTION.match(name)
    if match is None:
        return None
    site, part, bias = match["site"], match["part"], match["kind"] == "bias"
    part = part.removeprefix("self.").removesuffix("_proj")
    if part == "c_attn":
        # Conv1D: [in, 3 * heads * head_dim]; queries, keys and values side by side.
        view = (*shape[:-1], 3, heads, shape[-1] // (3 * heads))
        return Slot(name, f"{site}.head", view, len(view) - 2)
    if part in ("c", "c_proj", "o", "output.dense"):
        if bias:
            return None  # added after the heads are mixed: it belongs to none
        if part in ("c", "c_proj"):
            return Slot(name, f"{site}.head", (heads, shape[0] // heads, shape[1]), 0)
        return Slot(name, f"{site}.head", (shape[0], heads, shape[1] // heads), 1)
    count = pairs if part in ("k", "v", "key", "value") else heads
    family = "head" if count == heads else "kv_head"
    return Slot(name, f"{site}.{family}", (count, shape[0] // count, *shape[1:]), 0)


def group_scores(
    values: Mapping[str, Tensor], slots: Sequence[Slot], reduce: str
) -> dict[str, float]:
    """Adds up elements of tensors by parameter name to scores by group, in the layout's order.

    ``reduce`` is ``sum``, or ``mean`` over the group's elements; slots whose parameter has no value
    are left out.
    """
    sums: dict[str, Tensor] = {}
    counts: Counter[str] = Counter()
    scores: dict[str, float] = {}
    numbered = {slot.group for slot in slots if slot.axis is not None}
    for slot in slots:
        if slot.parameter not in values:
            continue
        view = values[slot.parameter].double().reshape(slot.view)
        if slot.axis is None:
            part = view.sum().reshape(1)
        else:
            part = view.movedim(slot.axis, 0).reshape(view.shape[slot.axis], -1).sum(1)
        sums[slot.group] = sums.get(slot.group, torch.zeros_like(part)) + part
        counts[slot.group] += prod(slot.view) // len(part)
    for group, total in sums.items():
        scaled = (total / counts[group] if reduce == "mean" else total).tolist()
        names = [f"{group}.{i}" for i in range(len(scaled))] if group in numbered else [group]
        scores |= zip(names, scaled, strict=True)
    return scores
