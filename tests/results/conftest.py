"""A finished appendix with its runs, made once, and copies of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks import verify_edits
from benchmarks.verify_edits import Place
from fisher_lab.results import figure_style, report


@pytest.fixture(scope="session")
def original(tmp_path_factory) -> Path:
    """Where an appendix and its runs lie, which is not to be changed."""
    root = tmp_path_factory.mktemp("verify") / "original"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "_figures", lambda table, frame: [])
        verify_edits.make(root)
    return root


@pytest.fixture
def place(original, tmp_path, monkeypatch) -> Place:
    """A copy in the working directory; its figures are copied too, and not drawn again."""
    shutil.copytree(original, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    save = figure_style.save

    def copied(figure, target):
        folders = (original / "appendix", original / "results" / "one")
        sources = [folder / target.parent.name / target.name for folder in folders]
        source = next((s for s in sources if s.with_name(f"{s.name}.pdf").exists()), None)
        if source is None:
            return save(figure, target)
        target.parent.mkdir(parents=True, exist_ok=True)
        return [
            Path(
                shutil.copyfile(
                    source.with_name(source.name + x), target.with_name(target.name + x)
                )
            )
            for x in figure_style.TYPES
        ]

    monkeypatch.setattr(figure_style, "save", copied)
    monkeypatch.setattr(report, "_figures", lambda table, frame: [])
    return Place(tmp_path / "copy")
