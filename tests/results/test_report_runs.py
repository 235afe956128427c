"""What the report says of single runs: the commands that give them again, and their settings."""

from __future__ import annotations

import dataclasses
import html
import json
import re
import shlex

import pytest

from fisher_lab import cli
from fisher_lab.config import compose, validate
from fisher_lab.results import load
from fisher_lab.results.paper import Places
from fisher_lab.results.report import page
from fisher_lab.runs.identity import run_id
from fisher_lab.runs.record import Run
from tests.results.run_directories import DEFAULTS, make_run, make_sweep, nested
from tests.sweeps.application import CONTENT, own_sweep, planned

SWEEP = """
title: Own
params:
  kfac: "{fisher:empirical},{fisher:empirical,true_fisher_head:true}"
  kfac.max_condition_number: 1e6,null
  seed: 0
kfac: {damping: 3e-4}
"""


def single(arguments):
    """The configuration of a run that is no sweep's."""
    args = cli._parse(arguments)
    with cli.config_loader(args) as loader:
        cfg = compose.load(loader, args.overrides)
        config = validate.validate(cfg)
        cli._check_single(cfg, config)
    return config


def written(one, skip=()):
    """The directories of a sweep whose cells have all been run, but for some."""
    one.layout.directory.mkdir(parents=True)
    one.write()
    for cell in one.cells:
        if cell.run_id not in skip:
            run = Run.start(
                one.layout.run_directory(cell.run_id),
                config=dataclasses.asdict(cell.config),
                overrides=list(cell.overrides),
                identity=CONTENT,
            )
            assert run.run_id == cell.run_id
            run.metrics({"m": float(cell.config.seed)})
            run.complete()


def commands(text):
    """The commands of a report, cell by cell."""
    part = text.partition("<h3>To run it again</h3>")[2].partition("<h2")[0]
    blocks = re.findall(r"<code>(.*?)</code>", part, flags=re.DOTALL)
    return [html.unescape(block).splitlines() for block in blocks]


def test_the_commands_of_a_sweep_file_give_each_run_and_no_other():
    own_sweep("own", SWEEP)
    (one,) = planned("+sweeps=own", "sweep.dir=results", "task.heldout_batches=2")
    assert len(one.cells) == 4
    unrun = one.cells[-1].run_id
    written(one, skip={unrun})
    blocks = commands(page(load("results/own")))
    assert [len(block) for block in blocks] == [1, 1, 1, 1]
    found = {}
    for (line,) in blocks:
        words = shlex.split(line)
        assert words[:4] == ["python", "-m", "fisher_lab", "-m"]
        (again,) = planned(*words[4:])
        (cell,) = again.cells  # one cell, and
        assert again.repeated == 0
        found[cell.run_id] = cell.config
        assert again.layout.directory == one.layout.directory
    assert found == {cell.run_id: cell.config for cell in one.cells}


def test_the_commands_of_values_by_hand_are_those_of_single_runs():
    (one,) = planned("seed=0,1", "kfac.damping=1e-3", "model=mlp")
    written(one)
    (block,) = commands(page(load(one.layout.directory)))
    assert all(line.startswith("python -m fisher_lab ") for line in block)
    configs = [single(shlex.split(line)[3:]) for line in block]
    identities = {run_id(dataclasses.asdict(config), CONTENT) for config in configs}
    assert identities == {cell.run_id for cell in one.cells}


@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        ("seed=0 +sweeps=main sweep.dir=results",
         "python -m fisher_lab -m seed=0 +sweeps=main sweep.dir=results"),
        ("seed=0 sweep.dir=/somewhere/else cache_dir=/x/y", "python -m fisher_lab seed=0"),
        ("'kfac={fisher:mc}'", "python -m fisher_lab 'kfac={fisher:mc}'"),
        ("'data.path=HOME/a b.txt'", """python -m fisher_lab data.path="$HOME"/'a b.txt'"""),
        ("data.path=/far/text.txt", "python -m fisher_lab data.path=/far/text.txt"),
    ],
)  # fmt: skip
def test_commands_name_no_home_and_no_place_of_the_results(typed, shown, tmp_path):
    home = tmp_path.parent / "home"
    places = Places(load(tmp_path), home=home)
    assert places.command(typed.replace("HOME", str(home))) == shown


def configurations(text):
    """Summary and lines of every configuration."""
    part = text.partition("<h3>Every configuration</h3>")[2].partition("<h2")[0]
    found = re.findall(r"<summary>(.*?)</summary><pre.*?><code>(.*?)</code>", part, flags=re.DOTALL)
    return {html.unescape(title): html.unescape(body).splitlines() for title, body in found}


