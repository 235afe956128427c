"""The compared libraries, each behind the same three steps: factors, inversion, one application.

An adapter follows its library's documentation. If a library does two steps in one, the time counts
where the library spends it. ``gradient`` is the mean gradient of the batch; it is computed outside
the measurement, unless a library computes it together with its factors.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from workloads import Workload


class Library(Protocol):
    """One library on one workload.

    Attributes:
        convention: what the damping means: ``factors`` (both factors get it), ``product`` (its
            square is added to the Kronecker product) or ``pi`` (split by the ratio of traces);
            ``augmented`` is ``factors`` where A has the bias's column, whose gradient is zero, or
            the batch's in ``augmented, own``.
    """

    convention: str

    def factors(self) -> None:
        """Forward and backward pass and Kronecker factors."""
        ...

    def invert(self) -> None:
        """Decompositions or inverses."""
        ...

    def apply(self) -> dict[str, Tensor]:
        """The natural gradient of the batch's mean gradient, by layer."""
        ...


def mean_gradient(workload: Workload) -> dict[str, Tensor]:
    """The batch's mean gradient, by layer."""
    modules = dict(workload.model.named_modules())
    weights = [modules[name].weight for name in workload.layers]
    loss = workload.loss() / workload.labels.numel()
    grads = torch.autograd.grad(loss, weights)  # type: ignore[arg-type]
    return dict(zip(workload.layers, grads, strict=True))


class FisherLab:
    """This project: ``own`` preconditions by push-through, else any gradient that is given."""

    def __init__(
        self, workload: Workload, damping: float, *, own: bool = False, kappa: float | None = None,
        dtype: Any = "float32", **options: Any,
    ) -> None:  # fmt: skip
        from fisher_lab import KFACNaturalGradient

        self.work, self.own = workload, own
        self.kfac = KFACNaturalGradient(
            damping=damping,
            max_condition_number=kappa,
            core_dtype=dtype,
            apply_dtype=dtype,
            include=workload.layers,
            norm_layers=False,
            track_diagonal=False,
            kfac_policy=options.pop("kfac_policy", "hybrid"),
            max_columns=max(8192, workload.labels.numel()),
            **options,
        )
        modules = dict(workload.model.named_modules())
        with_bias = any(modules[name].bias is not None for name in workload.layers)
        self.convention = "factors"
        if with_bias:
            self.convention = "augmented, own" if own else "augmented"
        parameters = {p: n for n, p in workload.model.named_parameters()}
        self.weights = {name: parameters[modules[name].weight] for name in workload.layers}  # type: ignore[index]
        self.gradient = None if own else mean_gradient(workload)

    def _loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(outputs, self.work.labels, reduction="sum")

    def factors(self) -> None:
        """See :class:`Library`."""
        self.kfac.collect_kfac_factors(
            self.work.model, self.work.inputs, self._loss, n_labels=self.work.labels.numel(),
            loss_reduction="sum", keep_gradient=self.own,
        )  # fmt: skip

    def invert(self) -> None:
        """See :class:`Library`."""
        self.kfac.prepare_inverses()

    def apply(self) -> dict[str, Tensor]:
        """See :class:`Library`."""
        given = None
        if self.gradient is not None:
            given = {self.weights[name]: g for name, g in self.gradient.items()}
        result = self.kfac.compute_natural_gradient(given, self.work.model)
        return {name: result[weight] for name, weight in self.weights.items()}


class Curvlinops:
    """curvlinops: dense factors, inverses by Cholesky."""

    convention = "factors"

    def __init__(self, workload: Workload, damping: float) -> None:
        import curvlinops

        self.library, self.work, self.damping = curvlinops, workload, damping
        modules = dict(workload.model.named_modules())
        self.parameters = [modules[name].weight for name in workload.layers]
        self.gradient = mean_gradient(workload)

    def factors(self) -> None:
        """See :class:`Library`."""
        self.operator = self.library.KFACLinearOperator(
            self.work.model,
            nn.CrossEntropyLoss(reduction="sum"),
            self.parameters,  # type: ignore[arg-type]
            [(self.work.inputs, self.work.labels)],
            check_deterministic=False,
            fisher_type="empirical",
            num_data=len(self.work.inputs),
            num_per_example_loss_terms=self.work.labels.numel() // len(self.work.inputs),
        )
        self.operator.compute_kronecker_factors()
        # With a summed loss G is a sum over tokens: a mean is wanted, as A is.
        self.scale = self.work.labels.numel()
        for covariance in self.operator._gradient_covariances.values():
            covariance.div_(self.scale)  # type: ignore[union-attr]

    def invert(self) -> None:
        """See :class:`Library`."""
        self.inverse = self.library.KFACInverseLinearOperator(
            self.operator, damping=(self.damping, self.damping)
        )
        for name in self.operator._mapping:
            self.inverse._compute_or_get_cached_inverse(name)

    def apply(self) -> dict[str, Tensor]:
        """See :class:`Library`."""
        columns = [self.gradient[name].unsqueeze(-1) for name in self.work.layers]
        result = self.inverse._matmat(columns)
        return {n: y.squeeze(-1) for n, y in zip(self.work.layers, result, strict=True)}


