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
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from fisher_lab.config.errors import SettingError
from fisher_lab.config.fields import Allowed, at_least, fraction, null, one_of, whole
from fisher_lab.config.kfac import require
from fisher_lab.curvature import wrappers
from fisher_lab.curvature.collectives import Alone, Communicator
from fisher_lab.curvature.errors import CurvatureError, NonFiniteError
from fisher_lab.curvature.evaluation_mode import random_state_kept
from fisher_lab.curvature.kfac.engine import KFACNaturalGradient
from fisher_lab.curvature.kfac.own_pass import OwnRefresh
from fisher_lab.curvature.losses import LossFunction
from fisher_lab.curvature.wrappers import unwrap
from fisher_lab.optim import groups, state
from fisher_lab.optim.clipping import Clipping
from fisher_lab.optim.damping import ConstantDamping, DampingSchedule
from fisher_lab.optim.divided import DividedOptimizer
from fisher_lab.optim.groups import Group
from fisher_lab.optim.passes import Recorder
from fisher_lab.optim.ranks import Compute, of_all_ranks

log = logging.getLogger(__name__)

RANGES: dict[str, tuple[Allowed, type]] = {
    "lr": (at_least(0), float),
    "momentum": (fraction(), float),
    "weight_decay": (at_least(0), float),
    "rest_lr": (at_least(0) | null, float),
    "inverse_freq": (whole(1) | null, int),
    "refresh_below": (at_least(0) | null, float),
    "outer": (one_of(*groups.METHODS), str),
    "graft": (one_of("none", "sgd", "adam"), str),
}
"""What the arguments may be."""


