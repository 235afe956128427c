"""Factors to and from files: the same numbers, and errors that leave everything as it was."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fisher_lab import KFACNaturalGradient
from fisher_lab.curvature.errors import FactorFileError, LayerError
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
    other = KFACNaturalGradient(damping=1e-3)
    other.load_state_dict(kfac.state_dict(model), model)
    assert other.step(model, models.language_batch((5, 5))) is False
    for name, value in kfac.diagonal_fisher.items():
        assert torch.equal(other.diagonal_fisher[name], value)


def test_a_file_cut_short_is_an_error_and_the_factors_stay(tmp_path):
    kfac, model = collected()
    path = tmp_path / "factors.safetensors"
    kfac.save(path, model)
    path.write_bytes(path.read_bytes()[:-100])
    before = kfac.kfac_factors
    with pytest.raises(FactorFileError, match=r"factors\.safetensors"):
        kfac.load(path, model)
    assert kfac.kfac_factors is before
    with pytest.raises(FactorFileError, match="does not exist"):
        kfac.load(tmp_path / "nothing", model)


def test_another_version_or_a_foreign_file_is_an_error(tmp_path):
    kfac, model = collected()
    path = tmp_path / "factors.safetensors"
    kfac.save(path, model)
    tensors = load_file(path)
    save_file(tensors, path)
    with pytest.raises(FactorFileError, match="not one"):
        kfac.load(path, model)
    state = kfac.state_dict(model)
    state["header"]["version"] = 99
    with pytest.raises(FactorFileError, match="version 99"):
        kfac.load_state_dict(state, model)
    state = kfac.state_dict(model)
    del state["tensors"]["lm_head/A/matrix"]
    with pytest.raises(FactorFileError, match="lm_head/A/matrix"):
        kfac.load_state_dict(state, model)


def test_factors_of_another_model_name_the_layer_and_overwrite_nothing(tmp_path):
    kfac, model = collected()
    kfac.save(tmp_path / "f", model)
    other = nn.Linear(3, 4)
    weight = other.weight.detach().clone()
    with pytest.raises(LayerError, match="lm_head"):
        KFACNaturalGradient().load(tmp_path / "f", other)
    assert torch.equal(other.weight, weight)
