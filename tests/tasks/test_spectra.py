"""The steps of task=analyze that run the spectral engines: files, figures, metrics."""

import csv
import json
import math
from types import SimpleNamespace

import pytest

from fisher_lab.config import schema
from fisher_lab.config.errors import ConfigError
from fisher_lab.config.fields import problems
from fisher_lab.curvature.group_fisher.collector import FisherCollector
from fisher_lab.curvature.spectra.spectrum import FisherSpectral, SpectralConfig
from fisher_lab.results import curve_figures
from fisher_lab.runs.record import Run
from fisher_lab.tasks.preflight import preflight
from fisher_lab.tasks.progress import Progress
from fisher_lab.tasks.spectra import run_engines
from tests.curvature.spectra.reference import batch_of, tiny


@pytest.fixture
def workload():
    def batches(split, n, seed):
        return [batch_of("gpt2", seed=seed + (1 if split == "train" else 100))][:n]

    return SimpleNamespace(model=tiny("gpt2").eval(), loss_fn=None, batches=batches)


@pytest.fixture
def run(tmp_path):
    return Run.start(tmp_path / "run", config={}, overrides=[], identity={}, provenance={})


def configured(**engines):
    config = schema.Config()
    config.lanczos.k, config.lanczos.density_probes, config.lanczos.density_steps = 3, 2, 8
    for name in engines:
        getattr(config, name).enabled = True
    return config


def test_all_engines_leave_their_files_and_numbers(workload, run):
    config = configured(spectral=1, lanczos=1, group_fisher=1)
    metrics = run_engines(config, workload, run, Progress(False))
    files = {path.name for path in run.directory.iterdir()}
    assert {
        "spectral.json", "spectral.csv", "lanczos.json", "density.csv", "group_fisher.json",
        "group_fisher.csv", "group_fisher", "group_fisher_export.safetensors",
    } <= files  # fmt: skip
    for figure in (
        "spectral_decay", "lanczos_eigenvalues", "lanczos_density", "group_fisher_layers"
    ):  # fmt: skip
        assert (run.directory / f"{figure}.pdf").read_bytes().startswith(b"%PDF")
        assert (run.directory / f"{figure}.png").read_bytes().startswith(b"\x89PNG")
    recorded = json.loads((run.directory / "metrics.json").read_text())
    assert recorded == metrics
    assert all(math.isfinite(value) for value in metrics.values())
    wanted = FisherSpectral(SpectralConfig()).compute_fisher_spectrum(
        workload.model, workload.batches("train", 1, 0)
    )
    assert metrics["spectral/largest_eigenvalue"] == wanted["global"]["largest_eigenvalue"]
    with (run.directory / "spectral.csv").open() as file:
        rows = {row["block"]: row for row in csv.DictReader(file)}
    for block, record in wanted["per_block"].items():
        assert float(rows[block]["trace"]) == pytest.approx(record["trace"])
    # The same matrix seen two ways: its trace is that of the blocks together.
    error = metrics["lanczos/trace_se"]
    assert abs(metrics["lanczos/trace"] - metrics["spectral/trace"]) <= 6 * error + 1e-9
    saved = FisherCollector.load(run.directory / "group_fisher")
    assert saved.token_total == {"train": 11.0, "heldout": 11.0}
    assert metrics["group_fisher/token_total"] == 11


def test_engines_that_are_off_do_nothing(workload, run):
    before = {path.name for path in run.directory.iterdir()}
    assert run_engines(schema.Config(), workload, run, Progress(False)) == {}
    assert {path.name for path in run.directory.iterdir()} == before


def test_figures_of_the_same_numbers_have_the_same_bytes(workload, tmp_path):
    found = []
    for name in ("a", "b"):
        run = Run.start(tmp_path / name, config={}, overrides=[], identity={}, provenance={})
        run_engines(configured(spectral=1), workload, run, Progress(False))
        found.append((run.directory / "spectral_decay.pdf").read_bytes())
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("spectral", "storage_mode", "disk"), ("spectral", "chunk_size", 0),
        ("spectral", "memory_budget_mb", -1.0), ("lanczos", "k", 0), ("lanczos", "tol", 0.0),
        ("lanczos", "max_vectors", 5), ("lanczos", "max_products", 5),
        ("lanczos", "operator", "fisher"),
        ("group_fisher", "unit", "word"), ("group_fisher", "share", 1.5),
    ],
)  # fmt: skip
def test_configuration_out_of_range_names_the_key(section, key, value):
    config = schema.Config()
    assert list(problems(config)) == []
    setattr(getattr(config, section), key, value)
    assert [problem[:2] for problem in problems(config)] == [(f"{section}.{key}", value)]


def test_probes_need_reorthogonalisation_before_any_work():
    config = configured(lanczos=1)
    config.lanczos.reorthogonalize = False
    assert list(problems(config)) == [
        ("lanczos.reorthogonalize", False, "true, or false with lanczos.density_probes=0")
    ]
    config.lanczos.density_probes = 0
    assert list(problems(config)) == []


@pytest.mark.parametrize(
    ("section", "key"), [("spectral", "eigensolve_device"), ("lanczos", "vector_device")]
)
def test_a_device_that_is_not_there_stops_before_any_work(section, key, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(
        "fisher_lab.workload.content_identity.content_identity", lambda config: {"data": "abc"}
    )
    config = configured(spectral=1, lanczos=1)
    assert preflight(config) == {"data": "abc"}
    setattr(getattr(config, section), key, "cuda")
    wanted = rf"^{section}\.{key}=cuda is not allowed: .* must be auto or cpu on a machine"
    with pytest.raises(ConfigError, match=wanted):
        preflight(config)
    # An engine that is off asks for nothing.
    getattr(config, section).enabled = False
    assert preflight(config) == {"data": "abc"}


def test_dtypes_and_sketch_rank_reach_the_engines(workload, run):
    config = configured(spectral=1, lanczos=1)
    config.spectral.storage_mode, config.spectral.sketch_rank = "sketch", 3
    config.spectral.dtype_eigensolve, config.lanczos.vector_dtype = "float32", "float32"
    config.lanczos.density_probes = 0
    metrics = run_engines(config, workload, run, Progress(False))
    found = json.loads((run.directory / "spectral.json").read_text())
    assert found["metadata"]["dtype_eigensolve"] == "float32"
    assert {len(r["eigenvalues"]) for r in found["per_block"].values()} <= {0, 3}
    # The model is in float64: 8 bytes a number without the setting.
    assert metrics["lanczos/bytes_per_parameter"] == 4 * 20


@pytest.mark.parametrize(("n_blocks", "title"), [(12, "N = 5"), (13, "N = 5; 12 of 13 blocks")])
def test_the_decay_says_what_it_leaves_out(n_blocks, title):
    record = {"status": "ok", "trace": 1.0, "eigenvalues": [1.0, 0.5], "threshold": 0.0}
    result = {
        "per_block": {f"b{i}": {**record, "trace": float(i)} for i in range(n_blocks)},
        "metadata": {"block_structure": "layer", "n_samples": 5},
    }
    axes, *_ = panels = curve_figures.spectrum_figure(result).axes
    said = axes.get_title().replace("\n", " ")
    assert said.replace(" (largest traces)", "").endswith(title)
    assert sum(len(one.lines) for one in panels) == 12
