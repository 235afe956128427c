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
``sweeps``
    Other sweeps that this one stands for, each with a directory of its own; then nothing else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fisher_lab.config import paths
from fisher_lab.config.errors import ConfigError, show
from fisher_lab.config.launchers import KINDS
from fisher_lab.config.schema import Config

METADATA = ("title", "params", "alone", "claims", "sweeps")


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
        sweeps: the names of what a collection stands for.
        config: all else, merged into the configuration.
    """

    name: str
    path: Path
    title: str = ""
    params: dict[str, str] = field(default_factory=dict)
    alone: bool = False
    claims: list[Any] = field(default_factory=list)
    sweeps: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)


def folders() -> list[Path]:
    """Where sweep files lie, the user's own first."""
    own = Path.cwd() / "sweeps"
    return [own, paths.sweeps()] if own.resolve() != paths.sweeps() else [own]


def all_files() -> dict[str, Path]:
    """Every sweep by name."""
    found: dict[str, Path] = {}
    for folder in folders():
        for file in sorted(folder.glob("*.yaml")):
            found.setdefault(file.stem, file)
    return dict(sorted(found.items()))


def load(path: Path) -> SweepFile:
    """Read a sweep file.

    Raises:
        ConfigError: it cannot be read, or a key of :data:`METADATA` is not of its type.
    """
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (OSError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path} cannot be read as a sweep file: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is not a sweep file: it must hold keys such as params")
    found = {str(key): value for key, value in content.items()}
    for key, kind, text in (
        ("title", str, "text"),
        ("params", dict, "a mapping from keys to values"),
        ("alone", bool, "true or false"),
        ("claims", list, "a list"),
        ("sweeps", list, "a list of sweeps"),
    ):
        if found.get(key) is not None and not isinstance(found[key], kind):
            raise ConfigError(
                f"{path}: {key}={show(found[key])} is not allowed: {key} must be {text}"
            )
    if found.get("sweeps") and set(found) - {"title", "sweeps"}:
        raise ConfigError(f"{path}: a file with sweeps holds nothing else but a title")
    return SweepFile(
        name=path.stem,
        path=path,
        title=found.get("title") or "",
        params={str(key): values(value) for key, value in (found.get("params") or {}).items()},
        alone=bool(found.get("alone")),
        claims=list(found.get("claims") or []),
        sweeps=[str(name) for name in found.get("sweeps") or []],
        config={key: value for key, value in found.items() if key not in METADATA},
    )


def values(value: Any) -> str:
    """The values of an axis in Hydra's notation: text as it is, a list with commas between."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ",".join(_value(item) for item in value)
    return _value(value)


def _value(item: Any) -> str:
    if isinstance(item, Mapping):
        return "{" + ",".join(f"{key}:{_value(part)}" for key, part in item.items()) + "}"
    if isinstance(item, list):
        return "[" + ",".join(_value(part) for part in item) + "]"
    return show(item)


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
            raise ConfigError(f"+sweeps={name}: there is no such sweep; there are {listed}")
        file = load(known[name])
        if not file.sweeps:
            found[name] = file
        for inner in file.sweeps:
            visit(inner, (*above, name))

    for name in names:
        visit(name, ())
    return list(found.values())


def node(file: SweepFile) -> dict[str, Any]:
    """What Hydra merges for a sweep file: its configuration, and its axes for the sweeper."""
    merged = cast("dict[str, Any]", OmegaConf.to_container(OmegaConf.create(file.config)))
    if file.params:
        sweeper = merged.setdefault("hydra", {}).setdefault("sweeper", {})
        sweeper["params"] = {**(sweeper.get("params") or {}), **file.params}
    return merged


_DEFAULTS: dict[str, type[Any]] = {
    "schema_defaults": Config,
    **{f"{kind}_settings": settings for kind, settings in KINDS.items()},
}
"""Entry of a defaults list under ``conf/`` -> the options whose defaults it stands for."""


def register() -> None:
    """Register the defaults of all option classes, and the sweeps. May be called more than once.

    The files under ``conf/`` name them in their defaults lists, so that none is repeated there.
    """
    # Plain values, not the dataclasses: their types would make Hydra raise in its own words.
    for name, section in _DEFAULTS.items():
        defaults = dataclasses.asdict(section())
        ConfigStore.instance().store(name=name, node=defaults, provider="fisher_lab")
    _register_sweeps()


def _register_sweeps() -> None:
    """Make every sweep file an option of the group ``sweeps``.

    Their folders are not put on Hydra's search path: the parents would have to be, and every other
    folder there would turn into a group.
    """
    store = ConfigStore.instance()
    store.repo.pop("sweeps", None)  # those of a working directory that is no longer ours
    for name, path in all_files().items():
        try:
            merged = node(load(path))
        except ConfigError:
            merged = {}  # whoever asks for it is told by `sweep_files.expand`
        store.store(
            group="sweeps", name=name, node=merged, package="_global_", provider="fisher_lab"
        )
