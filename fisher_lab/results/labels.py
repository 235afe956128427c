"""Names for people: the label, unit, direction and section of every metric, column and setting.

``labels.yaml`` beside this module has the entries. Those of :data:`OWN_FILE` in the working
directory are written alike and come on top. What has no entry is called by its key, and no value of
it is better than another. Screens, tables, figures, the report and the trackers ask here; files
keep the keys.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fisher_lab.config.spelling import did_you_mean

OWN_FILE = "fisher_lab_labels.yaml"
LOWER, HIGHER = "lower", "higher"
ENDS = {
    "_se": "standard error of the {}",
    "_bracket_low": "{}, left open by Lanczos, from",
    "_bracket_high": "{}, left open by Lanczos, to",
    "_low": "{}, lower end of the interval",
    "_high": "{}, upper end of the interval",
}
"""What follows the name of a number in the names of its error, interval and bracket."""


class LabelError(ValueError):
    """The user's own entries cannot be read; the text is one line."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What people read of a metric, a column or a setting; the file's head describes the fields."""

    key: str
    label: str
    name: str = ""
    symbol: str = ""
    unit: str = ""
    better: str | float | None = None
    format: str = "g"
    section: int | None = None
    formula: str = ""
    note: str = ""
    main: bool = False
    group: str = ""

    @property
    def short(self) -> str:
        """Words for narrow places: the name, or the label."""
        return self.name or self.label

    @property
    def arrow(self) -> str:
        """``↓`` or ``↑``, ``→ 1`` for a target; empty where no value is better than another."""
        if isinstance(self.better, str):
            return {LOWER: "↓", HIGHER: "↑"}[self.better]
        return "" if self.better is None else f"→ {self.better:g}"

    @property
    def with_unit(self) -> str:
        """The label with the unit in brackets, as an axis has it."""
        return f"{self.label} ({self.unit})" if self.unit else self.label

    @property
    def with_symbol(self) -> str:
        """The words for narrow places with the symbol, as a setting's axis has them."""
        return f"{self.short} {self.symbol}".rstrip()

    @property
    def heading(self) -> str:
        """The words for narrow places with unit and arrow, as a table's column has them."""
        return self._heading(self.short)

    @property
    def long_heading(self) -> str:
        """The heading with the symbol, where the words do not have it."""
        symbol = "" if self.symbol in self.short else self.symbol.replace(" ", "\u00a0")
        return self._heading(f"{self.short} {symbol}".rstrip())

    def _heading(self, words: str) -> str:
        return f"{words}{f' ({self.unit})' if self.unit else ''} {self.arrow}".rstrip()

    def text(self, value: Any) -> str:
        """A value as a screen shows it."""
        return number(value, self.format)


FIELDS = {item.name: item for item in dataclasses.fields(Entry)}
GIVEN = tuple(name for name in FIELDS if name not in ("key", "group"))
PARTS = ("words", "metrics", "columns", "settings")


@dataclass
class Catalogue:
    """All entries.

    Attributes:
        words: placeholder of a metric's name -> what stands there -> its words.
        metrics: key, or key with placeholders, -> entry; in the order of the screen.
        columns: file -> column -> entry.
        settings: key -> entry.
    """

    words: dict[str, dict[str, str]] = field(default_factory=dict)
    metrics: dict[str, Entry] = field(default_factory=dict)
    columns: dict[str, dict[str, Entry]] = field(default_factory=dict)
    settings: dict[str, Entry] = field(default_factory=dict)

    def take(self, about: Any, source: str) -> None:
        """Add what a file says; later entries replace earlier ones.

        Raises:
            LabelError: it says something that is no entry.
        """
        parts = _mapping(about or {}, source, PARTS)
        for place, words in _mapping(parts.get("words") or {}, f"{source}: words").items():
            known = self.words.setdefault(place, {})
            known |= {str(k): str(v) for k, v in _mapping(words, f"{source}: {place}").items()}
        for group, own in _mapping(parts.get("metrics") or {}, f"{source}: metrics").items():
            self.metrics |= _entries(own, f"{source}: metrics: {group}", group)
        for file, own in _mapping(parts.get("columns") or {}, f"{source}: columns").items():
            self.columns.setdefault(file, {}).update(_entries(own, f"{source}: {file}", file))
        self.settings |= _entries(parts.get("settings") or {}, f"{source}: settings", "")

    @functools.cached_property
    def families(self) -> list[tuple[re.Pattern[str], Entry]]:
        """The entries with placeholders, as patterns of names."""
        found = []
        for key, entry in self.metrics.items():
            if "{" in key:
                parts = re.split(r"\{(\w+)\}", key)
                parts[::2] = map(re.escape, parts[::2])
                parts[1::2] = [f"(?P<{name}>[^/]+)" for name in parts[1::2]]
                found.append((re.compile("".join(parts)), entry))
        return found

    def find(self, name: str) -> Entry | None:
        """The entry of a metric, made of a family's where it is of one; None: there is none."""
        if name in self.metrics and "{" not in name:
            return self.metrics[name]
        for pattern, entry in self.families:
            if match := pattern.fullmatch(name):
                return self._of_family(entry, name, match.groupdict())
        for end, words in ENDS.items():
            own = self.find(name.removesuffix(end)) if name.endswith(end) else None
            if own is not None:
                return dataclasses.replace(
                    own, key=name, label=words.format(own.label), name="", symbol="", better=None,
                    main=False,
                )  # fmt: skip
        return None

    def key_of(self, name: str) -> str | None:
        """The key of a metric's own entry, or of the family that it is of."""
        if name in self.metrics:
            return name
        return next((e.key for pattern, e in self.families if pattern.fullmatch(name)), None)

    def _of_family(self, entry: Entry, name: str, found: Mapping[str, str]) -> Entry:
        words = {place: self.words.get(place, {}).get(v, v) for place, v in found.items()}
        label, short = (text.format_map(words) for text in (entry.label, entry.name))
        return dataclasses.replace(entry, key=name, label=label, name=short)


