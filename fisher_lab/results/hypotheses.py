"""What a claim may state, and how each type is tested.

A claim is a hypothesis with a verdict. The hypothesis is a mapping in a sweep file, under
``claims:``; ``docs/results.md`` lists the types. A finding is the answer for one comparison (a pair
of groups in one stratum); :mod:`fisher_lab.results.claims` makes the verdict of them.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from fisher_lab.results import stats
from fisher_lab.results.coarse import resolution
from fisher_lab.results.table import TableCell, latest, make_cell
from fisher_lab.results.values import (
    ResultsError,
    column,
    filter_runs,
    find_axes,
    hint,
    label,
    levels,
    parse_value,
    resolve,
    same,
    select,
)
from fisher_lab.runs.status import UNFINISHED, Status

COMMON = ("type", "text", "where", "by", "over", "alpha", "not")

TYPES = {
    "equivalent": ("metric groups margin|ratio", ""),
    "stable": ("metric axis factor|margin", "values from to at"),
    "faster": ("metric a b", "at_least at_most"),
    "smaller": ("metric a b", "at_least at_most"),
    "matches": ("metric tolerance b|value", "a relative"),
    "bounded": ("metric at_most+at_least", ""),
    "fails": ("cells", "metric above below share"),
    "share": ("metric at_least+at_most", "above"),
}
"""Type -> the keys that it must have, and those that it may have beside :data:`COMMON`. Of ``a|b``
exactly one is given, of ``a+b`` at least one."""

ABOVE = {"margin": 0, "tolerance": 0, "alpha": 0, "ratio": 1, "factor": 1}
"""Numbers that must be above a bound."""

NUMBERS = (*ABOVE, "at_least", "at_most", "value", "above", "below", "share", "from", "to")
MAPPINGS = ("where", "a", "b", "groups", "cells")
LISTS = ("by", "over", "values")


@dataclass(frozen=True)
class Hypothesis:
    """A hypothesis of a sweep file whose keys and values have been checked.

    Attributes:
        type: one of :data:`TYPES`.
        text: what the paper says, in words.
        options: its other keys that are given; numbers as numbers.
        stated: the mapping as the sweep file has it.
    """

    type: str
    text: str
    options: dict[str, Any] = field(default_factory=dict)
    stated: dict[str, Any] = field(default_factory=dict)

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a key."""
        return self.options.get(name, default)

    @property
    def metric(self) -> str:
        """The metric, or an empty text where the hypothesis is about none."""
        return self.get("metric", "")

    @property
    def alpha(self) -> float:
        """The level of its tests."""
        return self.get("alpha", 0.05)


def parse(claim: Any, number: int = 1) -> Hypothesis:
    """The hypothesis of a mapping in a sweep file, the ``number``-th of its claims.

    Raises:
        ResultsError: it is wrong; the text is one line.
    """
    name = f"claim {number}"
    if not isinstance(claim, Mapping):
        raise ResultsError(f"{name} is not a mapping with a type")
    kind = str(claim.get("type"))
    if kind not in TYPES:
        raise ResultsError(f"{name}: type={kind} is not allowed: one of {', '.join(TYPES)}")
    _check_keys(f"{name} ({kind})", *TYPES[kind], claim)
    options = {
        str(key): _option(name, str(key), value)
        for key, value in claim.items()
        if key not in ("type", "text") and value is not None
    }
    _check_together(name, kind, options)
    text = str(claim.get("text") or f"{kind} {claim.get('metric', '')}".strip())
    return Hypothesis(kind, text, options, dict(claim))


def _check_keys(name: str, required: str, optional: str, claim: Mapping[str, Any]) -> None:
    allowed = {*COMMON, *re.findall(r"\w+", f"{required} {optional}")}
    for key in claim:
        if key not in allowed:
            raise ResultsError(f"{name}: there is no key {key}{hint(str(key), allowed)}")
    given = {key for key, value in claim.items() if value is not None}
    for names in required.split():
        group = re.split(r"[|+]", names)
        count = len(given & set(group))
        if "|" in names and count != 1:
            raise ResultsError(f"{name}: give exactly one of {' and '.join(group)}")
        if count == 0:
            one_of = "+" in names
            words = f"give one of {' and '.join(group)}" if one_of else f"{names} is missing"
            raise ResultsError(f"{name}: {words}")


