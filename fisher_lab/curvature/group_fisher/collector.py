"""Group Fisher: running moments of the squared gradient (``docs/math.md``, section 9).

The state of a task is, for each parameter, the weighted mean and ``M2`` of the squared gradient in
float64. What was squared is the collector's ``unit`` and travels with every export:

- ``batch``: the batch's mean gradient. Cheap, and *not* the diagonal of the Fisher matrix.
- ``sequence``: the gradient of a sequence's token-summed loss.
- ``token``: the gradient of a labelled token's own loss.

Weights are active tokens: of the batch, of the sequence, one for a token. With ``unit=token`` the
mean is the diagonal of section 8's matrix; with ``unit=sequence`` it is where all sequences have
as many active tokens, or with ``sequence_weight="one"``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from fisher_lab.config.spectra import GroupFisherConfig
from fisher_lab.curvature import losses
from fisher_lab.curvature.errors import (
    BatchError,
    CurvatureError,
    FactorFileError,
    NonFiniteError,
    check_one_of,
    check_options,
)
from fisher_lab.curvature.evaluation_mode import isolated
from fisher_lab.curvature.group_fisher.moments import Moments, by_element, overlap
from fisher_lab.curvature.group_fisher.parameter_groups import GROUPS, Slot, group_scores, layout_of
from fisher_lab.curvature.labelling import has_decoder
from fisher_lab.curvature.labels import token_mask
from fisher_lab.curvature.spectra.per_sample_gradients import Chunk, PerSampleGradients
from fisher_lab.curvature.spectra.samples import as_batches, draw_samples
from fisher_lab.curvature.wrappers import plain
from fisher_lab.runs import atomic

SCHEMA = 1
"""Version of the state that :meth:`FisherCollector.state` returns."""
RECORD = "group_fisher.json"


class FisherCollector:
    """Collects the moments of squared gradients by task and parameter; they can be saved.

    Args:
        unit: ``batch``, ``sequence`` or ``token``; see the module.
        sequence_weight: of a sequence: ``tokens`` (its active tokens) or ``one``.
        chunk_size: per-sample gradients of one backward pass.
        loss_fn: as for :func:`fisher_lab.curvature.losses.score`.

    Attributes:
        token_total: task to ``W``, the sum of its updates' weights.
        n_updates: task to the number of its updates.

    Raises:
        CurvatureError: an argument is out of range
            (:class:`fisher_lab.config.spectra.GroupFisherConfig`).
    """

    def __init__(
        self,
        unit: str = GroupFisherConfig.unit,
        *,
        sequence_weight: str = GroupFisherConfig.sequence_weight,
        chunk_size: int = GroupFisherConfig.chunk_size,
        loss_fn: losses.LossFunction | None = None,
    ) -> None:
        check_options(GroupFisherConfig(unit, sequence_weight, chunk_size))
        self.unit, self.sequence_weight, self.chunk_size = unit, sequence_weight, chunk_size
        self.token_total: dict[str, float] = {}
        self.n_updates: dict[str, int] = {}
        self._moments: dict[str, dict[str, Moments]] = {}
        self._layout: dict[str, list[Slot]] | None = None
        self._loss_fn = loss_fn

    # ---- collecting ------------------------------------------------------------------------

    def update_fisher_welford(
        self, task: str, gradients: Mapping[str, Tensor], weight: float
    ) -> None:
        """Takes in one gradient by parameter (it is squared here) of ``weight`` active tokens.

        Raises:
            CurvatureError: the weight is not above 0, or a shape differs from before.
            NonFiniteError: a gradient holds NaN or infinity.
        """
        rows = {name: g.detach()[None] for name, g in gradients.items()}
        self.update_rows(task, rows, torch.tensor([weight]))

    def update_rows(self, task: str, gradients: Mapping[str, Tensor], weights: Tensor) -> None:
        """Takes in several gradients at once: ``[c, *shape]`` by parameter, with weights ``[c]``.

        Raises:
            CurvatureError: a weight is not above 0, or a shape differs from before.
            NonFiniteError: a gradient holds NaN or infinity.
        """
        weights = weights.double()
        if not bool((weights > 0).all() & torch.isfinite(weights).all()):
            raise CurvatureError(f"weight: {weights.tolist()}; allowed: finite and above 0")
        state = self._moments.get(task, {})
        # Everything is checked before anything changes: a refused update leaves no half of itself.
        for name, rows in gradients.items():
            if not bool(torch.isfinite(rows).all()):
                raise NonFiniteError(f"task {task}: the gradient of {name} holds NaN or infinity")
            if name in state and state[name].mean.shape != rows.shape[1:]:
                raise CurvatureError(
                    f"task {task}: {name} of shape {tuple(rows.shape[1:])}; so far it was "
                    f"{tuple(state[name].mean.shape)}"
                )
        new = (
            (name, Moments.of(rows.detach().double().square(), weights))
            for name, rows in gradients.items()
        )
        self._add(task, new, float(weights.sum()), len(weights))

    def _add(
        self, task: str, new: Iterable[tuple[str, Moments]], tokens: float, updates: int
    ) -> None:
        """Merges moments of other data into those of a task; the moments are kept, not copied."""
        state = self._moments.setdefault(task, {})
        for name, moments in new:
            if name in state:
                state[name].merge(moments)
            else:
                state[name] = moments
        self.token_total[task] = self.token_total.get(task, 0.0) + tokens
        self.n_updates[task] = self.n_updates.get(task, 0) + updates

    def collect(
        self, model: nn.Module, batch: Any, task: str = "default", *, may_be_empty: bool = False
    ) -> None:
        """Takes in the gradients of a model on one batch or an iterable of batches.

        The model is evaluated in ``eval()`` mode and left as it was found. Parameters that the loss
        does not reach have a gradient of zero. With ``may_be_empty``, samples in which no label
        counts are nothing, and no error.

        Raises:
            BatchError: no label counts.
        """
        model = plain(model)
        self.describe(model)
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        with isolated(model, seed=0):
            if self.unit != "batch":
                self._collect_samples(model, batch, None, task, may_be_empty=may_be_empty)
                return
            batches = as_batches(batch)
            if not batches and not may_be_empty:
                raise BatchError(f"task {task}: no batch; allowed: one or more")
            for one in batches:
                grads, n_labels = self.summed_gradient(model, one, parameters)
                if n_labels == 0:
                    raise BatchError(f"task {task}: no label of the batch counts")
                means = {name: g / n_labels for name, g in grads.items()}
                self.update_fisher_welford(task, means, active_tokens(model, one))

    def summed_gradient(
        self, model: nn.Module, batch: Any, parameters: Mapping[str, nn.Parameter]
    ) -> tuple[dict[str, Tensor], int]:
        """Returns the gradient of a batch's token-summed loss, and how many labels count."""
        if losses.is_empty(batch):
            return {name: torch.zeros_like(p) for name, p in parameters.items()}, 0
        prepared = losses.prepare(model, batch, self._loss_fn)
        summed = losses.compute_loss(model, prepared, self._loss_fn)
        return losses.gradients_of(summed.loss, parameters), summed.n_labels

    def update_from(
        self, model: nn.Module, batch: Any, chunks: Iterable[Chunk], task: str = "default"
    ) -> None:
        """Takes in per-sample gradients that are there already; no backward pass is made.

        Args:
            model: the model that they belong to.
            batch: the batch or batches that they were collected on, without subsampling.
            chunks: all rows, as ``GradientCache.chunks`` keeps them.
            task: any name.

        Raises:
            CurvatureError: the unit is ``batch``.
            BatchError: no label counts.
        """
        if self.unit == "batch":
            raise CurvatureError("unit: 'batch'; per-sample gradients need 'sequence' or 'token'")
        model = plain(model)
        self.describe(model)
        self._collect_samples(model, batch, chunks, task)

    def _collect_samples(
        self,
        model: nn.Module,
        batch: Any,
        chunks: Iterable[Chunk] | None,
        task: str,
        *,
        may_be_empty: bool = False,
    ) -> None:
        """Takes in the gradients of all samples; where ``chunks`` is None they are computed."""
        samples = draw_samples(
            model, batch, unit=self.unit, n_samples=None, seed=0, loss_fn=self._loss_fn
        )
        if samples.n == 0 and not may_be_empty:
            raise BatchError(f"task {task}: no label of the batch counts")
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if chunks is None:
            chunks = PerSampleGradients(
                model, samples, parameters, chunk_size=self.chunk_size, loss_fn=self._loss_fn
            )
        for chunk in chunks:
            weights = torch.ones(chunk.n, dtype=torch.float64)
            if self.unit == "sequence" and self.sequence_weight == "tokens":
                weights *= active_tokens(model, samples.sequences[chunk.sequence].batch)
            rows = {}
            for name, p in parameters.items():
                found = chunk.rows(name)  # None where the loss does not reach the parameter
                found = p.new_zeros(chunk.n, p.numel()).detach() if found is None else found
                rows[name] = found.view(-1, *p.shape)
            self.update_rows(task, rows, weights)

    def merge(self, other: FisherCollector) -> None:
        """Takes in another collector's state, of other data; exact.

        Raises:
            CurvatureError: the other has another unit, sequence weight or shape; it is left out.
        """
        for name in ("unit", "sequence_weight"):
            if getattr(self, name) != getattr(other, name):
                raise CurvatureError(
                    f"{name}: {getattr(other, name)!r} cannot be merged into "
                    f"{getattr(self, name)!r}"
                )
        # Everything is checked before anything changes.
        for task, theirs in other._moments.items():
            mine = self._moments.get(task, {})
            for name, moments in theirs.items():
                if name in mine and mine[name].mean.shape != moments.mean.shape:
                    raise CurvatureError(f"task {task}: {name} has another shape in the other")
        for task, theirs in other._moments.items():
            copies = ((name, moments.clone()) for name, moments in theirs.items())
            self._add(task, copies, other.token_total[task], other.n_updates[task])
        self._layout = self._layout or other._layout

    # ---- reading ---------------------------------------------------------------------------

    @property
    def tasks(self) -> list[str]:
        """Tasks with at least one update."""
        return list(self._moments)

    @property
    def fisher_mean(self) -> dict[str, dict[str, Tensor]]:
        """Task, then parameter, to the float64 mean of the squared gradient."""
        return {task: self._means(task) for task in self._moments}

    @property
    def fisher_variance(self) -> dict[str, dict[str, Tensor]]:
        """Task, then parameter, to the float64 variance with frequency weights."""
        return {task: self.variance(task) for task in self._moments}

    def variance(self, task: str, weights: str = "frequency") -> dict[str, Tensor]:
        """Returns the variance by parameter; ``weights`` is ``frequency`` or ``general``.

        Raises:
            CurvatureError: no such task, or another kind of weights.
        """
        check_one_of("weights", weights, ("frequency", "general"))
        return {name: m.variance(weights) for name, m in self._task(task).items()}

    def export(self, task: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """Returns mean and variance in a narrower dtype, with what they mean; the state stays.

        Raises:
            CurvatureError: no such task.
        """
        means, variances = self._means(task), self.variance(task)
        return {
            "unit": self.unit,
            "sequence_weight": self.sequence_weight,
            "task": task,
            "token_total": self.token_total[task],
            "n_updates": self.n_updates[task],
            "mean": {name: x.to(dtype) for name, x in means.items()},
            "variance": {name: x.to(dtype) for name, x in variances.items()},
        }

    def importance(
        self, task: str, group: str = "layer", *, reduce: str = "mean"
    ) -> dict[str, float]:
        """Returns a score for each group: the mean (or sum) of its elements' Fisher values.

        Groups are ``layer``, ``head``, ``neuron`` (a linear layer's output unit) or ``parameter``;
        ``reduce`` is ``mean`` or ``sum``.

        Raises:
            CurvatureError: no such task or group, or the model's layout is not known.
        """
        check_one_of("reduce", reduce, ("mean", "sum"))
        return group_scores(self._means(task), self._slots(task, group), reduce)

    def top_k(
        self, task: str, k: int, group: str = "layer", *, reduce: str = "mean"
    ) -> list[tuple[str, float]]:
        """Returns the ``k`` groups of the highest importance, highest first."""
        scores = self.importance(task, group, reduce=reduce)
        return sorted(scores.items(), key=lambda item: -item[1])[:k]

    def overlap(
        self, first: str, second: str, *, share: float = 0.1, group: str | None = None
    ) -> dict[str, float | None]:
        """Compares what matters to two tasks, element by element or group by group.

        ``share``, above 0 and at most 1, says which part of the entries counts as the top. Returns
        what :func:`fisher_lab.curvature.group_fisher.moments.overlap` does.

        Raises:
            CurvatureError: no such task or group, or the share is out of range.
        """
        if group is None:
            return overlap(*by_element(self._means(first), self._means(second)), share)
        left, right = (
            {name: torch.tensor(x, dtype=torch.float64) for name, x in scores.items()}
            for scores in (self.importance(first, group), self.importance(second, group))
        )
        return overlap(*by_element(left, right), share)

    def _task(self, task: str) -> dict[str, Moments]:
        if task not in self._moments:
            raise CurvatureError(f"task: {task!r}; there are: {', '.join(self._moments) or 'none'}")
        return self._moments[task]

    def _means(self, task: str) -> dict[str, Tensor]:
        return {name: m.mean for name, m in self._task(task).items()}

    def _slots(self, task: str, group: str) -> list[Slot]:
        check_one_of("group", group, GROUPS)
        if self._layout is not None:
            slots = self._layout[group]
        elif group == "parameter":
            slots = [Slot(n, n, tuple(mean.shape)) for n, mean in self._means(task).items()]
        else:
            raise CurvatureError(f"group: {group!r} needs the model's layout; call describe(model)")
        if not slots:
            raise CurvatureError(f"group: {group!r}; the model has none that is known")
        return slots

    def describe(self, model: nn.Module) -> None:
        """Remembers how the model's parameters fall into groups (``collect`` does it itself)."""
        self._layout = layout_of(plain(model))

    # ---- state -----------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Returns the whole state: float64 tensors, and what belongs into JSON.

        The tensors are named ``<task number>/<mean|m2>/<parameter>``.
        """
        tensors: dict[str, Tensor] = {}
        tasks = []
        for number, (task, state) in enumerate(self._moments.items()):
            for name, moments in state.items():
                tensors[f"{number}/mean/{name}"] = moments.mean
                tensors[f"{number}/m2/{name}"] = moments.m2
            tasks.append(
                {
                    "name": task,
                    "token_total": self.token_total[task],
                    "n_updates": self.n_updates[task],
                    "weights": {name: [m.w, m.w2] for name, m in state.items()},
                }
            )
        plain = {
            "schema": SCHEMA,
            "unit": self.unit,
            "sequence_weight": self.sequence_weight,
            "tasks": tasks,
            "layout": self._layout
            and {kind: [asdict(slot) for slot in slots] for kind, slots in self._layout.items()},
        }
        return tensors, plain

    def restore(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        """Replaces the state by what :meth:`state` returned.

        Raises:
            CurvatureError: another schema, or tensors are missing.
        """
        if plain.get("schema") != SCHEMA:
            raise CurvatureError(f"schema: {plain.get('schema')!r}; allowed: {SCHEMA}")
        check_options(GroupFisherConfig(plain["unit"], plain["sequence_weight"]))
        moments: dict[str, dict[str, Moments]] = {}
        layout: dict[str, list[Slot]] = {}
        try:
            for kind, slots in (plain["layout"] or {}).items():
                layout[kind] = [
                    Slot(s["parameter"], s["group"], tuple(s["view"]), s["axis"]) for s in slots
                ]
            for number, task in enumerate(plain["tasks"]):
                moments[task["name"]] = {
                    name: Moments(
                        tensors[f"{number}/mean/{name}"].double(),
                        tensors[f"{number}/m2/{name}"].double(),
                        float(w),
                        float(w2),
                    )
                    for name, (w, w2) in task["weights"].items()
                }
        except KeyError as error:
            raise CurvatureError(f"state: {error} is missing") from error
        self.unit, self.sequence_weight = plain["unit"], plain["sequence_weight"]
        self._moments = moments
        self.token_total = {t["name"]: float(t["token_total"]) for t in plain["tasks"]}
        self.n_updates = {t["name"]: int(t["n_updates"]) for t in plain["tasks"]}
        self._layout = layout or None

    def save(self, directory: str | Path) -> Path:
        """Writes the state into a directory, which is made if needed, and returns it.

        Tensors go into a safetensors file in float64, the rest into a JSON record. The directory
        holds the new state in full or the old one.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        tensors, plain = self.state()
        data = safetensors.torch.save(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        )
        # The tensors' file is named after its content and the record names it: replacing the
        # record is the one moment at which the new state takes the old one's place.
        plain["digest"] = _digest(data)
        plain["tensors"] = f"group_fisher-{plain['digest'][:16]}.safetensors"
        atomic.write_bytes(directory / plain["tensors"], data)
        atomic.write_json(directory / RECORD, plain)
        for old in directory.glob("group_fisher-*.safetensors"):
            if old.name != plain["tensors"]:
                old.unlink(missing_ok=True)
        return directory

    @classmethod
    def load(cls, directory: str | Path, **options: Any) -> FisherCollector:
        """Reads what :meth:`save` wrote; updates go on where they stopped.

        ``options`` are further arguments of the constructor (``loss_fn``, ``chunk_size``).

        Raises:
            FactorFileError: a file is missing, cut short, or the two do not belong together.
        """
        directory = Path(directory)
        try:
            plain = json.loads((directory / RECORD).read_text(encoding="utf-8"))
            name = Path(str(plain["tensors"])).name
            data = (directory / name).read_bytes()
            if plain["digest"] != _digest(data):
                raise FactorFileError(
                    f"{directory / name}: not the file that {RECORD} was written with"
                )
            tensors = safetensors.torch.load(data)
        except FactorFileError:
            raise
        except (OSError, KeyError, ValueError, safetensors.SafetensorError) as error:
            raise FactorFileError(f"{directory}: no saved group Fisher ({error})") from error
        found = cls(**options)
        found.restore(tensors, plain)
        return found


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def active_tokens(model: nn.Module, batch: Any) -> int:
    """Counts the active positions where the loss is (``docs/math.md``, section 1).

    In an encoder-decoder model these are the decoder's: its mask, or else the labels that count.
    Without a mask every position of the labels is active.
    """
    labels = losses.labels_of(batch)
    if not isinstance(batch, Mapping):
        return 0 if labels is None else labels.numel()
    if has_decoder(model):
        mask = token_mask(batch, "decoder_attention_mask")
        if mask is None and labels is not None:
            mask = labels != losses.IGNORE_INDEX
    else:
        mask = token_mask(batch)
    if mask is None or labels is None or mask.shape != labels.shape:
        return 0 if labels is None else labels.numel()
    return int((mask != 0).sum())


__all__ = ["FisherCollector", "active_tokens"]
