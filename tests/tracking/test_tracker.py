"""Every call reaches every sink, and no sink that fails reaches the run."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from fisher_lab import tracking
from fisher_lab.config.schema import TRACKERS, TrackerConfig
from fisher_lab.tracking.base import Guarded, Start, Tracker
from fisher_lab.tracking.process import SinkProcess

CALLS = {
    "start": (Start("id", "id-1", 1, {"seed": 0}, Path("here")),),
    "log": ({"loss": 1.0}, 3),
    "summary": ({"loss": 1.0},),
    "table": ("layers.csv", [{"name": "a"}]),
    "image": ("density", Path("density.png")),
    "artifact": ("model", Path("model"), "checkpoint"),
    "finish": ("completed",),
}


class Sink(Tracker):
    """Remembers its calls, and raises in one of them."""

    def __init__(self, breaks: str | None = None) -> None:
        self.calls: list[tuple[str, tuple]] = []
        self.breaks = breaks

    def _call(self, name: str, *arguments: object) -> None:
        self.calls.append((name, arguments))
        if name == self.breaks:
            raise ConnectionError("the sink is down")


@pytest.mark.parametrize("name", CALLS)
def test_a_sink_that_raises_is_dropped_after_one_warning_and_the_others_go_on(name, caplog):
    broken, sound = Sink(breaks=name), Sink()
    guarded = Guarded(broken, sound)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            getattr(guarded, name)(*CALLS[name])
    assert broken.calls == [(name, CALLS[name])]
    assert sound.calls == [(name, CALLS[name])] * 3
    (warning,) = caplog.messages
    assert "Sink failed" in warning
    assert "the sink is down" in warning


def test_a_keyboard_interrupt_is_not_swallowed():
    class Interrupts(Tracker):
        def summary(self, values):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Guarded(Interrupts()).summary({})


def test_every_sink_of_the_schema_has_its_share_of_the_budget():
    def sinks(**config) -> list[SinkProcess]:
        return tracking.make(TrackerConfig(**config)).sinks  # type: ignore[attr-defined]

    both = sinks(sinks=list(TRACKERS))
    assert [sink.name for sink in both] == list(TRACKERS)
    assert sum(sink._left for sink in both) == 5.0
    assert sinks() == []
    assert sinks(sinks=["wandb"], mode="disabled") == []


def test_the_active_tracker_is_that_of_the_run():
    sink = Sink()
    tracking.active().log({"loss": 2.0}, 1)  # outside a run it goes nowhere
    with tracking.current(sink):
        tracking.active().log({"loss": 1.0}, 1)
    tracking.active().log({"loss": 2.0}, 1)
    assert sink.calls == [("log", ({"loss": 1.0}, 1))]


@pytest.fixture
def made(monkeypatch) -> list[Sink]:
    """The sinks of the runs of a test, in place of W&B."""
    sinks: list[Sink] = []
    monkeypatch.setattr(tracking, "SinkProcess", lambda *_: sinks.append(Sink()) or sinks[-1])
    return sinks


@pytest.mark.parametrize("breaks", ["start", "log", "summary", "table", "finish"])
def test_a_run_does_not_fail_with_its_tracker(breaks, small_task, monkeypatch, tmp_path, capfd):
    sink = Sink(breaks)
    monkeypatch.setattr(tracking, "SinkProcess", lambda *_: sink)
    assert small_task("task=plan", "tracker=wandb", "hydra.run.dir=here") == 0
    assert json.loads((tmp_path / "here" / "run.json").read_text())["status"] == "completed"
    assert len(json.loads((tmp_path / "here" / "metrics.json").read_text())) == 3
    assert capfd.readouterr().err.count("the sink is down") == 1
    assert [name for name, _ in sink.calls][-1] == breaks


def test_a_tracker_gets_what_a_run_is_and_how_it_ended(small_task, made):
    overrides = ["task=plan", "tracker=wandb", "seed=13"]
    assert small_task(*overrides, "hydra.run.dir=here") == 1
    (sink,) = made
    names = [name for name, _ in sink.calls]
    assert names == ["start", *["log"] * 3, "summary", "table", "table", "artifact", "finish"]
    (begun,) = sink.calls[0][1]
    assert begun.name == "task=plan, seed=13"
    assert (begun.job_type, begun.group, begun.attempt) == ("plan", None, 1)
    assert begun.config["seed"] == 13
    assert begun.tracker_id.startswith(begun.run_id + "-")
    assert sink.calls[-1] == ("finish", ("failed",))
