"""How a training changes its weights: one small interface, library optimisers behind it, rates.

Curvature optimisers have the same face and come in from above (``fisher_lab.tasks.natural``): this
package knows no engine.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from fisher_lab.config.errors import ConfigError
from fisher_lab.config.workload import OptimizerConfig
from fisher_lab.curvature import losses
from fisher_lab.workload.data_parallel import ALONE, Crew
from fisher_lab.workload.gradient import Gradient, Passes
from fisher_lab.workload.objectives import Batch

Further = Callable[[int], Batch]
"""``further(k)``: the batch that comes ``k`` steps later, prepared; 0 is the step's own."""


class Diverged(Exception):
    """A step cannot be made: a loss, a gradient or a product is not finite.

    Attributes:
        row: what is known of the step, as `Updater.step` returns it.
    """

    def __init__(self, row: dict[str, float]) -> None:
        self.row = row
        super().__init__(f"not finite: {row}")


class Updater(Protocol):
    """One step of a training; a curvature optimiser has the same face."""

    def step(self, batch: Batch, rate: float, further: Further) -> dict[str, float]:
        """Change the weights by one batch.

        Args:
            batch: Prepared for the model (`fisher_lab.curvature.losses.prepare`).
            rate: The learning rate of this step.
            further: Batches of the steps to come, for who builds factors from several.

        Returns:
            Numbers for the learning curve; ``loss`` (mean a label, before the step) among them.

        Raises:
            Diverged: Something is not finite; the weights are as they were.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on beside weights and random numbers."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state that `state_dict` gave."""
        ...


MakeUpdater = Callable[
    [nn.Module, losses.LossFunction | None, OptimizerConfig, Passes, Crew], Updater
]
"""What makes the updater of a training."""


class GradientUpdater:
    """Steps of ``torch.optim`` optimisers along the gradient of the mean loss.

    Args:
        gradient: Computes the gradient.
        optimizers: Each with its parameters; their learning rates are overwritten at every step,
            by the rate times a group's ``rate_factor`` (1 where a group has none).
    """

    def __init__(self, gradient: Gradient, *optimizers: torch.optim.Optimizer) -> None:
        self.gradient = gradient
        self.optimizers = optimizers

    def step(self, batch: Batch, rate: float, further: Further) -> dict[str, float]:
        """Forward, backward, clip, step; returns ``loss`` and ``grad_norm`` (before the cut)."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("rate_factor", 1.0)
        row = self.gradient.compute(batch)
        if not math.isfinite(row["loss"]):
            raise Diverged(row)
        self.gradient.apply()
        return row

    def state_dict(self) -> dict[str, Any]:
        """The optimisers' states."""
        return {
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "gradient": self.gradient.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the optimisers' states."""
        for optimizer, one in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(self.gradient.crew.held(one, optimizer))
        self.gradient.load_state_dict(state["gradient"])


def _groups(parameters: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices alone."""
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _adamw_over(parameters: list[nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        _groups(parameters, config.weight_decay),
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def _adamw(
    model: nn.Module,
    loss_fn: losses.LossFunction | None,
    config: OptimizerConfig,
    passes: Passes,
    crew: Crew = ALONE,
) -> Updater:
    optimizer = _adamw_over(_trainable(model), config)
    gradient = Gradient(model, loss_fn, passes, config.clip_norm, optimizer, crew=crew)
    return GradientUpdater(gradient, optimizer)


def _sgd(
    model: nn.Module,
    loss_fn: losses.LossFunction | None,
    config: OptimizerConfig,
    passes: Passes,
    crew: Crew = ALONE,
) -> Updater:
    # Weight decay that is decoupled, as everywhere here: torch's own SGD adds it to the gradient.
    optimizer = _DecoupledSGD(
        _groups(_trainable(model), config.weight_decay), lr=1.0, momentum=config.momentum
    )
    gradient = Gradient(model, loss_fn, passes, config.clip_norm, optimizer, crew=crew)
    return GradientUpdater(gradient, optimizer)


class _DecoupledSGD(torch.optim.SGD):
    """``torch.optim.SGD`` with the decay taken off the weights, not added to the gradient."""

    def step(self, closure: Any = None) -> Any:
        with torch.no_grad():
            decays = [group["weight_decay"] for group in self.param_groups]
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
                group["weight_decay"] = 0.0
        try:
            return super().step(closure)
        finally:
            for group, decay in zip(self.param_groups, decays, strict=True):
                group["weight_decay"] = decay


def _muon(
    model: nn.Module,
    loss_fn: losses.LossFunction | None,
    config: OptimizerConfig,
    passes: Passes,
    crew: Crew = ALONE,
) -> Updater:
    """``torch.optim.Muon`` on the hidden matrices, AdamW on embeddings, head and vectors."""
    if not hasattr(torch.optim, "Muon"):
        raise ConfigError.value(
            "optimizer.name", "muon", f"another one with torch {torch.__version__} (no Muon in it)"
        )
    outer = {module.weight for module in embeddings_and_head(model).values()}
    parameters = _trainable(model)
    hidden = [p for p in parameters if p.dim() == 2 and p not in outer]
    others = [p for p in parameters if not any(p is h for h in hidden)]
    muon = torch.optim.Muon(
        hidden,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
    adamw = _adamw_over(others, config)
    for group in adamw.param_groups:
        group["rate_factor"] = rest_factor(config)
    gradient = Gradient(model, loss_fn, passes, config.clip_norm, muon, adamw, crew=crew)
    return GradientUpdater(gradient, muon, adamw)


def rest_factor(config: OptimizerConfig) -> float:
    """Rate of AdamW, for what an optimiser leaves to it, over the optimiser's own.

    Both rates are known by the time a training begins (`fisher_lab.tasks.train.make_job`).
    """
    if config.lr is None or config.rest_lr is None:
        return 1.0
    return config.rest_lr / config.lr


def embeddings_and_head(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module of every embedding, and of what maps to the classes."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else getattr(model, "head", None)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) or module is head
    }


UPDATERS: dict[str, MakeUpdater] = {"adamw": _adamw, "sgd": _sgd, "muon": _muon}
"""``optimizer.name`` -> what makes the updater, for those that need no engine."""


def make(
    model: nn.Module,
    loss_fn: losses.LossFunction | None,
    config: OptimizerConfig,
    passes: Passes,
    crew: Crew = ALONE,
) -> Updater:
    """The updater that a configuration names.

    Raises:
        ConfigError: There is none of that name.
    """
    if config.name not in UPDATERS:
        raise ConfigError.value("optimizer.name", config.name, "one of " + ", ".join(UPDATERS))
    return UPDATERS[config.name](model, loss_fn, config, passes, crew)


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
