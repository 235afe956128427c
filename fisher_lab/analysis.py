"""The unified analysis as a Python door: several models, all four methods, one result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import torch
from torch import nn

from fisher_lab.api_collector import AdvancedFisherCollector
from fisher_lab.config.schema import Config
from fisher_lab.curvature import losses
from fisher_lab.curvature.evaluation_mode import isolated
from fisher_lab.curvature.spectra.eigensolve import NUMBERS
from fisher_lab.curvature.spectra.lanczos import FisherLanczos
from fisher_lab.curvature.spectra.spectrum import FisherSpectral, SpectralConfig
from fisher_lab.workload.build import build

Batch = Any


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
    damping: float = 1e-4
    kfac_policy: str = "all"
    sample_unit: str = "sequence"
    block_structure: str = "layer"
    group_unit: str = "batch"
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
        self, model: nn.Module, batches: Sequence[Batch], loss_fn: Any = None
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
        result: dict[str, Any] = {
            "n_params": sum(p.numel() for p in model.parameters()),
            "loss": self._mean_loss(model, batches, loss_fn),
        }
        if config.compute_advanced_fisher_metrics:
            collected = self._collect(model, batches, loss_fn)
            result["group_fisher"] = collected.pop("group_fisher")
            result["advanced_fisher"] = collected
        if config.compute_spectrum:
            engine = FisherSpectral(
                SpectralConfig(seed=config.seed, sample_unit=config.sample_unit), loss_fn=loss_fn
            )
            result["spectral"] = engine.compute_fisher_spectrum(
                model, batches, config.n_samples, config.block_structure
            )
        if config.compute_lanczos:
            result["lanczos"] = FisherLanczos(
                config.lanczos_k, seed=config.seed, loss_fn=loss_fn
            ).analyze(model, batches, lam=config.damping)
        return result

    def _mean_loss(self, model: nn.Module, batches: Sequence[Batch], loss_fn: Any) -> float:
        total, count = 0.0, 0
        with isolated(model, seed=self.config.seed), torch.no_grad():
            for batch in batches:
                if losses.is_empty(batch):
                    continue
                scored = losses.score(model, batch, loss_fn)
                total, count = total + float(losses.summed_loss(scored)), count + scored.n_labels
        return total / max(count, 1)

    def _analyze(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        if wanted.get("model") is not None:
            if self.config.batches is None:
                raise ValueError("batches: None; a model given as a module needs config.batches")
            return self.analyze_model(wanted["model"], self.config.batches, wanted.get("loss_fn"))
        bench = build(self._workbench(wanted))
        batches = self.config.batches
        if batches is None:
            batches = bench.batches("train", self.config.n_batches, self.config.seed)
        return {"path": wanted["path"], **self.analyze_model(bench.model, batches, bench.loss_fn)}

    def _workbench(self, wanted: Mapping[str, Any]) -> Config:
        config = Config()
        config.seed, config.device = self.config.seed, self.config.device
        config.data.batch_size, config.data.seq_len = self.config.batch_size, self.config.seq_len
        config.model.type = config.model.name = "pretrained"
        config.model.name_or_path = str(wanted["path"])
        config.model.revision, config.model.task = wanted.get("revision"), wanted.get("task")
        return config

    def _collect(self, model: nn.Module, batches: list[Batch], loss_fn: Any) -> dict[str, Any]:
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


def _norm(gradients: Mapping[str, torch.Tensor]) -> float:
    return sum(float(g.double().square().sum()) for g in gradients.values()) ** 0.5


__all__ = ["UnifiedConfig", "UnifiedModelAnalyzer", "comparison_row"]
