"""Every option of ``KFACOptimizer``, over 20 steps against a training by hand in float64."""

from typing import Any

import pytest
import torch

from fisher_lab import KFACNaturalGradient
from fisher_lab.curvature.losses import CrossEntropy
from fisher_lab.optim import Clipping, KFACOptimizer, LevenbergMarquardt
from tests import models
from tests.optim.by_hand import ByHand, Options

LOSS = CrossEntropy()
STEPS = 20

OPTIONS = {
    "plain": {},
    "momentum and decay": {"momentum": 0.9, "weight_decay": 0.1, "lr": 0.02},
    "old factors": {"update_freq": 3, "momentum": 0.5},
    "unit": {"clip": "unit", "momentum": 0.9, "lr": 0.01},
    "kl": {"clip": "kl", "limit": 1e-4, "momentum": 0.9},
    "trust": {"clip": "trust", "limit": 1e-3, "momentum": 0.9},
    "trust with a warm-up": {"clip": "trust", "limit": 1e-3, "momentum": 0.9, "warmup": 10},
    "ekfac": {"ekfac": True, "momentum": 0.9, "lr": 0.02},
    "ekfac with old factors": {"ekfac": True, "update_freq": 4},
    "levenberg-marquardt": {"lm": True, "update_freq": 2, "lr": 0.3},
    "grafted on sgd": {"graft": "sgd", "momentum": 0.5},
    "grafted on adam": {"graft": "adam", "lr": 0.01, "clip": "trust", "limit": 1e-2},
    "adamw for one": {"adamw": (1,), "weight_decay": 0.1, "momentum": 0.9},
}


def data_of(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = models.rows_batch(24, 7, seed=step)
    return rows["x"], rows["labels"]


def built(options: Options) -> tuple[torch.nn.Module, KFACOptimizer]:
    model = models.seeded(models.MLP, torch.float64)
    kfac = KFACNaturalGradient(
        damping_A=options.lam_a, damping_G=options.lam_g, max_condition_number=None,
        update_freq=options.update_freq, ekfac=options.ekfac,
        exclude=["second"] if options.adamw else [],
    )  # fmt: skip
    return model, KFACOptimizer(
        model, kfac, lr=options.lr, momentum=options.momentum, weight_decay=options.weight_decay,
        clipping=Clipping(kind=options.clip, limit=options.limit),  # type: ignore[arg-type]
        damping=LevenbergMarquardt() if options.lm else None, graft=options.graft,
        rest_lr=options.rest_lr, betas=options.betas, eps=options.eps,
    )  # fmt: skip


def matrices(model: Any) -> list[torch.Tensor]:
    return [
        torch.cat([layer.weight, layer.bias[:, None]], dim=1).detach().clone()
        for layer in (model.first, model.second)
    ]


def train_step(model: Any, optimizer: KFACOptimizer, options: Options, step: int, how: str) -> None:
    data = data_of(step)
    if options.warmup:
        optimizer.param_groups[0]["lr"] = options.lr * min(1.0, (step + 1) / options.warmup)
    optimizer.zero_grad()
    if how == "second pass":
        optimizer.refresh(data, LOSS)
    parts = [tuple(x[rows] for x in data) for rows in (slice(0, 7), slice(7, 24))]
    before = 0.0
    for x, y in parts if how == "micro-batches" else [data]:
        with optimizer.capture((x, y), LOSS):
            outputs = model(x)
        loss = torch.nn.functional.cross_entropy(outputs, y, reduction="sum") / len(data[1])
        loss.backward()
        before += float(loss.detach())
    predict = options.lm and optimizer.inverse_due
    optimizer.step(predict=predict)
    if predict:
        with torch.no_grad():
            optimizer.adapt(before, float(LOSS(model(data[0]), data).mean()))


WAYS = ("second pass", "micro-batches")


@pytest.mark.parametrize(
    ("name", "how"),
    [*((n, "one pass") for n in OPTIONS), *(("old factors", w) for w in WAYS)]
    + [("ekfac", w) for w in WAYS],
)  # fmt: skip
def test_a_trajectory_is_that_by_hand(name, how):
    options = Options(**OPTIONS[name])
    model, optimizer = built(options)
    hand = ByHand(matrices(model), options)
    start = matrices(model)
    for step in range(STEPS):
        train_step(model, optimizer, options, step, how)
        hand.step(*data_of(step))
    for mine, expected, first in zip(matrices(model), hand.layers, start, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-10)
        assert float((mine - first).norm()) > 1e-3
    assert optimizer.multiplier == pytest.approx(hand.multiplier)
    assert (hand.multiplier != 1.0) is options.lm


def test_a_warm_up_from_zero_keeps_the_whole_step_within_the_limit():
    """``kl`` bounds what is new; what momentum has gathered at small rates is in the whole step."""
    worst = {}
    for clip in ("kl", "trust"):
        options = Options(clip=clip, limit=1e-4, momentum=0.9, warmup=15, lr=0.5)
        model, optimizer = built(options)
        sizes = []
        for step in range(15):
            before = {n: p.detach().clone() for n, p in model.named_parameters()}
            train_step(model, optimizer, options, step, "one pass")
            change = {n: p.detach() - before[n] for n, p in model.named_parameters()}
            product = optimizer.kfac.compute_fisher_vector_product(change, model, damped=True)
            sizes.append(sum(float((change[n] * product[n]).sum()) for n in change) / 2)
        worst[clip] = max(sizes) / options.limit
    assert worst["trust"] <= 1 + 1e-9
    assert worst["kl"] > 5
