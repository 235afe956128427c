"""The public face of K-FAC: arguments to configuration objects, and one engine behind them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fisher_lab.config.errors import SettingError
from fisher_lab.config.fields import whole
from fisher_lab.config.kfac import KFACSettings, documented, require, settings_of
from fisher_lab.curvature import wrappers
from fisher_lab.curvature.collectives import Communicator, Progress, no_progress, world
from fisher_lab.curvature.errors import FactorFileError
from fisher_lab.curvature.kfac.capture import Capture
from fisher_lab.curvature.kfac.engine import KFACEngine
from fisher_lab.curvature.kfac.layer_factors import LayerFactors
from fisher_lab.curvature.kfac.numerics import EngineSettings, resolve_dtype
from fisher_lab.curvature.losses import LossFunction
from fisher_lab.runs import atomic

_HEADER = "fisher_lab.factors"


@documented
class KFACNaturalGradient:
    """K-FAC factors of a model, and the natural gradient with them.

    Conventions and formulas: ``docs/math.md``; Martens & Grosse 2015.

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
        kfac_factors: layer name -> factors, of the last refresh.
        uncovered: parameters that the last product returned unchanged.
        skipped: supported layers without factors -> why.
        diagonal_fisher: parameter name -> moving average over the refreshes of the squared mean
            gradient, of the covered parameters (the legacy diagonal: a batch's gradient squared
            is not the diagonal of the Fisher matrix, see ``docs/math.md``, section 9).
    """

    def __init__(
        self,
        settings: KFACSettings | None = None,
        *,
        seed: int = 0,
        use_gpu_eigh: bool = True,
        track_diagonal: bool = True,
        show_progress: bool = False,
        progress: Progress | None = None,
        communicator: Communicator | None = None,
        **options: Any,
    ) -> None:
        given = settings_of(settings, options)
        if given.store_device == "cuda" and not torch.cuda.is_available():
            raise SettingError("woodbury_store_device: 'cuda', but no CUDA device; allowed: cpu")
        self.update_freq, self.ema_decay = given.update_freq, given.ema_decay
        self.track_diagonal = track_diagonal and given.fisher == "empirical"
        self.diagonal_fisher: dict[str, Tensor] = {}
        self._steps = 0
        made = EngineSettings.of(given, seed=seed, on_host=not use_gpu_eigh)
        shown = progress or (_progress_bars() if show_progress else no_progress)
        self.engine = KFACEngine(made, shown, communicator)
        self._given = communicator

    @property
    def settings(self) -> EngineSettings:
        """All choices, as the engine has them."""
        return self.engine.settings

    @property
    def kfac_factors(self) -> dict[str, LayerFactors]:
        """Layer name -> factors, of the last refresh."""
        return self.engine.factors

    @property
    def uncovered(self) -> list[str]:
        """Parameters that the last product returned unchanged."""
        return self.engine.uncovered

    @property
    def skipped(self) -> dict[str, str]:
        """Supported layers that have no factors -> why."""
        return self.engine.skipped

    def capture(self, model: nn.Module) -> AbstractContextManager[Capture]:
        """Records a forward pass that the caller makes.

        ``with kfac.capture(model): loss = model(**batch).loss``, then
        ``collect_kfac_factors(model, batch, loss=loss)`` does not call the model again.
        """
        return self.engine.capture(model)

    def collect_kfac_factors(
        self,
        model: nn.Module,
        batch: Any,
        loss: Tensor | LossFunction | None = None,
        n_labels: int | None = None,
        loss_reduction: str = "mean",
        *,
        keep_gradient: bool = False,
    ) -> None:
        """Makes new factors: one call is one refresh.

        Args:
            model: any module with supported layers, in ``train()`` or ``eval()`` mode.
            batch: one batch (a mapping, a tensor, or a tuple of tensors), or an iterable of them.
            loss: None for a Hugging Face model; a function of (outputs, batch) that returns a
                scalar or unreduced losses; or the loss tensor of a captured forward pass.
            n_labels: labels behind a mean loss, where the batch's ``labels`` do not tell.
            loss_reduction: ``mean`` or ``sum``: how ``loss`` was reduced.
            keep_gradient: also form the batch's own mean gradient; then
                ``compute_natural_gradient(None, model)`` preconditions it.

        Raises:
            CurvatureError: see its subclasses; the factors from before stay.
            SettingError: the settings and the model do not go together.
        """
        self.engine.communicator = self._given or world()
        batches, total = _batches(batch)
        self.engine.collect(
            model,
            batches,
            loss,
            n_labels=n_labels,
            reduction=loss_reduction,
            keep_gradient=keep_gradient or self.track_diagonal,
            total=total,
        )
        if self.track_diagonal:
            self._update_diagonal(self.engine.own_gradients(model))
            if not keep_gradient:
                self.engine.drop_own_gradients()

    def step(self, model: nn.Module, batch: Any, **collect: Any) -> bool:
        """Counts a step and refreshes the factors on the first and every ``update_freq``-th.

        Args:
            model: the model.
            batch: as for :meth:`collect_kfac_factors`.
            **collect: further arguments of :meth:`collect_kfac_factors`.

        Returns:
            Whether the factors were refreshed.
        """
        due = self._steps % self.update_freq == 0
        if due:
            self.collect_kfac_factors(model, batch, **collect)
        self._steps += 1
        return due

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
            CurvatureError: no factors yet.
        """
        whole = None if gradients is None else wrappers.whole(gradients)
        result = self.engine.natural_gradient(whole, model)
        return wrappers.as_given(result, gradients, model, shards)

    def compute_fisher_vector_product(
        self, vectors: Mapping[str, Tensor], model: nn.Module, *, damped: bool = False
    ) -> dict[str, Tensor]:
        """Returns ``(T/N) G V A``: no floor, no damping unless ``damped``; shards for shards."""
        result = self.engine.fisher_vector(wrappers.whole(vectors), model, damped=damped)
        return wrappers.as_given(result, vectors, model)

    def trace(self) -> dict[str, float]:
        """Returns layer name -> trace ``(T/N) tr(G) tr(A)`` of its block, undamped."""
        return self.engine.trace()

    def log_determinant(self) -> dict[str, float]:
        """Returns layer name -> log-determinant of its block, damped and clipped.

        Of the Kronecker product, whatever EKFAC makes of its eigenvalues.
        """
        return self.engine.logdet()

    def top_eigenvalues(self, k: int = 1) -> dict[str, Tensor]:
        """Returns layer name -> the ``k`` largest eigenvalues of its block, undamped.

        Args:
            k: how many; fewer where the block has fewer.
        """
        require("k", k, whole(1), int)
        return self.engine.top_eigenvalues(k)

    def compute_powered_natural_gradient(
        self, gradients: Mapping[str, Tensor] | None, model: nn.Module, power: float
    ) -> dict[str, Tensor]:
        """Returns ``G^p dW A^p`` with damping and clipping; ``p = -1`` is the natural gradient."""
        return self.engine.powered(gradients, model, power)

    def state_dict(self, model: nn.Module) -> dict[str, Any]:
        """Returns factors, header and counters; tensors and plain values only.

        With several ranks the factors come whole, and every rank has to call it.
        """
        tensors, header = self.engine.export(model)
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
        self.engine.communicator = self._given or world()
        missing = {"tensors", "header", "steps", "diagonal_fisher"} - set(state)
        if missing:
            raise FactorFileError(f"factors: the state has no {', '.join(sorted(missing))}")
        self.engine.restore(state["tensors"], state["header"], model)
        self._steps = int(state["steps"])
        self.diagonal_fisher = dict(state["diagonal_fisher"])

    def save(self, path: str | Path, model: nn.Module) -> None:
        """Writes the factors to a safetensors file: under a temporary name, then renamed.

        With several ranks the factors are written whole, and every rank has to call it.

        Args:
            path: of the file.
            model: the model that the factors belong to; its fingerprint goes into the header.
        """
        from safetensors.torch import save

        tensors, header = self.engine.export(model)
        atomic.write_bytes(Path(path), save(tensors, metadata={_HEADER: json.dumps(header)}))

    def load(self, path: str | Path, model: nn.Module) -> None:
        """Reads factors from a file of :meth:`save`; neither model nor factors change on error.

        Args:
            path: of the file.
            model: the model that they are wanted for.

        Raises:
            FactorFileError: no factor file, cut short, or of another version.
            LayerError: factors of another model; names the layer and both sides.
        """
        self.engine.communicator = self._given or world()
        self.engine.restore(*_read(Path(path)), model)

    def _update_diagonal(self, gradients: Mapping[str, Tensor]) -> None:
        for name, gradient in gradients.items():
            square = gradient.square()
            old = self.diagonal_fisher.get(name)
            if old is None or old.shape != square.shape:
                self.diagonal_fisher[name] = square
            else:
                self.diagonal_fisher[name] = old.lerp(square, 1.0 - self.ema_decay)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FactorFileError(f"factor file {path}: does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[_HEADER])
            return {key: file.get_tensor(key) for key in file.keys()}, header  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError) as error:
        raise FactorFileError(f"factor file {path}: cut short or not one ({error})") from error


def _batches(batch: Any) -> tuple[Iterable[Any], int | None]:
    """One batch or an iterable of batches -> an iterable, and its length where it is known."""
    if isinstance(batch, Tensor | Mapping):
        return [batch], 1
    if isinstance(batch, list | tuple):
        if batch and all(isinstance(x, Tensor) for x in batch):
            return [tuple(batch)], 1
        return batch, len(batch)
    return batch, None


def _progress_bars() -> Progress:
    from tqdm import tqdm

    def show(items: Iterable[Any], label: str, total: int | None) -> Iterable[Any]:
        return tqdm(items, desc=label, total=total, leave=False, disable=None)

    return show


__all__ = ["KFACNaturalGradient", "SettingError", "resolve_dtype"]
