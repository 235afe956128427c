"""EKFAC: the second moments of the gradient in the basis of the factors.

George et al. 2018, equation 10, in the convention of ``docs/math.md``, section 6: of the gradients
of sequences, as there, or of those of tokens. On the Woodbury path the basis of G holds the
eigenvectors of its nonzero eigenvalues; the moments of their complement are zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fisher_lab.curvature.collectives import dtype_name, exchange_tokens_for_outputs
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
        sums: ``[r, dim_a]`` sums of the squared products over this rank's tokens or sequences.
    """

    v_g: Columns
    v_a: Tensor | None
    m_g: Tensor
    m_a: Tensor
    sums: Tensor


@dataclass(kw_only=True)
class Eigenbasis:
    """A layer's block as EKFAC has it, ``(T/N) V diag(S) V^T``, and every product with it.

    ``v_g`` and ``v_a``, in the apply dtype, are as in :class:`Basis`.

    Attributes:
        moments: ``S``, ``[r, dim_a]`` in the core dtype: the eigenvalues, undamped.
        m_g: ``[r]`` eigenvalues of G.
        m_a: ``[dim_a]`` eigenvalues of A.
        lam_A: damping of A.
        lam_G: damping of G.
        missing: directions of G that are not at hand, whose eigenvalues are zero.
        ratio: ``T/N``.
        floor: damped eigenvalues are raised to it; 0 for none.
        dim: number of pairs of eigenvectors, outputs times inputs with the bias column.
        clipped: how many pairs the floor raised, the missing ones included.
        kappa_before: condition number of the damped eigenvalues.
        kappa_after: condition number of those in use.
        label: layer and sides, for the log.
    """

    v_g: Columns
    v_a: Tensor | None
    moments: Tensor
    m_g: Tensor
    m_a: Tensor
    missing: int
    ratio: float
    label: str
    lam_A: float = 0.0
    lam_G: float = 0.0
    floor: float = 0.0
    dim: int = 0
    clipped: int = 0
    kappa_before: float = 1.0
    kappa_after: float = 1.0

    def damped_by(self, lams: tuple[float, float], kappa_max: float | None) -> Eigenbasis:
        """Returns the same basis under other dampings, of A and of G, and with another floor."""
        basis = replace(self, lam_A=lams[0], lam_G=lams[1], floor=0.0, clipped=0)
        damped, complement = basis.damped()
        parts = [x for x in (damped, complement) if x is not None and x.numel()]
        basis.dim = (len(self.m_g) + self.missing) * len(self.m_a)
        basis.kappa_before = basis.kappa_after = _kappa(parts)
        if kappa_max is not None:
            basis.floor = max(float(x.max()) for x in parts) / kappa_max**2
            basis.clipped = int((damped < basis.floor).sum())
            if complement is not None:
                basis.clipped += self.missing * int((complement < basis.floor).sum())
            basis.kappa_after = _kappa([x.clamp(min=basis.floor) for x in parts])
        return basis

    def to_host(self) -> None:
        """Moves everything to host memory."""
        for key, value in vars(self).items():
            if isinstance(value, Tensor | Columns):
                setattr(self, key, value.to(HOST))

    # ---- the eigenvalues: every product takes them from here ---------------------------------

    def damped(self) -> tuple[Tensor, Tensor | None]:
        """Returns the damped eigenvalues ``[r, dim_a]``, and ``[dim_a]`` those of what is missing.

        ``S_ij + lam_A m^G_i + lam_G m^A_j + lam_A lam_G``; the second is None where nothing is
        missing.
        """
        both = self.lam_A * self.lam_G
        inside = self.moments + self.lam_A * self.m_g[:, None] + self.lam_G * self.m_a[None, :]
        return inside + both, self.lam_G * self.m_a + both if self.missing else None

    def used(self) -> tuple[Tensor, Tensor | None]:
        """Returns the eigenvalues in use, damped and floored, as :meth:`damped`."""
        inside, outside = self.damped()
        if self.floor == 0.0:
            return inside, outside
        outside = None if outside is None else outside.clamp(min=self.floor)
        return inside.clamp(min=self.floor), outside

    # ---- products and numbers ----------------------------------------------------------------

    def power(self, y: Tensor, p: float) -> Tensor:
        """Returns ``y`` with the eigenvalues in use to the power ``p`` applied, without ``T/N``.

        Args:
            y: ``[out, dim_a]`` in the apply dtype; the same on all ranks.
            p: the power; -1 is the natural gradient.
        """

        def work(here: Tensor) -> Tensor:
            inside, outside = self.used()
            outside = None if outside is None else outside.to(y.dtype).pow(p)
            return self._scaled(here, inside.to(y.dtype).pow(p), outside)

        return self._on_device(work, y)

    def solve(self, y: Tensor, lam: float) -> Tensor:
        """Returns ``(B + lam I)^-1 y`` for the block ``B`` with ``T/N``: one damping in all."""

        def work(here: Tensor) -> Tensor:
            outside = torch.full_like(self.m_a, 1.0 / lam).to(y.dtype) if self.missing else None
            inside = (self.ratio * self.moments + lam).reciprocal()
            return self._scaled(here, inside.to(y.dtype), outside)

        return self._on_device(work, y)

    def in_use(self, y: Tensor) -> Tensor:
        """Returns the block in use times ``y``, without ``T/N``, to check an inverse by."""
        return self.power(y, 1.0)

    def product(self, y: Tensor, *, damped: bool = False) -> Tensor:
        """Returns the block times ``y``, with ``T/N`` and without a floor."""

        def work(here: Tensor) -> Tensor:
            inside, outside = self.damped() if damped else (self.moments, None)
            if outside is None and self.missing:
                outside = torch.zeros_like(self.m_a)
            outside = None if outside is None else outside.to(y.dtype)
            return self._scaled(here, inside.to(y.dtype), outside) * self.ratio

        return self._on_device(work, y)

    def trace(self) -> float:
        """Returns the trace of the block, undamped."""
        return self.ratio * float(self.moments.double().sum())

    def logdet(self) -> float:
        """Returns the log-determinant of the block with the eigenvalues in use."""
        inside, outside = self.used()
        value = float(inside.double().log().sum())
        if outside is not None:
            value += self.missing * float(outside.double().log().sum())
        return value + self.dim * math.log(self.ratio)

    def top(self, k: int) -> Tensor:
        """Returns the ``min(k, dim)`` largest eigenvalues of the block, undamped."""
        values = self.moments.double().flatten()
        values = values.topk(min(k, len(values))).values.cpu() * self.ratio
        return torch.cat([values, values.new_zeros(min(k, self.dim) - len(values))])

    def _on_device(self, work: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
        """Does a product where the basis is; the result comes back to where ``y`` is."""
        return on_device(
            lambda _: work(y.to(self.v_g.device)).to(y.device),
            self.v_g.device,
            self.label,
            self.to_host,
            collective=self.v_g.sharded,
        )

    def _scaled(self, y: Tensor, inside: Tensor, outside: Tensor | None) -> Tensor:
        """``y`` in the basis, times values for its pairs and for what is missing, and back."""
        rotated = y if self.v_a is None else y @ self.v_a
        coordinates = self.v_g.times(rotated)
        result = self.v_g.transposed_times(coordinates * inside)
        if outside is not None:
            result += (rotated - self.v_g.transposed_times(coordinates)) * outside
        return result if self.v_a is None else result @ self.v_a.T


def _kappa(parts: list[Tensor]) -> float:
    """Condition number of the eigenvalues of all pairs."""
    if not parts:
        return 1.0
    low, top = min(float(x.min()) for x in parts), max(float(x.max()) for x in parts)
    return top / low if low > 0 else float("inf")


def prepared(
    factors: LayerFactors, settings: EngineSettings, lams: tuple[float, float]
) -> Eigenbasis:
    """Computes a layer's basis and its eigenvalues, damped and floored; collective on ranks.

    ``lams`` are the dampings of A and of G.

    Where the device is full, what a rank does by itself moves to its host memory; what it does
    together with others is never done twice. The factors were collected with ``ekfac`` on.
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
    # What is expected over the model's own distribution was not drawn.
    draws = 1 if factors.hessian else factors.n_draws
    found = found._replace(sums=found.sums / (factors.tokens * draws))

    def there(device: torch.device) -> Eigenbasis:
        here = found
        if device != found.sums.device:
            moved = {k: v.to(device) for k, v in found._asdict().items() if v is not None}
            here = found._replace(**moved)
        return eigenbasis(factors, here, settings, lams, f"{what}, application")

    return on_device(there, found.sums.device, what)


def eigenbasis(
    factors: LayerFactors,
    basis: Basis,
    settings: EngineSettings,
    lams: tuple[float, float],
    label: str,
) -> Eigenbasis:
    """Returns a layer's basis with its damped and floored eigenvalues.

    The ``sums`` of the basis are those over the tokens of all ranks, divided by their number.
    """
    dtype = settings.numerics.apply_dtype
    return Eigenbasis(
        v_g=basis.v_g.cast(dtype),
        v_a=None if basis.v_a is None else basis.v_a.to(dtype),
        moments=basis.sums,
        m_g=basis.m_g,
        m_a=basis.m_a,
        missing=factors.layer.n_out - len(basis.m_g),
        ratio=factors.ratio,
        label=label,
    ).damped_by(lams, settings.kappa_max)


def kronecker(factors: LayerFactors, numerics: Numerics) -> Eigenbasis:
    """Returns a layer's Kronecker product in its eigenbasis: the moments are ``m^G_i m^A_j``.

    Undamped; of a layer without A, the one block G. Collective where G's columns are sharded.
    """
    m_g, v_g = factors.G.basis(numerics)
    if v_g is None:
        v_g = Columns(torch.eye(len(m_g), dtype=m_g.dtype, device=m_g.device), 1.0, m_g.device)
    m_a, v_a = m_g.new_ones(1), None
    if factors.A is not None:
        m_a, inputs = factors.A.basis(numerics)
        v_a = None if inputs is None else inputs.data.T.to(numerics.apply_dtype)
    return Eigenbasis(
        v_g=v_g.cast(numerics.apply_dtype),
        v_a=v_a,
        moments=torch.outer(m_g, m_a.to(m_g.device)),
        m_g=m_g,
        m_a=m_a,
        missing=factors.G.dim - len(m_g),
        ratio=factors.ratio,
        label=f"{factors.G.label}, eigenbasis",
    )


# ---- second moments ------------------------------------------------------------------------------


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
        sums = _sums_of(factors, v_g.data.T, m_g, v_a)
    return Basis(v_g, v_a, m_g, m_a, sums)


def _sums_of(factors: LayerFactors, v_g: Tensor, like: Tensor, v_a: Tensor | None) -> Tensor:
    """Sums over this rank's tokens or sequences where it has all of ``V_G``, ``[out, r]``."""
    g = factors.tokens_g
    assert g is not None
    if factors.hessian:
        return squared_products(factors, partial(_expected_squares, factors, v_g), like, v_a)
    return _sums_of_projected(factors, lambda rows: g[rows].to(v_g) @ v_g, like, v_a)


def _sums_of_projected(
    factors: LayerFactors,
    project: Callable[[slice | Tensor], Tensor],
    like: Tensor,
    v_a: Tensor | None,
) -> Tensor:
    if factors.sequences is not None:
        return sequence_products(factors, project, like, v_a)
    return squared_products(factors, lambda rows: project(rows).square(), like, v_a)


def _expected_squares(factors: LayerFactors, v_g: Tensor, rows: slice) -> Tensor:
    """``E (v_i^T g)^2 = v_i^T H v_i`` at labelled tokens of a true-Fisher head, ``[b, r]``.

    Labels are independent of one another and gradients have mean zero: the sum over a sequence has
    the sum of these.
    """
    assert factors.tokens_g is not None
    p = factors.tokens_g[rows].to(v_g)
    squares = p @ v_g.square()
    return squares if factors.hessian == "diagonal" else (squares - (p @ v_g).square()).clamp(min=0)


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
        return _sums_of_projected(factors, lambda rows: p[rows], like, vectors)

    return on_device(there, m_g.device, f"{factors.G.label}, second moments").to(m_g.device)


def squared_products(
    factors: LayerFactors,
    squares: Callable[[slice], Tensor],
    like: Tensor,
    v_a: Tensor | None,
) -> Tensor:
    """Returns ``sum_t (V_G^T g_t)_i^2 (V_A^T a_t)_j^2`` over this rank's tokens, ``[r, dim_a]``.

    Args:
        factors: with ``tokens_g`` and ``a`` kept.
        squares: gives ``(g V_G)^2``, ``[b, r]``, for some of the rows of ``tokens_g``.
        like: of the dtype and on the device of the result.
        v_a: ``[dim_a, dim_a]``, or None for an embedding (its one-hot inputs are the basis).
    """
    g, a = factors.tokens_g, factors.a
    assert g is not None
    assert a is not None
    assert factors.order is not None
    layer = factors.layer
    total = like.new_zeros(squares(slice(0, 0)).shape[1], layer.dim_a)
    for rows in blocks(g.shape[0], (layer.n_out + layer.dim_a) * 8):
        squared = squares(rows)
        index = factors.order[rows].to(a.device)  # `a` may have moved off a full device
        if v_a is None:
            total.T.index_add_(0, a[index].to(like.device), squared)
        else:
            total.addmm_(squared.T, _rotated(factors, index, v_a).square())
    return total


def sequence_products(
    factors: LayerFactors,
    project: Callable[[slice | Tensor], Tensor],
    like: Tensor,
    v_a: Tensor | None,
) -> Tensor:
    """Returns ``sum_n (sum_t (V_G^T g_t)_i (V_A^T a_t)_j)^2``, ``[r, dim_a]``.

    The inner sum is over the tokens of sequence ``n``, the outer one over this rank's sequences and
    draws.

    Args:
        factors: with ``tokens_g``, ``a`` and ``sequences`` kept.
        project: gives ``g V_G``, ``[b, r]``, for some of the rows of ``tokens_g``.
        like: of the dtype and on the device of the result.
        v_a: as for :func:`squared_products`.
    """
    a, order, sequences = factors.a, factors.order, factors.sequences
    assert a is not None
    assert order is not None
    assert sequences is not None
    r, m = project(slice(0, 0)).shape[1], factors.layer.dim_a
    total = like.new_zeros(r, m)
    if v_a is None:
        # Tokens with the same index in a sequence add up before they are squared.
        places = sequences * m + a[order.to(a.device)].to(sequences.device)
        found, inverse = places.unique(return_inverse=True)
        projected = project(slice(None))
        for columns in blocks(r, len(places) * 8):
            part = projected[:, columns]
            part = part.new_zeros(len(found), part.shape[1]).index_add_(0, inverse, part)
            total[columns].T.index_add_(0, (found % m).to(like.device), part.square())
        return total
    by_sequence = sequences.argsort(stable=True)
    _, counts = sequences[by_sequence].unique_consecutive(return_counts=True)
    starts = counts.cumsum(0) - counts
    for n in counts.unique().tolist():
        first = starts[counts == n]
        for some in blocks(len(first), (r * m + n * (r + m)) * 8):
            steps = torch.arange(n, device=first.device)
            rows = by_sequence[(first[some, None] + steps).flatten()]
            shape = len(rows) // n, n
            g = project(rows).reshape(*shape, r)
            x = _rotated(factors, order[rows].to(a.device), v_a).reshape(*shape, m)
            total += (g.mT @ x).square_().sum(dim=0)
    return total


def _rotated(factors: LayerFactors, index: Tensor, v_a: Tensor) -> Tensor:
    """The inputs ``[b, dim_a]`` of some tokens in the basis of A, with the bias's column."""
    assert factors.a is not None
    x = factors.a[index].to(v_a)
    if factors.layer.augmented:
        x = torch.cat([x, x.new_ones(x.shape[0], 1)], dim=1)
    return x @ v_a
