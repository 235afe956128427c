"""The Fisher spectrum against loops of one backward pass a sample (docs/math.md, section 8)."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fisher_lab.curvature import losses
from fisher_lab.curvature.errors import BatchError, CurvatureError
from fisher_lab.curvature.spectra import eigensolve, spill
from fisher_lab.curvature.spectra.blocks import architecture_of, parameter_blocks
from fisher_lab.curvature.spectra.per_sample_gradients import (
    PerSampleGradients,
    choose_factored,
    linear_cost,
)
from fisher_lab.curvature.spectra.samples import draw_samples
from fisher_lab.curvature.spectra.spectrum import FisherSpectral, GradientCache, SpectralConfig
from tests.curvature.spectra_support import (
    ARCHITECTURES,
    assert_same_spectrum,
    batch_of,
    reference_fisher,
    reference_rows,
    reference_spectrum,
    tiny,
)

EXACT_MODES = ("full", "chunked", "streaming")


def spectrum(model, batch, *, structure="layer", center=False, n_samples=None, **config):
    config = SpectralConfig(**{"chunk_size": 4, **config})
    return FisherSpectral(config).compute_fisher_spectrum(
        model, batch, n_samples, structure, center
    )


@pytest.fixture(scope="module", params=ARCHITECTURES)
def case(request):
    model, batch = tiny(request.param), batch_of(request.param)
    rows = {
        unit: reference_rows(model, batch, request.param, unit)[1] for unit in ("token", "sequence")
    }
    return SimpleNamespace(architecture=request.param, model=model, batch=batch, rows=rows)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("unit", ["token", "sequence"])
@pytest.mark.parametrize("mode", EXACT_MODES)
def test_every_block_matches_the_loops(case, mode, unit, center):
    result = spectrum(case.model, case.batch, storage_mode=mode, sample_unit=unit, center=center)
    blocks = parameter_blocks(case.model, "layer")
    assert set(result["per_block"]) == set(blocks)
    joined = []
    for block, names in blocks.items():
        record = result["per_block"][block]
        wanted = reference_spectrum(case.rows[unit], names, center=center)
        if float(wanted[0]) == 0.0:
            assert record["status"] == "degenerate"
            continue
        joined.append(wanted)
        assert_same_spectrum(record["eigenvalues"], wanted)
        trace = float(reference_fisher(case.rows[unit], names, center=center).trace())
        assert record["trace"] == pytest.approx(trace, rel=1e-10)
        assert record["largest_eigenvalue"] == pytest.approx(float(wanted[0]), rel=1e-10)
        assert record["spectral_gap"] == pytest.approx(
            float(wanted[0] - wanted[1]), rel=1e-7, abs=1e-12 * float(wanted[0])
        )
    union = torch.cat(joined).sort(descending=True).values
    assert_same_spectrum(result["global"]["eigenvalues"], union)


@pytest.mark.parametrize("structure", ["module", "parameter", "full"])
def test_every_structure_matches_the_explicit_matrix(case, structure):
    result = spectrum(case.model, case.batch, structure=structure, linear_gram="auto")
    noise = 1e-20 * result["global"]["largest_eigenvalue"]  # key biases: zero but for rounding
    for block, names in parameter_blocks(case.model, structure).items():
        wanted = torch.linalg.eigvalsh(reference_fisher(case.rows["token"], names)).flip(0)
        record = result["per_block"][block]
        if float(wanted[0]) <= noise:
            assert (record["largest_eigenvalue"] or 0.0) <= noise
            continue
        n, p = record["n_samples"], record["n_params"]
        assert p == sum(case.rows["token"][name].shape[1] for name in names)
        assert_same_spectrum(record["eigenvalues"], wanted[: min(n, p)])


def test_derived_numbers_follow_their_definitions(case):
    record = spectrum(case.model, case.batch, structure="full")["global"]
    names = list(case.rows["token"])
    values = reference_spectrum(case.rows["token"], names)
    p = sum(case.rows["token"][name].shape[1] for name in names)
    nonzero = values[values > max(len(values), p) * 2.0**-52 * values[0]]
    share = nonzero / nonzero.sum()
    assert record["n_nonzero"] == len(nonzero)
    assert record["effective_rank"] == pytest.approx(
        float((-(share * share.log()).sum()).exp()), rel=1e-9
    )
    assert record["condition_number"] == pytest.approx(float(nonzero[0] / nonzero[-1]), rel=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("unit", ["token", "sequence"])
@pytest.mark.parametrize("center", [False, True])
def test_products_give_the_gram_matrix_of_the_gradients(architecture, unit, center, monkeypatch):
    """Every linear layer forced onto the way without per-sample gradients, and spilled."""
    model, batch = tiny(architecture, tied=False), batch_of(architecture)
    monkeypatch.setattr(
        "fisher_lab.curvature.spectra.per_sample_gradients.linear_cost",
        lambda *_: SimpleNamespace(factored_is_cheaper=True),
    )
    monkeypatch.setattr(spill, "TILE_BYTES", 2048)
    result = spectrum(
        model, batch, structure="module", sample_unit=unit, center=center, memory_budget_mb=0
    )
    assert len(result["metadata"]["factored_weights"]) >= 8
    _, rows = reference_rows(model, batch, architecture, unit)
    for block, names in parameter_blocks(model, "module").items():
        wanted = reference_spectrum(rows, names, center=center)
        if float(wanted[0]) > 0.0:
            assert_same_spectrum(result["per_block"][block]["eigenvalues"], wanted)


def test_spilled_gradients_give_the_same_bits(case, monkeypatch):
    monkeypatch.setattr(spill, "TILE_BYTES", 4096)
    opened = []

    class Counting(spill.FileBytes):
        def __init__(self):
            super().__init__()
            opened.append(self)

    kept = spectrum(case.model, case.batch)
    engine = FisherSpectral(SpectralConfig(chunk_size=4, memory_budget_mb=0), spill=Counting)
    spilled = engine.compute_fisher_spectrum(case.model, case.batch)
    assert opened
    assert all(space._file.closed for space in opened)
    assert spilled["per_block"] == kept["per_block"]


def test_chunked_holds_no_more_than_a_chunk_and_a_tile(monkeypatch):
    """The largest tensor that the spilled mode forms, next to N x P of the whole model."""
    model, batch = tiny("gpt2"), batch_of("gpt2")
    monkeypatch.setattr(spill, "TILE_BYTES", 8 * 20 * 16)
    widest = []
    original = spill.DenseRows.tiles

    def watched(self):
        for tile in original(self):
            widest.append(tile.numel())
            yield tile

    monkeypatch.setattr(spill.DenseRows, "tiles", watched)
    result = spectrum(model, batch, memory_budget_mb=0, linear_gram="never")
    n = result["metadata"]["n_samples"]
    assert max(widest) <= 20 * 16
    assert n * sum(p.numel() for p in model.parameters()) > 20 * max(widest)


@pytest.mark.parametrize("unit", ["token", "sequence"])
def test_sketch_finds_the_top_and_bounds_its_error(case, unit):
    result = spectrum(case.model, case.batch, storage_mode="sketch", sample_unit=unit, top_k=3)
    for block, names in parameter_blocks(case.model, "layer").items():
        record = result["per_block"][block]
        values = torch.linalg.eigvalsh(reference_fisher(case.rows[unit], names)).flip(0)
        if record["status"] == "degenerate":
            continue
        assert record["method"] == "sketch"
        assert not record["exact"]
        slack = 1e-10 * float(values[0])
        for value, residual in zip(record["eigenvalues"], record["residuals"], strict=True):
            assert float((values - value).abs().min()) <= residual + slack
        assert record["discarded_trace"] == pytest.approx(
            float(values.sum()) - sum(record["eigenvalues"]), abs=1e-8 * float(values[0])
        )


def test_float32_model_is_decomposed_in_float64(case):
    model = copy.deepcopy(case.model).float()
    result = spectrum(model, case.batch, structure="full")
    wanted = reference_spectrum(case.rows["token"], list(case.rows["token"]))
    assert result["global"]["largest_eigenvalue"] == pytest.approx(float(wanted[0]), rel=1e-4)
    assert min(result["global"]["eigenvalues"]) >= 0.0


def test_a_float32_solver_knows_its_own_rounding():
    """Noise of the solver next to zero is no eigenvalue: rank 7 of 4 repeated sequences."""
    model, batch = tiny("gpt2"), batch_of("gpt2")
    batch = {key: torch.cat([value] * 4) for key, value in batch.items()}
    records64, records32 = (
        spectrum(model, batch, structure="module", dtype_eigensolve=dtype)
        for dtype in (torch.float64, torch.float32)
    )
    assert records32["metadata"]["nonzero_threshold"] == (
        "max(N, P) * eps(float32) * largest eigenvalue"
    )
    assert "eps(float64)" in records64["metadata"]["nonzero_threshold"]
    for block in ("transformer.h.0.mlp.c_fc", "transformer.h.1.attn.c_attn"):
        exact, found = (r["per_block"][block] for r in (records64, records32))
        assert exact["n_nonzero"] == 7
        assert found["n_nonzero"] <= 7
        assert found["threshold"] == pytest.approx(
            max(28, found["n_params"]) * 2.0**-23 * found["largest_eigenvalue"]
        )
        assert found["condition_number"] <= 1.01 * exact["condition_number"]
    whole = records32["global"]
    assert whole["threshold"] == pytest.approx(
        max(28, whole["n_params"]) * 2.0**-23 * whole["largest_eigenvalue"]
    )


def test_a_threshold_above_the_largest_eigenvalue_leaves_that_one():
    solved = eigensolve.Solved(torch.tensor([4.0, 1.0]).double(), 5.0)
    found = eigensolve.describe(solved, n=2, p=2**24, top_k=None, dtype=torch.float32)
    assert (found["n_nonzero"], found["condition_number"], found["effective_rank"]) == (1, 1.0, 1.0)


def test_batches_add_up_and_the_callers_batch_stays(case):
    parts = [{key: value[i : i + 1] for key, value in case.batch.items()} for i in range(3)]
    before = {key: value.clone() for key, value in case.batch.items()}
    whole = spectrum(case.model, case.batch, structure="full")
    split = spectrum(case.model, iter(parts), structure="full")
    assert_same_spectrum(split["global"]["eigenvalues"], whole["global"]["eigenvalues"])
    assert all(torch.equal(case.batch[key], before[key]) for key in before)


def test_mode_generator_and_gradients_are_left_alone(case):
    model = copy.deepcopy(case.model)
    model.train()
    next(iter(model.children())).eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with torch.no_grad():
        spectrum(model, case.batch, storage_mode="sketch", use_deterministic=True)
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.rand(3), expected)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not torch.are_deterministic_algorithms_enabled()


def test_seeds_do_not_reach_a_cuda_that_is_not_in_use(monkeypatch):
    """A seed that waits for CUDA to start would change the caller's random numbers then."""
    model, seeded = tiny("gpt2"), []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    spectrum(model, batch_of("gpt2"), storage_mode="sketch")
    assert seeded == []


