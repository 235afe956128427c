"""Where a result comes from: code, versions, machine. Nothing of the environment is copied."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from fisher_lab.runs import atomic

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

PACKAGE = Path(__file__).resolve().parents[1]
"""The directory of this package."""
SNAPSHOT_FILE = "code.json"
"""What :func:`code` said of a copy that :func:`snapshot` has made, beside the package."""

_GIT_TIMEOUT_S = 10
_OF_ANOTHER_REPOSITORY = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")
"""Variables that git sets for its hooks, which are about the repository that these belong to."""


def collect() -> dict[str, Any]:
    """Everything that is known before the task starts; imports no numerical library.

    Commit and versions are looked up once a process: what is edited or installed afterwards is not
    what the process runs.

    Returns:
        JSON-able: ``code``, ``git``, ``versions``, ``host``, ``pid``. The task adds device, threads
        and dtypes, which it alone knows.
    """
    return {**copy.deepcopy(_code()), "host": host(), "pid": os.getpid()}


@functools.cache
def _code() -> dict[str, Any]:
    return {**code(), "versions": versions()}


def code(package: Path | None = None) -> dict[str, Any]:
    """Which code a process runs.

    Args:
        package: the package's directory; by default fisher_lab's own.

    Returns:
        ``git`` as from :func:`git`; ``code``: the commit where the package is as in it, else the
        commit or the installed version with a digest of the package's files. Two processes with
        the same one run the same code.
    """
    folder = package or PACKAGE
    noted = atomic.read_json(folder.parent / SNAPSHOT_FILE)
    if noted:
        return noted
    found = git(folder)
    commit = (found["commit"] or "")[:12]
    if commit and not _git(folder, "status", "--porcelain", "--", "."):
        return {"code": commit, "git": found}
    commit = commit or version("fisher-lab") or ""
    return {"code": f"{commit or 'unknown'}+{_digest(folder)}", "git": found}


def code_of(recorded: Mapping[str, Any]) -> str | None:
    """``code`` of a record's provenance; of earlier records what their commit tells."""
    found = recorded.get("git") or {}
    commit = found.get("commit")
    before = f"{commit[:12]}{'+unknown' if found.get('dirty') else ''}" if commit else None
    return recorded.get("code") or before


def snapshot(folder: Path) -> Path:
    """Copy this package, so that a process which starts later runs the code of now.

    Args:
        folder: of all copies; one of the same code serves again.

    Returns:
        The directory in ``folder`` that holds the copy, for `environment.child`.
    """
    about = {key: value for key, value in _code().items() if key != "versions"}
    target = folder / about["code"]
    if not target.exists():
        with atomic.directory(target, keep_existing=True) as made:
            own = shutil.ignore_patterns("__pycache__")
            shutil.copytree(PACKAGE, made / PACKAGE.name, ignore=own)
            atomic.write_json(made / SNAPSHOT_FILE, about)
    return target


def _digest(package: Path) -> str:
    """A hash of the files of a package, by name and content."""
    total = hashlib.sha256()
    for file in sorted(path for path in package.rglob("*") if path.is_file()):
        if "__pycache__" not in file.parts:
            content = hashlib.sha256(file.read_bytes()).hexdigest()
            total.update(f"{file.relative_to(package).as_posix()} {content}\n".encode())
    return total.hexdigest()[:12]


def git(package: Path | None = None) -> dict[str, Any]:
    """Commit and dirtiness of the checkout that the package is imported from.

    An installed package has none, even where it lies inside somebody else's repository.

    Args:
        package: the package's directory; by default fisher_lab's own.

    Returns:
        ``commit`` (None outside a checkout) and ``dirty`` (tracked files differ from it, or None).
    """
    folder = package or PACKAGE
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
            command, text=True, stderr=subprocess.DEVNULL, timeout=_GIT_TIMEOUT_S,
            env={k: v for k, v in os.environ.items() if k not in _OF_ANOTHER_REPOSITORY},
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return text.strip()


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Versions of Python and of some distributions, where they are installed."""
    found = {"python": platform.python_version()}
    found |= {name: known for name in packages if (known := version(name)) is not None}
    return found


@functools.cache
def version(distribution: str) -> str | None:
    """The version of a distribution; None where it is not installed. Looked up once a process."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(distribution)
    return None


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
