"""A log that many processes append to: no line is lost, none is torn, and a torn one harms none."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path

import pytest

from fisher_lab.runs import journal
from fisher_lab.runs.journal import Journal
from fisher_lab.runs.lock import Lock
from tests.processes import start_python

WRITER = """
import sys
from pathlib import Path
from fisher_lab.runs.journal import Journal
log = Journal(Path("events.jsonl"), Path("locks"))
for number in range(20):
    log.append("tick", writer=sys.argv[1], number=number)
    log.append_new({"event": "once", "number": n} for n in range(number))
"""


def test_events_come_back_in_their_order():
    log = Journal(Path("a/events.jsonl"), Path("locks"))
    assert log.read() == []
    log.append("first", run_id="x", reason=None)
    log.append("second")
    assert [entry["event"] for entry in log.read()] == ["first", "second"]
    assert log.read()[0]["run_id"] == "x"
    assert log.read()[0]["time"] <= log.read()[1]["time"]
    assert list(Path("locks").iterdir()) == []


def test_processes_do_not_write_over_each_other():
    writers = [start_python("-c", WRITER, name) for name in ("a", "b", "c")]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0, 0]
    lines = Path("events.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    once = [entry["number"] for entry in entries if entry["event"] == "once"]
    assert sorted(once) == list(range(19))  # whoever came first wrote it
    entries = [entry for entry in entries if entry["event"] == "tick"]
    assert Counter(entry["writer"] for entry in entries) == {"a": 20, "b": 20, "c": 20}
    for name in "abc":
        numbers = [entry["number"] for entry in entries if entry["writer"] == name]
        assert numbers == list(range(20))


def test_a_line_that_was_cut_short_is_passed_over():
    log = Journal(Path("events.jsonl"), Path("locks"))
    log.append("first")
    with Path("events.jsonl").open("a") as file:
        file.write('{"time": "2026-01-01", "eve')
    log.append("second")
    assert [entry["event"] for entry in log.read()] == ["first", "second"]


def test_a_journal_that_is_held_is_an_error_that_names_it(monkeypatch):
    monkeypatch.setattr(journal, "TIMEOUT_S", 0.1)
    log = Journal(Path("events.jsonl"), Path("locks"))
    lock = Lock(Path("locks/events.jsonl"))
    assert lock.acquire()
    with lock, pytest.raises(TimeoutError, match=r"events\.jsonl is held by"):
        log.append("first")
    log.append("first")
    assert len(log.read()) == 1


def test_a_write_of_which_the_disk_takes_a_part_is_gone_on_with(monkeypatch):
    class Nearly(io.FileIO):
        def write(self, data):
            return super().write(bytes(data)[:5])

    def nearly_full(file, mode="r", buffering=-1, **more):
        return Nearly(file, "a+") if buffering == 0 else open(file, mode, buffering, **more)

    monkeypatch.setattr(journal, "open", nearly_full, raising=False)
    log = Journal(Path("events.jsonl"), Path("locks"))
    log.append("first", run_id="x")
    log.append("second")
    assert [entry["event"] for entry in log.read()] == ["first", "second"]


def test_nothing_is_added_where_a_look_under_the_lock_says_so():
    log = Journal(Path("events.jsonl"), Path("locks"))
    log.append_unless(log.read, "first")
    log.append_unless(log.read, "second")
    assert [entry["event"] for entry in log.read()] == ["first"]
