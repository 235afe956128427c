"""The schema: types, ranges and keys of a configuration given as plain values."""

from __future__ import annotations

import dataclasses

import pytest
from omegaconf import OmegaConf

from fisher_lab.config.errors import ConfigError, show
from fisher_lab.config.fields import above, at_least, fraction, null, one_of, problems, whole
from fisher_lab.config.schema import Config, KfacConfig
from fisher_lab.config.validate import all_keys, find, type_text, validate

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("allowed", "good", "bad"),
    [
        (above(0), [1e-300, 5], [0, -1, NAN, INF, None]),
        (at_least(1), [1, 1e9], [0.999, NAN, INF, None]),
        (above(0) | null, [1, None], [0, NAN]),
        (whole(1), [1, 7], [0, None]),
        (whole(0, 3), [0, 3], [-1, 4]),
        (fraction(), [0, 0.99], [1, -0.1, NAN]),
        (one_of("a", "b"), ["a", "b"], ["c", "A", None]),
    ],
)
def test_ranges(allowed, good, bad):
    assert [value for value in good if not allowed.test(value)] == []
    assert [value for value in bad if allowed.test(value)] == []


def test_nothing_given_is_the_default_that_the_documentation_promises():
    assert list(problems(Config())) == []
    assert validate({}) == Config()
    kfac = Config().kfac
    assert (kfac.damping, kfac.max_condition_number) == (1e-4, 1e6)
    assert (kfac.policy, kfac.big_threshold, kfac.n_batches) == ("all", 4096, 1)


@pytest.mark.parametrize(
    ("given", "section", "value"),
    [
        ({"kfac": {"damping": 1}}, "kfac.damping", 1.0),
        ({"kfac": {"damping": "1e-3"}}, "kfac.damping", 1e-3),
        ({"kfac": {"damping_A": None}}, "kfac.damping_A", None),
        ({"kfac": {"include": ["attn", "mlp"]}}, "kfac.include", ["attn", "mlp"]),
        ({"kfac": {"ekfac": "true"}}, "kfac.ekfac", True),
        ({"model": {"revision": 1234567}}, "model.revision", "1234567"),
        ({"model": {"recipe": {"steps": 3}}}, "model.recipe.steps", 3),
        ({"threads": "2"}, "threads", 2),
    ],
)
def test_values_take_the_type_of_their_field(given, section, value):
    node = validate(given)
    for part in section.split("."):
        node = getattr(node, part)
    assert node == value
    assert type(node) is type(value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kfac": {"ekfac": 1}}, "kfac.ekfac=1 is not allowed: kfac.ekfac must be true or false"),
        ({"kfac": {"n_batches": True}}, "kfac.n_batches=true is not allowed: kfac.n_batches must"),
        ({"kfac": {"include": [[1]]}}, "include=[[1]] is not allowed: kfac.include must be a list"),
        ({"kfac": {"damping": {"A": 1}}}, "kfac.damping={A:1} is not allowed: kfac.damping must"),
        ({"kfac": {"dmping": 1}}, "kfac.dmping=1: there is no key kfac.dmping; did you mean"),
        ({"model": {"recipe": {"stpes": 1}}}, "did you mean model.recipe.steps?"),
        ({"model": {"qqqq": 1}}, "model has name, type"),
    ],
)
def test_messages(given, message):
    with pytest.raises(ConfigError) as caught:
        validate(given)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_interpolations_are_resolved_hydra_is_left_out_and_a_missing_value_names_its_key():
    cfg = OmegaConf.create({"seed": 3, "threads": "${seed}", "hydra": {"anything": 1}})
    assert validate(cfg).threads == 3
    with pytest.raises(ConfigError, match=r"^kfac\.damping has no value"):
        validate(OmegaConf.create({"kfac": {"damping": "???"}}))


def test_lists_are_not_shared_between_instances():
    one, other = KfacConfig(), KfacConfig()
    one.include.append("attn")
    assert other.include == []


def test_every_key_says_what_it_means_and_what_it_may_be():
    def fields(section, prefix=""):
        for item in dataclasses.fields(section):
            if dataclasses.is_dataclass(getattr(section, item.name)):
                yield from fields(getattr(section, item.name), f"{prefix}{item.name}.")
            else:
                yield f"{prefix}{item.name}", item

    found = dict(fields(Config()))
    assert list(found) == list(all_keys())
    for key, item in found.items():
        assert item.metadata["meaning"].endswith("."), key
        field = find(key)
        assert field is not None
        assert field.text != "a value of the schema", key


def test_types_are_shown_in_words_and_values_as_they_are_typed():
    assert type_text(float | None) == "a number or null"
    assert type_text(list[str]) == "a list such as [a,b]"
    shown = [show(value) for value in (None, True, NAN, [1, None], {"a": 1.5})]
    assert shown == ["null", "true", "nan", "[1,null]", "{a:1.5}"]
