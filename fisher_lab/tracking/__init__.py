"""Where the numbers of a run are also sent: sinks behind one small interface.

A sink is never what a run depends on. Each works in a process of its own (:mod:`.remote`), and
:func:`make` wraps them so that whatever goes wrong becomes one warning, after which that sink is
left alone and the run goes on. The files in the run directory are the source of truth.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from fisher_lab.config.errors import ConfigError
from fisher_lab.config.schema import TrackerConfig
from fisher_lab.tracking.base import Guarded, NoTracker, Start, Tracker
from fisher_lab.tracking.remote import RemoteTracker, Stopped
from fisher_lab.tracking.wandb import disabled

_SINKS: dict[str, Callable[[str, TrackerConfig, float], Tracker]] = {
    "wandb": RemoteTracker,
    "tensorboard": RemoteTracker,
}
"""Every sink that the schema allows, and what makes it."""

__all__ = [
    "Guarded",
    "NoTracker",
    "RemoteTracker",
    "Start",
    "Stopped",
    "Tracker",
    "active",
    "check",
    "current",
    "disabled",
    "make",
]


def make(config: TrackerConfig) -> Tracker:
    """The sinks that the configuration names, safe to call.

    Args:
        config: the section ``tracker``.
    """
    without = {"wandb"} if disabled(config, os.environ) else set()
    names = [name for name in config.sinks if name not in without]
    share = config.budget_s / max(len(names), 1)
    return Guarded(*(_SINKS[name](name, config, share) for name in names))


def check(config: TrackerConfig) -> None:
    """Refuse a sink whose optional package is missing, before anything is started.

    Raises:
        ConfigError: one is missing; the line says how to get it.
    """
    if "tensorboard" in config.sinks:
        from fisher_lab.tracking.tensorboard import MISSING, installed

        if not installed():
            raise ConfigError(MISSING)


_ACTIVE: ContextVar[Tracker] = ContextVar("fisher_lab_tracker")


@contextmanager
def current(tracker: Tracker) -> Iterator[None]:
    """Make a tracker the one that :func:`active` gives, for a task."""
    token = _ACTIVE.set(tracker)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def active() -> Tracker:
    """The tracker of the run that is going on; one that does nothing outside a run."""
    return _ACTIVE.get(None) or NoTracker()
