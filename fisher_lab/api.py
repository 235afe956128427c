"""The public face of K-FAC: arguments to configuration objects, and one engine behind them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fisher_lab.config.kfac import (
    COMPUTE_DTYPES,
    Coverage,
    Damping,
    DeviceName,
    DtypeName,
    Fisher,
    FisherName,
    KFACSettings,
    Numerics,
    Policy,
    PolicyName,
    ReduceName,
    ReductionName,
    SettingError,
    Storage,
    StorageName,
    TiedName,
    UncoveredName,
    in_range,
    one_of,
)
from fisher_lab.curvature import wrappers
from fisher_lab.curvature.collectives import Communicator, Progress, no_progress, world
from fisher_lab.curvature.errors import FactorFileError
from fisher_lab.curvature.kfac.capture import Capture
from fisher_lab.curvature.kfac.engine import KFACEngine
from fisher_lab.curvature.kfac.layer_factors import LayerFactors
from fisher_lab.curvature.losses import LossFunction
from fisher_lab.runs import atomic

_HEADER = "fisher_lab.factors"


class KFACNaturalGradient:
    """K-FAC factors of a model, and the natural gradient with them.

    Conventions and formulas: ``docs/math.md``; Martens & Grosse 2015.

    Args:
        damping: Tikhonov damping of both factors.
        damping_A: damping of A; None takes ``damping``.
        damping_G: damping of G; None takes ``damping``.
        max_condition_number: floor of the damped eigenvalues is their maximum over this; None
            for no floor.
        kfac_use_woodbury: False keeps every G dense (policy ``small_only``).
        kfac_policy: ``all``, ``auto``, ``hybrid`` or ``small_only``.
        kfac_big_threshold: ``hybrid`` takes Woodbury from this many outputs on.
        kfac_auto_rho: ``auto`` takes Woodbury up to this many columns an output,
        kfac_auto_t_max: and up to this many columns.
        kfac_true_fisher_head: the head's G is the true Fisher of its softmax.
        kfac_eps: first jitter of a failed Cholesky factorisation, relative to the mean diagonal.
        woodbury_store_device: ``auto``, ``cuda`` or ``cpu``.
        woodbury_dtype: ``auto`` (the token gradients' own), ``fp64``, ``fp32``, ``bf16``,
            ``fp16``; 16 bits where there are fewer of them than outputs, else their own dtype too.
        use_eigenvalue_correction: damped and floored eigenvalues; off: damped ones only.
        update_freq: :meth:`step` refreshes the factors every so many calls.
        ema_decay: of ``diagonal_fisher``, the legacy diagonal, and of nothing else: factors are
            never averaged over time.
        use_gpu_eigh: False decomposes on the host.
        show_progress: progress bars, where the output is a terminal.
        kfac_distributed_reduce: how ranks join their tokens (``docs/math.md``, section 7): ``gram``
            and ``gather`` give what one process gives on the joined batches, with ``none`` every
            rank is on its own; on one process all are equal.
        core_dtype: where matrices are accumulated and decomposed.
        apply_dtype: where the decompositions are applied.
        push_through: the identity without cancellation for the factors' own gradient.
        fisher: ``empirical``, ``mc`` or ``true``.
        n_samples: draws of ``mc``.
        seed: of the draws and of column subsampling.
        true_max_classes: most classes for which ``true`` is exact in inner layers.
        fisher_scale: ``exact`` puts T/N into the natural gradient too.
        ekfac: eigenvalues corrected in the factors' basis (George et al. 2018).
        max_columns: columns kept on the Woodbury path.
        max_dense_dim: no ``out x out`` matrix beyond this ``out``.
        column_reduction: ``subsample`` or ``lowrank``.
        store_limit_mb: limit of ``woodbury_store_device=auto``.
        include: shell patterns of layer names to take; empty takes all.
        exclude: shell patterns of layer names to leave out.
        tied: whose factors precondition a tied weight: ``head``, ``embedding`` or ``sum``.
        norm_layers: cover LayerNorm and RMSNorm.
        uncovered: ``passthrough`` or ``diagonal``, for the parameters that remain.
        track_diagonal: keep ``diagonal_fisher``; it costs the weight gradients of a refresh, and
            is kept for ``fisher="empirical"`` only (others would need one more backward pass).
        progress: shows loops; used by the command line.
        communicator: the ranks that join their tokens; None takes the default process group of
            ``torch.distributed`` where there is one with several ranks.

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
        damping: float = 1e-4,
        damping_A: float | None = None,
        damping_G: float | None = None,
        max_condition_number: float | None = 1e6,
        kfac_use_woodbury: bool = True,
        kfac_policy: PolicyName = "all",
        kfac_big_threshold: int = 4096,
        kfac_auto_rho: float = 1.0,
        kfac_auto_t_max: int = 8192,
        kfac_true_fisher_head: bool = False,
        kfac_eps: float = 1e-6,
        woodbury_store_device: DeviceName = "auto",
        woodbury_dtype: StorageName = "auto",
        use_eigenvalue_correction: bool = True,
        update_freq: int = 10,
        ema_decay: float = 0.99,
        use_gpu_eigh: bool = True,
        show_progress: bool = False,
        kfac_distributed_reduce: ReduceName = "gram",
        *,
        core_dtype: DtypeName = "float64",
        apply_dtype: DtypeName = "float64",
        push_through: bool = True,
        fisher: FisherName = "empirical",
        n_samples: int = 1,
        seed: int = 0,
        true_max_classes: int = 64,
        fisher_scale: Literal["natural", "exact"] = "natural",
        ekfac: bool = False,
        max_columns: int = 8192,
        max_dense_dim: int = 16384,
        column_reduction: ReductionName = "subsample",
        store_limit_mb: float = 500.0,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        tied: TiedName = "head",
        norm_layers: bool = True,
        uncovered: UncoveredName = "passthrough",
        track_diagonal: bool = True,
        progress: Progress | None = None,
        communicator: Communicator | None = None,
    ) -> None:
        in_range("damping", damping, 0.0)
        in_range("update_freq", update_freq, 1, integer=True)
        in_range("ema_decay", ema_decay, 0.0, 1.0)
        for name, value in (("core_dtype", core_dtype), ("apply_dtype", apply_dtype)):
            one_of(name, value, ("auto", *COMPUTE_DTYPES))
        self.update_freq, self.ema_decay = update_freq, ema_decay
        self.track_diagonal = track_diagonal and fisher == "empirical"
        self.diagonal_fisher: dict[str, Tensor] = {}
        self._steps = 0
        settings = KFACSettings(
            damping=Damping(
                A=damping if damping_A is None else damping_A,
                G=damping if damping_G is None else damping_G,
                kappa_max=max_condition_number if use_eigenvalue_correction else None,
            ),
            policy=Policy(
                name=kfac_policy if kfac_use_woodbury else _dense(kfac_policy),
                big_threshold=kfac_big_threshold,
                auto_rho=kfac_auto_rho,
                auto_t_max=kfac_auto_t_max,
                max_columns=max_columns,
                max_dense_dim=max_dense_dim,
                column_reduction=column_reduction,
            ),
            numerics=Numerics(
                core_dtype=resolve_dtype(core_dtype),
                apply_dtype=resolve_dtype(apply_dtype),
                eps=kfac_eps,
                on_host=not use_gpu_eigh,
                push_through=push_through,
            ),
            storage=Storage(
                device=woodbury_store_device, dtype=woodbury_dtype, limit_mb=store_limit_mb
            ),
            fisher=Fisher(
                kind=fisher,
                n_samples=n_samples,
                seed=seed,
                true_max_classes=true_max_classes,
                true_head=kfac_true_fisher_head,
                scale=fisher_scale,
            ),
            coverage=Coverage(
                include=tuple(include),
                exclude=tuple(exclude),
                tied=tied,
                norm_layers=norm_layers,
                uncovered=uncovered,
            ),
            ekfac=ekfac,
            reduce=kfac_distributed_reduce,
        )
        shown = progress or (_progress_bars() if show_progress else no_progress)
        self.engine = KFACEngine(settings, shown, communicator)
        self._given = communicator

    @property
    def settings(self) -> KFACSettings:
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
        in_range("k", k, 1, integer=True)
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


def resolve_dtype(name: str) -> torch.dtype:
    """Returns the dtype behind ``float64``, ``float32`` or ``auto``.

    ``auto`` is float64, except with a CUDA device on which a float64 product takes more than
    eight times as long as a float32 one, by measurement.
    """
    return _measured_dtype() if name == "auto" else COMPUTE_DTYPES[name]


@cache
def _measured_dtype() -> torch.dtype:
    if not torch.cuda.is_available():
        return torch.float64
    wide, narrow = (_product_seconds(dtype) for dtype in (torch.float64, torch.float32))
    return torch.float32 if wide > 8 * narrow else torch.float64


def _product_seconds(dtype: torch.dtype) -> float:
    """Median seconds of a square product on the CUDA device."""
    x = torch.ones(2048, 2048, dtype=dtype, device="cuda")
    seconds = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = perf_counter()
        _ = x @ x
        torch.cuda.synchronize()
        seconds.append(perf_counter() - start)
    return sorted(seconds)[2]


def _dense(policy: str) -> PolicyName:
    one_of("kfac_policy", policy, ("all", "auto", "hybrid", "small_only"))
    return "small_only"


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
