"""How much memory is free: on a device, on the host, and within this process's control groups."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from ..errors import CurvatureError

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


def check_device(name: str, device: str) -> None:
    """Checks that a device that was asked for is there.

    Args:
        name: of the setting.
        device: ``auto``, ``cpu`` or ``cuda``.

    Raises:
        CurvatureError: ``cuda`` on a machine without.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise CurvatureError(f"{name}: 'cuda', but no CUDA device; allowed: auto, cpu")


def free_memory(device: torch.device) -> int:
    """Returns the bytes that are free on a device.

    On the host: what the system has available, or less where a control group (v1 or v2) of a
    container or a job scheduler leaves less.

    Args:
        device: any.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min([int(psutil.virtual_memory().available), *cgroup_free()])


def cgroup_free(root: Path = CGROUPS, own: Path = OWN_CGROUPS) -> list[int]:
    """Returns the bytes that each of this process's control groups still allows.

    Args:
        root: where the control groups are mounted.
        own: names the groups of this process.
    """
    found = []
    for group, names in _groups(root, own):
        limit, used = (_number(group / name) for name in names[:2])
        if limit is not None and used is not None:
            # The page cache counts as used and is given back on demand.
            found.append(max(limit - used + _stat(group / "memory.stat", names[2]), 0))
    return found


_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = ("memory.max", "memory.current", "inactive_file")


def _groups(root: Path, own: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """Yields this process's groups and those above them, with the names of their files."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top, names = (root / "memory", _V1) if controllers else (root, _V2)
        # A path of the host's that is not visible in here is skipped; the mount itself is not.
        group = top / path.lstrip("/")
        yield from ((one, names) for one in (group, *group.parents) if one.is_relative_to(top))


def _number(path: Path) -> int | None:
    """A file's number, or None where there is no file or no limit (``max``)."""
    try:
        text = path.read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _stat(path: Path, key: str) -> int:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{key} ")), 0)


__all__ = ["cgroup_free", "check_device", "free_memory"]
