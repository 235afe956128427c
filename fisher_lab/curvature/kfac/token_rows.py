"""Which token every row of every tensor of a forward pass belongs to.

Tokens have ids, and ids travel with the tensors: a view, a transposition, a gathering of rows does
to the ids what it does to the tensor; an operation position by position keeps them; a product over
features keeps those of its rows; a sum over tokens makes a row of its own of those that it sums.
So the rows of an expert, of a transposed or of a flattened tensor are known by their *origin*
(``docs/math.md``, section 1), and no shape is compared with the shape of a mask.

Ids of a tensor have as many dimensions as it, of size 1 where they do not vary: ``[B, S, 1]`` for
hidden states ``[B, S, d]``. A tensor may have several: attention scores those of queries and keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fisher_lab.curvature.kfac.layouts import Window, seen, window_of
from fisher_lab.curvature.kfac.token_ids import (
    FILLED,
    OWN,
    Fixed,
    Made,
    Operation,
    Origin,
    compressed,
    has_tensor,
    indexed_dims,
    narrowed,
    overlapping,
    picked_axis,
    reshaped,
    tensors_in,
    union,
    with_leading,
    words,
)
from fisher_lab.curvature.kfac.token_marks import TokenMarks

_SAME = words(
    "contiguous clone to float double half bfloat16 type type_as detach data cpu cuda long int "
    "bool alias requires_grad_ detach_"
)
_CHANNEL_NORMS = words("batch_norm group_norm instance_norm")
_VIEWS = words(
    "transpose permute unflatten squeeze unsqueeze expand expand_as select narrow __getitem__ "
    "chunk split unbind t T mT H mH movedim moveaxis swapaxes swapdims adjoint tensor_split "
    "split_with_sizes broadcast_to diagonal"
)
_NEW = words("new_zeros new_ones new_full new_empty new_tensor")
_RESHAPES = words("view reshape view_as reshape_as flatten ravel")
_COPIES = words("flip roll repeat tile repeat_interleave index_select pad unfold")
_JOINS = words("cat concat concatenate")
_PRODUCTS = words("matmul __matmul__ mm bmm __rmatmul__ linear addmm baddbmm")
_BY_FIRST = words(
    "scaled_dot_product_attention grouped_mm _grouped_mm grouped_mm_fallback masked_scatter "
    "masked_scatter_"
)
_RESAMPLINGS = frozenset(
    f"{name}{n}d"
    for name in words(
        "max_pool avg_pool lp_pool adaptive_max_pool adaptive_avg_pool conv_transpose"
    )
    for n in (1, 2, 3)
) | words("interpolate upsample")
_SUMS = words(
    "sum mean max min amax amin argmax argmin norm prod all any std var logsumexp nanmean "
    "count_nonzero nansum linalg_vector_norm"
)
_NORMS = words("norm linalg_vector_norm")
_SORTS = words("sort argsort topk glu")
_SCATTERS = words("scatter scatter_ scatter_add scatter_add_ scatter_reduce")

_FACTORS = (("input", "other"), ("mat1", "mat2"))


class TokenRows(TokenMarks):
    """Follows the ids of tokens through the operations of a forward pass.

    Args:
        constants: tensors that do not depend on the batch (parameters, buffers); kept alive by
            their owner.
    """

    def __init__(self, constants: Iterable[Tensor] = ()) -> None:
        super().__init__(constants)
        self._own_rows = WeakTensorKeyDictionary()
        self._picked: dict[int, Tensor] = {}
        self._picks: dict[tuple, dict[int, list[tuple[int, Tensor]]]] = {}
        rules: list[tuple[Iterable[str], Callable[..., Any]]] = [
            (_SAME | _CHANNEL_NORMS, self._same),
            (_VIEWS, self._view),
            (words("unsqueeze_ transpose_ swapaxes_ swapdims_ t_"), self._turned),
            (_RESHAPES, self._reshape),
            (["as_strided"], self._strided),
            (_NEW, self._new),
            (_COPIES, self._copy),
            (_JOINS, self._cat),
            (["stack"], self._stack),
            (_PRODUCTS, self._product),
            (["einsum"], self._einsum),
            (["embedding", "one_hot", "view_as_real"], self._one_more),
            (["view_as_complex"], self._without_last),
            (_BY_FIRST, self._by_first),
            (["scaled_dot_product_attention"], self._attend),
            (["conv1d", "conv2d", "conv3d"], self._convolve),
            (_RESAMPLINGS, self._resample),
            (_SUMS, self._sum),
            (_SORTS, self._sort),
            (["gather", "take_along_dim"], self._gather),
            (["index_add", "index_add_", "index_copy", "index_copy_"], self._write_rows),
            (_SCATTERS, self._scatter),
            (["__setitem__"], self._assign),
        ]
        self._rules = {name: rule for names, rule in rules for name in names}

    def follow(self, name: str, func: Callable[..., Any], args: Any, kwargs: Any, out: Any) -> None:
        """Notes what an operation makes of its arguments' ids.

        Args:
            name: of the operation.
            func: the operation.
            args: its arguments.
            kwargs: its arguments by name.
            out: its result.
        """
        outs = list(tensors_in([out]))
        given = list(tensors_in([args, kwargs.values()]))
        if not outs and name != "__setitem__":
            return
        origins = [self.of(t) for t in given]
        if name != "__setitem__" and all(o is Fixed.CONSTANT for o in origins):
            found: Any = [Fixed.CONSTANT] * len(outs)
        else:
            rule = self._rules.get(name, self._each_position)
            try:
                found = rule(Operation(name, func, args, kwargs, outs, given, origins))
            except (RuntimeError, TypeError, IndexError, ValueError, KeyError):
                found = Fixed.UNKNOWN  # an unusual form of the operation
        found = found if isinstance(found, list) else [found] * len(outs)
        for tensor, origin in zip(outs, found, strict=False):
            self.mark(tensor, Fixed.UNKNOWN if origin == () else self.settled(origin))

    # ---- rules: an operation's arguments -> the origin of its results ------------------------

    def _each_position(self, call: Operation) -> list[Origin]:
        """Position by position, where the result has the shape to which its arguments broadcast."""
        return [self._broadcast(out, call) for out in call.outs]

    def _broadcast(self, out: Tensor, call: Operation) -> Origin:
        found: list[Tensor] = []
        for tensor, origin in zip(call.given, call.origins, strict=True):
            fits = tensor.dim() <= out.dim() and all(
                n in (1, m)
                for n, m in zip(reversed(tensor.shape), reversed(out.shape), strict=False)
            )
            if not fits:
                return Fixed.UNKNOWN
            if not isinstance(origin, Fixed):
                found += [with_leading(ids, out.dim()) for ids in origin]
        origin = union(self._named(found))
        self._meet(origin, [tensor for tensor in call.given if tensor.shape == out.shape])
        return origin

    def _meet(self, origin: Origin, given: list[Tensor]) -> None:
        """Says of constants that they stand in, or beside, the vectors of tokens."""
        for tensor in given if self._waiting else ():
            if tensor in self._waiting and not isinstance(origin, Fixed):
                self._waiting.pop(tensor)(origin)

    def _same(self, call: Operation) -> Origin:
        return self.of(call.given[0])

    def _new(self, call: Operation) -> Origin:
        """A constant; one of the tensor's own shape stands beside its rows."""
        same = call.outs[0].shape == call.first.shape
        return self.of(call.first) if same else Fixed.CONSTANT

    def _view(self, call: Operation) -> list[Origin] | Origin:
        x, rest = call.first, call.rest
        origin = self.of(x)
        index = rest[0] if call.name == "__getitem__" else None
        if isinstance(origin, Fixed):
            ids = self.of(index)  # a table that is indexed by what tokens are
            if isinstance(ids, Fixed) or not isinstance(index, Tensor) or index.dtype == torch.bool:
                return origin
            extra = call.outs[0].dim() - index.dim()
            return tuple(i.reshape(*i.shape, *[1] * extra) for i in ids)
        if index is not None and has_tensor(index):
            k = indexed_dims(index, x.dim())
            picked = [i.expand(*x.shape[:k], *i.shape[k:])[index] for i in origin]
            return union([compressed(i) for i in picked])
        parts = [list(tensors_in([call.again(i.expand(x.shape))])) for i in origin]
        axis = picked_axis(call.name, call.rest, x.dim())
        if axis is not None:
            pairs = zip(origin, parts, strict=True)
            return union([self._pick(ids, axis, narrowed(part[0])) for ids, part in pairs])
        return [union([narrowed(p[n]) for p in parts]) for n in range(len(call.outs))]

    def _turned(self, call: Operation) -> Origin:
        """A view in place: the ids still have the dimensions from before."""
        origin, call.func = self.of(call.first), getattr(Tensor, call.name[:-1])
        return origin if isinstance(origin, Fixed) else tuple(map(call.again, origin))

    def _pick(self, ids: Tensor, axis: int, picked: Tensor) -> Tensor:
        """One position of every example (a class token): a row that is the example's.

        But where every position is picked, one after the other, each is its token's.
        Such rows are the positions again where they are put side by side (:meth:`_position`).
        """
        if ids.size(axis) == 1 or picked.numel() != ids.numel() // ids.size(axis):
            return picked
        of_example = self.pool(ids.movedim(axis, -1), 1).reshape(picked.shape)
        source = (int(ids.reshape(-1)[0]), ids.shape, axis)
        before = self._picks.setdefault(source, {})
        before.setdefault(int(picked.reshape(-1)[0]), []).append((len(self.pooled) - 1, picked))
        if len(before) == ids.size(axis):  # every position, one by one: a scan over the tokens
            for number, own in (pair for pairs in before.values() for pair in pairs):
                first, _, made = self.pooled[number]
                self.pooled[number] = (first, own.reshape(-1, 1), made)
        self._picked[int(of_example.reshape(-1)[0])] = picked
        return of_example

    def _position(self, origin: Origin) -> Origin:
        """The origin of a tensor of picked positions, each as the token that it is."""
        if isinstance(origin, Fixed) or not self._picked:
            return origin
        return tuple(self._picked.get(int(ids.reshape(-1)[0]), ids) for ids in origin)

    def _reshape(self, call: Operation) -> Origin:
        x, out = call.first, call.outs[0]
        origin = self.of(x)
        if isinstance(origin, Fixed) or x.dtype != out.dtype:
            return origin
        return union([reshaped(ids, tuple(x.shape), tuple(out.shape)) for ids in origin])

    def _strided(self, call: Operation) -> Origin:
        """A view by strides, which are those of the whole only where it lies in one piece."""
        origin, start = self.of(call.first), call.argument(3, "storage_offset")
        if isinstance(origin, Fixed) or start is not None or not call.first.is_contiguous():
            return Fixed.UNKNOWN
        shape = call.first.shape
        return union([compressed(call.again(i.expand(shape).contiguous())) for i in origin])

    def _copy(self, call: Operation) -> Origin:
        x = call.first
        origin = self.of(x)
        if isinstance(origin, Fixed):
            return origin
        if call.name == "pad":
            added = list(call.argument(1, "pad"))
            if x.is_floating_point() and all(ids.size(-1) == 1 for ids in origin):
                added[:2] = 0, 0  # more features of the same rows
            call.rest, call.kwargs = [added], {"value": FILLED}
        shape = list(x.shape)
        if call.name == "index_select":  # the other dimensions stay as they are
            dim = call.argument(1, "dim") % x.dim()
            return union(
                [
                    call.again(i.expand(*i.shape[:dim], shape[dim], *i.shape[dim + 1 :]))
                    for i in origin
                ]
            )
        copies = [compressed(call.again(i.expand(shape))) for i in origin]
        return union([self.shifted(ids) for ids in copies] if call.name == "pad" else copies)

    def _cat(self, call: Operation) -> Origin:
        parts = list(call.argument(0, "tensors"))
        dim = (call.argument(1, "dim") or 0) % parts[0].dim()
        origins = [self._position(self.of(p)) for p in parts]
        known = [o for o in origins if not isinstance(o, Fixed)]
        across = union(self._named([i for o in known for i in o if i.size(dim) == 1]))
        self._meet(across, [p for p in parts if p.shape[:-1] == call.outs[0].shape[:-1]])
        if Fixed.UNKNOWN in origins or any(len(o) != 1 for o in known):
            return across  # scores beside scores: what does not vary there stays
        varies = any(ids.size(dim) > 1 for o in known for ids in o)
        if not varies and (dim == parts[0].dim() - 1 or len(known) == len(parts) == 1):
            return across  # features beside features
        pieces = [
            self._of_model(p) if isinstance(o, Fixed) else o[0]
            for p, o in zip(parts, origins, strict=True)
        ]
        shape = torch.broadcast_shapes(*[(*p.shape[:dim], 1, *p.shape[dim + 1 :]) for p in pieces])
        whole = [
            ids.expand(*shape[:dim], part.size(dim), *shape[dim + 1 :])
            for ids, part in zip(pieces, parts, strict=True)
        ]
        return (self.shifted(compressed(torch.cat(whole, dim))),)

    def _stack(self, call: Operation) -> Origin:
        parts = list(call.argument(0, "tensors"))
        dim = (call.argument(1, "dim") or 0) % (parts[0].dim() + 1)
        origins = [self._position(self.of(p)) for p in parts]
        known = [o for o in origins if not isinstance(o, Fixed)]
        if len(known) < len(parts) or any(len(o) != len(known[0]) for o in known):
            return Fixed.UNKNOWN
        found = []
        for each in zip(*known, strict=True):
            shape = torch.broadcast_shapes(*[ids.shape for ids in each])
            found.append(compressed(torch.stack([ids.expand(shape) for ids in each], dim)))
        return union(found)

    def _one_more(self, call: Operation) -> Origin:
        """A dimension more at the end; ``torch.embedding`` has its indices in the second place."""
        source = call.given[0]
        if call.name == "embedding":
            source = next(t for t in call.given if not t.is_floating_point())
        origin = self.of(source)
        return origin if isinstance(origin, Fixed) else tuple(i.unsqueeze(-1) for i in origin)

    def _without_last(self, call: Operation) -> Origin:
        origin = self.of(call.first)
        if isinstance(origin, Fixed):
            return origin
        return union([ids[..., 0] for ids in origin if ids.size(-1) == 1])

    def _attend(self, call: Operation) -> Origin:
        """The rows of the queries; where these are the model's own, those of what they look at."""
        query, value = call.argument(0, "query"), call.argument(2, "value")
        of_value = self.of(value)
        if self.of(query) is not Fixed.CONSTANT or isinstance(of_value, Fixed):
            rest = self.of(query) is Fixed.CONSTANT and Fixed.CONSTANT not in call.origins[1:]
            return Fixed.UNKNOWN if rest else self._by_first(call)
        found = [ids for ids in of_value if ids.size(-2) == ids.size(-1) == 1]
        if not found and len(of_value) == 1 and of_value[0].size(-1) == 1:
            found = [self.pool(of_value[0].movedim(-2, -1), 1).movedim(-1, -2)]
        return union(found)

    def _by_first(self, call: Operation) -> Origin:
        """The rows of the first argument, whatever its features become."""
        origin = self.of(call.given[0])
        return (
            origin if isinstance(origin, Fixed) else union([i for i in origin if i.size(-1) == 1])
        )

    def _product(self, call: Operation) -> Origin:
        start = int(call.name in ("addmm", "baddbmm"))
        left, right = (call.argument(start + i, n) for i, n in enumerate(_FACTORS[start]))
        if call.name == "linear":
            right = call.argument(1, "weight")
        elif call.name == "__rmatmul__":
            left, right = right, left
        dim = call.outs[0].dim()
        found, summed = [], []
        of_left, of_right = self.of(left), self.of(right)
        if of_left is Fixed.UNKNOWN:
            return Fixed.UNKNOWN  # the rows are the left factor's
        for ids in () if isinstance(of_left, Fixed) else of_left:
            if ids.size(-1) > 1:
                summed.append((ids, -1))
            elif left.dim() > 1:
                found.append(with_leading(ids if right.dim() > 1 else ids.squeeze(-1), dim))
        if call.name == "linear" and not isinstance(of_right, Fixed):
            return Fixed.UNKNOWN
        for ids in () if isinstance(of_right, Fixed) else of_right:
            axis = -2 if right.dim() > 1 else -1
            if ids.size(axis) > 1:
                summed.append((ids, axis))
            elif right.dim() > 1:
                found.append(with_leading(ids if left.dim() > 1 else ids.squeeze(-2), dim))
        known = of_right is not Fixed.UNKNOWN
        if not found and summed and known and left.dim() == right.dim() == dim:
            ids, axis = summed[0]  # keys times values, summed over the tokens of an example
            other = ids.movedim(axis, -1)
            found.append(self.pool(other, 1).reshape(*ids.shape[:-2], 1, 1))
        return union(found)

    def _einsum(self, call: Operation) -> Origin:
        operands = call.rest[0] if isinstance(call.rest[0], list | tuple) else call.rest
        left, _, result = call.args[0].replace(" ", "").partition("->")
        if "." in left or not result:
            return Fixed.UNKNOWN
        found = []
        if any(self.of(tensor) is Fixed.UNKNOWN for tensor in operands):
            return Fixed.UNKNOWN
        for tensor, letters in zip(operands, left.split(","), strict=True):
            origin = self.of(tensor)
            for ids in () if isinstance(origin, Fixed) else origin:
                if any(n > 1 and c not in result for n, c in zip(ids.shape, letters, strict=True)):
                    continue
                kept = [c for c in letters if c in result]
                for axis in reversed(range(len(letters))):
                    ids = ids if letters[axis] in result else ids.select(axis, 0)
                ids = ids.permute([kept.index(c) for c in result if c in kept])
                found.append(ids[tuple(slice(None) if c in kept else None for c in result)])
        return union(found)

    def _convolve(self, call: Operation) -> Origin:
        """A location stands for a token, or for those in its window (:func:`.layouts.seen`)."""
        origin, weight = self.of(call.first), call.argument(1, "weight")
        if isinstance(origin, Fixed) or self.of(weight) is not Fixed.CONSTANT:
            return Fixed.UNKNOWN
        window, n = window_of(weight.shape[2:], call.args, call.kwargs), weight.dim() - 2
        found = []
        for ids in origin:
            if ids.size(-n - 1) > 1:
                ids = self._joined(ids.movedim(-n - 1, -1), Made.OF_SOME).unsqueeze(-n - 1)
            found.append(self._windows(ids, window, call.outs[0].shape[-n:]))
        return union(found)

    def _windows(self, ids: Tensor, window: Window, n_out: Sequence[int]) -> Tensor:
        for d, length in enumerate(n_out):
            axis = d - len(n_out)
            if ids.size(axis) > 1:
                under, filled = seen(ids.movedim(axis, -1), window, d, length)
                if filled:  # padding, too, is what was filled in
                    ids = self._joined(under, Made.OF_FILLED, always=True)
                else:
                    ids = self._joined(under, Made.OF_EVERY)
                ids = ids.movedim(-1, axis)
        return ids

    def _joined(self, ids: Tensor, made: Made, always: bool = False) -> Tensor:
        """One id for those along the last dimension; where all are filled in, so is the row.

        ``always`` a new one, if it is but one, too.
        """
        if ids.size(-1) == 1 and not always:
            return ids[..., 0]
        return self.pool(ids, 1, made)[..., 0].where((ids != FILLED).any(dim=-1), FILLED)

    def _resample(self, call: Operation) -> Origin:
        """Positions are mixed, as many as there are: what does not vary along them stays."""
        origin, out = self.of(call.first), call.outs[0]
        if isinstance(origin, Fixed) or out.dim() != call.first.dim():
            return Fixed.UNKNOWN
        n = int(call.name[-2]) if call.name[-1] == "d" else max(out.dim() - 2, 1)
        return union([i for i in origin if all(i.size(d) == 1 for d in range(-n, 0))])

    def _sum(self, call: Operation) -> Origin:
        x, out = call.first, call.outs[0]
        if call.name in ("max", "min") and len(call.args) > 1 and isinstance(call.args[1], Tensor):
            return self._broadcast(out, call)
        origin = self.of(x)
        dim = call.argument(2 if call.name in _NORMS else 1, "dim")
        if isinstance(origin, Fixed) or dim is None:
            return Fixed.UNKNOWN
        dims = sorted(d % x.dim() for d in (dim if isinstance(dim, list | tuple) else [dim]))
        keep = out.dim() == x.dim()
        found = [i for i in origin if all(i.size(d) == 1 for d in dims)]
        if not found and len(origin) == 1:
            rest = [d for d in range(x.dim()) if d not in dims]
            moved = origin[0].permute(*rest, *dims)
            made = Made.OF_EVERY if overlapping(moved, len(dims)) else Made.OF_SOME
            pooled = self.pool(moved, len(dims), made)
            found = [pooled.permute([([*rest, *dims]).index(d) for d in range(x.dim())])]
        if not keep:
            for d in reversed(dims):
                found = [i.squeeze(d) for i in found]
        return union(found)

    def _sort(self, call: Operation) -> list[Origin] | Origin:
        origin = self.of(call.first)
        dim = call.argument(2 if call.name == "topk" else 1, "dim")
        dim = dim if isinstance(dim, int) and not isinstance(dim, bool) else -1
        return (
            origin if isinstance(origin, Fixed) else union([i for i in origin if i.size(dim) == 1])
        )

    def _gather(self, call: Operation) -> Origin:
        x = call.first
        first = call.name == "gather"
        dim = call.argument(1 if first else 2, "dim")
        index = call.argument(2 if first else 1, "index" if first else "indices")
        origin = self.of(x)
        if isinstance(origin, Fixed):
            return self.of(index)
        dim %= x.dim()
        found = []
        for ids in origin:
            if ids.size(dim) > 1:
                where = narrowed(index)
                shape = [x.size(d) if d == dim else where.size(d) for d in range(x.dim())]
                ids = ids.expand([max(n, i) for n, i in zip(shape, ids.shape, strict=True)])
                where = where.expand(
                    [n if d == dim else ids.size(d) for d, n in enumerate(where.shape)]
                )
                ids = compressed(ids.gather(dim, where))
            found.append(ids)
        return union(found)

    def _write_rows(self, call: Operation) -> Origin:
        return self._written(
            call.first,
            call.argument(1, "dim"),
            call.argument(2, "index"),
            call.argument(3, "source"),
        )

    def _written(self, x: Tensor, dim: int, index: Tensor, source: Tensor) -> Origin:
        """Rows of ``source`` go to places of ``x``: each place belongs to what is written to it."""
        before, ids, dim = self.of(x), self._single(source), dim % x.dim()
        if ids is None or before is Fixed.UNKNOWN:
            return Fixed.UNKNOWN
        start = self._places(x, before)
        shape = [max(a, b) for a, b in zip(start.shape, ids.shape, strict=True)]
        shape[dim] = x.size(dim)
        start = start.expand(shape).clone()
        shape[dim] = index.numel()
        return (start.index_copy_(dim, index.reshape(-1).long(), ids.expand(shape).contiguous()),)

    @staticmethod
    def _of_model(constant: Tensor) -> Tensor:
        """The ids of a constant's rows: the model's own, or, where it is zero, filled in."""
        zero = not constant.requires_grad and not bool(constant.any())
        return torch.full([1] * constant.dim(), FILLED if zero else OWN, device=constant.device)

    def _single(self, source: Tensor) -> Tensor | None:
        """The ids of rows that are to be written; a constant's are the model's own."""
        origin = self.of(source)
        if origin is Fixed.CONSTANT:
            return self._of_model(source)
        return None if isinstance(origin, Fixed) or len(origin) != 1 else origin[0]

    def _places(self, x: Tensor, before: Origin) -> Tensor:
        """The ids of a tensor that is written to: where nothing was, its places belong to none."""
        if not isinstance(before, Fixed):
            return before[0]
        own = self._own_rows.get(x)
        return torch.full([1] * x.dim(), FILLED, device=x.device) if own is None else own

    def _scatter(self, call: Operation) -> Origin:
        x, dim = call.first, call.argument(1, "dim")
        index, source = call.argument(2, "index"), call.argument(3, "src")
        where = narrowed(index)
        if isinstance(source, Tensor) and where.numel() == where.size(dim) < index.numel():
            return self._written(x, dim, where, source)
        if isinstance(source, Tensor) and where.numel() < index.numel():
            return self._gathered_up(x, dim % x.dim(), where, source)
        for tensor in (x, index):  # into features: the rows stay
            origin = self.of(tensor)
            if not isinstance(origin, Fixed) and all(i.size(dim) == 1 for i in origin):
                return origin
        return Fixed.UNKNOWN

    def _gathered_up(self, x: Tensor, dim: int, where: Tensor, source: Tensor) -> Origin:
        """Rows that are summed at places of an empty ``x``: each is made of those sent to it."""
        ids = self._single(source)
        if ids is None or self.of(x) is not Fixed.CONSTANT:
            return Fixed.UNKNOWN
        shape = torch.broadcast_shapes(where.shape, ids.shape)
        ids, where = (t.expand(shape).movedim(dim, -1).flatten(0, -2) for t in (ids, where))
        sent = where[:, None] == torch.arange(x.size(dim), device=where.device)[:, None]
        order = sent.int().argsort(dim=-1, descending=True, stable=True)
        order = order[..., : int(sent.sum(dim=-1).max())]
        members = ids[:, None].expand(sent.shape).where(sent, FILLED).gather(-1, order)
        rows = [*shape[:dim], *shape[dim + 1 :], x.size(dim)]
        made = self._joined(members, Made.OF_SOME).reshape(rows)
        return (made.movedim(-1, dim),)

    def _assign(self, call: Operation) -> Origin:
        x, index, value = call.args
        before, constant = self.of(x), self.of(value) is Fixed.CONSTANT
        if constant and not (isinstance(value, Tensor) and value.requires_grad):
            self.mark(x, before)  # a number says nothing of whose the place is
            return Fixed.CONSTANT
        single = self._single(value)
        if single is None or before is Fixed.UNKNOWN:
            self.mark(x, Fixed.UNKNOWN)
            return Fixed.CONSTANT
        ids = self._places(x, before).expand(x.shape).clone()
        ids[index] = single.expand(value.shape)
        if constant and before is Fixed.CONSTANT:
            self._own_rows[x] = compressed(ids)  # a class token, beside which tokens will stand
        else:
            self.mark(x, (compressed(ids),))
        return Fixed.CONSTANT