@pytest.mark.gpu
def test_generators_of_cuda_devices_are_left_alone():
    """Also with the model on the host, where no device of the model's says which to keep."""
    torch.cuda.init()
    for device in ("cpu", "cuda"):
        model = tiny("gpt2").to(device)
        torch.cuda.manual_seed_all(5)
        before = torch.cuda.get_rng_state_all()
        spectrum(model, batch_of("gpt2"), storage_mode="sketch")
        after = torch.cuda.get_rng_state_all()
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_batch_norm_is_not_updated():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).double().train()
    state = copy.deepcopy(model.state_dict())
    batch = (torch.randn(5, 4).double(), torch.tensor([0, 1, 0, 1, 1]))
    FisherSpectral(loss_fn=losses.CrossEntropy()).compute_fisher_spectrum(model, batch)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_multilayer_perceptron_with_a_pair_as_batch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    inputs, labels = torch.randn(7, 4).double(), torch.tensor([0, 1, -100, 1, 1, 0, 0])
    engine = FisherSpectral(SpectralConfig(chunk_size=3), loss_fn=losses.CrossEntropy())
    result = engine.compute_fisher_spectrum(model, (inputs, labels), block_structure="full")
    rows = []
    for x, y in zip(inputs, labels, strict=True):
        if y == -100:
            continue
        loss = -torch.log_softmax(model(x), -1)[y]
        grads = torch.autograd.grad(loss, list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in grads]))
    wanted = torch.linalg.svdvals(torch.stack(rows) / 6**0.5).square()
    assert_same_spectrum(result["global"]["eigenvalues"], wanted)


