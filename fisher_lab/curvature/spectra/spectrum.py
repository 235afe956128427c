"""Spectra of the block-diagonal empirical Fisher matrix (``docs/math.md``, section 8)."""

from __future__ import annotations

import functools
import hashlib
import io
import logging
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from fisher_lab.config.fields import setting
from fisher_lab.config.spectra import SpectralOptions
from fisher_lab.curvature import losses
from fisher_lab.curvature.collectives import (
    Alone,
    Communicator,
    Spread,
    dtype_name,
    same_everywhere,
    together,
)
from fisher_lab.curvature.errors import CurvatureError, check_one_of, check_options
from fisher_lab.curvature.evaluation_mode import isolated, seed_generators
from fisher_lab.curvature.memory import check_device
from fisher_lab.curvature.spectra import eigensolve
from fisher_lab.curvature.spectra.block_matrices import (
    BlockMatrix,
    CovarianceMatrix,
    GramMatrix,
    RowMatrix,
)
from fisher_lab.curvature.spectra.blocks import architecture_of, parameter_blocks
from fisher_lab.curvature.spectra.eigensolve import Found, Solved, solve_blocks
from fisher_lab.curvature.spectra.gradient_cache import GradientCache, cached_chunks, hash_of
from fisher_lab.curvature.spectra.per_sample_gradients import (
    Chunk,
    PerSampleGradients,
    choose_factored,
)
from fisher_lab.curvature.spectra.records import BlockSpectrum, FisherSpectrum
from fisher_lab.curvature.spectra.samples import SampleSet, draw_samples
from fisher_lab.curvature.spectra.spill import FileBytes
from fisher_lab.curvature.wrappers import device_of, plain

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""``progress(done, total)``: called after every chunk with counts of samples."""


@dataclass(kw_only=True)
class SpectralConfig(SpectralOptions):
    """Options of ``FisherSpectral``.

    ``dtype_eigensolve`` may also be given as a ``torch.dtype``.

    Raises:
        CurvatureError: an option is out of range.
    """

    use_deterministic: bool = setting(
        False,
        "Deterministic algorithms alone, during the call: the same bits from run to run, and an "
        "error where an operation has no deterministic form. The command line has the key "
        "`deterministic`.",
    )

    @override
    def __post_init__(self) -> None:
        """Takes a ``torch.dtype`` by its name, and checks the ranges."""
        super().__post_init__()
        check_options(self)


class FisherSpectral:
    """Eigenvalues of ``F = (1/N) J^T J`` for every block of a model.

    The model is evaluated in ``eval()`` mode (BatchNorm uses its running statistics and keeps
    them); its modes and the random state are restored afterwards. The caller's batch is not
    changed.

    The storage modes ``chunked`` (Gram matrix from chunks, spilled to disk past
    ``memory_budget_mb``), ``streaming`` (``P x P`` where ``P < N``, else as ``chunked``) and
    ``full`` (``N x P`` in memory) are exact; ``sketch`` is approximate and estimates its error.

    Args:
        config: the options; the defaults where it is None.
        gradient_cache: what :meth:`collect_gradients` returns, or anything with
            ``per_sample_gradients`` (which may be missing or None). Where it holds what a call
            needs, no backward pass is made. Where it does not (other samples, a parameter that is
            missing, weights that have changed since), one line says so and the gradients are
            computed. The result is exactly the uncached one where the cache was collected with the
            same options on the same samples (``metadata["cache_exact"]``); otherwise, for example
            for a subsample, the two agree up to rounding.
        loss_fn: as for :func:`fisher_lab.curvature.losses.score`.
        spill: makes room on disk for one array; an unnamed temporary file where it is None.
        progress: called after every chunk.
        communicator: of the ranks whose samples are joined; None for this process alone. Every
            rank then has batches of its own (some may have none), its methods are collective, and
            every rank gets the spectra of all samples.

    Raises:
        CurvatureError: the options are of another class; a cache or the mode ``sketch`` on several
            ranks; ``eigensolve_device="cuda"`` on a machine without a CUDA device.
    """

    def __init__(
        self,
        config: SpectralConfig | None = None,
        gradient_cache: object = None,
        *,
        loss_fn: losses.LossFunction | None = None,
        spill: Callable[[], FileBytes] | None = None,
        progress: Progress | None = None,
        communicator: Communicator | None = None,
    ) -> None:
        if not isinstance(config, SpectralConfig | None):
            what = type(config).__name__
            raise CurvatureError(f"config: a {what}; allowed: SpectralConfig(...) or None")
        self.config = SpectralConfig() if config is None else replace(config)
        check_device("eigensolve_device", self.config.eigensolve_device)
        self._ranks = communicator or Alone()
        if self._ranks.size > 1:
            exact = ("full", "chunked", "streaming")
            check_one_of("storage_mode on several ranks", self.config.storage_mode, exact)
            if gradient_cache is not None:
                raise CurvatureError("gradient_cache: given; allowed on several ranks: None")
        self.gradient_cache = gradient_cache
        self._loss_fn = loss_fn
        self._spill = spill or FileBytes
        self._progress = progress

    def compute_fisher_spectrum(
        self,
        model: nn.Module,
        batch: Any,
        n_samples: int | None = None,
        block_structure: str = "layer",
        center_gradients: bool = False,
    ) -> FisherSpectrum:
        """Computes the spectrum of every block.

        Args:
            model: any module whose labelling is known, or any with a ``loss_fn``; DDP and
                ``fully_shard`` are looked through (:func:`fisher_lab.curvature.wrappers.plain`).
            batch: one batch or an iterable of batches; on several ranks this rank's own.
            n_samples: size of the subsample of all ranks' samples; None takes all.
            block_structure: ``layer``, ``module``, ``parameter`` or ``full``.
            center_gradients: subtract the mean row (gradient covariance instead of Fisher).

        Returns:
            ``metadata``; ``per_block`` by block name; ``global``, the union of the blocks, as keys
            and as attributes (``union`` for the last one). A
            block without a spectrum has ``status: degenerate``, a ``reason`` and no number, and
            is left out of ``global``.

        Raises:
            CurvatureError: the block structure has another name; ranks differ in model or choices.
            BatchError: a batch has no labels.
            RankError: another rank has an error.
        """
        model = plain(model)
        blocks = parameter_blocks(model, block_structure)
        with isolated(model, seed=self.config.seed, deterministic=self.config.use_deterministic):
            self._check_alike(model, n_samples, block_structure, center_gradients)
            samples = self._draw(model, batch, n_samples)
            call = _Call(model, samples, blocks, block_structure, center_gradients)
            cached = cached_chunks(self.gradient_cache, samples, call.trainable, model, self.config)
            if cached is None:
                chunks, factored = self._gradients(call)
            else:
                chunks = cached[0]
                factored = {name for chunk in chunks for name in chunk.factored}
            collectors = self._collectors(call, factored)
            try:
                together(self._ranks, lambda: self._collect(chunks, samples.n, collectors))
                found = self._solve(call, collectors)
            finally:
                for collector in collectors.values():
                    collector.close()
        exact = None if cached is None else cached[1]
        return self._result(call, collectors, found, exact, factored)

    def collect_gradients(
        self,
        model: nn.Module,
        batch: Any,
        n_samples: int | None = None,
        *,
        keep_rows: bool | None = None,
    ) -> GradientCache:
        """Collects the gradients that :meth:`compute_fisher_spectrum` would, and keeps them.

        Up to ``N x P`` numbers stay in memory, fewer where weights come as products. ``keep_rows``
        is without effect, and gone in the next release.

        Raises:
            CurvatureError: there are several ranks.
        """
        if keep_rows is not None:
            what = "keep_rows: without effect; rows are joined when they are asked for"
            warnings.warn(what, DeprecationWarning, stacklevel=2)
        if self._ranks.size > 1:
            raise CurvatureError("collect_gradients: several ranks; allowed: one process")
        model = plain(model)
        with isolated(model, seed=self.config.seed, deterministic=self.config.use_deterministic):
            call = _Call(model, self._draw(model, batch, n_samples))
            return GradientCache(
                sample_unit=call.samples.unit,
                keys=call.samples.keys,
                chunks=tuple(self._gradients(call)[0]),
                parameters=frozenset(call.trainable),
                model_hash=hash_of(model),
                config=replace(self.config),
            )

    # ---- samples and gradients ---------------------------------------------------------------

    def _check_alike(self, model: nn.Module, *choices: object) -> None:
        """Ranks that differ would wait for each other in different collectives."""
        named = model.named_parameters()
        shapes = [(name, tuple(p.shape), p.dtype) for name, p in named if p.requires_grad]
        text = f"{shapes} {self.config} {choices}"
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        same_everywhere(self._ranks, "Fisher spectrum: parameters and choices", digest)

    def _draw(self, model: nn.Module, batch: Any, n_samples: int | None) -> SampleSet:
        return draw_samples(
            model,
            batch,
            unit=self.config.sample_unit,
            n_samples=n_samples,
            seed=self.config.seed,
            loss_fn=self._loss_fn,
            communicator=self._ranks,
        )

    def _gradients(self, call: _Call) -> tuple[Iterable[Chunk], set[str]]:
        """Returns the rows of ``J``, still to be computed, and which weights come as products.

        Products serve the Gram matrix alone: the modes that need rows take none.
        """
        mode, trainable, n = self.config.storage_mode, call.trainable, call.samples.total
        factored: dict[str, nn.Module] = {}
        if self.config.linear_gram != "never" and mode in ("chunked", "streaming"):
            factored = choose_factored(call.model, call.samples, trainable, self._ranks)
        if mode == "streaming":
            # A weight with fewer elements than samples may get a P x P matrix, which needs rows.
            factored = {name: m for name, m in factored.items() if trainable[name].numel() >= n}
        chunks = PerSampleGradients(
            call.model,
            call.samples,
            trainable,
            factored=factored,
            chunk_size=self.config.chunk_size,
            loss_fn=self._loss_fn,
        )
        return chunks, set(factored)

    # ---- matrices ----------------------------------------------------------------------------

    def _collectors(self, call: _Call, factored: set[str]) -> dict[str, BlockMatrix]:
        samples, mode = call.samples, self.config.storage_mode
        parameters = dict(call.model.named_parameters())
        spread, device = Spread(self._ranks, samples.rows), device_of(call.model)
        space = self._space(call)
        result: dict[str, BlockMatrix] = {}
        for block, names in call.blocks.items():
            every = {name: parameters[name].numel() for name in names}
            p = call.sizes[block]
            if samples.total == 0 or p == 0:
                continue
            dtype = call.dtype(block)
            if mode in ("full", "sketch"):
                result[block] = RowMatrix(spread, every, mode, device, dtype)
            elif mode == "streaming" and p < samples.total:
                result[block] = CovarianceMatrix(spread, every, call.center)
            else:
                dense = {name: size for name, size in every.items() if name not in factored}
                products = [name for name in names if name in factored]
                result[block] = GramMatrix(spread, dense, products, space, device, dtype)
        return result

    def _space(self, call: _Call) -> Callable[[], FileBytes]:
        """Chooses memory or disk for the whole call, from an upper bound of what has to wait."""
        each = sum(p.numel() * p.element_size() for p in call.trainable.values())
        waiting = call.samples.n * each
        if waiting <= self.config.memory_budget_mb * 2**20:
            return lambda: FileBytes(io.BytesIO())
        if self.config.storage_mode in ("chunked", "streaming"):
            logger.info(
                "per-sample gradients: up to %.0f MiB past memory_budget_mb=%g: spilled to disk",
                waiting / 2**20,
                self.config.memory_budget_mb,
            )
        return self._spill

    def _collect(
        self, chunks: Iterable[Chunk], n: int, collectors: Mapping[str, BlockMatrix]
    ) -> None:
        for chunk in chunks:
            for collector in collectors.values():
                collector.add(chunk)
            if self._progress is not None:
                self._progress(chunk.first + chunk.n, n)

    # ---- eigenvalues -------------------------------------------------------------------------

    def _solve(self, call: _Call, collectors: Mapping[str, BlockMatrix]) -> dict[str, Found]:
        config, n = self.config, call.samples.total

        def solver(block: str, matrix: Tensor) -> Solved:
            p, rows = call.sizes[block], call.dtype(block)
            if not bool(torch.isfinite(matrix).all()):
                raise eigensolve.SolveError("non-finite gradients")
            if config.storage_mode == "sketch":
                # Each block starts from the seed, so that blocks do not depend on one another.
                seed_generators(config.seed)
                rank = min(config.top_k or config.sketch_rank, n, p)
                return eigensolve.sketch(matrix, rank, rows)
            device = torch.device(config.eigensolve_device.replace("auto", "cpu"))
            if config.eigensolve_device == "auto" and len(matrix) >= 2048:
                device = matrix.device
            return eigensolve.solve(
                matrix,
                min(n, p),
                dtype=self._solver_dtype,
                rows=rows,
                device=device,
                regularization=config.regularization,
            )

        wanted = {b: c for b, c in collectors.items() if not n == call.sizes[b] == 1}
        return solve_blocks(wanted, call.sizes, self._ranks, solver, center=call.center)

    @property
    def _solver_dtype(self) -> torch.dtype:
        """In which the eigenvalues are found; a sketch is made in float64."""
        sketched = self.config.storage_mode == "sketch"
        return torch.float64 if sketched else getattr(torch, self.config.dtype_eigensolve)

    # ---- records -----------------------------------------------------------------------------

    def _result(
        self,
        call: _Call,
        collectors: Mapping[str, BlockMatrix],
        found: Mapping[str, Found],
        cache_exact: bool | None,
        factored: set[str],
    ) -> FisherSpectrum:
        n, top_k = call.samples.total, self.config.top_k
        per_block: dict[str, dict[str, Any]] = {}
        solved: dict[str, Solved] = {}
        for block, p in call.sizes.items():
            one = found.get(block)
            if n == 0:
                one = "no sample: no label counts"
            elif one is None:
                one = "N = P = 1" if n == p == 1 else "no gradient"
            elif isinstance(one, str):
                logger.warning("block %s: %s", block, one)
            if isinstance(one, str):
                record = eigensolve.degenerate(one, n=n, p=p)
            else:
                record = eigensolve.describe(one, n=n, p=p, top_k=top_k)
                if record["status"] == "ok":
                    solved[block] = one
            method = getattr(collectors.get(block), "method", None)
            per_block[block] = BlockSpectrum(record, method=method)
        whole = eigensolve.union(
            solved.values(),
            n=n,
            p=sum(call.sizes[block] for block in solved),
            top_k=top_k,
            n_degenerate=len(call.blocks) - len(solved),
        )
        metadata = self._metadata(call, cache_exact, factored, per_block)
        about = {"metadata": metadata, "per_block": per_block, "global": BlockSpectrum(whole)}
        return FisherSpectrum(about)

    def _metadata(
        self,
        call: _Call,
        cache_exact: bool | None,
        factored: set[str],
        per_block: Mapping[str, dict[str, Any]],
    ) -> dict[str, Any]:
        samples, config = call.samples, self.config
        first = {"seed": config.seed, "use_deterministic": config.use_deterministic}
        return {
            **first,  # the order of the keys in files that there are
            **asdict(config),
            "normalization": "(1/N) * G^T G",
            "row": "gradient of a labelled token's own loss"
            if samples.unit == "token"
            else "gradient of a sequence's token-summed loss",
            "n_samples": samples.total,
            "samples_by_rank": list(samples.rows),
            "n_candidates": samples.n_candidates,
            "data_hash": samples.data_hash,
            "subsample_hash": samples.subsample_hash,
            "block_structure": call.structure,
            "center_gradients": call.center,
            "architecture": architecture_of(call.model),
            "nonzero_threshold": f"(10 side^(1/2) eps({dtype_name(self._solver_dtype)}) + "
            "eps(gradients)^2) * largest eigenvalue, side: of the matrix decomposed",
            "gradient_source": "backward" if cache_exact is None else "cache",
            "cache_exact": cache_exact,
            "factored_weights": sorted(factored),
            "regularization_used": max(
                (record["regularization_used"] for record in per_block.values()), default=0.0
            ),
        }


@dataclass(frozen=True)
class _Call:
    """The spectra of which blocks (name to trainable parameters) are computed from which samples.

    ``model`` has no wrappers, ``structure`` says how the blocks were made, and with ``center`` the
    mean row is subtracted.
    """

    model: nn.Module
    samples: SampleSet
    blocks: Mapping[str, list[str]] = field(default_factory=dict)
    structure: str = "layer"
    center: bool = False

    @functools.cached_property
    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that require a gradient, by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def dtype(self, block: str) -> torch.dtype:
        """The dtype of a block's rows of ``J``."""
        parameters = dict(self.model.named_parameters())
        dtypes = (parameters[name].dtype for name in self.blocks[block])
        return functools.reduce(torch.promote_types, dtypes)

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        """Block name to its number of parameters, ``P``."""
        return {
            block: sum(self.trainable[name].numel() for name in names)
            for block, names in self.blocks.items()
        }


__all__ = ["FisherSpectral", "GradientCache", "SpectralConfig"]
