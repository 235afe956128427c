"""``fisher-lab explain``: what a metric, a column or a setting means."""

from __future__ import annotations

import argparse
import dataclasses
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from fisher_lab.config.errors import ConfigError, show
from fisher_lab.config.schema import Config
from fisher_lab.config.spelling import did_you_mean
from fisher_lab.config.validate import fields_of
from fisher_lab.results import labels
from fisher_lab.results.labels import HIGHER, LOWER, Entry

SECTIONS = {
    1: "Tokens, losses, scales", 2: "Damping, clipping, inverse, powers",
    3: "Woodbury on the G side", 4: "Policies", 5: "True Fisher of the head", 6: "EKFAC",
    7: "Several ranks", 8: "Spectra", 9: "Group Fisher", 10: "Steps", 11: "The ladder",
}  # fmt: skip
"""Of docs/math.md."""

WIDTH = 80


def explain_command(arguments: Sequence[str]) -> int:
    """Print what some names mean; without a name, all metrics with their words.

    Raises:
        ConfigError: a name that nobody knows.
        LabelError: the user's own entries cannot be read.
    """
    parser = argparse.ArgumentParser(
        "fisher-lab explain", description="What a metric, a column or a setting means."
    )

    def fail(message: str) -> NoReturn:
        raise ConfigError(f"{message}; {parser.prog} --help shows what is allowed")

    parser.error = fail
    parser.add_argument("names", nargs="*", help="such as ng/cosine, kappa_A or kfac.damping")
    names = parser.parse_args(list(arguments)).names
    print("\n\n".join([_about(name) for name in names] or ["\n".join(_all())]))
    return 0


def _all() -> Iterator[str]:
    """Every metric with its words, by section."""
    group = ""
    for key, entry in labels.catalogue().metrics.items():
        if entry.group != group:
            yield ("\n" if group else "") + entry.group
            group = entry.group
        yield f"  {key:<34} {entry.label}"


def _about(name: str) -> str:
    """The entry of a name, in lines.

    Raises:
        ConfigError: there is none.
    """
    catalogue = labels.catalogue()
    known = catalogue.find(name)
    if known is not None:
        return "\n".join(_lines(known, "metric"))
    for file, columns in catalogue.columns.items():
        if name in columns:
            return "\n".join(_lines(columns[name], f"column of {file}"))
    setting = _setting(name)
    if setting is not None:
        return "\n".join(setting)
    names = [
        *catalogue.metrics,
        *catalogue.settings,
        *(c for f in catalogue.columns.values() for c in f),
    ]
    near = did_you_mean(name, names) or "fisher-lab explain lists all metrics"
    raise ConfigError(f"{name}: there is no such metric, column or setting; {near}")


def _lines(entry: Entry, what: str) -> Iterator[str]:
    yield f"{entry.key}: {entry.label}"
    unit = "MiB on the screen, bytes in the file" if entry.format == "mib" else entry.unit
    better: dict[object, str] = {
        None: "none: no value is better than another",
        LOWER: "lower is better",
        HIGHER: "higher is better",
    }
    rows = {
        "what": what,
        "symbol": entry.symbol,
        "formula": entry.formula,
        "unit": unit or "none",
        "direction": better.get(entry.better, f"{entry.better} is best"),
        "not comparable with": entry.note,
        "docs/math.md": _section(entry.section),
    }
    for name, text in rows.items():
        if text:
            yield _row(name, text)


def _section(number: int | None) -> str:
    return "" if number is None else f"section {number}, {SECTIONS[number]}"


def _row(name: str, text: str) -> str:
    return textwrap.fill(f"  {name:<20} {text}", WIDTH, subsequent_indent=" " * 23)


def _setting(key: str) -> list[str] | None:
    """What the schema says of a key; None where it has no such key."""
    node: Any = Config()
    *path, last = key.replace("/", ".").split(".")
    for part in path:
        node = getattr(node, part, None)
    if not dataclasses.is_dataclass(node) or isinstance(node, type):
        return None
    field = fields_of(type(node)).get(last)
    if field is None or field.section is not None:
        return None
    item = next(item for item in dataclasses.fields(node) if item.name == last)
    entry = labels.setting(key)
    rows = {
        "what": "setting",
        "symbol": entry.symbol,
        "meaning": item.metadata["meaning"],
        "must be": field.text,
        "default": show(getattr(node, last)),
        "docs/math.md": _section(entry.section),
    }
    return [f"{key}: {entry.label}", *(_row(name, text) for name, text in rows.items() if text)]
