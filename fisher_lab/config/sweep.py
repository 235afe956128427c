"""The cells of a sweep: expanded, composed and validated before any of them starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.errors import HydraException
from omegaconf import DictConfig

from .compose import load_cell, one_line, parse
from .errors import ConfigError
from .schema import Config


def cells(params: Mapping[str, object] | None, arguments: Sequence[str]) -> list[list[str]]:
    """The overrides of every cell: the product of all sweeps, the last argument varying fastest.

    Args:
        params: ``hydra.sweeper.params`` of a sweep file; the command line wins over it.
        arguments: the overrides of the command line.

    Raises:
        ConfigError: an override that cannot be parsed, or a sweep that is not a list of values.
    """
    parsed = parse([*(f"{key}={value}" for key, value in (params or {}).items()), *arguments])
    try:
        (batch,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    except HydraException as error:
        raise ConfigError(one_line(error)) from error
    return batch


def validated(
    loader: ConfigLoader, master: DictConfig, batch: Sequence[Sequence[str]]
) -> list[Config]:
    """Compose and validate every cell, before any of them starts.

    Raises:
        ConfigError: the first cell that cannot run, in one line.
    """
    return [load_cell(loader, master, overrides)[1] for overrides in batch]
