"""Fields of the schema: a default, what it means, and what is allowed, in one place.

``setting(1e-4, "...", above(0))`` is a dataclass field whose metadata hold the help text and the
:class:`Allowed` test. Validation and ``docs/configuration.md`` both read them.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Allowed:
    """What a value may be.

    Attributes:
        text: completes the sentence "must be ...".
        test: true for a value of the field's type that is allowed.
    """

    text: str
    test: Callable[[Any], bool]

    def __or__(self, other: Allowed) -> Allowed:
        """Either of the two."""
        return Allowed(
            f"{self.text} or {other.text}",
            lambda value: self.test(value) or other.test(value),
        )


null = Allowed("null", lambda value: value is None)
"""``above(0) | null`` allows an optional value to be absent."""


def _number(text: str, test: Callable[[float], bool]) -> Allowed:
    def allowed(value: Any) -> bool:
        return value is not None and math.isfinite(value) and test(value)

    return Allowed(text, allowed)


def above(low: float) -> Allowed:
    """A finite number greater than ``low``."""
    return _number(f"a finite number above {low:g}", lambda value: value > low)


def at_least(low: float) -> Allowed:
    """A finite number of at least ``low``."""
    return _number(f"a finite number of at least {low:g}", lambda value: value >= low)


def whole(low: int, high: int | None = None) -> Allowed:
    """A whole number of at least ``low`` and, where given, at most ``high``."""
    if high is None:
        return _number(f"a whole number of at least {low}", lambda value: value >= low)
    return _number(f"a whole number from {low} to {high}", lambda value: low <= value <= high)


def fraction(low: float = 0.0, high: float = 1.0) -> Allowed:
    """A number from ``low`` (included) up to ``high`` (left out)."""
    return _number(
        f"a number from {low:g} up to, but not including, {high:g}",
        lambda value: low <= value < high,
    )


def one_of(*options: str) -> Allowed:
    """One of the given words."""
    return Allowed("one of " + ", ".join(options), lambda value: value in options)


def each_of(*options: str) -> Allowed:
    """A list of some of the given words, each at most once."""
    return Allowed(
        "a list of " + ", ".join(options),
        lambda value: len(set(value)) == len(value) and set(value) <= set(options),
    )


def name_like() -> Allowed:
    """A name of letters, digits and ``._-``, as services take it for a project."""
    return Allowed(
        "letters, digits, '.', '_' and '-', at most 128",
        lambda value: re.fullmatch(r"[A-Za-z0-9._-]{1,128}", value) is not None,
    )


def setting(default: Any, meaning: str, allowed: Allowed | None = None) -> Any:
    """A dataclass field with its meaning and what it may be.

    Args:
        default: the default; a list or a dict is copied for every instance.
        meaning: one sentence, shown in the documentation.
        allowed: what is allowed beyond the type, or None where the type says it all.
    """
    metadata = {"meaning": meaning, "allowed": allowed}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def section(kind: type, meaning: str = "") -> Any:
    """A dataclass field that holds another section of the schema."""
    return dataclasses.field(default_factory=kind, metadata={"meaning": meaning, "allowed": None})


Problem = tuple[str, Any, str]
"""A key, the value that it has, and what is allowed."""


def problems(node: Any, prefix: str = "") -> Iterator[Problem]:
    """Everything in a section (and those inside it) that is out of range.

    A section may have a method ``check()`` that yields further problems, for what concerns more
    than one key; the keys that it yields are relative to the section.

    Args:
        node: an instance of a dataclass of the schema.
        prefix: the full key of the section with a dot at its end, or nothing for the root.
    """
    for item in dataclasses.fields(node):
        value = getattr(node, item.name)
        if dataclasses.is_dataclass(value):
            yield from problems(value, f"{prefix}{item.name}.")
            continue
        allowed: Allowed | None = item.metadata.get("allowed")
        if allowed is not None and not allowed.test(value):
            yield f"{prefix}{item.name}", value, allowed.text
    check = getattr(node, "check", None)
    if check is not None:
        for key, value, text in check():
            yield f"{prefix}{key}", value, text
