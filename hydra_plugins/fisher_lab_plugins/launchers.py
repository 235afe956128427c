"""The launchers, as Hydra finds them; what they do is in `fisher_lab.sweeps`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


class CellLauncher(Launcher):
    """Settings by name; runs the cells that `fisher_lab.sweeps.run` gives it.

    Args:
        settings: see `fisher_lab.config.launchers`, which checks them.
    """

    kind = ""

    def __init__(self, **settings: Any) -> None:
        self.settings = {
            name: OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
            for name, value in settings.items()
        }

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Called by Hydra."""

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Other sweepers would call this."""
        raise HydraException("this launcher runs the cells of hydra/sweeper=fisher_lab alone")


class SerialLauncher(CellLauncher):
    """One cell after the other, in the launching process."""

    kind = "serial"


class LocalLauncher(CellLauncher):
    """A bounded pool of processes on this machine."""

    kind = "local"


class SlurmLauncher(CellLauncher):
    """Job arrays, by submitit."""

    kind = "slurm"
