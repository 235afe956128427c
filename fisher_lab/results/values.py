"""Values of settings and metrics: how they are compared, ordered, rounded and chosen.

A setting comes from a run's configuration (typed), from a sweep file (where YAML reads ``1e-5`` as
a string) or from a command line (always a string). :func:`same` compares values by their meaning.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any, cast

import numpy as np

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import ArrayLike

WORDS = {"null": None, "~": None, "true": True, "false": False}
"""As YAML and Hydra read them; ``none`` is a text, and a choice of some settings."""


def meaning(value: Any) -> Any:
    """The value that a text stands for: numbers, ``null``, ``true`` and ``false`` as such.

    Args:
        value: of a setting; anything that is JSON-able.

    Returns:
        A hashable value: None, bool, float, or text.
    """
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int | float):
        return None if value != value else float(value)
    if not isinstance(value, str):
        return json.dumps(value, sort_keys=True)
    text = value.strip()
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    try:
        return float(text)
    except ValueError:
        return text


def same(left: Any, right: Any) -> bool:
    """Whether two values of a setting mean the same."""
    a, b = meaning(left), meaning(right)
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-12, abs_tol=0.0)
    return type(a) is type(b) and a == b


def order(value: Any) -> tuple[int, float, str]:
    """A key to sort by: numbers by size, then texts, then null."""
    known = meaning(value)
    if known is None:
        return (3, 0.0, "")
    if isinstance(known, bool):
        return (2, float(known), "")
    if isinstance(known, float):
        return (0, known, "")
    return (1, 0.0, str(known))


def levels(values: Iterable[Any]) -> list[Any]:
    """The distinct values, in order; the first spelling of each is kept."""
    found: dict[Any, Any] = {}
    for value in values:
        found.setdefault(meaning(value), value)
    return sorted(found.values(), key=order)


def label(value: Any) -> str:
    """A setting's value as it stands in a table: ``1e-5``, ``null``, ``auto``."""
    known = meaning(value)
    if known is None:
        return "null"
    if isinstance(known, bool):
        return "true" if known else "false"
    if isinstance(known, float):
        return _short(known)
    return str(value)


def _short(number: float) -> str:
    if number == 0 or not math.isfinite(number):
        return f"{number:g}"
    if number.is_integer() and abs(number) < 1e5:
        return str(int(number))
    text = f"{number:.10g}"
    if 1e-3 <= abs(number) < 1e5:
        return text
    mantissa, _, exponent = f"{number:.9e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


class Rounded:
    """A number with the digits that its uncertainty leaves, and a power of ten if that is shorter.

    Attributes:
        value: the digits of the number.
        spread: the digits of its uncertainty to two places, or None.
        exponent: both are to be multiplied by ten to this power.
    """

    def __init__(self, value: float, spread: float | None = None, digits: int = 4) -> None:
        """Round ``value`` to where ``spread`` begins.

        Args:
            value: finite.
            spread: half the width of the interval; None or 0 where there is none.
            digits: significant digits of ``value`` where there is no spread.
        """
        spread = spread if spread is not None and math.isfinite(spread) and spread > 0 else None
        size = max(abs(value), spread or 0.0)
        top = math.floor(math.log10(size)) if size > 0 else 0
        self.exponent = top if not -3 <= top < 5 else 0
        if spread is not None:
            last = math.floor(math.log10(spread)) - 1
        else:
            last = top - digits + 1
            last = last if self.exponent else min(last, 0)  # all digits of a whole number
        # A spread far below the precision of the number itself adds no digits.
        last = max(last, top - 14) - self.exponent
        self.value = _digits(value, self.exponent, last)
        self.spread = None if spread is None else _digits(spread, self.exponent, last)
        if spread is None and "." in self.value and float(value).is_integer():
            self.value = self.value.rstrip("0").rstrip(".")  # a whole number has no tail of zeros

    @property
    def plain(self) -> str:
        """``1.234 ± 0.056`` or ``(1.234 ± 0.056)e-7``."""
        power = f"e{self.exponent}" if self.exponent else ""
        if self.spread is None:
            return self.value + power
        both = f"{self.value} ± {self.spread}"
        return f"({both}){power}" if power else both


def _digits(value: float, exponent: int, last: int) -> str:
    scaled = Decimal(repr(float(value))).scaleb(-exponent)
    rounded = scaled.quantize(Decimal(1).scaleb(last))
    if rounded == 0:
        rounded = abs(rounded)  # no "-0.00"
    return f"{rounded:f}" if last < 0 else f"{int(rounded)}"


