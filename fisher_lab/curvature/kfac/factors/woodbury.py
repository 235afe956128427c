"""A factor kept as its token columns: ``M = w g^T g`` by Woodbury, never ``out x out``.

``g`` is ``[T, out]``, one token gradient a row: the transpose of the ``U`` of ``docs/math.md``,
section 3, without its ``1/sqrt(T)``, which goes in as the weight ``w`` within the core (rounding
``g / sqrt(T)`` to float32 costs 2e-3 at damping 1e-8).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from fisher_lab.curvature.kfac.factors.base import Factor, FactorReport, clipped_logdet
from fisher_lab.curvature.kfac.factors.dense import LARGE, Decomposing, check_power
from fisher_lab.curvature.kfac.numerics import Numerics
from fisher_lab.curvature.linalg import (
    Clipped,
    blocks,
    clip,
    gram,
    largest_eigenvalue,
    largest_eigenvalues,
    power_of_two_scale,
    symmetric_eigen,
)


class Columns:
    """Token columns ``g`` as stored: any dtype, host or device, scaled by a power of two.

    Args:
        data: ``[T, out]`` stored values, ``g / scale`` rounded to their dtype.
        scale: power of two by which they are multiplied on use.
        device: where products are formed; the data are moved there in blocks when elsewhere.
    """

    def __init__(self, data: Tensor, scale: float, device: torch.device) -> None:
        self.data, self.scale, self.device = data, scale, device

    @classmethod
    def store(cls, g: Tensor, dtype: torch.dtype | None, device: torch.device | None) -> Columns:
        """Rounds and places token gradients.

        Args:
            g: ``[T, out]`` as captured, finite.
            dtype: storage dtype; None keeps their own.
            device: storage device; None keeps their own. The host side is pinned where it can be.
        """
        dtype, device = dtype or g.dtype, device or g.device
        up = power_of_two_scale(g, dtype)
        if up == 1.0 and dtype == g.dtype and device == g.device:
            return cls(g, 1.0, g.device)
        pinned = device.type == "cpu" and g.device.type == "cuda"
        data = torch.empty(g.shape, dtype=dtype, device=device, pin_memory=pinned)
        # Moved first, scaled and rounded there: a device that is full has no room for a copy.
        for rows in blocks(g.shape[0], g.shape[1] * g.element_size()):
            part = g[rows].to(device)
            data[rows].copy_(part if up == 1.0 else part * up)
        return cls(data, 1.0 / up, g.device)

    @property
    def shape(self) -> torch.Size:
        """``[T, out]``."""
        return self.data.shape

    def _block(self, columns: slice, dtype: torch.dtype) -> Tensor:
        return self.data[:, columns].to(device=self.device, dtype=dtype, non_blocking=True)

    def _direct(self, dtype: torch.dtype) -> bool:
        return self.data.dtype == dtype and self.data.device == self.device and self.scale == 1.0

    def _blocks(self, dtype: torch.dtype) -> Iterator[slice]:
        size = torch.empty(0, dtype=dtype).element_size()
        return blocks(self.shape[1], self.shape[0] * size)

    def converted(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Yields the columns in ``dtype``, a slice of outputs at a time."""
        for columns in self._blocks(dtype):
            part = self._block(columns, dtype)
            yield columns, part if self.scale == 1.0 else part * self.scale

    def times(self, y: Tensor) -> Tensor:
        """Returns ``g y`` (``[T, m]``) for ``y`` of shape ``[out, m]``, in its dtype."""
        if self._direct(y.dtype):
            return self.data @ y
        result = y.new_zeros(self.shape[0], y.shape[1])
        # The scale goes onto the small side: it is a power of two, so nothing is rounded.
        for columns in self._blocks(y.dtype):
            result.addmm_(self._block(columns, y.dtype), y[columns])
        return result.mul_(self.scale)

    def transposed_times(self, z: Tensor) -> Tensor:
        """Returns ``g^T z`` (``[out, m]``) for ``z`` of shape ``[T, m]``, in its dtype."""
        if self._direct(z.dtype):
            return self.data.T @ z
        result = z.new_empty(self.shape[1], z.shape[1])
        z = z * self.scale
        for columns in self._blocks(z.dtype):
            torch.mm(self._block(columns, z.dtype).T, z, out=result[columns])
        return result

    def gram(self, dtype: torch.dtype) -> Tensor:
        """Returns ``g g^T`` (``[T, T]``) in ``dtype``."""
        if self.data.device == self.device:
            product = gram(self.data, dtype)
            return product if self.scale == 1.0 else product.mul_(self.scale**2)
        result = torch.zeros(self.shape[0], self.shape[0], dtype=dtype, device=self.device)
        for columns in self._blocks(dtype):
            part = self._block(columns, dtype)
            result.addmm_(part, part.T)
        return result.mul_(self.scale**2)

    def weighted_gram(self, weights: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns ``g diag(weights) g^T`` (``[T, T]``) in ``dtype``; ``weights`` is ``[out]``."""
        result = torch.zeros(self.shape[0], self.shape[0], dtype=dtype, device=self.device)
        for columns, part in self.converted(dtype):
            result.addmm_(part * weights[columns], part.T)
        return result

    def whole(self) -> Columns:
        """Returns the columns with all outputs: these are."""
        return self

    def cast(self, dtype: torch.dtype) -> Columns:
        """Returns the columns in another dtype, where they are."""
        return Columns(self.data.to(dtype), self.scale, self.device)

    def squared_norm(self) -> float:
        """Returns the sum of all squares, in float64."""
        total = 0.0
        for rows in blocks(self.shape[0], self.shape[1] * 8):
            total += float(self.data[rows].double().square().sum())
        return total * self.scale**2


class GramFactor(Factor):
    """``M = w g^T g`` from its columns.

    Args:
        columns: the token gradients.
        weight: ``w``, ``1/T`` (``1/(T n)`` for ``n`` draws; larger after subsampling).
        core_dtype: dtype of ``K = w g g^T``.
        discarded: share of the trace that a column reduction left out.
        reduction: which reduction that was, or "".
    """

    structure = "woodbury"
    movable = True

    def __init__(
        self,
        columns: Columns,
        weight: float,
        core_dtype: torch.dtype,
        *,
        discarded: float = 0.0,
        reduction: str = "",
    ) -> None:
        self.columns, self.weight, self.core_dtype = columns, weight, core_dtype
        self.discarded, self.reduction = discarded, reduction
        self.dim = columns.shape[1]
        self._kernel: Tensor | None = None
        self._eigen: tuple[Tensor, Tensor] | None = None

    @property
    def n_columns(self) -> int:
        """Number of columns, ``T`` where nothing was reduced."""
        return self.columns.shape[0]

    @property
    def kernel(self) -> Tensor:
        """``K = w g g^T``, ``[T, T]`` in the core dtype, computed once."""
        if self._kernel is None:
            self._kernel = self.columns.gram(self.core_dtype).mul_(self.weight)
        return self._kernel

    def eigen(self, *, on_host: bool = False) -> tuple[Tensor, Tensor]:
        """Returns ``s`` (``[T]``) and ``Q`` (``[T, T]``) of ``K``, computed once."""
        if self._eigen is None:
            self._eigen = symmetric_eigen(self.kernel, on_host=on_host)
        return self._eigen

    def nonzero(self) -> tuple[Tensor, Tensor]:
        """Returns the nonzero ``s`` and their ``Q``: at most ``min(T, out)``, above rounding."""
        s, q = self.eigen()
        if s.numel() == 0:
            return s, q
        cut = s.numel() * torch.finfo(s.dtype).eps * float(s.max())
        keep = (s > cut).nonzero()[:, 0][-self.dim :]
        return s[keep], q[:, keep]

    def basis(self, numerics: Numerics) -> tuple[Tensor, Tensor]:
        """Returns the nonzero eigenvalues ``[r]`` and eigenvectors ``[out, r]`` of ``M``."""
        s, coefficients = self.coefficients()
        return s, self.columns.transposed_times(coefficients)

    def coefficients(self) -> tuple[Tensor, Tensor]:
        """Returns the nonzero eigenvalues ``[r]``, and ``z`` ``[T, r]``: ``g^T z`` is the basis."""
        s, q = self.nonzero()
        return s, q * (self.weight / s).sqrt()

    def multiply(self, y: Tensor) -> Tensor:
        """See :meth:`Factor.multiply`."""
        return self.columns.transposed_times(self.columns.times(y)).mul_(self.weight)

    def trace(self) -> float:
        """See :meth:`Factor.trace`."""
        return self.weight * self.columns.squared_norm()

    def spectrum(self) -> tuple[Tensor, int]:
        """See :meth:`Factor.spectrum`: ``min(out, T)`` values of ``s``, the rest zeros."""
        values = self.eigen()[0]
        keep = min(self.dim, values.numel())
        # eigh sorts ascending: where T > out, the first T - out are the false zeros of K.
        return values[values.numel() - keep :], self.dim - keep

    def _top(self, k: int) -> Tensor:
        if self._eigen is None and (size := self.kernel.shape[0]) >= k * LARGE:
            return largest_eigenvalues(lambda v: self.kernel @ v, self.kernel, size, k)
        return super()._top(k)

    def damped(self, lam: float, kappa_max: float | None, numerics: Numerics) -> DampedGram:
        """See :meth:`Factor.damped`."""
        return DampedGram(self, lam, kappa_max, numerics)

    def tensors(self) -> dict[str, Tensor]:
        """See :meth:`Factor.tensors`."""
        return {"columns": self.columns.data}

    @property
    def device(self) -> torch.device:
        """See :class:`Factor`: not where the columns are stored, but where they are used."""
        return self.columns.device

    def move(self, device: torch.device) -> None:
        """See :meth:`Factor.move`."""
        self.columns = Columns(self.columns.data.to(device), self.columns.scale, device)
        self._kernel = self._eigen = None

    def to_host(self) -> bool:
        """See :meth:`Factor.to_host`; never where products take several ranks together."""
        return type(self.columns) is Columns and super().to_host()


class DampedGram(Decomposing):
    """A damped and clipped Gram factor (``docs/math.md``, section 3): ``K`` is decomposed."""

    factor: GramFactor

    def __init__(
        self, factor: GramFactor, lam: float, kappa_max: float | None, numerics: Numerics
    ) -> None:
        self.factor, self.lam, self.kappa_max, self.numerics = factor, lam, kappa_max, numerics

    @property
    def core(self) -> Tensor:
        """See :class:`Decomposing`: ``K``."""
        return self.factor.kernel

    @property
    def decomposed(self) -> bool:
        """See :class:`Decomposing`."""
        return self.factor._eigen is not None

    @cached_property
    def clipped(self) -> Clipped:
        """The spectrum in use."""
        self.factor.eigen(on_host=self.numerics.on_host)
        values, n_zero = self.factor.spectrum()
        return clip(values, n_zero, self.lam, self.kappa_max)

    def _power(self, y: Tensor, p: float) -> Tensor:
        """The general formula, for any ``y``."""
        columns, w = self.factor.columns, self.factor.weight
        if p == -1 and self.lower is not None:
            inner = torch.cholesky_solve(columns.times(y), self.lower)
            return (y - columns.transposed_times(inner).mul_(w)).div_(self.lam)
        base = self.clipped.base
        s, q = self.factor.nonzero()
        used = clip_used(s, self.lam, self.kappa_max, self.clipped)
        share = ((used.pow(p) - base**p) / s * w).to(y)
        q = q.to(y)
        inner = q @ (share[:, None] * (q.T @ columns.times(y)))
        return y * base**p + columns.transposed_times(inner)

    def push_through(self, b: Tensor, p: float) -> Tensor:
        """Returns ``M_used^p g^T b``: no cancellation, for the factor's own gradient only.

        Args:
            b: ``[T, m]`` in the apply dtype.
            p: the power.
        """
        check_power(p, self.lam)
        return self.guarded("application", lambda b: self._push_through(b, p), b)

    def _push_through(self, b: Tensor, p: float) -> Tensor:
        if p == -1 and self.lower is not None:
            inner = torch.cholesky_solve(b, self.lower)
        else:
            s, q = self.factor.eigen(on_host=self.numerics.on_host)
            used, q = clip_used(s, self.lam, self.kappa_max, self.clipped).to(b), q.to(b)
            inner = q @ (used.pow(p)[:, None] * (q.T @ b))
        return self.factor.columns.transposed_times(inner)

    def report(self, *, kappa: bool = True) -> FactorReport:
        """See :meth:`Damped.report`."""
        return self.guarded_step("report", lambda: self._report(kappa))

    def _report(self, wanted: bool) -> FactorReport:
        dim, found = self.factor.dim, self.cholesky
        if found is not None and found.lower is not None and not wanted:
            kappa = math.nan
            return FactorReport(dim, self.lam, 0, kappa, kappa, "cholesky", found.jitter, found.eps)
        if found is not None and found.lower is not None and self.factor.n_columns < dim:
            kernel = self.factor.kernel
            top, _ = largest_eigenvalue(lambda v: kernel @ v, kernel, kernel.shape[0])
            kappa = (top + self.lam) / self.lam
            return FactorReport(dim, self.lam, 0, kappa, kappa, "cholesky", found.jitter, found.eps)
        c = self.clipped
        if found is not None and found.lower is not None:
            return FactorReport(
                dim, self.lam, 0, c.kappa_before, c.kappa_before, "cholesky",
                found.jitter, found.eps,
            )  # fmt: skip
        fallback = "" if found is None else "eigh"
        return FactorReport(
            dim, self.lam, c.clipped, c.kappa_before, c.kappa_after, "eigh", fallback=fallback
        )

    def logdet(self) -> float:
        """See :meth:`Damped.logdet`."""
        return self.guarded_step("log-determinant", self._logdet)

    def _logdet(self) -> float:
        found, n_zero = self.cholesky, self.factor.dim - self.factor.n_columns
        if found is not None and found.lower is not None and n_zero >= 0:
            # det(w g^T g + lam I) = lam^(dim - T) det(K + lam I).
            known = 2.0 * float(found.lower.diagonal().double().log().sum())
            return known + n_zero * math.log(self.lam)
        _, n_zero = self.factor.spectrum()
        return clipped_logdet(self.clipped, n_zero)


def clip_used(s: Tensor, lam: float, kappa_max: float | None, clipped: Clipped) -> Tensor:
    """Returns ``max(s + lam, floor)`` with the floor of the whole spectrum."""
    if kappa_max is None:
        return s + lam
    top = float(clipped.used.max()) if clipped.used.numel() else lam
    return (s + lam).clamp(min=top / kappa_max)
