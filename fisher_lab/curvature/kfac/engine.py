"""K-FAC: collect, reduce, refresh, invert, precondition.

Martens & Grosse 2015 with the expand convention of Eschenhagen et al. 2023 for shared weights;
``docs/math.md`` fixes every scale. Each step is a module of its own:

    batches -> :mod:`.collect` -> statistics of this rank
            -> :mod:`.reduce` -> statistics of all ranks
            -> :mod:`.refresh` -> the factors A and G of every layer
            -> :mod:`.inverses` -> damped, floored and decomposed
            -> :mod:`.precondition` -> the natural gradient ``G^-1 dW A^-1``
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fisher_lab.config import fields
from fisher_lab.config.errors import SettingError
from fisher_lab.config.kfac import KFACSettings, documented, named, require, settings_of
from fisher_lab.curvature import collectives, wrappers
from fisher_lab.curvature.collectives import Alone, Communicator, Progress, no_progress, world
from fisher_lab.curvature.errors import FactorFileError, LossError
from fisher_lab.curvature.evaluation_mode import buffers_kept
from fisher_lab.curvature.kfac import as_operator, precondition, serialization
from fisher_lab.curvature.kfac.capture import Capture
from fisher_lab.curvature.kfac.collect import collect
from fisher_lab.curvature.kfac.inverses import Inverses, LayerReport, layer_line, same_vectors
from fisher_lab.curvature.kfac.layer_factors import LayerFactors
from fisher_lab.curvature.kfac.layers_by_module import discover
from fisher_lab.curvature.kfac.layers_by_use import Layers
from fisher_lab.curvature.kfac.numerics import EngineSettings
from fisher_lab.curvature.kfac.parts import base_of, whole_again
from fisher_lab.curvature.kfac.policy import check, check_device_supports
from fisher_lab.curvature.kfac.reduce import reduce
from fisher_lab.curvature.kfac.refresh import Coverage, LabelCount, Refresh, refresh
from fisher_lab.curvature.kfac.statistics import Statistics
from fisher_lab.curvature.linalg import full_precision
from fisher_lab.curvature.losses import LossFunction

log = logging.getLogger(__name__)

MISSED = 0.1
"""Beyond this share of the trained parameters that no layer covers, the coverage is a warning."""

RESIDUAL_WARNING = 1e-2
"""Relative residual of a natural gradient past which it is warned about."""


@documented
class KFACNaturalGradient:
    """K-FAC factors of a model, and the natural gradient with them.

    Conventions and formulas: ``docs/math.md``; Martens & Grosse 2015. With several ranks, and
    unless ``kfac_distributed_reduce`` is ``none``, methods that make, decompose, apply or export
    factors are collective: every rank calls them.

    Args:
        settings: all options; None for the defaults.
        seed: of drawn labels and of the subsample of columns.
        use_gpu_eigh: False decomposes on the host.
        track_diagonal: keep ``diagonal_fisher``; it costs the weight gradients of a refresh, and
            is kept for ``fisher="empirical"`` only (others would need one more backward pass).
        show_progress: progress bars, where the output is a terminal.
        progress: shows loops in another way; used by the command line.
        communicator: the ranks that join their tokens; None takes the default process group of
            ``torch.distributed`` where there is one with several ranks.
        {options}

    Raises:
        SettingError: an argument is out of range or misspelt.

    Attributes:
        settings: the options with what they come to on this machine.
        communicator: the ranks of the last refresh; one process alone with ``reduce=none``.
        uncovered: parameters that the last product returned unchanged, or gave to their diagonal.
        diagonal_fisher: parameter name -> moving average over the refreshes of the squared mean
            gradient, of the covered parameters (the legacy diagonal: a batch's gradient squared
            is not the diagonal of the Fisher matrix, see ``docs/math.md``, section 9).
        captured: a forward pass of the caller's that the next refresh takes.
    """

    def __init__(
        self,
        settings: KFACSettings | None = None,
        *values: Any,
        seed: int = 0,
        use_gpu_eigh: bool = True,
        track_diagonal: bool = True,
        show_progress: bool = False,
        progress: Progress | None = None,
        communicator: Communicator | None = None,
        **options: Any,
    ) -> None:
        if values or not isinstance(settings, KFACSettings | None):
            options = named((settings, *values), options)
            use_gpu_eigh = options.pop("use_gpu_eigh", use_gpu_eigh)
            show_progress = options.pop("show_progress", show_progress)
            settings = None
        given = settings_of(settings, options)
        if given.store_device == "cuda" and not torch.cuda.is_available():
            raise SettingError("woodbury_store_device: 'cuda', but no CUDA device; allowed: cpu")
        self.settings = EngineSettings.of(given, seed=seed, on_host=not use_gpu_eigh)
        self.update_freq, self.ema_decay = given.update_freq, given.ema_decay
        self.track_diagonal = track_diagonal and given.fisher == "empirical"
        self.progress = progress or (collectives.progress_bars if show_progress else no_progress)
        self.uncovered: list[str] = []
        self.diagonal_fisher: dict[str, Tensor] = {}
        self.captured: Capture | None = None
        self._given_ranks = communicator
        self.communicator = self._ranks(communicator)
        self._steps = 0
        self._hold(Refresh(fisher=given.fisher))

    @property
    def last(self) -> Refresh:
        """The last refresh: the factors, and how they were made."""
        return self._inverses.refresh

    @property
    def coverage(self) -> Coverage:
        """How much of the model the factors cover, and why not more."""
        return self.last.coverage

    @property
    def labels(self) -> LabelCount:
        """Which labels the loss is a sum over, and how many."""
        return self.last.labels

    @property
    def kfac_factors(self) -> dict[str, LayerFactors]:
        """Layer name -> factors, of the last refresh."""
        return self.last.factors

    @property
    def skipped(self) -> dict[str, str]:
        """Supported layers that have no factors -> why."""
        return self.last.skipped

    # ---- collect, reduce, refresh ------------------------------------------------------------

    def step(self, model: nn.Module, batch: Any, **more: Any) -> bool:
        """Counts a step and refreshes the factors on the first and every ``update_freq``-th.

        Args:
            model: the model.
            batch: as for :meth:`collect_kfac_factors`.
            **more: further arguments of :meth:`collect_kfac_factors`.

        Returns:
            Whether the factors were refreshed.
        """
        due = self._steps % self.update_freq == 0
        if due:
            self.collect_kfac_factors(model, batch, **more)
        self._steps += 1
        return due

    def collect_kfac_factors(
        self,
        model: nn.Module,
        batch: Any,
        loss: Tensor | LossFunction | None = None,
        n_labels: int | None = None,
        loss_reduction: str = "mean",
        *,
        keep_gradient: bool = False,
        verify: bool = False,
    ) -> None:
        """Makes new factors: one call is one refresh.

        Args:
            model: any module with supported layers, in ``train()`` or ``eval()`` mode.
            batch: one batch (a mapping, a tensor, or a tuple of tensors), or an iterable of them.
            loss: None for a Hugging Face model; a function of (outputs, batch) that returns a
                scalar or unreduced losses; or the loss tensor of a captured forward pass.
            n_labels: labels behind a mean loss, where the batch's ``labels`` do not say.
            loss_reduction: ``mean`` or ``sum``: how ``loss`` was reduced.
            keep_gradient: also form the batch's own mean gradient; then
                ``compute_natural_gradient(None, model)`` preconditions it.
            verify: also compare that gradient with autograd's, parameter by parameter, and refuse
                layers whose tokens do not explain it; costs the weights' gradients once.

        Raises:
            CurvatureError: see its subclasses; the factors from before stay.
            SettingError: the settings and the model do not go together.
        """
        captured, self.captured = self.captured, None
        if isinstance(loss, Tensor) and captured is None:
            raise LossError(
                "loss: a tensor was given but no forward pass was captured; run it inside "
                "'with kfac.capture(model):', or give a loss function"
            )
        layers = captured.promised if captured is not None and isinstance(loss, Tensor) else None
        own = keep_gradient or self.track_diagonal or verify
        statistics = self.begin(model, layers, keep_gradient=own, verify=verify)
        collect(
            statistics, model, batch, loss, captured, self.communicator, self.progress,
            n_labels=n_labels, reduction=loss_reduction,
        )  # fmt: skip
        self.finish(statistics)
        if self.track_diagonal:
            self._update_diagonal(model)
        if statistics.keep_gradient and not keep_gradient:
            self._inverses.refresh = self.last.without_own_gradients()

    def begin(self, model: nn.Module, layers: Layers | None = None, **more: bool) -> Statistics:
        """Returns empty statistics of a refresh; arguments as :meth:`collect_kfac_factors`."""
        self.communicator = self._ranks(self._given_ranks or world())
        return Statistics(
            wrappers.unwrap(model),
            layers or self.layers_of(model),
            self.settings,
            wrappers.device_of(model),
            rank=self.communicator.rank,
            **more,
        )

    def finish(self, statistics: Statistics) -> None:
        """Makes factors of collected statistics, of all ranks; collective."""
        rank_counts = reduce(statistics, self.communicator)
        self._hold_new(refresh(statistics, rank_counts))

    @contextmanager
    def capture(self, model: nn.Module) -> Iterator[Capture]:
        """Records a forward pass that the caller makes.

        ``with kfac.capture(model): loss = model(**batch).loss``, then
        ``collect_kfac_factors(model, batch, loss=loss)`` does not call the model again.

        Args:
            model: the model whose forward pass runs inside the ``with`` block.
        """
        recording = Capture(model, self.layers_of(model), self.settings)
        self.captured = None
        with recording, wrappers.uncompiled(model):
            yield recording
        self.captured = recording

    def layers_of(self, model: nn.Module) -> Layers:
        """Returns the model's K-FAC layers, checked against the policy before any work.

        Raises:
            LayerError: no supported layer, or one whose factors must not be formed.
            SettingError: a setting does not go with the model.
        """
        with buffers_kept(wrappers.unwrap(model)):  # a weight may be computed as it is looked at
            layers = discover(model, self.settings)
        for layer in layers.layers.values():
            check(self.settings, layer)
            if self.settings.ekfac and layer.partner is not None:
                raise SettingError(
                    f"tied: 'sum' with ekfac, and layer {layer.name} is tied: pooled factors have "
                    "no common eigenbasis; allowed with ekfac: head, embedding"
                )
            if self.settings.sharing == "reduce" and layer.partner is not None:
                raise SettingError(
                    f"tied: 'sum' with sharing=reduce, and layer {layer.name} is tied: its head "
                    "has a row an example, its embedding one a token; allowed: head, embedding"
                )
        check_device_supports(self.settings, wrappers.device_of(model))
        return layers

    def forget(self) -> None:
        """Drops the factors."""
        self._hold(replace(self.last, factors={}))

    def _ranks(self, found: Communicator | None) -> Communicator:
        if found is None or self.settings.reduce == "none":
            return Alone()
        return found

    def _hold_new(self, made: Refresh) -> None:
        """Takes over a refresh; logs its coverage and labelling where they are new."""
        if made.coverage != self.coverage:
            low = made.coverage.missed > MISSED
            log.log(logging.WARNING if low else logging.INFO, "%s", made.coverage)
        if made.labels.labelling != self.labels.labelling:
            log.info("%s", made.labels)
        self._hold(made)

    def _hold(self, made: Refresh) -> None:
        """Takes over a refresh; no inverse of the one before stays, whatever it was made by."""
        self._inverses = Inverses(made, self.settings)
        self._logged: set[str] = set()

    # ---- invert ------------------------------------------------------------------------------

    @full_precision()
    def prepare_inverses(self) -> None:
        """Decomposes every factor now, so that an application finds it done.

        At INFO, what was done is logged: one line per layer and refresh.
        """
        if self.communicator.size > 1:
            self._inverses.prepare_together(self.communicator)
        names = list(self.kfac_factors)
        for name in self.progress(names, "decompositions", len(names)):
            self._inverses.prepare(name)
        self._log(names)

    def with_damping(self, damping_A: float, damping_G: float) -> None:
        """Changes the damping (with ``pi``, to the product of both); eigendecompositions stay."""
        self.settings = replace(self.settings, damping_A=damping_A, damping_G=damping_G)
        if self.settings.damping_mode == "pi":
            self.settings.damping = None
        self._inverses = self._inverses.with_settings(self.settings)

    def scale_damping(self, scale_A: float, scale_G: float) -> None:
        """Multiplies the dampings of the settings, whatever their mode; factors stay."""
        self.settings = replace(self.settings, scale_A=scale_A, scale_G=scale_G)
        self._inverses = self._inverses.with_settings(self.settings)

    def _log(self, names: Iterable[str]) -> None:
        """Logs what was done to layers that have been decomposed; nothing is computed for it."""
        if not log.isEnabledFor(logging.INFO):
            return
        for name in names:
            if name not in self._logged:
                self._logged.add(name)
                log.info("%s", layer_line(self._inverses.report(name, kappa=False)))

    # ---- precondition ------------------------------------------------------------------------

    def compute_natural_gradient(
        self,
        gradients: Mapping[str, Tensor] | None,
        model: nn.Module,
        *,
        shards: bool | None = None,
    ) -> dict[str, Tensor]:
        """Returns the natural gradient ``G^-1 dW A^-1`` (``docs/math.md``, section 2).

        Args:
            gradients: name in ``named_parameters()`` -> gradient of the mean loss. None takes the
                factors' own gradient, by push-through where that holds.
            model: the model that the factors belong to.
            shards: of a model under ``fully_shard``, return every rank's own shards (True) or
                whole tensors (False); None returns shards where shards were given.

        Returns:
            The same names; what K-FAC does not cover unchanged, and listed in ``uncovered``. Each
            in its gradient's dtype, or in float32 (with a warning) where float16 cannot hold it.

        Raises:
            LayerError: factors, gradients and model do not match.
            CurvatureError: no factors yet, or no own gradient.
            SettingError: no damping.
        """
        return self.compute_powered_natural_gradient(gradients, model, -1.0, shards=shards)

    @full_precision()
    def compute_powered_natural_gradient(
        self,
        gradients: Mapping[str, Tensor] | None,
        model: nn.Module,
        power: float,
        *,
        shards: bool | None = None,
    ) -> dict[str, Tensor]:
        """Returns ``G^p dW A^p`` with damping and clipping; ``p = -1`` is the natural gradient.

        Args:
            gradients: see :meth:`compute_natural_gradient`.
            model: the model that the factors belong to.
            power: ``p``.
            shards: see :meth:`compute_natural_gradient`.

        Raises:
            SettingError: a negative power without damping.
        """
        whole = None if gradients is None else wrappers.whole(gradients)
        precondition.check_damped(self.settings, power)
        if power == -1 and self.communicator.size > 1:
            self._inverses.prepare_together(self.communicator)
        if whole is None:
            precondition.check_model(self.kfac_factors, model)
            result, self.uncovered = precondition.own_powered(self._inverses, power)
            result = whole_again(result, _shapes(model))
        else:
            self._check(whole, model)
            result, self.uncovered = precondition.powered(self._inverses, whole, power)
        if power == -1:
            here = result if whole is None else whole
            self._log(n for n, f in self.kfac_factors.items() if base_of(f.layer.weight) in here)
        return wrappers.as_given(result, gradients, model, shards)

    @full_precision()
    def uncorrected_natural_gradient(self, model: nn.Module) -> dict[str, Tensor]:
        """Returns the natural gradient of the factors' own gradient without EKFAC's correction.

        From the same factors; collective where they are those of several ranks.

        Args:
            model: the model that the factors belong to.

        Raises:
            CurvatureError: no factors yet, or no own gradient.
        """
        precondition.check_model(self.kfac_factors, model)
        inverses = self._inverses.with_settings(replace(self.settings, ekfac=False))
        if self.communicator.size > 1:
            inverses.prepare_together(self.communicator)
        result, _ = precondition.own_powered(inverses, -1.0)
        return whole_again(result, _shapes(model))

    @full_precision()
    def compute_fisher_vector_product(
        self, vectors: Mapping[str, Tensor], model: nn.Module, *, damped: bool = False
    ) -> dict[str, Tensor]:
        """Returns ``(T/N) G V A``: no floor, and no damping unless asked for.

        Of a layer that EKFAC corrects, ``(T/N) V_G (S * (V_G^T V V_A)) V_A^T``.

        Args:
            vectors: parameter name -> vector of the parameter's shape.
            model: the model that the factors belong to.
            damped: whether ``(T/N) (G + lam_G I) V (A + lam_A I)`` is wanted.

        Returns:
            The same names, shards for shards; what K-FAC does not cover unchanged.
        """
        whole = wrappers.whole(vectors)
        self._check(whole, model)
        result, self.uncovered = precondition.products(self._inverses, whole, damped=damped)
        return wrappers.as_given(result, vectors, model)

    @full_precision()
    def residuals(
        self, gradients: Mapping[str, Tensor], natural: Mapping[str, Tensor], model: nn.Module
    ) -> dict[str, float]:
        """Returns ``|G X A - Y| / |Y|`` by layer name: how well a natural gradient solves.

        ``G`` and ``A`` are damped and floored. Past 1e-2 it is warned about: the conditioning of
        the factors, or the dtype of the result, has left too few digits.

        Args:
            gradients: ``Y``, by parameter name.
            natural: ``X``, what :meth:`compute_natural_gradient` gave for them.
            model: the model that the factors belong to.
        """
        given, solved = wrappers.whole(gradients), wrappers.whole(natural)
        self._check(given, model)
        found = precondition.residuals(self._inverses, given, solved)
        for name, value in found.items():
            if not value <= RESIDUAL_WARNING:
                log.warning(
                    "layer %s: the natural gradient solves its system to %.1e only (relative "
                    "residual, damping A %g, G %g); allowed: a larger damping, a smaller "
                    "max_condition_number, core_dtype and apply_dtype float64",
                    name, value, self.settings.lam_A, self.settings.lam_G,
                )  # fmt: skip
        return found

    def own_gradients(self, model: nn.Module) -> dict[str, Tensor]:
        """Returns the factors' own mean gradient, by parameter name, in the core dtype.

        Raises:
            CurvatureError: the factors were collected without ``keep_gradient``.
        """
        precondition.check_model(self.kfac_factors, model)
        return whole_again(precondition.own_gradients(self.last), _shapes(model))

    def _check(self, vectors: Mapping[str, Tensor], model: nn.Module) -> None:
        """Checks that factors, vectors, model and ranks go together."""
        precondition.check_model(self.kfac_factors, model)
        precondition.check_vectors(vectors, model)
        if self.communicator.size > 1 and self.settings.reduce == "gram":
            same_vectors(self.communicator, list(vectors.values()))

    inverse, _repr_html_ = as_operator.inverse, as_operator.page

    def __repr__(self) -> str:
        return as_operator.text(self)

    # ---- numbers of the factors --------------------------------------------------------------

    @full_precision()
    def reports(self) -> list[LayerReport]:
        """Returns what was done to each layer, in the model's order."""
        return [self._inverses.report(name) for name in self.kfac_factors]

    @full_precision()
    def trace(self) -> dict[str, float]:
        """Returns layer name -> trace ``(T/N) tr(G) tr(A)`` of its block, undamped.

        Of a layer that EKFAC corrects, ``T/N`` times the sum of its own eigenvalues.
        """
        return {n: self._inverses.block(f).trace() for n, f in self.kfac_factors.items()}

    @full_precision()
    def log_determinant(self) -> dict[str, float]:
        """Returns layer name -> log-determinant of its block, damped and clipped.

        Of a layer that EKFAC corrects, with its own eigenvalues.
        """
        return {n: self._inverses.block(f).logdet() for n, f in self.kfac_factors.items()}

    @full_precision()
    def top_eigenvalues(self, k: int = 1) -> dict[str, Tensor]:
        """Returns layer name -> the ``k`` largest eigenvalues of its block, undamped.

        By Lanczos where a side has no decomposition (a true-Fisher head, ``tied=sum``); of a layer
        that EKFAC corrects, its own.

        Args:
            k: how many; fewer where the block has fewer.
        """
        require("k", k, fields.whole(1), int)
        return {n: self._inverses.block(f).top(k) for n, f in self.kfac_factors.items()}

    # ---- the legacy diagonal -----------------------------------------------------------------

    def _update_diagonal(self, model: nn.Module) -> None:
        for name, gradient in self.own_gradients(model).items():
            square = gradient.square()
            old = self.diagonal_fisher.get(name)
            if old is not None and old.shape == square.shape:
                square = old.lerp(square, 1.0 - self.ema_decay)
            self.diagonal_fisher[name] = square

    # ---- files -------------------------------------------------------------------------------

    def state_dict(self, model: nn.Module) -> dict[str, Any]:
        """Returns factors, header and counters; tensors and plain values only.

        With several ranks the factors come whole, and every rank has to call it.
        """
        tensors, header = self._export(model)
        return {
            "tensors": tensors,
            "header": header,
            "steps": self._steps,
            "diagonal_fisher": dict(self.diagonal_fisher),
        }

    def load_state_dict(self, state: Mapping[str, Any], model: nn.Module) -> None:
        """Takes what :meth:`state_dict` gave; the model is not changed.

        Raises:
            FactorFileError: another version, or incomplete.
            LayerError: factors of another model; names the layer and both sides.
        """
        missing = {"tensors", "header", "steps", "diagonal_fisher"} - set(state)
        if missing:
            raise FactorFileError(f"factors: the state has no {', '.join(sorted(missing))}")
        self._restore(state["tensors"], state["header"], model)
        self._steps = int(state["steps"])
        self.diagonal_fisher = dict(state["diagonal_fisher"])

    def save(self, path: str | Path, model: nn.Module) -> None:
        """Writes the factors to a safetensors file: under a temporary name, then renamed.

        With several ranks the factors are written whole, and every rank has to call it.

        Args:
            path: of the file.
            model: the model that the factors belong to; its fingerprint goes into the header.
        """
        serialization.write(Path(path), *self._export(model))

    def load(self, path: str | Path, model: nn.Module) -> None:
        """Reads factors from a file of :meth:`save`; neither model nor factors change on error.

        Args:
            path: of the file.
            model: the model that they are wanted for.

        Raises:
            FactorFileError: no factor file, cut short, or of another version.
            LayerError: factors of another model; names the layer and both sides.
        """
        self._restore(*serialization.read(Path(path)), model)

    def _export(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
        precondition.check_model(self.kfac_factors, model)
        return serialization.export(self.last, model, self.settings)

    def _restore(
        self, tensors: Mapping[str, Tensor], header: Mapping[str, Any], model: nn.Module
    ) -> None:
        self.communicator = self._ranks(self._given_ranks or world())
        layers, ranks = self.layers_of(model), self.communicator
        self._hold(serialization.restore(tensors, header, model, layers, self.settings, ranks))


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in wrappers.unwrap(model).named_parameters()}
