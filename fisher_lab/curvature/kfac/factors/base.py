"""What every factor can do, from its dense matrix alone.

A structure is a class of :class:`Factor` with :meth:`Factor.to_dense` and, for files,
:meth:`Factor.restored`. All the rest has a dense default here, which a structure overrides where it
knows a faster way. Formulas: ``docs/math.md``, sections 2 and 3.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor
from typing_extensions import override

from fisher_lab.config.errors import SettingError
from fisher_lab.curvature.collectives import dtype_name
from fisher_lab.curvature.kfac.factors.columns import Columns
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
from fisher_lab.curvature.memory import HOST, on_device

T = TypeVar("T")

LARGE = 1024
"""Side from which a few eigenvalues come cheaper by Lanczos than by a decomposition."""


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


class Reader(Protocol):
    """Reads the tensors of one saved factor, checked against the shapes of its layer."""

    def tensor(self, key: str, *shape: int | None) -> Tensor:
        """Returns a tensor on the model's device; None in ``shape`` stands for any length."""
        ...

    def columns(self, entry: Mapping[str, Any], dim: int) -> tuple[Columns, torch.dtype]:
        """Returns columns, placed as the storage options say, and the core dtype."""
        ...


class Factor(ABC):
    """A positive semi-definite matrix ``M`` of dimension ``dim``.

    Attributes:
        dim: its dimension.
        structure: name of the structure, as recorded.
        structures: every structure, by name.
        discarded: fraction of the trace that a column reduction left out.
        reduction: which reduction that was, or "".
        label: layer, side and both dimensions, for the log.
    """

    structure: ClassVar[str]
    structures: ClassVar[dict[str, type[Factor]]] = {}
    dim: int
    discarded: float = 0.0
    reduction: str = ""
    label: str = ""
    _eigen: tuple[Tensor, Tensor] | None = None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "structure" in vars(cls):
            Factor.structures[cls.structure] = cls

    @abstractmethod
    def to_dense(self) -> Tensor:
        """Returns ``M``, ``[dim, dim]`` in the core dtype; collective where sharded."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Returns tensors and JSON-able values for :meth:`restored`; collective where sharded."""
        return {"matrix": self.to_dense()}, {}

    @classmethod
    @abstractmethod
    def restored(cls, entry: Mapping[str, Any], dim: int, read: Reader) -> Self:
        """Returns a factor of dimension ``dim`` from what :meth:`state` gave."""

    # ---- products and numbers ----------------------------------------------------------------

    @cached_property
    def core(self) -> Tensor:
        """The matrix that is decomposed, undamped, in the core dtype."""
        return self.to_dense()

    def multiply(self, y: Tensor) -> Tensor:
        """Returns ``M y`` for ``y`` of shape ``[dim, m]``, undamped, in the dtype of ``y``."""
        return self.to_dense().to(y) @ y

    def trace(self) -> float:
        """Returns the trace of ``M``."""
        return float(self.to_dense().diagonal().double().sum())

    def eigen(self, *, on_host: bool = False) -> tuple[Tensor, Tensor]:
        """Returns eigenvalues ``[n]`` and eigenvectors ``[n, n]`` of the core, computed once."""
        if self._eigen is None:
            self._eigen = symmetric_eigen(self.core, on_host=on_host)
        return self._eigen

    @property
    def decomposed(self) -> bool:
        """Whether the spectrum is there already."""
        return self._eigen is not None

    def spectrum(self, *, on_host: bool = False) -> tuple[Tensor, int]:
        """Returns the eigenvalues at hand (>= 0, any order) and the number of further zeros."""
        return self.eigen(on_host=on_host)[0], 0

    def basis(self, numerics: Numerics) -> tuple[Tensor, Columns | None]:
        """Returns the eigenvalues ``[r]`` and eigenvectors of ``M`` that EKFAC works in.

        The eigenvectors come as ``r`` columns ``[r, dim]``; None stands for the unit vectors.
        """
        values, vectors = self.eigen(on_host=numerics.on_host)
        return values, Columns(vectors.T, 1.0, vectors.device)

    def damped(self, lam: float, kappa_max: float | None, numerics: Numerics) -> Damped:
        """Returns the damped and clipped form (``docs/math.md``, section 2)."""
        return Damped(self, lam, kappa_max, numerics)

    def plus_diagonal(self, diagonal: Tensor, scale: float = 1.0) -> Factor:
        """Returns ``scale * M + diag(diagonal)``; ``diagonal`` is ``[dim]``, >= 0."""
        matrix = self.to_dense() * scale
        matrix.diagonal().add_(diagonal.to(matrix))
        return DenseFactor(matrix)

    def product(self, y: Tensor) -> Tensor:
        """Returns :meth:`multiply`, in host memory where the device is full."""
        return self.on_device(
            "product", lambda: self.multiply(y.to(self.device)).to(y.device), self.to_host
        )

    def top(self, k: int) -> Tensor:
        """Returns the ``min(k, dim)`` largest eigenvalues, float64, descending."""
        return self.on_device("spectrum", lambda: self._top(k), self.to_host).cpu()

    def _top(self, k: int) -> Tensor:
        if not self.decomposed and len(self.core) >= k * LARGE:
            core = self.core
            return largest_eigenvalues(lambda v: core @ v, core, len(core), k)
        values, n_zero = self.spectrum()
        values = values.double().sort(descending=True).values[:k]
        missing = min(k - values.numel(), n_zero)
        return torch.cat([values, values.new_zeros(max(0, missing))])

    # ---- where it is kept --------------------------------------------------------------------

    @property
    def n_columns(self) -> int:
        """Number of token columns that the factor is kept as."""
        return 0

    @property
    def sharded(self) -> bool:
        """Whether each rank holds a slice of the factor only, so that it works collectively."""
        return False

    @property
    def device(self) -> torch.device:
        """Where products with the factor are formed."""
        return next(iter(self.tensors().values())).device

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors that the factor consists of on this process, without derived ones."""
        return {k: v.data if isinstance(v, Columns) else v for k, v in self._held().items()}

    def _held(self) -> dict[str, Tensor | Columns]:
        return {
            key: value
            for key, value in vars(self).items()
            if isinstance(value, Tensor | Columns) and key != "core"
        }

    def nbytes(self) -> int:
        """Returns the bytes that the factor takes on this process."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def to_host(self) -> None:
        """Moves the factor to host memory; what was derived from it is let go."""
        for key, value in self._held().items():
            setattr(self, key, value.to(HOST))
        self._eigen = None
        vars(self).pop("core", None)

    def on_device(self, operation: str, work: Callable[[], T], to_host: Callable[[], None]) -> T:
        """Does an operation of this side of a layer, in host memory where the device is full.

        ``work`` takes its data to :attr:`device` by itself. ``to_host`` moves the factor, and lets
        go of what was derived from it.
        """
        what = f"{self.label}, {operation}"
        return on_device(lambda _: work(), self.device, what, to_host, collective=self.sharded)


