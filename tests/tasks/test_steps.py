"""The step curves of `task=analyze`: the record agrees with the model that was moved by hand."""

import csv
import json
import math

import pytest
import torch

from fisher_lab.analysis import summed_loss
from fisher_lab.distributed.process_group import Ranks
from fisher_lab.tasks.steps import eta_of, heldout_parts
from fisher_lab.tasks.summary import winner_line
from tests.tasks.test_analyze import analysed, collected, config

SMALL = ("kfac.damping=0.1", "task.heldout_batches=6")


def rows_of(directory):
    with (directory / "step_curve.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_judged_change_is_that_of_a_model_moved_by_hand(tmp_path):
    metrics, _, record = analysed(tmp_path, *SMALL)
    rows = rows_of(tmp_path)
    assert {row["direction"] for row in rows} == {"natural", "gradient", "sign"}
    kfac, workload = collected(*SMALL)
    batches = workload.batches("train", 1, 0)
    kfac.collect_kfac_factors(workload.model, batches, loss=workload.loss_fn, keep_gradient=True)
    gradient = kfac.own_gradients(workload.model)
    natural = kfac.compute_natural_gradient(None, workload.model)
    covered = [name for name in gradient if name not in kfac.uncovered]
    tensors = {"natural": natural, "gradient": gradient}
    tensors["sign"] = {name: value.sign() for name, value in gradient.items()}
    heldout = workload.batches("heldout", 6, 0)
    parameters = dict(workload.model.named_parameters())
    for name, direction in tensors.items():
        (row,) = [r for r in rows if r["direction"] == name and r["chosen"] == "true"]
        length = float(row["length"])
        assert metrics[f"step/{name}/length"] == pytest.approx(length)
        norm = math.sqrt(sum(float(direction[n].double().square().sum()) for n in covered))
        assert float(row["distance"]) == pytest.approx(length * norm, rel=1e-6)
        sets = {"own": batches, "choosing": heldout[0::2], "judging": heldout[1::2]}
        before = {key: summed_loss(workload.model, some) for key, some in sets.items()}
        kept = {n: parameters[n].detach().clone() for n in covered}
        with torch.no_grad():
            for n in covered:
                parameters[n].copy_(kept[n].double() - length * direction[n].double())
            after = {key: summed_loss(workload.model, some) for key, some in sets.items()}
            for n in covered:
                parameters[n].copy_(kept[n])
        for key in sets:
            change = (after[key][0] - before[key][0]) / before[key][1]
            assert float(row[f"{key}_change"]) == pytest.approx(change, rel=1e-3, abs=1e-6), key
        judged = float(row["judging_change"])
        assert metrics[f"step/{name}/heldout_change"] == pytest.approx(judged)
    gain = metrics["step/gradient/heldout_change"] - metrics["step/natural/heldout_change"]
    assert metrics["step/natural/gain"] == pytest.approx(gain)
    assert record["provenance"]["step"]["first"] in tensors
    assert (tmp_path / "step_curve.png").stat().st_size > 0
    assert metrics["step/batches"] == 3
    assert "step/gradient/gain" not in metrics


def test_with_ekfac_both_natural_gradients_are_tried(tmp_path):
    metrics, _, _ = analysed(tmp_path, "kfac.ekfac=true", *SMALL)
    plain, _, _ = analysed(tmp_path / "plain", *SMALL)
    for key in ("length", "heldout_change", "own_change"):
        assert metrics[f"step/natural/{key}"] == pytest.approx(
            plain[f"step/natural/{key}"], rel=1e-3
        )
    assert metrics["step/ekfac/length"] != pytest.approx(metrics["step/natural/length"], rel=1e-2)


def test_no_heldout_window_comes_twice(caplog):
    _, workload = collected()
    most = workload.objective.distinct_batches(2, 32)
    assert most is not None
    cfg = config(f"task.heldout_batches={most + 3}")
    batches = heldout_parts(cfg, workload, Ranks())
    assert len(batches) == most
    assert f"the held-out text has {most} batches" in caplog.text
    windows = torch.cat([batch["input_ids"] for batch in batches])
    assert len(torch.unique(windows, dim=0)) > 0.99 * len(windows)


def test_one_heldout_batch_chooses_and_nothing_judges(tmp_path):
    metrics, _, record = analysed(tmp_path, "kfac.damping=0.1", "task.heldout_batches=1")
    assert "step/natural/heldout_change" not in metrics
    assert metrics["step/natural/own_change"] < 0
    text = json.dumps(record["provenance"]["step"])
    assert '"low": null' in text


def test_no_heldout_batch_tries_no_step(tmp_path):
    metrics, _, record = analysed(tmp_path, "task.heldout_batches=0")
    assert metrics["ng/decrement"] > 0
    assert not [name for name in metrics if name.startswith("step/")]
    assert "step" not in record["provenance"]
    assert not (tmp_path / "step_curve.csv").exists()


def test_steps_that_are_all_zero_have_no_margin():
    both = {"first": "natural", "rival": "sign", "margin": 0.0, "low": 0.0, "high": 0.0}
    line = winner_line({"confidence": 0.95, "certain": False, **both})
    assert line == "No winner: along no direction a step lowers the held-out loss"


def test_eta_fixes_the_quadratic_term():
    assert eta_of(4.0) ** 2 * 4.0 / 2 == pytest.approx(0.01)
    assert math.isnan(eta_of(0.0))
    assert math.isnan(eta_of(-1.0))
