"""Sweep files: the axes of a sweep, what it is called, what is claimed of it.

A file of ``sweeps/`` (the project's, or the user's own in the working directory, which wins) is a
Hydra configuration that is merged at the top level, but for these keys, which are read here:

``title``
    A line for people.
``params``
    Axes: key -> values, as text with commas or as a list; ``null`` for none.
``alone``
    true: times are compared, so that no other cell runs beside one of these, and the cells of one
    seed come before those of the next, whatever order the axes are in.
``claims``
    What is stated of the results; opaque here, read by whoever judges it.
``design``
    How the claims are tested while seeds are run, where a claim does not say it; likewise.
``sweeps``
    Other sweeps that this one stands for, each with a directory of its own; then nothing else.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fisher_lab.config import paths
from fisher_lab.config.errors import ConfigError, show
from fisher_lab.config.launchers import KINDS
from fisher_lab.config.schema import Config

_METADATA: dict[str, tuple[type, str]] = {
    "title": (str, "text"),
    "params": (dict, "a mapping from keys to values"),
    "alone": (bool, "true or false"),
    "claims": (list, "a list"),
    "design": (dict, "a mapping such as {first: 5, max_seeds: 30}"),
    "sweeps": (list, "a list of sweeps"),
}
"""The keys that are read here: their type, and its name."""


@dataclass(frozen=True)
class SweepFile:
    """The contents of a sweep file.

    Attributes:
        name: the file's name without its ending.
        path: the file.
        title: a line for people.
        params: axes; the values are text in Hydra's notation.
        alone: whether its cells run one at a time.
        claims: as in the file.
        design: of the claims, as in the file.
        sweeps: the names of what a collection stands for.
        config: all else, merged into the configuration.
    """

    name: str
    path: Path
    title: str = ""
    params: dict[str, str] = field(default_factory=dict)
    alone: bool = False
    claims: list[Any] = field(default_factory=list)
    design: dict[str, Any] = field(default_factory=dict)
    sweeps: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)


NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,127}")
"""What a sweep file may be called, without its ending; others are none."""


def all_files() -> dict[str, Path]:
    """Every sweep by name; the user's own come first."""
    found: dict[str, Path] = {}
    for folder in (Path.cwd() / "sweeps", paths.sweeps()):
        for file in sorted(folder.glob("*.yaml")):
            if NAME.fullmatch(file.stem) and file.is_file():
                found.setdefault(file.stem, file)
    return dict(sorted(found.items()))


def load(path: Path) -> SweepFile:
    """Read a sweep file.

    Raises:
        ConfigError: it cannot be read, or a key that is read here is not of its type.
    """
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (OSError, ValueError, RecursionError, YAMLError, OmegaConfBaseException) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise ConfigError(f"{path} cannot be read as a sweep file: {why}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is not a sweep file: it must hold keys such as params")
    found = {str(key): value for key, value in content.items() if value is not None}
    for key, (kind, text) in _METADATA.items():
        if not isinstance(found.get(key, kind()), kind):
            raise ConfigError(
                f"{path}: {key}={show(found[key])} is not allowed: {key} must be {text}"
            )
    if found.get("sweeps") and set(content) - {"title", "sweeps"}:
        raise ConfigError(f"{path}: a file with sweeps holds nothing else but a title")
    known = {key: found[key] for key in _METADATA if key in found}
    known["params"] = {str(key): values(value) for key, value in known.get("params", {}).items()}
    known["sweeps"] = [str(name) for name in known.get("sweeps", [])]
    config = {str(key): value for key, value in content.items() if key not in _METADATA}
    return SweepFile(name=path.stem, path=path, config=config, **known)


_BARE = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*")
_NO_TEXT = ("null", "true", "false", "nan", "inf", "infinity")
"""A text that Hydra reads as itself without quotes, anywhere, and words that it reads otherwise."""


def values(value: Any) -> str:
    """The values of an axis in Hydra's notation: text as it is, a list with commas between.

    The items of a list keep their types: ``"1e-3"`` stays text, and ``"a,b"`` one value.
    """
    return ",".join(map(_written, value)) if isinstance(value, list) else show(value)


def _written(value: Any) -> str:
    """A value in the notation from which Hydra makes the same value again."""
    if isinstance(value, list):
        return f"[{','.join(map(_written, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{_written(item)}' for key, item in value.items())}}}"
    if not isinstance(value, str):
        return repr(value) if isinstance(value, float) else show(value)
    is_word = _BARE.fullmatch(value) and value.lower() not in _NO_TEXT
    return value if is_word else QuotedString(value, Quote.single).with_quotes()


def expand(names: Sequence[str]) -> list[SweepFile]:
    """The sweeps that names stand for: a collection is replaced by what it holds, each once.

    Raises:
        ConfigError: a sweep that does not exist, or a collection that holds itself.
    """
    known = all_files()
    found: dict[str, SweepFile] = {}

    def visit(name: str, above: tuple[str, ...]) -> None:
        if name in above:
            raise ConfigError(f"the sweep {name} holds itself: {' -> '.join([*above, name])}")
        if name not in known:
            listed = ", ".join(known)
            why = "there is no such sweep" if NAME.fullmatch(name) else (
                "a sweep's name has letters, digits, dashes and underscores alone"
            )  # fmt: skip
            raise ConfigError(f"+sweeps={name}: {why}; there are {listed}")
        file = load(known[name])
        if not file.sweeps:
            found[name] = file
        for inner in file.sweeps:
            visit(inner, (*above, name))

    for name in names:
        visit(name, ())
    return list(found.values())


_DEFAULTS: dict[str, type[Any]] = {
    "schema_defaults": Config,
    **{f"{kind}_settings": settings for kind, settings in KINDS.items()},
}
"""Entry of a defaults list under ``conf/`` -> the options whose defaults it stands for."""


def register() -> None:
    """Register the defaults of all option classes, and every sweep file as an option of a group.

    The files under ``conf/`` name the defaults, so that none is repeated there. The folders of the
    sweep files are not put on Hydra's search path: their parents would have to be, and every other
    folder there would turn into a group. May be called more than once.
    """
    store = ConfigStore.instance()
    # Plain values, not the dataclasses: their types would make Hydra raise in its own words.
    for name, section in _DEFAULTS.items():
        store.store(name=name, node=dataclasses.asdict(section()), provider="fisher_lab")
    store.repo.pop("sweeps", None)  # those of a working directory that is no longer ours
    for name, path in all_files().items():
        try:
            file = load(path)
        except ConfigError:  # whoever asks for the sweep gets it from `expand`
            file = SweepFile(name, path)
        node = file.config
        if file.params:
            sweeper = node.setdefault("hydra", {}).setdefault("sweeper", {})
            sweeper["params"] = {**(sweeper.get("params") or {}), **file.params}
        store.store(group="sweeps", name=name, node=node, package="_global_", provider="fisher_lab")
