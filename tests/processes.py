"""Whether processes have ended."""

from __future__ import annotations

import psutil


def is_gone(pid: int) -> bool:
    """Whether a process has ended (it may be a zombie, or go while one looks)."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
