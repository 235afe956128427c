"""Trainings of a few seconds: a text, tiny models on it, deaths between two steps."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from fisher_lab.config.schema import Config
from fisher_lab.config.workload import DataConfig, ModelConfig, RecipeConfig
from fisher_lab.tasks import train
from fisher_lab.workload import models, training_loop
from fisher_lab.workload.inputs import Inputs, prepare


class Killed(BaseException):
    """Stands for a death between two steps: nothing is saved on the way out."""


def die_at(step: int | None) -> Callable[[int], None]:
    def after_step(done: int) -> None:
        if done == step:
            raise Killed

    return after_step


def text_in(directory: Path, lines: int = 400) -> str:
    """Writes the text; the directory as text."""
    text = "\n".join(f"line {n} of {n % 7} and {n * n % 11}" for n in range(lines))
    (directory / "text.txt").write_text(text)
    return str(directory)


def config_of(
    directory: str, kind: str = "gpt2", *, steps: int, batch_size: int, seq_len: int = 16,
    **sections: Any,
) -> Config:  # fmt: skip
    """A tiny model on the text of `text_in`; `sections`: fields by section, or whole values."""
    recipe = RecipeConfig(steps=steps, batch_size=batch_size, seq_len=seq_len, lr=1e-2)
    config = Config(
        device="cpu", progress=False, cache_dir=f"{directory}/cache",
        model=ModelConfig(name=kind, type=kind, layers=1, width=16, heads=2, recipe=recipe),
        data=DataConfig(
            type="text_file", path=f"{directory}/text.txt", vocab_size=300, heldout_fraction=0.2,
            batch_size=2, seq_len=seq_len,
        ),
    )  # fmt: skip
    for section, given in sections.items():
        is_fields = isinstance(given, dict)
        value = dataclasses.replace(getattr(config, section), **given) if is_fields else given
        setattr(config, section, value)
    return config


_MADE: dict[tuple[Any, ...], Inputs] = {}


def inputs_of(config: Config) -> Inputs:
    """Text and tokenizer, read once a process."""
    key = (config.data.path, config.model.type)
    if key not in _MADE:
        _MADE[key] = prepare(config)
    return dataclasses.replace(_MADE[key], cfg=config)


def untrained(config: Config) -> nn.Module:
    """The model with the weights that every training here begins with."""
    return models.with_dtype(inputs_of(config).untrained(1), config.model.dtype)


def trained(
    config: Config, directory: Path, begin: Callable[[nn.Module], Any] | None = None, **options: Any
) -> tuple[nn.Module, training_loop.Result]:
    """A training from the beginning, or from what the directory has; it saves after every step.

    `begin` is given the model first; `options` are those of `training_loop.train`.
    """
    model = untrained(config)
    if begin is not None:
        begin(model)
    run, objective = train.training_run(config, {}), inputs_of(config).objective
    options = {"save_every_s": 0.0, **options}
    return model, training_loop.train(model, objective, run, directory, **options)


def without_seconds(curve: training_loop.Curve) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in row.items() if not key.endswith("seconds")}
        for row in curve.rows
    ]
