"""Lanczos with thick restarts (Wu and Simon 2000), for any symmetric operator.

The iteration itself is :class:`fisher_lab.curvature.linalg.KrylovBasis`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fisher_lab.config.spectra import WHICH
from fisher_lab.curvature.errors import CurvatureError, check_one_of
from fisher_lab.curvature.linalg import KrylovBasis, MatVec, random_vector


@dataclass(frozen=True)
class LanczosResult:
    """Ritz pairs of a symmetric operator.

    Attributes:
        eigenvalues: ``[k]`` float64, most wanted first (fewer without reorthogonalisation, where
            only copies of these were found).
        residuals: ``[k]``, ``|A x - theta x|`` as the last Lanczos vector gives it.
        converged: ``[k]``, residual at most ``tol`` times the largest eigenvalue's magnitude.
        eigenvectors: ``[k, n]``, orthonormal rows, or None.
        n_products: products that were made.
        n_restarts: thick restarts.
        n_vectors: basis vectors, ``m``.
        memory_bytes: bytes of the basis, ``m n itemsize``.
    """

    eigenvalues: Tensor
    residuals: Tensor
    converged: tuple[bool, ...]
    eigenvectors: Tensor | None
    n_products: int
    n_restarts: int
    n_vectors: int
    memory_bytes: int


def default_vectors(n: int, k: int) -> int:
    """Returns the default number of basis vectors: ``min(n, max(2k + 10, 20))``."""
    return min(n, max(2 * k + 10, 20))


def lanczos_algorithm(
    matvec: MatVec,
    n: int,
    k: int,
    *,
    max_vectors: int | None = None,
    max_products: int | None = None,
    tol: float = 1e-6,
    seed: int = 42,
    which: str = "largest",
    reorthogonalize: bool = True,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    eigenvectors: bool = False,
) -> LanczosResult:
    """Finds ``k`` extreme eigenpairs of a symmetric operator.

    An eigenvalue of multiplicity above one shows once, unless the Krylov space becomes invariant
    before ``k`` pairs have converged.

    Args:
        matvec: product with a vector ``[n]``.
        n: size of the operator.
        k: pairs wanted, cut down to ``n``.
        max_vectors: basis vectors ``m`` (``m n`` numbers are allocated); at least ``k + 2`` where
            ``n`` allows. None: :func:`default_vectors`.
        max_products: gives up after so many products; None: ``max(20 m, 300)``.
        tol: a pair has converged when its residual is at most ``tol`` times the largest
            eigenvalue's magnitude.
        seed: of the first vector.
        which: ``largest``, ``smallest`` (algebraically) or ``magnitude``.
        reorthogonalize: False for the plain three-term recurrence, which never restarts. Copies of
            eigenvalues that appear as orthogonality is lost are dropped, so that fewer than ``k``
            pairs may be left; a copy that has yet to converge can only be told by its residual.
        dtype: of the vectors.
        device: of the vectors.
        eigenvectors: whether to return them.

    Raises:
        CurvatureError: an argument is out of range.
        NonFiniteError: a product holds NaN or infinity.
    """
    m, limit = _sizes(n, k, max_vectors, max_products)
    check_one_of("which", which, WHICH)
    if not tol > 0:
        raise CurvatureError(f"tol: {tol}; allowed: above 0")
    k = min(k, n)
    generator = torch.Generator().manual_seed(seed)
    basis = KrylovBasis(
        matvec,
        n,
        m,
        dtype=dtype,
        device=torch.device(device),
        generator=generator,
        reorthogonalize=reorthogonalize,
    )
    basis.start(random_vector(n, generator))
    pairs, restarts = _search(basis, k, which, tol, limit)
    chosen = pairs.order[:k]
    turn = pairs.coordinates[:, chosen].T.to(basis.vectors)
    vectors = turn @ basis.vectors[: basis.size] if eigenvectors else None
    return LanczosResult(
        eigenvalues=pairs.values[chosen],
        residuals=pairs.residuals[chosen],
        converged=pairs.converged(k, tol),
        eigenvectors=vectors,
        n_products=basis.n_products,
        n_restarts=restarts,
        n_vectors=m,
        memory_bytes=basis.vectors.numel() * basis.vectors.element_size(),
    )


@dataclass(frozen=True)
class _RitzPairs:
    """Ritz pairs of a basis of ``j`` vectors.

    Attributes:
        values: ``[j]``, ascending.
        coordinates: ``[j, j]``, one pair's per column.
        residuals: ``[j]``.
        order: indices of the values, most wanted first, without copies.
    """

    values: Tensor
    coordinates: Tensor
    residuals: Tensor
    order: Tensor

    @classmethod
    def of(cls, basis: KrylovBasis, which: str) -> _RitzPairs:
        """Returns the pairs of a basis."""
        values, coordinates = basis.ritz()
        key = {"largest": values, "smallest": -values, "magnitude": values.abs()}[which]
        order = key.argsort(descending=True)
        residuals = basis.beta * coordinates[-1].abs()
        if not basis.reorthogonalize:
            eps = torch.finfo(basis.vectors.dtype).eps
            order = _without_copies(order, values, residuals, eps)
        return cls(values, coordinates, residuals, order)

    def converged(self, k: int, tol: float) -> tuple[bool, ...]:
        """Says of each of the ``k`` most wanted pairs whether it has converged."""
        bound = tol * float(self.values.abs().max())
        return tuple((self.residuals[self.order[:k]] <= bound).tolist())


def _search(
    basis: KrylovBasis, k: int, which: str, tol: float, limit: int
) -> tuple[_RitzPairs, int]:
    """Grows and restarts a basis until ``k`` pairs have converged; returns pairs and restarts."""
    m, restarts = len(basis.vectors), 0
    while True:
        basis.grow()
        if basis.size < k:
            continue
        pairs = _RitzPairs.of(basis, which)
        done = pairs.converged(k, tol)
        # An invariant subspace says nothing of the eigenvalues outside of it: look there first.
        complete = all(done) and len(done) == k and (basis.beta > 0 or basis.exhausted)
        full = basis.size == m
        if complete or basis.n_products >= limit or (full and not basis.reorthogonalize):
            return pairs, restarts
        if full:
            # Half of the rest next to the wanted ones: restarts then lose little convergence.
            keep = min(k + max((m - k) // 2, 1), m - 1)
            basis.restart(pairs.coordinates[:, pairs.order[:keep]])
            restarts += 1


def _without_copies(order: Tensor, values: Tensor, residuals: Tensor, eps: float) -> Tensor:
    """Leaves out Ritz values that only repeat another one, of the most wanted ones in ``order``.

    A single starting vector shows every eigenvalue once; two Ritz values that lie closer to each
    other than both to an eigenvalue are one of them and its copy (Paige 1980). Of a cluster the
    one with the smallest residual stays. ``eps`` is that of the vectors' dtype.
    """
    scale = float(values.abs().max())
    noise = 10 * len(values) * eps * scale
    # One that is far from converging tells nothing by being near another.
    sharp = residuals <= 1e-3 * scale
    kept: list[int] = []
    for i in sorted(order.tolist(), key=lambda i: float(residuals[i])):
        near = [
            j
            for j in kept
            if abs(float(values[i] - values[j])) <= float(residuals[i] + residuals[j]) + noise
        ]
        if not near or not bool(sharp[i]):
            kept.append(i)
    return torch.tensor([i for i in order.tolist() if i in set(kept)], dtype=torch.long)


def _sizes(n: int, k: int, max_vectors: int | None, max_products: int | None) -> tuple[int, int]:
    if n < 1 or k < 1:
        raise CurvatureError(f"k: {k} of an operator of size {n}; allowed: both 1 or more")
    least = min(n, k + 2)
    m = default_vectors(n, k) if max_vectors is None else min(max_vectors, n)
    if m < least:
        raise CurvatureError(f"max_vectors: {max_vectors}; allowed: {least} or more for k={k}")
    limit = max(20 * m, 300) if max_products is None else max_products
    if limit < m and limit < k:
        raise CurvatureError(f"max_products: {max_products}; allowed: {k} or more")
    return m, limit
