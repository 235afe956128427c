"""Ranks agree on how a model's own loss treats labels, whatever their own batches show.

In whatever wrapper the model comes, its labels are those of the bare model.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from fisher_lab import KFACNaturalGradient
from fisher_lab.curvature import wrappers
from fisher_lab.curvature.collectives import Alone
from fisher_lab.curvature.labelling import shift_of
from tests.curvature.test_labels import Fused, Wrapped, bart, lora, xlnet
from tests.distributed.rank_pool import Pool
from tests.models import gpt2, language_batch, seeded


class Named(nn.Module):
    """Shards need an output in which they can find the tensors."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids, attention_mask=None, labels=None):
        return {"loss": self.inner(input_ids, attention_mask, labels).loss}


BUILDS = {
    "certain": gpt2,
    "in place": bart,
    "measured": lambda: Wrapped(gpt2()),
    "measured in place": xlnet,
    "own loss": lambda: Named(Fused(0.1, logits=False)),
    "peft": lambda: lora(gpt2()),
}
SAID = {
    "certain": "labels: shifted, 20 of 24",
    "in place": "labels: in place, 24 of 24",
    "measured": "labels: shifted, 20 of 24",
    "measured in place": "labels: in place, 24 of 24",
    "own loss": "labels: shifted, by the model's own loss, 20 of 24",
    "peft": "labels: shifted, 20 of 24",
}
COMPILED = {"backend": "eager", "dynamic": True}


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    return seeded(BUILDS[name], torch.float64)


def in_wrapper(model: Any, kind: str, comm: Any) -> Any:
    """The model in DDP, in shards, compiled, or in two of these, the inner one first."""
    for one in kind.split(" inside "):
        if one == "ddp":
            data_parallel = nn.parallel.DistributedDataParallel
            model = data_parallel(model, process_group=comm.group, find_unused_parameters=True)
        elif one == "shards":
            wrappers.shard(model, DeviceMesh.from_group(comm.group, "cpu"))
        elif one == "compiled":
            model = torch.compile(model, **COMPILED)
        elif one == "compiled in place":
            model.compile(**COMPILED)
        elif one == "module":
            model = Wrapped(model)
    return model


def collected(
    comm: Any, batches: list[dict[str, Tensor]], name: str, kind: str, mode: str = "gather"
) -> tuple[str, dict[str, Tensor]]:
    model = in_wrapper(model_of(name), kind, comm)
    kfac = KFACNaturalGradient(damping=1e-3, kfac_distributed_reduce=mode, communicator=comm)
    kfac.collect_kfac_factors(model, batches, keep_gradient=True)
    own = kfac.own_gradients(model)
    outside = "base.module." if kind == "ddp inside module" else ""
    return str(kfac.labels), {n.removeprefix(outside): g for n, g in own.items()}


def halves(lengths: tuple[int, ...]) -> list[list[dict[str, Tensor]]]:
    """A batch a rank; none of their labels is -100."""
    return [[language_batch(lengths, share=1.0, seed=seed)] for seed in (1, 2)]


WRAPPERS = {
    "ddp": ("certain", "in place", "measured", "own loss", "peft"),
    "shards": ("certain", "in place", "measured", "own loss"),
    "compiled": ("in place", "measured", "own loss"),
    "compiled in place": ("measured", "own loss", "peft"),
    "ddp inside compiled": ("measured",),
    "compiled inside ddp": ("measured in place",),
    "shards inside compiled": ("measured",),
    "ddp inside module": ("certain",),
}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_labels_are_those_of_the_bare_model(ranks: Pool, kind: str):
    batches = halves((6, 6))
    for name in WRAPPERS[kind]:
        said, own = collected(Alone(), [b for one in batches for b in one], name, "bare")
        assert said == SAID[name]
        for answer in ranks.run(collected, 2, batches, name=name, kind=kind):
            assert answer[0] == said, name
            assert answer[1].keys() == own.keys()
            for parameter, gradient in answer[1].items():
                torch.testing.assert_close(gradient, own[parameter], msg=parameter)


def agreement(comm: Any, batches: list[dict[str, Tensor]], kind: str) -> tuple[bool | None, str]:
    model = in_wrapper(model_of("measured"), kind, comm)
    kfac = KFACNaturalGradient(damping=1e-3, kfac_distributed_reduce="gather", communicator=comm)
    kfac.collect_kfac_factors(model, batches)
    return shift_of(model), str(kfac.labels)


@pytest.mark.parametrize("first", ["no label", "one batch"])
def test_a_rank_that_cannot_measure_does_as_another_has_measured(ranks: Pool, first: str):
    batch = language_batch((7, 7), share=1.0)
    none = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    batches = [[none, batch], [batch]] if first == "no label" else [[batch], [batch, none]]
    found = ranks.run(agreement, 2, batches, kind="bare")
    assert found == [(True, "labels: shifted, 24 of 28")] * 2


@pytest.mark.parametrize("first", [0, 1])
def test_ranks_that_share_their_passes_make_the_same_ones(ranks: Pool, first: int):
    """A rank without labels would have ended its measurement after one pass of shards."""
    batch = language_batch((7, 7), share=1.0)
    none = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    batches = [[none, batch], [batch, none]] if first == 0 else [[batch, none], [none, batch]]
    found = ranks.run(agreement, 2, batches, kind="shards")
    assert found == [(True, "labels: shifted, 24 of 28")] * 2


def test_factors_of_each_ranks_own_of_shards_have_labels_too(ranks: Pool):
    batches = halves((6, 6))
    answers = ranks.run(collected, 2, batches, name="measured", kind="shards", mode="none")
    for batch, (said, own) in zip(batches, answers, strict=True):
        alone = collected(Alone(), batch, "measured", "bare")
        assert said == alone[0] == "labels: shifted, 10 of 12"
        for parameter, gradient in own.items():
            torch.testing.assert_close(gradient, alone[1][parameter], msg=parameter)
