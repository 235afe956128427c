"""EKFAC: the second moments of the gradient in the basis of the factors.

George et al. 2018, equation 10, in the convention of ``docs/math.md``, section 6. On the Woodbury
path the basis of G holds the eigenvectors of its nonzero eigenvalues; the moments of their
complement are zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from fisher_lab.config.errors import SettingError
from fisher_lab.curvature.collectives import columns_for_rows, dtype_name
from fisher_lab.curvature.kfac.factors import (
    Columns,
    DenseFactor,
    DiagonalFactor,
    GramFactor,
    ShardedColumns,
)
from fisher_lab.curvature.kfac.layer_factors import LayerFactors
from fisher_lab.curvature.kfac.numerics import EngineSettings, Numerics
from fisher_lab.curvature.linalg import blocks
from fisher_lab.curvature.memory import HOST, on_host_if_full


@dataclass(kw_only=True)
class _Held:
    """Tensors that leave a full device together.

    Attributes:
        v_g: eigenvectors of G as the columns of a product, ``times`` being ``V_G^T y`` and
            ``transposed_times`` being ``V_G z``. Where the token columns are spread over ranks,
            every rank has the rows of its share of the outputs, ``(out/R) x r``, and products are
            collective.
        v_a: ``[dim_a, dim_a]`` eigenvectors of A; None where A is diagonal.
        hosted: whether they had to leave a full device.
    """

    v_g: Columns
    v_a: Tensor | None
    hosted: bool = False

    def to_host(self) -> bool:
        """Moves everything; False where that was done before, or ranks have a share each."""
        if self.hosted or isinstance(self.v_g, ShardedColumns):
            return False
        self.hosted = True
        self.v_g = Columns(self.v_g.data.to(HOST), 1.0, HOST)
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                setattr(self, field.name, value.to(HOST))
        return True


@dataclass(kw_only=True)
class Basis(_Held):
    """Eigenvectors of both factors of a layer, and what the tokens are in them.

    Attributes:
        m_g: ``[r]`` eigenvalues of G.
        m_a: ``[dim_a]`` eigenvalues of A.
        sums: ``[r, dim_a]`` sums of the squared products over this rank's tokens.
    """

    m_g: Tensor
    m_a: Tensor
    sums: Tensor


@dataclass(kw_only=True)
class Eigenbasis(_Held):
    """A layer in EKFAC's basis.

    Attributes:
        denominator: ``[r, dim_a]`` damped and floored eigenvalues.
        complement: ``[dim_a]`` the same for the directions of G that are not at hand.
        whole: whether ``v_g`` spans the whole space.
        clipped: how many pairs the floor raised, the complement's included.
        kappa_before: condition number of the damped eigenvalues.
        kappa_after: condition number of those in use.
        label: layer and sides, for the log.
    """

    denominator: Tensor
    complement: Tensor
    whole: bool
    clipped: int
    kappa_before: float
    kappa_after: float
    label: str = ""


def second_moments(factors: LayerFactors, v_g: Tensor, v_a: Tensor | None) -> Tensor:
    """Returns ``S_ij = (1/(T n)) sum_t (V_G^T g_t)_i^2 (V_A^T a_t)_j^2``, ``[r, dim_a]``.

    Where every rank has its own tokens, their sums are added; collective then.

    Args:
        factors: with ``tokens_g`` and ``a`` kept.
        v_g: ``[out, r]``.
        v_a: ``[dim_a, dim_a]``, or None for an embedding (its one-hot inputs are the basis).
    """
    g = factors.tokens_g
    assert g is not None
    sums = _own_sums(factors, lambda rows: g[rows].to(v_g) @ v_g, v_g.new_empty(0), v_a)
    return _joined(factors, sums)


def _joined(factors: LayerFactors, sums: Tensor) -> Tensor:
    if factors.spread is not None:
        sums = factors.spread.communicator.all_reduce(sums)
    return sums / (factors.tokens * factors.n_draws)


def _own_sums(
    factors: LayerFactors,
    project: Callable[[slice], Tensor],
    like: Tensor,
    v_a: Tensor | None,
) -> Tensor:
    """Sums of squared products over this rank's tokens.

    Args:
        factors: with ``tokens_g`` and ``a`` kept.
        project: gives ``g V_G``, ``[b, r]``, for some of the rows of ``tokens_g``.
        like: of the dtype and on the device of the result.
        v_a: as for :func:`second_moments`.
    """
    g, a = factors.tokens_g, factors.a
    assert g is not None
    assert a is not None
    assert factors.order is not None
    layer = factors.layer
    total = like.new_zeros(project(slice(0, 0)).shape[1], layer.dim_a)
    for rows in blocks(g.shape[0], (layer.n_out + layer.dim_a) * 8):
        squared = project(rows).square()
        index = factors.order[rows].to(a.device)  # `a` may have had to leave a full device
        if v_a is None:
            total.T.index_add_(0, a[index].to(like.device), squared)
            continue
        x = a[index].to(v_a)
        if layer.augmented:
            x = torch.cat([x, x.new_ones(x.shape[0], 1)], dim=1)
        total.addmm_(squared.T, (x @ v_a).square())
    return total


def basis_of(factors: LayerFactors, numerics: Numerics) -> Basis:
    """Computes a layer's basis; collective only where G's columns are spread over ranks.

    Args:
        factors: collected with ``ekfac`` on.
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
    if is_spread(factors):
        return _spread_basis(factors, numerics)
    if a_factor is not None and a_factor.device != g_factor.device:
        # One of them has had to leave a full device: both decide over the same products here.
        a_factor.to_host()
        g_factor.to_host()
    m_g, v_g = g_factor.basis(numerics)
    m_a, v_a = _input_basis(factors, numerics)
    g = factors.tokens_g
    assert g is not None
    sums = _own_sums(factors, lambda rows: g[rows].to(v_g) @ v_g, m_g, v_a)
    columns = Columns(v_g.T, 1.0, v_g.device)
    return Basis(v_g=columns, v_a=v_a, m_g=m_g, m_a=m_a, sums=sums)


