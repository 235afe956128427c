"""A small task in the place of a real one, and a way through the front door."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fisher_lab import cli
from fisher_lab.tasks import preflight, runner


@dataclass
class Answer:
    """What came out of the door."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.err.strip().splitlines()

    @property
    def refusal(self) -> str:
        """The line of a call that was refused: exit code 2, and nothing else was said."""
        assert (self.code, self.out) == (2, ""), self.err
        (line,) = self.lines
        return line


@pytest.fixture
def door(capfd: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """Call the application in this process, as ``fisher-lab ARGUMENTS`` does."""

    def call(*arguments: str) -> Answer:
        capfd.readouterr()
        code = cli.main(list(arguments))
        return Answer(code, *capfd.readouterr())

    return call


def install_task(monkeypatch: pytest.MonkeyPatch, run: Callable[[Any, Any], None]) -> None:
    """Put a function ``run(config, run)`` in the place of every task; nothing is prepared."""
    module = types.ModuleType("fake_task")
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_task", module)
    monkeypatch.setattr(runner, "TASKS", dict.fromkeys(runner.TASKS, "fake_task"))
    monkeypatch.setattr(runner, "_content", lambda config: ({"data": "abc"}, None))
    monkeypatch.setattr(preflight, "preflight", lambda config: {"data": "abc"})


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The configurations that a task was run with. The task raises for ``seed=13``."""
    configs: list[Any] = []

    def run(config: Any, run: Any) -> None:
        configs.append(config)
        if config.seed == 13:
            raise RuntimeError("thirteen is\nnot a seed")
        run.metrics({"loss": 1.5, "tokens": 512, "kfac/total_s": 0.25})
        run.table("layers.csv", [{"name": "h.0.attn", "method": "woodbury", "in": 128, "out": 384}])

    install_task(monkeypatch, run)
    return configs


@pytest.fixture
def runs(tmp_path: Path) -> Callable[[], list[tuple[Path, dict[str, Any]]]]:
    """All run directories under the working directory, with their records, by name.

    Also while a sweep goes on: directories and records may go as soon as they have been seen.
    """

    def find() -> list[tuple[Path, dict[str, Any]]]:
        found = []
        for file in sorted(Path(place, "run.json") for place, _, _ in os.walk(tmp_path)):
            with contextlib.suppress(FileNotFoundError):
                found.append((file.parent, json.loads(file.read_text())))
        return found

    return find
