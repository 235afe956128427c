"""`task=analyze` and `task=plan` on a tiny model: the run directory says what was computed."""

import csv
import json
import logging
import platform
from pathlib import Path

import pytest
import torch

from fisher_lab.config.errors import SettingError
from fisher_lab.curvature.errors import LayerError
from fisher_lab.curvature.kfac.engine import KFACNaturalGradient
from fisher_lab.runs.record import Run
from fisher_lab.tasks import analyze, plan
from fisher_lab.tasks.memory import MIB, PeakMemory
from fisher_lab.workload.build import build
from tests.config.test_groups import composed

TINY = [
    "model.init=random", "model.layers=1", "model.width=16", "model.heads=2",
    "model.recipe.seq_len=32", "data.vocab_size=300", "data.batch_size=2", "data.seq_len=32",
    "kfac.big_threshold=100", "progress=false", "kfac/damping=paper", "task.heldout_batches=4",
]  # fmt: skip

REQUIRED = [
    "loss", "tokens", "kfac/collect_s", "kfac/factor_s", "kfac/apply_s", "kfac/total_s",
    "kfac/forward_backward_s", "kfac/peak_mb", "kfac/clipped_frac_A", "kfac/clipped_frac_G",
    "kfac/kappa_A_max", "kfac/kappa_G_max", "kfac/woodbury_layers", "kfac/eig_layers", "ng/norm",
    "ng/cosine", "ng/decrement", "ng/eta", "ng/heldout_loss", "grad/norm",
    *(f"step/{name}/{key}" for name in ("natural", "gradient", "sign")
      for key in ("length", "heldout_change", "se", "own_change")),
    "step/natural/gain", "step/natural/gain_se", "step/sign/gain", "step/batches",
]  # fmt: skip


def kfac_engine(config):
    return KFACNaturalGradient(config.kfac, seed=config.seed, track_diagonal=False)


def collected(*overrides: str):
    """An engine of this configuration with the factors of the first batch, and its workload."""
    workload, kfac = build(config()), kfac_engine(config(*overrides))
    batches = workload.batches("train", 1, 0)
    kfac.collect_kfac_factors(workload.model, batches, loss=workload.loss_fn)
    return kfac, workload


def config(*overrides: str):
    return composed(*TINY, *overrides)


def analysed(directory: Path, *overrides: str) -> tuple[dict, list[dict], dict]:
    cfg = config(*overrides)
    run = Run.start(directory, config={})
    analyze.run(cfg, run)
    run.complete()
    with (directory / "layers.csv").open() as file:
        rows = list(csv.DictReader(file))
    metrics = json.loads((directory / "metrics.json").read_text())
    return metrics, rows, json.loads((directory / "run.json").read_text())


def test_every_metric_of_the_record_is_there_and_agrees_with_the_engine(tmp_path):
    metrics, rows, record = analysed(tmp_path, "kfac.damping=0.1", "kfac/policy=auto")
    assert [name for name in REQUIRED if metrics.get(name) is None] == []
    assert metrics["tokens"] == 64
    assert metrics["kfac/total_s"] == pytest.approx(
        sum(metrics[f"kfac/{part}_s"] for part in ("collect", "factor", "apply"))
    )
    kfac, workload = collected("kfac.damping=0.1")
    outputs = workload.model(**workload.batches("train", 1, 0)[0])
    assert metrics["loss"] == pytest.approx(float(outputs.loss), rel=1e-5)
    outputs.loss.backward()
    parameters = dict(workload.model.named_parameters())
    gradient = {n: p.grad for n, p in parameters.items() if p.grad is not None}
    natural = kfac.compute_natural_gradient(gradient, workload.model)
    covered = [n for n in gradient if n not in kfac.uncovered]
    inner = sum(float((gradient[n] * natural[n]).sum()) for n in covered)
    norm = sum(float(natural[n].square().sum()) for n in covered) ** 0.5
    assert metrics["ng/decrement"] == pytest.approx(inner, rel=1e-4)
    assert metrics["ng/norm"] == pytest.approx(norm, rel=1e-4)
    assert record["provenance"]["kfac"]["uncovered"] == ["transformer.wpe.weight"]
    assert {row["name"] for row in rows} == set(kfac.kfac_factors)


def test_the_record_says_what_is_covered_and_what_passes_through(tmp_path):
    metrics, rows, record = analysed(tmp_path, "kfac.exclude=[*c_fc]", "kfac.damping=0.1")
    _, workload = collected()
    sizes = {name: p.numel() for name, p in workload.model.named_parameters()}
    fc = [name for name in sizes if ".c_fc." in name]
    covered = (
        sum(sizes.values()) - sum(sizes[name] for name in fc) - sizes["transformer.wpe.weight"]
    )
    assert sum(int(row["parameters"]) for row in rows) == covered
    about = record["provenance"]["kfac"]["coverage"]
    assert about["covered"] == covered
    assert metrics["kfac/coverage"] == pytest.approx(covered / sum(sizes.values()))
    with (tmp_path / "uncovered.csv").open() as file:
        missed = {row["name"]: row for row in csv.DictReader(file)}
    assert {n: int(r["parameters"]) for n, r in missed.items()} == {
        name: sizes[name] for name in [*fc, "transformer.wpe.weight"]
    }
    assert {missed[name]["reason"] for name in fc} == {"in exclude"}
    assert sum(about["passed"].values()) == sum(int(r["parameters"]) for r in missed.values())


