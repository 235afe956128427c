"""The state of a `KFACOptimizer`: blank, as a dictionary, and back."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fisher_lab.config.errors import SettingError
from fisher_lab.curvature.wrappers import is_shard
from fisher_lab.optim import groups
from fisher_lab.optim.divided import DividedOptimizer

FACTORS = "factors"
"""The entry of the first parameter's state that has the factors."""

OF = {"kfac": ("momentum", "second"), "adamw": ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")}
"""The entries of a parameter's state by the method that has them."""


def is_blank(optimizer: DividedOptimizer) -> bool:
    """Says whether a step is none: no factors, no rate, no gradient, before the first step.

    So torch's distributed checkpoints ask an optimizer for its state.
    """
    if optimizer.done > 0 or optimizer.kfac.kfac_factors:
        return False
    if any(float(group["lr"]) != 0.0 for group in optimizer.param_groups):
        return False
    every = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
    return not any(bool((g.to_local() if is_shard(g) else g).any()) for g in every)


def begin(optimizer: DividedOptimizer) -> None:
    """Makes the state that a first step begins with; the step counts as none."""
    for group in optimizer.param_groups:
        for parameter in (p for p in group["params"] if p.requires_grad):
            entry = optimizer.state[parameter]
            if group["method"] == "kfac":
                entry["momentum"] = torch.zeros_like(parameter)
                continue
            entry["step"] = torch.tensor(0.0, dtype=torch.get_default_dtype())
            entry["exp_avg"] = torch.zeros_like(parameter)
            entry["exp_avg_sq"] = torch.zeros_like(parameter)


def export(optimizer: DividedOptimizer, plain: dict[str, Any]) -> dict[str, Any]:
    """Adds the factors to what torch's ``state_dict`` returned; collective on several ranks.

    Args:
        optimizer: whose state it is.
        plain: what torch made of it.
    """
    if not optimizer.kfac.kfac_factors:
        return plain
    found = optimizer.kfac.state_dict(optimizer.model)
    about = {"header": found["header"], "steps": found["steps"]}
    text = bytearray(json.dumps(about).encode())
    factors = {
        "header": torch.frombuffer(text, dtype=torch.uint8),
        "tensors": found["tensors"],
        "diagonal_fisher": found["diagonal_fisher"],
    }
    entry = {**plain["state"].get(0, {}), FACTORS: factors}
    return {**plain, "state": {**plain["state"], 0: entry}}


def restore(
    optimizer: DividedOptimizer, given: Mapping[str, Any], load: Callable[[dict[str, Any]], None]
) -> None:
    """Puts a state back: groups, entries of the parameters, factors, damping.

    Args:
        optimizer: that gets it.
        given: what :func:`export` or ``get_optimizer_state_dict`` returned.
        load: torch's ``load_state_dict``.

    Raises:
        SettingError: the state of another optimizer, or of other parameters.
    """
    missing = [key for key in ("state", "param_groups") if key not in given]
    if missing:
        raise SettingError(
            f"state_dict: no {missing[0]!r} in it; allowed: what state_dict() of a KFACOptimizer "
            "returned"
        )
    named = dict(optimizer._named())
    made, names = groups.restored(given["param_groups"], optimizer.param_groups, named)
    entries = {names[key]: dict(entry) for key, entry in given["state"].items() if key in names}
    factors = [entry.pop(FACTORS) for entry in entries.values() if FACTORS in entry]
    packed, place = [], {}
    for group in made:
        start, own = len(place), OF[group["method"]]
        place |= {name: start + k for k, name in enumerate(group["param_names"])}
        for name in group["param_names"]:
            entry = entries.get(name, {})
            entries[name] = {key: value for key, value in entry.items() if key in own}
        packed.append({**group, "params": [place[name] for name in group["param_names"]]})
    optimizer.param_groups = made
    load(
        {
            "state": {place[name]: entry for name, entry in entries.items() if entry},
            "param_groups": packed,
        }
    )
    _restore_factors(optimizer, factors[0] if factors else None)


def _restore_factors(optimizer: DividedOptimizer, packed: Mapping[str, Any] | None) -> None:
    if packed is None:
        optimizer.kfac.forget()
    else:
        header: Tensor = packed["header"]
        about = json.loads(header.cpu().numpy().tobytes())
        state = {**about, "tensors": packed["tensors"]}
        state["diagonal_fisher"] = packed["diagonal_fisher"]
        optimizer.kfac.load_state_dict(state, optimizer.model)
    optimizer.take_over(decided=optimizer.done > 0 and packed is not None)
