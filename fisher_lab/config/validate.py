"""From a composed configuration to typed objects, or to one line that says what is wrong.

OmegaConf lets ``+kfac.dampign=1`` pass: here the resolved configuration goes through the schema
once more, so that no key is accepted that nothing reads.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fisher_lab.config.errors import ConfigError, show
from fisher_lab.config.fields import Allowed, problems
from fisher_lab.config.schema import Config

_TYPE_TEXT = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
}


def validate(cfg: DictConfig | Mapping[str, Any]) -> Config:
    """Merge a composed configuration into the schema and check every range.

    Args:
        cfg: the composed configuration; Hydra's own node ``hydra`` may be in it and is left out.

    Returns:
        The typed configuration.

    Raises:
        ConfigError: an unknown key, a wrong type, a missing value or one out of range. One line.
    """
    return validate_plain(_resolved(cfg))


def validate_plain(given: Mapping[str, Any]) -> Config:
    """As :func:`validate`, for plain values in which nothing is left to be resolved.

    Raises:
        ConfigError: an unknown key, a wrong type or a value out of range. One line.
    """
    _check_keys(given)
    typed = build(Config, given)
    for key, value, allowed in problems(typed):
        raise ConfigError.value(key, _at(given, key, value), allowed)
    return typed


def _resolved(cfg: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
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
    return typing.cast("dict[str, Any]", plain)


Section = TypeVar("Section")


def build(section: type[Section], given: Mapping[str, Any], prefix: str = "") -> Section:
    """An instance of a section from plain values; what is not given keeps its default.

    Args:
        section: a dataclass of the schema.
        given: plain values; every key is one of the section's.
        prefix: the full key of the section with a dot at its end, or nothing for the root.

    Raises:
        ConfigError: a value of another type than its field's.
    """
    values = {}
    for name, value in given.items():
        annotation = _hints(section)[name]
        inner = section_type(annotation)
        if inner is not None:
            values[name] = build(inner, value, f"{prefix}{name}.")
            continue
        try:
            values[name] = _convert(annotation, value)
        except (TypeError, ValueError):
            raise ConfigError.value(f"{prefix}{name}", value, _text(section, name)) from None
    return section(**values)


def _text(section: type, name: str) -> str:
    """What a field of a section allows, in words."""
    (item,) = (item for item in dataclasses.fields(section) if item.name == name)
    allowed: Allowed | None = item.metadata.get("allowed")
    return allowed.text if allowed is not None else type_text(_hints(section)[name])


def _convert(annotation: Any, value: Any) -> Any:
    """A value as the type of its field; text that comes from an environment variable is parsed.

    Raises:
        TypeError: a value that is not of the type, nor safely made one (7 is not true).
        ValueError: text that is no number.
    """
    if _is_union(annotation):
        optional, (inner,) = _optional(annotation)
        return None if value is None and optional else _convert(inner, value)
    if typing.get_origin(annotation) is list:
        if not isinstance(value, list):
            raise TypeError
        (inner,) = typing.get_args(annotation)
        return [_convert(inner, item) for item in value]
    if typing.get_origin(annotation) is dict:
        return dict(value)
    if annotation is bool:
        words = {"true": True, "false": False}
        if isinstance(value, str) and value.lower() in words:
            return words[value.lower()]
        if isinstance(value, bool):
            return value
        raise TypeError
    if value is None or isinstance(value, bool | list | dict):
        raise TypeError
    if annotation is int and isinstance(value, float):
        raise TypeError
    if annotation is str:
        return show(value)
    return annotation(value)


def _is_union(annotation: Any) -> bool:
    return isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union


def _optional(annotation: Any) -> tuple[bool, list[Any]]:
    parts = typing.get_args(annotation)
    return type(None) in parts, [part for part in parts if part is not type(None)]


def section_type(annotation: Any) -> type | None:
    """The dataclass that a type annotation stands for, or None for a plain value."""
    if dataclasses.is_dataclass(annotation):
        return typing.cast(type, annotation)
    return None


@functools.cache
def _hints(section: type) -> dict[str, Any]:
    return typing.get_type_hints(section)


def _check_keys(given: Mapping[str, Any], section: type = Config, prefix: str = "") -> None:
    hints = _hints(section)
    for name, value in given.items():
        key = f"{prefix}{name}"
        if name not in hints:
            raise unknown_key(key, value)
        inner = section_type(hints[name])
        if inner is None:
            continue
        if not isinstance(value, Mapping):
            raise _not_a_section(key, value, inner)
        _check_keys(value, inner, f"{key}.")


def check_section(key: str, value: Any) -> None:
    """Check what is given for a whole section, as in ``kfac={damping:1e-5}``; a leaf is passed.

    Raises:
        ConfigError: no mapping, or one with an unknown key.
    """
    found = _find(key)
    inner = section_type(found[0]) if found else None
    if inner is None:
        return
    if not isinstance(value, Mapping):
        raise _not_a_section(key, value, inner)
    _check_keys(value, inner, f"{key}.")


def _not_a_section(key: str, value: Any, inner: type) -> ConfigError:
    names = list(_hints(inner))
    return ConfigError.value(key, value, f"a section such as {{{names[0]}:...,{names[-1]}:...}}")


def _at(given: Mapping[str, Any], key: str, default: Any) -> Any:
    """The value as it was given (``-1``, where the typed value is ``-1.0``)."""
    node: Any = given
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return default
        node = node[part]
    return node


def all_keys(section: type = Config, prefix: str = "") -> Iterator[str]:
    """Every key of the schema, ``kfac.damping`` and so on."""
    for name, hint in _hints(section).items():
        inner = section_type(hint)
        if inner is None:
            yield f"{prefix}{name}"
        else:
            yield from all_keys(inner, f"{prefix}{name}.")


@functools.cache
def _find(key: str) -> tuple[Any, Allowed | None] | None:
    """Type annotation and :class:`Allowed` of a key, or None where the schema has no such key."""
    section: type = Config
    *above, last = key.split(".")
    for part in above:
        inner = section_type(_hints(section).get(part))
        if inner is None:
            return None
        section = inner
    for item in dataclasses.fields(section):
        if item.name == last:
            return _hints(section)[last], item.metadata.get("allowed")
    return None


def is_known(key: str) -> bool:
    """Whether the schema has this key (a section counts)."""
    return _find(key) is not None


def allowed_text(key: str) -> str:
    """What the schema allows for a key: the range where there is one, else the type."""
    found = _find(key)
    if found is None:
        return "a key of the configuration"
    annotation, allowed = found
    return allowed.text if allowed is not None else type_text(annotation)


def type_text(annotation: Any) -> str:
    """A type annotation in words: ``float | None`` is ``a number or null``."""
    if _is_union(annotation):
        return " or ".join(type_text(part) for part in typing.get_args(annotation))
    if annotation is type(None):
        return "null"
    if typing.get_origin(annotation) is list:
        return "a list such as [a,b]"
    if typing.get_origin(annotation) is dict:
        return "a mapping such as {a:1}"
    return _TYPE_TEXT.get(annotation, "a value of the schema")


def unknown_key(key: str, value: Any) -> ConfigError:
    """The error for a key that nothing reads, with the nearest one that something does."""
    keys = list(all_keys())
    near = difflib.get_close_matches(key, keys, n=1, cutoff=0.75)
    if not near:
        leaf = key.rsplit(".", 1)[-1]
        by_leaf = {known.rsplit(".", 1)[-1]: known for known in reversed(keys)}
        near = [by_leaf[hit] for hit in difflib.get_close_matches(leaf, by_leaf, 1, 0.75)]
    if near:
        allowed = f"did you mean {near[0]}?"
    else:
        parent = key.rpartition(".")[0]
        section = section_type(_find(parent)[0]) if parent and is_known(parent) else None  # type: ignore[index]
        names = _hints(section or Config)
        allowed = f"{parent or 'the top level'} has {', '.join(names)}"
    return ConfigError(f"{key}={show(value)}: there is no key {key}; {allowed}")
