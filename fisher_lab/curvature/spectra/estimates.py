"""Stochastic estimates of traces, norms and diagonals, with standard errors and intervals.

Sources: Hutchinson 1990; Bekas, Kokiopoulou and Saad 2007 (diagonals); Meyer, Musco, Musco and
Woodruff 2021 (Hutch++); Epperly, Tropp and Webber 2024 (XTrace, XDiag).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from scipy.special import stdtrit
from torch import Tensor

from fisher_lab.curvature.errors import CurvatureError
from fisher_lab.curvature.linalg import MatVec

CONFIDENCE = 0.95
"""Of every interval."""


@dataclass(frozen=True)
class Estimate:
    """A stochastic estimate.

    Attributes:
        value: the estimate.
        standard_error: of the mean over the probes; 0 where nothing was left to chance.
        n_probes: random vectors; 0 where there was no need of any.
        n_products: operator products.
        seed: of the probes.
        low: lower end of the interval of confidence 0.95: quantiles of Student's t with
            ``n_probes - 1`` degrees of freedom, and all of the bracket where there is one.
        high: its upper end.
        bracket_low: mean over the probes of a lower bound of what Lanczos leaves open; None where
            nothing is left open.
        bracket_high: the same of an upper bound.
    """

    value: float
    standard_error: float
    n_probes: int
    n_products: int
    seed: int
    low: float = math.nan
    high: float = math.nan
    bracket_low: float | None = None
    bracket_high: float | None = None

    def closed(self, tol: float) -> bool:
        """Says whether the ends of the bracket differ by no more than a share of the upper one."""
        if self.bracket_low is None or self.bracket_high is None:
            return True
        return self.bracket_high - self.bracket_low <= tol * self.bracket_high

    def shifted(self, by: float) -> Estimate:
        """Returns the estimate of what is larger by a known number."""
        ends = ("value", "low", "high", "bracket_low", "bracket_high")
        values = {name: getattr(self, name) for name in ends}
        return replace(self, **{k: None if x is None else x + by for k, x in values.items()})


def t_quantile(n: int, confidence: float = CONFIDENCE) -> float:
    """Half the width of a two-sided interval of a mean of ``n``, in standard errors."""
    return float(stdtrit(n - 1, 0.5 + confidence / 2)) if n > 1 else math.nan


def mean_and_error(values: Tensor) -> tuple[Tensor, Tensor]:
    """The mean over the probes (the rows) and its standard error, NaN for a single probe."""
    error = values.std(0) / math.sqrt(len(values)) if len(values) > 1 else values[0] * math.nan
    return values.mean(0), error


def estimate(values: Sequence[float], products: int, seed: int, known: float = 0.0) -> Estimate:
    """Returns the mean of one value a probe, and what is ``known`` without chance."""
    mean, error = (float(x) for x in mean_and_error(torch.tensor(values, dtype=torch.float64)))
    value, half = known + mean, t_quantile(len(values)) * error
    return Estimate(value, error, len(values), products, seed, value - half, value + half)


def rademacher(n: int, generator: torch.Generator) -> Tensor:
    """Returns a vector of signs ``[n]`` in float64, drawn on the host."""
    signs = torch.randint(0, 2, (n,), generator=generator, dtype=torch.int8)
    return signs.double().mul_(2).sub_(1)


def bracketed(
    lower: Sequence[float],
    upper: Sequence[float],
    products: int,
    seed: int,
    *,
    least: float,
    most: float,
) -> Estimate:
    """Returns the middle of a bracket, one lower and one upper bound a probe.

    The interval reaches from the lower end of the lower bounds' one to the upper end of the upper
    bounds' one. ``least`` and ``most`` are certain.
    """
    ends = torch.tensor([lower, upper], dtype=torch.float64)
    (low, high), (low_error, high_error) = mean_and_error(ends.T)
    middle, error = mean_and_error(ends.mean(0))
    t = t_quantile(len(lower))

    def within(x: float | Tensor) -> float:
        return min(max(float(x), least), most)

    return Estimate(
        value=within(middle),
        standard_error=float(error),
        n_probes=len(lower),
        n_products=products,
        seed=seed,
        low=within(low - t * low_error),
        high=within(high + t * high_error),
        bracket_low=within(low),
        bracket_high=within(high),
    )


@dataclass(frozen=True)
class Diagonal:
    """A stochastic estimate of a diagonal.

    Attributes:
        values: ``[n]``, float64.
        standard_errors: ``[n]``, of the mean over the probes.
        n_probes: random vectors.
        n_products: operator products.
        seed: of the probes.
    """

    values: Tensor
    standard_errors: Tensor
    n_probes: int
    n_products: int
    seed: int


def hutch_plus_plus(
    matvec: MatVec,
    n: int,
    *,
    n_products: int,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
    squared: bool = False,
) -> Estimate:
    """Estimates the trace: exactly on a random range of the operator, by probes on the rest.

    A third of the products finds the range, a third evaluates it, a third probes the rest; the
    standard error is that of the probes.

    Args:
        matvec: the operator ``A``.
        n: its size.
        n_products: products in all, at least 6: the standard error takes two probes.
        seed: of the random vectors.
        dtype: of the vectors; ``n_products / 3`` of them are allocated.
        device: of the vectors.
        squared: takes the trace of ``A^2``, the squared Frobenius norm, instead.

    Raises:
        CurvatureError: fewer than 6 products.
    """
    _check_products(n_products, 6)
    generator = torch.Generator().manual_seed(seed)
    third = n_products // 3
    size = min(third, n)

    def signs() -> Tensor:
        return rademacher(n, generator).to(device=device, dtype=dtype)

    def form(v: Tensor) -> float:
        product = matvec(v.clone()).double()
        return float(product @ product if squared else v.double() @ product)

    basis = torch.linalg.qr(torch.stack([matvec(signs()) for _ in range(size)]).T).Q.T.contiguous()
    known = sum(form(row) for row in basis)
    if len(basis) == n:
        return Estimate(known, 0.0, 0, 2 * size, seed, known, known)
    rest = []
    for _ in range(third):
        probe = signs()
        probe -= (basis @ probe) @ basis
        rest.append(form(probe))
    return estimate(rest, 2 * size + third, seed, known)


def frobenius_norm(squared: Estimate) -> Estimate:
    """Returns the norm ``|A|_F`` from an estimate of its square; the error is of first order."""
    value, low, high = (max(x, 0.0) ** 0.5 for x in (squared.value, squared.low, squared.high))
    error = squared.standard_error / (2 * value) if value > 0 else 0.0
    return replace(squared, value=value, standard_error=error, low=low, high=high)


class _LeaveOneOut:
    """A random range of a symmetric operator, and what it is without each of its vectors.

    Rows are vectors: ``omega``, ``images`` ``= omega A`` and ``q`` ``[r, n]``, orthonormal, with
    the span of ``images``; ``q_images`` ``= q A``. Column ``i`` of ``out`` ``[r, m]`` has the
    coordinates of the direction that leaves the span with ``omega_i`` (zero if none does).
    """

    def __init__(
        self,
        matvec: MatVec,
        n: int,
        size: int,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        signs = [rademacher(n, generator).to(device=device, dtype=dtype) for _ in range(size)]
        self.omega = torch.stack(signs)
        self.images = torch.stack([matvec(v.clone()) for v in signs])
        q, r = torch.linalg.qr(self.images.T)
        turn, lengths, _ = torch.linalg.svd(r.double())
        rounding = 10 * size * torch.finfo(dtype).eps * float(lengths.max())
        rank = int((lengths > rounding).sum())
        if rank == size:
            out = torch.linalg.inv(r.double()).T
            self.out, self.q = out / out.norm(dim=0), q.T.contiguous()
        else:  # each vector lies in the span of the others
            self.out = torch.zeros(rank, size, dtype=torch.float64, device=device)
            self.q = turn[:, :rank].T.to(dtype) @ q.T
        self.q_images = torch.stack([matvec(row.clone()) for row in self.q]) if rank else self.q

    def projected(self, coordinates: Tensor) -> Tensor:
        """Coordinates ``[r, m]`` less, in column ``i``, their part along ``out_i``."""
        return coordinates - self.out * (self.out * coordinates).sum(0)


def xtrace(
    matvec: MatVec,
    n: int,
    *,
    n_products: int,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Estimate:
    """Estimates the trace by XTrace: every vector serves both the range and, left out, the rest.

    Args:
        matvec: the operator.
        n: its size.
        n_products: products in all, at least 4: half of them are with random vectors.
        seed: of the random vectors.
        dtype: of the vectors; ``2 n_products`` of them are allocated.
        device: of the vectors.

    Raises:
        CurvatureError: fewer than 4 products.
    """
    _check_products(n_products, 4)
    size = min(n_products // 2, n)
    span = _LeaveOneOut(matvec, n, size, seed, dtype, device)
    inner = (span.q @ span.q_images.T).double()
    known = float(inner.diagonal().sum())
    products = size + len(span.q)
    if len(span.q) == n:
        return Estimate(known, 0.0, 0, products, seed, known, known)
    lost = (span.out * (inner @ span.out)).sum(0)
    inside = span.projected((span.q @ span.omega.T).double())
    mixed = (inside * (span.q_images @ span.omega.T).double()).sum(0)
    whole = (span.omega * span.images).double().sum(1)
    rest = whole - 2 * mixed + (inside * (inner @ inside)).sum(0)
    return estimate((rest - lost).tolist(), products, seed, known)


def hutchinson_diagonal(
    matvec: MatVec,
    n: int,
    *,
    n_products: int,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Diagonal:
    """Estimates the diagonal as the mean of ``z * A z`` over random signs ``z``.

    Arguments and errors are those of :func:`xtrace`, from two products on; no block of vectors is
    allocated.
    """
    _check_products(n_products, 2)
    generator = torch.Generator().manual_seed(seed)
    running = _Running(n, device)
    for _ in range(n_products):
        probe = rademacher(n, generator).to(device=device, dtype=dtype)
        running.add(probe * matvec(probe.clone()))
    return running.result(n_products, seed)


def xdiag(
    matvec: MatVec,
    n: int,
    *,
    n_products: int,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Diagonal:
    """Estimates the diagonal by XDiag: exactly on a random range, by probes on the rest.

    Arguments and errors are those of :func:`xtrace`.
    """
    _check_products(n_products, 4)
    size = min(n_products // 2, n)
    span = _LeaveOneOut(matvec, n, size, seed, dtype, device)
    known = (span.q * span.q_images).double().sum(0)
    inside = span.projected((span.q @ span.images.T).double()).to(dtype)
    running = _Running(n, device)
    for i in range(size):
        out = span.out[:, i].to(dtype)
        rest = span.omega[i] * (span.images[i] - inside[:, i] @ span.q)
        running.add(rest - (out @ span.q) * (out @ span.q_images))
    found = running.result(size + len(span.q), seed)
    return replace(found, values=known + found.values)


class _Running:
    """Mean and spread of vectors ``[n]`` that come one by one (Welford 1962), in float64."""

    def __init__(self, n: int, device: torch.device) -> None:
        self._count = 0
        self._mean = torch.zeros(n, dtype=torch.float64, device=device)
        self._squares = torch.zeros_like(self._mean)

    def add(self, x: Tensor) -> None:
        """Takes the next one."""
        self._count += 1
        off = x.double() - self._mean
        self._mean += off / self._count
        self._squares += off * (x.double() - self._mean)

    def result(self, products: int, seed: int) -> Diagonal:
        """Returns the mean and its standard error, of two vectors or more."""
        error = (self._squares / (self._count - 1) / self._count).sqrt()
        return Diagonal(self._mean, error, self._count, products, seed)


def _check_products(n_products: int, least: int) -> None:
    if n_products < least:
        raise CurvatureError(f"n_products: {n_products}; allowed: {least} or more")