def _option(name: str, key: str, value: Any) -> Any:
    if key in NUMBERS:
        return _number(name, key, value)
    if key in MAPPINGS:
        if not isinstance(value, Mapping) or not value:
            raise ResultsError(f"{name}: {key} must name settings and their values")
        return dict(value)
    if key in LISTS:
        return list(value) if isinstance(value, list | tuple) else [value]
    if key in ("not", "relative") and not isinstance(value, bool):
        raise ResultsError(f"{name}: {key}={value} is not allowed: true or false")
    return value


def _number(name: str, key: str, value: Any) -> float:
    number = parse_value(value)
    if not isinstance(number, float) or abs(number) == math.inf:
        raise ResultsError(f"{name}: {key}={value} is not a number")
    if number <= ABOVE.get(key, -math.inf):
        raise ResultsError(f"{name}: {key}={value} is not allowed: above {ABOVE[key]}")
    if (key == "alpha" and number >= 0.5) or (key == "share" and not 0 <= number < 1):
        raise ResultsError(f"{name}: {key}={value} is not allowed")
    return number


def _check_together(name: str, kind: str, options: Mapping[str, Any]) -> None:
    """Check the rules that concern several keys."""
    low, high = options.get("at_least"), options.get("at_most")
    values, at = options.get("values"), options.get("at")
    beyond = sorted(options.keys() & {"above", "below"})
    wrong = ""
    if kind == "equivalent":
        groups = options["groups"]
        many = next(iter(groups.values()))
        if len(groups) != 1 or not isinstance(many, list | tuple) or len(many) < 2:
            wrong = "groups must be one setting with two values or more"
    elif kind in ("faster", "smaller") and not 0 < (low or 1.0) < options.get("at_most", math.inf):
        wrong = "at_least must be above 0 and below at_most"
    elif kind == "matches" and ("b" in options) != ("a" in options):
        wrong = "give a and b, or value alone"
    elif values and at is not None and not any(same(at, value) for value in values):
        wrong = f"at={label(at)} is not among its values"
    elif kind == "fails" and "metric" not in options and beyond:
        wrong = f"{beyond[0]} needs a metric"
    elif low is not None and high is not None and low > high:
        wrong = "at_least must not be above at_most"
    if wrong:
        raise ResultsError(f"{name}: {wrong}")


def claimed_metrics(frame: pd.DataFrame) -> list[str]:
    """The metrics that the claims of some sweeps are about; a table shows these first."""
    stated = [c for sweep in frame.attrs.get("sweeps", {}).values() for c in sweep.claims]
    names = [c.get("metric") for c in stated if isinstance(c, dict)]
    return list(dict.fromkeys(name for name in names if isinstance(name, str)))


# ---- findings ------------------------------------------------------------------------------------

HOLDS, FAILS, OPEN = "holds", "does not hold", "inconclusive"


@dataclass(frozen=True)
class Finding:
    """One comparison of a hypothesis.

    Attributes:
        about: what was compared, in words.
        verdict: holds, does not hold or inconclusive, before Holm's correction.
        n: how many seeds (pairs, or runs) it rests on.
        says: the numbers in words.
        p_holds: p of the test that it holds; NaN where there was no test.
        p_fails: p of the test that it does not hold; NaN likewise.
        needed: how many seeds would decide if mean and spread stay; None where that is not known.
        between: the numbers of seeds between which the right one lies; None likewise.
        values: the numbers themselves.
        lost: state of the runs that are lost -> how many.
        seeds_at: number of comparisons that the level is divided by -> ``needed``, ``between``.
        exact: the pairs do not vary: they were compared as numbers, without a test but for chance
            ties of a coarse metric.
    """

    about: str
    verdict: str
    n: int
    says: str
    p_holds: float = math.nan
    p_fails: float = math.nan
    needed: int | None = None
    values: Mapping[str, float] = field(default_factory=dict)
    lost: Mapping[str, int] = field(default_factory=dict)
    between: stats.Range | None = None
    seeds_at: Callable[[int], tuple[int | None, stats.Range]] | None = None
    exact: bool = False

    @property
    def tested(self) -> bool:
        """Whether a statistical test stands behind it."""
        return not math.isnan(self.p_fails)


