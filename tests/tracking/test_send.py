"""What is sent of a run and of a sweep, and under which name."""

from __future__ import annotations

import dataclasses
import json
import statistics

import pytest

from fisher_lab.config.schema import TrackerConfig
from fisher_lab.runs import atomic
from fisher_lab.runs.record import Run
from fisher_lab.tracking import send
from tests.processes import Clock
from tests.tracking.conftest import T_1
from tests.tracking.test_tracker import Sink
from tests.tracking.wandb_files import files, png, read


def test_the_sweep_of_a_directory(tmp_path):
    cell = tmp_path / "damping" / "abc"
    cell.mkdir(parents=True)
    assert send.sweep_of(cell) is None
    (cell.parent / "multirun.yaml").touch()
    assert send.sweep_of(cell) == f"{tmp_path.name}/damping"
    (cell.parent / "sweep.json").touch()
    assert send.sweep_of(cell) == "damping"


def test_what_is_sent_at_the_end_of_a_run(tmp_path):
    run = Run.start(tmp_path / "run", config={}, overrides=[], identity={})
    run.metrics({"loss": 1.0})
    run.table("layers.csv", [{"name": "a"}])
    run.table("empty.csv", [])
    for name in ("density.png", "factors.safetensors", "state.safetensors", "spectral.json"):
        (run.directory / name).write_bytes(b"x")
    run.complete()
    sink = Sink()
    send.send(run, TrackerConfig(), sink)
    assert [call for call in sink.calls if call[0] != "artifact"] == [
        ("summary", ({"loss": 1.0},)),
        ("table", ("layers.csv", [{"name": "a"}])),
        ("image", ("density", run.directory / "density.png")),
        ("finish", ("completed",)),
    ]
    kept = {call[1][0]: call[1][2] for call in sink.calls if call[0] == "artifact"}
    assert kept == {
        "factors.safetensors": "factors",
        "layers.csv": "tables",
        "empty.csv": "tables",
        "spectral.json": "spectra",
    }
    sink = Sink()
    send.send(run, TrackerConfig(artifacts=False), sink)
    assert "artifact" not in {name for name, _ in sink.calls}


def test_the_eigenvalues_of_a_run_are_a_table(tmp_path):
    file = tmp_path / "spectral.json"
    assert send.eigenvalues(file) == []
    for broken in ("{", json.dumps({"per_block": {"a": {"eigenvalues": [2.0]}, "b": {}}})):
        file.write_text(broken)
        assert send.eigenvalues(file) == []
    file.write_text(json.dumps({"per_block": {"a": {"eigenvalues": [2.0, 1.0]}}}))
    assert send.eigenvalues(file) == [
        {"block": "a", "index": 0, "eigenvalue": 2.0},
        {"block": "a", "index": 1, "eigenvalue": 1.0},
    ]


def test_a_resumed_run_keeps_its_name_and_a_repeat_gets_its_own(tmp_path):
    first = send.name_of(tmp_path / "a", "abc")
    assert first[0].startswith("abc-")
    assert first[1] == 1
    assert send.name_of(tmp_path / "a", "abc") == (first[0], 2)
    assert send.name_of(tmp_path / "a", "abc") == (first[0], 3)
    assert send.name_of(tmp_path / "b", "abc")[0] != first[0]
    other = send.name_of(tmp_path / "a", "xyz")
    assert other[0].startswith("xyz-")
    assert other[1] == 1
    (tmp_path / "a" / send.NAME_FILE).write_text("{")
    assert send.name_of(tmp_path / "a", "xyz")[1] == 1


# ---- the table of a sweep ------------------------------------------------------------------------


OFFLINE = TrackerConfig(sinks=["wandb"], mode="offline", budget_s=60.0)


def test_the_table_of_a_sweep_is_averaged_over_seeds(sweep):
    rows = send.aggregate(sweep)
    assert [row["kfac.damping"] for row in rows] == [1e-4, 1e-3]
    assert "seed" not in rows[0]
    assert "same" not in rows[0]
    assert [row["loss/mean"] for row in rows] == [2.5, 5.5]
    assert rows[0]["loss/sd"] == pytest.approx(statistics.stdev([2.0, 3.0]))
    assert rows[0]["loss/high"] - 2.5 == pytest.approx(T_1 * 0.5, rel=1e-3)
    assert rows[0]["loss/n"] == 2
    assert rows[0]["none/mean"] is None
    assert send.aggregate(sweep / "0")[0]["loss/sd"] is None
    assert send.aggregate(sweep / "4") == []


def test_a_sweep_sends_its_table_once_and_again_when_it_has_changed(sweep):
    (sweep / "table.csv").write_text("a,b\n")
    (sweep / "figures").mkdir()
    (sweep / "figures" / "density.png").write_bytes(png())
    assert not send.send_sweep(sweep, TrackerConfig())
    assert not send.send_sweep(sweep, TrackerConfig(sinks=["wandb"], mode="disabled"))
    assert not files(sweep)
    assert send.send_sweep(sweep, OFFLINE)
    assert send.send_sweep(sweep, OFFLINE)
    assert len(files(sweep)) == 1
    atomic.write_json(sweep / "0" / "metrics.json", {"loss": 4.0})
    assert send.send_sweep(sweep, OFFLINE)
    first, second = (read(file) for file in files(sweep))
    assert first.run["run_id"] != second.run["run_id"]
    assert first.run["run_group"] == second.run["run_group"] == "damping"
    assert second.curve("loss/mean") == [(0, 3.5), (1, 5.5)]
    kept = [one["name"] for one in second.artifacts if one["type"] == "tables"]
    assert kept == [f"{second.run['run_id']}-table.csv"]
    assert "figure/density._type" in set().union(*second.history)
    low = 3.5 - T_1 * statistics.stdev([4.0, 3.0]) / 2**0.5
    assert second.curve("loss/low")[0] == (0, pytest.approx(low, rel=1e-4))


def test_metrics_that_cannot_be_read_make_the_table_one_warning_and_the_sweep_goes_on(
    sweep, warnings_of
):
    (sweep / "1" / "metrics.json").write_text("{")
    assert not send.send_sweep(sweep, OFFLINE)
    (warning,) = warnings_of()
    assert warning.startswith(f"the aggregated table of {sweep} was not sent: ")
    assert "1: metrics.json: " in warning
    assert not files(sweep)


@pytest.mark.parametrize("what", ["no network", "an unwritable directory"])
def test_a_table_that_was_not_sent_is_one_warning_and_not_marked(
    what, sweep, tmp_path, monkeypatch, warnings_of
):
    send.aggregate(sweep)  # loads the libraries that it needs
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    config = TrackerConfig(sinks=["wandb"], mode="online", budget_s=2.5)
    if what == "an unwritable directory":
        (tmp_path / "file").write_text("")
        config = dataclasses.replace(config, budget_s=60.0, directory=str(tmp_path / "file" / "x"))
    clock = Clock()
    sent = send.send_sweep(sweep, config)
    assert clock() < (2.5 if what == "no network" else 20.0)
    assert not sent
    assert not (sweep / "tracker" / send.SENT_FILE).exists()
    assert len(warnings_of()) == 1
