"""`uncovered=diagonal`: the diagonal of the Fisher matrix, in the scale of the layers beside it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fisher_lab.curvature.losses import CrossEntropy
from tests.curvature.kfac.test_reduce_matches_dense import (
    Block,
    block_batch,
    cross_entropy,
    engine,
)
from tests.reference import relative

LAM = 1e-2


def squares_of(model: Block, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """`sum_n (dL_n / dW_i)^2` of every parameter: each example runs alone, without padding."""
    found = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for b, mask in enumerate(batch["attention_mask"].bool()):
        outputs = model(batch["input_ids"][b : b + 1, mask])
        loss = cross_entropy(outputs, batch["labels"][b : b + 1])
        grads = torch.autograd.grad(loss, list(model.parameters()))
        for (name, total), gradient in zip(found.items(), grads, strict=True):
            found[name] = total + gradient.square()
    return found


@pytest.mark.parametrize("scale", ["natural", "exact"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("power", [-1.0, -0.5])
def test_it_has_the_rows_of_the_layers(sharing, scale, power):
    """With `fisher_scale=exact` it is `(1/N) sum_n (dL_n / dW_i)^2`, whatever the layers have."""
    torch.manual_seed(1)
    model, batch = Block().double(), block_batch((3, 5))
    kfac = engine(
        sharing=sharing, uncovered="diagonal", norm_layers=False, fisher_scale=scale,
        exclude=["flat"], kfac_policy="small_only",
    )  # fmt: skip
    kfac.collect_kfac_factors(model, batch, loss=CrossEntropy())
    # An embedding keeps its tokens under reduce; what is called twice has each of them twice.
    tokens = int(batch["attention_mask"].sum())
    rows = 3 if sharing == "reduce" else 2 * tokens
    assert kfac.kfac_factors["words"].tokens == tokens
    assert kfac.kfac_factors["twice"].tokens == rows
    squares = squares_of(model, batch)
    torch.manual_seed(2)
    given = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    found = kfac.compute_powered_natural_gradient(given, model, power)
    names = ["norm.weight", "norm.bias", "scale.weight", "flat.weight", "flat.bias", "cls"]
    for name in names:
        expected = (squares[name] / rows + LAM) ** power * given[name]
        if scale == "exact":
            expected = expected * (rows / 3) ** power
        assert relative(found[name], expected) < 1e-10, name


def test_an_excluded_norm_has_the_diagonal_of_the_block_that_it_would_have():
    torch.manual_seed(1)
    model, batch = Block().double(), block_batch((4, 4))
    covered = engine(kfac_policy="small_only")
    covered.collect_kfac_factors(model, batch, loss=CrossEntropy())
    block = covered.kfac_factors["norm"].G.to_dense().diagonal()
    kfac = engine(uncovered="diagonal", norm_layers=False)
    kfac.collect_kfac_factors(model, batch, loss=CrossEntropy())
    found = kfac.compute_natural_gradient({"norm.weight": torch.ones(4).double()}, model)
    assert relative(found["norm.weight"], 1.0 / (block[:4] + LAM)) < 1e-10
