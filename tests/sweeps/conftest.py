"""The door of tests/cli, and a worker whose task costs nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from fisher_lab.sweeping import supervisor
from tests.cli.conftest import door, runs, seen

__all__ = ["door", "runs", "seen", "small_workers"]

SMALL_WORKER = Path(__file__).with_name("small_worker.py")


@pytest.fixture
def small_workers(seen, monkeypatch: pytest.MonkeyPatch) -> None:
    """Worker processes run `small_worker`; the launcher plans with the same identities."""
    monkeypatch.setattr(supervisor, "WORKER", (str(SMALL_WORKER),))
