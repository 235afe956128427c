"""EKFAC in both units, for every Fisher kind, head included: each product against dense float64.

The truth is formed from hooks of its own: the gradients of the recorded passes, or, over the
model's own distribution, one backward pass for each position and class.
"""

import math

import pytest
import torch
from torch import Tensor, nn

from fisher_lab.curvature.losses import CrossEntropy, SquaredError
from tests import models, reference
from tests.capturing import cross_entropy, engine, inputs_of, random_like
from tests.reference import Damping

DOUBLE = torch.float64
UNITS = ["token", "sequence"]
LAM = Damping(1e-2, 3e-3, None)


CLASSES = 7


def two_batches() -> list[models.Batch]:
    """Of words under `CLASSES`, with padding on one side and labels left out."""
    found = models.language_batch((3, 5), share=0.7, seed=3), models.language_batch((4,), seed=4)
    for batch in found:
        batch["input_ids"] %= CLASSES
        batch["labels"] = batch["labels"].where(batch["labels"] < 0, batch["labels"] % CLASSES)
    return list(found)


def enumerated(model, batches) -> reference.Record:
    """A backward pass for every labelled position and class: of -log p, times sqrt(p)."""
    with reference.record(model) as rec:
        for batch in batches:
            logits = model(**inputs_of(batch)).logits
            rows = reference.counting_labels(model, batch) != -100
            for nats in torch.log_softmax(logits[rows], -1).flatten():
                (-nats.detach().exp().sqrt() * nats).backward(retain_graph=True)
    model.zero_grad()
    return rec


class Dense:
    """Factors, eigenvectors and second moments of one linear layer, from recorded passes.

    Several passes of one call are terms of an expectation (`draws=1`), or draws.
    """

    def __init__(self, rec, name, batches, unit, draws=1) -> None:
        inputs, pairs = [], []
        for call in rec.calls:
            if call.name != name:
                continue
            mask = batches[call.sweep]["attention_mask"].bool()
            one_hot = isinstance(call.module, nn.Embedding)
            a = nn.functional.one_hot(call.input, call.module.weight.shape[0]) if one_hot else None
            a = (call.input if a is None else a).double()
            if getattr(call.module, "bias", None) is not None:
                a = nn.functional.pad(a, (0, 1), value=1.0)
            inputs.append(a[mask])
            for g in call.gradients:
                pairs += [(g[n][mask[n]].double(), a[n][mask[n]]) for n in range(len(mask))]
        a = torch.cat(inputs)
        self.tokens = len(a)
        gs = torch.cat([g for g, _ in pairs])
        self.A, self.G = a.T @ a / self.tokens, gs.T @ gs / (self.tokens * draws)
        self.m_a, self.V_A = torch.linalg.eigh(self.A)
        self.m_g, self.V_G = torch.linalg.eigh(self.G)
        self.S = torch.zeros(len(self.G), len(self.A), dtype=DOUBLE)
        for g, a in pairs:
            p, q = g @ self.V_G, a @ self.V_A
            self.S += (p**2).T @ q**2 if unit == "token" else (p.T @ q) ** 2
        self.S /= self.tokens * draws

    def damped(self, lam: Damping) -> Tensor:
        found = self.S + lam.A * self.m_g[:, None] + lam.G * self.m_a + lam.A * lam.G
        return found if lam.kappa is None else found.clamp(min=float(found.max()) / lam.kappa**2)

    def apply(self, y: Tensor, values: Tensor) -> Tensor:
        return self.V_G @ ((self.V_G.T @ y @ self.V_A) * values) @ self.V_A.T


LAYERS = {
    "gpt2": ["transformer.h.0.mlp.c_fc", "lm_head"],
    "llama": ["model.layers.0.self_attn.k_proj", "model.embed_tokens", "lm_head"],
}


