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

from fisher_lab.curvature.kfac.derived import Derived, Term, Terms, stack_of
from fisher_lab.curvature.kfac.layers import Kind, groups_of
from fisher_lab.curvature.kfac.layouts import Channels, Patches, RowLayout, window_of
from fisher_lab.curvature.kfac.parts import Part
from fisher_lab.curvature.kfac.token_ids import Fixed, tensors_in, words
from fisher_lab.curvature.kfac.token_rows import TokenRows
from fisher_lab.curvature.likelihoods import at_least_float32
from fisher_lab.curvature.linalg import full_precision

_SUMS = words("add __add__ __radd__ __iadd__ add_")
_LIKE = words("to type_as view_as reshape_as expand_as new_zeros new_ones new_full new_empty")
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
            group's, or which columns; None for all of the parameter.
        bias: the identity of the bias that the same operator adds; None without one.
        a: what the operator reads (the indices of a look-up).
        rows: which of the operator's rows (in the first dimension) are this part's; None for all.
        normalise: makes what the parameter multiplies of ``a``, where the operator normalises too,
            or where constants stand between them.
        padding: the index whose row a look-up does not train.
        layout: how the rows lie, where features are not the last dimension.
        features: how many last dimensions of what the operator gives are features.
        gives: makes the gradient of the parameter's own product of that of the operator's, where
            constants stand between them.
    """

    kind: Kind
    weight: int
    bias: int | None
    a: Tensor
    part: Part | None = None
    rows: int | slice | None = None
    normalise: Callable[[Tensor], Tensor] | None = None
    padding: int | None = None
    layout: RowLayout | None = None
    features: int = 1
    gives: Callable[[Tensor], Tensor] | None = None


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
        self._derived = Derived(self._identity, rows)
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
        if name == "__setitem__" and isinstance(args[0], Tensor):
            self._derived.forget(args[0])
        if name == "__setitem__" or isinstance(out, Tensor | list | tuple):
            if kwargs and name in _BY_NAME:
                args, kwargs = _by_place(_BY_NAME[name], args, kwargs)
            self._rows.follow(name, func, args, kwargs, out)
            if isinstance(out, Tensor):
                self._look(name, func, args, kwargs, out)
            for number, piece in enumerate(out if isinstance(out, tuple | list) else ()):
                if isinstance(piece, Tensor):
                    self._look(name, _piece_of(func, number), args, kwargs, piece)
        return out

    def terms(self, tensor: Any) -> Terms:
        """Returns what parameters are to a tensor that is made of them and constants alone."""
        return self._derived.terms(tensor)

    def parameter(self, tensor: Any) -> _Parameter | None:
        """Returns the parameter, or the part of one, that a tensor is: as stored or transposed."""
        terms = self.terms(tensor)
        place = terms[0].place() if len(terms) == 1 and terms[0].bare else None
        return None if place is None else _Parameter(terms[0].identity, place[1], place[0])

    def whole(self, tensor: Any) -> int | None:
        """Returns the identity of the parameter that a tensor is, maybe with another shape."""
        terms = self.terms(tensor)
        return terms[0].identity if len(terms) == 1 and terms[0].whole() else None

    def joined(self, x: Tensor, n: int) -> Tensor:
        """Returns a tensor with its last ``n`` dimensions, which are features, as one."""
        joined, origin = x.flatten(-n), self._rows.of(x)
        if not isinstance(origin, Fixed):
            kept = [ids for ids in origin if all(size == 1 for size in ids.shape[-n:])]
            origin = tuple(ids.flatten(-n) for ids in kept) or Fixed.UNKNOWN
        self._rows.mark(joined, origin)
        return joined

    def column(self, indices: Tensor) -> Tensor:
        """Returns indices with a last dimension of size 1, as that of features."""
        column, origin = indices.unsqueeze(-1), self._rows.of(indices)
        known = origin if isinstance(origin, Fixed) else tuple(i.unsqueeze(-1) for i in origin)
        self._rows.mark(column, known)
        return column

    def _look(
        self,
        name: str,
        func: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        out: Tensor,
    ) -> None:
        given = tensors_in([args, kwargs.values()])  # those in lists too: cat, stack, einsum
        given = args[:1] if name in _LIKE else given
        ours = {term.identity for tensor in given for term in self.terms(tensor)}
        if not ours:
            return
        made = self._derived.follow(name, func, args, kwargs, out)
        if made is None and args and out is args[0]:
            self._derived.forget(out)  # changed in place
        wrapped = torch._C._functorch  # type: ignore[attr-defined]  # what vmap hides
        inside = wrapped.is_functorch_wrapped_tensor(out)
        if torch.is_grad_enabled() and not out.requires_grad and not inside:
            return  # read, but not trained
        explained = {term.identity for term in made or ()}
        reader = _READERS.get(name) if made is None else None
        uses = [] if reader is None else reader(self, args, kwargs, out)
        explained |= {identity for use in uses for identity in (use.weight, use.bias) if identity}
        for identity in ours - explained:
            self.unexplained.setdefault(identity, name)
        for use in uses:
            self._found(use, out)


@dataclass(frozen=True)
class _Parameter:
    """A parameter that a tensor is, and whether as its transpose."""

    identity: int
    transposed: bool
    part: Part | None = None


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
    """``torch.addmm(b, a, W)``, and ``torch.baddbmm`` with a stack of matrices."""
    if len(args) < 3 or any(kwargs.get(k, 1) != 1 for k in ("alpha", "beta")):
        return []
    if args[2].dim() == 3:  # its biases are no rows of a table
        return _stack(watch, args[1], args[2], range(len(args[2])))
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
    if not isinstance(weight, Tensor) or weight.dim() != 2 or watch.terms(a) or a.dim() < 2:
        return []
    if isinstance(bias, Tensor) and bias.dim() != 1:
        return []
    terms, added = watch.terms(weight), watch.parameter(bias)
    uses = [use for term in terms if (use := _with(term, term.place(), a, turned)) is not None]
    if added is None:
        return uses
    # A row of a table of biases is a layer by itself, and so is one beside another weight.
    if len(terms) == len(uses) == 1 and terms[0].bare and added.part is None:
        return [replace(uses[0], bias=added.identity)]
    return [*uses, _bias(added, a, len(bias))]


def _with(
    term: Term, place: tuple[Part | None, bool] | None, a: Tensor, turned: bool
) -> Use | None:
    """The use of a parameter by a product with a matrix that it is a term of.

    Of ``s = D a`` with ``D = left theta right`` the parameter reads ``right a``, and the gradient
    of what it gives is ``left^T g`` (``turned``: ``D`` is given as it is, else its transpose).
    """
    if place is None or isinstance(term.factor, Tensor):
        return None
    kind = Kind.LINEAR if turned != place[1] else Kind.CONV1D
    read, given = (term.right, term.left) if turned else (term.left, term.right)
    if read is not None and turned:
        read = read.mT
    if given is not None and not turned:
        given = given.mT
    use = Use(kind, term.identity, None, a, place[0])
    return replace(use, normalise=_times(read), gives=_times(given, term.factor))


def _times(matrix: Tensor | None, factor: float = 1.0) -> Callable[[Tensor], Tensor] | None:
    """Multiplies rows by a matrix, and by a number; None where they stay as they are."""
    if matrix is None:
        return None if factor == 1 else lambda x: x * factor

    @full_precision()
    def multiplied(x: Tensor) -> Tensor:
        x = at_least_float32(x)
        return (x @ matrix.to(x)) * factor

    return multiplied


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
    if watch.terms(a):
        return []
    rows, found = list(rows), []
    for term in watch.terms(weights):
        for own, (part, turned, one) in zip(rows, stack_of(term) or (), strict=False):
            use = _with(one, (part, turned), a, False)
            if use is not None and (not isinstance(own, slice) or own.stop > own.start):
                found.append(replace(use, rows=own))
    return found


def _embedding(
    watch: OperatorWatch, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor
) -> list[Use]:
    """``F.embedding(indices, W)``; ``torch.embedding`` has them the other way round."""
    given = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    table = next((t for t in given if watch.terms(t)), None)
    indices = next((t for t in given if not t.is_floating_point()), None)
    if table is None or indices is None or table.dim() != 2:
        return []
    padding = _argument(args, kwargs, 2, "padding_idx")
    padding = None if padding is None or padding == -1 else padding % len(table)
    return _rows_of(watch, table, indices, padding)


def _rows_of(
    watch: OperatorWatch, table: Tensor, indices: Tensor, padding: int | None = None
) -> list[Use]:
    """A look-up in a table; of the transpose of a parameter it looks up columns.

    Where constants are multiplied on its left, a parameter reads the rows of those.
    """
    found = []
    for term in watch.terms(table):
        place = term.place()
        if place is None or place[0] is not None or isinstance(term.factor, Tensor):
            continue
        if term.left is None:
            kind = Kind.COLUMNS if place[1] else Kind.EMBEDDING
            right = None if term.right is None else term.right.mT
            use = Use(kind, term.identity, None, indices, padding=padding)
            found.append(replace(use, gives=_times(right, term.factor)))
        elif padding is None:
            use = _with(replace(term, left=None), place, watch.column(indices), False)
            if use is not None:
                found.append(replace(use, normalise=partial(_taken, term.left)))
    return found


def _taken(table: Tensor, indices: Tensor) -> Tensor:
    return table[indices[:, 0]]


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
    """``w * x`` over one dimension."""
    return [] if len(args) != 2 or kwargs else _along(watch, args, out, Kind.NORM)


def _along(watch: OperatorWatch, args: Sequence[Any], out: Tensor, kind: Kind) -> list[Use]:
    """A scale or a shift of one dimension, the features, by a vector of parameters."""
    for vector, x in (args, args[::-1]):
        terms = watch.terms(vector)
        if not terms or not isinstance(x, Tensor) or watch.terms(x) or x.shape != out.shape:
            continue
        axes = [d - vector.dim() for d, n in enumerate(vector.shape) if n > 1]
        axis, n = axes[0] if axes else -1, vector.numel()
        if len(axes) > 1 or out.size(axis) != n or vector.dim() > x.dim() or x.dim() < 2:
            return []
        layout = None if axis == -1 else Channels(-axis - 1, lambda x: x)
        found = []
        for term in terms:
            place = replace(term, lies=term.lies.squeeze().reshape(-1)).place()
            if place is None or term.left is not None or term.right is not None:
                continue
            scaled = _each(term.factor, n, kind)
            found.append(Use(kind, term.identity, None, x, place[0], None, scaled, layout=layout))
        return found
    return []


def _each(factor: float | Tensor, n: int, kind: Kind) -> Callable[[Tensor], Tensor] | None:
    """What a vector multiplies: what it scales, or 1 where it is added, with its constants."""
    by = factor.reshape(-1) if isinstance(factor, Tensor) else factor
    if kind is Kind.BIAS:
        return lambda x: x.new_ones(len(x), n) * by
    return None if not isinstance(by, Tensor) and by == 1 else lambda x: x * by


def _convolution(
    watch: OperatorWatch, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor
) -> list[Use]:
    """``F.conv2d(x, W, b, stride, padding, dilation, groups)``, a use for each group."""
    x, weight = _argument(args, kwargs, 0, "input"), _argument(args, kwargs, 1, "weight")
    given = _argument(args, kwargs, 2, "bias")
    matrix, bias = watch.whole(weight), watch.parameter(given)
    if watch.terms(x):
        return []
    window = window_of(weight.shape[2:], args, kwargs)
    if matrix is None:  # a weight that is made of others: its bias is a layer by itself
        layout = Patches(window, (0, 1))
        return [] if bias is None else [replace(_bias(bias, x, len(given)), layout=layout)]
    kind, parts = groups_of(weight.shape, _argument(args, kwargs, 6, "groups") or 1)
    added, read = None if bias is None else bias.identity, weight.shape[1]
    found = []
    for number, part in enumerate(parts):
        own = None if part is None else (number * read, (number + 1) * read)
        layout = Patches(window, own, part)
        found.append(Use(kind, matrix, added, x, part, layout=layout))
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
    """``x + b`` over one dimension."""
    return [] if len(args) != 2 or kwargs else _along(watch, args, out, Kind.BIAS)


def _einsum(
    watch: OperatorWatch, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor
) -> list[Use]:
    """``einsum("ibh,hnd->ibnd", x, W)``: features of ``x`` go, those of ``W`` come, rows stay."""
    operands = args[1] if len(args) == 2 and isinstance(args[1], list | tuple) else args[1:]
    left, _, result = args[0].replace(" ", "").partition("->")
    pairs = list(zip(operands, left.split(","), strict=False))
    if len(pairs) != 2 or "." in left or not result:
        return []
    (x, read), (weight, letters) = sorted(pairs, key=lambda p: bool(watch.terms(p[0])))
    matrix, stored = watch.whole(weight), _stored_shape(watch, weight)
    go = "".join(c for c in letters if c in read and c not in result)
    come = "".join(c for c in letters if c in result and c not in read)
    kind = {go + come: Kind.CONV1D, come + go: Kind.LINEAR}.get(letters)
    first = go if kind is Kind.CONV1D else come
    plain = weight.shape == stored and not watch.terms(x)
    rows = read.removesuffix(go) == result.removesuffix(come)
    if matrix is None or not plain or kind is None or len(first) != 1 or not (go and come and rows):
        return []
    a = x if len(go) == 1 else watch.joined(x, len(go))
    return [Use(kind, matrix, None, a, features=len(come))]


def _stored_shape(watch: OperatorWatch, tensor: Tensor) -> torch.Size | None:
    terms = watch.terms(tensor)
    return terms[0].shape if len(terms) == 1 else None


def _bias(added: _Parameter, a: Tensor, n: int) -> Use:
    """A bias of length ``n`` by itself, that is added to what an operator makes of ``a``."""
    return bias_alone(Use(Kind.BIAS, added.identity, added.identity, a), n, added.part)


def bias_alone(use: Use, n: int, part: Part | None = None) -> Use:
    """Returns the use of the bias of length ``n`` that an operator adds, without its weight's."""
    assert use.bias is not None
    bias = replace(use, kind=Kind.BIAS, weight=use.bias, bias=None, part=part)
    return replace(bias, normalise=lambda x: x.new_ones(len(x), n))


