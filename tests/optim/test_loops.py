"""Training loops as users write them: passes, micro-batches, precision, what is not finite."""

import logging
from typing import Any

import pytest
import torch
from torch import nn

from fisher_lab import KFACNaturalGradient
from fisher_lab.curvature.errors import CurvatureError, NonFiniteError
from fisher_lab.curvature.losses import CrossEntropy
from fisher_lab.optim import KFACOptimizer
from tests import models


def engine(**options: Any) -> KFACNaturalGradient:
    return KFACNaturalGradient(**{"damping": 0.1, "update_freq": 1, **options})


def gpt2(dtype: torch.dtype = torch.float64) -> Any:
    return models.seeded(models.gpt2, dtype)


def texts(seed: int = 1) -> dict[str, torch.Tensor]:
    """Texts whose padding has no labels: Hugging Face's own loss would count them."""
    batch = models.language_batch(seed=seed)
    return {**batch, "labels": batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)}


def factors(kfac: KFACNaturalGradient) -> dict[str, torch.Tensor]:
    found = {}
    for name, f in kfac.kfac_factors.items():
        found[f"{name} G"] = f.G.to_dense()
        if f.A is not None:
            found[f"{name} A"] = f.A.to_dense()
    return found


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], rtol: float) -> None:
    assert one.keys() == other.keys()
    for name in one:
        size = float(other[name].detach().norm())
        assert float((one[name] - other[name]).detach().norm()) <= rtol * size + 1e-30, name


class Counts:
    """Counts the forward passes of a model."""

    def __init__(self, model: nn.Module) -> None:
        self.passes = 0
        model.register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.passes += 1


@pytest.mark.parametrize(
    "options", [{}, {"ekfac": True}, {"kfac_true_fisher_head": True}, {"fisher": "mc"}],
)  # fmt: skip
def test_factors_of_the_steps_own_pass_are_those_of_a_second_one(options, caplog):
    batch = texts()
    expected = engine(**options, exclude=["transformer.wte"])
    expected.collect_kfac_factors(gpt2(), batch)
    model = gpt2()
    counts = Counts(model)
    outer: Any = {} if "fisher" in options or not options else {"outer": "kfac"}
    kfac = engine(**options, exclude=["transformer.wte"])
    optimizer = KFACOptimizer(model, kfac, lr=0.0, **outer)
    with caplog.at_level(logging.WARNING):
        model(**batch).loss.backward()
        optimizer.step()
    second = "fisher" in options
    assert counts.passes == (2 if second else 1)
    assert ("pass of their own: fisher=mc" in caplog.text) is second
    if outer == {}:
        expected.settings.exclude.append("lm_head")
        expected.collect_kfac_factors(gpt2(), batch)
    assert_close(factors(kfac), factors(expected), 1e-6)  # Hugging Face's loss is float32


def test_micro_batches_make_the_factors_and_the_step_of_the_whole_batch():
    batch = {k: v for k, v in texts().items() if k != "attention_mask"}
    batch["labels"] = batch["input_ids"].clone()
    results = []
    for parts in (1, 2):
        model = gpt2()
        optimizer = KFACOptimizer(model, engine(), lr=0.1)
        pieces = [{k: v.tensor_split(parts)[i] for k, v in batch.items()} for i in range(parts)]
        for piece in pieces:
            (model(**piece).loss / parts).backward()
        optimizer.step()
        results.append((factors(optimizer.kfac), dict(model.named_parameters())))
    (one, weights), (other, theirs) = results
    assert_close(one, other, 1e-6)
    assert_close(weights, theirs, 1e-6)


def test_a_refresh_is_one_for_a_step_and_leaves_buffers_and_random_numbers():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Linear(7, 8), nn.BatchNorm1d(8)
            self.drop, self.second = nn.Dropout(0.3), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.drop(torch.relu(self.norm(self.first(x)))))

    def trained(way: str) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
        torch.manual_seed(0)
        model = Net()
        made, counts = [], Counts(model)
        optimizer = KFACOptimizer(model, engine(), lr=0.0, rest_lr=0.0)
        for step in range(3):
            rows = models.rows_batch(16, 7, seed=step)
            data = rows["x"].float(), rows["labels"]
            for part in (slice(0, 8), slice(8, 16)):
                piece = data[0][part], data[1][part]
                if way == "refresh":
                    made.append(optimizer.refresh(piece, CrossEntropy()))
                if way == "none":
                    nn.functional.cross_entropy(model(piece[0]), piece[1]).backward()
                else:
                    with optimizer.capture(piece, CrossEntropy()):
                        nn.functional.cross_entropy(model(piece[0]), piece[1]).backward()
            if way != "none":
                optimizer.step()
        assert made == ([True, False] * 3 if way == "refresh" else [])
        buffers = {name: b.clone() for name, b in model.named_buffers()}
        return torch.rand(4), buffers, counts.passes

    plain, recorded, refreshed = (trained(way) for way in ("none", "record", "refresh"))
    assert (plain[2], recorded[2], refreshed[2]) == (6, 6, 9)
    for found in (recorded, refreshed):
        assert torch.equal(found[0], plain[0])
        for name, buffer in plain[1].items():
            assert torch.equal(found[1][name], buffer), name


