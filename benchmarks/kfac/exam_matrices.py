"""The matrices of the exam: curvlinops', this project's, and the exact Gauss-Newton matrix."""

# pyright: reportMissingImports=false
from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from curvlinops import EKFACLinearOperator, KFACLinearOperator
from torch import Tensor, nn

from fisher_lab import KFACNaturalGradient
from fisher_lab.curvature.kfac import ekfac
from fisher_lab.curvature.kfac.layer_factors import LayerFactors
from fisher_lab.curvature.likelihoods import Likelihood, Scored, understood

DRAWS = 2
FISHER = {"type-2": "true", "mc": "mc", "empirical": "empirical"}


@dataclass(frozen=True)
class Question:
    """What both libraries are asked for.

    Attributes:
        model: in float64, in ``eval()`` mode.
        loss: module of torch.
        batches: pairs of inputs and targets.
        names: the parameters whose matrix is asked for, in its order.
        fisher: ``type-2``, ``mc`` or ``empirical``.
        sharing: ``expand`` or ``reduce``.
        joint: whether the weight and the bias of a layer share a block.
        ekfac: whether the eigenvalues are corrected.
    """

    model: nn.Module
    loss: nn.Module
    batches: Sequence[tuple[Any, Tensor]]
    names: tuple[str, ...]
    fisher: str
    sharing: str
    joint: bool
    ekfac: bool = False

    @property
    def summed(self) -> bool:
        """Whether the loss is a sum."""
        return self.loss.reduction == "sum"

    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters in the matrix's order."""
        named = dict(self.model.named_parameters())
        return {name: named[name] for name in self.names}


# ---- draws that both libraries see -------------------------------------------------------------


class Draws:
    """Targets drawn from outputs ``[M, C]``, the same in both libraries."""

    def __init__(self, loss: nn.Module) -> None:
        self.loss, self.number = type(loss), 0

    def __call__(self, outputs: Tensor) -> Tensor:
        """Returns the next targets."""
        generator = torch.Generator().manual_seed(self.number)
        self.number += 1
        if self.loss is nn.MSELoss:
            noise = torch.randn(outputs.shape, generator=generator, dtype=outputs.dtype)
            return outputs + 0.5**0.5 * noise
        if self.loss is nn.BCEWithLogitsLoss:
            return torch.bernoulli(outputs.sigmoid(), generator=generator)
        return torch.multinomial(outputs.softmax(1), 1, generator=generator)[:, 0]


def with_draws(likelihood: Likelihood, draws: Draws) -> Likelihood:
    """A likelihood whose draws are those; its gradients at them come from autograd."""
    base: Any = type(likelihood)

    class Drawn(base):
        def drawn(self, outputs: Tensor, generator: Any, n: int) -> Iterator[Tensor]:
            for _ in range(n):
                f = outputs.detach().requires_grad_()
                none = torch.zeros(len(f), dtype=torch.int64)
                with torch.enable_grad():
                    total = self.total(Scored(f, draws(outputs), none, none, self))
                yield torch.autograd.grad(total, f)[0]

    return like(Drawn, likelihood)


class Curvlinops(KFACLinearOperator):
    """curvlinops' K-FAC with the draws of the exam."""

    draws: Draws

    def draw_label(self, output: Tensor) -> Tensor:
        """See the base class."""
        return self.draws(output.detach())


class CurvlinopsEKFAC(EKFACLinearOperator):
    """curvlinops' EKFAC with the draws of the exam, each twice: it makes two passes."""

    draws: Draws

    def compute_eigenvalue_correction(self) -> None:
        """See the base class."""
        self.draws.number = 0
        super().compute_eigenvalue_correction()

    def draw_label(self, output: Tensor) -> Tensor:
        """See the base class."""
        return self.draws(output.detach())


def at_once(likelihood: Likelihood) -> Likelihood:
    """A likelihood with one pass a class for all rows, as curvlinops' type-2 has."""
    base: Any = type(likelihood)

    class Together(base):
        def score(self, outputs: Any, batch: Any) -> Scored:
            scored = super().score(outputs, batch)
            return replace(scored, positions=torch.zeros_like(scored.positions))

    return like(Together, likelihood)


def like(kind: type[Likelihood], likelihood: Likelihood) -> Likelihood:
    """An object of a subclass with the options of a likelihood."""
    made = kind.__new__(kind)
    vars(made).update(vars(likelihood))
    return made


# ---- the matrices ------------------------------------------------------------------------------


