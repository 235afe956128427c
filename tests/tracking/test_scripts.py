"""The dashboard's JSON, and what the scripts send."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from fisher_lab.config import paths
from fisher_lab.tracking import send
from tests.processes import python
from tests.tracking.wandb_files import files

SCRIPTS = paths.root() / "scripts"


@pytest.fixture
def dashboard() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(SCRIPTS / "wandb_dashboard.py")))


def test_the_dashboard_is_dumped_without_a_login_and_read_by_the_library(tmp_path):
    pytest.importorskip("wandb_workspaces")
    import wandb_workspaces.reports.v2.internal as report_model
    import wandb_workspaces.workspaces.internal as workspace_model

    verdict = {"sweep": "s", "text": "Same | step.", "verdict": "holds", "seeds": 5,
               "why": "kfac.policy: auto against all: exact to 1e-15"}  # fmt: skip
    (tmp_path / "claims.json").write_text(json.dumps([verdict]))
    script = str(SCRIPTS / "wandb_dashboard.py")
    done = python(script, "--claims", "claims.json", "--dump", "d.json")
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "d.json").read_text())
    view = workspace_model.View.model_validate(content["workspace"])
    sections = {s.name: s.panels for s in view.spec.section.panel_bank_config.sections}
    assert set(sections) >= {
        "Results", "Figures and layers", "Spectra", "Learning curves of trainings",
        "Settings that differ",
    }  # fmt: skip
    kinds = {getattr(panel, "view_type", "") for panels in sections.values() for panel in panels}
    assert kinds == {
        "Bar Chart",
        "Media Browser",
        "Weave",
        "Run History Line Plot",
        "Scatter Plot",
        "Parallel Coordinates Plot",
        "Run Comparer",
    }
    written = report_model.ReportViewspec.model_validate(content["report"])
    grids = [block for block in written.spec.blocks if type(block).__name__ == "PanelGrid"]
    assert len(grids) == 5
    text = json.dumps(content["report"])
    assert r"Same \\| step. | **holds** | policy: auto against all: exact to 1e-15 | 5 |" in text
    (tmp_path / "claims.json").write_text("[{}]")
    done = python(script, "--claims", "claims.json", "--dump", "d.json")
    assert done.returncode == 2
    assert "no claims.json" in done.stderr


def test_bars_are_means_over_the_seeds_of_a_cell_and_named_by_its_settings(dashboard):
    pytest.importorskip("wandb_workspaces")
    for bar in dashboard.bars(["kfac/total_s"]):
        about = json.loads(bar._to_model().model_dump_json(by_alias=True))["config"]
        assert about["groupBy"] == "cell.value"
    typed = ["+sweeps=damping", "kfac.damping=1e-4", "kfac/policy=auto", "sweep.dir=/x", "hydra=y"]
    assert send.in_words(typed) == "damping=1e-4, policy=auto"


def test_curves_are_means_over_the_seeds_of_a_cell(dashboard):
    pytest.importorskip("wandb_workspaces")
    content = dashboard.dumped("me", "fisher_lab")
    sections = {
        s["name"]: s["panels"]
        for s in content["workspace"]["spec"]["section"]["panelBankConfig"]["sections"]
    }
    for name, panel in zip(dashboard.CURVES, sections["Learning curves of trainings"], strict=True):
        curve = panel["config"]
        assert (curve["xAxis"], curve["metrics"]) == ("curve/step", [f"curve/{name}"])
        assert (curve["groupBy"], curve["groupAgg"]) == ("cell.value", "mean")
        assert curve["groupArea"] == "stddev"


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


def test_what_the_service_refuses_does_not_count_as_sent(sink, start, tmp_path):
    """The library itself, which says that all is well."""
    tracker = sink()
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
