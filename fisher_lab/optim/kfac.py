"""``KFACOptimizer``: a ``torch.optim.Optimizer`` that steps along K-FAC's natural gradient.

Formulas: ``docs/math.md``, sections 1, 2 and 9; Martens & Grosse 2015. **Factors are not averaged
over time**, unlike in other K-FAC libraries: each refresh computes them from its own batches, and
they are used until the next one. A damping and a batch size that were tuned for a running average
do not carry over.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from fisher_lab.config.errors import SettingError
from fisher_lab.config.fields import Allowed, at_least, fraction, null, one_of, whole
from fisher_lab.config.kfac import require
from fisher_lab.curvature import wrappers
from fisher_lab.curvature.collectives import Alone, Communicator
from fisher_lab.curvature.errors import CurvatureError
from fisher_lab.curvature.kfac.engine import KFACNaturalGradient
from fisher_lab.curvature.kfac.parts import base_of
from fisher_lab.curvature.losses import LossFunction
from fisher_lab.curvature.wrappers import unwrap

log = logging.getLogger(__name__)

COVERED, REST = 0, 1
"""Indices of the two parameter groups."""

ClipName = Literal["unit", "kl", "trust", "none"]


@dataclass(frozen=True, kw_only=True)
class Clipping:
    """A bound on the length of a step: on the predicted change of the model's distribution.

    The divergence between the predictions before and after a step ``d`` is, to second order,
    ``KL = d^T F d / 2`` nats per label, with ``F`` the Fisher matrix of the mean loss.

    Attributes:
        kind: ``unit`` scales the natural gradient to length 1 in the damped metric, so that the
            predicted divergence of a step is ``lr^2 / 2`` for every gradient (the step of a trust
            region with radius ``lr``). ``kl`` bounds the natural gradient of this batch, before
            momentum, with ``d^T F d`` estimated by ``lr^2 <g, u>`` (Ba, Grosse & Martens 2017,
            section 5: it costs nothing, and is an upper bound because it contains the damping).
            ``trust`` bounds the whole step with its momentum by K-FAC's own Fisher-vector product
            (one more product per step). ``none`` bounds nothing.
        limit: largest ``d^T F d / 2``, in nats per label.
    """

    kind: ClipName = "kl"
    limit: float = 1e-3

    def __post_init__(self) -> None:
        require("clip", self.kind, one_of("unit", "kl", "trust", "none"), str)
        require("clip_limit", self.limit, at_least(0))

    def scale(self, quadratic: float) -> float:
        """The factor, at most 1, by which a step with this ``d^T F d`` is shortened.

        With ``unit``: the factor that gives it the length 1.
        """
        if self.kind == "none" or quadratic <= 0.0:
            return 1.0
        if self.kind == "unit":
            return 1.0 / math.sqrt(quadratic)
        return min(1.0, math.sqrt(2.0 * self.limit / quadratic))


class DampingSchedule(Protocol):
    """Chooses the multiplier of the dampings of both factors; it starts at 1."""

    wants_ratio: bool
    """Whether the schedule needs the reduction ratio, which costs a forward pass."""

    def update(self, multiplier: float, ratio: float) -> float:
        """The next multiplier.

        Args:
            multiplier: the multiplier of the last steps.
            ratio: actual over predicted change of the loss; not finite if it is unknown.
        """
        ...


@dataclass(frozen=True)
class ConstantDamping:
    """The damping does not change."""

    wants_ratio = False

    def update(self, multiplier: float, ratio: float) -> float:
        """Returns the same multiplier."""
        return multiplier


@dataclass(frozen=True, kw_only=True)
class LevenbergMarquardt:
    """More damping after steps for which the quadratic model predicted too much, else less.

    Martens & Grosse 2015, section 6.5: the multiplier grows when the reduction ratio is below
    ``low`` and shrinks when it is above ``high``. NaN and minus infinity count as low.

    Attributes:
        factor: divides or multiplies the multiplier, between 0 and 1.
        low: ratios below it increase the damping.
        high: ratios above it decrease the damping.
        smallest: lower bound of the multiplier.
        largest: upper bound of the multiplier.
    """

    factor: float = 0.77
    low: float = 0.25
    high: float = 0.75
    smallest: float = 1e-3
    largest: float = 1e6

    wants_ratio = True

    def __post_init__(self) -> None:
        require("lm_factor", self.factor, fraction())
        below = Allowed(f"a number from 0 to {self.high:g}", lambda low: 0.0 <= low <= self.high)
        require("lm_low", self.low, below)

    def update(self, multiplier: float, ratio: float) -> float:
        """Returns the next multiplier, as `DampingSchedule` says."""
        if ratio > self.high:
            return max(multiplier * self.factor, self.smallest)
        if ratio >= self.low:
            return multiplier
        return min(multiplier / self.factor, self.largest)


class KFACOptimizer(torch.optim.Optimizer):
    """Natural-gradient steps with momentum; AdamW for the parameters outside K-FAC's layers.

    ::

        optimizer = KFACOptimizer(model, KFACNaturalGradient(damping=0.01), lr=0.1)
        for batch in batches:
            optimizer.refresh(batch)              # every ``kfac.update_freq`` steps
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()

    A step, for the covered parameters ``W`` with gradient ``g`` of the mean loss::

        u = K-FAC's natural gradient of g         (scaled by clipping ``unit``, ``kl``)
        m = momentum * m + u
        W = (1 - lr * weight_decay) W - lr * m    (m shortened by clipping ``trust``)

    There are two parameter groups, ``kfac`` and ``adamw``; schedulers work on their ``lr``. Which
    parameters are in which is what the modules promise until the first refresh, and then what its
    forward pass has shown: experts that are slices of a parameter go to ``kfac``, and layers that
    the pass does not use, or that cannot be used, to ``adamw``. (With factors of each rank's own,
    from the first step on, what any of the ranks has shown.)

    Args:
        model: the model; its trainable parameters are optimised.
        kfac: the engine, with damping, policy and ``update_freq``.
        lr: learning rate of the covered parameters.
        momentum: decay of the running sum of natural gradients, from 0 up to, but not including, 1.
        weight_decay: decoupled (Loshchilov & Hutter 2019), on matrices alone.
        clipping: the bound on a step.
        damping: how the damping changes; it starts at that of ``kfac``.
        inverse_freq: steps between two refreshes of the inverses alone, with the current damping
            and a measured reduction ratio; None: only with the factors. Refreshing factors more
            often than inverses has no effect, since nothing is averaged.
        rest_lr: learning rate of AdamW for the other parameters; None: ``lr``.
        betas: those of AdamW.
        eps: that of AdamW.
        communicator: the ranks that step together. With ``kfac_distributed_reduce="none"`` each has
            factors of its own tokens, and the step follows the mean of their natural gradients,
            weighted by the labels behind the factors, so that all ranks keep the same weights.
            The other modes agree without it.

    Raises:
        SettingError: an argument is out of range.
        fisher_lab.curvature.errors.LayerError: the model has no K-FAC layer.

    Attributes:
        kfac: the engine.
        multiplier: current multiplier of the damping.
        last: numbers of the last step: ``kl_scale``, ``decrement``, and ``predicted`` on request.
    """

    def __init__(
        self,
        model: nn.Module,
        kfac: KFACNaturalGradient,
        *,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        clipping: Clipping | None = None,
        damping: DampingSchedule | None = None,
        inverse_freq: int | None = None,
        rest_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        communicator: Communicator | None = None,
    ) -> None:
        require("lr", lr, at_least(0))
        require("momentum", momentum, fraction())
        require("weight_decay", weight_decay, at_least(0))
        require("inverse_freq", inverse_freq, whole(1) | null, int)
        self.kfac, self.model = kfac, model
        self.clipping = clipping or Clipping()
        self.damping: DampingSchedule = damping or ConstantDamping()
        self.inverse_freq = inverse_freq
        apart = communicator if kfac.settings.reduce == "none" else None
        self.ranks: Communicator = apart or Alone()
        self.multiplier = 1.0
        self.last: dict[str, float] = {}
        self._done = 0
        trainable = {n: p for n, p in unwrap(model).named_parameters() if p.requires_grad}
        self._trainable = trainable
        self._names = {name: trainable[name] for name in self._promised()}
        self._adamw: dict[str, Any] = {"betas": betas, "eps": eps, "weight_decay": 0.0}
        self._rest_lr = lr if rest_lr is None else rest_lr
        self.rest: torch.optim.AdamW | None = None
        first = {"params": list(self._names.values()), "name": "kfac", "lr": lr}
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": 0.0}
        super().__init__([{**first, "weight_decay": weight_decay}], defaults)
        self._leave_the_rest()

    def _promised(self) -> list[str]:
        """The parameters in layers that modules promise; candidates are not among them."""
        found = self.kfac.layers_of(self.model)
        layers = [one for one in found.layers.values() if one.name not in found.candidates]
        names = [base_of(name) for one in layers for name in one.names]
        return [name for name in names if name in self._trainable]

    def _shown(self) -> list[str]:
        """The parameters that the last refresh has factors of, at least of a part."""
        missed = self.kfac.coverage.by_parameter
        return [n for n, p in self._trainable.items() if missed.get(n, (0, ""))[0] < p.numel()]

    def divide(self, covered: Iterable[str]) -> None:
        """Says which parameters are K-FAC's; the others are AdamW's. Before the first step.

        Args:
            covered: names in ``named_parameters()``.
        """
        wanted = set(covered)
        if wanted == set(self._names):
            return
        moved = sorted(wanted ^ set(self._names))
        log.info(
            "%d parameters change between kfac and adamw: %s", len(moved), ", ".join(moved[:9])
        )
        self._names = {name: p for name, p in self._trainable.items() if name in wanted}
        self.param_groups[COVERED]["params"] = list(self._names.values())
        self._leave_the_rest()

    def _leave_the_rest(self) -> None:
        """Gives AdamW what is not K-FAC's."""
        rest = [p for n, p in self._trainable.items() if n not in self._names]
        self.rest = None
        if rest:
            self.rest = torch.optim.AdamW(rest, lr=self._rest_lr, **self._adamw)
        if len(self.param_groups) > REST:
            self.param_groups[REST]["params"] = rest
        elif rest:
            lr = {"lr": self._rest_lr}
            if "initial_lr" in self.param_groups[COVERED]:  # a scheduler is there already
                lr["initial_lr"] = self._rest_lr
            self.add_param_group({"params": rest, "name": "adamw", "weight_decay": 0.0, **lr})

    # ---- factors and damping -----------------------------------------------------------------

    @property
    def refresh_due(self) -> bool:
        """Whether the next step needs new factors."""
        return self._done % self.kfac.update_freq == 0

    @property
    def inverse_due(self) -> bool:
        """Whether the reduction ratio is due at the next step, and with it the damping."""
        return self._done % (self.inverse_freq or self.kfac.update_freq) == 0

    def refresh(
        self,
        batch: Any,
        loss: LossFunction | None = None,
        *,
        force: bool = False,
        verify: bool = False,
    ) -> bool:
        """Computes new factors if they are due, by one more forward and backward pass.

        Args:
            batch: one batch, or several.
            loss: as for :meth:`KFACNaturalGradient.collect_kfac_factors`.
            force: compute them even if they are not due.
            verify: the same as there.

        Returns:
            Whether there are new factors.
        """
        if not (force or self.refresh_due):
            return False
        self.kfac.collect_kfac_factors(self.model, batch, loss=loss, verify=verify)
        if self._done == 0 and self.ranks.size == 1:
            self.divide(self._shown())
        return True

    def _settle(self) -> None:
        """Divides the parameters by what any rank has factors of; collective, once.

        Ranks with factors of their own may have seen different layers, and step together.
        """
        if self._done > 0 or self.ranks.size == 1:
            return
        own = self._shown() if self.kfac.kfac_factors else []
        every = self.ranks.all_gather_objects(own)
        if any(every):
            self.divide(set().union(*every))

    def adapt(self, before: float, after: float) -> float:
        """Compares the last step with its prediction, and changes the damping accordingly.

        Args:
            before: mean loss of the batch before the step.
            after: mean loss of the same batch after it.

        Returns:
            The reduction ratio: actual over predicted change (Martens & Grosse 2015, section 6.5);
            nan if the step predicted no decrease. The prediction is K-FAC's quadratic model in the
            covered parameters and linear in those that AdamW changed; the loss contains both.

        Raises:
            SettingError: the last step was not asked to ``predict``.
        """
        if "predicted" not in self.last:
            raise SettingError("adapt: the last step made no prediction; call step(predict=True)")
        predicted = self.last["predicted"]
        ratio = (after - before) / predicted if predicted < 0 else math.nan
        self._set_multiplier(self.damping.update(self.multiplier, ratio))
        return ratio

    def _set_multiplier(self, multiplier: float) -> None:
        if multiplier == self.multiplier:
            return
        self.multiplier = multiplier
        self.kfac.scale_damping(multiplier, multiplier)

    # ---- the step ----------------------------------------------------------------------------

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], Any] | None = None,
        *,
        predict: bool = False,
        cut: float = 1.0,
    ) -> Any:
        """Changes the weights by one step.

        Args:
            closure: computes the loss again, as in ``torch.optim``.
            predict: also predict the change of the loss, in ``last["predicted"]``; this takes one
                Fisher-vector product and a copy of the weights.
            cut: factor by which the gradients were multiplied before this step, for example by
                ``clip_grad_norm_``; the prediction needs the original gradient.

        Returns:
            The result of the closure.

        Raises:
            fisher_lab.curvature.errors.CurvatureError: there are no factors, or the result is not
                finite.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        self._settle()
        gradients = {n: p.grad for n, p in self._names.items() if p.grad is not None}
        named = unwrap(self.model).named_parameters() if predict else ()
        before = {n: p.detach().clone() for n, p in named if p.grad is not None}
        self._step_covered(gradients)
        if self.rest is not None:
            self.rest.param_groups[0]["lr"] = self.param_groups[REST]["lr"]
            self.rest.step()
        if predict:
            self.last["predicted"] = self._predicted(before, cut)
        self._done += 1
        return result

    def _step_covered(self, gradients: Mapping[str, Tensor]) -> None:
        group = self.param_groups[COVERED]
        lr = float(group["lr"])
        natural = self._of_all_ranks(self.kfac.compute_natural_gradient, gradients)
        decrement = wrappers.inner(gradients, natural)
        kind, scale, shorten = self.clipping.kind, 1.0, 1.0
        if kind in ("unit", "kl"):
            length = 1.0 if kind == "unit" else lr
            scale = self.clipping.scale(length * length * decrement)
        steps = {name: self._momentum(name, u, scale) for name, u in natural.items()}
        if kind == "trust":
            product = self._of_all_ranks(self.kfac.compute_fisher_vector_product, steps)
            scale = shorten = self.clipping.scale(lr * lr * wrappers.inner(steps, product))
        for name, step in steps.items():
            parameter = self._names[name]
            if parameter.dim() >= 2:
                parameter.mul_(1.0 - lr * group["weight_decay"])
            step = step.to(device=parameter.device, dtype=parameter.dtype)
            parameter.add_(step, alpha=-lr * shorten)
        self.last = {"kl_scale": scale, "decrement": decrement}

    def _of_all_ranks(self, compute: Callable[..., Any], given: Mapping[str, Tensor]) -> Any:
        """The engine's result for the layers that have factors; others are left unchanged.

        With factors of each rank's own, the result is the mean over the ranks, weighted by the
        labels behind their factors; collective.

        Raises:
            CurvatureError: no rank has factors, or one rank fails; the same on all ranks.
        """
        if self.ranks.size == 1:
            result, missing = compute(given, self.model), set(self.kfac.uncovered)
            return {name: value for name, value in result.items() if name not in missing}
        whole = wrappers.whole(given)
        own: dict[str, Tensor] = {}
        weight, problem = 0, None
        if self.kfac.kfac_factors:
            try:
                own = compute(whole, self.model)
                weight = max(f.n_labels for f in self.kfac.kfac_factors.values())
            except CurvatureError as error:
                problem = str(error)
        covered = [name for name in own if name not in set(self.kfac.uncovered)]
        found = self.ranks.all_gather_objects([weight, problem, covered])
        for rank, (_, text, _) in enumerate(found):
            if text is not None:
                raise CurvatureError(f"rank {rank}: {text}")
        weights = {n: sum(w for w, _, names in found if n in names) for n in whole}
        if not any(weights.values()):
            raise CurvatureError("factors: none collected yet, on any rank")
        mean = {}
        for name, total in weights.items():
            if total == 0:
                continue
            if name in covered:
                part = (own[name] * (weight / total)).double()
            else:
                part = torch.zeros_like(whole[name], dtype=torch.float64)
            mean[name] = self.ranks.all_reduce(part)
        return wrappers.as_given(mean, given, self.model)

    def _momentum(self, name: str, natural: Tensor, scale: float) -> Tensor:
        decay = self.param_groups[COVERED]["momentum"]
        if scale != 1.0:
            natural = natural * scale
        if decay == 0.0:
            return natural
        state = self.state[self._names[name]]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(self._names[name])
        return state["momentum"].mul_(decay).add_(natural)

    def _predicted(self, before: Mapping[str, Tensor], cut: float) -> float:
        """``<g, d> + d^T F d / 2`` for the step ``d``, with K-FAC's undamped ``F``.

        ``d`` includes weight decay and the steps of AdamW. Parameters that K-FAC does not cover
        have no ``F``; they contribute ``<g, d>`` alone.
        """
        named = dict(unwrap(self.model).named_parameters())
        change = {name: named[name] - old for name, old in before.items()}
        gradients: dict[str, Tensor] = {n: named[n].grad for n in change}  # type: ignore[misc]
        covered = {name: d for name, d in change.items() if name in self._names}
        product = self._of_all_ranks(self.kfac.compute_fisher_vector_product, covered)
        linear = wrappers.inner(gradients, change) / cut
        return linear + 0.5 * wrappers.inner(covered, product)

    # ---- state -------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on: momentum, AdamW, factors, damping, counters."""
        state = super().state_dict()
        state["kfac"] = self.kfac.state_dict(self.model) if self.kfac.kfac_factors else None
        state["rest"] = None if self.rest is None else self.rest.state_dict()
        state["multiplier"] = self.multiplier
        state["done"] = self._done
        state["covered"] = list(self._names)
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned, so that training continues exactly.

        Raises:
            fisher_lab.curvature.errors.CurvatureError: factors of another model.
        """
        self.divide(state_dict.get("covered", self._names))
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        if self.rest is not None and state_dict["rest"] is not None:
            self.rest.load_state_dict(state_dict["rest"])
        if state_dict["kfac"] is not None:
            self.kfac.load_state_dict(state_dict["kfac"], self.model)
        self._done = int(state_dict["done"])
        self._set_multiplier(float(state_dict["multiplier"]))

    def parameters_of(self, group: int) -> Iterable[nn.Parameter]:
        """Parameters of a group, :data:`COVERED` or :data:`REST`."""
        return self.param_groups[group]["params"] if group < len(self.param_groups) else []
