"""All engines on one model: one collector over the data, the spectral engines, several models.

:class:`AdvancedFisherCollector` feeds K-FAC, group Fisher and the gradient cache from one pass;
:class:`SpectralEngines` runs the spectrum, Lanczos and group Fisher with the options of the
command line's sections, as ``task=analyze`` does; :class:`UnifiedModelAnalyzer` does all of it for
several models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from fisher_lab.config.kfac import DAMPING, KFACSettings
from fisher_lab.config.schema import Config
from fisher_lab.config.spectra import (
    GroupFisherConfig,
    LanczosConfig,
    LanczosSection,
    SpectralSection,
    options_of,
)
from fisher_lab.curvature import losses
from fisher_lab.curvature.collectives import Alone, Communicator
from fisher_lab.curvature.errors import BatchError, CurvatureError
from fisher_lab.curvature.evaluation_mode import isolated
from fisher_lab.curvature.group_fisher.collector import FisherCollector, active_tokens
from fisher_lab.curvature.group_fisher.distributed import collect_slices, merge_over_ranks
from fisher_lab.curvature.kfac.engine import KFACNaturalGradient
from fisher_lab.curvature.losses import LossFunction
from fisher_lab.curvature.spectra.eigensolve import NUMBERS
from fisher_lab.curvature.spectra.gradient_cache import GradientCache
from fisher_lab.curvature.spectra.lanczos import FisherLanczos
from fisher_lab.curvature.spectra.samples import as_batches
from fisher_lab.curvature.spectra.spectrum import FisherSpectral, SpectralConfig
from fisher_lab.workload.build import build

Batch = Any
"""A mapping of tensors, a tensor, or a tuple of tensors."""


class AdvancedFisherCollector:
    """Feeds K-FAC, group Fisher and the gradient cache from one pass over the data.

    K-FAC and the batch's mean gradient (group Fisher with ``group_unit="batch"``) share one forward
    pass of each batch (a caller's loss with ``use_true_fisher`` takes a second one). Per-sample
    gradients, where they are wanted (``group_unit`` ``sequence`` or ``token``, or
    ``cache_gradients``), are collected once and serve group Fisher and the cache.

    Args:
        use_true_fisher: K-FAC over the model's own distribution instead of the labels.
        use_kfac: whether K-FAC is fed at all.
        kfac_update_freq: the factors are refreshed on the first and every so many-th batch.
        damping: of K-FAC.
        kfac_show_progress: progress bars of K-FAC.
        use_group_fisher: whether group Fisher is fed.
        group_unit: ``batch``, ``sequence`` or ``token``.
        cache_gradients: keep the last call's per-sample gradients in ``gradient_cache``, of
            labelled tokens, or of sequences with ``group_unit="sequence"``: up to ``N x P``
            numbers. ``FisherSpectral`` with the same options finds exactly what it would compute.
        cache_chunk_size: rows of one backward pass of the cache; ``chunk_size`` of the
            ``SpectralConfig`` of the engine that reads it.
        loss_fn: None for a Hugging Face model; else a ``CrossEntropy``.
        **kfac: further arguments of :class:`fisher_lab.KFACNaturalGradient` (``kfac_policy``,
            ``ema_decay``, ``use_gpu_eigh``, ...).

    Attributes:
        kfac_handler: the ``KFACNaturalGradient``, or None.
        group: the ``FisherCollector``, or None.
        gradient_cache: for :class:`fisher_lab.curvature.spectra.spectrum.FisherSpectral`; its
            ``per_sample_gradients`` are None unless ``cache_gradients``.
        gradients: mean gradient of the last batch, by parameter.

    Raises:
        CurvatureError: an argument is out of range.
    """

    def __init__(
        self,
        use_true_fisher: bool = False,
        use_kfac: bool = True,
        kfac_update_freq: int = 1,
        damping: float = DAMPING,
        kfac_show_progress: bool = False,
        *,
        use_group_fisher: bool = True,
        group_unit: str = GroupFisherConfig.unit,
        cache_gradients: bool = False,
        cache_chunk_size: int = SpectralConfig.chunk_size,
        loss_fn: LossFunction | None = None,
        **kfac: Any,
    ) -> None:
        if kfac_update_freq < 1:
            raise CurvatureError(f"kfac_update_freq: {kfac_update_freq}; allowed: 1 or more")
        self.kfac_handler: KFACNaturalGradient | None = None
        if use_kfac:
            self.kfac_handler = KFACNaturalGradient(
                damping=damping,
                update_freq=kfac_update_freq,
                show_progress=kfac_show_progress,
                **{"fisher": "true" if use_true_fisher else "empirical", **kfac},
            )
        self.use_true_fisher, self.kfac_update_freq = use_true_fisher, kfac_update_freq
        self.group = FisherCollector(group_unit, loss_fn=loss_fn) if use_group_fisher else None
        self.cache_gradients = cache_gradients
        self._spectral = SpectralConfig(
            sample_unit="sequence" if group_unit == "sequence" else "token",
            chunk_size=cache_chunk_size,
        )
        self.gradient_cache = GradientCache(sample_unit=self._spectral.sample_unit)
        self.gradients: dict[str, Tensor] = {}
        self.n_batches = self.n_refreshes = 0
        self._loss_fn = loss_fn

    @property
    def kfac_factors(self) -> dict[str, Any]:
        """Layer name to the factors of the last refresh; empty without K-FAC."""
        return {} if self.kfac_handler is None else dict(self.kfac_handler.kfac_factors)

    @property
    def diagonal_fisher(self) -> dict[str, Tensor]:
        """The legacy diagonal of K-FAC; empty without K-FAC."""
        return {} if self.kfac_handler is None else self.kfac_handler.diagonal_fisher

    def collect(self, model: nn.Module, batch: Any, task: str = "default") -> dict[str, Any]:
        """Takes in one batch or an iterable of batches.

        The model is evaluated in ``eval()`` mode and left as it was found.

        Args:
            model: any module whose labelling is known, or any with a ``loss_fn``.
            batch: one batch or an iterable of batches; they are not changed.
            task: under which name group Fisher files it.

        Returns:
            :meth:`summary`.

        Raises:
            BatchError: no batch, or one without examples; nothing has been taken in then.
            CurvatureError: see its subclasses.
        """
        batches = as_batches(batch)
        if not batches or any(losses.is_empty(one) for one in batches):
            raise BatchError("batch: empty; allowed: batches of one example or more")
        with isolated(model, seed=0):
            for one in batches:
                self._batch(model, one, task)
        if self.group is not None:
            self.group.describe(model)
        self._samples(model, batches, task)
        return self.summary()

    def natural_gradient(
        self, model: nn.Module, gradients: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Returns the natural gradient.

        Args:
            model: the model that was collected.
            gradients: name to gradient of the mean loss; None takes the last batch's.

        Raises:
            CurvatureError: without K-FAC, or nothing has been collected.
        """
        if self.kfac_handler is None:
            raise CurvatureError("use_kfac: False; the natural gradient needs True")
        wanted = self.gradients if gradients is None else gradients
        if not wanted:
            raise CurvatureError("gradients: nothing has been collected; call collect() first")
        return self.kfac_handler.compute_natural_gradient(wanted, model)

    compute_natural_gradient = natural_gradient

    def summary(self) -> dict[str, Any]:
        """Returns what was collected, as plain values.

        Returns:
            ``kfac_enabled``, ``n_batches``, ``n_refreshes``; ``kfac_factors`` by layer (``G_type``,
            ``A_bias_augmented``, ``tokens``, ``n_labels``); ``group_fisher`` by task (``unit``,
            ``token_total``, ``trace``, ``importance`` by layer); ``cached_samples``.
        """
        keys = ("G_type", "A_bias_augmented", "tokens", "n_labels")
        return {
            "kfac_enabled": self.kfac_handler is not None,
            "use_true_fisher": self.use_true_fisher,
            "n_batches": self.n_batches,
            "n_refreshes": self.n_refreshes,
            "kfac_factors": {
                name: {key: factors[key] for key in keys}
                for name, factors in self.kfac_factors.items()
            },
            "uncovered": [] if self.kfac_handler is None else list(self.kfac_handler.uncovered),
            "group_fisher": {} if self.group is None else _group_summary(self.group),
            "cached_samples": len(self.gradient_cache),
        }

    def _batch(self, model: nn.Module, batch: Any, task: str) -> None:
        """One forward pass: K-FAC's factors where they are due, and the mean gradient."""
        kfac = self.kfac_handler
        due = kfac is not None and self.n_batches % self.kfac_update_freq == 0
        # Labels of the model's own need its logits, which a caller's loss tensor hides.
        own = self._loss_fn is None or (kfac is not None and kfac.settings.fisher == "empirical")
        shared = due and own
        prepared = losses.prepare(model, batch, self._loss_fn)
        with kfac.capture(model) if kfac is not None and shared else nullcontext():
            summed = losses.compute_loss(model, prepared, self._loss_fn)
        loss, n_labels = summed.loss, summed.n_labels
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        grads = losses.gradients_of(loss, named, retain_graph=shared)
        self.gradients = {name: g / max(n_labels, 1) for name, g in grads.items()}
        if kfac is not None and shared:
            kfac.collect_kfac_factors(
                model, batch, loss=loss, n_labels=n_labels, loss_reduction="sum"
            )
        elif kfac is not None and due:
            kfac.collect_kfac_factors(model, batch, loss=self._loss_fn)
        self.n_refreshes += due
        if self.group is not None and self.group.unit == "batch" and n_labels > 0:
            self.group.update_fisher_welford(task, self.gradients, active_tokens(model, batch))
        self.n_batches += 1

    def _samples(self, model: nn.Module, batches: list[Any], task: str) -> None:
        """Per-sample gradients: kept for the cache, or handed straight on to group Fisher."""
        group = self.group if self.group is not None and self.group.unit != "batch" else None
        if not self.cache_gradients:
            if group is not None:
                group.collect(model, batches, task)
            return
        engine = FisherSpectral(self._spectral, loss_fn=self._loss_fn)
        self.gradient_cache = engine.collect_gradients(model, batches)
        if group is not None:
            group.update_from(model, batches, self.gradient_cache.chunks, task)


def _group_summary(group: FisherCollector) -> dict[str, Any]:
    return {
        task: {
            "unit": group.unit,
            "token_total": group.token_total[task],
            "n_updates": group.n_updates[task],
            "trace": sum(float(mean.sum()) for mean in group.fisher_mean[task].values()),
            "importance": group.importance(task, "layer"),
        }
        for task in group.tasks
    }


class SpectralEngines:
    """Spectrum, Lanczos and group Fisher of one model, with the options of a section each.

    Args:
        model: any module whose labelling is known, or any with a ``loss_fn``.
        batches: the batches; on several ranks this rank's sequences of each, None where it holds
            none of it.
        loss_fn: as for :func:`fisher_lab.curvature.losses.score`.
        communicator: of the ranks; None for this process alone. All methods are then collective.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch | None],
        *,
        loss_fn: LossFunction | None = None,
        communicator: Communicator | None = None,
    ) -> None:
        self._model, self._loss_fn = model, loss_fn
        self._batches = [batch for batch in batches if batch is not None]
        self._ranks = communicator or Alone()

    def spectrum(self, section: SpectralSection, *, deterministic: bool = False) -> dict[str, Any]:
        """Returns the spectra of the blocks (:meth:`FisherSpectral.compute_fisher_spectrum`).

        ``deterministic`` allows deterministic algorithms alone.
        """
        engine = FisherSpectral(
            options_of(section, SpectralConfig, use_deterministic=deterministic),
            loss_fn=self._loss_fn,
            communicator=self._ranks,
        )
        return engine.compute_fisher_spectrum(
            self._model,
            self._batches,
            section.n_samples,
            section.block_structure,
            section.center_gradients,
        )

    def lanczos(
        self, section: LanczosSection, *, say: Callable[[str], None] | None = None
    ) -> dict[str, Any]:
        """Returns what :meth:`FisherLanczos.analyze` does; the Hessian has no effective dimension.

        ``say`` gets the line about memory.
        """
        engine = FisherLanczos(
            config=options_of(section, LanczosConfig),
            loss_fn=self._loss_fn,
            say=say,
            communicator=self._ranks,
        )
        return engine.analyze(
            self._model,
            self._batches,
            section.block,
            lam=None if section.operator == "hessian" else section.dimension_damping,
            n_probes=section.density_probes,
            steps=section.density_steps,
            max_steps=section.density_max_steps,
            tol=section.dimension_tol,
        )

    def group_fisher(
        self, options: GroupFisherConfig, tasks: Mapping[str, Sequence[Batch | None]]
    ) -> FisherCollector:
        """Returns the moments of the squared gradients of all ranks' data.

        Args:
            options: the options.
            tasks: task to its batches, on several ranks as for the class.
        """
        collector = FisherCollector(
            options.unit,
            sequence_weight=options.sequence_weight,
            chunk_size=options.chunk_size,
            loss_fn=self._loss_fn,
        )
        for task, batches in tasks.items():
            if self._ranks.size == 1:
                collector.collect(self._model, batches, task)
            else:
                collect_slices(collector, self._model, batches, task, self._ranks)
        return collector if self._ranks.size == 1 else merge_over_ranks(collector, self._ranks)


@dataclass(kw_only=True)
class UnifiedConfig:
    """What :class:`UnifiedModelAnalyzer` does.

    Attributes:
        model_paths: hub names or local directories, analysed where ``analyze_models`` is given no
            models.
        compute_advanced_fisher_metrics: K-FAC and group Fisher by ``AdvancedFisherCollector``.
        compute_spectrum: the blocks' spectra.
        compute_lanczos: top eigenpairs of the whole model, trace and effective dimension.
        batch_size: sequences a batch.
        seq_len: tokens a sequence.
        n_batches: batches.
        seed: of batches and of everything random.
        damping: of K-FAC and of the effective dimension.
        kfac_policy: ``all``, ``auto``, ``hybrid`` or ``small_only``.
        sample_unit: of the spectrum; ``sequence`` is the cheap one.
        block_structure: of the spectrum.
        group_unit: of group Fisher.
        n_samples: samples of the spectrum, by a stable hash; None takes all.
        lanczos_k: eigenpairs.
        device: ``auto``, ``cpu`` or ``cuda``.
        verbose: progress bars of K-FAC.
        batches: batches to use instead of the embedded text, for every model.
    """

    model_paths: Sequence[str] = ()
    compute_advanced_fisher_metrics: bool = True
    compute_spectrum: bool = True
    compute_lanczos: bool = True
    batch_size: int = 32
    seq_len: int = 64
    n_batches: int = 1
    seed: int = 42
    damping: float = DAMPING
    kfac_policy: str = KFACSettings.policy
    sample_unit: str = "sequence"
    block_structure: str = "layer"
    group_unit: str = GroupFisherConfig.unit
    n_samples: int | None = None
    lanczos_k: int = 5
    device: str = "auto"
    verbose: bool = False
    batches: Sequence[Batch] | None = field(default=None, repr=False)


class UnifiedModelAnalyzer:
    """Analyses models with all four Fisher methods.

    Models are loaded by the library's Auto classes, from a local directory or the hub, and looked
    at on the text that every Python carries (or on ``config.batches``).

    Args:
        config: what to do; the defaults where it is None.
    """

    def __init__(self, config: UnifiedConfig | None = None) -> None:
        self.config = config or UnifiedConfig()

    def analyze_models(self, models: Sequence[Mapping[str, Any]] | None = None) -> dict[str, Any]:
        """Analyses several models.

        Args:
            models: of each ``path``, and optionally ``name`` (the key in the result),
                ``revision``, ``task`` (``causal``, ``masked``, ``spans``) or ``model`` (a module
                that is there already; then ``config.batches`` are needed). None takes
                ``config.model_paths``.

        Returns:
            ``models``: name to what :meth:`analyze_model` returns; ``comparison``: a row of flat
            numbers for each model. Where there is one model, its entries stand at the top as well.

        Raises:
            ValueError: no model is given, or two have one name.
            ConfigError: a model cannot be loaded.
        """
        wanted = [{"path": p} for p in self.config.model_paths] if models is None else list(models)
        if not wanted:
            raise ValueError("models: none given; allowed: at least one of config.model_paths")
        names = [str(one.get("name", one.get("path"))) for one in wanted]
        if len(set(names)) < len(names):
            raise ValueError(f"models: {names}; allowed: a name of its own for each")
        results = {n: self._analyze(one) for n, one in zip(names, wanted, strict=True)}
        comparison = [{"model": name, **comparison_row(result)} for name, result in results.items()]
        whole: dict[str, Any] = {"models": results, "comparison": comparison}
        return {**results[names[0]], **whole} if len(results) == 1 else whole

    def analyze_model(
        self, model: nn.Module, batches: Sequence[Batch], loss_fn: LossFunction | None = None
    ) -> dict[str, Any]:
        """Analyses one model that is there already.

        Args:
            model: any module whose labelling is known, or any with a ``loss_fn``.
            batches: the batches.
            loss_fn: as for :func:`fisher_lab.curvature.losses.score`.

        Returns:
            ``n_params``, ``loss`` and, as configured, ``advanced_fisher`` (``kfac_enabled``,
            ``kfac_factors``, ``natural_gradient_norm``, ...), ``group_fisher``, ``spectral`` and
            ``lanczos``.
        """
        config = self.config
        batches = list(batches)
        n_params = sum(p.numel() for p in model.parameters())
        with isolated(model, seed=config.seed):
            total, count = summed_loss(model, batches, loss_fn)
        result: dict[str, Any] = {"n_params": n_params, "loss": total / max(count, 1)}
        if config.compute_advanced_fisher_metrics:
            collected = self._collect(model, batches, loss_fn)
            result["group_fisher"] = collected.pop("group_fisher")
            result["advanced_fisher"] = collected
        engines = SpectralEngines(model, batches, loss_fn=loss_fn)
        if config.compute_spectrum:
            result["spectral"] = engines.spectrum(
                SpectralSection(
                    seed=config.seed,
                    sample_unit=config.sample_unit,
                    n_samples=config.n_samples,
                    block_structure=config.block_structure,
                )
            )
        if config.compute_lanczos:
            result["lanczos"] = engines.lanczos(
                LanczosSection(
                    k=config.lanczos_k, seed=config.seed, dimension_damping=config.damping
                )
            )
        return result

    def _analyze(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        if wanted.get("model") is not None:
            if self.config.batches is None:
                raise ValueError("batches: None; a model given as a module needs config.batches")
            return self.analyze_model(wanted["model"], self.config.batches, wanted.get("loss_fn"))
        workload = build(self._workload_config(wanted))
        batches = self.config.batches
        if batches is None:
            batches = workload.batches("train", self.config.n_batches, self.config.seed)
        return {
            "path": wanted["path"],
            **self.analyze_model(workload.model, batches, workload.loss_fn),
        }

    def _workload_config(self, wanted: Mapping[str, Any]) -> Config:
        config = Config()
        config.seed, config.device = self.config.seed, self.config.device
        config.data.batch_size, config.data.seq_len = self.config.batch_size, self.config.seq_len
        config.model.type = config.model.name = "pretrained"
        config.model.name_or_path = str(wanted["path"])
        config.model.revision, config.model.task = wanted.get("revision"), wanted.get("task")
        return config

    def _collect(
        self, model: nn.Module, batches: list[Batch], loss_fn: LossFunction | None
    ) -> dict[str, Any]:
        config = self.config
        collector = AdvancedFisherCollector(
            damping=config.damping,
            kfac_show_progress=config.verbose,
            group_unit=config.group_unit,
            loss_fn=loss_fn,
            kfac_policy=config.kfac_policy,
        )
        summary = collector.collect(model, batches)
        natural = collector.natural_gradient(model)
        return {
            **summary,
            "natural_gradient_norm": _norm(natural),
            "gradient_norm": _norm(collector.gradients),
        }


def summed_loss(
    model: nn.Module, batches: Iterable[Batch], loss_fn: LossFunction | None = None
) -> tuple[float, int]:
    """Returns the loss summed over all labels of some batches, in nats, and the labels.

    Args:
        model: in the mode that it is to be evaluated in.
        batches: the batches.
        loss_fn: as for :func:`fisher_lab.curvature.losses.score`.
    """
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            if losses.is_empty(batch):
                continue
            prepared = losses.prepare(model, batch, loss_fn)
            summed = losses.compute_loss(model, prepared, loss_fn)
            total, count = total + float(summed.loss), count + summed.n_labels
    return total, count


def comparison_row(result: Mapping[str, Any]) -> dict[str, float]:
    """Returns the flat numbers of one model's result, for a table of models."""
    row = {"n_params": result["n_params"], "loss": result["loss"]}
    if "advanced_fisher" in result:
        found = result["advanced_fisher"]
        row["kfac_layers"] = len(found["kfac_factors"])
        row["natural_gradient_norm"] = found["natural_gradient_norm"]
        row["group_fisher_trace"] = sum(t["trace"] for t in result["group_fisher"].values())
    if "spectral" in result:
        whole = result["spectral"]["global"]
        row |= {f"spectral_{k}": whole[k] for k in NUMBERS if whole.get(k) is not None}
    if "lanczos" in result:
        row["lanczos_largest"] = result["lanczos"]["top"]["eigenvalues"][0]
        for key in ("trace", "effective_dimension"):
            row[f"lanczos_{key}"] = result["lanczos"][key]["value"]
    return {key: value for key, value in row.items() if isfinite(value)}


def _norm(gradients: Mapping[str, Tensor]) -> float:
    return sum(float(g.double().square().sum()) for g in gradients.values()) ** 0.5


__all__ = [
    "AdvancedFisherCollector",
    "SpectralEngines",
    "UnifiedConfig",
    "UnifiedModelAnalyzer",
    "comparison_row",
    "summed_loss",
]
