"""A real worker that dies between a temporary file and its rename, where it is told to.

One worker a time takes the order: a file named ``kill-a-writer`` in the working directory.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from fisher_lab.runs import atomic
from fisher_lab.runs.signals import leave
from fisher_lab.sweeps import worker

ORDER = Path("kill-a-writer")
_flush = atomic._flush


def flush_or_die(path: Path) -> None:
    """What `atomic` calls when the temporary file is written and not yet renamed."""
    _flush(path)
    if path.name.endswith(".tmp") and ORDER.exists():
        try:
            ORDER.rename(f"{ORDER}.{os.getpid()}")
        except FileNotFoundError:
            return  # another worker took it
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    atomic._flush = flush_or_die
    leave(worker.main(sys.argv[1:]))
