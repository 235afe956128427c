"""What frames and their columns are called in signatures here.

They are pandas' DataFrame and Series. pandas annotates nearly every access as a union of frame,
series, array and scalar, which no code can narrow; a checker is therefore told nothing of what is
inside, and everything of what is made from it.
"""

from __future__ import annotations

from typing import Any, TypeAlias

Frame: TypeAlias = Any
"""A ``pandas.DataFrame``; with ``attrs`` as :func:`fisher_lab.results.load` gives them."""

Column: TypeAlias = Any
"""A ``pandas.Series``."""


class Shared(list[Any]):
    """A list for ``attrs`` that is never changed.

    pandas copies ``attrs`` in depth whenever it hands out a column; this is handed on as it is.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared:
        return self


def only(frame: Frame, sweep: str) -> Frame:
    """The runs of one sweep, with the metrics that any of them has.

    Args:
        frame: from :func:`fisher_lab.results.load`.
        sweep: its name.
    """
    runs = frame[frame["sweep"] == sweep]
    sweeps = {d: s for d, s in frame.attrs.get("sweeps", {}).items() if s.name == sweep}
    measured = Shared(m for m in frame.attrs.get("metrics", []) if _measured(runs, m))
    runs.attrs = {**frame.attrs, "sweeps": sweeps, "metrics": measured}
    return runs


def _measured(runs: Frame, metric: str) -> bool:
    lost = " ".join(runs["not_finite"].fillna("")).split()
    return bool(runs[metric].notna().any()) or metric in lost
