"""A screen that is gone, full, or knows few characters, ends nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.processes import python, start_python

PRINTS = r"""
import logging, sys
from fisher_lab.runs import screen
screen.install()
logging.basicConfig(stream=sys.stdout)
for number in range(2000):
    print("caf\u00e9 \u2500 \U0001f600 \ud800", number)
    print("error \u00e9", file=sys.stderr)
logging.getLogger().error("logged \u00e9")
sys.stdout.flush()
problem = screen.problem()
open("after", "w").write(str(problem))
"""


def after(**more: Any) -> tuple[int, str]:
    with start_python("-c", PRINTS, **more) as process:
        if process.stdout is not None:
            process.stdout.readline()
            process.stdout.close()
        code = process.wait(timeout=60)
    return code, Path("after").read_text()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_characters_that_the_screen_lacks_are_replaced(encoding):
    chosen = {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    done = python("-c", PRINTS, text="", environment=chosen, encoding=encoding)
    assert done.returncode == 0, done.stderr
    first = done.stdout.splitlines()[0]
    assert first.startswith("caf? ?" if encoding == "ascii" else "café")
    assert Path("after").read_text() == "None"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_device_is_said_once_everything_is_done():
    with open("/dev/full", "w") as full:
        assert after(stdout=full, stderr=full) == (
            0, "standard output cannot be written: No space left on device"
        )  # fmt: skip


def test_a_reader_that_has_gone_is_no_problem():
    assert after(stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) == (0, "None")


def test_streams_that_were_closed_before_the_process_began():
    script = f"import os; os.close(1); os.close(2); os.execv({sys.executable!r}, " \
             f"[{sys.executable!r}, '-c', {PRINTS!r}])"  # fmt: skip
    done = python("-c", script, text="")
    assert done.returncode == 0
    assert Path("after").read_text() == "None"
