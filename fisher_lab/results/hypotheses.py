"""What a claim may say: types, keys, and one line for what is wrong with one.

A claim is a mapping in a sweep file, under ``claims:``; ``docs/results.md`` lists the types.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fisher_lab.results.values import ResultsError, label, meaning, same

COMMON = {"type", "text", "where", "by", "over", "alpha", "not"}


@dataclass(frozen=True)
class Keys:
    """What a type of claim asks for.

    Attributes:
        required: keys that have to be there.
        optional: keys that may be.
        one_of: of each of these groups exactly one.
        any_of: of each of these groups at least one.
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
class Claim:
    """A claim that was checked.

    Attributes:
        type: one of :data:`TYPES`.
        text: what the paper says, in words.
        options: its other keys; numbers as numbers.
        stated: the claim as the sweep file has it.
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
        """The metric, or an empty text where the claim is about none."""
        return self.get("metric", "")

    @property
    def alpha(self) -> float:
        """The level of its tests."""
        return self.get("alpha", 0.05)


def check(claims: Iterable[Any]) -> list[Claim]:
    """Claims of a sweep file, checked.

    Args:
        claims: mappings.

    Raises:
        ResultsError: the first one that is not as it should be, in one line.
    """
    return [parse(claim, number) for number, claim in enumerate(claims, 1)]


def parse(claim: Any, number: int = 1) -> Claim:
    """One claim.

    Args:
        claim: a mapping.
        number: its place in the file, for the message.

    Raises:
        ResultsError: it is not as it should be, in one line.
    """
    name = f"claim {number}"
    if not isinstance(claim, Mapping):
        raise ResultsError(f"{name} is not a mapping with a type")
    kind = claim.get("type")
    if kind not in TYPES:
        raise ResultsError(f"{name}: type={kind} is not allowed: one of {', '.join(TYPES)}")
    keys = TYPES[str(kind)]
    for key in claim:
        if key not in keys.all:
            near = difflib.get_close_matches(str(key), keys.all, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ResultsError(f"{name} ({kind}): there is no key {key}{hint}")
    there = {key for key, value in claim.items() if value is not None}
    for key in sorted(keys.required - there):
        raise ResultsError(f"{name} ({kind}): {key} is missing")
    for group in keys.one_of:
        if len(there & set(group)) != 1:
            raise ResultsError(f"{name} ({kind}): give exactly one of {' and '.join(group)}")
    for group in keys.any_of:
        if not there & set(group):
            raise ResultsError(f"{name} ({kind}): give one of {' and '.join(group)}")
    options = {
        str(k): _option(name, str(k), v) for k, v in claim.items() if k not in ("type", "text")
    }
    _shape(name, str(kind), options)
    text = str(claim.get("text") or f"{kind} {claim.get('metric', '')}".strip())
    return Claim(str(kind), text, options, dict(claim))


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


def _shape(name: str, kind: str, options: Mapping[str, Any]) -> None:
    """Rules that concern several keys."""
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
