"""Threads, seeds and determinism of the process, set once before a task starts."""

from __future__ import annotations

import os
import random
from typing import Any

import numpy as np
import torch

from fisher_lab.config.schema import Config

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


def prepare(config: Config) -> dict[str, Any]:
    """Set threads, seeds and determinism as configured.

    Args:
        config: the typed configuration.

    Returns:
        What was set, for the record: ``device``, ``device_name``, ``threads``, ``seed``,
        ``deterministic``, ``default_dtype``.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if config.deterministic:
        # cuBLAS reads it when it is first used; without it, it is not deterministic.
        os.environ.setdefault(_CUBLAS, ":4096:8")
    if torch.are_deterministic_algorithms_enabled() != config.deterministic:
        # Only then: the call imports the compiler, which takes two seconds.
        torch.use_deterministic_algorithms(config.deterministic)
    random.seed(config.seed)
    np.random.seed(config.seed)
    torch.manual_seed(config.seed)
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "device": device,
        "device_name": torch.cuda.get_device_name() if device == "cuda" else None,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "seed": config.seed,
        "deterministic": config.deterministic,
        "default_dtype": str(torch.get_default_dtype()).removeprefix("torch."),
    }
