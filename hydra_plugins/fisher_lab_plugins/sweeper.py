"""The sweeper: every cell is validated before the first one starts, and none is lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


class ValidatingSweeper(Sweeper):
    """The product of the given values, as Hydra's basic sweeper, with all cells checked first.

    Unlike the basic sweeper it does not raise at the first failed cell: it returns what every cell
    returned, and the caller lists the failures.

    Args:
        max_batch_size: at most this many cells are handed to the launcher at once; None: all.
        params: overrides of a sweep file, under those of the command line.
    """

    def __init__(self, max_batch_size: int | None, params: Any = None) -> None:
        super().__init__()
        self.max_batch_size = max_batch_size
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

    def sweep(self, arguments: list[str]) -> Sequence[JobReturn]:
        """Run the sweep.

        Args:
            arguments: the overrides of the command line.

        Returns:
            What every cell returned, in the order of the cells.
        """
        from fisher_lab.cli import claim_directory, preflight
        from fisher_lab.config import sweep
        from fisher_lab.runs import atomic

        batch = sweep.cells(self.params, arguments)
        for config in sweep.validated(self._loader, self._master, batch):
            preflight(config)
        directory = claim_directory(self._master, "sweep")
        atomic.write_text(directory / "multirun.yaml", OmegaConf.to_yaml(self._master))
        returns: list[JobReturn] = []
        size = self.max_batch_size or len(batch)
        for start in range(0, len(batch), size):
            cells = batch[start : start + size]
            returns += self._launcher.launch(cells, initial_job_idx=start)
        return returns
