"""A text of a few thousand words and models small enough to train in a second."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fisher_lab.config.schema import Config
from fisher_lab.config.workload import DataConfig, ModelConfig, RecipeConfig, TrainConfig
from fisher_lab.workload import text
from fisher_lab.workload.inputs import Inputs, prepare


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
        recipe = RecipeConfig(steps=steps, batch_size=2, seq_len=32, lr=lr)
        sizes: dict[str, Any] = {"layers": 1, "width": 16, "heads": 2} | model
        return Config(
            device="cpu",
            progress=False,
            cache_dir=str(cache_directory),
            model=ModelConfig(name=kind, type=kind, recipe=recipe, **sizes),
            data=DataConfig(
                name="text_file",
                type="text_file",
                path=str(text_directory),
                vocab_size=400,
                heldout_fraction=0.2,
                batch_size=2,
                seq_len=32,
            ),
            train=TrainConfig(eval_every=2, save_every_s=0.0),
        )

    return make


@pytest.fixture(scope="session")
def inputs(config: Callable[..., Config]) -> Callable[..., Inputs]:
    made: dict[str, Inputs] = {}

    def get(kind: str) -> Inputs:
        if kind not in made:
            made[kind] = prepare(config(kind))
        return made[kind]

    return get
