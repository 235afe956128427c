"""Where the numbers of a run are also sent: sinks behind one small interface.

A sink is never what a run depends on: :func:`make` wraps it so that whatever it raises becomes one
warning, after which the sink is left alone and the run goes on.
"""

from __future__ import annotations

from fisher_lab.config.schema import TrackerConfig

from .base import Guarded, NoTracker, Tracker

_SINKS: dict[str, type[Tracker]] = {"none": NoTracker}
"""Every type that the schema allows, and the class that does it."""

__all__ = ["Guarded", "NoTracker", "Tracker", "make"]


def make(config: TrackerConfig) -> Tracker:
    """The sink that the configuration names, safe to call.

    Args:
        config: the section ``tracker``.

    Returns:
        The sink behind a :class:`Guarded`.
    """
    return Guarded(_SINKS[config.type]())
