"""Fisher kinds, the true-Fisher head, EKFAC, tied weights, embeddings and norms, held to dense."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
# pyright: reportReturnType=false, reportOptionalSubscript=false

import pytest
import torch
from torch import nn

from fisher_lab.curvature.kfac import ekfac
from fisher_lab.curvature.kfac.layers_by_module import discover
from fisher_lab.curvature.losses import CrossEntropy
from tests import models, reference
from tests.capturing import (
    Captured,
    captured,
    cross_entropy,
    engine,
    inputs_of,
    own_collect,
    random_like,
)
from tests.models import CASES
from tests.reference import Damping, Truth

DOUBLE = torch.float64
EMBEDDING = "model.embed_tokens.weight"
BOTH = ["all", "small_only"]


def causal_batch():
    return models.language_batch((3, 5), share=0.7, seed=3)


def expected_moments(model, batch) -> dict[str, tuple[torch.Tensor, int]]:
    """G of every layer over the model's own distribution, by enumeration of every label.

    Labels of different positions are drawn independently and scores have mean zero, so
    `E[g_t g_t^T] = sum over labelled s, classes c of p_sc h h^T` with `h` the gradient, at token
    t, of `-log p_sc` *alone*. One backward pass a pair (s, c).
    """
    with reference.record(model) as rec:
        logits = model(**inputs_of(batch)).logits
        rows = reference.counting_labels(model, batch) != -100
        log_p = torch.log_softmax(logits[rows], -1)
        for nats in log_p.flatten():
            model.zero_grad()
            (-nats.detach().exp().sqrt() * nats).backward(retain_graph=True)
    truth = Truth(model, rec, [batch])
    return {
        name: (sum(reference.moment(g) for g in tokens.g), tokens.count)
        for name, tokens in truth.tokens.items()
    }


def true_truth(model, batch) -> Truth:
    """Empirical tokens for A, with every G replaced by its expectation."""
    with reference.record(model) as rec:
        outputs = model(**inputs_of(batch))
        loss, labels = reference.summed_loss(model, outputs.logits, batch)
        loss.backward()
    model.zero_grad()
    truth = Truth(model, rec, [batch], labels=labels, norms=False)
    truth.G_override = {name: G for name, (G, _) in expected_moments(model, batch).items()}
    return truth


@pytest.mark.parametrize("build", [lambda: models.gpt2(tied=False), models.bert])
def test_true_fisher_of_inner_layers_and_head(build):
    """Exact where the classes are few enough, also where attention mixes the tokens."""
    model, batch = models.seeded(build, DOUBLE), causal_batch()
    truth = true_truth(model, batch)
    damping = Damping(1e-3, 1e-3, None)
    kfac = engine("small_only", damping, fisher="true", norm_layers=False)
    kfac.collect_kfac_factors(model, batch)
    vectors = random_like({n: p for n, p in model.named_parameters() if n in truth.covered()})
    product = kfac.compute_fisher_vector_product(vectors, model)
    reference.assert_close(product, truth.fisher_vector_product(vectors), 1e-9)


def test_the_enumeration_agrees_with_section_5():
    model, batch = models.seeded(lambda: models.gpt2(tied=False), DOUBLE), causal_batch()
    rows = reference.counting_labels(model, batch) != -100
    with torch.no_grad():
        logits = model(**inputs_of(batch)).logits[rows]
    G, tokens = expected_moments(model, batch)["lm_head"]
    assert reference.relative(G, reference.true_fisher_of_softmax(logits, tokens)) < 1e-12


def head_moment(kfac, model, truth) -> torch.Tensor:
    """The engine's G of the bias-free head `second`, read off Fisher-vector products."""
    A = reference.factors_of(truth.tokens["second"]).A
    scale = truth.tokens["second"].count / truth.labels * A[0, 0]
    columns = []
    for i in range(4):
        probe = torch.zeros(4, 9, dtype=DOUBLE)
        probe[i, 0] = 1.0
        answer = kfac.compute_fisher_vector_product({"second.weight": probe}, model)
        columns.append(answer["second.weight"][:, 0] / scale)
    return torch.stack(columns, 1)


