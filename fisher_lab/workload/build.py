"""From a configuration to a model and its batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fisher_lab.config.schema import Config
from fisher_lab.config.workload import DataConfig
from fisher_lab.curvature import losses
from fisher_lab.curvature.collectives import Progress, no_progress
from fisher_lab.runs.signals import Watch
from fisher_lab.workload import checkpoint, evaluation, models, pretrained
from fisher_lab.workload.corpus import Side
from fisher_lab.workload.inputs import Inputs, prepare
from fisher_lab.workload.objectives import Batch, Objective


@dataclass(frozen=True)
class Workload:
    """A model and the text that it is analysed on.

    Attributes:
        model: In evaluation mode, on ``device``.
        objective: Makes the batches.
        device: Where model and batches are.
        data: The options of the batches: ``batch_size`` and ``seq_len``.
        record: JSON-able: hashes of text, tokenizer and checkpoint, the held-out loss and that of
            the trivial model.
    """

    model: nn.Module
    objective: Objective
    device: torch.device
    data: DataConfig
    record: dict[str, Any]

    @property
    def loss_fn(self) -> losses.CrossEntropy | None:
        """None for a Hugging Face model; else ``loss_fn(outputs, batch)`` returns token losses."""
        return self.objective.loss_fn

    def batches(self, split: Side, n: int, seed: int) -> list[Batch]:
        """The first ``n`` batches of a side of the text, on the model's device.

        Args:
            split: ``train`` or ``heldout``.
            n: Number of batches; those of a smaller ``n`` are the first of a larger one.
            seed: Seed of windows and masks.
        """
        size = {"batch_size": self.data.batch_size, "seq_len": self.data.seq_len}
        made = (self.objective.batch(split, index, seed=seed, **size) for index in range(n))
        return [{key: value.to(self.device) for key, value in one.items()} for one in made]


def device_of(cfg: Config) -> torch.device:
    """The device that a configuration names; ``auto`` is CUDA if it is available."""
    if cfg.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(cfg.device)


def build(cfg: Config, progress: Progress = no_progress, signals: Watch | None = None) -> Workload:
    """Build model, tokenizer and batches; this trains the checkpoint if the cache lacks it.

    Args:
        cfg: The validated configuration.
        progress: Shows the training of a checkpoint.
        signals: The run's signals, so that a training that is stopped can be resumed.

    Raises:
        ConfigError: The text or the model is not available as configured.
        fisher_lab.runs.signals.Interrupted: A signal came while the checkpoint was trained.
    """
    inputs = prepare(cfg)
    model, about = trained(inputs, progress, signals)
    device = device_of(cfg)
    model = model.to(device).eval()
    objective = inputs.objective
    about = {**about, "parameters": sum(p.numel() for p in model.parameters())}
    if "adapter" in about:
        about.pop("heldout_loss", None)  # the checkpoint's, without the adapter
    if "heldout_loss" not in about:
        size: Any = {"batch_size": cfg.data.batch_size, "seq_len": cfg.data.seq_len}
        size["limit"] = evaluation.FEW_BATCHES
        about["heldout_loss"] = evaluation.heldout_loss(model, objective, **size)
        about["baseline_loss"] = evaluation.baseline_loss(objective, **size)
        about["baseline"] = objective.baseline
    return Workload(model, objective, device, cfg.data, {**inputs.record, "model": about})


def trained(
    inputs: Inputs, progress: Progress, signals: Watch | None
) -> tuple[nn.Module, dict[str, Any]]:
    """The model under analysis: pretrained, from its checkpoint, or as initialised.

    Returns:
        The model on the CPU, and what the record says about it.
    """
    built, about = _without_adapter(inputs, progress, signals)
    built, adapter = pretrained.with_adapter(built, inputs.cfg.model)
    return built, {**about, **adapter}


def _without_adapter(
    inputs: Inputs, progress: Progress, signals: Watch | None
) -> tuple[nn.Module, dict[str, Any]]:
    model = inputs.cfg.model
    if inputs.pretrained is not None:
        loaded = inputs.pretrained
        return loaded.model, {"init": "pretrained", **inputs.content["model"], **loaded.about}
    if model.init == "random":
        built = models.with_dtype(inputs.untrained(model.train_seed), model.dtype)
        models.set_attention(built, model.attn_implementation)
        return built, {"init": "random", "train_seed": model.train_seed}
    directory = checkpoint.cached(inputs, progress, signals)
    record = checkpoint.verified_record(directory)
    return models.load(directory, model, inputs.objective.name), {"init": "trained", **record}
