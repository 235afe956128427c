"""The application in a process of its own, its workers real ones or a test's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import IO

SMALL_WORKER = Path(__file__).with_name("small_worker.py")
HOLDING_WORKER = Path(__file__).with_name("holding_worker.py")


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
            "from fisher_lab.sweeps import session, supervisor; "
            f"supervisor.WORKER = ({str(worker)!r},); "
        )
        background = f"{chosen}from fisher_lab.sweeps.background import main; main(sys.argv[1:])"
        chosen += f"session.BACKGROUND = ('-c', {'import sys; ' + background!r}); "
    if identity is not None:
        chosen += f"cli.preflight = lambda config: {identity!r}; "
    script = f"import sys; from fisher_lab import cli; {chosen}sys.exit(cli.main(sys.argv[1:]))"
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )


def launch_small(*arguments: str) -> subprocess.Popen[str]:
    """Start it with the worker whose task costs nothing."""
    return launch(*arguments, worker=SMALL_WORKER, identity={"data": "abc"})
