"""`task=ladder` on a tiny model: table, numbers, figure and screen."""

import json
import math

import pytest

from fisher_lab.config.errors import ConfigError
from fisher_lab.runs.record import Run
from fisher_lab.tasks import ladder, summary
from tests.config.test_groups import composed
from tests.tasks.test_analyze import TINY


def climbed(directory, *overrides):
    run = Run.start(directory, config={"task": {"name": "ladder"}})
    ladder.run(composed(*TINY, "task=ladder", *overrides), run)
    run.complete()
    return run, json.loads((directory / "metrics.json").read_text())


def test_every_rung_is_in_table_numbers_figure_and_screen(tmp_path):
    run, metrics = climbed(tmp_path, "task.ladder_damping=100", "task.heldout_batches=4")
    rows = run.tables["ladder.csv"]
    whole = {row["rung"]: row for row in rows if row["layer"] == "all"}
    assert list(whole) == [
        "exact", "blocks", "ekfac_sequence", "ekfac_token", "kfac", "kfac_reduce", "diagonal",
        "identity", "kfac_split",
    ]  # fmt: skip
    assert whole["exact"]["error"] == 0
    assert whole["exact"]["residual"] < 1e-10
    for name, row in whole.items():
        assert metrics[f"ladder/{name}/cosine"] == pytest.approx(row["cosine"])
        assert metrics.get(f"ladder/{name}/error") == row["error"]
        assert math.isfinite(metrics[f"step/{name}/heldout_change"])
    assert whole["kfac_split"]["error"] is None  # of another damping
    layers = {row["layer"] for row in rows} - {"all"}
    assert "transformer.h.0.mlp.c_fc" in layers
    shares = [r["share"] for r in rows if r["rung"] == "kfac" and r["layer"] != "all"]
    assert sum(shares) == pytest.approx(1.0)
    assert (tmp_path / "ladder.png").stat().st_size > 5000
    assert (tmp_path / "step_curve.png").exists()
    summary.show(run)


def test_the_screen_has_eighty_columns(tmp_path, capsys):
    run, _ = climbed(tmp_path, "task.ladder_damping=100", "task.heldout_batches=2")
    summary.show(run)
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines if not line.startswith("run directory")) <= 80
    text = "\n".join(lines)
    for word in ("Relative error", "EK seq", "all, cosine", "exact to", "K-FAC, own damping"):
        assert word in text


def test_over_the_models_own_labels_the_diagonal_is_left_out(tmp_path, caplog):
    with caplog.at_level("WARNING"):
        run, metrics = climbed(
            tmp_path, "kfac.fisher=mc", "task.ladder_damping=100", "task.ladder_products=4",
            "task.heldout_batches=2",
        )  # fmt: skip
    assert "diagonal is left out: " in caplog.text
    assert "exact Fisher: residual" in caplog.text
    assert "ladder/diagonal/error" not in metrics
    assert run.record["provenance"]["ladder"]["operator"] == "true"


@pytest.mark.parametrize(
    ("override", "words"),
    [("kfac.tied=sum", "kfac.tied"), ("distributed.nproc=2", "distributed.nproc")],
)
def test_what_it_cannot_do_is_said_before_the_work(override, words):
    with pytest.raises(ConfigError, match=words):
        composed(*TINY, "task=ladder", override)
