"""The collectives on 1, 2 and 3 gloo processes: values, bytes, errors, time-outs."""

from __future__ import annotations

import pytest
import torch

from fisher_lab.curvature.collectives import Alone, slice_of_rank, slice_sizes
from tests.distributed import collective_calls
from tests.distributed.collective_calls import COUNTS, block
from tests.distributed.rank_pool import Pool

SIZES = (1, 2, 3)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.int64])
def test_gather_with_uneven_and_empty_ranks(ranks: Pool, size: int, dtype: torch.dtype) -> None:
    expected = torch.cat([block(r, n, dtype) for r, n in enumerate(COUNTS[:size])])
    for got in ranks.run(collective_calls.all_gather, size, dtype=dtype):
        assert got.dtype == dtype
        assert torch.equal(got, expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("transposed", [False, True])
def test_sum_over_ranks(ranks: Pool, size: int, transposed: bool) -> None:
    expected = torch.stack([block(r, 5, torch.float64) for r in range(size)]).sum(0)
    for got in ranks.run(collective_calls.all_reduce, size, transposed=transposed):
        assert torch.equal(got, expected.T if transposed else expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_exchange_of_columns_for_rows(ranks: Pool, size: int, dtype: torch.dtype) -> None:
    rows = COUNTS[:size]
    whole = torch.cat([
        torch.arange(n * 5).view(-1, 5).to(dtype) + 3 * r for r, n in enumerate(rows)
    ])  # fmt: skip
    answers = ranks.run(collective_calls.exchange, size, dtype=dtype)
    bytes_each = torch.empty(0, dtype=dtype).element_size()
    for rank, (got, moved) in enumerate(answers):
        assert torch.equal(got, whole[:, slice_of_rank(5, rank, size)])
        mine = slice_sizes(5, size)[rank]
        assert moved["sent"] == rows[rank] * (5 - mine) * bytes_each
        assert moved["received"] == (sum(rows) - rows[rank]) * mine * bytes_each


@pytest.mark.parametrize("size", SIZES)
def test_broadcast_and_values(ranks: Pool, size: int) -> None:
    for got in ranks.run(collective_calls.broadcast, size):
        for source, tensor in enumerate(got):
            assert torch.equal(tensor, block(source, 2, torch.bfloat16))
    expected = [{"rank": r, "text": "ü" * r, "none": None} for r in range(size)]
    assert all(got == expected for got in ranks.run(collective_calls.values, size))


@pytest.mark.parametrize("size", [2, 3])
def test_bytes_that_are_counted(ranks: Pool, size: int) -> None:
    padded = max(COUNTS[:size]) * 3 * 4
    for rank, got in enumerate(ranks.run(collective_calls.traffic, size)):
        ring = 2 * (size - 1) * 96 // size
        assert got["all_reduce"] == (1, ring, ring)
        assert got["all_gather"] == (1, (size - 1) * padded, (size - 1) * padded)
        assert got["broadcast"] == ((1, (size - 1) * 8, 0) if rank == 0 else (1, 0, 8))


@pytest.mark.parametrize("size", [2, 3])
def test_an_error_of_one_rank_is_raised_on_all(ranks: Pool, size: int) -> None:
    for rank, got in enumerate(ranks.run(collective_calls.failing, size)):
        expected = (
            "ValueError: no label" if rank == 1 else "RankError: rank 1: ValueError: no label"
        )
        assert got == expected
    for got in ranks.run(collective_calls.differing, size):
        assert "model: rank 0 has 'of 0', rank 1 has 'of 1'" in got


def test_a_collective_that_waits_in_vain_ends_and_is_named(ranks: Pool) -> None:
    first, second = ranks.run(collective_calls.stuck, 2, seconds=5.0)
    assert "rank 0 of 2: all_reduce of float32[3] failed after" in first
    assert second == "waited"


@pytest.mark.parametrize(("length", "size"), [(0, 3), (1, 3), (7, 3), (9, 3), (5, 1)])
def test_shares_cover_everything_once(length: int, size: int) -> None:
    seen = [i for rank in range(size) for i in range(length)[slice_of_rank(length, rank, size)]]
    assert seen == list(range(length))
    assert max(slice_sizes(length, size)) - min(slice_sizes(length, size)) <= 1


def test_one_process_moves_nothing() -> None:
    x, alone = torch.arange(6.0).view(3, 2), Alone()
    assert alone.all_reduce(x) is x
    assert alone.all_gather(x, [3]) is x
    assert alone.exchange(x, [6], [6]) is x
    assert alone.broadcast(x, 0) is x
    assert alone.all_gather_objects({"a": 1}) == [{"a": 1}]
