"""A lock guards a directory: who has lost it replaces nothing there."""

from __future__ import annotations

import pytest

from fisher_lab.runs import atomic, lock
from tests.runs.test_lock import as_of_another_host


def test_who_has_lost_a_lock_replaces_nothing_in_the_directory_that_it_guards(tmp_path):
    guarded = tmp_path / "run"
    first, second = (lock.Lock(tmp_path / "x", guards=guarded) for _ in range(2))
    assert first.acquire()
    with first:
        atomic.write_text(guarded / "run.json", "first")
        (guarded / ".begun.json.1-2.tmp").touch()
        as_of_another_host(tmp_path / "x.lock.0", age=1000)
        assert second.acquire()
        assert sorted(path.name for path in guarded.iterdir()) == ["run.json"]
        with pytest.raises(lock.LockLost):
            atomic.write_text(guarded / "run.json", "first again")
        atomic.write_text(tmp_path / "outside.json", "nobody guards it")
    with second:
        atomic.write_text(guarded / "run.json", "second")
    assert (guarded / "run.json").read_text() == "second"
    assert first.lost.is_set()
