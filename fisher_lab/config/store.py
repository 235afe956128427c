"""What Hydra learns from Python: every key with its default, and the files under ``sweeps/``."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from . import paths
from .schema import Config

DEFAULTS = "schema_defaults"
"""The entry of the defaults list in ``conf/config.yaml`` that brings every key of the schema."""


def register() -> None:
    """Register the schema's defaults and the sweeps. May be called more than once."""
    # Plain values, not the dataclass: its types would make Hydra raise in its own words.
    store = ConfigStore.instance()
    store.store(name=DEFAULTS, node=dataclasses.asdict(Config()), provider="fisher_lab")
    register_sweeps(paths.sweeps())


def register_sweeps(folder: Path) -> list[str]:
    """Make every YAML file of a folder an option of the group ``sweeps``.

    The folder itself is not put on Hydra's search path: its parent would have to be, and every
    other folder beside it would turn into a group.

    Returns:
        The names of the options.
    """
    names = []
    for file in sorted(folder.glob("*.yaml")):
        ConfigStore.instance().store(
            group="sweeps",
            name=file.stem,
            node=OmegaConf.load(file),
            package="_global_",
            provider="fisher_lab",
        )
        names.append(file.stem)
    return names
