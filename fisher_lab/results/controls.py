"""Controls of claims about times: a cell against itself, under the design of the claim.

A sweep that compares times (``alone: true``) with a claim of the type ``faster`` also runs the
cells ``a`` of the claim once more, in ``controls/``. Where the cell is called different from
itself, the design does not show what it is to show, and the verdict says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from fisher_lab.results import stats
from fisher_lab.results.loading import controls_of, load
from fisher_lab.results.values import Shared, filter_runs, select
from fisher_lab.runs.status import Status

LEVEL_OF_ALPHA = 0.5
"""The level of a control as a part of the claim's: it is to be wrong less often than the claim, of
which it is a check."""


def is_different(found: stats.Paired, alpha: float) -> bool:
    """Whether a cell is called different from itself, in either direction.

    Args:
        found: the ratio of the pairs (:func:`stats.paired_ratio`).
        alpha: of the claim.
    """
    if found.exact:
        return not found.identical
    return found.p < LEVEL_OF_ALPHA * alpha


def loaded(sweep: Path) -> Shared:
    """The controls of a sweep as a frame in a list, which is empty where there are none."""
    found = [one.directory for one in controls_of([sweep])]
    return Shared([load(found)] if found else [])


def in_words(
    metric: str, a: Mapping[str, Any], alpha: float, runs: pd.DataFrame, controls: pd.DataFrame
) -> str:
    """What the control of a claim says.

    Args:
        metric: of the claim, a time.
        a: the settings of the cells that were run once more.
        alpha: of the claim.
        runs: that the claim is about.
        controls: all controls of the sweep.
    """
    pairs = [_by_run(select(filter_runs(frame, frame["status"] == Status.COMPLETED), a), metric)
             for frame in (controls, runs)]  # fmt: skip
    names = [name for name in pairs[0] if name in pairs[1]]
    again, first = ([one[name] for name in names] for one in pairs)
    if not names or min(*again, *first) <= 0:
        return "there is no control"
    found = stats.paired_ratio(again, first)
    if found.n == 1:
        return f"the control is {found.mean:.4g} times itself, in one pair"
    level = 1 - LEVEL_OF_ALPHA * alpha
    found = stats.paired_ratio(again, first, level)
    ends = f"{100 * level:g}% interval [{found.low:.4g}, {found.high:.4g}]"
    says = f"{found.mean:.4g} times itself, {ends}"
    if is_different(found, alpha):
        return f"THE CONTROL IS CALLED DIFFERENT ({says}): these times cannot be compared"
    return f"the control is not called different ({says})"


def _by_run(runs: pd.DataFrame, metric: str) -> dict[str, float]:
    if metric not in runs:
        return {}
    numbers = zip(runs["run_id"], runs[metric], strict=True)
    return {name: float(value) for name, value in numbers if math.isfinite(value)}
