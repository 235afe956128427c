"""One collector over the engines, and the unified analysis on a saved model directory."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from fisher_lab.analysis import AdvancedFisherCollector, UnifiedConfig, UnifiedModelAnalyzer
from fisher_lab.curvature import losses
from fisher_lab.curvature.errors import BatchError, CurvatureError
from fisher_lab.curvature.group_fisher.collector import FisherCollector
from fisher_lab.curvature.kfac.engine import KFACNaturalGradient
from fisher_lab.curvature.spectra.spectrum import FisherSpectral, SpectralConfig
from tests.capturing import Calls
from tests.curvature.spectra.reference import ARCHITECTURES, batch_of, rows_of, tiny


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_forward_pass_feeds_kfac_and_group_fisher(architecture):
    model, batch = tiny(architecture), batch_of(architecture)
    before = {key: value.clone() for key, value in batch.items()}
    calls = Calls(model)
    collector = AdvancedFisherCollector(damping=1e-3)
    summary = collector.collect(model, batch, "t")
    assert calls.count == 1
    assert summary["kfac_enabled"]
    assert summary["n_refreshes"] == 1
    # The same numbers as each engine by itself.
    alone = KFACNaturalGradient(damping=1e-3)
    model.eval()
    alone.collect_kfac_factors(model, batch)
    assert set(collector.kfac_factors) == set(alone.kfac_factors)
    rows = rows_of(model, [batch])
    parameters = dict(model.named_parameters())
    mean = {name: rows[name].mean(0).view(parameters[name].shape) for name in rows}
    scale = max(float(value.abs().max()) for value in mean.values())
    for name, gradient in collector.gradients.items():
        torch.testing.assert_close(gradient, mean[name], rtol=1e-5, atol=1e-7 * scale)
    wanted = alone.compute_natural_gradient(collector.gradients, model)
    found = collector.natural_gradient(model)
    for name in wanted:
        error = float((found[name] - wanted[name]).norm())
        assert error <= 1e-4 * float(wanted[name].norm()) + 1e-9
    group = FisherCollector("batch")
    group.collect(model, batch, "t")
    for name, value in group.fisher_mean["t"].items():
        torch.testing.assert_close(
            collector.group.fisher_mean["t"][name], value, rtol=1e-5, atol=1e-10 * scale**2
        )
    assert all(torch.equal(batch[key], before[key]) for key in before)
    json.dumps(summary, allow_nan=False)


@pytest.mark.parametrize("unit", ["token", "sequence"])
def test_the_cache_feeds_group_fisher_and_the_spectrum(unit, monkeypatch):
    model, batch = tiny("gpt2"), batch_of("gpt2")
    collector = AdvancedFisherCollector(use_kfac=False, group_unit=unit, cache_gradients=True)
    summary = collector.collect(model, batch, "t")
    assert not summary["kfac_enabled"]
    assert summary["kfac_factors"] == {}
    assert summary["cached_samples"] == {"token": 7, "sequence": 3}[unit]
    alone = FisherCollector(unit)
    alone.collect(model, batch, "t")
    for name, value in alone.fisher_mean["t"].items():
        torch.testing.assert_close(
            collector.group.fisher_mean["t"][name], value, rtol=1e-12, atol=1e-18
        )
    config = SpectralConfig(sample_unit=unit)
    fresh = FisherSpectral(config).compute_fisher_spectrum(model, batch)
    calls, run = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append(1) or run(*a, **k))
    engine = FisherSpectral(config, gradient_cache=collector.gradient_cache)
    found = engine.compute_fisher_spectrum(model, batch)
    assert calls == []
    assert found["per_block"] == fresh["per_block"]
    assert found["metadata"]["cache_exact"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_documented_use_of_the_cache_is_exact(architecture):
    """As in docs/accumulation.md: the spectrum with its defaults, float32, products included."""
    model, batch = tiny(architecture, tied=False).float(), batch_of(architecture)
    collector = AdvancedFisherCollector(damping=1e-4, group_unit="token", cache_gradients=True)
    collector.collect(model, batch)
    engine = FisherSpectral(gradient_cache=collector.gradient_cache)
    found = engine.compute_fisher_spectrum(model, batch)
    fresh = FisherSpectral().compute_fisher_spectrum(model, batch)
    assert found["metadata"]["gradient_source"] == "cache"
    assert found["metadata"]["factored_weights"] == fresh["metadata"]["factored_weights"]
    assert found["metadata"]["factored_weights"]
    assert found["per_block"] == fresh["per_block"]
    assert found["global"] == fresh["global"]


def test_without_a_cache_the_spectrum_goes_on_by_itself():
    model, batch = tiny("gpt2"), batch_of("gpt2")
    collector = AdvancedFisherCollector()
    collector.collect(model, batch)
    assert collector.gradient_cache.per_sample_gradients is None
    engine = FisherSpectral(gradient_cache=collector.gradient_cache)
    result = engine.compute_fisher_spectrum(model, batch)
    assert result["metadata"]["gradient_source"] == "backward"


def test_factors_are_refreshed_as_often_as_asked():
    model, batch = tiny("gpt2"), batch_of("gpt2")
    collector = AdvancedFisherCollector(kfac_update_freq=2)
    summary = collector.collect(model, [batch] * 5)
    assert (summary["n_batches"], summary["n_refreshes"]) == (5, 3)


def test_arguments_reach_kfac():
    collector = AdvancedFisherCollector(
        True, damping=1e-3, ema_decay=0.5, use_gpu_eigh=False, kfac_policy="small_only"
    )
    handler = collector.kfac_handler
    assert handler.ema_decay == 0.5
    assert handler.settings.numerics.on_host
    assert handler.settings.lam_A == 1e-3
    assert handler.settings.policy == "small_only"
    assert handler.settings.fisher == "true"


def test_true_fisher_and_a_callers_loss():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    batch = (torch.randn(6, 4), torch.tensor([0, 1, 2, 2, 1, 0]))
    collector = AdvancedFisherCollector(True, loss_fn=losses.CrossEntropy())
    summary = collector.collect(model, batch)
    assert set(summary["kfac_factors"]) == {"0", "2"}
    alone = KFACNaturalGradient(fisher="true")
    alone.collect_kfac_factors(model, batch, loss=losses.CrossEntropy())
    wanted = alone.compute_natural_gradient(collector.gradients, model)
    found = collector.natural_gradient(model)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-6)


def test_an_empty_batch_is_refused_whole():
    model, batch = tiny("gpt2"), batch_of("gpt2")
    nothing = {key: value[:0] for key, value in batch.items()}
    for unit in ("batch", "token"):
        collector = AdvancedFisherCollector(group_unit=unit)
        for empty in ([], nothing, [batch, nothing]):
            with pytest.raises(BatchError, match=r"^batch: empty; allowed: .*$"):
                collector.collect(model, empty)
        assert collector.summary()["n_batches"] == 0
        assert collector.group.tasks == []


@pytest.mark.parametrize("cached", [False, True])
def test_forward_passes_are_as_many_as_documented(cached):
    """docs/accumulation.md: 1 + B a batch, and with the cache one more, without a graph."""
    model, batch = tiny("gpt2"), batch_of("gpt2")
    batches = [batch, {key: value[:2] for key, value in batch.items()}]
    calls = Calls(model)
    collector = AdvancedFisherCollector(group_unit="token", cache_gradients=cached)
    collector.collect(model, batches)
    assert calls.count == (1 + 3 + cached) + (1 + 2 + cached)


def test_what_cannot_be_done_says_why():
    with pytest.raises(CurvatureError, match="kfac_update_freq: 0"):
        AdvancedFisherCollector(kfac_update_freq=0)
    with pytest.raises(CurvatureError, match="use_kfac: False"):
        AdvancedFisherCollector(use_kfac=False).natural_gradient(tiny("gpt2"))
    with pytest.raises(CurvatureError, match="nothing has been collected"):
        AdvancedFisherCollector().natural_gradient(tiny("gpt2"))


@pytest.fixture(scope="module")
def saved_gpt2(tmp_path_factory):
    """With its tokenizer, saved as any model on the hub is."""
    directory = tmp_path_factory.mktemp("gpt2")
    words = {"<unk>": 0, "the": 1, "a": 2, "of": 3, "is": 4, "in": 5, "to": 6, "and": 7, ".": 8}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>", eos_token="."
    ).save_pretrained(directory)
    tiny("gpt2", vocab_size=len(words), n_positions=16).float().save_pretrained(directory)
    return directory


def test_integration_test_of_the_notes(saved_gpt2):
    config = UnifiedConfig(
        model_paths=[str(saved_gpt2)], compute_advanced_fisher_metrics=True, batch_size=32,
        seq_len=16,
    )  # fmt: skip
    analyzer = UnifiedModelAnalyzer(config)
    results = analyzer.analyze_models([{"path": str(saved_gpt2)}])
    assert "advanced_fisher" in results
    assert results["advanced_fisher"]["kfac_enabled"]
    assert len(results["advanced_fisher"]["kfac_factors"]) > 0
    for name, factors in results["advanced_fisher"]["kfac_factors"].items():
        assert factors["G_type"] in ("woodbury", "norm"), name
        assert factors["tokens"] == 32 * 16
    assert results["spectral"]["metadata"]["n_samples"] == 32
    assert results["group_fisher"]["default"]["token_total"] == 32 * 16
    assert all(results["lanczos"]["top"]["converged"])
    assert results["models"][str(saved_gpt2)]["loss"] == results["loss"]
    json.dumps(results["comparison"], allow_nan=False)


def test_several_models_are_compared():
    batch = batch_of("gpt2")
    analyzer = UnifiedModelAnalyzer(UnifiedConfig(batches=[batch], lanczos_k=2))
    results = analyzer.analyze_models(
        [{"name": str(seed), "model": tiny("gpt2", seed=seed)} for seed in (0, 1)]
    )
    assert [row["model"] for row in results["comparison"]] == ["0", "1"]
    first, second = results["comparison"]
    assert first["spectral_largest_eigenvalue"] != second["spectral_largest_eigenvalue"]
    assert first["kfac_layers"] == len(results["models"]["0"]["advanced_fisher"]["kfac_factors"])
    with pytest.raises(ValueError, match="a name of its own"):
        analyzer.analyze_models([{"name": "x"}, {"name": "x"}])
    with pytest.raises(ValueError, match="none given"):
        analyzer.analyze_models([])


def test_the_analysis_leaves_model_and_generator_alone():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 2)
    ).train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    batch = (torch.randn(6, 4), torch.tensor([0, 1, 0, 1, 1, 0]))
    config = UnifiedConfig(lanczos_k=2)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    loss = losses.CrossEntropy()
    result = UnifiedModelAnalyzer(config).analyze_model(model, [batch], loss)
    assert torch.equal(torch.rand(2), expected)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    wanted = nn.functional.cross_entropy(model.eval()(batch[0]), batch[1])
    assert result["loss"] == pytest.approx(wanted.item(), rel=1e-6)


def test_switched_off_methods_are_left_out():
    config = UnifiedConfig(
        batches=[batch_of("gpt2")], compute_spectrum=False, compute_lanczos=False,
        compute_advanced_fisher_metrics=False,
    )  # fmt: skip
    result = UnifiedModelAnalyzer(config).analyze_models([{"name": "m", "model": tiny("gpt2")}])
    assert not {"advanced_fisher", "group_fisher", "spectral", "lanczos"} & set(result)
