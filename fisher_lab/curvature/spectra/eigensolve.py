"""From a symmetric matrix to the numbers of a block's record (``docs/math.md``, section 8)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fisher_lab.curvature import linalg
from fisher_lab.curvature.collectives import Communicator, together
from fisher_lab.curvature.spectra.block_matrices import BlockMatrix

NUMBERS = (
    "largest_eigenvalue",
    "condition_number",
    "effective_rank",
    "spectral_gap",
    "trace",
    "n_nonzero",
    "threshold",
)
"""Keys of a record that hold one number, or None where the block is degenerate."""


@dataclass(frozen=True)
class Solved:
    """Eigenvalues of a block, descending, before they are cut to the top ``k``.

    Attributes:
        eigenvalues: ``[min(N, P)]`` float64, clamped at zero; fewer from a sketch.
        trace: the exact trace of ``F``.
        regularization: what was added to the diagonal after a failure, else 0.
        exact: False for a sketch, whose derived numbers see only the top eigenvalues.
        extra: further entries of the record.
        rounding: relative to the largest eigenvalue, what the others are off by at most.
        second: the second eigenvalue, where a sketch found it and does not keep it.
    """

    eigenvalues: Tensor
    trace: float
    regularization: float = 0.0
    exact: bool = True
    extra: Mapping[str, Any] | None = None
    rounding: float = 0.0
    second: float | None = None

    @property
    def threshold(self) -> float:
        """Up to where an eigenvalue cannot be told from zero."""
        return self.rounding * float(self.eigenvalues[0]) if len(self.eigenvalues) else 0.0

    @property
    def nonzero(self) -> Tensor:
        """The eigenvalues above it."""
        return self.eigenvalues[self.eigenvalues > self.threshold]


class SolveError(RuntimeError):
    """An eigensolver failed, also with regularisation; the block becomes degenerate."""


def solve(
    matrix: Tensor,
    size: int,
    *,
    dtype: torch.dtype,
    rows: torch.dtype,
    device: torch.device,
    regularization: float,
) -> Solved:
    """Decomposes ``(1/N) J J^T`` or ``(1/N) J^T J``, of which ``size`` eigenvalues can be nonzero.

    Args:
        matrix: symmetric, float64.
        size: ``min(N, P)``.
        dtype: of the eigensolver.
        rows: dtype in which the rows of ``J`` were computed.
        device: of the eigensolver.
        regularization: added to the diagonal, times the mean diagonal, only after a failure.

    Raises:
        SolveError: the solver failed twice.
    """
    trace = float(matrix.diagonal().sum())
    work = matrix.to(device=device, dtype=dtype)
    used = 0.0
    try:
        values = torch.linalg.eigvalsh(work)
    except RuntimeError:
        used = regularization * max(trace / len(matrix), torch.finfo(dtype).tiny)
        shift = used * torch.eye(len(work), dtype=dtype, device=device)
        try:
            values = torch.linalg.eigvalsh(work + shift) - used
        except RuntimeError as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise SolveError(f"the eigensolver failed: {reason}") from error
    if not bool(torch.isfinite(values).all()):
        raise SolveError("the eigensolver returned non-finite eigenvalues")
    values = values.flip(0)[:size].clamp(min=0.0)
    rounding = relative_rounding(len(matrix), dtype, rows)
    return Solved(values.double().cpu(), trace, used, rounding=rounding)


def relative_rounding(side: int, solver: torch.dtype, rows: torch.dtype) -> float:
    """What an eigenvalue is off by at most, relative to the largest one.

    ``10 side^(1/2) eps`` of the solver for the matrix ``[side, side]`` that it decomposes, whatever
    the other dimension of ``J`` is; and ``eps^2`` of the rows of ``J``, whose rounding alone makes
    eigenvalues of that size (``docs/math.md``, section 8).
    """
    return linalg.relative_rounding(side, solver) + torch.finfo(rows).eps ** 2


def sketch(rows: Tensor, rank: int, dtype: torch.dtype) -> Solved:
    """Approximates the top eigenvalues of ``(1/N) J^T J`` by a randomised SVD.

    Eight further columns and four power iterations (Halko et al. 2011, algorithm 4.4). The error
    estimate is a posteriori: within each pair's residual ``|F v - l v|`` there is a true eigenvalue
    of ``F``; what the sketch did not see is the discarded trace.

    Args:
        rows: ``J`` ``[N, P]`` float64, centred already where asked for.
        rank: eigenvalues wanted.
        dtype: in which the rows were computed.

    Raises:
        SolveError: the SVD failed.
    """
    n, p = rows.shape
    scaled = rows / n**0.5
    q = min(rank + 8, n, p)
    try:
        _, singular, right = torch.svd_lowrank(scaled, q=q, niter=4)
    except RuntimeError as error:
        raise SolveError(f"the sketch failed: {str(error).splitlines()[0]}") from error
    values, right = singular[:rank].square(), right[:, :rank]
    residuals = (scaled.T @ (scaled @ right) - right * values).norm(dim=0)
    trace = float(scaled.square().sum())
    largest = float(values[0]) if len(values) else 0.0
    extra = {
        "residuals": residuals.tolist(),
        "error_estimate": float(residuals.max()) / largest if largest > 0 else None,
        "discarded_trace": max(trace - float(values.sum()), 0.0),
    }
    return Solved(
        values.cpu(),
        trace,
        exact=False,
        extra=extra,
        rounding=relative_rounding(q, rows.dtype, dtype),
        second=float(singular[1].square()) if q > 1 else None,
    )


def describe(solved: Solved, *, n: int, p: int, top_k: int | None) -> dict[str, Any]:
    """Returns the record of a spectrum of ``n`` samples and ``p`` parameters.

    ``top_k`` eigenvalues are kept in it (None: all).
    """
    values = solved.eigenvalues
    if len(values) == 0 or float(values[0]) <= 0.0:
        return degenerate("every per-sample gradient is zero", n=n, p=p)
    return _record(solved, solved.nonzero, solved.threshold, n=n, p=p, top_k=top_k)


def _record(
    solved: Solved, nonzero: Tensor, threshold: float, *, n: int, p: int, top_k: int | None
) -> dict[str, Any]:
    values = solved.eigenvalues
    weights = nonzero / nonzero.sum()
    # The second eigenvalue of a P x P matrix of rank one is zero, if there is a second one.
    second = solved.second
    if second is None:
        second = float(values[1]) if len(values) > 1 else 0.0 if p > 1 and solved.exact else None
    return {
        "status": "ok",
        "reason": None,
        "eigenvalues": values[:top_k].tolist(),
        "largest_eigenvalue": float(values[0]),
        "condition_number": float(nonzero[0] / nonzero[-1]),
        "effective_rank": float(torch.exp(-(weights * weights.log()).sum())),
        "spectral_gap": None if second is None else float(values[0]) - second,
        "trace": solved.trace,
        "n_nonzero": len(nonzero),
        "threshold": threshold,
        "n_params": p,
        "n_samples": n,
        "exact": solved.exact,
        "regularization_used": solved.regularization,
        **(solved.extra or {}),
    }


def degenerate(reason: str, *, n: int, p: int) -> dict[str, Any]:
    """Returns the record of a block without a spectrum."""
    return {
        "status": "degenerate",
        "reason": reason,
        "eigenvalues": [],
        **dict.fromkeys(NUMBERS),
        "n_params": p,
        "n_samples": n,
        "exact": None,
        "regularization_used": 0.0,
    }


def union(
    solved: Iterable[Solved], *, n: int, p: int, top_k: int | None, n_degenerate: int
) -> dict[str, Any]:
    """Returns the record of the block-diagonal matrix: the blocks' eigenvalues together.

    ``solved`` are the blocks that are not degenerate, with ``p`` parameters in all, and
    ``n_degenerate`` those that were left out; the rest is as for :func:`describe`. Every block
    decides by its own rounding what is nonzero; ``threshold`` is the largest of theirs.
    """
    parts = list(solved)
    counts = {"n_blocks": len(parts), "n_degenerate": n_degenerate}
    if not parts:
        return {**degenerate("every block is degenerate", n=n, p=p), **counts}
    joined, nonzero = (
        torch.cat(values).sort(descending=True).values
        for values in ([part.eigenvalues for part in parts], [part.nonzero for part in parts])
    )
    # A block that keeps one eigenvalue of its sketch may still have the second one of all.
    hidden = [x.second for x in parts if len(x.eigenvalues) == 1 and x.second is not None]
    whole = Solved(
        joined,
        sum(part.trace for part in parts),
        max(part.regularization for part in parts),
        all(part.exact for part in parts),
        second=max([*joined[1:2].tolist(), *hidden], default=None),
    )
    threshold = max(part.threshold for part in parts)
    record = _record(whole, nonzero, threshold, n=n, p=p, top_k=top_k)
    return {**record, **counts}


Found = Solved | str
"""A block's spectrum, or why there is none."""


