"""What the public face promises: names, errors, refreshes, and nothing left over or invented."""

import copy

import pytest
import torch
from torch import nn

from fisher_lab import KFACNaturalGradient
from fisher_lab.config.errors import SettingError
from fisher_lab.curvature.errors import CurvatureError, NonFiniteError
from tests import models, reference
from tests.capturing import (
    POLICIES,
    Calls,
    Captured,
    assert_natural,
    captured,
    cross_entropy,
    engine,
    random_like,
    shared_capture,
)
from tests.models import rows_batch
from tests.reference import Damping, Truth

DOUBLE = torch.float64


def mlp(bias=True):
    return models.seeded(lambda: models.MLP(bias=bias), DOUBLE)


def gpt2_and_batch():
    return models.seeded(models.gpt2, DOUBLE), models.language_batch(models.FEW)


def collected(model=None, **settings):
    model = mlp() if model is None else model
    kfac = engine(**settings)
    kfac.collect_kfac_factors(model, rows_batch(), loss=cross_entropy)
    return kfac, model


def parameters_like(model):
    return random_like(dict(model.named_parameters()))


@pytest.mark.parametrize("case", models.CASES.values(), ids=models.CASES)
def test_names_shapes_and_dtypes_are_the_models(case):
    """What is given comes back, once, under its `named_parameters()` name; the rest as it was."""
    model = case.model(torch.float32)
    kfac = engine()
    truth, _ = shared_capture(kfac, model, case.batch("few"))
    gradients = parameters_like(model)
    before = {n: g.clone() for n, g in gradients.items()}
    result = kfac.compute_natural_gradient(gradients, model)
    assert set(result) == set(dict(model.named_parameters()))
    assert set(kfac.uncovered) == set(gradients) - truth.covered()
    for name, value in result.items():
        assert value.shape == gradients[name].shape
        assert value.dtype == gradients[name].dtype
        assert torch.isfinite(value).all()
        assert torch.equal(gradients[name], before[name])
        assert torch.equal(value, gradients[name]) == (name in kfac.uncovered), name


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"kfac_policy": "all"}, "woodbury"),
        ({"kfac_policy": "small_only"}, "eig"),
        ({"kfac_use_woodbury": False}, "eig"),
    ],
)
def test_factor_entries_say_what_they_are(settings, expected):
    kfac = KFACNaturalGradient(**settings)
    kfac.collect_kfac_factors(*gpt2_and_batch())
    entry, head = (kfac.kfac_factors[n] for n in ("transformer.h.0.attn.c_attn", "lm_head"))
    assert entry["G_type"] == head["G_type"] == expected
    assert entry["A_bias_augmented"] is True
    assert head["A_bias_augmented"] is False
    assert entry["tokens"] == 13


def test_without_a_loss_the_model_is_called_once_per_batch():
    model, batch = gpt2_and_batch()
    calls = Calls(model)
    engine().collect_kfac_factors(model, batch)
    assert calls.count == 1
    engine().collect_kfac_factors(model, [batch, models.language_batch(models.FEW, seed=2)])
    assert calls.count == 3


def test_a_loss_without_a_capture_is_an_error_that_says_so():
    model, batch = mlp(), rows_batch()
    calls = Calls(model)
    loss = cross_entropy(model(batch["x"]), batch)
    with pytest.raises(CurvatureError, match="capture"):
        engine().collect_kfac_factors(model, batch, loss=loss)
    assert calls.count == 1


def test_a_capture_serves_one_collection_only():
    """A second loss after the same capture must not meet the old activations."""
    model, batch = mlp(), rows_batch()
    kfac = engine()
    shared_capture(kfac, model, batch)
    other = cross_entropy(model(batch["x"]), batch)
    with pytest.raises(CurvatureError, match="capture"):
        kfac.collect_kfac_factors(model, batch, loss=other)


def test_no_hook_stays_on_the_model():
    model, batch = gpt2_and_batch()

    def hooks():
        return sum(
            len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
            for m in model.modules()
        )

    before = hooks()
    engine().collect_kfac_factors(model, batch)
    shared_capture(engine(), model, batch)
    with pytest.raises(ZeroDivisionError), engine().capture(model):
        raise ZeroDivisionError
    assert hooks() == before


