"""The references themselves: held to autograd, to finite differences and to exact cases."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from tests import models, reference
from tests.reference import Damping, Truth, moment, relative

DOUBLE = torch.float64


def recorded(model, batch):
    """Record one forward and backward pass of the token-summed loss."""
    with reference.record(model) as rec:
        outputs = model(**{k: v for k, v in batch.items() if k != "labels"})
        loss, labels = reference.summed_loss(model, outputs.logits, batch)
        model.zero_grad()
        loss.backward()
    return Truth(model, rec, [batch], labels=labels), labels


@pytest.mark.parametrize("case", models.CASES.values(), ids=models.CASES)
def test_sum_of_token_outer_products_is_the_autograd_gradient(case, tokens):
    model, batch = case.model(DOUBLE), case.batch(tokens)
    truth, labels = recorded(model, batch)
    own = truth.own_gradient(labels)
    checked = 0
    for name, parameter in model.named_parameters():
        if any(position in name for position in reference.POSITIONS):
            continue
        expected = parameter.grad / labels
        # BERT's key bias has no gradient but rounding: softmax ignores a common shift.
        assert (own[name] - expected).norm() <= 1e-12 * max(expected.norm(), 1e-3), name
        checked += 1
    assert checked == len(own)


def test_token_counts_follow_the_origin_of_the_tensor():
    model = models.seeded(models.t5, DOUBLE)
    batch = models.t5_batch((30, 17, 24), (21, 30, 20))
    batch["decoder_attention_mask"][0, 5] = 0  # equal widths, now different totals
    truth, _ = recorded(model, batch)
    cross = "decoder.block.0.layer.1.EncDecAttention."
    counts = {name: tokens.count for name, tokens in truth.tokens.items()}
    assert counts[cross + "k"] == counts[cross + "v"] == 71
    assert counts[cross + "q"] == counts[cross + "o"] == counts["lm_head"] == 70
    assert counts["encoder.block.0.layer.0.SelfAttention.k"] == 71
    assert counts["decoder.block.0.layer.0.SelfAttention.k"] == 70


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_that_count(side):
    """Of 5 + 8 tokens a causal model can predict 4 + 7; BERT predicts every one."""
    batch = models.language_batch(models.FEW, side, share=1.0)
    gpt2, bert = models.seeded(models.gpt2, DOUBLE), models.seeded(models.bert, DOUBLE)
    logits = torch.zeros(*batch["input_ids"].shape, models.VOCAB, dtype=DOUBLE)
    loss, n = reference.summed_loss(gpt2, logits, batch)
    assert n == 11
    assert float(loss) == pytest.approx(11 * float(torch.tensor(models.VOCAB).log()))
    assert reference.summed_loss(bert, logits, batch)[1] == 13


def test_a_token_gradient_is_the_finite_difference():
    model = models.seeded(models.gpt2, DOUBLE)
    batch = models.language_batch(models.FEW)
    truth, _ = recorded(model, batch)
    name = "transformer.h.0.mlp.c_fc"
    layer, direction = model.get_submodule(name), torch.zeros(64, dtype=DOUBLE)
    direction[3] = 1.0

    def loss_at(step):
        def nudge(module, args, output):
            nudged = output.clone()
            nudged[1, 2] += step * direction
            return nudged

        handle = layer.register_forward_hook(nudge)
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
        handle.remove()
        return float(reference.summed_loss(model, logits, batch)[0].detach())

    difference = (loss_at(1e-4) - loss_at(-1e-4)) / 2e-4
    # Row 1 starts after the 5 tokens of row 0.
    assert float(truth.tokens[name].g[0][5 + 2, 3]) == pytest.approx(difference, rel=1e-6)


def linear_tokens(rows, widths, seed=0):
    """Tokens of a chain of linear layers under squared error, one residual column each."""
    generator = torch.Generator().manual_seed(seed)
    layers = [nn.Linear(i, o, bias=False, dtype=DOUBLE) for i, o in pairwise(widths)]
    model = nn.Sequential(*layers)
    x = torch.randn(rows, widths[0], generator=generator, dtype=DOUBLE)
    return model, x


def test_one_datum_kfac_is_exact():
    model, x = linear_tokens(1, (4, 3, 2))
    with reference.record(model) as rec:
        model(x).square().sum().backward()
    for index, tokens in enumerate(Truth(model, rec, [None]).tokens.values()):
        factors = reference.factors_of(tokens)
        gradient = model[index].weight.grad.flatten()
        kron = torch.kron(factors.G, factors.A)
        assert relative(kron, torch.outer(gradient, gradient)) < 1e-13


def test_deep_linear_network_kfac_is_exact():
    """With residuals `e_c` for every class on every row, g does not depend on a: F = G (x) A."""
    model, x = linear_tokens(6, (4, 5, 3))
    rows = x.repeat_interleave(3, 0)
    residuals = torch.eye(3, dtype=DOUBLE).repeat(6, 1)
    with reference.record(model) as rec:
        (model(rows) * residuals).sum().backward()
    for tokens in Truth(model, rec, [None]).tokens.values():
        per_token = torch.einsum("to,ti->toi", tokens.g[0], tokens.a).flatten(1)
        factors = reference.factors_of(tokens)
        assert relative(torch.kron(factors.G, factors.A), moment(per_token)) < 1e-12


def random_factor(out, tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, -3, tokens, dtype=DOUBLE)
    g = torch.randn(tokens, out, generator=generator, dtype=DOUBLE) * scales[:, None]
    return g, generator


@pytest.mark.parametrize("p", [-1.0, -0.5, 0.5, 1.0])
@pytest.mark.parametrize("kappa", [None, 1e6, 30.0])
@pytest.mark.parametrize("tokens", [7, 33])
def test_section_3_is_section_2(tokens, kappa, p):
    """The Woodbury form with clipping against the dense power, T below and above `out`."""
    out, lam = 19, 1e-3
    g, generator = random_factor(out, tokens)
    U = g.T / tokens**0.5
    Y = torch.randn(out, 4, generator=generator, dtype=DOUBLE)
    s, Q = torch.linalg.eigh(U.T @ U)
    floor = 0.0 if kappa is None else float(s.max() + lam) / kappa
    c, base = (s + lam).clamp_min(floor), max(lam, floor)
    keep = s > s.max() * 1e-13
    weights = torch.where(keep, (c**p - base**p) / torch.where(keep, s, 1.0), 0.0)
    woodbury = base**p * Y + U @ (Q * weights) @ Q.T @ U.T @ Y
    dense = reference.power(moment(g), p, lam, kappa)
    assert relative(woodbury, dense @ Y) < 1e-9
    B = torch.randn(tokens, 3, generator=generator, dtype=DOUBLE)
    pushed = U @ (Q * c**p) @ Q.T @ B
    assert relative(pushed, dense @ U @ B) < 1e-9


def test_clipped_counts_the_null_space():
    g, _ = random_factor(19, 7)
    lam, kappa = 1e-3, 30.0
    s = torch.linalg.eigvalsh(g @ g.T / 7)
    floor = float(s.max() + lam) / kappa
    assert reference.clipped(moment(g), lam, kappa) == int((s + lam < floor).sum()) + 12


def test_section_5_inverse():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 11, generator=generator, dtype=DOUBLE)
    tokens, lam = 8, 1e-4
    p = torch.softmax(logits, 1)
    P, D = p.T / tokens**0.5, torch.diag(p.sum(0) / tokens + lam)
    dinv = torch.linalg.inv(D)
    S = torch.eye(5, dtype=DOUBLE) - P.T @ dinv @ P
    assert float(torch.linalg.eigvalsh(S).min()) > 0
    formula = dinv + dinv @ P @ torch.linalg.inv(S) @ P.T @ dinv
    G = reference.true_fisher_of_softmax(logits, tokens)
    assert relative(formula, reference.power(G, -1, lam, None)) < 1e-10


def test_true_fisher_of_softmax_is_the_expectation_of_gradients():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, generator=generator, dtype=DOUBLE, requires_grad=True)
    expected = torch.zeros(5, 5, dtype=DOUBLE)
    for t in range(3):
        for label in range(5):
            log_p = torch.log_softmax(logits[t], 0)[label]
            (g,) = torch.autograd.grad(log_p, logits)
            expected += log_p.detach().exp() * torch.outer(g[t], g[t])
    assert relative(reference.true_fisher_of_softmax(logits.detach(), 7), expected / 7) < 1e-13


def test_ekfac_is_the_best_diagonal_in_the_kronecker_basis():
    model, x = linear_tokens(9, (4, 3))
    with reference.record(model) as rec:
        torch.tanh(model(x)).square().sum().backward()
    truth = Truth(model, rec, [None])
    tokens = truth.tokens["0"]
    per_token = torch.einsum("to,ti->toi", tokens.g[0], tokens.a).flatten(1)
    factors = reference.factors_of(tokens)
    mA, VA = torch.linalg.eigh(factors.A)
    mG, VG = torch.linalg.eigh(factors.G)
    basis = torch.kron(VG, VA)
    lam = 1e-3
    extra = lam * mG[:, None] + lam * mA[None] + lam**2
    damped = torch.diagonal(basis.T @ moment(per_token) @ basis) + extra.flatten()
    dW = model[0].weight.grad
    expected = basis @ torch.diag(1 / damped) @ basis.T @ dW.flatten()
    found = truth.ekfac({"0.weight": dW}, Damping(lam, lam, None))["0.weight"]
    assert relative(found, expected.reshape(3, 4)) < 1e-11


def test_a_module_called_twice_adds_its_tokens():
    model = models.seeded(models.Twice, DOUBLE)
    x = torch.randn(5, 6, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    with reference.record(model) as rec:
        model(x).square().sum().backward()
    truth = Truth(model, rec, [None])
    assert truth.tokens["shared"].count == 10
    assert truth.tokens["head"].count == 5
    own = truth.own_gradient(1)
    assert relative(own["shared.weight"], model.shared.weight.grad) < 1e-13
    assert relative(own["shared.bias"], model.shared.bias.grad) < 1e-13


def test_comparison_catches_what_it_should():
    good = {"w": torch.ones(3, dtype=DOUBLE)}
    reference.assert_close({"w": torch.ones(3)}, good, 1e-12)
    for wrong in ({"w": torch.full((3,), float("nan"))}, {"w": torch.ones(3) * 1.1}, {}):
        with pytest.raises(AssertionError):
            reference.assert_close(wrong, good, 1e-3)
    with pytest.raises(AssertionError, match="nothing to compare"):
        reference.assert_close(good, {}, 1.0)
