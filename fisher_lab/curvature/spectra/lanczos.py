"""Top eigenpairs, spectral density, trace and effective dimension without a stored matrix.

Definitions in ``docs/math.md``, section 8; the parts in :mod:`fisher_lab.curvature.spectra`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fisher_lab.config.errors import SettingError
from fisher_lab.curvature import losses
from fisher_lab.curvature.collectives import Alone, Communicator
from fisher_lab.curvature.errors import CurvatureError
from fisher_lab.curvature.evaluation_mode import isolated
from fisher_lab.curvature.memory import check_device, free_memory
from fisher_lab.curvature.spectra.blocks import select_parameters
from fisher_lab.curvature.spectra.krylov import (
    LanczosResult,
    MatVec,
    default_vectors,
    lanczos_algorithm,
)
from fisher_lab.curvature.spectra.operators import OPERATORS, PRODUCTS, CurvatureOperator
from fisher_lab.curvature.spectra.quadrature import (
    Estimate,
    Quadrature,
    hutch_plus_plus,
    quadrature,
)
from fisher_lab.curvature.wrappers import plain

logger = logging.getLogger(__name__)


class FisherLanczos:
    """Spectral quantities of the Fisher matrix or the Hessian by matrix-free products.

    The model is evaluated in ``eval()`` mode and left as it was found. On several ranks every
    method that takes batches is collective: each rank brings its own (some may have none), the
    first one runs the algorithm and holds its vectors, all make their share of every product, and
    every rank gets the result for all batches.

    Args:
        k: eigenpairs wanted.
        max_vectors: basis vectors ``m`` of Lanczos; None: ``min(n, max(2k + 10, 20))``. The basis
            takes ``m n_params itemsize`` bytes, which is said, and checked against what is free,
            before it is allocated; so are ``k`` more vectors where eigenvectors are formed.
        operator: ``empirical`` (Fisher over the labels), ``true`` (over the model's own
            distribution; the generalised Gauss-Newton matrix) or ``hessian``.
        tol: a pair has converged when its residual is at most ``tol`` times the largest
            eigenvalue's magnitude.
        seed: of the first vector and of all probes.
        reorthogonalize: full reorthogonalisation; False keeps to the three-term recurrence, whose
            copies of eigenvalues are left out of :meth:`top_eigenpairs` (fewer than ``k`` may
            stay). What takes eigenpairs as known, :meth:`effective_dimension` and
            :meth:`analyze` with probes, needs True.
        vector_device: where the basis lives: ``cpu``, ``cuda``, or ``auto`` (with the model if it
            fits there, else on the host).
        max_products: gives up after so many products; None: ``max(20 m, 300)``.
        which: ``largest``, ``smallest`` or ``magnitude`` (for an indefinite Hessian).
        products: ``auto``, ``forward`` or ``double_backward``
            (:class:`fisher_lab.curvature.spectra.operators.CurvatureOperator`).
        vector_dtype: of the basis; None takes the parameters' own.
        loss_fn: as for :func:`fisher_lab.curvature.losses.score`.
        say: gets the line about memory; where it is None, the module's logger does, as a warning,
            so that it is seen where nobody set logging up.
        communicator: of the ranks; None for this process alone.

    Raises:
        CurvatureError: an argument is out of range, or ``vector_device="cuda"`` on a machine
            without.
    """

    def __init__(
        self,
        k: int = 10,
        max_vectors: int | None = None,
        operator: str = "empirical",
        tol: float = 1e-6,
        seed: int = 42,
        reorthogonalize: bool = True,
        vector_device: str = "auto",
        *,
        max_products: int | None = None,
        which: str = "largest",
        products: str = "auto",
        vector_dtype: torch.dtype | None = None,
        loss_fn: losses.LossFunction | None = None,
        say: Callable[[str], None] | None = None,
        communicator: Communicator | None = None,
    ) -> None:
        for name, value, allowed in (
            ("operator", operator, OPERATORS),
            ("vector_device", vector_device, ("auto", "cpu", "cuda")),
            ("products", products, PRODUCTS),
        ):
            if value not in allowed:
                raise CurvatureError(f"{name}: {value!r}; allowed: {', '.join(allowed)}")
        check_device("vector_device", vector_device)
        if k < 1:
            raise CurvatureError(f"k: {k}; allowed: 1 or more")
        self.k, self.max_vectors, self.operator, self.tol = k, max_vectors, operator, tol
        self.seed, self.reorthogonalize = seed, reorthogonalize
        self.vector_device, self.vector_dtype = vector_device, vector_dtype
        self.max_products, self.which, self.products = max_products, which, products
        self._loss_fn = loss_fn
        self._say = say or logger.warning
        self._ranks = communicator or Alone()

    def top_eigenpairs(
        self,
        model: nn.Module,
        batch: Any,
        block: str | None = None,
        *,
        eigenvectors: bool = False,
    ) -> dict[str, Any]:
        """Finds the top ``k`` eigenpairs of the whole model or of a block.

        Args:
            model: any module whose labelling is known, or any with a ``loss_fn``.
            batch: one batch or an iterable of batches.
            block: name of a block in any structure (``transformer.h.0``, a module, a parameter);
                None for the whole model.
            eigenvectors: whether to return them.

        Returns:
            ``eigenvalues`` (descending), ``residuals`` and ``converged`` by pair, ``n_products``,
            ``n_restarts``, ``n_vectors``, ``memory_bytes``, ``n_params``, ``n_samples`` (labelled
            tokens), ``operator``, ``block``, ``products`` (the way the products were made); with
            ``eigenvectors``, also these as name to ``[k, *shape]``.

        Raises:
            CurvatureError: no such block, or the basis does not fit into memory.
            BatchError: no label counts.
        """
        kept: list[Tensor] = []
        with self._opened(model, batch, block) as matrix:

            def work() -> dict[str, Any]:
                wanted = (eigenvectors, matrix.dtype, matrix.device)
                found = self._run(matrix, matrix.n, self.k, *wanted)
                kept.extend([] if found.eigenvectors is None else [found.eigenvectors])
                return self._pairs(found, matrix, block)

            record = matrix.led(work)
            if eigenvectors:
                record["eigenvectors"] = matrix.unflatten(self._of_rank_0(kept, record, matrix))
            return record

    def _of_rank_0(
        self, kept: list[Tensor], record: dict[str, Any], matrix: CurvatureOperator
    ) -> Tensor:
        """Sends the vectors ``[k, n]`` to the ranks that have none."""
        if self._ranks.size == 1:
            return kept[0]
        shape = (len(record["eigenvalues"]), matrix.n)
        dtype = self.vector_dtype or matrix.dtype
        mine = kept[0] if kept else torch.empty(shape, dtype=dtype, device=matrix.device)
        return self._ranks.broadcast(mine, 0)

    def analyze(
        self,
        model: nn.Module,
        batch: Any,
        block: str | None = None,
        *,
        lam: float | None = None,
        n_probes: int = 4,
        steps: int = 30,
        n_grid: int = 256,
    ) -> dict[str, Any]:
        """Finds eigenpairs, density, trace and effective dimension from one set of products.

        The probes are deflated by the eigenpairs found, which then enter exactly: less variance,
        and no product is made twice.

        Args:
            model: as for :meth:`top_eigenpairs`.
            batch: as there.
            block: as there.
            lam: damping of the effective dimension; None leaves it out.
            n_probes: random vectors of the rest, 0 for eigenpairs alone.
            steps: Lanczos steps a probe.
            n_grid: points of the density's grid.

        Returns:
            ``top`` (as :meth:`top_eigenpairs`); with probes also ``density`` (as
            :meth:`spectral_density`), ``trace`` and, with ``lam``, ``effective_dimension``.

        Raises:
            CurvatureError: an argument is out of range, or the basis does not fit into memory.
            SettingError: probes without ``reorthogonalize``.
        """
        self._check_damping(lam)
        if n_probes > 0:
            self._check_orthogonal("n_probes=0")
        with self._opened(model, batch, block) as matrix:
            return matrix.led(lambda: self._analyze(matrix, block, lam, n_probes, steps, n_grid))

    def _analyze(
        self,
        matrix: CurvatureOperator,
        block: str | None,
        lam: float | None,
        n_probes: int,
        steps: int,
        n_grid: int,
    ) -> dict[str, Any]:
        found = self._run(matrix, matrix.n, self.k, n_probes > 0, matrix.dtype, matrix.device)
        result: dict[str, Any] = {"top": self._pairs(found, matrix, block)}
        if n_probes == 0:
            return result
        rule = self._rest(matrix, found, n_probes, steps, self.seed + 1)
        dtype = self.vector_dtype or matrix.dtype
        log = self.operator != "hessian"
        result["density"] = {
            **_density(rule, dtype, n_grid, None, log),
            **self._about(matrix, block),
        }
        result["trace"] = asdict(rule.trace_of(lambda x: x))
        if lam is not None:
            dimension = rule.trace_of(lambda x: _filter(x, lam))
            result["effective_dimension"] = {**asdict(dimension), "lam": lam}
        return result

    def lanczos_algorithm(
        self, matvec: MatVec, n: int, k: int | None = None, *, eigenvectors: bool = True
    ) -> LanczosResult:
        """Finds extreme eigenpairs of any symmetric operator on float64 vectors ``[n]``.

        Args:
            matvec: product with a vector.
            n: size of the operator.
            k: pairs wanted; None takes this object's.
            eigenvectors: whether to return them.

        Raises:
            CurvatureError: an argument is out of range, or the basis does not fit into memory.
        """
        device = torch.device("cuda" if self.vector_device == "cuda" else "cpu")
        dtype = self.vector_dtype or torch.float64
        return self._run(matvec, n, k or self.k, eigenvectors, dtype, device)

    def spectral_density(
        self,
        model: nn.Module,
        batch: Any,
        block: str | None = None,
        *,
        n_probes: int = 8,
        steps: int = 40,
        n_grid: int = 256,
        sigma: float | None = None,
        log: bool = False,
    ) -> dict[str, Any]:
        """Estimates the density of eigenvalues by stochastic Lanczos quadrature.

        Args:
            model: as for :meth:`top_eigenpairs`.
            batch: as there.
            block: as there.
            n_probes: random vectors.
            steps: Lanczos steps a probe, full reorthogonalisation.
            n_grid: points of the grid.
            sigma: width of the Gaussians in the grid's unit; None takes 1 % of its span.
            log: over the decimal logarithm of the eigenvalue; what is zero or negative but for
                rounding is left out, and its share returned as ``mass_left_out``.

        Returns:
            ``grid``, ``density``, ``standard_error`` (lists), ``mass_at_zero`` (share of the
            eigenvalues that are zero but for rounding), ``nodes`` and ``weights`` by probe, and
            ``trace`` with its standard error from the same products.

        Raises:
            CurvatureError: no such block, or the basis does not fit into memory.
        """
        with self._opened(model, batch, block) as matrix:

            def work() -> dict[str, Any]:
                rule = self._quadrature(matrix, n_probes, steps)
                dtype = self.vector_dtype or matrix.dtype
                return {
                    **_density(rule, dtype, n_grid, sigma, log),
                    "trace": asdict(rule.trace_of(lambda x: x)),
                    **self._about(matrix, block),
                }

            return matrix.led(work)

    def _quadrature(self, matrix: CurvatureOperator, n_probes: int, steps: int) -> Quadrature:
        dtype = self.vector_dtype or matrix.dtype
        wanted = Wanted("steps", min(steps, matrix.n))
        device = self._reserve(wanted, matrix.n, dtype, matrix.device)
        return quadrature(
            matrix,
            matrix.n,
            n_probes=n_probes,
            steps=steps,
            seed=self.seed,
            dtype=dtype,
            device=device,
        )

    def trace(
        self,
        model: nn.Module,
        batch: Any,
        block: str | None = None,
        *,
        method: str = "hutch++",
        n_products: int = 60,
        steps: int = 1,
    ) -> Estimate:
        """Estimates the trace.

        Args:
            model: as for :meth:`top_eigenpairs`.
            batch: as there.
            block: as there.
            method: ``hutch++`` or ``slq`` (stochastic Lanczos quadrature).
            n_products: products in all.
            steps: Lanczos steps a probe of ``slq`` (one is exact for the trace).

        Raises:
            CurvatureError: the method has another name, or an argument is out of range.
        """
        if method not in ("hutch++", "slq"):
            raise CurvatureError(f"method: {method!r}; allowed: hutch++, slq")
        with self._opened(model, batch, block) as matrix:

            def work() -> dict[str, Any]:
                if method == "slq":
                    rule = self._quadrature(matrix, max(n_products // steps, 1), steps)
                    return asdict(rule.trace_of(lambda x: x))
                dtype = self.vector_dtype or matrix.dtype
                # The random range, its orthonormal basis and the work space in between.
                blocks = Wanted("n_products", max(n_products // 3, 1), copies=3)
                device = self._reserve(blocks, matrix.n, dtype, matrix.device)
                estimate = hutch_plus_plus(
                    matrix,
                    matrix.n,
                    n_products=n_products,
                    seed=self.seed,
                    dtype=dtype,
                    device=device,
                )
                return asdict(estimate)

            return Estimate(**matrix.led(work))

    def effective_dimension(
        self,
        model: nn.Module,
        batch: Any,
        lam: float,
        block: str | None = None,
        *,
        n_probes: int = 8,
        steps: int = 40,
    ) -> Estimate:
        """Estimates ``tr(F (F + lam I)^-1)``.

        The top ``k`` eigenpairs enter exactly, their complement by quadrature.

        Args:
            model: as for :meth:`top_eigenpairs`.
            batch: as there.
            lam: damping, above 0.
            block: as for :meth:`top_eigenpairs`.
            n_probes: random vectors.
            steps: Lanczos steps a probe.

        Raises:
            CurvatureError: ``lam`` is not above 0, or the operator may be indefinite.
            SettingError: without ``reorthogonalize``.
        """
        self._check_damping(lam)
        self._check_orthogonal()
        with self._opened(model, batch, block) as matrix:

            def work() -> dict[str, Any]:
                found = self._run(matrix, matrix.n, self.k, True, matrix.dtype, matrix.device)
                rule = self._rest(matrix, found, n_probes, steps, self.seed + 1)
                dimension = asdict(rule.trace_of(lambda x: _filter(x, lam)))
                return {**dimension, "n_products": dimension["n_products"] + found.n_products}

            return Estimate(**matrix.led(work))

    def _check_damping(self, lam: float | None) -> None:
        if lam is None:
            return
        if not lam > 0:
            raise CurvatureError(f"lam: {lam}; allowed: above 0")
        if self.operator == "hessian":
            raise CurvatureError("operator: 'hessian' may be indefinite; allowed: empirical, true")

    def _check_orthogonal(self, otherwise: str | None = None) -> None:
        """Copies of eigenvalues would be counted as known, each with a vector that is not new."""
        if not self.reorthogonalize:
            allowed = "True" if otherwise is None else f"True, or {otherwise}"
            raise SettingError(
                f"reorthogonalize: False; allowed where eigenpairs count as known: {allowed}"
            )

    def _rest(
        self, matrix: CurvatureOperator, found: LanczosResult, n_probes: int, steps: int, seed: int
    ) -> Quadrature:
        """Quadrature whose probes are deflated by the pairs that converged, which enter exactly."""
        assert found.eigenvectors is not None
        keep, vectors = torch.tensor(found.converged), found.eigenvectors
        dtype = self.vector_dtype or matrix.dtype
        # The basis that found them is gone; those that are kept are copied unless all are.
        some = 0 if bool(keep.all()) else int(keep.sum())
        wanted = Wanted("steps", min(steps, matrix.n), eigenvectors=some)
        self._reserve(wanted, matrix.n, dtype, matrix.device)
        if some:
            vectors = vectors[keep.to(vectors.device)]
        return quadrature(
            matrix,
            matrix.n,
            n_probes=n_probes,
            steps=steps,
            seed=seed,
            dtype=dtype,
            device=vectors.device,
            deflate=vectors if bool(keep.any()) else None,
        ).with_known(found.eigenvalues[keep])

    def _pairs(
        self, found: LanczosResult, matrix: CurvatureOperator, block: str | None
    ) -> dict[str, Any]:
        return {
            "eigenvalues": found.eigenvalues.tolist(),
            "residuals": found.residuals.tolist(),
            "converged": list(found.converged),
            "n_products": found.n_products,
            "n_restarts": found.n_restarts,
            "n_vectors": found.n_vectors,
            "memory_bytes": found.memory_bytes,
            "tolerance": self.tol,
            "seed": self.seed,
            **self._about(matrix, block),
        }

    @contextmanager
    def _opened(
        self, model: nn.Module, batch: Any, block: str | None
    ) -> Iterator[CurvatureOperator]:
        model = plain(model)
        with isolated(model, seed=self.seed):
            yield CurvatureOperator(
                self.operator,
                model,
                batch,
                select_parameters(model, block),
                loss_fn=self._loss_fn,
                products=self.products,
                communicator=self._ranks,
            )

    def _run(
        self,
        matvec: MatVec,
        n: int,
        k: int,
        eigenvectors: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> LanczosResult:
        m = default_vectors(n, min(k, n)) if self.max_vectors is None else min(self.max_vectors, n)
        dtype = self.vector_dtype or dtype
        wanted = Wanted("max_vectors", m, eigenvectors=min(k, n) if eigenvectors else 0)
        device = self._reserve(wanted, n, dtype, device)
        return lanczos_algorithm(
            matvec,
            n,
            k,
            max_vectors=m,
            max_products=self.max_products,
            tol=self.tol,
            seed=self.seed,
            which=self.which,
            reorthogonalize=self.reorthogonalize,
            dtype=dtype,
            device=device,
            eigenvectors=eigenvectors,
        )

    def _reserve(
        self, wanted: Wanted, n: int, dtype: torch.dtype, model_device: torch.device
    ) -> torch.device:
        """Says what the vectors will take, and chooses where they fit."""
        each = n * torch.empty(0, dtype=dtype).element_size()
        device = model_device if self.vector_device == "auto" else torch.device(self.vector_device)
        free = free_memory(device)
        if wanted.vectors * each > free and self.vector_device == "auto" and device.type != "cpu":
            device = torch.device("cpu")
            free = free_memory(device)
        self._say(
            f"Lanczos basis: {wanted} x {n} parameters x {dtype} = "
            f"{wanted.vectors * each / 2**20:.1f} MiB on {device} ({free / 2**20:.0f} MiB free)"
        )
        if wanted.vectors * each > free:
            raise CurvatureError(
                f"{wanted.setting}: {wanted} of {n} parameters take "
                f"{wanted.vectors * each / 2**20:.0f} MiB, and {free / 2**20:.0f} MiB are free on "
                f"{device}; allowed: {wanted.basis_of(free // max(each, 1))} or fewer vectors, "
                "or a smaller block"
            )
        return device

    def _about(self, matrix: CurvatureOperator, block: str | None) -> dict[str, Any]:
        return {
            "operator": self.operator,
            "block": block,
            "products": "double_backward" if self.operator == "hessian" else matrix.used,
            "n_params": matrix.n,
            "n_samples": matrix.n_labels,
        }


@dataclass(frozen=True)
class Wanted:
    """Vectors that are about to be allocated.

    Attributes:
        setting: the argument that their number follows from.
        basis: vectors of the basis, ``m``.
        copies: how many blocks of that size there are at once.
        eigenvectors: further vectors.
    """

    setting: str
    basis: int
    copies: int = 1
    eigenvectors: int = 0

    @property
    def vectors(self) -> int:
        """All of them."""
        return self.basis * self.copies + self.eigenvectors

    def basis_of(self, vectors: int) -> int:
        """The largest basis with which no more than so many vectors are allocated."""
        return max((vectors - self.eigenvectors) // self.copies, 0)

    def __str__(self) -> str:
        parts = f"{self.basis} vectors"
        parts = f"{self.copies} blocks of {parts}" if self.copies > 1 else parts
        return f"({parts} + {self.eigenvectors} eigenvectors)" if self.eigenvectors else parts


def _filter(values: Tensor, lam: float) -> Tensor:
    """``x / (x + lam)`` on eigenvalues that are not negative but for rounding."""
    clean = values.clamp(min=0)
    return clean / (clean + lam)


def _density(
    rule: Quadrature, dtype: torch.dtype, n_grid: int, sigma: float | None, log: bool
) -> dict[str, Any]:
    largest = max(float(nodes.abs().max()) for nodes in rule.nodes)
    floor = rule.n * torch.finfo(dtype).eps * largest
    zero = rule.trace_of(lambda x: (x.abs() <= floor).double())
    left_out = rule.trace_of(lambda x: (x <= floor).double())
    grid, width = _grid(rule.nodes, floor, n_grid, sigma, log)
    clean = replace(rule, nodes=tuple(_drop(x, floor) for x in rule.nodes)) if log else rule
    density, error = clean.density(grid, width, log=log)
    return {
        "grid": grid.tolist(),
        "scale": "log10" if log else "linear",
        "density": density.tolist(),
        "standard_error": error.tolist(),
        "sigma": width,
        "mass_at_zero": zero.value / rule.n,
        "mass_left_out": left_out.value / rule.n if log else 0.0,
        "nodes": [nodes.tolist() for nodes in rule.nodes],
        "weights": [weights.tolist() for weights in rule.weights],
    }


def _grid(
    nodes: tuple[Tensor, ...], floor: float, n_grid: int, sigma: float | None, log: bool
) -> tuple[Tensor, float]:
    every = torch.cat(nodes)
    if log:
        every = every[every > floor].log10()
    low, high = (float(every.min()), float(every.max())) if len(every) else (-1.0, 0.0)
    span = max(high - low, 1e-3 * max(abs(high), 1e-30))
    width = 0.01 * span if sigma is None else sigma
    return torch.linspace(low - 4 * width, high + 4 * width, n_grid, dtype=torch.float64), width


def _drop(nodes: Tensor, floor: float) -> Tensor:
    return torch.where(nodes > floor, nodes, torch.zeros_like(nodes))


__all__ = [
    "Estimate",
    "FisherLanczos",
    "LanczosResult",
    "lanczos_algorithm",
]
