"""The optimisers of a training in one table, and one step with each: `make` gives an `Updater`."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import nn
from torch.linalg import LinAlgError  # type: ignore[reportPrivateImportUsage]

from fisher_lab.config.errors import ConfigError
from fisher_lab.config.schema import KfacConfig
from fisher_lab.config.workload import OptimizerConfig
from fisher_lab.curvature import losses
from fisher_lab.curvature.collectives import Communicator
from fisher_lab.curvature.errors import BatchError, CurvatureError
from fisher_lab.curvature.kfac.engine import KFACNaturalGradient
from fisher_lab.optim import Clipping, ConstantDamping, KFACOptimizer, LevenbergMarquardt
from fisher_lab.workload.data_parallel import ONE_PROCESS, DataParallel
from fisher_lab.workload.gradient import BatchGradient
from fisher_lab.workload.objectives import Batch
from fisher_lab.workload.training_run import TrainingRun

log = logging.getLogger(__name__)

LaterBatch = Callable[[int], Batch]
"""``later(k)``: the batch that comes ``k`` steps later, prepared; 0 is the step's own."""


class Diverged(Exception):
    """A step cannot be made: a loss, a gradient or a product is not finite.

    Attributes:
        row: what is known of the step, as `Updater.step` returns it.
    """

    def __init__(self, row: dict[str, float]) -> None:
        self.row = row
        super().__init__(f"not finite: {row}")


