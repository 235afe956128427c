"""Every structure of a factor does what its dense matrix does, in float64."""

import math

import pytest
import torch

from fisher_lab.config.errors import SettingError
from fisher_lab.curvature.kfac.factors import (
    BlockDiagonalFactor,
    Columns,
    DenseFactor,
    DiagonalFactor,
    DiagonalLowRankFactor,
    Factor,
    WoodburyFactor,
    base,
)
from fisher_lab.curvature.kfac.numerics import Numerics

DOUBLE = torch.float64
DIM, LAM, KAPPA = 9, 1e-2, 20.0
NUMERICS = Numerics(DOUBLE, DOUBLE, 1e-6)


class ScaledIdentity(Factor):
    """A new structure: it has the two methods that a structure needs, and nothing else."""

    structure = "scaled_identity"

    def __init__(self, scale: torch.Tensor, dim: int) -> None:
        self.scale, self.dim = scale, dim

    def to_dense(self):
        return self.scale * torch.eye(self.dim, dtype=self.scale.dtype)

    @classmethod
    def restored(cls, entry, dim, read):
        matrix = read.tensor("matrix", dim, dim)
        return cls(matrix.diagonal().mean(), len(matrix))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def columns(tokens: int, dim: int = DIM) -> Columns:
    """Token gradients whose singular values fall off over two decades."""
    g = random(tokens, dim) * torch.logspace(0, -2, tokens, dtype=DOUBLE)[:, None]
    return Columns(g, 1.0, g.device)


def softmax_head() -> Factor:
    p = random(5, DIM).softmax(-1)
    return DiagonalLowRankFactor.of_rows(Columns(p, 1.0, p.device), 0.2, DOUBLE, "head")


FACTORS = {
    "dense": lambda: DenseFactor(columns(5).data.T @ columns(5).data),
    "few columns": lambda: WoodburyFactor(columns(4), 0.25, DOUBLE),
    "many columns": lambda: WoodburyFactor(columns(14), 1 / 14, DOUBLE),
    "scaled columns": lambda: WoodburyFactor(
        Columns.store(columns(4).data * 1e-3, torch.float16, None), 0.25, DOUBLE
    ),
    "diagonal": lambda: DiagonalFactor(random(DIM).square()),
    "blocks": lambda: BlockDiagonalFactor(random(3, 3, 2) @ random(3, 3, 2).mT),
    "diagonal and columns": lambda: WoodburyFactor(columns(4), 0.25, DOUBLE).plus_diagonal(
        random(DIM).square()
    ),
    "softmax head": softmax_head,
    "a new structure": lambda: ScaledIdentity(torch.tensor(0.7, dtype=DOUBLE), DIM),
}
LOW_RANK = ("diagonal and columns", "softmax head")


@pytest.fixture(params=FACTORS)
def name(request) -> str:
    return request.param


@pytest.fixture
def factor(name) -> Factor:
    return FACTORS[name]()


