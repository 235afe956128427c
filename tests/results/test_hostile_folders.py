"""Results folders that anybody may have written into: read as data, or left out with a line."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from fisher_lab import cli
from fisher_lab.results import load
from fisher_lab.runs import atomic
from tests.results.run_directories import make_run, make_sweep


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """A sweep of one good run."""
    return make_sweep(tmp_path / "s", [({"seed": 0}, {"a": 1.0})])


def left_out(sweep: Path) -> dict[str, str]:
    frame = load(sweep)
    assert frame["status"].tolist()[:1] == ["completed"]
    return {Path(one.directory).name: one.reason for one in frame.attrs["left_out"]}


def record_with(sweep: Path, **fields: object) -> None:
    shutil.copytree(sweep / "0", sweep / "bad")
    file = sweep / "bad" / "run.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.parametrize("name", ["run.json", "metrics.json", "sweep.json", "layers.csv"])
@pytest.mark.parametrize("kind", ["link", "pipe", "device"])
def test_what_is_no_regular_file_is_neither_followed_nor_waited_for(name, kind, sweep, tmp_path):
    make_run(sweep / "bad", {"seed": 1}, {"a": 2.0})
    outside = tmp_path / "outside"
    outside.write_text('{"schema": "fisher_lab.run/1", "secret": 7}')
    place = sweep / name if name == "sweep.json" else sweep / "bad" / name
    place.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(place)
    else:
        place.symlink_to(outside if kind == "link" else "/dev/zero")
    frame = load(sweep)
    reasons = [one.reason for one in frame.attrs["left_out"]]
    reasons += [str(one) for one in frame["reason"] if one]
    if name == "layers.csv":
        from fisher_lab.results.loading import load_layers

        reasons = [one.reason for one in load_layers(sweep).attrs["left_out"]] or reasons
    assert any("not a regular file" in one for one in reasons) or name == "layers.csv"
    assert "secret" not in frame.to_csv()


def test_links_to_directories_are_not_followed(sweep, tmp_path):
    outside = make_run(tmp_path / "outside", {"seed": 1}, {"a": 2.0}).directory
    (sweep / "link").symlink_to(outside, target_is_directory=True)
    (sweep / "loop").symlink_to(sweep, target_is_directory=True)
    assert len(load(sweep)) == 1


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"error": "text"}, "not the record of a run"),
        ({"overrides": 5}, "not the record of a run"),
        ({"status": ["completed"]}, "there is no status"),
        ({"config": [1]}, "no configuration"),
        ({"run_id": 3}, "no configuration or no run_id"),
    ],
)
def test_a_record_of_other_types_is_left_out(fields, reason, sweep):
    record_with(sweep, **fields)
    assert reason in left_out(sweep)["bad"]


def test_records_that_are_too_deep_or_too_large_are_left_out(sweep, monkeypatch):
    record_with(sweep)
    file = sweep / "bad" / "run.json"
    file.write_text('{"schema": ' + "[" * 10_000 + "]" * 10_000 + "}")
    assert "nested too deeply" in left_out(sweep)["bad"]
    with file.open("wb") as sparse:
        sparse.truncate(2 * 2**30)
    assert "larger than" in left_out(sweep)["bad"]


def test_metrics_that_are_no_numbers_make_a_run_corrupt(sweep):
    for text in ('{"a": 1' + "0" * 400 + "}", '{"a": {"b": 1}}', "[" * 10_000):
        (sweep / "0" / "metrics.json").write_text(text)
        assert load(sweep)["status"].tolist() == ["corrupt"]


def test_names_that_lead_out_are_no_cells(sweep, tmp_path):
    make_run(tmp_path / "outside", {"seed": 1}, {"a": 2.0})
    about = json.loads((sweep / "sweep.json").read_text())
    names = ["../outside", "..", ".", "", "/etc", "a/b", 7, None]
    about["cells"] = [{"run_id": name, "axes": {}, "settings": {}} for name in names]
    (sweep / "sweep.json").write_text(json.dumps(about))
    assert len(load(sweep)) == 1
    assert not any(map(atomic.is_name, names))


def test_directories_without_end_are_not_gone_into(sweep):
    deep = sweep.joinpath(*["d"] * 100)
    deep.mkdir(parents=True)
    (reason,) = left_out(sweep).values()
    assert "directories deep" in reason


def test_names_and_values_that_are_no_text_are_shown_all_the_same(sweep, capfd):
    odd = os.fsdecode(b"r\xff\xfen")
    shutil.copytree(sweep / "0", sweep / odd)
    text = (sweep / odd / "run.json").read_text().replace('"auto"', '"\\ud800 [x] \\u202e"')
    (sweep / odd / "run.json").write_text(text)
    for form in ("csv", "md", "tex", "html"):
        assert cli.main(["table", str(sweep), "-o", f"t.{form}"]) == 0
        assert Path(f"t.{form}").read_bytes().decode()
    assert capfd.readouterr().err == ""
