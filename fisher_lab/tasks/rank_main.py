"""What each rank of a launcher runs: ``python -m fisher_lab.tasks.rank_main FILE``."""

from __future__ import annotations

import json
import logging
import logging.config
import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fisher_lab.distributed import launch
from fisher_lab.runs.signals import Interrupted, leave
from fisher_lab.tasks.rank_status import (
    GRACE_S,
    has_written_error,
    is_consequence,
    write_error,
)
from fisher_lab.tasks.ranks import joined, log_of

log = logging.getLogger(__name__)


def main(path: str) -> int:
    """Works as a rank that :func:`.ranks.start` has started.

    Args:
        path: of the file that says what is to be done.

    Returns:
        The exit code.
    """
    launch.end_with_parent()
    launch.end_in_time()
    rank = int(os.environ["RANK"])
    folder = Path(path).parent
    given = json.loads(Path(path).read_text("utf-8"))
    if rank > 0:
        _redirect(folder / f"rank{rank}.log")
    logging.config.dictConfig(log_config(given["logging"], folder, rank))
    # Only now: what the imports print is in the rank's log, and they end with the parent.
    from fisher_lab.tasks.run_spec import RunSpec
    from fisher_lab.tasks.runner import perform

    try:
        spec = RunSpec.of(given)
        with joined(spec.config) as communicator:
            outcome = perform(spec, communicator)
            if outcome.error is not None:
                raise outcome.error
    except Interrupted as stop:
        return 128 + stop.signum
    except Exception as error:
        if not has_written_error(folder, rank):  # it came before or after the task
            write_error(folder, rank, error)
        if rank > 0:
            log.exception("rank %d failed", rank)
        if is_consequence(type(error).__name__, str(error)):
            threading.Event().wait(GRACE_S)
        return 1
    return 0


def _redirect(path: Path) -> None:
    """Standard output and error of ranks other than 0, native code's included, go to their log."""
    stream = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for target in (1, 2):
        os.dup2(stream, target)
    os.close(stream)


def log_config(given: Mapping[str, Any], folder: Path, rank: int) -> dict[str, Any]:
    """Returns the logging configuration of a rank: rank 0 as given, the others one file each."""
    return dict(given) if rank == 0 else log_of(given, folder / f"rank{rank}.log")


if __name__ == "__main__":
    leave(main(sys.argv[1]))
