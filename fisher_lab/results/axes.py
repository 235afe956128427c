"""What was swept: the axes that ``sweep.json`` states, and the settings that vary with them.

One choice may change several settings (``model=llama`` changes the name, the type and the sizes):
the axis stands for all of them, and the others are its followers. Runs that no ``sweep.json``
describes (a plain multirun, or runs of several sweeps) are told apart by their overrides and then
by the settings that differ.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from fisher_lab.results.values import ResultsError, column, hint, levels, meaning, same, where

SEED = "seed"
UNINTERESTING = ("cache_dir", "progress", "tracker", "hydra", "resume", "sweep", "launcher")
"""Settings that cannot change a result, with everything under them."""

GROUP_KEYS = {"kfac/kappa": "kfac.max_condition_number"}
"""Configuration groups that set a key of another name."""


@dataclass(frozen=True)
class Axes:
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


def find_axes(frame: pd.DataFrame) -> Axes:
    """The axes of a frame of runs.

    Args:
        frame: from :func:`fisher_lab.results.load`, or some of its rows.

    Returns:
        The swept settings in the order of the sweep file or command line, then settings that vary
        for another reason, and the seed last.
    """
    swept = _swept(frame)
    columns = {c: column(frame, c) for c in _settings(frame)}
    codes = {c: _codes(v) for c, v in columns.items() if v.nunique(dropna=False) > 1}
    varying = {c: code for c, code in codes.items() if max(code, default=0) > 0}
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
    return Axes({c: levels(columns[c]) for c in chosen}, followers)


def resolve(frame: pd.DataFrame, name: str) -> str:
    """The column that a name on the command line or in a claim stands for.

    Args:
        frame: of runs.
        name: a key (``kfac.damping``), a group (``kfac/policy``, ``model``) or ``seed``.

    Raises:
        ResultsError: there is no such setting.
    """
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
    keep = pd.Series(True, index=frame.index)
    for name, wanted in settings.items():
        options = wanted if isinstance(wanted, list | tuple) else [wanted]
        values = column(frame, resolve(frame, name))
        keep &= values.map(lambda value, options=options: any(same(value, o) for o in options))
    return where(frame, keep)


def setting_of(name: str, settings: Sequence[str]) -> str | None:
    """The key that a name on a command line or in a sweep file stands for; None: there is none."""
    dotted = name.lstrip("+").replace("/", ".")
    candidates = (name, GROUP_KEYS.get(name, name), dotted, f"{dotted}.name", f"{dotted}.enabled")
    return next((c for c in candidates if c in settings), None)


def _swept(frame: pd.DataFrame) -> list[str]:
    """Columns of the axes in ``sweep.json``, and of the overrides that differ between the runs."""
    settings = _settings(frame)
    names: list[str] = []
    for sweep in frame.attrs.get("sweeps", {}).values():
        names += sweep.axes
    typed: dict[str, set[str]] = {}
    for text in frame["overrides"]:
        for word in shlex.split(text or ""):
            key, sign, value = word.partition("=")
            if sign:
                typed.setdefault(key.lstrip("+~"), set()).add(value)
    names += [key for key, values in typed.items() if len(values) > 1]
    columns = [setting_of(name, settings) for name in names]
    return list(dict.fromkeys(c for c in columns if c is not None))


def _settings(frame: pd.DataFrame) -> list[str]:
    names: Sequence[str] = frame.attrs.get("config", [])
    return [n for n in names if n in frame and n.partition(".")[0] not in UNINTERESTING]


def key_of(value: Any) -> tuple[str, Any]:
    """What tells apart two values of a setting: their meaning and its type."""
    known = meaning(value)
    return (type(known).__name__, known)


def _codes(values: pd.Series) -> list[int]:
    """A number for each distinct value, in order of occurrence."""
    seen: dict[Any, int] = {}
    return [seen.setdefault(key_of(value), len(seen)) for value in values]


def _decides(leader: Sequence[int], other: Sequence[int]) -> bool:
    """Whether the value of one setting decides that of another."""
    decided: dict[int, int] = {}
    return all(decided.setdefault(a, b) == b for a, b in zip(leader, other, strict=True))
