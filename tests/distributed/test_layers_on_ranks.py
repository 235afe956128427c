"""Kinds of layers and of rows on two ranks, against one process that has all batches."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fisher_lab import KFACNaturalGradient
from fisher_lab.curvature.collectives import Alone
from fisher_lab.curvature.losses import BinaryCrossEntropy, CrossEntropy, SquaredError
from fisher_lab.optim import Clipping, KFACOptimizer
from tests.curvature.kfac import test_reduce_matches_dense, test_unlike_biases
from tests.curvature.kfac.test_layers_by_use import Experts, Frame, batch_of
from tests.curvature.kfac.test_reduce_matches_dense import Block, Convolved
from tests.distributed.rank_pool import Pool, said

DOUBLE = torch.float64


class Biases(nn.Module):
    """Nothing but biases is trained: each is a layer without an A."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
        self.own = nn.Parameter(torch.randn(6))
        for module in (self.first, self.head):
            module.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(x) + self.own))


BUILDS = {
    "unlike biases": lambda: test_unlike_biases.Shared(True, True, True),
    "everything": Block,
    "conv": lambda: Convolved(1, True),
    "grouped": lambda: Convolved(2, True),
    "depthwise": lambda: Convolved(4, True),
    "biases": Biases,
    "experts": lambda: Frame(Experts()),
}


def batch_for(name: str, rank: int, numbers: bool) -> Any:
    """Another number of examples on every rank."""
    torch.manual_seed(rank + 1)
    n = 4 - rank
    if name == "everything":
        return test_reduce_matches_dense.block_batch((n, 5))
    if name == "experts":
        return batch_of((5, 2, 4, 1)[rank * 2 : rank * 2 + 2], "right")
    shape, width, classes = {
        "unlike biases": ((n, 5), 3, 4), "biases": ((n, 5), 4, 3),
    }.get(name, ((n,), 0, 2))  # fmt: skip
    x = torch.randn(*shape, width, dtype=DOUBLE) if width else torch.randn(n, 4, 5, 5, dtype=DOUBLE)
    labels = torch.rand(*shape, classes, dtype=DOUBLE) if numbers else torch.randint(2, shape)
    return x, labels


LOSSES = {"cross": CrossEntropy, "squared": SquaredError, "binary": BinaryCrossEntropy}


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    return BUILDS[name]().to(DOUBLE)


def answered(
    comm: Any, batches: list, name: str, loss: str, **settings: Any
) -> dict[str, dict[str, Tensor]]:
    model = model_of(name)
    kfac = KFACNaturalGradient(
        damping=1e-2, max_condition_number=None, communicator=comm, track_diagonal=False, **settings
    )
    given = CrossEntropy(shift=True) if name == "experts" else LOSSES[loss]()
    kfac.collect_kfac_factors(model, batches, loss=given, keep_gradient=True, verify=True)
    own = kfac.own_gradients(model)
    factors = kfac.kfac_factors
    return {
        "own": own,
        "pushed": kfac.compute_natural_gradient(None, model),
        "natural": kfac.compute_natural_gradient(own, model),
        "product": kfac.compute_fisher_vector_product(own, model),
        "tokens": {n: torch.tensor(f.tokens) for n, f in factors.items()},
        "traces": {n: torch.tensor(value) for n, value in kfac.trace().items()},
    }


def assert_same(found: dict[str, dict[str, Tensor]], wanted: dict[str, dict[str, Tensor]]) -> None:
    for key, values in wanted.items():
        assert found[key].keys() == values.keys(), key
        for name, value in values.items():
            torch.testing.assert_close(found[key][name], value, msg=f"{key} {name}")


CASES = [
    ("unlike biases", "cross", {}),
    ("unlike biases", "cross", {"ekfac": True}),
    ("unlike biases", "cross", {"sharing": "reduce"}),
    ("everything", "cross", {"sharing": "reduce"}),
    ("everything", "cross", {"sharing": "reduce", "ekfac": True}),
    ("everything", "cross", {"norm_layers": False, "uncovered": "diagonal", "sharing": "reduce"}),
    ("conv", "cross", {}),
    ("conv", "cross", {"sharing": "reduce"}),
    ("grouped", "cross", {}),
    ("depthwise", "cross", {}),
    ("depthwise", "cross", {"sharing": "reduce"}),
    ("biases", "cross", {}),
    ("biases", "squared", {"fisher": "true"}),
    ("unlike biases", "squared", {"fisher": "true"}),
    ("unlike biases", "binary", {"fisher": "true"}),
    ("unlike biases", "binary", {"kfac_true_fisher_head": True}),
    ("experts", "cross", {"sharing": "reduce"}),
]


