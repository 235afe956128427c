"""The console of every screen: as wide as the terminal, or as ``COLUMNS`` says."""

from __future__ import annotations

import os
import sys

from rich.console import Console

PIPE_WIDTH = 120
"""Columns where standard output is no terminal that says its own width."""


def standard_output(pipe_width: int = PIPE_WIDTH) -> Console:
    """A console on standard output, which takes texts as they are.

    Args:
        pipe_width: columns where standard output is no terminal and ``COLUMNS`` is not set.
    """
    known = sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdigit()
    return Console(highlight=False, markup=False, width=None if known else pipe_width)
