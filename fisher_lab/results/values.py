"""Values of settings and names of metrics, and which settings of some runs were swept.

A setting comes from a run's configuration (typed), from a sweep file (where YAML reads ``1e-5`` as
a string) or from a command line (always a string). :func:`same` compares values by their meaning.

The swept settings are the axes that ``sweep.json`` states. One choice may change several settings
(``model=llama`` changes the name, the type and the sizes): the axis stands for all of them, and the
others are its followers. Runs that no ``sweep.json`` describes (a plain multirun, or runs of
several sweeps) are told apart by their overrides and then by the settings that differ.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from fisher_lab.config.spelling import did_you_mean

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import ArrayLike

WORDS = {"null": None, "~": None, "true": True, "false": False}
"""As YAML and Hydra read them; ``none`` is a text, and a choice of some settings."""


def parse_value(value: Any) -> Any:
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
        return json.dumps(value, sort_keys=True, ensure_ascii=False)
    text = value.strip()
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    try:
        return float(text)
    except ValueError:
        return text


def same(left: Any, right: Any) -> bool:
    """Whether two values of a setting mean the same."""
    a, b = parse_value(left), parse_value(right)
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-12, abs_tol=0.0)
    return type(a) is type(b) and a == b


def order(value: Any) -> tuple[int, float, str]:
    """A key to sort by: numbers by size, then texts, then null."""
    known = parse_value(value)
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
        found.setdefault(parse_value(value), value)
    return sorted(found.values(), key=order)


def label(value: Any) -> str:
    """A setting's value as it stands in a table: ``1e-5``, ``null``, ``auto``."""
    known = parse_value(value)
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


def filter_runs(frame: pd.DataFrame, keep: ArrayLike) -> pd.DataFrame:
    """The runs for which ``keep`` is true, with the frame's ``attrs``."""
    chosen = frame.loc[np.asarray(keep, dtype=bool)]
    chosen.attrs = frame.attrs
    return chosen


def runs_of_sweep(frame: pd.DataFrame, sweep: str) -> pd.DataFrame:
    """The runs of the sweep of that name, with the metrics that at least one of them has."""
    runs = filter_runs(frame, frame["sweep"] == sweep)
    lost = set(" ".join(column(runs, "not_finite").fillna("")).split())
    measured = Shared(m for m in metric_names(frame) if m in lost or column(runs, m).notna().any())
    sweeps = {d: s for d, s in frame.attrs.get("sweeps", {}).items() if s.name == sweep}
    runs.attrs = {**frame.attrs, "sweeps": sweeps, "metrics": measured}
    return runs


# ---- metrics -------------------------------------------------------------------------------------

FIRST = (
    "step/natural/heldout_change", "step/natural/gain",
    "ng/heldout_loss_decrease", "ng/heldout_loss_decrease_best", "ng/cosine",
    "kfac/clipped_frac_A", "kfac/clipped_frac_G", "kfac/total_s", "kfac/peak_mb",
    "kfac/factor_bytes", "loss/heldout", "loss/heldout_best", "train/seconds",
    "spectral/seconds", "lanczos/seconds", "loss",
)  # fmt: skip
"""Metrics that a table shows by default, where the runs have them. Records of earlier versions have
the decreases."""

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


def metric_names(frame: pd.DataFrame) -> list[str]:
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
    there = metric_names(frame)
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


def hint(name: str, names: Iterable[str]) -> str:
    """``; did you mean ...?`` where a known name is close, else an empty text."""
    words = did_you_mean(name, list(names))
    return words and f"; {words}"


# ---- swept settings ------------------------------------------------------------------------------

SEED = "seed"
CODE = "code"
"""Stands for the version of the code that made a run, in the place of a setting."""
UNINTERESTING = ("cache_dir", "progress", "tracker", "hydra", "resume", "sweep", "launcher")
"""Settings that cannot change a result, with everything under them; besides `identity.LEFT_OUT`."""

GROUP_KEYS = {"kfac/kappa": "kfac.max_condition_number"}
"""Configuration groups that set a key of another name."""


