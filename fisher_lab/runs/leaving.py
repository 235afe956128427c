"""The end of a process that was started for one piece of work."""

from __future__ import annotations

import atexit
import logging
import os
import sys
from typing import NoReturn


def leave(code: int) -> NoReturn:
    """End the process at once, without the interpreter's teardown; everything is written by now.

    Taking a model and its libraries apart takes seconds. It can also abort the process ("terminate
    called without an active exception"): a thread of a process group may still be winding up while
    C++ takes its statics down, and a completed run would be a failed one.
    """
    atexit._run_exitfuncs()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
