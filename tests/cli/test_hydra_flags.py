"""Hydra's own flags work as in any Hydra application."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

GROUPS = ("kfac/policy", "kfac/damping", "kfac/kappa", "kfac/reduce", "model", "data", "task")


def test_help_lists_groups_and_keys(door, tmp_path):
    answer = door("--help")
    assert answer.code == 0
    for group in GROUPS:
        assert f"\n{group}: " in answer.out
    assert "max_condition_number: 1000000.0" in answer.out
    assert list(tmp_path.iterdir()) == []


def test_help_takes_overrides_and_resolves(door):
    answer = door("--help", "--resolve", "seed=7", "threads=${seed}")
    assert answer.code == 0
    assert "\nthreads: 7\n" in answer.out


def test_help_of_what_is_misspelt(door):
    answer = door("--help", "model=gtp2")
    assert (answer.code, len(answer.lines)) == (2, 1)


def test_help_takes_less_than_two_seconds(tmp_path):
    """Of processor time, which other work on the machine does not stretch as it does the clock."""
    command = [sys.executable, "-m", "fisher_lab", "--help"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=tmp_path)
    _, status, used = os.wait4(process.pid, 0)  # of this one alone, whatever else has ended
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert used.ru_utime + used.ru_stime < 2


@pytest.mark.parametrize("flag", [["--cfg", "job"], ["-c", "job"]])
def test_cfg_shows_the_composed_configuration(flag, door, tmp_path):
    answer = door(*flag, "kfac/policy=all", "kfac.damping=1e-3")
    assert answer.code == 0
    shown = yaml.safe_load(answer.out)
    assert shown["kfac"]["policy"] == "all"
    assert float(shown["kfac"]["damping"]) == 1e-3
    assert "hydra" not in shown
    assert list(tmp_path.iterdir()) == []


def test_overrides_may_stand_before_the_flag(door):
    answer = door("kfac/policy=all", "--cfg", "job", "--package", "kfac")
    assert answer.code == 0
    assert yaml.safe_load(answer.out.replace("# @package kfac", ""))["policy"] == "all"


def test_info_lists_the_plugins(door):
    answer = door("--info", "plugins")
    assert answer.code == 0
    assert "FisherLabSearchPath" in answer.out
    assert "ValidatingSweeper" in answer.out


def test_a_misspelt_option_beside_a_flag(door):
    answer = door("--cfg", "job", "kfac/policy=al")
    assert answer.code == 2
    assert len(answer.lines) == 1


def test_two_modes_at_once(door):
    answer = door("--cfg", "job", "-m")
    assert answer.code == 2
    assert "--multirun and --cfg together" in answer.lines[0]


@pytest.mark.parametrize(
    "code",
    [
        "import fisher_lab",
        "import fisher_lab, sys; sys.argv[1:] = ['--help']; import fisher_lab.__main__ as m",
        "from fisher_lab import cli; cli.main(['--help'])",
        "from fisher_lab import cli; cli.main(['kfac.damping=-1'])",
    ],
)
def test_torch_is_not_imported_for_nothing(code, tmp_path: Path):
    probe = (
        f"{code}\nimport sys\nassert not {{'torch', 'transformers', 'wandb'}} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
