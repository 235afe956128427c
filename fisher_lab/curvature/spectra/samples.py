"""Which gradients are the rows of ``J``: labelled tokens or sequences, and a stable subsample.

A row belongs to a *labelled* token: a position whose label is masked, padded or -100 has no loss
of its own. A sequence without any label is no sample either. Samples are ordered by batch,
sequence and position. Where ranks have batches of their own, the samples of rank 0 come first,
then those of rank 1, and so on.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fisher_lab.curvature import losses
from fisher_lab.curvature.collectives import Alone, Communicator, together
from fisher_lab.curvature.errors import BatchError, CurvatureError
from fisher_lab.curvature.preparation import agreed


@dataclass(frozen=True)
class SequenceSamples:
    """One sequence of a prepared batch and which of its samples are wanted.

    Attributes:
        batch: the prepared batch, cut down to this sequence (leading dimension 1).
        chosen: indices of the wanted labelled tokens, ascending, in ``Scored`` order; all of them
            for the unit ``sequence``, where they are summed.
        first_row: row of this rank's ``J`` at which the samples of the sequence start.
        n_rows: number of those rows.
        group: index of the batch that the sequence came from.
    """

    batch: Any
    chosen: tuple[int, ...]
    first_row: int
    n_rows: int
    group: int


@dataclass(frozen=True)
class SampleSet:
    """The samples of a call, in the order of the rows of ``J``.

    Attributes:
        unit: ``token`` or ``sequence``.
        sequences: this rank's sequences that hold at least one chosen sample.
        keys: SHA-1 of each chosen sample's content (with a count where it repeats), this rank's.
        rows: chosen samples of each rank; ``N`` is their sum.
        n_candidates: samples of all ranks before subsampling.
        data_hash: SHA-1 over all candidates of all ranks, whatever their order.
        subsample_hash: SHA-1 over the chosen ones likewise.
    """

    unit: str
    sequences: tuple[SequenceSamples, ...]
    keys: tuple[str, ...]
    rows: tuple[int, ...]
    n_candidates: int
    data_hash: str
    subsample_hash: str

    @property
    def n(self) -> int:
        """Number of this rank's samples."""
        return len(self.keys)

    @property
    def total(self) -> int:
        """Number of samples of all ranks, ``N``."""
        return sum(self.rows)


def as_batches(batch: Any) -> list[Any]:
    """Returns one batch, or an iterable of batches, as a list of batches."""
    if isinstance(batch, Tensor | Mapping) or losses.labels_of(batch) is not None:
        return [batch]
    return list(batch)


def draw_samples(
    model: nn.Module,
    batch: Any,
    *,
    unit: str,
    n_samples: int | None,
    seed: int,
    loss_fn: losses.LossFunction | None = None,
    communicator: Communicator | None = None,
) -> SampleSet:
    """Lists the samples of a batch and keeps ``n_samples`` of them; collective.

    The subsample takes the ``n_samples`` smallest SHA-1 digests of (seed, sample content). It is
    the same in every process, for every order of the batch, every ``PYTHONHASHSEED`` and every
    number of ranks.

    Args:
        model: any module whose labelling is known, or any with a ``loss_fn``.
        batch: one batch or an iterable of batches, this rank's own; they are not changed.
        unit: ``token`` or ``sequence``.
        n_samples: how many to keep of all ranks' samples; None keeps all.
        seed: enters the digests.
        loss_fn: as for :func:`fisher_lab.curvature.losses.score`.
        communicator: of the ranks whose samples are joined; None for this process alone.

    Raises:
        CurvatureError: ``n_samples`` is below 1.
        BatchError: a batch has no labels.
        RankError: another rank's batch has none.
    """
    if n_samples is not None and n_samples < 1:
        raise CurvatureError(f"n_samples: {n_samples}; allowed: 1 or more, or None for all")
    ranks = communicator or Alone()
    found, batches = list[_Sequence](), list[Any]()
    together(ranks, lambda: batches.extend(as_batches(batch)))
    agreed(model, batches, ranks, loss_fn)
    alone = ranks.size == 1
    together(ranks, lambda: found.extend(_sequences(model, batches, loss_fn, alone)))
    places = [
        (index, number, f"{content}:{position}")
        for index, (one, content) in enumerate(zip(found, _numbered(found, ranks), strict=True))
        for number, position in enumerate(
            one.positions if unit == "token" else [-1] * min(len(one.positions), 1)
        )
    ]
    keys = [_sha1(content) for *_, content in places]
    by_rank = ranks.all_gather_objects(keys)
    every = [key for other in by_rank for key in other]
    ordered = sorted(range(len(every)), key=lambda i: _sha1(f"{seed}:{every[i]}"))
    kept = sorted(ordered[:n_samples])
    bounds = [0, *accumulate(len(other) for other in by_rank)]
    chosen = [[i - low for i in kept if low <= i < high] for low, high in pairwise(bounds)]
    mine = chosen[ranks.rank]
    return SampleSet(
        unit=unit,
        sequences=_group(found, [places[i] for i in mine], unit),
        keys=tuple(keys[i] for i in mine),
        rows=tuple(len(own) for own in chosen),
        n_candidates=len(every),
        data_hash=_sha1("\n".join(sorted(every))),
        subsample_hash=_sha1("\n".join(sorted(every[i] for i in kept))),
    )


