"""One collector over K-FAC, group Fisher and per-sample gradients."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fisher_lab.api import KFACNaturalGradient
from fisher_lab.curvature import losses
from fisher_lab.curvature.errors import BatchError, CurvatureError
from fisher_lab.curvature.evaluation_mode import isolated
from fisher_lab.curvature.group_fisher.collector import FisherCollector, active_tokens
from fisher_lab.curvature.losses import LossFunction
from fisher_lab.curvature.spectra.gradient_cache import GradientCache
from fisher_lab.curvature.spectra.samples import as_batches
from fisher_lab.curvature.spectra.spectrum import FisherSpectral, SpectralConfig


class AdvancedFisherCollector:
    """Feeds K-FAC, group Fisher and the gradient cache from one pass over the data.

    K-FAC and the batch's mean gradient (group Fisher with ``group_unit="batch"``) share one forward
    pass of each batch (not with a caller's loss and ``use_true_fisher``, which takes a second one).
    Per-sample gradients, where they are wanted (``group_unit`` ``sequence`` or
    ``token``, or ``cache_gradients``), are collected once and serve group Fisher and the cache.

    Args:
        use_true_fisher: K-FAC over the model's own distribution instead of the labels.
        use_kfac: whether K-FAC is fed at all.
        kfac_update_freq: the factors are refreshed on the first and every so many-th batch.
        damping: of K-FAC.
        kfac_show_progress: progress bars of K-FAC.
        ema_decay: handed to K-FAC; it belongs to its legacy diagonal and touches no factor.
        use_gpu_eigh: handed to K-FAC; False decomposes on the host.
        use_group_fisher: whether group Fisher is fed.
        group_unit: ``batch``, ``sequence`` or ``token``.
        cache_gradients: keep the last call's per-sample gradients in ``gradient_cache``, of
            labelled tokens, or of sequences with ``group_unit="sequence"``: up to ``N x P``
            numbers. ``FisherSpectral`` with the same options finds exactly what it would compute.
        cache_chunk_size: rows of one backward pass of the cache; ``chunk_size`` of the
            ``SpectralConfig`` of the engine that reads it.
        loss_fn: None for a Hugging Face model; else a ``CrossEntropy``.
        **kfac: further arguments of :class:`fisher_lab.KFACNaturalGradient` (``kfac_policy``,
            ``max_condition_number``, ...).

    Attributes:
        kfac_handler: the ``KFACNaturalGradient`` that is driven, or None.
        group: the ``FisherCollector`` that is fed, or None.
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
        damping: float = 1e-4,
        kfac_show_progress: bool = False,
        *,
        ema_decay: float = 0.99,
        use_gpu_eigh: bool = True,
        use_group_fisher: bool = True,
        group_unit: str = "batch",
        cache_gradients: bool = False,
        cache_chunk_size: int = 32,
        loss_fn: LossFunction | None = None,
        **kfac: Any,
    ) -> None:
        if kfac_update_freq < 1:
            raise CurvatureError(f"kfac_update_freq: {kfac_update_freq}; allowed: 1 or more")
        self.kfac_handler: KFACNaturalGradient | None = None
        if use_kfac:
            self.kfac_handler = KFACNaturalGradient(
                damping=damping,
                ema_decay=ema_decay,
                update_freq=kfac_update_freq,
                use_gpu_eigh=use_gpu_eigh,
                show_progress=kfac_show_progress,
                **{"fisher": "true" if use_true_fisher else "empirical", **kfac},
            )
        self.use_true_fisher, self.kfac_update_freq = use_true_fisher, kfac_update_freq
        self.group = FisherCollector(group_unit, loss_fn=loss_fn) if use_group_fisher else None
        self.cache_gradients = cache_gradients
        self._spectral = SpectralConfig(
            sample_unit=self._sample_unit(group_unit), chunk_size=cache_chunk_size
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
            "group_fisher": {} if self.group is None else _about(self.group),
            "cached_samples": len(self.gradient_cache),
        }

    def _batch(self, model: nn.Module, batch: Any, task: str) -> None:
        """One forward pass: K-FAC's factors where they are due, and the mean gradient."""
        kfac = self.kfac_handler
        due = kfac is not None and self.n_batches % self.kfac_update_freq == 0
        shared = due and self._shares_forward_pass()
        if kfac is not None and shared:
            with kfac.capture(model):
                scored = losses.score(model, batch, self._loss_fn)
        else:
            scored = losses.score(model, batch, self._loss_fn)
        loss = losses.summed_loss(scored)
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        grads = losses.gradients_of(loss, named, retain_graph=shared)
        self.gradients = {name: g / max(scored.n_labels, 1) for name, g in grads.items()}
        if kfac is not None and shared:
            kfac.collect_kfac_factors(
                model, batch, loss=loss, n_labels=scored.n_labels, loss_reduction="sum"
            )
        elif kfac is not None and due:
            kfac.collect_kfac_factors(model, batch, loss=self._loss_fn)
        self.n_refreshes += due
        if self.group is not None and self.group.unit == "batch" and scored.n_labels > 0:
            self.group.update_fisher_welford(task, self.gradients, active_tokens(model, batch))
        self.n_batches += 1

    def _shares_forward_pass(self) -> bool:
        """Labels of the model's own need its logits, which a caller's loss tensor hides."""
        kfac = self.kfac_handler
        assert kfac is not None
        return self._loss_fn is None or kfac.settings.fisher == "empirical"

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

    @staticmethod
    def _sample_unit(group_unit: str) -> str:
        return "sequence" if group_unit == "sequence" else "token"


def _about(group: FisherCollector) -> dict[str, Any]:
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


__all__ = ["AdvancedFisherCollector"]
