"""Conjugate gradients for ``(A + lam I) x = b``: the exact damped inverse, without a matrix.

It is the answer that an approximate inverse can be compared with, and takes that one as its
preconditioner. Sources: Hestenes and Stiefel 1952; Golub and Ye 1999 (the flexible form, for
preconditioners that are symmetric up to their own rounding only).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fisher_lab.curvature.errors import CurvatureError, NonFiniteError
from fisher_lab.curvature.linalg import MatVec

MAX_RESTARTS = 10
"""How often the residual may turn out, by another product, to be above what the recurrence says."""


@dataclass(frozen=True)
class Solution:
    """What :func:`conjugate_gradients` found.

    Attributes:
        x: the solution, ``[n]``.
        residual: ``|b - (A + lam I) x| / |b|``, of a product of its own; 0 for ``b = 0``.
        converged: whether the residual is at most the tolerance.
        n_products: products with ``A``.
        lam: the damping.
        tol: the tolerance.
        history: the relative residual after every step, as the recurrence has it.
    """

    x: Tensor
    residual: float
    converged: bool
    n_products: int
    lam: float
    tol: float
    history: tuple[float, ...]


def conjugate_gradients(
    matvec: MatVec,
    rhs: Tensor,
    *,
    lam: float,
    tol: float = 1e-10,
    max_products: int = 1000,
    precondition: Callable[[Tensor], Tensor] | None = None,
    dtype: torch.dtype = torch.float64,
) -> Solution:
    """Solves ``(A + lam I) x = b`` for a symmetric positive semi-definite ``A``.

    The residual of the recurrence drifts away from ``b - (A + lam I) x`` by rounding: before the
    method ends, one more product says what it is, and where it is above the tolerance the method
    starts again from where it is. It ends without ``converged`` where that gains nothing.

    Args:
        matvec: product with a vector ``[n]``; it gets ``dtype`` and may answer in another one. An
            operator that computes in float32 reaches a residual of about
            ``6e-8 |A| |x| / |b|`` at best, whatever ``dtype`` is.
        rhs: ``b``, ``[n]``.
        lam: damping, 0 or more.
        tol: of ``|b - (A + lam I) x| / |b|``.
        max_products: gives up after so many products.
        precondition: approximates ``(A + lam I)^-1 v``; any callable on ``[n]``. None: the
            identity.
        dtype: of the vectors; six of them are allocated.

    Raises:
        CurvatureError: an argument is out of range, or ``A + lam I`` or the preconditioner is not
            positive definite.
        NonFiniteError: a product, ``b`` or what the preconditioner returns holds NaN or infinity.
    """
    if not lam >= 0 or not math.isfinite(lam):
        raise CurvatureError(f"lam: {lam}; allowed: a finite number of at least 0")
    if not tol > 0 or max_products < 2:
        raise CurvatureError(
            f"tol, max_products: {tol}, {max_products}; allowed: above 0, 2 or more"
        )
    return _Iteration(matvec, rhs.to(dtype), lam, tol, max_products, precondition).run()


class _Iteration:
    """The state of the iteration; its arguments are those of :func:`conjugate_gradients`."""

    def __init__(
        self,
        matvec: MatVec,
        b: Tensor,
        lam: float,
        tol: float,
        most: int,
        precondition: Callable[[Tensor], Tensor] | None,
    ) -> None:
        self._matvec, self._b, self._lam, self._tol, self._most = matvec, b, lam, tol, most
        self._precondition = precondition
        self._length = float(_finite(b, "rhs").norm())
        self._x, self._products = torch.zeros_like(b), 0
        self._history: list[float] = []

    def run(self) -> Solution:
        residual, error = self._b.clone(), 1.0 if self._length > 0 else 0.0
        for _ in range(MAX_RESTARTS):
            if error <= self._tol or self._products >= self._most:
                break
            self._steps(residual)
            residual = self._b - self._times(self._x)
            before, error = error, float(residual.norm()) / self._length
            if error > 0.5 * before:  # rounding is all that is left of it
                break
        return Solution(
            self._x, error, error <= self._tol, self._products, self._lam, self._tol,
            tuple(self._history),
        )  # fmt: skip

    def _steps(self, r: Tensor) -> None:
        """Steps until the recurrence says that the tolerance is reached; leaves one product."""
        r = r.clone()
        z = self._preconditioned(r)
        p, rho = z.clone(), float(r @ z)
        while self._products < self._most - 1:
            self._positive(rho, "the preconditioner", "<r, M r>")
            q = self._times(p)
            curvature = float(p @ q)
            self._positive(curvature, f"the operator with lam = {self._lam:g}", "<p, (A + lam) p>")
            step = rho / curvature
            self._x += step * p
            before = r
            r = r - step * q
            self._history.append(float(r.norm()) / self._length)
            if self._history[-1] <= self._tol or not math.isfinite(self._history[-1]):
                return
            z = self._preconditioned(r)
            # Flexible: what a symmetric preconditioner would make zero is taken away.
            beta, rho = float(z @ (r - before)) / rho, float(r @ z)
            p = z + beta * p

    def _times(self, v: Tensor) -> Tensor:
        self._products += 1
        product = _finite(self._matvec(v), f"product {self._products}").to(v)
        return product + self._lam * v

    def _preconditioned(self, r: Tensor) -> Tensor:
        if self._precondition is None:
            return r.clone()
        return _finite(self._precondition(r), "the preconditioner's answer").to(r)

    @staticmethod
    def _positive(value: float, what: str, form: str) -> None:
        if not value > 0:
            raise CurvatureError(
                f"conjugate gradients: {what} is not positive definite ({form} = {value:.3g})"
            )


def _finite(x: Tensor, what: str) -> Tensor:
    """The tensor itself.

    Raises:
        NonFiniteError: it holds NaN or infinity.
    """
    if not bool(torch.isfinite(x).all()):
        raise NonFiniteError(f"conjugate gradients: {what} holds NaN or infinity")
    return x
