"""From a configuration to a model and its batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fisher_lab.config.schema import Config
from fisher_lab.curvature import losses
from fisher_lab.runs.signals import Watch
from fisher_lab.workload import checkpoint, content_identity, evaluation, models
from fisher_lab.workload.corpus import Side
from fisher_lab.workload.inputs import Inputs, ProgressLike, prepare
from fisher_lab.workload.objectives import Batch, Objective

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EVALUATION_BATCHES = 8
"""Held-out batches for the loss of a model that no recipe of ours has trained."""


@dataclass(frozen=True)
class Workload:
    """A model and the text it is looked at on.

    Attributes:
        model: In evaluation mode, on ``device``.
        tokenizer: The model's.
        objective: Makes the batches.
        device: Where model and batches are.
        batch_size: Sequences a batch.
        seq_len: Tokens a sequence.
        record: JSON-able: hashes of text, tokenizer and checkpoint, held-out loss and the trivial
            model's.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    objective: Objective
    device: torch.device
    batch_size: int
    seq_len: int
    record: dict[str, Any]

    @property
    def loss_fn(self) -> losses.CrossEntropy | None:
        """None for a Hugging Face model; else ``loss_fn(outputs, batch)`` gives token losses."""
        return self.objective.loss_fn

    def batches(self, split: Side, n: int, seed: int) -> list[Batch]:
        """The first ``n`` batches of a side of the text, on the model's device.

        Args:
            split: ``train`` or ``heldout``.
            n: How many; those of a smaller ``n`` are the first of a larger one.
            seed: Of windows and masks.
        """
        made = (
            self.objective.batch(
                split, index, seed=seed, batch_size=self.batch_size, seq_len=self.seq_len
            )
            for index in range(n)
        )
        return [{key: value.to(self.device) for key, value in one.items()} for one in made]


def device_of(cfg: Config) -> torch.device:
    """The device that a configuration names; ``auto`` is CUDA where there is one."""
    if cfg.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(cfg.device)


def build(
    cfg: Config, progress: ProgressLike | None = None, signals: Watch | None = None
) -> Workload:
    """Build model, tokenizer and batches; the first time, this trains the checkpoint.

    Args:
        cfg: The validated configuration.
        progress: Shows the training of a checkpoint.
        signals: The run's signals, so that a training that is stopped can go on where it was.

    Raises:
        ConfigError: Text or model cannot be had as configured.
        fisher_lab.runs.signals.Interrupted: A signal came while the checkpoint was trained.
    """
    inputs = prepare(cfg)
    model, about = trained(inputs, progress, signals)
    device = device_of(cfg)
    model = model.to(device).eval()
    record = {**inputs.record, "model": {**about, "parameters": _count(model)}}
    workload = Workload(
        model,
        inputs.tokenizer,
        inputs.objective,
        device,
        cfg.data.batch_size,
        cfg.data.seq_len,
        record,
    )
    if "heldout_loss" not in about:
        record["model"].update(_evaluate(workload))
    return workload


def trained(
    inputs: Inputs, progress: ProgressLike | None, signals: Watch | None
) -> tuple[nn.Module, dict[str, Any]]:
    """The model under analysis: pretrained, from its checkpoint, or as initialised.

    Returns:
        The model on the CPU, and what the record says of it.
    """
    model = inputs.cfg.model
    if inputs.pretrained is not None:
        content = content_identity.content_identity(inputs.cfg)["model"]
        return inputs.pretrained, {"init": "pretrained", **content}
    if model.init == "random":
        built = models.with_dtype(inputs.untrained(model.train_seed), model.dtype)
        models.set_attention(built, model.attn_implementation)
        return built, {"init": "random", "train_seed": model.train_seed}
    directory = checkpoint.cached(inputs, progress, signals)
    record = checkpoint.verified_record(directory)
    return models.load(directory, model, inputs.objective.name), {"init": "trained", **record}


def _evaluate(workload: Workload) -> dict[str, Any]:
    size: Any = {
        "batch_size": workload.batch_size,
        "seq_len": workload.seq_len,
        "limit": EVALUATION_BATCHES,
    }
    return {
        "heldout_loss": evaluation.heldout_loss(workload.model, workload.objective, **size),
        "baseline_loss": evaluation.baseline_loss(workload.objective, **size),
        "baseline": workload.objective.baseline,
    }


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
