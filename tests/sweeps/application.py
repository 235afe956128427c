"""The application in a process of its own, and what tests ask of the sweep that it leaves."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO

from fisher_lab.sweeps.directory import Layout

TRIVIAL_WORKER = Path(__file__).with_name("trivial_worker.py")
WAITING_WORKER = Path(__file__).with_name("waiting_worker.py")


def launch(
    *arguments: str,
    worker: Path | None = None,
    identity: dict[str, str] | None = None,
    output: int | IO[str] = subprocess.PIPE,
) -> subprocess.Popen[str]:
    """Start ``fisher-lab ARGUMENTS``.

    Args:
        arguments: of the command line.
        worker: script that the launcher, also a detached one, runs for a cell; None: the real one.
        identity: hashes of text and model that cells are planned with; None: the real ones.
        output: where standard output and error go.
    """
    chosen = ""
    if worker is not None:
        chosen = (
            "from fisher_lab.sweeps import run, worker_process; "
            f"worker_process.WORKER = ({str(worker)!r},); "
        )
        background = f"{chosen}run.main(sys.argv[1:])"
        chosen += f"run.BACKGROUND = ('-c', {'import sys; ' + background!r}); "
    if identity is not None:
        chosen += "from fisher_lab.tasks import preflight; "
        chosen += f"preflight.preflight = lambda config: {identity!r}; "
    script = f"import sys; from fisher_lab import cli; {chosen}sys.exit(cli.main(sys.argv[1:]))"
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )


def launch_trivial(*arguments: str) -> subprocess.Popen[str]:
    """Start it with the worker whose task costs nothing."""
    return launch(*arguments, worker=TRIVIAL_WORKER, identity={"data": "abc"})


def wait_for(condition: Callable[[], object], seconds: float = 90.0) -> None:
    """Wait until a condition is true, but not for ever."""
    pause = threading.Event()
    for _ in range(int(seconds / 0.05)):
        if condition():
            return
        pause.wait(0.05)
    raise AssertionError(f"it did not come true within {seconds:g} s")


def the_sweep() -> Layout:
    """The only sweep under the working directory."""
    (file,) = Path.cwd().glob("results/*/sweep.json")
    return Layout(file.parent)


def count(sweep: Layout, event: str) -> int:
    """How often something has happened, by the journal."""
    return sum(entry["event"] == event for entry in sweep.journal.read())


TEXT = "The quick brown fox jumps over the lazy dog. " * 400
TRAINING = [
    *("task=train", "model=mlp", "model.width=8", "model.layers=1", "data=text_file"),
    *("data.path=text.txt", "data.vocab_size=293", "data.seq_len=8", "train.seq_len=8"),
    *("train.batch_size=2", "train.save_every_s=0.1", "train.eval_every=1000000"),
    *("deterministic=true", "threads=1", "train.steps=400"),
]
"""A training of seconds on ``text.txt``, which saves its state all the time."""


def curve(directory: Path) -> list[dict[str, str]]:
    """The learning curve of a run without its times."""
    with (directory / "curve.csv").open() as file:
        return [
            {name: value for name, value in row.items() if "seconds" not in name}
            for row in csv.DictReader(file)
        ]
