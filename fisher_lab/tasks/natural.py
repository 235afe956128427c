"""Curvature optimisers as the training loop wants them: ``optimizer=kfac`` and ``ekfac``."""

from __future__ import annotations

import dataclasses
import logging
import math
from time import perf_counter
from typing import Any

import torch
from torch import nn
from torch.linalg import LinAlgError  # type: ignore[reportPrivateImportUsage]

from fisher_lab.config.schema import Config
from fisher_lab.config.workload import CURVATURE_OPTIMIZERS, OptimizerConfig
from fisher_lab.curvature import losses
from fisher_lab.curvature.collectives import Communicator
from fisher_lab.curvature.errors import BatchError, CurvatureError
from fisher_lab.curvature.kfac.engine import KFACNaturalGradient
from fisher_lab.optim import (
    Clipping,
    ConstantDamping,
    DampingSchedule,
    KFACOptimizer,
    LevenbergMarquardt,
)
from fisher_lab.workload import optimizers
from fisher_lab.workload.data_parallel import ALONE, Crew
from fisher_lab.workload.gradient import Gradient, Passes
from fisher_lab.workload.objectives import Batch
from fisher_lab.workload.optimizers import Diverged, Further, MakeUpdater, Updater

log = logging.getLogger(__name__)


def maker(config: Config, communicator: Communicator | None = None) -> MakeUpdater:
    """What makes the updater that a configuration names, with or without curvature.

    Args:
        config: the validated configuration.
        communicator: of the ranks that train together.
    """
    if config.optimizer.name not in CURVATURE_OPTIMIZERS:
        return optimizers.make

    def make(
        model: nn.Module,
        loss_fn: losses.LossFunction | None,
        chosen: OptimizerConfig,
        passes: Passes,
        crew: Crew = ALONE,
    ) -> Updater:
        outer = [] if chosen.outer == "kfac" else list(optimizers.embeddings_and_head(model))
        kfac = dataclasses.replace(
            config.kfac,
            ekfac=chosen.name == "ekfac",
            exclude=[*config.kfac.exclude, *outer],
            damping_A=config.kfac.damping_A or config.kfac.damping * chosen.damping_ratio,
        )
        engine = KFACNaturalGradient(
            kfac, seed=config.seed, track_diagonal=False, communicator=communicator
        )
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
            communicator=communicator,
        )
        gradient = Gradient(model, loss_fn, passes, chosen.clip_norm, optimizer, crew=crew)
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
        self.crew = gradient.crew

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
        if optimizer.refresh_due and self.crew.problem(self._refresh(batch, further)) is not None:
            raise Diverged(row)
        began = perf_counter()
        spent += began
        if self.crew.problem(self._apply(measure)) is not None:
            raise Diverged(row)
        spent += perf_counter() - began
        row |= optimizer.last
        if noise is not None and "predicted" in optimizer.last:
            row["reduction_ratio"] = self._ratio(batch, row["loss"], noise)
        row["damping_multiplier"] = optimizer.multiplier
        row["curvature_seconds"] = spent
        return row

    def _refresh(self, batch: Batch, further: Further) -> str | None:
        """New factors; returns why there are none."""
        optimizer, crew = self.optimizer, self.crew
        batches = crew.own([batch, *(further(k) for k in range(1, self.n_batches))])
        engine = optimizer.kfac
        if not batches and self._apart:
            engine.forget()  # no sequence, no say in the coming steps
            return None
        try:
            optimizer.refresh(batches, self.gradient.loss_fn)
            engine.prepare_inverses()
        except (CurvatureError, LinAlgError) as error:
            if self._apart and isinstance(error, BatchError):
                engine.forget()
                return None
            return _not_finite(error)
        finally:
            crew.settle(self.gradient.model)
        return None

    def _apply(self, measure: bool) -> str | None:
        """The step; returns why there was none."""
        self.optimizer.last = {}  # stays so where an overflow (fp16) skips the step
        try:
            self.gradient.apply(predict=measure, cut=self.gradient.cut)
        except (CurvatureError, LinAlgError) as error:
            return _not_finite(error)
        return None

    def _ratio(self, batch: Batch, before: float, noise: torch.Tensor) -> float:
        """Actual over predicted change of the batch's loss, with the same dropout."""
        with torch.random.fork_rng():
            torch.set_rng_state(noise)
            after = self.gradient.loss(batch)
        return self.optimizer.adapt(before, after)

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's state; with factors of each rank's own, those of all ranks."""
        state = self.optimizer.state_dict()
        if self._apart:
            state["kfac"] = self.crew.every(state["kfac"])
        return {"optimizer": state, "gradient": self.gradient.state_dict()}

    @property
    def _apart(self) -> bool:
        return self.crew.size > 1 and self.optimizer.kfac.settings.reduce == "none"

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the optimiser's state."""
        held = dict(self.crew.held(state["optimizer"], self.optimizer))
        if self.optimizer.rest is not None:
            held["rest"] = self.crew.held(held["rest"], self.optimizer.rest)
        if self._apart:
            held["kfac"] = held["kfac"][self.crew.rank]
        self.optimizer.load_state_dict(held)
        self.gradient.load_state_dict(state["gradient"])


def _not_finite(error: CurvatureError | LinAlgError) -> str:
    """The text of an error that means a diverged training, here or on another rank.

    Raises:
        CurvatureError: the error, where it means something else.
    """
    told = f"{type(error).__name__}: {error}"
    names = ("BatchError", "NonFiniteError", "LinAlgError", "not finite")
    if not any(name in told for name in names):
        raise error
    log.warning("no step can be made: %s", told)
    return told
