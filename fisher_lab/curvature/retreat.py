"""Out of device memory, and only then: one side of one layer goes on on the host.

``torch.OutOfMemoryError`` comes from a device's allocator alone; the host's own raises something
else, so that nothing here hides a full host.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from .linalg import full_precision

log = logging.getLogger(__name__)

T = TypeVar("T")

HOST = torch.device("cpu")


def on_host_if_full(work: Callable[[], T], retreat: Callable[[], bool], what: str) -> T:
    """Runs ``work``, without autocast; where the device is full, makes room and runs it again.

    Args:
        work: changes nothing when it fails, so that it can be run again.
        retreat: moves to the host what ``work`` needs and lets go of what it had taken on the
            device; False where that was done before, and the error stands.
        what: layer, side, both dimensions and step, for the log.

    Raises:
        torch.OutOfMemoryError: the device is full again after the retreat.
    """
    try:
        with full_precision():
            return work()
    except torch.OutOfMemoryError as error:
        # Its frames hold what had been taken so far.
        full = error.with_traceback(None)
    if not retreat():
        raise full
    log.warning("%s: out of device memory; goes on on the host", what)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with full_precision():
        return work()
