"""A factor kept as its token columns: ``M = w g^T g`` by Woodbury, never ``out x out``.

``g`` is ``[T, out]``, one token gradient per row: the transpose of the ``U`` of ``docs/math.md``,
section 3, without its ``1/sqrt(T)``, which goes in as the weight ``w`` within the core (rounding
``g / sqrt(T)`` to float32 costs 2e-3 at damping 1e-8).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from fisher_lab.curvature.kfac.factors.base import ColumnFactor, Damped, Factor, Reader
from fisher_lab.curvature.kfac.factors.columns import Columns
from fisher_lab.curvature.kfac.factors.diagonal import DiagonalLowRankFactor
from fisher_lab.curvature.kfac.numerics import Numerics
from fisher_lab.curvature.linalg import Clipped, at_rounding, largest_eigenvalue, upper_bound


class WoodburyFactor(ColumnFactor):
    """``M = w g^T g`` from its columns; its core is ``K = w g g^T``, ``[T, T]``.

    The weight is ``1/T`` (``1/(T n)`` for ``n`` draws; larger after subsampling).
    """

    structure = "woodbury"

    def __init__(self, columns: Columns, weight: float, core_dtype: torch.dtype) -> None:
        self.columns, self.weight, self.core_dtype = columns, weight, core_dtype
        self.dim = columns.shape[1]

    @cached_property
    def core(self) -> Tensor:
        """``K = w g g^T``, ``[T, T]`` in the core dtype."""
        return self.columns.gram(self.core_dtype).mul_(self.weight)

    @override
    def multiply(self, y: Tensor) -> Tensor:
        return self.columns.transposed_times(self.columns.times(y)).mul_(self.weight)

    @override
    def trace(self) -> float:
        return self.weight * self.columns.squared_norm()

    @override
    def spectrum(self, *, on_host: bool = False) -> tuple[Tensor, int]:
        """Returns ``min(out, T)`` eigenvalues of ``K``; the rest are zeros."""
        values = self.eigen(on_host=on_host)[0]
        keep = min(self.dim, values.numel())
        # eigh sorts ascending: where T > out, the first T - out are the false zeros of K.
        return values[values.numel() - keep :], self.dim - keep

    def nonzero(self) -> tuple[Tensor, Tensor]:
        """Returns the nonzero ``s`` and their ``Q``: at most ``min(T, out)``, above rounding."""
        s, q = self.eigen()
        if s.numel() == 0:
            return s, q
        keep = (s > at_rounding(s)).nonzero()[:, 0][-self.dim :]
        return s[keep], q[:, keep]

    @override
    def basis(self, numerics: Numerics) -> tuple[Tensor, Columns]:
        """Returns the nonzero eigenvalues and their eigenvectors ``g^T Q (w / s)^(1/2)``."""
        s, q = self.nonzero()
        return s, self.columns.combined(q * (self.weight / s).sqrt())

    @override
    def plus_diagonal(self, diagonal: Tensor, scale: float = 1.0) -> Factor:
        weight = scale * self.weight
        return DiagonalLowRankFactor(diagonal, self.columns, weight, 1, self.core_dtype)

    @override
    def damped(self, lam: float, kappa_max: float | None, numerics: Numerics) -> DampedWoodbury:
        return DampedWoodbury(self, lam, kappa_max, numerics)

    @override
    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, entry = super().state()
        return tensors, entry | {"discarded": self.discarded, "reduction": self.reduction}

    @classmethod
    @override
    def restored(cls, entry: Mapping[str, Any], dim: int, read: Reader) -> WoodburyFactor:
        columns, core_dtype = read.columns(entry, dim)
        factor = cls(columns, float(entry["weight"]), core_dtype)
        factor.discarded, factor.reduction = float(entry["discarded"]), entry["reduction"]
        return factor


def lossless_columns(values: Tensor, vectors: Tensor) -> Tensor:
    """Returns columns ``[r, n]`` with ``g^T g`` the matrix of an eigendecomposition.

    Eigenvalues at rounding are left out.
    """
    keep = values > at_rounding(values)
    return (vectors[:, keep] * values[keep].sqrt()).T.contiguous()


CANCELLED = 1e6
"""Beyond this ratio of the largest eigenvalue to the damping, columns that may span all outputs are
not factorised by Cholesky: its form takes ``y / lam`` away again, and as many digits with it."""


class DampedWoodbury(Damped[WoodburyFactor]):
    """A damped and clipped Woodbury factor (``docs/math.md``, section 3): ``K`` is decomposed."""

    @override
    def _floor_cannot_bind(self) -> bool:
        if not super()._floor_cannot_bind():
            return False
        if self.factor.n_columns < self.factor.dim:
            return True
        core, most = self.core, CANCELLED * self.lam
        if upper_bound(core) <= most:
            return True
        return largest_eigenvalue(lambda v: core @ v, core, len(core))[0] <= most

    @override
    def _power(self, y: Tensor, p: float) -> Tensor:
        """The general formula, for any ``y``."""
        columns, w = self.factor.columns, self.factor.weight
        if p == -1 and self.lower is not None:
            inner = torch.cholesky_solve(columns.times(y), self.lower)
            return (y - columns.transposed_times(inner).mul_(w)).div_(self.lam)
        s, q = self.factor.nonzero()
        used = clip_used(s, self.lam, self.kappa_max, self.clipped)
        # Where the columns span all outputs, nothing has the base: adding it to take it away again
        # would cost its digits.
        base = 0.0 if len(s) == self.factor.dim else self.clipped.base**p
        weights = ((used.pow(p) - base) / s * w).to(y)
        q = q.to(y)
        low = columns.transposed_times(q @ (weights[:, None] * (q.T @ columns.times(y))))
        return low if base == 0.0 else y * base + low

    @override
    def _push_through(self, b: Tensor, p: float) -> Tensor:
        """``M_used^p g^T b`` without cancellation, for the factor's own gradient only."""
        if p == -1 and self.lower is not None:
            inner = torch.cholesky_solve(b, self.lower)
        else:
            s, q = self.eigen()
            used, q = clip_used(s, self.lam, self.kappa_max, self.clipped).to(b), q.to(b)
            inner = q @ (used.pow(p)[:, None] * (q.T @ b))
        return self.factor.columns.transposed_times(inner)

    @override
    def _kappa(self, lower: Tensor) -> float:
        if self.factor.n_columns >= self.factor.dim:
            return self.clipped.kappa_before
        core = self.core
        top, _ = largest_eigenvalue(lambda v: core @ v, core, core.shape[0])
        return (top + self.lam) / self.lam


def clip_used(s: Tensor, lam: float, kappa_max: float | None, clipped: Clipped) -> Tensor:
    """Returns ``max(s + lam, floor)`` with the floor of the whole spectrum."""
    if kappa_max is None:
        return s + lam
    top = float(clipped.used.max()) if clipped.used.numel() else lam
    return (s + lam).clamp(min=top / kappa_max)
