"""Matrix-free products with the empirical Fisher, the true Fisher and the Hessian.

All three belong to the *mean* loss over the ``N`` labelled tokens of the batches:

- ``empirical``: ``F v = (1/N) J^T J v``, ``J`` the labelled tokens' own gradients;
- ``true``: ``(1/N) sum_n Z_n^T (diag(p_n) - p_n p_n^T) Z_n v``, ``Z_n`` the Jacobian of the token's
  logits (for a softmax the true Fisher is the generalised Gauss-Newton matrix);
- ``hessian``: the second derivative itself.

Both Fisher matrices are ``(1/N) B^T B`` with ``B`` ``[rows, n]``: ``B = J`` (a row for each token
with a label), and ``B_n = (diag(p_n)^(1/2) - p_n^(1/2) p_n^T) Z_n`` (one for each such token and
class). Their nonzero eigenvalues are those of ``(1/N) B B^T``, which is the smaller matrix where
``rows < n`` (:class:`RowOperator`).

The forward pass is made once and its graph kept; a product is a Jacobian-vector pass without graph
and a vector-Jacobian pass (Fisher), or one second backward pass (Hessian). Vectors are flat,
``[n]``, the parameters' elements in the order of ``named_parameters()``. On several ranks each has
batches of its own and computes their part of every product. Rank 0 runs the algorithm and
broadcasts the vector of each product; the others answer with their part until it is done.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.func import functional_call

from fisher_lab.config.spectra import OPERATORS, PRODUCTS
from fisher_lab.curvature import losses
from fisher_lab.curvature.collectives import (
    Alone,
    Communicator,
    raise_others,
    same_everywhere,
    together,
)
from fisher_lab.curvature.errors import BatchError, CurvatureError, check_one_of
from fisher_lab.curvature.preparation import agreed
from fisher_lab.curvature.spectra.samples import as_batches

_PRODUCT, _BY_ROWS, _TO_ROWS = 1, 2, 3
"""What is asked of the ranks: ``B^T B v``, ``B B^T u``, ``B v``."""


class _OnBatch(nn.Module):
    """A model as a function of a whole batch, for ``functional_call``."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, batch: Any) -> Any:
        return losses.forward(self.inner, batch)


def in_float64(model: nn.Module, batch: Any) -> tuple[nn.Module, list[Any]]:
    """Returns a copy of a model, and its batches, with every floating tensor in float64.

    Tensors that a forward pass itself casts to float32 stay what it makes of them.

    Args:
        model: without wrappers.
        batch: one batch or an iterable of batches.
    """

    def wide(x: Tensor) -> Tensor:
        return x.double() if x.is_floating_point() else x

    batches = [losses.map_tensors(wide, one) for one in as_batches(batch)]
    return copy.deepcopy(model).double(), batches


