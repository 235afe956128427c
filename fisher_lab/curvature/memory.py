"""Memory of a device: what is free, and what is done when it is full.

A device that is full while it works on one side of one layer is no error: that side moves to host
memory, and the work is done there. ``torch.OutOfMemoryError`` comes from a device's allocator
alone; the host's own raises something else, so that nothing here hides a full host.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import psutil
import torch

from fisher_lab.curvature.errors import CurvatureError
from fisher_lab.curvature.linalg import full_precision

log = logging.getLogger(__name__)

T = TypeVar("T")

HOST = torch.device("cpu")


def on_device(
    work: Callable[[torch.device], T],
    device: torch.device,
    what: str,
    to_host: Callable[[], None] | None = None,
    *,
    collective: bool = False,
) -> T:
    """Does one operation of one side of a layer, in host memory where the device is full.

    Autocast is off: it would turn products of float32 factors into 16-bit ones.

    Args:
        work: does the operation on the device that it is given. It changes nothing when it fails,
            so that it can be done again.
        device: where it is tried first.
        what: layer, side, both dimensions and operation, for the log.
        to_host: moves to host memory what ``work`` finds on the device, and lets go of what was
            derived from it there; None where the work takes its data to the device by itself.
        collective: whether ``work`` takes all ranks: one rank cannot do it again by itself.

    Raises:
        torch.OutOfMemoryError: the device is full even so, or ``work`` is collective.
    """
    try:
        with full_precision():
            return work(device)
    except torch.OutOfMemoryError as error:
        if collective:
            raise
        error.with_traceback(None)  # its frames hold what had been taken so far
    if to_host is not None:
        to_host()
    log.warning("%s: the device is full; moves to host memory", what)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with full_precision():
        return work(HOST)


CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


def check_device(name: str, device: str) -> None:
    """Checks that a device that was asked for (``auto``, ``cpu`` or ``cuda``) is there.

    Raises:
        CurvatureError: ``cuda`` on a machine without; ``name`` is the setting's.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise CurvatureError(f"{name}: 'cuda', but no CUDA device; allowed: auto, cpu")


def free_memory(device: torch.device) -> int:
    """Returns the bytes that are free on a device.

    On the host: what the system has available, or less where a control group (v1 or v2) of a
    container or a job scheduler leaves less.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min([int(psutil.virtual_memory().available), *cgroup_free()])


def cgroup_free(root: Path = CGROUPS, own: Path = OWN_CGROUPS) -> list[int]:
    """Returns the bytes that each of this process's control groups (named in ``own``) allows."""
    found = []
    for group, (most, used, cache) in _groups(root, own):
        limit, now = _read(group / most), _read(group / used)
        if limit.isdigit() and now.isdigit():  # the limit may be "max"
            # The page cache counts as used and is given back on demand.
            lines = _read(group / "memory.stat").splitlines()
            back = (int(line.split()[1]) for line in lines if line.startswith(f"{cache} "))
            found.append(max(int(limit) - int(now) + next(back, 0), 0))
    return found


_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = ("memory.max", "memory.current", "inactive_file")


def _groups(root: Path, own: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """Yields this process's groups and those above them, with the names of their files."""
    for line in _read(own).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top, names = (root / "memory", _V1) if controllers else (root, _V2)
        # A path of the host's that is not visible in here is skipped; the mount itself is not.
        group = top / path.lstrip("/")
        yield from ((one, names) for one in (group, *group.parents) if one.is_relative_to(top))


def _read(path: Path) -> str:
    """A file's text, nothing where there is no file."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
