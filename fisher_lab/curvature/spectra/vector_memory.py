"""Where the vectors of Lanczos go, and whether they fit, before they are allocated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fisher_lab.curvature.errors import CurvatureError
from fisher_lab.curvature.memory import free_memory


@dataclass(frozen=True)
class Vectors:
    """Vectors that are about to be allocated.

    Attributes:
        setting: the argument that their number follows from.
        basis: vectors of the basis, ``m``.
        copies: how many blocks of that size there are at once.
        eigenvectors: further vectors.
    """

    setting: str
    basis: int
    copies: int = 1
    eigenvectors: int = 0

    @property
    def count(self) -> int:
        """Number of all vectors."""
        return self.basis * self.copies + self.eigenvectors

    def largest_basis(self, count: int) -> int:
        """Returns the largest basis with which at most ``count`` vectors are allocated."""
        return max((count - self.eigenvectors) // self.copies, 0)

    def __str__(self) -> str:
        parts = f"{self.basis} vectors"
        parts = f"{self.copies} blocks of {parts}" if self.copies > 1 else parts
        return f"({parts} + {self.eigenvectors} eigenvectors)" if self.eigenvectors else parts


def place(
    wanted: Vectors,
    n: int,
    dtype: torch.dtype,
    *,
    device: str,
    model_device: torch.device,
    say: Callable[[str], None],
) -> torch.device:
    """Says what the vectors will take, and chooses where they fit.

    Args:
        wanted: the vectors.
        n: their length.
        dtype: of their elements.
        device: ``cpu``, ``cuda``, or ``auto`` (with the model if they fit there, else the host).
        model_device: where the model is.
        say: gets the line about memory.

    Raises:
        CurvatureError: they do not fit.
    """
    each = n * torch.empty(0, dtype=dtype).element_size()
    chosen = model_device if device == "auto" else torch.device(device)
    free = free_memory(chosen)
    if wanted.count * each > free and device == "auto" and chosen.type != "cpu":
        chosen = torch.device("cpu")
        free = free_memory(chosen)
    say(
        f"Lanczos basis: {wanted} x {n} parameters x {dtype} = "
        f"{wanted.count * each / 2**20:.1f} MiB on {chosen} ({free / 2**20:.0f} MiB free)"
    )
    if wanted.count * each > free:
        raise CurvatureError(
            f"{wanted.setting}: {wanted} of {n} parameters take "
            f"{wanted.count * each / 2**20:.0f} MiB, and {free / 2**20:.0f} MiB are free on "
            f"{chosen}; allowed: {wanted.largest_basis(free // max(each, 1))} or fewer vectors, "
            "or a smaller block"
        )
    return chosen
