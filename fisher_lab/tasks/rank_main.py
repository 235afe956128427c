"""What each rank of a launcher runs: ``python -m fisher_lab.tasks.rank_main FILE``."""

from __future__ import annotations

import json
import logging
import logging.config
import os
import sys
import threading
from pathlib import Path

from fisher_lab.distributed import launch
from fisher_lab.runs import screen
from fisher_lab.runs.signals import Interrupted, leave
from fisher_lab.tasks.rank_status import GRACE_S, is_consequence, write_error
from fisher_lab.tasks.ranks import joined, log_of

log = logging.getLogger(__name__)


def main(path: str) -> int:
    """Works as a rank that :func:`.ranks.start` has started; returns the exit code.

    Args:
        path: of the file that says what is to be done.
    """
    launch.end_with_parent()
    launch.end_in_time()
    rank = int(os.environ["RANK"])
    folder = Path(path).parent
    given = json.loads(Path(path).read_text("utf-8"))
    settings = given["logging"]
    screen.install()
    if rank > 0:  # output and log of a rank other than 0, native code's included, go to one file
        log_file = folder / f"rank{rank}.log"
        settings = log_of(settings, log_file)
        log_file.unlink(missing_ok=True)
        with log_file.open("ab") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
    logging.config.dictConfig(settings)
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
        write_error(folder, rank, error)  # where it came before or after the task
        if rank > 0:
            log.exception("rank %d failed", rank)
        if is_consequence(type(error).__name__, str(error)):
            threading.Event().wait(GRACE_S)
        return 1
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1]))
