"""What the ranks do in `test_communicator.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from fisher_lab.curvature.collectives import (
    TorchCommunicator,
    same_everywhere,
    slice_sizes,
    together,
)
from fisher_lab.curvature.errors import CurvatureError

COUNTS = [40, 0, 7]


def block(rank: int, rows: int, dtype: torch.dtype) -> Tensor:
    return (torch.arange(rows * 3).view(rows, 3) + 100 * rank).to(dtype)


def all_gather(comm, dtype: torch.dtype) -> Tensor:
    rows = COUNTS[: comm.size]
    return comm.all_gather(block(comm.rank, rows[comm.rank], dtype), rows)


def all_reduce(comm, transposed: bool) -> Tensor:
    x = block(comm.rank, 5, torch.float64)
    return comm.all_reduce(x.T if transposed else x)


def exchange(comm, dtype: torch.dtype) -> tuple[Tensor, dict]:
    """Columns for rows, as the mode `gram` does it: `[T_r, 5]` becomes `[T, share of 5]`."""
    comm = TorchCommunicator(comm.group)
    rows, widths = COUNTS[: comm.size], slice_sizes(5, comm.size)
    local = torch.arange(rows[comm.rank] * 5).view(-1, 5).to(dtype) + 3 * comm.rank
    pieces = local.split(widths, dim=1)
    flat = torch.cat([piece.reshape(-1) for piece in pieces])
    mine = widths[comm.rank]
    got = comm.exchange(flat, [rows[comm.rank] * w for w in widths], [n * mine for n in rows])
    moved = comm.traffic["exchange"]
    return got.view(-1, mine), {"sent": moved.sent, "received": moved.received}


def broadcast(comm) -> list[Tensor]:
    return [comm.broadcast(block(comm.rank, 2, torch.bfloat16), s) for s in range(comm.size)]


def values(comm) -> list:
    return comm.all_gather_objects({"rank": comm.rank, "text": "ü" * comm.rank, "none": None})


def traffic(comm) -> dict[str, tuple[int, int, int]]:
    comm.reset()
    comm.all_reduce(torch.zeros(6, 2, dtype=torch.float64))
    rows = COUNTS[: comm.size]
    comm.all_gather(torch.zeros(rows[comm.rank], 3), rows)
    comm.broadcast(torch.zeros(4, dtype=torch.float16), 0)
    found = {name: (t.calls, t.sent, t.received) for name, t in comm.traffic.items()}
    total = comm.totals()
    assert total.seconds >= sum(t.seconds for t in comm.traffic.values()) > 0
    assert total.sent == sum(sent for _, sent, _ in found.values())
    return found


def failing(comm) -> str:
    """Rank 1 alone has an error: it must be raised everywhere."""

    def step() -> None:
        if comm.rank == 1:
            raise ValueError("no label")

    try:
        together(comm, step)
    except (ValueError, CurvatureError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def differing(comm) -> str:
    same_everywhere(comm, "model", "alike")
    try:
        same_everywhere(comm, "model", f"of {comm.rank}")
    except CurvatureError as error:
        return str(error)
    return "nothing"


def stuck(comm, seconds: float) -> str:
    """Rank 0 reduces alone; the others wait until it has given up."""
    from datetime import timedelta

    import torch.distributed as dist

    group = dist.new_group(list(range(comm.size)), timeout=timedelta(seconds=seconds))
    found = "waited"
    if comm.rank == 0:
        try:
            TorchCommunicator(group).all_reduce(torch.ones(3))
        except CurvatureError as error:
            found = str(error)
    dist.barrier(group=comm.group)
    return found
