"""The comparisons of a claim: which runs each is about, and their numbers by seed.

A comparison is a pair of groups, or one group, in one stratum: runs that differ in seeds alone.
:mod:`fisher_lab.results.fixed_tests` tests it for the seeds that are there, and
:mod:`fisher_lab.results.looks` seed by seed.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

from fisher_lab.results.hypotheses import CHECKPOINT, Hypothesis
from fisher_lab.results.table import TableCell, latest, make_cell
from fisher_lab.results.values import (
    SEED,
    column,
    filter_runs,
    find_axes,
    label,
    levels,
    parse_value,
    resolve,
    same,
    select,
)
from fisher_lab.runs.status import UNFINISHED, Status

Bounds = tuple[float, float]
NONE = pd.Series(dtype=float)


@dataclass(frozen=True)
class Sample:
    """The numbers of one comparison, before any test.

    Attributes:
        about: what is compared, in words.
        kind: ``margin`` and ``factor`` (x and y lie within the bounds of each other, or their
            sizes), ``ratio`` (y / x does), ``match`` (x agrees with y), ``range`` (x lies within
            the bounds), ``share`` (the share of x that is not 0 does) or ``absent``.
        x: number by pairing key, in the order of the runs.
        y: of the other group, with the same keys; empty where there is one group.
        bounds: of the mean difference, of the mean logarithm, of the share or of every number.
        words: what a share counts, or why nothing can be compared.
        lost: state of the runs that are lost -> how many.
        without: pairing key that has no number -> the state of a run that lacks it.
        diverged: keys of runs that diverged, where this alone violates the claim; a key may occur
            for each group.
        over: the settings that a pairing key holds the values of.
        run_ids: of all runs that it is about, those without a number among them.
    """

    about: str
    kind: str
    x: pd.Series = field(default_factory=NONE.copy)
    y: pd.Series = field(default_factory=NONE.copy)
    bounds: Bounds = (-math.inf, math.inf)
    words: str = ""
    lost: Mapping[str, int] = field(default_factory=dict)
    without: Mapping[Hashable, str] = field(default_factory=dict)
    diverged: tuple[Hashable, ...] = ()
    over: tuple[str, ...] = (SEED,)
    run_ids: frozenset[str] = frozenset()

    @property
    def keys(self) -> list[tuple[Any, ...]]:
        """The pairing keys that have numbers."""
        return list(self.x.index)

    def of(self, keys: Sequence[Hashable]) -> Sample:
        """The same comparison of some keys alone, all of which have numbers, in their order."""
        x, y = (
            pd.Series([known[key] for key in keys], index=_index(keys), dtype=float)
            if (known := dict(zip(side.index, side, strict=True)))
            else side
            for side in (self.x, self.y)
        )
        return replace(self, x=x, y=y, lost={}, without={}, diverged=())


def samples(hypothesis: Hypothesis, runs: pd.DataFrame) -> list[Sample]:
    """All comparisons of a hypothesis with the runs that it is about: some, with its metric.

    Raises:
        ResultsError: a setting that the runs do not have.
    """
    answer = _MAKERS[hypothesis.type]
    return [one for stratum in _strata(hypothesis, runs) for one in answer(hypothesis, stratum)]


# ---- strata and cells ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stratum:
    """Runs that differ only in what the hypothesis compares, and in seeds."""

    name: str
    runs: pd.DataFrame
    over: list[str]
    expected: int

    def group(self, settings: Mapping[str, Any], metric: str) -> _Group:
        """One metric of the runs with some settings; of repeated runs the latest completed one."""
        runs = select(self.runs, settings)
        last = latest(runs, self.keys(runs))
        # Settings that are pooled beside the seed make more runs than seeds.
        cell = make_cell(runs.iloc[list(last.values())], metric, list(last), self.expected)
        return _Group(cell, frozenset(runs["run_id"]))

    def keys(self, runs: pd.DataFrame) -> list[Any]:
        """The pairing key of each run."""
        return [
            tuple(parse_value(v) for v in row)
            for row in runs.loc[:, self.over].itertuples(index=False)
        ]

    def sample(self, words: str, kind: str, *groups: _Group, **more: Any) -> Sample:
        """A comparison of one or two groups."""
        about = ", ".join(part for part in (words, self.name) if part)
        x, *ys = (group.cell.values for group in groups)
        without = {key: state for group in groups for key, state in group.cell.without.items()}
        if ys:
            both = x.index.intersection(ys[0].index, sort=False)
            x, more["y"] = x.loc[both], ys[0].loc[both]
        lost = sum((group.lost for group in groups), Counter())  # which leaves out what is 0
        run_ids = frozenset[str]().union(*(group.run_ids for group in groups))
        given = {"lost": lost, "without": without, "run_ids": run_ids, **more}
        return Sample(about, kind, x, over=tuple(self.over), **given)

    def absent(self, words: str, why: str) -> Sample:
        """A comparison that cannot be made."""
        about = ", ".join(part for part in (words, self.name) if part)
        return Sample(about, "absent", words=why, over=tuple(self.over))


@dataclass(frozen=True)
class _Group:
    cell: TableCell
    run_ids: frozenset[str]

    @property
    def lost(self) -> Counter[str]:
        return Counter({**self.cell.lost, Status.MISSING: self.cell.missing})


def _strata(hypothesis: Hypothesis, runs: pd.DataFrame) -> list[_Stratum]:
    over = [resolve(runs, name) for name in hypothesis.get("over", [SEED])]
    compared = {resolve(runs, name) for name in _compared(hypothesis)}
    axes = find_axes(runs)
    # A setting that varies with a compared one makes no stratum of its own.
    pooled = compared | axes.tied(compared) | set(over)
    rest = [a for a in axes.values if a not in pooled]
    if hypothesis.type == "share":  # which pools runs, but for those of one checkpoint with others
        rest = [a for a in rest if a == CHECKPOINT]
    by = [resolve(runs, name) for name in hypothesis.get("by", rest)]
    if hypothesis.type == "share":
        over = [*over, *(a for a in axes.values if a not in {*over, *by})]
    strata = []
    for values in itertools.product(*(levels(runs[name]) for name in by)):
        chosen = select(runs, dict(zip(by, values, strict=True)))
        if chosen.empty:
            continue
        name = ", ".join(f"{n}={label(v)}" for n, v in zip(by, values, strict=True))
        stratum = _Stratum(name, chosen, over, 0)
        strata.append(replace(stratum, expected=len(set(stratum.keys(chosen)))))
    return strata


def _compared(hypothesis: Hypothesis) -> list[str]:
    """Settings that the hypothesis compares."""
    names = [name for key in ("groups", "a", "b", "cells") for name in hypothesis.get(key, {})]
    return [*names, *([hypothesis.get("axis")] if hypothesis.get("axis") else [])]


def _words(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={label(value)}" for name, value in settings.items())


# ---- the types -----------------------------------------------------------------------------------


def _equivalent(hypothesis: Hypothesis, stratum: _Stratum) -> list[Sample]:
    ((axis, values),) = hypothesis.get("groups").items()
    groups = [(value, stratum.group({axis: value}, hypothesis.metric)) for value in values]
    return [_within(hypothesis, stratum, axis, *pair) for pair in itertools.combinations(groups, 2)]


def _within(
    hypothesis: Hypothesis,
    stratum: _Stratum,
    axis: str,
    one: tuple[Any, _Group],
    other: tuple[Any, _Group],
) -> Sample:
    (first, a), (second, b) = one, other
    about, margin = f"{axis}: {label(second)} against {label(first)}", hypothesis.get("margin")
    if margin is not None:
        return stratum.sample(about, "margin", b, a, bounds=(-margin, margin))
    bound = math.log(hypothesis.get("ratio") or hypothesis.get("factor"))
    return stratum.sample(about, "factor", b, a, bounds=(-bound, bound))


def _stable(hypothesis: Hypothesis, stratum: _Stratum) -> list[Sample]:
    axis, at = hypothesis.get("axis"), hypothesis.get("at")
    there = levels(stratum.runs[resolve(stratum.runs, axis)])
    values = hypothesis.get("values") or _range(hypothesis, there)
    named = [v for v in map(hypothesis.get, ("from", "to", "at")) if v is not None]
    found = [  # ends to which the range was not run
        stratum.absent(f"{axis}={label(end)}", "nothing was run there")
        for end in named
        if not any(same(end, value) for value in there)
    ]
    if len(values) < 2:
        why = "nothing to compare"
        return found or [stratum.absent(f"{axis}: fewer than two values in the range", why)]
    groups = [(value, stratum.group({axis: value}, hypothesis.metric)) for value in values]
    # Where ``not`` says that one value is unstable, a run that diverged elsewhere shows nothing.
    evident = at if hypothesis.get("not", False) else None
    for pair in itertools.combinations(groups, 2):
        if at is not None and not any(same(at, value) for value, _ in pair):
            continue
        out = [g.cell.diverged_at for v, g in pair if evident is None or same(evident, v)]
        # Diverging is out of the range; other lost runs say nothing.
        sample = _within(hypothesis, stratum, axis, *pair)
        found.append(replace(sample, diverged=tuple(itertools.chain(*out))))
    return found


SLACK = 1 + 1e-12


def _range(hypothesis: Hypothesis, values: Sequence[Any]) -> list[Any]:
    """The values of an axis that are compared: all, or the numbers between two ends."""
    low, high = hypothesis.get("from", -math.inf), hypothesis.get("to", math.inf)
    if (low, high) == (-math.inf, math.inf):
        return list(values)
    numbers = [v for v in values if isinstance(parse_value(v), float)]
    return [v for v in numbers if low / SLACK <= parse_value(v) <= high * SLACK]


def _faster(hypothesis: Hypothesis, stratum: _Stratum) -> list[Sample]:
    a, b = hypothesis.get("a"), hypothesis.get("b")
    groups = (stratum.group(settings, hypothesis.metric) for settings in (a, b))
    most = hypothesis.get("at_most")
    bounds = (math.log(hypothesis.get("at_least", 1.0)), math.log(most) if most else math.inf)
    return [stratum.sample(f"{_words(b)} over {_words(a)}", "ratio", *groups, bounds=bounds)]


def _matches(hypothesis: Hypothesis, stratum: _Stratum) -> list[Sample]:
    value = hypothesis.get("value")
    if value is None:
        settings = [hypothesis.get("a"), hypothesis.get("b")]
        groups = (stratum.group(one, hypothesis.metric) for one in settings)
        return [stratum.sample(" against ".join(map(_words, settings)), "match", *groups)]
    sample = stratum.sample(f"against {value:g}", "match", stratum.group({}, hypothesis.metric))
    return [replace(sample, y=pd.Series(float(value), index=sample.x.index))]


def _bounded(hypothesis: Hypothesis, stratum: _Stratum) -> list[Sample]:
    bounds = hypothesis.get("at_least", -math.inf), hypothesis.get("at_most", math.inf)
    group = stratum.group({}, hypothesis.metric)
    return [stratum.sample(hypothesis.metric, "range", group, bounds=bounds)]


def _fails(hypothesis: Hypothesis, stratum: _Stratum) -> list[Sample]:
    wanted = hypothesis.get("cells")
    options = (v if isinstance(v, list | tuple) else [v] for v in wanted.values())
    found = []
    for values in itertools.product(*options):
        settings = dict(zip(wanted, values, strict=True))
        runs = select(stratum.runs, settings)
        unfinished = column(runs, "status").isin([*UNFINISHED, Status.CANCELLED])
        ended = filter_runs(runs, ~unfinished)
        broken = [float(_is_broken(hypothesis, row)) for row in ended.to_dict("records")]
        missing = len(runs) - len(ended)
        sample = Sample(
            ", ".join(part for part in (_words(settings), stratum.name) if part),
            "share",
            pd.Series(broken, index=_index(stratum.keys(ended)), dtype=float),
            bounds=(hypothesis.get("share", 0.5), 1.0),
            words="failed or diverged",
            lost={Status.MISSING: missing} if missing else {},
            without=dict.fromkeys(stratum.keys(filter_runs(runs, unfinished)), Status.MISSING),
            over=tuple(stratum.over),
            run_ids=frozenset(runs["run_id"]),
        )
        found.append(sample)
    return found


def _index(keys: Sequence[Hashable]) -> pd.Index:
    return pd.Index(keys, dtype=object, tupleize_cols=False)


def _is_broken(hypothesis: Hypothesis, row: Mapping[str, Any]) -> bool:
    if row["status"] != Status.COMPLETED:
        return True
    names = str(row["not_finite"] or "").split()
    if not hypothesis.metric:
        return bool(names)
    value = row[hypothesis.metric]
    beyond = value > hypothesis.get("above", math.inf) or value < hypothesis.get("below", -math.inf)
    return hypothesis.metric in names or beyond


def _share(hypothesis: Hypothesis, stratum: _Stratum) -> list[Sample]:
    above, least = hypothesis.get("above", 0.0), hypothesis.get("at_least", 0.0)
    bounds = (least if least > 0 else -math.inf, hypothesis.get("at_most", 1.0))
    words = f"above {above:g}"
    group = stratum.group({}, hypothesis.metric)
    sample = stratum.sample(f"{hypothesis.metric} {words}", "share", group, bounds=bounds)
    return [replace(sample, x=(sample.x > above).astype(float), words=words)]


_MAKERS: dict[str, Callable[[Hypothesis, _Stratum], list[Sample]]] = {
    "equivalent": _equivalent,
    "stable": _stable,
    "faster": _faster,
    "smaller": _faster,
    "matches": _matches,
    "bounded": _bounded,
    "fails": _fails,
    "share": _share,
}
