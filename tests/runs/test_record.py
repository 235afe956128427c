"""The run directory: strict JSON, whole files, one ending."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from fisher_lab.runs import atomic, record
from fisher_lab.runs.record import Run, strict


def start(directory: Path, **more) -> Run:
    return Run.start(directory, config={"seed": 0}, overrides=["seed=0"], **more)


def on_disk(run: Run, name: str = "run.json") -> dict:
    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads((run.directory / name).read_text(), parse_constant=no_constant)


def test_the_life_of_a_run(tmp_path):
    run = start(tmp_path / "a" / "b", identity={"data": "x"}, provenance={"host": {"name": "h"}})
    assert on_disk(run)["status"] == run.status == "running"
    assert on_disk(run)["finished"] is None
    noted = {"device": "cpu", "dtypes": {"core": "float64"}}
    run.note(**noted)
    run.complete()
    final = record.read(run.directory)
    assert final["schema"] == "fisher_lab.run/1"
    assert final["status"] == "completed"
    assert final["finished"] >= final["started"]
    assert final["run_id"] == run.run_id
    assert final["provenance"] == {"host": {"name": "h"}, "content": {"data": "x"}, **noted}


def test_a_failure_keeps_type_message_and_traceback(tmp_path):
    run = start(tmp_path)
    try:
        raise KeyError("no such layer")
    except KeyError as error:
        run.fail(error)
    final = on_disk(run)
    assert final["status"] == "failed"
    traceback = final["error"].pop("traceback")
    assert "test_a_failure_keeps" in traceback
    assert final["error"] == {"type": "KeyError", "message": "'no such layer'"}


def test_a_run_ends_once_and_with_a_known_status(tmp_path):
    run = start(tmp_path)
    with pytest.raises(ValueError, match="one of completed, failed, preempted, cancelled"):
        run.end("done")
    run.end("preempted", "SIGUSR2")
    with pytest.raises(ValueError, match="has ended before, as preempted"):
        run.complete()
    assert (on_disk(run)["status"], on_disk(run)["reason"]) == ("preempted", "SIGUSR2")


def test_metrics_merge_and_are_strict(tmp_path):
    import torch

    run = start(tmp_path)
    run.metrics({"loss": np.float32(1.5), "tokens": np.int64(512)})
    run.metrics({"loss": 1.25, "kappa": float("inf"), "cosine": float("nan"), "none": None})
    run.metrics({"norm": torch.tensor(2.0, dtype=torch.float64)})
    numbers = {"loss": 1.25, "tokens": 512, "norm": 2.0}
    assert on_disk(run, "metrics.json") == numbers | dict.fromkeys(("kappa", "cosine", "none"))


@pytest.mark.parametrize("value", ["1.0", [1.0], {"a": 1}, np.zeros(2)])
def test_a_metric_is_one_number(tmp_path, value):
    with pytest.raises(TypeError, match="metric 'loss' must be one number"):
        start(tmp_path).metrics({"loss": value})


def test_metrics_of_an_earlier_run_do_not_stay(tmp_path):
    first = start(tmp_path)
    first.metrics({"loss": 1.0})
    first.complete()
    second = start(tmp_path)
    second.complete()
    assert json.loads((tmp_path / "metrics.json").read_text()) == {}


def test_tables(tmp_path):
    run = start(tmp_path)
    rows = [
        {"name": "a,b", "tied": True, "kappa": 1e6, "fallback": None},
        {"name": 'c"d', "tied": False, "kappa": float("nan"), "clipped": 3},
    ]
    path = run.table("layers.csv", rows)
    with path.open(newline="") as file:
        read = list(csv.DictReader(file))
    assert read == [
        {"name": "a,b", "tied": "true", "kappa": "1000000.0", "fallback": "", "clipped": ""},
        {"name": 'c"d', "tied": "false", "kappa": "", "fallback": "", "clipped": "3"},
    ]


def test_a_write_that_is_cut_short_leaves_the_old_file(tmp_path, monkeypatch):
    run = start(tmp_path)
    run.metrics({"loss": 1.0})

    def power_cut(*_: object) -> None:
        raise OSError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, "replace", power_cut)
        with pytest.raises(OSError, match="power cut"):
            run.metrics({"loss": 2.0})
    assert on_disk(run, "metrics.json") == {"loss": 1.0}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["metrics.json", "run.json"]


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (float("-inf"), None),
        (Path("a/b"), "a/b"),
        ((1, 2), [1, 2]),
        ({"b", "a"}, ["a", "b"]),
        ({1: np.arange(2)}, {"1": [0, 1]}),
        (np.bool_(True), True),
    ],
)
def test_strict(value, plain):
    assert strict(value) == plain


def test_what_is_no_json_is_an_error():
    with pytest.raises(TypeError, match="object cannot be written as JSON"):
        strict(object())


def test_a_run_is_ended_from_outside(tmp_path):
    run = Run.start(tmp_path / "a", config={"seed": 1})
    record.end_from_outside(
        tmp_path / "a", "failed", "SIGKILL", error={"type": "JobDied", "message": "killed"}
    )
    found = record.read(tmp_path / "a")
    assert (found["status"], found["reason"]) == ("failed", "SIGKILL")
    assert found["error"]["message"] == "killed"
    assert found["run_id"] == run.run_id
    assert found["finished"] >= found["started"]


def test_a_process_that_left_no_record_gets_one(tmp_path):
    assert record.status_of(tmp_path / "b") is None
    record.end_from_outside(
        tmp_path / "b", "failed", "exit", otherwise={"run_id": "x", "config": {"seed": 2}}
    )
    found = record.read(tmp_path / "b")
    assert (found["schema"], found["run_id"]) == (record.SCHEMA, "x")
    started = Run.start(tmp_path / "c", config={}).record
    assert set(found) == {*started, "digests"}
    (tmp_path / "b" / "run.json").write_text('{"status": "excellent"}')
    assert record.status_of(tmp_path / "b") is None