def _look_up(
    watch: OperatorWatch, args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor
) -> list[Use]:
    """``W[indices]`` and ``W.index_select(0, indices)``."""
    table, indices = args[0], args[-1]
    if not isinstance(table, Tensor) or table.dim() != 2:
        return []
    by_row = len(args) != 3 or args[1] in (0, -2)
    if not by_row or not isinstance(indices, Tensor) or indices.dtype not in _INTEGERS:
        return []
    return _rows_of(watch, table, indices)


_CHANNEL_NORMS = (F.batch_norm, F.group_norm, F.instance_norm)

_READERS: dict[str, Reader] = {
    "linear": _linear,
    "addmm": _addmm,
    "baddbmm": _addmm,
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


_BY_NAME = {
    **dict.fromkeys(("matmul", "mul", "multiply", "add"), ("input", "other")),
    **dict.fromkeys(("mm", "bmm"), ("input", "mat2")),
    "addmm": ("input", "mat1", "mat2"),
    "baddbmm": ("input", "batch1", "batch2"),
    "index_select": ("input", "dim", "index"),
    **dict.fromkeys(("cat", "concat", "stack"), ("tensors",)),
}
"""What functions of torch that are written in C call their first arguments."""


def _by_place(
    names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """Returns the arguments with those by place that were given by name and could be."""
    names = names[len(args) :]
    if not all(n in kwargs for n in names):
        return args, kwargs
    rest = {key: value for key, value in kwargs.items() if key not in names}
    return (*args, *(kwargs[n] for n in names)), rest


def _piece_of(func: Callable[..., Any], number: int) -> Callable[..., Tensor]:
    """One of the tensors that a function gives."""
    return lambda *args, **kwargs: func(*args, **kwargs)[number]


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
