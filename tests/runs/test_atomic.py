from __future__ import annotations

import json
import os
import signal

import pytest

from fisher_lab.runs import atomic
from tests.processes import python


def temporary_names(directory):
    return [p.name for p in directory.iterdir() if p.name.endswith(".tmp")]


def test_text_bytes_and_json_come_back_as_written(tmp_path):
    atomic.write_text(tmp_path / "deep" / "er" / "a.txt", "ä\n\r\nb")
    atomic.write_bytes(tmp_path / "b", b"\x00\xff")
    atomic.write_json(tmp_path / "c.json", {"z": 1, "a": [1.5, None, "é"]})
    assert (tmp_path / "deep/er/a.txt").read_bytes() == "ä\n\r\nb".encode()
    assert (tmp_path / "b").read_bytes() == b"\x00\xff"
    assert list(json.loads((tmp_path / "c.json").read_text("utf-8"))) == ["z", "a"]
    assert temporary_names(tmp_path) == []


def test_an_error_leaves_the_old_file_and_no_temporary_name(tmp_path):
    path = tmp_path / "a.json"
    atomic.write_json(path, {"old": 1})
    with pytest.raises(ValueError, match="Out of range"):
        atomic.write_json(path, {"new": float("nan")})
    with pytest.raises(KeyError), atomic.writing(path) as temporary:
        temporary.write_text("half")
        raise KeyError("stopped in the middle")
    with pytest.raises(FileNotFoundError), atomic.writing(path):
        pass  # nothing was written: no empty file
    assert json.loads(path.read_text()) == {"old": 1}
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_directory_appears_whole_or_not_at_all_and_once(tmp_path):
    target = tmp_path / "cache" / "abc"
    with pytest.raises(RuntimeError, match="stop"), atomic.directory(target) as temporary:
        (temporary / "one").write_text("1")
        raise RuntimeError("stop")
    assert not target.exists()
    with atomic.directory(target) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "one").write_text("1")
        assert not target.exists()
    known = pytest.raises(FileExistsError, match="abc exists already")
    with known, atomic.directory(target) as temporary:
        (temporary / "two").write_text("2")
    with atomic.directory(target, keep_existing=True) as temporary:
        (temporary / "three").write_text("3")
    assert (target / "sub" / "one").read_text() == "1"
    assert (os.listdir(target), os.listdir(target.parent)) == (["sub"], ["abc"])


KILLED_BETWEEN_WRITE_AND_RENAME = """
import os, signal, sys
from fisher_lab.runs import atomic
with atomic.writing(sys.argv[1]) as temporary:
    temporary.write_text("new, but never renamed")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_writer_killed_before_the_rename_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    atomic.write_text(path, "old")
    atomic.write_text(tmp_path / ".b.txt.1-2.tmp", "of another target")
    child = python("-c", KILLED_BETWEEN_WRITE_AND_RENAME, str(path))
    assert child.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    assert len(temporary_names(tmp_path)) == 2
    atomic.remove_leftovers(path.parent, path.name)
    assert sorted(os.listdir(tmp_path)) == [".b.txt.1-2.tmp", "a.txt"]


def test_what_killed_writers_left_anywhere_under_a_directory_is_removed(tmp_path):
    inner = tmp_path / "ranks"
    inner.mkdir()
    for kept in (tmp_path / "run.json", inner / "work.json", tmp_path / "note.tmp"):
        kept.write_text("kept")
    (tmp_path / ".layers.csv.12-ab.tmp").write_text("half")
    (inner / ".work.json.12-cd.tmp").write_text("half")
    (tmp_path / ".model.12-ef.tmp").mkdir()
    (tmp_path / ".model.12-ef.tmp" / ".weights.12-01.tmp").write_text("half")
    atomic.remove_leftovers(tmp_path)
    found = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))
    assert found == ["note.tmp", "ranks", "ranks/work.json", "run.json"]