class Kronfluence:
    """kronfluence with its ``kfac`` strategy: eigendecompositions, damping on the product."""

    convention = "product"

    def __init__(self, workload: Workload, damping: float) -> None:
        from kronfluence.analyzer import prepare_model
        from kronfluence.arguments import FactorArguments
        from kronfluence.task import Task
        from kronfluence.utils.state import State

        work = workload

        class Summed(Task):
            def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Any:
                logits = model(batch[0])
                return nn.functional.cross_entropy(logits, batch[1], reduction="sum")

            def compute_measurement(self, batch: Any, model: nn.Module) -> Any:
                raise NotImplementedError

            def get_influence_tracked_modules(self) -> list[str]:
                return work.layers

        self.gradient = mean_gradient(workload)
        self.work, self.damping, self.task, self.state = (
            workload,
            damping,
            Summed(),
            State(cpu=True),
        )
        self.model = prepare_model(workload.model, self.task)
        self.arguments = FactorArguments(
            strategy="kfac",
            use_empirical_fisher=True,
            eigendecomposition_dtype=torch.float32,
        )

    def factors(self) -> None:
        """See :class:`Library`."""
        from kronfluence.factor.covariance import fit_covariance_matrices_with_loader

        loader: Any = [(self.work.inputs, self.work.labels)]
        self.count, self.covariances = fit_covariance_matrices_with_loader(
            self.model, self.state, self.task, loader, self.arguments, disable_tqdm=True
        )

    def invert(self) -> None:
        """See :class:`Library`."""
        from kronfluence.arguments import ScoreArguments
        from kronfluence.factor.config import FactorConfig
        from kronfluence.factor.eigen import perform_eigendecomposition

        found = perform_eigendecomposition(
            self.covariances, self.model, self.state, self.arguments, disable_tqdm=True
        )
        self.config: Any = FactorConfig.CONFIGS["kfac"]
        arguments = ScoreArguments(damping_factor=self.damping**2)
        self.storages: dict[str, dict[str, Any]] = {}
        for name in self.work.layers:
            storage = {key: tensors[name] for key, tensors in found.items()}
            self.config.prepare(storage, arguments, torch.device("cpu"))
            self.storages[name] = storage

    def apply(self) -> dict[str, Tensor]:
        """See :class:`Library`."""
        return {
            name: self.config.precondition_gradient(g.unsqueeze(0), self.storages[name])[0]
            for name, g in self.gradient.items()
        }


class _Unmarked(contextlib.ContextDecorator):
    """Takes the place of a profiler's range, as a context and as a decorator."""

    def __init__(self, _message: str) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


class Asdl:
    """ASDL (``asdfghjkl``): dense factors, or low rank where a batch is smaller (``swift``)."""

    convention = "pi"

    def __init__(self, workload: Workload, damping: float, *, shape: str = "kron") -> None:
        # A build without CUDA has no nvtx; the library marks its ranges with it all the same.
        torch.cuda.nvtx.range = _Unmarked  # type: ignore[assignment]
        import asdl

        self.gradient = mean_gradient(workload)
        self.work, self.damping = workload, damping
        modules = dict(workload.model.named_modules())
        self.modules = {name: modules[name] for name in workload.layers}
        others = [
            m for n, m in modules.items() if n not in self.modules and not len(list(m.children()))
        ]
        self.maker = asdl.get_fisher_maker(
            workload.model,
            asdl.FisherConfig(
                fisher_type="fisher_emp",
                fisher_shapes=[shape],
                data_size=workload.labels.numel(),
                ignore_modules=others,
            ),
        )

    def factors(self) -> None:
        """See :class:`Library`."""
        dummy = self.maker.setup_model_call(self.work.model, self.work.inputs)
        self.maker.setup_loss_call(
            nn.functional.cross_entropy, dummy, self.work.labels, reduction="sum"
        )
        self.maker.forward_and_backward()

    def invert(self) -> None:
        """See :class:`Library`."""
        for module in self.modules.values():
            module.fisher.kron.update_inv(self.damping**2)  # type: ignore[union-attr, operator]

    def apply(self) -> dict[str, Tensor]:
        """See :class:`Library`."""
        return {
            name: self.modules[name].fisher.kron.mvp(g, use_inv=True)  # type: ignore[union-attr, operator]
            for name, g in self.gradient.items()
        }


LIBRARIES: dict[str, Any] = {
    "fisher_lab": FisherLab,
    "fisher_lab, clipping": lambda w, d: FisherLab(w, d, kappa=1e6),
    "fisher_lab, clipping that binds": lambda w, d: FisherLab(w, d, kappa=100.0),
    "fisher_lab, own gradient": lambda w, d: FisherLab(w, d, own=True),
    "fisher_lab, float64": lambda w, d: FisherLab(w, d, dtype="float64"),
    "fisher_lab, float64, clipping": lambda w, d: FisherLab(w, d, dtype="float64", kappa=1e6),
    "fisher_lab, float64, own gradient": lambda w, d: FisherLab(w, d, dtype="float64", own=True),
    "fisher_lab, fp16 columns": lambda w, d: FisherLab(w, d, woodbury_dtype="fp16"),
    "curvlinops": Curvlinops,
    "kronfluence": Kronfluence,
    "asdl": Asdl,
    "asdl, low rank": lambda w, d: Asdl(w, d, shape="swift_kron"),
}


def dampings(convention: str, a: float, g: float, damping: float) -> tuple[float, float]:
    """Damping of A and of G where a library damps the factors, from their mean diagonals.

    ``pi`` is Martens & Grosse 2015, section 6.3, on the square of the damping.
    """
    if convention != "pi":
        return damping, damping
    ratio = math.sqrt(a / g)
    return damping * ratio, damping / ratio
