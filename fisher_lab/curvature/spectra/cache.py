"""Per-sample gradients that were collected once and serve several engines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CurvatureError
from .gradients import Chunk
from .samples import SampleSet


@dataclass
class GradientCache:
    """Per-sample gradients of one set of samples.

    Attributes:
        per_sample_gradients: parameter name to ``[N, *shape]`` (or ``[N, numel]``); None where
            nothing was collected. Weights that ``chunks`` holds as products need not be in it.
        keys: ``[N]`` SHA-1 of each row's sample; empty where it is not known.
        sample_unit: ``token`` or ``sequence``.
        chunks: the rows as they were collected, products included.
    """

    per_sample_gradients: dict[str, Tensor] | None = None
    keys: tuple[str, ...] = ()
    sample_unit: str = "token"
    chunks: Sequence[Chunk] = field(default_factory=tuple, repr=False)

    @classmethod
    def from_chunks(cls, chunks: Iterable[Chunk], samples: SampleSet) -> GradientCache:
        """Keeps every chunk in memory.

        Args:
            chunks: all rows, in order.
            samples: which rows they are.
        """
        kept = tuple(chunks)
        names = {name for chunk in kept for name in chunk.dense}
        # Views of the chunks would be lost in torch.cat; the dense rows are joined on demand.
        gradients = _LazyRows(kept, names, samples.n)
        return cls(gradients, samples.keys, samples.unit, kept)  # type: ignore[arg-type]

    def __len__(self) -> int:
        if self.keys:
            return len(self.keys)
        return (
            len(next(iter(self.per_sample_gradients.values()))) if self.per_sample_gradients else 0
        )


class _LazyRows(Mapping[str, Tensor]):
    """A mapping of name to ``[N, numel]`` that joins the chunks when it is asked."""

    def __init__(self, chunks: Sequence[Chunk], names: set[str], n: int) -> None:
        factored = {name for chunk in chunks for name in chunk.factored}
        self._chunks, self._names, self._n = chunks, sorted(names | factored), n

    def __getitem__(self, name: str) -> Tensor:
        parts: list[tuple[Chunk, Tensor]] = []
        for chunk in self._chunks:
            if name in chunk.dense:
                parts.append((chunk, chunk.dense[name]))
            elif name in chunk.factored:
                parts.append((chunk, chunk.factored[name].dense()))
        if not parts:
            raise KeyError(name)
        rows = parts[0][1].new_zeros(self._n, parts[0][1].shape[1])
        for chunk, part in parts:
            rows[chunk.first : chunk.first + chunk.n] = part
        return rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def cached_chunks(
    cache: Any, samples: SampleSet, parameters: Mapping[str, nn.Parameter]
) -> Sequence[Chunk] | None:
    """Returns the rows of ``J`` out of a cache, or None where it does not hold them.

    Args:
        cache: None, or anything with ``per_sample_gradients``; the attribute may be missing.
        samples: the rows that are wanted.
        parameters: the columns that are wanted.

    Raises:
        CurvatureError: the cache was collected for another sample unit, or its rows are neither
            labelled by keys nor as many as the samples.
    """
    gradients = getattr(cache, "per_sample_gradients", None)
    if not gradients or samples.n == 0:
        return None
    unit = getattr(cache, "sample_unit", samples.unit)
    if unit != samples.unit:
        raise CurvatureError(
            f"gradient_cache: sample_unit {unit!r}; allowed here: {samples.unit!r}"
        )
    keys = tuple(getattr(cache, "keys", ()))
    chunks = getattr(cache, "chunks", ())
    if chunks and keys == samples.keys:
        return chunks
    if not keys:
        return _whole(gradients, samples, parameters)
    index = {key: i for i, key in enumerate(keys)}
    if not set(samples.keys) <= set(index):
        return None
    return _rows(gradients, parameters, [index[key] for key in samples.keys])


def _whole(
    gradients: Mapping[str, Tensor], samples: SampleSet, parameters: Mapping[str, nn.Parameter]
) -> list[Chunk]:
    for name, rows in gradients.items():
        if len(rows) != samples.n:
            raise CurvatureError(
                f"gradient_cache: {len(rows)} rows of {name}; there are {samples.n} samples"
            )
    return _rows(gradients, parameters, list(range(samples.n)))


def _rows(
    gradients: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter], rows: list[int]
) -> list[Chunk]:
    chunk = Chunk(0, len(rows), 0)
    for name, parameter in parameters.items():
        if name not in gradients:
            continue
        found = gradients[name].flatten(1)
        if found.shape[1] != parameter.numel():
            raise CurvatureError(
                f"gradient_cache: {name} has {found.shape[1]} columns; the model's parameter has "
                f"{parameter.numel()} elements"
            )
        everything = rows == list(range(len(found)))
        chunk.dense[name] = found if everything else found[torch.tensor(rows)]
    return [chunk]