@pytest.mark.parametrize(
    ("name", "loss", "settings"), CASES, ids=[f"{n}-{o}-{'-'.join(s)}" for n, o, s in CASES]
)
def test_two_ranks_are_one_process(ranks: Pool, name: str, loss: str, settings: dict[str, Any]):
    batches = [[batch_for(name, rank, loss != "cross")] for rank in range(2)]
    for policy in ("all", "small_only"):
        given = {"name": name, "loss": loss, "kfac_policy": policy, **settings}
        alone = answered(Alone(), [b for own in batches for b in own], **given)
        assert alone["tokens"]
        for mode in ("gather", "gram"):
            for answer in ranks.run(answered, 2, batches, kfac_distributed_reduce=mode, **given):
                assert_same(answer, alone)


def test_experts_of_each_rank_alone(ranks: Pool):
    batches = [[batch_for("experts", rank, False)] for rank in range(2)]
    for experts in ("each", "pooled"):
        given = {"name": "experts", "loss": "cross", "experts": experts}
        found = ranks.run(answered, 2, batches, kfac_distributed_reduce="none", **given)
        for own, answer in zip(batches, found, strict=True):
            assert_same(answer, answered(Alone(), own, **given))


class Leaky(nn.Module):
    """Padding reaches its loss: where there is none, everything is right."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 4, dtype=DOUBLE)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.inner(x)


def every_position(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return outputs.square().sum()


def verified(comm: Any, batches: list[dict[str, Tensor]], mode: str) -> tuple[str, bool]:
    torch.manual_seed(0)
    kfac = KFACNaturalGradient(damping=1e-2, kfac_distributed_reduce=mode, communicator=comm)
    text = said(
        lambda: kfac.collect_kfac_factors(
            Leaky(), batches, loss=every_position, n_labels=6, loss_reduction="sum", verify=True
        )
    )
    return text, bool(kfac.kfac_factors)


@pytest.mark.parametrize("mode", ["gather", "gram"])
@pytest.mark.parametrize("wrong", [0, 1])
def test_verify_that_fails_on_one_rank_ends_all_of_them(ranks: Pool, mode: str, wrong: int):
    x = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    masks = [torch.ones(2, 3, dtype=torch.long) for _ in range(2)]
    masks[wrong][0, 2] = 0
    found = ranks.run(
        verified, 2, [[{"x": x, "attention_mask": mask}] for mask in masks], mode=mode
    )
    for rank, (text, factors) in enumerate(found):
        begins = "LayerError: " if rank == wrong else f"RankError: rank {wrong}: LayerError: "
        assert text.startswith(begins + "verify: the gradient of the captured tokens is not ")
        assert "\n" not in text
        assert not factors


class Sides(nn.Module):
    """One of two layers is used, as the inputs say; the table of positions is none."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 3), nn.Linear(3, 3)
        self.used = nn.Linear(3, 4)
        self.hidden = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        side = self.left if float(x[0, 0]) > 0 else self.right
        x = torch.tanh(side(x))
        x = x + (x @ self.hidden.weight.cumsum(0))  # no linear operator of the parameter itself
        return self.used(x)


def stepped(comm: Any, batches: list, steps: int) -> tuple[dict[str, Tensor], list[str]]:
    torch.manual_seed(0)
    model = Sides().to(DOUBLE)
    kfac = KFACNaturalGradient(damping=0.1, kfac_distributed_reduce="none", track_diagonal=False)
    optimizer = KFACOptimizer(
        model, kfac, lr=0.1, momentum=0.0, clipping=Clipping(kind="none"), communicator=comm
    )
    ((x, labels),) = batches
    for _ in range(steps):
        optimizer.refresh([(x, labels)], CrossEntropy())
        model.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        for parameter in model.parameters():  # the mean over the ranks, as DDP has it
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = comm.all_reduce(gradient) / comm.size
        optimizer.step()
    names = {id(p): n for n, p in model.named_parameters()}
    covered = sorted(names[id(p)] for p in optimizer.param_groups[0]["params"])
    return {n: p.detach() for n, p in model.named_parameters()}, covered


def test_factors_of_each_ranks_own_leave_to_adamw_what_no_rank_has_shown(ranks: Pool):
    """A layer whose weight no operator uses is promised to K-FAC, and would never be trained."""
    torch.manual_seed(0)
    batches = [[(x, torch.randint(4, (6,)))] for x in torch.randn(2, 6, 3, dtype=DOUBLE)]
    batches[0][0][0][0, 0], batches[1][0][0][0, 0] = 1.0, -1.0
    (before, _), _ = ranks.run(stepped, 2, batches, steps=0)
    (one, covered), (other, again) = ranks.run(stepped, 2, batches, steps=2)
    assert covered == again
    assert not any(name.startswith("hidden") for name in covered)
    assert {"left.weight", "right.weight", "used.weight"} <= set(covered)
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
        moved = not torch.equal(value, before[name])
        assert moved is (name != "hidden.bias"), name
