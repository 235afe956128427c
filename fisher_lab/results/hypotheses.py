"""What a claim may state.

A claim is a hypothesis with a verdict. The hypothesis is a mapping in a sweep file, under
``claims:``; ``docs/results.md`` lists the types. :mod:`fisher_lab.results.comparisons` finds the
runs that it is about, and :mod:`fisher_lab.results.claims` makes the verdict.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from fisher_lab.results.sequential import Design
from fisher_lab.results.values import ResultsError, hint, label, parse_value, same

if TYPE_CHECKING:
    import pandas as pd

CHECKPOINT = "model.train_seed"
"""The setting that draws the checkpoint of a run; ``seed`` draws all else."""

HOLDS, FAILS, OPEN = "holds", "does not hold", "inconclusive"

COMMON = ("type", "name", "text", "where", "by", "over", "alpha", "not", "design")

NAME = r"(?=.*[A-Za-z])[A-Za-z0-9-]+"
"""What a claim may be called in an appendix; its place in the sweep file is the number."""

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
        design: how it is tested while its seeds are run; the level of every test is its.
    """

    type: str
    text: str
    options: dict[str, Any] = field(default_factory=dict)
    stated: dict[str, Any] = field(default_factory=dict)
    design: Design = field(default_factory=Design)

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
        return self.design.alpha


def parse(claim: Any, number: int = 1, design: Any = None) -> Hypothesis:
    """The hypothesis of a mapping in a sweep file.

    Args:
        claim: the mapping.
        number: its place among the claims of the file.
        design: that of all claims of the file, which a claim's own takes precedence over.

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
    if not re.fullmatch(NAME, str(claim.get("name") or "a")):
        words = "letters, digits and hyphens, not a number alone"
        raise ResultsError(f"{name}: name={claim['name']} is not allowed: {words}")
    options = {
        str(key): _option(name, str(key), value)
        for key, value in claim.items()
        if key not in ("type", "name", "text", "design") and value is not None
    }
    _check_together(name, kind, options)
    text = text_of(claim)
    designed = _design(name, options.get("alpha"), design or {}, claim.get("design") or {})
    return Hypothesis(kind, text, options, dict(claim), designed)


def text_of(claim: Mapping[str, Any]) -> str:
    """What the paper says of a claim, in words; its type and metric where the file has none."""
    return str(claim.get("text") or f"{claim.get('type')} {claim.get('metric', '')}".strip())


def _design(name: str, alpha: float | None, *given: Any) -> Design:
    """The design of a claim: what the sweep says, what the claim says, and its level."""
    numbers: dict[str, float] = {}
    allowed: dict[str, Any] = {one.name: type(one.default) for one in fields(Design)}
    for mapping in given:
        if not isinstance(mapping, Mapping):
            words = "a mapping such as {first: 5, max_seeds: 30}"
            raise ResultsError(f"{name}: design={mapping} is not allowed: {words}")
        for key, value in mapping.items():
            if key not in allowed:
                raise ResultsError(f"{name}: a design has no key {key}{hint(str(key), allowed)}")
            number = _number(f"{name}: design", str(key), value)
            if allowed[key] is int and not number.is_integer():
                raise ResultsError(f"{name}: design: {key}={value} is not a whole number")
            numbers[key] = allowed[key](number)
    if alpha is not None and "alpha" in given[-1]:
        raise ResultsError(f"{name}: alpha is given twice: in its design and beside it")
    try:
        return Design(**{**numbers, **({} if alpha is None else {"alpha": alpha})})  # pyright: ignore[reportArgumentType]
    except ValueError as error:
        raise ResultsError(f"{name}: design: {error}") from None


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
    elif kind in ("fails", "share") and CHECKPOINT in options.get("over", ()):
        wrong = f"a share over {CHECKPOINT} counts runs of one checkpoint as if each had its own"
    if wrong:
        raise ResultsError(f"{name}: {wrong}")


def claimed_metrics(frame: pd.DataFrame) -> list[str]:
    """The metrics that the claims of some sweeps are about; a table shows these first."""
    stated = [c for sweep in frame.attrs.get("sweeps", {}).values() for c in sweep.claims]
    names = [c.get("metric") for c in stated if isinstance(c, dict)]
    return list(dict.fromkeys(name for name in names if isinstance(name, str)))
