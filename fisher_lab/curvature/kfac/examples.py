"""Which example of the batch every row of a forward pass belongs to, and K-FAC-reduce with it.

An example is an index of the first dimension of the model's inputs, or a sequence of such a row
where a row holds several. Which example a row belongs to
follows from the tokens that it is made of (:mod:`.token_rows`). In K-FAC-reduce (Eschenhagen et al.
2023, section 3.2; ``docs/math.md``, section 1) a layer has one row an example: the mean of the
inputs of its tokens, and the sum of their gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fisher_lab.curvature.kfac.token_ids import FILLED, OWN, Origin, ids_of
from fisher_lab.curvature.kfac.token_rows import TokenRows
from fisher_lab.curvature.likelihoods import at_least_float32
from fisher_lab.curvature.losses import SummedLoss

NO_EXAMPLE = "which example each of its rows belongs to cannot be told"
"""Why a layer is left out of K-FAC-reduce."""


class Examples:
    """The example of every token of a forward pass.

    Args:
        rows: of the pass.
        inputs: side of the model, shape and first id of the tokens that it was given.
        device: of the ids.
        size: how many examples there are, where the inputs' first dimensions differ; None where
            that is not known.
        segments: ``[B, S]`` of which sequence of its row each position is, where rows hold several.
        axis: 1 gives the places in the second dimension of the inputs instead.
    """

    def __init__(
        self,
        rows: TokenRows,
        inputs: Sequence[tuple[str, torch.Size, int]],
        device: torch.device,
        size: int | None = None,
        segments: Tensor | None = None,
        axis: int = 0,
    ) -> None:
        sizes = {shape[axis] for _, shape, _ in inputs if len(shape) > axis}
        self.size = next(iter(sizes)) if len(sizes) == 1 else size if size in sizes else None
        # By id, the row that was filled in first and the model's own row last.
        table = torch.full((rows.count + 2,), -1, device=device)
        for _, shape, start in inputs:
            if len(shape) > axis and shape[axis] == self.size and shape.numel() > 0:
                numbers = torch.arange(shape.numel(), device=table.device)
                found = numbers // shape[axis + 1 :].numel() % shape[axis]
                if segments is not None:
                    of_row = segments.reshape(-1).to(table) if segments.shape == shape else None
                    among = int(segments.max()) + 1
                    found = found * among + of_row if of_row is not None else -1
                table[start : start + len(numbers)] = found
        for _ in range(2 if rows.unnamed else 1):  # some have their names from later ones
            for start, names in rows.unnamed:
                table[start : start + len(names)] = table[names.clamp(min=OWN)]
            for start, ids, _ in rows.pooled:
                members = table[ids]
                one = members.max(dim=1).values
                alone = ((members == one[:, None]) | (members < 0)).all(dim=1)
                table[start : start + len(ids)] = one.where(alone, -1)
        self._table = table

    def of(self, origin: Origin, trailing: int) -> Tensor | None:
        """Returns the example of every row of a tensor; None where one cannot be told.

        Args:
            origin: of the tensor.
            trailing: 1 where its last dimension holds features, else 0.

        Returns:
            int64, with as many dimensions as the rows, of size 1 where it does not vary.
        """
        ids = ids_of(origin, trailing)
        if ids is None or ids.numel() == 0:
            return ids
        found = self._beside(self._table[ids])
        unknown = (found < 0) & (ids != FILLED)  # few such rows count
        return None if bool(unknown.any()) else found

    @staticmethod
    def _beside(found: Tensor) -> Tensor:
        """Gives a row of the model's own (a class token) to the example of those beside it."""
        unknown = found < 0
        if not bool(unknown.any()) or bool(unknown.all()):
            return found
        for d in range(found.dim()):
            slices = found.movedim(d, 0).reshape(found.size(d), -1)
            one = slices.max(dim=1).values
            if bool((one >= 0).all() & ((slices == one[:, None]) | (slices < 0)).all()):
                shape = [-1 if k == d else 1 for k in range(found.dim())]
                return found.where(~unknown, one.reshape(shape))
        return found


