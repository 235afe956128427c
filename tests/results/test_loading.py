"""Run directories as frames: whole ones, incomplete ones, broken ones."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from fisher_lab.results import load, load_layers, load_table
from fisher_lab.results.values import ResultsError
from tests.results.run_directories import make_run, make_sweep, swept

LAYERS = [
    {"name": "h.0", "dim_A": 10, "clipped_A": 2, "kappa_A": 1e6, "method": "eig"},
    {"name": "h.1", "dim_A": 20, "clipped_A": 1, "kappa_A": None, "method": "woodbury"},
]


def test_a_row_a_run_with_settings_metrics_and_provenance(tmp_path):
    cells = [
        ({"kfac.damping": 1e-5, "seed": 1}, {"ng/norm": 2.5, "tokens": 512}),
        ({"kfac.damping": 1e-4, "seed": 0}, {"ng/norm": 3.5, "tokens": 512}),
    ]
    frame = load(make_sweep(tmp_path / "s", cells))
    assert frame["kfac.damping"].tolist() == [1e-5, 1e-4]
    assert frame["ng/norm"].tolist() == [2.5, 3.5]
    assert frame["status"].tolist() == ["completed"] * 2
    assert frame["sweep"].tolist() == ["s", "s"]
    assert frame["provenance.versions.torch"].tolist() == ["2.13.0"] * 2
    assert frame["kfac.include"].tolist() == ["[]", "[]"]
    assert frame["overrides"][0] == "kfac.damping=1e-05 seed=1"
    assert frame["seconds"].between(0, 60).all()
    assert frame.attrs["metrics"] == ["ng/norm", "tokens"]
    assert "kfac.damping" in frame.attrs["config"]
    assert frame.attrs["left_out"] == []


def test_null_stays_apart_from_missing_numbers(tmp_path):
    frame = swept(tmp_path, {"kfac.max_condition_number": [None, 1e6]})
    assert frame["kfac.max_condition_number"].tolist() == [None, 1e6]


def test_a_metric_that_is_called_as_a_setting_is_gets_a_prefix(tmp_path):
    make_run(tmp_path / "s" / "0", {"seed": 3}, {"seed": 7.0, "status": math.nan})
    frame = load(tmp_path / "s")
    assert frame["seed"].tolist() == [3]
    assert frame["metric/seed"].tolist() == [7.0]
    assert frame["not_finite"].tolist() == ["metric/status"]


def test_what_is_not_finite_is_named_and_what_was_not_measured_is_not(tmp_path):
    cells = [({"seed": 0}, {"a": math.inf, "b": 1.0}), ({"seed": 1}, {"b": 2.0})]
    frame = load(make_sweep(tmp_path / "s", cells))
    assert frame["a"].isna().all()
    assert frame["not_finite"].tolist() == ["a", ""]


def test_failed_running_and_ended_runs_are_rows(tmp_path):
    root = tmp_path / "s"
    make_run(root / "0", {"seed": 0}, error=MemoryError("no room\nsecond line"))
    make_run(root / "1", {"seed": 1}, status="running")
    make_run(root / "2", {"seed": 2}, status="preempted")
    frame = load(root)
    assert frame["status"].tolist() == ["failed", "running", "preempted"]
    assert frame["reason"].tolist() == ["MemoryError: no room", None, "because"]


BROKEN = {
    "truncated": b'{"schema": "fisher_lab.run/1", "run',
    "empty": b"",
    "list": b"[1, 2]",
    "binary": b"\xff\xfe\x00",
    "schema": b'{"schema": "other/9", "run_id": "a", "status": "completed", "config": {}}',
    "status": b'{"schema": "fisher_lab.run/1", "run_id": "a", "status": "odd", "config": {}}',
    "config": b'{"schema": "fisher_lab.run/1", "run_id": "a", "status": "failed", "config": 1}',
}


@pytest.fixture
def one(tmp_path):
    """A sweep of one run."""
    return make_sweep(tmp_path / "s", [({"seed": 0}, {"a": 1.0})])


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_record_is_left_out_with_the_reason(one, kind):
    (one / "bad").mkdir()
    (one / "bad" / "run.json").write_bytes(BROKEN[kind])
    frame = load(one)
    assert len(frame) == 1
    (left,) = frame.attrs["left_out"]
    assert left.directory.endswith("bad")
    assert left.reason.startswith("run.json")


def test_a_directory_without_a_record_is_left_out(one):
    (one / "9" / ".hydra").mkdir(parents=True)
    (one / ".0.123.tmp").mkdir()
    assert [Path(left.directory).name for left in load(one).attrs["left_out"]] == ["9"]


@pytest.mark.parametrize("text", ['{"a": ', '{"a": "much"}', "[]"])
def test_broken_metrics_make_a_run_corrupt(one, text):
    (one / "0" / "metrics.json").write_text(text)
    frame = load(one)
    assert frame["status"].tolist() == ["corrupt"]
    assert frame["reason"][0].startswith("metrics.json: ")


def test_a_broken_sweep_file_is_told_and_the_runs_are_read(one):
    (one / "sweep.json").write_text("{")
    frame = load(one)
    assert len(frame) == 1
    assert "sweep.json cannot be read" in frame.attrs["left_out"][0].reason


def test_paths_that_overlap_give_every_run_once(tmp_path):
    make_sweep(tmp_path / "r" / "s", [({"seed": 0}, {}), ({"seed": 1}, {})])
    make_sweep(tmp_path / "r" / "t", [({"seed": 0}, {})])
    frame = load([tmp_path / "r", tmp_path / "r" / "s", tmp_path / "r" / "s" / "0"])
    assert sorted(zip(frame["sweep"], frame["seed"], strict=True)) == [("s", 0), ("s", 1), ("t", 0)]
    assert load(tmp_path / "r" / "s" / "0")["sweep"].tolist() == ["s"]


def test_a_path_that_is_not_there():
    with pytest.raises(ResultsError, match="nowhere: there is no such directory"):
        load("nowhere")


def test_a_cell_that_was_not_run_has_the_settings_that_the_sweep_composed(tmp_path):
    root = make_sweep(tmp_path / "s", [({"kfac.policy": "all", "seed": 0}, {"a": 1.0})])
    shared = {"model.name": "mlp", "kfac.include": ["h.0"], "kfac.damping": 1e-3}
    cell = {"run_id": "f" * 16, "axes": {"kfac/policy": "auto"}, "overrides": ["kfac/policy=auto"],
            "settings": {"kfac.policy": "auto", "kfac.max_condition_number": None}}  # fmt: skip
    done = {"run_id": load(root)["run_id"][0], "axes": {"kfac/policy": "all"}, "settings": {}}
    about = {"axes": {"kfac/policy": ["all", "auto"]}, "settings": shared, "cells": [done, cell]}
    (root / "sweep.json").write_text(json.dumps(about))
    frame = load(root)
    assert frame["status"].tolist() == ["completed", "missing"]
    missing = frame.iloc[1]
    for key, value in {**shared, **cell["settings"], "kfac.include": '["h.0"]'}.items():
        assert missing[key] == value
    assert missing["overrides"] == "kfac/policy=auto"


def test_layers_and_other_tables(tmp_path):
    make_run(tmp_path / "s" / "0", {"seed": 0}, layers=LAYERS)
    make_run(tmp_path / "s" / "1", {"seed": 1}, layers=LAYERS)
    frame = load_layers(tmp_path / "s")
    assert frame["name"].tolist() == ["h.0", "h.1"] * 2
    assert frame["clipped_A"].tolist() == [2, 1] * 2
    assert frame["kappa_A"].isna().tolist() == [False, True] * 2
    assert frame["row"].tolist() == [0, 1] * 2
    assert load_table(tmp_path / "s", "curve.csv").empty


def test_a_table_that_was_cut_short_is_left_out(tmp_path):
    make_run(tmp_path / "s" / "0", {"seed": 0}, layers=LAYERS)
    (tmp_path / "s" / "0" / "layers.csv").write_text("name,dim_A\nh.0\n")
    frame = load_layers(tmp_path / "s")
    assert frame.empty
    assert frame.attrs["left_out"][0].reason == "layers.csv: line 2 has 1 fields, the first 2"


def test_a_column_does_not_copy_what_the_frame_knows(one):
    """pandas copies ``attrs`` in depth for every column: 10,000 cells of a sweep.json each time."""
    frame = load(one)
    attrs = frame["seed"].attrs
    for name in ("config", "metrics", "left_out"):
        assert attrs[name] is frame.attrs[name]
    ((_, sweep),) = attrs["sweeps"].items()
    assert sweep is next(iter(frame.attrs["sweeps"].values()))


def test_use_cache_is_accepted_for_one_more_release(tmp_path):
    make_run(tmp_path / "r", {})
    with pytest.warns(DeprecationWarning, match="use_cache"):
        assert len(load(tmp_path / "r", use_cache=False)) == 1
