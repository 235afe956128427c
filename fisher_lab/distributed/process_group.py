"""A rank's time in its process group: joining it, and leaving it in good order."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from fisher_lab.curvature.collectives import TorchCommunicator, world

_SOONER = 0.9


def backend_of(name: str, device: str) -> str:
    """Returns the backend: ``auto`` is nccl where the ranks compute on CUDA devices, else gloo."""
    if name != "auto":
        return name
    cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    return "nccl" if cuda else "gloo"


def make_errors_raise(environment: MutableMapping[str, str], *, watchdog: bool) -> None:
    """Asks nccl to raise an error where a collective is waited for, unless the user has said else.

    By default a watchdog thread of torch aborts the process (SIGABRT), and nobody learns which
    collective it was. A blocking wait does without the watchdog; collectives that are never waited
    for on the host, as those of ``fully_shard``, would then have no time-out at all.

    Args:
        environment: usually ``os.environ``; read by torch when the group is made.
        watchdog: leave the watchdog on.
    """
    known = ("TORCH_NCCL_BLOCKING_WAIT", "NCCL_BLOCKING_WAIT")
    if not watchdog and not any(name in environment for name in known):
        environment[known[0]] = "1"


@contextmanager
def session(
    backend: str, device: str = "auto", *, timeout_s: float = 600.0, watchdog: bool = False
) -> Iterator[TorchCommunicator]:
    """Joins the process group that the environment names (``RANK``, ``WORLD_SIZE``, ...).

    Args:
        backend: ``gloo``, ``nccl`` or ``auto``.
        device: ``cpu``, ``cuda`` or ``auto``; a rank on CUDA takes the device of its local rank.
        timeout_s: a collective that waits longer than this fails.
        watchdog: see :func:`make_errors_raise`.

    Yields:
        The communicator of all ranks.
    """
    chosen = backend_of(backend, device)
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(local % torch.cuda.device_count())
    one_node = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    if chosen == "gloo" and one_node and sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # no name look-up, no network
    if "nccl" in chosen:
        make_errors_raise(os.environ, watchdog=watchdog)
    dist.init_process_group(chosen, timeout=timedelta(seconds=timeout_s))
    found = world()
    communicator = TorchCommunicator() if found is None else found
    if "nccl" in chosen:
        # Before the watchdog's time, where there is one: the error names the collective.
        communicator.patience = timedelta(seconds=_SOONER * timeout_s)
    try:
        yield communicator
        # A rank that leaves while another is still talking aborts it.
        communicator.share(None)
    finally:
        dist.destroy_process_group()
