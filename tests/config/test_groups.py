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
    expected.lanczos.density_steps, expected.lanczos.dimension_damping = 20, 1e-4
    expected.group_fisher.unit = "sequence"
    assert composed() == expected


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
        assert getattr(config, group).name == name


@pytest.mark.parametrize(
    ("option", "key", "value"),
    [
        ("kfac/policy=all", "policy", "all"),
        ("kfac/policy=auto", "policy", "auto"),
        ("kfac/policy=hybrid", "policy", "hybrid"),
        ("kfac/policy=small_only", "policy", "small_only"),
        ("kfac/damping=paper", "damping", 1e-4),
        ("kfac/damping=small", "damping", 1e-5),
        ("kfac/damping=large", "damping", 1e-3),
        ("kfac/kappa=paper", "max_condition_number", 1e6),
        ("kfac/kappa=tight", "max_condition_number", 1e5),
        ("kfac/kappa=loose", "max_condition_number", 1e7),
        ("kfac/kappa=none", "max_condition_number", None),
        ("kfac/reduce=none", "reduce", "none"),
        ("kfac/reduce=gather", "reduce", "gather"),
        ("kfac/reduce=gram", "reduce", "gram"),
    ],
)
def test_the_groups_of_kfac_set_plain_keys(option, key, value):
    changed = composed(option)
    assert getattr(changed.kfac, key) == value
    default = composed()
    setattr(changed.kfac, key, getattr(default.kfac, key))
    assert changed == default  # and nothing else


def test_a_plain_key_wins_over_its_group():
    assert composed("kfac/damping=small", "kfac.damping=0.5").kfac.damping == 0.5
    assert composed("kfac.damping=0.5", "kfac/damping=small").kfac.damping == 0.5


def test_the_sweeps_of_the_project_are_found():
    with initialize_config_dir(str(paths.conf()), version_base="1.3"):
        cfg = compose("config", ["+sweeps=damping"], return_hydra_config=True)
    assert "kfac.damping" in cfg.hydra.sweeper.params
