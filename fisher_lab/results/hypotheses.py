"""What a claim may state: its types, their keys, and a one-line error for a wrong one.

A claim is a hypothesis with a verdict. The hypothesis is a mapping in a sweep file, under
``claims:``; ``docs/results.md`` lists the types.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fisher_lab.results.values import ResultsError, hint, label, meaning, same

if TYPE_CHECKING:
    import pandas as pd

COMMON = {"type", "text", "where", "by", "over", "alpha", "not"}


@dataclass(frozen=True)
class Keys:
    """The keys of a type of hypothesis.

    Attributes:
        required: keys that must be given.
        optional: keys that may be given.
        one_of: groups of keys of which exactly one must be given.
        any_of: groups of keys of which at least one must be given.
    """

    required: frozenset[str]
    optional: frozenset[str] = frozenset()
    one_of: tuple[tuple[str, ...], ...] = ()
    any_of: tuple[tuple[str, ...], ...] = ()

    @property
    def all(self) -> set[str]:
        """Every key that is allowed, the common ones included."""
        more = {name for group in (*self.one_of, *self.any_of) for name in group}
        return COMMON | self.required | self.optional | more


_RATIO = Keys(frozenset({"metric", "a", "b"}), frozenset({"at_least", "at_most"}))
TYPES: dict[str, Keys] = {
    "equivalent": Keys(frozenset({"metric", "groups"}), one_of=(("margin", "ratio"),)),
    "stable": Keys(
        frozenset({"metric", "axis"}),
        frozenset({"values", "from", "to", "at"}),
        (("factor", "margin"),),
    ),
    "faster": _RATIO,
    "smaller": _RATIO,
    "matches": Keys(
        frozenset({"metric", "tolerance"}), frozenset({"a", "relative"}), (("b", "value"),)
    ),
    "bounded": Keys(frozenset({"metric"}), any_of=(("at_most", "at_least"),)),
    "fails": Keys(frozenset({"cells"}), frozenset({"metric", "above", "below", "share"})),
    "share": Keys(frozenset({"metric"}), frozenset({"above"}), any_of=(("at_least", "at_most"),)),
}
"""Type -> its keys."""

POSITIVE = ("margin", "tolerance", "alpha")
ABOVE_ONE = ("ratio", "factor")
NUMBERS = ("at_least", "at_most", "value", "above", "below", "share", "from", "to")
MAPPINGS = ("where", "a", "b", "groups", "cells")
LISTS = ("by", "over", "values")


@dataclass(frozen=True)
class Hypothesis:
    """A hypothesis of a sweep file whose keys and values have been checked.

    Attributes:
        type: one of :data:`TYPES`.
        text: what the paper says, in words.
        options: its other keys; numbers as numbers.
        stated: the mapping as the sweep file has it.
    """

    type: str
    text: str
    options: dict[str, Any] = field(default_factory=dict)
    stated: dict[str, Any] = field(default_factory=dict)

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a key."""
        value = self.options.get(name)
        return default if value is None else value

    @property
    def metric(self) -> str:
        """The metric, or an empty text where the hypothesis is about none."""
        return self.get("metric", "")

    @property
    def alpha(self) -> float:
        """The level of its tests."""
        return self.get("alpha", 0.05)


def check(claims: Iterable[Any]) -> list[Hypothesis]:
    """The hypotheses of a sweep file.

    Args:
        claims: mappings.

    Raises:
        ResultsError: one is wrong; the text is one line about the first such.
    """
    return [parse(claim, number) for number, claim in enumerate(claims, 1)]


def parse(claim: Any, number: int = 1) -> Hypothesis:
    """One hypothesis.

    Args:
        claim: a mapping.
        number: its place in the file, for the message.

    Raises:
        ResultsError: it is wrong; the text is one line.
    """
    name = f"claim {number}"
    if not isinstance(claim, Mapping):
        raise ResultsError(f"{name} is not a mapping with a type")
    kind = str(claim.get("type"))
    if kind not in TYPES:
        raise ResultsError(f"{name}: type={kind} is not allowed: one of {', '.join(TYPES)}")
    _check_keys(f"{name} ({kind})", TYPES[kind], claim)
    options = {
        str(k): _option(name, str(k), v) for k, v in claim.items() if k not in ("type", "text")
    }
    _check_together(name, kind, options)
    text = str(claim.get("text") or f"{kind} {claim.get('metric', '')}".strip())
    return Hypothesis(kind, text, options, dict(claim))


def _check_keys(name: str, keys: Keys, claim: Mapping[str, Any]) -> None:
    for key in claim:
        if key not in keys.all:
            raise ResultsError(f"{name}: there is no key {key}{hint(str(key), keys.all)}")
    given = {key for key, value in claim.items() if value is not None}
    for key in sorted(keys.required - given):
        raise ResultsError(f"{name}: {key} is missing")
    for group in keys.one_of:
        if len(given & set(group)) != 1:
            raise ResultsError(f"{name}: give exactly one of {' and '.join(group)}")
    for group in keys.any_of:
        if not given & set(group):
            raise ResultsError(f"{name}: give one of {' and '.join(group)}")


def _option(name: str, key: str, value: Any) -> Any:
    if value is None:
        return None
    if key in (*POSITIVE, *ABOVE_ONE, *NUMBERS):
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
    number = meaning(value)
    if not isinstance(number, float) or abs(number) == float("inf"):
        raise ResultsError(f"{name}: {key}={value} is not a number")
    if key in POSITIVE and number <= 0:
        raise ResultsError(f"{name}: {key}={value} is not allowed: above 0")
    if key in ABOVE_ONE and number <= 1:
        raise ResultsError(f"{name}: {key}={value} is not allowed: above 1")
    if (key == "alpha" and number >= 0.5) or (key == "share" and not 0 <= number < 1):
        raise ResultsError(f"{name}: {key}={value} is not allowed")
    return number


def _check_together(name: str, kind: str, options: Mapping[str, Any]) -> None:
    """Check the rules that concern several keys."""
    if kind == "equivalent":
        groups = options["groups"]
        values = next(iter(groups.values()))
        if len(groups) != 1 or not isinstance(values, list | tuple) or len(values) < 2:
            raise ResultsError(f"{name}: groups must be one setting with two values or more")
    if kind in ("faster", "smaller"):
        low, high = options.get("at_least") or 1.0, options.get("at_most")
        if low <= 0 or (high is not None and high <= low):
            raise ResultsError(f"{name}: at_least must be above 0 and below at_most")
    if kind == "matches" and ("b" in options) != ("a" in options):
        raise ResultsError(f"{name}: give a and b, or value alone")
    if kind == "stable" and options.get("at") is not None:
        at, values = options["at"], options.get("values")
        if values and not any(same(at, value) for value in values):
            raise ResultsError(f"{name}: at={label(at)} is not among its values")
    if kind == "fails" and options.get("metric") is None:
        for key in ("above", "below"):
            if options.get(key) is not None:
                raise ResultsError(f"{name}: {key} needs a metric")
    low, high = options.get("at_least"), options.get("at_most")
    if low is not None and high is not None and low > high:
        raise ResultsError(f"{name}: at_least must not be above at_most")


def claimed_metrics(frame: pd.DataFrame) -> list[str]:
    """The metrics that the claims of some sweeps are about; a table shows these first."""
    stated = [c for sweep in frame.attrs.get("sweeps", {}).values() for c in sweep.claims]
    names = [c.get("metric") for c in stated if isinstance(c, dict)]
    return list(dict.fromkeys(name for name in names if isinstance(name, str)))
