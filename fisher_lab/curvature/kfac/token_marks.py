"""What is known of the tensors of a forward pass: which tokens their rows belong to.

:mod:`.token_rows` says what an operation makes of it. Ids of a tensor have as many dimensions as
it, of size 1 where they do not vary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fisher_lab.curvature.kfac.token_ids import FILLED, OWN, Fixed, Made, Origin, Standing

_UNNAMED, _SEVERAL = OWN - 1, OWN - 2


class TokenMarks:
    """The ids of tensors, and of rows that are made of several tokens.

    Args:
        constants: tensors that do not depend on the batch (parameters, buffers); kept alive by
            their owner.

    Attributes:
        count: how many ids there are; they start at 1.
        pooled: first id of rows that several tokens make, the ids of these, a row each, and when
            such a row counts.
        homes: first id and shape of the tokens of every input.
        unnamed: first id of rows whose tokens an operation has hidden, and the id of that of each
            (:meth:`name`).
    """

    def __init__(self, constants: Iterable[Tensor] = ()) -> None:
        self._of = WeakTensorKeyDictionary()
        self._constants = {id(t) for t in constants}
        self.count = 0
        self._waiting = WeakTensorKeyDictionary()
        self.pooled: list[tuple[int, Tensor, Made]] = []
        self.unnamed: list[tuple[int, Tensor]] = []
        self._pooled_first: set[int] = set()
        self.homes: list[tuple[int, torch.Size]] = []
        self._joint: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}

    def new_tokens(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """Returns ids of new tokens, int64 of this shape."""
        n = torch.Size(shape).numel()
        ids = torch.arange(self.count + 1, self.count + n + 1, device=device).reshape(tuple(shape))
        self.count += n
        return ids

    def mark(self, tensor: Tensor, origin: Origin) -> None:
        """Says what a tensor's rows are."""
        if id(tensor) not in self._constants:
            self._of[tensor] = origin

    def of(self, tensor: Any) -> Origin:
        """Returns what is known of a tensor; of a number, that it is constant."""
        if not isinstance(tensor, Tensor) or id(tensor) in self._constants:
            return Fixed.CONSTANT
        origin: Origin | None = self._of.get(tensor)
        return Fixed.UNKNOWN if origin is None else origin

    def is_coarse(self, origin: Origin, shape: Sequence[int]) -> bool:
        """Says whether rows vary by positions, of which only whole examples are known."""
        each = () if isinstance(origin, Fixed) else [i for i in origin if i.numel()]
        coarse = any(ids.shape != shape for ids in each)
        return coarse and all(int(ids.reshape(-1)[0]) in self._pooled_first for ids in each)

    def wait(self, tensor: Tensor, then: Callable[[Origin], None]) -> None:
        """Says what to do when a constant is added to the vectors of tokens, one to one.

        Args:
            tensor: the constant, with as many rows as the tokens.
            then: called with the tokens' origin.
        """
        self._waiting[tensor] = then

    def pool(self, ids: Tensor, n_dims: int, made: Made = Made.OF_SOME) -> Tensor:
        """Returns new ids for rows that several tokens make.

        Args:
            ids: of the tokens; the rows are its last ``n_dims`` dimensions.
            n_dims: see above.
            made: when such a row counts.
        """
        shape = ids.shape[: ids.dim() - n_dims]
        new = self.new_tokens(shape, ids.device)
        self._pooled_first.add(int(new.reshape(-1)[0]))
        self.pooled.append((int(new.reshape(-1)[0]), ids.reshape(shape.numel(), -1), made))
        return new.reshape(*shape, *[1] * n_dims)

    # ---- rows whose tokens are told by what they are added to --------------------------------

    def name(self, tensor: Tensor) -> Origin:
        """Gives ids to the vectors of a tensor whose tokens an operation has hidden.

        They become those of the tokens to whose vectors they are added, one to one
        (``docs/math.md``, section 1).

        Args:
            tensor: ``[..., features]``.
        """
        rows = tensor.shape[:-1]
        ids = self.new_tokens(rows, tensor.device)
        self.unnamed.append((int(ids.reshape(-1)[0]), torch.full_like(ids.reshape(-1), _UNNAMED)))
        self.mark(tensor, (ids.unsqueeze(-1),))
        return self.of(tensor)

    def _named(self, found: list[Tensor]) -> list[Tensor]:
        """The ids of a result, whose rows name those of its parts that have no name yet."""
        if not self.unnamed or len(found) < 2:
            return found
        kept = [ids for ids in found if not self._is_unnamed(ids)]
        for ids in found:
            if any(ids is other for other in kept):
                continue
            alike = [other for other in kept if other.shape == ids.shape]
            for other in alike[:1]:
                self._give(ids.reshape(-1), other.reshape(-1))
            kept += [] if alike else [ids]
        return kept

    def _is_unnamed(self, ids: Tensor) -> bool:
        highest = int(ids.max())
        return any(start <= highest < start + len(names) for start, names in self.unnamed)

    def _give(self, ids: Tensor, names: Tensor) -> None:
        for start, before in self.unnamed:
            here = (ids >= start) & (ids < start + len(before)) & (ids != names)
            places, new = ids[here] - start, names[here]
            old = before[places]
            before[places] = new.where((old == _UNNAMED) | (old == new), _SEVERAL)

    def shifted(self, ids: Tensor) -> Tensor:
        """Returns ids of rows that were moved on by some positions, as those of their places.

        A time shift puts rows before (or behind) the tokens of an input and drops as many at the
        other end: every row then lies at the place of the token to whose vector it belongs.
        """
        for start, shape in self.homes:
            if len(shape) != 2 or [n for n in ids.shape if n > 1] != [n for n in shape if n > 1]:
                continue
            home = torch.arange(start, start + shape.numel(), device=ids.device).reshape(shape)
            here = ids.reshape(shape)
            by = int(home[0, -1] - here[0, -1]) or int(home[0, 0] - here[0, 0])
            if not 0 < abs(by) < shape[1]:
                continue
            moved, real = home.roll(by, dims=1), slice(by, None) if by > 0 else slice(None, by)
            if torch.equal(here[:, real], moved[:, real]):
                return home.reshape(ids.shape)
        return ids

    # ---- which rows count --------------------------------------------------------------------

    def standings(self, masks: Iterable[tuple[int, Tensor]], device: torch.device) -> Tensor:
        """Returns the :class:`Standing` of every row by its id, int8.

        What is filled in comes first, the model's own row last.

        Args:
            masks: first id of the tokens of an input, and which of them are no padding.
            device: of the result.
        """
        table = torch.full((self.count + 2,), Standing.TOKEN, dtype=torch.int8, device=device)
        table[FILLED] = Standing.REACHED
        for start, mask in masks:
            table[start : start + mask.numel()] = mask.reshape(-1)
        while True:
            before = table.clone()
            for start, names in self.unnamed:
                found = table[names.clamp(min=OWN)].where(names >= OWN, Standing.UNTOLD)
                table[start : start + len(names)] = found
            for start, ids, made in self.pooled:
                table[start : start + len(ids)] = made.standing(table[ids], ids)
            if not self.unnamed or torch.equal(before, table):
                return table

    # ---- several ids for one row -------------------------------------------------------------

    def settled(self, origin: Origin) -> Origin:
        """Returns an origin without ids that say of the same rows what others do."""
        if isinstance(origin, Fixed) or len(origin) < 2:
            return origin
        if any(ids.numel() == 0 for ids in origin):
            return tuple(ids for ids in origin if ids.numel() == 0)[:1]  # there is no row
        origin = self._at_home(origin)
        alike: dict[tuple[bool, ...], list[Tensor]] = {}
        for ids in origin:
            alike.setdefault(tuple(n > 1 for n in ids.shape), []).append(ids)
        return tuple(self._together(every) for every in alike.values())

    def _together(self, every: list[Tensor]) -> Tensor:
        """Ids of rows each of which belongs to several tokens."""
        if len(every) == 1:
            return every[0]
        key = tuple(int(ids.reshape(-1)[0]) for ids in every)
        members = torch.stack(every, dim=-1)
        for ids, before in self._joint.get(key, ()):
            if torch.equal(before, members):
                return ids
        ids = self.pool(members, 1, Made.OF_ALIKE)[..., 0]
        self._joint.setdefault(key, []).append((ids, members))
        return ids

    def _at_home(self, origin: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The ids without those of other tokens whose vectors were mixed into a token's own.

        A row into which its neighbours were shifted (a time shift, a window) is that of the token
        that lies at its place in the input.
        """
        home = [ids for ids in origin if self._is_home(ids)]
        if len(home) != 1:
            return origin
        pattern = [n > 1 for n in home[0].shape]
        return tuple(i for i in origin if i is home[0] or [n > 1 for n in i.shape] != pattern)

    def _is_home(self, ids: Tensor) -> bool:
        """Whether tokens lie as they did in an input (or with examples and positions swapped)."""
        ids = ids.squeeze()
        orders = [ids.reshape(-1), ids.T.reshape(-1)] if ids.dim() == 2 else [ids.reshape(-1)]
        first = int(orders[0][0])
        if first <= 0 or first in self._pooled_first or ids.dim() > 2:
            return False
        home = torch.arange(first, first + ids.numel(), device=ids.device)
        return any(torch.equal(each, home) for each in orders)
