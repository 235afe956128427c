"""`damping_mode`: dampings by the formulas of `docs/math.md`, section 2, for every structure."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from fisher_lab import KFACNaturalGradient
from fisher_lab.config.errors import SettingError
from fisher_lab.config.kfac import KFACSettings
from fisher_lab.curvature.losses import CrossEntropy
from tests import models, reference
from tests.capturing import POLICIES, cross_entropy, random_like, shared_capture
from tests.models import CASES
from tests.reference import power

MODES: dict[str, dict[str, Any]] = {
    "relative": {"damping_A": 0.3, "damping_G": 2.0},
    "pi": {"damping": 1e-3},
}


def split(mode, A, G, damping=0.0, damping_A=0.0, damping_G=0.0):
    """`lam_A`, `lam_G` of dense factors; an A of None stands for a layer that is one block."""
    mean_g = float(G.trace()) / len(G) or 1.0
    mean_a = 1.0 if A is None else float(A.trace()) / len(A) or 1.0
    if mode == "relative":
        return damping_A * mean_a, damping_G * mean_g
    if A is None:
        return 0.0, damping
    pi = math.sqrt(mean_a / mean_g)
    return pi * math.sqrt(damping), math.sqrt(damping) / pi


@pytest.fixture(params=MODES)
def mode(request) -> str:
    return request.param


@pytest.mark.parametrize("kappa", [None, 30.0])
@pytest.mark.parametrize("name", ["gpt2_tied", "llama", "t5_masks"])
def test_natural_gradients_are_the_dense_ones(name, mode, kappa, policy):
    case, options = CASES[name], MODES[mode]
    model, batch = case.model(torch.float64), case.batch("few")
    kfac = KFACNaturalGradient(
        damping_mode=mode, max_condition_number=kappa, **options, **POLICIES[policy]
    )
    truth, labels = shared_capture(kfac, model, batch, keep_gradient=True)
    own = truth.own_gradient(labels)

    def kronecker(factors, tokens, matrix):
        lam_a, lam_g = split(mode, factors.A, factors.G, **options)
        return power(factors.G, -1, lam_g, kappa) @ matrix @ power(factors.A, -1, lam_a, kappa)

    def block(F, tokens, vector):
        return power(F, -1, split(mode, None, F, **options)[1], kappa) @ vector

    for vectors in (own, random_like(own)):
        expected = truth._apply(vectors, kronecker, block)
        result = kfac.compute_natural_gradient(vectors, model)
        assert set(expected) == truth.covered()
        reference.assert_close(result, expected, 1e-8)
    pushed = kfac.compute_natural_gradient(None, model)
    reference.assert_close(pushed, truth._apply(own, kronecker, block), 1e-8)


def depthwise():
    model = nn.Sequential(nn.Conv1d(4, 4, 3, groups=4), nn.Flatten(), nn.Linear(24, 5))
    x = torch.randn(7, 4, 8, generator=torch.Generator().manual_seed(0)).double()
    return models.seeded(lambda: model, torch.float64), {"x": x, "labels": torch.arange(7) % 5}


def gpt2():
    return CASES["gpt2_tied"].model(torch.float64), CASES["gpt2_tied"].batch("few")


SPECIAL: dict[str, Any] = {
    "block-diagonal": (depthwise, {"loss": CrossEntropy()}, {}),
    "true head": (gpt2, {}, {"kfac_true_fisher_head": True}),
    "pooled": (gpt2, {}, {"tied": "sum"}),
    "wide norm": (gpt2, {}, {}),
}


@pytest.mark.parametrize("name", SPECIAL)
def test_structures_that_are_rarer_are_damped_as_their_dense_matrices(name, mode, monkeypatch):
    if name == "wide norm":
        monkeypatch.setattr("fisher_lab.curvature.kfac.statistics.NORM_MAX_DIM", 4)
    make, more, settings = SPECIAL[name]
    model, batch = make()
    options = MODES[mode]
    kfac = KFACNaturalGradient(damping_mode=mode, max_condition_number=None, **options, **settings)
    kfac.collect_kfac_factors(model, batch, keep_gradient=True, **more)
    own = kfac.own_gradients(model)
    result = kfac.compute_natural_gradient(own, model)
    product = kfac.compute_fisher_vector_product(own, model, damped=True)
    seen = set()
    for factors in kfac.kfac_factors.values():
        layer = factors.layer
        G, A = factors.G.to_dense(), None if factors.A is None else factors.A.to_dense()
        lam_a, lam_g = split(mode, A, G, **options)
        y = layer.to_matrix(own, torch.float64)
        used = G + lam_g * torch.eye(len(G)).double()
        expected = torch.linalg.solve(used, y)
        back = used @ y * factors.ratio
        if A is not None:
            right = A + lam_a * torch.eye(len(A)).double()
            expected, back = torch.linalg.solve(right, expected.T).T, back @ right
        for found, wanted in ((result, expected), (product, back)):
            named = {n: v for n, v in layer.from_matrix(wanted).items() if n in found}
            assert named
            reference.assert_close(found, named, 1e-8)
        seen.add(factors.G.structure)
    special = {"block-diagonal": "block_diagonal", "wide norm": "diagonal"}
    assert special.get(name, "diagonal_low_rank") in seen


@pytest.mark.parametrize("policy", ["all", "small_only"])
def test_ekfac_damps_with_the_same_numbers(mode, policy):
    case, options = CASES["llama"], MODES[mode]
    model, batch = case.model(torch.float64), case.batch("few")
    kfac = KFACNaturalGradient(
        damping_mode=mode, max_condition_number=None, ekfac=True, norm_layers=False, **options,
        **POLICIES[policy],
    )  # fmt: skip
    truth, labels = shared_capture(kfac, model, batch, norms=False)
    own = truth.own_gradient(labels)

    def kronecker(factors, tokens, matrix):
        lam_a, lam_g = split(mode, factors.A, factors.G, **options)
        m_a, v_a = torch.linalg.eigh(factors.A)
        m_g, v_g = torch.linalg.eigh(factors.G)
        if tokens.kind == "embedding":
            a = nn.functional.one_hot(tokens.a, len(m_a)).double()
        else:
            a = tokens.augmented
        S = sum(((g @ v_g) ** 2).T @ ((a @ v_a) ** 2) for g in tokens.g)
        S = S / (tokens.count * len(tokens.g))
        S = S + lam_a * m_g[:, None] + lam_g * m_a[None] + lam_a * lam_g
        return v_g @ ((v_g.T @ matrix @ v_a) / S) @ v_a.T

    reference.assert_close(
        kfac.compute_natural_gradient(own, model), truth._apply(own, kronecker, None), 1e-7
    )


def test_parameters_that_no_layer_covers_are_damped_by_their_own_mean(mode):
    model, batch = gpt2()
    options = MODES[mode]
    kfac = KFACNaturalGradient(damping_mode=mode, uncovered="diagonal", **options)
    kfac.collect_kfac_factors(model, batch, keep_gradient=True)
    own = kfac.own_gradients(model)
    result = kfac.compute_natural_gradient(own, model)
    (name,) = kfac.uncovered
    diagonal = kfac.last.diagonal[name]
    lam = options.get("damping") or options["damping_G"] * float(diagonal.mean())
    expected = own[name].double() / (diagonal + lam)
    torch.testing.assert_close(result[name].double(), expected.double(), rtol=1e-6, atol=0)


def test_a_layer_of_zeros_has_a_damping_all_the_same(mode):
    """The gradient of the second layer is zero: its G has no size to be relative to."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5)).double()
    batch = {"x": torch.ones(6, 3).double(), "labels": torch.zeros(6, dtype=torch.int64)}

    def loss(outputs, batch):
        return cross_entropy(outputs * 0, batch)

    kfac = KFACNaturalGradient(damping_mode=mode, **MODES[mode])
    kfac.collect_kfac_factors(model, batch, loss=loss, n_labels=6)
    vectors = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    result = kfac.compute_natural_gradient(vectors, model)
    assert all(bool(torch.isfinite(value).all()) for value in result.values())


