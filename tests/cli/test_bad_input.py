"""Bad input: one line that names key, value and what is allowed; exit code 2; nothing written."""

from __future__ import annotations

import pytest

from tests.processes import python

BAD = {
    "kfac.damping=-1": ("kfac.damping=-1", "a finite number above 0"),
    "kfac.damping=nan": ("kfac.damping=nan", "a finite number above 0"),
    "kfac.damping=inf": ("kfac.damping=inf", "a finite number above 0"),
    "kfac.damping=0": ("kfac.damping=0", "a finite number above 0"),
    "kfac.damping=high": ("kfac.damping=high", "a finite number above 0"),
    "kfac={damping:null,damping_A:null}": ("kfac.damping=null", "both damping_A and damping_G"),
    "kfac.damping_mode=trace": ("kfac.damping_mode=trace", "one of absolute, relative, pi"),
    "task.damping_scan=[1,0]": ("task.damping_scan=[1,0]", "a list of finite numbers above 0"),
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
    "task=analyse": ("task=analyse", "one of analyze, ladder, plan, train"),
    "tracker=wadnb": ("tracker=wadnb", "tracker must be one of"),
    "tracker.sinks=[wandb,wandb]": ("tracker.sinks=", "a list of wandb, tensorboard"),
    "tracker.sinks=[mlflow]": ("tracker.sinks=[mlflow]", "a list of wandb, tensorboard"),
    "tracker.mode=sometimes": ("tracker.mode=", "online, offline, disabled or null"),
    "tracker.project='a b'": ("tracker.project=", "letters, digits"),
    "tracker.budget_s=-1": ("tracker.budget_s=-1", "at least 0"),
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
    "+sweeps=damping": ("+sweeps=damping names a sweep", "-m"),
    "sweep.dry_run=true": ("sweep.dry_run=true is for sweeps", "-m"),
}


@pytest.mark.parametrize("argument", BAD)
def test_one_line_and_nothing_written(argument, door, tmp_path):
    line = door(argument).refusal
    for part in BAD[argument]:
        assert part in line
    assert list(tmp_path.iterdir()) == []


DETACHED = ("seed=1,2", "hydra/launcher=slurm_cpu", "sweep.detach=true")
WITH = "with sweep.detach=true on SLURM"


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
        (["+sweeps=damping,kappa"], ["write +sweeps=[damping,kappa]"]),
        (
            ["seed=1,2", "hydra/launcher=basic"],
            ["hydra/launcher=basic", "local, serial, slurm_cpu"],
        ),
        (["seed=1,2", "sweep.timeout_s=5"], ["sweep.timeout_s=5", "hydra/launcher=local"]),
        (["seed=1,2", "sweep.name=a/b"], ["sweep.name=a/b", "letters"]),
        (
            ["seed=1,2", "hydra/launcher=local", "hydra.launcher.n_jobs=0"],
            ["hydra.launcher.n_jobs=0", "at least 1"],
        ),
        (
            ["seed=1,2", "hydra/launcher=local", "hydra.launcher.n_jobs=two"],
            ["hydra.launcher.n_jobs=two"],
        ),
        ([*DETACHED, "sweep.fail_fast=true"], ["sweep.fail_fast=true", f"must be false {WITH}"]),
        ([*DETACHED, "sweep.max_failures=2"], ["sweep.max_failures=2", f"must be null {WITH}"]),
    ],
)
def test_every_cell_is_validated_before_the_first_starts(arguments, parts, door, seen, tmp_path):
    line = door("-m", *arguments).refusal
    for part in parts:
        assert part in line
    assert seen == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("layers: [1\n", "mine.yaml"),  # no YAML
        (
            "type: gpt2\nlayerz: 3\n",
            "fisher_lab: model.layerz=3: there is no key model.layerz; did you mean model.layers?",
        ),
    ],
)
def test_a_users_own_file_that_is_wrong_is_one_line(text, words, door, tmp_path):
    (tmp_path / "own" / "model").mkdir(parents=True)
    (tmp_path / "own" / "model" / "mine.yaml").write_text(text)
    own = ("--config-dir", str(tmp_path / "own"))
    assert words in door(*own, "model=mine").refusal
    assert "model must be one of bert, gpt2" in (refusal := door(*own, "model=mime").refusal)
    assert "mine" in refusal


def test_as_typed_in_a_process_of_its_own(tmp_path):
    done = python("-m", "fisher_lab", "+kfac.dampign=1")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert list(tmp_path.iterdir()) == []