def is_spread(factors: LayerFactors) -> bool:
    """Says whether every rank has its share of the outputs of the layer's token columns."""
    g = factors.G
    return isinstance(g, GramFactor) and isinstance(g.columns, ShardedColumns)


def _input_basis(factors: LayerFactors, numerics: Numerics) -> tuple[Tensor, Tensor | None]:
    a_factor = factors.A
    if isinstance(a_factor, DiagonalFactor):
        return a_factor.diagonal, None
    assert isinstance(a_factor, DenseFactor)
    return a_factor.basis(numerics)


def _spread_basis(factors: LayerFactors, numerics: Numerics) -> Basis:
    """Each rank makes its rows of ``V_G``, and no rank ever has ``out x r``; collective.

    A rank's tokens are turned into the basis by the ranks together: their gradients are exchanged
    for those of all tokens at this rank's outputs, and ``g V_G`` is summed over the ranks.
    """
    g_factor, g, spread = factors.G, factors.tokens_g, factors.spread
    assert isinstance(g_factor, GramFactor)
    assert isinstance(g_factor.columns, ShardedColumns)
    assert g is not None
    assert spread is not None
    ranks = spread.communicator
    m_g, coefficients = g_factor.coefficients()
    v_g = g_factor.columns.share_of(coefficients)
    # The A side may have had to leave the device.
    m_a, v_a = (None if x is None else x.to(m_g.device) for x in _input_basis(factors, numerics))
    assert m_a is not None
    told = ranks.share([len(g), dtype_name(g.dtype)])
    rows = [length for length, _ in told]
    known = next((dtype for length, dtype in told if length), told[0][1])
    exchanged = columns_for_rows(g.to(getattr(torch, known)), rows, ranks)
    first = sum(rows[: ranks.rank])
    every = ranks.all_reduce(v_g.own(lambda v: exchanged.to(v.data) @ v.data.T))
    kept = [every[first : first + len(g)].clone(), m_g, v_a]
    places = iter([HOST])

    def sums() -> Tensor:
        projected, like, vectors = kept
        assert projected is not None
        assert like is not None
        return _own_sums(factors, lambda rows: projected[rows], like, vectors)

    def retreat() -> bool:
        place = next(places, None)
        kept[:] = [x if x is None or place is None else x.to(place) for x in kept]
        return place is not None

    what = f"{g_factor.label}, second moments"
    own = on_host_if_full(sums, retreat, what).to(m_g.device)
    return Basis(v_g=v_g, v_a=v_a, m_g=m_g, m_a=m_a, sums=own)


