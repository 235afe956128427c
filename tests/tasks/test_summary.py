"""The table at the end of a run, at eighty columns."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from fisher_lab.runs.record import Run
from fisher_lab.tasks import summary

METRICS = {
    "loss": 4.3812345,
    "tokens": 512,
    "ng/norm": 12345.678,
    "ng/heldout_loss": 4.01234,
    "kfac/clipped_frac_A": 0.12345,
    "kfac/kappa_G_max": 1e6,
    "kfac/total_s": 1.23456,
    "kfac/peak_mb": None,
    "some/other": 3.25,
}


def shown(
    metrics, rows=(), width=80, directory="/somewhere/" + 100 * "x", *, tmp_path: Path
) -> str:
    run = Run.start(tmp_path / directory.strip("/"), config={"task": {"name": "analyze"}})
    run.metrics(metrics)
    if rows:
        run.table("layers.csv", rows)
    out = io.StringIO()
    summary.show(run, console=Console(file=out, width=width, highlight=False))
    return out.getvalue()


def layers(count: int) -> list[dict]:
    return [
        {
            "name": f"transformer.h.{index}.a.very.long.name.of.a.layer.c_attn",
            "type": "Conv1D",
            "in": 128,
            "out": 384,
            "tokens": 512,
            "method": "woodbury" if index % 2 else "eig",
            "kappa_A": 1e6,
            "kappa_G": None,
            "bytes": 3 * 2**20,
            "seconds": 0.01,
        }
        for index in range(count)
    ]


def test_intervals_and_brackets_are_beside_their_numbers(tmp_path):
    numbers = {"": 494.0, "_se": 0.9, "_low": 492.2, "_high": 495.8}
    ends = {"_bracket_low": 492.8, "_bracket_high": 495.2}
    metrics = {f"lanczos/effective_dimension{k}": v for k, v in (numbers | ends).items()}
    metrics |= dict.fromkeys(("lanczos/trace", "lanczos/trace_low", "lanczos/trace_high"), 673.9)
    text = shown(metrics, tmp_path=tmp_path)
    assert "effective dimension (95 % interval)  494 (492.2 to 495.8)" in text
    assert "of it left open by Lanczos" in text
    assert "492.8 to 495.2" in text
    assert "673.9 (exact)" in text
    assert "_se" not in text
    assert "Others" not in text
    table = text.split("run directory")[0]
    assert max(len(line.rstrip()) for line in table.splitlines()) <= 80


def test_numbers_have_words_and_names(tmp_path):
    text = shown(METRICS, tmp_path=tmp_path)
    lines = text.splitlines()
    assert any("loss, nats a token" in line and "4.3812" in line for line in lines)
    assert any("4.0123" in line and "ng/heldout_loss" in line for line in lines)
    assert any("12.35%" in line and "kfac/clipped_frac_A" in line for line in lines)
    assert any("some/other" in line and "3.25" in line for line in lines)
    assert "kfac/peak_mb" not in text


def test_nothing_is_wider_than_eighty_columns_but_the_path(tmp_path):
    *lines, last = shown(METRICS, layers(3), tmp_path=tmp_path).splitlines()
    assert max(len(line) for line in lines) <= 80
    assert last.startswith("run directory")
    assert last.endswith(100 * "x")


def test_no_value_is_cut_however_long_its_words_and_its_name(tmp_path):
    metrics = {"kfac/coverage": 0.583, "loss/heldout_drawn": -1.23456, "ng/norm": 9.1e5}
    text = shown(metrics, tmp_path=tmp_path)
    assert "58.3%" in text
    assert "-1.2346" in text
    assert "9.1e+05" in text


@pytest.mark.parametrize(
    ("name", "limit", "text"),
    [
        ("lm_head", 7, "lm_head"),
        ("model.layers.0.self_attn.q_proj", 30, "m.layers.0.self_attn.q_proj"),
        ("model.layers.11.self_attn.q_proj", 17, "m.l.11.sa.q_proj"),
        ("model.layers.0.q_proj.lora_A.default", 22, "m.l.0.qp.lA.default"),
        ("model.layers.0.post_attention_layernorm", 20, "m.l.0.post_a…yernorm"),
        ("model.layers.0.mlp.experts.down_proj[3]", 20, "m.l.0.m.e.down…oj[3]"),
    ],
)
def test_a_short_name_keeps_numbers_beginning_and_end(name, limit, text):
    assert summary.short(name, limit) == text
    assert len(text) <= limit


def test_coverage_is_said_by_reason_with_the_first_layer_and_in_eighty_columns(tmp_path):
    run = Run.start(tmp_path, config={"task": {"name": "analyze"}})
    reasons = {
        f"reason {n} that is a rather long sentence of its own, with words": n for n in range(9)
    }
    coverage = {"covered": 100, "passed": {"never used": 300, **reasons}, "frozen": 1234}
    run.note(kfac={"coverage": coverage, "skipped": {"a.b": "never used", "c": "never used"}})
    out = io.StringIO()
    summary.show(run, console=Console(file=out, width=80, highlight=False))
    *lines, _ = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert any("100" in line and "22.9%" in line and "are covered" in line for line in lines)
    assert any("300" in line and "never used (a.b and 1 more)" in line for line in lines)
    assert any("6  " in line and "4 more reasons" in line for line in lines)
    assert any("1,234" in line and "frozen" in line for line in lines)


def test_layers_are_listed_and_summed_up(tmp_path):
    text = shown(METRICS, layers(3), tmp_path=tmp_path)
    assert text.count("Conv1D") == 3
    assert "3 layers: 2 eig, 1 woodbury" in text
    assert "3.00" in text


def test_many_layers_are_cut_and_said(tmp_path):
    text = shown(METRICS, layers(summary.MAX_ROWS + 5), tmp_path=tmp_path)
    assert text.count("Conv1D") == summary.MAX_ROWS
    assert "... 5 more" in text


def test_many_other_numbers_are_cut_and_said(tmp_path):
    text = shown({f"x/{n}": n for n in range(summary.MAX_OTHERS + 3)}, tmp_path=tmp_path)
    assert "... 3 more" in text


def test_a_run_without_numbers_still_says_where_it_is(tmp_path):
    assert "run directory" in shown({}, tmp_path=tmp_path)


@pytest.mark.parametrize(
    ("value", "form", "text"),
    [
        (None, "d", "-"),
        ("", ".1e", "-"),
        (1234567, "d", "1,234,567"),
        (0.00012345, "g", "0.0001234"),
        (2**20, "mib", "1.00"),
        (0.5, ".2%", "50.00%"),
        (True, "d", "True"),
        (1e6, ".1e", "1.0e+06"),
    ],
)
def test_number(value, form, text):
    assert summary.number(value, form) == text


STEP = {
    "first": "natural", "rival": "sign", "margin": 0.00984, "low": 0.00771, "high": 0.01197,
    "confidence": 0.95, "certain": True, "batches": 16, "edges": {"gradient": "zero"},
}  # fmt: skip


def test_the_closing_line_says_who_is_ahead_and_by_how_much(tmp_path):
    run = Run.start(tmp_path, config={"task": {"name": "analyze"}})
    run.note(step=STEP)
    row = {"length": 1.5, "distance": 0.25, "own_change": -0.02, "chosen": True}
    judged = {"judging_change": -0.0144, "judging_se": None}
    run.table("step_curve.csv", [{"direction": "natural", **row, **judged}])
    run.metrics({"step/natural/length": 1.5})
    out = io.StringIO()
    summary.show(run, console=Console(file=out, width=80, highlight=False))
    *lines, last, _ = out.getvalue().splitlines()
    assert last == "Winner: natural gradient, 9.84 [7.71, 12] mnat ahead of sign (95 %)"
    assert "gradient: no step lowers the loss of the half that chooses" in lines
    (step,) = [line.split() for line in lines if line.startswith("natural gradient  ")]
    assert step[2:] == ["1.5", "0.25", "-20.00", "-14.40", "-"]
    assert not any("step/natural" in line for line in lines)
    assert max(map(len, lines)) <= 80


def test_the_closing_line_names_no_winner_where_the_interval_holds_zero():
    open_ = {**STEP, "certain": False, "low": -0.0005, "edges": {"sign": "longest"}}
    edge, line = summary.step_lines(open_)
    assert line == "No winner: natural gradient 9.84 [-0.5, 12] mnat ahead of sign (95 %)"
    assert edge == "sign: the loss still falls at the longest step that was tried"
    (few,) = summary.step_lines({**open_, "edges": {}, "low": None})
    assert "too few held-out batches" in few
    assert summary.step_lines({}) == []


def test_the_closing_line_puts_first_who_is_ahead_where_it_is_judged():
    turned = {**STEP, "certain": False, "margin": -0.002, "low": -0.0051, "high": 0.001}
    *_, line = summary.step_lines(turned)
    assert line == "No winner: sign 2 [-1, 5.1] mnat ahead of natural gradient (95 %)"