@pytest.mark.parametrize("policy", BOTH)
def test_sampled_fisher_is_right_in_expectation(policy):
    """Every entry of the sampled G within 5 standard deviations of the enumerated one."""
    torch.manual_seed(0)
    model, batch, n_samples = models.MLP(bias=False).double().eval(), models.rows_batch(seed=5), 300
    with reference.record(model) as rec:
        cross_entropy(model(batch["x"]), batch).backward()
    truth = Truth(model, rec, [batch], labels=6)
    kfac = engine(policy, fisher="mc", n_samples=n_samples)
    kfac.collect_kfac_factors(model, batch, loss=CrossEntropy())
    found = head_moment(kfac, model, truth)
    p = torch.softmax(model(batch["x"]).detach(), 1)
    scores = p[:, None, :] - torch.eye(4, dtype=DOUBLE)[None]  # [T, class, 4]
    outer = scores[..., :, None] * scores[..., None, :]
    mean = (p[..., None, None] * outer).sum(1)
    variance = (p[..., None, None] * outer**2).sum(1) - mean**2
    deviation = (variance.sum(0) / (6**2 * n_samples)).sqrt()
    assert bool(((found - mean.mean(0)).abs() <= 5 * deviation + 1e-12).all())
    # The test has power: the data's labels would be many deviations off.
    empirical = reference.factors_of(truth.tokens["second"]).G * 36
    assert bool(((empirical - mean.mean(0)).abs() > 20 * deviation).any())


@pytest.mark.parametrize("policy", BOTH)
@pytest.mark.parametrize("n_samples", [1, 3])
def test_sampled_fisher_on_its_own_draws(n_samples, policy):
    """`n` draws are `T n` columns of weight `1 / (T n)`; held to the recorded backward passes."""
    model, batch = models.seeded(lambda: models.gpt2(tied=False), DOUBLE), causal_batch()
    labels = int((reference.counting_labels(model, batch) != -100).sum())
    damping = Damping(1e-2, 1e-2, None)
    more = {"n_samples": n_samples, "norm_layers": False}
    # The diagonal costs a pass over the labels of the data.
    kfac = engine(policy, damping, fisher="mc", track_diagonal=False, **more)
    truth = own_collect(kfac, model, [batch], labels=labels, norms=False)
    for tokens in truth.tokens.values():
        assert len(tokens.g) == n_samples
    vectors = random_like({n: p for n, p in model.named_parameters() if n in truth.covered()})
    product = kfac.compute_fisher_vector_product(vectors, model)
    reference.assert_close(product, truth.fisher_vector_product(vectors), 1e-10)
    result = kfac.compute_natural_gradient(vectors, model)
    reference.assert_close(result, truth.natural_gradient(vectors, damping), 1e-9)


def test_sampling_is_seeded_and_draws_differ():
    model, batch = models.seeded(lambda: models.gpt2(tied=False), DOUBLE), causal_batch()
    vectors = random_like(dict(model.named_parameters()))
    products = []
    for n_samples in (1, 1, 2):
        torch.manual_seed(11)
        kfac = engine(fisher="mc", n_samples=n_samples)
        kfac.collect_kfac_factors(model, batch)
        product = kfac.compute_fisher_vector_product(vectors, model)
        products.append(product["transformer.h.0.mlp.c_fc.weight"])
    assert torch.equal(products[0], products[1])
    assert reference.relative(products[2], products[0]) > 1e-3


@pytest.mark.parametrize("policy", BOTH)
def test_true_fisher_head(tokens, policy):
    """The head over the model's own distribution, the other layers empirical; no floor there."""
    case = CASES["gpt2_untied"]
    for damping in (Damping(1e-3, 1e-3, None), Damping(1e-3, 1e-4, 20.0)):
        model, batch = case.model(DOUBLE), case.batch(tokens)
        kfac = engine(policy, damping, kfac_true_fisher_head=True)
        rows = reference.counting_labels(model, batch) != -100
        labels = int(rows.sum())
        truth = own_collect(kfac, model, [batch], labels=labels)
        with torch.no_grad():
            logits = model(**inputs_of(batch)).logits[rows]
        T = truth.tokens["lm_head"].count
        truth.G_override["lm_head"] = reference.true_fisher_of_softmax(logits, T)
        own = truth.own_gradient(labels)
        for vectors in (own, random_like(own)):
            result = kfac.compute_natural_gradient(vectors, model)
            expected = truth.true_head_natural_gradient(vectors, damping, "lm_head")
            reference.assert_close(result, expected, 1e-9)
        product = kfac.compute_fisher_vector_product(own, model)
        reference.assert_close(product, truth.fisher_vector_product(own), 1e-10)


def test_the_head_is_found_and_nothing_else_is_taken_for_it():
    """Many refreshes: memory of an early layer's output may be used again for the logits."""
    case = CASES["gpt2_untied"]
    for _ in range(20):
        kfac = engine("small_only", kfac_true_fisher_head=True)
        kfac.collect_kfac_factors(case.model(DOUBLE), case.batch("many"))
        heads = [n for n, f in kfac.kfac_factors.items() if f["G_type"] == "true_head"]
        assert heads == ["lm_head"]


