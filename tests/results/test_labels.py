"""Names for people: every metric that the code writes has an entry, and users may add theirs."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from fisher_lab import cli
from fisher_lab.config import paths
from fisher_lab.config.validate import all_keys
from fisher_lab.results import labels
from fisher_lab.results.labels import LabelError
from fisher_lab.results.values import is_time
from fisher_lab.runs.record import Run
from fisher_lab.tasks import explain

FIRST = {key.partition("/")[0] for key in labels.catalogue().metrics} - {"{engine}"}
METRIC = re.compile(rf"({'|'.join(FIRST)})/[\w/\0]+")
WRITERS = ("tasks", "distributed")


def names_in(file: Path) -> set[str]:
    """Every text of a module that looks like a metric's name; a hole of an f-string is ``\\0``."""
    found = set()
    tree = ast.parse(file.read_text())
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)
              for part in node.values}  # fmt: skip
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = (p.value if isinstance(p, ast.Constant) else "\0" for p in node.values)
            text = "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = "" if id(node) in inside else node.value
        else:
            continue
        if METRIC.fullmatch(text):
            found.add(text)
    return found


def has_entry(name: str) -> bool:
    if "\0" not in name:
        return labels.catalogue().find(name) is not None
    pattern = re.compile(re.escape(name).replace("\0", r"[\w/]*"))
    keys = [re.sub(r"\{\w+\}", "x", key) for key in labels.catalogue().metrics]
    return any(pattern.fullmatch(key) for key in keys)


def test_every_metric_in_the_code_has_an_entry():
    package = paths.root() / "fisher_lab"
    written = {n for part in WRITERS for f in (package / part).glob("*.py") for n in names_in(f)}
    assert len(written) > 60
    assert sorted(name for name in written if not has_entry(name)) == []


def test_a_metric_that_a_task_writes_without_an_entry_is_noticed(tmp_path):
    """The fixture of ``tests/conftest.py`` sees what the tasks of all tests write."""
    run = Run.start(tmp_path, config={})
    source = "def write(run):\n    for name in names: run.metrics({name: 1.0})"
    names = ["kfac/total_s", "kfac/new"]
    scope: dict = {"__name__": "fisher_lab.tasks.made_up", "names": names}
    exec(source, scope)
    with pytest.raises(AssertionError, match="kfac/new has no entry"):
        scope["write"](run)
    assert run.values == {"kfac/total_s": 1.0}
    run.metrics({"kfac/new": 1.0})  # a test's own


def test_entries_are_about_what_there_is():
    found = labels.catalogue()
    assert [key for key in found.settings if key not in all_keys()] == []
    sections = {e.section for e in found.metrics.values()} - {None}
    page = (paths.root() / "docs" / "math.md").read_text()
    titles = dict(re.findall(r"^## (\d+)\. (.*)$", page, re.MULTILINE))
    assert {str(n) for n in sections} <= set(titles)
    assert all(titles[str(n)].startswith(title) for n, title in explain.SECTIONS.items())
    entries = [e for e in found.metrics.values() if "{" not in e.key]
    assert [e.key for e in entries if is_time(e.key) != (e.unit == "s")] == []
    assert [e.key for e in found.metrics.values() if not e.formula] == []


@pytest.mark.parametrize(
    ("name", "better"),
    [
        ("ng/cosine", None), ("kfac/clipped_frac_A", None), ("kfac/factor_bytes", None),
        ("spectral/bytes", None), ("dist/sent_bytes_max", None), ("nobody/knows_s", None),
        ("kfac/total_s", "lower"), ("step/ekfac/gain", "higher"), ("step/ekfac/gain_se", "lower"),
        ("train/reduction_ratio", 1), ("lanczos/trace_low", None), ("loss/heldout", "lower"),
    ],
)  # fmt: skip
def test_directions(name, better):
    assert labels.metric(name).better == better


