"""Paths in texts for readers on other machines, which name no directory of this one."""

from __future__ import annotations

import itertools
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from fisher_lab.results import manifest
from fisher_lab.results.values import Shared
from fisher_lab.runs.identity import LEFT_OUT

# Two parts at least, and not the rest of a relative path, of a URL or of a unit ("tokens /s").
ABSOLUTE = re.compile(r"(?<![\w.~:/$}-])(?:/[^\s/'\"`,;:()<>\[\]{}|=]+){2,}/?")
SWEEPS = "sweeps="


class Places:
    """Shortens the paths in texts for readers on another machine.

    A path is shown relative to the results directory, the working directory or the home directory;
    of any other absolute path only the file's name is shown.

    Args:
        frame: of runs; the directories above its sweeps are the results directories.
        home: the home directory; by default that of the user.
        roots: the directories that were the working and the home directory of whoever wrote a
            text first, in the place of those of now.
    """

    def __init__(
        self, frame: pd.DataFrame, home: Path | None = None, roots: manifest.Roots | None = None
    ) -> None:
        above = {Path(directory).absolute().parent for directory in frame.attrs.get("sweeps", {})}
        if roots is None:
            user = str(Path.home() if home is None else home)
            roots = {str(Path.cwd()): (".", True), user: ("~", True)}
        self.roots = dict.fromkeys(map(str, above), (".", False)) | roots
        self._typed = {root: short for root, (short, typed) in roots.items() if typed}
        longest = sorted(self.roots.items(), key=lambda item: -len(item[0]))
        self._roots = [(root, short) for root, (short, _) in longest if root != os.sep]

    def run(self, directory: str) -> str:
        """A run directory, relative to the results directory."""
        return self.short(os.path.abspath(directory))

    def short(self, text: str) -> str:
        """A text with its paths shortened."""
        for root, instead in self._roots:
            inside = "" if instead == "." else f"{instead}/"
            path = rf"(?<![\w.~/-]){re.escape(root)}"
            text = re.sub(rf"{path}/(?=[\w.~-])", inside, text)
            text = re.sub(rf"{path}/?(?![\w./-])", instead, text)
        return ABSOLUTE.sub(lambda found: Path(found[0]).name, text)

    def reasons(self, frame: pd.DataFrame) -> pd.DataFrame:
        """The runs, and the directories that were left out, with shortened reasons."""
        shown = frame.assign(
            reason=frame["reason"].map(lambda r: self.short(r) if isinstance(r, str) else r)
        )
        left = [
            replace(one, directory=self.run(one.directory), reason=self.short(one.reason))
            for one in frame.attrs.get("left_out", [])
        ]
        shown.attrs = {**frame.attrs, "left_out": Shared(left)}
        return shown

    def shown(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Like :meth:`reasons`, with the settings that are paths shortened too.

        Claims must not be tested with these runs: a claim names settings in full.
        """
        shown = self.reasons(frame)
        for name in frame.attrs.get("config", []):
            values = [v for v in dict.fromkeys(frame[name]) if isinstance(v, str) and "/" in v]
            if values:
                shown[name] = frame[name].replace(self._distinct(values))
        return shown

    def _distinct(self, values: Sequence[str]) -> dict[str, str]:
        """Value -> its short form, with a number where two would be the same."""
        found: dict[str, str] = {}
        for value in values:
            short = text = self.short(value)
            taken = set(found.values())
            for number in itertools.count(2):
                if text not in taken:
                    break
                text = f"{short} ({number})"
            found[value] = text
        return found

    def command(self, overrides: str) -> str:
        """The command that runs one cell again, and nothing else.

        Args:
            overrides: of its run, quoted for a shell. A cell of a sweep file names that file; the
                cell's own values replace the file's axes.
        """
        words = shlex.split(overrides)
        sweep = any(word.lstrip("+").startswith(SWEEPS) for word in words)
        kept = [self._word(word) for word in words if not _is_a_place(word)]
        return " ".join(["python -m fisher_lab", *(["-m"] if sweep else []), *kept])

    def _word(self, word: str) -> str:
        key, sign, value = word.partition("=")
        for root, instead in self._typed.items():  # from where a command is typed
            if value.startswith(f"{root}/"):
                rest = shlex.quote(value[len(root) + 1 :])
                return shlex.quote(key) + sign + (rest if instead == "." else f'"$HOME"/{rest}')
        return shlex.quote(word)


def _is_a_place(word: str) -> bool:
    """Whether an override only says where something is kept, by a path of its machine."""
    key, _, value = word.partition("=")
    name = key.lstrip("+").replace("/", ".")
    return value.startswith("/") and any(name == o or name.startswith(f"{o}.") for o in LEFT_OUT)