def _mapping(about: Any, where: str, allowed: Iterable[str] = ()) -> dict[str, Any]:
    """A mapping of texts, with known keys alone where ``allowed`` names some.

    Raises:
        LabelError: it is none, or has another key.
    """
    if not isinstance(about, dict):
        raise LabelError(f"{where}: {about!r} is not allowed: a mapping")
    known = tuple(allowed)
    for key in map(str, about) if known else ():
        if key not in known:
            near = did_you_mean(key, known) or f"there are {', '.join(known)}"
            raise LabelError(f"{where}: {key} is not known; {near}")
    return {str(key): value for key, value in about.items()}


def _entries(about: Any, where: str, group: str) -> dict[str, Entry]:
    found = {}
    for key, given in _mapping(about, where).items():
        fields = _mapping(given, f"{where}: {key}", GIVEN)
        for name, value in fields.items():
            fields[name] = str(value) if FIELDS[name].type == "str" else value
        better, section = fields.get("better"), fields.get("section")
        if better not in (None, LOWER, HIGHER) and not _is_number(better):
            raise LabelError(f"{where}: {key}: better={better} is not allowed: lower, higher or 0")
        if not fields.get("label"):
            raise LabelError(f"{where}: {key}: there is no label")
        if section is not None and not isinstance(section, int):
            raise LabelError(f"{where}: {key}: section={section} is not allowed: a whole number")
        try:
            number(1.0, fields.get("format", "g"))
        except ValueError:
            raise LabelError(
                f"{where}: {key}: format={fields['format']} is not allowed: g, d, s, mib or one of "
                "Python such as .3f"
            ) from None
        found[key] = Entry(key=key, group=group, **fields)
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def catalogue() -> Catalogue:
    """All entries, with those of the working directory.

    Raises:
        LabelError: the user's own file cannot be read.
    """
    own = Path(OWN_FILE)
    stamp = own.stat().st_mtime_ns if own.is_file() else None
    return _read(str(own.absolute()) if stamp is not None else "", stamp)


@functools.lru_cache(maxsize=8)
def _read(own: str, stamp: int | None) -> Catalogue:
    found = Catalogue()
    for file, source in ((Path(__file__).with_suffix(".yaml"), "labels.yaml"), (own, OWN_FILE)):
        if file:
            found.take(_yaml(Path(file), source), source)
    return found


def _yaml(file: Path, source: str) -> Any:
    import yaml

    try:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        return yaml.load(file.read_text(encoding="utf-8"), loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise LabelError(f"{source}: {' '.join(str(error).split())}") from error


def metric(name: str) -> Entry:
    """The entry of a metric; one that has its key alone where there is none."""
    return catalogue().find(name) or Entry(key=name, label=name)


def setting(key: str) -> Entry:
    """The entry of a setting; one that has its key alone where there is none."""
    return catalogue().settings.get(key) or Entry(key=key, label=key, name=key.rpartition(".")[2])


def column(file: str, name: str) -> Entry:
    """The entry of a column of a table of a run; one that has its name alone if there is none."""
    return catalogue().columns.get(file, {}).get(name) or Entry(key=name, label=name)


def words(place: str, value: str) -> str:
    """The words of a part of a metric's name, such as a ``direction``."""
    return catalogue().words.get(place, {}).get(value, value)


_KEY = re.compile(r"(?<![\w/.~-])[A-Za-z]\w*(?:[/.]\w+)+(?![\w/])")


def in_words(text: str) -> str:
    """A text with the keys of settings and metrics in it replaced by their words."""
    known = catalogue()

    def named(found: re.Match[str]) -> str:
        if setting := known.settings.get(found[0]):
            return setting.short
        entry = known.find(found[0])
        return entry.label if entry else found[0]

    return _KEY.sub(named, text)


def lower_is_better(value: float, better: str | float) -> float:
    """A number that is the lower the better a value is: of a target the distance to it."""
    if isinstance(better, str):
        return -value if better == HIGHER else value
    return abs(value - better)


def number(value: Any, form: str) -> str:
    """A value as it stands in a table: ``g`` is four digits, ``mib`` bytes in MiB."""
    if value is None or value == "" or value != value:
        return "-"
    if isinstance(value, bool | str) or form == "s":
        return str(value)
    if form == "mib":
        return f"{value / 2**20:.2f}"
    if form == "d":
        return f"{round(value):,}"
    return format(value, ".4g" if form == "g" else form)
