"""From a batch to the gradient of its mean loss: micro-batches, mixed precision, clipping."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fisher_lab.config.errors import ConfigError
from fisher_lab.curvature import losses
from fisher_lab.curvature.wrappers import device_of
from fisher_lab.workload.data_parallel import ONE_PROCESS, DataParallel
from fisher_lab.workload.objectives import Batch

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""``train.precision`` -> the dtype of the forward pass; ``fp32`` is none."""


@dataclass(frozen=True)
class GradientOptions:
    """How forward and backward passes are made.

    Attributes:
        precision: ``fp32`` (the weights' own dtype), ``bf16`` or ``fp16`` under autocast; the
            weights stay as they are.
        accumulation: Micro-batches that a batch is cut into; their gradients add up.
        gradient_checkpointing: Recompute activations in the backward pass.
    """

    precision: str = "fp32"
    accumulation: int = 1
    gradient_checkpointing: bool = False


class BatchGradient:
    """Computes the gradient of a batch and lets optimisers step along it.

    Args:
        model: The model.
        loss_fn: None for a Hugging Face model.
        options: How forward and backward passes are made.
        clip_norm: The gradient's norm is cut to this; None leaves it.
        *optimizers: Step in `apply`.
        parallel: The processes that compute it together.

    Attributes:
        cut: What the last gradient was multiplied by, to keep its norm under the limit.

    Raises:
        ConfigError: The model cannot recompute its activations.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: losses.LossFunction | None,
        options: GradientOptions,
        clip_norm: float | None,
        *optimizers: torch.optim.Optimizer,
        parallel: DataParallel = ONE_PROCESS,
    ) -> None:
        self.model, self.loss_fn, self.options, self.parallel = model, loss_fn, options, parallel
        self.limit = math.inf if clip_norm is None else clip_norm
        self.optimizers = optimizers
        self.device = device_of(model)
        scaled = options.precision == "fp16"
        self.scaler = torch.amp.GradScaler(self.device.type) if scaled else None
        if options.gradient_checkpointing:
            checkpoint_activations(model)
        self.wrapped = parallel.wrap(model)
        self.cut = 1.0

    def autocast(self) -> Any:
        """The context of a forward pass."""
        dtype = AUTOCAST.get(self.options.precision)
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    def compute(self, batch: Batch) -> dict[str, float]:
        """Leave the gradient of the mean loss in ``.grad``.

        Args:
            batch: Of all ranks, prepared for the model.

        Returns:
            Of all ranks: ``loss`` (mean a label) and ``grad_norm`` (before the cut).
        """
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        total, count = self._backward(batch)
        if self.scaler is not None:
            for optimizer in self.optimizers:
                self.scaler.unscale_(optimizer)
        norm = self.parallel.clip(self.model.parameters(), self.limit)
        self.cut = _cut(norm, self.limit)
        return {"loss": total / max(count, 1), "grad_norm": norm}

    def _backward(self, batch: Batch) -> tuple[float, float]:
        if self.options.accumulation == 1 and self.parallel.size == 1:
            summed = self._forward(batch)
            self._start(summed.loss / max(summed.n_labels, 1))
            return float(summed.loss.detach()), summed.n_labels
        # The number of labels is known at the end only: until then a constant keeps the
        # numbers near those of the mean loss (float16 has little room).
        scale = max(1, next(iter(batch.values())).shape[0])
        total, count = 0.0, 0
        parts = self.parallel.micro_batches(batch, self.options.accumulation)
        for index, part in enumerate(parts):
            with self.parallel.gradient_sync(self.wrapped, index + 1 == len(parts)):
                summed = self._forward(part)
                self._start(summed.loss / scale)
            total += float(summed.loss.detach())
            count += summed.n_labels
        self.parallel.count_tokens(batch, count)
        total, count = self.parallel.sum(total, count)
        # The gradient that was reduced over the ranks is the mean of theirs.
        factor = self.parallel.size * scale / max(count, 1)
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)
        return total, count

    def _forward(self, batch: Batch, model: nn.Module | None = None) -> losses.SummedLoss:
        model = self.wrapped if model is None else model
        with self.autocast():
            return losses.compute_loss(model, batch, self.loss_fn)

    def _start(self, loss: torch.Tensor) -> None:
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    @torch.no_grad()
    def loss(self, batch: Batch) -> float:
        """The mean loss of a batch with the weights as they are, in the model's mode."""
        total, count = 0.0, 0
        for part in self.parallel.micro_batches(batch, self.options.accumulation):
            summed = self._forward(part, self.model)
            total += float(summed.loss)
            count += summed.n_labels
        total, count = self.parallel.sum(total, count)
        return total / max(count, 1)

    def apply(self, **arguments: Any) -> None:
        """Let the optimisers step; with ``fp16``, not where a gradient has overflowed.

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
        """The loss scale, where there is one."""
        return {} if self.scaler is None else self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state that `state_dict` gave."""
        if self.scaler is not None and state:
            self.scaler.load_state_dict(state)


def _cut(norm: float, limit: float) -> float:
    """What ``clip_grad_norm_`` multiplies by; 1 where the norm says nothing."""
    if not 0.0 < norm < math.inf:
        return 1.0
    return min(1.0, limit / (norm + 1e-6))


def checkpoint_activations(model: nn.Module) -> None:
    """Have a Hugging Face model recompute its activations.

    Raises:
        ConfigError: It cannot.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ConfigError.value(
            "train.gradient_checkpointing", True, f"false with a {type(model).__name__}"
        )
    model.gradient_checkpointing_enable(  # type: ignore[operator]
        gradient_checkpointing_kwargs={"use_reentrant": False}
    )
