"""Stochastic Lanczos quadrature, Hutch++ and effective dimension, with standard errors.

Sources: Ubaru, Chen and Saad 2017 (quadrature); Ghorbani et al. 2019 and Papyan 2019 (spectral
densities of networks); Meyer et al. 2021 (Hutch++).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fisher_lab.curvature.errors import CurvatureError
from fisher_lab.curvature.linalg import KrylovBasis, MatVec


@dataclass(frozen=True)
class Estimate:
    """A stochastic estimate.

    Attributes:
        value: the estimate.
        standard_error: of the mean over the probes; 0 where nothing was left to chance.
        n_probes: random vectors.
        n_products: operator products.
        seed: of the probes.
    """

    value: float
    standard_error: float
    n_probes: int
    n_products: int
    seed: int


@dataclass(frozen=True)
class Quadrature:
    """Nodes and weights of every probe; a probe's weights sum to one.

    Attributes:
        nodes: one ``[steps]`` tensor a probe, float64.
        weights: the same shapes.
        n: size of the operator.
        n_products: operator products.
        seed: of the probes.
    """

    nodes: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    n: int
    n_products: int
    seed: int

    def trace_of(self, function: Callable[[Tensor], Tensor]) -> Estimate:
        """Estimates ``tr f(A)``."""
        values = [
            self.n * float((w * function(x)).sum())
            for x, w in zip(self.nodes, self.weights, strict=True)
        ]
        return _estimate(values, self.n_products, self.seed)

    def with_known(self, values: Tensor) -> Quadrature:
        """Adds known eigenvalues ``[l]``, each with weight ``1/n``, to every probe.

        For probes that were deflated by their eigenvectors: what is known then carries no variance
        (what Hutch++ does for the trace, for any function and for the density).
        """
        known = values.double().cpu()
        weight = torch.full_like(known, 1.0 / self.n)
        return replace(
            self,
            nodes=tuple(torch.cat([known, nodes]) for nodes in self.nodes),
            weights=tuple(torch.cat([weight, weights]) for weights in self.weights),
        )


def rademacher(n: int, generator: torch.Generator) -> Tensor:
    """Returns a vector of signs ``[n]`` in float64, drawn on the host."""
    signs = torch.randint(0, 2, (n,), generator=generator, dtype=torch.int8)
    return signs.double().mul_(2).sub_(1)


def quadrature(
    matvec: MatVec,
    n: int,
    *,
    n_probes: int,
    steps: int,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
    deflate: Tensor | None = None,
) -> Quadrature:
    """Runs Lanczos from random signs.

    Args:
        matvec: the operator.
        n: its size.
        n_probes: random vectors.
        steps: Lanczos steps a probe, ``m``: ``m n`` numbers are allocated.
        seed: of the probes.
        dtype: of the vectors.
        device: of the vectors.
        deflate: ``[l, n]`` orthonormal rows, removed from every probe; its weights then sum to its
            remaining squared length over ``n``.

    Raises:
        CurvatureError: fewer than one probe or step.
    """
    if n_probes < 1 or steps < 1:
        raise CurvatureError(f"n_probes, steps: {n_probes}, {steps}; allowed: 1 or more")
    generator = torch.Generator().manual_seed(seed)
    steps, products, nodes, weights = min(steps, n), 0, [], []
    for _ in range(n_probes):
        probe = rademacher(n, generator).to(device=device, dtype=dtype)
        if deflate is not None:
            probe -= (deflate @ probe) @ deflate
        length = float(probe.double().square().sum())
        if length <= 1e-12 * n:
            nodes.append(torch.zeros(1, dtype=torch.float64))
            weights.append(torch.zeros(1, dtype=torch.float64))
            continue
        basis = KrylovBasis(matvec, n, steps, dtype=dtype, device=device, generator=generator)
        basis.start(probe)
        while basis.size < steps:
            basis.grow()
            if basis.beta == 0.0:
                break
        values, coordinates = basis.ritz()
        products += basis.n_products
        nodes.append(values)
        weights.append(coordinates[0].square() * (length / n))
    return Quadrature(tuple(nodes), tuple(weights), n, products, seed)


def hutch_plus_plus(
    matvec: MatVec,
    n: int,
    *,
    n_products: int,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Estimate:
    """Estimates the trace: exactly on a random range of the operator, by probes on the rest.

    A third of the products finds the range, a third evaluates it, a third probes the rest; the
    standard error is that of the probes.

    Args:
        matvec: the operator.
        n: its size.
        n_products: products in all, at least 6: the standard error takes two probes.
        seed: of the random vectors.
        dtype: of the vectors; ``n_products / 3`` of them are allocated.
        device: of the vectors.

    Raises:
        CurvatureError: fewer than 6 products.
    """
    if n_products < 6:
        raise CurvatureError(f"n_products: {n_products}; allowed: 6 or more")
    generator = torch.Generator().manual_seed(seed)
    third = n_products // 3
    size = min(third, n)

    def signs() -> Tensor:
        return rademacher(n, generator).to(device=device, dtype=dtype)

    basis = torch.linalg.qr(torch.stack([matvec(signs()) for _ in range(size)]).T).Q.T.contiguous()
    known = sum(float(row.double() @ matvec(row.clone()).double()) for row in basis)
    if len(basis) == n:
        return Estimate(known, 0.0, 0, 2 * size, seed)
    rest = []
    for _ in range(third):
        probe = signs()
        probe -= (basis @ probe) @ basis
        rest.append(float(probe.double() @ matvec(probe).double()))
    found = _estimate(rest, 2 * size + third, seed)
    return Estimate(known + found.value, found.standard_error, third, found.n_products, seed)


def _estimate(values: list[float], products: int, seed: int) -> Estimate:
    mean, error = _mean_and_error(torch.tensor(values, dtype=torch.float64))
    return Estimate(float(mean), float(error), len(values), products, seed)


def _mean_and_error(values: Tensor) -> tuple[Tensor, Tensor]:
    """The mean over the probes (the rows) and its standard error, NaN for a single probe."""
    error = values.std(0) / math.sqrt(len(values)) if len(values) > 1 else values[0] * math.nan
    return values.mean(0), error


def damped_share(values: Tensor, lam: float) -> Tensor:
    """Returns ``x / (x + lam)``; eigenvalues below zero are rounding and count as zero."""
    clean = values.clamp(min=0)
    return clean / (clean + lam)


def density_record(
    rule: Quadrature, dtype: torch.dtype, n_grid: int, sigma: float | None, log: bool
) -> dict[str, Any]:
    """Returns the spectral density, smoothed by Gaussians, on a grid, as plain values.

    It integrates to one over the grid's unit, less what was left out; the standard error is that
    over the probes. The rounding of ``dtype``, the vectors', decides what is zero. ``n_grid``,
    ``sigma`` and ``log`` are those of ``FisherLanczos.spectral_density``.
    """
    largest = max(float(nodes.abs().max()) for nodes in rule.nodes)
    floor = rule.n * torch.finfo(dtype).eps * largest
    zero = rule.trace_of(lambda x: (x.abs() <= floor).double())
    left_out = rule.trace_of(lambda x: (x <= floor).double())
    every = torch.cat(rule.nodes)
    every = every[every > floor].log10() if log else every
    low, high = (float(every.min()), float(every.max())) if len(every) else (-1.0, 0.0)
    span = max(high - low, 1e-3 * max(abs(high), 1e-30))
    width = 0.01 * span if sigma is None else sigma
    grid = torch.linspace(low - 4 * width, high + 4 * width, n_grid, dtype=torch.float64)
    curves = []
    for nodes, weights in zip(rule.nodes, rule.weights, strict=True):
        if log:
            keep = nodes > floor
            nodes, weights = nodes[keep].log10(), weights[keep]
        bump = torch.exp(-((grid[:, None] - nodes) ** 2) / (2 * width**2))
        curves.append(bump @ weights / (width * math.sqrt(2 * math.pi)))
    density, error = _mean_and_error(torch.stack(curves))
    return {
        "grid": grid.tolist(),
        "scale": "log10" if log else "linear",
        "density": density.tolist(),
        "standard_error": error.tolist(),
        "sigma": width,
        "mass_at_zero": zero.value / rule.n,
        "mass_left_out": left_out.value / rule.n if log else 0.0,
        "nodes": [nodes.tolist() for nodes in rule.nodes],
        "weights": [weights.tolist() for weights in rule.weights],
    }