def solve_blocks(
    collectors: Mapping[str, BlockMatrix],
    sizes: Mapping[str, int],
    communicator: Communicator,
    solver: Callable[[str, Tensor], Solved],
    *,
    center: bool,
) -> dict[str, Found]:
    """Decomposes the matrices of all blocks, on several ranks as many at a time; collective.

    Args:
        collectors: block to what was collected of it on this rank.
        sizes: block to its number of parameters, ``P``; blocks of a size are decomposed together.
        communicator: of the ranks.
        solver: ``solver(block, matrix)`` gives a block's spectrum.
        center: whether the mean row is subtracted.

    Returns:
        Block to its spectrum or the reason why there is none; the same on every rank. Blocks that
        no rank's loss reaches are left out.
    """
    by_rank = communicator.all_gather_objects({name: c.touched for name, c in collectors.items()})
    reached = [name for name in collectors if any(other[name] for other in by_rank)]
    order = sorted(reached, key=lambda name: -sizes[name])
    own: dict[str, Found] = {}

    def decompose(matrices: Mapping[str, Tensor]) -> None:
        for name, matrix in matrices.items():
            try:
                own[name] = solver(name, matrix)
            except SolveError as error:
                own[name] = str(error)

    for start in range(0, len(order), communicator.size):
        mine: dict[str, Tensor] = {}
        for owner, name in enumerate(order[start : start + communicator.size]):
            matrix = collectors[name].matrix(center=center)
            if owner == communicator.rank:
                mine[name] = matrix
        together(communicator, partial(decompose, mine))
    plain = {
        name: x if isinstance(x, str) else {**vars(x), "eigenvalues": x.eigenvalues.tolist()}
        for name, x in own.items()
    }
    found: dict[str, Found] = {}
    for other in communicator.all_gather_objects(plain):
        for name, x in other.items():
            if isinstance(x, dict):
                values = torch.tensor(x["eigenvalues"], dtype=torch.float64)
                x = Solved(**{**x, "eigenvalues": values})
            found[name] = x
    return found
