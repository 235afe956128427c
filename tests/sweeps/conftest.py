"""The door of tests/cli, and a worker whose task costs nothing."""

from __future__ import annotations

import pytest

from fisher_lab.sweeps import worker_process
from tests.cli.conftest import door, runs, seen
from tests.sweeps.application import TRIVIAL_WORKER

__all__ = ["door", "runs", "seen", "trivial_workers"]


@pytest.fixture
def trivial_workers(seen, monkeypatch: pytest.MonkeyPatch) -> None:
    """Worker processes run `trivial_worker`; the launcher plans with the same identities."""
    monkeypatch.setattr(worker_process, "WORKER", (str(TRIVIAL_WORKER),))