@dataclass(frozen=True)
class SweptSettings:
    """The swept settings of some runs.

    Attributes:
        values: axis -> its values in order; the seed is among them if it varies.
        followers: axis -> settings whose value it decides.
    """

    values: dict[str, list[Any]]
    followers: dict[str, list[str]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """All axes but the seed."""
        return [name for name in self.values if name != SEED]

    def tied(self, names: Iterable[str]) -> set[str]:
        """The settings that vary with the named ones: their followers, and axes they follow."""
        names = set(names)
        followers = {f for axis in names for f in self.followers.get(axis, [])}
        return followers | {axis for axis, own in self.followers.items() if names & set(own)}


Axes = SweptSettings
"""Its name before, which ``fisher_lab.results`` still has."""


def find_axes(frame: pd.DataFrame) -> SweptSettings:
    """The swept settings of the runs of a frame, or of some of its rows.

    Their order is that of the sweep file or command line, then come settings that vary for another
    reason, and the seed last.
    """
    columns = {
        c: column(frame, c)
        for c in frame.attrs.get("config", [])
        if c in frame and c.partition(".")[0] not in UNINTERESTING
    }
    swept = _swept(frame, list(columns))
    varying = {c: _codes(v) for c, v in columns.items() if v.nunique(dropna=False) > 1}
    varying = {c: codes for c, codes in varying.items() if max(codes) > 0}
    # Of settings that vary together, a name stands for the others, then the one that varies most.
    rest = sorted(
        (c for c in varying if c not in swept and c != SEED),
        key=lambda c: (not c.endswith(".name"), -max(varying[c]), len(c), c),
    )
    chosen = [c for c in dict.fromkeys((*swept, SEED)) if c in varying]
    followers: dict[str, list[str]] = {}
    for name in rest:
        leader = next((a for a in chosen if _decides(varying[a], varying[name])), SEED)
        if leader == SEED:  # which other seeds would contradict
            chosen.append(name)
        else:
            followers.setdefault(leader, []).append(name)
    chosen.sort(key=lambda name: name == SEED)
    return SweptSettings({c: levels(columns[c]) for c in chosen}, followers)


def _swept(frame: pd.DataFrame, settings: Sequence[str]) -> list[str]:
    """The settings of the axes in ``sweep.json``, and of the overrides that differ between runs."""
    names = [name for sweep in frame.attrs.get("sweeps", {}).values() for name in sweep.axes]
    typed: dict[str, set[str]] = {}
    for text in frame["overrides"]:
        for word in shlex.split(text or ""):
            key, sign, value = word.partition("=")
            if sign:
                typed.setdefault(key.lstrip("+~"), set()).add(value)
    names += [key for key, values in typed.items() if len(values) > 1]
    found = [setting_of(name, settings) for name in names]
    return list(dict.fromkeys(c for c in found if c is not None))


def key_of(value: Any) -> tuple[str, Any]:
    """What tells apart two values of a setting: their meaning and its type."""
    known = parse_value(value)
    return (type(known).__name__, known)


def _codes(values: pd.Series) -> list[int]:
    """A number for each distinct value, in order of occurrence."""
    seen: dict[Any, int] = {}
    return [seen.setdefault(key_of(value), len(seen)) for value in values]


def _decides(leader: Sequence[int], other: Sequence[int]) -> bool:
    """Whether the value of one setting decides that of another."""
    return len(set(zip(leader, other, strict=True))) == len(set(leader))


def setting_of(name: str, settings: Sequence[str]) -> str | None:
    """The key that a name on a command line or in a sweep file stands for; None: there is none."""
    dotted = name.lstrip("+").replace("/", ".")
    candidates = (name, GROUP_KEYS.get(name, name), dotted, f"{dotted}.name", f"{dotted}.enabled")
    return next((c for c in candidates if c in settings), None)


def resolve(frame: pd.DataFrame, name: str) -> str:
    """The column of a key (``kfac.damping``), a group (``kfac/policy``), or :data:`CODE`.

    Raises:
        ResultsError: there is no such setting.
    """
    if name == CODE and f"provenance.{CODE}" in frame:
        return f"provenance.{CODE}"
    settings = list(frame.attrs.get("config", frame.columns))
    found = setting_of(name, settings)
    if found is None:
        raise ResultsError(f"{name}: the runs have no such setting{hint(name, settings)}")
    return found


def select(frame: pd.DataFrame, settings: Mapping[str, Any]) -> pd.DataFrame:
    """The runs whose settings have the given values.

    Args:
        frame: of runs.
        settings: name -> a value, or a list of values.

    Raises:
        ResultsError: a setting that the runs do not have.
    """
    keep = np.ones(len(frame), dtype=bool)
    for name, wanted in settings.items():
        options = wanted if isinstance(wanted, list | tuple) else [wanted]
        values = column(frame, resolve(frame, name))
        keep &= [any(same(value, option) for option in options) for value in values]
    return filter_runs(frame, keep)
