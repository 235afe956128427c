"""What a model is given: which of its inputs are tokens, on which side, and under which mask."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fisher_lab.curvature.kfac.token_ids import Fixed
from fisher_lab.curvature.kfac.token_rows import TokenRows


class GivenInputs:
    """The inputs of a forward pass, whose positions get ids.

    Args:
        rows: takes the ids.

    Attributes:
        inputs: side of the model, shape and first id of the tokens that it was given.
        masks: masks of the inputs beside a text (pictures, sounds), as bool, by the input's name.
            ``made``: that of a decoder's inputs which the model makes of its own.
        hidden: whether a mask hides rows of an input, and it cannot be told which.
    """

    def __init__(self, rows: TokenRows) -> None:
        self._rows = rows
        self.inputs: list[tuple[str, torch.Size, int]] = []
        self.masks: dict[str, Tensor] = {}
        self.hidden = False
        self._tensors: list[Tensor] = []
        self._mask: Any = None

    def take(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Gives ids to what the model is called with."""
        names = [n for n in inspect.signature(module.forward).parameters if n not in kwargs]
        named = dict([*zip(names, args, strict=False), *kwargs.items()])
        text = any(named.get(name) is not None for name in ("input_ids", "inputs_embeds"))
        self._mask = named.get("attention_mask")
        self._tensors = [value for value in named.values() if isinstance(value, Tensor)]
        for name, value in named.items():
            side, mask = "decoder" if name.startswith("decoder_") else "main", None
            if side == "main":
                signal = isinstance(value, Tensor) and value.is_floating_point()
                beside = text and signal and not name.endswith("embeds")
                side = name if beside else side  # pictures or sounds beside a text
                mask = mask_of(name, named) if beside else self._mask
            self._take_input(side, name, value, mask)

    def take_decoder(self, _module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Gives ids to a decoder's inputs that the model makes, of labels or of its own inputs."""
        if any(side == "decoder" for side, _, _ in self.inputs):
            return
        for name, value in [("input_ids", args[0] if args else None), *kwargs.items()]:
            given = any(value is one for one in self._tensors)  # what is run is the encoder
            if name not in ("input_ids", "inputs_embeds", "input_values") or given:
                continue
            mask, origin = self._mask, self._rows.of(value)
            made = not isinstance(origin, Fixed) and isinstance(mask, Tensor)
            if made and mask.shape == value.shape[:2]:  # of tokens that this mask is for
                self.masks["made"] = mask != 0
            self._take_input("made" if made else "decoder", name, value, None)

    def _take_input(self, side: str, name: str, given: Any, mask: Any) -> None:
        """Gives ids to the tokens of an input; masks, positions and single numbers are no data."""
        for value in _tensors_of(given):
            about = "mask" in name or "position" in name or name == "labels"
            if about or value.dim() == 0:
                self._rows.mark(value, Fixed.CONSTANT)
                continue
            shape = _positions(value, mask)
            if self._hides(side, value, shape, mask):
                self.hidden = True  # which of its rows the mask hides cannot be told
                self._rows.mark(value, Fixed.UNKNOWN)
                continue
            ids = self._ids(side, shape, value.device)
            self._rows.mark(value, (ids.reshape(*shape, *[1] * (value.dim() - len(shape))),))

    def _hides(self, side: str, value: Tensor, shape: torch.Size, mask: Any) -> bool:
        """Whether a mask hides positions, and it cannot be told which; else it is kept."""
        if not isinstance(mask, Tensor) or mask.dim() < 2 or bool(mask.all()):
            return False
        signal = side != "main" or value.is_floating_point()
        if signal and mask.shape != shape:
            return True
        if side != "main":
            self.masks[side] = mask != 0
        return False

    def _ids(self, side: str, shape: torch.Size, device: torch.device) -> Tensor:
        """The ids of a side's positions, the same for all its inputs of a shape."""
        first = next((i for s, n, i in self.inputs if (s, n) == (side, shape)), None)
        if first is None:
            first = self._rows.count + 1
            self.inputs.append((side, shape, first))
            self._rows.new_tokens(shape, device)
            self._rows.homes.append((first, shape))
        return torch.arange(first, first + shape.numel(), device=device).reshape(shape)


def _tensors_of(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors_of(one)


def _positions(value: Tensor, mask: Any) -> torch.Size:
    """The shape of an input's positions: its first two dimensions, but for that of features.

    Where an example has several texts, as their mask says, it is the mask's.
    """
    if isinstance(mask, Tensor) and mask.dim() > 2 and mask.shape == value.shape[: mask.dim()]:
        return mask.shape
    series = isinstance(mask, Tensor) and mask.shape == value.shape  # a value a position
    features = int(value.is_floating_point() and value.dim() > 1 and not series)
    return value.shape[: value.dim() - features][:2]


def mask_of(name: str, named: Mapping[str, Any]) -> Any:
    """Returns the mask of an input beside a text: of ``pixel_values``, ``pixel_attention_mask``.

    Args:
        name: of the input.
        named: all inputs.
    """
    words = {word.removesuffix("s") for word in name.split("_")} - {"input", "value"}
    masks = (other for other in named if other.endswith("mask"))
    return next(
        (named[m] for m in masks if words & {w.removesuffix("s") for w in m.split("_")}), None
    )
