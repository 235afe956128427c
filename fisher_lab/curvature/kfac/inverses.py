"""The damped factors of a refresh, decomposed when they are first wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from fisher_lab.curvature.collectives import Communicator, raise_others
from fisher_lab.curvature.errors import CurvatureError
from fisher_lab.curvature.kfac import ekfac
from fisher_lab.curvature.kfac.factors import Damped, Factor, GramFactor
from fisher_lab.curvature.kfac.factors.dense import DampedDense
from fisher_lab.curvature.kfac.factors.diagonal import DampedDiagonalLowRank
from fisher_lab.curvature.kfac.factors.woodbury import DampedGram
from fisher_lab.curvature.kfac.layer_factors import LayerFactors
from fisher_lab.curvature.kfac.numerics import EngineSettings
from fisher_lab.curvature.linalg import Cholesky

Decomposed = DampedDense | DampedGram | DampedDiagonalLowRank


def owners(sizes: Sequence[int], ranks: int) -> list[int]:
    """Assigns decompositions to ranks: the largest first, each to the least busy rank.

    Args:
        sizes: sides of the matrices; the cost is taken as their cube.
        ranks: number of ranks.
    """
    busy = [0.0] * ranks
    result = [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        result[index] = min(range(ranks), key=lambda r: busy[r])
        busy[result[index]] += float(sizes[index]) ** 3
    return result


@dataclass
class _Task:
    side: Decomposed
    size: int
    owner: int = 0


def prepare_together(
    sides: Sequence[Damped], communicator: Communicator, *, eigen: bool = False
) -> list[float]:
    """Decomposes every side once over all ranks; collective.

    Args:
        sides: damped factors, the same ones in the same order on every rank.
        communicator: of the ranks.
        eigen: eigendecompositions of the factors (EKFAC), whatever an inverse would need.

    Returns:
        Seconds that each side's decomposition took on its owner.

    Raises:
        CurvatureError: a decomposition failed; names the rank.
    """
    # A rank whose device was full has let go of what the others still have: they do it once more.
    told_left = communicator.share([_left(side, eigen) for side in sides])
    found = [
        _task(side) if any(left) else None
        for side, left in zip(sides, zip(*told_left, strict=True), strict=True)
    ]
    tasks = {id(t.side): t for t in found if t is not None}  # layers may share one
    todo = list(tasks.values())
    for task, owner in zip(todo, owners([t.size for t in todo], communicator.size), strict=True):
        task.owner = owner
    told: dict[str, Any] = {}
    error: str | None = None
    try:
        for index, task in enumerate(todo):
            if task.owner == communicator.rank:
                start = perf_counter()
                _decompose(task.side, eigen)
                told[str(index)] = {**_header(task.side), "seconds": perf_counter() - start}
    except Exception as failed:
        error = f"{type(failed).__name__}: {failed}"
    every = communicator.share({"error": error, "done": told})
    raise_others([each["error"] for each in every])
    seconds: dict[int, float] = {}
    for index, task in enumerate(todo):
        header = every[task.owner]["done"][str(index)]
        _hand_over(task, header, communicator)
        seconds[id(task.side)] = header["seconds"]
    return [seconds.get(id(side), 0.0) for side in sides]


def _left(side: Damped, eigen: bool) -> bool:
    """Says whether something is left to do for this rank."""
    if isinstance(side, DampedDiagonalLowRank):
        return "cholesky" not in side.__dict__
    if not isinstance(side, DampedDense | DampedGram) or side.factor._eigen is not None:
        return False
    return eigen or side.__dict__.get("cholesky") is None


def _task(side: Damped) -> _Task:
    """What has to be done; forms the matrix first, which is collective where it is spread."""
    assert isinstance(side, Decomposed)
    if isinstance(side, DampedDiagonalLowRank):
        return _Task(side, side.guarded_step("matrix", lambda: side.core).shape[0])
    return _Task(side, side.guarded_step("matrix", lambda: _matrix(side)).shape[0])


def _decompose(side: Decomposed, eigen: bool) -> None:
    if eigen and not isinstance(side, DampedDiagonalLowRank):
        factor, on_host = side.factor, side.numerics.on_host
        side.guarded_step("decomposition", lambda: factor.eigen(on_host=on_host))
    else:
        side.prepare()


def _header(side: Decomposed) -> dict[str, Any]:
    found = side.__dict__.get("cholesky")
    return {
        "tried": found is not None,
        "lower": found is not None and found.lower is not None,
        "jitter": 0.0 if found is None else found.jitter,
        "eps": 0.0 if found is None else found.eps,
    }


def _hand_over(task: _Task, header: dict[str, Any], communicator: Communicator) -> None:
    """Gives a decomposition to all ranks.

    Its owner too takes what was sent: the libraries return columns one after the other, what
    arrives lies in rows, and products of the two differ in their last bit.
    """
    side, mine = task.side, task.owner == communicator.rank
    like = side.core if isinstance(side, DampedDiagonalLowRank) else _matrix(side)

    def moved(x: Tensor | None, *shape: int) -> Tensor:
        here = x.contiguous() if mine and x is not None else like.new_empty(shape)
        return communicator.broadcast(here, task.owner)

    n = task.size
    if header["lower"]:
        own = side.cholesky.lower if mine and side.cholesky is not None else None
        side.cholesky = Cholesky(moved(own, n, n), header["jitter"], header["eps"])
        vars(side).pop("lower", None)  # made of the owner's own
        return
    if not mine and header["tried"]:
        side.cholesky = Cholesky(None, 0.0, 0.0)
    pair: tuple[Tensor, Tensor] | tuple[None, None] = (None, None)
    if mine:
        pair = side.eigen if isinstance(side, DampedDiagonalLowRank) else side.factor.eigen()
    found = moved(pair[0], n), moved(pair[1], n, n)
    if isinstance(side, DampedDiagonalLowRank):
        side.eigen = found
    else:
        side.factor._eigen = found


def _matrix(side: DampedDense | DampedGram) -> Tensor:
    factor = side.factor
    return factor.kernel if isinstance(factor, GramFactor) else factor.matrix


def same_vectors(communicator: Communicator, tensors: Sequence[Tensor]) -> None:
    """Checks that the ranks apply the factors to the same vectors.

    Raises:
        CurvatureError: they differ; without this a collective product would be silently wrong.
    """
    mean = torch.stack([t.double().sum() for t in tensors]).sum() if tensors else torch.zeros(())
    norm = sum(float(t.double().square().sum()) for t in tensors)
    found = communicator.share([float(mean), norm])
    for rank, (other_sum, other_norm) in enumerate(found):
        size = max(found[0][1], other_norm) ** 0.5
        near = abs(other_norm - found[0][1]) <= 1e-6 * max(found[0][1], other_norm)
        if not near or abs(other_sum - found[0][0]) > 1e-6 * max(size, abs(other_sum)):
            raise CurvatureError(
                f"gradients: those of rank {rank} (norm {other_norm**0.5:.6g}) are not those of "
                f"rank 0 (norm {found[0][1] ** 0.5:.6g}); allowed: the same gradient on every "
                "rank, weighted by the ranks' labels"
            )


class Inverses:
    """Both sides of every layer under one damping; what has been computed of them is kept.

    Args:
        factors: of the refresh, by layer name.
        settings: all choices.

    Attributes:
        seconds: spent on decomposing, by layer name.
        bases: EKFAC's eigenbases so far, by layer name.
    """

    def __init__(self, factors: Mapping[str, LayerFactors], settings: EngineSettings) -> None:
        self.factors, self.settings = factors, settings
        self.seconds: dict[str, float] = {}
        self.bases: dict[str, ekfac.Eigenbasis] = {}
        self._damped: dict[tuple[int, float], Damped] = {}

    def with_settings(self, settings: EngineSettings) -> Inverses:
        """Returns the same factors under another damping; their eigendecompositions stay."""
        other = Inverses(self.factors, settings)
        other.seconds = self.seconds
        return other

    def corrects(self, factors: LayerFactors) -> bool:
        """Says whether EKFAC corrects the eigenvalues of a layer."""
        return self.settings.ekfac and factors.tokens_g is not None

    def G(self, factors: LayerFactors) -> Damped:
        """Returns a layer's damped output side."""
        return self._damped_of(factors.G, self.settings.lam_G)

    def A(self, factors: LayerFactors) -> Damped | None:
        """Returns a layer's damped input side; None for a norm layer."""
        if factors.A is None:
            return None
        return self._damped_of(factors.A, self.settings.lam_A)

    def sides(self, factors: LayerFactors) -> list[Damped]:
        """Returns a layer's damped sides: G, then A where it has one."""
        return [side for side in (self.G(factors), self.A(factors)) if side is not None]

    def basis(self, name: str) -> ekfac.Eigenbasis:
        """Returns a layer's eigenbasis under EKFAC; collective the first time."""
        if name not in self.bases:
            self.bases[name] = ekfac.prepared(self.factors[name], self.settings)
        return self.bases[name]

    def prepare(self, name: str) -> None:
        """Decomposes what is left of a layer.

        Raises:
            CurvatureError: a decomposition failed.
        """
        start, factors = perf_counter(), self.factors[name]
        if self.corrects(factors):
            self.basis(name)
        else:
            for side in self.sides(factors):
                side.prepare()  # type: ignore[attr-defined]
        self._spent(name, perf_counter() - start)

    def prepare_together(self, communicator: Communicator) -> None:
        """Spreads the decompositions over the ranks; what then remains is done by each.

        Raises:
            CurvatureError: a decomposition failed; names the rank.
        """
        for eigen in (False, True):
            pairs = [
                (name, side)
                for name, factors in self.factors.items()
                if self.corrects(factors) == eigen
                for side in self.sides(factors)
            ]
            seconds = prepare_together([s for _, s in pairs], communicator, eigen=eigen)
            for (name, _), spent in zip(pairs, seconds, strict=True):
                self._spent(name, spent)

    def logdet(self, factors: LayerFactors) -> float:
        """Returns the log-determinant of a layer's block, with the factors in use.

        For ``(T/N) G (x) A`` that is ``dim_A logdet G + dim_G logdet A + dim_G dim_A log(T/N)``.
        """
        sides = [side.logdet() for side in self.sides(factors)]
        dim_g, dim_a = factors.G.dim, 1 if factors.A is None else factors.A.dim
        value = dim_a * sides[0] + (0.0 if factors.A is None else dim_g * sides[1])
        return value + dim_g * dim_a * float(torch.tensor(factors.ratio).double().log())

    def _damped_of(self, factor: Factor, lam: float) -> Damped:
        key = (id(factor), lam)
        if key not in self._damped:
            kappa = self.settings.kappa_max
            self._damped[key] = factor.damped(lam, kappa, self.settings.numerics)
        return self._damped[key]

    def _spent(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
