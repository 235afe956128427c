"""Stochastic Lanczos quadrature: ``tr f(A)``, with what chance and the rule leave open.

Sources: Ubaru, Chen and Saad 2017 (quadrature); Golub and Meurant 2010, chapters 6 and 7 (bounds by
Gauss and Gauss-Radau rules); Ghorbani et al. 2019 and Papyan 2019 (spectral densities of networks).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fisher_lab.curvature.errors import CurvatureError
from fisher_lab.curvature.linalg import KrylovBasis, MatVec
from fisher_lab.curvature.spectra.estimates import (
    Estimate,
    SignSpread,
    bracketed,
    estimate,
    mean_and_error,
    rademacher,
    t_quantile,
)

Function = Callable[[Tensor], Tensor]

CHECK_EVERY = 5
"""Steps between two looks at a bracket that is to close."""


class ProductsExceeded(CurvatureError):
    """The probes will take more products than they may."""


@dataclass(frozen=True)
class Rule:
    """A quadrature rule of one probe: nodes ``[m]`` and weights ``[m]``, float64, on the host."""

    nodes: Tensor
    weights: Tensor

    def of(self, function: Function) -> float:
        """Returns the weighted sum of a function at the nodes."""
        return float((self.weights * function(self.nodes)).sum())

    def scaled(self, factor: float) -> Rule:
        """Returns the rule with its weights times a factor."""
        return Rule(self.nodes, self.weights * factor)

    def joined(self, nodes: Tensor, weight: float) -> Rule:
        """Returns the rule with further nodes ``[l]``, all of one weight, before its own."""
        weights = torch.full_like(nodes, weight)
        return Rule(torch.cat([nodes, self.nodes]), torch.cat([weights, self.weights]))


NOTHING = Rule(torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
"""The rule of a probe of which deflation leaves nothing."""


@dataclass(frozen=True)
class Quadrature:
    """The rules of all probes; the weights of each sum to one.

    Attributes:
        gauss: a Gauss rule a probe.
        radau: a Gauss-Radau rule a probe, with a node at zero.
        n: size of the operator.
        n_products: operator products.
        seed: of the probes.
        steps: Lanczos steps of each probe.
        noise: how far the products are from a symmetric matrix, as the Krylov spaces show it.
        exact: whether the nodes are the eigenvalues; then nothing is left to chance.
        known: eigenvalues that were added by :meth:`with_known`.
        space: of the probes, ``parameters`` or ``samples``.
        trace_error: standard error of the trace, from :class:`~.estimates.SignSpread`.
        closing_error: the same of the function whose bracket was to close.
    """

    gauss: tuple[Rule, ...]
    radau: tuple[Rule, ...]
    n: int
    n_products: int
    seed: int
    steps: tuple[int, ...] = ()
    noise: float = 0.0
    exact: bool = False
    known: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    space: str = "parameters"
    trace_error: float = 0.0
    closing_error: float = 0.0

    @property
    def largest(self) -> float:
        """The largest magnitude of a node."""
        return max(float(rule.nodes.abs().max()) for rule in self.gauss)

    def about(self) -> dict[str, Any]:
        """Returns where the probes were drawn and how far they went, for the record."""
        return {"space": self.space, "steps": max(self.steps, default=0), "exact": self.exact}

    def trace(self) -> Estimate:
        """Estimates the trace."""
        return self.trace_of(lambda x: x, self.trace_error)

    def trace_of(self, function: Function, spread: float = 0.0) -> Estimate:
        """Estimates ``tr f(A)`` by the Gauss rules; ``spread`` is as for :func:`estimate`."""
        values = [self.n * rule.of(function) for rule in self.gauss]
        if self.exact:
            return Estimate(values[0], 0.0, 0, self.n_products, self.seed, values[0], values[0])
        return estimate(values, self.n_products, self.seed, spread=spread)

    def bracket_of(self, function: Function, *, floor: float, limit: float = math.inf) -> Estimate:
        """Estimates ``tr f(A)`` of a positive semi-definite ``A`` from above and from below.

        Every even derivative of ``f`` must be negative or zero and every odd one positive or zero,
        and ``f(0) = 0`` (``x / (x + lam)``, ``log(1 + x / lam)``): a Gauss rule then lies above the
        integral and a Gauss-Radau rule with a node at zero below it. It is the function that the
        brackets were to close for, if for any.

        Args:
            function: ``f``, for nodes of at least zero.
            floor: nodes up to it cannot be told from zero: they count in the upper bound alone.
            limit: of the true value, from above.
        """
        upper = [self.n * rule.of(lambda x: function(x.clamp(min=0.0))) for rule in self.gauss]
        lower = [
            self.n * rule.of(lambda x: torch.where(x > floor, function(x.clamp(min=0.0)), 0.0))
            for rule in self.radau
        ]
        least = float(function(self.known).sum())
        if self.exact:
            value = min(upper[0], limit)
            return Estimate(value, 0.0, 0, self.n_products, self.seed, value, value)
        spread = self.closing_error
        return bracketed(
            lower, upper, self.n_products, self.seed, least=least, most=limit, spread=spread
        )

    def with_known(self, values: Tensor) -> Quadrature:
        """Adds known eigenvalues ``[l]``, each with weight ``1/n``, to every probe.

        For probes that were deflated by their eigenvectors: what is known then carries no variance
        (what Hutch++ does for the trace, for any function and for the density).
        """
        known = values.double().cpu()
        return replace(
            self,
            gauss=tuple(rule.joined(known, 1.0 / self.n) for rule in self.gauss),
            radau=tuple(rule.joined(known, 1.0 / self.n) for rule in self.radau),
            known=torch.cat([known, self.known]),
        )

    def with_zeros(self, n: int) -> Quadrature:
        """From the matrix of the samples to that of ``n`` parameters: adds the zeros it lacks."""
        zero, share = torch.zeros(1, dtype=torch.float64), self.n / n

        def grown(rules: Sequence[Rule]) -> tuple[Rule, ...]:
            return tuple(rule.scaled(share).joined(zero, 1.0 - share) for rule in rules)

        return replace(self, gauss=grown(self.gauss), radau=grown(self.radau), n=n, space="samples")


@dataclass(frozen=True)
class Probing:
    """How much work the probes make.

    Attributes:
        n_probes: random vectors.
        steps: Lanczos steps a probe, at least.
        max_steps: Lanczos steps a probe while a bracket is open; None: a default of the space.
        tol: of the bracket.
        most: basis vectors that are allocated; filled in by :meth:`within`.
    """

    n_probes: int
    steps: int
    max_steps: int | None = None
    tol: float = 0.01
    most: int = 0

    def within(self, n: int, default: int, function: Function | None) -> Probing:
        """Returns the work in a space of ``n`` dimensions, with a bracket where there is an ``f``.

        Raises:
            CurvatureError: fewer than one probe or step.
        """
        if self.n_probes < 1 or self.steps < 1:
            raise CurvatureError(
                f"n_probes, steps: {self.n_probes}, {self.steps}; allowed: 1 or more"
            )
        steps = min(self.steps, n)
        more = default if self.max_steps is None else self.max_steps
        most = steps if function is None else max(steps, min(more, n))
        return replace(self, steps=steps, most=most)


@dataclass(frozen=True)
class Closing:
    """When a probe has made enough steps: the bracket of its ``f`` is closed.

    Attributes:
        function: as for :meth:`Quadrature.bracket_of`.
        tol: of upper less lower bound, relative to the upper one with what is known.
        known: the sum of the function over the known eigenvalues.
    """

    function: Function
    tol: float
    known: float

    @classmethod
    def of(cls, function: Function | None, known: Tensor, tol: float) -> Closing | None:
        """Returns what closes the bracket of a function, beside known eigenvalues."""
        return (
            None if function is None else cls(function, tol, float(function(known.double()).sum()))
        )

    def reached(self, upper: Rule, lower: Rule, n: int) -> bool:
        """Says whether two rules are close enough, for an operator of size ``n``."""
        high, low = (
            n * rule.of(lambda x: self.function(x.clamp(min=0.0))) for rule in (upper, lower)
        )
        return high - low <= self.tol * (self.known + high)


def quadrature(
    matvec: MatVec,
    n: int,
    probing: Probing,
    *,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
    deflate: Tensor | None = None,
    normalized: bool = False,
    closing: Closing | None = None,
    max_products: int | None = None,
) -> Quadrature:
    """Runs Lanczos from random signs.

    Args:
        matvec: the operator.
        n: its size.
        probing: how many probes and steps; ``most * n`` numbers are allocated.
        seed: of the probes.
        dtype: of the vectors.
        device: of the vectors.
        deflate: ``[l, n]`` orthonormal rows, removed from every probe; its weights then sum to its
            remaining squared length over ``n``.
        normalized: gives every deflated probe the mean of its squared length, ``n - l``: functions
            that hardly vary then have hardly any variance. The bias is of order ``l / n^2``.
        closing: adds steps until the bracket is closed.
        max_products: gives up where a probe shows that all of them will take more.

    Raises:
        CurvatureError: fewer than one probe or step.
        ProductsExceeded: more than ``max_products``.
    """
    if probing.most == 0:
        probing = probing.within(n, probing.steps, None if closing is None else closing.function)
    generator = torch.Generator().manual_seed(seed)
    products, noise = 0, 0.0
    gauss, radau, made = list[Rule](), list[Rule](), list[int]()
    spreads = [SignSpread(n, device) for _ in range(1 if closing is None else 2)]
    for _ in range(probing.n_probes):
        signs = rademacher(n, generator).to(device=device, dtype=dtype)
        probe = signs if deflate is None else signs - (deflate @ signs) @ deflate
        share = float(probe.double().square().sum()) / n
        if share <= 1e-12:
            gauss, radau, made = [*gauss, NOTHING], [*radau, NOTHING], [*made, 0]
            continue
        basis = KrylovBasis(
            matvec, n, probing.most, dtype=dtype, device=device, generator=generator
        )
        basis.start(probe)
        weight = 1.0 - (0 if deflate is None else len(deflate)) / n if normalized else share
        upper, lower = _probed(basis, weight, n, probing.steps, closing)
        _watch(spreads, basis, signs, (share * n) ** 0.5, closing, normalized)
        gauss, radau, made = [*gauss, upper], [*radau, lower], [*made, basis.size]
        products, noise = products + basis.n_products, max(noise, basis.noise())
        if max_products is not None and probing.n_probes * basis.size > max_products:
            raise ProductsExceeded(f"quadrature: more than {max_products} products")
    errors = [spread.error() for spread in spreads]
    return Quadrature(
        tuple(gauss), tuple(radau), n, products, seed, tuple(made), noise,
        trace_error=errors[0], closing_error=errors[-1],
    )  # fmt: skip


def _probed(
    basis: KrylovBasis, share: float, n: int, steps: int, closing: Closing | None
) -> tuple[Rule, Rule]:
    """Grows a basis for as long as it is to; returns the Gauss and the Gauss-Radau rule."""
    while True:
        basis.grow()
        ended = basis.beta == 0.0 or basis.size == len(basis.vectors)
        looks = basis.size >= steps and (basis.size - steps) % CHECK_EVERY == 0
        if not ended and not looks:
            continue
        values, coordinates = basis.ritz()
        upper = Rule(values, coordinates[0].square() * share)
        lower = gauss_radau(values, coordinates, basis.beta).scaled(share)
        if ended or closing is None or closing.reached(upper, lower, n):
            return upper, lower


def _watch(
    spreads: Sequence[SignSpread],
    basis: KrylovBasis,
    signs: Tensor,
    length: float,
    closing: Closing | None,
    normalized: bool,
) -> None:
    """Shows a probe to the spread of the trace, and to that of the function to close for."""
    mean = float(basis.projected[0, 0]) if normalized else 0.0
    spreads[0].add(signs, length * (basis.first_product() - mean * basis.vectors[0]))
    if closing is not None:
        spreads[1].add(signs, length * _applied(basis, closing.function, normalized))


def _applied(basis: KrylovBasis, function: Function, normalized: bool) -> Tensor:
    """``f(A) v`` of the vector of length one that a basis began with, ``[n]``.

    Normalised, less its part along ``v``: the integral over a probe of a given length does not
    change with it.
    """
    values, coordinates = basis.ritz()
    found = function(values)
    if normalized:
        found = found - (coordinates[0].square() * found).sum()
    turned = coordinates @ (found * coordinates[0])
    return turned.to(basis.vectors) @ basis.vectors[: basis.size]


def gauss_radau(values: Tensor, coordinates: Tensor, beta: float) -> Rule:
    """Returns the Gauss-Radau rule with a node at zero, of a positive semi-definite operator.

    The tridiagonal matrix ``T`` gets one more row, ``[beta e_m^T, beta^2 (T^-1)_mm]`` (Golub 1973),
    here in the basis of its eigenvectors.

    Args:
        values: Ritz values ``[m]``, ascending; those below zero are rounding.
        coordinates: ``[m, m]``, one pair's per column.
        beta: length of the remainder after the last step.
    """
    m, ends = len(values), coordinates[-1].double()
    if beta == 0.0:
        return Rule(values.clamp(min=0.0), coordinates[0].square())
    # A Ritz value at zero would make the last entry infinite, and the rule that of Gauss. Entries
    # that are large come to the same up to 1e-6 of the integral, and cost fewer digits.
    top = float(values.abs().max())
    clean = values.clamp(min=max(1e-10 * top, 1e-300))
    arrow = torch.zeros(m + 1, m + 1, dtype=torch.float64)
    arrow[:m, :m] = clean.diag()
    arrow[m, :m] = arrow[:m, m] = beta * ends
    arrow[m, m] = min(beta**2 * float((ends.square() / clean).sum()), 1e6 * top)
    nodes, vectors = torch.linalg.eigh(arrow)
    return Rule(nodes.clamp(min=0.0), (coordinates[0].double() @ vectors[:m]).square())


def exact_rule(matvec: MatVec, n: int, *, dtype: torch.dtype, seed: int) -> Quadrature:
    """Forms a symmetric matrix by ``n`` products, and takes its eigenvalues for the nodes.

    Args:
        matvec: the operator.
        n: its size: ``2 n n`` numbers are allocated on the host.
        dtype: of the vectors.
        seed: for the record.
    """
    matrix = torch.empty(n, n, dtype=torch.float64)
    for i in range(n):
        unit = torch.zeros(n, dtype=dtype)
        unit[i] = 1.0
        matrix[i] = matvec(unit).double().cpu()
    noise = float(torch.linalg.matrix_norm(matrix - matrix.T)) / 2
    values = torch.linalg.eigvalsh((matrix + matrix.T) / 2)
    rule = Rule(values, torch.full_like(values, 1.0 / n))
    return Quadrature((rule,), (rule,), n, n, seed, (1,), noise, exact=True)


def damped_share(values: Tensor, lam: float) -> Tensor:
    """Returns ``x / (x + lam)``; eigenvalues below zero are rounding and count as zero."""
    clean = values.clamp(min=0)
    return clean / (clean + lam)


def log_share(values: Tensor, lam: float) -> Tensor:
    """Returns ``log(1 + x / lam)``; eigenvalues below zero are rounding and count as zero."""
    return torch.log1p(values.clamp(min=0) / lam)


def zero_floor(rule: Quadrature, eps: float) -> float:
    """Returns up to where an eigenvalue cannot be told from zero: the rounding of Lanczos.

    Args:
        rule: the rule; its size does not matter.
        eps: relative rounding of the products and of the vectors, the larger one.
    """
    return max(10 * max(rule.steps, default=1) * eps * rule.largest, rule.noise)


def density_record(
    rule: Quadrature, floor: float, n_grid: int, sigma: float | None, log: bool
) -> dict[str, Any]:
    """Returns the spectral density, smoothed by Gaussians, on a grid, as plain values.

    It integrates to one over the grid's unit, less what was left out; the standard error is that
    over the probes, and ``low`` and ``high`` are the interval. Up to ``floor`` everything is zero.
    ``n_grid``, ``sigma`` and ``log`` are those of ``FisherLanczos.spectral_density``.
    """
    zero = rule.trace_of(lambda x: (x.abs() <= floor).double())
    left_out = rule.trace_of(lambda x: (x <= floor).double())
    every = torch.cat([one.nodes for one in rule.gauss])
    every = every[every > floor].log10() if log else every
    low, high = (float(every.min()), float(every.max())) if len(every) else (-1.0, 0.0)
    span = max(high - low, 1e-3 * max(abs(high), 1e-30))
    width = 0.01 * span if sigma is None else sigma
    grid = torch.linspace(low - 4 * width, high + 4 * width, n_grid, dtype=torch.float64)
    curves = []
    for one in rule.gauss:
        nodes, weights = one.nodes, one.weights
        if log:
            keep = nodes > floor
            nodes, weights = nodes[keep].log10(), weights[keep]
        bump = torch.exp(-((grid[:, None] - nodes) ** 2) / (2 * width**2))
        curves.append(bump @ weights / (width * math.sqrt(2 * math.pi)))
    density, error = mean_and_error(torch.stack(curves))
    if rule.exact:
        error = torch.zeros_like(density)
    half = (0.0 if rule.exact else t_quantile(len(curves))) * error
    return {
        "grid": grid.tolist(),
        "scale": "log10" if log else "linear",
        "density": density.tolist(),
        "standard_error": error.tolist(),
        "low": (density - half).clamp(min=0.0).tolist(),
        "high": (density + half).tolist(),
        "sigma": width,
        "zero_floor": floor,
        "noise": rule.noise,
        "mass_at_zero": zero.value / rule.n,
        "mass_left_out": left_out.value / rule.n if log else 0.0,
        "nodes": [one.nodes.tolist() for one in rule.gauss],
        "weights": [one.weights.tolist() for one in rule.gauss],
    }
