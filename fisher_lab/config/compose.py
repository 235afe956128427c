"""Composition by Hydra, with errors of one line.

Overrides are checked against the groups and the schema before Hydra composes, because Hydra's own
messages take several lines and end in exit code 1.
"""

from __future__ import annotations

import copy
import itertools
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, ValueType
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fisher_lab.config import help
from fisher_lab.config.errors import ConfigError
from fisher_lab.config.schema import Config
from fisher_lab.config.spelling import did_you_mean
from fisher_lab.config.validate import check_keys, find, unknown_key, validate

GROUP = "sweeps"
"""The group of the sweep files."""

# Hydra raises ValueError for options of a wrong type, and YAMLError comes from an edited file.
_COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, ValueError, YAMLError)

_OPTIONS: WeakKeyDictionary[ConfigLoader, dict[str, list[str]]] = WeakKeyDictionary()


# ---- overrides -----------------------------------------------------------------------------------


def parse(overrides: Sequence[str], loader: ConfigLoader | None = None) -> list[Override]:
    """Parse overrides as Hydra does.

    Args:
        overrides: as typed.
        loader: Hydra's configuration loader, which knows what ``glob(*)`` stands for.

    Raises:
        ConfigError: an override that is not of the form ``key=value``.
    """
    parser = OverridesParser.create(config_loader=loader)
    parsed = []
    for text in overrides:
        try:
            parsed += parser.parse_overrides([text])
        except OverrideParseException as error:
            lines = (one for one in str(error).splitlines() if not one.startswith(("Error", "See")))
            reason = next(lines, "it cannot be parsed").replace("EQUAL at '<EOF>'", "=")
            raise ConfigError(
                f"{text!r} is not an override ({reason}): allowed are key=value, group=option, "
                "+key=value and ~key"
            ) from None
    return parsed


def check(loader: ConfigLoader, overrides: Sequence[str], *, multirun: bool) -> None:
    """Check that every override names an option of a group or a key of the schema.

    Args:
        loader: Hydra's configuration loader; knows the groups and their options.
        overrides: as typed.
        multirun: whether several values for a key are allowed.

    Raises:
        ConfigError: the first override that cannot be right.
    """
    for override in parse(overrides, loader):
        key = override.key_or_group
        if not key:
            raise ConfigError(f"{override.input_line!r} is not an override (it names no key)")
        if override.is_delete() and find(key) is not None:
            raise ConfigError(
                f"{override.input_line} is not allowed: every key has a value; leave {key} out for "
                "its default"
            )
        if override.is_sweep_override() and not multirun:
            raise ConfigError(
                f"{override.input_line} gives several values: add -m to sweep over them, or write "
                f"a list as {key}=[a,b]"
            )
        if override.package is not None or override.is_delete():
            continue
        options = _options(loader, key)
        if options and not isinstance(override.value(), dict):
            _check_options(override, options)
        elif "/" in key and not options:
            groups = list(help.groups(own=True))
            near = _near(key, groups) or f"; groups are {', '.join(groups)}"
            raise ConfigError(f"{override.input_line}: there is no group {key}{near}")
        elif key != "hydra" and not key.startswith("hydra."):
            field = find(key)
            if field is None:
                raise unknown_key(key, (override.input_line or "").partition("=")[2])
            if field.section is not None and not override.is_sweep_override():
                check_keys(field.section, override.value(), f"{key}.")


def _options(loader: ConfigLoader, group: str) -> list[str]:
    known = _OPTIONS.setdefault(loader, {})
    if group not in known:  # about 20 ms each, and a sweep asks again for every cell
        known[group] = loader.get_group_options(group)
    return known[group]


def _check_options(override: Override, options: list[str]) -> None:
    for name in _values(override):
        if name is None or isinstance(name, dict) or str(name).startswith("{"):
            continue
        if str(name) not in options:
            raise ConfigError(
                f"{override.key_or_group}={name} is not an option: {override.key_or_group} must "
                f"be one of {', '.join(sorted(options))}{_near(str(name), options)}"
            )


def _values(override: Override) -> list[Any]:
    """The values of a sweep, the items of a list, or the one value that is given."""
    if override.is_sweep_override():
        return list(override.sweep_string_iterator())
    value = override.value()
    return value if isinstance(value, list) else [value]


def _near(word: str, words: Sequence[str]) -> str:
    near = did_you_mean(word, words, 0.5)
    return near and f" ({near})"


# ---- composition ---------------------------------------------------------------------------------


def load(
    loader: ConfigLoader, overrides: Sequence[str], *, name: str = "config", multirun: bool = False
) -> DictConfig:
    """Compose a configuration.

    Args:
        loader: Hydra's configuration loader.
        overrides: as typed.
        name: the primary configuration file, without its ending.
        multirun: compose what a sweep's cells are then composed on.

    Returns:
        The composed configuration, Hydra's own node included.

    Raises:
        ConfigError: whatever keeps it from being composed, in one line.
    """
    check(loader, overrides, multirun=multirun)
    mode = RunMode.MULTIRUN if multirun else RunMode.RUN
    with _one_line_errors():
        return loader.load_configuration(name, list(overrides), run_mode=mode)


