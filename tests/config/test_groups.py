"""Every option of every group composes, and is valid where it needs nothing more."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from fisher_lab.config import paths
from fisher_lab.config.errors import ConfigError
from fisher_lab.config.schema import Config
from fisher_lab.config.validate import validate

NEEDS = {
    "model=pretrained": "model.name_or_path=some/model",
    "data=text_file": "data.path=some.txt",
    "data=hf": "data.path=some/data",
}
"""Options that stand for something only the user can name, and an override that names it."""


def options() -> list[str]:
    found = []
    for file in sorted(paths.conf().rglob("*.yaml")):
        group = file.parent.relative_to(paths.conf())
        if group != Path() and group.parts[0] != "hydra":
            found.append(f"{group.as_posix()}={file.stem}")
    return found


def composed(*overrides: str) -> Config:
    with initialize_config_dir(str(paths.conf()), version_base="1.3"):
        return validate(compose("config", list(overrides)))


def test_the_default_run_is_the_schemas_but_for_what_conf_sets():
    expected = Config()
    expected.kfac.policy, expected.kfac.big_threshold = "auto", 1024
    expected.kfac.update_freq = 10
    expected.kfac.damping, expected.kfac.n_batches = None, 48
    expected.kfac.damping_A, expected.kfac.damping_G = 0.3, 1e-3
    expected.task.heldout_batches, expected.task.engine_batches = 104, 1
    expected.data.heldout_fraction = 0.4
    expected.lanczos.density_steps, expected.lanczos.dimension_damping = 20, 1e-4
    expected.group_fisher.unit = "sequence"
    assert composed() == expected


@pytest.mark.parametrize("task", ["analyze", "plan", "train"])
@pytest.mark.parametrize("preset", [None, "standard", "paper", "small", "large"])
def test_a_damping_that_is_given_is_that_of_both_sides_whatever_a_preset_says(preset, task):
    chosen = [f"task={task}", *([] if preset is None else [f"kfac/damping={preset}"])]
    kfac = composed(*chosen, "kfac.damping=0.02").kfac
    assert (kfac.damping, kfac.damping_A, kfac.damping_G) == (0.02, None, None)
    assert (kfac.lam_A, kfac.lam_G) == (0.02, 0.02)
    kfac = composed(*chosen, "kfac={damping:0.02,damping_G:0.5}").kfac
    assert (kfac.lam_A, kfac.lam_G) == (0.02, 0.5)


def test_one_side_that_is_given_leaves_the_other_to_the_preset():
    kfac = composed("kfac.damping_A=7").kfac
    assert (kfac.lam_A, kfac.lam_G) == (7, 1e-3)


def test_the_notes_settings_are_a_preset_and_those_of_trainings_are_as_they_were():
    notes = composed("kfac/damping=paper").kfac
    assert (notes.lam_A, notes.lam_G, notes.n_batches) == (1e-4, 1e-4, 1)
    assert notes.max_condition_number == 1e6
    trained = composed("task=train", "optimizer=kfac").kfac
    assert (trained.damping, trained.damping_A, trained.n_batches) == (1e-3, None, 1)
    assert composed("task=train").kfac == notes


@pytest.mark.parametrize("option", options())
def test_option(option):
    if option in NEEDS:
        with pytest.raises(ConfigError):
            composed(option)
        config = composed(option, NEEDS[option])
    else:
        config = composed(option)
    group, _, name = option.partition("=")
    if "/" not in group and hasattr(getattr(config, group), "name"):
        assert getattr(config, group).name == name.removesuffix("_tuned")


KEYS = {
    "policy": ("policy", {name: name for name in ("all", "auto", "hybrid", "small_only")}),
    "damping": ("damping", {"paper": 1e-4, "small": 1e-5, "large": 1e-3}),
    "kappa": ("max_condition_number", {"paper": 1e6, "tight": 1e5, "loose": 1e7, "none": None}),
    "reduce": ("reduce", {name: name for name in ("none", "gather", "gram")}),
}
"""Group -> the key that its options set, and to what."""


@pytest.mark.parametrize(
    ("option", "key", "value"),
    [
        (f"kfac/{group}={option}", key, value)
        for group, (key, values) in KEYS.items()
        for option, value in values.items()
    ],
)
def test_the_groups_of_kfac_set_plain_keys(option, key, value):
    changed = composed("task=train", option)  # whose preset sets nothing beside
    assert getattr(changed.kfac, key) == value
    default = composed("task=train")
    setattr(changed.kfac, key, getattr(default.kfac, key))
    assert changed == default  # and nothing else


def test_a_plain_key_wins_over_its_group():
    assert composed("kfac/damping=small", "kfac.damping=0.5").kfac.damping == 0.5
    assert composed("kfac.damping=0.5", "kfac/damping=small").kfac.damping == 0.5
