"""The identity of a run: a stable hash of everything that can change its result.

Left out: where results and caches are written, the tracker, progress bars, how a sweep runs its
cells, Hydra's own node (paths, launcher, sweeper), and labels. The number of threads stays in: it
changes the order of summation, and so the last bits. Data and model enter by content: their paths
are left out where a content hash stands for them, so that a copy of a text elsewhere is the same
run, and an edited text in the same place is another one.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

VERSION = 1
"""Raised when the same configuration comes to mean another result."""

LENGTH = 16
"""Hexadecimal digits of a ``run_id``: 64 bits, no collision to fear in a lab's lifetime."""

LEFT_OUT = (
    "cache_dir",
    "data.name",
    "distributed.timeout_s",
    "hydra",
    "kfac.verify",
    "model.name",
    "progress",
    "resume",
    "sweep",
    "tracker",
    "train.save_every_s",
)
"""Keys (with everything under them) that cannot change a result."""

CAME_LATER: dict[str, Any] = {
    "kfac.damping_mode": "absolute",
    "kfac.sharing": "expand",
    "kfac.ekfac_unit": "token",
    "kfac.experts": "each",
    "model.adapter": None,
    "task.damping_scan": [],
    "task.ladder_damping": 100.0,
    "task.ladder_products": 2000,
    "task.ladder_tol": 1e-10,
    "task.engine_batches": None,
    "model.lora": {"r": 8, "alpha": 16.0, "targets": [], "dora": False},
    "model.tokenizer": None,
    "optimizer.graft": "none",
    "optimizer.refresh_below": None,
}
"""Keys that earlier runs did not have -> the value with which a run is the same as without them.

With this value a key stays out of the identity, whatever its default becomes, so that a new version
finds what earlier ones have completed. Every key that is added to the schema goes in here (a test
holds it).
"""

RENAMED: dict[str, str] = {}
"""Key -> its name in earlier runs, for a key that was renamed or moved to another section.

The identity has the first name that a setting had, so that a new version finds what earlier ones
have completed, and tables show earlier runs under the new name. A key that is renamed goes in here,
and never to the name of another setting. None has been renamed so far.
"""

VALUES: dict[str, dict[Any, Any]] = {}
"""Key, as it is now -> value -> its name in earlier runs, for a value that was renamed: text, a
number or null."""

BY_CONTENT = {
    "adapter": ("model.adapter",),
    "data": ("data.path", "data.pattern"),
    "model": ("model.name_or_path",),
    "tokenizer": ("model.tokenizer",),
}
"""Keys that a content hash stands for, where the content under this name is known."""


def run_id(config: Mapping[str, Any], content: Mapping[str, Any] | None = None) -> str:
    """The identity of a run.

    Args:
        config: the resolved configuration, nested mappings of JSON-able values.
        content: hashes of what the configuration points to, such as ``data`` and ``model``.

    Returns:
        :data:`LENGTH` hexadecimal digits, the same in every process, on every machine.
    """
    content = content or {}
    out: set[str] = set(LEFT_OUT)
    for name, keys in BY_CONTENT.items():
        if content.get(name):
            out.update(keys)
    kept = in_earlier_words(_without(config, out))
    identity = {"version": VERSION, "config": kept, "content": content}
    text = json.dumps(_canonical(identity), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:LENGTH]


def in_earlier_words(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as the versions before its keys and values were renamed wrote it.

    Args:
        config: nested; it may lack keys.
    """
    found = copy.deepcopy(dict(config))
    for key in dict.fromkeys((*RENAMED, *VALUES)):
        *above, last = key.split(".")
        sections = [found]
        for name in above:
            sections.append(sections[-1].get(name) or {})
        if last not in sections[-1]:
            continue
        value = _reworded(sections[-1].pop(last), VALUES.get(key, {}))
        for name, section in reversed(list(zip(above, sections, strict=False))):
            if not section[name]:  # a section that has come with its key
                del section[name]
        *above, last = RENAMED.get(key, key).split(".")
        section = found
        for name in above:
            section = section.setdefault(name, {})
        section[last] = value
    return found


def in_present_words(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run of any version, by the keys and values that they have now.

    Args:
        settings: dotted key -> value.
    """
    new = {old: key for key, old in RENAMED.items()}
    found = {new.get(key, key): value for key, value in settings.items()}
    for key in VALUES.keys() & found.keys():
        found[key] = _reworded(found[key], {old: value for value, old in VALUES[key].items()})
    return found


def _reworded(value: Any, words: Mapping[Any, Any]) -> Any:
    """What stands for a value in another version; the value itself where nothing does."""
    return next((other for one, other in words.items() if one == value), value)


def before(key: str) -> Any:
    """What a setting was in runs that were made before it came; None where that is unknown.

    Args:
        key: such as ``kfac.sharing``, also within a section of :data:`CAME_LATER`.
    """
    if key in CAME_LATER:
        return CAME_LATER[key]
    above, _, last = key.rpartition(".")
    section = before(above) if above else None
    return section.get(last) if isinstance(section, Mapping) else None


def _without(config: Mapping[str, Any], out: set[str], prefix: str = "") -> dict[str, Any]:
    kept = {}
    for name, value in config.items():
        key = f"{prefix}{name}"
        if key in out or (key in CAME_LATER and value == CAME_LATER[key]):
            continue
        kept[name] = _without(value, out, f"{key}.") if isinstance(value, Mapping) else value
    return kept


def _canonical(value: Any) -> Any:
    """Equal numbers are written alike: ``1`` and ``1.0`` are the same value of a setting."""
    if isinstance(value, Mapping):
        return {str(key): _canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            return repr(value)
        return int(value) if value.is_integer() else value
    return value
