"""Ids of tokens as tensors, and the operations that :mod:`.token_rows` follows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import Enum, IntEnum
from typing import Any

import torch
from torch import Tensor


class Fixed(Enum):
    """What is known of a tensor that has no ids."""

    CONSTANT = "it does not depend on the batch"
    UNKNOWN = "an operation hides which tokens it sees"


Origin = tuple[Tensor, ...] | Fixed
"""The ids of a tensor (every way in which its rows belong to tokens), or why there are none."""

FILLED = 0
"""Id of a row that belongs to no token: padding that the model adds, a place not written to.

It counts where a gradient reaches it.
"""

OWN = -1
"""Id of a row of the model's own, such as a class token: it counts, whatever the masks say."""


class Standing(IntEnum):
    """Whether a row counts."""

    PADDING = 0
    TOKEN = 1
    REACHED = 2
    """It counts where a gradient reaches it."""
    UNTOLD = 3


class Made(Enum):
    """When a row counts that is made of several."""

    OF_SOME = "if one of them does"
    OF_EVERY = "if every one of them does"
    OF_FILLED = "the same, where a model fills in what lies around its tokens"
    OF_ALIKE = "if they do, and it cannot be told where some do and some do not"

    def standing(self, members: Tensor, ids: Tensor) -> Tensor:
        """Returns the standing of rows.

        What is made of filling alone, or in part of padding where every one has to count, counts
        where a gradient reaches it: nothing but padding never does.

        Args:
            members: standing of what each row is made of, ``[n, m]``.
            ids: their ids, the same.
        """
        token, padding, untold = (
            (members == each).any(dim=1)
            for each in (Standing.TOKEN, Standing.PADDING, Standing.UNTOLD)
        )
        found = torch.full_like(members[:, 0], Standing.REACHED)
        if self is Made.OF_ALIKE:
            alike = (members == members[:, :1]).all(dim=1)
            return members[:, 0].where(alike, Standing.UNTOLD)
        if self is Made.OF_SOME:
            found = found.masked_fill(padding, Standing.PADDING)
            found = found.masked_fill(untold, Standing.UNTOLD)
            return found.masked_fill(token, Standing.TOKEN)
        filled = ids == FILLED
        whole = ((members == Standing.TOKEN) | filled).all(dim=1) & token
        if self is Made.OF_EVERY:
            nothing = ((members == Standing.PADDING) | filled).all(dim=1) & padding
            found = found.masked_fill(nothing, Standing.PADDING)
        return found.masked_fill(untold, Standing.UNTOLD).masked_fill(whole, Standing.TOKEN)


def words(text: str) -> frozenset[str]:
    """Returns the words of a text: names of functions of torch."""
    return frozenset(text.split())


class Operation:
    """One operation with what is asked of it in the rules."""

    def __init__(
        self,
        name: str,
        func: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        outs: list[Tensor],
        given: list[Tensor],
        origins: list[Origin],
    ) -> None:
        self.name, self.func, self.args, self.kwargs = name, func, args, dict(kwargs)
        self.outs, self.given, self.origins = outs, given, origins
        self.rest = list(args[1:])

    @property
    def first(self) -> Tensor:
        """The tensor that is operated on."""
        return self.args[0] if self.args else self.kwargs["input"]

    def argument(self, index: int, name: str) -> Any:
        """Returns an argument by its place or its name."""
        return self.args[index] if len(self.args) > index else self.kwargs.get(name)

    def again(self, ids: Tensor) -> Any:
        """Returns the same operation's result for ids."""
        kwargs = {k: v for k, v in self.kwargs.items() if k != "input"}
        return self.func(ids, *self.rest, **kwargs)


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yields the tensors of arguments, those in lists and tuples too."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple) or type(value).__name__ == "dict_values":
            yield from tensors_in(value)


def ids_of(origin: Origin, trailing: int) -> Tensor | None:
    """Returns the tokens of a tensor's rows; None where they are not known, or not single.

    Args:
        origin: of the tensor.
        trailing: 1 where its last dimension holds features, 0 for a tensor of indices.
    """
    if isinstance(origin, Fixed) or len(origin) != 1:
        return None
    ids = origin[0]
    if not trailing:
        return ids
    return ids[..., 0] if ids.size(-1) == 1 else None


def is_one_value(indices: Tensor) -> bool:
    """Whether a look-up is of one row, as that of token types that a model fills in itself."""
    return indices.dim() > 1 and bool((indices == indices.reshape(-1)[:1]).all())


