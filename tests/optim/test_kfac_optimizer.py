# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportOptionalOperand=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportOptionalSubscript=false, reportIndexIssue=false
"""``KFACOptimizer`` against the formulas of its docstring, on models of a few weights."""

import copy
import math

import pytest
import torch

from fisher_lab import KFACNaturalGradient
from fisher_lab.config.errors import SettingError
from fisher_lab.curvature.errors import CurvatureError
from fisher_lab.curvature.losses import CrossEntropy
from fisher_lab.optim import Clipping, ConstantDamping, KFACOptimizer, LevenbergMarquardt
from tests import models

LOSS = CrossEntropy()
NONE = Clipping(kind="none")


def batch(n=24, seed=0, width=7):
    rows = models.rows_batch(n, width, seed=seed)
    return rows["x"], rows["labels"]


def mlp():
    return models.seeded(models.MLP, torch.float64)


def engine(**changes):
    return KFACNaturalGradient(**{"damping": 0.1, "track_diagonal": False, **changes})


def backward(model, data):
    model.zero_grad()
    loss = LOSS(model(data[0]), data).mean()
    loss.backward()
    return float(loss.detach())


def one_step(optimizer, model, data, **options):
    """With fresh factors; the loss before it."""
    optimizer.refresh(data, LOSS)
    loss = backward(model, data)
    optimizer.step(**options)
    return loss


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_close(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], **tolerance, msg=name)


def test_a_plain_step_is_along_the_natural_gradient():
    model, data = mlp(), batch()
    kfac = engine()
    optimizer = KFACOptimizer(model, kfac, lr=0.5, momentum=0.0, clipping=NONE)
    assert optimizer.refresh(data, LOSS)
    backward(model, data)
    before, natural = values(model), kfac.compute_natural_gradient(gradients(model), model)
    optimizer.step()
    assert_close(values(model), {n: before[n] - 0.5 * natural[n] for n in before})
    assert optimizer.last["kl_scale"] == 1.0


def test_momentum_and_decoupled_decay_are_as_the_docstring_says():
    model, kfac = mlp(), engine(update_freq=2)
    optimizer = KFACOptimizer(model, kfac, lr=0.1, momentum=0.8, weight_decay=0.3, clipping=NONE)
    expected = values(model)
    sums = {name: torch.zeros_like(value) for name, value in expected.items()}
    for step in range(5):
        data = batch(seed=step)
        assert optimizer.refresh(data, LOSS) is (step % 2 == 0)
        backward(model, data)
        natural = kfac.compute_natural_gradient(gradients(model), model)
        for name, value in expected.items():
            sums[name] = 0.8 * sums[name] + natural[name]
            decay = 1 - 0.1 * 0.3 if value.dim() >= 2 else 1.0
            expected[name] = decay * value - 0.1 * sums[name]
        optimizer.step()
        assert_close(values(model), expected)


def test_the_length_of_a_step():
    """Each kind of clipping makes its own prediction of the divergence meet the limit."""
    data = batch()
    for kind, momentum in (("unit", 0.0), ("kl", 0.0), ("trust", 0.9)):
        model, kfac = mlp(), engine(damping=1e-2)
        clipping = Clipping(kind=kind, limit=1e-4)
        optimizer = KFACOptimizer(model, kfac, lr=0.2, momentum=momentum, clipping=clipping)
        before = values(model)
        one_step(optimizer, model, data)
        step = {name: value - before[name] for name, value in values(model).items()}
        # (G + lam I) V (A + lam I), whose inverse made the step; T/N is 1 here
        product = kfac.compute_fisher_vector_product(step, model, damped=True)
        limit = 0.2**2 if kind == "unit" else 2 * 1e-4
        quadratic = sum(float((step[n] * product[n]).sum()) for n in step)
        assert quadratic == pytest.approx(limit, rel=1e-6), kind
        assert optimizer.last["kl_scale"] != 1.0


def test_a_limit_that_is_not_reached_changes_nothing():
    data, results = batch(), []
    for clipping in (NONE, Clipping(kind="kl", limit=1e6), Clipping(kind="trust", limit=1e6)):
        model = mlp()
        optimizer = KFACOptimizer(model, engine(), lr=0.1, clipping=clipping)
        one_step(optimizer, model, data)
        results.append(values(model))
    assert_close(results[0], results[1], rtol=0, atol=0)
    assert_close(results[0], results[2], rtol=0, atol=0)


