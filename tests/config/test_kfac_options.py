"""The options of K-FAC stand once: Python, the command line and the docstring agree."""

# pyright: reportArgumentType=false

from __future__ import annotations

import dataclasses
import inspect

import pytest

from fisher_lab import KFACNaturalGradient
from fisher_lab.config.errors import ConfigError, SettingError, show
from fisher_lab.config.kfac import ARGUMENTS, BY_POSITION, IN_PYTHON, KFACSettings
from fisher_lab.config.schema import Config
from fisher_lab.config.validate import validate

OPTIONS = [item.name for item in dataclasses.fields(KFACSettings)]

PUBLIC = [
    "damping", "damping_A", "damping_G", "max_condition_number",
    "kfac_use_woodbury",
    "kfac_policy", "kfac_big_threshold", "kfac_auto_rho", "kfac_auto_t_max",
    "kfac_true_fisher_head", "kfac_eps", "woodbury_store_device", "woodbury_dtype",
    "use_eigenvalue_correction", "update_freq", "ema_decay", "use_gpu_eigh", "show_progress",
    "kfac_distributed_reduce", "core_dtype", "apply_dtype", "push_through", "fisher", "sharing",
    "experts", "damping_mode",
    "n_samples", "seed", "true_max_classes", "fisher_scale", "ekfac", "ekfac_unit", "max_columns",
    "max_dense_dim", "column_reduction", "store_limit_mb", "include", "exclude", "tied",
    "norm_layers", "uncovered", "damping_mode", "track_diagonal", "progress", "communicator",
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


@pytest.mark.parametrize("name", IN_PYTHON)
def test_no_damping_is_for_python_alone(name):
    assert getattr(KFACNaturalGradient(**{name: 0.0}).settings, name) == 0.0
    with pytest.raises(ConfigError, match=f"kfac.{name}=0"):
        validate({"kfac": {name: 0}})


def test_values_by_position_get_the_names_that_they_had_and_say_so():
    with pytest.warns(DeprecationWarning, match="by position"):
        found = KFACNaturalGradient(1e-3, None, 2e-3, 1e4, False, use_gpu_eigh=False).settings
    wanted = KFACSettings(
        damping=1e-3, damping_G=2e-3, max_condition_number=1e4, use_woodbury=False
    )
    assert {name: getattr(found, name) for name in OPTIONS} == dataclasses.asdict(wanted)
    assert found.on_host
    assert list(BY_POSITION) == PUBLIC[: len(BY_POSITION)]


@pytest.mark.parametrize(
    ("values", "options", "problem"),
    [
        (("1e-3",), {}, "damping: '1e-3'; allowed: a finite number of at least 0"),
        ((1e-3,), {"damping": 1e-3}, "multiple values for argument 'damping'"),
        ((1e-3,) * 20, {}, "20 arguments by position; allowed: 19"),
    ],
)
def test_wrong_values_by_position_are_refused(values, options, problem):
    with (
        pytest.warns(DeprecationWarning, match="by position"),
        pytest.raises((SettingError, TypeError), match=problem),
    ):
        KFACNaturalGradient(*values, **options)
