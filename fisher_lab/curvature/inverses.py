"""The damped factors of a refresh, decomposed when they are first wanted."""

from __future__ import annotations

from collections.abc import Mapping
from time import perf_counter

import torch

from . import ekfac
from .decompose import prepare_together
from .factors import Damped, Factor
from .layer_factors import LayerFactors
from .reduce import Communicator
from .settings import KFACSettings


class Inverses:
    """Both sides of every layer under one damping; what has been computed of them is kept.

    Args:
        factors: of the refresh, by layer name.
        settings: all choices.

    Attributes:
        seconds: spent on decomposing, by layer name.
        bases: EKFAC's eigenbases so far, by layer name.
    """

    def __init__(self, factors: Mapping[str, LayerFactors], settings: KFACSettings) -> None:
        self.factors, self.settings = factors, settings
        self.seconds: dict[str, float] = {}
        self.bases: dict[str, ekfac.Eigenbasis] = {}
        self._damped: dict[tuple[int, float], Damped] = {}

    def with_settings(self, settings: KFACSettings) -> Inverses:
        """Returns the same factors under another damping; their eigendecompositions stay."""
        other = Inverses(self.factors, settings)
        other.seconds = self.seconds
        return other

    def corrects(self, factors: LayerFactors) -> bool:
        """Says whether EKFAC corrects the eigenvalues of a layer."""
        return self.settings.ekfac and factors.tokens_g is not None

    def G(self, factors: LayerFactors) -> Damped:
        """Returns a layer's damped output side."""
        return self._damped_of(factors.G, self.settings.damping.G)

    def A(self, factors: LayerFactors) -> Damped | None:
        """Returns a layer's damped input side; None for a norm layer."""
        if factors.A is None:
            return None
        return self._damped_of(factors.A, self.settings.damping.A)

    def sides(self, factors: LayerFactors) -> list[Damped]:
        """Returns a layer's damped sides: G, then A where it has one."""
        return [side for side in (self.G(factors), self.A(factors)) if side is not None]

    def basis(self, name: str) -> ekfac.Eigenbasis:
        """Returns a layer's eigenbasis under EKFAC; collective the first time."""
        if name not in self.bases:
            s = self.settings
            self.bases[name] = ekfac.prepared(self.factors[name], s.damping, s.numerics)
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
            kappa = self.settings.damping.kappa_max
            self._damped[key] = factor.damped(lam, kappa, self.settings.numerics)
        return self._damped[key]

    def _spent(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
