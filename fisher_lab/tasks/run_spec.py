"""What a run is to do, as entry points, launchers and ranks hand it on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fisher_lab.config.schema import Config
from fisher_lab.config.validate import validate


@dataclass(frozen=True)
class RunSpec:
    """What a run is to do, and where.

    Attributes:
        config: the validated configuration.
        directory: the run directory.
        overrides: as typed.
        frozen: hashes of text and model as they were when the run was submitted; it fails where
            they have changed since.
    """

    config: Config
    directory: Path
    overrides: tuple[str, ...]
    frozen: Mapping[str, Any] | None = None

    def plain(self) -> dict[str, Any]:
        """As JSON-able values, for the ranks."""
        return {**asdict(self), "directory": str(self.directory)}

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> RunSpec:
        """From what :meth:`plain` gave."""
        config = validate(plain["config"])
        directory, overrides = Path(plain["directory"]), tuple(plain["overrides"])
        return cls(config, directory, overrides, plain["frozen"])
