"""A plain loop with ``KFACOptimizer`` under DDP and FSDP2; runs on a rank of `rank_pool.py`."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from fisher_lab import KFACNaturalGradient
from fisher_lab.optim import KFACOptimizer
from tests.distributed.kfac_on_ranks import model_of, wrapped
from tests.distributed.rank_pool import said
from tests.distributed.trained import whole

Batch = dict[str, Tensor]


def built(comm: Any, kind: str, mode: str) -> tuple[Any, KFACOptimizer]:
    """A model in its wrapper, and its optimizer; without a communicator both in one process."""
    model = model_of("gpt2", torch.float64)
    model = model if comm is None else wrapped(comm, model, kind)
    kfac = KFACNaturalGradient(
        damping=0.1, update_freq=2, communicator=comm, kfac_distributed_reduce=mode
    )
    apart = comm if mode == "none" else None
    return model, KFACOptimizer(model, kfac, lr=0.05, communicator=apart)


def steps(model: Any, optimizer: KFACOptimizer, batches: list[Batch]) -> list[float]:
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def weights(model: Any) -> dict[str, Tensor]:
    return whole(getattr(model, "module", model))


def plain(comm: Any, kind: str, mode: str, batches: list[Batch]) -> dict[str, Any]:
    model, optimizer = built(comm, kind, mode)
    losses = steps(model, optimizer, batches)
    return {"losses": losses, "weights": weights(model), "done": optimizer.done}


def refused(comm: Any, kind: str, batches: list[Batch]) -> str:
    model, optimizer = built(comm, kind, "gram")
    return said(lambda: steps(model, optimizer, batches))


def restored(comm: Any, kind: str, directory: str, batches: list[Batch]) -> dict[str, Any]:
    """Three steps, a distributed checkpoint, and the rest in a model that has made one step."""
    model, optimizer = built(comm, kind, "gram")
    early = get_optimizer_state_dict(model, optimizer)  # before the first step: no trace
    steps(model, optimizer, batches[:3])
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    save(state, checkpoint_id=directory, process_group=comm.group)
    again, other = built(comm, kind, "gram")
    steps(again, other, batches[:1])
    state = {
        "model": get_model_state_dict(again),
        "optimizer": get_optimizer_state_dict(again, other),
    }
    load(state, checkpoint_id=directory, process_group=comm.group)
    set_model_state_dict(again, state["model"])
    set_optimizer_state_dict(again, other, state["optimizer"])
    steps(again, other, batches[3:])
    return {"weights": weights(again), "done": other.done, "early": sorted(early)}


def recipe(comm: Any, code: str, batches: list[Batch]) -> dict[str, Any]:
    """Runs a snippet of the documentation on shards; the losses of the batches before and after."""
    from torch.distributed.device_mesh import DeviceMesh

    model = model_of("gpt2", torch.float32)
    before = [float(model(**batch).loss) for batch in batches]
    world: dict[str, Any] = {
        "model": model, "batches": batches * 10, "mesh": DeviceMesh.from_group(comm.group, "cpu"),
        "engine": KFACNaturalGradient(damping=0.1, communicator=comm),
    }  # fmt: skip
    exec(compile(code, "recipe", "exec"), world)
    after = [float(model(**batch).loss) for batch in batches]
    return {"before": sum(before), "after": sum(after), "done": world["optimizer"].done}