def test_what_kfac_does_not_cover_goes_to_adamw():
    model = models.seeded(models.gpt2, torch.float64)
    data = models.language_batch()
    optimizer = KFACOptimizer(
        model, engine(), lr=1e-3, rest_lr=1e-2, eps=1e-12, clipping=NONE, outer="kfac"
    )
    names = {id(p): n for n, p in model.named_parameters()}
    rest = [names[id(p)] for p in optimizer.param_groups[1]["params"]]
    assert rest == ["transformer.wpe.weight"]
    optimizer.refresh(data)
    model.zero_grad()
    model(**data).loss.backward()
    parameter = model.transformer.wpe.weight
    before, sign = parameter.detach().clone(), parameter.grad.sign()
    optimizer.step()
    # The first step of Adam is the rate times the gradient's sign.
    torch.testing.assert_close(parameter.detach(), before - 1e-2 * sign, rtol=0, atol=1e-7)


def test_schedulers_reach_both_groups():
    model = models.seeded(models.gpt2, torch.float64)
    optimizer = KFACOptimizer(model, engine(), lr=1.0, rest_lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    data = models.language_batch()
    optimizer.refresh(data)
    model(**data).loss.backward()
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.05]
    before = values(model)
    optimizer.step()
    change = {n: (v - before[n]).abs().max() for n, v in values(model).items()}
    # The second step of Adam along an unchanged gradient is the rate, as the first one is.
    assert float(change["transformer.wpe.weight"]) == pytest.approx(0.05, rel=1e-3)


def test_the_prediction_is_the_quadratic_model_and_the_ratio_compares():
    model, data, kfac = mlp(), batch(), engine()
    optimizer = KFACOptimizer(model, kfac, lr=1e-3, momentum=0.0, clipping=NONE)
    before = values(model)
    loss = one_step(optimizer, model, data, predict=True)
    gradient = gradients(model)
    step = {n: v - before[n] for n, v in values(model).items()}
    product = kfac.compute_fisher_vector_product(step, model)
    expected = sum(
        float((gradient[n] * step[n]).sum() + 0.5 * (step[n] * product[n]).sum()) for n in step
    )
    assert optimizer.last["predicted"] == pytest.approx(expected)
    after = float(LOSS(model(data[0]), data).mean().detach())
    ratio = optimizer.adapt(loss, after)
    assert ratio == pytest.approx(1.0, abs=0.05)  # a small step: the linear term alone
    assert ratio == pytest.approx((after - loss) / expected)
    optimizer.step()
    with pytest.raises(SettingError, match="made no prediction"):
        optimizer.adapt(1.0, 0.0)


def test_levenberg_marquardt():
    schedule = LevenbergMarquardt(factor=0.5, smallest=0.3, largest=3.0)
    assert schedule.update(1.0, 0.9) == 0.5
    assert schedule.update(1.0, 0.5) == 1.0
    assert schedule.update(1.0, 0.1) == 2.0
    assert schedule.update(1.0, math.nan) == 2.0
    assert schedule.update(0.4, 0.9) == 0.3
    assert schedule.update(2.0, -1.0) == 3.0
    assert ConstantDamping().update(2.0, -1.0) == 2.0


def test_the_damping_moves_with_the_multiplier_and_the_factors_stay():
    model, data = mlp(), batch()
    kfac = engine(damping_A=0.2, damping_G=0.05)
    damping = LevenbergMarquardt(factor=0.5)
    optimizer = KFACOptimizer(model, kfac, lr=10.0, damping=damping, clipping=NONE)
    one_step(optimizer, model, data, predict=True)
    factors = kfac.kfac_factors
    optimizer.last["predicted"] = -1.0
    assert optimizer.adapt(1.0, 2.0) == -1.0  # it went the wrong way
    assert optimizer.multiplier == 2.0
    assert (kfac.settings.lam_A, kfac.settings.lam_G) == (0.4, 0.1)
    assert kfac.kfac_factors is factors
    assert optimizer.adapt(1.0, 0.0) == 1.0
    assert (kfac.settings.lam_A, kfac.settings.lam_G) == (0.2, 0.05)


