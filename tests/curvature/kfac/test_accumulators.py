"""Sums over tokens and batches: structure switches, column reductions, shared inputs."""

import pytest
import torch

from fisher_lab.curvature.kfac.accumulators import GradientAccumulator
from fisher_lab.curvature.kfac.factors import DenseFactor, WoodburyFactor
from fisher_lab.curvature.kfac.numerics import EngineSettings


def columns(t: int, out: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(t, out, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def accumulator(out: int, seed: int = 0, **policy) -> GradientAccumulator:
    return GradientAccumulator("layer", out, EngineSettings(**policy), seed)


def dense(factor: DenseFactor | WoodburyFactor) -> torch.Tensor:
    return factor.multiply(torch.eye(factor.dim, dtype=torch.float64))


def test_auto_decides_by_all_tokens_although_they_come_in_parts():
    parts = [columns(4, 10, seed) for seed in range(3)]
    acc = accumulator(10, policy="auto")
    kinds = []
    for part in parts:
        acc.add(part)
        kinds.append(type(acc.factor(1.0)))
    assert kinds == [WoodburyFactor, WoodburyFactor, DenseFactor]
    whole = torch.cat(parts)
    torch.testing.assert_close(dense(acc.factor(1 / 12)), whole.T @ whole / 12)


def test_past_max_columns_a_narrow_layer_loses_nothing():
    acc = accumulator(6, max_columns=8)
    g = columns(30, 6)
    acc.add(g[:10])
    acc.add(g[10:])
    factor = acc.factor(1 / 30)
    assert isinstance(factor, WoodburyFactor)
    assert factor.reduction == "lossless"
    assert factor.n_columns == 6
    assert not acc.tokens_in_order()
    torch.testing.assert_close(dense(factor), g.T @ g / 30)


def test_subsampling_is_unbiased_uniform_and_seeded():
    """The mean over many seeds approaches the whole factor, however the tokens are cut up."""
    g = columns(40, 5)
    truth = g.T @ g / 40
    total = torch.zeros_like(truth)
    n = 400
    for seed in range(n):
        acc = accumulator(5, seed, max_columns=10, max_dense_dim=1)
        for part in g.split([3, 20, 17]):
            acc.add(part)
        factor = acc.factor(1 / 40)
        assert isinstance(factor, WoodburyFactor)
        assert (factor.n_columns, factor.reduction) == (10, "subsample")
        assert factor.discarded == pytest.approx(0.75)
        total += dense(factor)
    one = float((dense(factor) - truth).norm())
    assert float((total / n - truth).norm()) < 4 * one / n**0.5
    again = accumulator(5, n - 1, max_columns=10, max_dense_dim=1)
    for part in g.split([3, 20, 17]):
        again.add(part)
    assert torch.equal(dense(again.factor(1 / 40)), dense(factor))


def test_low_rank_keeps_the_leading_directions_and_says_what_it_lost():
    scale = torch.logspace(0, -4, 12, dtype=torch.float64)
    g = columns(12, 12) * scale
    acc = accumulator(12, max_columns=6, max_dense_dim=1, column_reduction="lowrank")
    acc.add(g)
    factor = acc.factor(1.0)
    values, vectors = torch.linalg.eigh(g.T @ g)
    best = (vectors[:, -6:] * values[-6:]) @ vectors[:, -6:].T
    torch.testing.assert_close(dense(factor), best, rtol=1e-9, atol=1e-12)
    assert factor.discarded == pytest.approx(float(values[:6].sum() / values.sum()), rel=1e-6)
    assert factor.reduction == "lowrank"
