"""``fisher-lab register`` and ``decide``: a sweep's own command, with one thing more to be done.

The overrides of the command line that gave a sweep are in its ``sweep.json``.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from fisher_lab.config import compose, sweep_files
from fisher_lab.config.errors import ConfigError
from fisher_lab.runs import atomic
from fisher_lab.sweeps.directory import SWEEP_FILE

COMMANDS = {
    "decide": (
        "Run the seeds that the claims of a sweep need, until each is decided.",
        "sweep.until=decided",
    ),
    "register": (
        "Write down claims, designs and cells of a sweep before its first run.",
        "sweep.register=true",
    ),
}
"""Sub-command -> what it does, and the override that does it."""


def command_line(command: str, arguments: Sequence[str]) -> list[str]:
    """The command line of a multirun that a sub-command stands for.

    Args:
        command: a key of :data:`COMMANDS`.
        arguments: after it: a sweep, and further overrides.

    Raises:
        ConfigError: there is no such sweep, or an argument is not allowed.
    """
    what, override = COMMANDS[command]
    parser = ArgumentParser(f"fisher-lab {command}", description=what)

    def fail(message: str) -> NoReturn:
        raise ConfigError(f"{message}; {parser.prog} --help shows what is allowed")

    parser.error = fail
    where = "a sweep's directory, its name under results/, or the name of a sweep file"
    parser.add_argument("sweep", help=where)
    more = "as on the command line: hydra/launcher=local"
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help=more)
    chosen = parser.parse_args(list(arguments))
    return ["-m", *_arguments_of(chosen.sweep), *chosen.overrides, override]


def _arguments_of(sweep: str) -> list[str]:
    for directory in (Path(sweep), Path("results") / sweep):
        if not (directory / SWEEP_FILE).is_file():
            continue
        typed = atomic.read_json(directory / SWEEP_FILE).get("arguments")
        if not isinstance(typed, list):
            raise ConfigError(
                f"{directory / SWEEP_FILE} does not say how the sweep was started (it is of an "
                "earlier version): repeat its command once"
            )
        path = str(directory.resolve()).replace("'", "\\'")
        return [*map(str, typed), f"hydra.sweep.dir='{path}'"]
    if sweep in sweep_files.all_files():
        return [f"+{compose.GROUP}={sweep}"]
    raise ConfigError(
        f"{sweep} is no sweep: give the directory of one (with a {SWEEP_FILE}), its name under "
        "results/, or the name of a sweep file"
    )
