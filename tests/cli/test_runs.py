"""Runs and sweeps through the front door, with a small task in the place of a real one."""

from __future__ import annotations

import csv
import json
import logging
import re

from omegaconf import OmegaConf

from fisher_lab import cli
from fisher_lab.tasks import runner
from tests.cli.conftest import install_task

RUN_KEYS = {
    *("schema", "run_id", "status", "reason", "started", "finished", "config", "overrides"),
    *("error", "provenance", "digests"),
}


def test_a_run_leaves_a_complete_directory(door, seen, runs, tmp_path):
    answer = door("kfac.damping=1e-5", "kfac/policy=all")
    assert (answer.code, answer.err) == (0, "")
    ((directory, record),) = runs()
    place = directory.relative_to(tmp_path).as_posix()
    assert re.fullmatch(r"outputs/\d{4}-\d\d-\d\d/\d\d-\d\d-\d\d", place)
    assert set(record) == RUN_KEYS
    assert (record["status"], record["error"]) == ("completed", None)
    assert record["started"] < record["finished"]
    assert record["overrides"] == ["kfac.damping=1e-5", "kfac/policy=all"]
    kfac = record["config"]["kfac"]
    assert (kfac["damping"], kfac["policy"]) == (1e-5, "all")
    provenance = record["provenance"]
    assert provenance["device"] in ("cpu", "cuda")
    assert provenance["threads"] >= 1
    assert (provenance["seed"], provenance["deterministic"]) == (0, False)
    assert provenance["content"] == {"data": "abc"}
    metrics = json.loads((directory / "metrics.json").read_text())
    assert metrics == {"loss": 1.5, "tokens": 512, "kfac/total_s": 0.25}
    with (directory / "layers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows == [{"name": "h.0.attn", "method": "woodbury", "in": "128", "out": "384"}]
    of_hydra = {file.name for file in (directory / ".hydra").iterdir()}
    assert of_hydra == {"config.yaml", "hydra.yaml", "overrides.yaml"}
    assert "completed" in (directory / "fisher_lab.log").read_text()
    assert not list(directory.rglob("*.tmp"))


def test_the_screen_ends_with_the_numbers_and_the_directory(door, seen, runs):
    answer = door()
    ((directory, record),) = runs()
    for words in (str(directory), record["run_id"], "1.5000"):
        assert words in answer.out
    assert "\x1b" not in answer.out
    without_path = [line for line in answer.out.splitlines() if str(directory) not in line]
    assert max(map(len, without_path)) <= 80


def test_the_task_gets_the_typed_configuration(door, seen):
    door("kfac.n_batches=3", "kfac/kappa=none", "seed=5")
    (config,) = seen
    found = (config.kfac.n_batches, config.kfac.max_condition_number, config.seed)
    assert found == (3, None, 5)


def test_a_failing_run_is_recorded_in_full_and_said_in_one_line(door, seen, runs):
    answer = door("seed=13")
    assert answer.code == 1
    ((directory, record),) = runs()
    (line,) = answer.lines
    assert "RuntimeError: thirteen is" in line
    assert str(directory / "fisher_lab.log") in line
    assert record["status"] == "failed"
    assert "in run" in record["error"].pop("traceback")
    assert record["error"] == {"type": "RuntimeError", "message": "thirteen is\nnot a seed"}
    log = (directory / "fisher_lab.log").read_text()
    assert "Traceback (most recent call last)" in log
    assert "not a seed" in log


def test_a_run_whose_content_cannot_be_read_fails_with_a_record(door, seen, runs, monkeypatch):
    monkeypatch.setattr(runner, "_content", lambda config: ({}, OSError("the text is gone")))
    assert door().code == 1
    ((_, record),) = runs()
    assert (record["status"], record["error"]["message"]) == ("failed", "the text is gone")
    assert seen == []


def test_two_runs_in_one_second_get_a_directory_each(door, seen, runs):
    for _ in range(3):
        assert door("hydra.run.dir=outputs/x").code == 0
    assert len(runs()) == 1  # a directory that the user names is used as it is
    codes = {door().code for _ in range(4)}
    assert codes == {0}
    assert len({directory for directory, _ in runs()}) == 5


def test_the_default_directory_is_never_shared(tmp_path):
    taken = tmp_path / "outputs" / "12-00-00"
    chosen = []
    for _ in range(3):
        cfg = OmegaConf.create({"hydra": {"run": {"dir": str(taken)}, "overrides": {"hydra": []}}})
        chosen.append(cli.make_run_directory(cfg).name)
        assert cfg.hydra.run.dir == str(taken.with_name(chosen[-1]))
    assert chosen == ["12-00-00", "12-00-00-2", "12-00-00-3"]


def test_a_sweep_runs_every_cell(door, seen, runs):
    answer = door("-m", "kfac.damping=1e-5,1e-4", "kfac/policy=all,auto,hybrid")
    assert answer.code == 0
    assert "6 of 6 cells completed" in answer.out
    records = [record for _, record in runs()]
    assert [record["status"] for record in records] == ["completed"] * 6
    cells = {(r["config"]["kfac"]["damping"], r["config"]["kfac"]["policy"]) for r in records}
    assert cells == {(d, p) for d in (1e-5, 1e-4) for p in ("all", "auto", "hybrid")}
    assert len({record["run_id"] for record in records}) == 6
    assert (runs()[0][0].parent / "sweep.json").is_file()
    assert all(directory.name == record["run_id"] for directory, record in runs())


def test_one_failing_cell_does_not_lose_the_others(door, seen, runs):
    answer = door("-m", "seed=12,13,14")
    assert answer.code == 1
    statuses = {record["config"]["seed"]: record["status"] for _, record in runs()}
    assert statuses == {12: "completed", 13: "failed", 14: "completed"}
    assert "2 of 3 cells completed" in answer.out
    (line,) = answer.lines
    assert line.startswith("fisher_lab: seed=13: failed: RuntimeError: thirteen is")
    assert "fisher_lab.log" in line


def test_a_sweep_file(door, seen, runs):
    answer = door("-m", "+sweeps=damping", "seed=0", "kfac.damping=1e-5,2e-5")
    assert answer.code == 0
    cells = {(c.kfac.damping, c.kfac.max_condition_number) for c in seen}
    assert cells == {(d, k) for d in (1e-5, 2e-5) for k in (1e6, None)}
    assert len(runs()) == 4


def test_warnings_reach_the_log_and_the_screen(door, seen, runs, monkeypatch):
    def run(config, run):
        logging.getLogger("somewhere").warning("look out")
        logging.getLogger("somewhere").info("by the way")

    install_task(monkeypatch, run)
    answer = door()
    ((directory, _),) = runs()
    assert answer.lines == ["WARNING: look out"]
    log = (directory / "fisher_lab.log").read_text()
    assert "look out" in log
    assert "by the way" in log


def test_no_secret_reaches_a_file(door, seen, runs, monkeypatch, tmp_path):
    names = ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "SOME_PASSWORD")
    for name in names:
        monkeypatch.setenv(name, f"0123/{name.lower()}")
    assert door().code == 0
    assert door("seed=13").code == 1
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) >= 12
    for file in files:
        text = file.read_text().lower()
        assert [name for name in names if name.lower() in text] == []
