"""The digests of a run: recorded at its end, and broken by every later change of its files."""

from __future__ import annotations

import json
import shutil

import pytest

from fisher_lab.runs import digests, record
from fisher_lab.runs.record import Run


@pytest.fixture
def run(tmp_path):
    run = Run.start(tmp_path / "run", config={"seed": 0}, overrides=["seed=0"])
    run.metrics({"loss": 1.5})
    run.table("layers.csv", [{"name": "h.0", "kappa": 2.0}])
    (run.directory / "model").mkdir()
    (run.directory / "model" / "model.safetensors").write_bytes(b"weights")
    (run.directory / "fisher_lab.log").write_text("begun\n")
    run.complete()
    return run


def broken(run, **more):
    return dict(digests.broken(run.directory, record.read(run.directory), **more))


def test_every_file_has_a_digest_but_logs(run):
    found = record.read(run.directory)["digests"]
    assert list(found) == ["run.json", "layers.csv", "metrics.json", "model/model.safetensors"]
    assert found["metrics.json"] == digests.of_file(run.directory / "metrics.json")
    assert broken(run) == {}


def test_what_others_write_later_breaks_nothing(run):
    for name in ("fisher_lab.log", "tracker/x", ".hydra/config.yaml", "ranks/0.status.json"):
        file = run.directory / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("more\n")
    assert broken(run) == {}


def test_changed_removed_added_and_linked_files_are_named(run):
    (run.directory / "metrics.json").write_text('{"loss": 1.4}')
    (run.directory / "layers.csv").unlink()
    (run.directory / "extra.csv").write_text("a\n")
    weights = run.directory / "model" / "model.safetensors"
    weights.rename(run.directory.parent / "weights")
    weights.symlink_to(run.directory.parent / "weights")
    assert broken(run) == {
        "extra.csv": "added after the run had ended",
        "layers.csv": "removed after the run had ended",
        "metrics.json": "changed after the run had ended",
        "model/model.safetensors": "a symbolic link, which is not followed",
    }


def test_the_record_itself_has_one(run):
    file = run.directory / "run.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content))  # another layout is no other content
    assert broken(run) == {}
    content["config"]["seed"] = 1
    file.write_text(json.dumps(content))
    assert broken(run) == {"run.json": "changed after the run had ended"}


def test_files_that_a_copy_leaves_out_must_be_those_that_the_run_had(run):
    known = record.read(run.directory)["digests"]["model/model.safetensors"]
    shutil.rmtree(run.directory / "model")
    name = "model/model.safetensors"
    assert broken(run, left_out={name: known}) == {}
    assert set(broken(run, left_out={name: "another"})) == set(broken(run)) == {name}


def test_a_record_that_is_amended_or_ended_by_others_is_sealed_again(tmp_path):
    run = Run.start(tmp_path, config={}, overrides=[])
    assert "digests" not in record.read(tmp_path)
    run.fail(RuntimeError("first"))
    run.amend(record.describe(RuntimeError("the cause")))
    assert broken(run) == {}
    run.metrics({"loss": 1.0})
    record.end_from_outside(tmp_path, "failed", "killed")
    assert "metrics.json" in record.read(tmp_path)["digests"]
    assert broken(run) == {}


def test_a_run_that_may_come_back_has_no_digests_of_files(run, tmp_path):
    record.end_from_outside(run.directory, "preempted", "SIGUSR2")
    assert list(record.read(run.directory)["digests"]) == ["run.json"]
    (run.directory / "metrics.json").unlink()
    assert broken(run) == {}