def test_scaling_multiplies_both_sides_in_every_mode(mode):
    model, batch = gpt2()
    kfac = KFACNaturalGradient(damping_mode=mode, **MODES[mode])
    kfac.collect_kfac_factors(model, batch, keep_gradient=True)
    before = {r.factors.layer.name: r for r in kfac.reports()}
    kfac.scale_damping(10.0, 100.0)
    for report in kfac.reports():
        old = before[report.factors.layer.name]
        if report.A is None and mode == "pi":
            assert report.G.damping == pytest.approx(1000 * old.G.damping)
            continue
        assert report.G.damping == pytest.approx(100 * old.G.damping)
        if report.A is not None and old.A is not None:
            assert report.A.damping == pytest.approx(10 * old.A.damping)


def test_absolute_is_the_default_and_is_the_number_itself():
    model, batch = gpt2()
    kfac = KFACNaturalGradient(damping_A=0.25, damping_G=0.5)
    kfac.collect_kfac_factors(model, batch)
    assert KFACSettings().damping_mode == "absolute"
    for report in kfac.reports():
        assert report.G.damping == 0.5
        assert report.A is None or report.A.damping == 0.25


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"damping_mode": "trace"}, "damping_mode: 'trace'; allowed: one of absolute"),
        ({"damping": None}, "damping: None; allowed: a number, or None with both"),
        ({"damping": None, "damping_A": 1.0}, "damping: None; allowed: a number, or None"),
        ({"damping_mode": "pi", "damping_A": 1.0}, "damping_mode: 'pi'; allowed: absolute or"),
    ],
)
def test_dampings_that_do_not_go_together_are_refused(options, words):
    with pytest.raises(SettingError, match=words):
        KFACNaturalGradient(**options)


def test_with_pi_two_sides_stand_for_the_damping_of_their_product():
    one = KFACSettings(damping_mode="pi", damping=None, damping_A=0.3, damping_G=1e-3)
    assert one.lam_A == one.lam_G == pytest.approx(math.sqrt(3e-4))
