"""A dense symmetric factor: the A side, and the G side on the eigendecomposition path."""

from __future__ import annotations

import math
from abc import abstractmethod
from functools import cached_property

import torch
from torch import Tensor

from fisher_lab.config.errors import SettingError
from fisher_lab.curvature.kfac.factors.base import Factor, FactorReport, Movable, clipped_logdet
from fisher_lab.curvature.kfac.numerics import Numerics
from fisher_lab.curvature.linalg import (
    Cholesky,
    Clipped,
    clip,
    largest_eigenvalue,
    largest_eigenvalues,
    robust_cholesky,
    symmetric_eigen,
    upper_bound,
)

LARGE = 1024
"""Side from which a few eigenvalues come cheaper by Lanczos than by a decomposition."""


class DenseFactor(Factor):
    """``M`` as a matrix.

    Args:
        matrix: ``[dim, dim]`` in the core dtype.
    """

    structure = "dense"
    movable = True

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.dim = matrix.shape[0]
        self._eigen: tuple[Tensor, Tensor] | None = None

    def multiply(self, y: Tensor) -> Tensor:
        """See :meth:`Factor.multiply`."""
        return self.matrix.to(y) @ y

    def trace(self) -> float:
        """See :meth:`Factor.trace`."""
        return float(self.matrix.diagonal().double().sum())

    def eigen(self, *, on_host: bool = False) -> tuple[Tensor, Tensor]:
        """Returns eigenvalues ``[dim]`` and eigenvectors ``[dim, dim]``, computed once."""
        if self._eigen is None:
            self._eigen = symmetric_eigen(self.matrix, on_host=on_host)
        return self._eigen

    def basis(self, numerics: Numerics) -> tuple[Tensor, Tensor]:
        """Returns eigenvalues and eigenvectors: the whole space, nothing is left out."""
        return self.eigen(on_host=numerics.on_host)

    def spectrum(self) -> tuple[Tensor, int]:
        """See :meth:`Factor.spectrum`."""
        return self.eigen()[0], 0

    def _top(self, k: int) -> Tensor:
        if self._eigen is None and self.dim >= k * LARGE:
            return largest_eigenvalues(lambda v: self.matrix @ v, self.matrix, self.dim, k)
        return super()._top(k)

    def damped(self, lam: float, kappa_max: float | None, numerics: Numerics) -> DampedDense:
        """See :meth:`Factor.damped`."""
        return DampedDense(self, lam, kappa_max, numerics)

    def tensors(self) -> dict[str, Tensor]:
        """See :meth:`Factor.tensors`."""
        return {"matrix": self.matrix}

    def move(self, device: torch.device) -> None:
        """See :meth:`Factor.move`."""
        self.matrix, self._eigen = self.matrix.to(device), None


def floor_cannot_bind(matrix: Tensor, lam: float, kappa_max: float | None) -> bool:
    """Says whether the floor lies at or under the damping, so that nothing can be clipped.

    The largest eigenvalue decides: first by a bound that costs nothing, then by Lanczos.
    """
    if kappa_max is None:
        return True
    if (upper_bound(matrix) + lam) / kappa_max <= lam:
        return True
    value, residual = largest_eigenvalue(lambda v: matrix @ v, matrix, matrix.shape[0])
    return (value + residual + lam) / kappa_max <= lam


class Decomposing(Movable):
    """A damped and clipped factor behind a symmetric matrix that is decomposed.

    The inverse goes by Cholesky factorisation where nothing can be clipped (exact, and cheaper),
    everything else by eigendecomposition.
    """

    lam: float
    kappa_max: float | None
    numerics: Numerics

    @property
    @abstractmethod
    def core(self) -> Tensor:
        """The matrix that is decomposed, undamped, in the core dtype."""

    @property
    @abstractmethod
    def decomposed(self) -> bool:
        """Whether the eigendecomposition is there already."""

    @cached_property
    def cholesky(self) -> Cholesky | None:
        """The factorisation of the damped matrix, or None where it has to be clipped."""
        if self.decomposed or self.lam <= 0:
            return None
        if not floor_cannot_bind(self.core, self.lam, self.kappa_max):
            return None
        return robust_cholesky(
            self.core, self.lam, self.numerics.eps, on_host=self.numerics.on_host
        )

    @cached_property
    def lower(self) -> Tensor | None:
        """The Cholesky factor in the apply dtype."""
        found = self.cholesky
        lower = None if found is None else found.lower
        return None if lower is None else lower.to(self.numerics.apply_dtype)

    @cached_property
    @abstractmethod
    def clipped(self) -> Clipped:
        """The spectrum in use."""

    def prepare(self) -> None:
        """Does the decomposition that an inverse needs, now."""
        self.guarded_step("decomposition", self._prepare)

    def _prepare(self) -> None:
        if self.lower is None:
            _ = self.clipped

    def power(self, y: Tensor, p: float) -> Tensor:
        """See :meth:`Damped.power`."""
        check_power(p, self.lam)
        return self.guarded("application", lambda y: self._power(y, p), y)

    @abstractmethod
    def _power(self, y: Tensor, p: float) -> Tensor:
        """The power, where the factor is."""

    def forget(self) -> None:
        """See :meth:`Movable.forget`."""
        for name in ("cholesky", "lower", "clipped"):
            if name in vars(self):
                delattr(self, name)