def test_true_fisher_head_has_powers_one_and_minus_one_only():
    case = CASES["gpt2_untied"]
    model = case.model(DOUBLE)
    kfac = engine("all", kfac_true_fisher_head=True)
    kfac.collect_kfac_factors(model, case.batch("few"))
    own = random_like(dict(model.named_parameters()))
    kfac.compute_powered_natural_gradient(own, model, 1)
    with pytest.raises(ValueError, match=r"lm_head|power"):
        kfac.compute_powered_natural_gradient(own, model, -0.5)


@pytest.mark.parametrize("name", ["gpt2_untied", "bert_right"])
def test_ekfac(name, tokens, policy):
    """Section 6 on every policy: moments in the Kronecker basis, damped and floored as there."""
    for damping in (Damping(1e-3, 1e-3, None), Damping(1e-2, 1e-3, 30.0)):
        one = captured(name, tokens, policy, damping, ekfac=True)
        for vectors in (one.own, one.random()):
            expected = one.truth.ekfac(vectors, damping)
            reference.assert_close(one.natural(vectors), expected, 1e-8, policy)
        plain = one.truth.natural_gradient(one.own, damping)
        assert max(reference.errors(plain, one.truth.ekfac(one.own, damping)).values()) > 0.1


@pytest.mark.parametrize("more", [{"fisher": "mc", "n_samples": 3}, {"fisher": "true"}])
def test_moments_over_batches_and_draws(more):
    """EKFAC's moments pair every gradient with its own token."""
    model = models.seeded(models.MLP, DOUBLE)
    kfac = engine("small_only", ekfac=True, track_diagonal=False, **more)
    batches = [models.rows_batch(5, seed=3), models.rows_batch(3, seed=4)]
    with reference.record(model) as rec:
        kfac.collect_kfac_factors(model, batches, loss=CrossEntropy())
    factors = kfac.kfac_factors["first"]
    v_g, v_a = torch.linalg.eigh(torch.rand(9, 9, dtype=DOUBLE))[1], torch.eye(8).double()
    expected = torch.zeros(9, 8, dtype=DOUBLE)
    for call in rec.calls:
        if call.name != "first":
            continue
        a = torch.cat([call.input, torch.ones(len(call.input), 1).double()], 1).square()
        assert len(call.gradients) > 1
        for g in call.gradients:
            expected += (g @ v_g).square().T @ a
    draws = 3 if more["fisher"] == "mc" else 1
    expected /= 8 * draws
    g = factors.tokens_g
    found = ekfac.squared_products(factors, lambda rows: (g[rows] @ v_g).square(), v_g, v_a)
    found /= 8 * draws
    assert reference.relative(found, expected) < 1e-12


@pytest.mark.parametrize("tied", ["head", "embedding", "sum"])
@pytest.mark.parametrize("build", [models.gpt2, models.t5, lambda: models.llama(tied=True)])
def test_tied_weights(build, tied, policy):
    """One entry, under the name in `named_parameters()`, with the factors that were asked for."""
    model = models.seeded(build, DOUBLE)
    is_t5 = "T5" in type(model).__name__
    batch = models.t5_batch((8, 5), (4, 7)) if is_t5 else models.language_batch(models.FEW)
    damping = Damping(1e-3, 1e-3, 1e3)
    one = Captured(model, batch, policy, damping, tied=tied)
    name = one.truth.name_of(model.get_output_embeddings().weight)
    assert name == one.truth.name_of(model.get_input_embeddings().weight)
    assert "lm_head.weight" not in dict(model.named_parameters())
    assert set(one.natural(one.own)) == set(one.own)
    one.check_natural(1e-8, one.random())
    expected = one.truth.natural_gradient(one.own, damping)
    one.truth.tied = "embedding" if tied == "head" else "head"
    others = one.truth.natural_gradient(one.own, damping)
    assert reference.relative(others[name], expected[name]) > 0.1


@pytest.mark.parametrize(("excluded", "tied"), [("*wte", "head"), ("lm_head", "embedding")])
def test_the_own_gradient_of_a_tied_weight_whose_other_use_is_excluded(excluded, tied, policy):
    """It is that of both uses, whichever has the factors: no push-through of one use's tokens."""
    damping = Damping(1e-3, 1e-3, 1e3)
    more = {"exclude": [excluded], "keep_gradient": True}
    one = captured("gpt2_tied", "few", policy, damping, **more)
    one.truth.tied = tied
    reference.assert_close(one.kfac.own_gradients(one.model), one.own, 1e-10)
    expected = one.truth.natural_gradient(one.own, damping)
    reference.assert_close(one.natural(None), expected, 1e-8)


