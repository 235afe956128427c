"""What is sent of a run, and under which name."""

from __future__ import annotations

import json

from fisher_lab.config.schema import TrackerConfig
from fisher_lab.runs.record import Run
from fisher_lab.tracking import send
from tests.tracking.test_tracker import Sink

LOSS = {
    "metric": "loss", "words": "loss on the batches of the run", "value": 1.0,
    "unit": "nats/token", "better": "lower",
}  # fmt: skip


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
        ("table", ("metrics.csv", [LOSS])),
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
