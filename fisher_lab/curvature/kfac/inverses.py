"""The damped factors of a refresh, decomposed when they are first wanted, and their reports."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, Protocol

import torch
from torch import Tensor
from typing_extensions import override

from fisher_lab.curvature.collectives import Communicator, raise_others
from fisher_lab.curvature.errors import CurvatureError
from fisher_lab.curvature.kfac import ekfac
from fisher_lab.curvature.kfac.damping import dampings
from fisher_lab.curvature.kfac.factors import Damped, Factor, FactorReport
from fisher_lab.curvature.kfac.layer_factors import LayerFactors
from fisher_lab.curvature.kfac.numerics import EngineSettings
from fisher_lab.curvature.kfac.refresh import Refresh


def owners(sizes: Sequence[int], ranks: int) -> list[int]:
    """Assigns decompositions to ranks: the largest first, each to the least busy rank.

    The cost of a matrix is taken as the cube of its size.
    """
    busy = [0.0] * ranks
    result = [0] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        result[index] = min(range(ranks), key=lambda r: busy[r])
        busy[result[index]] += float(sizes[index]) ** 3
    return result


def same_vectors(communicator: Communicator, tensors: Sequence[Tensor]) -> None:
    """Checks that the ranks apply the factors to the same vectors.

    Raises:
        CurvatureError: they differ; without this a collective product would be silently wrong.
    """
    mean = torch.stack([t.double().sum() for t in tensors]).sum() if tensors else torch.zeros(())
    norm = sum(float(t.double().square().sum()) for t in tensors)
    found = communicator.all_gather_objects([float(mean), norm])
    for rank, (other_sum, other_norm) in enumerate(found):
        size = max(found[0][1], other_norm) ** 0.5
        near = abs(other_norm - found[0][1]) <= 1e-6 * max(found[0][1], other_norm)
        if not near or abs(other_sum - found[0][0]) > 1e-6 * max(size, abs(other_sum)):
            raise CurvatureError(
                f"gradients: those of rank {rank} (norm {other_norm**0.5:.6g}) are not those of "
                f"rank 0 (norm {found[0][1] ** 0.5:.6g}); allowed: the same gradient on every "
                "rank, weighted by the ranks' labels"
            )


@dataclass(frozen=True)
class LayerReport:
    """What a refresh did to one layer: a row of ``layers.csv``.

    Attributes:
        factors: the layer's factors.
        A: report of the input side, None for norm layers.
        G: report of the output side.
        seconds: spent on decomposing both sides.
        kappa_max: largest condition number that the floor allows, None for no floor.
        pairs: the layer in EKFAC's basis, where that is in use: its floor is one on the pairs of
            eigenvectors, and the sides are as they come then.
    """

    factors: LayerFactors
    A: FactorReport | None
    G: FactorReport
    seconds: float
    kappa_max: float | None = None
    pairs: ekfac.Eigenbasis | None = None


class Block(Protocol):
    """A layer's block of the Fisher matrix as it is approximated: all that is done with it.

    Matrices ``y`` are ``[out, dim_a]`` in the apply dtype. Powers and log-determinants are those of
    the damped and floored block, products and numbers those of the undamped one.
    """

    def power(self, y: Tensor, p: float) -> Tensor:
        """Returns the block to the power ``p`` times ``y``, without ``T/N``."""
        ...

    def solve(self, y: Tensor, lam: float) -> Tensor:
        """Returns ``(B + lam I)^-1 y`` for the block ``B`` with ``T/N``: one damping in all."""
        ...

    def in_use(self, y: Tensor) -> Tensor:
        """Returns the block in use times ``y``, without ``T/N``, to check an inverse by."""
        ...

    def product(self, y: Tensor, *, damped: bool = False) -> Tensor:
        """Returns the block times ``y``, with ``T/N`` and without a floor."""
        ...

    def trace(self) -> float:
        """Returns the trace, with ``T/N``."""
        ...

    def logdet(self) -> float:
        """Returns the log-determinant, with ``T/N``."""
        ...

    def top(self, k: int) -> Tensor:
        """Returns the ``min(k, dim)`` largest eigenvalues, with ``T/N``, descending."""
        ...


@dataclass(frozen=True)
class KroneckerBlock(Block):
    """``(T/N) G (x) A`` with both sides damped; of a layer without A, ``(T/N) G``.

    Attributes:
        factors: of the layer.
        G: the output side.
        A: the input side.
    """

    factors: LayerFactors
    G: Damped
    A: Damped | None

    @override
    def power(self, y: Tensor, p: float) -> Tensor:
        y = self.G.power(y, p)
        return y if self.A is None else self.A.power(y.T, p).T

    @override
    def product(self, y: Tensor, *, damped: bool = False) -> Tensor:
        y = self.G.factor.product(y) + (self.G.lam if damped else 0.0) * y
        if self.A is not None:
            y = self.A.factor.product(y.T).T + (self.A.lam if damped else 0.0) * y
        return y * self.factors.ratio

    @override
    def solve(self, y: Tensor, lam: float) -> Tensor:
        return ekfac.kronecker(self.factors, self.G.numerics).solve(y, lam)

    @override
    def in_use(self, y: Tensor) -> Tensor:
        y = self.G.in_use(y)
        return y if self.A is None else self.A.in_use(y.T).T

    @override
    def trace(self) -> float:
        return self.factors.trace()

    @override
    def logdet(self) -> float:
        # dim_A logdet G + dim_G logdet A + dim_G dim_A log(T/N)
        dim_g, dim_a = self.factors.G.dim, 1 if self.A is None else self.A.factor.dim
        value = dim_a * self.G.logdet()
        value += 0.0 if self.A is None else dim_g * self.A.logdet()
        return value + dim_g * dim_a * math.log(self.factors.ratio)

    @override
    def top(self, k: int) -> Tensor:
        return self.factors.top_eigenvalues(k)


class Inverses:
    """The blocks of all layers under one damping; what has been computed of them is kept.

    Attributes:
        factors: of the refresh, by layer name.
        seconds: spent on decomposing, by layer name.
        bases: EKFAC's eigenbases so far, by layer name.
        widened: names of the parameters whose result came in float32, with a warning.
    """

    def __init__(self, refresh: Refresh, settings: EngineSettings) -> None:
        self.refresh, self.settings = refresh, settings
        self.factors = refresh.factors
        self.widened: set[str] = set()
        self.seconds: dict[str, float] = defaultdict(float)
        self.bases: dict[str, ekfac.Eigenbasis] = {}
        self._damped: dict[tuple[int, float], Damped] = {}
        self._dampings: dict[str, tuple[float, float]] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)  # a copy's factors have other identities
        self._damped = {(id(x.factor), lam): x for (_, lam), x in self._damped.items()}

    def with_settings(self, settings: EngineSettings) -> Inverses:
        """Returns the same factors under another damping; their eigendecompositions stay."""
        other = Inverses(self.refresh, settings)
        other.seconds, other.widened = self.seconds, self.widened
        if (settings.kappa_max, settings.numerics) == (
            self.settings.kappa_max,
            self.settings.numerics,
        ):
            for factors in self.factors.values():
                lam_a, lam_g = other.dampings(factors)
                for key in ((id(factors.A), lam_a), (id(factors.G), lam_g)):
                    if key in self._damped:  # this side is damped as it was
                        other._damped[key] = self._damped[key]
        for name, basis in self.bases.items():
            lams = other.dampings(self.factors[name])
            other.bases[name] = basis.damped_by(lams, settings.kappa_max)
        return other

    def corrects(self, factors: LayerFactors) -> bool:
        """Says whether EKFAC corrects the eigenvalues of a layer."""
        return self.settings.ekfac and factors.correctable

    def G(self, factors: LayerFactors) -> Damped:
        """Returns a layer's damped output side."""
        return self._damped_of(factors.G, self.dampings(factors)[1])

    def A(self, factors: LayerFactors) -> Damped | None:
        """Returns a layer's damped input side; None for a norm layer."""
        if factors.A is None:
            return None
        return self._damped_of(factors.A, self.dampings(factors)[0])

    def dampings(self, factors: LayerFactors) -> tuple[float, float]:
        """Returns a layer's ``lam_A`` and ``lam_G``; may be collective the first time."""
        if factors.layer.name not in self._dampings:
            self._dampings[factors.layer.name] = dampings(factors, self.settings)
        return self._dampings[factors.layer.name]

    def sides(self, factors: LayerFactors) -> list[Damped]:
        """Returns a layer's damped sides: G, then A where it has one."""
        return [side for side in (self.G(factors), self.A(factors)) if side is not None]

    def basis(self, name: str) -> ekfac.Eigenbasis:
        """Returns a layer's eigenbasis under EKFAC; collective the first time."""
        if name not in self.bases:
            factors = self.factors[name]
            lams = self.dampings(factors)
            self.bases[name] = ekfac.prepared(factors, self.settings, lams)
        return self.bases[name]

    def block(self, factors: LayerFactors) -> Block:
        """Returns a layer's block, EKFAC's where that corrects it: where every product comes from.

        Collective the first time under EKFAC.
        """
        if self.corrects(factors):
            return self.basis(factors.layer.name)
        return KroneckerBlock(factors, self.G(factors), self.A(factors))

    def prepare(self, name: str) -> None:
        """Decomposes what is left of a layer."""
        start, factors = perf_counter(), self.factors[name]
        if self.corrects(factors):
            self.basis(name)
        else:
            for side in self.sides(factors):
                side.prepare()
        self.seconds[name] += perf_counter() - start

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
            spent = _decompose_together([side for _, side in pairs], communicator, eigen=eigen)
            for name, side in pairs:
                self.seconds[name] += spent.get(id(side), 0.0)

    def report(self, name: str, *, kappa: bool = True) -> LayerReport:
        """Returns what was done to a layer; ``kappa`` as in :meth:`Damped.report`."""
        factors, basis = self.factors[name], None
        sides = [s.report(kappa=kappa) for s in self.sides(factors)]
        if self.corrects(factors):
            basis = self.basis(name)
            # The floor is the pairs': no eigenvalue of a side is raised.
            sides = [
                replace(s, clipped=0, kappa_after=s.kappa_before, floor_applied=False)
                for s in sides
            ]
        a = sides[1] if len(sides) > 1 else None
        return LayerReport(factors, a, sides[0], self.seconds[name], self.settings.kappa_max, basis)

    def _damped_of(self, factor: Factor, lam: float) -> Damped:
        key = (id(factor), lam)
        if key not in self._damped:
            kappa = self.settings.kappa_max
            self._damped[key] = factor.damped(lam, kappa, self.settings.numerics)
        return self._damped[key]


