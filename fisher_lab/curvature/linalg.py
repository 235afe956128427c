"""Symmetric positive semi-definite matrices, and Lanczos for operators: no layers, no networks.

Conventions: ``x`` is ``[T, n]`` with one sample a row; a factor is ``M = w x^T x`` with the
weight ``w`` (``1/T``). Damping and clipping follow ``docs/math.md``, section 2; the robust
Cholesky factorisation section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fisher_lab.curvature.errors import NonFiniteError

MatVec = Callable[[Tensor], Tensor]

BLOCK_BYTES = 32 * 2**20
"""Upper size of a temporary copy in another precision."""

SYMMETRIC_LEAF = 384
"""Below this width a symmetric product is done as one general product."""

COLUMNS = 1 << 16
"""Columns of a Lanczos basis that a restart rewrites at once."""


def blocks(length: int, bytes_each: int) -> Iterator[slice]:
    """Yields slices of ``range(length)`` whose copies stay under ``BLOCK_BYTES``."""
    step = max(1, BLOCK_BYTES // max(1, bytes_each))
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


@contextmanager
def full_precision() -> Iterator[None]:
    """Switches autocast off: it would turn products of float32 factors into 16-bit ones."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


@full_precision()
def add_second_moment(total: Tensor, x: Tensor) -> None:
    """Adds ``x^T x`` to ``total`` in place, in the precision of ``total``.

    Args:
        total: ``[n, n]``; only its lower triangle is filled where ``n`` is large, see
            :func:`mirror`.
        x: ``[T, n]``, any floating dtype; converted in blocks of rows.
    """
    if x.dtype == total.dtype or x.shape[0] == 0:
        _add_lower(total, x.to(total.dtype), 1.0)
        return
    steps = list(blocks(x.shape[0], x.shape[1] * total.element_size()))
    # Taken before anything is added: where there is no room for it, the sum is as it was.
    room = torch.empty(steps[0].stop, x.shape[1], dtype=total.dtype, device=x.device)
    for rows in steps:
        part = room[: rows.stop - rows.start].copy_(x[rows])
        _add_lower(total, part, 1.0)


def _add_lower(total: Tensor, x: Tensor, beta: float) -> None:
    """Lower triangle by halves: a symmetric product needs half the work of a general one."""
    n = total.shape[0]
    if n <= SYMMETRIC_LEAF:
        total.addmm_(x.T, x, beta=beta)
        return
    half = n // 2
    _add_lower(total[:half, :half], x[:, :half], beta)
    _add_lower(total[half:, half:], x[:, half:], beta)
    total[half:, :half].addmm_(x[:, half:].T, x[:, :half], beta=beta)


def mirror(total: Tensor) -> Tensor:
    """Copies what :func:`add_second_moment` left out to the upper triangle, in place."""
    n = total.shape[0]
    if n > SYMMETRIC_LEAF:
        half = n // 2
        mirror(total[:half, :half])
        mirror(total[half:, half:])
        total[:half, half:] = total[half:, :half].T
    return total