class ResultsError(ValueError):
    """A request that cannot be answered; the text is one line that names what is wrong."""


class Shared(list[Any]):
    """A list in ``attrs`` that never changes.

    pandas copies ``attrs`` deeply whenever it returns a column; this list is passed on as it is.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared:
        return self


def column(frame: pd.DataFrame, name: str) -> pd.Series:
    """One column of a frame; pandas' own types do not tell it from a frame."""
    return cast("pd.Series", frame[name])


def where(frame: pd.DataFrame, keep: ArrayLike) -> pd.DataFrame:
    """The runs for which ``keep`` is true, with the frame's ``attrs``."""
    chosen = frame.loc[np.asarray(keep, dtype=bool)]
    chosen.attrs = frame.attrs
    return chosen


def only(frame: pd.DataFrame, sweep: str) -> pd.DataFrame:
    """The runs of one sweep, with the metrics that at least one of them has.

    Args:
        frame: from :func:`fisher_lab.results.load`.
        sweep: its name.
    """
    runs = where(frame, frame["sweep"] == sweep)
    lost = set(" ".join(column(runs, "not_finite").fillna("")).split())
    measured = Shared(m for m in known(frame) if m in lost or column(runs, m).notna().any())
    sweeps = {d: s for d, s in frame.attrs.get("sweeps", {}).items() if s.name == sweep}
    runs.attrs = {**frame.attrs, "sweeps": sweeps, "metrics": measured}
    return runs


# ---- metrics -------------------------------------------------------------------------------------

LESS = (
    "_s", "seconds", "_mb", "_bytes", "bytes", "error", "fallbacks", "jitter_events", "_max",
)  # fmt: skip
MORE = ("decrease", "decrease_best", "cosine", "per_s", "speedup", "efficiency")
LOSSES = ("loss", "heldout_loss", "heldout", "heldout_best")

FIRST = (
    "ng/heldout_loss_decrease", "ng/heldout_loss_decrease_best", "ng/cosine",
    "kfac/clipped_frac_A", "kfac/clipped_frac_G", "kfac/total_s", "kfac/peak_mb",
    "kfac/factor_bytes", "loss/heldout", "loss/heldout_best", "train/seconds",
    "spectral/seconds", "lanczos/seconds", "loss",
)  # fmt: skip
"""Metrics that a table shows by default, where the runs have them."""

MOST = 6
"""How many of them it shows at most."""

ENGINES = (
    "spectral/largest_eigenvalue", "spectral/effective_rank", "lanczos/eigenvalue_0",
    "lanczos/effective_dimension", "group_fisher/trace",
)  # fmt: skip
"""The main numbers of every further engine that ran; a table shows them in addition."""


def is_time(name: str) -> bool:
    """Whether a metric is a time. Other load of the machine skews times: median and quartiles."""
    return name.endswith(("_s", "seconds")) and not name.endswith("per_s")


def better(name: str) -> str | None:
    """``min`` or ``max``, or None where the name does not say which is better.

    It is None for a clipped fraction, which is 0 by construction where there is no floor.
    """
    last = name.rpartition("/")[2]
    if last.endswith(MORE):
        return "max"
    if last.endswith(LESS) or last in LOSSES or name.endswith("/heldout"):
        return "min"
    return None


def known(frame: pd.DataFrame) -> list[str]:
    """The metrics of a frame, with or without a finite number."""
    return [m for m in frame.attrs.get("metrics", []) if m in frame]


def choose(
    frame: pd.DataFrame, wanted: Sequence[str] | None, first: Iterable[str] = ()
) -> list[str]:
    """The metrics of a table.

    Args:
        frame: of runs.
        wanted: names, or None for a choice that suits the runs.
        first: metrics that come first where none are named (those of the claims).

    Raises:
        ResultsError: a metric that no run has.
    """
    there = known(frame)
    for name in wanted or ():
        if name not in there:
            some = ", ".join(there[:8]) + (", ..." if len(there) > 8 else "")
            raise ResultsError(
                f"{name}: no run has this metric{hint(name, there)} (there are {some or 'none'})"
            )
    if wanted:
        return list(dict.fromkeys(wanted))
    first = list(dict.fromkeys(first))
    usual = [name for name in dict.fromkeys((*first, *FIRST)) if name in there]
    usual = usual[: max(MOST, len(first))]
    return usual + [n for n in ENGINES if n in there and n not in usual] or there[:MOST]


def hint(name: str, known: Iterable[str]) -> str:
    """``; did you mean ...?`` where a known name is close, else an empty text."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""