def theirs(asked: Question, **options: Any) -> Tensor:
    """The matrix of curvlinops.

    Raises:
        ValueError: curvlinops does not offer it.
    """
    operator = (CurvlinopsEKFAC if asked.ekfac else Curvlinops)(
        asked.model, asked.loss, list(asked.parameters().values()), asked.batches,
        fisher_type=asked.fisher, kfac_approx=asked.sharing, check_deterministic=False,
        separate_weight_and_bias=not asked.joint, mc_samples=DRAWS if asked.fisher == "mc" else 1,
        batch_size_fn=examples_of, **options,
    )  # fmt: skip
    operator.draws = Draws(asked.loss)
    return operator @ torch.eye(operator.shape[0], dtype=torch.float64)


def examples_of(x: Any) -> int:
    """How many examples there are in a batch's inputs."""
    return len(x if isinstance(x, Tensor) else x["x"])


Change = Callable[[Any], Any]
"""Makes another likelihood of one."""
Moments = Callable[[LayerFactors, ekfac.Eigenbasis, int], Tensor]
"""A layer's eigenvalues ``[r, dim_a]`` in its basis, with the number of examples."""


def collected(asked: Question, change: Change = lambda x: x) -> KFACNaturalGradient:
    """This project's factors; those of weights alone where no bias stands beside them."""
    loss = change(understood(asked.loss))
    if asked.fisher == "mc":
        loss = with_draws(loss, Draws(asked.loss))
    alone = not any(name.endswith("bias") for name in asked.names)
    alone = alone or (asked.ekfac and not asked.joint)
    for name, p in asked.model.named_parameters():
        p.requires_grad_(not (alone and name.endswith("bias")))
    kfac = KFACNaturalGradient(
        fisher=FISHER[asked.fisher], sharing=asked.sharing, n_samples=DRAWS, ekfac=asked.ekfac,
        kfac_policy="small_only", track_diagonal=False, damping=0.0, max_condition_number=None,
        true_max_classes=1 << 20,
    )  # fmt: skip
    # The exact factor of a head has no eigenbasis; beneath other outputs there is no head.
    with headless(asked.model) if asked.ekfac else nullcontext():
        kfac.collect_kfac_factors(asked.model, list(asked.batches), loss=loss)
    for p in asked.model.parameters():
        p.requires_grad_(True)
    if kfac.skipped:
        raise RuntimeError(f"{kfac.skipped}")
    return kfac


@contextmanager
def headless(model: nn.Module) -> Iterator[None]:
    """Multiplies a model's outputs by one, so that they are no layer's."""
    handle = model.register_forward_hook(lambda *given: given[-1] * 1.0)
    try:
        yield
    finally:
        handle.remove()


def ours(asked: Question, change: Change = lambda x: x, moments: Moments | None = None) -> Tensor:
    """The matrix of this project: the blocks of its layers at their parameters' places.

    Args:
        asked: the question.
        change: makes another likelihood of the one that the loss means.
        moments: eigenvalues of EKFAC in place of its own.
    """
    places, start = {}, 0
    for name, p in asked.parameters().items():
        places[name] = torch.arange(start, start + p.numel()).reshape(p.shape)
        start += p.numel()
    total = torch.zeros(start, start, dtype=torch.float64)
    kfac = collected(asked, change)
    joint = asked.joint and any(name.endswith("weight") for name in asked.names)
    if asked.ekfac and not joint:
        biases = [name for name in asked.names if name.endswith("bias")]
        if moments is None:
            # A bias's own basis is that of G, whose eigenvalues need no correction by tokens.
            plain = collected(replace(asked, ekfac=False, joint=True), change)
            _place(total, places, plain, asked, biases)
        else:
            _place_biases(total, places, collected(replace(asked, joint=True), change), asked)
    names = [n for n in asked.names if joint or not asked.ekfac or not n.endswith("bias")]
    _place(total, places, kfac, asked, names, moments)
    return total


def _place(
    total: Tensor,
    places: Mapping[str, Tensor],
    kfac: KFACNaturalGradient,
    asked: Question,
    names: Sequence[str],
    moments: Moments | None = None,
) -> None:
    """Adds the blocks of some parameters."""
    for f in kfac.kfac_factors.values():
        parts = [f.layer.weight, *f.layer.biases]
        if not any(name in names for name in parts):
            continue
        assert f.A is not None
        block = _block(f, kfac, asked, moments)
        index = torch.arange(f.G.dim * f.A.dim).reshape(f.G.dim, f.A.dim)
        rows = [index[:, : f.layer.n_in].flatten()]
        rows += [index[:, f.layer.n_in + k] for k in range(len(f.layer.biases))]
        kept = [
            (own, places[name].flatten())
            for own, name in zip(rows, parts, strict=True) if name in names
        ]  # fmt: skip
        for (own, at), (others, to) in itertools.product(kept, kept):
            if asked.joint or own is others:
                total[at[:, None], to] = block[own[:, None], others]


