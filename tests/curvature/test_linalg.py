"""Pure functions on positive semi-definite matrices, against dense float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fisher_lab.curvature import linalg


def random_matrix(n: int, rank: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(rank, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.T @ x / rank


@pytest.mark.parametrize("n", [1, 3, 400, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_second_moment_by_halves_is_the_whole_product(n, dtype):
    x = torch.randn(37, n, generator=torch.Generator().manual_seed(1), dtype=dtype)
    total = torch.zeros(n, n, dtype=torch.float64)
    linalg.add_second_moment(total, x[:20])
    linalg.add_second_moment(total, x[20:])
    torch.testing.assert_close(
        linalg.mirror(total), x.double().T @ x.double(), rtol=1e-13, atol=1e-11
    )


def test_conversion_in_blocks_changes_nothing(monkeypatch):
    x = torch.randn(50, 30, generator=torch.Generator().manual_seed(2))
    whole = linalg.gram(x, torch.float64)
    monkeypatch.setattr(linalg, "BLOCK_BYTES", 50 * 8 * 4)
    assert len(list(linalg.blocks(30, 50 * 8))) > 5
    torch.testing.assert_close(linalg.gram(x, torch.float64), whole, rtol=1e-14, atol=1e-13)


def test_clipping_counts_the_null_space_and_floors_the_rest():
    clipped = linalg.clip(torch.tensor([10.0, 1.0, 0.0], dtype=torch.float64), 4, 1e-3, 100.0)
    floor = (10.0 + 1e-3) / 100.0
    assert clipped.clipped == 1 + 4
    assert clipped.base == pytest.approx(floor)
    assert clipped.kappa_before == pytest.approx((10 + 1e-3) / 1e-3)
    assert clipped.kappa_after == pytest.approx(100.0)
    torch.testing.assert_close(
        clipped.used, torch.tensor([10.001, 1.001, floor], dtype=torch.float64)
    )


def test_no_floor_and_no_damping_has_infinite_condition():
    clipped = linalg.clip(torch.tensor([2.0], dtype=torch.float64), 3, 0.0, None)
    assert clipped.kappa_before == float("inf")
    assert clipped.clipped == 0


def test_cholesky_needs_no_jitter_where_it_is_not_needed():
    matrix = random_matrix(20, 5)
    found = linalg.robust_cholesky(matrix, 1e-4, 1e-6)
    assert found.lower is not None
    assert found.jitter == 0.0
    damped = matrix + 1e-4 * torch.eye(20, dtype=torch.float64)
    torch.testing.assert_close(found.lower @ found.lower.T, damped, rtol=1e-12, atol=1e-14)


def test_jitter_is_relative_and_recorded():
    # Slightly indefinite: an eigenvalue of -1.5e-6 beside a mean diagonal near 1, damping 1e-3.
    matrix = torch.diag(torch.tensor([2.0, 1.0, -1.0015e-3], dtype=torch.float64))
    found = linalg.robust_cholesky(matrix, 1e-3, 5e-6)
    assert found.lower is not None
    assert found.eps == 5e-6
    assert found.jitter == pytest.approx(5e-6 * (float(matrix.diagonal().mean()) + 1e-3))


def test_a_jitter_that_would_damp_again_gives_up_and_leaves_the_matrix_alone():
    matrix = torch.diag(torch.tensor([1e8, 1e8, -1.0], dtype=torch.float64))
    before = matrix.clone()
    assert linalg.robust_cholesky(matrix, 1e-4, 1e-6).lower is None
    assert torch.equal(matrix, before)


def test_wide_factorisations_go_through_a_frame_and_leave_the_matrix_alone():
    # 1024 is a width at which the frame is taken; no jitter, and nothing of the frame comes back.
    matrix = random_matrix(1024, 700, 3)
    before = matrix.clone()
    found = linalg.robust_cholesky(matrix, 1e-3, 1e-6)
    assert found.lower is not None
    assert found.lower.shape == (1024, 1024)
    damped = before.numpy() + 1e-3 * np.eye(1024)
    np.testing.assert_allclose(found.lower.numpy(), np.linalg.cholesky(damped), atol=1e-12)
    assert torch.equal(matrix, before)


@pytest.mark.parametrize("n", [3, 385, 1000])
def test_second_moments_add_up_at_every_width(n):
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(7, n, generator=generator)
    for dtype in (torch.float32, torch.float64):
        total = torch.zeros((n, n), dtype=dtype)
        linalg.add_second_moment(total, x)
        linalg.add_second_moment(total, x)
        expected = 2 * x.double().T @ x.double()
        tolerance = 1e-5 if dtype == torch.float32 else 1e-12
        torch.testing.assert_close(
            linalg.mirror(total).double(), expected, rtol=tolerance, atol=10 * tolerance
        )


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 30), rank=st.integers(1, 30), seed=st.integers(0, 1000))
def test_largest_eigenvalue_lies_within_its_residual(n, rank, seed):
    matrix = random_matrix(n, rank, seed)
    value, residual = linalg.largest_eigenvalue(lambda v: matrix @ v, matrix, n)
    truth = float(torch.linalg.eigvalsh(matrix)[-1])
    assert abs(value - truth) <= residual + 1e-9 * truth
    assert linalg.upper_bound(matrix) >= truth * (1 - 1e-12)


def test_largest_eigenvalues_come_as_often_as_they_are_there():
    diagonal = torch.tensor([5.0] * 3 + [4.0] * 2 + [0.0] * 15, dtype=torch.float64)
    for matrix in (torch.diag(diagonal), torch.diag(diagonal) + 1e-3 * random_matrix(20, 20)):
        found = linalg.largest_eigenvalues(lambda v, m=matrix: m @ v, matrix, 20, 5)
        expected = torch.linalg.eigvalsh(matrix).flip(0)[:5]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    nothing = linalg.largest_eigenvalues(lambda v: 0 * v, diagonal, 3, 7)
    assert nothing.tolist() == [0.0] * 3


def test_a_full_device_is_no_solver_that_fails(monkeypatch):
    solver, calls = torch.linalg.eigh, []

    def full(matrix):
        calls.append(matrix)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("no room (stub)")
        return solver(matrix)

    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "eigh", full)
        with pytest.raises(torch.OutOfMemoryError, match="no room"):
            linalg.symmetric_eigen(torch.eye(3))


def test_power_of_two_scale_keeps_tiny_values():
    x = torch.tensor([1e-8, 3e-9, -2e-10])
    scale = linalg.power_of_two_scale(x, torch.float16)
    assert torch.tensor(scale).log2() == torch.tensor(scale).log2().round()
    back = (x * scale).to(torch.float16).float() / scale
    assert float((back - x).norm() / x.norm()) < 1e-3
    assert float((x.to(torch.float16).float() - x).norm() / x.norm()) > 0.5
    assert linalg.power_of_two_scale(x, torch.float32) == 1.0


def test_finite_check_sees_infinities_that_cancel():
    assert linalg.all_finite(torch.full((4,), 3e38))
    for bad in ([float("inf"), -float("inf"), 1.0], [1.0, float("nan")], [3e38, float("inf")]):
        assert not linalg.all_finite(torch.tensor(bad))


def test_solvers_that_fail_are_followed_by_others(monkeypatch):
    generator = torch.Generator().manual_seed(5)
    root = torch.randn(7, 4, generator=generator, dtype=torch.float64) * 1e-9
    matrix = root @ root.T
    expected, _ = torch.linalg.eigh(matrix)
    eigh, tries = torch.linalg.eigh, []

    def fails(times):
        def solve(x):
            tries.append(float(x.abs().max()))
            if len(tries) <= times:
                raise torch.linalg.LinAlgError("failed to converge")
            return eigh(x)

        return solve

    for times in (1, 2):
        tries.clear()
        monkeypatch.setattr(torch.linalg, "eigh", fails(times))
        values, vectors = linalg.symmetric_eigen(matrix)
        assert 0.5 <= tries[1] <= 1.0  # scaled by a power of two
        torch.testing.assert_close(values, expected.clamp(min=0.0), rtol=1e-12, atol=1e-30)
        rebuilt = vectors @ torch.diag(values) @ vectors.T
        torch.testing.assert_close(rebuilt, matrix, rtol=0.0, atol=1e-13 * float(matrix.max()))
