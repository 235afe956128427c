"""What child processes and SLURM get of the environment, and what rules them no more."""

from __future__ import annotations

import os

import pytest

from fisher_lab.runs import environment
from tests.processes import python

RULING = {
    "SBATCH_TIMELIMIT": "2", "SBATCH_PARTITION": "x", "SLURM_MEM_PER_CPU": "100",
    "SLURM_JOB_ID": "7", "SLURM_CLUSTERS": "far", "SQUEUE_PARTITION": "x", "SRUN_DEBUG": "1",
    "SALLOC_ACCOUNT": "x", "SCANCEL_STATE": "x", "SACCT_FORMAT": "x", "SUBMITIT_EXECUTOR": "slurm",
    "SUBMITIT_PREEMPT_SIGNAL": "TERM", "WANDB_SWEEP_ID": "x", "WANDB_RUN_ID": "x",
    "WANDB_PROJECT": "x",
}  # fmt: skip
KEPT = {"SLURM_CONF": "/x/slurm.conf", "SLURM_JWT": "x", "WANDB_API_KEY": "x", "WANDB_MODE": "x",
        "SLURMY": "x", "MY_SBATCH_X": "x", "OMP_NUM_THREADS": "3"}  # fmt: skip


@pytest.fixture(autouse=True)
def _ruled(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (RULING | KEPT).items():
        monkeypatch.setenv(name, value)


def test_a_child_gets_nothing_that_rules_it():
    found = environment.child({"OMP_NUM_THREADS": "1"})
    assert not set(RULING) & set(found)
    assert found["OMP_NUM_THREADS"] == "1"
    assert {name: found[name] for name in KEPT} == KEPT | {"OMP_NUM_THREADS": "1"}
    assert found["PATH"] == os.environ["PATH"]


def test_a_part_of_a_job_keeps_what_its_job_is():
    found = environment.child(in_job=True)
    assert {n for n in RULING if n not in found} == {n for n in RULING if n.startswith("WANDB")}


def test_a_library_finds_the_same_for_as_long_as_it_is_asked():
    before = dict(os.environ)
    with environment.cleaned():
        assert not set(RULING) & set(os.environ)
        assert os.environ["SLURM_CONF"] == KEPT["SLURM_CONF"]
    assert dict(os.environ) == before


def test_what_is_ignored_is_said_and_no_value_with_it(monkeypatch):
    text = environment.ignored()
    assert "SBATCH_TIMELIMIT" in text
    assert "WANDB_SWEEP_ID" in text
    assert "variables of the SLURM job 7" in text
    assert "far" not in text
    for name in RULING:
        monkeypatch.delenv(name)
    assert environment.ignored() == ""


def test_a_child_prints_whatever_it_has_to_into_its_log(monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    script = "import os, subprocess, sys, json; from fisher_lab.runs import environment; "
    script += "subprocess.run([sys.executable, '-c', 'print(chr(233) + chr(0xd800))'], check=True, "
    script += "env=environment.child())"
    done = python("-c", script, text="")
    assert (done.returncode, done.stdout) == (0, "\u00e9\\ud800\n")
