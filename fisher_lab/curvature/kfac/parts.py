"""Parts of parameters by name.

``experts.up[3]`` is a matrix of a stack, ``conv.weight[8:12]`` are rows, and ``lora_B[:,1:12:4]``
every fourth column from the second on. The parts of one parameter are alike and cover all of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fisher_lab.curvature.kfac.layers import Layer

Part = int | tuple[int, int] | tuple[int, int, int]
"""An element of the first dimension, rows ``start, stop``, or columns ``start, stop, step``."""


def part_text(part: Part | None) -> str:
    """Returns what stands behind a parameter's name for a part of it: ``[3]``, ``[8:12]``."""
    if part is None:
        return ""
    if isinstance(part, int):
        return f"[{part}]"
    numbers = ":".join(map(str, part))
    return f"[{numbers}]" if len(part) == 2 else f"[:,{numbers}]"


def base_of(name: str) -> str:
    """Returns the parameter behind a layer's weight: of ``experts.up[3]``, ``experts.up``."""
    return name.partition("[")[0]


def part_of(name: str) -> Part | None:
    """Returns which part of its parameter a name says; None for all of it."""
    if base_of(name) == name:
        return None
    inside = name.partition("[")[2][:-1]
    numbers = [int(n) for n in inside.removeprefix(":,").split(":")]
    return numbers[0] if len(numbers) == 1 else tuple(numbers)  # type: ignore[return-value]


def is_element(name: str) -> bool:
    """Says whether a name is that of one matrix of a stack, ``experts.up[3]``."""
    return isinstance(part_of(name), int)


def in_order(name: str) -> list[tuple[str, int]]:
    """Returns a key that sorts names by the numbers in them: ``up[2]`` before ``up[10]``."""
    return [(text, int(n or 0)) for text, n in re.findall(r"(\D*)(\d*)", name)]


def form_of(name: str) -> tuple[str, int, int] | None:
    """Returns what the parts of one parameter have in common; None for all of it."""
    match part_of(name):
        case None:
            return None
        case int():
            return "element", 1, 1
        case (start, stop):
            return "rows", stop - start, 1
        case (start, stop, step):
            return "columns", len(range(start, stop, step)), step


def _index(name: str) -> int | slice | tuple[slice, slice]:
    """The index of a part in its parameter."""
    part = part_of(name)
    assert part is not None
    if isinstance(part, int):
        return part
    return slice(*part) if len(part) == 2 else (slice(None), slice(*part))


def _pieces(name: str, value: Tensor) -> list[str]:
    """The names of all parts of a parameter of which ``name`` is one."""
    form, size, step = form_of(name) or ("", 1, 1)
    length = value.size(1) if form == "columns" else len(value)
    parts: Iterable[Part] = range(length)
    if form == "rows":
        parts = [(n, n + size) for n in range(0, length, size)]
    elif form == "columns" and step == 1:
        parts = [(n, n + size, 1) for n in range(0, length, size)]
    elif form == "columns":
        parts = [(n, length, step) for n in range(step)]
    return [base_of(name) + part_text(part) for part in parts]


def value_of(named: Mapping[str, Tensor], name: str) -> Tensor:
    """Returns what stands for a layer's weight in a mapping by parameter: all of it, or its part.

    Raises:
        KeyError: the parameter is not in the mapping.
    """
    whole = named[base_of(name)]
    return whole if base_of(name) == name else whole[_index(name)]


def in_parts(named: Mapping[str, Tensor], layers: Iterable[Layer]) -> dict[str, Tensor]:
    """Returns the mapping with every parameter cut up that layers have parts of (experts).

    Args:
        named: by parameter.
        layers: the layers.
    """
    names = [name for x in layers for name in x.names]
    cut = {base_of(name): name for name in names if base_of(name) != name}
    found: dict[str, Tensor] = {}
    for name, value in named.items():
        pieces = _pieces(cut[name], value) if name in cut else []
        found |= {piece: value[_index(piece)] for piece in pieces} or {name: value}
    return found


def whole_again(named: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Returns a mapping by parameter of one with parts; where there is no part, zeros.

    Args:
        named: by parameter, or by part of one.
        shapes: of the parameters that are cut up.
    """
    found: dict[str, Tensor] = {}
    for name, value in named.items():
        base = base_of(name)
        if base == name:
            found[name] = value
            continue
        if base not in found:
            found[base] = value.new_zeros(shapes[base])
        found[base][_index(name)] = value
    return found
