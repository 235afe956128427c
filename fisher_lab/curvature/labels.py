"""Which labels of a batch count, where a model predicts them, and how it is called with them.

What this module fixes (``docs/math.md``, section 1):

- labels at masked positions become ``IGNORE_INDEX`` on a *copy* of the batch; in a causal model
  also where the predicting position is padding (Hugging Face's own loss ignores the mask);
- how a model aligns labels with logits is measured against its own loss where its class leaves it
  open.

Shapes: ``B`` sequences of ``S`` positions, ``C`` classes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fisher_lab.curvature.errors import BatchError, LossError
from fisher_lab.curvature.wrappers import class_name, device_of, is_sharded, unwrap

IGNORE_INDEX = -100
"""Labels with this value do not count (the value that Hugging Face uses)."""


_ALIGNED_LOSS_TYPES = frozenset({"ForMaskedLM", "ForTokenClassification"})


def logits_of(outputs: Any) -> Tensor:
    """Returns the logits in a model's output.

    Raises:
        LossError: the output is neither a tensor nor an object or mapping with ``logits``.
    """
    if isinstance(outputs, Tensor):
        return outputs
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
    logits = getattr(outputs, "logits", None) if logits is None else logits
    if not isinstance(logits, Tensor):
        raise LossError(
            f"model output: no logits in a {type(outputs).__name__}; "
            "give loss=<function of (outputs, batch)>"
        )
    return logits


def labels_of(batch: Any) -> Tensor | None:
    """Returns the labels of a batch: its ``labels`` entry, or the second of a pair."""
    if isinstance(batch, Mapping):
        return batch.get("labels")
    if isinstance(batch, Sequence) and len(batch) == 2 and isinstance(batch[1], Tensor):
        return batch[1]
    return None


def is_empty(batch: Any) -> bool:
    """Says whether a batch has labels, but of no example: many models cannot run on that."""
    labels = labels_of(batch)
    return labels is not None and labels.numel() == 0


def count_labels(batch: Any, *, shift: bool = False) -> int | None:
    """Returns how many labels of a batch count, or None where it has none to look at."""
    labels = labels_of(batch)
    if labels is None or labels.is_floating_point():
        return None if labels is None else labels.shape[0]
    if shift and labels.dim() == 2:
        labels = labels[:, 1:]
    return int((labels != IGNORE_INDEX).sum())


def map_tensors(function: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """Returns the batch with a function of its tensors; containers are copied, never changed."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {key: map_tensors(function, value) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(map_tensors(function, value) for value in batch)
    return batch


def forward(model: nn.Module, batch: Any, *, with_labels: bool = False) -> Any:
    """Calls the model on a prepared batch, with its ``labels`` where its own loss is wanted.

    The batch is a tensor, a sequence of positional arguments, or a mapping. Of a mapping, the
    entries that ``forward`` names are passed by keyword; where it names none, the first tensor is
    passed by position (a bare ``nn.Linear``).
    """
    if isinstance(batch, Tensor):
        return model(batch)
    if not isinstance(batch, Mapping):
        return model(batch[0]) if labels_of(batch) is not None else model(*batch)
    inputs = {k: v for k, v in batch.items() if with_labels or k != "labels"}
    parameters = inspect.signature(unwrap(model).forward).parameters
    every = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    accepted = {k: v for k, v in inputs.items() if every or k in parameters}
    if not accepted:
        tensors = [v for v in inputs.values() if isinstance(v, Tensor)]
        if not tensors:
            raise BatchError(f"batch: no tensor in it; keys {sorted(map(str, batch))}")
        return model(tensors[0])
    if "use_cache" in parameters and "use_cache" not in accepted:
        accepted["use_cache"] = False
    return model(**accepted)


_MEASURED: WeakKeyDictionary[nn.Module, bool | None] = WeakKeyDictionary()
"""How models align labels with logits, where their own loss has shown it."""


def shift_of(model: nn.Module) -> bool | None:
    """Says how a model aligns labels with logits: as measured, else as Hugging Face's class says.

    True for a causal shift, False for labels at the predicting position itself, None where it is
    not known (then the model's own ``outputs.loss`` has to be used).
    """
    model = unwrap(model)
    return _MEASURED[model] if model in _MEASURED else _declared_shift(model)