class DenseFactor(Factor):
    """``M`` as a ``matrix`` in the core dtype: A, and G on the eigendecomposition path."""

    structure = "dense"

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.dim = matrix.shape[0]

    @override
    def to_dense(self) -> Tensor:
        return self.matrix

    @classmethod
    @override
    def restored(cls, entry: Mapping[str, Any], dim: int, read: Reader) -> DenseFactor:
        return cls(read.tensor("matrix", dim, dim))


class ColumnFactor(Factor):
    """A factor with a part ``w g^T g`` that is kept as its token columns.

    Attributes:
        columns: ``g``, stored in any dtype and place; perhaps this rank's slice of them.
        weight: ``w``.
        core_dtype: dtype of the core, ``[T, T]``.
    """

    columns: Columns
    weight: float
    core_dtype: torch.dtype

    @property
    @override
    def n_columns(self) -> int:
        return self.columns.shape[0]

    @property
    @override
    def sharded(self) -> bool:
        return self.columns.sharded

    @property
    @override
    def device(self) -> torch.device:
        return self.columns.device  # the columns may be stored in another place

    @override
    def to_dense(self) -> Tensor:
        return self.multiply(torch.eye(self.dim, dtype=self.core_dtype, device=self.device))

    @override
    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        whole = self.columns.whole()
        entry = {
            "weight": self.weight,
            "scale": whole.scale,
            "sharded": self.sharded,
            "core_dtype": dtype_name(self.core_dtype),
        }
        return {"columns": whole.data}, entry


F = TypeVar("F", bound=Factor)


