"""The other side of :mod:`.remote`: ``python -m fisher_lab.tracking.worker KIND``.

Reads one call a line on standard input and hands it to the sink. Standard output carries answers,
a line of JSON each: ``{"said": ..., "warning": ...}``, ``{"failed": ...}``, ``{"finished": true}``.
Where the input ends without ``finish``, the run was killed: the sink is finished as ``killed``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from fisher_lab.config.schema import TrackerConfig
from fisher_lab.tracking.base import Start, Tracker

SINKS = {
    "wandb": "fisher_lab.tracking.wandb",
    "tensorboard": "fisher_lab.tracking.tensorboard",
}
"""Sink -> the module whose ``make(config, say)`` makes it; only then its library is imported."""

IGNORED = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP")
"""Meant for the run, but a scheduler sends them to every process. This one ends with its input."""


class Mouth:
    """Tells the run something, where it still listens."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def tell(self, **content: Any) -> None:
        """Write one line."""
        try:
            self._stream.write(json.dumps(content) + "\n")
            self._stream.flush()
        except OSError:
            pass

    def say(self, text: str, *, warning: bool = False) -> None:
        """Something for the run's log; see :class:`~fisher_lab.tracking.base.Say`."""
        self.tell(said=text, warning=warning)


def main(kind: str) -> int:
    """Serve one run.

    Args:
        kind: a key of :data:`SINKS`.

    Returns:
        The exit code: 0 unless the sink failed.
    """
    for name in IGNORED:
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    # The library's own words must not get between the answers.
    mouth = Mouth(os.fdopen(os.dup(1), "w", encoding="utf-8"))
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    try:
        serve(kind, sys.stdin, mouth)
    except BaseException as error:  # a library may call exit
        lines = str(error).strip().splitlines()
        mouth.tell(failed=f"{type(error).__name__}: {lines[0] if lines else '(no message)'}")
        # Whatever threads and exit hooks it has left behind must not keep this process.
        os._exit(1)
    mouth.tell(finished=True)
    os._exit(0)


def serve(kind: str, lines: IO[str], mouth: Mouth) -> None:
    """Hand calls on until the input ends.

    Args:
        kind: a key of :data:`SINKS`.
        lines: a call a line.
        mouth: for what the sink has to say.
    """
    sink: Tracker | None = None
    grace, status = 60.0, "killed"
    for line in lines:
        call = json.loads(line)
        name = call.pop("call")
        if name == "start":
            config = TrackerConfig(**call["config"])
            grace = config.grace_s
            made: Tracker = import_module(SINKS[kind]).make(config, mouth.say)
            made.start(start_of(call["start"]))
            sink = made
        elif name == "finish":
            status = call["status"]
            break
        elif sink is not None:
            if "path" in call:
                call["path"] = Path(call["path"])
            getattr(sink, name)(**call)
    if sink is not None:
        _end_after(grace)
        sink.finish(status)


def start_of(content: dict[str, Any]) -> Start:
    """A :class:`Start` from its JSON."""
    return Start(**{**content, "directory": Path(content["directory"])})


def _end_after(seconds: float) -> None:
    """Ends this process after a time, whatever it waits for by then."""
    timer = threading.Timer(seconds, os._exit, (1,))
    timer.daemon = True
    timer.start()


if __name__ == "__main__":
    main(sys.argv[1])
