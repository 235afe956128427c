"""Hydra's own flags work as in any Hydra application."""

from __future__ import annotations

import os
import subprocess
import sys

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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--help", "model=gtp2"), "did you mean gpt2?"),
        (("--cfg", "job", "kfac/policy=al"), "kfac/policy=al"),
        (("--cfg", "job", "-m"), "--multirun and --cfg together"),
    ],
)
def test_what_a_flag_cannot_show_is_one_line(arguments, words, door):
    assert words in door(*arguments).refusal


def test_help_takes_less_than_two_seconds(tmp_path):
    """Of processor time, which other work on the machine does not stretch as it does the clock."""
    command = [sys.executable, "-m", "fisher_lab", "--help"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=tmp_path)
    _, status, used = os.wait4(process.pid, 0)  # of this one alone, whatever else has ended
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert used.ru_utime + used.ru_stime < 2


@pytest.mark.parametrize("flag", ["--cfg", "-c"])
def test_cfg_shows_the_composed_configuration(flag, door, tmp_path):
    answer = door(flag, "job", "kfac/policy=all", "kfac.damping=1e-3")
    assert answer.code == 0
    shown = yaml.safe_load(answer.out)
    assert (shown["kfac"]["policy"], float(shown["kfac"]["damping"])) == ("all", 1e-3)
    assert "hydra" not in shown
    before = door("kfac/policy=all", flag, "job", "--package", "kfac")  # overrides before the flag
    assert before.code == 0
    assert yaml.safe_load(before.out.replace("# @package kfac", ""))["policy"] == "all"
    assert list(tmp_path.iterdir()) == []


def test_info_lists_the_plugins(door):
    answer = door("--info", "plugins")
    assert answer.code == 0
    assert "FisherLabSearchPath" in answer.out
    assert "ValidatingSweeper" in answer.out
