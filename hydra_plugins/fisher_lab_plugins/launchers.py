"""The launcher, as Hydra finds it; what it does is in `fisher_lab.sweeps`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


class CellLauncher(Launcher):
    """Kind and settings of the launcher that `fisher_lab.sweeps.run` uses.

    Args:
        kind: a key of `fisher_lab.config.launchers.KINDS`.
        settings: of that kind, checked there.
    """

    def __init__(self, kind: str, **settings: Any) -> None:
        self.kind = kind
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
