"""What a metric's name says: which way is better, whether it is a time, whether it matters."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from .errors import ResultsError
from .frames import Frame

LESS = ("_s", "seconds", "_mb", "_bytes", "bytes", "error", "fallbacks", "jitter_events", "_max")
MORE = ("decrease", "decrease_best", "cosine", "per_s", "speedup", "efficiency")
LOSSES = ("loss", "heldout_loss", "heldout", "heldout_best")
TIMES = ("_s", "seconds")

FIRST = (
    "ng/heldout_loss_decrease", "ng/heldout_loss_decrease_best", "ng/cosine",
    "kfac/clipped_frac_A", "kfac/clipped_frac_G", "kfac/total_s", "kfac/peak_mb",
    "kfac/factor_bytes", "loss/heldout", "loss/heldout_best", "train/seconds",
    "spectral/seconds", "lanczos/seconds", "loss",
)  # fmt: skip
"""Metrics of a table where none are named: those of these that the runs have."""

MOST = 6
"""Metrics of a table where none are named, at most."""

ENGINES = (
    "spectral/largest_eigenvalue", "spectral/effective_rank", "lanczos/eigenvalue_0",
    "lanczos/effective_dimension", "group_fisher/trace",
)  # fmt: skip
"""Beside those, what each further engine that ran is about."""


def is_time(name: str) -> bool:
    """Whether a metric is a time: skewed by whatever else the machine did, so median and IQR."""
    return name.endswith(TIMES) and not name.endswith("per_s")


def better(name: str) -> str | None:
    """``min``, ``max``, or None where nothing says which is better.

    Neither is of a clipped share: it is 0 by construction where there is no floor.
    """
    last = name.rpartition("/")[2]
    if last.endswith(MORE):
        return "max"
    if last.endswith(LESS) or last in LOSSES or name.endswith("/heldout"):
        return "min"
    return None


def known(frame: Frame) -> list[str]:
    """The metrics of a frame, with or without a finite number."""
    return [m for m in frame.attrs.get("metrics", []) if m in frame]


def choose(frame: Frame, wanted: Sequence[str] | None, first: Iterable[str] = ()) -> list[str]:
    """The metrics of a table.

    Args:
        frame: of runs.
        wanted: names, or None for a choice that suits the runs.
        first: metrics that come before others where none are named (those of the claims).

    Raises:
        ResultsError: a metric that no run has.
    """
    there = known(frame)
    if wanted:
        for name in wanted:
            if name not in there:
                raise ResultsError(_unknown(name, there))
        return list(dict.fromkeys(wanted))
    usual = [*(n for n in first if n in there), *(n for n in FIRST if n in there)]
    usual = list(dict.fromkeys(usual))[: max(MOST, len(set(first)))]
    return usual + [n for n in ENGINES if n in there and n not in usual] or there[:MOST]


def _unknown(name: str, there: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, there, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    some = ", ".join(there[:8]) + (", ..." if len(there) > 8 else "")
    return f"{name}: no run has this metric{hint} (there are {some or 'none'})"
