"""What was swept: the settings that differ between the runs, one for each independent choice.

A choice may move several settings at once (``model=llama`` moves name, type and sizes; a paired
cell moves two). Settings that say the same of every run are one axis, under one name; the others
are its followers.
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from fisher_lab.results.values import Column, Frame, ResultsError, levels, meaning, same

SEED = "seed"
UNINTERESTING = ("cache_dir", "progress", "tracker", "hydra", "resume", "sweep", "launcher")
"""Settings that cannot change a result, with everything under them."""

GROUP_KEYS = {"kfac/kappa": "kfac.max_condition_number"}
"""Groups that set a key of another name."""


@dataclass(frozen=True)
class Axes:
    """The swept settings of some runs.

    Attributes:
        values: axis -> its values in order; the seed is among them if it varies.
        followers: axis -> settings that vary with it, one to one or coarser.
    """

    values: dict[str, list[Any]]
    followers: dict[str, list[str]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """All axes but the seed."""
        return [name for name in self.values if name != SEED]


def find_axes(frame: Frame) -> Axes:
    """The axes of a frame of runs.

    Args:
        frame: from :func:`fisher_lab.results.loading`, or some of its rows.

    Returns:
        The axes, those that were swept on the command line or in a sweep file first.
    """
    asked = _asked(frame)
    several = [c for c in _settings(frame) if frame[c].nunique(dropna=False) > 1]
    codes = {c: _codes(frame[c]) for c in several}
    varying = {c: code for c, code in codes.items() if max(code, default=0) > 0}
    ranked = sorted(varying, key=lambda c: (_rank(c, asked), -max(varying[c]), len(c), c))
    chosen: list[str] = []
    followers: dict[str, list[str]] = {}
    for column in ranked:
        explicit = column in asked or column == SEED
        leader = None
        if not explicit:
            leader = next((a for a in chosen if _follows(varying[column], varying[a])), None)
            if leader == SEED:
                leader = None
        if leader is None:
            chosen.append(column)
        else:
            followers.setdefault(leader, []).append(column)
    chosen.sort(key=lambda c: (c == SEED, asked.index(c) if c in asked else len(asked)))
    return Axes({c: levels(frame[c]) for c in chosen}, followers)


def resolve(frame: Frame, name: str) -> str:
    """The column that a name on the command line or in a claim stands for.

    Args:
        frame: of runs.
        name: a key (``kfac.damping``), a group (``kfac/policy``, ``model``) or ``seed``.

    Raises:
        ResultsError: there is no such setting.
    """
    for candidate in _candidates(name):
        if candidate in frame.attrs.get("config", frame.columns):
            return candidate
    known = list(frame.attrs.get("config", frame.columns))
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ResultsError(f"{name}: the runs have no such setting{hint}")


def select(frame: Frame, where: Mapping[str, Any]) -> Frame:
    """The runs whose settings have the given values.

    Args:
        frame: of runs.
        where: setting -> a value, or a list of values.

    Raises:
        ResultsError: a setting that the runs do not have.
    """
    keep = pd.Series(True, index=frame.index)
    for name, wanted in where.items():
        options = wanted if isinstance(wanted, list | tuple) else [wanted]
        column = frame[resolve(frame, name)]
        keep &= column.map(lambda value, options=options: any(same(value, o) for o in options))
    chosen = frame[keep]
    chosen.attrs = frame.attrs
    return chosen


def _candidates(name: str) -> list[str]:
    dotted = name.lstrip("+").replace("/", ".")
    named = [GROUP_KEYS[name]] if name in GROUP_KEYS else []
    return [name, *named, dotted, f"{dotted}.name", f"{dotted}.enabled"]


def _asked(frame: Frame) -> list[str]:
    """Columns that the sweep files name as axes, and those of overrides that differ."""
    known = set(_settings(frame))
    names: list[str] = []
    for sweep in frame.attrs.get("sweeps", {}).values():
        axes = sweep.about.get("axes")
        names += list(axes) if isinstance(axes, dict | list) else []
    names += _overridden(frame["overrides"])
    found = [next((c for c in _candidates(str(n)) if c in known), None) for n in names]
    return list(dict.fromkeys(c for c in found if c is not None))


def _overridden(texts: Iterable[str | None]) -> list[str]:
    """Keys that are not overridden alike in all runs."""
    values: dict[str, set[str]] = {}
    for text in texts:
        for word in shlex.split(text or ""):
            key, sign, value = word.partition("=")
            if sign:
                values.setdefault(key.lstrip("+~"), set()).add(value)
    return [key for key, found in values.items() if len(found) > 1]


def _settings(frame: Frame) -> list[str]:
    names: Sequence[str] = frame.attrs.get("config", [])
    return [n for n in names if n in frame and n.partition(".")[0] not in UNINTERESTING]


def _rank(column: str, asked: Sequence[str]) -> tuple[int, int]:
    if column in asked:
        return (0, asked.index(column))
    if column == SEED:
        return (1, 0)
    return (2, 0) if column.endswith(".name") else (3, 0)


def _codes(column: Column) -> list[int]:
    """A number for each distinct value, in order of occurrence."""
    seen: dict[Any, int] = {}
    return [seen.setdefault(_key(value), len(seen)) for value in column]


def _key(value: Any) -> Any:
    known = meaning(value)
    return (type(known).__name__, known)


def _follows(column: Sequence[int], leader: Sequence[int]) -> bool:
    """Whether the leader's value decides the column's."""
    decided: dict[int, int] = {}
    return all(decided.setdefault(a, b) == b for a, b in zip(leader, column, strict=True))
