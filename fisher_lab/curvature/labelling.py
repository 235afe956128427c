"""How a model's own loss treats the labels of a batch: as its class says, or as was measured.

Which position predicts a label (the one before it, or its own), whether the loss is the
cross-entropy of the logits, and what its mean is taken over (``docs/math.md``, section 1).
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from textwrap import dedent
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from fisher_lab.curvature.labels import TOKEN_MASKS, labels_of
from fisher_lab.curvature.wrappers import unwrap

_IN_PLACE = frozenset({"ForMaskedLM", "ForTokenClassification"})


_CLASSIFIES = frozenset(
    f"For{what}Classification" for what in ("Sequence", "Image", "Video", "Audio")
)


_SHIFTED = frozenset({"ForCausalLM", "ForConditionalGeneration"})


_HANDED_ON = re.compile(r"\.loss_function\(")
_BY_HAND = re.compile(r"CrossEntropyLoss\((ignore_index=-100)?\).*labels\.view\(-1\)", re.DOTALL)
_MORE_THAN_ONE = re.compile(
    r"""shift(?!_tokens_right|_right) | ,[ ]:-1 | ,[ ]1: | logits\[
    | CrossEntropyLoss\(.*CrossEntropyLoss\(
    | loss\w*\s*(\+= | =\s*\w*loss\w*\s*[+*/])""",
    re.DOTALL | re.VERBOSE,
)
"""In the source of a forward pass: its loss may be more, less or other than one cross-entropy."""

_MADE = {"decoder_input_ids", *TOKEN_MASKS.values()}
"""Entries of a batch that are made where they are not given."""


@dataclass(frozen=True)
class Labelling:
    """How a model's own loss treats the labels of a kind of batch.

    Attributes:
        shift: whether position ``t`` predicts the label at ``t + 1``; None: not known.
        scored: whether the loss is the cross-entropy of the logits, and is computed from them.
        count: what a loss that is the model's own is a mean over: ``labels``, ``rows`` of
            real-valued ones (``[..., C]``, each a distribution), or ``examples``; None: not known.
        summed: whether the model's own loss is a sum over ``count``, and no mean.
        besides: what the model adds to the cross-entropy, and what is left out here.
    """

    shift: bool | None = None
    scored: bool = False
    count: str | None = None
    summed: bool = False
    besides: str = ""

    def __str__(self) -> str:
        words = {None: [], False: ["in place"], True: ["shifted"]}[self.shift]
        words += {"examples": ["one an example"], "rows": ["one a row"]}.get(self.count or "", [])
        words += [] if self.scored else ["by the model's own loss"]
        return ", ".join(words) + (f" ({self.besides} is left out)" if self.besides else "")


UNKNOWN = Labelling()
"""The model's own loss, with a count that has to be given."""


MEASURED: WeakKeyDictionary[nn.Module, dict[Any, Labelling]] = WeakKeyDictionary()
"""Model -> kind of batch -> what was found."""


def labelling_of(model: nn.Module, batch: Any = None) -> Labelling:
    """Returns how a model's own loss treats labels: as measured, else as its class says.

    Args:
        model: any module.
        batch: of the kind in question; None for those that have been prepared.
    """
    inner = unwrap(model)
    found = MEASURED.get(inner, {})
    if batch is None and found:
        scored = {one for one in found.values() if one.scored}
        return scored.pop() if len(scored) == 1 else UNKNOWN
    if batch is not None and kind_of(batch) in found:
        return found[kind_of(batch)]
    return certain_of(inner, batch) or declared_of(inner)


def shift_of(model: nn.Module, batch: Any = None) -> bool | None:
    """Says how a model aligns labels with logits: as measured, else as its class says.

    True for a causal shift, False for labels at the predicting position itself, None where it is
    not known (then the model's own ``outputs.loss`` has to be used).

    Args:
        model: any module.
        batch: of the kind in question; None for those that have been prepared.
    """
    found = labelling_of(model, batch)
    return found.shift if found.scored else None


def has_decoder(model: nn.Module) -> bool:
    """Says whether labels and their mask are those of a decoder with inputs of its own."""
    inner = hf_model(model)
    names = inspect.signature(inner.forward).parameters
    flag = getattr(getattr(inner, "config", None), "is_encoder_decoder", False)
    return bool(flag) and "decoder_input_ids" in names


def hf_model(model: nn.Module) -> nn.Module:
    """The outermost model of Hugging Face's that a wrapper holds, or the model."""
    inner = unwrap(model)
    return next((m for m in inner.modules() if hasattr(type(m), "loss_function")), inner)


def kind_of(batch: Any) -> Any:
    """What batches have in common whose labels a model treats in one way."""
    labels = labels_of(batch)
    about = None if labels is None else (labels.dim(), labels.is_floating_point())
    names = set(map(str, batch)) if isinstance(batch, Mapping) else set()
    return about, tuple(sorted(names - _MADE))


@lru_cache(maxsize=64)
def source_of(forward_pass: Any) -> str:
    """Returns the statements of a forward pass, without its docstring and comments."""
    try:
        tree = ast.parse(dedent(inspect.getsource(forward_pass))).body[0]
    except (OSError, TypeError, SyntaxError):
        return ""
    if not isinstance(tree, ast.FunctionDef):
        return ""
    return "\n".join(map(ast.unparse, tree.body[bool(ast.get_docstring(tree)) :]))


def certain_of(model: nn.Module, batch: Any) -> Labelling | None:
    """What the forward pass of a class of Hugging Face's says of its loss, None where it is open.

    Certain is one whose labels go, as they are, to ``loss_function`` or with the logits as they are
    to a cross-entropy.

    Args:
        model: without its wrappers.
        batch: with labels or without.
    """
    labels, kind = labels_of(batch), getattr(model, "loss_type", None)
    source = source_of(type(model).forward) if hasattr(type(model), "loss_function") else ""
    if _MORE_THAN_ONE.search(source) or {"forward", "_loss_function"} & vars(model).keys():
        return None
    if labels is not None and labels.dim() > 1 and not _one_a_position(batch, labels):
        return None
    handed_on = bool(_HANDED_ON.search(source))
    if not handed_on and not _BY_HAND.search(source):
        return None
    if kind in _CLASSIFIES:
        return _classification(model, labels)
    if kind in _IN_PLACE or not handed_on:
        return Labelling(False, True)
    # Without a type, as GPT-2's, ``loss_function`` is that of causal models.
    return Labelling(True, True) if kind in _SHIFTED or kind is None else None


def _one_a_position(batch: Any, labels: Tensor) -> bool:
    """Whether a batch holds ids like the labels, and nothing that could add positions to them."""
    if not isinstance(batch, Mapping):
        return True  # the model gets what comes first, and is not given labels
    ids = [batch.get(k) for k in ("input_ids", "decoder_input_ids")]
    fits = any(isinstance(x, Tensor) and x.shape == labels.shape for x in ids)
    others = [x for x in batch.values() if isinstance(x, Tensor) and x.is_floating_point()]
    return fits and not any(x.dim() > 2 for x in others)


def _classification(model: nn.Module, labels: Tensor | None) -> Labelling:
    config = getattr(model, "config", None)
    several = getattr(config, "num_labels", 0) > 1
    whole = labels is None or not labels.is_floating_point()
    single = getattr(config, "problem_type", None) in (None, "single_label_classification")
    return Labelling(False, True) if single and several and whole else Labelling(count="labels")


def declared_of(model: nn.Module) -> Labelling:
    """What is taken where nothing could be measured: the type of a loss, else nothing."""
    base = unwrap(model)  # what a wrapper does with the loss of the model inside is not known
    config, kind = getattr(base, "config", None), getattr(base, "loss_type", None)
    if config is None or not hasattr(type(base), "loss_function"):
        return UNKNOWN
    shifts = ".loss_function(" in source_of(type(base).forward)
    if kind in _IN_PLACE:
        return Labelling(False, True)
    if kind == "ForConditionalGeneration" and getattr(config, "is_encoder_decoder", False):
        return Labelling(False, True)
    if kind in _CLASSIFIES:
        return _classification(base, None)
    if kind == "ForCausalLM" or (kind is None and shifts):
        return Labelling(True, True) if shifts else UNKNOWN
    return UNKNOWN


def is_certain(model: nn.Module, batch: Any) -> bool:
    """Says whether a model's class says how its loss treats the labels of such a batch."""
    return certain_of(unwrap(model), batch) is not None
