"""When the device is full, one side of a layer moves to host memory, and the numbers stay.

The stub raises `torch.OutOfMemoryError` once, at the n-th operation of the factors' own work that
takes memory, for every n: each stage is hit, on the A and on the G side apart.
"""

import gc
import logging
import weakref
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fisher_lab.curvature import memory
from fisher_lab.curvature.kfac import accumulators
from fisher_lab.curvature.kfac.accumulators import (
    GradientAccumulator,
    MomentAccumulator,
    NormAccumulator,
)
from fisher_lab.curvature.kfac.factors import DenseFactor, WoodburyFactor
from tests import models, reference
from tests.capturing import engine
from tests.reference import Damping

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
LOGGER = "fisher_lab.curvature.memory"


def storage_of(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


class FullOnce(TorchDispatchMode):
    """Raises once, in place of the n-th operation that takes memory."""

    def __init__(self, at: int | None) -> None:
        super().__init__()
        self.at, self.count = at, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {storage_of(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        takes = isinstance(result, torch.Tensor) and storage_of(result) not in given
        if takes and result.numel() > 1:
            self.count += 1
            if self.count == self.at:
                raise torch.OutOfMemoryError("no room (stub)")
        return result


def case_on(device: str, dtype=torch.float32, *, tied: bool = False):
    case = models.CASES["gpt2_untied"]
    batch = {k: v.to(device) for k, v in case.batch("few").items()}
    model = models.seeded(models.gpt2, dtype) if tied else case.model(dtype)
    return model.to(device), batch


@contextmanager
def only(monkeypatch, owner, name, stub):
    """Lets the stub see what one method does, and nothing else."""
    original = getattr(owner, name)

    def watched(self, *args, **kwargs):
        with stub:
            return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, watched)
        yield


def warnings(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == LOGGER]


def through(device, policy, monkeypatch, stage=None, at=None, *, batches=1, **settings):
    """Collects and applies, the stub watching one stage; returns result, engine and stub."""
    model, batch = case_on(device, tied="tied" in settings)
    kfac = engine(policy, Damping(1e-3, 1e-3, 50.0), **{"norm_layers": False, **settings})
    stub = FullOnce(at)
    with nullcontext() if stage is None else only(monkeypatch, *stage, stub):
        kfac.collect_kfac_factors(model, [batch] * batches, keep_gradient=True)
        return kfac.compute_natural_gradient(None, model), kfac, stub


def stages():
    from fisher_lab.curvature.kfac import refresh
    from fisher_lab.curvature.kfac.factors import Damped
    from fisher_lab.curvature.kfac.factors.diagonal import DampedDiagonal, DampedDiagonalLowRank
    from fisher_lab.curvature.kfac.factors.woodbury import DampedWoodbury
    from fisher_lab.curvature.kfac.statistics import TrueFisherHead

    two = {"batches": 2}
    few = {"max_columns": 8, "max_dense_dim": 40, "exclude": ["*mlp.c_proj"]}
    low = two | few | {"column_reduction": "lowrank"}
    head, pooled = {"kfac_true_fisher_head": True}, {"tied": "sum"}
    joined, norms = (GradientAccumulator, "factor"), {"norm_layers": True}
    return {
        "sum of A": (MomentAccumulator, "add", "A side", "all", {}),
        "room for A": (MomentAccumulator, "__init__", "A side", "all", {}),
        "sum of G": (GradientAccumulator, "to_matrix", "G side", "small_only", {}),
        "columns put together": (*joined, "G side", "all", two),
        "columns stored": (*joined, "G side", "all", two | {"woodbury_dtype": "fp64"}),
        "unrounded columns": (
            GradientAccumulator, "exact_factor", "G side", "all", two | {"woodbury_dtype": "fp16"},
        ),
        "subsample": (accumulators, "chosen_rows", "G side", "all", two | few),
        "low rank": (GradientAccumulator, "_leading", "G side", "all", low),
        "lossless": (*joined, "G side", "all", {"max_columns": 8}),
        "tokens kept": (refresh, "joined", "side", "all", two | {"ekfac": True}),
        "A or G, application": (Damped, "power", "side", "small_only", {}),
        "G, application": (DampedWoodbury, "_push_through", "G side", "all", {}),
        "sum of a norm layer": (NormAccumulator, "add", "scale and shift", "all", norms),
        "room for a norm layer": (NormAccumulator, "__init__", "scale and shift", "all", norms),
        "embedding": (DampedDiagonal, "_power", "A side", "all", {}),
        "true head, probabilities": (TrueFisherHead, "add", "G side", "all", head),
        "true head": (TrueFisherHead, "factor", "G side", "all", two | head),
        "true head, application": (DampedDiagonalLowRank, "_power", "G side", "all", head),
        "pooled": (refresh, "pool", "side", "all", pooled),
        "pooled, dense": (refresh, "pool", "side", "small_only", pooled),
        "pooled, application": (DampedDiagonalLowRank, "_power", "G side", "all", pooled),
    }  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", stages())
def test_when_the_device_is_full_one_side_moves_to_host_memory(name, device, monkeypatch, caplog):
    owner, method, side, policy, settings = stages()[name]
    expected, _, _ = through(device, policy, monkeypatch, **settings)
    _, _, counted = through(device, policy, monkeypatch, (owner, method), **settings)
    assert counted.count > 0, "the stage takes memory"
    # Every operation of the first layers, then some of the rest: each is a run of its own.
    chosen = sorted({*range(1, min(9, counted.count)), -(-counted.count // 2), counted.count})
    for at in chosen:
        caplog.clear()
        with caplog.at_level(logging.WARNING, LOGGER):
            found, kfac, _ = through(device, policy, monkeypatch, (owner, method), at, **settings)
        reference.assert_close(found, expected, 1e-5, f"{name}, operation {at}")
        (message,) = warnings(caplog)
        assert side in message
        assert "layer transformer" in message or "layer lm_head" in message
        assert sum(word.split("=")[1][0].isdigit() for word in message.split() if "=" in word) == 2
        factors = [f for x in kfac.kfac_factors.values() for f in (x.A, x.G) if f is not None]
        moved = {id(f) for f in factors if f.device.type != device}
        assert len(moved) <= 1, "one side of one layer (or of those that share it)"


@pytest.mark.parametrize("device", DEVICES)
def test_the_diagonal_of_a_wide_norm_layer_moves_to_host_memory(device, caplog):
    torch.manual_seed(0)
    batches = torch.randn(2, 2, 5, 6, device=device)
    expected = sum((torch.cat([g * x, g], 1).double() ** 2).sum(0) for x, g in batches).cpu()
    at, hosted = 1, True
    while hosted:
        caplog.clear()
        norm = NormAccumulator(6, True, False, torch.float64, batches.device, "layer ln")
        with FullOnce(at):
            for x, g in batches:
                norm.add(x, g)
        hosted = bool(warnings(caplog))
        assert len(warnings(caplog)) <= 1
        assert not hosted or norm.total.device.type == "cpu"
        torch.testing.assert_close(norm.factor(1.0).diagonal.cpu(), expected)
        at += 1
    assert at > 4, "every operation was hit, until there was none left"


@pytest.mark.parametrize("device", DEVICES)
def test_a_device_that_is_full_twice_is_an_error(device, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("no room (stub)")

    model, batch = case_on(device)
    kfac = engine("all", Damping(1e-3, 1e-3, None))
    kfac.collect_kfac_factors(model, batch, keep_gradient=True)
    before = dict(kfac.kfac_factors)
    with monkeypatch.context() as patch:
        patch.setattr(accumulators, "add_second_moment", full)
        with pytest.raises(torch.OutOfMemoryError, match="no room"):
            kfac.collect_kfac_factors(model, batch)
    assert dict(kfac.kfac_factors) == before
    assert kfac.compute_natural_gradient(None, model)


@pytest.mark.parametrize("error", [RuntimeError("something else"), MemoryError("the host is full")])
def test_no_other_error_is_taken_for_a_full_device(error, monkeypatch, caplog):
    def fails(*args, **kwargs):
        raise error

    model, batch = case_on("cpu")
    kfac = engine("all", Damping(1e-3, 1e-3, None))
    with monkeypatch.context() as patch:
        patch.setattr(accumulators, "add_second_moment", fails)
        with pytest.raises(type(error)):
            kfac.collect_kfac_factors(model, batch)
    assert not warnings(caplog)


@pytest.mark.parametrize("device", DEVICES)
def test_what_had_been_taken_is_freed(device):
    """The core that was formed before the device was full is gone when the work goes on."""
    g = torch.randn(6, 40, dtype=torch.float64, device=device)
    from fisher_lab.curvature.kfac.factors import Columns

    factor = WoodburyFactor(Columns(g, 1.0, g.device), 1 / 6, torch.float64)
    numerics = engine("all").settings.numerics
    damped = factor.damped(1e-3, None, numerics)
    damped.prepare()
    taken = [weakref.ref(factor.core), weakref.ref(damped.lower)]
    calls = []

    def work():
        calls.append(None)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("no room (stub)")
        gc.collect()
        assert all(ref() is None for ref in taken)
        return 7

    assert factor.on_device("a step", work, damped.to_host) == 7
    assert factor.device.type == "cpu"


def test_nothing_moves_while_there_is_room():
    device = torch.device("cpu")
    assert memory.on_device(lambda d: d, device, "x", lambda: pytest.fail("no need")) == device


def test_a_collective_operation_is_never_done_again_by_one_rank():
    def full(_):
        raise torch.OutOfMemoryError("no room (stub)")

    with pytest.raises(torch.OutOfMemoryError):
        memory.on_device(full, memory.HOST, "x", lambda: pytest.fail("no"), collective=True)


@pytest.mark.parametrize("device", DEVICES)
def test_ekfac_with_sides_apart(device, monkeypatch, caplog):
    expected, _, _ = through(device, "all", monkeypatch, ekfac=True)
    stage = (MomentAccumulator, "add")
    with caplog.at_level(logging.WARNING, LOGGER):
        found, kfac, _ = through(device, "all", monkeypatch, stage, 2, ekfac=True)
    assert warnings(caplog)
    reference.assert_close(found, expected, 1e-5)
    assert any(isinstance(x.A, DenseFactor) for x in kfac.kfac_factors.values())
