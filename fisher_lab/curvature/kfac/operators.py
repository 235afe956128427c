"""The linear operators of a forward pass that use a parameter of the model.

A layer is a use of a parameter by a linear operator: ``F.linear(x, W, b)``, ``x @ W``, a look-up in
``W``, a product with a scale. Nothing is asked of the module's class: what the operator reads is
``a`` and what it gives is ``s``, whatever a module does before and after it.

An operator is seen by :class:`torch.overrides.TorchFunctionMode`, which hands over every function
of torch that the forward pass calls.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from fisher_lab.curvature.kfac.layers import Kind, groups_of
from fisher_lab.curvature.kfac.layouts import Channels, Patches, RowLayout, window_of
from fisher_lab.curvature.kfac.token_ids import Fixed, tensors_in, words
from fisher_lab.curvature.kfac.token_rows import TokenRows

_TRANSPOSES = words("t T mT transpose adjoint swapaxes permute")
_CASTS = words("to float double half bfloat16 type type_as contiguous clone")
_SHIFTS = words("add __add__ __radd__ sub __sub__")
_SUMS = words("add __add__ __radd__ __iadd__ add_")
_INTEGERS = (torch.int64, torch.int32)
_SCALES = words("mul __mul__ __rmul__ multiply")


@dataclass(frozen=True)
class Use:
    """One use of a parameter by a linear operator.

    Attributes:
        kind: of the layer that it makes: ``Linear`` for ``W`` as ``[out, in]``, ``Conv1D`` for
            ``[in, out]``, ``Embedding`` for a look-up, ``Norm`` for a scale, ``Bias`` for a shift,
            ``Conv`` and ``Depthwise`` for a convolution.
        weight: the parameter's identity.
        part: which matrix of a stack it is, or which rows of the weight (and of the bias) are a
            group's; None for all of the parameter.
        bias: the identity of the bias that the same operator adds; None without one.
        a: what the operator reads (the indices of a look-up).
        rows: which of the operator's rows (in the first dimension) are this part's; None for all.
        normalise: makes the scaled values of ``a``, where the operator normalises too.
        padding: the index whose row a look-up does not train.
        layout: how the rows lie, where features are not the last dimension.
        features: how many last dimensions of what the operator gives are features.
    """

    kind: Kind
    weight: int
    bias: int | None
    a: Tensor
    part: int | tuple[int, int] | None = None
    rows: int | slice | None = None
    normalise: Callable[[Tensor], Tensor] | None = None
    padding: int | None = None
    layout: RowLayout | None = None
    features: int = 1


class OperatorWatch(TorchFunctionMode):
    """Watches the functions of torch while it is entered.

    Args:
        model: whose parameters count.
        rows: follows the tokens through the same functions.
        found: called with every use and the operator's output.

    Attributes:
        unexplained: identity of a parameter -> name of a function that uses it, and that is none of
            the operators.
    """

    def __init__(
        self, model: nn.Module, rows: TokenRows, found: Callable[[Use, Tensor], None]
    ) -> None:
        super().__init__()
        self._rows, self._found = rows, found
        self._identity = {id(p): id(p) for p in model.parameters()}
        self._derived = WeakTensorKeyDictionary()
        self.unexplained: dict[int, str] = {}

    def stands_for(self, tensor: Tensor, parameter: Tensor) -> None:
        """Says that a tensor is in the place of a (sharded) parameter."""
        self._identity[id(tensor)] = id(parameter)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        _types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = _name_of(func)
        if name == "multi_head_attention_forward":
            with self:
                return opened(func)(*args, **kwargs)
        out = func(*args, **kwargs)
        if name == "__setitem__" or isinstance(out, Tensor | list | tuple):
            self._rows.follow(name, func, args, kwargs, out)
            if isinstance(out, Tensor):
                self._look(name, args, kwargs, out)
        return out

    def parameter(self, tensor: Any) -> _Parameter | None:
        """Returns the parameter that a tensor is, as it is stored or transposed."""
        if not isinstance(tensor, Tensor):
            return None
        identity = self._identity.get(id(tensor))
        return self._derived.get(tensor) if identity is None else _Parameter(identity, False)

    def joined(self, x: Tensor, n: int) -> Tensor:
        """Returns a tensor with its last ``n`` dimensions, which are features, as one."""
        joined, origin = x.flatten(-n), self._rows.of(x)
        if not isinstance(origin, Fixed):
            kept = [ids for ids in origin if all(size == 1 for size in ids.shape[-n:])]
            origin = tuple(ids.flatten(-n) for ids in kept) or Fixed.UNKNOWN
        self._rows.mark(joined, origin)
        return joined

    def _look(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor) -> None:
        given = tensors_in([args, kwargs.values()])  # those in lists too: cat, stack, einsum
        ours = [p for p in map(self.parameter, given) if p is not None]
        if not ours or self._derive(name, args, out):
            return
        if torch.is_grad_enabled() and not out.requires_grad:
            return  # read, but not trained
        reader = _READERS.get(name)
        uses = [] if reader is None else reader(self, args, kwargs, out)
        explained = {identity for use in uses for identity in (use.weight, use.bias)}
        for parameter in ours:
            if parameter.identity not in explained:
                self.unexplained.setdefault(parameter.identity, name)
        for use in uses:
            self._found(use, out)

    def _derive(self, name: str, args: Sequence[Any], out: Tensor) -> bool:
        """Notes what is a parameter still: transposed, in another dtype, or with a number added."""
        source = self.parameter(args[0]) if args else None
        if name in _TRANSPOSES and source is not None and 2 <= out.dim() == args[0].dim() <= 3:
            if out.stride() not in (args[0].stride(), args[0].mT.stride()):
                return False
            turned = out.shape != args[0].shape or out.stride() != args[0].stride()
            self._derived[out] = replace(source, transposed=source.transposed != turned)
            return True
        if name in _CASTS and source is not None:
            if out is not args[0]:
                self._derived[out] = source
            return True
        if name == "__getitem__" and source is not None and _has_parts(source, args[0], out):
            number = args[1]
            if isinstance(number, int) or (isinstance(number, Tensor) and number.dim() == 0):
                part = int(number) % len(args[0])
                self._derived[out] = replace(source, part=part)
                return True
        if name in _SHIFTS and len(args) == 2:
            numbers = [a for a in args if self.parameter(a) is None]
            if len(numbers) == 1 and not (isinstance(numbers[0], Tensor) and numbers[0].dim() > 0):
                parameter = next(p for p in map(self.parameter, args) if p is not None)
                negative = name.endswith("sub__") and source is None
                if not negative:
                    self._derived[out] = parameter
                    return True
        return False


@dataclass(frozen=True)
class _Parameter:
    """A parameter that a tensor is, and whether as its transpose."""

    identity: int
    transposed: bool
    part: int | None = None


def _has_parts(source: _Parameter, tensor: Tensor, out: Tensor) -> bool:
    """Whether one of a tensor's first dimension is a part of the parameter: matrix, or row."""
    whole = source.part is None and (tensor.dim() == 3 or not source.transposed)
    return whole and tensor.dim() == out.dim() + 1 > 1


