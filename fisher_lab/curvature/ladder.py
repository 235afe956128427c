"""How good is K-FAC? The damped inverse of the exact Fisher matrix, and of what stands for it.

Every rung of the ladder is the answer to one question, ``(F + lam I)^-1 b`` with the same ``b``
(the mean gradient) and the same ``lam``, with a coarser ``F`` than the rung above: the exact one,
its blocks, EKFAC, K-FAC, its diagonal, a multiple of the identity. ``docs/math.md``, section 11.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from fisher_lab.config.kfac import KFACSettings
from fisher_lab.curvature.collectives import Alone, Progress, no_progress
from fisher_lab.curvature.errors import LayerError
from fisher_lab.curvature.evaluation_mode import isolated
from fisher_lab.curvature.kfac.engine import KFACNaturalGradient
from fisher_lab.curvature.kfac.inverses import Inverses
from fisher_lab.curvature.kfac.parts import base_of
from fisher_lab.curvature.kfac.precondition import powered, solved
from fisher_lab.curvature.kfac.refresh import Refresh
from fisher_lab.curvature.losses import LossFunction
from fisher_lab.curvature.spectra.conjugate_gradients import conjugate_gradients
from fisher_lab.curvature.spectra.operators import CurvatureOperator, in_float64
from fisher_lab.curvature.spectra.per_sample_gradients import PerSampleGradients
from fisher_lab.curvature.spectra.samples import draw_samples
from fisher_lab.curvature.wrappers import unwrap

Vectors = dict[str, Tensor]

EXACT, BLOCKS, SEQUENCE, TOKEN = "exact", "blocks", "ekfac_sequence", "ekfac_token"
EXPAND, REDUCE, DIAGONAL, IDENTITY = "kfac", "kfac_reduce", "diagonal", "identity"
SPLIT = "kfac_split"
RUNGS = {
    EXACT: "exact Fisher",
    BLOCKS: "block-diagonal",
    SEQUENCE: "EKFAC, sequences",
    TOKEN: "EKFAC, tokens",
    EXPAND: "K-FAC, expand",
    REDUCE: "K-FAC, reduce",
    DIAGONAL: "diagonal",
    IDENTITY: "identity",
    SPLIT: "K-FAC, own damping",
}
"""Rung -> its words. The last one is K-FAC as the run damps it, a damping on each side."""


@dataclass(frozen=True)
class Rung:
    """One approximation's answer.

    Attributes:
        solution: by parameter name, float64.
        seconds: that it took.
        products: with the exact matrix, or with blocks of it.
        residual: the largest relative residual of its systems, where they were solved by products.
    """

    solution: Vectors
    seconds: float
    products: int = 0
    residual: float = 0.0


@dataclass(frozen=True)
class Closeness:
    """How near an answer is to the exact one, over some parameters.

    Attributes:
        error: ``|x - x*| / |x*|``.
        cosine: of the angle between both.
        share: ``|x*|^2`` over these parameters, as a part of that over all.
    """

    error: float
    cosine: float
    share: float


@dataclass(frozen=True)
class Ladder:
    """All rungs.

    Attributes:
        rungs: by name, in the order of :data:`RUNGS`.
        left_out: rung -> why it is not there.
        layers: layer -> its parameters; layers that share one are together under the first's name.
        lam: the damping.
        mean_eigenvalue: ``tr F / n`` as K-FAC has it.
        operator: ``empirical`` or ``true``: which exact matrix.
        n_labels: ``N``.
    """

    rungs: Mapping[str, Rung]
    left_out: Mapping[str, str]
    layers: Mapping[str, tuple[str, ...]]
    lam: float
    mean_eigenvalue: float
    operator: str
    n_labels: int

    def closeness(self, rung: str, layer: str | None = None) -> Closeness:
        """Returns how near a rung is to the exact answer, over a layer or over all parameters."""
        names = (
            [n for x in self.layers.values() for n in x] if layer is None else self.layers[layer]
        )
        exact, found = self.rungs[EXACT].solution, self.rungs[rung].solution

        def inner(a: Vectors, b: Vectors, over: Sequence[str]) -> float:
            return sum(float((a[n] * b[n]).sum()) for n in over)

        difference = {n: found[n] - exact[n] for n in names}
        size, norm = inner(exact, exact, names), inner(found, found, names)
        scale = math.sqrt(size * norm)
        return Closeness(
            error=math.sqrt(inner(difference, difference, names) / size) if size else math.nan,
            cosine=inner(exact, found, names) / scale if scale else math.nan,
            share=size / inner(exact, exact, list(exact)),
        )


def ladder(
    model: nn.Module,
    batches: Sequence[Any],
    settings: KFACSettings,
    *,
    damping: float = 100.0,
    tol: float = 1e-10,
    max_products: int = 2000,
    seed: int = 0,
    loss_fn: LossFunction | None = None,
    progress: Progress = no_progress,
) -> Ladder:
    """Returns every rung's ``(F + lam I)^-1`` of the batches' mean gradient.

    All of it is computed in float64, on a copy of the model in ``eval()`` mode, over the parameters
    that K-FAC covers as a whole. The exact matrix is the empirical Fisher of the tokens' losses
    where ``settings.fisher`` is ``empirical``, else the one over the model's own distribution.

    Args:
        model: any module whose labelling is known, or any with a ``loss_fn``.
        batches: from which gradient, factors and the exact matrix are.
        settings: of K-FAC; dtypes, EKFAC and sharing are the ladder's.
        damping: ``lam`` in mean eigenvalues, ``tr F / n`` with K-FAC's trace.
        tol: relative residual at which conjugate gradients end.
        max_products: and after so many products, whatever the residual is.
        seed: of drawn labels.
        loss_fn: as for :func:`fisher_lab.curvature.losses.score`.
        progress: shows the rungs.

    Raises:
        LayerError: no parameter is covered as a whole.
        CurvatureError: see its subclasses.
    """
    wide, given = in_float64(unwrap(model), list(batches))
    with isolated(wide, seed=seed):
        made = _Maker(wide, given, settings, damping, tol, max_products, seed, loss_fn)
        rungs, left_out = {}, dict[str, str]()
        for name in progress(list(RUNGS), "rungs", len(RUNGS)):
            start = perf_counter()
            found = made.rung(name)
            if isinstance(found, str):
                left_out[name] = found
            else:
                rungs[name] = replace(found, seconds=perf_counter() - start)
    return Ladder(
        rungs, left_out, made.layers, made.lam, made.unit, made.operator, made.n_labels
    )  # fmt: skip


class _Maker:
    """What the rungs have in common; its arguments are those of :func:`ladder`."""

    def __init__(
        self,
        model: nn.Module,
        batches: list[Any],
        settings: KFACSettings,
        damping: float,
        tol: float,
        max_products: int,
        seed: int,
        loss_fn: LossFunction | None,
    ) -> None:
        self._model, self._batches, self._loss_fn, self._seed = model, batches, loss_fn, seed
        self._tol, self._most = tol, max_products
        self.operator = "empirical" if settings.fisher == "empirical" else "true"
        self._settings = replace(
            settings, ekfac=True, ekfac_unit="sequence", sharing="expand", core_dtype="float64",
            apply_dtype="float64", fisher_scale="exact", uncovered="passthrough", reduce="none",
        )  # fmt: skip
        engine = self._collected("expand")
        self._last, self._engine_settings = engine.last, engine.settings
        own = engine.own_gradients(model)
        missed = set(engine.coverage.by_parameter)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._parameters = {n: p for n, p in trained.items() if n not in missed}
        if not self._parameters:
            raise LayerError("ladder: no parameter is covered by K-FAC as a whole")
        self.gradient = {n: own[n] for n in self._parameters}
        self.layers = _layers(self._last, self._parameters)
        plain = self._inverses(self._last, ekfac=False)
        trace = sum(plain.block(f).trace() for f in self._last.factors.values())
        self.unit = trace / sum(p.numel() for p in self._parameters.values())
        self.lam = damping * self.unit
        self.n_labels = engine.labels.counted

    def _collected(self, sharing: str) -> KFACNaturalGradient:
        settings = replace(self._settings, sharing=sharing)
        engine = KFACNaturalGradient(
            settings, seed=self._seed, track_diagonal=False, communicator=Alone()
        )
        engine.collect_kfac_factors(self._model, self._batches, self._loss_fn, keep_gradient=True)
        return engine

    def _inverses(self, last: Refresh, *, ekfac: bool) -> Inverses:
        return Inverses(last, replace(self._engine_settings, ekfac=ekfac))

    def rung(self, name: str) -> Rung | str:
        """Returns a rung, or why it is left out."""
        make: dict[str, Callable[[], Rung | str]] = {
            EXACT: lambda: self._solved_by_products([list(self._parameters)]),
            BLOCKS: lambda: self._solved_by_products([list(x) for x in self.layers.values()]),
            SEQUENCE: lambda: self._approximate(self._last, ekfac=True),
            TOKEN: lambda: self._approximate(self._by_tokens(), ekfac=True),
            EXPAND: lambda: self._approximate(self._last, ekfac=False),
            REDUCE: lambda: self._approximate(self._collected("reduce").last, ekfac=False),
            DIAGONAL: self._diagonal,
            IDENTITY: lambda: Rung(self._scaled(1.0 / (self.unit + self.lam)), 0.0),
            SPLIT: self._split,
        }
        return make[name]()

    def _by_tokens(self) -> Refresh:
        """The same factors, whose moments are those of tokens."""
        factors = self._last.factors.items()
        return replace(self._last, factors={n: replace(f, sequences=None) for n, f in factors})

    def _scaled(self, factor: float) -> Vectors:
        return {name: factor * value for name, value in self.gradient.items()}

    def _approximate(self, last: Refresh, *, ekfac: bool) -> Rung | str:
        missing = set(self._last.factors) - set(last.factors)
        if missing:
            return f"it has no factors for {sorted(missing)[0]}"
        return Rung(solved(self._inverses(last, ekfac=ekfac), self.gradient, self.lam), 0.0)

    def _split(self) -> Rung:
        found, _ = powered(self._inverses(self._last, ekfac=False), self.gradient, -1.0)
        return Rung(found, 0.0)

    def _diagonal(self) -> Rung | str:
        if self.operator != "empirical":
            return "the diagonal over the model's own distribution is not computed"
        samples = draw_samples(
            self._model, self._batches, unit="token", n_samples=None, seed=0, loss_fn=self._loss_fn
        )
        squares = {n: torch.zeros_like(p).flatten() for n, p in self._parameters.items()}
        rows = PerSampleGradients(self._model, samples, self._parameters, loss_fn=self._loss_fn)
        for chunk in rows:
            for name, total in squares.items():
                found = chunk.rows(name)
                if found is not None:
                    total += found.square().sum(dim=0)
        scale = {n: s.view_as(self.gradient[n]) / samples.n + self.lam for n, s in squares.items()}
        return Rung({n: g / scale[n] for n, g in self.gradient.items()}, 0.0)

    def _solved_by_products(self, parts: Sequence[Sequence[str]]) -> Rung:
        """Solves each part's system by conjugate gradients, EKFAC being the preconditioner."""
        inverses = self._inverses(self._by_tokens(), ekfac=True)
        solution, products, residual = {}, 0, 0.0
        for names in parts:
            parameters = {n: self._parameters[n] for n in names}
            operator = CurvatureOperator(
                self.operator, self._model, self._batches, parameters, loss_fn=self._loss_fn
            )
            found = conjugate_gradients(
                operator,
                _flat(self.gradient, names),
                lam=self.lam,
                tol=self._tol,
                max_products=self._most,
                precondition=partial(_precondition, inverses, operator, names, self.lam),
            )
            solution |= operator.unflatten(found.x)
            products += found.n_products
            residual = max(residual, found.residual)
        return Rung(solution, 0.0, products, residual)


def _precondition(
    inverses: Inverses, operator: CurvatureOperator, names: Sequence[str], lam: float, v: Tensor
) -> Tensor:
    return _flat(solved(inverses, operator.unflatten(v), lam), names)


def _flat(named: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    return torch.cat([named[n].flatten() for n in names])


def _layers(last: Refresh, parameters: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Layer -> its parameters, in the model's order; those that share one are one block."""
    groups: list[tuple[str, set[str]]] = []
    for name, factors in last.factors.items():
        own = {base_of(n) for n in factors.layer.names} & set(parameters)
        same = [group for group in groups if group[1] & own]
        for group in same:
            own |= group[1]
            groups.remove(group)
        if own:
            groups.append((same[0][0] if same else name, own))

    def ordered(own: set[str]) -> Iterator[str]:
        return (n for n in parameters if n in own)

    return {name: tuple(ordered(own)) for name, own in groups}
