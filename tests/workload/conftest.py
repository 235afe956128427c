"""A text of a few thousand words and models small enough to train in a second."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fisher_lab.config.schema import Config
from fisher_lab.config.workload import DataConfig
from fisher_lab.workload import text
from fisher_lab.workload.inputs import Inputs, prepare
from tests.training import config_of


@pytest.fixture(scope="session")
def text_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six documents of 6000 characters."""
    directory = tmp_path_factory.mktemp("text")
    documents = [content for _, content in text.load(DataConfig()).documents if len(content) > 6000]
    for number, content in enumerate(documents[:6]):
        (directory / f"{number}.txt").write_text(content[:6000], encoding="utf-8")
    return directory


@pytest.fixture(scope="session")
def cache_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def config(text_directory: Path, cache_directory: Path) -> Callable[..., Config]:
    """``config("t5", steps=3, dropout=0.1)``: tiny, on the text above, in a cache of its own."""

    def make(kind: str = "gpt2", *, steps: int = 2, lr: float = 3e-3, **model: Any) -> Config:
        data = {"name": "text_file", "path": str(text_directory), "vocab_size": 400}
        made = config_of(
            str(text_directory), kind, steps=steps, batch_size=2, seq_len=32, model=model,
            data=data, train={"eval_every": 2, "save_every_s": 0.0},
            cache_dir=str(cache_directory),
        )  # fmt: skip
        made.model.recipe.lr = lr
        return made

    return make


@pytest.fixture(scope="session")
def inputs(config: Callable[..., Config]) -> Callable[..., Inputs]:
    made: dict[str, Inputs] = {}

    def get(kind: str) -> Inputs:
        if kind not in made:
            made[kind] = prepare(config(kind))
        return made[kind]

    return get
