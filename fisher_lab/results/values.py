"""Values of settings and numbers of metrics: compared, ordered and written.

A setting reaches us from three places: a run's configuration (typed), a sweep file (where YAML
makes ``1e-5`` a string) and a command line (always a string). :func:`same` compares them by what
they mean.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any, TypeAlias

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
            spread: half the interval's width; None or 0 where there is none.
            digits: significant digits of ``value`` where there is no spread.
        """
        known = spread is not None and math.isfinite(spread) and spread > 0
        size = max(abs(value), spread or 0.0) if known else abs(value)
        top = math.floor(math.log10(size)) if size > 0 else 0
        self.exponent = top if not -3 <= top < 5 else 0
        last = (
            math.floor(math.log10(spread)) - 1 if known and spread is not None else top - digits + 1
        )
        if not known and not self.exponent:
            last = min(last, 0)  # all digits of a whole number
        # A spread far below the precision of the number itself adds no digits.
        last = max(last, top - 14) - self.exponent
        self.value = _places(value, self.exponent, last)
        self.spread = _places(spread, self.exponent, last) if known and spread is not None else None
        if not known:
            self.value = _trim(self.value, value)

    @property
    def plain(self) -> str:
        """``1.234 ± 0.056`` or ``(1.234 ± 0.056)e-7``."""
        if self.spread is None:
            return self.value + (f"e{self.exponent}" if self.exponent else "")
        both = f"{self.value} ± {self.spread}"
        return f"({both})e{self.exponent}" if self.exponent else both


def _places(value: float, exponent: int, last: int) -> str:
    scaled = Decimal(repr(float(value))).scaleb(-exponent)
    rounded = scaled.quantize(Decimal(1).scaleb(last))
    if rounded == 0:
        rounded = abs(rounded)  # no "-0.00"
    return f"{rounded:f}" if last < 0 else f"{int(rounded)}"


def _trim(text: str, value: float) -> str:
    """Whole numbers without a tail of zeros."""
    return text.rstrip("0").rstrip(".") if "." in text and float(value).is_integer() else text


class ResultsError(ValueError):
    """What was asked for cannot be had; the text is one line that names the thing."""


Frame: TypeAlias = Any
"""A ``pandas.DataFrame``; with ``attrs`` as :func:`fisher_lab.results.loading` gives them."""

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
        frame: from :func:`fisher_lab.results.loading`.
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
