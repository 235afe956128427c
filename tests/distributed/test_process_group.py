"""What nccl is asked for, and that its errors name the collective; no GPU is needed for that."""

import os
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fisher_lab.curvature.collectives import CommunicationError, TorchCommunicator
from fisher_lab.distributed import process_group


@pytest.mark.parametrize(
    ("given", "watchdog", "expected"),
    [
        ({}, False, {"TORCH_NCCL_BLOCKING_WAIT": "1"}),
        ({"TORCH_NCCL_BLOCKING_WAIT": "0"}, False, {"TORCH_NCCL_BLOCKING_WAIT": "0"}),
        ({"NCCL_BLOCKING_WAIT": "0"}, False, {"NCCL_BLOCKING_WAIT": "0"}),
        ({}, True, {}),
        ({"TORCH_NCCL_BLOCKING_WAIT": "1"}, True, {"TORCH_NCCL_BLOCKING_WAIT": "1"}),
    ],
)
def test_nccl_is_asked_to_raise_unless_the_user_has_said_else(given, watchdog, expected):
    environment = dict(given)
    process_group.make_errors_raise(environment, watchdog=watchdog)
    assert environment == expected


class Made(Exception):
    """The group would be made now."""


@pytest.mark.parametrize(("backend", "expected"), [("nccl", "1"), ("gloo", None)])
def test_it_is_asked_before_the_group_is_made(monkeypatch, backend, expected):
    monkeypatch.setenv("TORCH_NCCL_BLOCKING_WAIT", "0")  # so that it is put back afterwards
    monkeypatch.delenv("TORCH_NCCL_BLOCKING_WAIT")
    seen: list[Any] = []

    def make(name: str, timeout: timedelta) -> None:
        seen.append((name, os.environ.get("TORCH_NCCL_BLOCKING_WAIT"), timeout))
        raise Made

    monkeypatch.setattr(dist, "init_process_group", make)
    with pytest.raises(Made), process_group.session(backend, "cpu", timeout_s=7):
        pass
    assert seen == [(backend, expected, timedelta(seconds=7))]


class Late:
    """As nccl's: handed back at once, and the time-out comes where it is waited for."""

    def wait(self, timeout: timedelta | None = None) -> None:
        raise RuntimeError(f"Work timed out, waited for {timeout}\nand more lines")


def test_a_time_out_that_comes_with_the_wait_names_the_collective(monkeypatch):
    def started(*_: Any, async_op: bool, **__: Any) -> Late | None:
        return Late() if async_op else None  # without it there is nothing to wait for

    for name in ("all_reduce", "broadcast", "all_to_all_single"):
        monkeypatch.setattr(dist, name, started)
    monkeypatch.setattr("fisher_lab.curvature.collectives._gather_into", started)
    for name, value in (("get_rank", 0), ("get_world_size", 2), ("get_backend", "gloo")):
        monkeypatch.setattr(dist, name, lambda _, value=value: value)
    monkeypatch.setattr(dist, "get_global_rank", lambda _, rank: rank)
    communicator = TorchCommunicator(object())  # type: ignore[arg-type]
    communicator.patience = timedelta(seconds=9)
    x = torch.ones(2, 3)
    calls = {
        "all_reduce": lambda: communicator.all_reduce(x),
        "all_gather": lambda: communicator.all_gather(x, [2, 2]),
        "broadcast": lambda: communicator.broadcast(x, 0),
        "exchange": lambda: communicator.exchange(x.view(-1), [3, 3], [3, 3]),
    }
    for name, call in calls.items():
        with pytest.raises(CommunicationError) as caught:
            call()
        assert f"rank 0 of 2: {name} of float32[" in str(caught.value)
        assert "Work timed out, waited for 0:00:09" in str(caught.value)
        assert "another rank has ended, is stuck" in str(caught.value)
