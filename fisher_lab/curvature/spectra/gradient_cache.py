"""Per-sample gradients that were collected once and serve several engines."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fisher_lab.curvature.errors import CurvatureError
from fisher_lab.curvature.spectra.per_sample_gradients import Chunk
from fisher_lab.curvature.spectra.samples import SampleSet

logger = logging.getLogger(__name__)


class Shape(NamedTuple):
    """What of an engine's settings decides the last bits of its rows and matrices.

    Attributes:
        products: which weights come as products: ``all`` that are cheaper so, those ``streaming``
            leaves to the Gram matrix, or ``none``.
        chunk_size: rows of one backward pass.
        deterministic: whether only deterministic algorithms were used.
    """

    products: str
    chunk_size: int
    deterministic: bool


class Cached(NamedTuple):
    """What a cache holds of a call.

    Attributes:
        chunks: the rows of ``J``.
        exact: whether they are, bit for bit, what the call would compute.
    """

    chunks: Sequence[Chunk]
    exact: bool


@dataclass
class GradientCache:
    """Per-sample gradients of one set of samples.

    Attributes:
        per_sample_gradients: parameter name to ``[N, *shape]`` (or ``[N, numel]``); None where
            nothing was collected. Weights that ``chunks`` holds as products need not be in it.
        keys: ``[N]`` SHA-1 of each row's sample; empty where it is not known.
        sample_unit: ``token`` or ``sequence``.
        chunks: the rows as they were collected, products included.
        parameters: names of the parameters that were collected; one of them without gradients is
            one that the loss does not reach. None: no more than ``per_sample_gradients`` names.
        fingerprint: of the model that it was collected on (:func:`fingerprint_of`); empty where it
            is not known, and nothing is compared.
        shape: the settings that it was collected with, or None.
        keeps_rows: whether weights that come as products are there as gradients, too.
    """

    per_sample_gradients: dict[str, Tensor] | None = None
    keys: tuple[str, ...] = ()
    sample_unit: str = "token"
    chunks: Sequence[Chunk] = field(default_factory=tuple, repr=False)
    parameters: frozenset[str] | None = field(default=None, repr=False)
    fingerprint: str = ""
    shape: Shape | None = None
    keeps_rows: bool = False

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


def fingerprint_of(model: nn.Module) -> str:
    """Returns a SHA-1 of the bits of all parameters and buffers of a model.

    Args:
        model: any module; of frozen parameters and running statistics the gradients depend as well.
    """
    sha = hashlib.sha1(usedforsecurity=False)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        sha.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        sha.update(raw.numpy().data)
    return sha.hexdigest()


def cached_chunks(
    cache: Any,
    samples: SampleSet,
    parameters: Mapping[str, nn.Parameter],
    model: nn.Module,
    shape: Shape,
) -> Cached | None:
    """Returns the rows of ``J`` out of a cache, or None where it does not hold them.

    The result of a call is exactly the uncached one where the samples are those that were
    collected, no more and no fewer, and the settings in :class:`Shape` are as well (a cache that
    keeps rows serves any ``products``). Else it is so but for rounding: a batched backward pass
    over other rows rounds in another way.

    Args:
        cache: None, or anything with ``per_sample_gradients``; the attribute may be missing.
        samples: the rows that are wanted.
        parameters: the columns that are wanted.
        model: whose parameters they are.
        shape: the caller's settings.

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
    if not keys:
        _check_lengths(gradients, samples)
    problem = _problem(cache, keys, samples, parameters, model)
    if problem is not None:
        logger.warning("gradient_cache: %s; the gradients are computed anew", problem)
        return None
    chunks = getattr(cache, "chunks", ())
    if chunks and keys == samples.keys:
        return _as_collected(cache, chunks, parameters, samples, shape)
    index = {key: i for i, key in enumerate(keys or samples.keys)}
    return Cached(_rows(gradients, parameters, [index[key] for key in samples.keys]), False)


def _problem(
    cache: Any,
    keys: Sequence[str],
    samples: SampleSet,
    parameters: Mapping[str, nn.Parameter],
    model: nn.Module,
) -> str | None:
    """Says why a cache does not hold what is wanted, or None where it does."""
    held = set(cache.per_sample_gradients) | set(getattr(cache, "parameters", None) or ())
    missing = [name for name in parameters if name not in held]
    if missing:
        return f"no gradients of {missing[0]}" + (
            f" and {len(missing) - 1} more parameters" if len(missing) > 1 else ""
        )
    if keys and not set(samples.keys) <= set(keys):
        return "not all samples are in it"
    known = getattr(cache, "fingerprint", "")
    if known and known != fingerprint_of(model):
        return "the model's weights have changed since it was collected"
    return None


def _as_collected(
    cache: Any,
    chunks: Sequence[Chunk],
    parameters: Mapping[str, nn.Parameter],
    samples: SampleSet,
    shape: Shape,
) -> Cached:
    """The rows as they were collected, weights as products where the caller would take them so."""
    collected = getattr(cache, "shape", None)
    if not getattr(cache, "keeps_rows", False):
        return Cached(chunks, collected == shape)
    wanted = {
        name: name in parameters and takes_product(shape.products, parameters[name], samples.total)
        for chunk in chunks
        for name in chunk.factored
    }
    picked = [
        replace(
            chunk,
            dense={n: x for n, x in chunk.dense.items() if not wanted.get(n, False)},
            factored={n: x for n, x in chunk.factored.items() if wanted[n]},
        )
        for chunk in chunks
    ]
    return Cached(picked, collected is not None and collected[1:] == shape[1:])


def takes_product(products: str, parameter: nn.Parameter, n: int) -> bool:
    """Says whether a weight whose products are the cheaper way comes so.

    Args:
        products: as in :class:`Shape`.
        parameter: the weight.
        n: samples, ``N``.
    """
    # A P x P matrix needs rows; with ``streaming`` a weight as large as N stays with the Gram one.
    return products == "all" or (products == "streaming" and parameter.numel() >= n)


def _check_lengths(gradients: Mapping[str, Tensor], samples: SampleSet) -> None:
    for name, rows in gradients.items():
        if len(rows) != samples.n:
            raise CurvatureError(
                f"gradient_cache: {len(rows)} rows of {name}; there are {samples.n} samples"
            )


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
