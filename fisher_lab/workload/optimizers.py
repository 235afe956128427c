"""The optimisers of a training in one table: `make` returns the `Updater` that steps with them."""

from __future__ import annotations

import dataclasses
import logging
import math
from contextlib import AbstractContextManager, nullcontext
from time import perf_counter
from typing import Any

import torch
from torch import nn
from torch.linalg import LinAlgError  # type: ignore[reportPrivateImportUsage]
from typing_extensions import override

from fisher_lab.config.errors import ConfigError
from fisher_lab.config.schema import KfacConfig
from fisher_lab.config.workload import OPTIMIZERS, OptimizerConfig
from fisher_lab.curvature import losses, wrappers
from fisher_lab.curvature.errors import BatchError, CurvatureError
from fisher_lab.curvature.kfac.engine import KFACNaturalGradient
from fisher_lab.curvature.kfac.own_pass import OwnPass, OwnRefresh, why_not
from fisher_lab.optim import Clipping, ConstantDamping, KFACOptimizer, LevenbergMarquardt
from fisher_lab.optim.groups import by_decay, outer_layers
from fisher_lab.optim.state import FACTORS
from fisher_lab.workload.data_parallel import ONE_PROCESS, DataParallel
from fisher_lab.workload.gradient import Diverged, LaterBatch, Updater
from fisher_lab.workload.objectives import Batch
from fisher_lab.workload.training_run import TrainingRun

log = logging.getLogger(__name__)


