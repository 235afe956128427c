"""What a run is to do, as entry points, launchers and ranks hand it on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fisher_lab.config.validate import validate

if TYPE_CHECKING:
    from fisher_lab.config.schema import Config


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
        return {
            "config": dataclasses.asdict(self.config),
            "directory": str(self.directory),
            "overrides": list(self.overrides),
            "frozen": None if self.frozen is None else dict(self.frozen),
        }

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> RunSpec:
        """From what :meth:`plain` gave."""
        config = validate(plain["config"])
        directory, overrides = Path(plain["directory"]), tuple(plain["overrides"])
        return cls(config, directory, overrides, plain["frozen"])