class KFACOptimizer(DividedOptimizer):
    """Natural-gradient steps with momentum; AdamW for the parameters outside K-FAC's layers.

    ::

        optimizer = KFACOptimizer(model)
        for batch in batches:
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()

    A step, for the covered parameters ``W`` with gradient ``g`` of the mean loss::

        u = K-FAC's natural gradient of g         (scaled by clipping ``unit``, ``kl``)
        m = momentum * m + u
        W = (1 - lr * weight_decay) W - lr * m    (m shortened by clipping ``trust``)

    There are two parameter groups, ``kfac`` and ``adamw``, with a rate, ``weight_decay``
    (decoupled, Loshchilov & Hutter 2019, on matrices alone), ``momentum`` or ``betas`` and ``eps``
    of their own, which schedulers and callers may change. Which parameters are in which is what
    the modules promise until the first refresh, and then what its forward pass has shown: experts
    that are slices of a parameter go to ``kfac``, and layers that the pass does not use, or that
    cannot be used, to ``adamw``. (With factors of each rank's own, from the first step on, what
    any of the ranks has shown.) Parameters that are frozen later stay where they are and are not
    changed; those that are unfrozen later join at the next refresh, unless ``add_param_group`` has
    taken them.

    Where new factors are due (every ``kfac.update_freq`` steps), they are made of the step's own
    passes, micro-batches included: the token gradients are kept on the caller's way back. That
    needs the labels, as an argument of the model or by :meth:`capture`; ``fisher=mc`` and ``true``,
    and losses that are not the likelihood of the labels, take a second pass, and the log says so.
    :meth:`refresh` makes factors of any batch.

    The whole state is in ``state_dict()``, factors included; copies and pickles hold the model too.

    Args:
        model: the model; its trainable parameters are optimised.
        kfac: the engine, with damping, policy and ``update_freq``; None: one with the dampings
            ``DAMPINGS``. It is the optimizer's from now on.
        lr: learning rate of the covered parameters.
        momentum: decay of the running sum of natural gradients, from 0 up to, but not including, 1.
        weight_decay: decoupled, on matrices alone, of either method.
        clipping: the bound on a step.
        damping: how the damping changes; it starts at that of ``kfac``.
        graft: the length of each tensor's ``u``: ``none``: as it is, ``sgd``: that of the gradient,
            ``adam``: that of Adam's step without momentum (of the gradient over the root of its
            second moment); with the clippings ``none`` and ``trust``.
        refresh_below: a measured reduction ratio (:meth:`adapt`) below it makes new factors due at
            the next step, whatever ``update_freq`` says; None: it does not.
        inverse_freq: steps between two refreshes of the inverses alone, with the current damping
            and a measured reduction ratio; None: only with the factors. Refreshing factors more
            often than inverses has no effect, since nothing is averaged.
        rest_lr: learning rate of AdamW for the other parameters; None: ``lr``.
        betas: those of AdamW.
        eps: that of AdamW.
        outer: what changes embeddings and the layer of the logits, whose factors are the largest
            and the least well known: ``adamw``, or ``kfac`` as everything else.
        communicator: the ranks that step together. With ``kfac_distributed_reduce="none"`` each has
            factors of its own tokens, and the step follows the mean of their natural gradients,
            weighted by the labels behind the factors, so that all ranks keep the same weights.
            The other modes agree without it.
        record: whether the passes of the training loop are watched; without it, only
            :meth:`refresh` makes factors.

    Raises:
        SettingError: an argument is out of range.
        fisher_lab.curvature.errors.LayerError: the model has no K-FAC layer.

    Attributes:
        kfac: the engine.
        last: numbers of the last step: ``kl_scale``, ``decrement``, and ``predicted`` on request.
    """

    DAMPINGS: ClassVar[dict[str, Any]] = {"damping_A": 0.3, "damping_G": 1e-3}
    """Of an engine that the optimizer makes; ``docs/training.md`` says how they were found."""

    def __init__(
        self,
        model: nn.Module,
        kfac: KFACNaturalGradient | None = None,
        *,
        lr: float = 0.03,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        clipping: Clipping | None = None,
        damping: DampingSchedule | None = None,
        graft: str = "none",
        refresh_below: float | None = None,
        inverse_freq: int | None = None,
        rest_lr: float | None = 3e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        outer: str = "adamw",
        communicator: Communicator | None = None,
        record: bool = True,
    ) -> None:
        own: dict[str, Any] = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        given = {"rest_lr": rest_lr, "inverse_freq": inverse_freq, "refresh_below": refresh_below}
        for name, value in {**own, **given, "outer": outer, "graft": graft}.items():
            require(name, value, *RANGES[name])
        self.kfac = kfac or KFACNaturalGradient(track_diagonal=False, **self.DAMPINGS)
        self.model, self.clipping = model, clipping or Clipping()
        self.damping: DampingSchedule = damping or ConstantDamping()
        self.inverse_freq, self.graft, self.refresh_below = inverse_freq, graft, refresh_below
        if graft != "none" and self.clipping.kind not in ("none", "trust"):
            raise SettingError(
                f"clipping: {self.clipping.kind!r} with graft={graft!r}; allowed: none, trust"
            )
        apart = communicator if self.kfac.settings.reduce == "none" else None
        self.ranks: Communicator = apart or Alone()
        self.last: dict[str, float] = {}
        self._rest_lr = lr if rest_lr is None else rest_lr
        self._fresh = False  # whether this step has new factors already
        self._decided, self._behind, self._warned = set(), set(), set()
        if outer == "adamw":
            self._leave_out(groups.outer_layers(unwrap(model)))
        own |= {"betas": betas, "eps": eps, "steps": 0, "multiplier": 1.0, "aged": False}
        first = groups.first(self._named(), self._promised(), (lr, self._rest_lr))
        super().__init__(first, {**groups.adamw_defaults(), **own})
        self._record = record
        self._recorder = Recorder(self) if record else None

    def _leave_out(self, layers: Iterable[str]) -> None:
        settings = self.kfac.settings
        self.kfac.settings = replace(settings, exclude=[*settings.exclude, *layers])

    # ---- factors and damping -----------------------------------------------------------------

    @property
    def multiplier(self) -> float:
        """The current multiplier of the dampings."""
        return self.param_groups[0]["multiplier"]

    def _note(self, **values: Any) -> None:
        """Writes numbers of the optimizer into all groups, which are saved everywhere."""
        for group in self.param_groups:
            group.update(values)

    @property
    def refresh_due(self) -> bool:
        """Whether the next step needs new factors: by its number, or for other parameters."""
        if self._fresh:
            return False
        if self.done % self.kfac.update_freq == 0 or self.param_groups[0]["aged"]:
            return True
        if self._trained() != self._behind:
            return True
        return not self.kfac.kfac_factors and self.ranks.size == 1

    @property
    def inverse_due(self) -> bool:
        """Whether the reduction ratio is due at the next step, and with it the damping."""
        return self.done % (self.inverse_freq or self.kfac.update_freq) == 0

    def refresh(
        self,
        batch: Any,
        loss: LossFunction | None = None,
        *,
        force: bool = False,
        verify: bool = False,
    ) -> bool:
        """Computes new factors if they are due, by one more forward and backward pass.

        The model's buffers and the random state are left as they were. Of several calls for one
        step the first one counts: of micro-batches, give the list.

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
        with random_state_kept():
            self.kfac.collect_kfac_factors(self.model, batch, loss=loss, verify=verify)
        self._refreshed()
        return True

    def refresh_from(self, own: OwnRefresh) -> None:
        """Takes factors of passes that the caller has recorded and differentiated; collective."""
        own.finish()
        self._refreshed()

    def _refreshed(self) -> None:
        self._join()
        self._fresh, self._behind = True, self._trained()
        self._note(aged=False)
        if self.ranks.size == 1:
            self._decide()

    def capture(self, batch: Any, loss: LossFunction | None = None) -> AbstractContextManager[None]:
        """Says of what batch the forward passes inside a ``with`` block are.

        It is needed where the model's arguments do not contain the labels, or where the loss is not
        the model's own: ``with optimizer.capture((x, y), CrossEntropy()): outputs = model(x)``.

        Args:
            batch: with its labels, as for :meth:`refresh`.
            loss: the likelihood behind the loss that is differentiated afterwards.
        """
        return nullcontext() if self._recorder is None else self._recorder.given(batch, loss)

    @override
    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        if self._recorder is not None:
            self._recorder.forget_arrived()

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
        if self.refresh_below is not None:
            self._note(aged=not ratio >= self.refresh_below)
        return ratio

    def take_over(self, *, decided: bool) -> None:
        """Goes on from groups and factors that have been restored.

        Args:
            decided: whether a forward pass had shown already whose the parameters are.
        """
        self._fresh = False
        self._decided = self._trained() if decided else set()
        self._behind = self._trained() if decided else set()
        self._set_multiplier(self.multiplier)

    def _set_multiplier(self, multiplier: float) -> None:
        self._note(multiplier=multiplier)
        if (self.kfac.settings.scale_A, self.kfac.settings.scale_G) != (multiplier, multiplier):
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
            fisher_lab.curvature.errors.CurvatureError: there are no factors, or a gradient or the
                result is not finite; weights and state are as they were.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        if state.is_blank(self):
            state.begin(self)
            return result
        if self._recorder is not None and self.refresh_due:
            with torch.enable_grad():
                self._recorder.refresh(self)
        if self.ranks.size > 1:
            self._decide()
        self._check_factors()
        gradients = {n: p.grad for n, p in self._names.items() if p.grad is not None}
        rest = self._with_groups("adamw")
        given = {n: p.grad for n, (_, p) in rest.items() if p.grad is not None}
        if not wrappers.finite(given):
            bad = [n for n, g in given.items() if not wrappers.finite({n: g})]
            raise NonFiniteError(f"gradients of {', '.join(bad[:3])} are not finite")
        named = self._named() if predict else {}
        before = {n: p.detach().clone() for n, p in named.items() if p.grad is not None}
        if gradients:
            self._step_covered(gradients)
        self._step_rest()
        if predict:
            self.last["predicted"] = self._predicted(before, cut)
        self._note(steps=self.done + 1)
        self._fresh = False
        return result

    def _check_factors(self) -> None:
        """Says once that factors are older than they should be.

        Raises:
            CurvatureError: there are none, and nobody but this rank could have some.
        """
        if not self.kfac.kfac_factors and self.ranks.size == 1:
            if any(p.grad is not None for p in self._names.values()):
                raise CurvatureError(
                    "factors: none collected yet, and no forward pass with labels was seen; give "
                    "the model labels, use capture(batch, loss), or call refresh(batch) before "
                    "step() (after torch.compile, give the optimizer the compiled model)"
                )
        elif self.ranks.size == 1 and self.refresh_due and self.says_for_the_first_time("due"):
            log.warning(
                "step %d: new factors are due (update_freq=%d) and were not made; the step uses "
                "the old ones",
                self.done + 1, self.kfac.update_freq,
            )  # fmt: skip

    def says_for_the_first_time(self, what: str) -> bool:
        """Whether a warning has not been given yet; it counts as given then."""
        new = what not in self._warned
        self._warned.add(what)
        return new

    def _step_covered(self, gradients: Mapping[str, Tensor]) -> None:
        with_groups = self._with_groups("kfac")
        natural = self._of_all_ranks(self.kfac.compute_natural_gradient, gradients)
        rates = {name: float(with_groups[name][0]["lr"]) for name in natural}
        decrement = wrappers.inner(gradients, natural)
        sizes = {} if self.graft == "none" else self._sizes(gradients, natural, with_groups)
        natural = {name: u * sizes[name] if sizes else u for name, u in natural.items()}
        kind, scale, shorten = self.clipping.kind, 1.0, 1.0
        if kind == "unit":
            scale = self.clipping.scale(decrement)
        elif kind == "kl":
            scale = self.clipping.scale(_quadratic(gradients, natural, rates))
        momenta = {n: self._momentum(*with_groups[n], u, scale) for n, u in natural.items()}
        if kind == "trust":
            change = {name: m * rates[name] for name, m in momenta.items()}
            product = self._of_all_ranks(self._damped_product, change)
            scale = shorten = self.clipping.scale(wrappers.inner(change, product))
        for name, m in momenta.items():
            group, parameter = with_groups[name]
            if group["momentum"] != 0.0:
                self.state[parameter]["momentum"] = m
            if parameter.dim() >= 2:
                parameter.mul_(1.0 - rates[name] * group["weight_decay"])
            m = m.to(device=parameter.device, dtype=parameter.dtype)
            parameter.add_(m, alpha=-rates[name] * shorten)
        self.last = {"kl_scale": scale, "decrement": decrement}

    def _sizes(
        self,
        gradients: Mapping[str, Tensor],
        natural: Mapping[str, Tensor],
        with_groups: Mapping[str, tuple[Group, nn.Parameter]],
    ) -> dict[str, float]:
        """What each natural gradient is multiplied by to have the length of another method's."""
        found = {}
        for name, u in natural.items():
            (group, parameter), step = with_groups[name], gradients[name]
            if self.graft == "adam":
                entry, decay = self.state[parameter], group["betas"][1]
                second = entry.setdefault("second", torch.zeros_like(parameter))
                second.lerp_(step.square(), 1.0 - decay)
                root = (second / (1.0 - decay ** (self.done + 1))).sqrt_()
                step = step / root.add_(group["eps"])
            own = wrappers.inner({name: u}, {name: u})
            size = wrappers.inner({name: step}, {name: step})
            found[name] = math.sqrt(size / own) if own > 0.0 else 0.0
        return found

    def _damped_product(self, vectors: Mapping[str, Tensor], model: nn.Module) -> Any:
        return self.kfac.compute_fisher_vector_product(vectors, model, damped=True)

    def _step_rest(self) -> None:
        """Steps of AdamW, of torch's own code on this optimizer's groups and state."""
        parts = [
            part
            for group in self.param_groups
            if group["method"] == "adamw"
            for part in groups.by_decay(group)
        ]
        if parts:
            adamw = torch.optim.AdamW(parts)
            adamw.param_groups, adamw.state = parts, self.state
            adamw.step()

    def _of_all_ranks(self, compute: Compute, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return of_all_ranks(compute, given, self.model, self.kfac, self.ranks)

    def _momentum(self, group: Group, parameter: Tensor, natural: Tensor, scale: float) -> Tensor:
        """The running sum with a new natural gradient; the state is not changed."""
        if scale != 1.0:
            natural = natural * scale
        decay, before = group["momentum"], self.state[parameter].get("momentum")
        if decay == 0.0:
            return natural
        before = torch.zeros_like(parameter) if before is None else before
        return (before * decay).add_(natural)

    def _predicted(self, before: Mapping[str, Tensor], cut: float) -> float:
        """``<g, d> + d^T F d / 2`` for the step ``d``, with K-FAC's undamped ``F``.

        ``d`` includes weight decay and the steps of AdamW. Parameters that K-FAC does not cover
        have no ``F``; they contribute ``<g, d>`` alone.
        """
        named = self._named()
        change = {name: named[name] - old for name, old in before.items()}
        gradients: dict[str, Tensor] = {n: named[n].grad for n in change}  # type: ignore[misc]
        covered = {name: d for name, d in change.items() if name in self._names}
        linear = wrappers.inner(gradients, change) / cut
        if not covered:
            return linear
        product = self._of_all_ranks(self.kfac.compute_fisher_vector_product, covered)
        return linear + 0.5 * wrappers.inner(covered, product)

    # ---- state -------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, in ``state`` and ``param_groups``.

        The factors are in the entry ``factors`` of the first parameter's state. With several ranks
        every rank has to call it.
        """
        return state.export(self, super().state_dict())

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned, so that training continues exactly.

        Of a state without factors (what torch's distributed checkpoints read into an optimizer
        that has none yet), the next step makes new ones.

        Raises:
            SettingError: the state of another optimizer, or of other parameters.
            fisher_lab.curvature.errors.CurvatureError: factors of another model.
        """
        state.restore(self, state_dict, super().load_state_dict)

    def __getstate__(self) -> dict[str, Any]:
        hidden = {"step", "_recorder"}  # a scheduler's own, which counts the calls
        return {
            key: value
            for key, value in vars(self).items()
            if key not in hidden and not key.startswith("_optimizer_")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "model" in state:  # a copy; torch itself puts groups back in this way
            self._recorder = Recorder(self) if self._record else None


def _quadratic(
    gradients: Mapping[str, Tensor], natural: Mapping[str, Tensor], rates: Mapping[str, float]
) -> float:
    """``<rate g, rate u>``, with one product for each rate."""
    total = 0.0
    for rate in dict.fromkeys(rates.values()):
        some = {name: u for name, u in natural.items() if rates[name] == rate}
        total += rate * rate * wrappers.inner(some, gradients)
    return total