def measure_shift(model: nn.Module, batch: Mapping[str, Any]) -> None:
    """Measures, once for a model whose class leaves it open, whether its loss shifts the labels.

    The model's loss of the batch is compared with the mean cross-entropy of its logits, with the
    labels shifted and in place. Where both come out alike, or the output has no loss or no logits,
    nothing is concluded. The pass has no dropout and draws nothing; modes are put back.

    Args:
        model: any module; a sharded one is left alone, since its passes are for all ranks.
        batch: with the caller's own labels, on the model's device.
    """
    inner, labels = unwrap(model), labels_of(batch)
    if inner in _MEASURED or labels is None or labels.numel() == 0 or _is_certain(inner):
        return
    if labels.dim() > 2 or labels.is_floating_point() or any(map(is_sharded, inner.modules())):
        return
    modes = [(module, module.training) for module in inner.modules()]
    inner.eval()
    try:
        with torch.no_grad():
            outputs = forward(inner, batch, with_labels=True)
    finally:
        for module, training in modes:
            module.training = training
    loss = getattr(outputs, "loss", None)
    try:
        found = {s: _mean_loss(logits_of(outputs), labels, s) for s in (False, True)}
    except (LossError, BatchError, IndexError, RuntimeError):
        return
    if not isinstance(loss, Tensor) or loss.dim() > 0:
        return
    close = [s for s, value in found.items() if abs(value - float(loss)) <= 1e-4 * abs(value)]
    if len(close) == 1:
        _MEASURED[inner] = close[0]
    elif not close and bool((labels != IGNORE_INDEX).any()):
        _MEASURED[inner] = None


def _is_certain(model: nn.Module) -> bool:
    """Whether what the class declares is what it does, or there is no loss of its own to ask.

    Labels in place are declared by classes that have them so. Whoever declares a shift and hands
    its labels to ``loss_function``, which shifts them, is believed; others compute their own loss.
    """
    base = model.get_base_model() if _has_base(model) else model  # type: ignore[operator]
    declared = _declared_shift(model)
    if "labels" not in inspect.signature(base.forward).parameters or declared is False:
        return True
    try:
        source = inspect.getsource(type(base).forward)
    except (OSError, TypeError):
        return False
    return declared is True and ".loss_function(" in source


def _mean_loss(logits: Tensor, labels: Tensor, shift: bool) -> float:
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    keep = labels != IGNORE_INDEX
    return float(
        F.cross_entropy(logits[keep].float(), labels[keep], reduction="none").double().mean()
    )


def _has_base(model: nn.Module) -> bool:
    """Whether a model hands its arguments on to one inside (PEFT)."""
    return hasattr(model, "get_base_model")


def _declared_shift(model: nn.Module) -> bool | None:
    if _has_base(model):
        model = model.get_base_model()  # type: ignore[operator]
    config = getattr(model, "config", None)
    if config is None or not hasattr(type(model), "loss_function"):
        return None
    name, kind = class_name(model), getattr(model, "loss_type", None)
    if kind in _ALIGNED_LOSS_TYPES:
        return False
    if kind == "ForConditionalGeneration":
        return False if getattr(config, "is_encoder_decoder", False) else None
    if kind == "ForSequenceClassification":
        single = getattr(config, "problem_type", None) in (None, "single_label_classification")
        return False if single and getattr(config, "num_labels", 0) > 1 else None
    # GPT2LMHeadModel, BertLMHeadModel and their like have no loss_type and shift; XLNet does not.
    if kind == "ForCausalLM" or (kind is None and name.endswith("LMHeadModel")):
        return None if name.startswith("XL") else True
    return None


def masked_labels(batch: Mapping[str, Any], *, shift: bool, encoder_decoder: bool) -> Tensor | None:
    """Returns a copy of the labels with -100 wherever padding predicts or is predicted.

    With a causal ``shift``, labels whose predicting position is padding go as well; in an
    encoder-decoder model labels and mask are the decoder's.
    """
    labels = batch.get("labels")
    mask = batch.get("decoder_attention_mask" if encoder_decoder else "attention_mask")
    if labels is None or mask is None or labels.dim() != 2 or mask.shape != labels.shape:
        return labels
    active = mask.to(labels.device) != 0
    if shift:
        predicting = torch.ones_like(active)
        predicting[:, 1:] = active[:, :-1]
        active = active & predicting
    return labels.masked_fill(~active, IGNORE_INDEX)


def prepare(model: nn.Module, batch: Any, *, measure: bool = True) -> Any:
    """Returns a copy of the batch, on the model's device, with the labels masked.

    An encoder-decoder model's decoder inputs are made from the caller's labels first, as the model
    itself would, so that masking the labels does not change what the decoder sees.
    """
    device = device_of(model)
    batch = map_tensors(lambda x: x.to(device), batch)
    if not isinstance(batch, dict) or batch.get("labels") is None:
        return batch
    inner = unwrap(model)
    encoder_decoder = bool(getattr(getattr(inner, "config", None), "is_encoder_decoder", False))
    given = "decoder_input_ids" in batch or "decoder_inputs_embeds" in batch
    shift_right = getattr(inner, "prepare_decoder_input_ids_from_labels", None)
    if encoder_decoder and not given and shift_right is not None:
        batch["decoder_input_ids"] = shift_right(labels=batch["labels"])
    if measure:
        measure_shift(model, batch)
    batch["labels"] = masked_labels(
        batch, shift=bool(shift_of(model)), encoder_decoder=encoder_decoder
    )
    return batch
