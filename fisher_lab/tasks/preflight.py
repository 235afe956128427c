"""What can be known to fail before a directory is made or a model is built."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from fisher_lab import tracking
from fisher_lab.config.errors import ConfigError
from fisher_lab.results import labels

if TYPE_CHECKING:
    from fisher_lab.config.schema import Config


def preflight(config: Config) -> Mapping[str, Any]:
    """Check what a configuration needs of this machine.

    Returns:
        The hashes of text and model, part of the run's identity.

    Raises:
        ConfigError: a device that this machine does not have; a text or a model that does not
            exist; a tracker or an optimiser whose package is missing.
        LabelError: the user's own names of metrics cannot be read.
    """
    from fisher_lab.workload import pretrained_files
    from fisher_lab.workload.content_identity import content_identity

    tracking.check(config.tracker)
    labels.catalogue()  # the user's own names can be read
    content = content_identity(config)
    pretrained_files.check(config)
    check_optimizer(config)
    check_ranks(config)
    asked = {"device": config.device}
    if config.task.name == "analyze" and config.spectral.enabled:
        asked["spectral.eigensolve_device"] = config.spectral.eigensolve_device
    if config.task.name == "analyze" and config.lanczos.enabled:
        asked["lanczos.vector_device"] = config.lanczos.vector_device
    for key in (key for key, device in asked.items() if device == "cuda"):
        import torch

        if not torch.cuda.is_available():
            allowed = "auto or cpu on a machine without a CUDA device"
            raise ConfigError.value(key, "cuda", allowed)
    return content


def check_optimizer(config: Config) -> None:
    """Check that the package of an optimiser is there.

    Raises:
        ConfigError: it is not.
    """
    name = config.optimizer.name
    of_package = config.task.name == "train" and name in ("soap", "shampoo")
    if of_package and find_spec("pytorch_optimizer") is None:
        raise ConfigError(
            f"optimizer={name} needs the package pytorch_optimizer: "
            "pip install 'fisher-lab[optimizers]'"
        )


def check_ranks(config: Config) -> None:
    """Check that there is a CUDA device for each rank.

    Raises:
        ConfigError: there is not.
    """
    d = config.distributed
    if d.nproc == 1 or config.device == "cpu" or d.backend == "gloo":
        return
    import torch

    found = torch.cuda.device_count()
    if d.nproc > found and (found or config.device == "cuda"):
        allowed = f"at most {found}, the CUDA devices of this machine"
        raise ConfigError.value("distributed.nproc", d.nproc, allowed)


def check_nodes(config: Config) -> None:
    """Check that the environment names the nodes (where a sweep is submitted, it does not yet).

    Raises:
        ConfigError: it does not.
    """
    from fisher_lab.distributed import launch

    try:
        launch.place(config.distributed.nproc, config.distributed.nodes, os.environ)
    except launch.LaunchError as error:
        raise ConfigError(str(error)) from None
