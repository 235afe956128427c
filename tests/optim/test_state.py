"""The state of a ``KFACOptimizer``: copies, pickles, checkpoints, groups that change."""

import copy
import logging
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from fisher_lab import KFACNaturalGradient
from fisher_lab.config.errors import SettingError
from fisher_lab.optim import KFACOptimizer
from tests import models


def gpt2() -> Any:
    return models.seeded(models.gpt2, torch.float32)


def built(model: Any = None, *, freq: int = 3, **options: Any) -> tuple[Any, KFACOptimizer]:
    model = gpt2() if model is None else model
    kfac = KFACNaturalGradient(damping=0.1, update_freq=freq, ekfac=options.pop("ekfac", False))
    return model, KFACOptimizer(model, kfac, lr=0.01, **options)


def texts(seed: int) -> dict[str, torch.Tensor]:
    """Texts whose padding has no labels: Hugging Face's own loss would count them."""
    batch = models.language_batch(seed=seed)
    return {**batch, "labels": batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)}


def go_on(model: Any, optimizer: KFACOptimizer, first: int, last: int) -> None:
    for step in range(first, last):
        optimizer.zero_grad()
        model(**texts(step)).loss.backward()
        optimizer.step()


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    unlike = [name for name in one if not torch.equal(one[name], other[name])]
    assert not unlike


@pytest.fixture(scope="module", params=[False, True], ids=["kfac", "ekfac"])
def whole(request: Any) -> tuple[bool, dict[str, torch.Tensor]]:
    """Weights after eight steps without an interruption."""
    model, optimizer = built(ekfac=request.param)
    go_on(model, optimizer, 0, 8)
    return request.param, values(model)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save", "saved before it began"])
def test_a_copy_goes_on_to_the_bit_and_leaves_the_original_alone(whole, way, tmp_path):
    ekfac, expected = whole
    model, optimizer = built(ekfac=ekfac)
    done = 0 if way == "saved before it began" else 4  # between two refreshes
    go_on(model, optimizer, 0, done)
    if way == "deepcopy":
        again, other = copy.deepcopy((model, optimizer))
    elif way == "torch.save":
        torch.save((model, optimizer), tmp_path / "both")
        again, other = torch.load(tmp_path / "both", weights_only=False)
    else:
        again, other = pickle.loads(pickle.dumps((model, optimizer)))
    assert other.model is again
    before = values(model)
    go_on(again, other, done, 8)
    assert_same(values(again), expected)
    assert_same(values(model), before)
    go_on(model, optimizer, done, 8)
    assert_same(values(model), expected)


def test_a_copy_of_the_optimizer_alone_has_a_model_of_its_own():
    model, optimizer = built()
    go_on(model, optimizer, 0, 2)
    other = copy.deepcopy(optimizer)
    assert {id(p) for g in other.param_groups for p in g["params"]} == {
        id(p) for p in other.model.parameters()
    }
    assert other.model is not model
    copied = copy.deepcopy(model)  # of the model alone: nothing of the optimizer comes along
    copied(**texts(0)).loss.backward()
    assert optimizer.done == 2


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("begun", [False, True])
def test_distributed_checkpoints_take_the_state_without_a_trace(begun, flat):
    """Asked before and after the first refresh, a training is what it would have been."""
    plain, its = built()
    go_on(plain, its, 0, 6)
    model, optimizer = built()
    done = 4 if begun else 0
    go_on(model, optimizer, 0, done)
    optimizer.zero_grad()
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    assert optimizer.done == done
    go_on(model, optimizer, done, 6)
    assert_same(values(model), values(plain))
    again, other = built()
    again.load_state_dict(model.state_dict())
    set_optimizer_state_dict(again, other, state, options=options)
    assert other.done == done
    assert [g["lr"] for g in other.param_groups] == [g["lr"] for g in optimizer.param_groups]


def test_a_distributed_checkpoint_goes_on_to_the_bit():
    plain, its = built()
    go_on(plain, its, 0, 6)
    model, optimizer = built()
    go_on(model, optimizer, 0, 4)
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    again, other = built()
    again.load_state_dict(model.state_dict())
    set_optimizer_state_dict(again, other, state)
    go_on(again, other, 4, 6)
    assert_same(values(again), values(plain))


def test_a_state_without_factors_gets_new_ones_at_the_next_step():
    model, optimizer = built()
    go_on(model, optimizer, 0, 4)
    state = optimizer.state_dict()
    state["state"] = {
        key: {name: value for name, value in entry.items() if name != "factors"}
        for key, entry in state["state"].items()
    }
    again, other = built()
    again.load_state_dict(model.state_dict())
    other.load_state_dict(state)
    assert other.done == 4
    assert other.refresh_due
    go_on(again, other, 4, 5)
    assert other.kfac.kfac_factors


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "no 'state' in it"),
        ({"state": {}, "param_groups": [{"lr": 0.1, "params": [0]}]}, "have no 'method'"),
    ],
)
def test_the_state_of_another_optimizer_is_refused(state, message):
    _, optimizer = built()
    with pytest.raises(SettingError, match=message):
        optimizer.load_state_dict(state)


