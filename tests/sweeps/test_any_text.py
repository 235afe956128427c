"""Values that are any text: the same in a sweep file, in the cell, on the screen and in a table."""

from __future__ import annotations

import csv
import io
import json
import math
import shlex
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fisher_lab.config import compose, sweep_files
from fisher_lab.results import load
from fisher_lab.results.export import to_csv, to_html, to_latex, to_markdown
from fisher_lab.results.table import tabulate
from tests.cli.conftest import install_task
from tests.sweeps.application import own_sweep, planned

TEXTS = [
    "1e-3", "a,b", "null", "true", "nan", "inf", "0x10", "'", '"', "'a'", "[a]", "{b: 1}", "é",
    "a\nb", "x" * 300, "\u202eabc", "=1+1", "$(touch x)", "a=b", "\\", "~", "a: b", "[bold]x[/]",
    "|", "-1", "\u65e5\u672c", "a\tb", "%", "#", "*", "& _", "a b", "<script>", "`ls`",
    "choice(a,b)",
]  # fmt: skip
KEY = "model.tokenizer"
PRETRAINED = ("model=pretrained", "model.name_or_path=x")
"""The model of which this key, whose value may be any text, is a setting."""

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()


def is_plain(value: object) -> bool:
    """Not what Hydra and OmegaConf take for something else, in quotes or not."""
    return "${" not in str(value) and "\0" not in str(value) and not str(value).endswith("\\")


@given(st.lists(scalars.filter(is_plain), min_size=1, max_size=4))
def test_the_items_of_a_list_keep_their_types(values):
    text = sweep_files.values(values)
    found = [compose.parse(cell)[0].value() for cell in compose.cells({"key": text}, [])]
    assert [(type(one), one) for one in found] == [(type(one), one) for one in values]


def test_lists_and_mappings_in_a_list_keep_theirs():
    values = [["1e-3", 1e-3, "a,b"], {"a": "1", "b": ["x y", 2]}]
    found = [
        compose.parse(c)[0].value() for c in compose.cells({"k": sweep_files.values(values)}, [])
    ]
    assert found == values


def test_texts_of_a_sweep_file_reach_the_cells_as_they_are():
    own_sweep("own", json.dumps({"params": {KEY: TEXTS}}))
    (plan,) = planned("+sweeps=own", *PRETRAINED)
    assert [cell.config.model.tokenizer for cell in plan.cells] == TEXTS
    assert len({cell.run_id for cell in plan.cells}) == len(TEXTS)


def test_texts_on_the_screen_and_in_every_table(door, seen, runs, monkeypatch):
    texts = ["[bold]x[/]", "é", "a,b", "[1]", "a\nb", "x" * 300, "*", "'"]

    def run(config, run):
        run.metrics({"loss": 1.0})
        if config.model.tokenizer == "a,b":
            raise RuntimeError("[no] markup\n\u00e9")

    install_task(monkeypatch, run)
    own_sweep("own", json.dumps({"params": {KEY: texts}}))
    dry = door("-m", "+sweeps=own", *PRETRAINED, "sweep.dry_run=true")
    assert dry.code == 0
    assert all(text in dry.out for text in ("[bold]x[/]", "é", "[1]"))
    answer = door("-m", "+sweeps=own", *PRETRAINED)
    assert answer.code == 1
    (line,) = [one for one in answer.lines if ": failed: RuntimeError: [no] markup" in one]
    # What the line says gives this cell again when it is pasted into a shell.
    typed = shlex.split(line.removeprefix("fisher_lab: ").partition(": failed:")[0])
    assert [compose.parse([one])[0].value() for one in typed if KEY in one] == ["a,b"]
    shown = door("status", "own", "--json").out
    assert "é" in shown
    labels = {cell["label"] for cell in json.loads(shown)}
    assert f"{KEY}='a,b'" in labels
    assert door("status", "own").code == 0

    frame = load("results/own")
    table = tabulate(frame, rows=[KEY])
    rows = list(csv.DictReader(io.StringIO(to_csv(table))))
    assert sorted({row[KEY].removeprefix("'") or "'" for row in rows}) == sorted(texts)
    assert "[bold]x[/]" in to_html(table)
    assert "\n| " in to_markdown(table)
    body = to_latex(table)
    rows = [one for one in body.splitlines() if one.endswith(r"\\")]
    assert len(rows) >= len(texts)
    assert not [one for one in rows if one.lstrip().startswith(("[", "*"))]
    assert door("report", "results/own", "-o", "r.html").code == 0


@pytest.mark.parametrize(
    "name", ["undecodable.yaml", ".hidden.yaml", "a.b.yaml", "a b.yaml", "é.yaml"]
)
def test_one_odd_file_among_the_sweeps_breaks_no_command(name, door, seen):
    Path("sweeps").mkdir()
    Path("sweeps", name).write_bytes(b"\xff\xfe\x00params:")
    Path("sweeps", "folder.yaml").mkdir()
    assert door("-m", "seed=1,2").code == 0
    assert door("seed=1").code == 0
    assert door("--help").code == 0
    answer = door("-m", f"+sweeps={name.removesuffix('.yaml')}")
    assert (answer.code, len(answer.lines)) == (2, 1)


def test_a_glob_of_a_group_gives_its_options(door, seen):
    (plan,) = planned("kfac/policy=glob(a*)")
    assert {cell.config.kfac.policy for cell in plan.cells} == {"all", "auto"}
    for text in ("kfac.damping=glob(*)", "kfac/policy=glob(x*)", "seed=range(1,1)"):
        assert "a sweep over no values" in door("-m", text).refusal
    assert "name the sweeps" in door("-m", "+sweeps=glob(*)").refusal


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["~kfac.damping", "kfac/damping=paper"], "every key has a value"),
        (["~seed"], "every key has a value"),
        (["hydra.sweep.subdir=x"], "named by its identity"),
        (["sweep.name=" + "a" * 300], "at most 128"),
    ],
)
def test_what_would_be_ignored_is_refused(arguments, words, door, seen):
    assert words in door("-m", "seed=1,2", *arguments).refusal
    assert seen == []


def test_a_dry_run_tells_what_the_launcher_cannot_do(door, seen):
    answer = door("-m", "seed=1,2", "sweep.timeout_s=3", "sweep.dry_run=true")
    assert answer.code == 2
    assert "2 cells: 2 invalid" in answer.out
    assert answer.lines == [
        "fisher_lab: sweep.timeout_s=3.0 is not allowed: sweep.timeout_s must be null with "
        "hydra/launcher=serial, which cannot end a cell; take hydra/launcher=local"
    ]


def test_numbers_that_are_no_finite_numbers_stay_what_they_are():
    (found,) = compose.cells({"key": sweep_files.values([math.nan])}, [])
    assert math.isnan(float(str(compose.parse(found)[0].value())))
