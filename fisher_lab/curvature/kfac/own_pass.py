"""A refresh from the passes of a training step: gradient and factors of the same passes.

The caller's ``loss.backward()`` fills ``.grad`` as always, and the token gradients are kept on the
way. They belong to the caller's loss, which is the token-summed one times a weight: one over the
labels, over micro-batches, or the scale of mixed precision.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from fisher_lab.curvature import wrappers
from fisher_lab.curvature.collectives import together
from fisher_lab.curvature.errors import CurvatureError, LayerError
from fisher_lab.curvature.kfac.capture import Capture
from fisher_lab.curvature.kfac.collect import add_own_pass
from fisher_lab.curvature.kfac.engine import KFACNaturalGradient
from fisher_lab.curvature.kfac.statistics import Statistics
from fisher_lab.curvature.likelihoods import at_least_float32
from fisher_lab.curvature.losses import SummedLoss


def why_not(kfac: KFACNaturalGradient) -> str:
    """Returns why a refresh needs passes beside those of a training step; "" where it does not."""
    settings = kfac.settings
    if settings.fisher != "empirical":
        return f"fisher={settings.fisher} sends back other gradients than those of the data's loss"
    if settings.uncovered == "diagonal":
        return "uncovered=diagonal takes a gradient for every sequence"
    if settings.sharing == "reduce":
        return "sharing=reduce looks at the dimensions of the first batch"
    return ""


class OwnPass:
    """A pass of the caller's; used as a context manager around the forward pass alone.

    Args:
        model: the model whose forward pass is about to run.
        kfac: the engine.

    Attributes:
        capture: of the forward pass.
        grads: index of a call -> gradient of its output, once the backward pass has been made.
    """

    def __init__(self, model: nn.Module, kfac: KFACNaturalGradient) -> None:
        self._model = model
        self.capture = Capture(model, kfac.layers_of(model), kfac.settings)
        self.grads: dict[int, Tensor] = {}
        self._stack = ExitStack()

    def __enter__(self) -> OwnPass:
        self.capture.__enter__()
        self._stack.callback(self.capture.pause, None, None, None)
        self._stack.enter_context(wrappers.uncompiled(self._model))
        return self

    def __exit__(self, *exc: Any) -> None:
        self.pause()
        self.capture.close()
        self.grads = self.capture.await_gradients()

    def pause(self) -> None:
        """Ends a pass of which nothing is wanted, inside of a hook; ``capture.close()`` is left."""
        self._stack.close()


class OwnRefresh:
    """One refresh from one or several passes of a training step, such as micro-batches.

    An error of a pass is raised by :meth:`finish`, on all ranks.

    Args:
        model: the model.
        kfac: the engine that gets the factors.
    """

    def __init__(self, model: nn.Module, kfac: KFACNaturalGradient) -> None:
        self._model, self._kfac = model, kfac
        self._sums: Statistics = kfac.begin(model)
        self._problem: CurvatureError | None = None

    def add(self, one: OwnPass, batch: Any, loss: SummedLoss, weight: float) -> None:
        """Adds a pass after its backward pass.

        Args:
            one: the pass.
            batch: its batch, prepared (:func:`~fisher_lab.curvature.losses.prepare`).
            loss: its token-summed loss.
            weight: what that was multiplied by before it was differentiated.
        """
        grads = {index: _over(g, weight) for index, g in one.grads.items()}
        try:
            if one.capture.replays:
                raise LayerError(
                    "gradient checkpointing with use_reentrant=True gives no token gradients on "
                    "the way; use use_reentrant=False, or refresh(batch)"
                )
            size = self._kfac.communicator.size
            add_own_pass(self._sums, self._model, one.capture, batch, loss, grads, size)
        except CurvatureError as error:
            self._problem = self._problem or error

    def finish(self) -> None:
        """Makes the factors; collective.

        Raises:
            CurvatureError: of a pass, or of the refresh; the factors from before stay.
        """

        def check() -> None:
            if self._problem is not None:
                raise self._problem

        together(self._kfac.communicator, check)
        self._kfac.finish(self._sums)


def _over(g: Tensor, weight: float) -> Tensor:
    return g if weight == 1.0 else at_least_float32(g) / weight
