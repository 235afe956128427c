"""TensorBoard event files, read back; and the error where the package is missing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.tracking.conftest import assert_complete
from tests.tracking.wandb_files import png

if TYPE_CHECKING:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytest.importorskip("tensorboard")


def events_in(directory: Path) -> EventAccumulator:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory / "tracker" / "tensorboard"))
    events.Reload()
    return events


def losses(events: EventAccumulator) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events.Scalars("curve/loss")]


def test_event_files_are_read_back(sink, start, tmp_path):
    tracker = sink("tensorboard")
    tracker.start(start())
    for step in range(1, 4):
        tracker.log({"loss": 1.0 / step, "nothing": None}, step)
    tracker.summary({"loss/heldout": 0.25, "missing": None})
    tracker.table("layers.csv", [{"name": "a|b", "eigenvalue": 1.0}, {"eigenvalue": 10.0}])
    (tmp_path / "figure.png").write_bytes(png())
    tracker.image("figure", tmp_path / "figure.png")
    tracker.artifact("model", tmp_path, "checkpoint")
    tracker.finish("completed")
    events = events_in(tmp_path)
    assert losses(events) == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    assert events.Scalars("summary/loss/heldout")[0].value == 0.25
    tags = events.Tags()
    assert "curve/nothing" not in tags["scalars"]
    assert tags["images"] == ["figure/figure"]
    assert tags["histograms"] == ["histogram/layers/log10_eigenvalue"]
    (table,) = events.Tensors("table/layers/text_summary")
    assert rb"a\|b" in table.tensor_proto.string_val[0]
    (config,) = events.Tensors("config/text_summary")
    assert b'"damping": 0.0001' in config.tensor_proto.string_val[0]


def test_steps_that_are_made_again_are_shown_once(sink, start, tmp_path):
    first, second = sink("tensorboard"), sink("tensorboard")
    first.start(start())
    for step in range(1, 5):
        first.log({"loss": float(step)}, step)
    first.finish("killed")
    second.start(start(attempt=2))
    for step in range(3, 6):
        second.log({"loss": 10.0 * step}, step)
    second.finish("completed")
    assert len(list((tmp_path / "tracker" / "tensorboard").iterdir())) == 2
    found = losses(events_in(tmp_path))
    assert found == [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0), (5, 50.0)]


def test_a_later_attempt_without_a_curve_is_written(sink, start, tmp_path):
    tracker = sink("tensorboard")
    tracker.start(start(attempt=2))
    tracker.summary({"loss": 0.25})
    tracker.finish("completed")
    events = events_in(tmp_path)
    assert events.Scalars("summary/loss")[0].value == 0.25
    assert "config/text_summary" in events.Tags()["tensors"]


def test_a_missing_package_is_an_error_before_anything_is_written(
    small_task, monkeypatch, capfd, tmp_path
):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert small_task("task=plan", "tracker=tensorboard") == 2
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert "pip install 'fisher-lab[tensorboard]'" in line
    assert list(tmp_path.iterdir()) == []


def test_both_sinks_write_their_files(small_task, tmp_path):
    code = small_task(
        "task=plan", "tracker=all", "tracker.mode=offline", "tracker.budget_s=120",
        "hydra.run.dir=here",
    )  # fmt: skip
    assert code == 0
    kept = tmp_path / "here" / "tracker"
    assert list(kept.rglob("run-*.wandb"))
    assert list(kept.rglob("events.out.tfevents.*"))
    assert_complete(tmp_path / "here")
