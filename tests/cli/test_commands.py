"""The front command: what it lists, what it suggests, and a reader that has read enough."""

from __future__ import annotations

import pytest

import fisher_lab
from fisher_lab import cli
from fisher_lab.config import help as page
from tests import models
from tests.processes import python


def test_help_lists_every_command_and_fits_eighty_columns(door):
    out = door("--help").out
    commands = out.partition("== Commands ==")[2].partition("== Flags")[0].splitlines()
    assert set(page.COMMANDS) == set(cli.COMMANDS)
    listed = [line.split()[1] for line in commands if line.startswith("fisher-lab ")]
    assert sorted(listed) == sorted(cli.COMMANDS)
    assert [line for line in out.splitlines() if len(line) > 80] == []


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_every_command_fits_eighty_columns(command, capsys):
    try:
        code = cli.main([command, "--help"])
    except SystemExit as stop:
        code = stop.code
    out = capsys.readouterr().out
    assert code == 0
    assert f"fisher-lab {command}" in out
    assert [line for line in out.splitlines() if len(line) > 80] == []


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("tabel", "did you mean table?"),
        ("reprot", "did you mean report?"),
        ("zzzzzz", "there are cancel, "),
    ],
)
def test_a_misspelt_command_gets_a_suggestion(word, words, door):
    line = door(word).refusal
    assert line.startswith(f"fisher_lab: {word}: there is no such command; ")
    assert words in line


def test_the_version_is_ours(door):
    answer = door("--version")
    assert (answer.code, answer.out) == (0, f"fisher_lab {fisher_lab.__version__}\n")


@pytest.mark.parametrize("arguments", [["--help"], ["explain"]])
def test_a_reader_that_has_read_enough_is_no_error(arguments, tmp_path):
    """As ``| head -1``: standard output is closed before the command writes to it."""
    code = (
        "import os, sys; read, write = os.pipe(); os.close(read); os.dup2(write, 1);"
        f"sys.argv[1:] = {arguments!r}; from fisher_lab.cli import entry; entry()"
    )
    done = python("-c", code)
    assert (done.returncode, done.stderr) == (0, "")


def test_verbose_reaches_the_screen_and_is_no_override(door, seen, monkeypatch):
    monkeypatch.setenv("FISHER_LAB_VERBOSE", "")
    assert door("--verbose", "seed=1").code == 0
    assert len(seen) == 1


def test_check_says_what_is_covered_and_what_to_run_next(door, tmp_path):
    """On a model in a directory, with a text of the user's own."""
    model = models.built("gpt2", vocab_size=300, n_embd=8, n_layer=1, n_head=2, n_positions=40)
    model.save_pretrained(tmp_path / "mine")
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question. " * 200)
    own = ("data.seq_len=8", "model.tokenizer=trained", "data.vocab_size=300")
    answer = door("check", "mine", "--data", "text.txt", *own)
    assert answer.code == 0, answer.err
    assert "K-FAC covers" in answer.out
    assert "whose tokens give the gradient that autograd gives" in answer.out
    following = answer.out.splitlines()[-1].split()
    assert following[:3] == ["next:", "fisher-lab", "model=pretrained"]
    assert {"model.name_or_path=mine", "data.path=text.txt", *own} <= set(following)
    assert "model.name_or_path=nowhere" in door("check", "nowhere", *own).refusal
