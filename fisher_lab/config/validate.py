"""From a composed configuration to typed objects, or to one line that says what is wrong.

The resolved configuration goes through the schema once more, because OmegaConf lets
``+kfac.dampign=1`` pass. pydantic lacks what the errors here promise: it takes 1 for true and true
for 1, has no words for what a key may be, suggests no key, and doubles the time of ``--help``.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fisher_lab.config.errors import ConfigError, show
from fisher_lab.config.fields import Allowed, problems
from fisher_lab.config.schema import Config
from fisher_lab.config.spelling import did_you_mean

_TYPE_TEXT = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    types.NoneType: "null",
    list: "a list such as [a,b]",
    dict: "a mapping such as {a:1}",
}

Section = TypeVar("Section")


def _unless(given: Any, otherwise: Any) -> Any:
    """``${unless:${.damping},0.3}`` in a file of ``conf/``: null where another key is given."""
    return otherwise if given is None else None


OmegaConf.register_new_resolver("unless", _unless, replace=True)


def validate(cfg: DictConfig | Mapping[str, Any]) -> Config:
    """Merge a composed configuration into the schema and check every range.

    Args:
        cfg: the composed configuration; Hydra's own node ``hydra`` may be in it and is left out.

    Returns:
        The typed configuration.

    Raises:
        ConfigError: an unknown key, a wrong type, a missing value or one out of range. One line.
    """
    node = cfg if isinstance(cfg, DictConfig) else OmegaConf.create(dict(cfg))
    keys = [str(key) for key in node if key != "hydra"]
    try:
        plain = OmegaConf.to_container(
            OmegaConf.masked_copy(node, keys), resolve=True, throw_on_missing=True
        )
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "configuration"
        first = str(error).splitlines()[0]
        raise ConfigError(f"{key} has no value that can be used: {first}") from None
    return build(Config, typing.cast("dict[str, Any]", plain))


def build(section: type[Section], given: Mapping[str, Any], prefix: str = "") -> Section:
    """An instance of a section from plain values; what is not given keeps its default.

    Args:
        section: a dataclass of the schema.
        given: plain values.
        prefix: the full key of the section with a dot at its end, or nothing for the root.

    Raises:
        ConfigError: an unknown key, a value of another type than its field's, or one out of range.
    """
    check_keys(section, given, prefix)
    typed = _build(section, given, prefix)
    for key, value, allowed in problems(typed, prefix):
        raise ConfigError.value(key, value, allowed)
    return typed


def _build(section: type[Section], given: Mapping[str, Any], prefix: str) -> Section:
    values: dict[str, Any] = {}
    for name, value in given.items():
        field, key = fields_of(section)[name], f"{prefix}{name}"
        if field.section is not None:
            values[name] = _build(field.section, value, f"{key}.")
            continue
        try:
            values[name] = _convert(field.annotation, value)
        except (TypeError, ValueError):
            raise ConfigError.value(key, value, field.text) from None
        if field.allowed is not None and not field.allowed.test(values[name]):
            raise ConfigError.value(key, value, field.text)  # as it was given
    return section(**values)


def _convert(annotation: Any, value: Any) -> Any:
    """A value as the type of its field; text that comes from an environment variable is parsed.

    Raises:
        TypeError: a value that is not of the type, nor safely made one (7 is not true).
        ValueError: text that is no number.
    """
    kind = typing.get_origin(annotation) or annotation
    if kind in (types.UnionType, typing.Union):
        (inner,) = (part for part in typing.get_args(annotation) if part is not types.NoneType)
        return None if value is None else _convert(inner, value)
    if kind is bool and isinstance(value, str):
        value = {"true": True, "false": False}.get(value.lower(), value)
    if kind is list and isinstance(value, list):
        return [_convert(typing.get_args(annotation)[0], item) for item in value]
    if kind in (bool, dict) and isinstance(value, kind):
        return value
    refused = (bool, list, dict, types.NoneType, *([float] if kind is int else []))
    if kind in (bool, list, dict) or isinstance(value, refused):
        raise TypeError
    return show(value) if kind is str else kind(value)


# ---- keys ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Field:
    """What the schema knows of a key: its type and, where that does not say it all, its range."""

    annotation: Any
    allowed: Allowed | None

    @property
    def section(self) -> Any:
        """The dataclass of a key that is a section; None for a plain value."""
        return self.annotation if dataclasses.is_dataclass(self.annotation) else None

    @property
    def text(self) -> str:
        """What is allowed, in words."""
        return type_text(self.annotation) if self.allowed is None else self.allowed.text


@functools.cache
def fields_of(section: type) -> dict[str, Field]:
    """The fields of a section by name."""
    hints, items = typing.get_type_hints(section), dataclasses.fields(section)
    return {item.name: Field(hints[item.name], item.metadata.get("allowed")) for item in items}


@functools.cache
def find(key: str) -> Field | None:
    """The field of a key such as ``kfac.damping``, or None where the schema has no such key."""
    field = Field(Config, None)
    for part in key.split("."):
        found = fields_of(field.section).get(part) if field.section is not None else None
        if found is None:
            return None
        field = found
    return field


def all_keys(section: type = Config, prefix: str = "") -> Iterator[str]:
    """Every key of the schema, ``kfac.damping`` and so on."""
    for name, field in fields_of(section).items():
        if field.section is None:
            yield f"{prefix}{name}"
        else:
            yield from all_keys(field.section, f"{prefix}{name}.")


def type_text(annotation: Any) -> str:
    """A type annotation in words: ``float | None`` is ``a number or null``."""
    kind = typing.get_origin(annotation) or annotation
    if kind in (types.UnionType, typing.Union):
        return " or ".join(type_text(part) for part in typing.get_args(annotation))
    return _TYPE_TEXT.get(kind, "a value of the schema")


def check_keys(section: type, given: Any, prefix: str = "") -> None:
    """Check that only keys of a section are given, and a mapping where a section is.

    Args:
        section: a dataclass of the schema.
        given: what is given for it.
        prefix: as in :func:`build`.

    Raises:
        ConfigError: no mapping, or one with an unknown key.
    """
    fields = fields_of(section)
    if not isinstance(given, Mapping):
        names = list(fields)
        text = f"a section such as {{{names[0]}:...,{names[-1]}:...}}"
        raise ConfigError.value(prefix.removesuffix("."), given, text)
    for name, value in given.items():
        if name not in fields:
            raise unknown_key(f"{prefix}{name}", value, section)
        if fields[name].section is not None:
            check_keys(fields[name].section, value, f"{prefix}{name}.")


def unknown_key(key: str, value: Any, section: type | None = None) -> ConfigError:
    """The error for a key that nothing reads, with the nearest one that something does.

    Args:
        key: the full key.
        value: what was given for it.
        section: the section that lacks it; None: the one that the key names.
    """
    parent = key.rpartition(".")[0]
    if section is None:
        field = find(parent)
        section = field and field.section
    if section is None:
        section, parent = Config, ""
    own = all_keys(section, f"{parent}." if parent else "")
    keys = list(dict.fromkeys([*all_keys(), *own]))  # the second for sections beside `Config`
    by_leaf = {known.rsplit(".", 1)[-1]: known for known in reversed(keys)}
    hint = did_you_mean(key, keys, 0.75) or did_you_mean(key.rsplit(".", 1)[-1], by_leaf, 0.75)
    hint = hint or f"{parent or 'the top level'} has {', '.join(fields_of(section))}"
    return ConfigError(f"{key}={show(value)}: there is no key {key}; {hint}")
