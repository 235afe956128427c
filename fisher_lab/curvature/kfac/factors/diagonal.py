"""Diagonal factors, and diagonal ones with a low-rank part.

The A of an embedding is ``diag(token counts) / T``; the true-Fisher G of a softmax head is
``Dbar - P P^T`` (``docs/math.md``, section 5); a tied weight whose two uses are pooled has
``diag + U U^T``. Nothing ``dim x dim`` is formed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from fisher_lab.config.errors import SettingError
from fisher_lab.curvature.kfac.factors.base import Factor, FactorReport, Movable, clipped_logdet
from fisher_lab.curvature.kfac.factors.columns import ShardedColumns
from fisher_lab.curvature.kfac.factors.dense import check_power
from fisher_lab.curvature.kfac.factors.woodbury import Columns
from fisher_lab.curvature.kfac.numerics import Numerics
from fisher_lab.curvature.linalg import (
    Cholesky,
    Clipped,
    clip,
    largest_eigenvalues,
    robust_cholesky,
    symmetric_eigen,
)
from fisher_lab.curvature.memory import on_host_if_full


class DiagonalFactor(Factor):
    """``M = diag(d)``.

    Args:
        diagonal: ``[dim]`` in the core dtype, >= 0.
    """

    structure = "diagonal"
    movable = True

    def __init__(self, diagonal: Tensor) -> None:
        self.diagonal = diagonal
        self.dim = diagonal.numel()

    def multiply(self, y: Tensor) -> Tensor:
        """See :meth:`Factor.multiply`."""
        return self.diagonal.to(y)[:, None] * y

    def trace(self) -> float:
        """See :meth:`Factor.trace`."""
        return float(self.diagonal.double().sum())

    def spectrum(self) -> tuple[Tensor, int]:
        """See :meth:`Factor.spectrum`."""
        return self.diagonal, 0

    def damped(self, lam: float, kappa_max: float | None, numerics: Numerics) -> DampedDiagonal:
        """See :meth:`Factor.damped`."""
        return DampedDiagonal(self, lam, kappa_max)

    def tensors(self) -> dict[str, Tensor]:
        """See :meth:`Factor.tensors`."""
        return {"diagonal": self.diagonal}

    def move(self, device: torch.device) -> None:
        """See :meth:`Factor.move`."""
        self.diagonal = self.diagonal.to(device)


class DampedDiagonal(Movable):
    """A damped and clipped diagonal factor."""

    def __init__(self, factor: DiagonalFactor, lam: float, kappa_max: float | None) -> None:
        self.factor, self.lam, self.kappa_max = factor, lam, kappa_max

    def forget(self) -> None:
        """See :meth:`Movable.forget`."""
        vars(self).pop("clipped", None)

    @cached_property
    def clipped(self) -> Clipped:
        """The spectrum in use."""
        return clip(self.factor.diagonal, 0, self.lam, self.kappa_max)

    def prepare(self) -> None:
        """Nothing to decompose."""

    def power(self, y: Tensor, p: float) -> Tensor:
        """See :meth:`Damped.power`."""
        check_power(p, self.lam)
        return self.guarded("application", lambda y: self._power(y, p), y)

    def _power(self, y: Tensor, p: float) -> Tensor:
        return self.clipped.used.to(y).pow(p)[:, None] * y

    def report(self, *, kappa: bool = True) -> FactorReport:
        """See :meth:`Damped.report`."""
        c = self.clipped
        return FactorReport(
            self.factor.dim, self.lam, c.clipped, c.kappa_before, c.kappa_after, "diagonal"
        )

    def logdet(self) -> float:
        """See :meth:`Damped.logdet`."""
        return clipped_logdet(self.clipped, 0)


class DiagonalLowRankFactor(Factor):
    """``M = diag(d) + sign * w P^T P`` with ``P`` of shape ``[N, dim]``.

    With ``sign = -1`` it is the true Fisher of a softmax head, positive semi-definite as long as
    ``d`` comes from the same rows as ``P``. No floor can be applied, and only the powers -1 and
    1 exist; both are recorded (``docs/math.md``, section 5).

    Args:
        diagonal: ``[dim]`` in the core dtype.
        columns: the rows ``P``.
        weight: ``w``.
        sign: -1 or 1.
        core_dtype: dtype of the ``N x N`` core.
    """

    structure = "diagonal_low_rank"
    movable = True

    def __init__(
        self, diagonal: Tensor, columns: Columns, weight: float, sign: int, core_dtype: torch.dtype
    ) -> None:
        self.diagonal, self.columns, self.weight = diagonal, columns, weight
        self.sign, self.core_dtype = sign, core_dtype
        self.dim = diagonal.numel()

    @property
    def n_columns(self) -> int:
        """Number of rows of ``P``."""
        return self.columns.shape[0]

    def multiply(self, y: Tensor) -> Tensor:
        """See :meth:`Factor.multiply`."""
        low = self.columns.transposed_times(self.columns.times(y)).mul_(self.weight * self.sign)
        return low.add_(self.diagonal.to(y)[:, None] * y)

    @classmethod
    def of_rows(
        cls, columns: Columns, weight: float, core_dtype: torch.dtype, label: str
    ) -> DiagonalLowRankFactor:
        """Returns the true Fisher of a softmax head from its probabilities.

        ``Dbar`` comes from the stored rows: from others, ``S`` could turn indefinite (section 5).

        Args:
            columns: the probabilities ``P``.
            weight: ``w``.
            core_dtype: dtype of the core and of the diagonal.
            label: layer, side and both dimensions, for the log.
        """
        nothing = torch.empty(0, dtype=core_dtype, device=columns.device)
        factor = cls(nothing, columns, weight, -1, core_dtype)
        factor.dim, factor.label = columns.shape[1], label
        what = f"{label}, diagonal"
        factor.diagonal = on_host_if_full(factor._row_sum, factor.to_host, what)
        return factor

    def _row_sum(self) -> Tensor:
        ones = torch.ones(self.n_columns, 1, dtype=self.core_dtype, device=self.device)
        return self.columns.transposed_times(ones)[:, 0] * self.weight

    def trace(self) -> float:
        """See :meth:`Factor.trace`."""
        low = self.weight * self.columns.squared_norm()
        return float(self.diagonal.double().sum()) + self.sign * low

    def spectrum(self) -> tuple[Tensor, int]:
        """See :meth:`Factor.spectrum`; :meth:`top` goes by Lanczos.

        Raises:
            SettingError: the spectrum of this structure is not at hand.
        """
        raise SettingError(
            f"spectrum: not at hand for the structure {self.structure}; allowed: top, trace, "
            "products"
        )

    def _top(self, k: int) -> Tensor:
        columns = self.columns
        agreed: Callable[[bool], bool] = bool
        if isinstance(columns, ShardedColumns):  # the products are collective: all stop together
            agreed = columns.agreed
        return largest_eigenvalues(
            lambda v: self.multiply(v[:, None])[:, 0], self.diagonal, self.dim, k, agreed=agreed
        )

    def damped(
        self, lam: float, kappa_max: float | None, numerics: Numerics
    ) -> DampedDiagonalLowRank:
        """See :meth:`Factor.damped`."""
        return DampedDiagonalLowRank(self, lam, kappa_max, numerics)

    def tensors(self) -> dict[str, Tensor]:
        """See :meth:`Factor.tensors`."""
        return {"diagonal": self.diagonal, "columns": self.columns.data}

    @property
    def device(self) -> torch.device:
        """See :class:`Factor`: not where the columns are stored, but where they are used."""
        return self.columns.device

    def move(self, device: torch.device) -> None:
        """See :meth:`Factor.move`."""
        self.diagonal = self.diagonal.to(device)
        self.columns = Columns(self.columns.data.to(device), self.columns.scale, device)

    def to_host(self) -> bool:
        """See :meth:`Factor.to_host`; never where products take several ranks together."""
        return type(self.columns) is Columns and super().to_host()


class DampedDiagonalLowRank(Movable):
    """Damped, not clipped; inverse by Woodbury around the diagonal."""

    def __init__(
        self,
        factor: DiagonalLowRankFactor,
        lam: float,
        kappa_max: float | None,
        numerics: Numerics,
    ) -> None:
        self.factor, self.lam, self.kappa_max, self.numerics = factor, lam, kappa_max, numerics

    def forget(self) -> None:
        """See :meth:`Movable.forget`."""
        for name in ("core", "cholesky", "eigen"):
            vars(self).pop(name, None)

    @cached_property
    def core(self) -> Tensor:
        """``S - I = sign w P D^-1 P^T``, ``[N, N]`` in the core dtype."""
        f = self.factor
        inverse = (f.diagonal + self.lam).reciprocal()
        return f.columns.weighted_gram(inverse, f.core_dtype).mul_(f.weight * f.sign)

    @cached_property
    def cholesky(self) -> Cholesky:
        """The factorisation of ``S``."""
        return robust_cholesky(self.core, 1.0, self.numerics.eps, on_host=self.numerics.on_host)

    @cached_property
    def eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues, above rounding, and eigenvectors of ``S``: where Cholesky fails."""
        identity = torch.eye(len(self.core), dtype=self.core.dtype, device=self.core.device)
        values, vectors = symmetric_eigen(self.core + identity, on_host=self.numerics.on_host)
        least = len(values) * torch.finfo(values.dtype).eps * float(values.max())
        return values.clamp(min=least), vectors

    def prepare(self) -> None:
        """Factorises the core, now."""
        self.guarded_step("decomposition", self._prepare)

    def _prepare(self) -> None:
        if self.cholesky.lower is None:
            _ = self.eigen

    def _solve(self, y: Tensor) -> Tensor:
        """Returns ``S^-1 y``."""
        if self.cholesky.lower is not None:
            return torch.cholesky_solve(y, self.cholesky.lower.to(y))
        values, vectors = (t.to(y) for t in self.eigen)
        return vectors @ ((vectors.T @ y) / values[:, None])

    def power(self, y: Tensor, p: float) -> Tensor:
        """See :meth:`Damped.power`.

        Raises:
            SettingError: a power other than -1 and 1.
        """
        check_power(p, self.lam)
        if p not in (-1, 1):
            structure = self.factor.structure
            raise SettingError(f"power: {p:g} on the structure {structure}; allowed: -1, 1")
        return self.guarded("application", lambda y: self._power(y, p), y)

    def _power(self, y: Tensor, p: float) -> Tensor:
        f = self.factor
        if p == 1:
            return f.multiply(y) + self.lam * y
        inverse = (f.diagonal.to(y) + self.lam).reciprocal()[:, None]
        scaled = inverse * y
        inner = self._solve(f.columns.times(scaled))
        low = f.columns.transposed_times(inner).mul_(f.weight * f.sign)
        return scaled - inverse * low

    def report(self, *, kappa: bool = True) -> FactorReport:
        """See :meth:`Damped.report`; the condition number is bounded by the diagonal's."""
        return self.guarded_step("report", self._report)

    def _report(self) -> FactorReport:
        d = self.factor.diagonal + self.lam
        low = self.lam if self.factor.sign < 0 else float(d.min())
        kappa = float(d.max()) / low if low > 0 else float("inf")
        found = self.cholesky
        failed = found.lower is None
        return FactorReport(
            self.factor.dim, self.lam, 0, kappa, kappa, "eigh" if failed else "cholesky",
            found.jitter, found.eps, "eigh" if failed else "", self.kappa_max is None,
        )  # fmt: skip

    def logdet(self) -> float:
        """See :meth:`Damped.logdet`: ``log det D + log det S``."""
        return self.guarded_step("log-determinant", self._logdet)

    def _logdet(self) -> float:
        outer = float((self.factor.diagonal.double() + self.lam).log().sum())
        if self.cholesky.lower is not None:
            return outer + 2.0 * float(self.cholesky.lower.double().diagonal().log().sum())
        return outer + float(self.eigen[0].double().log().sum())
