"""What a convolution and a norm by channel read, for the reference: offset by offset.

It shares no code with the engine, which unfolds its inputs.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
NORMS = {
    "batch_norm": ("input", "running_mean", "running_var", "weight", "bias"),
    "group_norm": ("input", "num_groups", "weight", "bias", "eps"),
}


def given(names: tuple[str, ...], args: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a function by name."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


def patches(options: Mapping[str, Any], g_shape: torch.Size) -> tuple[Tensor, list[Tensor]]:
    """Which locations of a convolution stand for a position, and what each channel reads.

    Args:
        options: its arguments by name.
        g_shape: shape of what it gives, ``[N, out, *locations]``.

    Returns:
        ``[*locations]`` True or False, and for each channel ``[N, *locations, k]``.
    """
    x, size = options["input"].detach(), options["weight"].shape[2:]
    n = len(size)

    def each(name: str, default: int) -> list[int]:
        value = options.get(name, default)
        return [value] * n if isinstance(value, int) else [*value] * (n if len(value) == 1 else 1)

    stride, dilation = each("stride", 1), each("dilation", 1)
    padding = options.get("padding", 0)
    if padding == "same":
        total = [d * (k - 1) for k, d in zip(size, dilation, strict=True)]
        around = [(t // 2, t - t // 2) for t in total]
    else:
        around = [(p, p) for p in each("padding", 0)] if padding != "valid" else [(0, 0)] * n
    stands = torch.ones(g_shape[2:], dtype=torch.bool)
    if n == 1 and sum(around[0]):  # locations after the last position
        stands &= torch.arange(g_shape[2]) * stride[0] < x.shape[2]
    padded = F.pad(x, [p for pair in reversed(around) for p in pair])
    channels = []
    for channel in range(x.shape[1]):
        read = []
        for offset in itertools.product(*map(range, size)):
            place = tuple(
                slice(o * d, o * d + s * (m - 1) + 1, s)
                for o, d, s, m in zip(offset, dilation, stride, g_shape[2:], strict=True)
            )
            read.append(padded[(slice(None), channel, *place)])
        channels.append(torch.stack(read, dim=-1))
    return stands, channels


def normalised(name: str, options: Mapping[str, Any]) -> Tensor:
    """What a norm by channel scales, ``[N, channels, *positions]``, by its definition."""
    x, eps = options["input"].detach(), options.get("eps", 1e-5)
    if name == "group_norm":
        cut = x.reshape(len(x), options["num_groups"], -1)
        mean, var = cut.mean(-1, keepdim=True), cut.var(-1, keepdim=True, unbiased=False)
        return ((cut - mean) / (var + eps).sqrt()).reshape(x.shape)
    if options.get("training"):
        raise ValueError("batch statistics mix the examples; allowed: eval()")
    shape = (1, -1, *[1] * (x.dim() - 2))
    mean, var = options["running_mean"].reshape(shape), options["running_var"].reshape(shape)
    return (x - mean) / (var + eps).sqrt()
