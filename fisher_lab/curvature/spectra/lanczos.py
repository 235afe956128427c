"""Top eigenpairs, spectral density, trace and effective dimension without a stored matrix.

Definitions are in ``docs/math.md``, section 8.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fisher_lab.config.errors import SettingError
from fisher_lab.config.spectra import LanczosConfig
from fisher_lab.curvature.errors import CurvatureError, check_one_of
from fisher_lab.curvature.linalg import MatVec
from fisher_lab.curvature.spectra import estimates
from fisher_lab.curvature.spectra.blocks import select_parameters
from fisher_lab.curvature.spectra.conjugate_gradients import conjugate_gradients
from fisher_lab.curvature.spectra.estimates import Diagonal, Estimate
from fisher_lab.curvature.spectra.krylov import LanczosResult, lanczos_algorithm
from fisher_lab.curvature.spectra.matrix_free import MatrixFree
from fisher_lab.curvature.spectra.operators import CurvatureOperator, in_float64
from fisher_lab.curvature.spectra.quadrature import Probing, damped_share, log_share
from fisher_lab.curvature.spectra.records import (
    Eigenpairs,
    Keyed,
    LanczosAnalysis,
    SpectralDensity,
)
from fisher_lab.curvature.wrappers import plain


class FisherLanczos(MatrixFree):
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

    # ---- eigenpairs --------------------------------------------------------------------------

    def top_eigenpairs(
        self,
        model: nn.Module,
        batch: Any,
        block: str | None = None,
        *,
        eigenvectors: bool = False,
    ) -> Eigenpairs:
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

        def work(matrix: CurvatureOperator) -> tuple[dict[str, Any], dict[str, Tensor]]:
            found = self._eigenpairs(matrix, eigenvectors=eigenvectors)
            vectors = {} if found.eigenvectors is None else {"eigenvectors": found.eigenvectors}
            return self._pairs(found, matrix, block), vectors

        return Eigenpairs(self._driven_with_vectors(model, batch, block, work))

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
        n_probes: int = 10,
        steps: int = 30,
        n_grid: int = 256,
        max_steps: int | None = None,
        tol: float = 0.01,
    ) -> LanczosAnalysis:
        """Finds eigenpairs, density, trace and effective dimension from one set of products.

        The probes are deflated by the eigenpairs found, which then enter exactly: less variance,
        and no product is made twice. There are ``n_probes`` of them (0 for eigenpairs alone); the
        density's grid has ``n_grid`` points. The other arguments are those of
        :meth:`effective_dimension`.

        Returns:
            ``top`` (as :meth:`top_eigenpairs`); with probes also ``density`` (as
            :meth:`spectral_density`), ``trace`` and, with a damping ``lam``,
            ``effective_dimension``: the entries of an :class:`Estimate`, ``lam``, ``tolerance``,
            ``closed`` (whether the bracket is closed to it), ``rank_bound``, ``space`` and
            ``steps``.

        Raises:
            CurvatureError: an argument is out of range, or the basis does not fit into memory.
            SettingError: probes without ``reorthogonalize``.
        """
        self._check(lam, tol, "True, or n_probes=0" if n_probes > 0 else "")
        share = None if lam is None else partial(damped_share, lam=lam)

        def work(matrix: CurvatureOperator) -> dict[str, Any]:
            found = self._eigenpairs(matrix, eigenvectors=n_probes > 0)
            result: dict[str, Any] = {"top": self._pairs(found, matrix, block)}
            if n_probes == 0:
                return result
            rule = self._rule(matrix, Probing(n_probes, steps, max_steps, tol), found, share)
            log = self.config.operator != "hessian"
            result["density"] = self._density(rule, matrix, block, n_grid, None, log)
            result["trace"] = asdict(rule.trace())
            if share is not None:
                dimension = rule.bracket_of(share, floor=rule.noise, limit=matrix.rank)
                result["effective_dimension"] = {
                    **asdict(dimension),
                    "lam": lam,
                    "tolerance": tol,
                    "closed": dimension.closed(tol),
                    "rank_bound": matrix.rank,
                    **rule.about(),
                }
            return result

        found = self._driven(model, batch, block, work)
        kinds = {"top": Eigenpairs, "density": SpectralDensity, "effective_dimension": Keyed,
                 "trace": Keyed}  # fmt: skip
        return LanczosAnalysis({name: kinds[name](part) for name, part in found.items()})

    # ---- estimates ---------------------------------------------------------------------------

    def spectral_density(
        self,
        model: nn.Module,
        batch: Any,
        block: str | None = None,
        *,
        n_probes: int = 10,
        steps: int = 40,
        n_grid: int = 256,
        sigma: float | None = None,
        log: bool = False,
    ) -> SpectralDensity:
        """Estimates the density of eigenvalues by stochastic Lanczos quadrature.

        ``n_probes`` random vectors make ``steps`` Lanczos steps each, with full
        reorthogonalisation; in the space of the samples where that is smaller, and where ``N``
        products say everything, exactly. The density is given on ``n_grid`` points, smoothed by
        Gaussians of width ``sigma`` in the grid's unit (None: 1 % of its span). With ``log`` it is
        over the decimal logarithm of the eigenvalue; what is zero or negative up to rounding is
        left out, and its weight is ``mass_left_out``.

        Returns:
            ``grid``, ``density``, ``standard_error``, ``low`` and ``high`` (lists; the interval of
            confidence 0.95 at every point), ``mass_at_zero`` (the fraction of eigenvalues that are
            zero up to rounding, which is ``zero_floor``), ``nodes`` and ``weights`` by probe,
            ``space`` (``samples`` or ``parameters``), ``steps``, ``exact``, and ``trace`` with its
            standard error from the same products.

        Raises:
            CurvatureError: no such block, or the basis does not fit into memory.
        """

        def work(matrix: CurvatureOperator) -> dict[str, Any]:
            rule = self._rule(matrix, Probing(n_probes, steps))
            trace = {"trace": asdict(rule.trace())}
            return self._density(rule, matrix, block, n_grid, sigma, log) | trace

        return SpectralDensity(self._driven(model, batch, block, work))

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

        ``method`` is ``hutch++``, ``xtrace`` or ``slq``: stochastic Lanczos quadrature, ``steps``
        Lanczos steps a probe (one is exact for the trace).

        Raises:
            CurvatureError: the method has another name, or an argument is out of range.
        """
        check_one_of("method", method, ("hutch++", "slq", "xtrace"))

        def work(matrix: CurvatureOperator) -> dict[str, Any]:
            if method == "slq":
                probes = max(n_products // steps, 1)
                rule = self._rule_of_parameters(matrix, Probing(probes, steps))
                return asdict(rule.trace())
            if method == "xtrace":
                # Random vectors, their images, the basis of these, and its images.
                return asdict(self._estimated(estimates.xtrace, matrix, n_products, 2, 4))
            # The random range, its orthonormal basis and the work space in between.
            return asdict(self._estimated(estimates.hutch_plus_plus, matrix, n_products, 3, 3))

        return Estimate(**self._driven(model, batch, block, work))

    def frobenius_norm(
        self, model: nn.Module, batch: Any, block: str | None = None, *, n_products: int = 60
    ) -> Estimate:
        """Estimates ``|F|_F`` by Hutch++ on ``F^2`` with ``n_products`` products in all.

        Raises:
            CurvatureError: an argument is out of range.
        """

        def work(matrix: CurvatureOperator) -> dict[str, Any]:
            method = partial(estimates.hutch_plus_plus, squared=True)
            return asdict(self._estimated(method, matrix, n_products, 3, 3))

        return estimates.frobenius_norm(Estimate(**self._driven(model, batch, block, work)))

    def diagonal(
        self,
        model: nn.Module,
        batch: Any,
        block: str | None = None,
        *,
        method: str = "xdiag",
        n_products: int = 60,
    ) -> dict[str, Any]:
        """Estimates the diagonal with ``n_products`` products in all.

        ``method`` is ``xdiag`` or ``hutchinson``, which allocates no block of vectors.

        Returns:
            ``diagonal`` and ``standard_errors`` by parameter, ``n_probes``, ``n_products``,
            ``seed``, and what :meth:`top_eigenpairs` says of the operator.

        Raises:
            CurvatureError: the method has another name, or an argument is out of range.
        """
        check_one_of("method", method, ("xdiag", "hutchinson"))

        def work(matrix: CurvatureOperator) -> tuple[dict[str, Any], dict[str, Tensor]]:
            if method == "xdiag":
                found: Diagonal = self._estimated(estimates.xdiag, matrix, n_products, 2, 4)
            else:
                found = self._estimated(
                    estimates.hutchinson_diagonal, matrix, n_products, n_products, 3
                )
            record = {**vars(found), **self._about(matrix, block)}
            vectors = {"diagonal": record.pop("values")}
            return record, vectors | {"standard_errors": record.pop("standard_errors")}

        return self._driven_with_vectors(model, batch, block, work)

    def effective_dimension(
        self,
        model: nn.Module,
        batch: Any,
        lam: float,
        block: str | None = None,
        *,
        n_probes: int = 10,
        steps: int = 40,
        max_steps: int | None = None,
        tol: float = 0.01,
    ) -> Estimate:
        """Estimates ``tr(F (F + lam I)^-1)`` for a damping ``lam`` above 0, from both sides.

        The top ``k`` eigenpairs enter exactly, their complement by quadrature with ``n_probes``
        random vectors: Gauss rules from above, Gauss-Radau rules with a node at zero from below
        (``docs/math.md``, section 8). The matrix of the samples is taken where it is the smaller
        one; where the probes would take as many products as there are samples, it is formed and
        decomposed instead, and nothing is left open.

        Args:
            model: as for :meth:`top_eigenpairs`.
            batch: as for :meth:`top_eigenpairs`.
            lam: the damping.
            block: as for :meth:`top_eigenpairs`.
            n_probes: random vectors.
            steps: Lanczos steps a probe, at least.
            max_steps: Lanczos steps a probe until the bracket is closed, at most. None: 200 in the
                space of the samples, ``steps`` in that of the parameters.
            tol: the bracket is closed when its ends differ by no more than this share.

        Raises:
            CurvatureError: ``lam`` is not above 0, or the operator may be indefinite.
            SettingError: without ``reorthogonalize``.
        """
        return self._bracketed(
            model, batch, block, damped_share, lam, Probing(n_probes, steps, max_steps, tol)
        )

    def log_determinant(
        self,
        model: nn.Module,
        batch: Any,
        lam: float,
        block: str | None = None,
        *,
        n_probes: int = 10,
        steps: int = 40,
        max_steps: int | None = None,
        tol: float = 0.01,
    ) -> Estimate:
        """Estimates ``log det(F + lam I)``, of which ``n log(lam)`` is known, from both sides.

        Arguments and errors are those of :meth:`effective_dimension`; ``tol`` is relative to
        ``log det(F / lam + I)``.
        """
        found = self._bracketed(
            model, batch, block, log_share, lam, Probing(n_probes, steps, max_steps, tol)
        )
        n = sum(p.numel() for p in select_parameters(plain(model), block).values())
        return found.shifted(n * math.log(lam))

    def _bracketed(
        self,
        model: nn.Module,
        batch: Any,
        block: str | None,
        function: Callable[..., Tensor],
        lam: float,
        probing: Probing,
    ) -> Estimate:
        """``tr f(F)`` of a function with a damping, as :meth:`effective_dimension` says."""
        self._check(lam, probing.tol, "True")
        share = partial(function, lam=lam)

        def work(matrix: CurvatureOperator) -> dict[str, Any]:
            found = self._eigenpairs(matrix, eigenvectors=True)
            rule = self._rule(matrix, probing, found, share)
            limit = matrix.rank if function is damped_share else math.inf
            dimension = asdict(rule.bracket_of(share, floor=rule.noise, limit=limit))
            return {**dimension, "n_products": dimension["n_products"] + found.n_products}

        return Estimate(**self._driven(model, batch, block, work))

    def _check(self, lam: float | None, tol: float, allowed: str) -> None:
        """Refuses a damping out of range, and copies of eigenvalues that would count as known."""
        if lam is not None and not lam > 0:
            raise CurvatureError(f"lam: {lam}; allowed: above 0")
        if not tol > 0:
            raise CurvatureError(f"tol: {tol}; allowed: above 0")
        if lam is not None and self.config.operator == "hessian":
            raise CurvatureError("operator: 'hessian' may be indefinite; allowed: empirical, true")
        if allowed and not self.config.reorthogonalize:
            raise SettingError(
                f"reorthogonalize: False; allowed where eigenpairs count as known: {allowed}"
            )

    # ---- linear systems ----------------------------------------------------------------------

    def damped_inverse(
        self,
        model: nn.Module,
        batch: Any,
        vector: Mapping[str, Tensor],
        lam: float,
        block: str | None = None,
        *,
        tol: float = 1e-10,
        max_products: int = 1000,
        preconditioner: Callable[[dict[str, Tensor]], Mapping[str, Tensor]] | None = None,
        float64: bool = True,
    ) -> dict[str, Any]:
        """Solves ``(F + lam I) x = b`` by conjugate gradients: the exact damped inverse.

        Args:
            model: as for :meth:`top_eigenpairs`.
            batch: as for :meth:`top_eigenpairs`.
            vector: ``b``, for example the mean gradient: a tensor for each parameter of the block.
            lam: damping, 0 or more.
            block: as for :meth:`top_eigenpairs`.
            tol: of ``|b - (F + lam I) x| / |b|``.
            max_products: gives up after so many products.
            preconditioner: approximates ``(F + lam I)^-1`` of vectors by parameters, such as K-FAC;
                None: the identity.
            float64: computes with a copy of the model in float64; False: in the model's dtype,
                whose rounding then bounds the residual.

        Returns:
            ``solution`` by parameter, ``residual`` (of a product of its own), ``converged``,
            ``history`` (residual by step), ``n_products``, ``lam``, ``tol`` and what
            :meth:`top_eigenpairs` says of the operator.

        Raises:
            CurvatureError: an argument is out of range, the vector lacks a parameter, the matrix
                (a Hessian) or the preconditioner is not positive definite, or the vectors do not
                fit into memory.
            NonFiniteError: a product holds NaN or infinity.
        """
        if float64:
            model, batch = in_float64(plain(model), batch)

        def work(matrix: CurvatureOperator) -> tuple[dict[str, Any], dict[str, Tensor]]:
            device = self._place("block", 6, matrix.n, torch.float64, matrix.device)
            rhs = matrix.flatten(vector).to(device=device, dtype=torch.float64)

            def precondition(v: Tensor) -> Tensor:
                assert preconditioner is not None
                return matrix.flatten(preconditioner(matrix.unflatten(v)))

            found = conjugate_gradients(
                matrix,
                rhs,
                lam=lam,
                tol=tol,
                max_products=max_products,
                precondition=None if preconditioner is None else precondition,
            )
            record = {**vars(found), **self._about(matrix, block)}
            return record, {"solution": record.pop("x")}

        return self._driven_with_vectors(model, batch, block, work)


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
