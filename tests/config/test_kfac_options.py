"""The options of K-FAC stand once: Python, the command line and the docstring agree."""

from __future__ import annotations

import dataclasses
import inspect

import pytest

from fisher_lab import KFACNaturalGradient
from fisher_lab.config.errors import ConfigError, SettingError, show
from fisher_lab.config.kfac import ARGUMENTS, ZERO_ALLOWED, KFACSettings
from fisher_lab.config.schema import Config
from fisher_lab.config.validate import validate

OPTIONS = [item.name for item in dataclasses.fields(KFACSettings)]

PUBLIC = [
    "damping", "damping_A", "damping_G", "max_condition_number", "kfac_use_woodbury",
    "kfac_policy", "kfac_big_threshold", "kfac_auto_rho", "kfac_auto_t_max",
    "kfac_true_fisher_head", "kfac_eps", "woodbury_store_device", "woodbury_dtype",
    "use_eigenvalue_correction", "update_freq", "ema_decay", "use_gpu_eigh", "show_progress",
    "kfac_distributed_reduce", "core_dtype", "apply_dtype", "push_through", "fisher",
    "n_samples", "seed", "true_max_classes", "fisher_scale", "ekfac", "max_columns",
    "max_dense_dim", "column_reduction", "store_limit_mb", "include", "exclude", "tied",
    "norm_layers", "uncovered", "track_diagonal", "progress", "communicator",
]  # fmt: skip
"""Keywords of the constructor that are public."""


def test_python_and_the_command_line_have_the_same_defaults():
    python, section = KFACNaturalGradient().settings, Config().kfac
    assert isinstance(section, KFACSettings)
    for name in OPTIONS:
        assert getattr(python, name) == getattr(section, name), name


def test_the_constructor_has_every_option_under_its_public_name():
    signature = inspect.signature(KFACNaturalGradient)
    assert set(signature.parameters) == {"settings", *PUBLIC}
    text = (KFACNaturalGradient.__doc__ or "").partition("\n    Raises:")[0]
    for item in dataclasses.fields(KFACSettings):
        argument = ARGUMENTS.get(item.name, item.name)
        assert text.count(f"\n        {argument}: ") == 1, argument
        assert signature.parameters[argument].default == getattr(KFACSettings(), item.name)
        about = " ".join(text.partition(f"\n        {argument}: ")[2].split())
        default = show(getattr(KFACSettings(), item.name)).replace("null", "None")
        assert about.startswith(item.metadata["meaning"].replace("null", "None")), argument
        assert f"(default {default}" in about, argument


def test_settings_and_keywords_go_together_and_keywords_win():
    given = KFACSettings(policy="auto", damping=0.5, include=["a"])
    kfac = KFACNaturalGradient(given, damping=0.25, kfac_big_threshold=7, seed=3)
    found = kfac.settings
    assert (found.policy, found.damping, found.big_threshold, found.seed) == ("auto", 0.25, 7, 3)
    given.include.append("b")
    assert found.include == ["a"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ekfac", 1),
        ("update_freq", 2.0),
        ("n_samples", True),
        ("fisher", None),
        ("include", "attn"),
        ("damping", "high"),
        ("damping", None),
        ("max_columns", 0),
    ],
)
def test_a_value_of_another_type_is_refused(name, value):
    with pytest.raises(SettingError, match=f"{name}: .*; allowed: "):
        KFACNaturalGradient(**{name: value})


@pytest.mark.parametrize("name", ZERO_ALLOWED)
def test_no_damping_is_for_python_alone(name):
    assert getattr(KFACNaturalGradient(**{name: 0.0}).settings, name) == 0.0
    with pytest.raises(ConfigError, match=f"kfac.{name}=0"):
        validate({"kfac": {name: 0}})