def test_the_state_of_an_adamw_and_of_other_parameters_are_refused():
    model, optimizer = built()
    with pytest.raises(SettingError, match="have no 'method'"):
        optimizer.load_state_dict(torch.optim.AdamW(model.parameters()).state_dict())
    frozen = gpt2()
    frozen.transformer.ln_f.requires_grad_(False)
    _, other = built(frozen)
    with pytest.raises(SettingError, match=r"2 parameters are not in both .*ln_f"):
        optimizer.load_state_dict(other.state_dict())


def test_groups_have_rates_momenta_betas_and_decays_of_their_own():
    model, optimizer = built(freq=1, weight_decay=0.0)
    go_on(model, optimizer, 0, 1)
    kfac, adamw = optimizer.param_groups
    kfac["lr"], kfac["weight_decay"] = 0.0, 10.0
    adamw["lr"], adamw["betas"], adamw["weight_decay"] = 1e-3, (0.0, 0.0), 0.5
    before = values(model)
    go_on(model, optimizer, 1, 2)
    after = values(model)
    for name in kfac["param_names"]:
        assert torch.equal(before[name], after[name])
    weight = model.transformer.wte.weight
    # Without memory AdamW steps along the sign; the matrix decays first.
    expected = before["transformer.wte.weight"] * (1 - 1e-3 * 0.5) - 1e-3 * weight.grad.sign()
    moved = weight.grad.abs() > 1e-4
    torch.testing.assert_close(after["transformer.wte.weight"][moved], expected[moved])


def test_embeddings_decay_as_every_matrix_and_vectors_do_not():
    model, optimizer = built(freq=1, weight_decay=0.5, rest_lr=0.1, eps=1e12)
    before = values(model)
    go_on(model, optimizer, 0, 1)
    wte = "transformer.wte.weight"
    torch.testing.assert_close(values(model)[wte], before[wte] * (1 - 0.1 * 0.5))
    assert {g["weight_decay"] for g in optimizer.param_groups} == {0.5}


class Grows(nn.Module):
    """Two layers, of which the first is frozen in the beginning, and a table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 6)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 4)
        self.first.requires_grad_(False)
        self.table.requires_grad_(False)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Any:
        logits = self.second(torch.tanh(self.first(self.table(input_ids))))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def grows() -> Grows:
    torch.manual_seed(0)
    return Grows().double()


def once(model: nn.Module, optimizer: KFACOptimizer, seed: int = 0) -> None:
    draws = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 5, (12,), generator=draws)
    optimizer.zero_grad()
    with optimizer.capture({"input_ids": ids, "labels": ids % 4}, nn.CrossEntropyLoss()):
        model(input_ids=ids, labels=ids % 4)["loss"].backward()
    optimizer.step()


def names(optimizer: KFACOptimizer) -> dict[str, set[str]]:
    return {group["name"]: set(group["param_names"]) for group in optimizer.param_groups}


def moved(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {n for n, p in model.named_parameters() if not torch.equal(p.detach(), before[n])}


SECOND, FIRST = {"second.weight", "second.bias"}, {"first.weight", "first.bias"}


def test_added_groups_are_stepped_with_their_own_rates():
    model, optimizer = built(grows(), freq=1)
    once(model, optimizer)
    model.requires_grad_(True)
    added = [*model.first.parameters(), *model.table.parameters()]
    optimizer.add_param_group({"params": added, "lr": 0.5, "rest_lr": 0.25, "weight_decay": 0.0})
    groups = names(optimizer)
    assert groups == {"kfac": SECOND, "kfac_1": FIRST, "adamw_1": {"table.weight"}}
    assert [g["lr"] for g in optimizer.param_groups] == [0.01, 0.5, 0.25]
    before = values(model)
    once(model, optimizer, 1)
    assert moved(model, before) == SECOND | FIRST | {"table.weight"}
    state = copy.deepcopy(optimizer.state_dict())
    again, other = built(copy.deepcopy(model), freq=1)
    other.load_state_dict(state)
    assert names(other) == groups
    once(model, optimizer, 2)
    once(again, other, 2)
    assert_same(values(model), values(again))
    with pytest.raises(ValueError, match="appear in more than one"):
        optimizer.add_param_group({"params": model.first.weight})
    with pytest.raises(SettingError, match=r"shape \(3,\) is not the model's"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})


def test_what_is_unfrozen_joins_and_what_is_frozen_stays():
    model, optimizer = built(grows(), freq=100)
    once(model, optimizer)
    assert names(optimizer) == {"kfac": SECOND}
    model.requires_grad_(True)
    before = values(model)
    once(model, optimizer, 1)
    assert moved(model, before) == set(before)
    assert names(optimizer) == {"kfac": SECOND | FIRST, "adamw": {"table.weight"}}
    for frozen in ([model.second], [model.first, model.table]):
        model.requires_grad_(True)
        for module in frozen:
            module.requires_grad_(False)
        expected = {n for n, p in model.named_parameters() if p.requires_grad}
        for seed in (2, 3):
            before = values(model)
            once(model, optimizer, seed)
            assert moved(model, before) == expected


def test_old_factors_are_told_of_once(caplog):
    model, optimizer = built(models.seeded(models.MLP, torch.float64), freq=1)
    rows = models.rows_batch(8, 7)
    data = rows["x"], rows["labels"]
    optimizer.refresh(data, nn.CrossEntropyLoss())
    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            nn.functional.cross_entropy(model(data[0]), data[1]).backward()
            optimizer.step()
    said = [r.message for r in caplog.records if "new factors are due" in r.message]
    assert len(said) == 1
    assert "step 2" in said[0]
