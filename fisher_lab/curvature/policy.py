"""Which structure for which layer, and what it costs (``docs/math.md``, section 4)."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import LayerError
from .layers import Kind, Layer
from .settings import Policy


def wants_woodbury(policy: Policy, out: int, columns: int | None) -> bool:
    """Says whether a policy sends a layer to the Woodbury path.

    Args:
        policy: the policy with its thresholds.
        out: outputs of the layer.
        columns: token columns (``T``, or ``T n`` for ``n`` draws); None while not known.
    """
    match policy.name:
        case "all":
            return True
        case "small_only":
            return False
        case "auto" if columns is not None:
            return columns <= policy.auto_rho * out and columns <= policy.auto_t_max
        case _:
            return out >= policy.big_threshold


def method(policy: Policy, layer: Layer, columns: int | None) -> str:
    """Returns the structure of a layer's G factor: ``woodbury`` or ``eig``.

    A layer that a policy sends to the dense path although its dense factor is too large takes
    Woodbury with reduced columns.
    """
    if layer.kind is Kind.NORM:
        return "norm"
    if wants_woodbury(policy, layer.n_out, columns) or layer.n_out > policy.max_dense_dim:
        return "woodbury"
    return "eig"


def check(policy: Policy, layer: Layer) -> None:
    """Checks before any work that a layer's factors may be formed.

    Raises:
        LayerError: ``small_only`` on a layer whose dense G is over ``max_dense_dim``, or any
            policy on a layer whose dense A is.
    """
    limit = policy.max_dense_dim
    if policy.name == "small_only" and layer.n_out > limit:
        gigabytes = layer.n_out**2 * 8 / 1e9
        raise LayerError(
            f"layer {layer.name}: its dense G factor is {layer.n_out} x {layer.n_out} "
            f"({gigabytes:.1f} GB), policy small_only; allowed: out <= max_dense_dim = {limit}, "
            "or another policy"
        )
    if layer.kind in (Kind.LINEAR, Kind.CONV1D) and layer.dim_a > limit:
        raise LayerError(
            f"layer {layer.name}: its A factor is {layer.dim_a} x {layer.dim_a}; allowed: "
            f"in <= max_dense_dim = {limit}, or exclude the layer"
        )


@dataclass(frozen=True)
class Cost:
    """Memory and arithmetic of one side of one layer.

    Attributes:
        bytes: what the factor and its decomposition keep.
        flops_factor: to build and decompose it.
        flops_apply: to apply its inverse once.
    """

    bytes: int
    flops_factor: float
    flops_apply: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.bytes + other.bytes,
            self.flops_factor + other.flops_factor,
            self.flops_apply + other.flops_apply,
        )


def cost_g(
    layer: Layer, chosen: str, columns: int, *, itemsize: int = 4, core_itemsize: int = 8
) -> Cost:
    """Returns the cost of a layer's G side.

    Args:
        layer: the layer.
        chosen: ``woodbury`` or ``eig``.
        columns: token columns.
        itemsize: bytes of a stored column entry.
        core_itemsize: bytes of an entry of the decomposed matrix.
    """
    out, m, t = layer.n_out, layer.dim_a, columns
    if chosen == "woodbury":
        return Cost(
            out * t * itemsize + 2 * t * t * core_itemsize,
            float(out) * t * t + t**3 / 3,
            4.0 * out * t * m + 2.0 * t * t * m,
        )
    return Cost(2 * out * out * core_itemsize, float(out) ** 2 * t + out**3 / 3, 2.0 * out**2 * m)


def cost_a(layer: Layer, tokens: int, *, core_itemsize: int = 8) -> Cost:
    """Returns the cost of a layer's A side; an embedding's is a diagonal."""
    n = layer.dim_a
    if layer.kind is Kind.EMBEDDING:
        return Cost(n * core_itemsize, float(tokens), float(n) * layer.n_out)
    if layer.kind is Kind.NORM:
        return Cost(0, 0.0, 0.0)
    return Cost(
        2 * n * n * core_itemsize,
        float(n) ** 2 * tokens + n**3 / 3,
        2.0 * n**2 * layer.n_out,
    )


def cost_norm(layer: Layer, tokens: int, *, dense: bool, core_itemsize: int = 8) -> Cost:
    """Returns the cost of a norm layer's block over scale and shift."""
    n = layer.n_out * (2 if layer.bias is not None else 1)
    if not dense:
        return Cost(n * core_itemsize, 2.0 * n * tokens, float(n))
    return Cost(2 * n * n * core_itemsize, float(n) ** 2 * tokens + n**3 / 3, 2.0 * n**2)
