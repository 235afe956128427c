"""Top eigenpairs, spectral density, trace and effective dimension without a stored matrix.

Definitions are in ``docs/math.md``, section 8.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fisher_lab.config.errors import SettingError
from fisher_lab.config.spectra import LanczosConfig
from fisher_lab.curvature import losses
from fisher_lab.curvature.collectives import Alone, Communicator
from fisher_lab.curvature.errors import CurvatureError, check_one_of, check_options
from fisher_lab.curvature.evaluation_mode import isolated
from fisher_lab.curvature.linalg import MatVec
from fisher_lab.curvature.memory import check_device, free_memory
from fisher_lab.curvature.spectra.blocks import select_parameters
from fisher_lab.curvature.spectra.krylov import LanczosResult, default_vectors, lanczos_algorithm
from fisher_lab.curvature.spectra.operators import CurvatureOperator
from fisher_lab.curvature.spectra.quadrature import (
    Estimate,
    Quadrature,
    damped_share,
    density_record,
    hutch_plus_plus,
    quadrature,
)
from fisher_lab.curvature.wrappers import plain

logger = logging.getLogger(__name__)


class FisherLanczos:
    """Spectral quantities of the Fisher matrix or the Hessian by matrix-free products.

    The model is evaluated in ``eval()`` mode and left as it was found. On several ranks every
    method that takes batches is collective: each rank brings its own (some may have none), rank 0
    runs the algorithm and holds its vectors, all ranks compute their part of every product, and
    every rank gets the result for all batches. ``model``, ``batch`` and ``block`` are those of
    :meth:`top_eigenpairs` everywhere.

    The basis takes ``m n_params itemsize`` bytes for ``m`` vectors, which is said, and checked
    against what is free, before it is allocated; so are ``k`` more vectors where eigenvectors are
    formed. Without ``reorthogonalize`` the copies of eigenvalues are left out of
    :meth:`top_eigenpairs`, so that fewer than ``k`` may be left, and methods that take eigenpairs
    as known refuse to run.

    Args:
        *values: options by position, in the order of
            :class:`fisher_lab.config.spectra.LanczosConfig` (``k``, ``max_vectors``,
            ``operator``, ...).
        config: the options as an object, instead of single ones.
        loss_fn: as for :func:`fisher_lab.curvature.losses.score`.
        say: gets the line about memory; None: a warning of the module's logger, so that it is seen
            where nobody set logging up.
        communicator: of the ranks; None for this process alone.
        **options: options by name, such as ``k=5``.

    Raises:
        CurvatureError: an option is out of range, or ``vector_device="cuda"`` on a machine without
            a CUDA device.
    """

    def __init__(
        self,
        *values: Any,
        config: LanczosConfig | None = None,
        loss_fn: losses.LossFunction | None = None,
        say: Callable[[str], None] | None = None,
        communicator: Communicator | None = None,
        **options: Any,
    ) -> None:
        given = LanczosConfig(*values, **options)
        self.config = given if config is None else replace(config, **options)
        check_options(self.config)
        check_device("vector_device", self.config.vector_device)
        self._loss_fn = loss_fn
        self._say = say or logger.warning
        self._ranks = communicator or Alone()

    # ---- eigenpairs --------------------------------------------------------------------------

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

        def work(matrix: CurvatureOperator) -> dict[str, Any]:
            found = self._eigenpairs(matrix, eigenvectors=eigenvectors)
            kept.extend([] if found.eigenvectors is None else [found.eigenvectors])
            return self._pairs(found, matrix, block)

        return self._driven(model, batch, block, work, kept if eigenvectors else None)

    def lanczos_algorithm(
        self, matvec: MatVec, n: int, k: int | None = None, *, eigenvectors: bool = True
    ) -> LanczosResult:
        """Finds extreme eigenpairs of any symmetric operator on float64 vectors ``[n]``.

        ``k`` pairs, or as many as the options say; see :func:`lanczos_algorithm` for the rest.

        Raises:
            CurvatureError: an argument is out of range, or the basis does not fit into memory.
        """
        config = self.config
        device = torch.device("cuda" if config.vector_device == "cuda" else "cpu")
        named = config.vector_dtype
        dtype = torch.float64 if named == "auto" else getattr(torch, named)
        return self._run(matvec, n, k or config.k, eigenvectors, dtype, device)

    # ---- everything from one set of products -------------------------------------------------

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
        and no product is made twice. There are ``n_probes`` of them (0 for eigenpairs alone) with
        ``steps`` Lanczos steps each; the density's grid has ``n_grid`` points.

        Returns:
            ``top`` (as :meth:`top_eigenpairs`); with probes also ``density`` (as
            :meth:`spectral_density`), ``trace`` and, with a damping ``lam``,
            ``effective_dimension``.

        Raises:
            CurvatureError: an argument is out of range, or the basis does not fit into memory.
            SettingError: probes without ``reorthogonalize``.
        """
        self._check(lam, "True, or n_probes=0" if n_probes > 0 else "")

        def work(matrix: CurvatureOperator) -> dict[str, Any]:
            found = self._eigenpairs(matrix, eigenvectors=n_probes > 0)
            result: dict[str, Any] = {"top": self._pairs(found, matrix, block)}
            if n_probes == 0:
                return result
            rule = self._quadrature(matrix, n_probes, steps, found)
            log = self.config.operator != "hessian"
            result["density"] = {
                **density_record(rule, self._dtype(matrix), n_grid, None, log),
                **self._about(matrix, block),
            }
            result["trace"] = asdict(rule.trace_of(lambda x: x))
            if lam is not None:
                dimension = rule.trace_of(partial(damped_share, lam=lam))
                result["effective_dimension"] = {**asdict(dimension), "lam": lam}
            return result

        return self._driven(model, batch, block, work)

    # ---- estimates ---------------------------------------------------------------------------

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

        ``n_probes`` random vectors make ``steps`` Lanczos steps each, with full
        reorthogonalisation. The density is given on ``n_grid`` points, smoothed by Gaussians of
        width ``sigma`` in the grid's unit (None: 1 % of its span). With ``log`` it is over the
        decimal logarithm of the eigenvalue; what is zero or negative up to rounding is left out,
        and its weight is ``mass_left_out``.

        Returns:
            ``grid``, ``density``, ``standard_error`` (lists), ``mass_at_zero`` (the fraction of
            eigenvalues that are zero up to rounding), ``nodes`` and ``weights`` by probe, and
            ``trace`` with its standard error from the same products.

        Raises:
            CurvatureError: no such block, or the basis does not fit into memory.
        """

        def work(matrix: CurvatureOperator) -> dict[str, Any]:
            rule = self._quadrature(matrix, n_probes, steps)
            return {
                **density_record(rule, self._dtype(matrix), n_grid, sigma, log),
                "trace": asdict(rule.trace_of(lambda x: x)),
                **self._about(matrix, block),
            }

        return self._driven(model, batch, block, work)

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
        """Estimates the trace with ``n_products`` products in all.

        ``method`` is ``hutch++`` or ``slq``: stochastic Lanczos quadrature, ``steps`` Lanczos steps
        a probe (one is exact for the trace).

        Raises:
            CurvatureError: the method has another name, or an argument is out of range.
        """
        check_one_of("method", method, ("hutch++", "slq"))

        def work(matrix: CurvatureOperator) -> dict[str, Any]:
            if method == "slq":
                rule = self._quadrature(matrix, max(n_products // steps, 1), steps)
                return asdict(rule.trace_of(lambda x: x))
            dtype = self._dtype(matrix)
            # The random range, its orthonormal basis and the work space in between.
            block = max(n_products // 3, 1)
            device = self._place("n_products", block, matrix.n, dtype, matrix.device, copies=3)
            seed = self.config.seed
            return asdict(
                hutch_plus_plus(
                    matrix, matrix.n, n_products=n_products, seed=seed, dtype=dtype, device=device
                )
            )

        return Estimate(**self._driven(model, batch, block, work))

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
        """Estimates ``tr(F (F + lam I)^-1)`` for a damping ``lam`` above 0.

        The top ``k`` eigenpairs enter exactly, their complement by quadrature with ``n_probes``
        random vectors and ``steps`` Lanczos steps each.

        Raises:
            CurvatureError: ``lam`` is not above 0, or the operator may be indefinite.
            SettingError: without ``reorthogonalize``.
        """
        self._check(lam, "True")

        def work(matrix: CurvatureOperator) -> dict[str, Any]:
            found = self._eigenpairs(matrix, eigenvectors=True)
            rule = self._quadrature(matrix, n_probes, steps, found)
            dimension = asdict(rule.trace_of(partial(damped_share, lam=lam)))
            return {**dimension, "n_products": dimension["n_products"] + found.n_products}

        return Estimate(**self._driven(model, batch, block, work))

    def _check(self, lam: float | None, allowed: str) -> None:
        """Refuses a damping out of range, and copies of eigenvalues that would count as known."""
        if lam is not None and not lam > 0:
            raise CurvatureError(f"lam: {lam}; allowed: above 0")
        if lam is not None and self.config.operator == "hessian":
            raise CurvatureError("operator: 'hessian' may be indefinite; allowed: empirical, true")
        if allowed and not self.config.reorthogonalize:
            raise SettingError(
                f"reorthogonalize: False; allowed where eigenpairs count as known: {allowed}"
            )

    # ---- runs --------------------------------------------------------------------------------

    def _driven(
        self,
        model: nn.Module,
        batch: Any,
        block: str | None,
        work: Callable[[CurvatureOperator], dict[str, Any]],
        vectors: list[Tensor] | None = None,
    ) -> dict[str, Any]:
        """Returns what the work makes of the operator on rank 0, on every rank.

        Where the work leaves eigenvectors ``[k, n]`` in ``vectors``, these are sent as well.
        """
        model = plain(model)
        with isolated(model, seed=self.config.seed):
            matrix = CurvatureOperator(
                self.config.operator,
                model,
                batch,
                select_parameters(model, block),
                loss_fn=self._loss_fn,
                products=self.config.products,
                communicator=self._ranks,
            )
            record = matrix.drive(lambda: work(matrix))
            if vectors is not None:
                shape = (len(record["eigenvalues"]), matrix.n)
                if not vectors:
                    dtype = self._dtype(matrix)
                    vectors.append(torch.empty(shape, dtype=dtype, device=matrix.device))
                record["eigenvectors"] = matrix.unflatten(self._ranks.broadcast(vectors[0], 0))
            return record

    def _eigenpairs(self, matrix: CurvatureOperator, *, eigenvectors: bool) -> LanczosResult:
        n, k, dtype = matrix.n, self.config.k, self._dtype(matrix)
        return self._run(matrix, n, k, eigenvectors, dtype, matrix.device)

    def _run(
        self,
        matvec: MatVec,
        n: int,
        k: int,
        eigenvectors: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> LanczosResult:
        config = self.config
        most = config.max_vectors
        m = default_vectors(n, min(k, n)) if most is None else min(most, n)
        more = min(k, n) if eigenvectors else 0
        return lanczos_algorithm(
            matvec,
            n,
            k,
            max_vectors=m,
            max_products=config.max_products,
            tol=config.tol,
            seed=config.seed,
            which=config.which,
            reorthogonalize=config.reorthogonalize,
            dtype=dtype,
            device=self._place("max_vectors", m, n, dtype, device, eigenvectors=more),
            eigenvectors=eigenvectors,
        )

    def _quadrature(
        self,
        matrix: CurvatureOperator,
        n_probes: int,
        steps: int,
        found: LanczosResult | None = None,
    ) -> Quadrature:
        """Quadrature; its probes are deflated by converged pairs, which then enter exactly."""
        dtype, m, seed = self._dtype(matrix), min(steps, matrix.n), self.config.seed
        known, deflate = torch.empty(0), None
        if found is None:
            device = self._place("steps", m, matrix.n, dtype, matrix.device)
        else:
            assert found.eigenvectors is not None
            keep, seed = torch.tensor(found.converged), seed + 1
            known, vectors = found.eigenvalues[keep], found.eigenvectors
            device = vectors.device
            # The basis that found them is gone; those that are kept are copied unless all are.
            some = 0 if bool(keep.all()) else len(known)
            self._place("steps", m, matrix.n, dtype, matrix.device, eigenvectors=some)
            if len(known):
                deflate = vectors[keep.to(device)] if some else vectors
        return quadrature(
            matrix,
            matrix.n,
            n_probes=n_probes,
            steps=steps,
            seed=seed,
            dtype=dtype,
            device=device,
            deflate=deflate,
        ).with_known(known)

    def _dtype(self, matrix: CurvatureOperator) -> torch.dtype:
        named = self.config.vector_dtype
        return matrix.dtype if named == "auto" else getattr(torch, named)

    def _place(
        self,
        setting: str,
        basis: int,
        n: int,
        dtype: torch.dtype,
        model_device: torch.device,
        *,
        copies: int = 1,
        eigenvectors: int = 0,
    ) -> torch.device:
        """Says what vectors ``[n]`` will take that are about to be allocated, and where they fit.

        ``copies`` blocks of ``basis`` vectors, a number that follows from the argument ``setting``,
        and ``eigenvectors`` more; the model is on ``model_device``.

        Raises:
            CurvatureError: they do not fit.
        """
        device = self.config.vector_device
        count, each = basis * copies + eigenvectors, n * dtype.itemsize
        chosen = model_device if device == "auto" else torch.device(device)
        if device == "auto" and count * each > free_memory(chosen):
            chosen = torch.device("cpu")
        free = free_memory(chosen)
        what = f"{copies} blocks of {basis} vectors" if copies > 1 else f"{basis} vectors"
        what = f"({what} + {eigenvectors} eigenvectors)" if eigenvectors else what
        size, room = count * each / 2**20, f"{free / 2**20:.0f} MiB"
        self._say(
            f"Lanczos basis: {what} x {n} parameters x {dtype} = "
            f"{size:.1f} MiB on {chosen} ({room} free)"
        )
        if count * each > free:
            largest = max((free // max(each, 1) - eigenvectors) // copies, 0)
            raise CurvatureError(
                f"{setting}: {what} of {n} parameters take {size:.0f} MiB, and {room} are free on "
                f"{chosen}; allowed: {largest} or fewer vectors, or a smaller block"
            )
        return chosen

    # ---- records -----------------------------------------------------------------------------

    def _pairs(
        self, found: LanczosResult, matrix: CurvatureOperator, block: str | None
    ) -> dict[str, Any]:
        record = {
            **vars(found),
            "eigenvalues": found.eigenvalues.tolist(),
            "residuals": found.residuals.tolist(),
            "converged": list(found.converged),
        }
        del record["eigenvectors"]
        options = {"tolerance": self.config.tol, "seed": self.config.seed}
        return {**record, **options, **self._about(matrix, block)}

    def _about(self, matrix: CurvatureOperator, block: str | None) -> dict[str, Any]:
        operator = self.config.operator
        return {
            "operator": operator,
            "block": block,
            "products": "double_backward" if operator == "hessian" else matrix.used,
            "n_params": matrix.n,
            "n_samples": matrix.n_labels,
        }


def _option_of_config(name: str) -> property:
    """The attribute that an option was before the engine held them in ``config``."""
    text = f"FisherLanczos.{name}: now config.{name}; the attribute goes in the next release"

    def get(engine: FisherLanczos) -> Any:
        warnings.warn(text, DeprecationWarning, stacklevel=2)
        return getattr(engine.config, name)

    def change(engine: FisherLanczos, value: Any) -> None:
        warnings.warn(text, DeprecationWarning, stacklevel=2)
        engine.config = replace(engine.config, **{name: value})

    return property(get, change)


for _item in fields(LanczosConfig):
    setattr(FisherLanczos, _item.name, _option_of_config(_item.name))


__all__ = ["Estimate", "FisherLanczos", "LanczosResult", "lanczos_algorithm"]
