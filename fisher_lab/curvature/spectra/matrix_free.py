"""What every matrix-free computation shares: the operator on all ranks, and room for vectors."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fisher_lab.config.spectra import LanczosConfig
from fisher_lab.curvature import losses
from fisher_lab.curvature.collectives import Alone, Communicator, dtype_name
from fisher_lab.curvature.errors import CurvatureError, check_options
from fisher_lab.curvature.evaluation_mode import isolated
from fisher_lab.curvature.linalg import MatVec
from fisher_lab.curvature.memory import check_device, free_memory
from fisher_lab.curvature.spectra.blocks import select_parameters
from fisher_lab.curvature.spectra.krylov import LanczosResult, default_vectors, lanczos_algorithm
from fisher_lab.curvature.spectra.operators import CurvatureOperator, RowOperator
from fisher_lab.curvature.spectra.quadrature import (
    Closing,
    Function,
    Probing,
    ProductsExceeded,
    Quadrature,
    density_record,
    exact_rule,
    quadrature,
    zero_floor,
)
from fisher_lab.curvature.wrappers import plain

MOST_ROWS = 4096
"""Rows up to which ``(1/N) B B^T`` is formed where the probes would take as many products."""

ROW_STEPS = 200
"""Lanczos steps a probe at most in the space of the samples, where nothing else is asked for."""

logger = logging.getLogger(__name__)


class MatrixFree:
    """Runs algorithms on a :class:`CurvatureOperator`; the base of ``FisherLanczos``.

    Arguments and errors are those of :class:`fisher_lab.curvature.spectra.lanczos.FisherLanczos`.
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

    def _driven(
        self,
        model: nn.Module,
        batch: Any,
        block: str | None,
        work: Callable[[CurvatureOperator], dict[str, Any]],
    ) -> dict[str, Any]:
        """Returns what the work makes of the operator on rank 0, on every rank."""
        return self._driven_with_vectors(model, batch, block, lambda matrix: (work(matrix), {}))

    def _driven_with_vectors(
        self,
        model: nn.Module,
        batch: Any,
        block: str | None,
        work: Callable[[CurvatureOperator], tuple[dict[str, Any], dict[str, Tensor]]],
    ) -> dict[str, Any]:
        """As :meth:`_driven`, with vectors.

        The work also returns vectors ``[..., n]``; each becomes an entry of the record, by
        parameters.
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
            own: dict[str, Tensor] = {}

            def plain_values() -> dict[str, Any]:
                record, vectors = work(matrix)
                own.update(vectors)
                shapes = {key: [list(x.shape), dtype_name(x.dtype)] for key, x in vectors.items()}
                return {"record": record, "shapes": shapes}

            answer = matrix.drive(plain_values)
            record = answer["record"]
            for key, (shape, dtype) in answer["shapes"].items():
                if key not in own:
                    own[key] = torch.empty(shape, dtype=getattr(torch, dtype), device=matrix.device)
                record[key] = matrix.unflatten(self._ranks.broadcast(own[key], 0))
            return record

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
        what: str = "parameters",
    ) -> torch.device:
        """Says what vectors ``[n]`` will take that are about to be allocated, and where they fit.

        ``copies`` blocks of ``basis`` vectors, a number that follows from the argument ``setting``,
        and ``eigenvectors`` more; the model is on ``model_device``, and ``what`` are its elements.

        Raises:
            CurvatureError: they do not fit.
        """
        device = self.config.vector_device
        count, each = basis * copies + eigenvectors, n * dtype.itemsize
        chosen = model_device if device == "auto" else torch.device(device)
        if device == "auto" and count * each > free_memory(chosen):
            chosen = torch.device("cpu")
        free = free_memory(chosen)
        vectors = f"{copies} blocks of {basis} vectors" if copies > 1 else f"{basis} vectors"
        vectors = f"({vectors} + {eigenvectors} eigenvectors)" if eigenvectors else vectors
        size, room = count * each / 2**20, f"{free / 2**20:.0f} MiB"
        self._say(
            f"Lanczos basis: {vectors} x {n} {what} x {dtype} = "
            f"{size:.1f} MiB on {chosen} ({room} free)"
        )
        if count * each > free:
            largest = max((free // max(each, 1) - eigenvectors) // copies, 0)
            raise CurvatureError(
                f"{setting}: {vectors} of {n} {what} take {size:.0f} MiB, and {room} are free on "
                f"{chosen}; allowed: {largest} or fewer vectors, or a smaller block"
            )
        return chosen

    def _about(self, matrix: CurvatureOperator, block: str | None) -> dict[str, Any]:
        operator = self.config.operator
        return {
            "operator": operator,
            "block": block,
            "products": "double_backward" if operator == "hessian" else matrix.used,
            "n_params": matrix.n,
            "n_samples": matrix.n_labels,
        }

    # ---- Lanczos and quadrature --------------------------------------------------------------

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

    def _estimated(
        self,
        method: Callable[..., Any],
        matrix: CurvatureOperator,
        n_products: int,
        share: int,
        blocks: int,
    ) -> Any:
        """Runs a method of :mod:`.estimates`.

        It allocates ``blocks`` of ``n_products / share`` vectors.
        """
        n, dtype = matrix.n, self._dtype(matrix)
        each = max(n_products // share, 1)
        device = self._place("n_products", each, n, dtype, matrix.device, copies=blocks)
        seed = self.config.seed
        return method(matrix, n, n_products=n_products, seed=seed, dtype=dtype, device=device)

    def _rule(
        self,
        matrix: CurvatureOperator,
        probing: Probing,
        found: LanczosResult | None = None,
        function: Function | None = None,
    ) -> Quadrature:
        """Quadrature; its probes are deflated by converged pairs, which then enter exactly."""
        if 0 < matrix.n_rows < matrix.n:
            return self._rule_of_rows(RowOperator(matrix), probing, found, function)
        return self._rule_of_parameters(matrix, probing, found, function)

    def _rule_of_parameters(
        self,
        matrix: CurvatureOperator,
        probing: Probing,
        found: LanczosResult | None = None,
        function: Function | None = None,
    ) -> Quadrature:
        probing = probing.within(matrix.n, probing.steps, function)
        dtype, m, seed = self._dtype(matrix), probing.most, self.config.seed
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
        rule = quadrature(
            matrix,
            matrix.n,
            probing,
            seed=seed,
            dtype=dtype,
            device=device,
            deflate=deflate,
            closing=Closing.of(function, known, probing.tol),
        )
        assert rule is not None
        return rule.with_known(known)

    def _rule_of_rows(
        self,
        rows: RowOperator,
        probing: Probing,
        found: LanczosResult | None = None,
        function: Function | None = None,
    ) -> Quadrature:
        """The same in the space of the samples, with the zeros that this one lacks."""
        probing = probing.within(rows.n, ROW_STEPS, function)
        matrix, dtype, forms = rows.operator, torch.float64, rows.n <= MOST_ROWS
        if forms and probing.n_probes * probing.steps >= rows.n:
            return self._formed(rows)
        known, deflate = torch.empty(0), None
        if found is not None:
            known, deflate = self._images(rows, found)
        m, home = probing.most, matrix.device
        try:
            rule = quadrature(
                rows,
                rows.n,
                probing,
                seed=self.config.seed + (0 if found is None else 1),
                dtype=dtype,
                device=self._place("steps", m, rows.n, dtype, home, what="samples"),
                deflate=deflate,
                normalized=deflate is not None,
                closing=Closing.of(function, known, probing.tol),
                max_products=rows.n if forms else None,
            )
        except ProductsExceeded:
            return self._formed(rows)
        return replace(rule.with_zeros(matrix.n).with_known(known), n_products=rows.n_products)

    def _formed(self, rows: RowOperator) -> Quadrature:
        """The eigenvalues themselves, of the matrix of the samples."""
        n, dtype = rows.n, torch.float64
        self._place("steps", 2 * n, n, dtype, torch.device("cpu"), what="samples")
        rule = exact_rule(rows, n, dtype=dtype, seed=self.config.seed)
        return replace(rule.with_zeros(rows.operator.n), n_products=rows.n_products)

    @staticmethod
    def _images(rows: RowOperator, found: LanczosResult) -> tuple[Tensor, Tensor]:
        """The known eigenvalues of the samples' matrix, and its eigenvectors ``[l, rows]``.

        Those at the tolerance of Lanczos may be zeros that this matrix does not have.
        """
        assert found.eigenvectors is not None
        values, keep = found.eigenvalues, torch.tensor(found.converged)
        keep &= values > 1e-4 * float(values.abs().max())
        vectors = rows.images(found.eigenvectors[keep.to(found.eigenvectors.device)])
        return values[keep], torch.linalg.qr(vectors.double().T).Q.T.contiguous()

    def _density(
        self,
        rule: Quadrature,
        matrix: CurvatureOperator,
        block: str | None,
        n_grid: int,
        sigma: float | None,
        log: bool,
    ) -> dict[str, Any]:
        used = (matrix.dtype, self._dtype(matrix))
        eps = max(torch.finfo(dtype).eps for dtype in used)
        record = density_record(rule, zero_floor(rule, eps), n_grid, sigma, log)
        return {**record, **rule.about(), **self._about(matrix, block)}

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
