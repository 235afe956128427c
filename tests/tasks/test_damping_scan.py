"""The damping scan: every pair is what a run with these dampings finds, from one set of factors."""

import csv

import pytest

from fisher_lab.curvature.kfac.engine import KFACNaturalGradient
from tests.tasks.test_analyze import analysed

COMMON = ("kfac.damping=null", "kfac.damping_A=0.2", "kfac.damping_G=0.1", "task.heldout_batches=6")


def scanned(directory):
    with (directory / "damping_scan.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {(float(row["factor_A"]), float(row["factor_G"])): row for row in rows}


def test_every_pair_is_what_a_run_with_its_dampings_finds(tmp_path, monkeypatch):
    collect, calls = KFACNaturalGradient.collect_kfac_factors, []

    def counted(engine, *arguments, **more):
        calls.append(None)
        return collect(engine, *arguments, **more)

    monkeypatch.setattr(KFACNaturalGradient, "collect_kfac_factors", counted)
    metrics, _, _ = analysed(tmp_path / "scan", "task.damping_scan=[0.1,10]", *COMMON)
    assert len(calls) == 1
    rows = scanned(tmp_path / "scan")
    assert sorted(rows) == [(a, g) for a in (0.1, 1.0, 10.0) for g in (0.1, 1.0, 10.0)]
    own = rows[1.0, 1.0]
    assert [key for key, row in rows.items() if row["default"] == "true"] == [(1.0, 1.0)]
    assert float(own["judging_change"]) == pytest.approx(metrics["step/natural/heldout_change"])
    assert float(own["length"]) == pytest.approx(metrics["step/natural/length"])
    assert float(own["gain"]) == 0.0
    row = rows[10.0, 0.1]
    assert (float(row["damping_A"]), float(row["damping_G"])) == pytest.approx((2.0, 0.01))
    more = (*COMMON[:1], "kfac.damping_A=2.0", "kfac.damping_G=0.01", COMMON[-1])
    there, _, _ = analysed(tmp_path / "there", *more)
    assert float(row["length"]) == pytest.approx(there["step/natural/length"], rel=1e-3)
    changes = [float(rows[key]["choosing_change"]) for key in rows]
    (best,) = [row for row in rows.values() if row["chosen"] == "true"]
    assert float(best["choosing_change"]) == min(changes)
    assert metrics["scan/best_damping_A"] == float(best["damping_A"])
    gain = float(own["judging_change"]) - float(best["judging_change"])
    assert float(best["gain"]) == pytest.approx(gain, abs=1e-12)
    assert metrics["scan/gain"] == pytest.approx(gain, abs=1e-12)
    assert (tmp_path / "scan" / "damping_scan.png").stat().st_size > 0


@pytest.mark.parametrize("mode", ["relative", "pi"])
def test_multiples_go_with_every_mode(tmp_path, mode):
    given = ("kfac.damping=0.1", f"kfac.damping_mode={mode}", "task.damping_scan=[10]")
    metrics, rows, _ = analysed(tmp_path, *given, "task.heldout_batches=4")
    assert len(scanned(tmp_path)) == 4
    assert "scan/gain" in metrics
    assert len({row["damping_G"] for row in rows}) > 3  # of the run itself: layer by layer
