"""Stochastic estimates of traces, norms and diagonals, with standard errors and intervals.

Sources: Hutchinson 1990; Bekas, Kokiopoulou and Saad 2007 (diagonals); Meyer, Musco, Musco and
Woodruff 2021 (Hutch++); Epperly, Tropp and Webber 2024 (XTrace, XDiag).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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
            ``n_probes - 1`` degrees of freedom, times the standard error or what
            :class:`SignSpread` says, whichever is larger, and all of the bracket where there
            is one.
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


class SignSpread:
    """The standard error of a mean of ``z^T M z`` over random signs, from the products ``M z``.

    Of independent signs ``Var(z^T M z) = 2 sum_{j != k} M_jk^2 = 2 sum_k Var(z_k (M z)_k)``. The
    right side is a sum over all elements, which ten probes tell far better than the ten values of
    ``z^T M z`` do, above all where one eigenvalue outweighs the others and the values are skewed.
    """

    def __init__(self, n: int, device: torch.device) -> None:
        self._running = _Running(n, device)

    def add(self, signs: Tensor, product: Tensor) -> None:
        """Takes a probe ``z`` and ``M z``, both ``[n]``."""
        self._running.add(signs * product)

    def error(self) -> float:
        """The standard error, NaN for a single probe."""
        if self._running.count < 2:
            return math.nan
        return math.sqrt(2 * float(self._running.errors().square().sum()))


def estimate(
    values: Sequence[float], products: int, seed: int, known: float = 0.0, spread: float = 0.0
) -> Estimate:
    """Returns the mean of one value a probe, and what is ``known`` without chance.

    ``spread`` is a standard error from :class:`SignSpread`.
    """
    mean, error = (float(x) for x in mean_and_error(torch.tensor(values, dtype=torch.float64)))
    value, half = known + mean, t_quantile(len(values)) * max(error, spread)
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
    spread: float = 0.0,
) -> Estimate:
    """Returns the middle of a bracket, one lower and one upper bound a probe.

    The interval reaches from the lower end of the lower bounds' one to the upper end of the upper
    bounds' one. ``least`` and ``most`` are certain; ``spread`` is as for :func:`estimate`.
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
        low=within(low - t * max(float(low_error), spread)),
        high=within(high + t * max(float(high_error), spread)),
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
    standard error is that of the probes. Of a square, a quarter each does so, and a quarter is for
    the interval.

    Args:
        matvec: the operator ``A``.
        n: its size.
        n_products: products in all, at least 6, of a square 8: a standard error takes two probes.
        seed: of the random vectors.
        dtype: of the vectors; ``n_products / 3`` of them are allocated.
        device: of the vectors.
        squared: takes the trace of ``A^2``, the squared Frobenius norm, instead.

    Raises:
        CurvatureError: fewer products.
    """
    shares = 4 if squared else 3
    _check_products(n_products, 2 * shares)
    generator = torch.Generator().manual_seed(seed)
    third = n_products // shares
    size = min(third, n)

    def signs() -> Tensor:
        return rademacher(n, generator).to(device=device, dtype=dtype)

    basis = torch.linalg.qr(torch.stack([matvec(signs()) for _ in range(size)]).T).Q.T.contiguous()
    known = 0.0
    for row in basis:
        product = matvec(row.clone()).double()
        known += float(product @ (product if squared else row.double()))
    if len(basis) == n:
        return Estimate(known, 0.0, 0, 2 * size, seed, known, known)
    rest, spread = [], SignSpread(n, device)
    for _ in range(third):
        drawn = signs()
        probe = drawn - (basis @ drawn) @ basis
        product = matvec(probe.clone())
        rest.append(float(product.double() @ (product if squared else probe).double()))
        product = matvec(product) if squared else product
        spread.add(drawn, product - (basis @ product) @ basis)
    return estimate(rest, 2 * size + (shares - 2) * third, seed, known, spread.error())


def frobenius_norm(squared: Estimate) -> Estimate:
    """Returns the norm ``|A|_F`` from an estimate of its square; the error is of first order."""
    value, low, high = (max(x, 0.0) ** 0.5 for x in (squared.value, squared.low, squared.high))
    error = squared.standard_error / (2 * value) if value > 0 else 0.0
    return replace(squared, value=value, standard_error=error, low=low, high=high)


class _LeaveOneOut:
    """A random range of a symmetric operator, and what it is without each of its vectors.

    Rows are vectors: ``omega``, ``images = omega A`` and ``q`` ``[m, n]``, orthonormal, with the
    span of ``images``; ``q_images = q A``. All that follows is in coordinates of ``q``, float64.
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
        self.size, self.eps = size, torch.finfo(dtype).eps
        self.omega = torch.empty(size, n, dtype=dtype, device=device)
        for row in self.omega:
            row.copy_(rademacher(n, generator))
        self.images = torch.stack([matvec(row.clone()) for row in self.omega])
        q, r = torch.linalg.qr(self.images.T)
        self.q, self.r = q.T.contiguous(), r.double()
        self.q_images = torch.stack([matvec(row.clone()) for row in self.q])
        self.inner = (self.q @ self.q_images.T).double()
        self.inside = (self.q @ self.omega.T).double()
        self.mixed = (self.q_images @ self.omega.T).double()
        self.whole = (self.omega * self.images).double().sum(1)

    def range(self, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Of the vectors ``keep``, the projector on their images and what each adds to the span.

        Returns:
            ``[m, m]``, and ``[m, len(keep)]``: column ``i`` is the direction that leaves the span
            with vector ``i``, zero if none does.
        """
        turn, lengths, back = torch.linalg.svd(self.r[:, keep], full_matrices=False)
        rank = int((lengths > 10 * self.size * self.eps * lengths.max()).sum())
        out = torch.zeros(self.size, len(keep), dtype=torch.float64, device=self.r.device)
        if rank == len(keep):
            out = (turn / lengths) @ back
            out = out / out.norm(dim=0)
        turn = turn[:, :rank]
        return turn @ turn.T, out

    def trace(self, keep: Tensor) -> float:
        """XTrace of the vectors ``keep``."""
        onto, out = self.range(keep)
        inside = self.inside[:, keep]
        inside = onto @ inside - out * (out * inside).sum(0)
        known = (onto * self.inner).sum() - (out * (self.inner @ out)).sum(0)
        rest = self.whole[keep] - 2 * (inside * self.mixed[:, keep]).sum(0)
        return float((known + rest + (inside * (self.inner @ inside)).sum(0)).mean())

    def diagonal(self, keep: Tensor) -> Tensor:
        """XDiag of the vectors ``keep``, ``[n]``."""
        onto, out = self.range(keep)
        images = self.r[:, keep] - out * (out * self.r[:, keep]).sum(0)
        core = (onto - out @ out.T / len(keep)).to(self.q)
        taken = (images / len(keep)).to(self.q) @ self.omega[keep]
        probed = (self.omega[keep] * self.images[keep]).double().mean(0)
        found = self.q * (core @ self.q_images - taken)
        return found.double().sum(0) + probed

    def replicates(self) -> Iterator[Tensor]:
        """Yields all vectors but one."""
        every = torch.arange(self.size, device=self.r.device)
        for i in range(self.size):
            yield every[every != i]


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

    The standard error is the jackknife's, which leaves out one vector in all (Epperly and Tropp
    2024): the estimates whose mean XTrace is share a range, and their spread is too small.

    Args:
        matvec: the operator.
        n: its size.
        n_products: products in all, at least 6: half of them are with random vectors.
        seed: of the random vectors.
        dtype: of the vectors; ``2 n_products`` of them are allocated.
        device: of the vectors.

    Raises:
        CurvatureError: fewer than 6 products.
    """
    _check_products(n_products, 6)
    size = min(n_products // 2, n)
    span = _LeaveOneOut(matvec, n, size, seed, dtype, device)
    if size == n:
        known = float(span.inner.diagonal().sum())
        return Estimate(known, 0.0, 0, 2 * size, seed, known, known)
    value = span.trace(torch.arange(size, device=device))
    others = torch.tensor([span.trace(keep) for keep in span.replicates()], dtype=torch.float64)
    error = math.sqrt((size - 1) * float(others.var(correction=0)))
    half = t_quantile(size) * error
    return Estimate(value, error, size, 2 * size, seed, value - half, value + half)


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
    return Diagonal(running.mean, running.errors(), n_products, n_products, seed)


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

    Arguments, errors and standard errors are those of :func:`xtrace`.
    """
    _check_products(n_products, 6)
    size = min(n_products // 2, n)
    span = _LeaveOneOut(matvec, n, size, seed, dtype, device)
    if size == n:
        values = (span.q * span.q_images).double().sum(0)
        return Diagonal(values, torch.zeros_like(values), 0, 2 * size, seed)
    running = _Running(n, device)
    for keep in span.replicates():
        running.add(span.diagonal(keep))
    values = span.diagonal(torch.arange(size, device=device))
    return Diagonal(values, (size - 1) * running.errors(), size, 2 * size, seed)


class _Running:
    """Mean and spread of vectors ``[n]`` that come one by one (Welford 1962), in float64."""

    def __init__(self, n: int, device: torch.device) -> None:
        self.count = 0
        self.mean = torch.zeros(n, dtype=torch.float64, device=device)
        self._squares = torch.zeros_like(self.mean)

    def add(self, x: Tensor) -> None:
        """Takes the next one."""
        self.count += 1
        off = x.double() - self.mean
        self.mean += off / self.count
        self._squares += off * (x.double() - self.mean)

    def errors(self) -> Tensor:
        """The standard errors of the mean of two vectors or more."""
        return (self._squares / (self.count - 1) / self.count).sqrt()


def _check_products(n_products: int, least: int) -> None:
    if n_products < least:
        raise CurvatureError(f"n_products: {n_products}; allowed: {least} or more")