class KFACUpdater(Updater):
    """Steps of a `KFACOptimizer`, with refreshes of its factors and the reduction ratio."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        kfac = self.run.kfac
        self._verify = kfac is not None and kfac.verify  # the first refresh alone
        self._own: OwnRefresh | None = None  # that of the step, of its own passes

    @property
    def optimizer(self) -> KFACOptimizer:
        """The only optimiser."""
        (optimizer,) = self.optimizers
        assert isinstance(optimizer, KFACOptimizer)
        return optimizer

    @property
    def _separate(self) -> bool:
        """Whether each rank has factors of its own."""
        return self.parallel.size > 1 and self.optimizer.kfac.settings.reduce == "none"

    @property
    @override
    def curvature(self) -> dict[str, Any]:
        """What the last factors cover."""
        kfac = self.optimizer.kfac
        if not kfac.kfac_factors:
            return {}
        return {"coverage": kfac.coverage.summed(), "skipped": kfac.skipped}

    @override
    def step(self, batch: Batch, rate: float, later: LaterBatch) -> dict[str, float]:
        """One step; the row also has what clipping, damping and the reduction ratio were."""
        optimizer, parallel = self.optimizer, self.parallel
        for group in optimizer.param_groups:
            factor = rest_factor(self.run.optimizer) if group["method"] == "adamw" else 1.0
            group["lr"] = rate * factor
        measure = self.run.optimizer.ratio and optimizer.inverse_due
        noise = torch.get_rng_state() if measure else None
        due = optimizer.refresh_due
        self._own = OwnRefresh(self.model, optimizer.kfac) if due and self._one_pass else None
        row = self.compute(batch)
        began = perf_counter()
        due = due and math.isfinite(row["grad_norm"])  # an overflow of fp16 skips the step
        if due and parallel.first_problem(self._refresh(batch, later)) is not None:
            raise Diverged(row)
        if parallel.first_problem(self._apply(measure)) is not None:
            raise Diverged(row)
        spent = perf_counter() - began
        row |= optimizer.last
        if noise is not None and "predicted" in optimizer.last:
            with torch.random.fork_rng():
                torch.set_rng_state(noise)  # the loss after the step, with the same dropout
                after = self.loss(batch)
            row["reduction_ratio"] = optimizer.adapt(row["loss"], after)
        row["damping_multiplier"] = optimizer.multiplier
        row["curvature_seconds"] = spent
        return row

    @property
    def _one_pass(self) -> bool:
        """Whether the step's own passes give the factors."""
        several = self.run.kfac is not None and self.run.kfac.n_batches > 1
        return not several and not why_not(self.optimizer.kfac)

    @override
    def _recording(self, counts: bool) -> AbstractContextManager[OwnPass | None]:
        if self._own is None or not counts:
            return nullcontext()
        return OwnPass(self.model, self.optimizer.kfac)

    @override
    def _recorded(self, one: OwnPass, part: Batch, loss: losses.SummedLoss, weight: float) -> None:
        assert self._own is not None
        self._own.add(one, part, loss, weight)

    def _refresh(self, batch: Batch, later: LaterBatch) -> str | None:
        """Compute new factors; returns why there are none."""
        own, self._own = self._own, None
        n_batches = 1 if self.run.kfac is None else self.run.kfac.n_batches
        batches = [batch, *(later(k) for k in range(1, n_batches))]
        batches = self.parallel.own_sequences(batches, self.run.accumulation)
        engine = self.optimizer.kfac
        if not batches and self._separate:
            engine.forget()  # without a sequence, this rank has no part in the coming steps
            return None
        try:
            if own is None or self._verify:
                self.optimizer.refresh(batches, self.loss_fn, verify=self._verify)
            if own is not None:  # those that were verified had other random numbers
                self.optimizer.refresh_from(own)
            self._verify = False
            engine.prepare_inverses()
        except (CurvatureError, LinAlgError) as error:
            if self._separate and isinstance(error, BatchError):
                engine.forget()
                return None
            return _not_finite(error)
        finally:
            wrappers.at_rest(self.model)
        return None

    def _apply(self, measure: bool) -> str | None:
        """Step; returns why that was impossible."""
        self.optimizer.last = {}  # stays empty if an overflow (fp16) skips the step
        try:
            self.apply(predict=measure, cut=self.cut)
        except (CurvatureError, LinAlgError) as error:
            return _not_finite(error)
        return None

    @override
    def _optimizer_states(self) -> dict[str, Any]:
        state = self.optimizer.state_dict()
        if not self._separate:
            return {"optimizer": state}
        own = state["state"].get(0, {}).pop(FACTORS, None)
        return {"optimizer": state, "factors": self.parallel.gather_states(own)}

    @override
    def _load_optimizer_states(self, state: dict[str, Any]) -> None:
        whole = state["optimizer"]
        every = state.get("factors", [])
        if self._separate and len(every) == self.parallel.size:
            own = every[self.parallel.rank]
            whole["state"].setdefault(0, {}).update({} if own is None else {FACTORS: own})
        named = dict(self.model.named_parameters())
        names = [name for group in whole["param_groups"] for name in group["param_names"]]
        parameters = [named[name] for name in names]
        self.optimizer.load_state_dict(self.parallel.scatter_state(whole, parameters))


def _not_finite(error: CurvatureError | LinAlgError) -> str:
    """The text of an error that means a diverged training, on this rank or another.

    Raises:
        CurvatureError: the error itself, if it means something else.
    """
    text = f"{type(error).__name__}: {error}"
    names = ("BatchError", "NonFiniteError", "LinAlgError", "not finite")
    if not any(name in text for name in names):
        raise error
    log.warning("no step can be made: %s", text)
    return text


# ---- the optimisers ------------------------------------------------------------------------------


def make(
    model: nn.Module,
    loss_fn: losses.LossFunction | None,
    run: TrainingRun,
    parallel: DataParallel = ONE_PROCESS,
) -> Updater:
    """The updater of a training, by ``run.optimizer.name``; the arguments are those of `Updater`.

    Raises:
        ConfigError: There is no optimiser of that name.
    """
    config = run.optimizer
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizers: list[torch.optim.Optimizer]
    match config.name:
        case "adamw":
            optimizers = [_adamw(parameters, config)]
        case "sgd":
            groups = by_decay({"params": parameters, "weight_decay": config.weight_decay})
            optimizers = [_DecoupledSGD(groups, lr=1.0, momentum=config.momentum)]
        case "muon" | "soap" | "shampoo":
            optimizers = _of_matrices(model, parameters, config)
        case "kfac" | "ekfac":
            kfac = _kfac(model, run, parallel)
            return KFACUpdater(model, loss_fn, run, [kfac], parallel)
        case _:
            raise ConfigError.value(
                "optimizer.name", config.name, "one of " + ", ".join(OPTIMIZERS)
            )
    return Updater(model, loss_fn, run, optimizers, parallel)