def _group(
    found: list[_Sequence], places: list[tuple[int, int, str]], unit: str
) -> tuple[SequenceSamples, ...]:
    numbers: dict[int, list[int]] = {}
    for index, number, _ in places:
        numbers.setdefault(index, []).append(number)
    result, row = [], 0
    for index, wanted in numbers.items():
        one, n_rows = found[index], len(wanted)
        chosen = wanted if unit == "token" else range(len(one.positions))
        result.append(SequenceSamples(one.batch, tuple(chosen), row, n_rows, one.group))
        row += n_rows
    return tuple(result)


def _sha1(text: str) -> str:
    return hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class _Sequence:
    """A sequence, its batch's index, its content's digest and its labelled positions."""

    group: int
    batch: Any
    content: str
    positions: list[int]


def _sequences(
    model: nn.Module, batches: Sequence[Any], loss_fn: losses.LossFunction | None, measure: bool
) -> Iterator[_Sequence]:
    for group, one in enumerate(batches):
        prepared = losses.prepare(model, one, loss_fn, measure=measure)
        positions = _labelled(prepared, losses.scorer(model, loss_fn).shift)
        for row, where in enumerate(positions):
            content = _digest(_slice(one, row, len(positions)))
            yield _Sequence(group, _slice(prepared, row, len(positions)), content, where)


def _numbered(found: Sequence[_Sequence], ranks: Communicator) -> list[str]:
    """Appends to each content how often it has come so far, lower ranks first."""
    own = [one.content for one in found]
    seen: Counter[str] = Counter()
    for other in ranks.all_gather_objects(own)[: ranks.rank]:
        seen.update(other)
    result = []
    for content in own:
        seen[content] += 1
        result.append(f"{content}:{seen[content]}")
    return result


def _labelled(prepared: Any, shift: bool) -> list[list[int]]:
    """Returns the labelled positions of each sequence."""
    labels = losses.labels_of(prepared)
    if labels is None:
        raise BatchError("batch: no 'labels' in it, and per-sample losses need them")
    if shift and labels.dim() == 2:
        labels = labels[:, 1:]
    keep = labels != losses.IGNORE_INDEX
    if keep.dim() == 1:
        keep = keep[:, None]
    return [row.nonzero()[:, 0].tolist() for row in keep]


def _slice(batch: Any, row: int, size: int) -> Any:
    """Cuts one example out of a batch; entries without the batch dimension stay whole."""

    def cut(x: Tensor) -> Tensor:
        return x[row : row + 1] if x.dim() > 0 and x.shape[0] == size else x

    return losses.map_tensors(cut, batch)


def _digest(sample: Any) -> str:
    sha = hashlib.sha1(usedforsecurity=False)
    items = sorted(sample.items()) if isinstance(sample, Mapping) else enumerate(sample)
    for key, value in items:
        sha.update(str(key).encode())
        if isinstance(value, Tensor):
            add_to_hash(sha, value)
        else:
            sha.update(repr(value).encode())
    return sha.hexdigest()


def add_to_hash(sha: hashlib._Hash, tensor: Tensor) -> None:
    """Adds dtype, shape and bits of a tensor to a hash."""
    sha.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    sha.update(raw.numpy().data)
