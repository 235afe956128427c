"""``fisher-lab verify``: an untouched appendix is as its runs say, and every edit is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import verify_edits
from benchmarks.verify_edits import EDITS
from fisher_lab import cli
from fisher_lab.results import verify
from tests.results.run_directories import crossed, make_sweep


def snapshot(root: Path) -> dict[str, tuple[int, bytes]]:
    files = (file for file in root.rglob("*") if file.is_file())
    return {str(file): (file.stat().st_mtime_ns, file.read_bytes()) for file in files}


def test_an_untouched_appendix_differs_in_nothing_and_nothing_is_written(place, capsys):
    before = snapshot(Path.cwd())
    assert cli.main(["verify", "appendix"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[-1].endswith("files: nothing differs")
    assert err == ""
    assert cli.main(["verify", "results"]) == 0
    assert snapshot(Path.cwd()) == before


@pytest.mark.parametrize("name", EDITS)
def test_every_edit_is_named(name, place):
    function, words = EDITS[name]
    function(place)
    lines = verify_edits.named(place)
    assert [line for line in lines if words in line], lines


def test_there_are_fifty_edits():
    assert len(EDITS) >= 50


def test_a_line_names_both_values_and_the_exit_code_is_1(place, capsys):
    file = place.appendix / "one" / "table.csv"
    value = file.read_text().splitlines()[1].split(",")[4]
    file.write_text(file.read_text().replace(value, "9.5", 1))
    assert cli.main(["verify", "appendix"]) == 1
    assert f"appendix/one/table.csv, line 2: `9.5`, and the runs give `{value}`" in (
        capsys.readouterr().out
    )
    assert cli.main(["verify", "appendix", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["equal"] is False
    assert found["deviations"][0]["line"] == 2


def test_the_runs_may_have_moved(place, capsys):
    Path("results").rename("moved")
    assert cli.main(["verify", "appendix"]) == 2
    assert "give their directory with --runs" in capsys.readouterr().err
    assert cli.main(["verify", "appendix", "--runs", "moved"]) == 0
    digit_of = place.run.name
    file = Path("moved", "one", digit_of, "metrics.json")
    verify_edits.digit(file)
    assert cli.main(["verify", "appendix", "--runs", "moved"]) == 1


def test_another_working_directory_and_home_make_no_difference(place, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert verify.verify(place.appendix).deviations == []


def test_pdf_of_the_document_is_noted_and_not_checked(place):
    (place.appendix / "appendix.pdf").write_bytes(b"%PDF")
    found = verify.verify(place.appendix)
    assert found.deviations == []
    assert [note for note in found.notes if "appendix.pdf: made by LaTeX" in note]


def test_rounding_by_other_versions_is_none_but_an_edit_is(place):
    """A number that another processor computes otherwise in its last digits, unedited."""
    index = place.appendix / "appendix.json"
    file = place.appendix / "one" / "table.csv"
    text = file.read_text()
    mean = text.splitlines()[1].split(",")[4]
    file.write_text(text.replace(mean, repr(float(mean) * (1 + 1e-13)), 1))

    def other_machine(content):
        content["software"]["processor"] = "another"
        content["files"]["one/table.csv"] = verify.digests.of_file(file)
        return {**content, "digests": verify.digests.of_record(content)}

    verify_edits.change(index, other_machine)
    found = verify.verify(place.appendix)
    assert found.deviations == []
    assert [note for note in found.notes if "another processor" in note]
    file.write_text(text.replace(mean, repr(float(mean) * (1 + 1e-6)), 1))
    verify_edits.change(index, other_machine)
    assert [str(one) for one in verify.verify(place.appendix).deviations if one.line == 2]


def test_runs_of_versions_before_have_no_digests_and_that_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_sweep(tmp_path / "s", crossed({"seed": range(3)}, lambda s: {"m": 1.0 + s}))
    for file in tmp_path.glob("s/*/run.json"):
        verify_edits.change(file, lambda record: record.pop("digests") and None)
    assert cli.main(["verify", "s"]) == 0
    out = capsys.readouterr().out
    assert "3 of 3 runs have no digests" in out
    assert "no table was written at its end" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "nowhere: there is no such directory"),
        (["empty"], "neither an appendix nor a run"),
        (["old"], "old: it has no appendix.json that can be read"),
        (["odd"], "appendix.json: this is no index of fisher_lab.index/1"),
        (["empty", "--runs", "x"], "--runs goes with an appendix"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "old", "odd"):
        (tmp_path / name).mkdir()
    (tmp_path / "old" / "appendix.tex").write_text("")
    (tmp_path / "odd" / "appendix.json").write_text('{"schema": "x"}')
    assert cli.main(["verify", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert len(err.strip().splitlines()) == 1
