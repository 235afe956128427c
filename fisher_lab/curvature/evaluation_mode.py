"""Leaves the caller's model and random state as they were found."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def isolated(model: nn.Module, *, seed: int, deterministic: bool = False) -> Iterator[None]:
    """Evaluates a model without leaving a trace in it.

    Within: every module is in ``eval()`` mode (no dropout; BatchNorm uses its running statistics
    and does not update them), autograd is on, the generators of the host and of every CUDA device
    are seeded, and scaled dot-product attention uses its plain formula (the fused kernels have
    neither a batching rule nor a forward-mode or second derivative on CPU; ``docs/math.md``,
    section 8). On leaving, each module's mode, the generators and the global switches are what they
    were.

    ``deterministic`` turns on ``torch.use_deterministic_algorithms`` and sets
    ``CUBLAS_WORKSPACE_CONFIG``; operations without a deterministic form raise an error.
    """
    with ExitStack() as stack:
        stack.enter_context(random_state_kept())
        stack.enter_context(torch.enable_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if deterministic:
            stack.enter_context(deterministic_algorithms())
        stack.enter_context(evaluating(model))
        seed_generators(seed)
        yield


def random_state_kept() -> AbstractContextManager[None]:
    """Puts the generators of the host and of every CUDA device back as they were."""
    # All devices, not the model's alone: seeding reaches every one of them.
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    return torch.random.fork_rng(devices=devices)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts every module of a model into ``eval()`` mode, and back into its own mode at the end."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Puts the model's buffers back as they were, also after an error.

    In ``train()`` mode a forward pass moves the running statistics of BatchNorm, and whatever
    else a module keeps of its passes in buffers, in attributes that are numbers, or in a cache that
    was None (a rotary embedding that has grown keeps its frequencies and the length that they are
    for).

    Args:
        model: of which one pass or several are made meanwhile.
    """
    modules = [(m, dict(m._buffers), _plain_attributes(m)) for m in model.modules()]
    kept = [
        (buffer, buffer.detach().clone())
        for _, buffers, _ in modules
        for buffer in buffers.values()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for module, buffers, attributes in modules:
            module._buffers.clear()  # of those that a pass has made
            module._buffers.update(buffers)
            vars(module).update(attributes)
        with torch.no_grad():
            for buffer, before in kept:
                if not torch.equal(buffer, before):  # BatchNorm counts no version up
                    buffer.copy_(before)


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    """What a module keeps in attributes of its own that are numbers, words or None."""
    if isinstance(module, nn.parallel.DistributedDataParallel):
        return {}  # its own state of the passes goes on
    plain = int | float | str | None
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, plain) and name not in _OF_EVERY_MODULE
    }


def seed_generators(seed: int) -> None:
    """Seeds the host's generator and those of all CUDA devices, if CUDA is in use.

    ``torch.manual_seed`` would do more than :func:`isolated` can undo: where CUDA is not in use
    yet, it leaves a seed behind for the moment at which it is.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """Turns on deterministic algorithms, cuBLAS's workspace included, for a while."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    benchmark = torch.backends.cudnn.benchmark
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark
        if workspace is None:
            os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
