"""``fisher-lab capsule``: the zip can be checked where it is unpacked, and may name nobody."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from benchmarks import verify_edits
from fisher_lab import cli
from fisher_lab.results import capsule, verify
from fisher_lab.results.capsule import Names
from fisher_lab.results.finishing import finish
from fisher_lab.runs import digests


def unpacked(file: Path, folder: Path) -> Path:
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None
        archive.extractall(folder)
    return folder


def add_weights(run: Path) -> None:
    (run / "model").mkdir()
    (run / "model" / "model.safetensors").write_bytes(b"weights")
    (run / "fisher_lab.log").write_text("a log\n")


def finish_again(place) -> None:
    """Runs that were changed on purpose become runs that ended like this."""
    for record in place.sweep.glob("*/run.json"):
        verify_edits.reseal(record.parent)
    capsule._seal_journal(place.sweep)
    finish(place.sweep)
    report = ["report", "results/one", "results/two", "-o", "appendix/report.html"]
    assert cli.main([*report, "--appendix", "appendix"]) == 0


def test_an_unpacked_capsule_verifies_without_the_weights(place, tmp_path, capsys):
    add_weights(place.run)
    finish_again(place)
    assert cli.main(["capsule", "appendix", "-o", str(tmp_path / "c.zip")]) == 0
    root = unpacked(tmp_path / "c.zip", tmp_path / "reader")
    names = {name for name, _ in digests.entries(root)}
    run = f"results/one/{place.run.name}"
    assert {"README.md", "constraints.txt", "capsule.json", "appendix/appendix.tex",
            "ro-crate-metadata.json", f"{run}/run.json", f"{run}/layers.csv",
            "results/one/sweep.json", "results/one/events.jsonl"} <= names  # fmt: skip
    assert not [name for name in names if name.endswith((".log", ".safetensors"))]
    for path, runs in (("appendix", 12), ("results/one", 9)):
        found = verify.verify(root / path)
        assert (found.deviations, found.runs) == ([], runs)
    verify_edits.digit(root / run / "metrics.json")
    assert verify.verify(root / "appendix").deviations
    readme = (root / "README.md").read_text()
    assert "fisher-lab verify appendix\nfisher-lab reproduce appendix --sample 5\n" in readme
    assert "torch==" in (root / "constraints.txt").read_text()
    assert "fisher-lab==" not in (root / "constraints.txt").read_text()


def test_the_description_is_an_ro_crate_of_every_file(place, tmp_path):
    capsule.pack(Path("results/one"), tmp_path / "c.zip")
    root = unpacked(tmp_path / "c.zip", tmp_path / "reader")
    described = json.loads((root / "ro-crate-metadata.json").read_text())
    assert described["@context"] == "https://w3id.org/ro/crate/1.1/context"
    entities = {one["@id"]: one for one in described["@graph"]}
    assert entities["ro-crate-metadata.json"]["about"] == {"@id": "./"}
    assert {"name", "description", "datePublished", "license"} <= entities["./"].keys()
    files = {one["@id"] for one in described["@graph"] if one["@type"] == "File"}
    there = {name for name, _ in digests.entries(root)}
    assert files == there - {"ro-crate-metadata.json"}
    parts = {part["@id"] for one in entities.values() for part in one.get("hasPart", [])}
    assert parts <= entities.keys()


def test_the_same_content_gives_the_same_zip(place, tmp_path):
    one, other = (capsule.pack(Path("results"), tmp_path / name) for name in ("a.zip", "b.zip"))
    assert one.read_bytes() == other.read_bytes()


PRIVATE = ("jdoe", "lab-box-7", "jane.doe@example.org", "acme-team", "git@git.example.org")


def with_names(place, home: Path) -> None:
    """Names wherever a record may have them."""

    def completed(record):
        record["config"]["tracker"]["entity"] = "acme-team"
        record["config"]["cache_dir"] = f"{home}/cache"
        record["overrides"].append(f"cache_dir={home}/cache")
        record["provenance"]["host"]["name"] = "lab-box-7.example.org"
        record["provenance"]["note"] = "git@git.example.org:jdoe/secret.git by jane.doe@example.org"

    def failed(record):
        completed(record)
        record["error"]["message"] = f"{home}/data.txt of jdoe on lab-box-7"
        record["error"]["traceback"] = f'File "/home/jdoe/project/x.py" {home}/site-packages'

    verify_edits.change(place.run / "run.json", completed)
    verify_edits.change(place.failed / "run.json", failed)
    finish_again(place)


def test_an_anonymous_capsule_names_nobody_and_verifies(place, tmp_path, monkeypatch):
    home = tmp_path / "jdoe"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USER", "jdoe")
    monkeypatch.setenv("LOGNAME", "jdoe")
    add_weights(place.other)
    with_names(place, home)
    before = {name: path.read_bytes() for name, path in digests.entries(place.results)}
    assert cli.main(["capsule", "appendix", "--anonymous", "-o", str(tmp_path / "c.zip")]) == 0
    assert {name: path.read_bytes() for name, path in digests.entries(place.results)} == before
    root = unpacked(tmp_path / "c.zip", tmp_path / "reader")
    everything = [(tmp_path / "c.zip").read_bytes()]
    for name, path in digests.entries(root):
        everything += [name.encode(), path.read_bytes()]
    for word in (*PRIVATE, str(home)):
        assert not [data for data in everything if word.lower().encode() in data.lower()], word
    found = verify.verify(root / "appendix")
    assert (found.deviations, found.runs) == ([], 12)
    record = json.loads((root / "results" / "one" / place.run.name / "run.json").read_text())
    assert record["config"]["cache_dir"] == "~/cache"
    assert record["run_id"] == place.run.name


def test_an_appendix_that_differs_is_not_sealed_anew(place, tmp_path, capsys):
    verify_edits.digit(place.run / "metrics.json")
    assert cli.main(["capsule", "appendix", "--anonymous", "-o", str(tmp_path / "c.zip")]) == 2
    assert "not as its runs were" in capsys.readouterr().err
    assert not (tmp_path / "c.zip").exists()


def test_a_name_that_cannot_be_taken_out_makes_no_capsule(place, tmp_path, monkeypatch, capsys):
    """A user who is called like a key of every record."""
    monkeypatch.setenv("LOGNAME", "kfac")
    assert cli.main(["capsule", "appendix", "--anonymous", "-o", str(tmp_path / "c.zip")]) == 2
    assert "which cannot be taken out: no capsule is made" in capsys.readouterr().err
    assert not (tmp_path / "c.zip").exists()


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("/home/ada/data of ada", "~/data of somebody"),
        ("/home/adam stays", "/home/adam stays"),
        ("a digest 0ada1", "a digest 0ada1"),
        ("ADA's box, box-1.", "somebody's box, somebody."),
        ("xbox-1y", "xsomebodyy"),
        ("by a.b@c.org from https://h.org/x/y.git", "by private from private"),
        ("root of all", "root of all"),
    ],
)
def test_names_in_texts(text, clean):
    names = Names(["/home/ada"], ["ada", "box-1", "root"], ["lab"])
    assert names.out_of(text) == clean


def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["capsule", "nowhere"]) == 2
    assert "nowhere: there is no such directory" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert cli.main(["capsule", "empty"]) == 2
    assert "neither an appendix nor a run" in capsys.readouterr().err
