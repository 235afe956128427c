"""Group Fisher with its files: the public ``FisherCollector``."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch

from fisher_lab.curvature.errors import FactorFileError
from fisher_lab.curvature.group_fisher.collector import GroupFisher
from fisher_lab.runs import atomic

RECORD = "group_fisher.json"


class FisherCollector(GroupFisher):
    """Moments of squared gradients by task and parameter, which can be saved and taken up again.

    Everything of :class:`.collector.GroupFisher`, and files: float64 tensors as safetensors, the
    rest as JSON, in a directory that is there in full or not at all.
    """

    def save(self, directory: str | Path) -> Path:
        """Writes the state into a directory, replacing what it held.

        Args:
            directory: made where it does not exist.

        Returns:
            The directory.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        tensors, plain = self.state()
        data = safetensors.torch.save(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        )
        # The tensors' file is named after its content and the record names it: replacing the
        # record is the one moment at which the new state takes the old one's place.
        plain["digest"] = _digest(data)
        plain["tensors"] = f"group_fisher-{plain['digest'][:16]}.safetensors"
        atomic.write_bytes(directory / plain["tensors"], data)
        atomic.write_json(directory / RECORD, plain)
        for old in directory.glob("group_fisher-*.safetensors"):
            if old.name != plain["tensors"]:
                old.unlink(missing_ok=True)
        return directory

    @classmethod
    def load(cls, directory: str | Path, **options: Any) -> FisherCollector:
        """Reads a saved state; updates go on where they stopped.

        Args:
            directory: where :meth:`save` wrote.
            **options: further arguments of the constructor (``loss_fn``, ``chunk_size``).

        Raises:
            FactorFileError: a file is missing, cut short, or the two do not belong together.
        """
        directory = Path(directory)
        try:
            plain = json.loads((directory / RECORD).read_text(encoding="utf-8"))
            name = Path(str(plain["tensors"])).name
            data = (directory / name).read_bytes()
            if plain["digest"] != _digest(data):
                raise FactorFileError(
                    f"{directory / name}: not the file that {RECORD} was written with"
                )
            tensors = safetensors.torch.load(data)
        except (OSError, KeyError, ValueError, safetensors.SafetensorError) as error:
            if isinstance(error, FactorFileError):
                raise
            raise FactorFileError(f"{directory}: no saved group Fisher ({error})") from error
        found = cls(**options)
        found.restore(tensors, plain)
        return found


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


__all__ = ["FisherCollector"]