@pytest.mark.parametrize("training", [True, False])
def test_eval_and_train_mode_both_work_and_are_left_alone(training):
    model, batch = gpt2_and_batch()
    one = Captured(model.train(training), batch, "all", Damping(1e-3, 1e-3, None))
    assert model.training is training
    one.check_natural(1e-9)


def test_caller_state_is_untouched():
    """No `.grad`, no parameter, no entry of the batch changes; `requires_grad` stays."""
    model, batch = gpt2_and_batch()
    kept = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.transformer.h[0].mlp.c_fc.weight.grad = torch.ones(16, 64, dtype=DOUBLE)
    copied = copy.deepcopy(batch)
    labels = batch["labels"]
    engine().collect_kfac_factors(model, batch)
    assert set(batch) == set(copied)
    assert batch["labels"] is labels
    for key in batch:
        assert torch.equal(batch[key], copied[key]), key
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, kept[name])
        assert parameter.requires_grad
        touched = name == "transformer.h.0.mlp.c_fc.weight"
        assert (parameter.grad is not None) == touched, name
    assert torch.equal(model.transformer.h[0].mlp.c_fc.weight.grad, torch.ones(16, 64).double())


def test_collecting_under_no_grad_still_works():
    model = mlp()
    with torch.no_grad():
        kfac, _ = collected(model)
    outside, _ = collected(model)
    vectors = parameters_like(model)
    inside = kfac.compute_natural_gradient(vectors, model)
    expected = outside.compute_natural_gradient(vectors, model)
    reference.assert_close(inside, expected, 1e-12)
    assert not any(v.requires_grad for v in inside.values())


def test_callers_loss_function_on_a_model_without_a_loss():
    model, batch, damping = mlp(), rows_batch(), Damping(1e-3, 1e-3, 1e6)
    results = []
    for loss_fn, more in (
        (cross_entropy, {}),
        (lambda o, b: 6 * cross_entropy(o, b), {"loss_reduction": "sum"}),
        (lambda o, b: cross_entropy(o, b), {"n_labels": 6}),
        (lambda o, b: nn.functional.cross_entropy(o, b["labels"], reduction="none"), {}),
    ):
        kfac = engine("all", damping)
        with reference.record(model) as rec:
            kfac.collect_kfac_factors(model, batch, loss=loss_fn, **more)
        truth = Truth(model, rec, [batch], labels=6)
        own = truth.own_gradient(6)
        results.append(kfac.compute_natural_gradient(own, model))
        reference.assert_close(results[-1], truth.natural_gradient(own, damping), 1e-9)
    for other in results[1:]:
        reference.assert_close(other, results[0], 1e-9)


def test_squared_error_of_a_plain_model():
    """A loss without integer labels: `n_labels` says what the mean was over."""
    model, batch = mlp(), rows_batch()
    batch["labels"] = torch.randn(6, 4, dtype=DOUBLE)
    damping = Damping(1e-3, 1e-3, None)

    def loss_fn(outputs, batch):
        return (outputs - batch["labels"]).square().sum(1).mean()

    kfac = engine("all", damping)
    with reference.record(model) as rec:
        kfac.collect_kfac_factors(model, batch, loss=loss_fn, n_labels=6)
    truth = Truth(model, rec, [batch], labels=6)
    residual = 2 * (model(batch["x"]) - batch["labels"]).detach()
    assert reference.relative(truth.tokens["second"].g[0], residual) < 1e-12
    assert_natural(kfac, model, truth, damping)


