"""`tied=sum`: one Kronecker product for the two blocks of a tied weight, against their sum."""

# pyright: reportAttributeAccessIssue=false

import pytest
import torch
from torch import Tensor, nn

from fisher_lab.curvature.losses import CrossEntropy
from tests import models, reference
from tests.capturing import engine, random_like
from tests.reference import Damping

DOUBLE = torch.float64
WORDS, WIDTH = 5, 4


class Tied(nn.Module):
    """A token's embedding, something nonlinear, and the same table as head; `bias` in the head."""

    def __init__(self, bias: bool, scale: float) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH)
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=bias)
        self.head.weight = self.table.weight
        self.scale = scale

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.scale * torch.tanh(self.inner(self.table(ids))))


def collected(bias: bool, scale: float = 3.0, **settings):
    """An engine with pooled factors, and the model's two blocks of the weight, from hooks.

    Each block is `sum_t vec(g_t a_t^T) vec(.)^T / N` with the average outer products of both sides,
    as K-FAC takes it: dense, `[V (d + 1)]^2` with a bias.
    """
    torch.manual_seed(3)
    model, ids = Tied(bias, scale).double(), torch.randint(WORDS, (4, 6))
    labels = torch.randint(WORDS, (4, 6))
    kfac = engine("all", Damping(1e-3, 1e-3, None), tied="sum", track_diagonal=False, **settings)
    with reference.record(model) as rec:
        logits = model(ids)
        nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), reduction="sum"
        ).backward()
    calls = {call.name: call for call in rec.calls}
    a, g = calls["head"].input.flatten(0, 1), calls["head"].gradients[0].flatten(0, 1)
    a = nn.functional.pad(a, (0, 1), value=1.0) if bias else a
    if settings.get("fisher") == "true":
        p = torch.softmax(logits.detach().flatten(0, 1), -1)
        G = torch.diag(p.sum(0)) - p.T @ p
    else:
        G = g.T @ g
    N = labels.numel()
    head = torch.kron(G / N, a.T @ a / N)
    g = calls["table"].gradients[0].flatten(0, 1)
    if settings.get("fisher") == "true":
        g = torch.cat(expected_gradients(model, ids))
    wide = torch.zeros(WIDTH + bias, WIDTH + bias, dtype=DOUBLE)
    wide[:WIDTH, :WIDTH] = g.T @ g / N
    counts = torch.bincount(ids.flatten(), minlength=WORDS).double()
    table = torch.kron(torch.diag(counts / N), wide)
    kfac.collect_kfac_factors(model, (ids, labels), CrossEntropy())
    return kfac, model, head, table


def expected_gradients(model, ids):
    """Gradients at the embedding for every position and class: sqrt(p) times that of -log p."""
    with reference.record(model) as rec:
        for nats in torch.log_softmax(model(ids).flatten(0, 1), -1).flatten():
            (-nats.detach().exp().sqrt() * nats).backward(retain_graph=True)
    (call,) = (call for call in rec.calls if call.name == "table")
    return [g.flatten(0, 1) for g in call.gradients]


def block_of(kfac, model, bias: bool) -> Tensor:
    """The engine's block of the weight, column by column of its Fisher-vector product."""
    columns = []
    for i in range(WORDS):
        for j in range(WIDTH + bias):
            y = torch.zeros(WORDS, WIDTH + 1, dtype=DOUBLE)
            y[i, j] = 1.0
            given = {"table.weight": y[:, :WIDTH]} | ({"head.bias": y[:, WIDTH]} if bias else {})
            found = kfac.compute_fisher_vector_product(given, model)
            parts = [found["table.weight"]] + ([found["head.bias"][:, None]] if bias else [])
            columns.append(torch.cat(parts, 1).flatten())
    return torch.stack(columns, 1)


def best_product(block: Tensor, rows: int) -> Tensor:
    """The nearest Kronecker product in the Frobenius norm (Van Loan and Pitsianis 1993)."""
    m = len(block) // rows
    turned = block.reshape(rows, m, rows, m).permute(0, 2, 1, 3).reshape(rows**2, m**2)
    u, s, v = torch.linalg.svd(turned)
    return torch.kron(s[0] * u[:, 0].reshape(rows, rows), v[0].reshape(m, m))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("more", [{}, {"kfac_policy": "small_only"}, {"fisher": "true"}])
def test_the_product_has_the_trace_of_the_sum_and_is_near_it(bias, more):
    settings = {k: v for k, v in more.items() if k != "kfac_policy"}
    kfac, model, head, table = collected(bias, **settings)
    total, found = head + table, block_of(kfac, model, bias)
    assert float(found.trace()) == pytest.approx(float(total.trace()), rel=1e-10)
    assert kfac.trace()["head"] == pytest.approx(float(total.trace()), rel=1e-10)
    best = reference.relative(best_product(total, WORDS), total)
    error = reference.relative(found, total)
    # The head alone, and the sums of unlike quantities that there were before.
    alone = reference.relative(head, total)
    assert best <= error < min(1.5 * best, 0.7 * alone)


def test_it_does_not_depend_on_the_units_of_either_side():
    """Activations in other units, and a head that compensates: the two blocks scale alike."""
    found = []
    for fisher in ("empirical", "true"):
        kfac, model, head, table = collected(False, fisher=fisher)
        t_h, t_e = float(head.trace()), float(table.trace())
        w = t_h / (t_h + t_e)
        g_h = head.reshape(WORDS, WIDTH, WORDS, WIDTH).diagonal(dim1=1, dim2=3).sum(-1) / t_h
        a_h = head.reshape(WORDS, WIDTH, WORDS, WIDTH).diagonal(dim1=0, dim2=2).sum(-1) / t_h
        a_e = table.reshape(WORDS, WIDTH, WORDS, WIDTH).diagonal(dim1=1, dim2=3).sum(-1) / t_e
        g_e = table.reshape(WORDS, WIDTH, WORDS, WIDTH).diagonal(dim1=0, dim2=2).sum(-1) / t_e
        expected = torch.kron(w * g_h + (1 - w) * a_e, w * a_h + (1 - w) * g_e) * (t_h + t_e)
        found.append(reference.relative(block_of(kfac, model, False), expected))
    assert max(found) < 1e-12


def test_where_the_embedding_has_no_gradient_it_is_the_heads():
    """And the head's damping means what it means without the embedding."""
    case = models.CASES["gpt2_tied"]
    model, batch = case.model(DOUBLE), case.batch("few")
    results = []

    def faint(module, inputs, output):
        output.register_hook(lambda g: 1e-9 * g)

    handle = model.transformer.wte.register_forward_hook(faint)
    for tied in ("head", "sum"):
        kfac = engine("all", Damping(1e-3, 1e-2, None), tied=tied, track_diagonal=False)
        kfac.collect_kfac_factors(model, batch)
        vectors = random_like({n: p.detach() for n, p in model.named_parameters()})
        results.append(kfac.compute_natural_gradient(vectors, model)["transformer.wte.weight"])
    handle.remove()
    assert reference.relative(results[1], results[0]) < 1e-8
