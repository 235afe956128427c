"""Weights that adapters make of their factors, for the reference: ``W + scale B A``, ``m / c``.

Adapters are known by PEFT's names. It shares no code with the engine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

KEPT = ("to", "float", "double", "contiguous", "add", "__add__", "__radd__")


@dataclass(frozen=True)
class LowRank:
    """``scale B A`` of one matrix; names and values of its factors."""

    down: str
    up: str
    a: Tensor
    b: Tensor
    scale: float = 1.0


class Made:
    """What tensors are made of factors of adapters, or are vectors over constants.

    Args:
        name_of: the name of the parameter that a tensor is, or None.
    """

    def __init__(self, name_of: Callable[[Tensor], str | None]) -> None:
        self._name_of = name_of
        self._matrices: dict[int, tuple[Tensor, list[LowRank]]] = {}
        self._vectors: dict[int, tuple[Tensor, str, Tensor]] = {}
        self._below: dict[int, tuple[Tensor, list[tuple[str, int, int]]]] = {}

    def note(self, name: str, args: Any, kwargs: Any, out: Tensor) -> None:
        """Notes what an operation makes."""
        first: Any = args[0] if args else None
        if name == "baddbmm" and len(args) > 2 and all(map(self._name_of, args[1:3])):
            self._matrices[id(out)] = (out, self._stack(args, kwargs))
        elif name in ("matmul", "__matmul__") and all(isinstance(x, Tensor) for x in args):
            names = [self._name_of(x) for x in args]
            if "lora_B" in (names[0] or "") and "lora_A" in (names[1] or ""):
                pair = LowRank(names[1] or "", names[0] or "", args[1].detach(), args[0].detach())
                self._matrices[id(out)] = (out, [pair])
        elif name in ("div", "__truediv__") and isinstance(args[1], Tensor):
            found = self._name_of(first)
            if found is not None and first.dim() == 1:
                self._vectors[id(out)] = (out, found, 1 / args[1].detach())
        elif name == "cat" and out.dim() == 2 and len(out.T) == len(first[0].T):
            ends = np.cumsum([len(x) for x in first]).tolist()
            below = zip(map(self._name_of, first), [0, *ends], ends, strict=False)
            self._below[id(out)] = (
                out,
                [(n, i, j) for n, i, j in below if n is not None and j > i],
            )
        else:
            self._follow(name, args, out)

    def _follow(self, name: str, args: Any, out: Tensor) -> None:
        for x in args:
            if id(x) in self._vectors and name in ("view", "sub", "__sub__"):
                self._vectors[id(out)] = (out, *self._vectors[id(x)][1:])
            if id(x) not in self._matrices:
                continue
            pairs = self._matrices[id(x)][1]
            if name in ("mul", "__mul__") and not isinstance(args[1], Tensor):
                pairs = [replace(p, scale=p.scale * args[1]) for p in pairs]
            elif name == "__getitem__" and out.dim() == 2:
                pairs = [pairs[int(args[1])]]
            elif name not in KEPT:
                continue
            self._matrices[id(out)] = (out, pairs)

    def _stack(self, args: Any, kwargs: Any) -> list[LowRank]:
        names = [self._name_of(x) or "" for x in args[1:]]
        turned = "lora_A" in names[0]
        up, down = (args[2].mT, args[1].mT) if turned else args[1:]
        name_b, name_a = names[::-1] if turned else names
        n, rank = len(up), up.shape[-1]
        return [
            LowRank(
                f"{name_a}[{e * rank}:{(e + 1) * rank}]",
                f"{name_b}[:,{e}:{n * rank}:{n}]",
                down[e].detach(),
                up[e].detach(),
                kwargs.get("alpha", 1),
            )
            for e in range(n)
        ]

    def pairs(self, weight: Tensor, x: Tensor) -> list[tuple[str, Tensor, Tensor]]:
        """Of a product with a weight: a factor's name, what it reads, and what ``g`` is times."""
        found = []
        for name, start, stop in self._below.get(id(weight), (weight, []))[1]:
            found.append((name, x.detach()[..., start:stop], torch.eye(weight.shape[1]).to(x)))
        for one in self._matrices.get(id(weight), (weight, []))[1]:
            unit = torch.eye(len(one.b), dtype=x.dtype)
            found.append((one.down, x.detach(), one.scale * one.b))
            found.append((one.up, x.detach() @ one.a.T, one.scale * unit))
        return found

    def scaled(self, vector: Tensor, x: Tensor) -> tuple[str, Tensor] | None:
        """Of a product with a vector: its parameter's name, and what that multiplies."""
        if id(vector) not in self._vectors:
            return None
        _, name, factor = self._vectors[id(vector)]
        return name, x.detach() * factor
