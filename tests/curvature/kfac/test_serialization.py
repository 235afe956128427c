"""Factors to and from files: the same numbers, and errors that leave everything as it was."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fisher_lab import KFACNaturalGradient
from fisher_lab.config.kfac import KFACSettings
from fisher_lab.curvature.errors import FactorFileError, LayerError
from fisher_lab.curvature.kfac import serialization as state_module
from fisher_lab.curvature.kfac.policy import put_back
from tests import models
from tests.capturing import random_like

SETTINGS = {
    "all": {"kfac_policy": "all"},
    "small_only": {"kfac_policy": "small_only"},
    "ekfac": {"kfac_policy": "all", "ekfac": True},
    "fp16": {"kfac_policy": "all", "woodbury_dtype": "fp16"},
    "sum": {"kfac_policy": "all", "tied": "sum"},
    "true head": {"kfac_policy": "all", "kfac_true_fisher_head": True},
}


def collected(**settings) -> tuple[KFACNaturalGradient, nn.Module]:
    model = models.seeded(models.gpt2, torch.float32)
    kfac = KFACNaturalGradient(damping=1e-3, **settings)
    kfac.collect_kfac_factors(model, models.language_batch((9, 4, 7)), keep_gradient=True)
    return kfac, model


@pytest.mark.parametrize("name", SETTINGS)
def test_a_file_gives_back_the_same_numbers(name, tmp_path):
    kfac, model = collected(**SETTINGS[name])
    kfac.save(tmp_path / "factors.safetensors", model)
    assert [p.name for p in tmp_path.iterdir()] == ["factors.safetensors"]
    other = KFACNaturalGradient(damping=1e-3, **SETTINGS[name])
    other.load(tmp_path / "factors.safetensors", model)
    vectors = random_like(dict(model.named_parameters()))
    expected = kfac.compute_natural_gradient(vectors, model)
    for key, value in other.compute_natural_gradient(vectors, model).items():
        assert torch.equal(value, expected[key]), key
    q, k = "transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.c_proj"
    assert (other.kfac_factors[q].A is other.kfac_factors[k].A) is False


def test_state_dict_holds_counters_and_the_legacy_diagonal():
    kfac, model = collected()
    kfac.step(model, models.language_batch((5, 5)))
    other = KFACNaturalGradient(damping=1e-3, update_freq=10)
    other.load_state_dict(kfac.state_dict(model), model)
    assert other.step(model, models.language_batch((5, 5))) is False
    for name, value in kfac.diagonal_fisher.items():
        assert torch.equal(other.diagonal_fisher[name], value)


def assert_refused(kfac, message, load, *arguments):
    """The file or state is an error that says why, and the engine keeps its factors."""
    before = kfac.kfac_factors
    with pytest.raises(FactorFileError, match=message):
        load(*arguments)
    assert kfac.kfac_factors is before


def test_a_file_that_is_none_is_an_error_and_the_factors_stay(tmp_path):
    kfac, model = collected()
    path = tmp_path / "factors.safetensors"
    kfac.save(path, model)
    tensors = load_file(path)
    path.write_bytes(path.read_bytes()[:-100])
    assert_refused(kfac, r"factors\.safetensors", kfac.load, path, model)
    save_file(tensors, path)
    assert_refused(kfac, "not one", kfac.load, path, model)
    assert_refused(kfac, "does not exist", kfac.load, tmp_path / "nothing", model)


def without(*path):
    def damage(state):
        *way, last = path
        for key in way:
            state = state[key]
        del state[last]

    return damage


def cut(name):
    def damage(state):
        tensor = state["tensors"][name]
        cut_columns = name.endswith(("columns", "_g"))
        state["tensors"][name] = tensor[:, :-1] if cut_columns else tensor[:-1]

    return damage


HEADER = ("layers", "fisher", "skipped", "uncovered_own", "rank_counts")
LAYER = "transformer.h.0.mlp.c_fc"
TENSORS = (
    f"{LAYER}/A/matrix", f"{LAYER}/G/columns", f"{LAYER}/own", f"{LAYER}/a", f"{LAYER}/tokens_g",
    f"{LAYER}/order", "transformer.h.0.ln_1/G/matrix", "//uncovered/own/transformer.wpe.weight",
)  # fmt: skip
DAMAGES = {
    "another version": (lambda state: state["header"].update(version=99), "version 99"),
    "no steps": (without("steps"), "the state has no steps"),
    "no tokens": (
        without("header", "layers", "lm_head", "tokens"),
        "header is incomplete.*tokens",
    ),
    "no matrix": (without("tensors", "lm_head/A/matrix"), "lm_head/A/matrix"),
    **{key: (without("header", key), f"header is incomplete.*{key}") for key in HEADER},
    **{name: (cut(name), f"{name} has shape") for name in TENSORS},
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_state_is_an_error_that_names_it(damage, message):
    kfac, model = collected(ekfac=True)
    state = kfac.state_dict(model)
    damage(state)
    assert_refused(kfac, message, kfac.load_state_dict, state, model)


def test_factors_of_another_model_name_the_layer_and_overwrite_nothing(tmp_path):
    kfac, model = collected()
    kfac.save(tmp_path / "f", model)
    other = nn.Linear(3, 4)
    weight = other.weight.detach().clone()
    with pytest.raises(LayerError, match="lm_head"):
        KFACNaturalGradient().load(tmp_path / "f", other)
    assert torch.equal(other.weight, weight)


def test_uncovered_parameters_come_back_from_a_file(tmp_path):
    """Their diagonal and their own gradients; so does what the record says of the factors."""
    kfac, model = collected(uncovered="diagonal")
    kfac.save(tmp_path / "f", model)
    other = KFACNaturalGradient(damping=1e-3, uncovered="diagonal", fisher="mc")
    other.load(tmp_path / "f", model)
    expected = kfac.compute_natural_gradient(None, model)
    found = other.compute_natural_gradient(None, model)
    assert set(found) == set(expected) == set(dict(model.named_parameters()))
    assert kfac.uncovered == other.uncovered == ["transformer.wpe.weight"]
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    own = kfac.own_gradients(model)["transformer.wpe.weight"]
    assert float((expected["transformer.wpe.weight"] - own).norm()) > float(own.norm())
    assert other.last.fisher == "empirical"
    assert other.skipped == kfac.skipped
    assert other.last.rank_counts == kfac.last.rank_counts


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"ekfac": True}, "lm_head was collected without ekfac"),
        ({"uncovered": "diagonal"}, "collected with uncovered='passthrough'"),
    ],
)
def test_factors_that_lack_what_the_settings_need_are_refused(wanted, message):
    kfac, model = collected()
    other, _ = collected(**wanted)
    assert_refused(other, message, other.load_state_dict, kfac.state_dict(model), model)


def test_a_plain_engine_takes_the_factors_of_ekfac():
    kfac, model = collected(ekfac=True)
    plain, _ = collected()
    other = KFACNaturalGradient(damping=1e-3)
    other.load_state_dict(kfac.state_dict(model), model)
    vectors = random_like(dict(model.named_parameters()))
    expected = plain.compute_natural_gradient(vectors, model)
    for name, value in other.compute_natural_gradient(vectors, model).items():
        torch.testing.assert_close(value, expected[name])


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        (KFACSettings(store_device="cpu"), "cpu"),
        (KFACSettings(store_limit_mb=0.001), "cpu"),
        (KFACSettings(), "meta"),
    ],
)
def test_columns_from_a_file_are_placed_as_new_ones(settings, where):
    """`meta` stands for a device here: what is placed on it is not on the host."""
    data = torch.ones(7, 40)
    columns = put_back(data, 2.0, settings, torch.float64, torch.device("meta"))
    assert columns.data.device.type == where
    assert columns.device.type == "meta"
    assert columns.scale == 2.0


def test_the_storage_settings_reach_a_file_that_is_read(monkeypatch):
    kfac, model = collected(woodbury_store_device="cpu", store_limit_mb=3.0)
    seen = []

    def watched(data, scale, settings, core, compute):
        seen.append((settings.store_device, settings.store_limit_mb))
        return put_back(data, scale, settings, core, compute)

    monkeypatch.setattr(state_module, "put_back", watched)
    kfac.load_state_dict(kfac.state_dict(model), model)
    assert set(seen) == {("cpu", 3.0)}
