"""How a training changes its weights: one small interface, AdamW behind it, rates over time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from fisher_lab.config.errors import ConfigError
from fisher_lab.config.workbench_schema import OptimizerConfig
from fisher_lab.curvature import losses

from .tasks import Batch


class Updater(Protocol):
    """One step of a training; a curvature optimiser has the same face."""

    def step(self, batch: Batch, rate: float) -> dict[str, float]:
        """Change the weights by one batch.

        Args:
            batch: Prepared for the model (`fisher_lab.curvature.losses.prepare`).
            rate: The learning rate of this step.

        Returns:
            Numbers for the learning curve; ``loss`` (mean a label, before the step) among them.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on beside weights and random numbers."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state that `state_dict` gave."""
        ...


class GradientUpdater:
    """Steps of a ``torch.optim`` optimiser along the gradient of the mean loss.

    Args:
        model: The model.
        loss_fn: None for a Hugging Face model.
        optimizer: Its learning rate is overwritten at every step.
        clip_norm: The gradient's norm is cut to this; None leaves it.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: losses.LossFunction | None,
        optimizer: torch.optim.Optimizer,
        clip_norm: float | None,
    ) -> None:
        self.model = model
        self.loss_fn = loss_fn
        self.optimizer = optimizer
        self.clip_norm = clip_norm

    def step(self, batch: Batch, rate: float) -> dict[str, float]:
        """Forward, backward, clip, step; returns ``loss`` and ``grad_norm`` (before the cut)."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        summed = losses.compute_loss(self.model, batch, self.loss_fn)
        loss = summed.loss / max(summed.n_labels, 1)
        loss.backward()
        limit = math.inf if self.clip_norm is None else self.clip_norm
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self.optimizer.step()
        return {"loss": float(loss.detach()), "grad_norm": float(norm)}

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's state."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the optimiser's state."""
        self.optimizer.load_state_dict(state)


def _adamw(
    model: nn.Module, loss_fn: losses.LossFunction | None, config: OptimizerConfig
) -> Updater:
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
    return GradientUpdater(model, loss_fn, optimizer, config.clip_norm)


UPDATERS: dict[str, Callable[[nn.Module, losses.LossFunction | None, OptimizerConfig], Updater]] = {
    "adamw": _adamw
}
"""``optimizer.name`` -> what makes the updater. Other optimisers add themselves here."""


def make(model: nn.Module, loss_fn: losses.LossFunction | None, config: OptimizerConfig) -> Updater:
    """The updater that a configuration names.

    Raises:
        ConfigError: There is none of that name.
    """
    if config.name not in UPDATERS:
        raise ConfigError.value("optimizer.name", config.name, "one of " + ", ".join(UPDATERS))
    return UPDATERS[config.name](model, loss_fn, config)


def rate(step: int, steps: int, peak: float, config: OptimizerConfig) -> float:
    """The learning rate of step ``step`` (from 0) of ``steps``: a rise, then the schedule."""
    warm = round(config.warmup * steps)
    if step < warm:
        return peak * (step + 1) / warm
    if config.schedule == "constant":
        return peak
    done = (step - warm) / max(steps - warm, 1)
    left = 1 - done if config.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return peak * (config.final_lr + (1 - config.final_lr) * left)