class DampedDense(Decomposing):
    """A damped and clipped dense factor."""

    factor: DenseFactor

    def __init__(
        self, factor: DenseFactor, lam: float, kappa_max: float | None, numerics: Numerics
    ) -> None:
        self.factor, self.lam, self.kappa_max, self.numerics = factor, lam, kappa_max, numerics
        self._applied: tuple[Tensor, Tensor] | None = None

    @property
    def core(self) -> Tensor:
        """See :class:`Decomposing`: the factor itself."""
        return self.factor.matrix

    @property
    def decomposed(self) -> bool:
        """See :class:`Decomposing`."""
        return self.factor._eigen is not None

    @cached_property
    def clipped(self) -> Clipped:
        """The spectrum in use."""
        values, _ = self.factor.eigen(on_host=self.numerics.on_host)
        return clip(values, 0, self.lam, self.kappa_max)

    def forget(self) -> None:
        """See :meth:`Movable.forget`."""
        super().forget()
        self._applied = None

    def _power(self, y: Tensor, p: float) -> Tensor:
        if p == -1 and self.lower is not None:
            return torch.cholesky_solve(y, self.lower)
        if p == 1 and self.kappa_max is None:
            return self.factor.multiply(y) + self.lam * y
        if self._applied is None:
            vectors = self.factor.eigen(on_host=self.numerics.on_host)[1]
            self._applied = (self.clipped.used.to(y), vectors.to(y))
        used, vectors = self._applied
        return vectors @ (used.pow(p)[:, None] * (vectors.T @ y))

    def report(self, *, kappa: bool = True) -> FactorReport:
        """See :meth:`Damped.report`."""
        return self.guarded_step("report", lambda: self._report(kappa))

    def _report(self, wanted: bool) -> FactorReport:
        found = self.cholesky
        if found is None or found.lower is None:
            c = self.clipped
            fallback = "" if found is None else "eigh"
            return FactorReport(
                self.factor.dim, self.lam, c.clipped, c.kappa_before, c.kappa_after, "eigh",
                fallback=fallback,
            )  # fmt: skip
        kappa = math.nan
        if wanted:
            kappa = _kappa_from_cholesky(self.factor.matrix, found.lower, self.lam)
        return FactorReport(
            self.factor.dim, self.lam, 0, kappa, kappa, "cholesky", found.jitter, found.eps
        )

    def logdet(self) -> float:
        """See :meth:`Damped.logdet`."""
        return self.guarded_step("log-determinant", self._logdet)

    def _logdet(self) -> float:
        found = self.cholesky
        if found is not None and found.lower is not None:
            return 2.0 * float(found.lower.diagonal().double().log().sum())
        return clipped_logdet(self.clipped, 0)


def check_power(p: float, lam: float) -> None:
    """Checks that a power can be taken.

    Raises:
        SettingError: a negative power without damping.
    """
    if p < 0 and lam <= 0:
        raise SettingError(f"damping: {lam:g} with power {p:g}; allowed: above 0 for powers < 0")


def _kappa_from_cholesky(matrix: Tensor, lower: Tensor, lam: float) -> float:
    """Condition number of ``M + lam I`` from its Cholesky factor, both ends by Lanczos."""
    n = matrix.shape[0]
    top, _ = largest_eigenvalue(lambda v: matrix @ v, matrix, n)
    inverse, _ = largest_eigenvalue(
        lambda v: torch.cholesky_solve(v[:, None], lower)[:, 0], matrix, n
    )
    # The damping bounds the smallest eigenvalue from below; rounding must not go under it.
    return (top + lam) * min(inverse, 1.0 / lam)
