"""The cells of a sweep: expanded, composed and validated before any of them starts."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from .compose import COMPOSITION_ERRORS, check, load_cell, names_group, one_line, parse
from .errors import ConfigError
from .schema import Config
from .validate import validate

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

GROUP = "sweeps"


def requested(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The sweeps that a command line asks for, and its other overrides.

    Raises:
        ConfigError: ``+sweeps=a,b``, which would sweep over the names of the files.
    """
    names: list[str] = []
    others: list[str] = []
    for override in parse(arguments):
        text = override.input_line or ""
        if override.key_or_group != GROUP:
            others.append(text)
            continue
        if override.is_sweep_override():
            given = ",".join(override.sweep_string_iterator())
            raise ConfigError(
                f"{text} would sweep over the names of the files: write +{GROUP}=[{given}] to run "
                "these sweeps, each in its own directory"
            )
        value = override.value()
        names += [str(item) for item in value] if isinstance(value, list) else [str(value)]
    return names, others


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


class Composer:
    """Composes and validates cells as Hydra would, each choice of groups once.

    Hydra takes 0.15 s a cell. What takes that long is the choice of options; plain values are then
    set in the composed configuration, in order, which is what is done here for each cell.

    Args:
        loader: Hydra's configuration loader.
        master: what the sweep was started with.
    """

    def __init__(self, loader: ConfigLoader, master: DictConfig) -> None:
        self._loader = loader
        self._master = master
        self._composed: dict[tuple[str, ...], DictConfig] = {}

    def __call__(self, overrides: Sequence[str]) -> Config:
        """Compose and validate one cell.

        Raises:
            ConfigError: in one line that ends with the cell's overrides.
        """
        parsed = parse(overrides)
        groups = [one for one in parsed if names_group(self._loader, one)]
        plain = [one for one in parsed if one not in groups]
        if not all(_sets_a_value(one) for one in plain):
            return load_cell(self._loader, self._master, overrides)[1]
        key = tuple(one.input_line or "" for one in groups)
        try:
            check(self._loader, overrides, multirun=False)
            if key not in self._composed:
                composed = self._loader.load_sweep_config(self._master, list(key))
                names = [str(name) for name in composed if name != "hydra"]
                self._composed[key] = OmegaConf.masked_copy(composed, names)
            cfg = copy.deepcopy(self._composed[key])
            for one in plain:
                OmegaConf.update(cfg, one.key_or_group, one.value(), merge=True)
            return validate(cfg)
        except ConfigError as error:
            raise ConfigError(f"{error} (in the cell {' '.join(overrides)})") from None
        except COMPOSITION_ERRORS as error:
            text = f"{one_line(error)} (in the cell {' '.join(overrides)})"
            raise ConfigError(text) from error


def _sets_a_value(override: Override) -> bool:
    return override.package is None and not (
        override.is_delete() or override.is_add() or override.is_force_add()
    )
