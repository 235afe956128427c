"""The same training in one process and on ranks; runs on a rank of `pool.py`."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fisher_lab.config.schema import Config
from fisher_lab.config.workload import DataConfig, ModelConfig, RecipeConfig
from fisher_lab.curvature import wrappers
from fisher_lab.runs.signals import Interrupted, Watch
from fisher_lab.tasks import train
from fisher_lab.workload import models, snapshot, training_loop
from fisher_lab.workload.data_parallel import DataParallel
from fisher_lab.workload.inputs import Inputs, prepare

STEPS = 5


class Killed(BaseException):
    """Stands for a death between two steps: nothing is saved on the way out."""


def config_of(directory: str, kind: str = "gpt2", dtype: str = "float64", **changes: Any) -> Config:
    """A tiny model on a text of its own; ``changes`` are fields by section."""
    config = Config(
        device="cpu",
        progress=False,
        cache_dir=f"{directory}/cache",
        model=ModelConfig(
            name=kind, type=kind, layers=2, width=16, heads=2, dtype=dtype,
            recipe=RecipeConfig(steps=STEPS, batch_size=5, seq_len=16, lr=1e-2),
        ),
        data=DataConfig(
            type="text_file", path=f"{directory}/text.txt", vocab_size=300, heldout_fraction=0.2,
            batch_size=2, seq_len=16,
        ),
    )  # fmt: skip
    config.kfac.damping, config.kfac.update_freq = 0.1, 2
    for section, values in {"train": {"eval_every": 2}, **changes}.items():
        value = dataclasses.replace(getattr(config, section), **values)
        setattr(config, section, value)
    return config


def text_in(directory: Path) -> str:
    """Writes the text; the directory as text."""
    lines = (f"line {n} of {n % 7} and {n * n % 11}" for n in range(400))
    (directory / "text.txt").write_text("\n".join(lines))
    return str(directory)


_MADE: dict[tuple[Any, ...], Inputs] = {}


def inputs_of(config: Config) -> Inputs:
    """Text and tokenizer, read once a process."""
    key = (config.data.path, config.model.type)
    if key not in _MADE:
        _MADE[key] = prepare(config)
    return dataclasses.replace(_MADE[key], cfg=config)


def trained(
    comm: Any,
    config: Config,
    run: str,
    wrapper: str = "ddp",
    after_step: Callable[[int], None] | None = None,
    disturb: Callable[[Any], None] | None = None,
    signals: Watch | None = None,
) -> dict[str, Any]:
    """A training from the beginning or from what ``run`` has; the same numbers on every rank.

    Args:
        comm: of the ranks; None for one process.
        config: of `config_of`.
        run: directory of the run, which only rank 0 uses.
        wrapper: ``ddp`` or ``fsdp``.
        after_step: as in `training.train`.
        disturb: is given the model before the training begins.
        signals: as in `training.train`.
    """
    parallel = DataParallel(comm, wrapper)
    directory = Path(run) if parallel.is_rank_zero else Path(run, f"of_rank{parallel.rank}")
    directory.mkdir(parents=True, exist_ok=True)
    inputs = inputs_of(config)
    model = models.with_dtype(inputs.untrained(1), config.model.dtype)
    if disturb is not None:
        disturb(model)
    parallel.prepare(model)
    rows: list[dict[str, Any]] = []
    result = training_loop.train(
        model,
        inputs.objective,
        train.training_run(config, {}),
        directory,
        save_every_s=0.0,
        after_step=after_step,
        signals=signals,
        on_row=lambda row: rows.append(dict(row)),
        parallel=parallel,
    )
    return {
        "weights": whole(model),
        "curve": [
            {key: value for key, value in row.items() if not key.endswith("seconds")}
            for row in result.curve.rows
        ],
        "heldout": result.heldout_loss,
        "diverged_at": result.diverged_at,
        "resumed_at": result.resumed_at,
        "files": sorted(path.name for path in directory.glob("*.*")),
        "seen": (parallel.tokens, parallel.labels),
    }


def initial(config: Config) -> dict[str, Tensor]:
    """The weights that every training here begins with."""
    untrained = inputs_of(config).untrained(1)
    return whole(models.with_dtype(untrained, config.model.dtype))


def whole(model: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters, without shards."""
    return {n: t.clone() for n, t in wrappers.whole(named(model)).items()}


def named(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def resumed(comm: Any, config: Config, run: str, wrapper: str, die_at: int) -> dict[str, Any]:
    """Dies after a step, goes on with other random numbers."""

    def after_step(done: int) -> None:
        if done == die_at:
            raise Killed

    with contextlib.suppress(Killed):
        trained(comm, config, run, wrapper, after_step)
    torch.manual_seed(99)
    return trained(comm, config, run, wrapper)


def signalled(comm: Any, config: Config, run: str, rank: int, signum: int) -> dict[str, Any]:
    """One rank gets a signal after its second step."""

    def after_step(done: int) -> None:
        if done == 2 and comm.rank == rank:
            os.kill(os.getpid(), signum)

    with Watch() as signals:
        try:
            trained(comm, config, run, after_step=after_step, signals=signals)
        except Interrupted as stop:
            path = Path(run, training_loop.STATE_FILE)
            return {"signal": int(stop.signum), "steps": snapshot.load(path)["steps"]}
    raise AssertionError("the signal did not end the training")


def unlike(comm: Any, config: Config, run: str) -> str:
    """Rank 1 begins with other weights."""

    def disturb(model: torch.nn.Module) -> None:
        if comm.rank == 1:
            with torch.no_grad():
                next(model.parameters()).view(-1)[0] += 1e-12

    try:
        trained(comm, config, run, disturb=disturb)
    except Exception as error:
        return str(error)
    return "nothing"
