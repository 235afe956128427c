"""A block without a spectrum says why and carries no number."""

import pytest
import torch
from torch import nn

from fisher_lab.curvature import losses
from fisher_lab.curvature.spectra.spectrum import FisherSpectral
from tests.curvature.spectra.reference import (
    EXACT_MODES,
    assert_no_number,
    batch_of,
    spectrum,
    tiny,
)


@pytest.mark.parametrize("mode", [*EXACT_MODES, "sketch"])
def test_a_model_with_nothing_to_train_is_degenerate(mode):
    model, batch = tiny("gpt2").requires_grad_(False), batch_of("gpt2")
    result = spectrum(model, batch, storage_mode=mode)
    assert result["metadata"]["n_samples"] == 7
    for record in (*result["per_block"].values(), result["global"]):
        assert_no_number(record)
    assert {record["reason"] for record in result["per_block"].values()} == {"no gradient"}
    assert FisherSpectral().collect_gradients(model, batch).keys


def modules(frozen):
    """The spectrum of two used layers, of which one is frozen, and of one that is not used."""
    model = nn.ModuleDict(
        {"used": nn.Linear(3, 2), "idle": nn.Linear(3, 2), "ice": nn.Linear(2, 2)}
    )
    for name in frozen:
        model[name].requires_grad_(False)
    model.forward = lambda x: model["ice"](model["used"](x))
    batch = (torch.randn(4, 3), torch.tensor([0, 1, 1, 0]))
    engine = FisherSpectral(loss_fn=losses.CrossEntropy())
    return engine.compute_fisher_spectrum(model, batch, block_structure="module")


def test_a_loss_that_reaches_only_frozen_parameters_is_degenerate():
    result = modules(frozen=["used", "ice"])
    assert_no_number(result["per_block"]["idle"])
    assert_no_number(result["global"])


def test_unused_and_frozen_parameters_are_degenerate_and_left_out():
    result = modules(frozen=["ice"])
    assert_no_number(result["per_block"]["idle"])
    assert_no_number(result["per_block"]["ice"])
    assert result["global"]["n_blocks"] == 1
    assert result["global"]["trace"] == result["per_block"]["used"]["trace"]


def test_no_label_at_all_or_no_example_is_degenerate():
    model, batch = tiny("gpt2"), batch_of("gpt2")
    batch["labels"] = torch.full_like(batch["labels"], -100)
    result = spectrum(model, batch)
    for record in (*result["per_block"].values(), result["global"]):
        assert_no_number(record)
    for empty in ({key: value[:0] for key, value in batch.items()}, []):
        assert_no_number(spectrum(model, empty)["global"])


def test_one_sample_and_one_parameter():
    model = nn.Linear(1, 2, bias=False).double()
    batch = (torch.ones(1, 1).double(), torch.tensor([0]))
    engine = FisherSpectral(loss_fn=losses.CrossEntropy())
    two = engine.compute_fisher_spectrum(model, batch)["global"]
    assert two["eigenvalues"] == [two["trace"]]
    assert two["spectral_gap"] == two["largest_eigenvalue"]
    assert_no_number(engine.compute_fisher_spectrum(model, batch, None, "full", True)["global"])

    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1).double())

        def forward(self, x):
            return torch.cat([self.scale * x, -self.scale * x], dim=1)

    single = engine.compute_fisher_spectrum(One(), batch)
    assert_no_number(single["global"])
    assert single["per_block"]["model"]["reason"] == "N = P = 1"


def test_non_finite_gradients_are_degenerate_in_every_mode():
    model, batch = tiny("gpt2"), batch_of("gpt2")
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight[0, 0] = float("nan")
    for mode in (*EXACT_MODES, "sketch"):
        result = spectrum(model, batch, storage_mode=mode)
        assert_no_number(result["per_block"]["transformer.h.0"])
        assert "non-finite" in result["per_block"]["transformer.h.0"]["reason"]


def test_a_failing_solver_is_regularised_once_then_given_up(monkeypatch):
    model, batch = tiny("gpt2"), batch_of("gpt2")
    plain = spectrum(model, batch, structure="full")["global"]
    run, failures = torch.linalg.eigvalsh, [1]

    def flaky(matrix):
        if failures and failures.pop():
            raise torch.linalg.LinAlgError("did not converge")
        return run(matrix)

    monkeypatch.setattr(torch.linalg, "eigvalsh", flaky)
    result = spectrum(model, batch, structure="full")
    n = result["metadata"]["n_samples"]
    used = result["metadata"]["regularization_used"]
    assert used == pytest.approx(1e-10 * plain["trace"] / n)
    assert result["global"]["largest_eigenvalue"] == pytest.approx(plain["largest_eigenvalue"])
    failures.extend([1] * 2)
    given_up = spectrum(model, batch, structure="full")
    assert_no_number(given_up["global"])
    assert "did not converge" in given_up["per_block"]["full"]["reason"]


def test_a_failing_svd_is_degenerate(monkeypatch):
    def fail(*_args, **_kwargs):
        raise torch.linalg.LinAlgError("svd did not converge")

    monkeypatch.setattr(torch, "svd_lowrank", fail)
    assert_no_number(spectrum(tiny("gpt2"), batch_of("gpt2"), storage_mode="sketch")["global"])
