"""Per-sample gradients, a chunk of rows of ``J`` at a time, never all of them.

Each sequence is run on its own (its samples depend on nothing else), and one batched backward
pass gives a chunk of its rows. A linear layer whose Gram matrix is cheaper without gradients
(:func:`factored_is_cheaper`) yields its inputs and output gradients instead of rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fisher_lab.curvature import losses
from fisher_lab.curvature.collectives import Alone, Communicator, together
from fisher_lab.curvature.spectra.samples import SampleSet, SequenceSamples
from fisher_lab.curvature.wrappers import is_conv1d


def factored_is_cheaper(n: int, positions: int, total: int, d_in: int, d_out: int) -> bool:
    """Says whether a weight's Gram matrix takes fewer multiplications without its gradients.

    For ``n`` samples ``N``, ``positions`` of one sequence ``S`` and in ``total`` ``T``: dense (form
    the gradients, then the lower triangle of their Gram matrix) takes ``N S in out + N^2 in out /
    2`` multiplications; factored (products of the inputs, output gradients mixed by them, the same
    triangle) takes ``T^2 in / 2 + N T S out / 2 + N^2 S out / 2``.
    """
    dense = n * positions * d_in * d_out + n * n * d_in * d_out / 2
    factored = (total * total * d_in + n * total * positions * d_out) / 2
    factored += n * n * positions * d_out / 2
    return factored < dense


@dataclass(frozen=True)
class Factored:
    """Some rows of ``J`` for one weight, as a product.

    Attributes:
        inputs: ``[S, in]``, shared by the rows.
        outputs: ``[c, S, out]``, each row's loss by the layer's outputs.
        transposed: the weight is stored ``[in, out]`` (Hugging Face's ``Conv1D``).
    """

    inputs: Tensor
    outputs: Tensor
    transposed: bool

    def dense(self) -> Tensor:
        """Returns the rows themselves, ``[c, in * out]`` in the weight's own order."""
        rows = torch.einsum("cso,si->coi", self.outputs, self.inputs)
        return (rows.mT if self.transposed else rows).flatten(1)


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of ``J`` of one sequence.

    Attributes:
        first: index of the first row.
        n: number of rows.
        sequence: index of the sequence.
        dense: parameter name to ``[n, numel]``; one that the loss does not reach is absent.
        factored: weight name to its rows as a product.
    """

    first: int
    n: int
    sequence: int
    dense: dict[str, Tensor] = field(default_factory=dict)
    factored: dict[str, Factored] = field(default_factory=dict)

    def rows(self, name: str) -> Tensor | None:
        """Returns a parameter's rows ``[n, numel]``; None where the loss does not reach it."""
        if name in self.factored:
            return self.factored[name].dense()
        return self.dense.get(name)


def linear_weights(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """Returns the linear layers whose weight belongs to them alone, by the weight's name."""
    wanted = set(names)
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        name = f"{path}.weight" if path else "weight"
        plain = isinstance(module, nn.Linear) or is_conv1d(module)
        if plain and name in wanted and owners[id(module.weight)] == 1:
            found[name] = module
    return found


def choose_factored(
    model: nn.Module,
    samples: SampleSet,
    names: Iterable[str],
    communicator: Communicator | None = None,
) -> dict[str, nn.Module]:
    """Picks the linear layers whose Gram matrix is cheaper without gradients; collective.

    One forward pass per batch, without gradient, counts the positions at each layer. A layer that
    is called more than once, or on another shape than ``[1, S, in]`` or ``[1, in]``, is left out.
    All ranks pick the layers that one process would pick.

    Returns:
        The layers by the weight's name, of those in ``names``.
    """
    ranks = communicator or Alone()
    linear = linear_weights(model, names)
    if not linear or samples.total == 0:
        return {}
    own: dict[str, tuple[int, int] | None] = {}
    together(ranks, lambda: own.update(_positions(model, linear, samples)))
    by_rank = ranks.all_gather_objects(own)
    chosen = {}
    for name, module in linear.items():
        seen = [other[name] for other in by_rank if name in other]
        if not seen or None in seen:
            continue
        longest, positions = max(s[0] for s in seen), sum(s[1] for s in seen)
        weight: Tensor = module.weight  # type: ignore[assignment]
        d_in, d_out = weight.shape if is_conv1d(module) else weight.shape[::-1]
        if factored_is_cheaper(samples.total, longest, positions, d_in, d_out):
            chosen[name] = module
    return chosen


def _positions(
    model: nn.Module, linear: Mapping[str, nn.Module], samples: SampleSet
) -> dict[str, tuple[int, int] | None]:
    """The positions of the longest sequence and of all, by layer; None where they do not fit."""
    result: dict[str, tuple[int, int] | None] = {}
    groups = Counter(sequence.group for sequence in samples.sequences)
    first = {sequence.group: sequence for sequence in reversed(samples.sequences)}
    for group, number in groups.items():
        for name, shapes in _probe(model, linear, first[group]).items():
            before = result.get(name, (0, 0))
            fits = len(shapes) == 1 and len(shapes[0]) in (2, 3) and shapes[0][0] == 1
            if not fits or before is None:
                result[name] = None
                continue
            count = shapes[0][1] if len(shapes[0]) == 3 else 1
            result[name] = max(before[0], count), before[1] + count * number
    return result


def _probe(
    model: nn.Module, linear: Mapping[str, nn.Module], sequence: SequenceSamples
) -> dict[str, list[torch.Size]]:
    """The shapes of the inputs of every call of a layer."""
    calls: dict[str, list[torch.Size]] = {name: [] for name in linear}
    with torch.no_grad(), ExitStack() as stack:
        for name, module in linear.items():
            hook = module.register_forward_hook(
                lambda _m, args, _out, name=name: calls[name].append(args[0].shape)
            )
            stack.callback(hook.remove)
        losses.forward(model, sequence.batch)
    return calls


class PerSampleGradients:
    """Yields the rows of ``J`` chunk by chunk.

    Args:
        model: any module, already in the mode it is to be evaluated in.
        samples: which rows.
        parameters: the columns, by name.
        factored: weights that are to come as products, from :func:`choose_factored`.
        chunk_size: rows of one backward pass, ``c``.
        loss_fn: as for :func:`fisher_lab.curvature.losses.score`.
    """

    def __init__(
        self,
        model: nn.Module,
        samples: SampleSet,
        parameters: Mapping[str, nn.Parameter],
        *,
        factored: Mapping[str, nn.Module] | None = None,
        chunk_size: int = 32,
        loss_fn: losses.LossFunction | None = None,
    ) -> None:
        self._model = model
        self._samples = samples
        self._factored = dict(factored or {})
        self._dense = {n: p for n, p in parameters.items() if n not in self._factored}
        self._chunk_size = chunk_size
        self._scorer = losses.scorer(model, loss_fn)

    def __iter__(self) -> Iterator[Chunk]:
        for index, sequence in enumerate(self._samples.sequences):
            yield from self._sequence(index, sequence)

    def _sequence(self, index: int, sequence: SequenceSamples) -> Iterator[Chunk]:
        calls: dict[str, tuple[Tensor, Tensor]] = {}
        with ExitStack() as stack:
            for name, module in self._factored.items():
                hook = module.register_forward_hook(
                    lambda _m, args, out, name=name: calls.update({name: (args[0], out)})
                )
                stack.callback(hook.remove)
            outputs = losses.forward(self._model, sequence.batch)
        values = losses.token_losses(self._scorer.score(outputs, sequence.batch))
        if self._samples.unit == "sequence":
            values = values.sum()[None]
        else:
            values = values[list(sequence.chosen)]
        targets = [out for _, out in calls.values()] + list(self._dense.values())
        for start in range(0, sequence.n_rows, self._chunk_size):
            stop = min(start + self._chunk_size, sequence.n_rows)
            chunk = Chunk(sequence.first_row + start, stop - start, index)
            # Where nothing is to be trained, or the loss reaches none of it, there is no graph.
            grads: list[Tensor | None] = [None] * len(targets)
            if targets and values.requires_grad:
                grads = _rows(values, targets, start, stop, retain=stop < sequence.n_rows)
            for (name, (inputs, _)), grad in zip(calls.items(), grads, strict=False):
                if grad is not None:
                    chunk.factored[name] = Factored(
                        inputs.detach().reshape(-1, inputs.shape[-1]),
                        grad.reshape(chunk.n, -1, grad.shape[-1]),
                        transposed=is_conv1d(self._factored[name]),
                    )
            for name, grad in zip(self._dense, grads[len(calls) :], strict=True):
                if grad is not None:
                    chunk.dense[name] = grad.reshape(chunk.n, -1)
            yield chunk


def _rows(
    values: Tensor, targets: list[Any], start: int, stop: int, *, retain: bool
) -> list[Tensor | None]:
    """Differentiates ``values[start:stop]`` one by one, in a batched backward pass where it can."""
    if stop - start == 1:
        grads = torch.autograd.grad(values[start], targets, retain_graph=retain, allow_unused=True)
        return [None if g is None else g[None] for g in grads]
    cotangents = torch.eye(len(values), dtype=values.dtype, device=values.device)[start:stop]
    try:
        return list(
            torch.autograd.grad(
                values,
                targets,
                cotangents,
                retain_graph=True,
                allow_unused=True,
                is_grads_batched=True,
            )
        )
    except RuntimeError as error:
        # An operation without a batching rule (a custom autograd function): row by row instead.
        if "vmap" not in str(error) and "batching rule" not in str(error):
            raise
    single = [_rows(values, targets, i, i + 1, retain=True) for i in range(start, stop)]
    return [
        None if columns[0] is None else torch.cat([c for c in columns if c is not None])
        for columns in zip(*single, strict=True)
    ]