def test_a_plan_says_the_coverage_that_the_analysis_then_has(tmp_path):
    run = Run.start(tmp_path / "plan", config={})
    plan.run(config("kfac.norm_layers=false"), run)
    metrics, _, record = analysed(tmp_path / "run", "kfac.norm_layers=false")
    assert run.values["kfac/coverage"] == metrics["kfac/coverage"] < 1.0
    planned = run.record["provenance"]["kfac"]
    assert planned["coverage"] == record["provenance"]["kfac"]["coverage"]
    assert run.tables["uncovered.csv"][0]["name"]


@pytest.mark.parametrize("verify", [True, False])
def test_a_gradient_that_is_not_autograds_ends_the_run_unless_nobody_compares(
    tmp_path, monkeypatch, verify
):
    own = KFACNaturalGradient.own_gradients

    def wrong(engine, model):
        return {name: 1.01 * value for name, value in own(engine, model).items()}

    monkeypatch.setattr(KFACNaturalGradient, "own_gradients", wrong)
    if not verify:
        metrics, _, _ = analysed(tmp_path, "kfac.verify=false")
        assert metrics["ng/decrement"] > 0
        return
    with pytest.raises(LayerError, match=r"verify: .* is not autograd's for .* \(off by 1\.0%\)"):
        analysed(tmp_path)


def test_pooled_factors_of_a_tied_head_are_analysed(tmp_path):
    """The head's G has no spectrum at hand; in its dense form it has, with the same values."""
    metrics, rows, _ = analysed(tmp_path, "kfac.tied=sum", "kfac.damping=0.1")
    kfac, _ = collected("kfac.tied=sum", "kfac/policy=small_only", "kfac.damping=0.1")
    tops = kfac.top_eigenvalues(1)
    assert {row["name"] for row in rows} == set(tops)
    top = max(float(t[0]) for t in tops.values())
    assert metrics["kfac/top_eigenvalue"] == pytest.approx(top, rel=1e-6)
    logdet = sum(kfac.log_determinant().values())  # no floor binds at this damping
    assert metrics["kfac/logdet"] == pytest.approx(logdet, rel=1e-6)


def test_pooled_factors_with_ekfac_are_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(analyze, "mean_loss", lambda *_: pytest.fail("a pass was made"))
    with pytest.raises(SettingError, match="tied: 'sum' with ekfac"):
        analyze.run(config("kfac.tied=sum", "kfac.ekfac=true"), Run.start(tmp_path, config={}))


def test_the_record_says_what_was_stored_and_clipped(tmp_path):
    _, rows, _ = analysed(
        tmp_path, "kfac.damping=1e-6", "kfac.max_condition_number=50", "kfac.woodbury_dtype=fp16"
    )
    by_name = {row["name"]: row for row in rows}
    assert {row["kappa_max"] for row in rows} == {"50.0"}
    assert {row["storage_device"] for row in rows} == {"cpu"}
    head = by_name["lm_head"]  # 300 outputs, 62 columns: fewer, so in 16 bits
    assert head["method"] == "woodbury"
    assert head["storage_dtype"] == "float16"
    assert by_name["transformer.h.0.ln_1"]["storage_dtype"] == "float64"
    shares = [float(row["clipped_frac_G"]) for row in rows]
    for row, share in zip(rows, shares, strict=True):
        assert share == pytest.approx(int(row["clipped_G"]) / int(row["dim_G"]))
    assert max(shares) > 0.5
    assert {row["ekfac_clipped"] for row in rows} == {""}


def test_under_ekfac_the_record_says_what_its_own_floor_did(tmp_path):
    """The floor is one on pairs of eigenvectors; the sides are not clipped."""
    overrides = ["kfac.ekfac=true", "kfac.damping=1e-5", "kfac.max_condition_number=30"]
    metrics, rows, _ = analysed(tmp_path, *overrides)
    kfac, _ = collected(*overrides)
    kfac.prepare_inverses()
    clipped = pairs = 0
    for row in rows:
        basis = kfac._inverses.bases.get(row["name"])
        if basis is None:
            assert row["method"] == "norm"
            assert row["ekfac_clipped"] == ""
            continue
        total = int(row["dim_A"]) * int(row["dim_G"])
        assert int(row["ekfac_clipped"]) == basis.clipped
        assert float(row["ekfac_clipped_frac"]) == pytest.approx(basis.clipped / total)
        assert float(row["ekfac_kappa"]) == pytest.approx(30.0**2, rel=1e-6)
        assert float(row["ekfac_kappa_before"]) > 30.0**2
        assert (row["clipped_A"], row["clipped_G"]) == ("0", "0")
        assert (row["floor_applied_A"], row["floor_applied_G"]) == ("false", "false")
        clipped, pairs = clipped + basis.clipped, pairs + total
    assert clipped > 0
    assert metrics["kfac/ekfac_clipped_frac"] == pytest.approx(clipped / pairs)
    assert metrics["kfac/ekfac_kappa_max"] == pytest.approx(30.0**2, rel=1e-6)


