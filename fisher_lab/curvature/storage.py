"""Where token columns live and in what precision (``docs/math.md``, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from .factors.gram import Columns
from .retreat import HOST, on_host_if_full
from .settings import STORAGE_DTYPES, SettingError, Storage

MB = 1e6


def storage_dtype(storage: Storage, own: torch.dtype, shape: tuple[int, int]) -> torch.dtype:
    """Returns the dtype in which columns are kept.

    Sixteen bits are for columns that are fewer than the outputs. Where there are as many or more,
    rounding them perturbs the small eigenvalues of ``G`` itself, in which the natural gradient is
    large (an error of 1e-1 at damping 1e-4), and a dense matrix would take no more room: such
    columns stay as they came.

    Args:
        storage: the setting.
        own: dtype in which the columns came.
        shape: their number and the layer's outputs, over all ranks.
    """
    if storage.dtype == "auto":
        return own
    dtype = STORAGE_DTYPES[storage.dtype]
    columns, out = shape
    return own if dtype.itemsize < 4 and columns >= out else dtype


def place(n_bytes: int, storage: Storage, compute: torch.device) -> torch.device:
    """Decides where a layer's columns and core are kept.

    Args:
        n_bytes: what columns and core take together.
        storage: the setting.
        compute: device of the model.

    Returns:
        ``compute`` for ``cuda``, and for ``auto`` while ``n_bytes`` is under the limit; else the
        host.
    """
    if compute.type == "cpu" or storage.device == "cpu":
        return torch.device("cpu")
    if storage.device == "cuda" or n_bytes < storage.limit_mb * MB:
        return compute
    return torch.device("cpu")


def bytes_of(columns: int, out: int, dtype: torch.dtype, core: torch.dtype) -> int:
    """Returns the bytes of ``[columns, out]`` in ``dtype`` plus a square core."""
    size = torch.empty(0, dtype=dtype).element_size()
    core_size = torch.empty(0, dtype=core).element_size()
    return columns * out * size + columns * columns * core_size


def check_device_supports(storage: Storage, device: torch.device) -> None:
    """Checks that the device can compute in the storage dtype.

    Raises:
        SettingError: bfloat16 on a CUDA device without it.
    """
    if storage.dtype == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise SettingError("woodbury_dtype: 'bf16', but the device has no bfloat16; allowed: fp16")


def store_columns(
    g: Tensor,
    out: int,
    storage: Storage,
    core: torch.dtype,
    name: str,
    compute: torch.device | None = None,
) -> Columns:
    """Rounds and places token gradients; out of device memory, and only then, on the host.

    Args:
        g: ``[T, out]`` as captured, or this rank's share of the outputs, ``[T, out_r]``.
        out: outputs of the layer.
        storage: the setting.
        core: core dtype (its square core counts for the placement).
        name: of the layer, for the log.
        compute: where products are formed; None where ``g`` is. Columns that had to leave it
            for want of room stay on the host.
    """
    compute = compute or g.device
    dtype = storage_dtype(storage, g.dtype, (g.shape[0], out))
    wanted = place(bytes_of(g.shape[0], g.shape[1], dtype, core), storage, compute)
    places = [HOST if g.device != compute else wanted]

    def retreat() -> bool:
        places.append(HOST)
        return len(places) == 2

    what = f"layer {name}: G side (out={g.shape[1]}, columns={g.shape[0]}), storage"
    stored = on_host_if_full(lambda: Columns.store(g, dtype, places[-1]), retreat, what)
    return Columns(stored.data, stored.scale, compute)


def put_back(
    data: Tensor, scale: float, storage: Storage, core: torch.dtype, compute: torch.device
) -> Columns:
    """Places columns that were stored before, as :func:`store_columns` places new ones.

    Args:
        data: ``[T, out]``, rounded and scaled.
        scale: power of two by which they are multiplied on use.
        storage: the setting.
        core: core dtype.
        compute: where products are formed.
    """
    columns, out = data.shape
    places = [place(bytes_of(columns, out, data.dtype, core), storage, compute)]

    def retreat() -> bool:
        places.append(HOST)
        return len(places) == 2

    def moved() -> Tensor:
        there = data.to(places[-1])
        pinned = there.device.type == "cpu" and compute.type == "cuda"
        return there.pin_memory() if pinned else there

    what = f"token columns (out={out}, columns={columns}) from a file"
    return Columns(on_host_if_full(moved, retreat, what), scale, compute)
