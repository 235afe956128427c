"""The passes of a training loop, from which factors are made where they are due.

Hooks on the model watch its forward passes; the caller's own backward pass leaves the token
gradients behind, and the step makes factors of them. What a loss was multiplied by before it was
differentiated (one over the labels, over micro-batches, the scale of mixed precision) is read off
the gradient at the logits, which is the likelihood's own times that number.
"""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fisher_lab.curvature.errors import CurvatureError
from fisher_lab.curvature.kfac.capture import Capture
from fisher_lab.curvature.kfac.own_pass import OwnPass, OwnRefresh, why_not
from fisher_lab.curvature.likelihoods import Likelihood, Scored
from fisher_lab.curvature.losses import (
    LossFunction,
    SummedLoss,
    labels_of,
    likelihood_of,
    logits_of,
    prepare,
    summed_loss,
)
from fisher_lab.curvature.wrappers import unwrap
from fisher_lab.optim.divided import DividedOptimizer

log = logging.getLogger(__name__)

UNLIKE = 1e-3
"""Relative difference of weights, and of a gradient from the likelihood's own, that is one."""

UNLIKE_16_BITS = 3e-2
"""The same where the gradient has 16 bits."""


class _Hook:
    """A hook on a model that keeps nothing alive; a copy of the model goes without it."""

    def __init__(self, method: weakref.WeakMethod | None) -> None:
        self._method = method

    def __call__(self, *args: Any) -> None:
        if torch.compiler.is_compiling() or self._method is None:
            return
        method = self._method()
        if method is not None:
            method(*args)

    def __deepcopy__(self, _memo: object) -> _Hook:
        return _Hook(None)

    def __reduce__(self) -> tuple[type[_Hook], tuple[None]]:
        return _Hook, (None,)


class _Weighing:
    """Finds what a loss was multiplied by, as its gradient comes to the logits.

    Attributes:
        scored: logits and targets, without a graph.
        weight: what was found; 0 where no label counts; None as long as no gradient has come.
        problem: why nothing was found, or "".
    """

    def __init__(self, likelihood: Likelihood, logits: Tensor, batch: Any) -> None:
        self._likelihood, self._batch = likelihood, batch
        self._logits = logits.detach()
        self.scored: Scored = likelihood.score(self._logits, batch)
        self.weight: float | None = None
        self.problem = ""

    def __call__(self, grad: Tensor) -> None:
        with torch.enable_grad():
            x = self._logits.clone().requires_grad_()
            loss = summed_loss(self._likelihood.score(x, self._batch))
            (own,) = torch.autograd.grad(loss, x)
        own, given = own.double().flatten(), grad.double().flatten()
        size = float(own @ own)
        self.weight, self.problem = float(given @ own) / size if size else 0.0, ""
        off = float((given - self.weight * own).norm())
        most = UNLIKE_16_BITS if grad.element_size() < 4 else UNLIKE
        if not off <= most * float(given.norm()):
            self.problem = (
                f"the gradient at the logits is not that of the {self._likelihood.name} of these "
                "labels"
            )


@dataclass
class _Recorded:
    """A forward pass, with what its backward pass left.

    Attributes:
        batch: prepared.
        loss: the caller's, or None.
        own: what was recorded; None where passes of the engine's own are needed.
        logits: of the pass.
        weighing: of its loss; None before the forward pass has ended.
        problem: why it cannot be used as it is, or "".
    """

    batch: Any
    loss: LossFunction | None
    own: OwnPass | None
    logits: Tensor | None = None
    weighing: _Weighing | None = None
    problem: str = ""

    @property
    def arrived(self) -> bool:
        """Whether the backward pass has been made."""
        return self.weighing is not None and self.weighing.weight is not None


