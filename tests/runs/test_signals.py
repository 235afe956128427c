"""Signals end a run with the right status, at once or when its task has saved its state."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from fisher_lab.runs.signals import STATUS, Interrupted, Watch, interruption
from tests.processes import python, start_python


@pytest.mark.parametrize(("signum", "status"), STATUS.items())
def test_a_signal_is_raised_at_once(signum, status):
    before = signal.getsignal(signum)
    with pytest.raises(Interrupted) as caught, Watch():
        assert signal.getsignal(signum) != before
        os.kill(os.getpid(), signum)
    assert (caught.value.signum, caught.value.status) == (signum, status)
    assert not isinstance(caught.value, Exception)  # no `except Exception` swallows it
    assert signal.getsignal(signum) == before


@pytest.mark.parametrize("opened", [True, False])
def test_a_deferred_signal_waits_for_the_task(opened):
    watch, steps = Watch(), []
    before = signal.getsignal(signal.SIGUSR2)

    def task() -> None:
        with watch.deferred() as pending:
            for step in range(5):
                if step == 2:
                    os.kill(os.getpid(), signal.SIGUSR2)
                steps.append(step)
                if pending():
                    steps.append("saved")
                    pending.stop()

    with pytest.raises(Interrupted) as caught:
        if opened:
            with watch:
                task()
        else:
            task()
    assert steps == [0, 1, 2, "saved"]
    assert caught.value.status == "preempted"
    assert signal.getsignal(signal.SIGUSR2) == before


def test_a_signal_that_the_task_did_not_look_at_is_raised_at_the_end():
    with pytest.raises(Interrupted, match="cancelled by SIGTERM"), Watch() as watch:
        with watch.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("not reached")


def test_the_first_signal_counts():
    watch = Watch()
    with pytest.raises(Interrupted, match="preempted by SIGUSR2"), watch, watch.deferred():
        os.kill(os.getpid(), signal.SIGUSR2)
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_block_within_a_block_leaves_it_to_the_outer_one():
    watch, order = Watch(), []
    with pytest.raises(Interrupted), watch, watch.deferred():
        with watch.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
        order.append("still here")
    assert order == ["still here"]


def test_outside_the_main_thread_nothing_is_installed():
    before, inside = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with Watch():
            inside.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(timeout=10)
    assert inside == [before]


SCRIPT = """
import sys, time, types
from fisher_lab import cli
from fisher_lab.tasks import runner
module = types.ModuleType("waiting")
def run(config, run):
    print("ready", flush=True)
    while True:  # a signal just before one long wait would be seen only at its end
        time.sleep(0.05)
module.run = run
sys.modules["waiting"] = module
runner.TASKS["plan"] = "waiting"
runner.prepare = lambda config: {}  # without torch, which is not what is tested
sys.exit(cli.main(["task=plan", "hydra.run.dir=here", *sys.argv[1:]]))
"""


@pytest.mark.parametrize(
    ("signum", "status"),
    [
        (signal.SIGTERM, "cancelled"),
        (signal.SIGUSR2, "preempted"),
        (signal.SIGINT, "cancelled"),
        (signal.SIGKILL, "running"),
    ],
)
def test_a_run_that_is_signalled(tmp_path: Path, signum, status):
    pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    process = start_python("-c", SCRIPT, **pipes)
    watchdog = threading.Timer(60, process.kill)
    watchdog.start()
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signum)
        _, err = process.communicate(timeout=60)
    finally:
        watchdog.cancel()
        process.kill()
    record = json.loads((tmp_path / "here" / "run.json").read_text())
    assert record["status"] == status
    if signum == signal.SIGKILL:
        assert process.returncode == -signum
        assert record["finished"] is None
    else:
        assert process.returncode == 128 + signum
        assert record["reason"] == signum.name
        assert "Traceback" not in err
        assert len(err.splitlines()) == 1


def test_a_second_signal_does_not_break_into_the_ending():
    """Schedulers send SIGUSR2 and SIGTERM, and some of them more than once."""
    ended = []
    with pytest.raises(Interrupted) as caught, Watch():
        try:
            os.kill(os.getpid(), signal.SIGUSR2)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGUSR2)
            ended.append("saved")
    assert caught.value.status == "preempted"
    assert ended == ["saved"]


SWALLOWED = """
import os, signal, sys, threading, weakref
from fisher_lab.runs.signals import Interrupted, Watch

class Thing:
    def __del__(self):
        if sys.argv[1] == "del":
            signal_now()

def signal_now(*_):
    os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(100):
        pass

def swallow():
    try:
        signal_now()
    except BaseException:
        pass

until = threading.Event()
try:
    with Watch() as outer, Watch():
        thing = Thing()
        reference = weakref.ref(thing, signal_now) if sys.argv[1] == "weakref" else None
        del thing
        if sys.argv[1] == "except":
            swallow()
        for _ in range(3000):
            until.wait(0.01)
        print("lost")
except Interrupted as stop:
    print(stop.signum.name, signal.Signals(outer.received).name)
del until
threading.Event().wait(0.2)
print("once")
"""


@pytest.mark.parametrize("where", ["del", "weakref", "except", "plain"])
def test_a_signal_that_something_has_swallowed_is_raised_again_until_it_is_seen(where):
    """Python prints what is raised in a finaliser, and goes on."""
    script = SWALLOWED if where != "plain" else SWALLOWED.replace('print("lost")', "signal_now()")
    script = script.replace("range(3000)", "range(0)") if where == "plain" else script
    done = python("-c", script, where, text="")
    assert (done.returncode, done.stdout.split()) == (0, ["SIGTERM", "SIGTERM", "once"]), (
        done.stderr
    )


def test_an_error_that_came_of_a_signal_is_an_interruption():
    stop, other = Interrupted(signal.SIGUSR2), ValueError("a library's")
    other.__context__ = stop
    assert interruption(stop) is interruption(other) is stop
    assert interruption(ValueError("its own")) is None
    assert interruption(None) is None


def test_contexts_around_learn_of_a_signal_that_came_while_a_run_was_being_ended():
    with Watch() as outer, Watch() as inner:
        inner.ending()
        os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Interrupted, match="cancelled by SIGTERM"):
        outer.check()
    Watch().check()