Reader = Callable[[OperatorWatch, Sequence[Any], Mapping[str, Any], Tensor], list[Use]]


def _argument(args: Sequence[Any], kwargs: Mapping[str, Any], index: int, name: str) -> Any:
    return args[index] if len(args) > index else kwargs.get(name)


def _linear(
    watch: OperatorWatch, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor
) -> list[Use]:
    """``F.linear(a, W, b)``."""
    a, weight = _argument(args, kwargs, 0, "input"), _argument(args, kwargs, 1, "weight")
    return _product(watch, a, weight, True, _argument(args, kwargs, 2, "bias"))


def _addmm(
    watch: OperatorWatch, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor
) -> list[Use]:
    """``torch.addmm(b, a, W)``."""
    if len(args) < 3 or any(kwargs.get(k, 1) != 1 for k in ("alpha", "beta")):
        return []
    return _product(watch, args[1], args[2], False, args[0])


def _matmul(
    watch: OperatorWatch, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor
) -> list[Use]:
    """``a @ W``."""
    if len(args) == 2 and isinstance(args[1], Tensor) and args[1].dim() == 3 == args[0].dim():
        return _stack(watch, args[0], args[1], range(len(args[1])))
    return _product(watch, args[0], args[1], False, None) if len(args) == 2 else []