@full_precision()
def gram(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns ``x x^T`` (``[T, T]``) in ``dtype``, converting ``x`` in blocks of columns."""
    result = torch.empty(x.shape[0], x.shape[0], dtype=dtype, device=x.device)
    if x.dtype == dtype or x.shape[1] == 0:
        _add_lower(result, x.to(dtype).T, 0.0)
        return mirror(result)
    beta = 0.0
    for columns in blocks(x.shape[1], x.shape[0] * result.element_size()):
        _add_lower(result, x[:, columns].to(dtype).T, beta)
        beta = 1.0
    return mirror(result)


@dataclass(frozen=True)
class Clipped:
    """A damped and clipped spectrum (``docs/math.md``, section 2).

    Attributes:
        used: ``[r]`` the eigenvalues in use, of the part of the spectrum that is at hand.
        base: the value in use for every zero eigenvalue that is not at hand.
        clipped: how many the floor raised, over the full dimension.
        kappa_before: condition number of the damped spectrum.
        kappa_after: condition number of the spectrum in use.
    """

    used: Tensor
    base: float
    clipped: int
    kappa_before: float
    kappa_after: float


def clip(values: Tensor, n_zero: int, lam: float, kappa_max: float | None) -> Clipped:
    """Damps a spectrum by ``lam`` and floors it.

    Args:
        values: ``[r]`` eigenvalues at hand, >= 0.
        n_zero: further eigenvalues that are exactly zero.
        lam: Tikhonov damping.
        kappa_max: largest condition number, or None for no floor.
    """
    damped = values + lam
    top = float(damped.max()) if damped.numel() else lam
    floor = 0.0 if kappa_max is None else top / kappa_max
    used = damped.clamp(min=floor)
    base = max(lam, floor)
    clipped = int((damped < floor).sum()) + (n_zero if lam < floor else 0)
    lows = [float(damped.min())] if damped.numel() else []
    low = min([*lows, lam]) if n_zero else min(lows, default=lam)
    return Clipped(used, base, clipped, _ratio(top, low), _ratio(top, max(low, floor)))


def _ratio(top: float, low: float) -> float:
    return top / low if low > 0 else float("inf")


def symmetric_eigen(matrix: Tensor, *, on_host: bool = False) -> tuple[Tensor, Tensor]:
    """Eigendecomposition of a positive semi-definite matrix ``[n, n]``: (values >= 0, vectors).

    A solver that fails to converge is followed by the host's in float64, of the matrix scaled to
    entries of at most 1, and that one by a singular value decomposition, which is the same for such
    a matrix and goes another way. With ``on_host`` all is done on the host; results come back to
    the matrix's device.
    """
    work = matrix.cpu() if on_host else matrix
    found = None
    try:
        found = torch.linalg.eigh(work)
    except torch.OutOfMemoryError:  # the caller moves more than this matrix to the host
        raise
    except RuntimeError:  # torch.linalg.LinAlgError is one
        pass
    values, vectors = _decomposed_again(matrix) if found is None else found
    values, vectors = values.to(matrix), vectors.to(matrix)
    return values.clamp(min=0.0), vectors


def at_rounding(values: Tensor) -> float:
    """Returns what computed eigenvalues ``[n]`` may be off by: ``10 n^(1/2) eps`` of the largest.

    ``n eps``, the bound for the worst matrix, is a thousandth of the largest at 8192 in float32
    (``docs/math.md``, section 8).
    """
    return relative_rounding(len(values), values.dtype) * float(values.max())


def relative_rounding(side: int, dtype: torch.dtype) -> float:
    """Returns :func:`at_rounding` over the largest eigenvalue, for a solver in ``dtype``."""
    return 10 * side**0.5 * torch.finfo(dtype).eps


def _decomposed_again(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """What :func:`symmetric_eigen` tries last; ascending, float64, on the host."""
    work = matrix.cpu().double()
    size = float(work.abs().max())
    scale = 2.0 ** math.frexp(size)[1] if 0.0 < size < math.inf else 1.0
    try:
        values, vectors = torch.linalg.eigh(work / scale)
    except RuntimeError:
        vectors, values, _ = torch.linalg.svd(work / scale)
        values, vectors = values.flip(0), vectors.flip(1)
    return values * scale, vectors


@dataclass(frozen=True)
class Cholesky:
    """A Cholesky factorisation of ``M + lam I`` with what it took to get it.

    Attributes:
        lower: ``[n, n]`` lower triangular, or None where an eigendecomposition has to step in.
        jitter: absolute jitter that was added to the diagonal.
        eps: the same relative to the mean diagonal.
    """

    lower: Tensor | None
    jitter: float
    eps: float


def _cholesky(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """``cholesky_ex``, for widths of a power of two in a frame that is a little wider.

    On the host the triangle is cut out along columns whose addresses then collide in the cache:
    that took twice as long as the factorisation itself at the widths that transformers have.
    """
    n = matrix.shape[0]
    if matrix.device.type != "cpu" or n < 1024 or n % 256:
        lower, info = torch.linalg.cholesky_ex(matrix)
        return lower, info
    frame = matrix.new_zeros(n + 16, n + 16)
    frame[:n, :n] = matrix
    frame[n:, n:].diagonal().fill_(1.0)
    lower, info = torch.linalg.cholesky_ex(frame)
    return lower[:n, :n], info


def robust_cholesky(matrix: Tensor, lam: float, eps: float, *, on_host: bool = False) -> Cholesky:
    """Factorises ``matrix + lam I``; jitter 0, eps, 10 eps relative to the mean diagonal.

    A jitter over 1 % of ``lam`` would silently re-damp: then, and after three tries, ``lower`` is
    None (``docs/math.md``, section 3). The matrix is ``[n, n]``, symmetric positive semi-definite.
    """
    work = matrix.cpu() if on_host else matrix
    mean = float(work.diagonal().mean()) + lam
    # The diagonal is shifted in place and put back: a copy would cost as much as the factorisation
    # of a small matrix.
    diagonal = work.diagonal()
    kept = diagonal.clone()
    try:
        for relative in (0.0, eps, 10 * eps):
            jitter = relative * mean
            if jitter > 0.01 * lam:
                break
            diagonal.copy_(kept + (lam + jitter))
            lower, info = _cholesky(work)
            if int(info) == 0 and bool(torch.isfinite(lower.diagonal()).all()):
                return Cholesky(lower.to(matrix), jitter, relative)
        return Cholesky(None, 0.0, 0.0)
    finally:
        diagonal.copy_(kept)


class KrylovBasis:
    """An orthonormal basis that grows by one product at a time: the Lanczos iteration.

    Vectors are the rows of ``vectors`` ``[m, n]``; the projected matrix ``V A V^T`` is kept in
    float64 with all of its entries, so that a restart is nothing but a change of basis. Source of
    the orthogonalisation: Giraud et al. 2005 ("twice is enough").

    Args:
        matvec: the operator.
        n: its size.
        m: the most vectors.
        dtype: of the vectors.
        device: of the vectors.
        generator: draws a new direction when an invariant subspace is found.
        reorthogonalize: False keeps to the three-term recurrence (cheaper by ``m`` dot products a
            step; copies of converged eigenvalues appear as orthogonality is lost).
        tridiagonal: takes the projected matrix from the recurrence, and no new direction before
            the remainder is exactly zero: for a caller that stops at its own bound.
    """

    def __init__(
        self,
        matvec: MatVec,
        n: int,
        m: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator,
        reorthogonalize: bool = True,
        tridiagonal: bool = False,
    ) -> None:
        self._matvec, self._generator = matvec, generator
        self.reorthogonalize, self._tridiagonal = reorthogonalize, tridiagonal
        self.vectors = torch.empty(m, n, dtype=dtype, device=device)
        self.projected = torch.zeros(m, m, dtype=torch.float64)
        self.size = 0
        self.beta = 0.0
        self.n_products = 0
        self.exhausted = False
        self._scale = 0.0
        self._was_fresh = False
        self._next: Tensor | None = None

    def start(self, vector: Tensor) -> None:
        """Begins with a vector, normalised."""
        self.size, self._next = 0, vector.to(self.vectors) / vector.norm()

    def grow(self) -> None:
        """Adds the next vector and its product.

        Raises:
            NonFiniteError: the product holds NaN or infinity.
        """
        assert self._next is not None
        j = self.size
        self.vectors[j] = self._next
        vector = self.vectors[j].clone()
        work = self._matvec(vector).to(self.vectors)
        self.n_products += 1
        if not bool(torch.isfinite(work).all()):
            raise NonFiniteError(f"Lanczos: product {self.n_products} holds NaN or infinity")
        self._scale = max(self._scale, float(work.norm()))
        work, coefficients = self._orthogonalised(work, vector)
        self.projected[: j + 1, j] = coefficients
        self.projected[j, : j + 1] = coefficients
        self.size = j + 1
        self.beta = float(work.norm())
        # Below rounding the subspace is invariant: what is left of the product is noise.
        noise = 0.0 if self._tridiagonal else 10 * torch.finfo(work.dtype).eps * self._scale
        if self.beta <= noise:
            # A fresh random direction that is invariant by itself: what is left of the operator
            # is a multiple of the identity, and there is nothing more to find.
            self.exhausted = self._was_fresh or self.size == self.vectors.shape[1]
            self.beta, self._was_fresh = 0.0, True
            self._next = self._fresh() if self.size < self.vectors.shape[1] else None
        else:
            self._next, self._was_fresh = work / self.beta, False

    def _orthogonalised(self, work: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
        """Returns a product less its part in the basis, and that part's coordinates."""
        j = self.size
        recurrence = torch.zeros(j + 1, dtype=torch.float64)
        if j > 0:
            recurrence[j - 1] = self.beta
        if not self.reorthogonalize:
            if j > 0:
                work = work - self.beta * self.vectors[j - 1]
            alpha = vector @ work
            recurrence[j] = float(alpha)
            return work - alpha * vector, recurrence
        if self._tridiagonal:
            recurrence[j] = float(work @ vector)
        basis, total = self.vectors[: j + 1], torch.zeros(j + 1, dtype=torch.float64)
        for _ in range(2):
            coefficients = basis @ work
            work = work - coefficients @ basis
            if not self._tridiagonal:
                total += coefficients.double().cpu()
        return work, recurrence if self._tridiagonal else total

    def _fresh(self) -> Tensor:
        vector = random_vector(self.vectors.shape[1], self._generator).to(self.vectors)
        for _ in range(2):
            basis = self.vectors[: self.size]
            vector -= (basis @ vector) @ basis
        return vector / vector.norm()

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Returns (values ascending ``[j]``, coordinates ``[j, j]``) of the projected matrix."""
        return torch.linalg.eigh(self.projected[: self.size, : self.size])

    def first_product(self) -> Tensor:
        """Returns the product with the first vector, of length one, without a new one."""
        found = self.projected[: self.size, 0].to(self.vectors) @ self.vectors[: self.size]
        if self.size == 1 and self._next is not None:
            found += self.beta * self._next
        return found

    def noise(self) -> float:
        """Returns how far the products are from those of a symmetric matrix.

        Of a full orthogonalisation without restarts: what ``V A V^T`` has beside its three
        diagonals, as a norm. In exact arithmetic there is nothing.
        """
        return 2**0.5 * float(self.projected[: self.size, : self.size].triu(2).norm())

    def restart(self, coordinates: Tensor) -> None:
        """Keeps only the directions with these coordinates ``[j, l]`` (orthonormal columns)."""
        keep = coordinates.shape[1]
        values = coordinates.T @ self.projected[: self.size, : self.size] @ coordinates
        turn = coordinates.T.to(self.vectors)
        for start in range(0, self.vectors.shape[1], COLUMNS):
            stop = start + COLUMNS
            self.vectors[:keep, start:stop] = turn @ self.vectors[: self.size, start:stop]
        self.projected.zero_()
        self.projected[:keep, :keep] = torch.diag(values.diagonal())
        self.size = keep


def random_vector(n: int, generator: torch.Generator) -> Tensor:
    """Returns a standard normal vector ``[n]`` in float64, drawn on the host."""
    return torch.randn(n, generator=generator, dtype=torch.float64)


def largest_eigenvalue(
    multiply: MatVec, like: Tensor, n: int, *, steps: int = 40
) -> tuple[float, float]:
    """Largest Ritz value of a positive semi-definite operator by Lanczos, and its residual.

    Deterministic start; full reorthogonalisation; at most ``steps`` products. Some eigenvalue lies
    within the residual of the value (Parlett 1998, theorem 4.5.1); that it is the largest is what
    Lanczos converges to from a start that is not orthogonal to it. The vectors ``[n]`` have the
    dtype and device of ``like``.
    """
    value, residual, _ = _largest_pair(multiply, like, n, steps, bool)
    return value, residual


def largest_eigenvalues(
    multiply: MatVec,
    like: Tensor,
    n: int,
    k: int,
    *,
    steps: int = 100,
    agreed: Callable[[bool], bool] = bool,
) -> Tensor:
    """The ``min(k, n)`` largest eigenvalues of a positive semi-definite operator, descending.

    One run as for :func:`largest_eigenvalue` each, with those found before taken out, so that
    repeated ones come repeatedly. ``agreed`` makes one decision of several ranks' where
    ``multiply`` is collective.
    """
    values: list[float] = []
    vectors: list[Tensor] = []

    def rest(v: Tensor) -> Tensor:
        product = multiply(v)
        for value, vector in zip(values, vectors, strict=True):
            product = product - value * (vector @ v) * vector
        return product

    for _ in range(min(k, n)):
        value, _, vector = _largest_pair(rest, like, n, steps, agreed)
        values.append(value)
        vectors.append(vector)
    return torch.tensor(values, dtype=torch.float64).clamp(min=0.0).sort(descending=True).values


def _largest_pair(
    multiply: MatVec,
    like: Tensor,
    n: int,
    steps: int,
    agreed: Callable[[bool], bool],
) -> tuple[float, float, Tensor]:
    """The largest Ritz value, its residual and its vector."""
    if n == 0:
        return 0.0, 0.0, like.new_empty(0)
    generator = torch.Generator().manual_seed(0)
    basis = KrylovBasis(
        multiply,
        n,
        min(steps, n),
        dtype=like.dtype,
        device=like.device,
        generator=generator,
        tridiagonal=True,
    )
    basis.start(random_vector(n, generator).to(like))
    while True:
        basis.grow()
        values, vectors = basis.ritz()
        value, residual = float(values[-1]), abs(basis.beta * float(vectors[-1, -1]))
        small = max(value, 1e-300)
        done = agreed(residual <= 1e-9 * small or basis.beta <= 1e-14 * small)
        if done or basis.size == len(basis.vectors):
            vector = basis.vectors[: basis.size].T @ vectors[:, -1].to(like)
            return value, residual, vector / vector.norm()


def upper_bound(matrix: Tensor) -> float:
    """A cheap upper bound of a positive semi-definite matrix's largest eigenvalue."""
    row_sums = float(torch.linalg.matrix_norm(matrix, ord=float("inf")))
    return min(float(matrix.diagonal().sum()), row_sums)


def power_of_two_scale(x: Tensor, dtype: torch.dtype) -> float:
    """A power of two that brings ``x`` to the middle of a 16-bit range; 1 for wider dtypes.

    Token gradients of 1e-8 underflow float16 (``docs/math.md``, section 3): the largest
    magnitude is brought to 2^12 (float16 ends at 65504), so that values 2^26 below it are still
    normal numbers.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return 1.0
    # No `abs`: it would take as much room again as the columns.
    largest = max(abs(float(end)) for end in x.aminmax()) if x.numel() else 0.0
    if largest == 0.0:
        return 1.0
    return float(2.0 ** (12 - torch.tensor(largest, dtype=torch.float64).log2().ceil()))


def all_finite(x: Tensor) -> bool:
    """Says whether a tensor holds neither NaN nor infinity, in one pass over it."""
    # A NaN or an infinity cannot be summed away. Large finite values can overflow into a false
    # alarm: then, and only then, float64 decides.
    if x.numel() == 0 or bool(torch.isfinite(x.sum())):
        return True
    return bool(torch.isfinite(x.sum(dtype=torch.float64)))
