"""The K-FAC engine: capture -> policy -> factors -> products.

Martens & Grosse 2015 with the expand convention of Eschenhagen et al. 2023 for shared weights;
``docs/math.md`` fixes every scale. The engine holds the factors of its last refresh and applies
them: natural gradient, any power, Fisher-vector products, trace, log-determinant, spectrum.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from . import ekfac, state
from .build import FactorBuilder
from .capture import Capture, TokenMasks
from .decompose import prepare_together, same_vectors
from .errors import BatchError, CurvatureError, FactorFileError, LayerError, LossError
from .factors import Damped, Factor, FactorReport, GramFactor
from .layer_factors import Built, LayerFactors
from .layers import Kind, Layer, Layers, discover
from .linalg import all_finite, full_precision
from .losses import (
    IGNORE_INDEX,
    CrossEntropy,
    LossFunction,
    SummedLoss,
    compute_loss,
    device_of,
    labels_of,
    logits_of,
    prepare,
    scorer,
    shift_of,
    sum_of,
    unwrap,
)
from .policy import check
from .reduce import Alone, Communicator, together
from .settings import Damping, KFACSettings, SettingError
from .storage import check_device_supports

log = logging.getLogger(__name__)

STORAGE_ERROR_WARNING = 1e-2
"""Relative error of the natural gradient past which rounding the columns is warned about."""

STORAGE_PROBES = 8
"""Columns on which that error is estimated."""

Progress = Callable[[Iterable[Any], str, int | None], Iterable[Any]]
"""``progress(items, label, total)`` yields the items; how it shows them is the caller's affair."""


def no_progress(items: Iterable[Any], label: str, total: int | None) -> Iterable[Any]:
    """Shows nothing."""
    return items


@dataclass(frozen=True)
class LayerReport:
    """What a refresh did to one layer: a row of ``layers.csv``.

    Attributes:
        factors: the layer's factors.
        A: report of the input side, None for norm layers.
        G: report of the output side.
        seconds: spent on decomposing both sides.
        kappa_max: largest condition number that the floor allows, None for no floor.
        pairs: what EKFAC did to the eigenvalues of the layer's block, where it is in use: its
            floor is one on the pairs, and the sides are as they come then.
    """

    factors: LayerFactors
    A: FactorReport | None
    G: FactorReport
    seconds: float
    kappa_max: float | None = None
    pairs: PairsReport | None = None


@dataclass(frozen=True)
class PairsReport:
    """What EKFAC's damping and floor did to the pairs of eigenvectors of a layer.

    Attributes:
        dim: their number, outputs times inputs with the bias column.
        clipped: how many the floor raised.
        kappa_before: condition number of the damped eigenvalues.
        kappa_after: condition number of those in use.
    """

    dim: int
    clipped: int
    kappa_before: float
    kappa_after: float