class Updater(Protocol):
    """One step of a training."""

    def step(self, batch: Batch, rate: float, later: LaterBatch) -> dict[str, float]:
        """Change the weights by one batch.

        Args:
            batch: Prepared for the model (`fisher_lab.curvature.losses.prepare`).
            rate: The learning rate of this step.
            later: Batches of the steps to come, where factors are built from several.

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


class GradientUpdater:
    """Steps of ``torch.optim`` optimisers along the gradient of the mean loss.

    Args:
        gradient: Computes the gradient. The learning rates of its optimisers are overwritten at
            every step, by the rate times a group's ``rate_factor`` (1 where a group has none).
    """

    def __init__(self, gradient: BatchGradient) -> None:
        self.gradient = gradient

    def step(self, batch: Batch, rate: float, later: LaterBatch) -> dict[str, float]:
        """Forward, backward, clip, step; returns ``loss`` and ``grad_norm`` (before the cut)."""
        for optimizer in self.gradient.optimizers:
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
            "optimizers": [optimizer.state_dict() for optimizer in self.gradient.optimizers],
            "gradient": self.gradient.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the optimisers' states."""
        parallel = self.gradient.parallel
        for optimizer, one in zip(self.gradient.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(parallel.scatter_state(one, optimizer))
        self.gradient.load_state_dict(state["gradient"])


class NaturalUpdater:
    """Steps of a `KFACOptimizer`.

    Args:
        gradient: Computes the gradient of a batch.
        optimizer: Makes the steps.
        config: Its choices.
        n_batches: Batches behind a refresh of the factors: the step's own and those that follow.
    """

    def __init__(
        self,
        gradient: BatchGradient,
        optimizer: KFACOptimizer,
        config: OptimizerConfig,
        n_batches: int,
    ) -> None:
        self.gradient, self.optimizer = gradient, optimizer
        self.rest_factor, self.ratio, self.n_batches = rest_factor(config), config.ratio, n_batches
        self.parallel = gradient.parallel

    def step(self, batch: Batch, rate: float, later: LaterBatch) -> dict[str, float]:
        """One step; the row also says what the clipping, the damping and the ratio were."""
        optimizer, parallel = self.optimizer, self.parallel
        for group in optimizer.param_groups:
            group["lr"] = rate * (self.rest_factor if group["name"] == "adamw" else 1.0)
        measure = self.ratio and optimizer.inverse_due
        noise = torch.get_rng_state() if measure else None
        row = self.gradient.compute(batch)
        if not math.isfinite(row["loss"]):
            raise Diverged(row)
        began = perf_counter()
        if (
            optimizer.refresh_due
            and parallel.first_problem(self._refresh(batch, later)) is not None
        ):
            raise Diverged(row)
        if parallel.first_problem(self._apply(measure)) is not None:
            raise Diverged(row)
        spent = perf_counter() - began
        row |= optimizer.last
        if noise is not None and "predicted" in optimizer.last:
            row["reduction_ratio"] = self._ratio(batch, row["loss"], noise)
        row["damping_multiplier"] = optimizer.multiplier
        row["curvature_seconds"] = spent
        return row

    def _refresh(self, batch: Batch, later: LaterBatch) -> str | None:
        """New factors; returns why there are none."""
        optimizer, parallel = self.optimizer, self.parallel
        batches = parallel.own_sequences([batch, *(later(k) for k in range(1, self.n_batches))])
        engine = optimizer.kfac
        if not batches and self._separate:
            engine.forget()  # no sequence, no say in the coming steps
            return None
        try:
            optimizer.refresh(batches, self.gradient.loss_fn)
            engine.prepare_inverses()
        except (CurvatureError, LinAlgError) as error:
            if self._separate and isinstance(error, BatchError):
                engine.forget()
                return None
            return _not_finite(error)
        finally:
            parallel.reshard(self.gradient.model)
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

    @property
    def _separate(self) -> bool:
        """Whether each rank has factors of its own."""
        return self.parallel.size > 1 and self.optimizer.kfac.settings.reduce == "none"

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's state; with factors of each rank's own, those of all ranks."""
        state = self.optimizer.state_dict()
        if self._separate:
            state["kfac"] = self.parallel.gather_states(state["kfac"])
        return {"optimizer": state, "gradient": self.gradient.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the optimiser's state."""
        own = dict(self.parallel.scatter_state(state["optimizer"], self.optimizer))
        if self.optimizer.rest is not None:
            own["rest"] = self.parallel.scatter_state(own["rest"], self.optimizer.rest)
        if self._separate:
            own["kfac"] = own["kfac"][self.parallel.rank]
        self.optimizer.load_state_dict(own)
        self.gradient.load_state_dict(state["gradient"])


def _not_finite(error: CurvatureError | LinAlgError) -> str:
    """The text of an error that means a diverged training, here or on another rank.

    Raises:
        CurvatureError: the error, where it means something else.
    """
    text = f"{type(error).__name__}: {error}"
    names = ("BatchError", "NonFiniteError", "LinAlgError", "not finite")
    if not any(name in text for name in names):
        raise error
    log.warning("no step can be made: %s", text)
    return text


# ---- the optimisers ------------------------------------------------------------------------------


def _adamw(
    model: nn.Module, run: TrainingRun, communicator: Communicator | None
) -> list[torch.optim.Optimizer]:
    return [_adamw_over(_trainable(model), run.optimizer)]


def _adamw_over(parameters: list[nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        _groups(parameters, config.weight_decay),
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def _sgd(
    model: nn.Module, run: TrainingRun, communicator: Communicator | None
) -> list[torch.optim.Optimizer]:
    groups = _groups(_trainable(model), run.optimizer.weight_decay)
    return [_DecoupledSGD(groups, lr=1.0, momentum=run.optimizer.momentum)]


class _DecoupledSGD(torch.optim.SGD):
    """``torch.optim.SGD`` with decoupled weight decay, as the other optimisers here have it.

    torch adds the decay to the gradient, and so to the momentum; here it is taken off the weights.
    """

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
    model: nn.Module, run: TrainingRun, communicator: Communicator | None
) -> list[torch.optim.Optimizer]:
    """``torch.optim.Muon`` on the hidden matrices, AdamW on embeddings, head and vectors."""
    if not hasattr(torch.optim, "Muon"):
        raise ConfigError.value(
            "optimizer.name", "muon", f"another one with torch {torch.__version__} (no Muon in it)"
        )
    config = run.optimizer
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
    return [muon, adamw]


def _kfac(
    model: nn.Module, run: TrainingRun, communicator: Communicator | None
) -> list[torch.optim.Optimizer]:
    """K-FAC, or EKFAC; embeddings and head are left to AdamW unless ``outer`` is ``kfac``."""
    config, kfac = run.optimizer, run.kfac or KfacConfig()
    outer = [] if config.outer == "kfac" else list(embeddings_and_head(model))
    kfac = dataclasses.replace(
        kfac,
        ekfac=config.name == "ekfac",
        exclude=[*kfac.exclude, *outer],
        damping_A=kfac.damping_A or kfac.damping * config.damping_ratio,
    )
    adapts = config.damping_schedule == "lm"
    optimizer = KFACOptimizer(
        model,
        KFACNaturalGradient(kfac, seed=run.seed, track_diagonal=False, communicator=communicator),
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        clipping=Clipping(kind=config.clip, limit=config.clip_limit),  # type: ignore[arg-type]
        damping=LevenbergMarquardt(factor=config.lm_factor) if adapts else ConstantDamping(),
        inverse_freq=config.inverse_freq,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        communicator=communicator,
    )
    return [optimizer]


OPTIMIZERS: dict[
    str, Callable[[nn.Module, TrainingRun, Communicator | None], list[torch.optim.Optimizer]]
] = {"adamw": _adamw, "sgd": _sgd, "muon": _muon, "kfac": _kfac, "ekfac": _kfac}
"""``optimizer.name`` -> what makes the optimisers that a step lets step, in order."""


def _groups(parameters: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices alone."""
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def rest_factor(config: OptimizerConfig) -> float:
    """Rate of AdamW, for what an optimiser leaves to it, over the optimiser's own.

    Both rates are known by the time a training begins (`fisher_lab.tasks.train.training_run`).
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


def make(
    model: nn.Module,
    loss_fn: losses.LossFunction | None,
    run: TrainingRun,
    parallel: DataParallel = ONE_PROCESS,
) -> Updater:
    """The updater of a training, by ``run.optimizer.name``.

    Args:
        model: The model, prepared by `DataParallel.prepare`.
        loss_fn: None for a Hugging Face model.
        run: The training.
        parallel: The processes that train.

    Raises:
        ConfigError: There is no optimiser of that name.
    """
    config = run.optimizer
    if config.name not in OPTIMIZERS:
        raise ConfigError.value("optimizer.name", config.name, "one of " + ", ".join(OPTIMIZERS))
    found = OPTIMIZERS[config.name](model, run, parallel.communicator)
    gradient = BatchGradient(
        model, loss_fn, run.gradient, config.clip_norm, *found, parallel=parallel
    )
    if isinstance(found[0], KFACOptimizer):
        n_batches = 1 if run.kfac is None else run.kfac.n_batches
        return NaturalUpdater(gradient, found[0], config, n_batches)
    return GradientUpdater(gradient)


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
