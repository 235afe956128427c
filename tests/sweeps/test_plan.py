"""Sweep files, dry runs, and what is refused before anything starts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from fisher_lab import cli
from fisher_lab.config import compose, paths, sweep_files
from fisher_lab.config.validate import validate
from fisher_lab.results import hypotheses
from tests.sweeps.application import own_sweep, planned

FILES = {file.stem: sweep_files.load(file) for file in sorted(paths.sweeps().glob("*.yaml"))}
SWEEPS = [name for name, file in FILES.items() if not file.sweeps]


@pytest.mark.parametrize("name", SWEEPS)
def test_every_sweep_of_the_project_composes_with_its_seeds_and_fitting_claims(name):
    """Three seeds; five where a claim rests on them."""
    (one,) = planned(f"+sweeps={name}")
    assert len({cell.config.seed for cell in one.cells}) >= (5 if FILES[name].claims else 3)
    assert one.repeated == 0
    for claim in map(hypotheses.parse, FILES[name].claims):
        # A claim speaks of settings that the sweep varies.
        stated = [claim.get(key, {}) for key in ("where", "a", "b", "groups", "cells")]
        named = {setting for part in stated for setting in part} | {claim.get("axis")} - {None}
        for setting in named:
            values = {_at(dataclasses.asdict(cell.config), setting) for cell in one.cells}
            assert len(values) > 1, f"{claim.text}: {setting} does not vary"


def test_the_appendices_stand_for_every_sweep():
    """But for one that shows how claims decide themselves."""
    names = {file.name for file in sweep_files.expand(["appendix"])}
    full = {file.name for file in sweep_files.expand(["appendix_full"])}
    assert set(SWEEPS) - full == {"decided", "optimizers"}
    assert full - names == {"train_damping", "update_freq"}


def _at(config: dict, setting: str) -> object:
    for part in setting.split("."):
        config = config[part]
    return config


def test_a_users_own_sweep_wins_and_may_bring_groups_pairs_and_claims(door, seen):
    own_sweep(
        "damping",
        """
        title: Mine
        params:
          kfac: [{damping: 1e-5, update_freq: 1}, {damping: 1e-3, update_freq: 5}]
          seed: 0,1
        claims: [{type: bounded, metric: loss, at_most: 2}]
        defaults: [override /model: mlp]
        model: {width: 16}
        """,
    )
    assert door("-m", "+sweeps=damping", "threads=1").code == 0
    found = [(c.kfac.damping, c.kfac.update_freq, c.seed) for c in seen]
    assert found == [(1e-5, 1, 0), (1e-5, 1, 1), (1e-3, 5, 0), (1e-3, 5, 1)]
    assert {(c.model.type, c.model.width, c.threads) for c in seen} == {("mlp", 16, 1)}
    content = json.loads(Path("results/damping/sweep.json").read_text())
    assert content["title"] == "Mine"
    assert content["claims"] == [{"type": "bounded", "metric": "loss", "at_most": 2}]
    assert list(content["axes"]) == ["kfac", "seed"]


def test_two_sweeps_each_in_its_own_directory(door, seen):
    own_sweep("one", "title: One\nparams: {seed: '1,2'}\n")
    own_sweep("two", "title: Two\nparams: {kfac.damping: '1e-3,1e-2'}\nkfac: {ekfac: true}\n")
    own_sweep("all", "title: All\nsweeps: [one, two]\n")
    for given in ("+sweeps=[one,two]", "+sweeps=all"):
        answer = door("-m", given)
        assert answer.code == 0
        assert "4 of 4 cells completed" in answer.out
    found = [(c.seed, c.kfac.damping, c.kfac.ekfac) for c in seen]
    assert found == [(1, None, False), (2, None, False), (0, 1e-3, True), (0, 1e-2, True)]
    for name in ("one", "two"):
        assert len(list(Path("results", name).glob("*/run.json"))) == 2


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("title: [1\n", "cannot be read as a sweep file"),
        ("params: 3\n", "params=3 is not allowed"),
        ("sweeps: [bad]\n", "bad -> bad"),
        ("sweeps: [damping]\nparams: {seed: '1,2'}\n", "holds nothing else"),
        ("params: {seed: '1,2'}\nkfca: {damping: 1}\n", "there is no key kfca"),
    ],
)
def test_a_bad_sweep_file_is_one_line_and_harms_nobody_else(text, part, door, seen):
    own_sweep("bad", text)
    assert part in door("-m", "+sweeps=bad").refusal
    assert door("-m", "seed=1,2").code == 0


def test_cells_whose_times_are_compared_are_interleaved():
    own_sweep("times", "title: T\nalone: true\nparams: {kfac.policy: 'all,auto', seed: '0,1,2'}\n")
    (one,) = planned("+sweeps=times")
    found = [(cell.config.seed, cell.config.kfac.policy) for cell in one.launched]
    assert found == [(0, "all"), (0, "auto"), (1, "auto"), (1, "all"), (2, "all"), (2, "auto")]
    assert all(cell.alone for cell in one.cells)


def test_a_dry_run_lists_states_and_starts_nothing(door, seen, tmp_path):
    door("-m", "seed=12,13")
    before = sorted(tmp_path.rglob("*"))
    answer = door("-m", "seed=12,13,14", "sweep.dry_run=true")
    assert answer.code == 0
    rows = [line.split(maxsplit=1) for line in answer.out.splitlines() if line.strip()]
    states = {row[0]: row[1].rstrip() for row in rows if row[0] in ("12", "13", "14")}
    assert states == {"12": "completed", "13": "failed, to run", "14": "to run"}
    assert len(seen) == 2
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_lists_every_invalid_cell_and_ends_with_2(door, seen, tmp_path):
    answer = door("-m", "seed=1,2", "model.width=128,130,-1", "sweep.dry_run=true")
    assert answer.code == 2
    assert "6 cells: 4 invalid, 2 to run" in answer.out
    assert len(answer.lines) == 4
    assert "model.heads=4" in answer.lines[0]
    assert list(tmp_path.iterdir()) == []


def test_cells_are_composed_as_hydra_does():
    """Groups once, values set: the same configurations, cell by cell."""
    args = cli._parse(["-m", "kfac/policy=all,auto", "model=mlp,gpt2", "seed=1,2"])
    extra = ["kfac={damping:1e-3,update_freq:2}", "data.seq_len=16", "threads=${seed}"]
    with cli.config_loader(args) as loader:
        master = compose.load(loader, [*args.overrides, *extra], multirun=True)
        composer = compose.Composer(loader, master)
        batch = compose.cells(None, [*args.overrides, *extra])
        assert len(batch) == 8
        for overrides in batch:
            assert composer(overrides) == validate(loader.load_sweep_config(master, overrides))


def test_values_of_an_axis_may_be_a_list():
    assert sweep_files.values([1e-5, None, True, {"a": 1, "b": [1, 2]}]) == (
        "1e-05,null,true,{a:1,b:[1,2]}"
    )
    assert sweep_files.values("1e-5,1e-4") == "1e-5,1e-4"
