"""Powers of a K-FAC approximation as linear operators: on named tensors, on vectors, in scipy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from fisher_lab.curvature.errors import BatchError
from fisher_lab.curvature.kfac.layer_factors import LayerFactors
from fisher_lab.curvature.kfac.numerics import EngineSettings
from fisher_lab.curvature.kfac.precondition import check_model
from fisher_lab.curvature.kfac.refresh import Coverage
from fisher_lab.results.notebook import html_table

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator


Vectors = TypeVar("Vectors", Mapping[str, Tensor], Tensor)


class Engine(Protocol):
    """What is asked of a :class:`fisher_lab.KFACNaturalGradient`."""

    settings: EngineSettings

    @property
    def coverage(self) -> Coverage:
        """How much of the model the factors cover."""
        ...

    @property
    def kfac_factors(self) -> dict[str, LayerFactors]:
        """Layer name -> factors."""
        ...

    def compute_powered_natural_gradient(
        self, gradients: Mapping[str, Tensor] | None, model: nn.Module, power: float
    ) -> dict[str, Tensor]:
        """``G^p dW A^p``."""
        ...


class KFACOperator:
    """``dW -> G^p dW A^p`` over the parameters that K-FAC covers as a whole.

    ``operator @ vectors`` takes a mapping of tensors by parameter name and returns one, or a tensor
    ``[n]`` or ``[n, k]`` whose rows are the parameters of :attr:`names`, flattened one after the
    other. The operator is symmetric. It follows the engine: new factors are a new operator.

    Args:
        engine: with its factors.
        model: the model that they belong to.
        power: ``p``.

    Attributes:
        names: parameter names, in the order of a flat vector.
        shape: ``(n, n)``.
    """

    def __init__(self, engine: Engine, model: nn.Module, power: float = -1.0) -> None:
        self._engine, self._model, self.power = engine, model, power
        left_out = engine.coverage.by_parameter
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._like = {n: p for n, p in named.items() if n not in left_out}
        self.names = list(self._like)
        n = sum(p.numel() for p in self._like.values())
        self.shape = n, n

    def __matmul__(self, vectors: Vectors) -> Vectors:
        """The product with vectors."""
        if isinstance(vectors, Mapping):
            return self._engine.compute_powered_natural_gradient(vectors, self._model, self.power)
        if vectors.shape[:1] != self.shape[:1] or vectors.ndim > 2:
            n = self.shape[0]
            raise BatchError(f"vectors: {list(vectors.shape)}; allowed: [{n}] or [{n}, k]")
        if vectors.ndim == 1:
            return self._flat(self @ self._named(vectors))
        return torch.stack([self @ column for column in vectors.T], dim=1)

    def _named(self, vector: Tensor) -> Mapping[str, Tensor]:
        parts = vector.split([p.numel() for p in self._like.values()])
        shapes = zip(self._like.items(), parts, strict=True)
        return {name: part.view(p.shape).to(p.device) for (name, p), part in shapes}

    def _flat(self, vectors: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([vectors[name].flatten() for name in self.names])

    def to_scipy(self) -> LinearOperator:
        """The operator in float64 for scipy, which adds, scales and multiplies operators."""
        from scipy.sparse.linalg import LinearOperator

        def matvec(x: Any) -> Any:
            vector = torch.from_numpy(np.array(x, dtype=np.float64).reshape(-1))
            return (self @ vector).cpu().numpy()

        make: Any = LinearOperator  # its stubs know the class's own constructor alone
        return make(self.shape, matvec=matvec, rmatvec=matvec, dtype=np.float64)

    @override
    def __repr__(self) -> str:
        n, _ = self.shape
        return f"KFACOperator(power {self.power:g}, {n:,} numbers in {len(self.names)} parameters)"


def inverse(engine: Engine, model: nn.Module, power: float = -1.0) -> KFACOperator:
    """Returns ``G^p dW A^p`` as a linear operator: ``kfac.inverse(model) @ vectors``.

    Args:
        engine: with its factors.
        model: the model that they belong to.
        power: ``p``; -1 is the damped inverse.

    Raises:
        CurvatureError: there are no factors, or they are of another model.
    """
    check_model(engine.kfac_factors, model)
    return KFACOperator(engine, model, power)


def text(engine: Engine) -> str:
    """The engine in a line: layers, methods, coverage, damping."""
    return f"{type(engine).__name__}({'; '.join(f'{n} {t}' for n, t in _about(engine).items())})"


def page(engine: Engine) -> str:
    """The engine as a notebook shows it, with a row per layer."""
    shown = html_table(type(engine).__name__, _about(engine).items())
    layers = [
        (name, f.method, f"{f.tokens:,}", f"{f.nbytes() / 2**20:.2f}")
        for name, f in engine.kfac_factors.items()
    ]
    return shown + html_table("", layers, ("layer", "method", "tokens", "MiB")) if layers else shown


def _about(engine: Engine) -> dict[str, str]:
    s, factors = engine.settings, engine.kfac_factors.values()
    methods = Counter(f.method for f in factors)
    counts = ", ".join(f"{count} {method}" for method, count in methods.most_common())
    mode = "" if s.damping_mode == "absolute" else f", {s.damping_mode}"
    return {
        "layers": f"{len(factors)} ({counts})" if factors else "none yet",
        **({"coverage": f"{engine.coverage.share:.1%}"} if factors else {}),
        "damping": f"A {s.lam_A:g}, G {s.lam_G:g}{mode}",
        "floor": f"largest eigenvalue / {s.kappa_max:g}" if s.kappa_max else "none",
        "policy": s.policy_in_use,
        "fisher": s.fisher,
    }
