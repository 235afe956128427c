"""Per-sample gradients that were collected once and serve several calls.

A cache is never used for another model than it was collected on: the bits of the parameters and
buffers are compared, and where they differ the gradients are computed anew.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fisher_lab.config.spectra import SpectralOptions
from fisher_lab.curvature.errors import CurvatureError
from fisher_lab.curvature.spectra.per_sample_gradients import Chunk
from fisher_lab.curvature.spectra.samples import SampleSet, add_to_hash

logger = logging.getLogger(__name__)


@dataclass
class GradientCache:
    """Per-sample gradients of one set of samples.

    Attributes:
        sample_unit: ``token`` or ``sequence``.
        keys: ``[N]`` SHA-1 of each row's sample; empty where it is not known.
        chunks: the rows as they were collected, some weights as products.
        parameters: names of the parameters that were collected; one that no chunk holds is one
            that the loss does not reach.
        model_hash: of the model that it was collected on (:func:`hash_of`); empty where it is not
            known, and nothing is compared.
        config: the options that it was collected with; None where the chunks are not rows in their
            order, but one parameter each.
    """

    sample_unit: str = "token"
    keys: tuple[str, ...] = ()
    chunks: Sequence[Chunk] = field(default=(), repr=False)
    parameters: frozenset[str] = field(default=frozenset(), repr=False)
    model_hash: str = ""
    config: SpectralOptions | None = None

    @classmethod
    def of(cls, given: object, unit: str) -> GradientCache:
        """Returns a cache as it is, or one of the tensors that another object holds.

        That is anything with ``per_sample_gradients``: parameter name to ``[N, *shape]``; None, or
        an object without it, gives an empty cache. ``unit`` is that of an object that names none.
        """
        if isinstance(given, GradientCache):
            return given
        gradients: Mapping[str, Tensor] = getattr(given, "per_sample_gradients", None) or {}
        covered = frozenset(getattr(given, "parameters", None) or ())
        return cls(
            sample_unit=getattr(given, "sample_unit", unit),
            keys=tuple(getattr(given, "keys", ())),
            chunks=[Chunk(0, len(x), 0, {name: x.flatten(1)}) for name, x in gradients.items()],
            parameters=covered | frozenset(gradients),
        )

    @property
    def per_sample_gradients(self) -> dict[str, Tensor] | None:
        """Parameter name to ``[N, numel]``, joined anew by every call; None in an empty cache."""
        found = {name: self.rows(name) for name in sorted(self.parameters)}
        return {name: x for name, x in found.items() if x is not None} or None

    def rows(self, name: str) -> Tensor | None:
        """Returns a parameter's rows ``[N, numel]``; None where the loss does not reach it."""
        parts = [(one.first, x) for one in self.chunks if (x := one.rows(name)) is not None]
        if not parts:
            return None
        if len(parts[0][1]) == len(self):
            return parts[0][1]
        rows = parts[0][1].new_zeros(len(self), parts[0][1].shape[1])
        for first, part in parts:
            rows[first : first + len(part)] = part
        return rows

    def __len__(self) -> int:
        return len(self.keys) or max((one.first + one.n for one in self.chunks), default=0)


def cached_chunks(
    given: object,
    samples: SampleSet,
    parameters: Mapping[str, nn.Parameter],
    model: nn.Module,
    config: SpectralOptions,
) -> tuple[Sequence[Chunk], bool] | None:
    """Returns the rows of ``J`` out of a cache, or None where it does not hold them.

    Args:
        given: as for :meth:`GradientCache.of`.
        samples: the rows that are wanted.
        parameters: the columns that are wanted.
        model: whose parameters they are.
        config: the caller's options.

    Returns:
        The rows, and whether the call would compute the very same bits: the cache was collected
        with these options on just these samples. Otherwise the two agree up to rounding.

    Raises:
        CurvatureError: the cache was collected for another sample unit, or its rows are neither
            labelled by keys nor as many as the samples.
    """
    cache = GradientCache.of(given, samples.unit)
    if not cache.chunks or samples.n == 0:
        return None
    if cache.sample_unit != samples.unit:
        raise CurvatureError(
            f"gradient_cache: sample_unit {cache.sample_unit!r}; allowed here: {samples.unit!r}"
        )
    for chunk in cache.chunks:
        if not cache.keys and chunk.n != samples.n:
            names = ", ".join(chunk.dense)
            raise CurvatureError(
                f"gradient_cache: {chunk.n} rows of {names}; there are {samples.n} samples"
            )
    problem = _problem(cache, samples, parameters, model)
    if problem is not None:
        logger.warning("gradient_cache: %s; the gradients are computed anew", problem)
        return None
    if cache.config is not None and cache.keys == samples.keys:
        return cache.chunks, cache.config == config
    index = {key: i for i, key in enumerate(cache.keys or samples.keys)}
    rows = torch.tensor([index[key] for key in samples.keys])
    picked = Chunk(0, samples.n, 0)
    for name, parameter in parameters.items():
        found = cache.rows(name)
        if found is None:
            continue
        if found.shape[1] != parameter.numel():
            raise CurvatureError(
                f"gradient_cache: {name} has {found.shape[1]} columns; the model's parameter has "
                f"{parameter.numel()} elements"
            )
        picked.dense[name] = found[rows.to(found.device)]
    return [picked], False


def _problem(
    cache: GradientCache,
    samples: SampleSet,
    parameters: Mapping[str, nn.Parameter],
    model: nn.Module,
) -> str | None:
    """Says why a cache does not hold what is wanted, or None where it does."""
    missing = [name for name in parameters if name not in cache.parameters]
    if missing:
        more = f" and {len(missing) - 1} more parameters" if len(missing) > 1 else ""
        return f"no gradients of {missing[0]}{more}"
    if cache.keys and not set(samples.keys) <= set(cache.keys):
        return "not all samples are in it"
    if cache.model_hash and cache.model_hash != hash_of(model):
        return "the model's weights have changed since it was collected"
    return None


def hash_of(model: nn.Module) -> str:
    """Returns a SHA-1 of the bits of all parameters and buffers of a model.

    Frozen parameters and running statistics count, because the gradients depend on them as well.
    """
    sha = hashlib.sha1(usedforsecurity=False)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        sha.update(name.encode())
        add_to_hash(sha, tensor)
    return sha.hexdigest()