def test_a_bias_that_a_head_names_as_its_own_is_no_other_use():
    """Where nothing else has the weight, push-through holds for BERT's head."""
    model = models.seeded(models.bert, DOUBLE)
    decoder = model.get_output_embeddings()
    decoder.weight = nn.Parameter(decoder.weight.detach().clone())
    assert decoder.bias is model.cls.predictions.bias
    tied = {layer.name: layer.tied for layer in discover(model).layers.values()}
    assert not any(tied.values())


class Siamese(nn.Module):
    """Two linear layers and two norms, each pair with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.other_norm = nn.LayerNorm(7), nn.LayerNorm(7)
        self.first, self.second = nn.Linear(7, 7), nn.Linear(7, 7)
        self.other_norm.weight, self.other_norm.bias = self.norm.weight, self.norm.bias
        self.second.weight, self.second.bias = self.first.weight, self.first.bias
        self.out = nn.Linear(7, 4)

    def forward(self, x):
        return self.out(self.second(self.other_norm(torch.tanh(self.first(self.norm(x))))))


@pytest.mark.parametrize("excluded", ["first", "second", "norm", "other_norm"])
def test_the_own_gradient_where_a_module_with_the_same_weight_is_excluded(excluded):
    model = models.seeded(Siamese, DOUBLE)
    kfac = engine("all", Damping(1e-3, 1e-3, None), exclude=[excluded])
    batch = models.rows_batch(seed=5)
    kfac.collect_kfac_factors(model, batch, cross_entropy, n_labels=6, keep_gradient=True)
    model.zero_grad()
    cross_entropy(model(batch["x"]), batch).backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    reference.assert_close(kfac.own_gradients(model), expected, 1e-10)
    own = kfac.compute_natural_gradient(None, model)
    reference.assert_close(own, kfac.compute_natural_gradient(expected, model), 1e-10)


@pytest.mark.parametrize("kappa", [None, 5.0])
def test_embedding(kappa, tokens, policy):
    """`A = diag(counts) / T` over the whole vocabulary, absent words (a zero) included."""
    one = captured("llama", tokens, policy, Damping(1e-3, 1e-2, kappa))
    one.own, other = ({EMBEDDING: vectors[EMBEDDING]} for vectors in (one.own, one.random()))
    one.check_natural(1e-10, other)
    one.check_product(1e-10, other)


@pytest.mark.parametrize("name", ["gpt2_untied", "llama", "t5_lengths"])
def test_norm_layers(name):
    """The dense block `(1/T) sum v v^T`, `v = [g xhat; g]`, damped by `damping_G`."""
    one = captured(name, "few", "all", Damping(1e-4, 1e-2, 10.0))
    norms = {n for n in one.own if "norm" in n or ".ln_" in n}
    assert len(norms) >= 3
    one.own, other = ({n: vectors[n] for n in norms} for vectors in (one.own, one.random()))
    one.check_natural(1e-9, other)
    one.check_product(1e-9, other)


def test_norm_layers_can_be_left_out():
    one = captured("gpt2_tied", "few", norm_layers=False)
    result, uncovered = one.natural(one.own), set(one.own) - one.truth.covered()
    assert uncovered <= set(one.kfac.uncovered)
    assert "transformer.ln_f.weight" in uncovered
    for name in uncovered:
        assert torch.equal(result[name], one.own[name])


def test_exact_fisher_scale_divides_by_tokens_over_labels():
    """The inverse of `(T / N) G (x) A`; leaving `T / N` out is the default."""
    damping = Damping(1e-3, 1e-3, 1e6)
    more = {"fisher_scale": "exact", "norm_layers": False}
    one = captured("gpt2_untied", "few", "all", damping, **more)
    scale = one.labels / one.truth.tokens["lm_head"].count
    assert scale != 1
    natural = one.truth.natural_gradient(one.own, damping)
    expected = {n: v * scale for n, v in natural.items()}
    reference.assert_close(one.natural(one.own), expected, 1e-9)


def test_column_reduction_is_lossless_where_the_output_is_narrow():
    """More tokens than `max_columns`: layers within `max_dense_dim` go through `out x out`."""
    damping = Damping(1e-3, 1e-3, 1e4)
    one = captured("gpt2_untied", "many", "all", damping, max_columns=70)  # 89 tokens, 64 outputs
    one.check_natural(1e-9, one.random())