@pytest.mark.parametrize("ekfac", [False, True])
def test_a_restored_optimizer_goes_on_to_the_bit(ekfac, tmp_path):
    """Saved between two refreshes, damping moved, momentum and AdamW under way."""

    def build():
        model = models.seeded(models.gpt2, torch.float32)
        kfac = engine(update_freq=3, ekfac=ekfac)
        return model, KFACOptimizer(
            model, kfac, lr=0.01, weight_decay=0.1, damping=LevenbergMarquardt(factor=0.5)
        )

    def go_on(model, optimizer, first, last):
        for step in range(first, last):
            data = models.language_batch(seed=step)
            optimizer.refresh(data)
            model.zero_grad()
            loss = model(**data).loss
            loss.backward()
            optimizer.step(predict=True)
            with torch.no_grad():
                optimizer.adapt(float(loss), float(model(**data).loss))

    whole, optimizer = build()
    go_on(whole, optimizer, 0, 8)
    part, optimizer = build()
    go_on(part, optimizer, 0, 4)
    assert optimizer.multiplier != 1.0
    torch.save({"model": part.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "s")
    saved = torch.load(tmp_path / "s", weights_only=True)
    again, optimizer = build()
    again.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    go_on(again, optimizer, 4, 8)
    assert_close(values(again), values(whole), rtol=0, atol=0)


def test_a_layer_without_a_token_stays_where_it_is():
    model = models.seeded(models.Gated, torch.float64)
    model.open = False
    optimizer, before = KFACOptimizer(model, engine(), lr=0.1), values(model)
    one_step(optimizer, model, batch(8, width=6))
    assert torch.equal(model.side.weight, before["side.weight"])
    assert not torch.equal(model.main.weight, before["main.weight"])


def test_frozen_parameters_are_not_optimised():
    model = mlp()
    model.first.requires_grad_(False)
    optimizer = KFACOptimizer(model, engine(), lr=0.1)
    frozen = copy.deepcopy(model.first.state_dict())
    one_step(optimizer, model, batch())
    assert all(torch.equal(frozen[n], v) for n, v in model.first.state_dict().items())


def test_a_closure_is_evaluated_with_gradients():
    model, data = mlp(), batch()
    optimizer = KFACOptimizer(model, engine(), lr=0.1)
    optimizer.refresh(data, LOSS)
    before = values(model)

    def closure():
        return backward(model, data)

    assert optimizer.step(closure) > 0
    assert not torch.equal(model.first.weight, before["first.weight"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, "lr"),
        ({"momentum": 1.0}, "momentum"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"inverse_freq": 0}, "inverse_freq"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(SettingError, match=message):
        KFACOptimizer(mlp(), engine(), **arguments)
    with pytest.raises(SettingError, match="clip"):
        Clipping(kind="sometimes")  # type: ignore[arg-type]


def test_a_step_without_factors_is_an_error():
    model, data = mlp(), batch()
    optimizer = KFACOptimizer(model, engine(), lr=0.1)
    backward(model, data)
    with pytest.raises(CurvatureError, match="none collected yet"):
        optimizer.step()


def test_it_is_an_optimizer_with_a_group_for_each_method():
    optimizer = KFACOptimizer(mlp(), engine(), lr=0.1)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert [group["name"] for group in optimizer.param_groups] == ["kfac"]


class Experts(torch.nn.Module):
    """Two experts as slices of a parameter, and a layer that no forward pass uses."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(4, 4)
        self.experts = torch.nn.Parameter(torch.randn(2, 3, 4))
        self.never = torch.nn.Linear(4, 4)

    def forward(self, x):
        hidden = self.inner(x)
        half = len(x) // 2
        linear = torch.nn.functional.linear
        parts = linear(hidden[:half], self.experts[0]), linear(hidden[half:], self.experts[1])
        return torch.cat(parts)


def expert_batch():
    draws = torch.Generator().manual_seed(3)
    x = torch.randn(10, 4, generator=draws, dtype=torch.float64)
    return x, torch.arange(10) % 3


def experts() -> Experts:
    torch.manual_seed(0)
    return Experts().double()


def named_groups(optimizer, model) -> dict[str, set[str]]:
    names = {id(p): n for n, p in model.named_parameters()}
    return {g["name"]: {names[id(p)] for p in g["params"]} for g in optimizer.param_groups}


def test_the_first_refresh_decides_which_parameters_are_kfacs():
    model = experts()
    optimizer = KFACOptimizer(model, engine(), lr=0.1, rest_lr=0.2, clipping=NONE)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    assert named_groups(optimizer, model)["adamw"] == {"experts"}
    before = values(model)
    one_step(optimizer, model, expert_batch())
    scheduler.step()
    groups = named_groups(optimizer, model)
    assert groups["kfac"] == {"inner.weight", "inner.bias", "experts"}
    assert groups["adamw"] == {"never.weight", "never.bias"}
    assert [g["lr"] for g in optimizer.param_groups] == [0.05, 0.1]
    after = values(model)
    assert not torch.equal(after["experts"], before["experts"])
    assert "momentum" in optimizer.state[model.experts]


def test_a_training_with_other_groups_than_promised_is_resumed_exactly():
    straight, data = experts(), expert_batch()
    optimizer = KFACOptimizer(straight, engine(), lr=0.1, clipping=NONE)
    for _ in range(3):
        one_step(optimizer, straight, data)
    first, second = experts(), experts()
    optimizer = KFACOptimizer(first, engine(), lr=0.1, clipping=NONE)
    one_step(optimizer, first, data)
    state = copy.deepcopy(optimizer.state_dict())
    second.load_state_dict(first.state_dict())
    resumed = KFACOptimizer(second, engine(), lr=0.1, clipping=NONE)
    resumed.load_state_dict(state)
    for _ in range(2):
        one_step(resumed, second, data)
    for name, value in values(straight).items():
        assert torch.equal(value, values(second)[name]), name