class Recorder:
    """Records the forward passes of an optimizer's model, where factors are due.

    Args:
        optimizer: that gets the factors.
    """

    def __init__(self, optimizer: DividedOptimizer) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._passes: list[_Recorded] = []
        self._open: _Recorded | None = None
        self._failed: OwnPass | None = None
        self._given: tuple[Any, LossFunction | None] | None = None
        self._busy = False
        begin, end = _Hook(weakref.WeakMethod(self._begin)), _Hook(weakref.WeakMethod(self._end))
        self._handles = [
            optimizer.model.register_forward_pre_hook(begin, with_kwargs=True),
            optimizer.model.register_forward_hook(end, always_call=True),
        ]
        weakref.finalize(self, _remove, self._handles)

    @contextmanager
    def given(self, batch: Any, loss: LossFunction | None) -> Iterator[None]:
        """Says of what batch, and by what loss, the passes inside are."""
        self._given = batch, loss
        try:
            yield
        finally:
            self._given = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Records nothing."""
        before, self._busy = self._busy, True
        try:
            yield
        finally:
            self._busy = before

    def forget_arrived(self) -> None:
        """Drops passes of a step that was not made (an overflow of float16)."""
        self._passes = [one for one in self._passes if not one.arrived]

    # ---- the forward pass --------------------------------------------------------------------

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        optimizer = self._optimizer()
        if optimizer is None or self._busy or Capture.running or not torch.is_grad_enabled():
            return
        if self._open is not None or not optimizer.refresh_due or _transformed():
            return
        if self._failed is not None:
            self._failed.capture.close()
            self._failed = None
        batch, loss = self._given or (_bound(module, args, kwargs), None)
        if labels_of(batch) is None:
            return
        with self.paused():
            batch = prepare(optimizer.model, batch, loss, measure=True)
        if why_not(optimizer.kfac):
            self._open = _Recorded(batch, loss, None)
            return
        self._open = _Recorded(batch, loss, OwnPass(optimizer.model, optimizer.kfac))
        known = set(module._forward_pre_hooks)
        assert self._open.own is not None
        self._open.own.__enter__()
        # Hooks that are new on the module whose hooks are being called are not called by it.
        for key, hook in list(module._forward_pre_hooks.items()):
            if key not in known and key in module._forward_pre_hooks_with_kwargs:
                hook(module, args, kwargs)
            elif key not in known:
                hook(module, args)

    def _end(self, _module: nn.Module, _args: object, output: Any) -> None:
        one, optimizer = self._open, self._optimizer()
        self._open = None
        if one is None or optimizer is None:
            return
        if output is None:  # the pass ended in an error, and the hooks are being called
            self._failed = one.own
            if one.own is not None:
                one.own.pause()
            return
        if one.own is not None:
            one.own.__exit__(None, None, None)
        try:
            one.logits = logits_of(output)
            with self.paused():
                likelihood = likelihood_of(optimizer.model, one.loss)
                one.weighing = _Weighing(likelihood, one.logits, one.batch)
        except CurvatureError as error:
            one.problem = str(error)
        if one.logits is not None and one.logits.requires_grad and one.weighing is not None:
            one.logits.register_hook(one.weighing)
            self._passes.append(one)

    # ---- the factors -------------------------------------------------------------------------

    def refresh(self, optimizer: DividedOptimizer) -> bool:
        """Makes factors of the passes of this step; collective. Returns whether there were any.

        Raises:
            CurvatureError: the passes cannot be used, or the ranks weigh their labels differently.
        """
        ready, self._passes = [one for one in self._passes if one.arrived], []
        problem = why_not(optimizer.kfac)
        weights, labels = [], 0
        for one in ready:
            assert one.weighing is not None
            problem = problem or one.weighing.problem
            weights += [one.weighing.weight] if one.weighing.weight else []
            labels += one.weighing.scored.n_labels
        own = OwnRefresh(optimizer.model, optimizer.kfac)
        every = optimizer.kfac.communicator.all_gather_objects(
            [len(ready), problem, weights, labels]
        )
        if not any(row[0] for row in every):
            return False
        _check_weights(optimizer, [row[2] for row in every], [row[3] for row in every])
        problem = next((row[1] for row in every if row[1]), "")
        if problem:
            _say(optimizer, problem, "factors need a pass of their own: " + problem)
            batches = [one.batch for one in ready]
            optimizer.refresh(batches, ready[0].loss if ready else None)
            return True
        for one in ready:
            assert one.weighing is not None
            assert one.own is not None
            scored = one.weighing.scored
            about = f"of the {scored.likelihood.name}"
            loss = SummedLoss(summed_loss(scored), scored.n_labels, scored, one.logits, about)
            own.add(one.own, one.batch, loss, one.weighing.weight or 1.0)
        optimizer.refresh_from(own)
        return True


def _check_weights(
    optimizer: DividedOptimizer, every: list[list[float]], labels: list[int]
) -> None:
    """Compares what a label weighs in the gradient, over the ranks and over micro-batches.

    Args:
        optimizer: for what it has said already.
        every: weights of the micro-batches of each rank.
        labels: of each rank.

    Raises:
        CurvatureError: ranks differ.
    """
    means = [sum(found) / len(found) for found in every if found]
    if 0 in labels and sum(labels) > 0:  # the ranks' mean counts a rank without a label as one
        expected = len(labels) / sum(labels)
        if any(abs(mean - expected) > UNLIKE * expected for mean in means):
            raise CurvatureError(
                f"loss: rank {labels.index(0)} has no label, and a label of the others weighs "
                f"{means[0]:.4g}; allowed: {expected:.4g}, the ranks over all labels (multiply "
                "each rank's summed loss by that)"
            )
    if means and max(means) - min(means) > UNLIKE * max(map(abs, means)):
        shown = ", ".join(f"{mean:.4g}" for mean in means)
        raise CurvatureError(
            f"loss: a label weighs {shown} on the ranks, so that the gradient is not that of the "
            "mean over all labels; allowed: the same weight (multiply each rank's mean loss by its "
            "labels times the ranks over all labels)"
        )
    own = [weight for found in every for weight in found]
    if own and max(own) - min(own) > UNLIKE * max(map(abs, own)):
        _say(
            optimizer, "weights", "the labels of the micro-batches weigh differently in the "
            "gradient; in the factors they weigh the same",
        )  # fmt: skip


def _say(optimizer: DividedOptimizer, key: str, text: str) -> None:
    if optimizer.says_for_the_first_time(key):
        log.warning("%s", text)


def _bound(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """What a forward pass was given, by the names of its arguments."""
    forward = type(unwrap(module)).forward
    try:
        found = inspect.signature(forward).bind_partial(module, *args, **kwargs).arguments
    except TypeError:
        return dict(kwargs)
    found.pop(next(iter(inspect.signature(forward).parameters)), None)
    for name in ("kwargs", "args"):
        more = found.pop(name, None)
        found |= more if isinstance(more, dict) else {}
    return {name: value for name, value in found.items() if value is not None}


def _transformed() -> bool:
    """Whether the pass is inside a transform of ``torch.func``."""
    return torch._C._functorch.peek_interpreter_stack() is not None  # type: ignore[reportAttributeAccessIssue]


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
