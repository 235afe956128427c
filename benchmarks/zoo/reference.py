"""The reference: each example alone, without padding, and what torch's functions are given then.

It shares no code with the engine. A use of a parameter is recognised by its address in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from benchmarks.zoo.convolutions import NAMES, NORMS, given, normalised, patches
from benchmarks.zoo.inputs import Batch, takes
from benchmarks.zoo.made import Made

PRODUCTS = ("linear", "addmm", "matmul", "__matmul__", "mm")
SCALES = ("mul", "__mul__", "__rmul__")
COPIES = (
    *("to", "type_as", "double", "float", "contiguous", "clone"),
    *("add", "__add__", "__radd__", "__iadd__", "add_"),
)


@dataclass
class Used:
    """One use of a parameter as ``table``, ``matrix``, ``scale`` or ``shift``."""

    name: str
    kind: str
    a: Tensor
    keep: Tensor | None = None
    size: tuple[int, ...] = ()
    g: Tensor | None = None
    features: int = 1
    times: Tensor | None = None
    filled: Tensor | None = None

    def rows(self) -> tuple[Tensor, Tensor]:
        """What it read and the gradients of its results, a row a token; zero where none came."""
        g = self.a.new_zeros(self.size).double() if self.g is None else self.g
        a = self.a.reshape(-1) if self.kind == "table" else self.a.reshape(-1, self.a.shape[-1])
        g = g.flatten(-self.features)
        g = g.reshape(-1, g.shape[-1])
        g = g if self.times is None else g @ self.times
        keep = self.keep
        if self.filled is not None:
            keep = ~self.filled if keep is None else keep & ~self.filled
        return (a, g) if keep is None else (a[keep], g[keep])


class Recorder(TorchFunctionMode):
    """Records what ``linear``, ``matmul``, ``embedding``, norms and their like are given."""

    def __init__(self, model: nn.Module, fill: torch.Generator | None = None) -> None:
        super().__init__()
        self.fill = fill
        self.parameters = dict(model.named_parameters())
        self.starts = {p.data_ptr(): n for n, p in self.parameters.items()}
        self.stacks = {n: p for n, p in self.parameters.items() if p.dim() == 3}
        self.tables = {n: p for n, p in self.parameters.items() if p.dim() == 2 and "bias" in n}
        self.copies: dict[int, tuple[Tensor, str]] = {}
        self.seen: list[Used] = []
        self.made = Made(self.parameter)
        self.fills = self.rows_filled = False
        self.constant: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, x = getattr(func, "__name__", ""), args[0] if args else None
        if name == "multi_head_attention_forward":  # it would be one call, without what is in it
            plain = mock.patch.dict(func.__globals__, {"has_torch_function": lambda _: False})
            with plain, self:
                return func(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        if name == "pad" and isinstance(x, Tensor) and 1 < x.dim() < 6 and out.shape != x.shape:
            rows = x.is_floating_point() and out.shape[-1] == x.shape[-1]
            self.rows_filled = self.rows_filled or rows
            self.fills = self.fills or not x.is_floating_point() or rows
            if rows:
                out = self._other(out, func(torch.ones_like(x), *args[1:], **(kwargs or {})) == 0)
        untouched = name == "scatter_reduce" and not (kwargs or {}).get("include_self", True)
        if untouched and isinstance(x, Tensor):
            self.rows_filled = True
            out = self._other(out, _untouched(x, kwargs or {}))
        if isinstance(out, Tensor) and out.requires_grad:
            values = [t for t in (*args, *(kwargs or {}).values()) if isinstance(t, Tensor)]
            self._note(name, args, kwargs or {}, values, out)
        return out

    def _other(self, out: Tensor, places: Tensor) -> Tensor:
        """Puts other numbers where a model filled in some, in a pass that asks for it."""
        if self.fill is None:
            return out
        other = torch.randn(out.shape, generator=self.fill, dtype=out.dtype)
        return torch.where(places, other, out)

    def _note(self, name: str, args: Any, kwargs: Any, values: list[Tensor], out: Tensor) -> None:
        self.made.note(name, args, kwargs, out)
        if name in COPIES:
            found = [n for n in map(self.parameter, values) if n is not None]
            if len(found) == 1 and sum(t.dim() > 0 for t in values) == 1:
                self.copies[id(out)] = (out, found[0])
            self._shift(name, values, out)
        elif name == "__getitem__":
            self._looked_up(args, out)
        elif name == "einsum" and len(values) == 2:
            self._einsum(args[0], values, out)
        elif name == "embedding":
            self._embedding(args, kwargs, values, out)
        elif name in ("layer_norm", "rms_norm"):
            self._norm(name, args, kwargs, out)
        elif name in NORMS:
            self._channel_norm(name, given(NORMS[name], args, kwargs), out)
        elif name in ("conv1d", "conv2d", "conv3d"):
            self._convolution(given(NAMES, args, kwargs), out)
        elif name in SCALES and len(values) == 2:
            self._scale(values, out)
        elif name in PRODUCTS:
            x, weight = values[1:3] if name == "addmm" else values[:2]
            found = self.parameter(weight)
            bias = name == "addmm" or (name == "linear" and len(values) > 2)
            if self.parameter(x) is not None:
                return  # a matrix that is made of two
            if id(x) in self.constant or _is_unit(x):  # DoRA asks for its own matrix
                self.constant[id(out)] = out
            for factor, read, times in self.made.pairs(weight, x):
                self._keep(Used(factor, "matrix", read, times=times), out)
            if found is not None and weight.dim() == 2 and id(out) not in self.constant:
                self._keep(Used(found, "matrix", x.detach()), out)
                added = values[0] if name == "addmm" else values[-1]
                if bias and (alone := self.parameter(added)) is not None:
                    self._keep(Used(alone, "shift", x.detach()), out)
        if name in ("bmm", "matmul", "__matmul__") and values[1].dim() == 3 == values[0].dim():
            found = self.parameter(values[1])
            for part in range(len(values[1])) if found is not None else ():
                self._keep(Used(f"{found}[{part}]", "matrix", values[0].detach()[part]), out, part)

    def _shift(self, name: str, values: list[Tensor], out: Tensor) -> None:
        """A bias that is added by itself."""
        if "add" not in name or len(values) != 2:
            return
        for shift, x in (values, values[::-1]):
            found, axis = self.parameter(shift), _one_axis(shift)
            if found is not None and axis is not None and shift.dim() <= x.dim() > 1:
                if x.shape == out.shape and shift.numel() == out.shape[axis]:
                    self._keep(Used(found, "shift", x.detach().movedim(axis, -1)), out, axis=axis)
                return

    def _scale(self, values: list[Tensor], out: Tensor) -> None:
        """A scale over one dimension."""
        for scale, x in (values, values[::-1]):
            found, axis = self.parameter(scale), _one_axis(scale)
            if axis is None or x.shape != out.shape or not scale.dim() <= x.dim() > 1:
                continue
            if (made := self.made.scaled(scale, x)) is not None:
                self._keep(Used(made[0], "scale", made[1]), out)
                return
            if found is not None and scale.numel() == out.shape[axis]:
                self._keep(Used(found, "scale", x.detach().movedim(axis, -1)), out, axis=axis)
                return

    def _einsum(self, equation: str, values: list[Tensor], out: Tensor) -> None:
        """A product of features with a weight that keeps heads apart."""
        operands, _, result = equation.partition("->")
        read, own = operands.split(",")
        found, shared = self.parameter(values[1]), set(read) & set(own)
        if found is not None and not shared & set(result):
            x = values[0].detach().flatten(-len(shared))
            self._keep(Used(found, "matrix", x, features=len(own) - len(shared)), out)

    def _looked_up(self, args: Any, out: Tensor) -> None:
        """Rows of a table by their numbers."""
        table, index = args
        whole = isinstance(index, Tensor) and not index.is_floating_point()
        if whole and index.dtype != torch.bool and table.dim() == 2 and index.dim() > 0:
            found = self.parameter(table)
            if found is not None:
                self._keep(Used(found, "table", index), out)

    def _embedding(self, args: Any, kwargs: Any, values: list[Tensor], out: Tensor) -> None:
        ids = next(t for t in values if not t.is_floating_point())
        table = next(t for t in values if t.is_floating_point())
        padding = args[2] if len(args) > 2 else kwargs.get("padding_idx")
        found = self.parameter(table)
        if found is not None:
            keep = None if padding is None or padding < 0 else (ids != padding).reshape(-1)
            self._keep(Used(found, "table", ids, keep=keep), out)

    def _norm(self, name: str, args: Any, kwargs: Any, out: Tensor) -> None:
        names = ("input", "normalized_shape", "weight", "bias", "eps")
        names = names if name == "layer_norm" else (*names[:3], "eps")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        found = self.parameter(given.get("weight"))
        if found is not None and given["weight"].dim() == 1:
            eps = {"eps": given["eps"]} if given.get("eps") is not None else {}
            x = getattr(F, name)(given["input"].detach(), given["normalized_shape"], **eps)
            self._keep(Used(found, "scale", x), out)
        if (alone := self.parameter(given.get("bias"))) is not None:
            self._keep(Used(alone, "shift", given["input"].detach()), out)

    def _channel_norm(self, name: str, options: dict[str, Any], out: Tensor) -> None:
        found = self.parameter(options.get("weight"))
        if found is not None:
            x = normalised(name, options).movedim(1, -1)
            self._keep(Used(found, "scale", x), out, axis=1)

    def _convolution(self, options: dict[str, Any], out: Tensor) -> None:
        found, weight = self.parameter(options["weight"]), options["weight"]
        alone = self.parameter(options.get("bias"))
        if found is None and alone is not None:  # its weight is made of others
            stands, _ = patches({**options, "input": options["input"][:, :1]}, out.shape)
            keep = stands.expand(len(out), *out.shape[2:]).reshape(-1)
            read = out.detach().movedim(1, -1)
            self._keep(Used(alone, "shift", read, keep=keep), out, axis=1)
        if found is None or out.dim() != weight.dim():
            return
        stands, channels = patches(options, out.shape)
        keep = stands.expand(len(out), *out.shape[2:]).reshape(-1)
        groups, n = options.get("groups", 1), weight.shape[1]
        used = Used(found, "matrix", torch.zeros(()), keep)
        if groups > 1 and n == 1:
            each = torch.stack(channels, dim=-2)
            each = each.repeat_interleave(len(weight) // groups, dim=-2)
            self._keep(replace(used, kind="depthwise", a=each.flatten(-2)), out, axis=1)
            return
        rows = len(weight) // groups
        for group in range(groups):
            a = torch.cat(channels[group * n : (group + 1) * n], dim=-1)
            own = slice(group * rows, (group + 1) * rows)
            name = found if groups == 1 else f"{found}[{own.start}:{own.stop}]"
            self._keep(replace(used, name=name, a=a), out, axis=1, own=own)

    def parameter(self, tensor: Tensor | None) -> str | None:
        """The parameter, or the part of a stack, that starts where a tensor does."""
        if tensor is None:
            return None
        if id(tensor) in self.copies:
            return self.copies[id(tensor)][1]
        start = self.starts.get(tensor.data_ptr())
        start = None if start in self.stacks and tensor.dim() == 2 else start
        if start is not None and tensor.numel() == self.parameters[start].numel():
            return start
        for name, stack in self.stacks.items():
            size = stack[0].numel() * stack.element_size()
            part, rest = divmod(tensor.data_ptr() - stack.data_ptr(), size)
            fits = tensor.dim() == 2 and tensor.numel() == stack[0].numel()
            if fits and rest == 0 and 0 <= part < len(stack):
                return f"{name}[{part}]"
        for name, table in self.tables.items():
            size = table[0].numel() * table.element_size()
            row, rest = divmod(tensor.data_ptr() - table.data_ptr(), size)
            if tensor.shape == table.shape[1:] and rest == 0 and 0 <= row < len(table):
                return f"{name}[{row}]"
        return None

    def _keep(
        self,
        used: Used,
        out: Tensor,
        part: int | None = None,
        axis: int = -1,
        own: slice = slice(None),
    ) -> None:
        self.seen.append(used)
        used.size = out.shape if part is None else out.shape[1:]

        def note(grad: Tensor) -> None:
            grad = grad.detach().reshape(shape)
            grad = grad if part is None else grad[part]
            used.g = grad.movedim(axis, -1)[..., own]

        # A view that is written to later on has its gradient where the whole tensor has.
        shape, whole = out.shape, out if out._base is None else out._base
        viewed = whole.requires_grad and whole.is_contiguous()
        viewed = viewed and out.is_contiguous() and whole.numel() == out.numel()
        (whole if viewed else out).register_hook(note)


def _untouched(x: Tensor, options: Mapping[str, Any]) -> Tensor:
    """Where a scatter left a tensor as it was."""
    sent = torch.ones_like(options["src"])
    return torch.zeros_like(x).scatter(options["dim"], options["index"], sent) == 0


def _one_axis(x: Tensor) -> int | None:
    """The only dimension of a tensor that is longer than 1, counted from the end."""
    axes = [d - x.dim() for d, n in enumerate(x.shape) if n > 1]
    return axes[0] if len(axes) == 1 else None


def _is_unit(x: Tensor) -> bool:
    """Whether a product is with the unit matrix."""
    return x.dim() == 2 and torch.equal(x, torch.eye(*x.shape, dtype=x.dtype))


@dataclass
class Reference:
    """What the examples of a batch come to.

    Attributes:
        loss: sum over the labels that count.
        labels: how many count.
        gradient: of the mean loss, by parameter.
        tokens: name and kind of a parameter's use -> what it read and the gradients of its results.
        with_own: the same with the rows that are the model's own, equal for every example, where
            there are some: beside words they count (learned streams), by themselves they do not
            (positions).
        logits: of each example.
    """

    loss: float = 0.0
    labels: int = 0
    reached: int = 0
    fills: bool = False
    gradient: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[tuple[str, str], tuple[Tensor, Tensor]] = field(default_factory=dict)
    with_own: dict[tuple[str, str], tuple[Tensor, Tensor]] = field(default_factory=dict)
    logits: list[Tensor] = field(default_factory=list)


def run(model: nn.Module, values: Mapping[str, Tensor]) -> Any:
    """The model's outputs for a batch, with its own loss."""
    named = takes(model)
    given = {k: v for k, v in values.items() if k in named}
    return model(**given, **({"use_cache": False} if "use_cache" in named else {}))


