"""How the rows of an operator lie in its tensors, where features are not their last dimension.

A convolution reads and gives ``[..., channels, *positions]``. Every location of its output is a
row: ``a_t`` is the patch under the kernel, as an image-to-columns unfolding makes it, and ``g_t``
the gradient at the location (Grosse and Martens 2016, section 3; ``docs/math.md``, section 1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fisher_lab.curvature.kfac.token_ids import FILLED


class RowLayout(Protocol):
    """Where the rows of a use are, in what the operator reads and gives.

    Attributes:
        axis: the dimension of the features in what it gives, counted from the end.
    """

    @property
    def axis(self) -> int:
        """See the class."""
        ...

    def inputs(self, a: Tensor) -> Tensor:
        """Returns what the operator reads as ``[*rows, features]``."""
        ...

    def outputs(self, g: Tensor) -> Tensor:
        """Returns the gradient of what it gives as ``[*rows, features]``."""
        ...


@dataclass(frozen=True)
class Window:
    """What a convolution sees at a location, dimension by dimension.

    Attributes:
        size: positions that it reads.
        stride: positions from one location to the next.
        padding: positions added before and after.
        dilation: positions from one that it reads to the next.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]

    @classmethod
    def of(
        cls, size: Sequence[int], stride: Any = 1, padding: Any = 0, dilation: Any = 1
    ) -> Window:
        """Returns the window of torch's arguments: a number or one a dimension, or ``same``."""
        n = len(size)
        steps, apart = _each(stride, n), _each(dilation, n)
        if padding == "same":
            added = [d * (k - 1) for k, d in zip(size, apart, strict=True)]
            around = tuple((m // 2, m - m // 2) for m in added)
        else:
            around = tuple((p, p) for p in _each(0 if padding == "valid" else padding, n))
        return cls(tuple(size), steps, around, apart)

    @property
    def span(self) -> tuple[int, ...]:
        """Positions from the first that it reads to the last, in each dimension."""
        return tuple(d * (k - 1) + 1 for k, d in zip(self.size, self.dilation, strict=True))


def window_of(size: Sequence[int], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Window:
    """Returns the window of a convolution of torch with a kernel of ``size``.

    Args:
        size: of the kernel.
        args: arguments of the convolution: input, weight, bias, stride, padding, dilation.
        kwargs: the same by name.
    """
    given = [
        args[3 + n] if len(args) > 3 + n else kwargs.get(name, default)
        for n, (name, default) in enumerate((("stride", 1), ("padding", 0), ("dilation", 1)))
    ]
    return Window.of(size, *given)


def _each(value: Any, n: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, list | tuple | torch.Size) else (value,) * n
    return tuple(int(v) for v in (values * n if len(values) == 1 else values))


@dataclass(frozen=True)
class Patches:
    """The rows of a convolution, or of one of its groups.

    Attributes:
        window: of the convolution.
        channels: those that the group reads; None for all.
        results: those that it gives; None for all.
    """

    window: Window
    channels: tuple[int, int] | None = None
    results: tuple[int, int] | None = None

    @property
    def axis(self) -> int:
        """The dimension of the channels, counted from the end."""
        return -len(self.window.size) - 1

    def inputs(self, a: Tensor) -> Tensor:
        """Returns the patches ``[..., *locations, channels * size]`` of ``[..., channels, *n]``."""
        if self.channels is not None:
            start, stop = self.channels
            a = a.narrow(self.axis, start, stop - start)
        window, n = self.window, len(self.window.size)
        if any(sum(pair) for pair in window.padding):
            a = F.pad(a, [p for pair in reversed(window.padding) for p in pair])
        first = a.dim() - n  # of the positions; the channels lie before it
        for d, (span, step, apart) in enumerate(
            zip(window.span, window.stride, window.dilation, strict=True)
        ):
            a = a.unfold(first + d, span, step)[..., ::apart]
        return a.movedim(first - 1, first + n - 1).flatten(first + n - 1)

    def outputs(self, g: Tensor) -> Tensor:
        """Returns ``[..., *locations, results]`` of ``[..., results, *locations]``."""
        if self.results is not None:
            start, stop = self.results
            g = g.narrow(self.axis, start, stop - start)
        return g.movedim(self.axis, -1)


@dataclass(frozen=True)
class Channels:
    """The rows of a norm that has a scale for each channel: every position is one.

    Attributes:
        dims: how many dimensions come after that of the channels.
        normalise: makes of what the norm reads what it scales, both ``[..., channels, *n]``.
    """

    dims: int
    normalise: Callable[[Tensor], Tensor]

    @property
    def axis(self) -> int:
        """The dimension of the channels, counted from the end."""
        return -self.dims - 1

    def inputs(self, a: Tensor) -> Tensor:
        """Returns what is scaled, ``[..., *n, channels]``."""
        return self.normalise(a).movedim(self.axis, -1)

    def outputs(self, g: Tensor) -> Tensor:
        """Returns ``[..., *n, channels]`` of ``[..., channels, *n]``."""
        return g.movedim(self.axis, -1)


def seen(ids: Tensor, window: Window, d: int, n_out: int) -> tuple[Tensor, bool]:
    """Returns the tokens for which the locations of a convolution stand.

    Where a convolution is padded so that every position of its stride has a location (what was
    filled in before counts as padding), a location stands for the token at its place, whatever
    else is under its window; with more padding than the window is long, the first locations have
    no place. Otherwise a location stands for all of its window.

    Args:
        ids: ``[..., n]`` along the dimension ``d`` of the window.
        window: of the convolution.
        d: the dimension.
        n_out: how many locations there are.

    Returns:
        ``[..., n_out, k]``, with ``k`` 1 for the first and the size of the window for the second;
        and whether there are locations with nothing but padding under them.
    """
    size, step, apart = window.size[d], window.stride[d], window.dilation[d]
    before, after = window.padding[d]
    real = (ids != FILLED).reshape(-1, ids.size(-1)).any(dim=0).nonzero()[:, 0].tolist()
    first, last = (real[0], real[-1]) if real else (0, ids.size(-1) - 1)
    left, right = before + first, after + ids.size(-1) - 1 - last
    place = step * torch.arange(n_out, device=ids.device)[:, None]
    early = max(left - (size - 1) * apart, 0)
    placed = bool(left + right) and n_out * step - early > last - first
    if placed:
        index = place + first - early
        inside = (index >= first) & (index <= last)
    else:
        index = place - before + apart * torch.arange(size, device=ids.device)
        inside = (index >= 0) & (index < ids.size(-1))
    under = ids[..., index.clamp(0, ids.size(-1) - 1)].where(inside, FILLED)
    return under, bool(early) if placed else bool(left + right)
