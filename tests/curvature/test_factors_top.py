"""The largest eigenvalues of large factors, without a decomposition."""

from __future__ import annotations

import pytest
import torch

from fisher_lab.curvature.kfac.factors import Columns, DenseFactor, WoodburyFactor, base

DOUBLE = torch.float64


def columns(tokens: int, out: int) -> torch.Tensor:
    """Token gradients whose singular values fall off over three decades."""
    generator = torch.Generator().manual_seed(3)
    g = torch.randn(tokens, out, generator=generator, dtype=DOUBLE)
    return g * torch.logspace(0, -3, tokens, dtype=DOUBLE)[:, None]


@pytest.mark.parametrize("k", [1, 3])
def test_top_of_large_factors_needs_no_decomposition(k, monkeypatch):
    monkeypatch.setattr(base, "LARGE", 10)
    g = columns(40, 60)
    expected = torch.linalg.eigvalsh(g.T @ g / 40).flip(0)[:k]
    full = DenseFactor(g.T @ g / 40)
    gram = WoodburyFactor(Columns(g, 1.0, g.device), 1 / 40, DOUBLE)
    for factor in (full, gram):
        torch.testing.assert_close(factor.top(k), expected, rtol=1e-12, atol=0.0)
        assert not factor.decomposed
    full.eigen()
    torch.testing.assert_close(full.top(k), expected, rtol=1e-12, atol=0.0)
