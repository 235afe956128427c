"""What ``--help`` prints: examples, flags, groups and the composed configuration.

Hydra can print this from a template, but then asks for the options of every group twice, which
copies all registered configurations each time and takes longer than a help page may.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from fisher_lab.config import paths, sweep_files
from fisher_lab.config.errors import show
from fisher_lab.config.schema import Config
from fisher_lab.config.validate import fields_of

_PAGE_HEAD = """\
# Configuration

Every key, its default, what it may be and what it means. This page is made from
`fisher_lab/config/schema.py` by `python scripts/document_configuration.py`; a test holds the two
together.

A key is set as `kfac.damping=1e-5`, an option of a group as `kfac/policy=all`. Groups set plain
keys, and a key on the command line wins over its group. Values that are not allowed, keys that do
not exist (also with `+`) and options that are misspelt end in one line and exit code 2, before
anything is built or written.
"""

_GROUPS_HEAD = """
## Groups

| group | options |
|---|---|
"""

_TABLE_HEAD = "\n| key | default | must be | meaning |\n|---|---|---|---|\n"


def markdown() -> str:
    """The whole page."""
    parts = [_PAGE_HEAD, _GROUPS_HEAD]
    for group, names in groups().items():
        parts.append(f"| `{group}` | {', '.join(f'`{name}`' for name in names)} |\n")
    root = Config()
    parts += ["\n## Top level\n", _TABLE_HEAD, *_rows(root, "")]
    for item in dataclasses.fields(root):
        section = getattr(root, item.name)
        if dataclasses.is_dataclass(section):
            about = (type(section).__doc__ or "").strip().splitlines()[0]
            parts += [f"\n## {item.name}\n\n{about}\n", _TABLE_HEAD]
            parts += _rows(section, f"{item.name}.", deep=True)
    return "".join(parts)


def groups(*, own: bool = False) -> dict[str, list[str]]:
    """Group -> its options, from the files under ``conf/`` and ``sweeps/``.

    Args:
        own: also the user's: sweeps in the working directory, options under ``--config-dir``.
    """
    found: dict[str, list[str]] = {}
    for folder in (paths.conf(), *(paths.further_folders() if own else ())):
        for file in sorted(folder.rglob("*.yaml")):
            group = file.parent.relative_to(folder).as_posix()
            if group != "." and not group.startswith("hydra/"):
                found.setdefault(group, []).append(file.stem)
    sweeps = sweep_files.all_files() if own else {f.stem: f for f in paths.sweeps().glob("*.yaml")}
    found["sweeps"] = sorted(sweeps)
    return dict(sorted(found.items()))


def _rows(section: Any, prefix: str, *, deep: bool = False) -> Iterator[str]:
    for item in dataclasses.fields(section):
        key, value = f"{prefix}{item.name}", getattr(section, item.name)
        field = fields_of(type(section))[item.name]
        if field.section is None:
            cells = (f"`{key}`", f"`{show(value)}`", field.text, item.metadata["meaning"])
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"
        elif deep:
            yield from _rows(value, f"{key}.", deep=True)


_HEAD = """\
fisher_lab: K-FAC, Fisher spectra and their records, on real transformers.

fisher-lab                                    the analysis of the default model
fisher-lab task=plan                          what it would cost
fisher-lab task=ladder                        K-FAC against the exact Fisher
fisher-lab kfac/policy=all kfac.damping=1e-5  an option of a group, a key
fisher-lab -m kfac.damping=1e-5,1e-4          a sweep
fisher-lab --cfg job                          the configuration alone

== Commands ==
{commands}

== Flags ==
--verbose             every number and every layer at the end of a run
--version             the version of fisher_lab
-m, --multirun        run every combination of the given values
-c, --cfg job         show the composed configuration
-cd, --config-dir D   find further options of groups under D
--info                show what the configuration is composed of
--hydra-help          all flags of Hydra
"""

COMMANDS = {
    "status": "how the cells of a sweep stand",
    "cancel": "end the running cells of a sweep",
    "table": "the table of a sweep: settings by metrics, over seeds",
    "claims": "the claims of the sweep files, tested with their runs",
    "report": "one HTML file about sweeps; the appendix of a paper",
    "diff": "what differs between two runs",
    "explain": "what a metric or a setting means",
    "verify": "whether a paper's numbers are those of its runs",
    "work": "take the cells of a sweep until none is left",
    "capsule": "runs, claims and code of a paper in one archive",
    "reproduce": "completed cells once more, and their numbers compared",
    "check": "what K-FAC makes of a model of your own, in a minute",
}
"""Sub-command -> what it does."""

WIDTH = 80

_FOOT = "docs/configuration.md describes every key."


def text(cfg: DictConfig, *, resolve: bool = False) -> str:
    """The help page.

    Args:
        cfg: the composed configuration, with Hydra's own node, which is not shown.
        resolve: show what interpolations stand for.
    """
    options = "\n".join(
        textwrap.fill(f"{group}: {', '.join(names)}", WIDTH, subsequent_indent="    ")
        for group, names in groups(own=True).items()
    )
    commands = "\n".join(
        f"fisher-lab {name} --help".ljust(27) + what for name, what in COMMANDS.items()
    )
    shown = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
    keys = OmegaConf.to_yaml(shown, resolve=resolve)
    head = _HEAD.format(commands=commands)
    parts = (head, "== Groups (group=option) ==", options, "\n== Keys (key=value) ==", keys, _FOOT)
    return "\n".join(parts)
