"""The dashboard's JSON, the aggregate, and what the sync script sends."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import pytest

from fisher_lab.config import paths
from fisher_lab.config.schema import TrackerConfig
from fisher_lab.runs import atomic
from fisher_lab.tasks import aggregate
from tests.tracking.offline import Clock, files, read
from tests.tracking.test_wandb import png

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
    grids = [block for block in written.spec.blocks if type(block).__name__ == "PanelGrid"]
    assert len(grids) == 4


def test_what_the_panels_show_of_which_runs(dashboard):
    """Bars are those of the aggregates, and every other panel leaves these out."""
    pytest.importorskip("wandb_workspaces")
    content = dashboard.dumped("me", "fisher_lab")
    sections = {
        s["name"]: s["panels"]
        for s in content["workspace"]["spec"]["section"]["panelBankConfig"]["sections"]
    }
    bars = [panel["config"] for panel in sections["Aggregates"]]
    assert len(bars) == len(dashboard.METRICS)
    for metric, bar in zip(dashboard.METRICS, bars, strict=True):
        assert bar["metrics"][:4] == [
            f"groups/0/{metric}/mean",
            f"groups/0/{metric}/low",
            f"groups/0/{metric}/high",
            f"groups/1/{metric}/mean",
        ]
        assert bar["overrideSeriesTitles"][f"groups/1/{metric}/low"] == "row 1, 95 % from"
        # W&B would make error bars of its own, over whatever runs it takes together.
        assert (bar["groupBy"], bar["groupAgg"], bar["groupArea"]) == (None, None, None)
    for name, panel in zip(dashboard.CURVES, sections["Learning curves"], strict=True):
        curve = panel["config"]
        assert (curve["xAxis"], curve["metrics"]) == ("curve/step", [f"curve/{name}"])
        assert (curve["groupBy"], curve["groupAgg"]) == ("cell.value", "mean")
        assert curve["groupArea"] == "stddev"
    grids = [b for b in content["report"]["spec"]["blocks"] if b["type"] == "panel-grid"]
    kinds = []
    for grid in grids:
        ((condition,),) = [s["filters"]["filters"] for s in grid["metadata"]["runSets"]]
        assert condition["key"] == {"section": "run", "name": "jobType"}
        assert condition["value"] == "aggregate"
        views = {p["viewType"] for p in grid["metadata"]["panelBankSectionConfig"]["panels"]}
        kinds.append((condition["op"], "Bar Chart" in views))
    assert kinds == [("=", True), ("!=", False), ("!=", False), ("!=", False)]


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
    for row, mean in enumerate([2.5, 5.5]):  # what the dashboard's bars show
        half = 12.706 * 0.5  # Student's t, one degree of freedom
        for name, value in (("mean", mean), ("low", mean - half), ("high", mean + half)):
            found = recorded.summary[f"groups/{row}/loss/{name}"]
            assert found == pytest.approx(value, rel=1e-3)
    with pytest.raises(SystemExit):
        dashboard.main(["--aggregate", str(tmp_path / "damping" / "9")])


def test_a_sweep_sends_its_aggregate_once_and_again_when_it_has_changed(tmp_path):
    root = tmp_path / "damping"
    sweep(root)
    offline = TrackerConfig(sinks=["wandb"], mode="offline", budget_s=60.0)
    (root / "table.csv").write_text("a,b\n")
    (root / "figures").mkdir()
    (root / "figures" / "density.png").write_bytes(png())
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
    kept = [one["name"] for one in second.artifacts if one["type"] == "tables"]
    assert kept == [f"{second.run['run_id']}-table.csv"]
    assert "figure/density._type" in set().union(*second.history)
    low = 3.5 - 12.706 * statistics.stdev([4.0, 3.0]) / 2**0.5
    assert second.curve("loss/low")[0] == (0, pytest.approx(low, rel=1e-4))


def test_an_aggregate_that_cannot_be_sent_is_one_warning(tmp_path, caplog):
    sweep(tmp_path)
    (tmp_path / "1" / "metrics.json").write_text("{")
    assert not aggregate.at_end(tmp_path, TrackerConfig(sinks=["wandb"], mode="offline"))
    assert "the aggregate of" in caplog.text


@pytest.mark.parametrize("what", ["no network", "an unwritable directory"])
def test_an_aggregate_that_was_not_sent_is_not_marked(what, tmp_path, monkeypatch, warnings_of):
    root = tmp_path / "damping"
    sweep(root)
    aggregate.aggregate(root)  # loads the libraries that it needs
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    config = TrackerConfig(sinks=["wandb"], mode="online", budget_s=2.5)
    if what == "an unwritable directory":
        (tmp_path / "file").write_text("")
        config = dataclasses.replace(config, budget_s=60.0, directory=str(tmp_path / "file" / "x"))
    clock = Clock()
    sent = aggregate.at_end(root, config)
    assert clock() < (2.5 if what == "no network" else 20.0)
    assert not sent
    assert not (root / "tracker" / aggregate.SENT_FILE).exists()
    assert len(warnings_of()) == 1


FAKE = """#!/usr/bin/env bash
echo "$@" >> "$CALLS"
case "$*" in *broken*) exit 1 ;; *refused*) exit 0 ;; *hangs*) exec tail -f /dev/null ;; esac
case "$*" in *partly*) echo "wandb: ERROR [x] Fatal error while uploading data." ;; esac
for file in "${@: -1}"/run-*.wandb; do touch "$file.synced"; done
"""


def test_the_sync_script_sends_each_run_once(tmp_path):
    (tmp_path / "wandb").write_text(FAKE)
    (tmp_path / "wandb").chmod(0o755)
    calls = tmp_path / "calls"

    def sync(*arguments, seconds="60") -> int:
        calls.write_text("")
        changes = {"WANDB": str(tmp_path / "wandb"), "CALLS": str(calls), "TIMEOUT": seconds}
        return subprocess.run(
            [str(SCRIPTS / "wandb_sync.sh"), *arguments],
            env={**os.environ, **changes},
            timeout=60,
            capture_output=True,
        ).returncode

    def sent() -> list[str]:
        return [line.rpartition("run-")[2] for line in calls.read_text().splitlines()]

    for name in ("2_b-a", "1_b-a", "3_c-c", "4_d d-d"):
        kind = "run" if name == "1_b-a" else "offline-run"  # online, cut off, and gone on with
        directory = tmp_path / "sweep" / name[0] / "tracker" / "wandb" / f"{kind}-{name}"
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
    assert all("--include-online" in line for line in calls.read_text().splitlines())
    for way in ("broken", "refused", "partly", "hangs"):  # wandb 0.31 exits with 0 where refused
        file = tmp_path / way / f"offline-run-{way}" / "run-e.wandb"
        file.parent.mkdir(parents=True)
        file.write_text("x")
        file.with_name("run-e.wandb.synced").touch()  # of an earlier size
        seconds = "3" if way == "hangs" else "60"
        assert sync(str(tmp_path / way), seconds=seconds) == 1
        assert not file.with_name("run-e.wandb.sent").exists()
        assert sync(str(tmp_path / way), seconds=seconds) == 1  # it is tried again
        assert sent() == [way]
    assert sync() == 2


class Refuses(BaseHTTPRequestHandler):
    """A service that takes nothing."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(403)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    do_GET = do_POST

    def log_message(self, format: str, *args) -> None:
        """Say nothing."""


def test_what_the_service_refuses_does_not_count_as_sent(remote, start, tmp_path):
    """The library itself, which says that all is well."""
    tracker = remote()
    tracker.start(start())
    tracker.log({"loss": 1.0}, 1)
    tracker.finish("completed")
    (file,) = files(tmp_path / "tracker")
    with ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            (tmp_path / "command").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m wandb "$@"\n')
            (tmp_path / "command").chmod(0o755)
            done = subprocess.run(
                [str(SCRIPTS / "wandb_sync.sh"), str(tmp_path / "tracker")],
                env={
                    **os.environ,
                    "WANDB": str(tmp_path / "command"),
                    "WANDB_API_KEY": "0" * 40,
                    "WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}",
                },
                timeout=200,
                capture_output=True,
            )
        finally:
            server.shutdown()
    assert done.returncode == 1
    assert "wandb: ERROR" in Path(f"{file}.log").read_text()
    assert not Path(f"{file}.sent").exists()
