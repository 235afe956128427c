"""Curvature optimisers as the training loop wants them: ``optimizer=kfac`` and ``ekfac``."""

from __future__ import annotations

import dataclasses
import math
from time import perf_counter
from typing import Any

import torch
from torch import nn

from fisher_lab.config.schema import Config
from fisher_lab.config.workbench_schema import CURVATURE_OPTIMIZERS, OptimizerConfig
from fisher_lab.curvature import losses
from fisher_lab.curvature.errors import BatchError, CurvatureError, NonFiniteError
from fisher_lab.optim import (
    Clipping,
    ConstantDamping,
    DampingSchedule,
    KFACOptimizer,
    LevenbergMarquardt,
)
from fisher_lab.tasks.engine import kfac_engine
from fisher_lab.workbench import optimizers
from fisher_lab.workbench.optimizers import Diverged, Further, MakeUpdater, Updater
from fisher_lab.workbench.passes import Gradient, Passes
from fisher_lab.workbench.tasks import Batch


def maker(config: Config) -> MakeUpdater:
    """What makes the updater that a configuration names, with or without curvature."""
    if config.optimizer.name not in CURVATURE_OPTIMIZERS:
        return optimizers.make

    def make(
        model: nn.Module,
        loss_fn: losses.LossFunction | None,
        chosen: OptimizerConfig,
        passes: Passes,
    ) -> Updater:
        outer = [] if chosen.outer == "kfac" else list(optimizers.embeddings_and_head(model))
        kfac = dataclasses.replace(
            config.kfac,
            ekfac=chosen.name == "ekfac",
            exclude=[*config.kfac.exclude, *outer],
            damping_A=config.kfac.damping_A or config.kfac.damping * chosen.damping_ratio,
        )
        engine = kfac_engine(dataclasses.replace(config, kfac=kfac))
        optimizer = KFACOptimizer(
            model,
            engine,
            momentum=chosen.momentum,
            weight_decay=chosen.weight_decay,
            clipping=Clipping(kind=chosen.clip, limit=chosen.clip_limit),  # type: ignore[arg-type]
            damping=_schedule(chosen),
            inverse_freq=chosen.inverse_freq,
            betas=(chosen.beta1, chosen.beta2),
            eps=chosen.eps,
        )
        gradient = Gradient(model, loss_fn, passes, chosen.clip_norm, optimizer)
        return NaturalUpdater(
            gradient,
            optimizer,
            optimizers.rest_factor(chosen),
            config.kfac.n_batches,
            chosen.ratio,
        )

    return make


def _schedule(chosen: OptimizerConfig) -> DampingSchedule:
    if chosen.damping_schedule == "lm":
        return LevenbergMarquardt(factor=chosen.lm_factor)
    return ConstantDamping()


class NaturalUpdater:
    """Steps of a `KFACOptimizer`.

    Args:
        gradient: Computes the gradient of a batch.
        optimizer: Makes the steps.
        rest_factor: Rate of the parameters outside K-FAC's layers over that of the others.
        n_batches: Batches behind a refresh of the factors: the step's own and those that follow.
        ratio: Whether the reduction ratio is measured where the inverses are refreshed.
    """

    def __init__(
        self,
        gradient: Gradient,
        optimizer: KFACOptimizer,
        rest_factor: float,
        n_batches: int,
        ratio: bool,
    ) -> None:
        self.gradient, self.optimizer = gradient, optimizer
        self.rest_factor, self.n_batches, self.ratio = rest_factor, n_batches, ratio

    def step(self, batch: Batch, rate: float, further: Further) -> dict[str, float]:
        """One step; the row also says what the clipping, the damping and the ratio were."""
        optimizer = self.optimizer
        for group in optimizer.param_groups:
            group["lr"] = rate * (self.rest_factor if group["name"] == "adamw" else 1.0)
        measure = self.ratio and optimizer.inverse_due
        noise = torch.get_rng_state() if measure else None
        row = self.gradient.compute(batch)
        if not math.isfinite(row["loss"]):
            raise Diverged(row)
        spent = -perf_counter()
        try:
            if optimizer.refresh_due:
                batches = [batch, *(further(k) for k in range(1, self.n_batches))]
                optimizer.refresh(batches, self.gradient.loss_fn)
                optimizer.kfac.engine.prepare_inverses()
            spent += perf_counter()
            began = perf_counter()
            optimizer.last = {}  # stays so where an overflow (fp16) skips the step
            self.gradient.apply(predict=measure)
            spent += perf_counter() - began
        except (BatchError, NonFiniteError) as error:
            raise Diverged(row) from error
        except CurvatureError as error:
            if "not finite" not in str(error):
                raise
            raise Diverged(row) from error
        row |= optimizer.last
        if noise is not None and "predicted" in optimizer.last:
            row["reduction_ratio"] = self._ratio(batch, row["loss"], noise)
        row["damping_multiplier"] = optimizer.multiplier
        row["curvature_seconds"] = spent
        return row

    def _ratio(self, batch: Batch, before: float, noise: torch.Tensor) -> float:
        """Actual over predicted change of the batch's loss, with the same dropout."""
        with torch.random.fork_rng():
            torch.set_rng_state(noise)
            after = self.gradient.loss(batch)
        return self.optimizer.adapt(before, after)

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's state."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "gradient": self.gradient.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the optimiser's state."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.gradient.load_state_dict(state["gradient"])