def findings(hypothesis: Hypothesis, runs: pd.DataFrame) -> list[Finding]:
    """All comparisons of a hypothesis with the runs that it is about: some, with its metric.

    Raises:
        ResultsError: a setting that the runs do not have.
    """
    answer, _ = TESTS[hypothesis.type]
    return [one for stratum in _strata(hypothesis, runs) for one in answer(hypothesis, stratum)]


# ---- strata and cells ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stratum:
    """Runs that differ only in what the hypothesis compares, and in seeds."""

    name: str
    runs: pd.DataFrame
    over: list[str]
    expected: int

    def cell(self, settings: Mapping[str, Any], metric: str) -> TableCell:
        """One metric of the runs with some settings; of repeated runs the latest completed one."""
        runs = select(self.runs, settings)
        last = latest(runs, _over_keys(runs, self.over))
        # Settings that are pooled beside the seed make more runs than seeds.
        return make_cell(runs.iloc[list(last.values())], metric, list(last), self.expected)

    def about(self, words: str) -> str:
        return ", ".join(part for part in (words, self.name) if part)


def _over_keys(runs: pd.DataFrame, over: Sequence[str]) -> list[Any]:
    return [
        tuple(parse_value(v) for v in row)
        for row in runs.loc[:, list(over)].itertuples(index=False)
    ]


def _strata(hypothesis: Hypothesis, runs: pd.DataFrame) -> list[_Stratum]:
    over = [resolve(runs, name) for name in hypothesis.get("over", ["seed"])]
    compared = {resolve(runs, name) for name in _compared(hypothesis)}
    axes = find_axes(runs)
    # A setting that varies with a compared one makes no stratum of its own.
    pooled = compared | axes.tied(compared) | set(over)
    rest = [] if hypothesis.type == "share" else [a for a in axes.values if a not in pooled]
    by = [resolve(runs, name) for name in hypothesis.get("by", rest)]
    if hypothesis.type == "share":
        over = [*over, *(a for a in axes.values if a not in {*over, *by})]
    strata = []
    for values in itertools.product(*(levels(runs[name]) for name in by)):
        chosen = select(runs, dict(zip(by, values, strict=True)))
        if chosen.empty:
            continue
        name = ", ".join(f"{n}={label(v)}" for n, v in zip(by, values, strict=True))
        expected = len(set(_over_keys(chosen, over)))
        strata.append(_Stratum(name, chosen, over, expected))
    return strata


def _compared(hypothesis: Hypothesis) -> list[str]:
    """Settings that the hypothesis compares."""
    names = [name for key in ("groups", "a", "b", "cells") for name in hypothesis.get(key, {})]
    return [*names, *([hypothesis.get("axis")] if hypothesis.get("axis") else [])]


