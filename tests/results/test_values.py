"""What was swept: found by itself, from overrides, sweep files and configurations that differ."""

from __future__ import annotations

import pytest

from fisher_lab.results import find_axes, load
from fisher_lab.results.values import ResultsError, Rounded, label, levels, resolve, same, select
from tests.results.run_directories import make_run, make_sweep, swept


def test_swept_settings_are_found_in_order_with_the_seed_last(tmp_path):
    varied = {"seed": [0, 1], "kfac.damping": [1e-3, 1e-5], "kfac.policy": ["auto", "all"]}
    axes = find_axes(swept(tmp_path, varied))
    assert list(axes.values) == ["kfac.damping", "kfac.policy", "seed"]
    assert axes.values["kfac.damping"] == [1e-5, 1e-3]
    assert axes.values["kfac.policy"] == ["all", "auto"]
    assert axes.names == ["kfac.damping", "kfac.policy"]


def test_a_choice_that_moves_several_settings_is_one_axis(tmp_path):
    models = [("gpt2", 128), ("llama", 64), ("mlp", 64)]
    cells = [{"model.name": n, "model.width": w, "seed": s} for n, w in models for s in (0, 1)]
    for i, cell in enumerate(cells):
        run = make_run(tmp_path / "s" / str(i), cell)
        run.record["overrides"] = [f"model={cell['model.name']}", f"seed={cell['seed']}"]
        run._write()
    axes = find_axes(load(tmp_path / "s"))
    assert list(axes.values) == ["model.name", "seed"]
    assert axes.followers == {"model.name": ["model.width"]}


def test_the_seed_is_never_merged_with_what_was_only_run_once(tmp_path):
    cells = [{"kfac.damping": 1e-5, "seed": 0}, {"kfac.damping": 1e-4, "seed": 1}]
    axes = find_axes(load(make_sweep(tmp_path / "s", [(c, {}) for c in cells])))
    assert list(axes.values) == ["kfac.damping", "seed"]


def test_null_is_a_value(tmp_path):
    axes = find_axes(swept(tmp_path, {"kfac.max_condition_number": [None, 1e6, 1e5]}))
    assert axes.values == {"kfac.max_condition_number": [1e5, 1e6, None]}


def test_names_are_resolved_and_unknown_ones_get_a_hint(tmp_path):
    frame = swept(tmp_path, {})
    assert resolve(frame, "kfac/policy") == "kfac.policy"
    assert resolve(frame, "kfac/kappa") == "kfac.max_condition_number"
    assert resolve(frame, "model") == "model.name"
    with pytest.raises(ResultsError, match=r"kfac.dampign: .* did you mean kfac.damping"):
        resolve(frame, "kfac.dampign")


def test_runs_are_selected_by_what_values_mean(tmp_path):
    varied = {"kfac.damping": [1e-5, 1e-4], "kfac.max_condition_number": [None, 1e6]}
    frame = swept(tmp_path, varied)
    assert len(select(frame, {"kfac.damping": "1e-5"})) == 2
    assert len(select(frame, {"kfac.damping": ["0.00001", "1E-4"]})) == 4
    assert len(select(frame, {"kfac.max_condition_number": "null"})) == 2
    assert len(select(frame, {"kfac.max_condition_number": "1000000"})) == 2


@pytest.mark.parametrize(
    ("left", "right", "answer"),
    [
        ("1e-5", 0.00001, True), (1, 1.0, True), ("null", None, True), ("true", True, True),
        (True, 1, False), ("auto", "all", False), (0.1 + 0.2, 0.3, True), ("01", 1, True),
        ([], "[]", True),
    ],
)  # fmt: skip
def test_values_are_the_same_by_their_meaning(left, right, answer):
    assert same(left, right) is answer


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1e-5, "1e-5"), (3e-5, "3e-5"), (1e6, "1e6"), (0.1, "0.1"), (512, "512"), (None, "null"),
        (True, "true"), ("a_b", "a_b"), (2.5e-7, "2.5e-7"), (1e-3, "0.001"),
    ],
)  # fmt: skip
def test_labels(value, text):
    assert label(value) == text


def test_levels_are_in_order_each_once():
    assert levels(["b", 1e-3, None, "1e-3", 1e-5, "a"]) == [1e-5, 1e-3, "a", "b", None]


@pytest.mark.parametrize(
    ("value", "spread", "text"),
    [
        (1.23456, 0.0567, "1.235 ± 0.057"), (1234.5, 56.7, "1234 ± 57"), (0.3, 45.0, "0 ± 45"),
        (1.5e-7, 2.2e-8, "(1.50 ± 0.22)e-7"), (-0.04, 0.5, "-0.04 ± 0.50"), (512, None, "512"),
        (0.123456, None, "0.1235"), (1.23456e9, None, "1.235e9"), (0.0, None, "0"), (0.0, 0.0, "0"),
        (2.0, 0.0, "2"), (123456.0, 1e-30, "(1.23456000000000 ± 0.00000000000000)e5"),
        (-0.001, 0.4, "0.00 ± 0.40"),
    ],
)  # fmt: skip
def test_numbers_have_the_digits_that_the_interval_leaves(value, spread, text):
    assert Rounded(value, spread).plain == text
