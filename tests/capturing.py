"""One capture for the engine and for the reference: both see the same `a` and `g`, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fisher_lab import KFACNaturalGradient
from tests import reference
from tests.reference import Damping, Truth

# A threshold between the widths of the tiny models, so that `hybrid` mixes both paths.
POLICIES = {
    "all": {"kfac_policy": "all"},
    "auto": {"kfac_policy": "auto"},
    "hybrid": {"kfac_policy": "hybrid", "kfac_big_threshold": 30},
    "small_only": {"kfac_policy": "small_only"},
}


def inputs_of(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in batch.items() if key != "labels"}


def engine(policy: str = "all", damping: Damping | None = None, **settings) -> KFACNaturalGradient:
    damping = Damping() if damping is None else damping
    return KFACNaturalGradient(
        damping_A=damping.A,
        damping_G=damping.G,
        max_condition_number=damping.kappa,
        **POLICIES[policy],
        **settings,
    )


def shared_capture(
    kfac: KFACNaturalGradient,
    model: nn.Module,
    batch: Mapping[str, Tensor],
    *,
    reduction: str = "mean",
    keep_gradient: bool = False,
    **truth_settings,
) -> tuple[Truth, int]:
    """Run the model once, hand its loss to the engine, and return the truth of the same pass."""
    with reference.record(model) as rec, kfac.capture(model):
        outputs = model(**inputs_of(batch))
        loss, labels = reference.summed_loss(model, outputs.logits, batch)
    loss = loss / labels if reduction == "mean" else loss
    kfac.collect_kfac_factors(
        model,
        batch,
        loss=loss,
        n_labels=labels,
        loss_reduction=reduction,
        keep_gradient=keep_gradient,
    )
    return Truth(model, rec, [batch], labels=labels, **truth_settings), labels


def own_collect(
    kfac: KFACNaturalGradient,
    model: nn.Module,
    batches: list,
    *,
    labels: int,
    keep_gradient: bool = False,
    **truth_settings,
) -> Truth:
    """Let the engine run the model itself (its own loss), recorded from outside."""
    with reference.record(model) as rec:
        given = batches if len(batches) > 1 else batches[0]
        kfac.collect_kfac_factors(model, given, keep_gradient=keep_gradient)
    return Truth(model, rec, batches, labels=labels, **truth_settings)


def assert_natural(
    kfac: KFACNaturalGradient,
    model: nn.Module,
    truth: Truth,
    damping: Damping,
    bound: float = 1e-9,
    *,
    random: bool = False,
) -> None:
    """The natural gradient of the batch's own gradient (and of a random one) is the dense one."""
    own = truth.own_gradient(truth.labels)
    for vectors in (own, random_like(own)) if random else (own,):
        result = kfac.compute_natural_gradient(vectors, model)
        assert set(result) >= set(vectors)
        reference.assert_close(result, truth.natural_gradient(vectors, damping), bound)


def random_like(gradients: Mapping[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype)
        for name, value in gradients.items()
    }


class Calls:
    """Counts the forward passes of a model."""

    def __init__(self, model: nn.Module) -> None:
        self.count = 0
        self.handle = model.register_forward_pre_hook(self._called)

    def _called(self, module: nn.Module, args: tuple) -> None:
        self.count += 1
