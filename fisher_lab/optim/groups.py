"""The parameter groups of a `KFACOptimizer`: one per method, ``kfac`` and ``adamw``, of each set.

A set holds the parameters that were given together: those of the constructor, or of one call of
``add_param_group``. Every group has the names of its parameters (``param_names``, as torch does
it), its ``method`` and the number of its ``set``; a parameter changes the method within its set.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fisher_lab.config.errors import SettingError

Group = dict[str, Any]

METHODS = ("kfac", "adamw")


@cache
def adamw_defaults() -> dict[str, Any]:
    """Returns what ``torch.optim.AdamW`` reads of a group, but rate and decay, as torch has it.

    Torch's optimisers import its compiler when the first of them is made, which takes a second.
    """
    defaults = torch.optim.AdamW([nn.Parameter(torch.zeros(1))]).defaults
    return {key: value for key, value in defaults.items() if key not in ("lr", "weight_decay")}


def outer_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Returns name -> module of every embedding, and of the layer that computes the logits."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else getattr(model, "head", None)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) or module is head
    }


def first(
    named: Mapping[str, nn.Parameter], covered: set[str], rates: tuple[float, float]
) -> list[Group]:
    """Returns the groups of the constructor; AdamW's only where something is left to it.

    Args:
        named: the model's parameters; those that are trained are taken.
        covered: names of those that are K-FAC's.
        rates: of both methods.
    """
    made = []
    for method, rate in zip(METHODS, rates, strict=True):
        names = [
            n for n, p in named.items() if p.requires_grad and (n in covered) == (method == "kfac")
        ]
        about = {"method": method, "name": label(method, 0), "set": 0, "lr": rate}
        if names or method == "kfac":
            made.append({"params": [named[n] for n in names], "param_names": names, **about})
    return made


def label(method: str, number: int) -> str:
    """Returns the name of a group, by which loggers of learning rates show it."""
    return method if number == 0 else f"{method}_{number}"


def names_of(given: Any, named: Mapping[str, Tensor]) -> list[str]:
    """Returns the names of what ``add_param_group`` was given.

    Args:
        given: a parameter, parameters, or pairs of a name and a parameter.
        named: the model's parameters.

    Raises:
        SettingError: one of them is not the model's.
    """
    known = {id(parameter): name for name, parameter in named.items()}
    found = []
    for item in [given] if isinstance(given, Tensor) else list(given):
        parameter = item[1] if isinstance(item, tuple) else item
        if id(parameter) not in known:
            raise SettingError(
                f"add_param_group: a parameter of shape {tuple(parameter.shape)} is not the "
                "model's; allowed: parameters of the model that the optimizer was given"
            )
        found.append(known[id(parameter)])
    return found


def move(
    groups: list[Group], wanted: Iterable[str], named: Mapping[str, Tensor], rest_lr: float
) -> list[str]:
    """Gives parameters of K-FAC's to K-FAC and the others to AdamW, each within its set; in place.

    A group that is missing is made of its sibling; that of the constructor has ``rest_lr``.

    Args:
        groups: of the optimizer.
        wanted: names of the parameters that are to be K-FAC's.
        named: the model's parameters.
        rest_lr: rate of AdamW.

    Returns:
        The names of those that have moved.
    """
    kfac, order = set(wanted), {name: place for place, name in enumerate(named)}
    moved: list[str] = []
    for group in list(groups):
        wrong = [n for n in group["param_names"] if (n in kfac) != (group["method"] == "kfac")]
        if not wrong:
            continue
        sibling = _sibling(groups, group, rest_lr)
        kept = [n for n in group["param_names"] if n not in wrong]
        for one, names in ((group, kept), (sibling, [*sibling["param_names"], *wrong])):
            one["param_names"] = sorted(names, key=order.__getitem__)
            one["params"] = [named[name] for name in one["param_names"]]
        moved += wrong
    return moved


def _sibling(groups: list[Group], group: Group, rest_lr: float) -> Group:
    other = METHODS[1 - METHODS.index(group["method"])]
    for one in groups:
        if (one["set"], one["method"]) == (group["set"], other):
            return one
    made = {**group, "method": other, "name": label(other, group["set"])}
    made |= {"params": [], "param_names": []}
    if other == "adamw" and group["set"] == 0:
        made["lr"] = rest_lr
        if "initial_lr" in group:  # a scheduler is there already
            made["initial_lr"] = rest_lr
    groups.append(made)
    return made


def by_decay(group: Group) -> list[Group]:
    """Returns a group as at most two that are not empty, so that matrices alone decay."""
    matrices = [p for p in group["params"] if p.dim() >= 2]
    others = [p for p in group["params"] if p.dim() < 2]
    parts = {**group, "params": matrices}, {**group, "params": others, "weight_decay": 0.0}
    return [part for part in parts if part["params"]]


# ---- saved groups --------------------------------------------------------------------------------


def restored(
    saved: Sequence[Group], own: Sequence[Group], named: Mapping[str, Tensor]
) -> tuple[list[Group], dict[Any, str]]:
    """Returns groups of a state dict with the optimizer's own parameters, and names by their ids.

    Args:
        saved: of ``state_dict``, or of ``get_optimizer_state_dict``, whose ids are names.
        own: of the optimizer.
        named: the model's parameters.

    Raises:
        SettingError: they are not those of a `KFACOptimizer`, or of another model's parameters.
    """
    names: dict[Any, str] = {}
    made: dict[tuple[int, str], Group] = {}
    for place, group in enumerate(saved):
        by_name = all(isinstance(key, str) for key in group["params"])
        if "method" not in group and by_name and place < len(own):
            group = {**own[place], "params": group["params"]}  # torch had nothing for it
        if "method" not in group:
            raise SettingError(
                "state_dict: its parameter groups have no 'method'; allowed: what state_dict() or "
                "get_optimizer_state_dict() of a KFACOptimizer of this version returned"
            )
        own_names = group["params"] if by_name else group["param_names"]
        names |= zip(group["params"], own_names, strict=True)
        made[group["set"], group["method"]] = {**group, "param_names": list(group["param_names"])}
    groups = list(made.values())
    placed = {name for group in groups for name in group["param_names"]}
    for group in own:  # what torch could not place stays where it is
        key = group["set"], group["method"]
        left = [n for n in group["param_names"] if n in set(names.values()) - placed]
        if left and key in made:
            made[key]["param_names"] += left
            placed |= set(left)
    here = {name for group in own for name in group["param_names"]}
    if placed != here:
        unlike = sorted(placed ^ here)
        raise SettingError(
            f"state_dict: {len(unlike)} parameters are not in both the state and the optimizer "
            f"({', '.join(unlike[:3])}); allowed: the same parameters, trained as they were when "
            "the state was saved"
        )
    for group in groups:
        group["params"] = [named[name] for name in group["param_names"]]
    return groups, names
