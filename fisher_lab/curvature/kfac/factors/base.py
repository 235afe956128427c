"""What every factor can do."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from fisher_lab.curvature.kfac.numerics import Numerics
from fisher_lab.curvature.linalg import Clipped, clip
from fisher_lab.curvature.memory import HOST, on_host_if_full

T = TypeVar("T")


@dataclass(frozen=True)
class FactorReport:
    """What was done to a factor to make it usable (a side of a row of ``layers.csv``).

    Attributes:
        dim: dimension of the factor.
        damping: its Tikhonov damping.
        clipped: eigenvalues that the floor raised, over the full dimension.
        kappa_before: condition number of the damped spectrum; NaN where it was not asked for.
        kappa_after: condition number of the spectrum in use; the same.
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
    def report(self, *, kappa: bool = True) -> FactorReport:
        """Returns what was done; may cost an eigenvalue computation the first time.

        Args:
            kappa: False leaves out condition numbers that would have to be computed.
        """

    @abstractmethod
    def logdet(self) -> float:
        """Returns the log-determinant of the matrix in use."""


class Factor(ABC):
    """A positive semi-definite matrix ``M`` of dimension ``dim``.

    Attributes:
        dim: its dimension.
        structure: name of the structure, as recorded.
        label: layer, side and both dimensions, for the log.
        hosted: whether a full device has sent it to the host.
        movable: whether it can go there.
    """

    dim: int
    structure: str
    label: str = ""
    hosted: bool = False
    movable: bool = False

    @property
    def device(self) -> torch.device:
        """Where products with the factor are formed."""
        return next(iter(self.tensors().values())).device

    def move(self, device: torch.device) -> None:
        """Moves what the factor holds; what was derived from it is let go."""
        raise NotImplementedError(f"{self.structure}: stays where it is")

    def to_host(self) -> bool:
        """Goes on on the host; False where it is there already for want of room."""
        if self.hosted or not self.movable:
            return False
        self.move(HOST)
        self.hosted = True
        return True

    @abstractmethod
    def multiply(self, y: Tensor) -> Tensor:
        """Returns ``M y`` for ``y`` of shape ``[dim, m]``, undamped, in the dtype of ``y``."""

    def product(self, y: Tensor) -> Tensor:
        """:meth:`multiply` where the factor is, on the host where the device is full."""
        return on_host_if_full(
            lambda: self.multiply(y.to(self.device)).to(y.device),
            self.to_host,
            f"{self.label}, product",
        )

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
        what = f"{self.label}, spectrum"
        return on_host_if_full(lambda: self._top(k), self.to_host, what).cpu()

    def _top(self, k: int) -> Tensor:
        values, n_zero = self.spectrum()
        values = values.double().sort(descending=True).values[:k]
        missing = min(k - values.numel(), n_zero)
        return torch.cat([values, values.new_zeros(max(0, missing))])

    def nbytes(self) -> int:
        """Returns the bytes that the factor takes."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())


class Movable(Damped):
    """A damped factor whose steps go on on the host where the device is full.

    Attributes:
        factor: the factor.
    """

    factor: Any

    @abstractmethod
    def forget(self) -> None:
        """Lets go of every decomposition."""

    def guarded(self, step: str, work: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
        """Runs ``work`` on ``y`` where the factor is; the result comes back to where ``y`` was."""
        return on_host_if_full(
            lambda: work(y.to(self.factor.device)).to(y.device),
            self._retreat,
            f"{self.factor.label}, {step}",
        )

    def guarded_step(self, step: str, work: Callable[[], T]) -> T:
        """Runs a step that takes and returns no tensor of the caller's."""
        return on_host_if_full(work, self._retreat, f"{self.factor.label}, {step}")

    def _retreat(self) -> bool:
        moved = self.factor.to_host()
        self.forget()
        return moved


def clipped_logdet(clipped: Clipped, n_zero: int) -> float:
    """Log-determinant of a clipped spectrum with ``n_zero`` further eigenvalues at its base."""
    known = float(clipped.used.double().log().sum())
    return (
        known
        + (n_zero * math.log(clipped.base) if n_zero and clipped.base > 0 else 0.0)
        + (-math.inf if n_zero and clipped.base <= 0 else 0.0)
    )


__all__ = ["Damped", "Factor", "FactorReport", "Movable", "clip", "clipped_logdet"]