def reference(model: nn.Module, batch: Batch) -> Reference:
    """The sums over the examples of a batch, each alone, whose losses are means over its labels."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = Reference(gradient={n: torch.zeros_like(p) for n, p in trained.items()})
    uses: dict[tuple[str, str], list[Used]] = {}
    reached: set[str] = set()
    passes: list[list[Used]] = []
    for values, count in batch.alone():
        with Recorder(model) as recorder:
            outputs = run(model, values)
            loss = outputs.loss * count
        found.logits.append(getattr(outputs, "logits", torch.zeros(())).detach())
        grads = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        found.loss += float(loss.detach())
        found.labels += count
        found.fills = found.fills or recorder.fills
        reached |= {n for n, g in zip(trained, grads, strict=True) if g is not None}
        for name, grad in zip(trained, grads, strict=True):
            found.gradient[name] += 0.0 if grad is None else grad
        passes.append(_without_filling(model, values, recorder))
    for used in (used for seen in passes for used in seen):
        uses.setdefault((used.name, used.kind), []).append(used)
    found.reached = sum(_reached(trained[n], n, uses) for n in reached)
    found.gradient = {n: g / found.labels for n, g in found.gradient.items()}
    for key, every in uses.items():
        used = _of_tokens(every, len(found.logits))
        if any(one.g is not None for one in used):
            found.tokens[key] = _joined(used)
        if len(every) > len(used) and any(one.g is not None for one in every):
            found.with_own[key] = _joined(every)
    return found


def _without_filling(
    model: nn.Module, values: Mapping[str, Tensor], recorder: Recorder
) -> list[Used]:
    """The uses of a pass without the rows that a model fills in and no gradient reaches.

    Such a row is zero still, or it is another when other numbers are filled in, here or in a use
    of rows that lie alike, example by example. There are such among more rows than the example has
    positions; what is filled in beside a position changes its row too, and experts give zeros.
    """
    if not recorder.rows_filled:
        return recorder.seen
    with Recorder(model, torch.Generator().manual_seed(5)) as second:
        run(model, values)
    alike = [(one.name, one.a.shape) for one in second.seen]
    alike = alike == [(one.name, one.a.shape) for one in recorder.seen]  # no other experts, say
    others = second.seen if alike else recorder.seen
    positions = max(
        x.shape[1] if x.is_floating_point() else x[0].numel()
        for x in values.values()
        if x.dim() > 1
    )
    reached: dict[int, Tensor] = {}
    filled: dict[tuple[int, ...], Tensor] = {}
    places: dict[int, tuple[int, ...]] = {}
    for i, (one, other) in enumerate(zip(recorder.seen, others, strict=True)):
        if one.kind in ("matrix", "scale"):
            (a, g), b = replace(one, keep=None).rows(), other.a.reshape(-1, other.a.shape[-1])
            made = torch.isclose(a, b, rtol=1e-9, atol=1e-12).all(1) & (a != 0).any(1)
            made = made | (len(a) <= positions)
            reached[i] = (g != 0).any(1)
            places[i] = one.a.shape[:-1] if one.a.dim() > 2 else (i,)
            empty = ~made & ~reached[i]
            filled[places[i]] = filled.get(places[i], empty) | empty
    return [
        replace(one, filled=filled[places[i]] & ~reached[i]) if i in reached else one
        for i, one in enumerate(recorder.seen)
    ]


def _reached(parameter: Tensor, name: str, uses: Mapping[tuple[str, str], list[Used]]) -> int:
    """How many numbers of a parameter the loss reaches: of a stack, those of matrices in use."""
    parts = {used: every for (used, _), every in uses.items() if used.startswith(f"{name}[")}
    if not parts or any(":" in used for used in parts):
        return parameter.numel()
    size = parameter[0].numel()
    return size * sum(
        any(one.g is not None and one.g.numel() > 0 for one in x) for x in parts.values()
    )


def _joined(used: list[Used]) -> tuple[Tensor, Tensor]:
    pairs = [one.rows() for one in used]
    return torch.cat([a for a, _ in pairs]), torch.cat([g for _, g in pairs])


def _of_tokens(used: list[Used], n: int) -> list[Used]:
    """The uses that do not read the same for every example, such as relative positions."""
    if n < 2 or len(used) % n or used[0].kind == "table":
        return used
    calls = [used[i :: len(used) // n] for i in range(len(used) // n)]
    return [
        one
        for call in calls
        if any(c.a.shape != call[0].a.shape or not torch.equal(c.a, call[0].a) for c in call[1:])
        for one in call
    ]


def padding_counts(model: nn.Module, batch: Batch, alone: Reference) -> bool:
    """Whether the model's loss or logits of a padded batch are others than its examples' alone."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    outputs = run(model, batch.values)
    loss = outputs.loss
    grads = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    if not abs(float(loss) - alone.loss / alone.labels) <= 1e-8 * abs(float(loss)):
        return True
    size = sum(float(g.square().sum()) for g in alone.gradient.values()) ** 0.5
    if any(
        float((alone.gradient[n] - (0.0 if g is None else g)).norm())
        > 1e-7 * float(alone.gradient[n].norm()) + 1e-9 * size
        for n, g in zip(trained, grads, strict=True)
    ):
        return True
    mask = batch.values.get(batch.masks.get("labels", ""))
    logits = getattr(outputs, "logits", None)
    if mask is None or logits is None or logits.shape[:2] != mask.shape:
        return False
    rows = [logits[real.bool()] for logits, real in zip(outputs.logits, mask, strict=True)]
    return any(
        not torch.allclose(one, other[0], rtol=1e-6, atol=1e-8)
        for one, other in zip(rows, alone.logits, strict=True)
    )