def with_leading(ids: Tensor, dim: int) -> Tensor:
    """Ids with dimensions of size 1 before theirs, ``dim`` in all."""
    return ids.reshape(*[1] * (dim - ids.dim()), *ids.shape)


def narrowed(ids: Tensor) -> Tensor:
    """Size 1 in the dimensions that were only expanded."""
    for d in range(ids.dim()):
        if ids.stride(d) == 0 and ids.size(d) > 1:
            ids = ids.narrow(d, 0, 1)
    return ids


def compressed(ids: Tensor) -> Tensor:
    """Size 1 in the dimensions along which the values do not vary."""
    ids = narrowed(ids)
    for d in range(ids.dim()):
        if ids.size(d) > 1 and bool((ids == ids.narrow(d, 0, 1)).all()):
            ids = ids.narrow(d, 0, 1)
    return ids


def overlapping(ids: Tensor, n_dims: int) -> bool:
    """Whether a token is in several of the rows that the last ``n_dims`` dimensions are."""
    rows = ids.reshape(ids.shape[: ids.dim() - n_dims].numel(), -1)
    row = torch.arange(len(rows), device=ids.device)[:, None].expand(rows.shape)
    pairs = torch.stack([rows, row])[:, rows > 0].unique(dim=1)
    return pairs.shape[1] > pairs[0].unique().numel()


def reshaped(ids: Tensor, old: tuple[int, ...], new: tuple[int, ...]) -> Tensor:
    """Returns the ids of a tensor of shape ``old`` that is seen as ``new``."""
    kept = 0  # trailing dimensions that stay, and along which nothing varies
    while kept < min(len(old), len(new)) and old[-1 - kept] == new[-1 - kept]:
        if ids.size(-1 - kept) > 1:
            break
        kept += 1
    ids = ids.reshape(ids.shape[: ids.dim() - kept])
    made = narrowed(ids.expand(old[: len(old) - kept]).reshape(new[: len(new) - kept]))
    more = sum(n > 1 for n in made.shape) > sum(n > 1 for n in ids.shape)
    if more or made.numel() > ids.numel():
        made = compressed(made)  # copies that lie side by side now
    return made.reshape(*made.shape, *[1] * kept)


def union(found: Sequence[Tensor]) -> Origin:
    """All different ids; those of whole examples say less than those of their tokens."""
    kept: list[Tensor] = []
    for ids in found:
        if not any(_equal(ids, other) for other in kept):
            kept.append(ids)
    fine = [i for i in kept if not any(_coarser(i, other) for other in kept)]
    return tuple(fine) if fine else Fixed.UNKNOWN


def _equal(one: Tensor, other: Tensor) -> bool:
    if one is other:
        return True
    if one.shape != other.shape:
        return False
    same = one.data_ptr() == other.data_ptr() and one.stride() == other.stride()
    return same or bool((one == other).all())


def _coarser(one: Tensor, other: Tensor) -> bool:
    """Whether ids vary in fewer dimensions than others do, and in no dimension of their own."""
    pairs = list(zip(one.shape, other.shape, strict=True))
    return all(a == 1 or b > 1 for a, b in pairs) and any(a == 1 < b for a, b in pairs)


def picked_axis(name: str, rest: Sequence[Any], dim: int) -> int | None:
    """The dimension of which ``select`` or ``x[:, 0]`` takes one position; None for others."""
    if name == "select":
        return rest[0] % dim
    index = rest[0] if name == "__getitem__" else ()
    index = index if isinstance(index, tuple) else (index,)
    numbers = [n for n, i in enumerate(index) if isinstance(i, int) and not isinstance(i, bool)]
    plain = all(isinstance(i, int | slice) for i in index)
    return numbers[0] if plain and len(numbers) == 1 else None


def has_tensor(index: Any) -> bool:
    """Says whether an index gathers, by a tensor or a list."""
    return any(
        isinstance(i, Tensor | list) for i in (index if isinstance(index, tuple) else (index,))
    )


def indexed_dims(index: Any, dim: int) -> int:
    """How many leading dimensions an index speaks of."""
    index = index if isinstance(index, tuple) else (index,)
    if any(i is Ellipsis for i in index):
        return dim
    boolean = [i.dim() if isinstance(i, Tensor) and i.dtype == torch.bool else 1 for i in index]
    return min(sum(n for n, i in zip(boolean, index, strict=True) if i is not None), dim)


def with_features(origin: Origin, n: int) -> Origin:
    """The origin of vectors as that of tensors whose last ``n`` dimensions are features."""
    if isinstance(origin, Fixed):
        return origin
    return tuple(ids.reshape(*ids.shape[:-1], *[1] * n) for ids in origin)
