from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from fisher_lab.runs import atomic, lock
from tests.processes import start_python, until

WAIT = 60  # seconds after which a test gives a child process up


def lock_files(directory):
    return sorted(p.name for p in directory.iterdir() if ".lock." in p.name)


def as_of_another_host(path, *, age):
    """Turn a lock file into one that another host left behind ``age`` seconds ago."""
    fields = json.loads(path.read_text())
    fields.update(namespace="far", host="far", token="t" * 16)
    path.write_text(json.dumps(fields))
    then = time.time() - age
    os.utime(path, (then, then))


def test_only_one_of_two_holds_a_lock(tmp_path):
    first, second = lock.Lock(tmp_path / "x"), lock.Lock(tmp_path / "x")
    assert first.holder() is None
    assert first.acquire_within(1.0)
    assert not second.acquire()
    assert not second.acquire_within(0.1)
    holder = second.holder()
    assert holder is not None
    assert (holder.pid, holder.is_here()) == (os.getpid(), True)
    first.release()
    assert second.acquire()
    second.release()
    assert first.acquire_within(1.0)
    first.release()
    assert os.listdir(tmp_path) == []


def test_wrong_uses_are_refused(tmp_path):
    with pytest.raises(RuntimeError, match="acquire"), lock.Lock(tmp_path / "x"):
        pass
    held = lock.Lock(tmp_path / "x")
    assert held.acquire()
    with pytest.raises(RuntimeError, match="held by this object already"):
        held.acquire()
    held.release()


def test_the_lock_of_another_host_counts_until_its_heartbeat_is_old(tmp_path):
    left = lock.Lock(tmp_path / "x", stale_after=600)  # it does not beat meanwhile
    assert left.acquire()
    taker = lock.Lock(tmp_path / "x", stale_after=10)
    as_of_another_host(tmp_path / "x.lock.0", age=5)
    assert taker.holder() is not None
    assert not taker.acquire()
    as_of_another_host(tmp_path / "x.lock.0", age=11)
    assert taker.holder() is None
    assert taker.acquire()
    assert lock_files(tmp_path) == ["x.lock.1"]
    left.release()  # no longer its own: must not remove the taker's
    assert not taker.lost.is_set()
    assert lock_files(tmp_path) == ["x.lock.1"]
    taker.release()


def test_a_heartbeat_keeps_a_lock_fresh_and_a_frozen_holder_learns_that_it_has_lost_it(tmp_path):
    holder = lock.Lock(tmp_path / "x", stale_after=1.0)
    holder.heartbeat = 0.01
    assert holder.acquire()
    file = tmp_path / "x.lock.0"
    os.utime(file, (1, 1))
    until(lambda: file.stat().st_mtime > 1)
    assert not holder.lost.is_set()
    file.unlink()  # what a taker-over does once it has the next generation
    assert holder.lost.wait(WAIT)
    holder.release()


def test_a_rival_that_appears_between_create_and_listing_makes_us_give_way(tmp_path, monkeypatch):
    """A third process that saw an empty directory makes generation 0 while we take over 3."""
    stale = lock.Lock(tmp_path / "x")
    assert stale.acquire()
    stale._stop.set()
    (tmp_path / "x.lock.0").rename(tmp_path / "x.lock.3")
    as_of_another_host(tmp_path / "x.lock.3", age=1e4)
    rival = tmp_path / "x.lock.0"
    write = lock.Holder.write

    def with_rival(self, path):
        made = write(self, path)
        rival.write_text(json.dumps({"token": "rival"}))
        return made

    monkeypatch.setattr(lock.Holder, "write", with_rival)
    ours = lock.Lock(tmp_path / "x", stale_after=60)
    assert not ours.acquire()
    assert rival.exists()
    assert not (tmp_path / "x.lock.4").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"token": "a", "later": 1}'])
def test_a_lock_whose_file_cannot_be_read_is_held_until_it_is_old(text, tmp_path):
    """As for the moment between its create and its text, or after a later version wrote it."""
    file = tmp_path / "x.lock.0"
    file.write_text(text)
    taker = lock.Lock(tmp_path / "x", stale_after=60)
    assert not taker.acquire()
    os.utime(file, (time.time() - 61, time.time() - 61))
    assert taker.acquire()
    taker.release()