def _place_biases(
    total: Tensor,
    places: Mapping[str, Tensor],
    kfac: KFACNaturalGradient,
    asked: Question,
) -> None:
    """Adds the blocks of biases by themselves, with the moments of whole examples."""
    n = sum(map(examples_of, (x for x, _ in asked.batches)))
    for f in kfac.kfac_factors.values():
        basis = ekfac.prepared(f, kfac.settings, (0.0, 0.0))
        values = by_example(f, basis, n, inputs=False).flatten()
        scale = f.ratio * (f.n_labels if asked.summed else 1)
        vectors = outputs_basis(basis)
        for name in f.layer.biases:
            if name in asked.names:
                at = places[name].flatten()
                total[at[:, None], at] = scale * (vectors * values) @ vectors.T


def _block(
    f: LayerFactors, kfac: KFACNaturalGradient, asked: Question, moments: Moments | None
) -> Tensor:
    """``(T/N) G (x) A``, times ``N`` for a summed loss, or the same in EKFAC."""
    scale = f.ratio * (f.n_labels if asked.summed else 1)
    if not kfac.settings.ekfac:
        assert f.A is not None
        return scale * torch.kron(f.G.to_dense(), f.A.to_dense())
    basis = ekfac.prepared(f, kfac.settings, (0.0, 0.0))
    assert basis.v_a is not None
    values = basis.moments
    if moments is not None:
        values = moments(f, basis, sum(map(examples_of, (x for x, _ in asked.batches))))
    vectors = torch.kron(outputs_basis(basis), basis.v_a.contiguous())
    return scale * (vectors * values.flatten()) @ vectors.T


def outputs_basis(basis: ekfac.Eigenbasis) -> Tensor:
    """The eigenvectors of G as columns, ``[out, r]``."""
    unit = torch.eye(len(basis.moments), dtype=torch.float64)
    return basis.v_g.transposed_times(unit).contiguous()


def by_example(f: LayerFactors, basis: ekfac.Eigenbasis, n: int, inputs: bool = True) -> Tensor:
    """EKFAC's moments of the gradients of examples, summed over their tokens, ``[r, dim_a]``.

    Without ``inputs`` they are those of a bias by itself, ``[r, 1]``.

    ``(1/T) sum_e (sum_{t of e} (V_G^T g_t)_i (V_A^T a_t)_j)^2``; ``docs/math.md`` has the squares
    inside of the sum over tokens. Tokens lie example by example, as many for each of the ``n``.
    """
    g, a, order = f.tokens_g, f.a, f.order
    assert g is not None
    assert a is not None
    assert order is not None
    assert basis.v_a is not None
    a = torch.cat([a, a.new_ones(len(a), 1)], dim=1) if f.layer.augmented else a
    tokens, place = order.sort(stable=True)
    starts = torch.searchsorted(tokens, tokens)
    times = torch.empty_like(order)  # which draw, or class, of its token
    times[place] = torch.arange(len(order)) - starts
    x = a[order] @ basis.v_a if inputs else a.new_ones(len(order), 1)
    y = g.double() @ outputs_basis(basis)
    group = times * n + order // (len(a) // n)
    sums = y.new_zeros(int(group.max()) + 1, y.shape[1], x.shape[1])
    sums.index_add_(0, group, y[:, :, None] * x[:, None, :])
    return sums.square().sum(0) / (f.tokens * f.n_draws)


def gauss_newton(asked: Question) -> Tensor:
    """The exact matrix ``sum J^T H J`` by explicit Jacobians, block-diagonal by layer."""
    named = asked.parameters()
    loss = type(asked.loss)(reduction="sum")
    size, n = sum(p.numel() for p in named.values()), 0
    total = torch.zeros(size, size, dtype=torch.float64)
    for x, y in asked.batches:
        f = asked.model(x)
        rows = [torch.autograd.grad(one, list(named.values()), retain_graph=True)
                for one in f.flatten()]  # fmt: skip
        jacobian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
        flat = f.detach().flatten()
        curvature: Any = torch.autograd.functional.hessian(
            lambda v, shape=f.shape, y=y: loss(v.reshape(shape), y), flat
        )
        total += jacobian.T @ curvature @ jacobian
        n += y.numel()
    owner = torch.cat([
        torch.full((p.numel(),), 0 if asked.joint else k) for k, p in enumerate(named.values())
    ])  # fmt: skip
    total = total * (owner[:, None] == owner)
    return total if asked.summed else total / n


def relative(found: Tensor, expected: Tensor) -> float:
    """Relative error in the Frobenius norm."""
    return float((found - expected).norm() / expected.norm())