def _decompose_together(
    sides: Sequence[Damped], communicator: Communicator, *, eigen: bool
) -> dict[int, float]:
    """Decomposes every side once over all ranks; collective.

    Args:
        sides: the same ones in the same order on every rank.
        communicator: of the ranks.
        eigen: eigendecompositions of the factors (EKFAC), whatever an inverse would need.

    Returns:
        Identity of a side -> seconds that its decomposition took on its owner.
    """
    # A rank whose device was full has let go of what the others still have: they do it once more.
    pending = communicator.all_gather_objects([side.pending(eigen=eigen) for side in sides])
    wanted = [s for s, left in zip(sides, zip(*pending, strict=True), strict=True) if any(left)]
    todo = list({id(side): side for side in wanted}.values())  # layers may share one
    # Forming a core is collective where it is sharded.
    owner = owners([len(side.form_core()) for side in todo], communicator.size)
    done: dict[str, Any] = {}
    error: str | None = None
    try:
        for index, side in enumerate(todo):
            if owner[index] == communicator.rank:
                start = perf_counter()
                side.prepare(eigen=eigen)
                seconds = perf_counter() - start
                tried, in_use = side.decomposition()
                shapes = [list(x.shape) for x in in_use]
                done[str(index)] = {"tried": tried, "shapes": shapes, "seconds": seconds}
    except Exception as failed:
        error = f"{type(failed).__name__}: {failed}"
    every = communicator.all_gather_objects({"error": error, "done": done})
    raise_others([each["error"] for each in every])
    for index, side in enumerate(todo):
        found = every[owner[index]]["done"][str(index)]
        # The owner too takes what was sent: the libraries return columns one after the other, what
        # arrives lies in rows, and products of the two differ in their last bit.
        if owner[index] == communicator.rank:
            in_use = side.decomposition()[1]
        else:
            in_use = [side.core.new_empty(shape) for shape in found["shapes"]]
        moved = [communicator.broadcast(x.contiguous(), owner[index]) for x in in_use]
        side.adopt(found["tried"], moved)
    return {id(x): every[owner[i]]["done"][str(i)]["seconds"] for i, x in enumerate(todo)}


def layer_line(report: LayerReport) -> str:
    """Returns what was done to a layer in one line, for the log."""
    f = report.factors
    parts = [f"layer {f.layer.name or '(the model)'}: T={f.tokens} {f.method} ({f.fisher})"]
    for side, r in (("A", report.A), ("G", report.G), ("EKFAC", report.pairs)):
        if r is None:
            continue
        text = f"clipped {r.clipped}/{r.dim}"
        if not math.isnan(r.kappa_before):
            text += f", kappa {r.kappa_before:.2e} -> {r.kappa_after:.2e}"
        if isinstance(r, FactorReport):
            text = f"lambda {r.damping:g}, {text}, {r.route}"
            text += f", jitter {r.jitter:.1e}" if r.jitter else ""
            text += f", fallback {r.fallback}" if r.fallback else ""
        else:
            text += " of pairs"
        parts.append(f"{side}: {text}")
    return "; ".join(parts)
