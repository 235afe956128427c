"""`task=analyze` with the spectral engines on several ranks, through the real command line."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.runs_on_ranks import SMALL, TIMES, finished, metrics_of, rows_of

ENGINES = (
    "spectral=layer", "lanczos=top10", "lanczos.k=4", "lanczos.density_probes=2",
    "lanczos.density_steps=8", "group_fisher=default", "task=analyze",
)  # fmt: skip
UNEVEN = ("data.batch_size=3", "kfac.n_batches=2", "task.engine_batches=2")
"""Two sequences of every batch on rank 0, one on rank 1: the ranks' order is not that of one."""


def numbers(directory: Path) -> dict[str, float]:
    """What does not depend on the clock, nor on how many processes there are."""
    return {
        name: value
        for name, value in metrics_of(directory).items()
        if not name.startswith("dist/") and not name.endswith((*TIMES, "_s_max", "bytes_max"))
    }


@pytest.mark.slow
@pytest.mark.timeout(1600)
@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-10), ("float32", 1e-5)])
def test_two_ranks_give_the_numbers_of_one(tmp_path, dtype, bound):
    one, two = tmp_path / "one", tmp_path / "two"
    for directory, more in ((one, ()), (two, ("distributed.nproc=2",))):
        more = (*more, f"model.dtype={dtype}", f"hydra.run.dir={directory}")
        code, out = finished(*SMALL, *ENGINES, *UNEVEN, *more, timeout=500)
        assert code == 0, out
    expected, found = numbers(one), numbers(two)
    assert set(found) == set(expected)
    assert {
        "spectral/largest_eigenvalue", "spectral/trace", "lanczos/eigenvalue_3", "lanczos/trace",
        "lanczos/effective_dimension", "group_fisher/trace", "group_fisher/token_total",
    } <= set(found)  # fmt: skip
    # What rests on the smallest numbers, or on differences: rounding is a larger part of these.
    wide = 1e-7 if dtype == "float64" else 1e-2
    loose = {"lanczos/residual_max": 0.1, "spectral/condition_number": 1e-3}
    ends = ("se", "low", "high", "bracket_low", "bracket_high")
    loose |= {f"lanczos/{x}_{end}": wide for x in ("trace", "effective_dimension") for end in ends}
    for name, value in expected.items():
        if name.startswith(("spectral/", "lanczos/", "group_fisher/")):
            assert found[name] == pytest.approx(value, rel=loose.get(name, bound)), name
        else:  # K-FAC: its own tests have its tolerances
            # A change is a difference of losses, which are in float32 here; where it is lowest, it
            # hardly depends on the length.
            least = 5e-6 if name.endswith("_change") else 0
            least = 1e-9 if name == "kfac/residual_max" else least
            width = 1e-2 if name.startswith("step/") and name.endswith("/length") else 1e-5
            assert found[name] == pytest.approx(value, rel=width, abs=least), name
    moved = metrics_of(two)
    for engine in ("spectral", "lanczos", "group_fisher"):
        assert moved[f"{engine}/sent_bytes_max"] > 0
        assert f"{engine}/sent_bytes_max" not in metrics_of(one)
    check_files(one, two, bound)


def check_files(one: Path, two: Path, bound: float) -> None:
    """Rank 0 wrote what one process writes."""
    names = {path.name for path in one.iterdir()}
    assert names <= {path.name for path in two.iterdir()}
    first, second = (json.loads((d / "spectral.json").read_text()) for d in (one, two))
    for key in ("data_hash", "subsample_hash", "n_samples", "factored_weights"):
        assert second["metadata"][key] == first["metadata"][key]
    assert len(second["metadata"]["samples_by_rank"]) == 2
    assert all(count > 0 for count in second["metadata"]["samples_by_rank"])
    assert list(second["per_block"]) == list(first["per_block"])
    scores, others = (rows_of(d / "group_fisher.csv") for d in (one, two))
    assert [(r["kind"], r["group"]) for r in scores] == [(r["kind"], r["group"]) for r in others]
    largest: dict[str, float] = {}
    for row in scores:
        largest[row["kind"]] = max(largest.get(row["kind"], 0.0), float(row["importance"]))
    for row, other in zip(scores, others, strict=True):
        difference = abs(float(row["importance"]) - float(other["importance"]))
        assert difference <= bound * largest[row["kind"]], row["group"]
    states = [
        json.loads((d / "group_fisher" / "group_fisher.json").read_text()) for d in (one, two)
    ]
    tokens: list[Any] = [[(t["name"], t["token_total"]) for t in s["tasks"]] for s in states]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("key", ["distributed.nproc=2", "distributed.nodes=2"])
def test_a_sketch_on_ranks_is_refused_before_any_work(tmp_path, key):
    arguments = ("spectral=sketch", key, f"hydra.run.dir={tmp_path / 'run'}")
    code, out = finished(*SMALL, *arguments, timeout=120)
    assert code == 2
    assert out.count("\n") == 1
    assert "spectral.storage_mode=sketch is not allowed" in out
    assert not (tmp_path / "run").exists()
