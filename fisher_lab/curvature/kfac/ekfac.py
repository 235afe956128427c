"""EKFAC: the second moments of the gradient in the basis of the factors.

George et al. 2018, equation 10, in the convention of ``docs/math.md``, section 6. On the Woodbury
path the basis of G holds the eigenvectors of its nonzero eigenvalues; the moments of their
complement are zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fisher_lab.curvature.collectives import dtype_name, exchange_tokens_for_outputs
from fisher_lab.curvature.kfac.damping import dampings
from fisher_lab.curvature.kfac.factors import Columns, ShardedColumns
from fisher_lab.curvature.kfac.layer_factors import LayerFactors
from fisher_lab.curvature.kfac.numerics import EngineSettings, Numerics
from fisher_lab.curvature.linalg import blocks
from fisher_lab.curvature.memory import HOST, on_device


class Basis(NamedTuple):
    """Eigenvectors of both factors of a layer, and what the tokens are in them.

    Attributes:
        v_g: eigenvectors of G as columns, ``times`` being ``V_G^T y`` and ``transposed_times``
            being ``V_G z``. Where the token columns are sharded, every rank has the rows of its
            slice of the outputs, ``(out/R) x r``, and products are collective.
        v_a: ``[dim_a, dim_a]`` eigenvectors of A; None where A is diagonal.
        m_g: ``[r]`` eigenvalues of G.
        m_a: ``[dim_a]`` eigenvalues of A.
        sums: ``[r, dim_a]`` sums of the squared products over this rank's tokens.
    """

    v_g: Columns
    v_a: Tensor | None
    m_g: Tensor
    m_a: Tensor
    sums: Tensor


@dataclass(kw_only=True)
class Eigenbasis:
    """A layer in EKFAC's basis, in the apply dtype; ``v_g`` and ``v_a`` as in :class:`Basis`.

    Attributes:
        denominator: ``[r, dim_a]`` damped and floored eigenvalues.
        complement: ``[dim_a]`` the same for the directions of G that are not at hand; None where
            ``v_g`` spans the whole space.
        dim: number of pairs of eigenvectors, outputs times inputs with the bias column.
        clipped: how many pairs the floor raised, the complement's included.
        kappa_before: condition number of the damped eigenvalues.
        kappa_after: condition number of those in use.
        label: layer and sides, for the log.
    """

    v_g: Columns
    v_a: Tensor | None
    denominator: Tensor
    complement: Tensor | None
    dim: int
    clipped: int
    kappa_before: float
    kappa_after: float
    label: str

    def to_host(self) -> None:
        """Moves everything to host memory."""
        for key, value in vars(self).items():
            if isinstance(value, Tensor | Columns):
                setattr(self, key, value.to(HOST))


def prepared(factors: LayerFactors, settings: EngineSettings) -> Eigenbasis:
    """Computes a layer's basis and its damped and floored eigenvalues; collective on ranks.

    Where the device is full, what a rank does by itself moves to its host memory; what it does
    together with others is never done twice. The factors were collected with ``ekfac`` on.

    Raises:
        SettingError: the layer's G has no eigenbasis (a true-Fisher head).
    """
    g, a = factors.G, factors.A
    assert a is not None

    def both_to_host() -> None:
        g.to_host()
        a.to_host()

    what = f"{g.label} and its A side (in={factors.layer.dim_a}), eigenbasis"
    work = partial(_basis_of, factors, settings.numerics)
    found = on_device(work, g.device, what, both_to_host, collective=g.sharded)
    if factors.spread is not None:
        found = found._replace(sums=factors.spread.communicator.all_reduce(found.sums))
    found = found._replace(sums=found.sums / (factors.tokens * factors.n_draws))

    def there(device: torch.device) -> Eigenbasis:
        here = found
        if device != found.sums.device:
            moved = {k: v.to(device) for k, v in found._asdict().items() if v is not None}
            here = found._replace(**moved)
        return eigenbasis(factors, here, settings, f"{what}, application")

    return on_device(there, found.sums.device, what)


def _basis_of(factors: LayerFactors, numerics: Numerics, _device: torch.device) -> Basis:
    """Computes a layer's basis; collective only where G's columns are sharded."""
    g_factor, a_factor, g = factors.G, factors.A, factors.tokens_g
    assert a_factor is not None
    assert g is not None
    if not g_factor.sharded and a_factor.device != g_factor.device:
        # One of them has moved off a full device: both decide over the same products here.
        a_factor.to_host()
        g_factor.to_host()
    m_g, v_g = g_factor.basis(numerics)
    assert v_g is not None
    m_a, inputs = a_factor.basis(numerics)
    v_a = None if inputs is None else inputs.data.T
    if isinstance(v_g, ShardedColumns):
        # The A side may have moved off the device.
        m_a, v_a = m_a.to(m_g.device), None if v_a is None else v_a.to(m_g.device)
        sums = _sums_of_own_tokens(factors, v_g, m_g, v_a)
    else:
        vectors = v_g.data.T
        sums = squared_products(factors, lambda rows: g[rows].to(vectors) @ vectors, m_g, v_a)
    return Basis(v_g, v_a, m_g, m_a, sums)


def _sums_of_own_tokens(
    factors: LayerFactors, v_g: ShardedColumns, m_g: Tensor, v_a: Tensor | None
) -> Tensor:
    """Sums over this rank's tokens where each rank has its rows of ``V_G``; collective.

    No rank ever has ``out x r``. The tokens are turned into the basis by the ranks together: their
    gradients are exchanged for those of all tokens at this rank's slice of the outputs, and
    ``g V_G`` is summed over the ranks.
    """
    g, spread = factors.tokens_g, factors.spread
    assert g is not None
    assert spread is not None
    ranks = spread.communicator
    brought = ranks.all_gather_objects([len(g), dtype_name(g.dtype)])
    rows = [length for length, _ in brought]
    known = next((dtype for length, dtype in brought if length), brought[0][1])
    exchanged = exchange_tokens_for_outputs(g.to(getattr(torch, known)), rows, ranks)
    first = sum(rows[: ranks.rank])
    every = ranks.all_reduce(v_g.of_own(lambda v: exchanged.to(v.data) @ v.data.T))
    projected = every[first : first + len(g)].clone()

    def there(device: torch.device) -> Tensor:
        p, like = projected.to(device), m_g.to(device)
        vectors = None if v_a is None else v_a.to(device)
        return squared_products(factors, lambda rows: p[rows], like, vectors)

    return on_device(there, m_g.device, f"{factors.G.label}, second moments").to(m_g.device)


def squared_products(
    factors: LayerFactors,
    project: Callable[[slice], Tensor],
    like: Tensor,
    v_a: Tensor | None,
) -> Tensor:
    """Returns ``sum_t (V_G^T g_t)_i^2 (V_A^T a_t)_j^2`` over this rank's tokens, ``[r, dim_a]``.

    Args:
        factors: with ``tokens_g`` and ``a`` kept.
        project: gives ``g V_G``, ``[b, r]``, for some of the rows of ``tokens_g``.
        like: of the dtype and on the device of the result.
        v_a: ``[dim_a, dim_a]``, or None for an embedding (its one-hot inputs are the basis).
    """
    g, a = factors.tokens_g, factors.a
    assert g is not None
    assert a is not None
    assert factors.order is not None
    layer = factors.layer
    total = like.new_zeros(project(slice(0, 0)).shape[1], layer.dim_a)
    for rows in blocks(g.shape[0], (layer.n_out + layer.dim_a) * 8):
        squared = project(rows).square()
        index = factors.order[rows].to(a.device)  # `a` may have moved off a full device
        if v_a is None:
            total.T.index_add_(0, a[index].to(like.device), squared)
            continue
        x = a[index].to(v_a)
        if layer.augmented:
            x = torch.cat([x, x.new_ones(x.shape[0], 1)], dim=1)
        total.addmm_(squared.T, (x @ v_a).square())
    return total


def eigenbasis(
    factors: LayerFactors, basis: Basis, settings: EngineSettings, label: str
) -> Eigenbasis:
    """Returns a layer's basis with its damped and floored eigenvalues.

    The ``sums`` of the basis are those over the tokens of all ranks, divided by their number.
    """
    m_g, m_a, s = basis.m_g, basis.m_a, basis.sums
    (lam_a, lam_g), kappa_max = dampings(factors, settings), settings.kappa_max
    damped = s + lam_a * m_g[:, None] + lam_g * m_a[None, :] + lam_a * lam_g
    missing = factors.layer.n_out - len(m_g)
    complement = lam_g * m_a + lam_a * lam_g if missing else None
    before, clipped = _kappa(damped, complement), 0
    if kappa_max is not None:
        tops = [float(x.max()) for x in (damped, complement) if x is not None and x.numel()]
        floor = max(tops) / kappa_max**2
        clipped = int((damped < floor).sum())
        damped = damped.clamp(min=floor)
        if complement is not None:
            clipped += missing * int((complement < floor).sum())
            complement = complement.clamp(min=floor)
    dtype = settings.numerics.apply_dtype
    return Eigenbasis(
        v_g=basis.v_g.cast(dtype),
        v_a=None if basis.v_a is None else basis.v_a.to(dtype),
        denominator=damped.to(dtype),
        complement=None if complement is None else complement.to(dtype),
        dim=factors.layer.n_out * factors.layer.dim_a,
        clipped=clipped,
        kappa_before=before,
        kappa_after=_kappa(damped, complement),
        label=label,
    )


def _kappa(damped: Tensor, complement: Tensor | None) -> float:
    """Condition number of the eigenvalues of all pairs."""
    parts = [x for x in (damped, complement) if x is not None and x.numel()]
    if not parts:
        return 1.0
    low, top = min(float(x.min()) for x in parts), max(float(x.max()) for x in parts)
    return top / low if low > 0 else float("inf")


def apply(basis: Eigenbasis, y: Tensor, p: float) -> Tensor:
    """Returns ``y`` with EKFAC's eigenvalues of the layer to the power ``p`` applied.

    Args:
        basis: of the layer.
        y: ``[out, dim_a]`` in the apply dtype; the same on all ranks.
        p: the power; -1 is the natural gradient.
    """
    return on_device(
        lambda _: _apply(basis, y.to(basis.v_g.device), p).to(y.device),
        basis.v_g.device,
        basis.label,
        basis.to_host,
        collective=basis.v_g.sharded,
    )


def _apply(basis: Eigenbasis, y: Tensor, p: float) -> Tensor:
    rotated = y if basis.v_a is None else y @ basis.v_a
    inside = basis.v_g.times(rotated)
    result = basis.v_g.transposed_times(inside * basis.denominator.pow(p))
    if basis.complement is not None:
        outside = rotated - basis.v_g.transposed_times(inside)
        result += outside * basis.complement.pow(p)
    return result if basis.v_a is None else result @ basis.v_a.T
