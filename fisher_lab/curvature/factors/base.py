"""What every factor can do."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ..linalg import Clipped, clip
from ..settings import Numerics


@dataclass(frozen=True)
class FactorReport:
    """What was done to a factor to make it usable (a side of a row of ``layers.csv``).

    Attributes:
        dim: dimension of the factor.
        damping: its Tikhonov damping.
        clipped: eigenvalues that the floor raised, over the full dimension.
        kappa_before: condition number of the damped spectrum.
        kappa_after: condition number of the spectrum in use.
        route: ``cholesky``, ``eigh`` or ``diagonal``.
        jitter: absolute jitter of the Cholesky factorisation.
        eps: the same relative to the mean diagonal.
        fallback: what was taken instead when the first route failed, or "".
        floor_applied: whether a floor that was asked for was applied.
    """

    dim: int
    damping: float
    clipped: int
    kappa_before: float
    kappa_after: float
    route: str
    jitter: float = 0.0
    eps: float = 0.0
    fallback: str = ""
    floor_applied: bool = True


class Damped(ABC):
    """A factor with its damping and clipping in place, ready to be applied."""

    @abstractmethod
    def power(self, y: Tensor, p: float) -> Tensor:
        """Returns ``M_used^p y``.

        Args:
            y: ``[dim, m]`` in the apply dtype.
            p: any power; negative ones need a positive damping.

        Raises:
            SettingError: ``p < 0`` without damping, or a power that the structure lacks.
        """

    @abstractmethod
    def report(self) -> FactorReport:
        """Returns what was done; may cost an eigenvalue computation the first time."""

    @abstractmethod
    def logdet(self) -> float:
        """Returns the log-determinant of the matrix in use."""


class Factor(ABC):
    """A positive semi-definite matrix ``M`` of dimension ``dim``.

    Attributes:
        dim: its dimension.
        structure: name of the structure, as recorded.
    """

    dim: int
    structure: str

    @abstractmethod
    def multiply(self, y: Tensor) -> Tensor:
        """Returns ``M y`` for ``y`` of shape ``[dim, m]``, undamped, in the dtype of ``y``."""

    @abstractmethod
    def trace(self) -> float:
        """Returns the trace of ``M``."""

    @abstractmethod
    def spectrum(self) -> tuple[Tensor, int]:
        """Returns the eigenvalues at hand (>= 0, any order) and the number of further zeros."""

    @abstractmethod
    def damped(self, lam: float, kappa_max: float | None, numerics: Numerics) -> Damped:
        """Returns the damped and clipped form (``docs/math.md``, section 2)."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors that the factor consists of, for files and for counting bytes."""

    def finite(self) -> bool:
        """Says whether the factor holds neither NaN nor infinity."""
        return all(bool(torch.isfinite(t).all()) for t in self.tensors().values())

    def top(self, k: int) -> Tensor:
        """Returns the ``min(k, dim)`` largest eigenvalues, float64, descending."""
        values, n_zero = self.spectrum()
        values = values.double().sort(descending=True).values[:k]
        missing = min(k - values.numel(), n_zero)
        return torch.cat([values, values.new_zeros(max(0, missing))])

    def nbytes(self) -> int:
        """Returns the bytes that the factor takes."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())


def clipped_logdet(clipped: Clipped, n_zero: int) -> float:
    """Log-determinant of a clipped spectrum with ``n_zero`` further eigenvalues at its base."""
    known = float(clipped.used.double().log().sum())
    return (
        known
        + (n_zero * math.log(clipped.base) if n_zero and clipped.base > 0 else 0.0)
        + (-math.inf if n_zero and clipped.base <= 0 else 0.0)
    )


__all__ = ["Damped", "Factor", "FactorReport", "clip", "clipped_logdet"]