@contextmanager
def _one_line_errors(after: str = "") -> Iterator[None]:
    """Errors of Hydra and OmegaConf become ours, on one line, without search paths and notes."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{error}{after}") from None
    except _COMPOSITION_ERRORS as error:
        texts = [str(error)]
        if error.__cause__ is not None and str(error.__cause__) not in texts[0]:
            texts.append(str(error.__cause__))
        lines = [line.strip() for line in "\n".join(texts).splitlines()]
        lines = itertools.takewhile(lambda line: not line.startswith("Search path"), lines)
        noise = ("full_key:", "object_type=", "reference_type=", "See ")
        kept = [line for line in lines if line and not line.startswith(noise)]
        text = " ".join(dict.fromkeys(kept)) or type(error).__name__
        raise ConfigError(f"{text}{after}") from error


# ---- sweeps --------------------------------------------------------------------------------------


def requested(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The sweeps that a command line asks for, and its other overrides.

    Raises:
        ConfigError: ``+sweeps=a,b``, which would sweep over the names of the files.
    """
    names: list[str] = []
    others: list[str] = []
    for override in parse(arguments):
        text = override.input_line or ""
        if override.key_or_group != GROUP:
            others.append(text)
            continue
        if override.value_type is ValueType.GLOB_CHOICE_SWEEP:
            raise ConfigError(f"{text} is not allowed: name the sweeps, as in +{GROUP}=[a,b]")
        given = [str(name) for name in _values(override)]
        if override.is_sweep_override():
            raise ConfigError(
                f"{text} would sweep over the names of the files: write "
                f"+{GROUP}=[{','.join(given)}] to run these sweeps, each in its own directory"
            )
        names += given
    return names, others


def cells(
    params: Mapping[str, object] | None,
    arguments: Sequence[str],
    loader: ConfigLoader | None = None,
) -> list[list[str]]:
    """The overrides of every cell: the product of all sweeps, the last argument varying fastest.

    Args:
        params: ``hydra.sweeper.params`` of a sweep file; the command line wins over it.
        arguments: the overrides of the command line.
        loader: Hydra's configuration loader; without it there is no ``glob(*)``.

    Raises:
        ConfigError: an override that cannot be parsed, or a sweep that is not a list of values.
    """
    axes: dict[str, list[str]] = {}
    given = [*(f"{key}={value}" for key, value in (params or {}).items()), *arguments]
    for one in parse(given, loader):
        key = one.get_key_element()
        if not one.is_sweep_override():
            axes[key] = [f"{key}={one.get_value_element_as_str()}"]
        elif one.is_discrete_sweep():
            axes[key] = [f"{key}={value}" for value in one.sweep_string_iterator()]
            if not axes[key]:
                raise ConfigError(f"{one.input_line}: a sweep over no values")
        else:
            raise ConfigError(
                f"{one.input_line}: a sweep does not support sweep type "
                f"{one.value_type.name if one.value_type else ''}; give a list of values"
            )
    return [list(cell) for cell in itertools.product(*axes.values())]


class Composer:
    """Composes and validates cells as Hydra would, each choice of groups once.

    Hydra takes 0.15 s a cell. What takes that long is the choice of options; plain values are then
    set in the composed configuration, in order, which is what is done here for each cell.

    Args:
        loader: Hydra's configuration loader.
        master: what the sweep was started with.
    """

    def __init__(self, loader: ConfigLoader, master: DictConfig) -> None:
        self._loader = loader
        self._master = master
        self._composed: dict[tuple[str, ...], DictConfig] = {}

    def __call__(self, overrides: Sequence[str]) -> Config:
        """Compose and validate one cell.

        Raises:
            ConfigError: in one line that ends with the cell's overrides.
        """
        with _one_line_errors(f" (in the cell {shlex.join(overrides)})"):
            check(self._loader, overrides, multirun=False)
            parsed = parse(overrides)
            plain = [
                one
                for one in parsed
                if not _options(self._loader, one.key_or_group) or isinstance(one.value(), dict)
            ]
            if not all(one.package is None and one.type is OverrideType.CHANGE for one in plain):
                return validate(self._loader.load_sweep_config(self._master, list(overrides)))
            choices = tuple(one.input_line or "" for one in parsed if one not in plain)
            if choices not in self._composed:
                composed = self._loader.load_sweep_config(self._master, list(choices))
                names = [str(name) for name in composed if name != "hydra"]
                self._composed[choices] = OmegaConf.masked_copy(composed, names)
            cfg = copy.deepcopy(self._composed[choices])
            for one in plain:
                OmegaConf.update(cfg, one.key_or_group, one.value(), merge=True)
            return validate(cfg)