@pytest.mark.parametrize("ekfac", [False, True])
def test_one_line_a_layer_at_info(tmp_path, caplog, ekfac):
    with caplog.at_level(logging.INFO, "fisher_lab.curvature.kfac.engine"):
        _, rows, _ = analysed(tmp_path, "kfac.damping=0.1", f"kfac.ekfac={ekfac}")
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("layer ")]
    assert len(lines) == len(rows)
    for row in rows:
        (line,) = [x for x in lines if x.startswith(f"layer {row['name']}: ")]
        assert f"T={row['tokens']} {row['method']} (empirical)" in line
        assert f"G: lambda 0.1, clipped {row['clipped_G']}/{row['dim_G']}" in line
        assert ("of pairs" in line) == (row["ekfac_clipped"] != "")


def test_factors_are_kept_where_asked_for(tmp_path):
    analysed(tmp_path / "without")
    assert not (tmp_path / "without" / "factors.safetensors").exists()
    analysed(tmp_path / "with", "kfac.save_factors=true", "kfac.damping=0.1")
    fresh, workload = collected("kfac.damping=0.1")
    kept = kfac_engine(config("kfac.damping=0.1"))
    kept.load(tmp_path / "with" / "factors.safetensors", workload.model)
    gradient = {n: torch.ones_like(p) for n, p in workload.model.named_parameters()}
    one = kept.compute_natural_gradient(gradient, workload.model)
    other = fresh.compute_natural_gradient(gradient, workload.model)
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-5, atol=1e-8, msg=name)


def test_policies_differ_in_method_and_in_nothing_that_matters(tmp_path):
    found = {
        policy: analysed(tmp_path / policy, f"kfac/policy={policy}", "kfac.damping=0.01")
        for policy in ("all", "auto", "hybrid", "small_only")
    }
    methods = {p: tuple(row["method"] for row in rows) for p, (_, rows, _) in found.items()}
    assert len(set(methods.values())) == 4
    for name in ("ng/norm", "ng/decrement", "ng/eta", "kfac/kappa_A_max"):
        values = [metrics[name] for metrics, _, _ in found.values()]
        assert values == pytest.approx([values[0]] * 4, rel=1e-6), name


def test_plan_says_what_analyze_then_does(tmp_path, monkeypatch, capsys):
    def no_backward(*_args, **_kwargs):
        raise AssertionError("a plan must not run a backward pass")

    monkeypatch.setattr(torch.autograd, "grad", no_backward)
    monkeypatch.setattr(torch.Tensor, "backward", no_backward)
    run = Run.start(tmp_path / "plan", config={})
    plan.run(config("kfac/policy=hybrid"), run)
    monkeypatch.undo()
    with (tmp_path / "plan" / "plan.csv").open() as file:
        planned = {row["name"]: row for row in csv.DictReader(file)}
    _, rows, _ = analysed(tmp_path / "run", "kfac/policy=hybrid")
    assert {n: (r["method"], r["tokens"]) for n, r in planned.items()} == {
        row["name"]: (row["method"], row["tokens"]) for row in rows
    }
    assert planned["lm_head"]["small_only"] == "eig"
    total = sum(float(r["bytes_A"]) + float(r["bytes_G"]) for r in planned.values())
    assert run.values["plan/bytes"] == total
    assert "policy hybrid" in capsys.readouterr().out


def test_plan_marks_what_a_policy_refuses(tmp_path):
    run = Run.start(tmp_path, config={})
    plan.run(config("kfac/policy=auto", "kfac.max_dense_dim=200"), run)
    rows = {row["name"]: row for row in run.tables["plan.csv"]}
    assert rows["lm_head"]["small_only"] == "error"
    assert rows["lm_head"]["hybrid"] == "woodbury"


def test_peak_memory_sees_what_a_phase_takes():
    with PeakMemory(torch.device("cpu")) as memory:
        block = torch.ones(64 * MIB // 4)
        del block
    assert 60 < memory.growth_mib < 200
    with PeakMemory(torch.device("cpu")) as memory:
        pass
    assert memory.growth_mib < 10


@pytest.mark.skipif("glibc" not in platform.libc_ver(), reason="needs glibc's malloc_trim")
def test_a_run_counts_its_memory_even_after_another_one_in_the_same_process():
    def phase():
        with PeakMemory(torch.device("cpu")) as memory:
            _ = [torch.ones(MIB // 16) for _ in range(256)]  # 64 MiB in pieces of the heap
        return memory.growth_mib

    block = torch.ones(8 * MIB)  # 32 MiB: from its end on smaller pieces come from the heap
    del block
    kept = []
    for _ in range(3):
        kept.append(torch.ones(16))  # at the top of the heap, above what has been given back
        assert 50 < phase() < 200
