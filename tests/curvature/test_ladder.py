"""The ladder's rungs against dense float64: one damping, ever coarser matrices."""

import pytest
import torch
from torch import Tensor, nn

from fisher_lab.config.kfac import KFACSettings
from fisher_lab.curvature.ladder import RUNGS, Ladder, ladder
from fisher_lab.curvature.losses import CrossEntropy
from tests import models, reference

DOUBLE = torch.float64
LAYERS = {"first": ("first.weight", "first.bias"), "second": ("second.weight", "second.bias")}


def collected(fisher: str, damping: float) -> tuple[Ladder, nn.Module, dict[str, Tensor]]:
    model, batch = models.seeded(models.MLP, DOUBLE), models.rows_batch(6, seed=3)
    settings = KFACSettings(fisher=fisher, damping=1e-2, max_condition_number=None)
    found = ladder(model, [batch], settings, damping=damping, loss_fn=CrossEntropy())
    return found, model, batch


def rows_of(model: nn.Module, batch: dict[str, Tensor], fisher: str) -> dict[str, Tensor]:
    """Parameter -> a row for each term of `N F`: of each label, or of each class, by its root."""
    rows = {name: [] for name, _ in model.named_parameters()}
    for x, y in zip(batch["x"], batch["labels"], strict=True):
        log_p = torch.log_softmax(model(x[None])[0], -1)
        terms = [-log_p[y]]
        if fisher == "true":
            terms = [-nats.detach().exp().sqrt() * nats for nats in log_p]
        for term in terms:
            grads = torch.autograd.grad(term, list(model.parameters()), retain_graph=True)
            for name, g in zip(rows, grads, strict=True):
                rows[name].append(g.flatten())
    return {name: torch.stack(found) for name, found in rows.items()}


def joined(named: dict[str, Tensor], names) -> Tensor:
    return torch.cat([named[n].flatten() for n in names])


def layer_matrix(J: dict[str, Tensor], names) -> Tensor:
    """Rows of a layer's gradients as `[R, out, in + 1]`."""
    weight, bias = (J[n] for n in names)
    return torch.cat([weight.reshape(len(weight), bias.shape[1], -1), bias[..., None]], 2)


def by_layer(model, batch, J, names) -> tuple[Tensor, Tensor, Tensor]:
    """K-FAC's product, EKFAC's matrix and the rows of one layer, `vec` of `[out, in + 1]`."""
    x = batch["x"]
    a = x if names[0].startswith("first") else torch.tanh(model.first(x)).detach()
    a = nn.functional.pad(a, (0, 1), value=1.0)
    rows = layer_matrix(J, names)
    # One row is g a^T: with the bias's column, g itself is the last one.
    g = rows[..., -1]
    N = len(x)
    A, G = a.T @ a / N, g.T @ g / N
    V = torch.kron(torch.linalg.eigh(G)[1], torch.linalg.eigh(A)[1])
    S = (rows.flatten(1) @ V).square().sum(0) / N
    return torch.kron(G, A), V @ torch.diag(S) @ V.T, rows


@pytest.mark.parametrize("fisher", ["empirical", "true"])
@pytest.mark.parametrize("damping", [0.1, 10.0])
def test_every_rung_is_the_dense_one(fisher, damping):
    found, model, batch = collected(fisher, damping)
    N = len(batch["x"])
    loss = torch.nn.functional.cross_entropy(model(batch["x"]), batch["labels"])
    named = dict(model.named_parameters())
    b = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    J = rows_of(model, batch, fisher)
    parts = {layer: by_layer(model, batch, J, names) for layer, names in LAYERS.items()}
    trace = sum(float(kfac.trace()) for kfac, _, _ in parts.values())
    n = sum(p.numel() for p in named.values())
    assert found.mean_eigenvalue == pytest.approx(trace / n, rel=1e-10)
    lam = damping * trace / n
    assert found.lam == pytest.approx(lam, rel=1e-10)

    def solved(F: Tensor, y: Tensor) -> Tensor:
        return torch.linalg.solve(F + lam * torch.eye(len(F), dtype=DOUBLE), y)

    every = torch.cat([J[name] for name in named], 1)
    exact = solved(every.T @ every / N, joined(b, named))
    given = found.rungs["exact"].solution
    assert reference.relative(joined(given, named), exact) < 1e-6  # at a residual of 1e-10
    diagonal = found.rungs.get("diagonal")
    assert (diagonal is None) == (fisher == "true")
    if diagonal is not None:
        expected = joined(b, named) / (every.square().sum(0) / N + lam)
        assert reference.relative(joined(diagonal.solution, named), expected) < 1e-10
    expected = joined(b, named) / (lam + trace / n)
    assert reference.relative(joined(found.rungs["identity"].solution, named), expected) < 1e-10
    for layer, names in LAYERS.items():
        kfac, ekfac, rows = parts[layer]
        y = layer_matrix({n: b[n].flatten()[None] for n in names}, names).flatten()
        flat = rows.flatten(1)
        answers = {
            "blocks": flat.T @ flat / N, "ekfac_sequence": ekfac, "ekfac_token": ekfac,
            "kfac": kfac, "kfac_reduce": kfac,
        }  # fmt: skip
        for rung, F in answers.items():
            x = {n: found.rungs[rung].solution[n].flatten()[None] for n in names}
            error = reference.relative(layer_matrix(x, names).flatten(), solved(F, y))
            assert error < (1e-6 if rung == "blocks" else 1e-8), (rung, layer)


def test_how_near_is_told_over_all_and_by_layer():
    found, _, _ = collected("empirical", 1.0)
    assert found.layers == LAYERS
    assert list(found.rungs) == list(RUNGS)
    exact, kfac = (found.rungs[n].solution for n in ("exact", "kfac"))
    names = LAYERS["second"]
    x, y = joined(exact, names), joined(kfac, names)
    near = found.closeness("kfac", "second")
    assert near.error == pytest.approx(float((x - y).norm() / x.norm()))
    assert near.cosine == pytest.approx(float(x @ y / x.norm() / y.norm()))
    assert sum(found.closeness("kfac", layer).share for layer in LAYERS) == pytest.approx(1.0)
    whole = found.closeness("exact")
    assert (whole.error, whole.cosine) == (0.0, pytest.approx(1.0))
    assert found.rungs["exact"].residual < 1e-10


def test_a_tied_weight_is_one_block_and_nothing_of_the_model_changes():
    model = models.seeded(lambda: models.gpt2(layers=1), torch.float32).train()
    batch = models.language_batch((5, 3))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    found = ladder(model, [batch], KFACSettings(), damping=100.0)
    names = [n for layer in found.layers.values() for n in layer]
    assert len(names) == len(set(names))
    assert names.count("transformer.wte.weight") == 1
    assert "transformer.wpe.weight" not in names  # not covered
    assert model.training
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name])
        assert value.grad is None


def test_too_few_products_are_told():
    model, batch = models.seeded(models.MLP, DOUBLE), models.rows_batch(6, seed=3)
    found = ladder(
        model, [batch], KFACSettings(), damping=1e-3, max_products=3, loss_fn=CrossEntropy()
    )
    assert found.rungs["exact"].products == 3
    assert found.rungs["exact"].residual > 1e-10