def test_a_layer_called_twice_and_an_operation_without_batching_rule():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return 2 * x * grad

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(3, 3), nn.Linear(3, 4)

        def forward(self, x):
            return self.head(Square.apply(self.inner(torch.tanh(self.inner(x)))))

    torch.manual_seed(0)
    model = Twice().double()
    inputs, labels = torch.randn(2, 3, 3).double(), torch.tensor([[0, 1, 2], [3, 1, 0]])
    engine = FisherSpectral(SpectralConfig(), loss_fn=losses.CrossEntropy())
    result = engine.compute_fisher_spectrum(model, (inputs, labels), block_structure="full")
    rows = []
    for x, y in zip(inputs.flatten(0, 1), labels.flatten(), strict=True):
        grads = torch.autograd.grad(-torch.log_softmax(model(x), -1)[y], list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in grads]))
    wanted = torch.linalg.svdvals(torch.stack(rows) / 6**0.5).square()
    assert_same_spectrum(result["global"]["eigenvalues"], wanted)


# --- cache -----------------------------------------------------------------------------------


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
    fresh = spectrum(case.model, case.batch, n_samples=5, structure="module")
    noise = 1e-20 * fresh["global"]["largest_eigenvalue"]
    for block, record in fresh["per_block"].items():
        if (record["largest_eigenvalue"] or 0.0) > noise:
            assert_same_spectrum(found["per_block"][block]["eigenvalues"], record["eigenvalues"])