class KFACEngine:
    """Collects Kronecker factors and applies them.

    Args:
        settings: all choices.
        progress: how loops that take long are shown.
        communicator: of the ranks that join their tokens; None for this process alone. Unless
            ``settings.reduce`` is ``none``, methods that form, decompose, apply or export factors
            are collective.
    """

    def __init__(
        self,
        settings: KFACSettings,
        progress: Progress = no_progress,
        communicator: Communicator | None = None,
    ) -> None:
        self.settings = settings
        self._communicator = communicator
        self.progress = progress
        self.factors: dict[str, LayerFactors] = {}
        self.skipped: dict[str, str] = {}
        self.uncovered: list[str] = []
        self.own_uncovered: dict[str, Tensor] = {}
        self.diagonal: dict[str, Tensor] = {}
        self.fisher = settings.fisher.kind
        self.rank_counts: tuple[dict[str, int], ...] = ()
        self.refreshes = 0
        self.capturing: Capture | None = None
        self._ever_called: set[str] = set()
        self._damped: dict[tuple[int, float, float | None], Damped] = {}
        self._bases: dict[str, ekfac.Eigenbasis] = {}
        self._seconds: dict[str, float] = {}
        self._told: set[str] = set()
        self._widened: set[str] = set()

    @property
    def communicator(self) -> Communicator:
        """The ranks whose tokens are joined; one process alone with ``reduce=none``."""
        alone = self._communicator is None or self.settings.reduce == "none"
        return Alone() if alone else self._communicator  # type: ignore[return-value]

    @communicator.setter
    def communicator(self, communicator: Communicator | None) -> None:
        self._communicator = communicator

    # ---- collecting --------------------------------------------------------------------------

    def layers_of(self, model: nn.Module) -> Layers:
        """Returns the model's K-FAC layers, checked against the policy before any work.

        Raises:
            LayerError: no supported layer, or one whose factors must not be formed.
            SettingError: a setting does not go with the model.
        """
        layers = discover(model, self.settings.coverage)
        for layer in layers.layers.values():
            check(self.settings.policy, layer)
            if self.settings.ekfac and layer.partner is not None:
                raise SettingError(
                    f"tied: 'sum' with ekfac, and layer {layer.name} is tied: pooled factors have "
                    "no common eigenbasis; allowed with ekfac: head, embedding"
                )
        check_device_supports(self.settings.storage, device_of(model))
        return layers

    @contextmanager
    def capture(self, model: nn.Module) -> Iterator[Capture]:
        """Records a forward pass that the caller makes; the next refresh takes it.

        Args:
            model: the model whose forward pass runs inside the ``with`` block.
        """
        recording = Capture(model, self.layers_of(model))
        earlier, self.capturing = self.capturing, None
        if earlier is not None:
            earlier.close()
        with recording, uncompiled(model):
            yield recording
        self.capturing = recording

    def collect(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        loss: Tensor | LossFunction | None = None,
        *,
        n_labels: int | None = None,
        reduction: str = "mean",
        keep_gradient: bool = False,
        total: int | None = None,
    ) -> None:
        """Makes new factors from batches; one call is one refresh.

        Args:
            model: the model, in whatever mode it is.
            batches: the batches.
            loss: a loss tensor of a captured forward pass, a loss function, or None.
            n_labels: labels behind a mean loss that the caller reduced.
            reduction: ``mean`` or ``sum``: how the caller reduced it.
            keep_gradient: also form the factors' own mean gradient (``own_gradients``).
            total: number of batches, for the progress bar.

        Raises:
            CurvatureError: see the subclasses; the factors from before stay as they are.
            SettingError: the settings and the model do not go together.
        """
        captured, self.capturing = self.capturing, None
        try:
            self._collect(model, batches, loss, captured, n_labels, reduction, keep_gradient, total)
        finally:
            if captured is not None:
                captured.close()

    def _collect(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        loss: Tensor | LossFunction | None,
        captured: Capture | None,
        n_labels: int | None,
        reduction: str,
        keep_gradient: bool,
        total: int | None,
    ) -> None:
        given = isinstance(loss, Tensor)
        if given and captured is None:
            raise LossError(
                "loss: a tensor was given but no forward pass was captured; run it inside "
                "'with kfac.capture(model):', or give a loss function"
            )
        layers = captured.layers if given and captured else self.layers_of(model)
        builder = FactorBuilder(
            model,
            layers,
            self.settings,
            keep_gradient=keep_gradient,
            communicator=self.communicator,
        )

        def add_all() -> None:
            if not given and self.communicator.size == 1 and n_labels is None:
                _check_labels(model, batches, loss)
            for index, batch in enumerate(self.progress(batches, "K-FAC factors", total)):
                prepared = prepare(model, batch)
                if not given:
                    function = None if loss is None or isinstance(loss, Tensor) else loss
                    self._add(builder, model, layers, prepared, function, n_labels, reduction)
                    continue
                if index > 0:
                    raise LossError("loss: one tensor for several batches; allowed: one batch")
                assert isinstance(loss, Tensor)
                assert captured is not None
                summed = _summed(model, captured, loss, batch, n_labels, reduction)
                summed = _with_logits(summed, model, captured, prepared)
                builder.add(captured, prepared, summed)

        together(self.communicator, add_all)
        self._take(builder.finish(), layers)

    def _add(
        self,
        builder: FactorBuilder,
        model: nn.Module,
        layers: Layers,
        batch: Any,
        function: LossFunction | None,
        n_labels: int | None,
        reduction: str,
    ) -> None:
        inner = unwrap(model)
        if self.communicator.size == 1:
            TokenMasks.of(inner, batch)  # refused before a pass is spent on it
        recording = Capture(inner, layers)
        with torch.enable_grad(), uncompiled(inner), recording:
            summed = compute_loss(inner, batch, function, n_labels=n_labels, reduction=reduction)
        try:
            builder.add(recording, batch, summed)
        finally:
            recording.close()

    def _take(self, built: Built, layers: Layers) -> None:
        """Takes over what a builder made; nothing of the refresh before stays."""
        for name in layers.layers:
            if name not in built.called and name not in self._ever_called:
                raise LayerError(
                    f"layer {name}: expected, but never called in the forward pass; exclude it "
                    "(or, in a compiled model, run the uncompiled one: model._orig_mod)"
                )
        self._ever_called |= built.called
        self.skipped = {**layers.skipped, **built.skipped}
        self.own_uncovered, self.diagonal = built.gradients, built.diagonal
        self.fisher = built.fisher
        self.rank_counts = built.rank_counts
        self._replace(built.factors)
        for factors in self.factors.values():
            self._measure_storage(factors)

    def _replace(self, factors: dict[str, LayerFactors]) -> None:
        """New factors: every inverse of the old ones goes, whichever path it came from."""
        self.factors = factors
        self._damped, self._bases, self._seconds = {}, {}, {}
        self._told, self._widened = set(), set()
        self.refreshes += 1

    def forget(self) -> None:
        """Drops the factors."""
        self._replace({})

    # ---- files -------------------------------------------------------------------------------

    def export(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Returns the factors as tensors and a JSON-able header; see :mod:`.state`."""
        self.check_model(model)
        tensors, header = state.export(self.factors, state.fingerprint(model))
        rest = {"own": self.own_uncovered, "diagonal": self.diagonal}
        for key, named in rest.items():
            for name, value in named.items():
                tensors[f"{state.UNCOVERED}/{key}/{name}"] = value.detach().contiguous().clone()
        header |= {
            "fisher": self.fisher,
            "uncovered": self.settings.coverage.uncovered,
            "skipped": self.skipped,
            "rank_counts": list(self.rank_counts),
            **{f"uncovered_{key}": sorted(named) for key, named in rest.items()},
        }
        return tensors, header

    def restore(
        self, tensors: Mapping[str, Tensor], header: Mapping[str, Any], model: nn.Module
    ) -> None:
        """Takes factors that :meth:`export` gave; nothing changes where they do not match.

        Raises:
            FactorFileError: another version, incomplete, or made with settings that leave out
                what this engine's need.
            LayerError: factors of another model.
        """
        layers = self.layers_of(model)
        found = state.restore(
            tensors, header, model, layers, self.settings.storage, self.communicator
        )
        self._check_restored(found, header)
        own, diagonal = (
            state.uncovered(tensors, header, model, key) for key in ("own", "diagonal")
        )
        with state.reading():
            fisher, skipped = str(header["fisher"]), dict(header["skipped"])
            rank_counts = tuple(dict(counts) for counts in header["rank_counts"])
        self._replace(found)
        self._ever_called |= set(self.factors)
        self.own_uncovered, self.diagonal = own, diagonal
        self.fisher, self.skipped, self.rank_counts = fisher, skipped, rank_counts

    def _check_restored(self, found: Mapping[str, LayerFactors], header: Mapping[str, Any]) -> None:
        """Checks that factors hold what these settings need of them.

        Raises:
            FactorFileError: EKFAC without the tokens, or no diagonal of what is uncovered.
        """
        for name, factors in found.items():
            kept = factors.tokens_g is not None or factors.method in ("norm", "true_head")
            if self.settings.ekfac and not kept:
                raise FactorFileError(
                    f"factors: layer {name} was collected without ekfac; allowed: ekfac=False, or "
                    "factors of an engine with ekfac=True"
                )
        wanted = self.settings.coverage.uncovered
        if wanted == "diagonal" and header.get("uncovered") != "diagonal":
            raise FactorFileError(
                f"factors: collected with uncovered={header.get('uncovered')!r}; allowed for "
                "uncovered='diagonal': factors of an engine with it"
            )

    @full_precision()
    def _measure_storage(self, factors: LayerFactors) -> None:
        """Relative error of ``G^-1 dW`` on the factors' own gradient that rounding costs.

        Estimated on ``dW Z`` with a few seeded normal columns ``Z``: the whole of ``dW`` would
        cost as much as applying the inverse, twice.
        """
        exact, g = factors.exact, factors.G
        factors.exact = None
        if exact is None or not isinstance(g, GramFactor) or factors.a is None:
            return
        numerics, damping = self.settings.numerics, self.settings.damping
        if damping.G <= 0 or g.n_columns != factors.tokens:
            return
        if factors.layer.kind is Kind.EMBEDDING:
            return
        a = factors.a.to(numerics.apply_dtype)
        generator = torch.Generator().manual_seed(0)
        probes = a @ torch.randn(a.shape[1], STORAGE_PROBES, generator=generator).to(a)
        if factors.spread is not None:
            probes = factors.spread.gather(probes)
        probes = probes.to(exact.device)
        dw = exact.columns.transposed_times(probes)
        reference = exact.damped(damping.G, damping.kappa_max, numerics).power(dw, -1)
        stored = g.damped(damping.G, damping.kappa_max, numerics).power(dw, -1)
        norm = float(reference.norm())
        factors.storage_error = float((stored - reference).norm()) / norm if norm else 0.0
        if factors.storage_error > STORAGE_ERROR_WARNING:
            log.warning(
                "layer %s: storing its columns in %s changes the natural gradient by %.1e "
                "(relative, at damping %g)",
                factors.layer.name, g.columns.data.dtype, factors.storage_error, damping.G,
            )  # fmt: skip

    # ---- decomposing -------------------------------------------------------------------------

    @full_precision()
    def prepare_inverses(self) -> None:
        """Decomposes every factor now, so that an application finds it done.

        At INFO, what was done is logged: one line a layer and refresh.
        """
        if self.communicator.size > 1:
            self._prepare_together()
        items = list(self.factors.items())
        for name, factors in self.progress(items, "decompositions", len(items)):
            start = perf_counter()
            if self.settings.ekfac and factors.tokens_g is not None:
                self._basis(name)
            else:
                for side in self._sides(factors):
                    side.prepare()  # type: ignore[attr-defined]
            self._seconds[name] = self._seconds.get(name, 0.0) + perf_counter() - start
        self._tell(self.factors)

    def _tell(self, names: Iterable[str]) -> None:
        """Logs what was done to layers that have been decomposed; nothing is computed for it."""
        if not log.isEnabledFor(logging.INFO):
            return
        for name in names:
            if name not in self._told:
                self._told.add(name)
                log.info("%s", layer_line(self._report(name, kappa=False)))

    def _prepare_together(self) -> None:
        """Spreads the decompositions over the ranks; what then remains is done by each."""
        corrected = self.settings.ekfac
        for eigen in (False, True):
            pairs = [
                (name, side)
                for name, factors in self.factors.items()
                if (corrected and factors.tokens_g is not None) == eigen
                for side in self._sides(factors)
            ]
            seconds = prepare_together([s for _, s in pairs], self.communicator, eigen=eigen)
            for (name, _), spent in zip(pairs, seconds, strict=True):
                self._seconds[name] = self._seconds.get(name, 0.0) + spent

    def _sides(self, factors: LayerFactors) -> list[Damped]:
        d = self.settings.damping
        sides = [self._damped_of(factors.G, d.G)]
        return sides if factors.A is None else [*sides, self._damped_of(factors.A, d.A)]

    def _damped_of(self, factor: Factor, lam: float, *, floor: bool = True) -> Damped:
        kappa = self.settings.damping.kappa_max if floor else None
        key = (id(factor), lam, kappa)
        if key not in self._damped:
            self._damped[key] = factor.damped(lam, kappa, self.settings.numerics)
        return self._damped[key]

    def _basis(self, name: str) -> ekfac.Eigenbasis:
        if name not in self._bases:
            s = self.settings
            self._bases[name] = ekfac.prepared(self.factors[name], s.damping, s.numerics)
        return self._bases[name]

    # ---- applying ----------------------------------------------------------------------------

    def natural_gradient(
        self, gradients: Mapping[str, Tensor] | None, model: nn.Module
    ) -> dict[str, Tensor]:
        """Returns ``G^-1 dW A^-1`` for every covered parameter; the rest as it is.

        Args:
            gradients: parameter name -> gradient of the mean loss; None takes the factors' own
                (collected with ``keep_gradient``), by push-through where that holds.
            model: the model that the factors belong to.

        Raises:
            LayerError: factors and model do not match.
            CurvatureError: there are no factors yet, or no own gradient.
        """
        return self.powered(gradients, model, -1.0)

    @full_precision()
    def powered(
        self, gradients: Mapping[str, Tensor] | None, model: nn.Module, power: float
    ) -> dict[str, Tensor]:
        """Returns ``G^p dW A^p`` with damping and clipping; see :meth:`natural_gradient`."""
        d = self.settings.damping
        if power < 0 and (d.A <= 0 or d.G <= 0):
            raise SettingError(
                f"damping: A {d.A:g}, G {d.G:g} with power {power:g}; allowed: above 0 for "
                "powers < 0"
            )
        if power == -1 and self.communicator.size > 1:
            self._prepare_together()
        if gradients is None:
            result = self._apply_own(model, power)
        else:
            result = self._apply(
                gradients, model, lambda f, y: self._powered_layer(f, y, power), power
            )
        if power == -1:
            here = result if gradients is None else gradients
            self._tell(n for n, f in self.factors.items() if f.layer.weight in here)
        return result

    @full_precision()
    def fisher_vector(
        self, vectors: Mapping[str, Tensor], model: nn.Module, *, damped: bool = False
    ) -> dict[str, Tensor]:
        """Returns ``(T/N) G V A``: no floor, and no damping unless asked for.

        Args:
            vectors: parameter name -> vector of the parameter's shape.
            model: the model that the factors belong to.
            damped: whether ``(T/N) (G + lam_G I) V (A + lam_A I)`` is wanted.
        """

        def product(factors: LayerFactors, y: Tensor) -> Tensor:
            left, right = (self.settings.damping.G, self.settings.damping.A) if damped else (0, 0)
            y = factors.G.product(y) + left * y
            if factors.A is not None:
                y = factors.A.product(y.T).T + right * y
            return y * factors.ratio

        return self._apply(vectors, model, product, None)

    def own_gradients(self, model: nn.Module) -> dict[str, Tensor]:
        """Returns the factors' own mean gradient, by parameter name, in the core dtype.

        Raises:
            CurvatureError: the factors were collected without ``keep_gradient``.
        """
        self.check_model(model)
        result: dict[str, Tensor] = dict(self.own_uncovered)
        for factors in self.factors.values():
            if factors.own is None:
                raise CurvatureError(
                    "own gradient: not kept in the last refresh; collect with keep_gradient=True"
                )
            self._put(result, factors.layer, factors.own, None)
        return result

    def drop_own_gradients(self) -> None:
        """Frees the own gradients; the factors stay."""
        self.own_uncovered = {}
        for factors in self.factors.values():
            factors.own = None

    def _apply_own(self, model: nn.Module, power: float) -> dict[str, Tensor]:
        own = self.own_gradients(model)
        result = {n: self._uncovered(n, g, power) for n, g in self.own_uncovered.items()}
        self.uncovered = sorted(self.own_uncovered)
        for name, factors in self.factors.items():
            if factors.push and not self.settings.ekfac:
                y = self._push_through(factors, power)
            else:
                assert factors.own is not None
                y = factors.own.to(self.settings.numerics.apply_dtype)
                y = self._powered_layer(factors, y, power)
            self._finite(name, y)
            self._put(result, factors.layer, y, own)
        return result

    def _push_through(self, factors: LayerFactors, power: float) -> Tensor:
        """``G^p U B A^p`` without forming ``U B`` (``docs/math.md``, section 3)."""
        assert factors.a is not None
        assert factors.A is not None
        layer, damping = factors.layer, self.settings.damping
        dtype = self.settings.numerics.apply_dtype
        if layer.kind is Kind.EMBEDDING:
            assert factors.own is not None
            y = factors.own.to(dtype)
            return self._powered_layer(factors, y, power)
        b = factors.a.to(dtype)
        if layer.augmented:
            b = torch.cat([b, b.new_ones(b.shape[0], 1)], dim=1)
        b = self._damped_of(factors.A, damping.A).power(b.T, power).T / factors.n_labels
        if factors.spread is not None:
            b = factors.spread.gather(b)
        side: Any = self._damped_of(factors.G, damping.G)
        y = side.push_through(b, power)
        return y * self._scale(factors, power)

    def _apply(
        self,
        vectors: Mapping[str, Tensor],
        model: nn.Module,
        function: Callable[[LayerFactors, Tensor], Tensor],
        power: float | None,
    ) -> dict[str, Tensor]:
        self.check_model(model)
        known = dict(unwrap(model).named_parameters())
        for name in vectors:
            if name not in known:
                raise LayerError(
                    f"gradient {name}: the model has no such parameter; allowed: the names in "
                    "named_parameters()"
                )
            if not isinstance(vectors[name], Tensor):
                raise LayerError(
                    f"gradient {name}: {vectors[name]!r}; allowed: a tensor (leave the name out "
                    "where there is no gradient)"
                )
        if self.communicator.size > 1 and self.settings.reduce == "gram":
            same_vectors(self.communicator, list(vectors.values()))
        dtype = self.settings.numerics.apply_dtype
        result: dict[str, Tensor] = {}
        for name, factors in self.factors.items():
            layer = factors.layer
            if layer.weight not in vectors:
                continue
            self._check_shapes(layer, vectors)
            y = function(factors, self._matrix(layer, vectors, dtype))
            self._finite(name, y)
            self._put(result, layer, y, vectors)
        self.uncovered = [name for name in vectors if name not in result]
        for name in self.uncovered:
            vector = vectors[name]
            result[name] = vector if power is None else self._uncovered(name, vector, power)
        return {name: result[name] for name in vectors}

    def _uncovered(self, name: str, vector: Tensor, power: float) -> Tensor:
        diagonal = self.diagonal.get(name)
        if self.settings.coverage.uncovered != "diagonal" or diagonal is None:
            return vector
        used = (diagonal + self.settings.damping.G).to(self.settings.numerics.apply_dtype)
        return self._narrowed(name, vector.to(used) * used.pow(power), vector)

    def _powered_layer(self, factors: LayerFactors, y: Tensor, power: float) -> Tensor:
        if self.settings.ekfac and factors.tokens_g is not None:
            return ekfac.apply(self._basis(factors.layer.name), y, power) * self._scale(
                factors, power
            )
        y = self._damped_of(factors.G, self.settings.damping.G).power(y, power)
        if factors.A is not None:
            y = self._damped_of(factors.A, self.settings.damping.A).power(y.T, power).T
        return y * self._scale(factors, power)

    def _scale(self, factors: LayerFactors, power: float) -> float:
        return factors.ratio**power if self.settings.fisher.scale == "exact" else 1.0

    def _finite(self, name: str, y: Tensor) -> None:
        if not all_finite(y):
            raise CurvatureError(
                f"layer {name}: the result is not finite at damping "
                f"A {self.settings.damping.A:g}, G {self.settings.damping.G:g}; allowed: finite "
                "gradients, a larger damping, core_dtype=float64"
            )

    # ---- matrices and parameters -------------------------------------------------------------

    def check_model(self, model: nn.Module) -> None:
        """Checks that the factors belong to a model.

        Raises:
            CurvatureError: there are no factors yet.
            LayerError: a layer is missing, or has other sizes; names the layer and both sides.
        """
        if not self.factors:
            raise CurvatureError("factors: none collected yet; call collect_kfac_factors first")
        modules = dict(unwrap(model).named_modules())
        parameters = dict(unwrap(model).named_parameters())
        for name, factors in self.factors.items():
            layer = factors.layer
            if name not in modules or layer.weight not in parameters:
                raise LayerError(
                    f"layer {name}: the factors have it ({layer.n_out} x {layer.n_in}), the model "
                    "does not"
                )
            shape = tuple(parameters[layer.weight].shape)
            expected = _stored_shape(layer)
            if shape != expected:
                raise LayerError(
                    f"layer {name}: factors for a weight of shape {expected}, the model's has "
                    f"{shape}"
                )
            has_bias = getattr(modules[name], "bias", None) is not None
            if has_bias != (layer.bias is not None):
                raise LayerError(
                    f"layer {name}: factors {'with' if layer.bias else 'without'} a bias column, "
                    f"the model's layer {'has a' if has_bias else 'has no'} bias"
                )

    def _check_shapes(self, layer: Layer, vectors: Mapping[str, Tensor]) -> None:
        given = tuple(vectors[layer.weight].shape)
        if given != _stored_shape(layer):
            raise LayerError(
                f"layer {layer.name}: the gradient of {layer.weight} has shape {given}, the "
                f"factors are for {_stored_shape(layer)}"
            )
        bias = vectors.get(layer.bias) if layer.bias is not None else None
        if bias is not None and tuple(bias.shape) != (layer.n_out,):
            raise LayerError(
                f"layer {layer.name}: the gradient of {layer.bias} has shape "
                f"{tuple(bias.shape)}, the factors are for {(layer.n_out,)}"
            )

    def _matrix(self, layer: Layer, vectors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        weight = vectors[layer.weight]
        bias = vectors.get(layer.bias) if layer.bias is not None else None
        if layer.kind is not Kind.NORM:
            return layer.to_matrix(weight, bias, dtype)
        parts = [weight]
        if layer.bias is not None:
            parts.append(torch.zeros_like(weight) if bias is None else bias)
        return torch.cat([p.detach().to(dtype) for p in parts])[:, None]

    def _put(
        self,
        result: dict[str, Tensor],
        layer: Layer,
        y: Tensor,
        like: Mapping[str, Tensor] | None,
    ) -> None:
        """Writes a layer's matrix into ``result`` as parameters; no bias is invented."""
        if layer.kind is Kind.NORM:
            weight, bias = y[: layer.n_out, 0], y[layer.n_out :, 0]
        else:
            weight, bias = layer.from_matrix(y)
        pairs = [(layer.weight, weight)]
        if layer.bias is not None and bias is not None:
            pairs.append((layer.bias, bias))
        for name, value in pairs:
            if like is None:
                result[name] = value
            elif name in like:
                result[name] = self._narrowed(name, value, like[name])

    def _narrowed(self, name: str, value: Tensor, like: Tensor) -> Tensor:
        """A result as its gradient was: dtype, device; in float32 where float16 cannot hold it.

        Raises:
            CurvatureError: float32 cannot hold it either; names the parameter.
        """
        narrow = value.to(like).contiguous()
        if value.dtype == like.dtype or all_finite(narrow):
            return narrow
        wide = value.to(device=like.device, dtype=torch.float32).contiguous()
        largest = float(value.abs().max())
        if not all_finite(wide):
            raise CurvatureError(
                f"parameter {name}: the result is beyond {like.dtype} and float32 (largest "
                f"{largest:.1e}); allowed: gradients in float64, a larger damping"
            )
        if name not in self._widened:
            self._widened.add(name)
            log.warning(
                "parameter %s: the result is beyond %s (largest %.1e); it comes in float32",
                name, like.dtype, largest,
            )  # fmt: skip
        return wide

    # ---- what comes for nothing --------------------------------------------------------------

    @full_precision()
    def reports(self) -> list[LayerReport]:
        """Returns what was done to each layer, in the model's order."""
        return [self._report(name) for name in self.factors]

    def _report(self, name: str, *, kappa: bool = True) -> LayerReport:
        factors, settings = self.factors[name], self.settings
        sides = [s.report(kappa=kappa) for s in self._sides(factors)]
        pairs = None
        if settings.ekfac and factors.tokens_g is not None:
            basis = self._basis(name)
            n = factors.layer.n_out * factors.layer.dim_a
            pairs = PairsReport(n, basis.clipped, basis.kappa_before, basis.kappa_after)
            # The floor is the pairs': no eigenvalue of a side is raised.
            sides = [
                replace(s, clipped=0, kappa_after=s.kappa_before, floor_applied=False)
                for s in sides
            ]
        a = sides[1] if len(sides) > 1 else None
        seconds = self._seconds.get(name, 0.0)
        return LayerReport(factors, a, sides[0], seconds, settings.damping.kappa_max, pairs)

    @full_precision()
    def trace(self) -> dict[str, float]:
        """Returns the trace ``(T/N) tr(G) tr(A)`` of each layer's block."""
        return {
            name: f.ratio * f.G.trace() * (1.0 if f.A is None else f.A.trace())
            for name, f in self.factors.items()
        }

    @full_precision()
    def logdet(self) -> dict[str, float]:
        """Returns the log-determinant of each layer's block, with the factors in use.

        For ``(T/N) G (x) A`` that is ``dim_A logdet G + dim_G logdet A + dim_G dim_A log(T/N)``.
        """
        result = {}
        for name, f in self.factors.items():
            sides = [s.logdet() for s in self._sides(f)]
            dim_a = 1 if f.A is None else f.A.dim
            value = dim_a * sides[0] + (0.0 if f.A is None else f.G.dim * sides[1])
            result[name] = value + f.G.dim * dim_a * float(torch.tensor(f.ratio).double().log())
        return result

    @full_precision()
    def top_eigenvalues(self, k: int) -> dict[str, Tensor]:
        """Returns the ``k`` largest eigenvalues of each layer's block ``(T/N) G (x) A``.

        By Lanczos where a side has no decomposition (a true-Fisher head, ``tied=sum``).
        """
        result = {}
        for name, f in self.factors.items():
            top = f.G.top(k)
            if f.A is not None:
                top = torch.outer(top, f.A.top(k)).flatten()
            result[name] = (f.ratio * top).sort(descending=True).values[:k]
        return result

    def with_damping(self, damping: Damping) -> None:
        """Changes the damping; factors and their eigendecompositions stay."""
        self.settings = replace(self.settings, damping=damping)
        self._damped, self._bases = {}, {}


def layer_line(report: LayerReport) -> str:
    """Returns what was done to a layer in one line, for the log."""
    f = report.factors
    told = [f"layer {f.layer.name or '(the model)'}: T={f.tokens} {f.method} ({f.fisher})"]
    for side, r in (("A", report.A), ("G", report.G)):
        if r is not None:
            told.append(f"{side}: lambda {r.damping:g}, {_clipping(r)}, {r.route}" + _events(r))
    if report.pairs is not None:
        told.append(f"EKFAC: {_clipping(report.pairs)} of pairs")
    return "; ".join(told)


def _clipping(r: FactorReport | PairsReport) -> str:
    kappa = (
        "" if math.isnan(r.kappa_before) else f", kappa {r.kappa_before:.2e} -> {r.kappa_after:.2e}"
    )
    return f"clipped {r.clipped}/{r.dim}{kappa}"


def _events(r: FactorReport) -> str:
    jitter = f", jitter {r.jitter:.1e}" if r.jitter else ""
    return jitter + (f", fallback {r.fallback}" if r.fallback else "")


def uncompiled(model: nn.Module) -> AbstractContextManager[Any]:
    """Compiled blocks run as they were written, so that hooks on what is inside them are called.

    Args:
        model: whose forward pass is about to run.
    """
    compiled = any(
        hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None
        for m in model.modules()
    )
    # Only then: the import of the compiler takes two seconds.
    if compiled and hasattr(torch.compiler, "set_stance"):
        return torch.compiler.set_stance("force_eager")
    return nullcontext()


def _check_labels(
    model: nn.Module, batches: Iterable[Any], loss: Tensor | LossFunction | None
) -> None:
    """Refuses batches of which the labels alone say that none counts, before a pass.

    Raises:
        BatchError: no label of any batch counts, or one has no active token.
    """
    if not isinstance(batches, list | tuple) or not batches:
        return  # an iterator can be read once only
    if isinstance(loss, CrossEntropy):
        shift: bool | None = loss.shift
    else:
        shift = shift_of(model) if loss is None else None
    if shift is None:
        return
    for batch in batches:
        batch = prepare(model, batch)
        TokenMasks.of(unwrap(model), batch)
        labels = labels_of(batch)
        if labels is None or labels.dim() not in (1, 2):
            return
        labels = labels[:, 1:] if shift and labels.dim() == 2 else labels
        if bool((labels != IGNORE_INDEX).any()):
            return
    raise BatchError("labels: none counts (all are -100 or masked); allowed: at least one")


def _stored_shape(layer: Layer) -> tuple[int, ...]:
    if layer.kind is Kind.NORM:
        return (layer.n_out,)
    return (layer.n_in, layer.n_out) if layer.transposed else (layer.n_out, layer.n_in)


def _summed(
    model: nn.Module,
    captured: Capture,
    loss: Tensor,
    batch: Any,
    n_labels: int | None,
    reduction: str,
) -> SummedLoss:
    """The token-summed loss behind a tensor that the caller computed from the batch's labels."""
    if len(captured.outputs) != 1:
        raise LossError(
            f"capture: {len(captured.outputs)} forward passes of the model in the 'with' block; "
            "allowed: one (of a compiled model, run the uncompiled one: model._orig_mod)"
        )
    return sum_of(
        loss,
        batch,
        n_labels=n_labels,
        reduction=reduction,
        touch=loss,
        shift=bool(shift_of(model)),
    )


def _with_logits(summed: SummedLoss, model: nn.Module, captured: Capture, batch: Any) -> SummedLoss:
    """Adds the logits of the captured pass, where the model's labelling is known."""
    if shift_of(model) is None or labels_of(batch) is None:
        return summed
    output = captured.outputs[0]
    return replace(summed, scored=scorer(model).score(output, batch), logits=logits_of(output))
