"""Bad input: one line that names key, value and what is allowed; exit code 2; nothing written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BAD = {
    "kfac.damping=-1": ("kfac.damping=-1", "a finite number above 0"),
    "kfac.damping=nan": ("kfac.damping=nan", "a finite number above 0"),
    "kfac.damping=inf": ("kfac.damping=inf", "a finite number above 0"),
    "kfac.damping=0": ("kfac.damping=0", "a finite number above 0"),
    "kfac.damping=high": ("kfac.damping=high", "a finite number above 0"),
    "kfac.damping=null": ("kfac.damping=null", "a finite number above 0"),
    "kfac.damping=": ("kfac.damping=", "a finite number above 0"),
    "kfac.damping_A=-1": ("kfac.damping_A=-1", "above 0 or null"),
    "kfac.max_condition_number=0.5": ("kfac.max_condition_number=0.5", "at least 1 or null"),
    "kfac.max_condition_number=nan": ("kfac.max_condition_number=nan", "at least 1 or null"),
    "kfac.n_batches=0": ("kfac.n_batches=0", "a whole number of at least 1"),
    "kfac.n_batches=1.5": ("kfac.n_batches=1.5", "a whole number of at least 1"),
    "kfac.n_batches=two": ("kfac.n_batches=two", "a whole number of at least 1"),
    "kfac.ekfac=7": ("kfac.ekfac=7", "true or false"),
    "kfac.include=attn": ("kfac.include=attn", "a list such as [a,b]"),
    "kfac.woodbury_dtype=fp8": ("kfac.woodbury_dtype=fp8", "auto, fp64, fp32, bf16, fp16"),
    "kfac.policy=al": ("kfac.policy=al", "one of all, auto, hybrid, small_only"),
    "seed=-1": ("seed=-1", "a whole number from 0 to 4294967295"),
    "threads=0": ("threads=0", "a whole number of at least 1 or null"),
    "model.heads=3": ("model.heads=3", "a divisor of model.width=128"),
    "kfac.dampign=1": ("kfac.dampign=1", "did you mean kfac.damping?"),
    "+kfac.dampign=1": ("kfac.dampign=1", "did you mean kfac.damping?"),
    "++kfac.dampign=1": ("kfac.dampign=1", "did you mean kfac.damping?"),
    "+damping=1": ("damping=1", "did you mean kfac.damping?"),
    "kfac={dampign:1}": ("kfac.dampign=1", "did you mean kfac.damping?"),
    "+kfac.damping.deep=1": ("kfac.damping.deep=1", "there is no key kfac.damping.deep"),
    "kfac=3": ("kfac=3", "a section"),
    "zzz=1": ("zzz=1", "the top level has seed, device"),
    "kfac/policy=al": ("kfac/policy=al", "one of all, auto, hybrid, small_only"),
    "kfac/polcy=all": ("kfac/polcy=all", "did you mean kfac/policy?"),
    "model=gtp2": ("model=gtp2", "did you mean gpt2?"),
    "task=analyse": ("task=analyse", "one of analyze, plan, train"),
    "tracker=wadnb": ("tracker=wadnb", "tracker must be one of"),
    "hydra/launcher=slrum": ("hydra/launcher=slrum", "must be one of basic"),
    "hydra.jbo.name=x": ("hydra.jbo", "Key 'jbo'"),
    "kfac.damping": ("'kfac.damping'", "key=value"),
    "kfac.damping=[1": ("'kfac.damping=[1'", "key=value"),
    "=3": ("'=3'", "names no key"),
    "kfac.damping=1e-4,1e-5": ("kfac.damping=1e-4,1e-5", "add -m to sweep"),
    "kfac.damping=${nope}": ("kfac.damping", "'nope' not found"),
    "data=text_file": ("data.path=null", "a UTF-8 file"),
    "model=pretrained": ("model.name_or_path=null", "a local directory"),
    "--frobnicate": ("--frobnicate", "--help"),
    "--resolve": ("--resolve", "--cfg"),
    "--config-dir=nowhere": ("--config-dir nowhere", "no such directory"),
    "--experimental-rerun=x.pickle": ("--experimental-rerun", "unpickles"),
}


@pytest.mark.parametrize("argument", BAD)
def test_one_line_and_nothing_written(argument, door, tmp_path):
    answer = door(argument)
    assert answer.code == 2
    assert answer.out == ""
    (line,) = answer.lines
    for part in BAD[argument]:
        assert part in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["kfac.damping=1e-5,-1"], ["kfac.damping=-1", "above 0", "in the cell kfac.damping=-1"]),
        (["kfac.damping=1e-5,1e-4", "kfac.n_batches=1,0"], ["kfac.n_batches=0", "in the cell"]),
        (["kfac.dampign=1,2"], ["kfac.dampign=1,2", "did you mean kfac.damping?"]),
        (["kfac/policy=all,al"], ["kfac/policy=al", "one of all, auto"]),
        (["model.width=128,130"], ["model.heads=4", "a divisor of model.width=130"]),
        (["seed=range(0,3)", "kfac.damping=choice(1,nan)"], ["kfac.damping=nan", "seed=0"]),
        (["+sweeps=dampin"], ["sweeps=dampin", "did you mean damping?"]),
        (["hydra.mode=RUN,MULTIRUN"], ["Sweeping over Hydra"]),
        (["seed=interval(0,1)"], ["does not support sweep type"]),
    ],
)
def test_every_cell_is_validated_before_the_first_starts(arguments, parts, door, seen, tmp_path):
    answer = door("-m", *arguments)
    assert answer.code == 2
    (line,) = answer.lines
    for part in parts:
        assert part in line
    assert seen == []
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_yaml_is_one_line(door, tmp_path):
    (tmp_path / "own" / "model").mkdir(parents=True)
    (tmp_path / "own" / "model" / "broken.yaml").write_text("layers: [1\n")
    answer = door("--config-dir", str(tmp_path / "own"), "model=broken")
    assert answer.code == 2
    (line,) = answer.lines
    assert "broken.yaml" in line


def test_a_key_in_a_users_own_file_that_nothing_reads(door, tmp_path):
    (tmp_path / "own" / "model").mkdir(parents=True)
    (tmp_path / "own" / "model" / "mine.yaml").write_text("type: gpt2\nlayerz: 3\n")
    answer = door("--config-dir", str(tmp_path / "own"), "model=mine")
    assert answer.code == 2
    assert answer.lines == [
        "fisher_lab: model.layerz=3: there is no key model.layerz; did you mean model.layers?"
    ]


def test_as_typed_in_a_process_of_its_own(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "fisher_lab", "+kfac.dampign=1"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