def test_a_loss_that_is_not_the_likelihood_takes_a_second_pass_and_says_so(caplog):
    model, batch = gpt2(), texts()
    counts = Counts(model)
    optimizer = KFACOptimizer(model, engine(), lr=0.0, rest_lr=0.0)
    for _ in range(2):
        optimizer.zero_grad()
        outputs = model(**batch)
        (outputs.loss + 0.1 * outputs.logits.square().mean()).backward()
        optimizer.step()
    assert counts.passes == 4
    assert caplog.text.count("is not that of the cross-entropy") == 1
    expected = engine(exclude=["transformer.wte", "lm_head"])
    expected.collect_kfac_factors(gpt2(), batch)
    assert_close(factors(optimizer.kfac), factors(expected), 1e-12)


def test_an_overflow_of_float16_skips_the_step_and_leaves_nothing_behind():
    model, batch = gpt2(torch.float32), texts()
    optimizer = KFACOptimizer(model, engine(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for done in (0, 1):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = model(**batch).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update(2.0**10 if done == 0 else None)
        assert optimizer.done == done
        same = all(torch.equal(p, before[n]) for n, p in model.named_parameters())
        assert same is (done == 0)
    (tokens,) = {f.tokens for f in optimizer.kfac.kfac_factors.values()}
    assert tokens == int(batch["attention_mask"].sum())
    full = engine(exclude=["transformer.wte", "lm_head"])
    full.collect_kfac_factors(gpt2(torch.float32), batch)
    assert_close(factors(optimizer.kfac), factors(full), 0.05)


@pytest.mark.parametrize("name", ["transformer.wte.weight", "transformer.h.0.attn.c_attn.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(name, value):
    model, batch = gpt2(), texts()
    optimizer = KFACOptimizer(model, engine(), lr=0.01)
    for step in range(2):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        if step == 1:
            dict(model.named_parameters())[name].grad.view(-1)[3] = value
            break
        optimizer.step()
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    momenta = {
        (n, key): entry.clone()
        for n, p in model.named_parameters()
        for key, entry in optimizer.state[p].items()
    }
    with pytest.raises(CurvatureError, match="not finite") as raised:
        optimizer.step()
    assert isinstance(raised.value, NonFiniteError) or "c_attn" in str(raised.value)
    assert all(torch.equal(weights[n], p) for n, p in model.named_parameters())
    now = {
        (n, key): entry
        for n, p in model.named_parameters()
        for key, entry in optimizer.state[p].items()
    }
    assert all(torch.equal(momenta[key], now[key]) for key in momenta)


class Adapted(nn.Module):
    """A layer with a low-rank correction whose second matrix is zero, and a dead unit's layer."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.down = nn.Linear(7, 8), nn.Linear(7, 3, bias=False)
        self.up, self.head_ = nn.Linear(3, 8, bias=False), nn.Linear(8, 4)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head_(torch.tanh(self.base(x) + self.up(self.down(x))))


@pytest.mark.parametrize("policy", ["all", "small_only"])
@pytest.mark.parametrize("unit", ["token", "sequence"])
def test_ekfac_steps_where_the_token_gradients_of_a_layer_are_zero(policy, unit):
    torch.manual_seed(0)
    model = Adapted().double()
    kfac = engine(ekfac=True, kfac_policy=policy, ekfac_unit=unit)
    optimizer = KFACOptimizer(model, kfac, lr=0.1)
    rows = models.rows_batch(10, 7)
    for step in range(3):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer.zero_grad()
        with optimizer.capture((rows["x"], rows["labels"]), CrossEntropy()):
            nn.functional.cross_entropy(model(rows["x"]), rows["labels"]).backward()
        optimizer.step()
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        assert moved == {*before} - ({"down.weight"} if step == 0 else set())
        assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