class CurvatureOperator:
    """A symmetric matrix that is known by its products.

    Args:
        name: ``empirical``, ``true`` or ``hessian``.
        model: any module whose labelling is known, or any with a ``loss_fn``; in the mode it is to
            be evaluated in, with attention that has the derivatives needed
            (:func:`fisher_lab.curvature.evaluation_mode.isolated`).
        batch: one batch or an iterable of batches; on several ranks this rank's own.
        parameters: the block, by name.
        loss_fn: as for :func:`fisher_lab.curvature.losses.score`.
        communicator: of the ranks whose batches are joined; None for this process alone. On
            several ranks products are made within :meth:`drive` alone.
        products: how ``J v`` is formed. ``double_backward`` keeps the graph of the backward pass
            as well and is the fastest; ``forward`` (forward mode, without a graph) makes the
            forward pass again each time and keeps less; ``auto`` is ``double_backward``, and
            ``forward`` where an operation has no second derivative.

    Attributes:
        n: number of elements, ``n``.
        n_labels: ``N``, of all ranks.
        n_rows: rows of ``B``, of all ranks; 0 for the Hessian.
        rank: an upper bound of the matrix's rank: ``N``, ``N (C - 1)`` for ``C`` classes, or ``n``.
        products: the way asked for.
        used: the way in use.

    Raises:
        CurvatureError: the operator or the way has another name; ranks have other parameters.
        BatchError: no label counts on any rank.
        RankError: another rank has an error.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        batch: Any,
        parameters: Mapping[str, nn.Parameter],
        *,
        loss_fn: losses.LossFunction | None = None,
        products: str = "auto",
        communicator: Communicator | None = None,
    ) -> None:
        check_one_of("operator", name, OPERATORS)
        check_one_of("products", products, PRODUCTS)
        self.name, self.products = name, products
        self.used = "forward" if products == "forward" else "double_backward"
        self._model, self._wrapped = model, _OnBatch(model)
        self._names, self._parameters = list(parameters), list(parameters.values())
        self._sizes = [p.numel() for p in self._parameters]
        self.n = sum(self._sizes)
        self.dtype, self.device = self._parameters[0].dtype, self._parameters[0].device
        self._ranks = communicator or Alone()
        shapes = [[name, list(p.shape)] for name, p in parameters.items()]
        same_everywhere(self._ranks, "operator and parameters", [name, shapes])
        self._parts: list[_Part] = []
        batches: list[Any] = []
        together(self._ranks, lambda: batches.extend(as_batches(batch)))
        agreed(model, batches, self._ranks, loss_fn)
        together(self._ranks, lambda: self._open(batches, loss_fn))
        own = [[part.index, part.n_rows, part.n_labels, part.rank] for part in self._parts]
        by_rank = self._ranks.all_gather_objects(own)
        self.n_labels = sum(labels for parts in by_rank for _, _, labels, _ in parts)
        if self.n_labels == 0:
            raise BatchError("batch: no label counts; a product needs at least one")
        self.n_rows = self._number_rows(by_rank)
        bound = sum(rank for parts in by_rank for *_, rank in parts)
        self.rank = self.n if name == "hessian" else min(self.n, bound)
        self._all_failed = False

    def _open(self, batches: Sequence[Any], loss_fn: losses.LossFunction | None) -> None:
        alone = self._ranks.size == 1
        for index, one in enumerate(batches):
            if losses.is_empty(one):
                continue
            prepared = losses.prepare(self._model, one, loss_fn, measure=alone)
            self._scorer = losses.scorer(self._model, loss_fn)
            part = _Part(self, prepared, index)
            if part.n_labels > 0:
                self._parts.append(part)

    def _number_rows(self, by_rank: list[list[list[int]]]) -> int:
        """Gives every part its first row, and returns how many there are.

        By batches and then by ranks: one process that has the whole batches counts the same way.
        """
        start, starts = 0, {}
        keys = [
            (index, rank, place, count)
            for rank, parts in enumerate(by_rank)
            for place, (index, count, *_) in enumerate(parts)
        ]
        for _, rank, place, count in sorted(keys):
            starts[rank, place] = start
            start += count
        for place, part in enumerate(self._parts):
            part.first_row = starts[self._ranks.rank, place]
        return start

    def __call__(self, vector: Tensor) -> Tensor:
        """Returns the product with a flat vector, on the vector's device and in its dtype.

        Raises:
            RankError: another rank has an error.
        """
        total = self._answered(_PRODUCT, vector)
        return (total / self.n_labels).to(device=vector.device, dtype=vector.dtype)

    def _answered(self, kind: int, vector: Tensor) -> Tensor:
        """All ranks' answer to a vector, on the operator's device and in its dtype."""
        here = vector.to(device=self.device, dtype=self.dtype)
        if self._ranks.size > 1:
            message = here.new_zeros(self.n + 1)
            message[: len(here)], message[-1] = here, kind
            self._ranks.broadcast(message, 0)
        return self._answer(kind, here)

    def _answer(self, kind: int, vector: Tensor) -> Tensor:
        """This rank's share of the answer, and of adding up what all have."""
        if kind == _PRODUCT:
            return self._sum(self.n, lambda: self._own_part(vector))
        if kind == _BY_ROWS:
            rows = vector[: self.n_rows]
            vector = self._sum(self.n, lambda: self._own_pull(rows))
        return self._sum(self.n_rows, lambda: self._own_push(vector))

    def _own_pull(self, rows: Tensor) -> Tensor:
        """This rank's part of ``B^T u``."""
        total = torch.zeros(self.n, dtype=self.dtype, device=self.device)
        for part in self._parts:
            total += self._flatten(part.pull_rows(rows[part.first_row :][: part.n_rows]))
        return total

    def _own_push(self, vector: Tensor) -> Tensor:
        """This rank's rows of ``B v``, zeros for those of the others."""
        tangents = list(self.unflatten(vector).values())
        total = torch.zeros(self.n_rows, dtype=self.dtype, device=self.device)
        for part in self._parts:
            total[part.first_row :][: part.n_rows] = part.push_rows(tangents)
        return total

    def _own_part(self, vector: Tensor) -> Tensor:
        """The part of the product that belongs to this rank's samples, not yet divided by ``N``."""
        tangents = list(self.unflatten(vector).values())
        total = torch.zeros(self.n, dtype=self.dtype, device=self.device)
        for part in self._parts:
            total += part.product(tangents)
        return total

    def drive(self, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Does work that makes products; collective: rank 0 does it, all compute the products.

        Args:
            work: makes products; its result is plain values that JSON can hold.

        Returns:
            The result, on every rank.

        Raises:
            RankError: another rank has an error.
        """
        ranks = self._ranks
        if ranks.size == 1:
            return work()
        nothing = torch.zeros(self.n + 1, dtype=self.dtype, device=self.device)
        if ranks.rank > 0:
            # The last element says what is to be done, 0 that there is nothing more.
            while kind := int((message := ranks.broadcast(nothing.clone(), 0))[-1]):
                self._answer(kind, message[:-1])
            error, result = ranks.all_gather_objects(None)[0]
            raise_others([error])
            return result
        try:
            result = work()
        except Exception as error:
            if not self._all_failed:  # otherwise all ranks know already
                ranks.broadcast(nothing, 0)
                ranks.all_gather_objects([f"{type(error).__name__}: {error}", None])
            raise
        ranks.broadcast(nothing, 0)
        ranks.all_gather_objects([None, result])
        return result

    def _sum(self, size: int, part: Callable[[], Tensor]) -> Tensor:
        """The sum of all ranks' parts; the last element sent counts those that have an error."""
        if self._ranks.size == 1:
            return part()
        total = torch.zeros(size + 1, dtype=self.dtype, device=self.device)
        own: Exception | None = None
        try:
            total[:-1] = part()
        except Exception as error:
            own = error
            total[-1] = 1
        total = self._ranks.all_reduce(total)
        if bool(total[-1]):
            self._all_failed = True
            text = None if own is None else f"{type(own).__name__}: {own}"
            errors = self._ranks.all_gather_objects(text)
            if own is not None:
                raise own
            raise_others(errors)
        return total[:-1]

    def unflatten(self, vectors: Tensor) -> dict[str, Tensor]:
        """Cuts ``[..., n]`` into parameters, ``[..., *shape]``."""
        parts = vectors.split(self._sizes, dim=-1)
        return {
            name: part.reshape(*vectors.shape[:-1], *parameter.shape)
            for name, part, parameter in zip(self._names, parts, self._parameters, strict=True)
        }

    def flatten(self, named: Mapping[str, Tensor]) -> Tensor:
        """Joins a tensor for each parameter to ``[n]``.

        Raises:
            CurvatureError: one is missing or of another shape; further ones are left out.
        """
        parts = []
        for name, parameter in zip(self._names, self._parameters, strict=True):
            part = named.get(name)
            if part is None or part.shape != parameter.shape:
                given = "none" if part is None else f"shape {list(part.shape)}"
                allowed = list(parameter.shape)
                raise CurvatureError(f"vector: {name}: {given}; allowed: shape {allowed}")
            parts.append(part.detach().flatten())
        return torch.cat(parts)

    def _flatten(self, grads: tuple[Tensor | None, ...]) -> Tensor:
        return torch.cat(
            [
                torch.zeros_like(p).flatten() if g is None else g.flatten()
                for g, p in zip(grads, self._parameters, strict=True)
            ]
        )


class RowOperator:
    """``(1/N) B B^T``, ``[rows, rows]``: the nonzero eigenvalues of ``(1/N) B^T B``.

    A vector has an element for every row of ``B``: by batches, then by ranks, then as the labelled
    tokens (and their classes) follow each other.

    Args:
        operator: a Fisher matrix; on several ranks products are made within its
            :meth:`CurvatureOperator.drive`.

    Attributes:
        n: number of rows.
        n_products: products that were made.
    """

    def __init__(self, operator: CurvatureOperator) -> None:
        check_one_of("operator", operator.name, ("empirical", "true"))
        self.operator, self.n, self.n_products = operator, operator.n_rows, 0

    def __call__(self, rows: Tensor) -> Tensor:
        """Returns the product with ``[rows]``, on the vector's device and in its dtype."""
        self.n_products += 1
        return self._scaled(_BY_ROWS, rows, 1 / self.operator.n_labels)

    def images(self, vectors: Tensor) -> Tensor:
        """Returns ``N^(-1/2) B v`` of vectors ``[k, n]`` of parameters: ``[k, rows]``.

        An eigenvector of ``(1/N) B^T B`` becomes one of ``(1/N) B B^T``, times the root of the
        eigenvalue.
        """
        scale = self.operator.n_labels**-0.5
        found = [self._scaled(_TO_ROWS, vector, scale) for vector in vectors]
        return torch.stack(found) if found else vectors.new_empty(0, self.n)

    def _scaled(self, kind: int, vector: Tensor, scale: float) -> Tensor:
        found = self.operator._answered(kind, vector)
        return found.to(device=vector.device, dtype=vector.dtype) * scale


class _Part:
    """One batch's part of an operator, not yet divided by ``N``."""

    def __init__(self, operator: CurvatureOperator, batch: Any, index: int) -> None:
        self._operator, self._batch, self.index = operator, batch, index
        scored = operator._scorer.score(losses.forward(operator._model, batch), batch)
        self.n_labels = scored.n_labels
        self.first_row = self.n_rows = self.rank = 0
        self._cotangent: Tensor | None = None
        self._pulled: tuple[Tensor | None, ...] = ()
        self._adjoint = False
        if self.n_labels == 0:
            return
        self._probabilities = torch.softmax(scored.logits.detach(), dim=-1)
        match operator.name:
            case "true":
                self._output = scored.logits
            case "empirical":
                self._output = losses.token_losses(scored)
            case _:
                self._output = losses.token_losses(scored).sum()
                self._pulled = self._pull(self._output, None, create_graph=True)
                return
        self.n_rows = self._output.numel()
        # The gradients that a softmax gives a token lie in C - 1 dimensions.
        self.rank = self.n_rows - (self.n_labels if operator.name == "true" else 0)

    def _pull(
        self, output: Tensor, cotangent: Tensor | None, *, create_graph: bool = False
    ) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(
            output,
            self._operator._parameters,
            cotangent,
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
        )

    def product(self, tangents: list[Tensor]) -> Tensor:
        operator = self._operator
        if operator.name == "hessian":
            return operator._flatten(self._second(self._pulled, operator._parameters, tangents))
        pushed = weighted = self._pushed(tangents)
        if operator.name == "true":
            p = self._probabilities
            weighted = p * pushed - p * (p * pushed).sum(-1, keepdim=True)
        return operator._flatten(self._pull(self._output, weighted))

    def _pushed(self, tangents: list[Tensor]) -> Tensor:
        """``J v``, checked the first time."""
        pushed = self._push(tangents)
        if self._operator.used == "double_backward" and not self._adjoint:
            # <J^T u, v> = <u, J v>, u = J v. An operation that can be differentiated only once
            # drops out of the second pass without a word; here it shows, also where all of J v is
            # zero by this fault: u is 1, 2, 3, ... then.
            cotangent = pushed
            if not bool(pushed.any()):
                cotangent = torch.ones_like(pushed).flatten().cumsum(0).view_as(pushed)
            grads = self._pull(self._output, cotangent)
            self._adjoint = _agree(grads, tangents, cotangent, pushed)
            if not self._adjoint:
                self._give_up("J v and J^T u do not belong together")
                return self._pushed(tangents)
        return pushed

    def push_rows(self, tangents: list[Tensor]) -> Tensor:
        """The part's rows of ``B v``."""
        pushed = self._pushed(tangents)
        if self._operator.name == "true":
            p = self._probabilities
            pushed = p.sqrt() * (pushed - (p * pushed).sum(-1, keepdim=True))
        return pushed.flatten()

    def pull_rows(self, rows: Tensor) -> tuple[Tensor | None, ...]:
        """The part of ``B^T u`` that its own rows ``u`` give."""
        cotangent = rows.view_as(self._output).to(self._output.dtype)
        if self._operator.name == "true":
            p = self._probabilities
            rooted = p.sqrt() * cotangent
            cotangent = rooted - p * rooted.sum(-1, keepdim=True)
        return self._pull(self._output, cotangent)

    def _push(self, tangents: list[Tensor]) -> Tensor:
        if self._operator.used == "double_backward":
            try:
                return self._push_double_backward(tangents)
            except (RuntimeError, NotImplementedError) as error:
                # "derivative for ... is not implemented", "trying to differentiate twice ...".
                if not any(k in str(error) for k in ("not implemented", "differentiate twice")):
                    raise
                self._give_up(str(error).splitlines()[0])
        return self._push_forward(tangents)

    def _give_up(self, reason: str) -> None:
        """Leaves double backward for forward mode, where that is allowed.

        Raises:
            CurvatureError: double backward was asked for by name.
        """
        if self._operator.products != "auto":
            raise CurvatureError(f"products: 'double_backward' does not work here: {reason}")
        self._operator.used = "forward"

    def _push_forward(self, tangents: list[Tensor]) -> Tensor:
        """``J v`` by forward-mode differentiation, without a graph."""
        operator = self._operator
        with torch.no_grad(), forward_ad.dual_level():
            duals = {
                f"inner.{name}": forward_ad.make_dual(p.detach(), t)
                for name, p, t in zip(operator._names, operator._parameters, tangents, strict=True)
            }
            outputs = functional_call(operator._wrapped, duals, (self._batch,))
            scored = operator._scorer.score(outputs, self._batch)
            found = scored.logits if operator.name == "true" else losses.token_losses(scored)
            tangent = forward_ad.unpack_dual(found).tangent
        return torch.zeros_like(self._output) if tangent is None else tangent.detach()

    def _push_double_backward(self, tangents: list[Tensor]) -> Tensor:
        """``J v`` as the derivative of ``u -> <J^T u, v>``, whose graph is kept."""
        if self._cotangent is None:
            self._cotangent = torch.zeros_like(self._output, requires_grad=True)
            self._pulled = self._pull(self._output, self._cotangent, create_graph=True)
        (pushed,) = self._second(self._pulled, [self._cotangent], tangents)
        return torch.zeros_like(self._output) if pushed is None else pushed

    @staticmethod
    def _second(
        pulled: tuple[Tensor | None, ...], inputs: list[Any], tangents: list[Tensor]
    ) -> tuple[Tensor | None, ...]:
        pairs = [
            (g, t)
            for g, t in zip(pulled, tangents, strict=True)
            if g is not None and g.requires_grad
        ]
        if not pairs:
            return (None,) * len(inputs)
        return torch.autograd.grad(
            [g for g, _ in pairs],
            inputs,
            [t for _, t in pairs],
            retain_graph=True,
            allow_unused=True,
        )


def _agree(
    grads: tuple[Tensor | None, ...], tangents: list[Tensor], cotangent: Tensor, pushed: Tensor
) -> bool:
    """Whether ``<J^T u, v> = <u, J v>`` up to rounding."""
    pairs = [(g, t) for g, t in zip(grads, tangents, strict=True) if g is not None]
    left = sum(float((g * t).sum()) for g, t in pairs)
    size = sum(float((g * t).double().square().sum()) for g, t in pairs) ** 0.5
    right = float((cotangent * pushed).sum())
    bound = 1e-3 if pushed.dtype in (torch.float32, torch.float64) else 5e-2
    scale = float(cotangent.norm() * pushed.norm())
    return abs(left - right) <= bound * scale + 1e2 * torch.finfo(pushed.dtype).eps * size
