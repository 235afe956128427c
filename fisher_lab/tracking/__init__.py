"""Copies of a run's numbers for W&B and TensorBoard: sinks behind one small interface.

A run never depends on a sink. Each works in a process of its own (:mod:`.process`), and whatever
goes wrong becomes one warning, after which that sink is dropped and the run goes on. The files in
the run directory are the source of truth.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec

from fisher_lab.config.errors import ConfigError
from fisher_lab.config.schema import TrackerConfig
from fisher_lab.tracking.base import Guarded, Tracker
from fisher_lab.tracking.process import SinkProcess
from fisher_lab.tracking.wandb import disabled

_ACTIVE: ContextVar[Tracker] = ContextVar("fisher_lab_tracker", default=Tracker())  # noqa: B039


def make(config: TrackerConfig) -> Tracker:
    """Make the tracker of a run: all sinks that the configuration names.

    Args:
        config: the section ``tracker``.
    """
    without = {"wandb"} if disabled(config, os.environ) else set()
    names = [name for name in config.sinks if name not in without]
    budget_s = config.budget_s / max(len(names), 1)
    return Guarded(*(SinkProcess(name, config, budget_s) for name in names))


def check(config: TrackerConfig) -> None:
    """Refuse a sink whose optional package is missing, before anything is started.

    Raises:
        ConfigError: a package is missing; the message says how to install it.
    """
    if "tensorboard" in config.sinks and find_spec("tensorboard") is None:
        needed = "the package tensorboard: pip install 'fisher-lab[tensorboard]'"
        raise ConfigError(f"tracker=tensorboard needs {needed}")


@contextmanager
def current(tracker: Tracker) -> Iterator[None]:
    """Make a tracker the one that :func:`active` returns, while a task runs."""
    token = _ACTIVE.set(tracker)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def active() -> Tracker:
    """The tracker of the current run; outside a run, one that sends nothing."""
    return _ACTIVE.get()