def _product(watch: OperatorWatch, a: Tensor, weight: Any, turned: bool, bias: Any) -> list[Use]:
    """A product with ``W`` (``turned``: with its transpose), and the bias added to it."""
    matrix, added = watch.parameter(weight), watch.parameter(bias)
    if matrix is None or weight.dim() != 2 or watch.parameter(a) is not None or a.dim() < 2:
        return []
    if isinstance(bias, Tensor) and bias.dim() != 1:
        return []
    kind = Kind.LINEAR if turned != matrix.transposed else Kind.CONV1D
    use = Use(kind, matrix.identity, None, a, matrix.part)
    if added is None:
        return [use]
    with_bias = replace(use, bias=added.identity)
    # A row of a table of biases is a layer by itself.
    whole = added.part is None
    return [with_bias] if whole else [use, bias_alone(with_bias, len(bias), added.part)]


def _grouped(
    watch: OperatorWatch, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor
) -> list[Use]:
    """``grouped_mm(a, W, offs)``: rows up to ``offs[e]`` are expert ``e``'s."""
    offsets = _argument(args, kwargs, 2, "offs")
    if offsets is None or args[0].dim() != 2 or args[1].dim() != 3:
        return []
    ends = offsets.tolist()
    rows = [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    return _stack(watch, args[0], args[1], rows)


def _stack(
    watch: OperatorWatch, a: Tensor, weights: Tensor, rows: Iterable[int | slice]
) -> list[Use]:
    """Products with the matrices of a stack, each with its own rows of ``a``."""
    stack = watch.parameter(weights)
    if stack is None or stack.part is not None or watch.parameter(a) is not None:
        return []
    kind = Kind.LINEAR if stack.transposed else Kind.CONV1D
    return [
        Use(kind, stack.identity, None, a, part, own)
        for part, own in enumerate(rows)
        if not isinstance(own, slice) or own.stop > own.start
    ]


def _embedding(
    watch: OperatorWatch, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor
) -> list[Use]:
    """``F.embedding(indices, W)``; ``torch.embedding`` has them the other way round."""
    given = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    table = next((t for t in given if watch.parameter(t) is not None), None)
    indices = next((t for t in given if not t.is_floating_point()), None)
    matrix = watch.parameter(table)
    if matrix is None or indices is None or matrix.transposed or table.dim() != 2:  # type: ignore[union-attr]
        return []
    padding = _argument(args, kwargs, 2, "padding_idx")
    padding = None if padding is None or padding == -1 else padding % len(table)  # type: ignore[arg-type]
    return [Use(Kind.EMBEDDING, matrix.identity, None, indices, padding=padding)]


def _layer_norm(
    watch: OperatorWatch, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor
) -> list[Use]:
    """``F.layer_norm(x, shape, w, b, eps)``."""
    shape, eps = _argument(args, kwargs, 1, "normalized_shape"), _argument(args, kwargs, 4, "eps")
    eps = 1e-5 if eps is None else eps
    return _norm(watch, args, kwargs, lambda x: F.layer_norm(x, shape, eps=eps))


def _rms_norm(
    watch: OperatorWatch, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor
) -> list[Use]:
    """``F.rms_norm(x, shape, w, eps)``."""
    shape, eps = _argument(args, kwargs, 1, "normalized_shape"), _argument(args, kwargs, 3, "eps")
    return _norm(watch, args[:3], {}, lambda x: F.rms_norm(x, shape, eps=eps))


def _norm(
    watch: OperatorWatch, args: Sequence[Any], kwargs: Mapping[str, Any], normalise: Any
) -> list[Use]:
    scale = watch.parameter(_argument(args, kwargs, 2, "weight"))
    shift = watch.parameter(_argument(args, kwargs, 3, "bias"))
    shape = _argument(args, kwargs, 1, "normalized_shape")
    if scale is None or len(shape) != 1:
        return []
    bias = None if shift is None else shift.identity
    return [
        Use(
            Kind.NORM,
            scale.identity,
            bias,
            _argument(args, kwargs, 0, "input"),
            normalise=normalise,
        )
    ]


def _scale(
    watch: OperatorWatch, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor
) -> list[Use]:
    """``w * x`` over the last dimension."""
    if len(args) != 2:
        return []
    for factor, x in (args, args[::-1]):
        found = watch.parameter(factor)
        if found is None or not isinstance(x, Tensor) or watch.parameter(x) is not None:
            continue
        if (
            factor.dim() == 1
            and x.dim() > 1
            and x.shape == out.shape == (*x.shape[:-1], len(factor))
        ):
            return [Use(Kind.NORM, found.identity, None, x, found.part)]
    return []


def _convolution(
    watch: OperatorWatch, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor
) -> list[Use]:
    """``F.conv2d(x, W, b, stride, padding, dilation, groups)``, a use for each group."""
    x, weight = _argument(args, kwargs, 0, "input"), _argument(args, kwargs, 1, "weight")
    matrix = watch.parameter(weight)
    bias = watch.parameter(_argument(args, kwargs, 2, "bias"))
    stored = matrix is not None and matrix.part is None and not matrix.transposed
    if matrix is None or not stored or watch.parameter(x) is not None:
        return []
    window = window_of(weight.shape[2:], args, kwargs)
    kind, parts = groups_of(weight.shape, _argument(args, kwargs, 6, "groups") or 1)
    added, read = None if bias is None else bias.identity, weight.shape[1]
    found = []
    for number, part in enumerate(parts):
        own = None if part is None else (number * read, (number + 1) * read)
        layout = Patches(window, own, part)
        found.append(Use(kind, matrix.identity, added, x, part, layout=layout))
    return found


def _channels(
    norm: Callable[..., Tensor],
    watch: OperatorWatch,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    out: Tensor,
) -> list[Use]:
    """Torch's norms with a scale for each channel, ``[N, channels, *positions]``."""
    given = inspect.signature(norm).bind(*args, **kwargs).arguments
    scale, shift = watch.parameter(given.get("weight")), watch.parameter(given.get("bias"))
    x = given.pop("input")
    if scale is None or x.dim() < 2:
        return []
    own = given.get("training", given.get("use_input_stats", norm is F.instance_norm))
    none = ("weight", "bias", *(("running_mean", "running_var") if own else ()))
    given |= dict.fromkeys([name for name in none if name in given])
    layout = Channels(x.dim() - 2, lambda x: norm(x, **given))
    bias = None if shift is None else shift.identity
    return [Use(Kind.NORM, scale.identity, bias, x, layout=layout)]


def _shift(
    watch: OperatorWatch, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor
) -> list[Use]:
    """``x + b`` over the last dimension."""
    if len(args) != 2 or kwargs:
        return []
    for added, x in (args, args[::-1]):
        found = watch.parameter(added)
        if found is None or not isinstance(x, Tensor) or watch.parameter(x) is not None:
            continue
        if added.dim() == 1 < x.dim() and x.shape == out.shape == (*x.shape[:-1], len(added)):
            use = Use(Kind.BIAS, found.identity, found.identity, x)
            return [bias_alone(use, len(added), found.part)]
    return []


def _einsum(
    watch: OperatorWatch, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor
) -> list[Use]:
    """``einsum("ibh,hnd->ibnd", x, W)``: features of ``x`` go, those of ``W`` come, rows stay."""
    operands = args[1] if len(args) == 2 and isinstance(args[1], list | tuple) else args[1:]
    left, _, result = args[0].replace(" ", "").partition("->")
    pairs = list(zip(operands, left.split(","), strict=False))
    if len(pairs) != 2 or "." in left or not result:
        return []
    (x, read), (weight, letters) = sorted(pairs, key=lambda p: watch.parameter(p[0]) is not None)
    matrix = watch.parameter(weight)
    go = "".join(c for c in letters if c in read and c not in result)
    come = "".join(c for c in letters if c in result and c not in read)
    kind = {go + come: Kind.CONV1D, come + go: Kind.LINEAR}.get(letters)
    first = go if kind is Kind.CONV1D else come
    plain = matrix is not None and matrix.part is None and not matrix.transposed
    rows = read.removesuffix(go) == result.removesuffix(come)
    if matrix is None or not plain or kind is None or len(first) != 1 or not (go and come and rows):
        return []
    a = x if len(go) == 1 else watch.joined(x, len(go))
    return [Use(kind, matrix.identity, None, a, features=len(come))]


def bias_alone(use: Use, n: int, part: int | tuple[int, int] | None = None) -> Use:
    """Returns the use of the bias of length ``n`` that an operator adds, without its weight's."""
    assert use.bias is not None
    bias = replace(use, kind=Kind.BIAS, weight=use.bias, bias=None, part=part)
    return replace(bias, normalise=lambda x: x.new_ones(len(x), n))


def _look_up(
    watch: OperatorWatch, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor
) -> list[Use]:
    """``W[indices]`` and ``W.index_select(0, indices)``."""
    table, indices = args[0], args[-1] if not kwargs else kwargs.get("index")
    matrix = watch.parameter(table)
    if matrix is None or matrix.part is not None or matrix.transposed or table.dim() != 2:
        return []
    by_row = len(args) != 3 or args[1] in (0, -2)
    if not by_row or not isinstance(indices, Tensor) or indices.dtype not in _INTEGERS:
        return []
    return [Use(Kind.EMBEDDING, matrix.identity, None, indices)]


_CHANNEL_NORMS = (F.batch_norm, F.group_norm, F.instance_norm)

_READERS: dict[str, Reader] = {
    "linear": _linear,
    "addmm": _addmm,
    "matmul": _matmul,
    "__matmul__": _matmul,
    "mm": _matmul,
    "bmm": _matmul,
    "grouped_mm": _grouped,
    "_grouped_mm": _grouped,
    "grouped_mm_fallback": _grouped,
    "embedding": _embedding,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    **{norm.__name__: partial(_channels, norm) for norm in _CHANNEL_NORMS},
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    "einsum": _einsum,
    "__getitem__": _look_up,
    "index_select": _look_up,
    **dict.fromkeys(_SCALES, _scale),
    **dict.fromkeys(_SUMS, _shift),
}


def _name_of(func: Callable[..., Any]) -> str:
    """The name of a function; of a property (``x.T``) the property's."""
    name = getattr(func, "__name__", "")
    return getattr(func.__self__, "__name__", name) if name == "__get__" else name  # type: ignore[attr-defined]


def opened(func: Any) -> Callable[..., Any]:
    """A function of torch's Python code that does not hand itself over to the mode once more."""
    names = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    world = {**func.__globals__, **dict.fromkeys(names, lambda *_: False)}
    opened = types.FunctionType(func.__code__, world, func.__name__, func.__defaults__)
    opened.__kwdefaults__ = func.__kwdefaults__
    return opened
