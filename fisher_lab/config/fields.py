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
from operator import attrgetter
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
        text = f"{self.text} or {other.text}"
        return Allowed(text, lambda value: self.test(value) or other.test(value))


null = Allowed("null", lambda value: value is None)
"""``above(0) | null`` allows an optional value to be absent."""


def _number(text: str, test: Callable[[float], bool]) -> Allowed:
    return Allowed(text, lambda value: value is not None and math.isfinite(value) and test(value))


def above(low: float) -> Allowed:
    """A finite number greater than ``low``."""
    return _number(f"a finite number above {low:g}", lambda value: value > low)


def at_least(low: float) -> Allowed:
    """A finite number of at least ``low``."""
    return _number(f"a finite number of at least {low:g}", lambda value: value >= low)


factor = Allowed(
    "a factor of more than 1, such as x2",
    lambda value: bool(re.fullmatch(r"x\d+(\.\d+)?", str(value))) and float(value[1:]) > 1,
)


def whole(low: int, high: float = math.inf) -> Allowed:
    """A whole number of at least ``low`` and, where given, at most ``high``."""
    text = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
    return _number(f"a whole number {text}", lambda value: low <= value <= high)


def fraction(low: float = 0.0, high: float = 1.0) -> Allowed:
    """A number from ``low`` (included) up to ``high`` (left out)."""
    text = f"a number from {low:g} up to, but not including, {high:g}"
    return _number(text, lambda value: low <= value < high)


def one_of(*options: str) -> Allowed:
    """One of the given words."""
    return Allowed("one of " + ", ".join(options), lambda value: value in options)


def each_of(*options: str) -> Allowed:
    """A list of some of the given words, each at most once."""
    return Allowed(
        "a list of " + ", ".join(options),
        lambda value: len(set(value)) == len(value) and set(value) <= set(options),
    )


def each_above(low: float) -> Allowed:
    """A list of finite numbers greater than ``low``."""
    test = above(low).test
    return Allowed(f"a list of finite numbers above {low:g}", lambda value: all(map(test, value)))


def matching(pattern: str, text: str) -> Allowed:
    """Text that a regular expression matches as a whole; ``text`` says so in words."""
    return Allowed(text, lambda value: value is not None and bool(re.fullmatch(pattern, value)))


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


def section(kind: type) -> Any:
    """A dataclass field that holds another section of the schema."""
    return dataclasses.field(default_factory=kind)


Problems = Iterator[tuple[str, str]]
"""What the ``check()`` of a section yields: a key, relative to it, and what is allowed there."""


def problems(node: Any, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Everything in a section (and those inside it) that is out of range.

    A section may have a method ``check()``, for what concerns more than one key.

    Args:
        node: an instance of a dataclass of the schema.
        prefix: the full key of the section with a dot at its end, or nothing for the root.

    Yields:
        A key, the value that it has, and what is allowed.
    """
    for item in dataclasses.fields(node):
        value, allowed = getattr(node, item.name), item.metadata.get("allowed")
        if dataclasses.is_dataclass(value):
            yield from problems(value, f"{prefix}{item.name}.")
        elif allowed is not None and not allowed.test(value):
            yield f"{prefix}{item.name}", value, allowed.text
    for key, text in getattr(node, "check", tuple)():
        yield f"{prefix}{key}", attrgetter(key)(node), text
