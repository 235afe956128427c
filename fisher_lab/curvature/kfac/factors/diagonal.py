"""Diagonal factors, and diagonal ones with a low-rank part.

The A of an embedding is ``diag(token counts) / T``; the true-Fisher G of a softmax head is
``Dbar - P P^T`` (``docs/math.md``, section 5); a tied weight whose two uses are pooled has
``diag + U U^T``. Nothing ``dim x dim`` is formed.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from math import inf, nan
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from fisher_lab.config.errors import SettingError
from fisher_lab.curvature.kfac.factors.base import (
    ColumnFactor,
    Damped,
    Factor,
    FactorReport,
    Reader,
)
from fisher_lab.curvature.kfac.factors.columns import Columns
from fisher_lab.curvature.kfac.numerics import Numerics
from fisher_lab.curvature.linalg import (
    Cholesky,
    at_rounding,
    largest_eigenvalue,
    largest_eigenvalues,
    robust_cholesky,
    symmetric_eigen,
)
from fisher_lab.curvature.memory import on_device


class DiagonalFactor(Factor):
    """``M = diag(d)``, with ``d`` ``[dim]`` in the core dtype, >= 0."""

    structure = "diagonal"

    def __init__(self, diagonal: Tensor) -> None:
        self.diagonal = diagonal
        self.dim = diagonal.numel()

    @override
    def to_dense(self) -> Tensor:
        return torch.diag(self.diagonal)

    @override
    def multiply(self, y: Tensor) -> Tensor:
        return self.diagonal.to(y)[:, None] * y

    @override
    def trace(self) -> float:
        return float(self.diagonal.double().sum())

    @property
    @override
    def decomposed(self) -> bool:
        return True

    @override
    def spectrum(self, *, on_host: bool = False) -> tuple[Tensor, int]:
        return self.diagonal, 0

    @override
    def basis(self, numerics: Numerics) -> tuple[Tensor, None]:
        return self.diagonal, None

    @override
    def damped(self, lam: float, kappa_max: float | None, numerics: Numerics) -> DampedDiagonal:
        return DampedDiagonal(self, lam, kappa_max, numerics)

    @override
    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {"diagonal": self.diagonal}, {}

    @classmethod
    @override
    def restored(cls, entry: Mapping[str, Any], dim: int, read: Reader) -> DiagonalFactor:
        return cls(read.tensor("diagonal", dim))


class DampedDiagonal(Damped[DiagonalFactor]):
    """A damped and clipped diagonal factor: there is nothing to decompose."""

    route = "diagonal"

    @override
    def _power(self, y: Tensor, p: float) -> Tensor:
        return self.clipped.used.to(y).pow(p)[:, None] * y


class DiagonalLowRankFactor(ColumnFactor):
    """``M = diag(d) + sign * w P^T P`` with ``P`` of shape ``[N, dim]``.

    With ``sign = -1`` it is the true Fisher of a softmax head, positive semi-definite as long as
    ``d`` comes from the same rows as ``P``; with 1, a pooled factor. No floor can be applied, and
    only the powers -1 and 1 exist; both are recorded (``docs/math.md``, section 5).

    Args:
        diagonal: ``d``, ``[dim]`` in the core dtype.
        columns: the rows ``P``.
        weight: ``w``.
        sign: -1 or 1.
        core_dtype: dtype of the ``N x N`` core.
    """

    structure = "diagonal_low_rank"

    def __init__(
        self, diagonal: Tensor, columns: Columns, weight: float, sign: int, core_dtype: torch.dtype
    ) -> None:
        self.diagonal, self.columns, self.weight = diagonal, columns, weight
        self.sign, self.core_dtype = sign, core_dtype
        self.dim = diagonal.numel()

    @classmethod
    def of_rows(
        cls, columns: Columns, weight: float, core_dtype: torch.dtype, label: str
    ) -> DiagonalLowRankFactor:
        """Returns the true Fisher of a softmax head from its probabilities ``P``.

        ``Dbar`` comes from the stored rows: from others, ``S`` could turn indefinite (section 5).
        """

        def row_sum(device: torch.device) -> tuple[Columns, Tensor]:
            here = columns if device == columns.device else columns.to(device)
            ones = torch.ones(here.shape[0], 1, dtype=core_dtype, device=device)
            return here, here.transposed_times(ones)[:, 0] * weight

        here, diagonal = on_device(
            row_sum, columns.device, f"{label}, diagonal", collective=columns.sharded
        )
        return cls(diagonal, here, weight, -1, core_dtype)

    @override
    def multiply(self, y: Tensor) -> Tensor:
        low = self.columns.transposed_times(self.columns.times(y)).mul_(self.weight * self.sign)
        return low.add_(self.diagonal.to(y)[:, None] * y)

    @override
    def trace(self) -> float:
        low = self.weight * self.columns.squared_norm()
        return float(self.diagonal.double().sum()) + self.sign * low

    @override
    def eigen(self, *, on_host: bool = False) -> tuple[Tensor, Tensor]:
        """Raises an error: it would need a dense matrix."""
        raise SettingError(
            f"eigendecomposition: not at hand for the structure {self.structure}; allowed: top, "
            "trace, products"
        )

    @override
    def _top(self, k: int) -> Tensor:
        return largest_eigenvalues(
            lambda v: self.multiply(v[:, None])[:, 0],
            self.diagonal,
            self.dim,
            k,
            agreed=self.columns.any_rank,  # where products are collective, all ranks stop together
        )

    @override
    def plus_diagonal(self, diagonal: Tensor, scale: float = 1.0) -> Factor:
        total = self.diagonal * scale + diagonal.to(self.diagonal)
        weight = scale * self.weight
        return DiagonalLowRankFactor(total, self.columns, weight, self.sign, self.core_dtype)

    @override
    def damped(
        self, lam: float, kappa_max: float | None, numerics: Numerics
    ) -> DampedDiagonalLowRank:
        return DampedDiagonalLowRank(self, lam, kappa_max, numerics)

    @override
    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, entry = super().state()
        return {"diagonal": self.diagonal, **tensors}, entry | {"sign": self.sign}

    @classmethod
    @override
    def restored(cls, entry: Mapping[str, Any], dim: int, read: Reader) -> DiagonalLowRankFactor:
        columns, core_dtype = read.columns(entry, dim)
        diagonal, weight = read.tensor("diagonal", dim), float(entry["weight"])
        return cls(diagonal, columns, weight, int(entry["sign"]), core_dtype)


class DampedDiagonalLowRank(Damped[DiagonalLowRankFactor]):
    """Damped, not clipped; inverse by Woodbury around the diagonal."""

    @property
    @override
    def core(self) -> Tensor:
        return self._inner

    @cached_property
    def _inner(self) -> Tensor:
        """``S - I = sign w P D^-1 P^T``, ``[N, N]`` in the core dtype."""
        f = self.factor
        inverse = (f.diagonal + self.lam).reciprocal()
        return f.columns.weighted_gram(inverse, f.core_dtype).mul_(f.weight * f.sign)

    @cached_property
    def cholesky(self) -> Cholesky:
        """The factorisation of ``S``."""
        return robust_cholesky(self.core, 1.0, self.numerics.eps, on_host=self.numerics.on_host)

    @cached_property
    def core_eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues, above rounding, and eigenvectors of ``S``: where Cholesky fails."""
        identity = torch.eye(len(self.core), dtype=self.core.dtype, device=self.core.device)
        values, vectors = symmetric_eigen(self.core + identity, on_host=self.numerics.on_host)
        return values.clamp(min=at_rounding(values)), vectors

    @override
    def eigen(self) -> tuple[Tensor, Tensor]:
        return self.core_eigen

    @override
    def _prepare(self, eigen: bool) -> None:
        if self.lower is None:
            self.eigen()

    @override
    def _take_eigen(self, values: Tensor, vectors: Tensor) -> None:
        self.core_eigen = values, vectors

    @override
    def _check_power(self, p: float) -> None:
        super()._check_power(p)
        if p not in (-1, 1):
            structure = self.factor.structure
            raise SettingError(f"power: {p:g} on the structure {structure}; allowed: -1, 1")

    @override
    def _power(self, y: Tensor, p: float) -> Tensor:
        f = self.factor
        if p == 1:
            return f.multiply(y) + self.lam * y
        inverse = (f.diagonal.to(y) + self.lam).reciprocal()[:, None]
        scaled = inverse * y
        inner = f.columns.times(scaled)
        if self.lower is not None:
            inner = torch.cholesky_solve(inner, self.lower)
        else:
            values, vectors = (t.to(y) for t in self.eigen())
            inner = vectors @ ((vectors.T @ inner) / values[:, None])
        low = f.columns.transposed_times(inner).mul_(f.weight * f.sign)
        return scaled - inverse * low

    @override
    def _in_use(self, y: Tensor) -> Tensor:
        return self.factor.multiply(y) + self.lam * y

    @override
    def _report(self, wanted: bool) -> FactorReport:
        """Returns the report; in place of the condition number comes an upper bound of it.

        With ``D = diag(d) + lam I``, no eigenvalue lies above ``max(D)`` or under ``lam`` where
        the low-rank part is taken away. Where it is added, none lies under ``min(D)`` or above
        ``max(D)`` times the largest eigenvalue of ``S``.
        """
        d, found = self.factor.diagonal + self.lam, self.cholesky
        low, top = self.lam, float(d.max())
        if self.factor.sign > 0:
            low, core = float(d.min()), self.core
            value = largest_eigenvalue(lambda v: core @ v, core, len(core))[0] if wanted else nan
            top *= 1.0 + value
        kappa = top / low if low > 0 else inf
        failed = found.lower is None
        return FactorReport(
            self.factor.dim, self.lam, 0, kappa, kappa, "eigh" if failed else "cholesky",
            found.jitter, found.eps, "eigh" if failed else "", self.kappa_max is None,
        )  # fmt: skip

    @override
    def _logdet(self) -> float:
        # log det D + log det S
        outer = float((self.factor.diagonal.double() + self.lam).log().sum())
        if self.cholesky.lower is not None:
            return outer + 2.0 * float(self.cholesky.lower.double().diagonal().log().sum())
        return outer + float(self.eigen()[0].double().log().sum())
