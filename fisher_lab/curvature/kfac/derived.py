"""Tensors that are made of parameters and constants alone: what each parameter is to them.

Such a tensor ``D`` (a transposed weight, ``1 + w``, a frozen weight with an adapter added to it) is
linear in each of its parameters while the others are held: a change of ``theta`` changes it by
``left dtheta right``. So an operator that uses ``D`` uses ``theta``, with what it reads and the
gradient of what it gives multiplied by constants (``docs/math.md``, section 1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fisher_lab.curvature.kfac.parts import Part, form_of, part_text
from fisher_lab.curvature.kfac.token_ids import Fixed, words
from fisher_lab.curvature.kfac.token_rows import TokenRows

_CASTS = words("to float double half bfloat16 type type_as contiguous clone")
_VIEWS = words(
    "t T mT transpose adjoint swapaxes swapdims permute movedim view reshape flatten unflatten "
    "squeeze unsqueeze __getitem__ select narrow view_as reshape_as"
)
PIECES = words("chunk split split_with_sizes tensor_split unbind hsplit vsplit")
"""Operations that give several views."""
_JOINS = words("cat concat concatenate vstack row_stack stack hstack")
_SUMS = words("add __add__ __radd__")
_DIFFERENCES = words("sub __sub__ __rsub__ rsub")
_SCALES = words("mul __mul__ __rmul__ multiply")
_QUOTIENTS = words("div __truediv__ divide true_divide")
_PRODUCTS = words("matmul __matmul__ mm bmm")
_ADDED_PRODUCTS = words("addmm baddbmm")


@dataclass(frozen=True)
class Term:
    """What a parameter is to a tensor: ``D = left theta right + ...``, or ``factor * theta + ...``.

    Attributes:
        identity: of the parameter.
        lies: a tensor without data whose shape, strides and offset say which of the parameter's
            numbers stands where.
        shape: of the parameter.
        left: ``[rows of D, rows]``, of a stack one for each of its matrices; None for the unit.
        right: ``[columns, columns of D]``, the same.
        factor: a number, or numbers by which each of those of a vector is multiplied.
    """

    identity: int
    lies: Tensor
    shape: torch.Size
    left: Tensor | None = None
    right: Tensor | None = None
    factor: float | Tensor = 1.0

    @property
    def bare(self) -> bool:
        """Whether nothing is multiplied to the parameter."""
        plain = self.left is None and self.right is None
        return plain and not isinstance(self.factor, Tensor) and self.factor == 1

    @property
    def vector(self) -> bool:
        """Whether it is a vector, in one dimension of ``D``."""
        return sum(n > 1 for n in self.lies.shape) <= 1

    def place(self) -> tuple[Part | None, bool] | None:
        """Returns which part of the parameter it is, and whether as its transpose."""
        if self.lies.dim() == 1:
            found = _row(self.lies, self.shape)
            return None if found is None else (found[0], False)
        if self.lies.dim() != 2:
            return None
        for turned, one in ((False, self.lies), (True, self.lies.mT)):
            found = _matrix(one, self.shape)
            if found is not None:
                return found[0], turned
        return None

    def whole(self) -> bool:
        """Whether it is all of the parameter as it is stored, maybe with another shape."""
        same = self.lies.is_contiguous() and self.lies.numel() == self.shape.numel()
        return self.bare and same

    def element(self, number: int) -> Term:
        """Returns what the parameter is to a matrix of a stack."""
        left, right = (None if x is None else x[number] for x in (self.left, self.right))
        return replace(self, lies=self.lies[number], left=left, right=right)


def _row(lies: Tensor, shape: torch.Size) -> tuple[Part | None] | None:
    """Which part of a vector, or row of a table, numbers side by side are."""
    n, start = lies.numel(), int(lies.storage_offset())
    if n > 1 and lies.stride(0) != 1:
        return None
    if len(shape) == 2 and n == shape[1] and start % n == 0:
        return (start // n,)
    if len(shape) != 1 or n == 0 or shape[0] % n or start % n:
        return None
    return (None if n == shape[0] else (start, start + n),)


def _matrix(lies: Tensor, shape: torch.Size) -> tuple[Part | None] | None:
    """Which part of a parameter a matrix is: all, an element of a stack, rows or columns."""
    (rows, columns), start = lies.shape, int(lies.storage_offset())
    down, right = lies.stride(0), lies.stride(1) if columns > 1 else 1
    if lies.numel() == 0 or len(shape) < 2:
        return None
    width = shape[1:].numel()
    beside = right == 1 and (down == columns or rows == 1)
    if (rows, columns) == (shape[0], width) and beside:
        return (None,)
    if len(shape) == 3 and (rows, columns) == shape[1:] and beside and start % width == 0:
        return (start // width,)
    if len(shape) != 2:
        return None
    if columns == width and beside and start % (rows * width) == 0 and shape[0] % rows == 0:
        return ((start // width, start // width + rows),)
    if rows != shape[0] or (down != width and rows > 1) or start >= width or width % columns:
        return None
    if right == 1 and start % columns == 0:
        return ((start, start + columns, 1),)
    return ((start, width, right),) if right * columns == width and start < right else None


Terms = tuple[Term, ...]


class Derived:
    """Follows what is made of parameters and constants alone.

    Args:
        identities: identity of a tensor -> that of the parameter that it stands for.
        rows: says what does not depend on the batch.
    """

    def __init__(self, identities: dict[int, int], rows: TokenRows) -> None:
        self._identity, self._rows = identities, rows
        self._terms = WeakTensorKeyDictionary()
        rules: list[tuple[frozenset[str], Callable[..., Terms | None]]] = [
            (_CASTS, self._cast),
            (_VIEWS | PIECES, self._view),
            (_JOINS, self._join),
            (_SUMS | _DIFFERENCES, self._sum),
            (_SCALES | _QUOTIENTS, self._scale),
            (words("neg negative __neg__"), self._negative),
            (_PRODUCTS, self._multiply),
            (_ADDED_PRODUCTS, self._add_product),
        ]
        self._rules = {name: rule for names, rule in rules for name in names}

    def terms(self, tensor: Any) -> Terms:
        """Returns what parameters are to a tensor; none where it is not made of them alone."""
        if not isinstance(tensor, Tensor):
            return ()
        identity = self._identity.get(id(tensor))
        if identity is None:
            found, has_gradient = self._terms.get(tensor) or ((), False)
            # What a torch.autograd.Function made without a graph has the backward pass of that.
            return found if tensor.requires_grad == has_gradient else ()
        return (Term(identity, torch.empty(tensor.shape, device="meta"), tensor.shape),)

    def forget(self, tensor: Tensor) -> None:
        """Says that a tensor has been changed in place."""
        self._terms.pop(tensor, None)

    def follow(
        self, name: str, func: Callable[..., Any], args: Sequence[Any], kwargs: Any, out: Tensor
    ) -> Terms | None:
        """Notes what an operation makes of what is made of parameters; None where it is no such.

        Args:
            name: of the operation.
            func: the operation.
            args: its arguments, of which one at least is made of parameters.
            kwargs: its arguments by name.
            out: its result.
        """
        rule = self._rules.get(name)
        if rule is None or not args:
            return None
        try:
            found = rule(name, func, args, kwargs, out)
        except (RuntimeError, TypeError, IndexError, ValueError):
            return None  # an unusual form of the operation
        if found and out is not args[0]:
            self._terms[out] = found, out.requires_grad
        return found or None

    def _constant(self, x: Any) -> bool:
        """Whether no parameter has a part in it: what requires a gradient may be made of any."""
        if not isinstance(x, Tensor):
            return True
        return self._rows.of(x) is Fixed.CONSTANT and not x.requires_grad

    def _held(self, c: Any, terms: Terms) -> bool:
        """Whether a factor stays as it is while the parameters of some terms change."""
        own = self.terms(c)
        apart = {t.identity for t in own}.isdisjoint(t.identity for t in terms)
        return self._constant(c) or (len(own) > 0 and apart)

    # ---- rules: an operation and its arguments -> the terms of its result --------------------

    def _cast(self, name: str, func: Any, args: Any, kwargs: Any, out: Tensor) -> Terms | None:
        return self.terms(args[0]) if out.shape == args[0].shape else None

    def _view(self, name: str, func: Any, args: Any, kwargs: Any, out: Tensor) -> Terms | None:
        index = args[1] if name == "__getitem__" else None
        if isinstance(index, Tensor):
            if index.dim() > 0 or index.dtype == torch.bool:
                return None  # a look-up
            args = (args[0], int(index))
        rest = args[1:]
        found = [
            self._viewed(term, args[0], lambda x: func(x, *rest, **kwargs))
            for term in self.terms(args[0])
        ]
        return None if None in found else tuple(t for t in found if t is not None)

    def _viewed(self, term: Term, x: Tensor, view: Callable[[Tensor], Tensor]) -> Term | None:
        if term.left is None and term.right is None:
            lies = view(term.lies)
            if not _shares(lies, term.lies) or 0 in lies.stride():
                return None
            factor = term.factor
            factor = view(factor) if isinstance(factor, Tensor) else factor
            return replace(term, lies=lies, factor=factor)
        blank = torch.empty(x.shape, device="meta")
        made = view(blank)
        if (made.shape, made.stride()) == (blank.shape, blank.stride()):
            return term
        if (made.shape, made.stride()) == (blank.mT.shape, blank.mT.stride()):
            left, right = (None if m is None else m.mT for m in (term.right, term.left))
            return replace(term, lies=term.lies.mT, left=left, right=right)
        if x.dim() == 3 and (made.shape, made.stride()) == (blank[0].shape, blank[0].stride()):
            return term.element(int(made.storage_offset()) // max(blank.stride(0), 1))
        return None

    def _join(self, name: str, func: Any, args: Any, kwargs: Any, out: Tensor) -> Terms | None:
        """Matrices below or beside each other: ``D = sum_i E_i D_i``, ``E_i`` rows of the unit."""
        parts = args[0]
        if out.dim() != 2 or any(x.dim() != 2 for x in parts):
            return None
        axis = next(d for d in (0, 1) if out.shape[1 - d] == parts[0].shape[1 - d])
        unit = torch.eye(out.size(axis), dtype=out.dtype, device=out.device)
        found: list[Term] = []
        for x, place in zip(parts, unit.split([x.size(axis) for x in parts]), strict=True):
            terms = self.terms(x)
            if not terms and not self._constant(x):
                return None
            if any(isinstance(t.factor, Tensor) for t in terms):
                return None
            found += [_placed(term, place, axis) for term in terms]
        return tuple(found)

    def _sum(self, name: str, func: Any, args: Any, kwargs: Any, out: Tensor) -> Terms | None:
        scale = kwargs.get("alpha", 1)
        if len(args) != 2 or set(kwargs) - {"alpha"} or isinstance(scale, Tensor):
            return None
        first, second = 1.0, float(scale)
        if name in _DIFFERENCES:
            turned = name in ("__rsub__", "rsub")
            first, second = (-second, 1.0) if turned else (1.0, -second)
        found: list[Term] = []
        for x, sign in zip(args, (first, second), strict=True):
            terms = self.terms(x)
            if not terms and not self._constant(x):
                return None
            if terms and x.shape != out.shape:
                return None
            found += [_times(term, sign) for term in terms]
        return tuple(found)

    def _negative(self, name: str, func: Any, args: Any, kwargs: Any, out: Tensor) -> Terms | None:
        return tuple(_times(term, -1.0) for term in self.terms(args[0]))

    def _scale(self, name: str, func: Any, args: Any, kwargs: Any, out: Tensor) -> Terms | None:
        """``D * c`` and ``D / c``; a second factor that is made of parameters counts as ``c``."""
        if len(args) != 2 or kwargs:
            return None
        for x, c in (args, args[::-1])[: 1 if name in _QUOTIENTS else 2]:
            terms = self.terms(x)
            if terms and x.shape == out.shape and self._held(c, terms):
                c = c.detach() if isinstance(c, Tensor) else c
                c = 1 / c if name in _QUOTIENTS else c
                found = [_scaled(term, c, out.shape) for term in terms]
                return None if None in found else tuple(t for t in found if t is not None)
        return None

    def _multiply(self, name: str, func: Any, args: Any, kwargs: Any, out: Tensor) -> Terms | None:
        """``X Y``, of matrices or of stacks of as many."""
        if len(args) != 2 or kwargs:
            return None
        return self._product(args[0], args[1], 1.0)

    def _product(self, x: Tensor, y: Tensor, scale: float) -> Terms | None:
        fits = x.dim() == y.dim() and x.dim() in (2, 3) and x.shape[:-2] == y.shape[:-2]
        if not fits or not (self._constant(x) or self.terms(x)):
            return None
        if not (self._constant(y) or self.terms(y)):
            return None
        found = [
            replace(t, right=y.detach() if t.right is None else t.right @ y.detach())
            for t in self.terms(x)
        ]
        found += [
            replace(t, left=x.detach() if t.left is None else x.detach() @ t.left)
            for t in self.terms(y)
        ]
        if any(isinstance(t.factor, Tensor) for t in found):
            return None
        return tuple(_times(term, scale) for term in found)

    def _add_product(
        self, name: str, func: Any, args: Any, kwargs: Any, out: Tensor
    ) -> Terms | None:
        """``beta D + alpha X Y``."""
        added, scales = args[0], [kwargs.get(k, 1) for k in ("beta", "alpha")]
        known = self._constant(added) or self.terms(added)
        if len(args) != 3 or not known or any(isinstance(s, Tensor) for s in scales):
            return None
        product = self._product(args[1], args[2], float(scales[1]))
        terms = self.terms(added)
        if product is None or (terms and added.shape != out.shape):
            return None
        return (*(_times(term, float(scales[0])) for term in terms), *product)


def _shares(view: Tensor, whole: Tensor) -> bool:
    """Whether a tensor without data is a view of another."""
    base = whole if whole._base is None else whole._base
    return view is whole or view._base is base


def _placed(term: Term, rows: Tensor, axis: int) -> Term:
    """A term of a matrix that stands at these rows of the unit in a larger one."""
    if axis == 0:
        return replace(term, left=rows.mT if term.left is None else rows.mT @ term.left)
    return replace(term, right=rows if term.right is None else term.right @ rows)


def _times(term: Term, number: float) -> Term:
    return replace(term, factor=term.factor * number)


def _scaled(term: Term, c: Any, shape: torch.Size) -> Term | None:
    """A term that is multiplied by a constant, position by position, as far as it stays one."""
    if not isinstance(c, Tensor):
        return _times(term, float(c))
    if c.numel() == 1 and c.dim() <= len(shape):
        return _times(term, float(c))
    if term.vector and term.left is None and term.right is None:
        return replace(term, factor=(term.factor * c).expand(shape))
    if isinstance(term.factor, Tensor) or len(shape) != 2:
        return None
    wide = c.expand(shape[-2:]) if c.dim() <= 2 else c
    if c.dim() == 2 and c.size(-1) == 1:  # by row
        left = torch.diag(wide[:, 0]) if term.left is None else wide[:, :1] * term.left
        return replace(term, left=left)
    if c.dim() == 1 or c.size(-2) == 1:  # by column
        right = torch.diag(wide[0]) if term.right is None else term.right * wide[:1]
        return replace(term, right=right)
    return None


def stack_of(term: Term) -> list[tuple[Part, bool, Term]] | None:
    """Returns the matrices of a stack: part of the parameter, whether transposed, term.

    None where they are not parts of one kind that the parameter consists of.
    """
    if term.lies.dim() != 3:
        return None
    found: list[tuple[Part, bool, Term]] = []
    for number in range(len(term.lies)):
        one = term.element(number)
        place = one.place()
        if place is None or place[0] is None:
            return None
        found.append((place[0], place[1], one))
    alike = {(turned, form_of(f"w{part_text(part)}")) for part, turned, _ in found}
    return found if len(alike) == 1 else None
