"""The sweeper: hands the command line to `fisher_lab.sweeps.run`."""

from __future__ import annotations

from typing import Any

from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from .launchers import CellLauncher


class ValidatingSweeper(Sweeper):
    """The product of the given values, validated before the first cell starts, and resumable.

    Args:
        params: overrides of a sweep file, under those of the command line.
    """

    def __init__(self, params: Any = None) -> None:
        super().__init__()
        self.params = params

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Called by Hydra before :meth:`sweep`."""
        self._loader = hydra_context.config_loader
        self._master = config
        self._launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> int:
        """Run the sweep.

        Args:
            arguments: the overrides of the command line.

        Returns:
            The exit code.
        """
        from fisher_lab.config import paths
        from fisher_lab.config.errors import ConfigError
        from fisher_lab.sweeps import run
        from fisher_lab.tasks.preflight import preflight

        launcher = self._launcher
        if not isinstance(launcher, CellLauncher):
            chosen = self._master.hydra.runtime.choices["hydra/launcher"]
            ours = (paths.conf() / "hydra" / "launcher").glob("*.yaml")
            names = ", ".join(sorted(file.stem for file in ours))
            raise ConfigError.value("hydra/launcher", chosen, f"one of {names}")
        return run.run(
            self._loader, self._master, arguments, launcher.kind, launcher.settings, preflight
        )