def _words(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={label(value)}" for name, value in settings.items())


def _lost(*cells: TableCell) -> Counter[str]:
    states = (Counter({**cell.lost, Status.MISSING: cell.missing}) for cell in cells)
    return sum(states, Counter())  # which leaves out what is 0


def _pairs(a: TableCell, b: TableCell) -> tuple[np.ndarray, np.ndarray]:
    both = a.values.index.intersection(b.values.index, sort=False)
    return a.values.loc[both].to_numpy(), b.values.loc[both].to_numpy()


def _nothing(about: str, lost: Mapping[str, int]) -> Finding:
    return Finding(about, OPEN, 0, "nothing to compare", lost=lost)


# ---- the types -----------------------------------------------------------------------------------


def _equivalent(hypothesis: Hypothesis, stratum: _Stratum) -> list[Finding]:
    ((axis, values),) = hypothesis.get("groups").items()
    cells = [(value, stratum.cell({axis: value}, hypothesis.metric)) for value in values]
    return [_within(hypothesis, stratum, axis, *pair) for pair in itertools.combinations(cells, 2)]


def _stable(hypothesis: Hypothesis, stratum: _Stratum) -> list[Finding]:
    axis, at = hypothesis.get("axis"), hypothesis.get("at")
    there = levels(stratum.runs[resolve(stratum.runs, axis)])
    values = hypothesis.get("values") or _range(hypothesis, there)
    named = [v for v in map(hypothesis.get, ("from", "to", "at")) if v is not None]
    found = [  # ends to which the range was not run
        Finding(stratum.about(f"{axis}={label(end)}"), OPEN, 0, "nothing was run there")
        for end in named
        if not any(same(end, value) for value in there)
    ]
    if len(values) < 2:
        return found or [_nothing(stratum.about(f"{axis}: fewer than two values in the range"), {})]
    cells = [(value, stratum.cell({axis: value}, hypothesis.metric)) for value in values]
    # Where ``not`` says that one value is unstable, a run that diverged elsewhere shows nothing.
    evident = at if hypothesis.get("not", False) else None
    for pair in itertools.combinations(cells, 2):
        if at is not None and not any(same(at, value) for value, _ in pair):
            continue
        finding = _within(hypothesis, stratum, axis, *pair)
        diverged = sum(c.diverged for v, c in pair if evident is None or same(evident, v))
        if diverged:  # which is out of the range; other lost runs say nothing
            says = f"{diverged} diverged within the range"
            finding = Finding(finding.about, FAILS, finding.n, says, lost=finding.lost)
        found.append(finding)
    return found


SLACK = 1 + 1e-12


def _range(hypothesis: Hypothesis, values: Sequence[Any]) -> list[Any]:
    """The values of an axis that are compared: all, or the numbers between two ends."""
    low, high = hypothesis.get("from", -math.inf), hypothesis.get("to", math.inf)
    if (low, high) == (-math.inf, math.inf):
        return list(values)
    numbers = [v for v in values if isinstance(parse_value(v), float)]
    return [v for v in numbers if low / SLACK <= parse_value(v) <= high * SLACK]


def _within(
    hypothesis: Hypothesis,
    stratum: _Stratum,
    axis: str,
    one: tuple[Any, TableCell],
    other: tuple[Any, TableCell],
) -> Finding:
    """Whether two cells are equal within the margin, the ratio or the factor."""
    (first, a), (second, b) = one, other
    about = stratum.about(f"{axis}: {label(second)} against {label(first)}")
    x, y = _pairs(b, a)
    lost, margin, alpha = _lost(a, b), hypothesis.get("margin"), hypothesis.alpha
    if x.size == 0:
        return _nothing(about, lost)
    step = resolution(x, y)
    if margin is not None:
        return _tested(about, x - y, (-margin, margin), stats.size(x, y), alpha, lost, step)
    if np.array_equal(x, y) and x.size > 1 and not step:
        values = {"difference": 0.0}
        return Finding(about, HOLDS, x.size, "identical", values=values, lost=lost, exact=True)
    if (x * y <= 0).any():
        apart = x.size > 1 and (np.sign(x) != np.sign(y)).all()
        words = "the sign changes: no factor holds" if apart else "zeros or signs: give a margin"
        return Finding(about, FAILS if apart else OPEN, x.size, words, lost=lost)
    d = np.log(np.abs(x)) - np.log(np.abs(y))
    bound = math.log(hypothesis.get("ratio") or hypothesis.get("factor"))
    step /= float(min(np.abs(x).min(), np.abs(y).min()))
    return _tested(about, d, (-bound, bound), 1.0, alpha, lost, step, as_ratio=True)


def _tested(
    about: str,
    d: np.ndarray,
    bounds: tuple[float, float],
    scale: float,
    alpha: float,
    lost: Mapping[str, int],
    step: float,
    as_ratio: bool = False,
) -> Finding:
    """Two one-sided tests of differences, or of logarithms of ratios, of a metric with a step."""
    e = stats.equivalence(d, *bounds, alpha, scale, step)
    scaled = math.exp if as_ratio else float
    values = {name: scaled(getattr(e, name)) for name in ("mean", "low", "high")}
    values["std"] = e.std
    name = "ratio" if as_ratio else "difference"
    if e.n == 1:
        # Nothing is known of the spread yet: two are the least that can be tested.
        says = f"{name} {values['mean']:.4g}: one seed, no test"
        return Finding(about, OPEN, 1, says, needed=2, values=values, lost=lost)
    verdict = HOLDS if e.p_inside < alpha else FAILS if e.p_outside < alpha else OPEN
    p = (e.p_inside, e.p_outside)
    if e.exact:
        worst = float(np.abs(d).max())
        says = f"{name} {values['mean']:.6g}, exact"
        if verdict == HOLDS and not (as_ratio and worst > 1e-9):
            says = f"exact to {worst:.2g}"
        if verdict == OPEN:
            says = f"{name} {values['mean']:.6g} {e.n} times, which may be chance: a coarse metric"
        p = p if step > 0 else (math.nan, math.nan)
    else:
        ends = f"[{values['low']:.4g}, {values['high']:.4g}]"
        says = f"{name} {values['mean']:.4g}, {_interval(alpha)} {ends}"

    def seeds_at(many: int) -> tuple[int | None, stats.Range]:
        known = (e, *bounds, alpha, many)
        return stats.seeds_for(*known), stats.seeds_range(*known)

    return Finding(
        about, verdict, e.n, says, *p, values=values, lost=lost, seeds_at=seeds_at, exact=e.exact
    )


def _interval(alpha: float) -> str:
    """The interval that two one-sided tests at this level use; a table's interval is wider."""
    return f"{100 * (1 - 2 * alpha):g}% interval"


def _faster(hypothesis: Hypothesis, stratum: _Stratum) -> list[Finding]:
    a, b = hypothesis.get("a"), hypothesis.get("b")
    about = stratum.about(f"{_words(b)} over {_words(a)}")
    one, other = stratum.cell(a, hypothesis.metric), stratum.cell(b, hypothesis.metric)
    x, y = _pairs(one, other)
    lost = _lost(one, other)
    if x.size == 0:
        return [_nothing(about, lost)]
    if min(x.min(), y.min()) <= 0:
        return [Finding(about, OPEN, x.size, "not all numbers are above 0: no ratio", lost=lost)]
    most = hypothesis.get("at_most")
    bounds = (math.log(hypothesis.get("at_least", 1.0)), math.log(most) if most else math.inf)
    step = resolution(x, y) / float(min(x.min(), y.min()))
    return [_tested(about, np.log(y / x), bounds, 1.0, hypothesis.alpha, lost, step, as_ratio=True)]


def _matches(hypothesis: Hypothesis, stratum: _Stratum) -> list[Finding]:
    value = hypothesis.get("value")
    settings = [{}] if value is not None else [hypothesis.get("a"), hypothesis.get("b")]
    cells = [stratum.cell(one, hypothesis.metric) for one in settings]
    if value is not None:
        x = cells[0].values.to_numpy()
        y, words = np.full_like(x, value), f"against {value:g}"
    else:
        x, y = _pairs(*cells)
        words = " against ".join(map(_words, settings))
    lost, about = _lost(*cells), stratum.about(words)
    if x.size == 0:
        return [_nothing(about, lost)]
    relative = hypothesis.get("relative", True)
    errors = np.abs(x - y)
    if relative:
        none = np.where(errors == 0, 0.0, np.inf)
        errors = np.divide(errors, np.abs(y), out=none, where=y != 0)
    error = float(errors.max())
    verdict = HOLDS if error <= hypothesis.get("tolerance") else FAILS
    words = "relative" if relative else "absolute"
    says = f"exact to {error:.2g} ({words})" if verdict == HOLDS else f"{words} error {error:.3g}"
    return [Finding(about, verdict, x.size, says, values={"error": error}, lost=lost)]


def _bounded(hypothesis: Hypothesis, stratum: _Stratum) -> list[Finding]:
    cell = stratum.cell({}, hypothesis.metric)
    x, about = cell.values.to_numpy(), stratum.about(hypothesis.metric)
    if x.size == 0:
        return [_nothing(about, _lost(cell))]
    low, high = hypothesis.get("at_least", -math.inf), hypothesis.get("at_most", math.inf)
    verdict = HOLDS if low <= x.min() and x.max() <= high else FAILS
    says = f"from {x.min():.4g} to {x.max():.4g}"
    values = {"least": float(x.min()), "most": float(x.max())}
    return [Finding(about, verdict, x.size, says, values=values, lost=_lost(cell))]


def _fails(hypothesis: Hypothesis, stratum: _Stratum) -> list[Finding]:
    wanted = hypothesis.get("cells")
    options = (v if isinstance(v, list | tuple) else [v] for v in wanted.values())
    bounds = (hypothesis.get("share", 0.5), 1.0)
    found = []
    for values in itertools.product(*options):
        settings = dict(zip(wanted, values, strict=True))
        runs = select(stratum.runs, settings)
        ended = filter_runs(runs, ~column(runs, "status").isin([*UNFINISHED, Status.CANCELLED]))
        broken = sum(_is_broken(hypothesis, row) for row in ended.to_dict("records"))
        missing = len(runs) - len(ended)
        lost: dict[str, int] = {Status.MISSING: missing} if missing else {}
        about, words = stratum.about(_words(settings)), "failed or diverged"
        alpha = hypothesis.alpha
        found.append(_proportion(about, broken, len(ended), bounds, alpha, lost, words))
    return found


def _is_broken(hypothesis: Hypothesis, row: Mapping[str, Any]) -> bool:
    if row["status"] != Status.COMPLETED:
        return True
    names = str(row["not_finite"] or "").split()
    if not hypothesis.metric:
        return bool(names)
    value = row[hypothesis.metric]
    beyond = value > hypothesis.get("above", math.inf) or value < hypothesis.get("below", -math.inf)
    return hypothesis.metric in names or beyond


def _share(hypothesis: Hypothesis, stratum: _Stratum) -> list[Finding]:
    cell = stratum.cell({}, hypothesis.metric)
    above, least = hypothesis.get("above", 0.0), hypothesis.get("at_least", 0.0)
    count = int((cell.values > above).sum())
    bounds = (least if least > 0 else -math.inf, hypothesis.get("at_most", 1.0))
    words, n = f"above {above:g}", len(cell.values)
    about = stratum.about(f"{hypothesis.metric} {words}")
    return [_proportion(about, count, n, bounds, hypothesis.alpha, _lost(cell), words)]


def _proportion(
    about: str,
    count: int,
    n: int,
    bounds: tuple[float, float],
    alpha: float,
    lost: Mapping[str, int],
    words: str,
) -> Finding:
    """Whether the proportion of some runs lies between two bounds."""
    if n == 0:
        return _nothing(about, lost)
    verdict, low, high = _proportion_verdict(count, n, bounds, alpha)
    tests = stats.proportion_tests(count, n, *bounds)
    p = float(tests[0]), float(tests[1])
    says = f"{count} of {n} {words}: {count / n:.0%}, {_interval(alpha)} [{low:.0%}, {high:.0%}]"
    values = {"share": count / n, "low": low, "high": high}

    def runs_at(share: float, many: int) -> int | None:
        """How many runs would decide if that is the proportion."""
        numbers = np.arange(n + 1, stats.MAX_SEEDS + 1)
        p_holds, p_fails = stats.proportion_tests(np.round(share * numbers), numbers, *bounds)
        decided = (p_holds < alpha) | (p_fails < alpha / many)
        return int(numbers[decided.argmax()]) if decided.any() else None

    def seeds_at(many: int) -> tuple[int | None, stats.Range]:
        ends = stats.proportion_interval(count, n, (1 - stats.GUESS) / 2)
        some = [runs_at(share, many) for share in (*ends, count / n)]
        # Where a bound lies within the interval no number is enough for a proportion near it.
        past = any(0 <= one < 1 and ends[0] <= one <= ends[1] for one in bounds)
        known = sorted(filter(None, some)) or [None]
        return some[-1], (known[0], None if past or None in some else known[-1])

    return Finding(about, verdict, n, says, *p, values=values, lost=lost, seeds_at=seeds_at)


def _proportion_verdict(
    count: int, n: int, bounds: tuple[float, float], alpha: float
) -> tuple[str, float, float]:
    """The verdict on a proportion and its interval, of one comparison."""
    low, high = stats.proportion_interval(count, n, alpha)
    if (low > bounds[0] or bounds[0] < 0) and (high < bounds[1] or bounds[1] >= 1):
        return HOLDS, low, high
    if stats.proportion_tests(count, n, *bounds)[1] < alpha:
        return FAILS, low, high
    return OPEN, low, high


_PAIRED = "two one-sided paired t tests"
_RATIO = "one-sided paired t test of log ratios"
_PROPORTION = "share of runs, Clopper and Pearson"

TESTS: dict[str, tuple[Callable[[Hypothesis, _Stratum], list[Finding]], str]] = {
    "equivalent": (_equivalent, _PAIRED),
    "stable": (_stable, f"{_PAIRED} for every pair of values"),
    "faster": (_faster, _RATIO),
    "smaller": (_faster, _RATIO),
    "matches": (_matches, "every pair or run"),
    "bounded": (_bounded, "every run"),
    "fails": (_fails, _PROPORTION),
    "share": (_share, _PROPORTION),
}
"""Type -> its comparisons, and the test in words."""
