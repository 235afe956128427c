"""A cache of per-sample gradients gives what the uncached call gives, and is never stale."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fisher_lab.curvature import losses
from fisher_lab.curvature.errors import CurvatureError
from fisher_lab.curvature.spectra import per_sample_gradients
from fisher_lab.curvature.spectra.gradient_cache import GradientCache
from fisher_lab.curvature.spectra.spectrum import FisherSpectral, SpectralConfig
from tests.curvature.spectra.reference import (
    EXACT_MODES,
    assert_no_number,
    assert_same_spectrum,
    batch_of,
    reference_spectrum,
    spectrum,
    tiny,
)


@pytest.fixture
def backward_calls(monkeypatch):
    calls = []
    run = torch.autograd.grad
    monkeypatch.setattr(
        torch.autograd, "grad", lambda *a, **k: calls.append("grad") or run(*a, **k)
    )
    back = torch.Tensor.backward
    monkeypatch.setattr(
        torch.Tensor, "backward", lambda *a, **k: calls.append("backward") or back(*a, **k)
    )
    return calls


@pytest.mark.parametrize("mode", [*EXACT_MODES, "sketch"])
def test_cache_makes_no_backward_call_and_changes_no_bit(case, mode, backward_calls):
    config = SpectralConfig(chunk_size=4, storage_mode=mode)
    fresh = FisherSpectral(config).compute_fisher_spectrum(case.model, case.batch)
    cache = FisherSpectral(config).collect_gradients(case.model, case.batch)
    assert backward_calls
    backward_calls.clear()
    engine = FisherSpectral(config, gradient_cache=cache)
    again = engine.compute_fisher_spectrum(case.model, case.batch)
    assert backward_calls == []
    assert again["per_block"] == fresh["per_block"]
    assert again["global"] == fresh["global"]
    assert again["metadata"]["gradient_source"] == "cache"


def test_cache_serves_a_subsample_and_other_blocks(case, backward_calls):
    cache = FisherSpectral(SpectralConfig()).collect_gradients(case.model, case.batch)
    backward_calls.clear()
    engine = FisherSpectral(SpectralConfig(), gradient_cache=cache)
    found = engine.compute_fisher_spectrum(case.model, case.batch, 5, "module")
    assert backward_calls == []
    assert_same_blocks(found, spectrum(case.model, case.batch, n_samples=5, structure="module"))


def assert_same_blocks(found, fresh):
    noise = 1e-20 * fresh["global"]["largest_eigenvalue"]
    for block, record in fresh["per_block"].items():
        if (record["largest_eigenvalue"] or 0.0) > noise:
            assert_same_spectrum(found["per_block"][block]["eigenvalues"], record["eigenvalues"])


def test_cache_of_plain_tensors_and_caches_without_gradients(case, backward_calls):
    names = dict(case.model.named_parameters())
    rows = {name: case.rows["token"][name].view(-1, *names[name].shape) for name in names}
    backward_calls.clear()
    engine = FisherSpectral(gradient_cache=SimpleNamespace(per_sample_gradients=rows))
    found = engine.compute_fisher_spectrum(case.model, case.batch, block_structure="full")
    assert backward_calls == []
    wanted = reference_spectrum(case.rows["token"], list(names))
    assert_same_spectrum(found["global"]["eigenvalues"], wanted)
    for empty in (SimpleNamespace(), SimpleNamespace(per_sample_gradients=None), GradientCache()):
        again = FisherSpectral(gradient_cache=empty).compute_fisher_spectrum(
            case.model, case.batch, block_structure="full"
        )
        assert again["metadata"]["gradient_source"] == "backward"


def test_a_cache_of_another_unit_or_size_is_an_error(case):
    cache = FisherSpectral(SpectralConfig(sample_unit="sequence")).collect_gradients(
        case.model, case.batch
    )
    with pytest.raises(CurvatureError, match="sample_unit 'sequence'"):
        FisherSpectral(gradient_cache=cache).compute_fisher_spectrum(case.model, case.batch)
    name, parameter = next(iter(case.model.named_parameters()))
    short = SimpleNamespace(per_sample_gradients={name: torch.zeros(1, parameter.numel())})
    with pytest.raises(CurvatureError, match="1 rows of"):
        FisherSpectral(gradient_cache=short).compute_fisher_spectrum(case.model, case.batch)


@pytest.mark.parametrize("mode", EXACT_MODES)
@pytest.mark.parametrize("linear_gram", ["auto", "never"])
@pytest.mark.parametrize("center", [False, True])
def test_a_cache_with_products_serves_every_engine(case, mode, linear_gram, center, monkeypatch):
    monkeypatch.setattr(per_sample_gradients, "factored_is_cheaper", lambda *_: True)
    collecting = SpectralConfig(chunk_size=4)
    cache = FisherSpectral(collecting).collect_gradients(case.model, case.batch)
    assert any(chunk.factored for chunk in cache.chunks)
    config = SpectralConfig(chunk_size=4, storage_mode=mode, linear_gram=linear_gram)
    arguments = (case.model, case.batch, None, "module", center)
    fresh = FisherSpectral(config).compute_fisher_spectrum(*arguments)
    again = FisherSpectral(config, gradient_cache=cache).compute_fisher_spectrum(*arguments)
    assert again["metadata"]["gradient_source"] == "cache"
    assert again["metadata"]["cache_exact"] is (config == collecting)
    if config == collecting:
        assert again["per_block"] == fresh["per_block"]
    assert_same_blocks(again, fresh)


def test_a_cached_subsample_is_exact_where_it_was_collected_so(case):
    config = SpectralConfig(chunk_size=2)
    fresh = FisherSpectral(config).compute_fisher_spectrum(case.model, case.batch, 5)
    for collected, exact in ((5, True), (None, False)):
        cache = FisherSpectral(config).collect_gradients(case.model, case.batch, collected)
        engine = FisherSpectral(config, gradient_cache=cache)
        again = engine.compute_fisher_spectrum(case.model, case.batch, 5)
        assert again["metadata"]["cache_exact"] is exact
        if exact:
            assert again["per_block"] == fresh["per_block"]
    other = FisherSpectral(SpectralConfig(chunk_size=3), gradient_cache=cache)
    found = other.compute_fisher_spectrum(case.model, case.batch)
    assert found["metadata"]["gradient_source"] == "cache"
    assert found["metadata"]["cache_exact"] is False


def test_a_parameter_that_a_cache_lacks_is_computed(case, caplog):
    names = dict(case.model.named_parameters())
    rows = {name: case.rows["token"][name] for name in names}
    left_out = next(name for name in BIG if name in rows)
    del rows[left_out]
    engine = FisherSpectral(gradient_cache=SimpleNamespace(per_sample_gradients=rows))
    found = engine.compute_fisher_spectrum(case.model, case.batch)
    fresh = FisherSpectral().compute_fisher_spectrum(case.model, case.batch)
    assert found["per_block"] == fresh["per_block"]
    assert found["metadata"]["gradient_source"] == "backward"
    assert caplog.messages == [
        f"gradient_cache: no gradients of {left_out}; the gradients are computed anew"
    ]
    # What the cache says it covered, and is not there, is what the loss does not reach.
    covered = SimpleNamespace(per_sample_gradients=rows, parameters=frozenset(names))
    found = FisherSpectral(gradient_cache=covered).compute_fisher_spectrum(case.model, case.batch)
    assert found["metadata"]["gradient_source"] == "cache"


def test_a_cache_of_a_model_that_was_partly_frozen():
    model, batch = tiny("gpt2"), batch_of("gpt2")
    model.transformer.h[0].requires_grad_(False)
    cache = FisherSpectral().collect_gradients(model, batch)
    engine = FisherSpectral(gradient_cache=cache)
    found = engine.compute_fisher_spectrum(model, batch)
    assert found["metadata"]["cache_exact"]
    assert_no_number(found["per_block"]["transformer.h.0"])
    model.requires_grad_(True)
    found = engine.compute_fisher_spectrum(model, batch)
    assert found["metadata"]["gradient_source"] == "backward"
    assert found["per_block"] == FisherSpectral().compute_fisher_spectrum(model, batch)["per_block"]


@pytest.mark.parametrize("what", ["weight", "statistics"])
def test_a_stale_cache_is_left_aside(what, caplog):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).double()
    batch = (torch.randn(5, 4).double(), torch.tensor([0, 1, 0, 1, 1]))
    loss = losses.CrossEntropy()
    cache = FisherSpectral(loss_fn=loss).collect_gradients(model, batch)
    engine = FisherSpectral(gradient_cache=cache, loss_fn=loss)
    assert engine.compute_fisher_spectrum(model, batch)["metadata"]["cache_exact"]
    with torch.no_grad():
        if what == "weight":
            # The last bit of one number.
            model[0].weight[0, 0] = torch.nextafter(model[0].weight[0, 0], torch.tensor(9.0))
        else:
            model(batch[0])
    found = engine.compute_fisher_spectrum(model, batch)
    assert found["metadata"]["gradient_source"] == "backward"
    fresh = FisherSpectral(loss_fn=loss).compute_fisher_spectrum(model, batch)
    assert found["per_block"] == fresh["per_block"]
    assert caplog.messages == [
        "gradient_cache: the model's weights have changed since it was collected; "
        "the gradients are computed anew"
    ]


BIG = (
    "transformer.h.0.mlp.c_fc.weight", "model.layers.0.mlp.up_proj.weight",
    "bert.encoder.layer.0.output.dense.weight", "encoder.block.0.layer.1.DenseReluDense.wo.weight",
)  # fmt: skip
