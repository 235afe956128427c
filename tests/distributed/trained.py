"""The same training in one process and on ranks; runs on a rank of `rank_pool.py`."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fisher_lab.config.schema import Config
from fisher_lab.curvature import wrappers
from fisher_lab.runs.signals import Interrupted, Watch
from fisher_lab.workload import snapshot, training_loop
from fisher_lab.workload.data_parallel import DataParallel
from tests import training
from tests.distributed.rank_pool import said
from tests.training import Killed, die_at, without_seconds


def config_of(directory: str, dtype: str = "float64", **sections: Any) -> Config:
    sections = {"train": {"eval_every": 2}, "model": {"layers": 2, "dtype": dtype}, **sections}
    sections["kfac"] = {"damping": 0.1, "update_freq": 2, **sections.get("kfac", {})}
    return training.config_of(directory, steps=5, batch_size=5, **sections)


def trained(
    comm: Any,
    config: Config,
    run: str,
    wrapper: str = "ddp",
    disturb: Callable[[nn.Module], None] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """A training from the beginning or from what ``run`` has; the same numbers on every rank.

    Args:
        comm: of the ranks; None for one process.
        config: of `config_of`.
        run: directory of the run, which only rank 0 uses.
        wrapper: ``ddp`` or ``fsdp``.
        disturb: is given the model before the training begins.
        options: of `training_loop.train`.
    """
    parallel = DataParallel(comm, wrapper)
    directory = Path(run) if parallel.is_rank_zero else Path(run, f"of_rank{parallel.rank}")
    directory.mkdir(parents=True, exist_ok=True)

    def begin(model: nn.Module) -> None:
        if disturb is not None:
            disturb(model)
        parallel.prepare(model)

    model, result = training.trained(config, directory, begin, parallel=parallel, **options)
    return {
        "weights": whole(model),
        "curve": without_seconds(result.curve),
        "heldout": result.heldout_loss,
        "diverged_at": result.diverged_at,
        "resumed_at": result.resumed_at,
        "files": sorted(path.name for path in directory.glob("*.*")),
        "seen": (parallel.tokens, parallel.labels),
    }


def whole(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, without shards."""
    named = {name: p.detach() for name, p in model.named_parameters()}
    return {n: t.clone() for n, t in wrappers.whole(named).items()}


def killed(comm: Any, config: Config, run: str, step: int, wrapper: str = "ddp") -> None:
    """Dies after a step."""
    with contextlib.suppress(Killed):
        trained(comm, config, run, wrapper, after_step=die_at(step))


def resumed(comm: Any, config: Config, run: str, wrapper: str, step: int) -> dict[str, Any]:
    """Dies after a step, goes on with other random numbers."""
    killed(comm, config, run, step, wrapper)
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

    def disturb(model: nn.Module) -> None:
        if comm.rank == 1:
            with torch.no_grad():
                next(model.parameters()).view(-1)[0] += 1e-12

    return said(lambda: trained(comm, config, run, disturb=disturb))
