"""One weight in several uses, some with a bias, some with another or none.

Each bias has a column of A of its own, 1 in the rows of its uses: `[W b c]` is one matrix.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fisher_lab import KFACNaturalGradient
from fisher_lab.curvature.losses import CrossEntropy
from tests.reference import relative

WIDTH, DOUBLE = 3, torch.float64


class Shared(nn.Module):
    """`first` and `second` have one weight; so has a use by function without a bias."""

    def __init__(self, first: bool, second: bool, bare: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH, first), nn.Linear(WIDTH, WIDTH, second)
        self.second.weight = self.first.weight
        self.head, self.bare = nn.Linear(WIDTH, 4), bare

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.second(torch.tanh(self.first(x))))
        if self.bare:
            x = torch.tanh(F.linear(x, self.first.weight))
        return self.head(x)


CASES = [(True, False, False), (True, True, False), (True, True, True), (False, True, False)]


def rows_of(model: Shared, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs with a column for each bias, and output gradients, call by call."""
    biases = [m.bias for m in (model.first, model.second) if m.bias is not None]
    calls, real = [], F.linear

    def linear(a, weight, bias=None):
        s = real(a, weight, bias)
        if weight is model.first.weight:
            marks = torch.tensor([float(bias is b) for b in biases], dtype=DOUBLE)
            s.retain_grad()
            calls.append((torch.cat([a, marks.expand(*a.shape[:-1], -1)], -1).detach(), s))
        return s

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "linear", linear)
        F.cross_entropy(model(x).flatten(0, -2), labels.flatten(), reduction="sum").backward()
    model.zero_grad()
    return (
        torch.stack([a for a, _ in calls]),
        torch.stack([s.grad for _, s in calls if s.grad is not None]),
    )


def setting(case, *shape: int) -> tuple[Shared, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(*shape, WIDTH, dtype=DOUBLE)
    return Shared(*case).double(), x, torch.randint(4, shape)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("policy", ["all", "small_only"])
@pytest.mark.parametrize("ekfac", [False, True])
def test_factors_and_natural_gradient(case, policy, ekfac):
    model, x, labels = setting(case, 4, 5)
    lam = 1e-2
    kfac = KFACNaturalGradient(
        damping=lam, max_condition_number=None, kfac_policy=policy, ekfac=ekfac
    )
    kfac.collect_kfac_factors(
        model, (x, labels), loss=CrossEntropy(), keep_gradient=True, verify=True
    )
    a, g = (rows.flatten(0, -2) for rows in rows_of(model, x, labels))
    factors = kfac.kfac_factors["first"]
    A, G = a.T @ a / len(a), g.T @ g / len(g)
    assert factors.tokens == len(a) == (2 + case[2]) * 20
    assert relative(factors.A.to_dense(), A) < 1e-12
    assert relative(factors.G.to_dense(), G) < 1e-12
    own = g.T @ a / 20
    if ekfac:
        (m_a, v_a), (m_g, v_g) = torch.linalg.eigh(A), torch.linalg.eigh(G)
        s = ((g @ v_g) ** 2).T @ ((a @ v_a) ** 2) / len(a)
        s = s + lam * m_g[:, None] + lam * m_a + lam**2
        expected = v_g @ ((v_g.T @ own @ v_a) / s) @ v_a.T
    else:
        eyes = [lam * torch.eye(len(m), dtype=DOUBLE) for m in (G, A)]
        expected = torch.linalg.solve(G + eyes[0], own) @ torch.linalg.inv(A + eyes[1])
    found = kfac.compute_natural_gradient(None, model)
    assert relative(found["first.weight"], expected[:, :WIDTH]) < 1e-9
    names = [n for n in ("first.bias", "second.bias") if n in dict(model.named_parameters())]
    for column, name in enumerate(names):
        assert relative(found[name], expected[:, WIDTH + column]) < 1e-9
    given = kfac.compute_natural_gradient(kfac.own_gradients(model), model)
    assert max(relative(given[n], found[n]) for n in found) < 1e-9
    assert kfac.coverage.share == 1.0


def test_rows_of_examples_have_the_share_of_their_tokens():
    model, x, labels = setting((True, True, True), 4, 5)
    kfac = KFACNaturalGradient(kfac_policy="small_only", sharing="reduce")
    kfac.collect_kfac_factors(model, (x, labels), loss=CrossEntropy())
    a, g = rows_of(model, x, labels)  # [calls, B, S, ...]
    a, g = a.mean((0, 2)), g.sum((0, 2))
    factors = kfac.kfac_factors["first"]
    assert bool((a[:, WIDTH:] == 1 / 3).all())
    assert relative(factors.A.to_dense(), a.T @ a / 4) < 1e-12
    assert relative(factors.G.to_dense(), g.T @ g / 4) < 1e-12


def test_factors_are_kept_in_a_file(tmp_path):
    model, x, labels = setting((True, True, False), 4, 5)
    kfac = KFACNaturalGradient(damping=1e-2)
    kfac.collect_kfac_factors(model, (x, labels), loss=CrossEntropy(), keep_gradient=True)
    kfac.save(tmp_path / "factors.safetensors", model)
    again = KFACNaturalGradient(damping=1e-2)
    again.load(tmp_path / "factors.safetensors", model)
    one, other = (k.compute_natural_gradient(None, model) for k in (kfac, again))
    assert max(relative(one[name], other[name]) for name in one) < 1e-12


class Varying(Shared):
    """Without the second use where the inputs are negative."""

    def forward(self, x: Tensor) -> Tensor:
        s = self.first(x)
        return self.head(torch.tanh(self.second(s) if float(x.sum()) > 0 else s))


def test_biases_that_differ_from_batch_to_batch_leave_the_layer_out():
    model, x, labels = setting((True, True, False), 4, 5)
    torch.manual_seed(0)
    model = Varying(True, True, False).double()
    batches = [(x.abs(), labels), (-x.abs(), labels)]
    kfac = KFACNaturalGradient(damping=1e-2)
    kfac.collect_kfac_factors(model, batches, loss=CrossEntropy(), keep_gradient=True)
    assert "first" not in kfac.kfac_factors
    assert kfac.skipped["first"] == "its biases differ from batch to batch"
    total = sum(F.cross_entropy(model(a).flatten(0, 1), b.flatten()) for a, b in batches) / 2
    for name in ("first.weight", "first.bias", "second.bias"):
        (gradient,) = torch.autograd.grad(
            total, dict(model.named_parameters())[name], retain_graph=True
        )
        assert relative(kfac.own_gradients(model)[name], gradient) < 1e-12


class SharedNorms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.other.weight, self.head = self.one.weight, nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.other(torch.tanh(self.one(x))))


def test_one_scale_with_two_shifts_is_left_out():
    torch.manual_seed(0)
    model, x = SharedNorms().double(), torch.randn(4, WIDTH, dtype=DOUBLE)
    kfac = KFACNaturalGradient()
    kfac.collect_kfac_factors(model, (x, torch.randint(4, (4,))), loss=CrossEntropy())
    assert set(kfac.kfac_factors) == {"head"}
    assert kfac.skipped["one"] == kfac.skipped["other"] == "one weight with unlike biases"