def used(matrix: torch.Tensor, kappa: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues in use and eigenvectors of the dense matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    damped = values.clamp(min=0) + LAM
    return damped if kappa is None else damped.clamp(min=float(damped.max()) / kappa), vectors


def assert_close(found, expected, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * 1e-2)


class Reader:
    def __init__(self, tensors) -> None:
        self.tensors = tensors

    def tensor(self, key, *shape):
        assert len(shape) == self.tensors[key].dim()
        return self.tensors[key]

    def columns(self, entry, dim):
        data = self.tensors["columns"]
        return Columns(data, entry["scale"], data.device), getattr(torch, entry["core_dtype"])


class TestEveryStructure:
    def test_products_are_those_of_the_matrix(self, factor):
        y, matrix = random(DIM, 3, seed=1), factor.to_dense()
        assert_close(factor.multiply(y), matrix @ y)
        assert_close(factor.product(y), matrix @ y)
        assert factor.trace() == pytest.approx(float(matrix.trace()))

    @pytest.mark.parametrize("k", [1, 4, DIM + 3])
    def test_the_largest_eigenvalues_come_in_order(self, factor, k):
        expected = torch.linalg.eigvalsh(factor.to_dense()).clamp(min=0).flip(0)[:k]
        assert_close(factor.top(k), expected, 1e-7)

    @pytest.mark.parametrize("kappa", [None, KAPPA])
    @pytest.mark.parametrize("p", [-1.0, -0.5, 0.5, 1.0])
    def test_powers_are_those_of_the_damped_and_clipped_matrix(self, name, factor, p, kappa):
        y, damped = random(DIM, 3, seed=2), factor.damped(LAM, kappa, NUMERICS)
        if name in LOW_RANK and p not in (-1.0, 1.0):
            with pytest.raises(SettingError, match="allowed: -1, 1"):
                damped.power(y, p)
            return
        values, vectors = used(factor.to_dense(), None if name in LOW_RANK else kappa)
        assert_close(damped.power(y, p), vectors @ (values.pow(p)[:, None] * (vectors.T @ y)))

    @pytest.mark.parametrize("kappa", [None, KAPPA])
    @pytest.mark.parametrize("eigen", [False, True])
    def test_what_was_done_is_reported(self, name, factor, kappa, eigen):
        damped = factor.damped(LAM, kappa, NUMERICS)
        damped.prepare(eigen=eigen and name not in LOW_RANK)
        assert not damped.pending()
        values, _ = used(factor.to_dense(), None if name in LOW_RANK else kappa)
        assert damped.logdet() == pytest.approx(float(values.log().sum()), rel=1e-9)
        report = damped.report()
        assert (report.dim, report.damping) == (DIM, LAM)
        if name in LOW_RANK:
            assert report.floor_applied == (kappa is None)
            assert report.kappa_after >= float(values.max() / values.min()) * (1 - 1e-9), "a bound"
            return
        before, _ = used(factor.to_dense(), None)
        assert report.kappa_before == pytest.approx(float(before.max() / before.min()), rel=1e-6)
        assert report.kappa_after == pytest.approx(float(values.max() / values.min()), rel=1e-6)
        assert report.clipped == int((before < values * (1 - 1e-12)).sum())
        assert math.isnan(damped.report(kappa=False).kappa_after) == (report.route == "cholesky")

    def test_the_eigenbasis_gives_the_matrix_back(self, name, factor):
        if name in LOW_RANK:
            with pytest.raises(SettingError):
                factor.basis(NUMERICS)
            return
        values, vectors = factor.basis(NUMERICS)
        matrix = torch.diag(values)
        if vectors is not None:
            matrix = vectors.data.T @ matrix @ vectors.data
        assert_close(matrix, factor.to_dense())

    def test_a_diagonal_can_be_added(self, name, factor):
        if name in LOW_RANK:
            factor = DenseFactor(factor.to_dense())
        diagonal = random(DIM, seed=3).square()
        assert_close(
            factor.plus_diagonal(diagonal).to_dense(), factor.to_dense() + torch.diag(diagonal)
        )

    def test_a_file_gives_it_back(self, factor):
        tensors, entry = factor.state()
        restored = Factor.structures[factor.structure].restored(entry, DIM, Reader(tensors))
        assert type(restored) is type(factor)
        torch.testing.assert_close(restored.to_dense(), factor.to_dense(), rtol=1e-15, atol=0.0)

    def test_moving_to_host_memory_lets_go_of_what_was_derived(self, factor):
        matrix, size = factor.to_dense().clone(), factor.nbytes()
        damped = factor.damped(LAM, None, NUMERICS)
        damped.prepare()
        damped.to_host()
        assert not {"cholesky", "clipped", "lower"} & set(vars(damped))
        assert factor._eigen is None
        assert torch.equal(factor.to_dense(), matrix)
        assert factor.nbytes() == size == sum(t.nbytes for t in factor.tensors().values())


@pytest.mark.parametrize("k", [1, 3])
def test_the_largest_eigenvalues_of_large_factors_need_no_decomposition(k, monkeypatch):
    monkeypatch.setattr(base, "LARGE", 10)
    g = columns(40, 60)
    dense = DenseFactor(g.data.T @ g.data / 40)
    expected = torch.linalg.eigvalsh(dense.matrix).flip(0)[:k]
    for factor in (dense, WoodburyFactor(g, 1 / 40, DOUBLE)):
        torch.testing.assert_close(factor.top(k), expected, rtol=1e-12, atol=0.0)
        assert not factor.decomposed
    dense.eigen()
    torch.testing.assert_close(dense.top(k), expected, rtol=1e-12, atol=0.0)


def test_push_through_is_the_power_of_the_factors_own_columns():
    for tokens in (4, 14):
        factor, b = WoodburyFactor(columns(tokens), 1 / tokens, DOUBLE), random(tokens, 2, seed=4)
        damped = factor.damped(LAM, KAPPA, NUMERICS)
        for p in (-1.0, 0.5):
            assert_close(
                damped.push_through(b, p), damped.power(factor.columns.transposed_times(b), p)
            )
    with pytest.raises(SettingError, match="no token columns"):
        DenseFactor(torch.eye(3)).damped(LAM, None, NUMERICS).push_through(torch.eye(3), -1.0)
