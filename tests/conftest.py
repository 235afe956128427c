"""What every test gets: one thread, no network, a directory and a cache of its own.

The cache is shared by the tests of one session (and its workers), so that a checkpoint is trained
once; it is never the user's.
"""

import logging
import os
import socket
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Before anything imports torch, and for every process that a test starts.
os.environ.update(
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    WANDB_MODE="offline",
    COLUMNS="80",
)
for name in ("FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE"):
    os.environ.pop(name, None)

# The same examples every time, and none that fails for the machine being slow.
settings.register_profile(
    "fisher_lab",
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("fisher_lab")

TURNS = ("longest", "slow")
"""Markers of the tests that are begun first."""

LOOPBACK = ("127.0.0.1", "::1", "localhost", "0.0.0.0", "::", "")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long tests come first; those marked ``gpu`` run where there is a CUDA device."""
    items.sort(key=_turn)  # stable: the others keep their order
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))


def _turn(item: pytest.Item) -> int:
    """None of the long tests is to be begun when the other workers are done."""
    return next((i for i, name in enumerate(TURNS) if item.get_closest_marker(name)), len(TURNS))


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FISHER_LAB_CACHE", str(shared / "cache"))
        yield


@pytest.fixture(scope="session", autouse=True)
def _metrics_have_words() -> Iterator[None]:
    """What the package itself records, in whatever test, has an entry in the catalogue of names."""
    from fisher_lab.results import labels
    from fisher_lab.runs.record import Run

    record = Run.metrics

    def checked(self: Run, values: Mapping[str, object]) -> None:
        caller = str(sys._getframe(1).f_globals.get("__name__"))
        if caller.startswith("fisher_lab."):
            unknown = [name for name in values if labels.catalogue().find(name) is None]
            assert not unknown, f"{', '.join(unknown)} has no entry in results/labels.yaml"
        record(self, values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "metrics", checked)
        yield


@pytest.fixture(autouse=True)
def _own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loopback and local sockets only; anything else fails at once and says so."""
    connect, connect_ex = socket.socket.connect, socket.socket.connect_ex

    def guard(self: socket.socket, address: object) -> None:
        local = self.family == getattr(socket, "AF_UNIX", None)
        host = address[0] if isinstance(address, tuple) else address
        if not local and host not in LOOPBACK:
            raise RuntimeError(f"a test tried to reach {host}: tests have no network")

    def guarded_connect(self: socket.socket, address: object) -> None:
        guard(self, address)
        return connect(self, address)  # type: ignore[arg-type]

    def guarded_connect_ex(self: socket.socket, address: object) -> int:
        guard(self, address)
        return connect_ex(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", guarded_connect)
    monkeypatch.setattr(socket.socket, "connect_ex", guarded_connect_ex)


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """Hydra configures logging anew for every run; what it set up does not outlive the test."""
    root = logging.getLogger()
    handlers, level, show = list(root.handlers), root.level, warnings.showwarning
    yield
    logging.captureWarnings(False)
    for handler in set(root.handlers) - set(handlers):
        root.removeHandler(handler)
        handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)
    warnings.showwarning = show
