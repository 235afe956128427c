"""Powers of K-FAC as linear operators, against a dense matrix of the test's own."""

import numpy as np
import pytest
import torch
from torch import nn

from fisher_lab.curvature.errors import BatchError, CurvatureError
from fisher_lab.curvature.kfac.engine import KFACNaturalGradient

LAM_A, LAM_G = 0.3, 0.05


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)

    def forward(self, x):
        return self.two(torch.tanh(self.one(x)))


def squares(outputs, batch):
    return outputs.square().sum(-1)


@pytest.fixture
def made():
    torch.manual_seed(0)
    model, x = Net().double(), torch.randn(5, 3, dtype=torch.float64)
    kfac = KFACNaturalGradient(
        damping_A=LAM_A, damping_G=LAM_G, max_condition_number=None, track_diagonal=False
    )
    assert "none yet" in repr(kfac)
    kfac.collect_kfac_factors(model, {"x": x}, squares)
    return kfac, model, x


def dense(model, x, power):
    """The blocks ``G^p (x) A^p``, from inputs and output gradients that autograd gives."""
    a, s = x, model.one(x)
    hidden = torch.tanh(s)
    out = model.two(hidden)
    gradients = torch.autograd.grad(out.square().sum(), (s, out))
    blocks = []
    for inputs, g in zip((a, hidden), gradients, strict=True):
        sides = []
        for rows, lam in ((g, LAM_G), (inputs.detach(), LAM_A)):
            matrix = rows.T @ rows / len(rows) + lam * torch.eye(rows.shape[1], dtype=torch.float64)
            values, vectors = np.linalg.eigh(matrix.numpy())
            sides.append(vectors @ np.diag(values**power) @ vectors.T)
        blocks.append(np.kron(*sides))
    n = sum(len(block) for block in blocks)
    whole = np.zeros((n, n))
    whole[: len(blocks[0]), : len(blocks[0])], whole[len(blocks[0]) :, len(blocks[0]) :] = blocks
    return whole


@pytest.mark.parametrize("power", [-1.0, -0.5])
def test_it_is_the_dense_matrix_on_names_on_vectors_and_in_scipy(made, power):
    kfac, model, x = made
    operator, expected = kfac.inverse(model, power), dense(model, x, power)
    assert operator.shape == expected.shape == (20, 20)
    assert operator.names == ["one.weight", "two.weight"]
    columns = torch.randn(20, 3, dtype=torch.float64)
    np.testing.assert_allclose(operator @ columns, expected @ columns.numpy(), rtol=1e-9)
    named = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    flat = torch.cat([named[name].flatten() for name in operator.names])
    found = operator @ named
    assert set(found) == set(named)
    together = torch.cat([found[name].flatten() for name in operator.names])
    np.testing.assert_allclose(together, expected @ flat.numpy(), rtol=1e-9)
    np.testing.assert_allclose(operator @ flat, together, rtol=1e-12)
    scipys = operator.to_scipy()
    np.testing.assert_allclose(scipys @ np.eye(20), expected, atol=1e-12)
    composed = 2.0 * scipys @ scipys.T
    np.testing.assert_allclose(composed @ flat.numpy(), 2 * expected @ expected @ flat.numpy())


def test_it_takes_what_it_covers_alone_and_says_so(made):
    kfac, model, _ = made
    operator = kfac.inverse(model)
    with pytest.raises(BatchError, match=r"vectors: \[19\]; allowed: \[20\] or \[20, k\]"):
        operator @ torch.ones(19)
    with pytest.raises(CurvatureError):
        KFACNaturalGradient().inverse(model)
    some = KFACNaturalGradient(exclude=["two"], track_diagonal=False)
    some.collect_kfac_factors(model, {"x": torch.randn(5, 3).double()}, squares)
    assert some.inverse(model).names == ["one.weight"]


def test_an_engine_shows_layers_methods_coverage_and_damping(made):
    kfac, model, _ = made
    text, page = repr(kfac), kfac._repr_html_()
    assert text.startswith("KFACNaturalGradient(layers 2 (2 woodbury); coverage 100.0%; damping ")
    assert "A 0.3, G 0.05" in text
    assert "<td>one</td><td>woodbury</td><td>5</td>" in page
    assert repr(kfac.inverse(model)) == "KFACOperator(power -1, 20 numbers in 2 parameters)"
