"""SOAP and Shampoo of the package ``pytorch_optimizer``, an optional extra.

SOAP: Vyas et al. 2024. Shampoo: Gupta, Koren & Singer 2018, in the form of Anil et al. 2020.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pytorch_optimizer import SOAP, ScalableShampoo
from pytorch_optimizer.optimizer.utils.graft import LayerWiseGrafting
from torch import Tensor, nn
from typing_extensions import override

from fisher_lab.config.workload import OptimizerConfig
from fisher_lab.curvature.evaluation_mode import random_state_kept

REFRESH = 10
"""Steps between two refreshes of eigenbases and roots, where the configuration has none."""


def make(hidden: list[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """Returns SOAP or Shampoo, by ``config.name``, on matrices."""
    common: dict[str, Any] = {"lr": 1.0, "betas": (config.beta1, config.beta2)}
    common["weight_decay"] = config.weight_decay
    every = config.inverse_freq or REFRESH
    if config.name == "soap":
        return SOAP(hidden, eps=config.eps, precondition_frequency=every, **common)
    return Shampoo(
        hidden,
        start_preconditioning_step=every,
        preconditioning_compute_steps=every,
        graft_type=LayerWiseGrafting.RMSPROP,
        diagonal_eps=config.eps,
        decoupled_weight_decay=True,
        moving_average_for_momentum=True,
        nesterov=False,
        shape_interpretation=False,
        **common,
    )


class Shampoo(ScalableShampoo):
    """The package's Shampoo, with a state of tensors where the package keeps objects of its own.

    Its roots begin with random vectors, which are the same here at every step and on all ranks.
    """

    @override
    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with random_state_kept():
            torch.manual_seed(0)
            return super().step(closure)

    @override
    def state_dict(self) -> dict[str, Any]:
        plain = super().state_dict()
        state = {
            key: {name: _tensors(value) for name, value in entry.items()}
            for key, entry in plain["state"].items()
        }
        return {**plain, "state": state}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "state": {}})
        saved = state_dict["state"]
        packed = [key for group in state_dict["param_groups"] for key in group["params"]]
        own = [p for group in self.param_groups for p in group["params"]]
        for key, parameter in zip(packed, own, strict=True):
            if key in saved:
                parameter.grad = torch.zeros_like(parameter)
        self.state.clear()
        for group in self.param_groups:
            self.init_group(group)
        for key, parameter in zip(packed, own, strict=True):
            parameter.grad = None
            for name, value in saved.get(key, {}).items():
                _put(self.state[parameter], name, value, parameter)


def _tensors(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value
    held = {
        name: getattr(value, name)
        for name in ("statistics", "pre_conditioners", "momentum")
        if hasattr(value, name)
    }
    return {name: list(one) if isinstance(one, list) else one for name, one in held.items()}


def _put(entry: dict[str, Any], name: str, value: Any, like: Tensor) -> None:
    """Puts tensors back, into the package's object where there was one."""
    if isinstance(value, Mapping):
        for key, held in value.items():
            many = isinstance(held, list)
            moved = [t.to(like.device) for t in held] if many else held.to(like.device)
            setattr(entry[name], key, moved)
    else:
        entry[name] = value.to(like.device)
