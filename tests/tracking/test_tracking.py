"""Sinks: every call is handed on, and none that fails reaches the run."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from fisher_lab import tracking
from fisher_lab.config.schema import TrackerConfig
from fisher_lab.tracking import Guarded, NoTracker

CALLS = {
    "start": ("id", {"seed": 0}, Path("here")),
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
        def call(*arguments):
            self.calls.append((name, arguments))
            if name == self.breaks:
                raise ConnectionError("the sink is down")

        return call


@pytest.mark.parametrize("name", CALLS)
def test_calls_are_handed_on(name):
    sink = Sink()
    getattr(Guarded(sink), name)(*CALLS[name])
    assert sink.calls == [(name, CALLS[name])]


@pytest.mark.parametrize("name", CALLS)
def test_a_sink_that_raises_is_left_alone_after_one_warning(name, caplog):
    sink = Sink(breaks=name)
    guarded = Guarded(sink)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            getattr(guarded, name)(*CALLS[name])
    assert len(sink.calls) == 1
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


def test_every_type_of_the_schema_can_be_made():
    assert isinstance(tracking.make(TrackerConfig()), Guarded)


@pytest.mark.parametrize("breaks", ["start", "summary", "table", "finish"])
def test_a_run_does_not_fail_with_its_tracker(breaks, monkeypatch, tmp_path, capfd):
    import sys
    import types

    from fisher_lab import cli
    from fisher_lab.tasks import job

    sink = Sink(breaks)
    module = types.ModuleType("small_task")

    def run(config, run):
        run.metrics({"loss": 1.0})
        run.table("layers.csv", [{"name": "a"}])

    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "small_task", module)
    monkeypatch.setitem(job.TASKS, "plan", "small_task")
    monkeypatch.setitem(tracking._SINKS, "none", lambda: sink)
    assert cli.main(["task=plan", "hydra.run.dir=here"]) == 0
    assert json.loads((tmp_path / "here" / "run.json").read_text())["status"] == "completed"
    assert capfd.readouterr().err.count("the sink is down") == 1
    assert [name for name, _ in sink.calls][-1] == breaks


def test_a_tracker_hears_how_the_run_ended(monkeypatch, tmp_path):
    import sys
    import types

    from fisher_lab import cli
    from fisher_lab.tasks import job

    sink, module = Sink(), types.ModuleType("small_task")

    def run(config, run):
        run.metrics({"loss": 1.0})
        raise RuntimeError("halfway")

    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "small_task", module)
    monkeypatch.setitem(job.TASKS, "plan", "small_task")
    monkeypatch.setitem(tracking._SINKS, "none", lambda: sink)
    assert cli.main(["task=plan", "hydra.run.dir=here"]) == 1
    assert sink.calls[1:] == [("summary", ({"loss": 1.0},)), ("finish", ("failed",))]
