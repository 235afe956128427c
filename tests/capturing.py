"""One capture for the engine and for the reference: both see the same `a` and `g`, bit for bit."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fisher_lab import KFACNaturalGradient
from tests import models, reference
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


def cross_entropy(outputs: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(outputs, batch["labels"])


def engine(policy: str = "all", damping: Damping | None = None, **settings) -> KFACNaturalGradient:
    damping = Damping() if damping is None else damping
    if settings.get("damping_mode") == "pi":
        settings["damping"] = None  # the two sides' product is the damping of the product
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
        logits = model(batch["x"]) if "x" in batch else model(**inputs_of(batch)).logits
        loss, labels = reference.summed_loss(model, logits, batch)
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


class Captured:
    """An engine, and the dense truth, of one shared capture and its own gradient.

    `settings` are those of the engine; the truth follows `tied` and `norm_layers`.
    """

    def __init__(
        self, model: nn.Module, batch: Mapping[str, Tensor], policy: str = "all",
        damping: Damping | None = None, *, keep_gradient: bool = False, reduction: str = "mean",
        **settings,
    ) -> None:  # fmt: skip
        self.model, self.damping = model, Damping() if damping is None else damping
        self.kfac = engine(policy, self.damping, **settings)
        self.truth, self.labels = shared_capture(
            self.kfac, model, batch, keep_gradient=keep_gradient, reduction=reduction,
            tied=settings.get("tied", "head"), norms=settings.get("norm_layers", True),
        )  # fmt: skip
        self.own = self.truth.own_gradient(self.labels)

    def natural(self, vectors: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        return self.kfac.compute_natural_gradient(vectors, self.model)

    def check_natural(self, bound: float = 1e-9, *others: Mapping[str, Tensor]) -> None:
        """The natural gradients of the own gradient and of others are the dense ones."""
        for vectors in (self.own, *others):
            result = self.natural(vectors)
            assert set(result) >= set(vectors)
            expected = self.truth.natural_gradient(vectors, self.damping)
            reference.assert_close(result, expected, bound)

    def check_product(self, bound: float, *others: Mapping[str, Tensor]) -> None:
        for vectors in (self.own, *others):
            product = self.kfac.compute_fisher_vector_product(vectors, self.model)
            reference.assert_close(product, self.truth.fisher_vector_product(vectors), bound)

    def random(self) -> dict[str, Tensor]:
        """Another gradient, of all parameters that have one."""
        return random_like(self.own)


def captured(
    name: str, tokens: str, policy: str = "all", damping: Damping | None = None, *,
    dtype: torch.dtype = torch.float64, **more,
) -> Captured:  # fmt: skip
    """Of one of the `CASES`."""
    case = models.CASES[name]
    return Captured(case.model(dtype), case.batch(tokens), policy, damping, **more)


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
) -> None:
    """The natural gradient of the batch's own gradient is the dense one."""
    assert truth.labels is not None
    own = truth.own_gradient(truth.labels)
    result = kfac.compute_natural_gradient(own, model)
    assert set(result) >= set(own)
    reference.assert_close(result, truth.natural_gradient(own, damping), bound)


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
