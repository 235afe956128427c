"""The dashboard's JSON, the aggregate, and what the sync script sends."""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
from types import ModuleType

import pytest

from fisher_lab.config import paths
from fisher_lab.config.schema import TrackerConfig
from fisher_lab.runs import atomic
from fisher_lab.tasks import aggregate
from tests.tracking.offline import files, read

SCRIPTS = paths.root() / "scripts"


@pytest.fixture
def dashboard() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dashboard", SCRIPTS / "wandb_dashboard.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_dashboard_is_dumped_without_a_login_and_read_by_the_library(tmp_path, monkeypatch):
    pytest.importorskip("wandb_workspaces")
    import wandb_workspaces.reports.v2.internal as report_model
    import wandb_workspaces.workspaces.internal as workspace_model

    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    subprocess.run(
        [sys.executable, str(SCRIPTS / "wandb_dashboard.py"), "--dump", "d.json"],
        check=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(paths.root()), "NETRC": str(tmp_path / "none")},
    )
    content = json.loads((tmp_path / "d.json").read_text())
    view = workspace_model.View.model_validate(content["workspace"])
    sections = {s.name: s.panels for s in view.spec.section.panel_bank_config.sections}
    assert set(sections) >= {"Results", "Learning curves", "Settings that differ"}
    kinds = {panel.view_type for panels in sections.values() for panel in panels}
    assert kinds == {
        "Run History Line Plot",
        "Bar Chart",
        "Scatter Plot",
        "Parallel Coordinates Plot",
        "Run Comparer",
    }
    written = report_model.ReportViewspec.model_validate(content["report"])
    assert sum(type(block).__name__ == "PanelGrid" for block in written.spec.blocks) == 3


def sweep(directory) -> None:
    losses = {(1e-4, 0): 2.0, (1e-4, 1): 3.0, (1e-3, 0): 5.0, (1e-3, 1): 6.0}
    for number, ((damping, seed), loss) in enumerate(losses.items()):
        cell = directory / str(number)
        config = {"kfac": {"damping": damping}, "seed": seed, "same": [1]}
        atomic.write_json(cell / "run.json", {"status": "completed", "config": config})
        atomic.write_json(cell / "metrics.json", {"loss": loss, "none": None})
    atomic.write_json(directory / "9" / "run.json", {"status": "failed", "config": {}})


def test_the_aggregate(tmp_path):
    sweep(tmp_path)
    rows = aggregate.aggregate(tmp_path)
    assert [row["kfac.damping"] for row in rows] == [1e-4, 1e-3]
    assert "seed" not in rows[0]
    assert "same" not in rows[0]
    assert [row["loss/mean"] for row in rows] == [2.5, 5.5]
    assert rows[0]["loss/sd"] == pytest.approx(statistics.stdev([2.0, 3.0]))
    # Student's t with one degree of freedom: 12.706.
    assert rows[0]["loss/high"] - 2.5 == pytest.approx(12.706 * 0.5, rel=1e-3)
    assert rows[0]["loss/n"] == 2
    assert rows[0]["none/mean"] is None
    assert aggregate.moments([1.0])["sd"] is None


def test_the_aggregate_is_a_run_of_its_own(dashboard, tmp_path, capsys):
    sweep(tmp_path / "damping")
    assert dashboard.main(["--aggregate", str(tmp_path / "damping"), "--mode", "offline"]) == 0
    assert capsys.readouterr().out == "2 groups\n"
    (file,) = files(tmp_path / "damping")
    recorded = read(file)
    assert recorded.run["job_type"] == "aggregate"
    assert recorded.run["run_group"] == "damping"
    assert recorded.curve("loss/mean") == [(0, 2.5), (1, 5.5)]
    with pytest.raises(SystemExit):
        dashboard.main(["--aggregate", str(tmp_path / "damping" / "9")])


def test_a_sweep_sends_its_aggregate_once_and_again_when_it_has_changed(tmp_path):
    root = tmp_path / "damping"
    sweep(root)
    offline = TrackerConfig(sinks=["wandb"], mode="offline")
    assert not aggregate.at_end(root, TrackerConfig())
    assert not aggregate.at_end(root, TrackerConfig(sinks=["wandb"], mode="disabled"))
    assert not files(root)
    assert aggregate.at_end(root, offline)
    assert not aggregate.at_end(root, offline)
    atomic.write_json(root / "0" / "metrics.json", {"loss": 4.0})
    assert aggregate.at_end(root, offline)
    first, second = (read(file) for file in files(root))
    assert first.run["run_id"] != second.run["run_id"]
    assert first.run["run_group"] == second.run["run_group"] == "damping"
    assert second.curve("loss/mean") == [(0, 3.5), (1, 5.5)]
    low = 3.5 - 12.706 * statistics.stdev([4.0, 3.0]) / 2**0.5
    assert second.curve("loss/low")[0] == (0, pytest.approx(low, rel=1e-4))


def test_an_aggregate_that_cannot_be_sent_is_one_warning(tmp_path, caplog):
    sweep(tmp_path)
    (tmp_path / "1" / "metrics.json").write_text("{")
    assert not aggregate.at_end(tmp_path, TrackerConfig(sinks=["wandb"], mode="offline"))
    assert "the aggregate of" in caplog.text


FAKE = """#!/usr/bin/env bash
echo "$@" >> "$CALLS"
case "$*" in *broken*) exit 1 ;; esac
"""


def test_the_sync_script_sends_each_run_once(tmp_path):
    (tmp_path / "wandb").write_text(FAKE)
    (tmp_path / "wandb").chmod(0o755)
    calls = tmp_path / "calls"

    def sync(*arguments) -> int:
        calls.write_text("")
        return subprocess.run(
            [str(SCRIPTS / "wandb_sync.sh"), *arguments],
            env={**os.environ, "WANDB": str(tmp_path / "wandb"), "CALLS": str(calls)},
            timeout=60,
            capture_output=True,
        ).returncode

    def sent() -> list[str]:
        return [line.rpartition("offline-run-")[2] for line in calls.read_text().splitlines()]

    for name in ("2_b-a", "1_b-a", "3_c-c", "4_d d-d"):
        directory = tmp_path / "sweep" / name[0] / "tracker" / "wandb" / f"offline-run-{name}"
        directory.mkdir(parents=True)
        (directory / f"run-{name[4:].strip() or 'a'}.wandb").write_text("x")
    root = str(tmp_path / "sweep")
    assert sync("--dry-run", root) == 0
    assert sent() == []
    assert sync(root) == 0
    assert sorted(sent()) == ["1_b-a", "2_b-a", "3_c-c", "4_d d-d"]
    assert sent().index("1_b-a") < sent().index("2_b-a")  # attempts in their order
    assert sync(root) == 0
    assert sent() == []
    (grown,) = (tmp_path / "sweep").rglob("run-c.wandb")
    grown.write_text("xy")
    assert sync(root) == 0
    assert sent() == ["3_c-c"]
    broken = tmp_path / "sweep" / "5" / "offline-run-broken"
    broken.mkdir(parents=True)
    (broken / "run-e.wandb").write_text("x")
    assert sync(root) == 1
    assert sync(root) == 1  # it is tried again
    assert sent() == ["broken"]
    assert sync() == 2
