"""A small task behind the command line, and sinks whose processes end with the test."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from fisher_lab import cli, tracking
from fisher_lab.config.schema import TrackerConfig
from fisher_lab.tasks import preflight
from fisher_lab.tracking.base import Start
from fisher_lab.tracking.process import SinkProcess
from tests.cli.conftest import install_task
from tests.processes import no_child_is_left, until


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Start]:
    def make(**changes) -> Start:
        return Start(
            **{
                "run_id": "abc",
                "tracker_id": "abc-1234",
                "attempt": 1,
                "config": {"kfac": {"damping": 1e-4}, "seed": 0, "note": None},
                "directory": tmp_path / "tracker",
                "name": "kfac.damping=1e-4",
                "group": "damping 2026/12",
                "job_type": "train",
                "tags": ("a", "b"),
                **changes,
            }
        )

    return make


@pytest.fixture
def sink() -> Callable[..., SinkProcess]:
    """A sink with a long budget, offline."""

    def make(name: str = "wandb", budget_s: float = 60.0, **config) -> SinkProcess:
        settings = TrackerConfig(**{"mode": "offline", "grace_s": 30.0, **config})
        return SinkProcess(name, settings, budget_s)

    return make


@pytest.fixture(autouse=True)
def _no_sink_is_left() -> Iterator[None]:
    """None waits for its service."""
    with no_child_is_left():
        yield


@pytest.fixture(autouse=True)
def _no_login(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


@pytest.fixture
def service() -> Callable[[SinkProcess], psutil.Process]:
    """The process of W&B's service, a child of the sink's."""

    def is_service(one: psutil.Process) -> bool:
        try:
            return one.name().startswith("wandb-core")
        except psutil.NoSuchProcess:  # something else that the library has run for a moment
            return False

    def find(sink: SinkProcess) -> psutil.Process:
        assert sink.child is not None
        process = psutil.Process(sink.child.pid)
        (found,) = until(lambda: [one for one in process.children() if is_service(one)])
        return found

    return find


@pytest.fixture
def small_task(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """``small_task("tracker=wandb", ...)`` runs a task that logs, records and ends.

    What ``small_task.after[STEP]`` holds is called after that step.
    """
    after: dict[int, Callable[[], None]] = {}

    def run(config, run) -> None:
        for step in range(1, 4):
            tracking.active().log({"loss": 1.0 / step}, step)
            after.get(step, lambda: None)()
        run.metrics({"loss": 0.5 + config.seed, "kfac/total_s": 0.25, "loss/heldout": None})
        run.table("layers.csv", [{"name": "a", "clipped": None, "dim": 3}])
        if config.seed == 13:
            raise RuntimeError("thirteen")

    install_task(monkeypatch, run)
    identity = preflight.preflight
    monkeypatch.setattr(
        preflight, "preflight", lambda cfg: tracking.check(cfg.tracker) or identity(cfg)
    )

    def call(*arguments: str) -> int:
        return cli.main(list(arguments))

    call.after = after  # type: ignore[attr-defined]
    return call


def assert_complete(directory: Path, *words: str) -> None:
    """The run of `small_task` is complete, and its log has one warning with these words, if any."""
    record = json.loads((directory / "run.json").read_text())
    metrics = json.loads((directory / "metrics.json").read_text())
    assert record["status"] == "completed"
    assert metrics == {"loss": 0.5, "kfac/total_s": 0.25, "loss/heldout": None}
    lines = (directory / "fisher_lab.log").read_text().splitlines()
    warnings = [line for line in lines if " WARNING " in line]
    assert len(warnings) == bool(words), warnings
    assert all(word in line for line in warnings for word in words)


@pytest.fixture
def warnings_of(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    def get() -> list[str]:
        return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]

    return get