def test_cache_of_plain_tensors_and_caches_without_gradients(case, backward_calls):
    names = dict(case.model.named_parameters())
    rows = {name: case.rows["token"][name].view(-1, *names[name].shape) for name in names}
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


@pytest.mark.parametrize("mode", [*EXACT_MODES, "sketch"])
@pytest.mark.parametrize("linear_gram", ["auto", "never"])
@pytest.mark.parametrize("center", [False, True])
def test_a_cache_with_rows_and_products_serves_every_engine_exactly(
    case, mode, linear_gram, center, monkeypatch
):
    monkeypatch.setattr(
        "fisher_lab.curvature.spectra.per_sample_gradients.linear_cost",
        lambda *_: SimpleNamespace(factored_is_cheaper=True),
    )
    collecting = FisherSpectral(SpectralConfig(chunk_size=4))
    cache = collecting.collect_gradients(case.model, case.batch, keep_rows=True)
    config = SpectralConfig(chunk_size=4, storage_mode=mode, linear_gram=linear_gram)
    arguments = (case.model, case.batch, None, "module", center)
    fresh = FisherSpectral(config).compute_fisher_spectrum(*arguments)
    again = FisherSpectral(config, gradient_cache=cache).compute_fisher_spectrum(*arguments)
    assert again["metadata"]["gradient_source"] == "cache"
    assert again["metadata"]["cache_exact"]
    assert again["per_block"] == fresh["per_block"]
    assert again["global"] == fresh["global"]
    assert again["metadata"]["factored_weights"] == fresh["metadata"]["factored_weights"]


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


BIG = (
    "transformer.h.0.mlp.c_fc.weight", "model.layers.0.mlp.up_proj.weight",
    "bert.encoder.layer.0.output.dense.weight", "encoder.block.0.layer.1.DenseReluDense.wo.weight",
)  # fmt: skip


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


# --- samples ---------------------------------------------------------------------------------


def test_subsample_depends_on_content_not_on_order(case):
    order = torch.tensor([2, 0, 1])
    shuffled = {key: value[order] for key, value in case.batch.items()}

    def draw(batch, seed=42):
        return draw_samples(case.model, batch, unit="token", n_samples=5, seed=seed)

    assert sorted(draw(case.batch).keys) == sorted(draw(shuffled).keys)
    assert draw(case.batch).subsample_hash != draw(case.batch, seed=43).subsample_hash
    rows = case.rows["token"]
    kept = [i for i, key in enumerate(all_keys(case)) if key in set(draw(case.batch).keys)]
    wanted = reference_spectrum({name: rows[name][kept] for name in rows}, list(rows))
    found = spectrum(case.model, case.batch, n_samples=5, structure="full")
    assert found["metadata"]["n_samples"] == 5
    assert_same_spectrum(found["global"]["eigenvalues"], wanted)


def all_keys(case):
    return draw_samples(case.model, case.batch, unit="token", n_samples=None, seed=0).keys


def test_repeated_sequences_are_samples_of_their_own():
    model, batch = tiny("gpt2"), batch_of("gpt2")
    twice = {key: torch.cat([value, value]) for key, value in batch.items()}
    samples = draw_samples(model, twice, unit="token", n_samples=None, seed=0)
    assert len(set(samples.keys)) == samples.n


