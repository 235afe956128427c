"""Which structure for which layer, and what it costs (``docs/math.md``, section 4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fisher_lab.config.errors import SettingError
from fisher_lab.config.kfac import KFACSettings
from fisher_lab.curvature.errors import LayerError
from fisher_lab.curvature.kfac.factors.columns import Columns
from fisher_lab.curvature.kfac.layers import Kind, Layer
from fisher_lab.curvature.memory import HOST, on_device


def wants_woodbury(settings: KFACSettings, out: int, columns: int | None) -> bool:
    """Says whether a policy sends a layer with ``out`` outputs to the Woodbury path.

    ``columns`` are its token columns (``T``, or ``T n`` for ``n`` draws); None while not known.
    """
    match settings.policy_in_use:
        case "all":
            return True
        case "small_only":
            return False
        case "auto" if columns is not None:
            return columns <= settings.auto_rho * out and columns <= settings.auto_t_max
        case _:
            return out >= settings.big_threshold


def method(settings: KFACSettings, layer: Layer, columns: int | None) -> str:
    """Returns how a layer's G is formed: ``woodbury``, ``eig``, ``norm`` or ``channels``.

    A layer that a policy sends to the dense path although its dense factor is too large takes
    Woodbury with reduced columns.
    """
    if layer.one_block:
        return "norm" if layer.elementwise else "channels"
    if wants_woodbury(settings, layer.n_out, columns) or layer.n_out > settings.max_dense_dim:
        return "woodbury"
    return "eig"


def sharing_of(settings: KFACSettings, layer: Layer) -> str:
    """Returns what a layer's rows are: tokens (``expand``) or examples (``reduce``).

    Those of an embedding are tokens: the mean of one-hot rows has no diagonal A.
    """
    return "expand" if layer.kind.looks_up else settings.sharing


_ONE_BLOCK = (Kind.NORM, Kind.BIAS, Kind.DEPTHWISE)
"""Kinds of layers with one factor over all of their numbers."""


def wants_sequences(settings: KFACSettings, kind: Kind) -> bool:
    """Says whether a layer of some kind needs to know which sequence each of its rows is of.

    For EKFAC's moments of sequences. A row that is an example (K-FAC-reduce) is a sequence's sum
    already, and a layer of one block has no second factor to correct.
    """
    if not settings.ekfac or settings.ekfac_unit != "sequence" or kind in _ONE_BLOCK:
        return False
    return settings.sharing == "expand" or kind.looks_up


def wants_examples(settings: KFACSettings, kind: Kind) -> bool:
    """Says whether it has to be known which example each row of a layer of some kind is of."""
    reduced = settings.sharing == "reduce" and not kind.looks_up
    return reduced or wants_sequences(settings, kind)


def check(settings: KFACSettings, layer: Layer) -> None:
    """Checks before any work that a layer's factors may be formed.

    Raises:
        LayerError: ``small_only`` on a layer whose dense G is over ``max_dense_dim``, or any
            policy on a layer whose dense A is.
    """
    limit = settings.max_dense_dim
    if settings.policy_in_use == "small_only" and layer.n_out > limit:
        gigabytes = layer.n_out**2 * 8 / 1e9
        raise LayerError(
            f"layer {layer.name}: its dense G factor is {layer.n_out} x {layer.n_out} "
            f"({gigabytes:.1f} GB), policy small_only; allowed: out <= max_dense_dim = {limit}, "
            "or another policy"
        )
    if not layer.kind.looks_up and not layer.one_block and layer.dim_a > limit:
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


def cost_g(
    layer: Layer, method: str, columns: int, *, itemsize: int = 4, core_itemsize: int = 8
) -> Cost:
    """Returns the cost of a layer's G side.

    Args:
        layer: the layer.
        method: ``woodbury`` or ``eig``.
        columns: token columns.
        itemsize: bytes of a stored column entry.
        core_itemsize: bytes of an entry of the decomposed matrix.
    """
    out, m, t = layer.n_out, layer.dim_a, columns
    if method == "woodbury":
        return Cost(
            out * t * itemsize + 2 * t * t * core_itemsize,
            float(out) * t * t + t**3 / 3,
            4.0 * out * t * m + 2.0 * t * t * m,
        )
    return _cost_of_matrix(out, t, m, core_itemsize)


def cost_a(layer: Layer, tokens: int, *, core_itemsize: int = 8) -> Cost:
    """Returns the cost of a layer's A side; an embedding's is a diagonal."""
    n = layer.dim_a
    if layer.kind.looks_up:
        return Cost(n * core_itemsize, float(tokens), float(n) * layer.n_out)
    if layer.one_block:
        return Cost(0, 0.0, 0.0)
    return _cost_of_matrix(n, tokens, layer.n_out, core_itemsize)


def cost_block(layer: Layer, tokens: int, *, core_itemsize: int = 8) -> Cost:
    """Returns the cost of the one block of a norm layer, or of the blocks of its channels."""
    n = layer.dim_g
    if layer.kind is Kind.DEPTHWISE:
        one = _cost_of_matrix(n // layer.n_out, tokens, 1, core_itemsize)
        return Cost(*(layer.n_out * value for value in vars(one).values()))
    if layer.n_out > NORM_MAX_DIM:
        return Cost(n * core_itemsize, 2.0 * n * tokens, float(n))
    return _cost_of_matrix(n, tokens, 1, core_itemsize)


def _cost_of_matrix(n: int, tokens: int, width: int, itemsize: int) -> Cost:
    """An ``n x n`` matrix and its decomposition, applied to ``n x width``."""
    return Cost(2 * n * n * itemsize, float(n) ** 2 * tokens + n**3 / 3, 2.0 * n**2 * width)


NORM_MAX_DIM = 2048
"""The widest norm layer whose block is a dense matrix; beyond it, its diagonal."""

MB = 1e6

_STORAGE_DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def storage_dtype(settings: KFACSettings, own: torch.dtype, shape: tuple[int, int]) -> torch.dtype:
    """Returns the dtype in which columns, which came in the dtype ``own``, are kept.

    Sixteen bits are for columns that are fewer than the outputs (the ``shape`` has both, over all
    ranks). Where there are as many or more, rounding them perturbs the small eigenvalues of ``G``
    itself, in which the natural gradient is large (an error of 1e-1 at damping 1e-4), and a dense
    matrix would take no more room: such columns stay as they came.
    """
    if settings.woodbury_dtype == "auto":
        return own
    dtype = _STORAGE_DTYPES[settings.woodbury_dtype]
    columns, out = shape
    return own if dtype.itemsize < 4 and columns >= out else dtype


def place(n_bytes: int, settings: KFACSettings, compute: torch.device) -> torch.device:
    """Decides where a layer's columns and core, of ``n_bytes`` together, are kept.

    Returns:
        ``compute``, the model's device, for ``cuda``, and for ``auto`` while ``n_bytes`` is under
        the limit; else the host.
    """
    small = n_bytes < settings.store_limit_mb * MB
    on_device = settings.store_device == "cuda" or (settings.store_device == "auto" and small)
    return compute if on_device else HOST


def bytes_of(columns: int, out: int, dtype: torch.dtype, core: torch.dtype) -> int:
    """Returns the bytes of ``[columns, out]`` in ``dtype`` plus a square core."""
    return columns * out * dtype.itemsize + columns * columns * core.itemsize


def check_device_supports(settings: KFACSettings, device: torch.device) -> None:
    """Checks that the device can compute in the storage dtype.

    Raises:
        SettingError: bfloat16 on a CUDA device without it.
    """
    if (
        settings.woodbury_dtype == "bf16"
        and device.type == "cuda"
        and not torch.cuda.is_bf16_supported()
    ):
        raise SettingError("woodbury_dtype: 'bf16', but the device has no bfloat16; allowed: fp16")


def store_columns(
    g: Tensor,
    out: int,
    settings: KFACSettings,
    core: torch.dtype,
    name: str,
    compute: torch.device | None = None,
) -> Columns:
    """Rounds and places token gradients, in host memory where the device is full.

    Args:
        g: ``[T, out]`` as captured, or this rank's slice of the outputs, ``[T, out_r]``.
        out: outputs of the layer.
        settings: say in which dtype and where.
        core: core dtype (its square core counts for the placement).
        name: of the layer, for the log.
        compute: where products are formed; None where ``g`` is. Columns that have moved to host
            memory stay there.
    """
    compute = compute or g.device
    dtype = storage_dtype(settings, g.dtype, (g.shape[0], out))
    wanted = place(bytes_of(g.shape[0], g.shape[1], dtype, core), settings, compute)
    first = wanted if g.device == compute else HOST
    what = f"layer {name}: G side (out={g.shape[1]}, columns={g.shape[0]}), storage"
    stored = on_device(lambda device: Columns.store(g, dtype, device), first, what)
    return Columns(stored.data, stored.scale, compute)


def put_back(
    data: Tensor, scale: float, settings: KFACSettings, core: torch.dtype, compute: torch.device
) -> Columns:
    """Places ``[T, out]`` stored columns from a file, as :func:`store_columns` places new ones."""
    columns, out = data.shape

    def moved(device: torch.device) -> Tensor:
        there = data.to(device)
        pinned = device.type == "cpu" and compute.type == "cuda"
        return there.pin_memory() if pinned else there

    first = place(bytes_of(columns, out, data.dtype, core), settings, compute)
    what = f"token columns (out={out}, columns={columns}) from a file"
    return Columns(on_device(moved, first, what), scale, compute)