def test_words_of_families_ends_and_of_what_nobody_knows():
    gain = labels.metric("step/ekfac_token/gain")
    assert gain.label == "gain of EKFAC, tokens over the gradient"
    assert gain.heading == "gain, EKFAC, tokens (nats/token) ↑"
    assert labels.metric("step/momentum/gain").label == "gain of momentum over the gradient"
    assert (
        labels.metric("lanczos/trace_se").label == "standard error of the trace, matrix of Lanczos"
    )
    unknown = labels.metric("my/own")
    assert (unknown.label, unknown.heading, unknown.better) == ("my/own", "my/own", None)
    assert labels.setting("kfac.damping").with_symbol == "damping λ"
    assert labels.setting("my.own.key").short == "key"


def test_numbers_that_share_a_word_say_what_they_are_of():
    for word in ("trace", "largest_eigenvalue", "seconds", "residual", "residual_max"):
        keys = [k for k in labels.catalogue().metrics if k.rpartition("/")[2] == word]
        assert len({labels.metric(key).label for key in keys}) == len(keys)
    entries = list(labels.catalogue().metrics.values())
    assert len({e.label for e in entries}) == len(entries)


OWN = """
metrics:
  Mine:
    my/sharpness: {label: sharpness, unit: 1, better: 0, format: .2f, formula: max eig}
    ng/cosine: {label: angle}
settings:
  kfac.damping: {label: Dämpfung}
"""


def test_a_users_own_entries_come_on_top(capsys):
    Path(labels.OWN_FILE).write_text(OWN)
    mine = labels.metric("my/sharpness")
    assert (mine.label, mine.better, mine.text(1.234), mine.group) == (
        "sharpness",
        0,
        "1.23",
        "Mine",
    )
    assert labels.metric("ng/cosine").label == "angle"
    assert labels.metric("ng/norm").label == "norm of the natural gradient"
    assert labels.setting("kfac.damping").label == "Dämpfung"
    assert cli.main(["explain", "my/sharpness"]) == 0
    assert "0 is best" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("metrics: [1]", "a mapping"),
        ("metrix: {}", "did you mean metrics?"),
        ("metrics: {A: {m: {lable: x}}}", "did you mean label?"),
        ("metrics: {A: {m: {unit: s}}}", "there is no label"),
        ("metrics: {A: {m: {label: x, better: more}}}", "better=more is not allowed"),
        ("metrics: {A: {m: {label: x, format: .zz}}}", "format=.zz is not allowed"),
        ("metrics: {A: {m: {label: x, section: two}}}", "section=two is not allowed"),
        ("metrics: {A: [", "while parsing"),
        ("- !!python/object/apply:os.getcwd []", "could not determine a constructor"),
    ],
)
def test_a_users_own_file_that_is_wrong_is_one_line(text, words, capsys):
    Path(labels.OWN_FILE).write_text(text)
    with pytest.raises(LabelError, match=re.escape(words)) as caught:
        labels.metric("ng/cosine")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(labels.OWN_FILE)
    for arguments in (["explain", "ng/cosine"], ["task=plan"]):
        assert cli.main(arguments) == 2
        assert labels.OWN_FILE in capsys.readouterr().err


def test_explain(capsys):
    assert cli.main(["explain", "step/natural/gain", "kappa_A", "kfac.damping"]) == 0
    out = capsys.readouterr().out
    assert "paired by batch" in out
    assert "higher is better" in out
    assert "section 10, Steps" in out
    assert "column of layers.csv" in out
    assert "a finite number above 0 or null" in out
    assert max(map(len, out.splitlines())) <= 80
    assert cli.main(["explain"]) == 0
    listed = capsys.readouterr().out
    assert [key for key in labels.catalogue().metrics if key not in listed] == []
    assert cli.main(["explain", "ng/cosin"]) == 2
    assert "did you mean ng/cosine?" in capsys.readouterr().err
