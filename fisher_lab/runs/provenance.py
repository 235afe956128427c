"""Where a result comes from: code, versions, machine. Nothing of the environment is copied."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "fisher-lab",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "scipy",
    "pandas",
    "hydra-core",
    "omegaconf",
    "datasets",
    "wandb",
)
"""Distributions whose versions are recorded, where they are installed."""

_GIT_TIMEOUT_S = 10


def collect() -> dict[str, Any]:
    """Everything that is known before the task starts; imports no numerical library.

    Commit and versions are looked up once a process: what is edited or installed afterwards is not
    what the process runs.

    Returns:
        JSON-able: ``git``, ``versions``, ``host``, ``pid``. The task adds device, threads and
        dtypes, which it alone knows.
    """
    return {**copy.deepcopy(_code()), "host": host(), "pid": os.getpid()}


@functools.cache
def _code() -> dict[str, Any]:
    return {"git": git(), "versions": versions()}


def git(package: Path | None = None) -> dict[str, Any]:
    """Commit and dirtiness of the checkout that the package is imported from.

    An installed package has none, even where it lies inside somebody else's repository.

    Args:
        package: the package's directory; by default fisher_lab's own.

    Returns:
        ``commit`` (None outside a checkout) and ``dirty`` (tracked files differ from it, or None).
    """
    folder = package or Path(__file__).resolve().parents[1]
    tracked = _git(folder, "ls-files", "--error-unmatch", "__init__.py")
    commit = _git(folder, "rev-parse", "HEAD") if tracked is not None else None
    if commit is None:
        return {"commit": None, "dirty": None}
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    try:
        text = subprocess.check_output(
            command, text=True, stderr=subprocess.DEVNULL, timeout=_GIT_TIMEOUT_S
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return text.strip()


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Versions of Python and of some distributions, where they are installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def host() -> dict[str, Any]:
    """Name, operating system, processor and memory of the machine."""
    import psutil

    return {
        "name": platform.node(),
        "system": platform.platform(),
        "machine": platform.machine(),
        "cpu": _processor(),
        "cpus": psutil.cpu_count(logical=True),
        "cpus_allowed": allowed_cpus(),
        "memory_mb": psutil.virtual_memory().total // 2**20,
    }


def machine() -> dict[str, Any]:
    """The machine without its name, as a benchmark's table tells it; memory in GiB."""
    found = host()
    return {
        "processor": found["cpu"],
        "cores": found["cpus"],
        "memory_gib": round(found["memory_mb"] / 2**10, 1),
        "system": platform.system(),
        "python": platform.python_version(),
    }


def python_path() -> str:
    """``PYTHONPATH`` with which another process imports this very package, wherever it is run."""
    root = str(Path(__file__).resolve().parents[2])
    known = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join([root, *(path for path in known if path and path != root)])


def allowed_cpus() -> int | None:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _processor() -> str:
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            for line in Path("/proc/cpuinfo").read_text().splitlines():
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor()
