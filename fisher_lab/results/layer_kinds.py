"""Many layers as few kinds: by their names without numbers, by the ends of these, by type."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

INDEX = re.compile(r"(?<![^.\[])\d+(?![^.\]])")
"""A part of a name that is a number: of a block, an expert, an item of a list."""

Row = Mapping[str, Any]


def grouped(rows: Sequence[Row], most: int) -> dict[str, list[Row]]:
    """Name of a kind -> its layers; each layer is a kind of its own where there are few.

    Args:
        rows: with the key ``name`` and, where it is known, ``type``.
        most: kinds that are wanted at most; more only if there are more types.
    """
    groups: dict[str, list[Row]] = {}
    for names in _kinds(rows):
        groups = {}
        for name, row in zip(names, rows, strict=True):
            groups.setdefault(name, []).append(row)
        if len(groups) <= most:
            break
    return groups


def _kinds(rows: Sequence[Row]) -> Iterator[list[str]]:
    names = [str(row["name"]) for row in rows]
    yield names
    starred = [INDEX.sub("*", name) for name in names]
    yield starred
    yield [f"*.{last}" if path else last for path, _, last in (n.rpartition(".") for n in starred)]
    yield [f"all of type {row.get('type') or 'layer'}" for row in rows]
