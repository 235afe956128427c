"""A real SLURM of one node, where there is one to be had."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ports import free_ports
from tests.sweeps.conftest import door, runs, seen, trivial_workers

__all__ = ["cluster", "door", "runs", "seen", "trivial_workers"]

SCRIPT = Path(__file__).with_name("cluster.sh")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")


def why_not() -> str | None:
    """What keeps SLURM from being brought up here."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "bringing up SLURM takes root on Linux"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"SLURM is not installed here ({', '.join(missing)}); .ci/run does so on Debian"
    return None


@pytest.fixture(scope="session")
def _node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    # Sockets have short names.
    directory = tmp_path_factory.mktemp("slurm")
    # Workers may share the tests out: each has a node of its own, on ports of its own.
    ports = {"SLURM_PORT": str(free_ports(2))}
    try:
        done = subprocess.run(
            [str(SCRIPT), "up", str(directory)],
            capture_output=True, text=True, timeout=180, env={**os.environ, **ports},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        yield done.stdout.strip().splitlines()[-1]
    finally:
        subprocess.run([str(SCRIPT), "down", str(directory)], timeout=120, check=False)


@pytest.fixture
def cluster(_node: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``sbatch`` and its like reach the node; whatever a test leaves in the queue is cancelled."""
    monkeypatch.setenv("SLURM_CONF", _node)
    yield
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    subprocess.run(["scancel", "-u", user], timeout=60, check=False)
