"""Hooks in the situations that usually break them."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fisher_lab import KFACNaturalGradient
from fisher_lab.curvature.errors import CurvatureError, LayerError, LossError


def squared(outputs, batch):
    return outputs.square().sum(dim=-1) / 2


class Net(nn.Module):
    def __init__(self, inplace: bool = False, reentrant: bool | None = None) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)
        self.act, self.reentrant = nn.ReLU(inplace=inplace), reentrant

    def body(self, x):
        return self.second(self.act(self.first(x)))

    def forward(self, x):
        if self.reentrant is None:
            return self.body(x)
        return checkpoint(self.body, x.requires_grad_(), use_reentrant=self.reentrant)


def build(**settings) -> Net:
    torch.manual_seed(0)
    return Net(**settings).double()


def batch() -> torch.Tensor:
    return torch.randn(7, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def products(model: nn.Module) -> dict[str, torch.Tensor]:
    kfac = KFACNaturalGradient(track_diagonal=False)
    kfac.collect_kfac_factors(model, batch(), loss=squared, n_labels=7)
    assert {f.tokens for f in kfac.kfac_factors.values()} == {7}
    vectors = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    return kfac.compute_fisher_vector_product(vectors, model)


@pytest.mark.parametrize(
    "settings",
    [{"inplace": True}, {"reentrant": False}, {"reentrant": True}],
    ids=["in-place activation", "checkpoint", "re-entrant checkpoint"],
)
def test_the_same_factors_as_the_plain_model(settings):
    plain, other = products(build()), products(build(**settings))
    for name, value in plain.items():
        torch.testing.assert_close(other[name], value, rtol=1e-12, atol=1e-14)


def test_reentrant_checkpoint_leaves_the_gradients_of_the_caller():
    model = build(reentrant=True)
    marks = {n: torch.full_like(p, 3.0) for n, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.grad = marks[name]
    products(model)
    assert all(p.grad is marks[n] for n, p in model.named_parameters())


def test_an_input_changed_in_place_afterwards_is_an_error():
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            hidden = x * 2
            out = self.linear(hidden.detach())
            return out + hidden.detach().add_(1.0)

    with pytest.raises(LayerError, match=r"linear.*in place"):
        products(Changing().double())


def test_autocast_accumulates_in_the_core_dtype():
    model = build().float()
    x = batch().float()
    kfac = KFACNaturalGradient(track_diagonal=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kfac.collect_kfac_factors(model, x, loss=squared, n_labels=7)
    factors = kfac.kfac_factors["first"]
    assert factors.G.columns.data.dtype == torch.bfloat16
    augmented = torch.cat([x, torch.ones(7, 1)], dim=1).double()
    torch.testing.assert_close(factors.A.matrix, augmented.T @ augmented / 7)


@pytest.mark.parametrize("ekfac", [False, True])
def test_autocast_around_everything_changes_nothing(ekfac):
    """Factors and their application keep their own precision; the forward pass is outside."""
    model, x = build().float(), batch().float()
    kind = {"core_dtype": "float32", "apply_dtype": "float32"}
    results = []
    for inside in (False, True):
        kfac = KFACNaturalGradient(damping=1e-3, woodbury_dtype="bf16", ekfac=ekfac, **kind)
        with kfac.capture(model):
            loss = squared(model(x), None).sum()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            kfac.collect_kfac_factors(
                model, x, loss=loss, n_labels=7, loss_reduction="sum", keep_gradient=True
            )
            own = kfac.own_gradients(model)
            logdet, top = kfac.log_determinant(), kfac.top_eigenvalues(2)
            found = {
                "own": own,
                "natural": kfac.compute_natural_gradient(None, model),
                "general": kfac.compute_natural_gradient(own, model),
                "product": kfac.compute_fisher_vector_product(own, model),
                "half": kfac.compute_powered_natural_gradient(own, model, -0.5),
                "numbers": {
                    n: torch.tensor([f.storage_error or 0.0, logdet[n], *top[n].tolist()])
                    for n, f in kfac.kfac_factors.items()
                },
            }
        results.append(found)
    for what, values in results[0].items():
        for name, value in values.items():
            assert torch.equal(value, results[1][what][name]), (what, name)


@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="needs torch 2.6")
@pytest.mark.parametrize("how", ["block", "in place", "wrapper", "captured", "captured wrapper"])
def test_compiled_parts_run_as_they_were_written(how):
    plain = products(build())
    torch._dynamo.reset()
    model = build()
    if how == "in place":
        model.compile(backend="eager")
    elif "wrapper" in how:
        model = torch.compile(model, backend="eager")
    else:
        model.first = torch.compile(model.first, backend="eager")
    model(batch())  # compiled now, without hooks
    kfac = KFACNaturalGradient(track_diagonal=False)
    if "captured" in how:
        with kfac.capture(model):
            loss = squared(model(batch()), None).sum()
        kfac.collect_kfac_factors(model, batch(), loss, n_labels=7, loss_reduction="sum")
    else:
        kfac.collect_kfac_factors(model, batch(), loss=squared, n_labels=7)
    inner = getattr(model, "_orig_mod", model)
    vectors = {n: torch.ones_like(p) for n, p in inner.named_parameters()}
    found = kfac.compute_fisher_vector_product(vectors, model)
    assert {n.replace("._orig_mod", "") for n in kfac.kfac_factors} == {"first", "second"}
    for name, value in found.items():
        expected = plain[name.replace("._orig_mod", "")]
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)


def test_a_captured_pass_without_a_call_says_what_to_do():
    model = build()
    kfac = KFACNaturalGradient()
    with kfac.capture(model):
        loss = squared(build()(batch()), None).sum()
    with pytest.raises(LossError, match=r"0 forward passes.*compiled model.*_orig_mod"):
        kfac.collect_kfac_factors(model, batch(), loss, n_labels=7)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("end", ["never collected", "failed", "captured again", "own pass"])
def test_no_hook_of_a_reentrant_capture_stays(end):
    model = build(reentrant=True)
    kfac = KFACNaturalGradient(track_diagonal=False)
    with kfac.capture(model) as recording:
        loss = squared(model(batch()), None).sum()
    assert hooks(model) == 0, "the replay adds its own"
    seen = len(recording.outputs), len(recording.inputs), recording.rows.count
    model(batch())
    assert (len(recording.outputs), len(recording.inputs), recording.rows.count) == seen
    if end == "never collected":
        return
    if end == "failed":
        with pytest.raises(CurvatureError, match="not finite"):
            kfac.collect_kfac_factors(model, batch(), loss * float("nan"), n_labels=7)
    elif end == "captured again":
        with kfac.capture(model):
            loss = squared(model(batch()), None).sum()
        kfac.collect_kfac_factors(model, batch(), loss, n_labels=7)
    else:
        kfac.collect_kfac_factors(model, batch(), loss=squared, n_labels=7)
    assert hooks(model) == 0


def test_layers_that_read_the_very_same_tensor_share_one_factor():
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(4, 3, bias=False), nn.Linear(4, 2, bias=False)
            self.v = nn.Linear(4, 2)
            self.other = nn.Linear(4, 2, bias=False)

        def forward(self, x):
            parts = [self.q(x), self.k(x), self.v(x), self.other(x * 1.0)]
            return torch.cat(parts, dim=1)

    model = Branches().double()
    kfac = KFACNaturalGradient(track_diagonal=False)
    kfac.collect_kfac_factors(model, [batch(), batch()], loss=squared, n_labels=7)
    a = {name: f.A for name, f in kfac.kfac_factors.items()}
    assert a["q"] is a["k"]
    assert a["v"] is not a["q"]
    assert a["other"] is not a["q"]
    torch.testing.assert_close(a["other"].matrix, a["q"].matrix)