def test_many_threads_one_winner_each_round(tmp_path):
    """Every round begins with a stale lock, so all of them take over at once."""
    for round_ in range(5):
        path = tmp_path / f"x{round_}"
        left = lock.Lock(path)
        assert left.acquire()
        left._stop.set()
        as_of_another_host(tmp_path / f"{path.name}.lock.0", age=1e4)
        barrier, takers = threading.Barrier(8), [lock.Lock(path) for _ in range(8)]

        def race(taker, barrier=barrier):
            barrier.wait(WAIT)
            return taker.acquire()

        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(race, takers, timeout=WAIT))
        assert sum(won) == 1
        assert lock_files(tmp_path) == [f"{path.name}.lock.1"]
        takers[won.index(True)].release()


def test_once_builds_when_missing_and_only_then(tmp_path):
    calls = []

    def build(path):
        calls.append(path)
        atomic.write_text(path, "built")

    atomic.write_text(tmp_path / ".x.1-2.tmp", "a killed builder's")
    assert lock.once(tmp_path / "x", build)
    assert not lock.once(tmp_path / "x", build)
    assert calls == [tmp_path / "x"]
    assert os.listdir(tmp_path) == ["x"]


def test_once_hands_the_builders_error_on_and_frees_the_lock(tmp_path):
    def broken(path):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        lock.once(tmp_path / "x", broken)
    with pytest.raises(RuntimeError, match="not there although its builder returned"):
        lock.once(tmp_path / "x", lambda path: None)
    assert os.listdir(tmp_path) == []


# -- real processes ----------------------------------------------------------------------------

BUILDER = """
import os, signal, sys
from pathlib import Path
from fisher_lab.runs import atomic, lock
target, log, mode = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
def build(path):
    with open(log, "a") as file:
        file.write(f"{os.getpid()}\\n")
    if mode == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "announce":
        print("building", flush=True)
        sys.stdin.readline()
    with atomic.directory(path) as temporary:
        for i in range(20):
            (temporary / str(i)).write_text("x" * 1000)
print("ready", flush=True)
sys.stdin.readline()
print(lock.once(target, build), flush=True)
"""


@pytest.fixture
def target(tmp_path):
    return tmp_path / "cache" / "x"


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log"


@pytest.fixture
def begin(target, log):
    """Start builders, which wait for each other and then build, or do what ``mode`` says."""

    def start(count, mode):
        given, pipes = ("-c", BUILDER, str(target), str(log), mode), ("stdin", "stdout")
        children = [
            start_python(*given, **dict.fromkeys(pipes, subprocess.PIPE)) for _ in range(count)
        ]
        for child in children:
            assert child.stdout.readline() == "ready\n"
        for child in children:
            child.stdin.write("go\n")
            child.stdin.flush()
        return children

    return start


def answers(children):
    return sorted(child.communicate(timeout=WAIT)[0].strip() for child in children)


def test_processes_that_start_together_build_once(begin, target, log):
    assert answers(begin(4, "build")) == ["False", "False", "False", "True"]
    assert len(log.read_text().splitlines()) == 1
    assert len(os.listdir(target)) == 20
    assert os.listdir(target.parent) == ["x"]


def test_a_killed_builder_is_taken_over_by_exactly_one(begin, target, log):
    (dying,) = begin(1, "die")
    dying.communicate(timeout=WAIT)
    assert dying.returncode == -signal.SIGKILL
    assert lock_files(target.parent) == ["x.lock.0"]
    assert answers(begin(3, "build")) == ["False", "False", "True"]
    assert len(log.read_text().splitlines()) == 2  # the one that died, and one more
    assert os.listdir(target.parent) == ["x"]


def test_a_builder_that_is_killed_while_others_wait_is_replaced(begin, target):
    (dying,) = begin(1, "announce")
    assert dying.stdout.readline() == "building\n"
    waiting = threading.Event()

    def build(path):
        atomic.write_text(path, "second")

    with ThreadPoolExecutor() as pool:
        built = pool.submit(lock.once, target, build, on_wait=lambda holder: waiting.set())
        assert waiting.wait(WAIT)
        dying.kill()
        dying.communicate(timeout=WAIT)
        assert built.result(WAIT)
    assert target.read_text() == "second"
