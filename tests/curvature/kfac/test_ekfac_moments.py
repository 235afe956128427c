"""EKFAC's moments pair every gradient with its own token: several batches, several draws."""

from __future__ import annotations

import pytest
import torch

from fisher_lab.curvature.kfac import ekfac
from fisher_lab.curvature.losses import CrossEntropy
from tests import models, reference
from tests.capturing import engine


def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        {
            "x": torch.randn(n, 7, generator=generator, dtype=torch.float64),
            "labels": torch.randint(0, 4, (n,), generator=generator),
        }
        for n in (5, 3)
    ]


@pytest.mark.parametrize("more", [{"fisher": "mc", "n_samples": 3}, {"fisher": "true"}])
def test_moments_over_batches_and_draws(more) -> None:
    model = models.seeded(models.MLP, torch.float64)
    kfac = engine("small_only", ekfac=True, track_diagonal=False, **more)
    with reference.record(model) as rec:
        kfac.collect_kfac_factors(model, batches(), loss=CrossEntropy())
    factors = kfac.kfac_factors["first"]
    v_g, v_a = torch.linalg.eigh(torch.rand(9, 9, dtype=torch.float64))[1], torch.eye(8).double()
    expected = torch.zeros(9, 8, dtype=torch.float64)
    for call in rec.calls:
        if call.name != "first":
            continue
        a = torch.cat([call.input, torch.ones(len(call.input), 1).double()], 1).square()
        assert len(call.gradients) > 1
        for g in call.gradients:
            expected += (g @ v_g).square().T @ a
    draws = 3 if more["fisher"] == "mc" else 1
    expected /= 8 * draws
    g = factors.tokens_g
    found = ekfac.squared_products(factors, lambda rows: g[rows] @ v_g, v_g, v_a) / (8 * draws)
    assert reference.relative(found, expected) < 1e-12