class Scale(nn.Module):
    """A model without a supported layer."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4, dtype=DOUBLE))

    def forward(self, x):
        return x[:, :4] * self.scale.exp()


@pytest.mark.parametrize(
    ("collect", "error", "message"),
    [
        (lambda: engine().collect_kfac_factors(mlp(), rows_batch()), CurvatureError, "loss"),
        (
            lambda: engine().collect_kfac_factors(
                mlp(), rows_batch(), loss=cross_entropy, loss_reduction="avg"
            ),
            ValueError,
            "loss_reduction.*avg",
        ),
        (lambda: collected(Scale()), CurvatureError, "no K-FAC layer .*: scale: its use by exp"),
        (lambda: collected(exclude=["*"]), CurvatureError, "(?i)no .*layer"),
        (
            lambda: engine().collect_kfac_factors(mlp(), [], loss=cross_entropy),
            CurvatureError,
            "batch",
        ),
    ],
    ids=["no loss", "reduction misspelt", "no supported layer", "all excluded", "no batch"],
)
def test_what_cannot_be_collected_says_why(collect, error, message):
    with pytest.raises(error, match=message):
        collect()


def test_frozen_layers_are_skipped():
    model = mlp()
    for parameter in model.first.parameters():
        parameter.requires_grad_(False)
    kfac, _ = collected(model)
    assert list(kfac.kfac_factors) == ["second"]
    vectors = parameters_like(model)
    result = kfac.compute_natural_gradient(vectors, model)
    assert torch.equal(result["first.weight"], vectors["first.weight"])
    assert set(kfac.uncovered) == {"first.weight", "first.bias"}


@pytest.mark.parametrize(
    ("key", "fill", "message"),
    [("attention_mask", 0, "no active token"), ("labels", -100, "label.*none counts")],
)
def test_a_batch_without_a_token_costs_no_forward_pass_and_leaves_the_engine_usable(
    key, fill, message
):
    model, good = gpt2_and_batch()
    kfac, vectors = engine(), parameters_like(model)
    kfac.collect_kfac_factors(model, good)
    before = kfac.compute_natural_gradient(vectors, model)
    bad, calls = dict(good, **{key: torch.full_like(good[key], fill)}), Calls(model)
    for batches in (bad, [bad, bad]):
        with pytest.raises(CurvatureError, match=message):
            kfac.collect_kfac_factors(model, batches)
    assert calls.count == 0
    after = kfac.compute_natural_gradient(vectors, model)
    for name, value in before.items():
        assert torch.equal(after[name], value)
    # One batch without labels among others has tokens all the same.
    unlabelled = dict(good, labels=torch.full_like(good["labels"], -100))
    kfac.collect_kfac_factors(model, [unlabelled, good])
    assert kfac.kfac_factors["lm_head"].tokens == 2 * int(good["attention_mask"].sum())


def test_labels_that_the_callers_own_loss_does_not_read_are_not_counted():
    model, batch = mlp(), rows_batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    kfac = engine()
    kfac.collect_kfac_factors(model, batch, loss=lambda y, _: y.square().sum(dim=1), n_labels=6)
    assert kfac.kfac_factors["first"].n_labels == 6


@pytest.mark.parametrize("side", ["activations", "gradients"])
def test_non_finite_values_name_the_layer(side):
    model, batch = mlp(), rows_batch()
    if side == "activations":
        batch["x"][2, 3] = float("nan")
        loss_fn = cross_entropy
    else:

        def loss_fn(outputs, batch):
            return (outputs.sum() - outputs.sum().detach()).abs().sqrt()

    with pytest.raises(CurvatureError, match=r"first|second"):
        engine().collect_kfac_factors(model, batch, loss=loss_fn, n_labels=6)


def test_the_layer_of_non_finite_logits_is_named():
    model, batch = models.seeded(lambda: models.gpt2(False), DOUBLE), models.language_batch((9, 4))
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"layer lm_head, batch 0: \d+ of \d+ outputs"):
        engine().collect_kfac_factors(model, batch)


def test_float16_gradients_come_back_in_float32_where_the_result_is_too_large(caplog):
    model, batch = models.seeded(models.gpt2, torch.float32), models.language_batch((9, 4, 7))
    kfac = engine("all", Damping(1e-6, 1e-6, None))
    kfac.collect_kfac_factors(model, batch, keep_gradient=True)
    half = {n: g.half() for n, g in kfac.own_gradients(model).items()}
    result = kfac.compute_natural_gradient(half, model)
    expected = kfac.compute_natural_gradient({n: g.double() for n, g in half.items()}, model)
    large = {n for n, g in expected.items() if not torch.isfinite(g.half()).all()}
    assert large
    assert large != set(expected)
    for name, value in result.items():
        assert value.dtype == (torch.float32 if name in large else torch.float16)
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-3, atol=1e-7)
    named = {n for n in large if f"parameter {n}:" in caplog.text}
    assert named == large


def test_a_result_beyond_float32_is_an_error_that_names_the_parameter():
    model = mlp().float()
    kfac = engine("all", Damping(1e-10, 1e-10, None))
    batch = {"x": torch.zeros(3, 7), "labels": torch.tensor([0, 1, 2])}
    kfac.collect_kfac_factors(model, batch, loss=lambda y, _: (y * 0).sum(dim=1))
    huge = {n: torch.full_like(p, 1e30) for n, p in model.named_parameters()}
    with pytest.raises(CurvatureError, match=r"parameter first\.weight: .*beyond torch\.float32"):
        kfac.compute_natural_gradient(huge, model)


def test_no_damping_from_tiny_to_one_gives_anything_non_finite():
    for policy in POLICIES:
        for lam in (1e-10, 1e-8, 1e-4, 1.0):
            damping = Damping(lam, lam, None)
            one = captured("gpt2_tied", "few", policy, damping, dtype=torch.float32)
            assert all(bool(torch.isfinite(v).all()) for v in one.natural(one.own).values())


@pytest.mark.parametrize("kappa", [None, 30.0])
def test_trace_log_determinant_and_top_eigenvalues(kappa):
    damping = Damping(1e-2, 1e-2, kappa)
    kfac, _ = collected(damping=damping)
    for name, f in kfac.kfac_factors.items():
        a = f.A.matrix
        g = f.G.columns.data.T.double() @ f.G.columns.data.double() * f.G.weight
        block = torch.kron(g, a) * f.ratio
        used = torch.kron(*(reference.power(m, 1, 1e-2, kappa) for m in (g, a))) * f.ratio
        top = torch.linalg.eigvalsh(block).flip(0)[:3]
        assert kfac.trace()[name] == pytest.approx(float(block.trace()), rel=1e-10)
        assert kfac.log_determinant()[name] == pytest.approx(float(used.logdet()), rel=1e-9)
        torch.testing.assert_close(kfac.top_eigenvalues(3)[name], top, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="k: 0"):
        kfac.top_eigenvalues(0)


@pytest.mark.parametrize("settings", [{"tied": "sum"}, {"kfac_true_fisher_head": True}])
def test_top_eigenvalues_of_a_side_without_a_decomposition(settings):
    model = models.seeded(models.gpt2, DOUBLE)
    kfac = engine("all", **settings)
    kfac.collect_kfac_factors(model, models.language_batch((9, 4, 7)))
    head = kfac.kfac_factors["lm_head"]
    assert head.G.structure == "diagonal_low_rank"
    g = head.G.multiply(torch.eye(models.VOCAB, dtype=DOUBLE))
    expected = torch.linalg.eigvalsh(torch.kron(g, head.A.matrix) * head.ratio).flip(0)[:4]
    found = kfac.top_eigenvalues(4)
    assert set(found) == set(kfac.kfac_factors)
    torch.testing.assert_close(found["lm_head"], expected, rtol=1e-6, atol=1e-12)


def test_ekfac_with_pooled_factors_is_refused_before_a_pass():
    model = models.seeded(models.gpt2, DOUBLE)
    calls = Calls(model)
    with pytest.raises(SettingError, match=r"tied: 'sum' with ekfac.*lm_head.*head, embedding"):
        engine(ekfac=True, tied="sum").collect_kfac_factors(model, models.language_batch((5, 8)))
    assert calls.count == 0
    untied = models.seeded(lambda: models.gpt2(False), DOUBLE)
    engine(ekfac=True, tied="sum").collect_kfac_factors(untied, models.language_batch((5, 8)))


@pytest.mark.parametrize("policy", ["all", "small_only"])
def test_factors_of_another_model_name_the_layer_and_both_sides(policy):
    kfac, _ = collected(policy=policy)
    wider = models.seeded(lambda: models.MLP(sizes=(7, 11, 4)), DOUBLE)
    with pytest.raises(CurvatureError, match=r"first.*(9.*11|11.*9)"):
        kfac.compute_natural_gradient(random_like(dict(wider.named_parameters())), wider)
    without_bias = mlp(bias=False)
    gradients = random_like(dict(without_bias.named_parameters()))
    with pytest.raises(CurvatureError, match=r"first.*bias"):
        kfac.compute_natural_gradient(gradients, without_bias)


@pytest.mark.parametrize("product", ["compute_natural_gradient", "compute_fisher_vector_product"])
@pytest.mark.parametrize(
    ("name", "gradient", "message"),
    [
        ("first.weight", torch.ones(7, 9), "first"),
        ("first.weight", None, r"gradient first\.weight: None; allowed: a tensor"),
        ("nowhere.weight", torch.ones(2, 2), "nowhere"),
    ],
    ids=["another shape", "none", "another name"],
)
def test_gradients_of_another_model_are_named(name, gradient, message, product):
    kfac, model = collected()
    gradients = {**parameters_like(model), name: gradient}
    with pytest.raises(CurvatureError, match=message):
        getattr(kfac, product)(gradients, model)
    with pytest.raises(CurvatureError, match="collect"):
        getattr(engine(), product)(parameters_like(model), model)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("damping", -1.0),
        ("damping", float("nan")),
        ("damping_A", -1e-3),
        ("max_condition_number", 0.5),
        ("kfac_policy", "some"),
        ("woodbury_dtype", "fp8"),
        ("woodbury_store_device", "tpu"),
        ("update_freq", 0),
        ("ema_decay", 1.5),
        ("kfac_distributed_reduce", "sum"),
        ("fisher", "guess"),
        ("tied", "both"),
        ("core_dtype", "float16"),
    ],
)
def test_settings_out_of_range_are_named(setting, value):
    with pytest.raises(ValueError, match=f"{setting}.*{str(value).replace('+', '.')}"):
        KFACNaturalGradient(**{setting: value})


def test_misspelt_settings_are_errors():
    with pytest.raises(TypeError, match="dampign"):
        KFACNaturalGradient(dampign=1e-3)


def test_negative_power_without_damping_is_an_error():
    kfac, model = collected(damping=Damping(0.0, 0.0, None))
    vectors = parameters_like(model)
    with pytest.raises(ValueError, match="damping"):
        kfac.compute_natural_gradient(vectors, model)
    assert kfac.compute_powered_natural_gradient(vectors, model, 1.0)


def test_step_refreshes_every_update_freq():
    model, batch = gpt2_and_batch()
    kfac, calls = engine(update_freq=3), Calls(model)
    seen = []
    for _ in range(7):
        kfac.step(model, batch)
        seen.append(calls.count)
    assert seen == [1, 1, 1, 2, 2, 2, 3]


@pytest.mark.parametrize("policy", ["all", "small_only"])
def test_ema_decay_touches_the_diagonal_and_nothing_else(policy):
    model, _ = gpt2_and_batch()
    vectors = parameters_like(model)

    def after(decay, *seeds):
        kfac = engine(policy, ema_decay=decay)
        for seed in seeds:
            kfac.collect_kfac_factors(model, models.language_batch(models.FEW, seed=seed))
        return kfac.compute_natural_gradient(vectors, model), kfac.diagonal_fisher

    expected, last = after(0.0, 1, 2)
    found, decayed = after(0.9, 1, 2)
    fresh, _ = after(0.0, 2)
    _, first = after(0.0, 1)
    for other in (found, fresh):
        for name, value in expected.items():
            assert reference.relative(other[name], value.double()) < 1e-12, name
    assert last
    assert set(last) <= set(dict(model.named_parameters()))
    name = "transformer.h.0.mlp.c_fc.weight"
    assert last[name].shape == (16, 64)
    assert bool((last[name] >= 0).all())
    assert reference.relative(decayed[name], last[name].double()) > 0.05
    blend = 0.9 * first[name] + 0.1 * last[name]
    assert reference.relative(decayed[name], blend.double()) < 1e-6