def eigenbasis(factors: LayerFactors, basis: Basis, settings: EngineSettings) -> Eigenbasis:
    """Returns a layer's basis with its damped and floored eigenvalues.

    Args:
        factors: of the layer.
        basis: of the layer; ``sums`` over the tokens of all ranks, divided by their number.
        settings: damping of both sides, the largest condition number, and the precision.
    """
    m_g, m_a, s = basis.m_g, basis.m_a, basis.sums
    lam_a, lam_g, kappa_max = settings.lam_A, settings.lam_G, settings.kappa_max
    damped = s + lam_a * m_g[:, None] + lam_g * m_a[None, :] + lam_a * lam_g
    complement = lam_g * m_a + lam_a * lam_g
    rank, out = len(m_g), factors.layer.n_out
    whole, clipped = rank == out, 0
    before = _kappa(damped, None if whole else complement)
    if kappa_max is not None:
        top = max(float(damped.max()), 0.0 if whole else float(complement.max()))
        floor = top / kappa_max**2
        clipped = int((damped < floor).sum()) + (out - rank) * int((complement < floor).sum())
        damped, complement = damped.clamp(min=floor), complement.clamp(min=floor)
    dtype = settings.numerics.apply_dtype
    return Eigenbasis(
        v_g=basis.v_g.cast(dtype),
        v_a=None if basis.v_a is None else basis.v_a.to(dtype),
        denominator=damped.to(dtype),
        complement=complement.to(dtype),
        whole=whole,
        clipped=clipped,
        kappa_before=before,
        kappa_after=_kappa(damped, None if whole else complement),
        hosted=basis.hosted,
    )


def _kappa(damped: Tensor, complement: Tensor | None) -> float:
    """Condition number of the eigenvalues of all pairs."""
    parts = [x for x in (damped, complement) if x is not None and x.numel()]
    if not parts:
        return 1.0
    low, top = min(float(x.min()) for x in parts), max(float(x.max()) for x in parts)
    return top / low if low > 0 else float("inf")


def prepared(factors: LayerFactors, settings: EngineSettings) -> Eigenbasis:
    """Computes a layer's basis and its damped and floored eigenvalues; collective on ranks.

    Where the device is full, what a rank does by itself goes on on its host; what it does together
    with others is never done twice.

    Args:
        factors: collected with ``ekfac`` on.
        settings: damping of both sides, the largest condition number, and the precision.

    Raises:
        SettingError: the layer's G has no eigenbasis (a true-Fisher head).
    """

    def retreat() -> bool:
        if is_spread(factors):
            return False
        moved = factors.G.to_host()
        return (factors.A is not None and factors.A.to_host()) or moved

    what = f"{factors.G.label} and its A side (in={factors.layer.dim_a}), eigenbasis"
    found = on_host_if_full(lambda: basis_of(factors, settings.numerics), retreat, what)
    found.sums = _joined(factors, found.sums)
    result = on_host_if_full(lambda: eigenbasis(factors, found, settings), found.to_host, what)
    result.label = f"{what}, application"
    return result


def apply(basis: Eigenbasis, y: Tensor, p: float) -> Tensor:
    """Returns the layer's matrix ``y`` with EKFAC's eigenvalues to the power ``p`` applied.

    Args:
        basis: of the layer.
        y: ``[out, dim_a]`` in the apply dtype; the same on all ranks.
        p: the power; -1 is the natural gradient.
    """
    return on_host_if_full(
        lambda: _apply(basis, y.to(basis.v_g.device), p).to(y.device), basis.to_host, basis.label
    )


def _apply(basis: Eigenbasis, y: Tensor, p: float) -> Tensor:
    rotated = y if basis.v_a is None else y @ basis.v_a
    inside = basis.v_g.times(rotated)
    result = basis.v_g.transposed_times(inside * basis.denominator.pow(p))
    if not basis.whole:
        outside = rotated - basis.v_g.transposed_times(inside)
        result += outside * basis.complement.pow(p)
    return result if basis.v_a is None else result @ basis.v_a.T