class ByExample:
    """Sums and means of tokens over the examples that they belong to, in ascending order.

    Args:
        examples: ``[T]`` of the tokens.

    Attributes:
        index: ``[T]`` which of the sums each token goes to.
    """

    def __init__(self, examples: Tensor) -> None:
        _, self.index, counts = examples.unique(return_inverse=True, return_counts=True)
        self._counts = counts

    def __len__(self) -> int:
        return len(self._counts)

    def sums(self, x: Tensor) -> Tensor:
        """Returns the sums ``[n, features]`` of tokens ``[T, features]``, at least in float32."""
        return self._total(x).to(at_least_float32(x[:0]).dtype)

    def means(self, x: Tensor) -> Tensor:
        """Returns the means ``[n, features]`` of tokens ``[T, features]``, at least in float32."""
        return (self._total(x) / self._counts[:, None]).to(at_least_float32(x[:0]).dtype)

    def _total(self, x: Tensor) -> Tensor:
        wide = x.double()
        return wide.new_zeros(len(self), *x.shape[1:]).index_add_(0, self.index, wide)


def by_example(
    loss: SummedLoss, rows: TokenRows, known: Callable[[], Examples], dims: int = 2
) -> SummedLoss:
    """Returns a loss whose scored rows know their example where the outputs' shape does not say it.

    That is so of flat outputs ``[M, C]``: rows of one example may reach one another, and need
    backward passes of their own; where the example of a row cannot be told, every row is taken for
    one that does. It is also so of ``[B, S, C]`` where a row of the batch holds several sequences.

    Args:
        loss: of the pass.
        rows: of the pass.
        known: gives the examples of the pass.
        dims: of outputs that do not say it; those of others stay as they are.
    """
    scored, logits = loss.scored, loss.logits
    if scored is None or logits is None or logits.dim() != dims or scored.n_labels == 0:
        return loss
    examples = known()
    found = examples.of(rows.of(logits), 1)
    if found is None and len(logits) == examples.size:
        return loss
    owners = torch.zeros_like(scored.rows)
    if found is not None:
        places = (scored.rows, scored.positions)[: dims - 1]
        owners = found.expand(logits.shape[:-1])[places]
    return replace(loss, scored=replace(scored, rows=owners, positions=_ranks(owners)))


def _ranks(rows: Tensor) -> Tensor:
    """Counts every value's occurrences from 0, in their order."""
    order = rows.argsort(stable=True)
    _, counts = rows[order].unique_consecutive(return_counts=True)
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
    ranks = torch.empty_like(rows)
    ranks[order] = torch.arange(len(rows), device=rows.device) - starts
    return ranks


def lie_along_the_second(
    loss: SummedLoss,
    places: tuple[Examples, Examples],
    reached: Callable[[Tensor, Examples], set[int]],
) -> bool:
    """Whether the examples of a batch lie along the second dimension, and not along the first.

    The loss of one example reaches its own tokens alone. Where that of an index of the first
    dimension reaches the tokens of other indices, and that of an index of the second does not, the
    inputs are ``[S, B, ...]``.

    Args:
        loss: of the pass.
        places: of the tokens, in the first and in the second dimension of the inputs.
        reached: gives the places of the tokens at which a part of the loss has a gradient.
    """
    scored, logits = loss.scored, loss.logits
    if scored is None or logits is None or logits.dim() > 3 or scored.n_labels == 0:
        return False
    if places[1].size is None:
        return False
    losses = scored.likelihood.losses(scored)
    several = logits.dim() == 3
    if not several and len(logits) not in (places[0].size, places[1].size):
        return False
    of = (scored.rows, scored.positions if several else scored.rows)

    def mixes(axis: int) -> bool:
        last = of[axis].max()
        return bool(reached(losses[of[axis] == last].sum(), places[axis]) - {int(last)})

    return mixes(0) and not mixes(1)


def joined(parts: Sequence[Tensor]) -> ByExample:
    """Returns the examples of a layer's tokens over all its calls.

    Args:
        parts: ``[T]`` of each call.
    """
    return ByExample(parts[0] if len(parts) == 1 else torch.cat(list(parts)))