def test_settings_that_follow_an_axis_are_told_of_every_configuration(tmp_path):
    for i, (name, width) in enumerate((("gpt2", 128), ("gpt2", 128), ("llama", 96), ("llama", 96))):
        config = {**DEFAULTS, "model.name": name, "model.width": width, "seed": i % 2}
        config["sweep.dir"] = f"elsewhere-{i}"  # changes no result
        run = Run.start(
            tmp_path / "results" / "models" / str(i),
            config=nested(config),
            overrides=[f"model={name}", f"seed={i % 2}"],
            provenance={},
        )
        run.complete()
    make_sweep(tmp_path / "results" / "other", [({"kfac.damping": 1e-3}, {"m": 1.0})])
    frame = load(tmp_path / "results")
    found = configurations(page(frame))
    assert list(found) == [
        "models: model=gpt2 (2 runs)", "models: model=llama (2 runs)", "other (1 run)",
    ]  # fmt: skip
    ids = frame["run_id"].tolist()
    assert found["models: model=llama (2 runs)"] == [
        f"runs: {ids[2]} (seed 0), {ids[3]} (seed 1)",
        "kfac.damping: 1e-4", "model.name: llama", "model.width: 96",
    ]  # fmt: skip
    assert "model.width: 128" in found["other (1 run)"]


def test_two_hundred_runs_make_a_page_of_sane_size(tmp_path):
    record = make_run(tmp_path / "one", {}, {"m": 1.0}).record
    for i in range(200):
        settings = {"kfac.damping": 1e-5 * (1 + i // 4), "seed": i % 4, "model.width": i // 4}
        config = nested({**DEFAULTS, **settings})
        folder = tmp_path / "many" / str(i)
        folder.mkdir(parents=True)
        own = {"config": config, "run_id": f"{i:016x}", "overrides": []}
        (folder / "run.json").write_text(json.dumps({**record, **own}))
    frame = load(tmp_path / "many")
    text = page(frame).partition('id="runs"')[2].partition('id="provenance"')[0]
    assert len(configurations(text)) == 50
    assert len(text) < 120_000


PRIVATE = {
    "host": {"name": "secret-machine", "system": "Linux-6.1-secret", "cpu": "a processor"},
    "pid": 424242,
    "distributed": {"ranks": [{"rank": 0, "host": "secret-machine", "pid": 434343}]},
}


def test_no_path_host_or_process_of_the_machine_is_in_the_page(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    root = tmp_path / "results" / "s"
    lost = {
        "a": FileNotFoundError(f"no file {root}/a/x.json"),
        "b": OSError(f"'{tmp_path}/home/data/text.txt' is no text"),
        "c": OSError("/mnt/disk 3/there: broken, /mnt/disk/model.bin too"),
    }
    for i, (name, error) in enumerate(lost.items()):
        run = Run.start(
            root / name,
            config={"seed": i, "data": {"path": f"{tmp_path}/home/text"}, "kfac": {"damping": 0.1}},
            overrides=[f"seed={i}", f"sweep.dir={tmp_path}/results"],
            provenance=PRIVATE,
        )
        run.fail(error)
    make_run(root / "d", {"seed": 7}, {"m": 1.0})
    (root / "e").mkdir()
    (root / "e" / "run.json").write_text("{")
    text = page(load(root))
    for secret in (str(tmp_path), "secret", "424242", "434343", "/mnt"):
        assert secret not in text
    shown = html.unescape(text)
    for words in ("FileNotFoundError: no file s/a/x.json", "'~/data/text.txt' is no text",
                  "model.bin too", ">s/a<", "s/e: run.json: not JSON", "data.path: ~/text",
                  '[{"rank": 0}]', "a processor"):  # fmt: skip
        assert words in shown
    assert json.loads((root / "a" / "run.json").read_text())["provenance"]["pid"] == 424242


def test_settings_that_are_paths_are_shortened_and_stay_apart(tmp_path):
    for i, path in enumerate(("/far/a/text.txt", "/far/b/text.txt", f"{tmp_path}/text.txt")):
        make_run(tmp_path / "s" / str(i), {"data.path": path, "seed": 0}, {"m": float(i)})
    frame = load(tmp_path / "s")
    shown = Places(frame).shown(frame)
    assert shown["data.path"].tolist() == ["text.txt", "text.txt (2)", "text.txt (3)"]
    assert frame["data.path"].tolist()[0] == "/far/a/text.txt"
    where = {"data.path": "/far/a/text.txt"}
    claim = {"type": "bounded", "metric": "m", "at_most": 0, "where": where, "text": "bounded"}
    (tmp_path / "s" / "sweep.json").write_text(json.dumps({"name": "s", "claims": [claim]}))
    text = page(load(tmp_path / "s"))
    assert "1</b> claims: holds" in text  # which names the setting in full
    for command in (line for block in commands(text) for line in block):
        text = text.replace(html.escape(command), "")  # and so must a command
    assert "/far/" not in text


def test_a_run_without_a_reason_beside_one_with_one(tmp_path):
    make_run(tmp_path / "s" / "0", {"seed": 0}, error=MemoryError("no room"))
    make_run(tmp_path / "s" / "1", {"seed": 1}, status="running")
    text = page(load(tmp_path / "s")).partition('id="failures"')[2].partition("<h2")[0]
    assert "no room" in text
    assert "running" in text
    assert "nan" not in text.lower()
