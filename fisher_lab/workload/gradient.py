"""One step of a training along the gradient of the mean loss of a batch.

Micro-batches, mixed precision and clipping of the gradient's norm are the same for every optimiser;
K-FAC changes what happens between the gradient and the step (`fisher_lab.workload.optimizers`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from fisher_lab.config.errors import ConfigError
from fisher_lab.curvature import losses
from fisher_lab.curvature.kfac.own_pass import OwnPass
from fisher_lab.curvature.wrappers import device_of
from fisher_lab.workload.data_parallel import DataParallel
from fisher_lab.workload.objectives import Batch
from fisher_lab.workload.training_run import TrainingRun

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""``train.precision`` -> the dtype of the forward pass; ``fp32`` has no autocast."""

LaterBatch = Callable[[int], Batch]
"""``later(k)`` is the prepared batch of ``k`` steps later; ``later(0)`` is the step's own."""


class Diverged(Exception):
    """A step is impossible because a loss, a gradient or a product is not finite.

    Attributes:
        row: what is known about the step, as `Updater.step` returns it.
    """

    def __init__(self, row: dict[str, float]) -> None:
        self.row = row
        super().__init__(f"not finite: {row}")


class Updater:
    """Steps of ``torch.optim`` optimisers along the gradient of the mean loss.

    Args:
        model: The model, prepared by `DataParallel.prepare`.
        loss_fn: None for a Hugging Face model.
        run: The training: precision, micro-batches, gradient checkpointing, limit of the norm.
        optimizers: They step one after the other. Their learning rates are overwritten at every
            step by the rate times a group's ``rate_factor`` (1 if a group has none).
        parallel: The processes that train together.

    Attributes:
        cut: What the last gradient was multiplied by to keep its norm under the limit.

    Raises:
        ConfigError: The model cannot recompute its activations.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: losses.LossFunction | None,
        run: TrainingRun,
        optimizers: Sequence[torch.optim.Optimizer],
        parallel: DataParallel,
    ) -> None:
        self.model, self.loss_fn, self.run, self.parallel = model, loss_fn, run, parallel
        self.optimizers = optimizers
        self.device = device_of(model)
        scaled = run.precision == "fp16"
        self.scaler = torch.amp.GradScaler(self.device.type) if scaled else None
        if run.gradient_checkpointing:
            _checkpoint_activations(model)
        self.wrapped = parallel.wrap(model)
        self.cut = 1.0

    @property
    def curvature(self) -> dict[str, Any]:
        """What the factors cover, for the record; nothing where there are none."""
        return {}

    def step(self, batch: Batch, rate: float, later: LaterBatch) -> dict[str, float]:
        """Change the weights by one batch.

        Args:
            batch: The batch of all ranks, prepared for the model (`losses.prepare`).
            rate: The learning rate of this step.
            later: Batches of the following steps, for factors that are built from several.

        Returns:
            Numbers for the learning curve, of all ranks, among them ``loss`` (mean per label,
            before the step) and ``grad_norm`` (before the norm is cut).

        Raises:
            Diverged: Something is not finite; the weights are unchanged.
        """
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("rate_factor", 1.0)
        row = self.compute(batch)
        self.apply()
        return row

    def compute(self, batch: Batch) -> dict[str, float]:
        """Leave the gradient of the mean loss in ``.grad``; returns ``loss`` and ``grad_norm``.

        Raises:
            Diverged: The loss or a gradient is not finite.
        """
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        total, count = self._backward(batch)
        if self.scaler is not None:
            for optimizer in self.optimizers:
                self.scaler.unscale_(optimizer)
        clip_norm = self.run.optimizer.clip_norm
        limit = math.inf if clip_norm is None else clip_norm
        norm = self.parallel.clip(self.model.parameters(), limit)
        # The factor of `clip_grad_norm_`.
        self.cut = min(1.0, limit / (norm + 1e-6)) if 0.0 < norm < math.inf else 1.0
        row = {"loss": total / max(count, 1), "grad_norm": norm}
        # An overflow of float16 is not the end: the scaler skips the step.
        finite = self.scaler is not None or math.isfinite(norm)
        if not (finite and math.isfinite(row["loss"])):
            raise Diverged(row)
        return row

    def _backward(self, batch: Batch) -> tuple[float, float]:
        """Returns the summed loss and the number of labels, of all ranks."""
        if self.run.accumulation == 1 and self.parallel.size == 1:
            summed = self._pass(batch, None)
            return float(summed.loss.detach()), summed.n_labels
        # The number of labels is known at the end only. Until then, division by a constant keeps
        # the numbers near those of the mean loss (the range of float16 is small).
        scale = max(1, next(iter(batch.values())).shape[0])
        total, count = 0.0, 0
        parts, own = self.parallel.micro_batches(batch, self.run.accumulation)
        for index, part in enumerate(parts):
            with self.parallel.gradient_sync(self.wrapped, index + 1 == len(parts)):
                summed = self._pass(part, scale, counts=index < own)
            total += float(summed.loss.detach())
            count += summed.n_labels
        self.parallel.count_tokens(batch, count)
        total, count = self.parallel.sum(total, count)
        # The reduced gradient is the mean over the ranks.
        factor = self.parallel.size * scale / max(count, 1)
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)
        return total, count

    def _pass(self, part: Batch, scale: float | None, *, counts: bool = True) -> losses.SummedLoss:
        """Adds the gradient of a part's summed loss over ``scale`` (None: over its labels).

        Args:
            part: Of the batch.
            scale: The divisor.
            counts: Whether it is a part of this rank's own, and none that stands in for one.
        """
        with self._recording(counts) as one:
            summed = self._forward(self.wrapped, part)
        divisor = max(summed.n_labels, 1) if scale is None else scale
        self._scaled(summed.loss / divisor).backward()
        if one is not None:
            weight = 1.0 if self.scaler is None else self.scaler.get_scale()
            self._recorded(one, part, summed, weight / divisor)
        return summed

    def _recording(self, counts: bool) -> AbstractContextManager[OwnPass | None]:
        """What is entered around a forward pass."""
        return nullcontext()

    def _recorded(self, one: OwnPass, part: Batch, loss: losses.SummedLoss, weight: float) -> None:
        """Called after the backward pass of what was recorded; the loss was times ``weight``."""

    def _forward(self, model: nn.Module, batch: Batch) -> losses.SummedLoss:
        dtype = AUTOCAST.get(self.run.precision)
        with nullcontext() if dtype is None else torch.autocast(self.device.type, dtype):
            return losses.compute_loss(model, batch, self.loss_fn)

    def _scaled(self, loss: torch.Tensor) -> torch.Tensor:
        return loss if self.scaler is None else self.scaler.scale(loss)

    @torch.no_grad()
    def loss(self, batch: Batch) -> float:
        """The mean loss of a batch with the current weights, in the model's current mode."""
        total, count = 0.0, 0
        for part in self.parallel.micro_batches(batch, self.run.accumulation)[0]:
            summed = self._forward(self.model, part)
            total += float(summed.loss)
            count += summed.n_labels
        total, count = self.parallel.sum(total, count)
        return total / max(count, 1)

    def apply(self, **arguments: Any) -> None:
        """Let the optimisers step; with ``fp16``, not if a gradient has overflowed.

        Args:
            **arguments: For ``optimizer.step``.
        """
        for optimizer in self.optimizers:
            if self.scaler is None:
                optimizer.step(**arguments)
            else:
                self.scaler.step(optimizer, **arguments)
        if self.scaler is not None:
            self.scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on besides weights and random numbers."""
        scaler = {} if self.scaler is None else self.scaler.state_dict()
        return {**self._optimizer_states(), "gradient": scaler}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._load_optimizer_states(state)
        if self.scaler is not None and state["gradient"]:
            self.scaler.load_state_dict(state["gradient"])

    def _optimizer_states(self) -> dict[str, Any]:
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def _load_optimizer_states(self, state: dict[str, Any]) -> None:
        for optimizer, one in zip(self.optimizers, state["optimizers"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            optimizer.load_state_dict(self.parallel.scatter_state(one, parameters))


def _checkpoint_activations(model: nn.Module) -> None:
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ConfigError.value(
            "train.gradient_checkpointing", True, f"false with a {type(model).__name__}"
        )
    model.gradient_checkpointing_enable(  # type: ignore[operator]
        gradient_checkpointing_kwargs={"use_reentrant": False}
    )
