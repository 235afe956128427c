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

from fisher_lab.curvature.kfac.token_ids import Fixed, Origin


class TokenMarks:
    """The ids of tensors, and of rows that are made of several tokens.

    Args:
        constants: tensors that do not depend on the batch (parameters, buffers); kept alive by
            their owner.

    Attributes:
        count: how many ids there are; they start at 1.
        pooled: first id of rows that several tokens make, the ids of these, a row each, and whether
            such a row counts only if all of them do.
    """

    def __init__(self, constants: Iterable[Tensor] = ()) -> None:
        self._of = WeakTensorKeyDictionary()
        self._constants = {id(t) for t in constants}
        self.count = 0
        self._waiting = WeakTensorKeyDictionary()
        self.pooled: list[tuple[int, Tensor, bool]] = []
        self._pooled_first: set[int] = set()

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

    def wait(self, tensor: Tensor, then: Callable[[Origin], None]) -> None:
        """Says what to do when a constant is added to the vectors of tokens, one to one.

        Args:
            tensor: the constant, with as many rows as the tokens.
            then: called with the tokens' origin.
        """
        self._waiting[tensor] = then

    def _pool(self, ids: Tensor, n_dims: int, every: bool = False) -> Tensor:
        """New ids for rows that several tokens make, which their last ``n_dims`` dimensions are.

        Such a row counts if one of them does, or if ``every`` one of them does.
        """
        shape = ids.shape[: ids.dim() - n_dims]
        made = self.new_tokens(shape, ids.device)
        self._pooled_first.add(int(made.reshape(-1)[0]))
        self.pooled.append((int(made.reshape(-1)[0]), ids.reshape(shape.numel(), -1), every))
        return made.reshape(*shape, *[1] * n_dims)

    def _at_home(self, origin: Origin) -> Origin:
        """The ids without those of other tokens whose vectors were mixed into a token's own.

        A row into which its neighbours were shifted (a time shift, a window) is that of the token
        that lies at its place in the input.
        """
        if isinstance(origin, Fixed) or len(origin) < 2:
            return origin
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
