"""Spectra of the block-diagonal empirical Fisher matrix (``docs/math.md``, section 8)."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fisher_lab.curvature import losses
from fisher_lab.curvature.collectives import Alone, Communicator, same_everywhere, together
from fisher_lab.curvature.errors import CurvatureError
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
from fisher_lab.curvature.spectra.eigensolve import Found, solve_blocks
from fisher_lab.curvature.spectra.gradient_cache import (
    Cached,
    GradientCache,
    Shape,
    cached_chunks,
    fingerprint_of,
    takes_product,
)
from fisher_lab.curvature.spectra.per_sample_gradients import (
    Chunk,
    PerSampleGradients,
    choose_factored,
    factored_of,
)
from fisher_lab.curvature.spectra.samples import SAMPLE_UNITS, SampleSet, draw_samples
from fisher_lab.curvature.spectra.spill import Bytes, FileBytes, MemoryBytes
from fisher_lab.curvature.wrappers import device_of, plain

logger = logging.getLogger(__name__)

STORAGE_MODES = ("full", "chunked", "streaming", "sketch")

Progress = Callable[[int, int], None]
"""``progress(done, total)``: called after every chunk with counts of samples."""


@dataclass(frozen=True, kw_only=True)
class SpectralConfig:
    """How a Fisher spectrum is computed.

    Attributes:
        seed: of the subsample and the sketch.
        use_deterministic: ``torch.use_deterministic_algorithms`` and a fixed cuBLAS workspace
            during the call. Bit-identical from run to run; no slower where it was measured, on a
            CPU (``docs/benchmarks.md``; a GPU can lose more), and an operation without a
            deterministic form is an error.
        sample_unit: ``token`` (a labelled token's own loss) or ``sequence`` (a sequence's
            token-summed loss).
        eigensolve_device: ``cpu``, ``cuda``, or ``auto`` (the host, but the model's GPU from
            a side of 2048 on).
        regularization: added to the diagonal, times the mean diagonal, only after the eigensolver
            failed; the record says what was added.
        dtype_eigensolve: ``torch.float64`` or ``torch.float32``.
        storage_mode: ``chunked`` (Gram matrix from chunks; spilled to disk past
            ``memory_budget_mb``), ``streaming`` (``P x P`` where ``P < N``, else as ``chunked``),
            ``full`` (``N x P`` in memory): all exact; ``sketch`` is approximate, with an error
            estimate.
        chunk_size: rows of one backward pass.
        top_k: eigenvalues kept in a record, at most ``min(N, P)``; None keeps all.
        linear_gram: ``auto`` (without per-sample gradients where that is cheaper, see
            :mod:`fisher_lab.curvature.spectra.per_sample_gradients`) or ``never``.
        memory_budget_mb: MiB of gradients that may wait in memory.
        sketch_rank: eigenvalues of a sketch where ``top_k`` is None.
    """

    seed: int = 42
    use_deterministic: bool = False
    sample_unit: str = "token"
    eigensolve_device: str = "auto"
    regularization: float = 1e-10
    dtype_eigensolve: torch.dtype = torch.float64
    storage_mode: str = "chunked"
    chunk_size: int = 32
    top_k: int | None = None
    linear_gram: Literal["auto", "never"] = "auto"
    memory_budget_mb: float = 512.0
    sketch_rank: int = 32

    def __post_init__(self) -> None:
        """Checks every range.

        Raises:
            CurvatureError: a field is out of range; the message names it.
        """
        _one_of("sample_unit", self.sample_unit, SAMPLE_UNITS)
        _one_of("storage_mode", self.storage_mode, STORAGE_MODES)
        _one_of("eigensolve_device", self.eigensolve_device, ("auto", "cpu", "cuda"))
        _one_of("linear_gram", self.linear_gram, ("auto", "never"))
        _one_of("dtype_eigensolve", self.dtype_eigensolve, (torch.float64, torch.float32))
        for name, least in (("chunk_size", 1), ("sketch_rank", 1), ("regularization", 0)):
            if not getattr(self, name) >= least:
                raise CurvatureError(f"{name}: {getattr(self, name)}; allowed: {least} or more")
        if self.top_k is not None and self.top_k < 1:
            raise CurvatureError(f"top_k: {self.top_k}; allowed: 1 or more, or None for all")
        if not self.memory_budget_mb >= 0:
            raise CurvatureError(f"memory_budget_mb: {self.memory_budget_mb}; allowed: 0 or more")


class FisherSpectral:
    """Eigenvalues of ``F = (1/N) J^T J`` for every block of a model.

    The model is evaluated in ``eval()`` mode (BatchNorm uses its running statistics and keeps
    them); its modes and the random state are restored afterwards. The caller's batch is not
    changed.

    Args:
        config: how; the defaults where it is None.
        gradient_cache: anything with ``per_sample_gradients`` (which may be missing or None), as
            :meth:`collect_gradients` returns it. Where it holds what a call needs, no backward
            pass is made; where it does not (other samples, a parameter that is missing, weights
            that have changed since), one line says so and the gradients are computed. The result
            is exactly the uncached one for the very samples that were collected, with this
            ``storage_mode``, ``linear_gram``, ``chunk_size`` and ``use_deterministic``; in all
            other cases, a subsample of the cache among them, it is so but for rounding
            (``metadata["cache_exact"]`` tells).
        loss_fn: as for :func:`fisher_lab.curvature.losses.score`.
        spill: makes room on disk for one array; an unnamed temporary file where it is None.
        progress: called after every chunk.
        communicator: of the ranks whose samples are joined; None for this process alone. Every
            rank then has batches of its own (some may have none), its methods are collective, and
            every rank gets the spectra of all samples.

    Raises:
        CurvatureError: a cache or the mode ``sketch``, neither of which there is on several ranks;
            ``eigensolve_device="cuda"`` on a machine without.
    """

    def __init__(
        self,
        config: SpectralConfig | None = None,
        gradient_cache: Any = None,
        *,
        loss_fn: losses.LossFunction | None = None,
        spill: Callable[[], Bytes] | None = None,
        progress: Progress | None = None,
        communicator: Communicator | None = None,
    ) -> None:
        self.config = config or SpectralConfig()
        check_device("eigensolve_device", self.config.eigensolve_device)
        self._ranks = communicator or Alone()
        if self._ranks.size > 1:
            allowed = [mode for mode in STORAGE_MODES if mode != "sketch"]
            _one_of("storage_mode on several ranks", self.config.storage_mode, tuple(allowed))
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
    ) -> dict[str, Any]:
        """Computes the spectrum of every block.

        Args:
            model: any module whose labelling is known, or any with a ``loss_fn``; DDP and
                ``fully_shard`` are looked through (:func:`fisher_lab.curvature.wrappers.plain`).
            batch: one batch or an iterable of batches; on several ranks this rank's own.
            n_samples: size of the subsample of all ranks' samples; None takes all.
            block_structure: ``layer``, ``module``, ``parameter`` or ``full``.
            center_gradients: subtract the mean row (gradient covariance instead of Fisher).

        Returns:
            ``metadata``; ``per_block`` by block name; ``global``, the union of the blocks. A
            block without a spectrum has ``status: degenerate``, a ``reason`` and no number, and
            is left out of ``global``.

        Raises:
            CurvatureError: the block structure has another name; ranks differ in model or choices.
            BatchError: a batch has no labels.
            RankError: another rank has an error.
        """
        model = plain(model)
        blocks = parameter_blocks(model, block_structure)
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        with self._isolated(model):
            self._check_alike(parameters, n_samples, block_structure, center_gradients)
            samples = self._draw(model, batch, n_samples)
            cached = cached_chunks(self.gradient_cache, samples, parameters, model, self._shape())
            chunks = self._chunks(model, samples, parameters) if cached is None else cached.chunks
            factored = factored_of(chunks)
            collectors = self._collectors(model, samples, blocks, factored, center_gradients)
            try:
                together(self._ranks, lambda: self._collect(chunks, samples, collectors))
                solved, per_block = self._solve_all(
                    model, samples, blocks, collectors, center_gradients
                )
            finally:
                for collector in collectors.values():
                    collector.close()
        n_degenerate = len(blocks) - len(solved)
        return {
            "metadata": self._metadata(
                model, samples, block_structure, center_gradients, cached, factored, per_block
            ),
            "per_block": per_block,
            "global": eigensolve.union(
                solved.values(),
                n=samples.total,
                p=sum(per_block[name]["n_params"] for name in solved),
                top_k=self.config.top_k,
                n_degenerate=n_degenerate,
                dtype=self._solver_dtype,
            ),
        }

    def collect_gradients(
        self,
        model: nn.Module,
        batch: Any,
        n_samples: int | None = None,
        *,
        keep_rows: bool = False,
    ) -> GradientCache:
        """Collects what :meth:`compute_fisher_spectrum` would, and keeps it in memory.

        Args:
            model: as there.
            batch: as there.
            n_samples: as there.
            keep_rows: keep both gradients and products, whatever this engine's ``storage_mode``
                and ``linear_gram``, so that an engine with any of them is served exactly.

        Returns:
            The cache, ``N x P`` numbers (fewer where products are kept instead of gradients, and
            up to about half as many again where both are).

        Raises:
            CurvatureError: there are several ranks.
        """
        if self._ranks.size > 1:
            raise CurvatureError("collect_gradients: several ranks; allowed: one process")
        model = plain(model)
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        with self._isolated(model):
            samples = self._draw(model, batch, n_samples)
            chunks = self._chunks(model, samples, parameters, keep_rows=keep_rows)
            cache = GradientCache.from_chunks(chunks, samples)
            cache.parameters, cache.fingerprint = frozenset(parameters), fingerprint_of(model)
            cache.shape, cache.keeps_rows = self._shape(), keep_rows
            return cache

    def _shape(self) -> Shape:
        """The settings by which a cache has to be like this engine to give its very bits."""
        config = self.config
        products = {"chunked": "all", "streaming": "streaming"}.get(config.storage_mode, "none")
        if config.linear_gram == "never":
            products = "none"
        return Shape(products, config.chunk_size, config.use_deterministic)

    def _isolated(self, model: nn.Module) -> Any:
        return isolated(model, seed=self.config.seed, deterministic=self.config.use_deterministic)

    def _check_alike(self, parameters: Mapping[str, nn.Parameter], *choices: Any) -> None:
        """Ranks that differ would wait for one another for something else each."""
        if self._ranks.size == 1:
            return
        shapes = [(name, tuple(p.shape), p.dtype) for name, p in parameters.items()]
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

    def _choose_factored(
        self, model: nn.Module, samples: SampleSet, parameters: Mapping[str, nn.Parameter]
    ) -> dict[str, nn.Module]:
        """Products serve the Gram matrix alone: the modes that need rows take none."""
        products = self._shape().products
        if products == "none":
            return {}
        chosen = choose_factored(model, samples, parameters, self._ranks)
        return {
            name: module
            for name, module in chosen.items()
            if takes_product(products, parameters[name], samples.total)
        }

    def _collectors(
        self,
        model: nn.Module,
        samples: SampleSet,
        blocks: Mapping[str, list[str]],
        factored: set[str],
        center: bool,
    ) -> dict[str, BlockMatrix]:
        parameters = dict(model.named_parameters())
        space = self._space(model, samples, blocks, factored)
        device = device_of(model)
        result: dict[str, BlockMatrix] = {}
        for block, names in blocks.items():
            every = {name: parameters[name].numel() for name in names}
            p, n = sum(every.values()), samples.n
            if samples.total == 0 or p == 0:
                continue
            dtypes = (parameters[name].dtype for name in names)
            dtype = functools.reduce(torch.promote_types, dtypes)
            if self.config.storage_mode in ("full", "sketch"):
                result[block] = RowMatrix(n, every, device, dtype)
            elif self.config.storage_mode == "streaming" and p < samples.total:
                result[block] = CovarianceMatrix(every, center)
            else:
                dense = {name: size for name, size in every.items() if name not in factored}
                weights = [name for name in names if name in factored]
                longest = max(samples.rows)
                result[block] = GramMatrix(
                    n, dense, weights, space, device, dtype=dtype, longest=longest
                )
        return result

    def _space(
        self,
        model: nn.Module,
        samples: SampleSet,
        blocks: Mapping[str, list[str]],
        factored: set[str],
    ) -> Callable[[], Bytes]:
        """Chooses memory or disk for the whole call, from an upper bound of what has to wait."""
        wanted = {name for names in blocks.values() for name in names}
        waiting = samples.n * sum(
            p.numel() * p.element_size() for name, p in model.named_parameters() if name in wanted
        )
        fits = waiting <= self.config.memory_budget_mb * 2**20
        if not fits and self.config.storage_mode in ("chunked", "streaming"):
            logger.info(
                "per-sample gradients: up to %.0f MiB past memory_budget_mb=%g: spilled to disk",
                waiting / 2**20,
                self.config.memory_budget_mb,
            )
        return MemoryBytes if fits else self._spill

    def _collect(
        self,
        chunks: Iterable[Chunk],
        samples: SampleSet,
        collectors: Mapping[str, BlockMatrix],
    ) -> None:
        for chunk in chunks:
            for collector in collectors.values():
                collector.add(chunk)
            if self._progress is not None:
                self._progress(chunk.first + chunk.n, samples.n)

    def _chunks(
        self,
        model: nn.Module,
        samples: SampleSet,
        parameters: Mapping[str, nn.Parameter],
        *,
        keep_rows: bool = False,
    ) -> PerSampleGradients:
        choose = choose_factored if keep_rows else self._choose_factored
        return PerSampleGradients(
            model,
            samples,
            parameters,
            factored=choose(model, samples, parameters),
            chunk_size=self.config.chunk_size,
            loss_fn=self._loss_fn,
            keep_rows=keep_rows,
        )

    def _solve_all(
        self,
        model: nn.Module,
        samples: SampleSet,
        blocks: Mapping[str, list[str]],
        collectors: Mapping[str, BlockMatrix],
        center: bool,
    ) -> tuple[dict[str, eigensolve.Solved], dict[str, dict[str, Any]]]:
        numbers = {name: p.numel() for name, p in model.named_parameters()}
        sizes = {block: sum(numbers[name] for name in names) for block, names in blocks.items()}
        n = samples.total

        def solver(block: str, matrix: Tensor | None) -> eigensolve.Solved:
            return self._eigenvalues(collectors[block], matrix, n, sizes[block], center)

        wanted = {b: c for b, c in collectors.items() if not n == sizes[b] == 1}
        found = solve_blocks(wanted, sizes, samples.rows, self._ranks, solver, center=center)
        solved: dict[str, eigensolve.Solved] = {}
        per_block: dict[str, dict[str, Any]] = {}
        for block, p in sizes.items():
            one = found.get(block)
            record = self._record(block, one, n, p)
            if isinstance(one, eigensolve.Solved) and record["status"] == "ok":
                solved[block] = one
            per_block[block] = {**record, "method": self._method(collectors.get(block))}
        return solved, per_block

    def _record(self, block: str, found: Found | None, n: int, p: int) -> dict[str, Any]:
        if n == 0:
            return eigensolve.degenerate("no sample: no label counts", n=n, p=p)
        if found is None:
            reason = "N = P = 1" if n == p == 1 else "no gradient"
            return eigensolve.degenerate(reason, n=n, p=p)
        if isinstance(found, str):
            logger.warning("block %s: %s", block, found)
            return eigensolve.degenerate(found, n=n, p=p)
        return eigensolve.describe(
            found, n=n, p=p, top_k=self.config.top_k, dtype=self._solver_dtype
        )

    @property
    def _solver_dtype(self) -> torch.dtype:
        """In which the eigenvalues are found; a sketch is made in float64."""
        sketched = self.config.storage_mode == "sketch"
        return torch.float64 if sketched else self.config.dtype_eigensolve

    def _eigenvalues(
        self, collector: BlockMatrix, matrix: Tensor | None, n: int, p: int, center: bool
    ) -> eigensolve.Solved:
        config = self.config
        if config.storage_mode == "sketch" and isinstance(collector, RowMatrix):
            rows = collector.rows(center=center)
            if not bool(torch.isfinite(rows).all()):
                raise eigensolve.SolveError("non-finite gradients")
            # Each block starts from the seed, so that blocks do not depend on one another.
            seed_generators(config.seed)
            return eigensolve.sketch(rows, min(config.top_k or config.sketch_rank, n, p))
        matrix = collector.matrix(center=center) if matrix is None else matrix
        if not bool(torch.isfinite(matrix).all()):
            raise eigensolve.SolveError("non-finite gradients")
        return eigensolve.solve(
            matrix,
            min(n, p),
            dtype=config.dtype_eigensolve,
            device=self._device(matrix),
            regularization=config.regularization,
        )

    def _device(self, matrix: Tensor) -> torch.device:
        match self.config.eigensolve_device:
            case "auto":
                return matrix.device if len(matrix) >= 2048 else torch.device("cpu")
            case name:
                return torch.device(name)

    def _method(self, collector: BlockMatrix | None) -> str | None:
        if collector is None:
            return None
        return "sketch" if self.config.storage_mode == "sketch" else collector.method

    def _metadata(
        self,
        model: nn.Module,
        samples: SampleSet,
        structure: str,
        center: bool,
        cached: Cached | None,
        factored: set[str],
        per_block: Mapping[str, dict[str, Any]],
    ) -> dict[str, Any]:
        config = asdict(self.config)
        config["dtype_eigensolve"] = _name(self.config.dtype_eigensolve)
        return {
            **config,
            "normalization": "(1/N) * G^T G",
            "row": "gradient of a labelled token's own loss"
            if samples.unit == "token"
            else "gradient of a sequence's token-summed loss",
            "n_samples": samples.total,
            "samples_by_rank": list(samples.rows),
            "n_candidates": samples.n_candidates,
            "data_hash": samples.data_hash,
            "subsample_hash": samples.subsample_hash,
            "block_structure": structure,
            "center_gradients": center,
            "architecture": architecture_of(model),
            "nonzero_threshold": f"max(N, P) * eps({_name(self._solver_dtype)}) * "
            "largest eigenvalue",
            "gradient_source": "backward" if cached is None else "cache",
            "cache_exact": None if cached is None else cached.exact,
            "factored_weights": sorted(factored),
            "regularization_used": max(
                (record["regularization_used"] for record in per_block.values()), default=0.0
            ),
        }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        options = ", ".join(str(option) for option in allowed)
        raise CurvatureError(f"{name}: {value!r}; allowed: {options}")


__all__ = ["STORAGE_MODES", "FisherSpectral", "GradientCache", "SpectralConfig"]
