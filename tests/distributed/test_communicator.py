"""The collectives on 1, 2 and 3 gloo processes: values, bytes, errors, time-outs."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fisher_lab.curvature.collectives import (
    Alone,
    TorchCommunicator,
    same_everywhere,
    slice_of_rank,
    slice_sizes,
    together,
)
from tests.distributed.rank_pool import said

COUNTS = [40, 0, 7]
SIZES = (1, 2, 3)


def block(rank: int, rows: int, dtype: torch.dtype) -> Tensor:
    return (torch.arange(rows * 3).view(rows, 3) + 100 * rank).to(dtype)


def all_gather(comm, dtype: torch.dtype) -> Tensor:
    rows = COUNTS[: comm.size]
    return comm.all_gather(block(comm.rank, rows[comm.rank], dtype), rows)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.int64])
def test_gather_with_uneven_and_empty_ranks(ranks, size, dtype):
    expected = torch.cat([block(r, n, dtype) for r, n in enumerate(COUNTS[:size])])
    for got in ranks.run(all_gather, size, dtype=dtype):
        assert got.dtype == dtype
        assert torch.equal(got, expected)


def all_reduce(comm, transposed: bool) -> Tensor:
    x = block(comm.rank, 5, torch.float64)
    return comm.all_reduce(x.T if transposed else x)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("transposed", [False, True])
def test_sum_over_ranks(ranks, size, transposed):
    expected = torch.stack([block(r, 5, torch.float64) for r in range(size)]).sum(0)
    for got in ranks.run(all_reduce, size, transposed=transposed):
        assert torch.equal(got, expected.T if transposed else expected)


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


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_exchange_of_columns_for_rows(ranks, size, dtype):
    rows = COUNTS[:size]
    whole = torch.cat([
        torch.arange(n * 5).view(-1, 5).to(dtype) + 3 * r for r, n in enumerate(rows)
    ])  # fmt: skip
    answers = ranks.run(exchange, size, dtype=dtype)
    bytes_each = torch.empty(0, dtype=dtype).element_size()
    for rank, (got, moved) in enumerate(answers):
        assert torch.equal(got, whole[:, slice_of_rank(5, rank, size)])
        mine = slice_sizes(5, size)[rank]
        assert moved["sent"] == rows[rank] * (5 - mine) * bytes_each
        assert moved["received"] == (sum(rows) - rows[rank]) * mine * bytes_each


def broadcast(comm) -> list[Tensor]:
    return [comm.broadcast(block(comm.rank, 2, torch.bfloat16), s) for s in range(comm.size)]


def values(comm) -> list:
    return comm.all_gather_objects({"rank": comm.rank, "text": "ü" * comm.rank, "none": None})


@pytest.mark.parametrize("size", SIZES)
def test_broadcast_and_values(ranks, size):
    for got in ranks.run(broadcast, size):
        for source, tensor in enumerate(got):
            assert torch.equal(tensor, block(source, 2, torch.bfloat16))
    expected = [{"rank": r, "text": "ü" * r, "none": None} for r in range(size)]
    assert all(got == expected for got in ranks.run(values, size))


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


@pytest.mark.parametrize("size", [2, 3])
def test_bytes_that_are_counted(ranks, size):
    padded = max(COUNTS[:size]) * 3 * 4
    for rank, got in enumerate(ranks.run(traffic, size)):
        ring = 2 * (size - 1) * 96 // size
        assert got["all_reduce"] == (1, ring, ring)
        assert got["all_gather"] == (1, (size - 1) * padded, (size - 1) * padded)
        assert got["broadcast"] == ((1, (size - 1) * 8, 0) if rank == 0 else (1, 0, 8))


def failing(comm) -> str:
    """Rank 1 alone has an error: it must be raised everywhere."""

    def step() -> None:
        if comm.rank == 1:
            raise ValueError("no label")

    return said(lambda: together(comm, step))


def differing(comm) -> str:
    same_everywhere(comm, "model", "alike")
    return said(lambda: same_everywhere(comm, "model", f"of {comm.rank}"))


@pytest.mark.parametrize("size", [2, 3])
def test_an_error_of_one_rank_is_raised_on_all(ranks, size):
    own, others = "ValueError: no label", "RankError: rank 1: ValueError: no label"
    assert ranks.run(failing, size) == [others, own, others][:size]
    for got in ranks.run(differing, size):
        assert "model: rank 0 has 'of 0', rank 1 has 'of 1'" in got


def stuck(comm, seconds: float) -> str:
    """Rank 0 reduces alone; the others wait until it has given up."""
    group = dist.new_group(list(range(comm.size)), timeout=timedelta(seconds=seconds))
    found = "waited"
    if comm.rank == 0:
        found = said(lambda: TorchCommunicator(group).all_reduce(torch.ones(3)))
    dist.barrier(group=comm.group)
    return found


def test_a_collective_that_waits_in_vain_ends_and_is_named(ranks):
    first, second = ranks.run(stuck, 2, seconds=5.0)
    assert "rank 0 of 2: all_reduce of float32[3] failed after" in first
    assert second == "waited"


@pytest.mark.parametrize(("length", "size"), [(0, 3), (1, 3), (7, 3), (9, 3), (5, 1)])
def test_shares_cover_everything_once(length, size):
    seen = [i for rank in range(size) for i in range(length)[slice_of_rank(length, rank, size)]]
    assert seen == list(range(length))
    assert max(slice_sizes(length, size)) - min(slice_sizes(length, size)) <= 1


def test_one_process_moves_nothing():
    x, alone = torch.arange(6.0).view(3, 2), Alone()
    assert alone.all_reduce(x) is x
    assert alone.all_gather(x, [3]) is x
    assert alone.exchange(x, [6], [6]) is x
    assert alone.broadcast(x, 0) is x
    assert alone.all_gather_objects({"a": 1}) == [{"a": 1}]