class Damped(Generic[F]):
    """A factor with its damping ``lam`` and clipping in place, ready to be applied.

    The core of the factor is decomposed: by Cholesky factorisation for an inverse where nothing
    can be clipped (exact, and cheaper), by eigendecomposition for everything else. ``kappa_max``
    is the largest condition number; None stands for no floor.
    """

    route = "eigh"

    def __init__(self, factor: F, lam: float, kappa_max: float | None, numerics: Numerics) -> None:
        self.factor, self.lam, self.kappa_max, self.numerics = factor, lam, kappa_max, numerics

    # ---- what is decomposed ------------------------------------------------------------------

    @property
    def core(self) -> Tensor:
        """The matrix that is decomposed, undamped, in the core dtype; collective if sharded."""
        return self.factor.core

    @cached_property
    def cholesky(self) -> Cholesky | None:
        """The factorisation of the damped matrix, or None where it has to be clipped."""
        if self.factor.decomposed or self.lam <= 0 or not self._floor_cannot_bind():
            return None
        return robust_cholesky(
            self.core, self.lam, self.numerics.eps, on_host=self.numerics.on_host
        )

    def _floor_cannot_bind(self) -> bool:
        """Whether the floor lies at or under the damping, so that nothing can be clipped.

        The largest eigenvalue decides: first by a bound that costs nothing, then by Lanczos.
        """
        core, lam, kappa_max = self.core, self.lam, self.kappa_max
        if kappa_max is None or (upper_bound(core) + lam) / kappa_max <= lam:
            return True
        value, residual = largest_eigenvalue(lambda v: core @ v, core, len(core))
        return (value + residual + lam) / kappa_max <= lam

    @cached_property
    def lower(self) -> Tensor | None:
        """The Cholesky factor in the apply dtype."""
        found = self.cholesky
        lower = None if found is None else found.lower
        return None if lower is None else lower.to(self.numerics.apply_dtype)

    def eigen(self) -> tuple[Tensor, Tensor]:
        """Returns eigenvalues and eigenvectors of the core."""
        return self.factor.eigen(on_host=self.numerics.on_host)

    @cached_property
    def clipped(self) -> Clipped:
        """The spectrum in use."""
        values, n_zero = self.factor.spectrum(on_host=self.numerics.on_host)
        return clip(values, n_zero, self.lam, self.kappa_max)

    def pending(self, *, eigen: bool = False) -> bool:
        """Says whether what :meth:`prepare` does is left to do on this process."""
        if self.factor.decomposed:
            return False
        return eigen or vars(self).get("cholesky") is None

    def prepare(self, *, eigen: bool = False) -> None:
        """Does the decomposition that an inverse needs (``eigen``: that EKFAC needs), now."""
        self._on_device("decomposition", lambda: self._prepare(eigen))

    def _prepare(self, eigen: bool) -> None:
        if eigen or self.lower is None:
            _ = self.clipped

    def form_core(self) -> Tensor:
        """Returns the core, in host memory where the device is full; collective if sharded."""
        return self._on_device("matrix", lambda: self.core)

    def decomposition(self) -> tuple[list[float] | None, list[Tensor]]:
        """Returns what :meth:`prepare` found, for :meth:`adopt` on another rank.

        First jitter and eps of the Cholesky factorisation, None where there was none; then what is
        in use: its lower triangle, else the eigenvalues and eigenvectors.
        """
        found: Cholesky | None = vars(self).get("cholesky")
        if found is None:
            return None, [*self.eigen()]
        in_use = [*self.eigen()] if found.lower is None else [found.lower]
        return [found.jitter, found.eps], in_use

    def adopt(self, tried: Sequence[float] | None, in_use: Sequence[Tensor]) -> None:
        """Takes over a decomposition that another rank, or this one, has found."""
        if tried is not None:
            jitter, eps = tried
            self.cholesky = Cholesky(in_use[0] if len(in_use) == 1 else None, jitter, eps)
            vars(self).pop("lower", None)  # made of this rank's own
        if len(in_use) == 2:
            self._take_eigen(*in_use)

    def _take_eigen(self, values: Tensor, vectors: Tensor) -> None:
        self.factor._eigen = values, vectors

    def to_host(self) -> None:
        """Moves the factor to host memory; every decomposition is let go."""
        self.factor.to_host()
        for name in vars(self).keys() - {"factor", "lam", "kappa_max", "numerics"}:
            delattr(self, name)

    def _on_device(self, operation: str, work: Callable[[], T]) -> T:
        return self.factor.on_device(operation, work, self.to_host)

    # ---- applying ----------------------------------------------------------------------------

    def power(self, y: Tensor, p: float) -> Tensor:
        """Returns ``M_used^p y``.

        Args:
            y: ``[dim, m]`` in the apply dtype.
            p: any power; negative ones need a positive damping.

        Raises:
            SettingError: ``p < 0`` without damping, or a power that the structure lacks.
        """
        return self._applied(self._power, y, p)

    def push_through(self, b: Tensor, p: float) -> Tensor:
        """Returns ``M_used^p g^T b``, with ``b`` ``[T, m]``, for a factor kept as columns ``g``.

        Raises:
            SettingError: the structure has no columns, or as :meth:`power`.
        """
        return self._applied(self._push_through, b, p)

    def _applied(self, function: Callable[[Tensor, float], Tensor], y: Tensor, p: float) -> Tensor:
        """Applies a function where the factor is; the result comes back to where ``y`` is."""
        self._check_power(p)
        return self._on_device(
            "application", lambda: function(y.to(self.factor.device), p).to(y.device)
        )

    def _push_through(self, b: Tensor, p: float) -> Tensor:
        raise SettingError(
            f"push-through: the structure {self.factor.structure} keeps no token columns"
        )

    def _check_power(self, p: float) -> None:
        if p < 0 and self.lam <= 0:
            raise SettingError(
                f"damping: {self.lam:g} with power {p:g}; allowed: above 0 for powers < 0"
            )

    def _power(self, y: Tensor, p: float) -> Tensor:
        if p == -1 and self.lower is not None:
            return torch.cholesky_solve(y, self.lower)
        if p == 1 and self.kappa_max is None:
            return self.factor.multiply(y) + self.lam * y
        used, vectors = self.clipped.used.to(y), self.eigen()[1].to(y)
        return vectors @ (used.pow(p)[:, None] * (vectors.T @ y))

    def in_use(self, y: Tensor) -> Tensor:
        """Returns ``M_used y`` for ``y`` of shape ``[dim, m]``, to check an inverse by.

        By the matrix itself where no eigenvalue is raised: its decomposition is not asked.
        """
        return self._on_device(
            "residual", lambda: self._in_use(y.to(self.factor.device)).to(y.device)
        )

    def _in_use(self, y: Tensor) -> Tensor:
        if self.lower is not None or self.clipped.clipped == 0:
            return self.factor.multiply(y) + self.lam * y
        return self._power(y, 1)

    # ---- numbers -----------------------------------------------------------------------------

    def report(self, *, kappa: bool = True) -> FactorReport:
        """Returns what was done, without condition numbers that cost something if not ``kappa``."""
        return self._on_device("report", lambda: self._report(kappa))

    def _report(self, wanted: bool) -> FactorReport:
        found, dim = self.cholesky, self.factor.dim
        if found is None or found.lower is None:
            c = self.clipped
            fallback = "" if found is None else "eigh"
            return FactorReport(
                dim, self.lam, c.clipped, c.kappa_before, c.kappa_after, self.route,
                fallback=fallback,
            )  # fmt: skip
        kappa = self._kappa(found.lower) if wanted else math.nan
        return FactorReport(dim, self.lam, 0, kappa, kappa, "cholesky", found.jitter, found.eps)

    def _kappa(self, lower: Tensor) -> float:
        """Condition number of ``M + lam I`` from its Cholesky factor, both ends by Lanczos."""
        core = self.core
        n = core.shape[0]
        top, _ = largest_eigenvalue(lambda v: core @ v, core, n)
        inverse, _ = largest_eigenvalue(
            lambda v: torch.cholesky_solve(v[:, None], lower)[:, 0], core, n
        )
        # The damping bounds the smallest eigenvalue from below; rounding must not go under it.
        return (top + self.lam) * min(inverse, 1.0 / self.lam)

    def logdet(self) -> float:
        """Returns the log-determinant of the matrix in use."""
        return self._on_device("log-determinant", self._logdet)

    def _logdet(self) -> float:
        found = self.cholesky
        if found is not None and found.lower is not None:
            n_zero = self.factor.dim - len(found.lower)
            if n_zero >= 0:
                # det(w g^T g + lam I) = lam^(dim - T) det(K + lam I).
                known = 2.0 * float(found.lower.diagonal().double().log().sum())
                return known + n_zero * math.log(self.lam)
        clipped, n_zero = self.clipped, self.factor.spectrum()[1]
        known = float(clipped.used.double().log().sum())
        if n_zero == 0:
            return known
        return known + n_zero * math.log(clipped.base) if clipped.base > 0 else -math.inf