_PROCESS = """
import json, sys
import torch
torch.set_num_threads(1)
from fisher_lab.curvature.spectra.spectrum import FisherSpectral, SpectralConfig
from tests.curvature.spectra_support import batch_of, tiny
config = SpectralConfig(use_deterministic=bool(int(sys.argv[1])))
result = FisherSpectral(config).compute_fisher_spectrum(tiny("gpt2"), batch_of("gpt2"), 6)
print(json.dumps(result))
"""


def with_hash_seeds(deterministic):
    outputs = []
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", _PROCESS, str(int(deterministic))],
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.getcwd()},
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        outputs.append(json.loads(done.stdout.splitlines()[-1]))
    assert outputs[0]["metadata"]["n_samples"] == 6
    return outputs


def test_processes_with_other_hash_seeds_agree_bit_for_bit():
    first, second = with_hash_seeds(deterministic=True)
    assert first == second


def test_processes_with_other_hash_seeds_choose_the_same_samples():
    first, second = with_hash_seeds(deterministic=False)
    assert first["metadata"] == second["metadata"]
    assert list(first["per_block"]) == list(second["per_block"])
    for name, record in first["per_block"].items():
        values = second["per_block"][name]["eigenvalues"]
        assert record["eigenvalues"] == pytest.approx(values, rel=1e-9, abs=0)


# --- degenerate blocks -----------------------------------------------------------------------


@pytest.mark.parametrize("mode", [*EXACT_MODES, "sketch"])
def test_a_model_with_nothing_to_train_is_degenerate(mode):
    model, batch = tiny("gpt2").requires_grad_(False), batch_of("gpt2")
    result = spectrum(model, batch, storage_mode=mode)
    assert result["metadata"]["n_samples"] == 7
    for record in (*result["per_block"].values(), result["global"]):
        assert_no_number(record)
    assert {record["reason"] for record in result["per_block"].values()} == {"no gradient"}
    assert FisherSpectral().collect_gradients(model, batch).keys


def test_a_loss_that_reaches_only_frozen_parameters_is_degenerate():
    model = nn.ModuleDict({"used": nn.Linear(3, 2), "idle": nn.Linear(3, 2)})
    model["used"].requires_grad_(False)
    model.forward = lambda x: model["used"](x)
    batch = (torch.randn(4, 3), torch.tensor([0, 1, 1, 0]))
    engine = FisherSpectral(loss_fn=losses.CrossEntropy())
    result = engine.compute_fisher_spectrum(model, batch, block_structure="module")
    assert_no_number(result["per_block"]["idle"])
    assert_no_number(result["global"])


def assert_no_number(record):
    assert record["status"] == "degenerate"
    assert record["eigenvalues"] == []
    assert record["reason"]
    assert all(record[key] is None for key in eigensolve.NUMBERS)
    json.dumps(record, allow_nan=False)


def test_no_label_at_all_is_degenerate():
    model, batch = tiny("gpt2"), batch_of("gpt2")
    batch["labels"] = torch.full_like(batch["labels"], -100)
    result = spectrum(model, batch)
    for record in (*result["per_block"].values(), result["global"]):
        assert_no_number(record)


def test_an_empty_batch_is_degenerate():
    model, batch = tiny("gpt2"), batch_of("gpt2")
    for empty in ({key: value[:0] for key, value in batch.items()}, []):
        assert_no_number(spectrum(model, empty)["global"])


def test_unused_and_frozen_parameters_are_degenerate_and_left_out():
    model = nn.ModuleDict(
        {"used": nn.Linear(3, 2), "idle": nn.Linear(3, 2), "ice": nn.Linear(2, 2)}
    )
    model["ice"].requires_grad_(False)
    model.forward = lambda x: model["ice"](model["used"](x))
    batch = (torch.randn(4, 3), torch.tensor([0, 1, 1, 0]))
    engine = FisherSpectral(loss_fn=losses.CrossEntropy())
    result = engine.compute_fisher_spectrum(model, batch, block_structure="module")
    assert_no_number(result["per_block"]["idle"])
    assert_no_number(result["per_block"]["ice"])
    assert result["global"]["n_blocks"] == 1
    assert result["global"]["trace"] == result["per_block"]["used"]["trace"]


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


def test_plain_results_carry_no_regularisation(case):
    assert spectrum(case.model, case.batch)["metadata"]["regularization_used"] == 0.0


