"""Matrix-free spectra against explicit matrices (docs/math.md, section 8)."""

import copy
import json
import math
import subprocess
import sys

import pytest
import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from fisher_lab.config.errors import SettingError
from fisher_lab.curvature import losses
from fisher_lab.curvature.errors import BatchError, CurvatureError, NonFiniteError
from fisher_lab.curvature.evaluation_mode import isolated
from fisher_lab.curvature.spectra import matrix_free as module
from fisher_lab.curvature.spectra.blocks import select_parameters
from fisher_lab.curvature.spectra.lanczos import FisherLanczos, lanczos_algorithm
from fisher_lab.curvature.spectra.operators import CurvatureOperator
from fisher_lab.curvature.spectra.spectrum import FisherSpectral, SpectralConfig
from tests import reference
from tests.curvature.spectra.reference import (
    batch_of,
    flat_gradient,
    logits_of,
    spectrum_of_pairs,
    through,
    tiny,
)


def restricted(case, matrix):
    """A matrix of the whole model cut down to the case's block."""
    index, at = [], 0
    for name, parameter in case.model.named_parameters():
        if name.startswith(f"{case.block}."):
            index += range(at, at + parameter.numel())
        at += parameter.numel()
    return matrix[index][:, index]


@pytest.mark.parametrize("operator", ["empirical", "true"])
def test_products_match_the_explicit_matrix(case, operator):
    matrix = case.matrices[operator]
    n = len(matrix)
    vectors = torch.randn(3, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    bound = 3e-5 if case.rounds_to_float32 else 1e-10
    for way in ("forward", "double_backward"):
        with isolated(case.model, seed=0):
            product = CurvatureOperator(
                operator, case.model, case.batch, select_parameters(case.model, None), products=way
            )
            assert product.n == n
            found = torch.stack([product(v) for v in vectors])
        error = (found - vectors @ matrix).norm() / (vectors @ matrix).norm()
        assert float(error) < bound, (way, float(error))


@pytest.mark.parametrize("operator", ["empirical", "true"])
def test_top_ten_match_the_explicit_matrix(case, operator):
    result = FisherLanczos(k=10, operator=operator).top_eigenpairs(
        case.model, case.batch, eigenvectors=True
    )
    wanted = torch.linalg.eigvalsh(case.matrices[operator]).flip(0)[:10]
    found = torch.tensor(result["eigenvalues"], dtype=torch.float64)
    assert float((found - wanted).abs().max() / wanted[0]) < 1e-6
    assert all(result["converged"])
    assert max(result["residuals"]) <= 1e-6 * result["eigenvalues"][0]
    flat = torch.cat([v.flatten(1) for v in result["eigenvectors"].values()], dim=1)
    torch.testing.assert_close(flat @ flat.T, torch.eye(10).double(), atol=1e-8, rtol=0)
    true_residuals = (flat @ case.matrices[operator] - found[:, None] * flat).norm(dim=1)
    slack = 3e-5 if case.rounds_to_float32 else 1e-10
    assert float(true_residuals.max()) <= (2e-6 + slack) * float(wanted[0])
    result.pop("eigenvectors")
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("operator", ["empirical", "true", "hessian"])
def test_a_block_is_the_matrix_restricted_to_it(case, operator):
    engine = FisherLanczos(k=10, operator=operator)
    result = engine.top_eigenpairs(case.model, case.batch, case.block)
    dense = case.hessian if operator == "hessian" else restricted(case, case.matrices[operator])
    wanted = torch.linalg.eigvalsh(dense).flip(0)[:10]
    assert result["n_params"] == len(dense)
    assert result["eigenvalues"] == pytest.approx(wanted.tolist(), abs=1e-6 * float(wanted[0]))


@pytest.mark.parametrize("case", ["gpt2", "t5"], indirect=True)
def test_batches_add_up_to_the_mean_over_labels(case):
    parts = [{key: value[i : i + 1] for key, value in case.batch.items()} for i in range(3)]
    engine = FisherLanczos(k=4)
    whole = engine.top_eigenpairs(case.model, case.batch)
    split = engine.top_eigenpairs(case.model, parts)
    assert split["n_samples"] == whole["n_samples"]
    assert split["eigenvalues"] == pytest.approx(whole["eigenvalues"], rel=1e-6)


@pytest.mark.parametrize("case", ["gpt2", "llama"], indirect=True)
def test_indefinite_hessians_by_magnitude_and_from_below(case):
    values, block = torch.linalg.eigvalsh(case.hessian), case.block
    scale = float(values.abs().max())
    low = FisherLanczos(k=3, operator="hessian", which="smallest", tol=1e-7)
    assert low.top_eigenpairs(case.model, case.batch, block)["eigenvalues"] == pytest.approx(
        values[:3].tolist(), abs=1e-6 * scale
    )
    large = FisherLanczos(k=3, operator="hessian", which="magnitude", tol=1e-7)
    wanted = values[values.abs().argsort(descending=True)[:3]]
    assert large.top_eigenpairs(case.model, case.batch, block)["eigenvalues"] == pytest.approx(
        wanted.tolist(), abs=1e-6 * scale
    )


# Not T5: its ReLU has kinks within any step.
@pytest.mark.parametrize("case", ["gpt2", "bert", "llama"], indirect=True)
def test_hessian_product_against_finite_differences(case):
    """Another principle than any automatic second derivative."""
    model = copy.deepcopy(case.model).eval()
    parameters = list(model.parameters())
    start = parameters_to_vector(parameters).detach()
    vector = torch.randn(
        len(start), dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    step, grads = 1e-4 if case.architecture == "llama" else 1e-6, []
    for sign in (1, -1):
        vector_to_parameters(start + sign * step * vector, parameters)
        loss, labels = reference.summed_loss(model, logits_of(model, case.batch), case.batch)
        grads.append(flat_gradient(loss / labels, parameters))
    wanted = (grads[0] - grads[1]) / (2 * step)
    with isolated(case.model, seed=0):
        product = CurvatureOperator(
            "hessian", case.model, case.batch, select_parameters(case.model, None)
        )(vector)
    bound = 1e-2 if case.rounds_to_float32 else 1e-6
    assert float((product - wanted).norm() / wanted.norm()) < bound


def test_traces_lie_within_their_stated_errors(case):
    for operator in ("empirical", "true"):
        exact = float(case.matrices[operator].trace())
        engine = FisherLanczos(operator=operator, seed=3)
        for method, count in (("slq", 24), ("hutch++", 24)):
            found = engine.trace(case.model, case.batch, method=method, n_products=count)
            assert found.n_products == count
            assert abs(found.value - exact) <= 4 * found.standard_error + 1e-6 * exact
        assert found.standard_error < 0.5 * exact


@pytest.mark.parametrize(
    ("operator", "share"), [("empirical", 1e-1), ("empirical", 1e-3), ("true", 1e-3)]
)
def test_effective_dimension_lies_in_its_interval(case, share, operator, monkeypatch):
    values = torch.linalg.eigvalsh(case.matrices[operator]).clamp(min=0)
    lam = share * float(values[-1])
    exact = float((values / (values + lam)).sum())
    engine = FisherLanczos(k=5, operator=operator)
    formed = engine.effective_dimension(case.model, case.batch, lam)
    slack = 1e-5 if case.rounds_to_float32 else 1e-9
    assert formed.value == pytest.approx(exact, rel=slack)
    assert formed.standard_error == 0.0
    assert formed.n_probes == 0
    if operator == "true" and case.rounds_to_float32:
        return  # many products, of slow models
    monkeypatch.setattr(module, "MOST_ROWS", 0)
    found = engine.effective_dimension(case.model, case.batch, lam)
    assert found.low - slack * exact <= exact <= found.high + slack * exact
    assert found.closed(0.01)
    assert found.high - found.low < 0.4 * exact


def mass(density):
    values, grid = (torch.tensor(density[key]).double() for key in ("density", "grid"))
    return float(torch.trapezoid(values, grid))


@pytest.mark.parametrize("case", ["gpt2"], indirect=True)
def test_density_integrates_to_one_and_says_what_is_zero(case):
    engine = FisherLanczos(operator="empirical")
    values = torch.linalg.eigvalsh(case.matrices["empirical"])
    linear = engine.spectral_density(case.model, case.batch, n_probes=4, steps=20)
    assert mass(linear) == pytest.approx(1.0, abs=0.02)
    zero = float((values < 1e-9 * values[-1]).double().mean())
    assert linear["mass_at_zero"] == pytest.approx(zero, abs=0.02)
    log = engine.spectral_density(case.model, case.batch, n_probes=4, steps=20, log=True)
    assert mass(log) == pytest.approx(1.0 - log["mass_left_out"], abs=0.02)
    trace = log["trace"]
    exact = float(case.matrices["empirical"].trace())
    assert trace["low"] == trace["high"] == pytest.approx(exact)


@pytest.mark.parametrize("case", ["bert"], indirect=True)
def test_one_analysis_gives_all_of_it(case):
    engine = FisherLanczos(k=4, operator="true")
    matrix = case.matrices["true"]
    values = torch.linalg.eigvalsh(matrix).clamp(min=0).flip(0)
    lam = 1e-2 * float(values[0])
    found = engine.analyze(case.model, case.batch, lam=lam, n_probes=4, steps=24)
    assert found["top"]["eigenvalues"] == pytest.approx(
        values[:4].tolist(), abs=1e-6 * float(values[0])
    )
    for key, exact in (
        ("trace", float(values.sum())),
        ("effective_dimension", float((values / (values + lam)).sum())),
    ):
        assert abs(found[key]["value"] - exact) <= 4 * found[key]["standard_error"] + 1e-3 * exact
        # The part that is known exactly carries no variance.
        assert found[key]["standard_error"] < 0.5 * exact
    left_out = found["density"]["mass_left_out"]
    assert mass(found["density"]) == pytest.approx(1.0 - left_out, abs=0.02)
    assert engine.analyze(case.model, case.batch, n_probes=0).keys() == {"top"}


@pytest.mark.parametrize("case", ["gpt2"], indirect=True)
def test_model_generator_and_batch_are_left_alone(case):
    model = copy.deepcopy(case.model).train()
    before = {key: value.clone() for key, value in case.batch.items()}
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    with torch.no_grad():
        FisherLanczos(k=1).top_eigenpairs(model, case.batch)
    assert torch.equal(torch.rand(2), expected)
    assert all(child.training for child in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(case.batch[key], before[key]) for key in before)


@pytest.mark.parametrize("case", ["gpt2"], indirect=True)
def test_copies_never_count_as_known_eigenvalues(case):
    engine = FisherLanczos(k=10, max_vectors=60, tol=1e-12, reorthogonalize=False)
    for run in (
        lambda: engine.analyze(case.model, case.batch, lam=1e-2),
        lambda: engine.analyze(case.model, case.batch),
        lambda: engine.effective_dimension(case.model, case.batch, 1e-2),
    ):
        with pytest.raises(SettingError, match=r"reorthogonalize: False; allowed .*: True"):
            run()
    top = engine.analyze(case.model, case.batch, n_probes=0)["top"]
    values = torch.linalg.eigvalsh(case.matrices["empirical"]).flip(0)
    n = int((values > 1e-10 * values[0]).sum())
    assert n == 7
    # 60 steps in a space of rank 7: eight copies of each, and one on its way, which says so.
    pairs = zip(top["eigenvalues"], top["converged"], strict=True)
    found = torch.tensor([value for value, done in pairs if done], dtype=torch.float64)
    assert len(found) == len(top["eigenvalues"]) - 1
    torch.testing.assert_close(found[:n], values[:n], atol=1e-9 * float(values[0]), rtol=0)
    assert float(found.sum()) == pytest.approx(float(values.sum()), rel=1e-8)
    assert len(top["eigenvalues"]) == len(top["residuals"]) == len(top["converged"])


def test_memory_is_said_before_it_is_allocated_and_checked(monkeypatch):
    model, batch = tiny("gpt2"), batch_of("gpt2")
    n = sum(p.numel() for p in model.parameters())
    said = []
    result = FisherLanczos(k=2, max_vectors=7, say=said.append).top_eigenpairs(model, batch)
    assert result["memory_bytes"] == 7 * n * 8
    assert len(said) == 1
    assert f"7 vectors x {n} parameters" in said[0]
    allocated = []
    monkeypatch.setattr(module, "free_memory", lambda device: 7 * n * 8 - 1)
    monkeypatch.setattr(module, "lanczos_algorithm", lambda *a, **k: allocated.append(a))
    with pytest.raises(CurvatureError, match=r"max_vectors: 7 vectors .* allowed: 6 or fewer"):
        FisherLanczos(k=2, max_vectors=7, say=said.append).top_eigenpairs(model, batch)
    assert len(said) == 2
    assert allocated == []


def test_memory_is_said_where_nobody_set_logging_up():
    script = (
        "from fisher_lab.curvature.spectra.lanczos import FisherLanczos\n"
        "FisherLanczos().lanczos_algorithm(lambda v: 0 * v, 1000, 2, eigenvectors=False)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
    )
    assert "Lanczos basis: 20 vectors x 1000 parameters x torch.float64 = 0.2 MiB" in done.stderr


@pytest.mark.parametrize("case", ["gpt2"], indirect=True)
def test_eigenvectors_and_the_blocks_of_the_trace_count(case, monkeypatch):
    n, said = len(case.matrices["empirical"]), []
    engine = FisherLanczos(k=3, max_vectors=8, say=said.append)
    engine.top_eigenpairs(case.model, case.batch, eigenvectors=True)
    assert f"(8 vectors + 3 eigenvectors) x {n} parameters" in said[-1]
    assert f"= {11 * n * 8 / 2**20:.1f} MiB" in said[-1]
    engine.trace(case.model, case.batch, n_products=12)
    assert f"3 blocks of 4 vectors x {n} parameters" in said[-1]
    assert f"= {12 * n * 8 / 2**20:.1f} MiB" in said[-1]
    monkeypatch.setattr(module, "free_memory", lambda device: 11 * n * 8 - 1)
    for run, text in (
        (lambda: engine.analyze(case.model, case.batch), "max_vectors: .* allowed: 7 or fewer"),
        (
            lambda: engine.trace(case.model, case.batch, n_products=12),
            "n_products: .* allowed: 3 or fewer",
        ),
        (
            lambda: FisherLanczos(k=3, operator="hessian").spectral_density(
                case.model, case.batch, steps=12
            ),
            "steps: 12 vectors .* allowed: 10 or fewer",
        ),
    ):
        with pytest.raises(CurvatureError, match=text):
            run()


def test_a_cuda_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CurvatureError, match=r"^vector_device: 'cuda', but no CUDA device"):
        FisherLanczos(vector_device="cuda")
    with pytest.raises(CurvatureError, match=r"^eigensolve_device: 'cuda', but no CUDA device"):
        FisherSpectral(SpectralConfig(eigensolve_device="cuda"))


def test_an_operation_without_second_derivative_falls_back():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            ctx.save_for_forward(x)
            return x * x

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
            (x,) = ctx.saved_tensors
            return 2 * x * grad

        @staticmethod
        def jvp(ctx, tangent):  # pyright: ignore[reportIncompatibleMethodOverride]
            (x,) = ctx.saved_for_forward
            return 2 * x * tangent

    model = through(Square)
    inputs, labels = torch.randn(5, 3).double(), torch.tensor([0, 1, 2, 3, 1])
    engine = FisherLanczos(k=3, loss_fn=losses.CrossEntropy())
    result = engine.top_eigenpairs(model, (inputs, labels))
    assert result["products"] == "forward"
    wanted = spectrum_of_pairs(model, inputs, labels)[:3]
    assert result["eigenvalues"] == pytest.approx(wanted.tolist(), rel=1e-8)


def test_errors_name_what_is_wrong():
    model, batch = tiny("gpt2"), batch_of("gpt2")
    with pytest.raises(CurvatureError, match="operator: 'fisher'"):
        FisherLanczos(operator="fisher")
    with pytest.raises(CurvatureError, match="k: 0"):
        FisherLanczos(k=0)
    with pytest.raises(CurvatureError, match="max_products: 5; allowed: None, or at least k = 10"):
        FisherLanczos(max_products=5)
    with pytest.raises(CurvatureError, match=r"block: .*'transformer\.h\.7'"):
        FisherLanczos().top_eigenpairs(model, batch, "transformer.h.7")
    with pytest.raises(CurvatureError, match="max_vectors: 5"):
        lanczos_algorithm(lambda v: v, 50, 5, max_vectors=5)
    with pytest.raises(CurvatureError, match="which: 'middle'"):
        lanczos_algorithm(lambda v: v, 50, 5, which="middle")
    with pytest.raises(CurvatureError, match="lam: 0"):
        FisherLanczos().effective_dimension(model, batch, 0.0)
    with pytest.raises(CurvatureError, match="indefinite"):
        FisherLanczos(operator="hessian").effective_dimension(model, batch, 1.0)
    with pytest.raises(NonFiniteError, match="product 1"):
        lanczos_algorithm(lambda v: v * math.nan, 5, 1)
    for empty in ([], {key: value[:0] for key, value in batch.items()}):
        with pytest.raises(BatchError, match="no label counts"):
            FisherLanczos().top_eigenpairs(model, empty)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    with pytest.raises(BatchError, match="no label counts"):
        FisherLanczos().top_eigenpairs(model, batch)
