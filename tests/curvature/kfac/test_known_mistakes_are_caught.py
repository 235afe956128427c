"""The numbered bugs of the project's first notes, each held down by a test that fails with it.

Every test states the buggy behaviour as plain code (`buggy`), checks that the engine agrees with
the dense truth, and checks that the buggy behaviour would *not* pass the same comparison.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fisher_lab.curvature.errors import CurvatureError
from tests import models, reference
from tests.capturing import (
    Calls,
    Captured,
    captured,
    cross_entropy,
    engine,
    random_like,
    shared_capture,
)
from tests.reference import Damping

DOUBLE = torch.float64
DAMPING = Damping(1e-3, 1e-3, 1e4)
BOUND = 1e-9


def rows(n=6, width=6, seed=0):
    return models.rows_batch(n, width, seed=seed)


def fails(given, truth, bound=BOUND) -> bool:
    """Whether the comparison of this file rejects a result."""
    return max(reference.errors(given, truth).values()) > 1e3 * bound


@pytest.mark.parametrize("push_through", [True, False])
@pytest.mark.parametrize("correction", [True, False])
def test_1_stale_inverse_cache(policy, correction, push_through):
    """A refresh drops every cached inverse, whichever path ran and whatever was cached."""
    model = models.seeded(lambda: models.MLP(sizes=(6, 40, 4)), DOUBLE)
    kfac = engine(policy, DAMPING, use_eigenvalue_correction=correction, push_through=push_through)
    damping = DAMPING if correction else Damping(DAMPING.A, DAMPING.G, None)
    vectors = random_like(dict(model.named_parameters()))
    stale = {}
    for seed in (1, 2, 3):
        truth, labels = shared_capture(kfac, model, rows(5 + seed, seed=seed))
        own = truth.own_gradient(labels)
        for key, gradients in (("own", own), ("random", vectors)):
            result = kfac.compute_natural_gradient(gradients, model)  # fills every cache
            expected = truth.natural_gradient(gradients, damping)
            reference.assert_close(result, expected, BOUND, f"refresh {seed} {key}")
            powered = kfac.compute_powered_natural_gradient(gradients, model, -0.5)
            reference.assert_close(powered, truth.powered(gradients, -0.5, damping), BOUND)
        product = kfac.compute_fisher_vector_product(vectors, model)
        reference.assert_close(product, truth.fisher_vector_product(vectors), BOUND)
        fresh = truth.natural_gradient(vectors, damping)
        assert not stale or fails(stale, fresh)  # the first refresh's inverses would not pass
        stale = fresh


def test_2_layer_without_a_gradient(policy):
    """Skipped: no crash, no value of the layer before it, no factors of the batch before."""
    model = models.seeded(models.Gated, DOUBLE)
    kfac = engine(policy, DAMPING)
    vectors = random_like(dict(model.named_parameters()))
    opened, _ = shared_capture(kfac, model, rows(seed=1))
    assert set(kfac.kfac_factors) == {"main", "side"}
    model.open = False
    truth, _ = shared_capture(kfac, model, rows(seed=2))
    assert set(kfac.kfac_factors) == {"main"}
    result = kfac.compute_natural_gradient(vectors, model)
    expected = truth.natural_gradient(vectors, DAMPING)
    assert set(expected) == {"main.weight", "main.bias"}
    reference.assert_close(result, expected, BOUND)
    assert set(kfac.uncovered) == {"side.weight", "side.bias"}
    unchanged = {n: vectors[n] for n in kfac.uncovered}
    for name, value in unchanged.items():
        assert torch.equal(result[name], value)
    # Buggy: `act` of the previous loop turn (main's), or the factors of the batch before.
    buggy = opened.natural_gradient(vectors, DAMPING)
    assert fails({n: buggy[n] for n in unchanged}, unchanged)
    model.open = True
    shared_capture(kfac, model, rows(seed=3))
    assert set(kfac.kfac_factors) == {"main", "side"}


def test_3_no_eigenvalue_correction_is_still_kfac(policy):
    """Off means raw damped eigenvalues, and not `gradient / damping`."""
    model = models.seeded(models.MLP, DOUBLE)
    one = Captured(model, models.rows_batch(), policy, DAMPING, use_eigenvalue_correction=False)
    expected = one.truth.natural_gradient(one.own, Damping(DAMPING.A, DAMPING.G, None))
    reference.assert_close(one.natural(one.own), expected, BOUND)
    for divisor in (DAMPING.A, DAMPING.A * DAMPING.G):
        buggy = {n: g / divisor for n, g in one.own.items()}
        assert fails(buggy, expected)


def test_4_no_second_forward_pass():
    """With a loss given the model is not called again, here with dropout to show it in values."""

    class Noisy(models.MLP):
        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.dropout(torch.tanh(self.first(x)), 0.5, True))

    torch.manual_seed(3)
    model = models.seeded(Noisy, DOUBLE)
    calls = Calls(model)
    one = Captured(model, models.rows_batch(), "all", DAMPING)
    assert calls.count == 1
    one.check_natural(BOUND)
    again = Captured(model, models.rows_batch(), "all", DAMPING)  # another dropout mask
    natural, other = (
        truth.natural_gradient(one.own, DAMPING) for truth in (one.truth, again.truth)
    )
    assert fails(other, natural)


@pytest.mark.parametrize("kappa", [None, 1e4, 10.0])
def test_5_damping_is_added_and_not_a_clamp(policy, kappa):
    """`m + lam`, then the floor; at a damping of the size of the eigenvalues the two part."""
    damping = Damping(0.3, 0.05, kappa)
    one = Captured(models.seeded(models.MLP, DOUBLE), models.rows_batch(), policy, damping)
    one.check_natural(BOUND)
    own, expected = one.own, one.truth.natural_gradient(one.own, damping)

    def clamp_only(M: Tensor, lam: float) -> Tensor:
        m, V = torch.linalg.eigh(M)
        floor = max(lam, 0.0 if kappa is None else float(m.max()) / kappa)
        return (V / m.clamp_min(floor)) @ V.T

    for name, (factors, _) in one.truth.weight_factors().items():
        bias = name.replace("weight", "bias")
        joined = torch.cat([own[name], own[bias][:, None]], 1)
        buggy = clamp_only(factors.G, damping.G) @ joined @ clamp_only(factors.A, damping.A)
        assert fails({name: buggy[:, :-1]}, {name: expected[name]})


class Watch(TorchDispatchMode):
    """Every operation that makes a tensor: the widest square, the most numbers, the diagonals."""

    def __init__(self) -> None:
        super().__init__()
        self.square = 0
        self.numel = 0
        self.diagonals: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                self.numel = max(self.numel, tensor.numel())
                if tensor.dim() >= 2:
                    self.square = max(self.square, min(tensor.shape[-2:]))
        if func.overloadpacket.__name__ in ("diag", "diag_embed"):
            self.diagonals.append(str(func))
        return result


VOCAB = 3000


def wide_head():
    model = models.seeded(lambda: nn.Linear(6, VOCAB, bias=False), DOUBLE)
    return model, models.rows_batch(10, 6, VOCAB)


@pytest.mark.parametrize("policy", ["all", "auto"])
@pytest.mark.parametrize("kappa", [None, 1e4])
def test_6_products_and_powers_form_nothing_square(kappa, policy):
    """Through the Gram matrix: no `out x out`, no materialised diagonal, values as by hand."""
    model, batch = wide_head()
    damping = Damping(1e-2, 1e-2, kappa)
    one = Captured(model, batch, policy, damping)
    vectors = random_like({"weight": model.weight})
    with Watch() as watch:
        product = one.kfac.compute_fisher_vector_product(vectors, model)
        root = one.kfac.compute_powered_natural_gradient(vectors, model, -0.5)
        natural = one.natural(vectors)
    assert watch.square <= 20
    assert watch.numel <= 2 * VOCAB * 10
    assert watch.diagonals == []
    # Values without an out x out matrix here either: G = U U^T through its thin SVD.
    tokens = one.truth.tokens[""]
    A = tokens.a.T @ tokens.a / 10
    left, sigma, _ = torch.linalg.svd(tokens.g[0].T / 10**0.5, full_matrices=False)
    W = vectors["weight"]
    by_hand = left @ (sigma[:, None] ** 2 * (left.T @ W)) @ A
    assert reference.relative(product["weight"], by_hand) < BOUND
    for p, found in ((-0.5, root), (-1.0, natural)):
        used, _ = reference.used_eigenvalues(
            torch.cat([sigma**2, torch.zeros(1, dtype=DOUBLE)]), damping.G, damping.kappa
        )
        rest = used[-1] ** p
        G_W = rest * W + left @ ((used[:-1] ** p - rest)[:, None] * (left.T @ W))
        by_hand = G_W @ reference.power(A, p, damping.A, damping.kappa)
        assert reference.relative(found["weight"], by_hand) < BOUND


def test_6_the_watch_sees_the_old_way():
    model, _ = wide_head()
    with Watch() as watch:
        values = torch.ones(200, dtype=DOUBLE)
        vectors = torch.eye(200, dtype=DOUBLE)
        _ = (vectors @ torch.diag(values) @ vectors.T) @ model.weight.detach()[:200]
    assert watch.square == 200
    assert watch.diagonals


@pytest.mark.parametrize("policy", ["small_only", "hybrid"])
def test_6_no_diagonal_on_the_eigen_path(policy):
    """Products by broadcasting in eigenspace: no diag, and no `V f(m) V^T` either."""
    model = models.seeded(lambda: models.MLP(sizes=(6, 120, 4)), DOUBLE)
    one = Captured(model, rows(9), policy, DAMPING)
    vectors = one.random()
    one.natural(vectors)  # decompositions, if they wait for a use
    with Watch() as watch:
        one.kfac.compute_fisher_vector_product(vectors, model)
        root = one.kfac.compute_powered_natural_gradient(vectors, model, -0.5)
    assert watch.diagonals == []
    one.check_product(BOUND, vectors)
    reference.assert_close(root, one.truth.powered(vectors, -0.5, DAMPING), BOUND)


@pytest.mark.parametrize("policy", ["all", "auto"])
def test_7_a_wide_head_is_collected_without_its_square(policy):
    """From the forward pass to the result nothing of `vocab x vocab` exists."""
    model, batch = wide_head()
    with Watch() as watch:
        one = Captured(model, batch, policy, DAMPING)
        one.natural(one.own)
    assert watch.square <= 20
    assert one.kfac.kfac_factors[""]["G_type"] == "woodbury"


def test_7_a_dense_head_that_does_not_fit_is_an_error_before_any_work():
    """The message has the layer and the dimension that is too large, not the hidden size."""
    model, batch = wide_head()
    calls = Calls(model)
    kfac = engine("small_only", max_dense_dim=1000)
    with pytest.raises(CurvatureError, match=rf"{VOCAB}.*1000"):
        kfac.collect_kfac_factors(model, batch, loss=cross_entropy)
    assert calls.count == 0


def test_8_a_missing_bias_gradient_counts_as_zero_and_is_not_invented(policy):
    one = Captured(models.seeded(models.MLP, DOUBLE), models.rows_batch(), policy, DAMPING)
    own, truth = one.own, one.truth
    without = {n: g for n, g in own.items() if n != "first.bias"}
    result = one.natural(without)
    assert set(result) == set(without)
    zero = dict(own, **{"first.bias": torch.zeros_like(own["first.bias"])})
    expected = truth.natural_gradient(zero, DAMPING)
    del expected["first.bias"]
    reference.assert_close(result, expected, BOUND)
    # Buggy: A's eigenvectors cut down to the rows of the weight.
    factors, _ = truth.weight_factors()["first.weight"]
    m, V = torch.linalg.eigh(factors.A)
    used, _ = reference.used_eigenvalues(m, DAMPING.A, DAMPING.kappa)
    cut = V[:-1, :-1]
    G = reference.power(factors.G, -1, DAMPING.G, DAMPING.kappa)
    buggy = G @ own["first.weight"] @ (cut / used[:-1]) @ cut.T
    assert fails({"first.weight": buggy}, {"first.weight": expected["first.weight"]})


def test_8_on_a_conv1d_layer_and_in_a_product():
    one = captured("gpt2_tied", "few", "all", DAMPING)
    one.own = {n: g for n, g in one.own.items() if not n.endswith("c_fc.bias")}
    product = one.kfac.compute_fisher_vector_product(one.own, one.model)
    assert set(product) == set(one.natural(one.own)) == set(one.own)
    one.check_natural(BOUND)
    one.check_product(BOUND)