def gpt2() -> nn.Module:
    return models.built(
        "gpt2", vocab_size=CLASSES, tie_word_embeddings=False, n_embd=8, n_layer=2, n_head=2,
        n_positions=8, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip


def llama() -> nn.Module:
    return models.built(
        "llama", "sdpa", vocab_size=CLASSES, tie_word_embeddings=False, hidden_size=8,
        intermediate_size=6, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        max_position_embeddings=8,
    )  # fmt: skip


BUILD = {"gpt2": gpt2, "llama": llama}


def matrix(model, name, named) -> Tensor:
    """`[out, in (+ 1)]` of a layer's vectors."""
    module = model.get_submodule(name)
    transposed = type(module).__name__ in ("Conv1D", "Embedding")
    weight = named[f"{name}.weight"]
    weight = weight.T if transposed else weight
    bias = named.get(f"{name}.bias")
    return weight if bias is None else torch.cat([weight, bias[:, None]], 1)


def check_products(kfac, model, layers, lam) -> None:
    """All that EKFAC gives against `V diag(S) V^T`, for layer name -> dense truth."""
    labels = next(iter(kfac.kfac_factors.values())).n_labels
    own = [n for n, _ in model.named_parameters() if n.rsplit(".", 1)[0] in layers]
    vectors = random_like({n: dict(model.named_parameters())[n].detach() for n in own})
    powers = {p: kfac.compute_powered_natural_gradient(vectors, model, p) for p in (-1, -0.5, 1)}
    plain = kfac.compute_fisher_vector_product(vectors, model)
    damped = kfac.compute_fisher_vector_product(vectors, model, damped=True)
    trace, logdet, top = kfac.trace(), kfac.log_determinant(), kfac.top_eigenvalues(3)
    for name, truth in layers.items():
        y, ratio = matrix(model, name, vectors), truth.tokens / labels
        used = truth.damped(lam)
        for p, result in powers.items():
            expected = truth.apply(y, used**p)
            assert reference.relative(matrix(model, name, result), expected) < 1e-8, (name, p)
        expected = truth.apply(y, truth.S) * ratio
        assert reference.relative(matrix(model, name, plain), expected) < 1e-10, name
        expected = truth.apply(y, truth.damped(Damping(lam.A, lam.G, None))) * ratio
        assert reference.relative(matrix(model, name, damped), expected) < 1e-10, name
        assert trace[name] == pytest.approx(ratio * float(truth.S.sum()), rel=1e-10)
        expected = float((ratio * used).log().sum())
        assert logdet[name] == pytest.approx(expected, rel=1e-9)
        expected = (ratio * truth.S).flatten().topk(3).values
        torch.testing.assert_close(top[name], expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("fisher", ["empirical", "mc", "true"])
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("name", BUILD)
def test_every_product_has_ekfacs_eigenvalues(name, unit, fisher):
    model, batches = models.seeded(BUILD[name], DOUBLE), two_batches()
    more = {"n_samples": 3} if fisher == "mc" else {}
    for policy, kappa in (("all", None), ("small_only", 20.0)):
        lam = Damping(LAM.A, LAM.G, kappa)
        kfac = engine(
            policy, lam, ekfac=True, ekfac_unit=unit, fisher=fisher, norm_layers=False,
            track_diagonal=False, **more,
        )  # fmt: skip
        with reference.record(model) as rec:
            kfac.collect_kfac_factors(model, batches)
        assert kfac.last.fisher == fisher
        if fisher == "true":
            rec = enumerated(model, batches)
        draws = more.get("n_samples", 1)
        check_products(
            kfac, model, {x: Dense(rec, x, batches, unit, draws) for x in LAYERS[name]}, lam
        )
    tokens, sequences = (Dense(rec, LAYERS[name][0], batches, u).S for u in UNITS)
    assert reference.relative(tokens, sequences) > 1e-2  # else the units could not be told apart


@pytest.mark.parametrize("unit", UNITS)
def test_the_exact_head_beside_empirical_and_drawn_inner_layers(unit):
    """Its eigenvalues are EKFAC's too, whatever the inner layers get."""
    model, batches = models.seeded(BUILD["gpt2"], DOUBLE), two_batches()
    truth = Dense(enumerated(model, batches), "lm_head", batches, unit)
    for more in (
        {"kfac_true_fisher_head": True},
        {"fisher": "true", "true_max_classes": 2, "n_samples": 2},
    ):
        kfac = engine("all", LAM, ekfac=True, ekfac_unit=unit, track_diagonal=False, **more)
        kfac.collect_kfac_factors(model, batches)
        assert kfac.kfac_factors["lm_head"].method == "true_head"
        check_products(kfac, model, {"lm_head": truth}, LAM)


def test_a_head_whose_hessian_is_diagonal():
    """Squared errors: `H = 2 I`, so that `S_ij = 2 m^A_j` for all `i`."""
    torch.manual_seed(0)
    model, x = models.MLP().double(), torch.randn(6, 7, dtype=DOUBLE)
    kfac = engine("all", LAM, ekfac=True, fisher="true", track_diagonal=False)
    kfac.collect_kfac_factors(model, (x, torch.randn(6, 4, dtype=DOUBLE)), SquaredError())
    a = nn.functional.pad(torch.tanh(model.first(x)).detach(), (0, 1), value=1.0)
    A = a.T @ a / 6
    y = {"second.weight": torch.randn(4, 9, dtype=DOUBLE), "second.bias": torch.randn(4).double()}
    found = matrix(model, "second", kfac.compute_fisher_vector_product(y, model))
    expected = 2 * matrix(model, "second", y) @ A * 6 / 24
    assert reference.relative(found, expected) < 1e-12


def test_a_head_too_wide_for_its_eigenvectors_is_none_and_this_is_said(caplog):
    model, (x, y) = models.MLP((3, 4, 7)).double(), (torch.randn(6, 3).double(), torch.arange(6))
    more = {"ekfac": True, "max_dense_dim": 6, "track_diagonal": False}
    kfac = engine(fisher="true", true_max_classes=2, **more)
    with caplog.at_level("WARNING"):
        kfac.collect_kfac_factors(model, (x, y), CrossEntropy())
    assert kfac.kfac_factors["second"].fisher == "mc"
    assert "EKFAC of a true-Fisher head needs its 7 x 7 eigenvectors" in caplog.text
    kfac = engine(kfac_true_fisher_head=True, **more)
    with pytest.raises(ValueError, match=r"7 x 7 eigenvectors.*ekfac=False"):
        kfac.collect_kfac_factors(model, (x, y), CrossEntropy())


def test_a_layer_whose_token_gradients_are_all_zero():
    """Its eigenvalues are the damping alone; nothing fails."""
    torch.manual_seed(0)
    model, batch = models.MLP().double(), models.rows_batch(seed=5)
    with torch.no_grad():
        model.second.weight.zero_()  # no gradient comes through
    for unit in UNITS:
        for policy in ("all", "small_only"):
            kfac = engine(policy, LAM, ekfac=True, ekfac_unit=unit)
            kfac.collect_kfac_factors(model, batch, cross_entropy, n_labels=6)
            y = {"first.weight": torch.randn(9, 7, dtype=DOUBLE)}
            assert not kfac.compute_fisher_vector_product(y, model)["first.weight"].any()
            assert kfac.trace()["first"] == 0.0
            assert math.isfinite(kfac.log_determinant()["first"])
            assert torch.isfinite(kfac.compute_natural_gradient(y, model)["first.weight"]).all()


class AcrossExamples(nn.Module):
    """A layer that reads the mean over the sequences: no row of it is of one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.everyone, self.head = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        return self.head(torch.tanh(self.own(x) + self.everyone(x.mean(0, keepdim=True))))


def test_a_layer_whose_rows_are_of_no_single_sequence_is_left_out():
    torch.manual_seed(0)
    model, x = AcrossExamples().double(), torch.randn(3, 5, 4, dtype=DOUBLE)
    labels = torch.randint(4, (3, 5))
    found, skipped = {}, {}
    for unit in UNITS:
        kfac = engine("all", LAM, ekfac=True, ekfac_unit=unit)
        kfac.collect_kfac_factors(model, (x, labels), loss=CrossEntropy())
        found[unit], skipped = set(kfac.kfac_factors), kfac.skipped
    assert found == {"token": {"own", "everyone", "head"}, "sequence": {"own", "head"}}
    assert "cannot be told" in skipped["everyone"]


@pytest.mark.parametrize("unit", UNITS)
def test_units_are_one_for_examples_of_one_row(unit):
    model, batch = models.seeded(models.MLP, DOUBLE), models.rows_batch(6, seed=3)
    y = random_like({n: p.detach() for n, p in model.named_parameters()})
    results = []
    for one in ("token", unit):
        kfac = engine("all", LAM, ekfac=True, ekfac_unit=one)
        kfac.collect_kfac_factors(model, batch, cross_entropy, n_labels=6)
        results.append(kfac.compute_natural_gradient(y, model))
    for key, value in results[0].items():
        assert reference.relative(results[1][key], value) < 1e-12


@pytest.mark.parametrize("fisher", ["empirical", "true"])
def test_files_keep_the_unit(tmp_path, fisher):
    """The same numbers come back; of tokens alone, moments of sequences are not to be had."""
    model, batches = models.seeded(BUILD["llama"], DOUBLE), two_batches()
    made = {}
    for unit in UNITS:
        kfac = engine("all", LAM, ekfac=True, ekfac_unit=unit, fisher=fisher, track_diagonal=False)
        kfac.collect_kfac_factors(model, batches)
        kfac.save(tmp_path / unit, model)
        made[unit] = kfac
    vectors = random_like({n: p.detach() for n, p in model.named_parameters()})
    for unit, source in (("token", "token"), ("sequence", "sequence"), ("token", "sequence")):
        other = engine("all", LAM, ekfac=True, ekfac_unit=unit, track_diagonal=False)
        other.load(tmp_path / source, model)
        expected = made[unit].compute_natural_gradient(vectors, model)
        for key, value in other.compute_natural_gradient(vectors, model).items():
            assert reference.relative(value, expected[key]) < 1e-12, (unit, source, key)
        for key, value in other.trace().items():
            assert value == pytest.approx(made[unit].trace()[key], rel=1e-12)
    other = engine("all", LAM, ekfac=True, ekfac_unit="sequence")
    with pytest.raises(ValueError, match="collected with ekfac_unit='token'"):
        other.load(tmp_path / "token", model)


def test_another_damping_keeps_the_moments(monkeypatch):
    from fisher_lab.curvature.kfac import ekfac

    model, batches = models.seeded(BUILD["gpt2"], DOUBLE), two_batches()
    vectors = random_like({n: p.detach() for n, p in model.named_parameters()})
    fresh = engine("all", Damping(0.3, 0.2, 50.0), ekfac=True)
    fresh.collect_kfac_factors(model, batches)
    expected = fresh.compute_natural_gradient(vectors, model)
    kfac = engine("all", Damping(1e-3, 1e-2, 50.0), ekfac=True)
    kfac.collect_kfac_factors(model, batches)
    kfac.compute_natural_gradient(vectors, model)
    monkeypatch.setattr(ekfac, "squared_products", lambda *_: pytest.fail("formed once more"))
    kfac.with_damping(0.3, 0.2)
    for key, value in kfac.compute_natural_gradient(vectors, model).items():
        assert reference.relative(value, expected[key]) < 1e-12
