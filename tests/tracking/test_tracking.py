"""Sinks: every call is handed on, and none that fails reaches the run."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from fisher_lab import tracking
from fisher_lab.config.schema import TRACKERS, TrackerConfig
from fisher_lab.runs.record import Run
from fisher_lab.tracking import Guarded, NoTracker, Start, identity, send, worker

START = Start("id", "id-1", 1, {"seed": 0}, Path("here"))

CALLS = {
    "start": (START,),
    "log": ({"loss": 1.0}, 3),
    "summary": ({"loss": 1.0},),
    "table": ("layers.csv", [{"name": "a"}]),
    "image": ("density", Path("density.png")),
    "artifact": ("model", Path("model"), "checkpoint"),
    "finish": ("completed",),
}


class Sink:
    """Remembers its calls; raises in the one that it is told to."""

    def __init__(self, breaks: str | None = None) -> None:
        self.calls: list[tuple[str, tuple]] = []
        self.breaks = breaks

    def __getattr__(self, name: str):
        if name == "name":
            raise AttributeError(name)

        def call(*arguments):
            self.calls.append((name, arguments))
            if name == self.breaks:
                raise ConnectionError("the sink is down")

        return call


@pytest.mark.parametrize("name", CALLS)
def test_calls_are_handed_on_to_every_sink(name):
    sinks = [Sink(), Sink()]
    getattr(Guarded(*sinks), name)(*CALLS[name])
    assert [sink.calls for sink in sinks] == [[(name, CALLS[name])]] * 2


@pytest.mark.parametrize("name", CALLS)
def test_a_sink_that_raises_is_left_alone_after_one_warning(name, caplog):
    broken, sound = Sink(breaks=name), Sink()
    guarded = Guarded(broken, sound)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            getattr(guarded, name)(*CALLS[name])
    assert (len(broken.calls), len(sound.calls)) == (1, 3)
    (warning,) = caplog.messages
    assert "Sink failed" in warning
    assert "the sink is down" in warning


def test_a_keyboard_interrupt_is_not_swallowed():
    class Interrupts(Sink):
        def summary(self, values):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Guarded(Interrupts()).summary({})


@pytest.mark.parametrize("name", CALLS)
def test_no_tracker_takes_every_call_and_writes_nothing(name, tmp_path):
    assert getattr(NoTracker(), name)(*CALLS[name]) is None
    assert list(tmp_path.iterdir()) == []


def test_every_sink_of_the_schema_can_be_made():
    assert set(tracking._SINKS) == set(worker.SINKS) == set(TRACKERS)
    both = tracking.make(TrackerConfig(sinks=list(TRACKERS)))
    assert [sink.name for sink in both._sinks] == list(TRACKERS)
    assert sum(sink._left for sink in both._sinks) == 5.0
    assert tracking.make(TrackerConfig())._sinks == []
    assert tracking.make(TrackerConfig(sinks=["wandb"], mode="disabled"))._sinks == []


def test_the_active_tracker_is_that_of_the_run():
    sink = Sink()
    assert isinstance(tracking.active(), NoTracker)
    with tracking.current(sink):
        tracking.active().log({"loss": 1.0}, 1)
    assert sink.calls == [("log", ({"loss": 1.0}, 1))]
    assert isinstance(tracking.active(), NoTracker)


@pytest.mark.parametrize("breaks", ["start", "log", "summary", "table", "finish"])
def test_a_run_does_not_fail_with_its_tracker(breaks, small_task, monkeypatch, tmp_path, capfd):
    sink = Sink(breaks)
    monkeypatch.setitem(tracking._SINKS, "wandb", lambda *_: sink)
    assert small_task("task=plan", "tracker=wandb", "hydra.run.dir=here") == 0
    assert json.loads((tmp_path / "here" / "run.json").read_text())["status"] == "completed"
    assert len(json.loads((tmp_path / "here" / "metrics.json").read_text())) == 3
    assert capfd.readouterr().err.count("the sink is down") == 1
    assert [name for name, _ in sink.calls][-1] == breaks


def test_a_tracker_hears_how_the_run_went(small_task, monkeypatch):
    sink = Sink()
    monkeypatch.setitem(tracking._SINKS, "wandb", lambda *_: sink)
    overrides = ["task=plan", "tracker=wandb", "seed=13"]
    assert small_task(*overrides, "hydra.run.dir=here") == 1
    names = [name for name, _ in sink.calls]
    assert names == ["start", *["log"] * 3, "summary", "table", "artifact", "finish"]
    (begun,) = sink.calls[0][1]
    assert begun.name == " ".join(overrides)
    assert (begun.job_type, begun.group, begun.attempt) == ("plan", None, 1)
    assert begun.config["seed"] == 13
    assert begun.tracker_id.startswith(begun.run_id + "-")
    assert sink.calls[-1] == ("finish", ("failed",))


def test_the_cells_of_a_sweep_are_a_group(small_task, monkeypatch):
    sinks = []
    monkeypatch.setitem(tracking._SINKS, "wandb", lambda *_: sinks.append(Sink()) or sinks[-1])
    code = small_task(
        "-m", "+sweeps=damping", "kfac.damping=1,2", "kfac.max_condition_number=null", "seed=0",
        "tracker=wandb",
    )  # fmt: skip
    assert code == 0
    starts = [sink.calls[0][1][0] for sink in sinks]
    assert [begun.group for begun in starts] == ["damping"] * 2
    assert len({begun.tracker_id for begun in starts}) == 2


def test_the_sweep_of_a_directory(tmp_path):
    cell = tmp_path / "damping" / "abc"
    cell.mkdir(parents=True)
    assert send.sweep_of(cell) is None
    (cell.parent / "multirun.yaml").touch()
    assert send.sweep_of(cell) == f"{tmp_path.name}/damping"
    (cell.parent / "sweep.json").touch()
    assert send.sweep_of(cell) == "damping"


def test_what_is_sent_at_the_end(tmp_path):
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
    file.write_text("{")
    assert send.eigenvalues(file) == []
    file.write_text(json.dumps({"per_block": {"a": {"eigenvalues": [2.0, 1.0]}, "b": {}}}))
    assert send.eigenvalues(file) == []
    file.write_text(json.dumps({"per_block": {"a": {"eigenvalues": [2.0, 1.0]}}}))
    assert send.eigenvalues(file) == [
        {"block": "a", "index": 0, "eigenvalue": 2.0},
        {"block": "a", "index": 1, "eigenvalue": 1.0},
    ]


def test_a_resumed_run_keeps_its_name_and_a_repeat_gets_its_own(tmp_path):
    first = identity.claim(tmp_path / "a", "abc")
    assert first[0].startswith("abc-")
    assert first[1] == 1
    assert identity.claim(tmp_path / "a", "abc") == (first[0], 2)
    assert identity.claim(tmp_path / "a", "abc") == (first[0], 3)
    assert identity.claim(tmp_path / "b", "abc")[0] != first[0]
    other = identity.claim(tmp_path / "a", "xyz")
    assert other[0].startswith("xyz-")
    assert other[1] == 1
    (tmp_path / "a" / identity.FILE).write_text("{")
    assert identity.claim(tmp_path / "a", "xyz")[1] == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tracker.sinks=[wandb,wandb]", "a list of wandb, tensorboard"),
        ("tracker.sinks=[mlflow]", "a list of wandb, tensorboard"),
        ("tracker.mode=sometimes", "online, offline, disabled or null"),
        ("tracker.project='a b'", "letters, digits"),
        ("tracker.budget_s=-1", "at least 0"),
    ],
)
def test_bad_settings_are_refused(small_task, override, message, capfd, tmp_path):
    assert small_task("task=plan", override) == 2
    assert message in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []
