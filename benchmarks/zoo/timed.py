"""One architecture in a process of a pool, within a limit of time."""

from __future__ import annotations

import logging
import signal
import time
import warnings
from typing import Any

import torch
import transformers

from benchmarks.zoo.examine import CRASHED, examine
from benchmarks.zoo.mappings import TASKS

SECONDS = 300


class Late(BaseException):
    """An architecture took too long."""


def quiet() -> None:
    """Silences what models say as they are built, in a process with one thread."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)


def timed(task: str, kind: str) -> tuple[str, dict[str, Any]]:
    """The row of an architecture, with its seconds."""

    def late(*_: object) -> None:
        raise Late(f"more than {SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    start = time.monotonic()
    signal.alarm(SECONDS)
    try:
        row: dict[str, Any] = examine(task, kind)
    except Late as error:
        row = {"status": CRASHED, "why": str(error)}
    signal.alarm(0)
    seconds = round(time.monotonic() - start, 1)
    return kind, {"class": TASKS[task].classes[kind], **row, "seconds": seconds}
