"""EKFAC: the second moments of the gradient in the basis of the factors.

George et al. 2018, equation 10, in the convention of ``docs/math.md``, section 6. On the Woodbury
path the basis of G holds the eigenvectors of its nonzero eigenvalues; the moments of their
complement are zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .build import LayerFactors
from .factors import DenseFactor, DiagonalFactor, GramFactor
from .linalg import blocks
from .settings import Damping, Numerics, SettingError


@dataclass(frozen=True)
class Eigenbasis:
    """A layer in EKFAC's basis.

    Attributes:
        v_g: ``[out, r]`` eigenvectors of G.
        v_a: ``[dim_a, dim_a]`` eigenvectors of A; None where A is diagonal.
        denominator: ``[r, dim_a]`` damped and floored eigenvalues.
        complement: ``[dim_a]`` the same for the directions of G that are not at hand.
        whole: whether ``v_g`` spans the whole space.
        clipped: how many pairs the floor raised, the complement's included.
    """

    v_g: Tensor
    v_a: Tensor | None
    denominator: Tensor
    complement: Tensor
    whole: bool
    clipped: int


def second_moments(factors: LayerFactors, v_g: Tensor, v_a: Tensor | None) -> Tensor:
    """Returns ``S_ij = (1/(T n)) sum_t (V_G^T g_t)_i^2 (V_A^T a_t)_j^2``, ``[r, dim_a]``.

    Where every rank has its own tokens, their sums are added; collective then.

    Args:
        factors: with ``tokens_g`` and ``a`` kept.
        v_g: ``[out, r]``.
        v_a: ``[dim_a, dim_a]``, or None for an embedding (its one-hot inputs are the basis).
    """
    g, a = factors.tokens_g, factors.a
    assert g is not None
    assert a is not None
    assert factors.order is not None
    layer, n = factors.layer, factors.n_draws
    total = v_g.new_zeros(v_g.shape[1], layer.dim_a)
    for rows in blocks(g.shape[0], (layer.n_out + layer.dim_a) * 8):
        squared = (g[rows].to(v_g) @ v_g).square()
        index = factors.order[rows]
        if v_a is None:
            total.T.index_add_(0, a[index].to(v_g.device), squared)
            continue
        x = a[index].to(v_a)
        if layer.augmented:
            x = torch.cat([x, x.new_ones(x.shape[0], 1)], dim=1)
        total.addmm_(squared.T, (x @ v_a).square())
    if factors.spread is not None:
        total = factors.spread.communicator.all_reduce(total)
    return total / (factors.tokens * n)


def eigenbasis(factors: LayerFactors, damping: Damping, numerics: Numerics) -> Eigenbasis:
    """Computes a layer's basis and its damped and floored eigenvalues.

    Args:
        factors: collected with ``ekfac`` on.
        damping: of both sides, with the largest condition number.
        numerics: precision.

    Raises:
        SettingError: the layer's G has no eigenbasis (a true-Fisher head).
    """
    g_factor, a_factor = factors.G, factors.A
    if not isinstance(g_factor, DenseFactor | GramFactor):
        raise SettingError(
            f"ekfac: layer {factors.layer.name} has the structure {g_factor.structure}; "
            "allowed: dense or woodbury"
        )
    if a_factor is not None and a_factor.device != g_factor.device:
        # One of them has had to leave a full device: both decide over the same products here.
        a_factor.to_host()
        g_factor.to_host()
    m_g, v_g = g_factor.basis(numerics)
    if isinstance(a_factor, DiagonalFactor):
        m_a, v_a = a_factor.diagonal, None
    else:
        assert isinstance(a_factor, DenseFactor)
        m_a, v_a = a_factor.basis(numerics)
    s = second_moments(factors, v_g, v_a)
    damped = s + damping.A * m_g[:, None] + damping.G * m_a[None, :] + damping.A * damping.G
    complement = damping.G * m_a + damping.A * damping.G
    whole = v_g.shape[1] == factors.layer.n_out
    clipped = 0
    if damping.kappa_max is not None:
        top = max(float(damped.max()), 0.0 if whole else float(complement.max()))
        floor = top / damping.kappa_max**2
        missing = factors.layer.n_out - v_g.shape[1]
        clipped = int((damped < floor).sum()) + missing * int((complement < floor).sum())
        damped, complement = damped.clamp(min=floor), complement.clamp(min=floor)
    dtype = numerics.apply_dtype
    return Eigenbasis(
        v_g.to(dtype),
        None if v_a is None else v_a.to(dtype),
        damped.to(dtype),
        complement.to(dtype),
        whole,
        clipped,
    )


def apply(basis: Eigenbasis, y: Tensor, p: float) -> Tensor:
    """Returns the layer's matrix ``y`` with EKFAC's eigenvalues to the power ``p`` applied.

    Args:
        basis: of the layer.
        y: ``[out, dim_a]`` in the apply dtype.
        p: the power; -1 is the natural gradient.
    """
    y, home = y.to(basis.v_g.device), y.device
    rotated = y if basis.v_a is None else y @ basis.v_a
    inside = basis.v_g.T @ rotated
    result = basis.v_g @ (inside * basis.denominator.pow(p))
    if not basis.whole:
        outside = rotated - basis.v_g @ inside
        result += outside * basis.complement.pow(p)
    result = result if basis.v_a is None else result @ basis.v_a.T
    return result.to(home)