def _adamw(parameters: list[nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        by_decay({"params": parameters, "weight_decay": config.weight_decay}),
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


class _DecoupledSGD(torch.optim.SGD):
    """``torch.optim.SGD`` with decoupled weight decay, as all other optimisers here have it.

    torch adds the decay to the gradient, and so to the momentum; here it is taken off the weights.
    """

    @override
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


def _of_matrices(
    model: nn.Module, parameters: list[nn.Parameter], config: OptimizerConfig
) -> list[torch.optim.Optimizer]:
    """A library's optimiser on the hidden matrices, AdamW on embeddings, head and vectors."""
    outer = {module.weight for module in outer_layers(model).values()}
    hidden = [p for p in parameters if p.dim() == 2 and p not in outer]
    adamw = _adamw([p for p in parameters if p.dim() != 2 or p in outer], config)
    for group in adamw.param_groups:
        group["rate_factor"] = rest_factor(config)
    if config.name == "muon":
        return [_muon(hidden, config), adamw]
    from fisher_lab.workload import shampoo  # its package is an optional one

    return [shampoo.make(hidden, config), adamw]


def _muon(hidden: list[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    if not hasattr(torch.optim, "Muon"):
        raise ConfigError.value(
            "optimizer.name", "muon", f"another one with torch {torch.__version__} (no Muon in it)"
        )
    return torch.optim.Muon(
        hidden,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )


def _kfac(model: nn.Module, run: TrainingRun, parallel: DataParallel) -> KFACOptimizer:
    """K-FAC or EKFAC; embeddings and head are left to AdamW unless ``outer`` is ``kfac``."""
    config, kfac = run.optimizer, run.kfac or KfacConfig()
    kfac = dataclasses.replace(
        kfac, ekfac=config.name == "ekfac", damping_A=_damping_of_inputs(kfac, config)
    )
    adapts = config.damping_schedule == "lm"
    communicator = parallel.communicator
    return KFACOptimizer(
        model,
        KFACNaturalGradient(kfac, seed=run.seed, track_diagonal=False, communicator=communicator),
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        clipping=Clipping(kind=config.clip, limit=config.clip_limit),  # type: ignore[arg-type]
        damping=LevenbergMarquardt(factor=config.lm_factor) if adapts else ConstantDamping(),
        graft=config.graft,
        refresh_below=config.refresh_below,
        inverse_freq=config.inverse_freq,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        outer=config.outer,
        communicator=communicator,
        record=False,
    )


def _damping_of_inputs(kfac: KfacConfig, config: OptimizerConfig) -> float | None:
    """The damping of the A sides: ``damping_ratio`` times that of G, unless it is given.

    With ``damping_mode=pi`` there is one damping, and its split is the factors' own.
    """
    if kfac.damping_A is not None or kfac.damping is None or kfac.damping_mode == "pi":
        return kfac.damping_A
    return kfac.damping * config.damping_ratio


def rest_factor(config: OptimizerConfig) -> float:
    """The rate of AdamW, for what an optimiser leaves to it, relative to the optimiser's own.

    Both rates are known when a training begins (`fisher_lab.tasks.train.training_run`).
    """
    if config.lr is None or config.rest_lr is None:
        return 1.0
    return config.rest_lr / config.lr


def rate(step: int, steps: int, peak: float, config: OptimizerConfig) -> float:
    """The learning rate of step ``step`` (from 0) of ``steps``: the warm-up, then the schedule."""
    warm = round(config.warmup * steps)
    if step < warm:
        return peak * (step + 1) / warm
    if config.schedule == "constant":
        return peak
    done = (step - warm) / max(steps - warm, 1)
    left = 1 - done if config.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return peak * (config.final_lr + (1 - config.final_lr) * left)
