"""The Fisher spectrum against loops of one backward pass a sample (docs/math.md, section 8)."""

import copy
import math

import pytest
import torch
from torch import nn

from fisher_lab.curvature import losses
from fisher_lab.curvature.errors import BatchError, CurvatureError
from fisher_lab.curvature.spectra import eigensolve, per_sample_gradients, spill
from fisher_lab.curvature.spectra.blocks import parameter_blocks
from fisher_lab.curvature.spectra.spectrum import FisherSpectral, SpectralConfig
from tests.curvature.spectra.reference import (
    ARCHITECTURES,
    EXACT_MODES,
    assert_same_spectrum,
    batch_of,
    reference_fisher,
    reference_spectrum,
    rows_of,
    spectrum,
    spectrum_of_pairs,
    through,
    tiny,
)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("unit", ["token", "sequence"])
@pytest.mark.parametrize("mode", EXACT_MODES)
def test_every_block_matches_the_loops(case, mode, unit, center):
    result = spectrum(case.model, case.batch, storage_mode=mode, sample_unit=unit, center=center)
    blocks = parameter_blocks(case.model, "layer")
    assert set(result["per_block"]) == set(blocks)
    assert result["metadata"]["regularization_used"] == 0.0
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
    if structure == "parameter":
        assert list(result["per_block"]) == [name for name, _ in case.model.named_parameters()]
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
    monkeypatch.setattr(per_sample_gradients, "factored_is_cheaper", lambda *_: True)
    monkeypatch.setattr(spill, "TILE_BYTES", 2048)
    result = spectrum(
        model, batch, structure="module", sample_unit=unit, center=center, memory_budget_mb=0
    )
    assert len(result["metadata"]["factored_weights"]) >= 8
    rows = rows_of(model, [batch], unit)
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
    assert "eps(float32)" in records32["metadata"]["nonzero_threshold"]
    assert "eps(float64)" in records64["metadata"]["nonzero_threshold"]
    for block in ("transformer.h.0.mlp.c_fc", "transformer.h.1.attn.c_attn"):
        exact, found = (r["per_block"][block] for r in (records64, records32))
        assert exact["n_nonzero"] == 7
        # The matrix of the 28 samples is decomposed.
        rounding = 10 * math.sqrt(28) * 2.0**-23
        assert found["threshold"] == pytest.approx(rounding * found["largest_eigenvalue"])
        above = [value for value in exact["eigenvalues"] if value > found["threshold"]]
        assert found["n_nonzero"] == len(above) > 4
        assert found["condition_number"] <= 1.01 * exact["condition_number"]
    # Every block decides by its own largest eigenvalue what is nonzero.
    for record in (records32, records64):
        blocks = [one for one in record["per_block"].values() if one["status"] == "ok"]
        whole = record["global"]
        assert whole["n_nonzero"] == sum(one["n_nonzero"] for one in blocks)
        assert whole["threshold"] == max(one["threshold"] for one in blocks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_number_of_parameters_makes_no_eigenvalue_zero(dtype):
    """Twelve samples of 2^24 parameters: their 12 x 12 matrix has twelve eigenvalues."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64, generator=generator)).Q
    values = torch.logspace(0, -4, 12, dtype=torch.float64)
    solved = eigensolve.solve(
        basis @ values.diag() @ basis.T, 12, dtype=dtype, rows=torch.float32,
        device=torch.device("cpu"), regularization=0.0,
    )  # fmt: skip
    for found in (
        eigensolve.describe(solved, n=12, p=2**24, top_k=None),
        eigensolve.union([solved], n=12, p=2**24, top_k=None, n_degenerate=0),
    ):
        assert found["n_nonzero"] == 12
        assert found["condition_number"] == pytest.approx(1e4, rel=1e-2)
        weights = values / values.sum()
        rank = math.exp(-float((weights * weights.log()).sum()))
        assert found["effective_rank"] == pytest.approx(rank, rel=1e-4)


@pytest.mark.parametrize("case", ["gpt2"], indirect=True)
def test_the_gap_of_a_sketch_that_keeps_one_eigenvalue(case):
    """The gap is to the second eigenvalue, also where the record keeps none but the first."""
    for structure in ("full", "layer"):
        one = spectrum(case.model, case.batch, structure=structure, storage_mode="sketch", top_k=1)
        for block, record in one["per_block"].items():
            names = parameter_blocks(case.model, structure)[block]
            values = reference_spectrum(case.rows["token"], names)
            assert record["spectral_gap"] == pytest.approx(float(values[0] - values[1]), rel=1e-6)
            assert len(record["eigenvalues"]) == 1
        every = [
            value
            for names in parameter_blocks(case.model, structure).values()
            for value in reference_spectrum(case.rows["token"], names).tolist()
        ]
        first, second = sorted(every, reverse=True)[:2]
        assert one["global"]["spectral_gap"] == pytest.approx(first - second, rel=1e-6)


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
    wanted = spectrum_of_pairs(model, inputs, labels)
    assert_same_spectrum(result["global"]["eigenvalues"], wanted)


def test_a_layer_called_twice_and_an_operation_without_batching_rule():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
            (x,) = ctx.saved_tensors
            return 2 * x * grad

    model = through(Square, twice=True)
    inputs, labels = torch.randn(2, 3, 3).double(), torch.tensor([[0, 1, 2], [3, 1, 0]])
    engine = FisherSpectral(SpectralConfig(), loss_fn=losses.CrossEntropy())
    result = engine.compute_fisher_spectrum(model, (inputs, labels), block_structure="full")
    wanted = spectrum_of_pairs(model, inputs.flatten(0, 1), labels.flatten())
    assert_same_spectrum(result["global"]["eigenvalues"], wanted)


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
    with pytest.raises(CurvatureError, match=r"^config: a dict; allowed: SpectralConfig\(\.\.\.\)"):
        FisherSpectral({"chunk_size": 3})  # type: ignore[arg-type]
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
