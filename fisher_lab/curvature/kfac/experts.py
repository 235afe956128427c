"""One pair of factors for all matrices of a stack (the experts of a mixture).

The matrices of a stack, ``experts.up[3]``, are layers of their own. ``kfac.experts=pooled`` gives
them common factors, over the tokens of all of them: an expert that has seen few tokens borrows what
the others have seen (``docs/math.md``, section 1). Low-rank factors of experts, which are rows or
columns of one parameter, keep factors of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

from fisher_lab.curvature.kfac.parts import base_of, is_element
from fisher_lab.curvature.kfac.statistics import LayerSums, Statistics


def pool_experts(sums: Statistics) -> None:
    """Puts common sums in the place of those of the matrices of every stack, in place.

    Args:
        sums: of all batches and of all ranks; own gradients and kept tokens stay each matrix's own.
    """
    stacks: dict[tuple[str, str], list[LayerSums]] = {}
    for name in sums.layers.layers:
        found = sums.by_layer.get(name)
        if found is not None and is_element(found.layer.weight):
            key = (base_of(found.layer.weight), str(found.layer.kind))
            stacks.setdefault(key, []).append(found)
    groups: dict[tuple[int, ...], int] = {}
    for stack in stacks.values():
        if len(stack) > 1:
            _pool(sums, stack, groups)


def _pool(sums: Statistics, stack: Sequence[LayerSums], groups: dict[tuple[int, ...], int]) -> None:
    first, *others = stack
    for other in others:
        first.g.absorb(other.g)  # type: ignore[arg-type]
    # Stacks that read the very same rows share their A, as their matrices did before.
    members = tuple(one.group for one in stack)
    if members not in groups and first.group >= 0:
        total = deepcopy(sums.inputs[first.group])
        for one in others:
            total.absorb(sums.inputs[one.group])  # type: ignore[arg-type]
        groups[members] = max(sums.inputs) + 1
        sums.inputs[groups[members]] = total
    tokens = sum(one.tokens for one in stack)
    for one in stack:
        one.g, one.group, one.pooled = first.g, groups.get(members, -1), tokens
