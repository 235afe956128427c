"""Paths and commands as a reader on another machine can use them.

What is written for others (the report, the appendix) names no directory of the machine that it was
made on: a path is shown from the results directory, from the working directory or from the home
directory, and any other absolute one as the file's name.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fisher_lab.results.values import Frame, Shared
from fisher_lab.runs.identity import LEFT_OUT

# Two parts at least, and not the rest of a relative path, of a URL or of a unit ("tokens /s").
ABSOLUTE = re.compile(r"(?<![\w.~:/$}-])(?:/[^\s/'\"`,;:()<>\[\]{}|=]+){2,}/?")
SWEEPS = "sweeps="


class Places:
    """Shortens the paths in texts.

    Args:
        frame: of runs; the directories above its sweeps are the results directories.
        home: the home directory; by default that of the user.
    """

    def __init__(self, frame: Frame, home: Path | None = None) -> None:
        above = {Path(directory).absolute().parent for directory in frame.attrs.get("sweeps", {})}
        self._typed = {str(Path.cwd()): ".", str(Path.home() if home is None else home): "~"}
        roots = dict.fromkeys(map(str, above), ".") | self._typed
        longest = sorted(roots.items(), key=lambda item: -len(item[0]))
        self._roots = [(root, short) for root, short in longest if Path(root).parent != Path(root)]

    def run(self, directory: str) -> str:
        """A run directory, from the results directory."""
        return self.short(os.path.abspath(directory))

    def short(self, text: str) -> str:
        """A text with its paths shortened."""
        for root, instead in self._roots:
            inside = "" if instead == "." else f"{instead}/"
            path = rf"(?<![\w.~/-]){re.escape(root)}"
            text = re.sub(rf"{path}/(?=[\w.~-])", inside, text)
            text = re.sub(rf"{path}/?(?![\w./-])", instead, text)
        return ABSOLUTE.sub(lambda found: Path(found[0]).name, text)

    def reasons(self, frame: Frame) -> Frame:
        """The runs with shortened reasons, and so is the reason of what was left out."""
        told = frame.assign(
            reason=frame["reason"].map(lambda r: self.short(r) if isinstance(r, str) else r)
        )
        left = [
            replace(one, directory=self.run(one.directory), reason=self.short(one.reason))
            for one in frame.attrs.get("left_out", [])
        ]
        told.attrs = {**frame.attrs, "left_out": Shared(left)}
        return told

    def shown(self, frame: Frame) -> Frame:
        """As :meth:`reasons`, with the settings that are paths shortened too.

        Claims are not to be judged by these: they name settings in full.
        """
        told = self.reasons(frame)
        for name in frame.attrs.get("config", []):
            values = [v for v in dict.fromkeys(frame[name]) if isinstance(v, str) and "/" in v]
            if values:
                told[name] = frame[name].replace(self._distinct(values))
        return told

    def _distinct(self, values: Sequence[str]) -> dict[str, str]:
        """Value -> its short form; a number tells apart those that would be the same."""
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
        """What runs one cell, and nothing else, again.

        Args:
            overrides: of its run, as typed into a shell. A cell of a sweep file names that file,
                whose axes are then pinned by the cell's own values.
        """
        words = shlex.split(overrides)
        sweep = any(word.lstrip("+").startswith(SWEEPS) for word in words)
        kept = [word for word in words if not _is_elsewhere(word)]
        return " ".join(
            ["python -m fisher_lab", *(["-m"] if sweep else []), *map(self._word, kept)]
        )

    def _word(self, word: str) -> str:
        key, sign, value = word.partition("=")
        for root, instead in self._typed.items():  # from where a command is typed
            if value.startswith(f"{root}/"):
                rest = shlex.quote(value[len(root) + 1 :])
                return shlex.quote(key) + sign + (rest if instead == "." else f'"$HOME"/{rest}')
        return shlex.quote(word)


def _is_elsewhere(word: str) -> bool:
    """Whether an override only says where something is kept, by a path of the machine it ran on."""
    key, _, value = word.partition("=")
    name = key.lstrip("+").replace("/", ".")
    return value.startswith("/") and any(name == o or name.startswith(f"{o}.") for o in LEFT_OUT)
