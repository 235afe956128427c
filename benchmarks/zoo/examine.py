"""What becomes of one architecture: right, wrong, refused, crashed, or not built."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from torch import nn

from benchmarks.zoo.compare import DAMPING, compare
from benchmarks.zoo.inputs import Batch, Shape
from benchmarks.zoo.mappings import TASKS, Task
from benchmarks.zoo.reference import padding_counts, reference
from benchmarks.zoo.tiny import Exact, build
from fisher_lab import KFACNaturalGradient
from fisher_lab.curvature.errors import CurvatureError

NOT_BUILT, REFUSED, CRASHED, WRONG, RIGHT = "not built", "refused", "crashed", "wrong", "right"


def examine(task: str, kind: str) -> dict[str, Any]:
    """Builds a class of transformers and compares the engine with its reference on every batch.

    Args:
        task: name of the mapping.
        kind: type of model.

    Returns:
        ``status``, ``why``, ``coverage``, ``passed``, and the shapes whose padding is not hidden.
    """
    with Exact():
        return _examine(TASKS[task], kind)


def _examine(about: Task, kind: str) -> dict[str, Any]:
    def works(model: nn.Module) -> None:
        for shape in about.shapes[-1:]:
            reference(model, about.batch(model, shape))

    try:
        model = build(about.classes[kind], works, about.settle)
        model = about.adapt.get(kind, lambda model: model)(model)
    except Exception as error:
        return {"status": NOT_BUILT, "why": said(error)}
    return examined(model, about)


def examined(model: nn.Module, about: Task) -> dict[str, Any]:
    """Compares the engine with the reference on every batch of a task."""
    found: dict[str, Any] = {"status": RIGHT, "why": "", "unpadded": [], "parameters": 0}
    found["parameters"] = sum(p.numel() for p in model.parameters())
    shapes = about.shapes
    if about.windows and reference(model, about.batch(model, shapes[-1])).fills:
        shapes = about.windows
    for shape in shapes:
        try:
            batch, expected, hidden = chosen(model, about, shape)
        except Exception as error:
            return {**found, "status": NOT_BUILT, "why": f"{shape.name}: {said(error)}"}
        try:
            if not hidden:
                found["unpadded"].append(shape.name)
                refuse(model, about.batch(model, shape))
            result = compare(model, batch, expected)
        except CurvatureError as error:
            return {**found, "status": REFUSED, "why": f"{shape.name}: {error}"[:400]}
        except Exception as error:
            return {**found, "status": CRASHED, "why": f"{shape.name}: {said(error)}"}
        off = result.pop("off")
        if found.get("coverage", 1.0) >= result["coverage"]:
            found |= result
        if off:
            lines = "; ".join(off[:3]) + (f"; {len(off)} in all" if len(off) > 3 else "")
            return {**found, "status": WRONG, "why": f"{shape.name}: {lines}"}
    return found


def chosen(model: nn.Module, about: Task, shape: Shape) -> tuple[Batch, Any, bool]:
    """A batch with its reference: without padding, where the model lets that into its loss."""
    batch = about.batch(model, shape)
    expected = reference(model, batch)
    if not padding_counts(model, batch, expected):
        return batch, expected, True
    batch = about.batch(model, shape.full())
    expected = reference(model, batch)
    if padding_counts(model, batch, expected):
        raise ValueError("the loss of a batch is not the mean of those of its examples")
    return batch, expected, False


def refuse(model: nn.Module, batch: Batch) -> None:
    """Collects a batch whose padding reaches the loss: a line of error, or what autograd has."""
    kfac = KFACNaturalGradient(damping=DAMPING, track_diagonal=False)
    with suppress(CurvatureError):
        kfac.collect_kfac_factors(model, dict(batch.values), verify=True)


def said(error: Exception) -> str:
    """An exception as one line."""
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:300]
