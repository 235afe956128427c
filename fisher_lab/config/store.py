"""What Hydra learns from Python: every key with its default, and the files under ``sweeps/``."""

from __future__ import annotations

import dataclasses

from hydra.core.config_store import ConfigStore

from . import sweep_files
from .errors import ConfigError
from .schema import Config

DEFAULTS = "schema_defaults"
"""The entry of the defaults list in ``conf/config.yaml`` that brings every key of the schema."""


def register() -> None:
    """Register the schema's defaults and the sweeps. May be called more than once."""
    # Plain values, not the dataclass: its types would make Hydra raise in its own words.
    store = ConfigStore.instance()
    store.store(name=DEFAULTS, node=dataclasses.asdict(Config()), provider="fisher_lab")
    _register_sweeps()


def _register_sweeps() -> None:
    """Make every sweep file an option of the group ``sweeps``.

    Their folders are not put on Hydra's search path: the parents would have to be, and every other
    folder there would turn into a group.
    """
    store = ConfigStore.instance()
    store.repo.pop("sweeps", None)  # those of a working directory that is no longer ours
    for name, path in sweep_files.all_files().items():
        try:
            node = sweep_files.node(sweep_files.load(path))
        except ConfigError:
            node = {}  # whoever asks for it is told by `sweep_files.expand`
        store.store(group="sweeps", name=name, node=node, package="_global_", provider="fisher_lab")