# --- blocks, cost, configuration -------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "layers"),
    [
        ("gpt2", ["transformer.h.0", "transformer.h.1"]),
        ("bert", ["bert.encoder.layer.0", "bert.encoder.layer.1"]),
        ("llama", ["model.layers.0", "model.layers.1"]),
        ("t5", ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"]),
    ],
)
def test_layers_by_architecture(architecture, layers):
    model = tiny(architecture)
    assert architecture_of(model) == architecture
    blocks = parameter_blocks(model, "layer")
    assert [name for name in blocks if name in layers] == layers
    for name in layers:
        assert all(member.startswith(f"{name}.") for member in blocks[name])
    for structure in ("layer", "module", "parameter", "full"):
        members = [name for names in parameter_blocks(model, structure).values() for name in names]
        assert sorted(members) == sorted(name for name, _ in model.named_parameters())


def test_llama_modules_and_generic_models():
    modules = parameter_blocks(tiny("llama"), "module")
    assert {f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up", "down")} <= set(modules)
    stack = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})
    assert list(parameter_blocks(stack, "layer")) == ["blocks.0", "blocks.1"]
    assert list(parameter_blocks(nn.Linear(2, 2), "layer")) == ["model"]
    assert architecture_of(stack) == "generic"


def test_parameter_blocks_are_keyed_by_parameter_names(case):
    result = spectrum(case.model, case.batch, structure="parameter")
    assert list(result["per_block"]) == [name for name, _ in case.model.named_parameters()]


@given(
    n=st.integers(1, 600), s=st.integers(1, 300), b=st.integers(1, 8),
    d_in=st.integers(1, 600), d_out=st.integers(1, 600),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_products_are_chosen_where_positions_are_fewer_than_inputs(n, s, b, d_in, d_out):
    cost = linear_cost(n, s, s * b, d_in, d_out)
    assert cost.factored_is_cheaper == (cost.factored_flops < cost.dense_flops)
    if s == 1 and b == 1 and d_in > 3 and d_out > 3:
        assert cost.factored_is_cheaper
    if s > d_in and b > 1 and n >= s * b:
        assert not cost.factored_is_cheaper


def test_a_shared_weight_never_comes_as_a_product(monkeypatch):
    monkeypatch.setattr(
        "fisher_lab.curvature.spectra.per_sample_gradients.linear_cost",
        lambda *_: SimpleNamespace(factored_is_cheaper=True),
    )
    model, batch = tiny("gpt2"), batch_of("gpt2")
    samples = draw_samples(model, batch, unit="token", n_samples=None, seed=0)
    names = [name for name, _ in model.named_parameters()]
    chosen = choose_factored(model, samples, names)
    assert "transformer.wte.weight" not in chosen
    assert "transformer.h.0.mlp.c_fc.weight" in chosen
    parameters = dict(model.named_parameters())
    rows = {}
    for chunk in PerSampleGradients(model.eval(), samples, parameters, factored=chosen):
        for name, one in chunk.factored.items():
            rows.setdefault(name, []).append(one.dense())
    _, wanted = reference_rows(model, batch, "gpt2")
    for name, parts in rows.items():
        torch.testing.assert_close(torch.cat(parts), wanted[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sample_unit", "word"), ("storage_mode", "disk"), ("chunk_size", 0), ("top_k", 0),
        ("regularization", -1.0), ("eigensolve_device", "tpu"), ("memory_budget_mb", float("nan")),
        ("dtype_eigensolve", torch.float16), ("linear_gram", "always"), ("sketch_rank", 0),
    ],
)  # fmt: skip
def test_configuration_out_of_range_names_the_field(field, value):
    with pytest.raises(CurvatureError, match=f"{field}: .*allowed"):
        SpectralConfig(**{field: value})


def test_errors_name_what_is_wrong(case):
    with pytest.raises(CurvatureError, match="block_structure: 'tower'"):
        spectrum(case.model, case.batch, structure="tower")
    with pytest.raises(CurvatureError, match="n_samples: 0"):
        spectrum(case.model, case.batch, n_samples=0)
    with pytest.raises(BatchError, match="no 'labels'"):
        spectrum(case.model, {"input_ids": case.batch["input_ids"]})


def test_top_k_cuts_the_record_and_not_the_summary(case):
    every, top = (spectrum(case.model, case.batch, top_k=k) for k in (None, 2))
    for block, record in every["per_block"].items():
        assert top["per_block"][block]["eigenvalues"] == record["eigenvalues"][:2]
        assert top["per_block"][block]["effective_rank"] == record["effective_rank"]
    assert len(top["global"]["eigenvalues"]) == 2
