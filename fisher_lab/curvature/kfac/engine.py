"""The K-FAC engine: capture -> policy -> factors -> products.

Martens & Grosse 2015 with the expand convention of Eschenhagen et al. 2023 for shared weights;
``docs/math.md`` fixes every scale. The engine holds the factors of its last refresh and hands them
to the modules that do the work: :mod:`.collecting` makes them, :mod:`.inverses` decomposes and
:mod:`.applying` applies them, :mod:`.parameters` goes between matrices and parameters,
:mod:`.reports` tells what was done, :mod:`.saved` takes them apart.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from fisher_lab.config.errors import SettingError
from fisher_lab.curvature.collectives import Alone, Communicator, Progress, no_progress, together
from fisher_lab.curvature.errors import CurvatureError, LayerError
from fisher_lab.curvature.kfac import precondition, saved
from fisher_lab.curvature.kfac.capture import Capture
from fisher_lab.curvature.kfac.collect import FactorBuilder, GivenLoss, add_batches, uncompiled
from fisher_lab.curvature.kfac.inverses import Inverses, same_vectors
from fisher_lab.curvature.kfac.layer_factors import Built, LayerFactors
from fisher_lab.curvature.kfac.layers import Layers, discover
from fisher_lab.curvature.kfac.numerics import EngineSettings
from fisher_lab.curvature.kfac.policy import check, check_device_supports
from fisher_lab.curvature.kfac.report import (
    LayerReport,
    layer_line,
    measure_storage_error,
    report_of,
)
from fisher_lab.curvature.linalg import full_precision
from fisher_lab.curvature.losses import LossFunction
from fisher_lab.curvature.wrappers import device_of

log = logging.getLogger(__name__)


class KFACEngine:
    """Collects Kronecker factors and applies them.

    Args:
        settings: all choices.
        progress: how loops that take long are shown.
        communicator: of the ranks that join their tokens; None for this process alone. Unless
            ``settings.reduce`` is ``none``, methods that form, decompose, apply or export factors
            are collective.

    Attributes:
        factors: layer name -> factors, of the last refresh.
        skipped: supported layers without factors -> why.
        uncovered: parameters that the last product passed through, or gave to their diagonal.
        own_uncovered: own mean gradients of parameters that belong to no layer, where kept.
        diagonal: diagonal Fisher of these, where it was asked for.
        fisher: kind of Fisher matrix that the inner layers got.
        rank_counts: tokens and labels of each rank.
        refreshes: how many times the factors have been replaced.
        capturing: a forward pass of the caller's that the next refresh takes.
    """

    def __init__(
        self,
        settings: EngineSettings,
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
        self.fisher: str = settings.fisher
        self.rank_counts: tuple[dict[str, int], ...] = ()
        self.refreshes = 0
        self.capturing: Capture | None = None
        self._ever_called: set[str] = set()
        self._inverses = Inverses({}, settings)
        self._narrowed = precondition.Narrowing()
        self._told: set[str] = set()

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
        layers = discover(model, self.settings)
        for layer in layers.layers.values():
            check(self.settings, layer)
            if self.settings.ekfac and layer.partner is not None:
                raise SettingError(
                    f"tied: 'sum' with ekfac, and layer {layer.name} is tied: pooled factors have "
                    "no common eigenbasis; allowed with ekfac: head, embedding"
                )
        check_device_supports(self.settings, device_of(model))
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
            given = GivenLoss.of(loss, captured, n_labels, reduction)
            layers = self.layers_of(model) if given.captured is None else given.captured.layers
            ranks = self.communicator
            builder = FactorBuilder(
                model, layers, self.settings, keep_gradient=keep_gradient, communicator=ranks
            )

            def shown(batches: Iterable[Any]) -> Iterable[Any]:
                return self.progress(batches, "K-FAC factors", total)

            together(ranks, lambda: add_batches(builder, model, batches, given, shown))
            self._take(builder.finish(), layers)
        finally:
            if captured is not None:
                captured.close()

    def _take(self, built: Built, layers: Layers) -> None:
        """Takes over what a builder made; nothing of the refresh before stays."""
        for name in layers.layers:
            if name not in built.called and name not in self._ever_called:
                raise LayerError(
                    f"layer {name}: expected, but never called in the forward pass; exclude it "
                    "(or, in a compiled model, run the uncompiled one: model._orig_mod)"
                )
        self._hold(replace(built, skipped={**layers.skipped, **built.skipped}))
        for factors in self.factors.values():
            measure_storage_error(factors, self.settings)

    def _hold(self, built: Built) -> None:
        """Holds what a refresh ended in, or what a file had of one."""
        self._ever_called |= built.called
        self.skipped = built.skipped
        self.own_uncovered, self.diagonal = built.gradients, built.diagonal
        self.fisher = built.fisher
        self.rank_counts = built.rank_counts
        self._replace(built.factors)

    def _replace(self, factors: dict[str, LayerFactors]) -> None:
        """New factors: every inverse of the old ones goes, whichever path it came from."""
        self.factors = factors
        self._inverses = Inverses(factors, self.settings)
        self._narrowed, self._told = precondition.Narrowing(), set()
        self.refreshes += 1

    def forget(self) -> None:
        """Drops the factors."""
        self._replace({})

    def with_damping(self, lam_A: float, lam_G: float) -> None:
        """Changes the damping; factors and their eigendecompositions stay."""
        self.settings = replace(self.settings, damping_A=lam_A, damping_G=lam_G)
        self._inverses = self._inverses.with_settings(self.settings)

    # ---- files -------------------------------------------------------------------------------

    def export(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Returns the factors as tensors and a JSON-able header; see :mod:`.saved`."""
        self.check_model(model)
        built = Built(
            factors=self.factors,
            skipped=self.skipped,
            gradients=self.own_uncovered,
            diagonal=self.diagonal,
            called=frozenset(self.factors),
            fisher=self.fisher,
            rank_counts=self.rank_counts,
        )
        return saved.export(built, model, self.settings)

    def restore(
        self, tensors: Mapping[str, Tensor], header: Mapping[str, Any], model: nn.Module
    ) -> None:
        """Takes factors that :meth:`export` gave; nothing changes where they do not match.

        Raises:
            FactorFileError: another version, incomplete, or made with settings that leave out
                what this engine's need.
            LayerError: factors of another model.
        """
        layers, ranks = self.layers_of(model), self.communicator
        self._hold(saved.restore(tensors, header, model, layers, self.settings, ranks))

    # ---- decomposing -------------------------------------------------------------------------

    @full_precision()
    def prepare_inverses(self) -> None:
        """Decomposes every factor now, so that an application finds it done.

        At INFO, what was done is logged: one line a layer and refresh.
        """
        if self.communicator.size > 1:
            self._inverses.prepare_together(self.communicator)
        names = list(self.factors)
        for name in self.progress(names, "decompositions", len(names)):
            self._inverses.prepare(name)
        self._tell(self.factors)

    def _tell(self, names: Iterable[str]) -> None:
        """Logs what was done to layers that have been decomposed; nothing is computed for it."""
        if not log.isEnabledFor(logging.INFO):
            return
        for name in names:
            if name not in self._told:
                self._told.add(name)
                log.info("%s", layer_line(report_of(self._inverses, name, kappa=False)))

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
        """Returns ``G^p dW A^p`` with damping and clipping; see :meth:`natural_gradient`.

        Raises:
            SettingError: a negative power without damping.
        """
        lam_a, lam_g = self.settings.lam_A, self.settings.lam_G
        if power < 0 and (lam_a <= 0 or lam_g <= 0):
            raise SettingError(
                f"damping: A {lam_a:g}, G {lam_g:g} with power {power:g}; allowed: above 0 for "
                "powers < 0"
            )
        if power == -1 and self.communicator.size > 1:
            self._inverses.prepare_together(self.communicator)
        if gradients is None:
            result = self._apply_own(model, power)
        else:
            inverses = self._inverses
            result = self._apply(
                gradients, model, lambda f, y: precondition.powered(inverses, f, y, power), power
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
        lam_g, lam_a = (self.settings.lam_G, self.settings.lam_A) if damped else (0.0, 0.0)
        return self._apply(
            vectors, model, lambda f, y: precondition.product(f, y, lam_g, lam_a), None
        )

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
            result.update(precondition.named_of(factors.layer, factors.own))
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
            y = precondition.own_powered(self._inverses, factors, power)
            precondition.check_finite(name, y, self.settings)
            for parameter, value in precondition.named_of(factors.layer, y).items():
                result[parameter] = self._narrowed(parameter, value, own[parameter])
        return result

    def _apply(
        self,
        vectors: Mapping[str, Tensor],
        model: nn.Module,
        function: Callable[[LayerFactors, Tensor], Tensor],
        power: float | None,
    ) -> dict[str, Tensor]:
        self.check_model(model)
        precondition.check_vectors(vectors, model)
        if self.communicator.size > 1 and self.settings.reduce == "gram":
            same_vectors(self.communicator, list(vectors.values()))
        result = precondition.to_covered(
            self.factors, vectors, function, self.settings, self._narrowed
        )
        self.uncovered = [name for name in vectors if name not in result]
        for name in self.uncovered:
            vector = vectors[name]
            result[name] = vector if power is None else self._uncovered(name, vector, power)
        return {name: result[name] for name in vectors}

    def _uncovered(self, name: str, vector: Tensor, power: float) -> Tensor:
        value = precondition.diagonal_power(self.diagonal.get(name), vector, power, self.settings)
        return vector if value is None else self._narrowed(name, value, vector)

    def check_model(self, model: nn.Module) -> None:
        """Checks that the factors belong to a model; see :func:`.parameters.check_model`."""
        precondition.check_model(self.factors, model)

    # ---- what comes for nothing --------------------------------------------------------------

    @full_precision()
    def reports(self) -> list[LayerReport]:
        """Returns what was done to each layer, in the model's order."""
        return [report_of(self._inverses, name) for name in self.factors]

    @full_precision()
    def trace(self) -> dict[str, float]:
        """Returns the trace ``(T/N) tr(G) tr(A)`` of each layer's block."""
        return {name: factors.trace() for name, factors in self.factors.items()}

    @full_precision()
    def logdet(self) -> dict[str, float]:
        """Returns the log-determinant of each layer's block, with the factors in use."""
        return {name: self._inverses.logdet(factors) for name, factors in self.factors.items()}

    @full_precision()
    def top_eigenvalues(self, k: int) -> dict[str, Tensor]:
        """Returns the ``k`` largest eigenvalues of each layer's block ``(T/N) G (x) A``.

        By Lanczos where a side has no decomposition (a true-Fisher head, ``tied=sum``).
        """
        return {name: factors.top_eigenvalues(k) for name, factors in self.factors.items()}
