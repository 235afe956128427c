"""The table at the end of a run, at eighty columns."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from fisher_lab.results import labels
from fisher_lab.runs.record import Run
from fisher_lab.tasks import layer_table, summary

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
    assert "effective dimension, matrix of Lanczos  494 (492.2 to 495.8)" in text
    assert "of it left open by Lanczos" in text
    assert "492.8 to 495.2" in text
    assert "673.9 (exact)" in text
    assert "_se" not in text
    assert "Others" not in text
    table = text.split("run directory")[0]
    assert max(len(line.rstrip()) for line in table.splitlines()) <= 80


def test_numbers_have_words_and_with_verbose_their_keys(tmp_path, monkeypatch):
    lines = shown(METRICS, tmp_path=tmp_path).splitlines()
    assert any(
        "held-out loss, batches of the steps, nats/token" in x and "4.0123" in x for x in lines
    )
    assert any("eigenvalues of A raised to the floor" in x and "12.35%" in x for x in lines)
    assert any("some/other" in line and "3.25" in line for line in lines)  # nobody knows it
    assert not any("kfac/" in line or "512" in line for line in lines)
    monkeypatch.setenv(layer_table.VERBOSE, "1")
    lines = shown(METRICS, tmp_path=tmp_path / "all").splitlines()
    assert any("kfac/clipped_frac_A" in line and "12.35%" in line for line in lines)
    assert any("tokens" in line and "512" in line for line in lines)
    assert not any("kfac/peak_mb" in line for line in lines)  # there is no number


def test_nothing_is_wider_than_eighty_columns_but_the_path(tmp_path):
    *lines, last = shown(METRICS, layers(3), tmp_path=tmp_path).splitlines()
    assert max(len(line) for line in lines) <= 80
    assert last.startswith("run directory")
    assert last.endswith(100 * "x")


def test_no_value_is_cut_however_long_its_words_and_its_name(tmp_path):
    metrics = {"kfac/clipped_frac_A": 0.583, "loss/heldout_drawn": -1.23456, "ng/norm": 9.1e5}
    text = shown(metrics, tmp_path=tmp_path)
    assert "58.30%" in text
    assert "-1.2346" in text
    assert "9.1e+05" in text


@pytest.mark.parametrize(
    ("name", "limit", "lines"),
    [
        ("lm_head", 7, ["lm_head"]),
        ("model.layers.0.self_attn.q_proj", 31, ["model.layers.0.self_attn.q_proj"]),
        ("model.layers.11.self_attn.q_proj", 18, ["model.layers.11.", "  self_attn.q_proj"]),
        ("model.layers.0.mlp.experts.down_proj[3]", 20,
         ["model.layers.0.mlp.", "  experts.", "  down_proj[3]"]),
        ("averyveryverylongname", 8, ["averyveryverylongname"]),
    ],
)  # fmt: skip
def test_a_name_is_broken_between_its_parts_and_never_cut(name, limit, lines):
    broken = layer_table.broken(name, limit).split("\n")
    assert broken == lines
    assert "".join(map(str.strip, broken)) == name


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
    assert any("pass through, for 7 more reasons" in line for line in lines)
    assert any("1,234" in line and "frozen" in line for line in lines)


def test_few_layers_are_listed_one_by_one(tmp_path):
    text = shown(METRICS, layers(3), tmp_path=tmp_path)
    assert text.count("384") == 3
    assert "3 layers: 2 eig, 1 woodbury" in text
    assert "3.00" in text


def test_many_layers_are_one_line_with_ranges_and_sums(tmp_path, monkeypatch):
    many = layers(40)
    for index, row in enumerate(many):
        row |= {"kappa_A": 10.0**index, "out": 100 + index}
    text = shown(METRICS, many, tmp_path=tmp_path)
    (line,) = [line for line in text.splitlines() if "100-139" in line]
    assert line.split()[-4:] == ["100-139", "eig/woodbury", "1.0e0-1.0e39", "120.00"]
    assert "layers.csv, and with --verbose" in text
    assert "transformer.h.*." in text
    monkeypatch.setenv(layer_table.VERBOSE, "1")
    assert shown(METRICS, many, tmp_path=tmp_path / "all").count("c_attn") == 40


def test_kinds_are_as_fine_as_the_rows_allow():
    names = [f"h.{i}.{part}.{w}" for i in range(9) for part in ("a", "b") for w in "kqv"]
    rows = [{"name": name, "type": "Linear"} for name in names]
    from fisher_lab.results.layer_kinds import grouped

    assert {k: len(v) for k, v in grouped(rows, 12).items()} == {
        f"h.*.{part}.{w}": 9 for part in ("a", "b") for w in "kqv"
    }
    assert {k: len(v) for k, v in grouped(rows, 3).items()} == {f"*.{w}": 18 for w in "kqv"}
    assert list(grouped(rows, 2)) == ["all of type Linear"]
    assert len(grouped(rows, 54)) == 54


def test_what_nobody_knows_is_not_hidden_and_lists_are_short(tmp_path):
    text = shown({f"x/{n}": n for n in range(30)}, tmp_path=tmp_path)
    assert all(f"x/{n}" in text for n in range(30))
    values = {f"lanczos/eigenvalue_{n}": 100.0 - n for n in range(30)}
    text = shown(values, tmp_path=tmp_path / "list")
    assert "30 eigenvalues, matrix of Lanczos" in text
    assert "100 99 98" in text
    assert "... 71" in text


def test_the_default_run_has_forty_lines_at_most(tmp_path):
    """Its layers, its coverage, its steps and all its metrics."""
    run = Run.start(tmp_path, config={"task": {"name": "analyze"}})
    run.note(step=STEP, kfac={
        "coverage": {"covered": 1055488, "passed": {"not a look-up of tokens": 16384}, "frozen": 0},
        "labels": {"labelling": "shifted", "counted": 24384, "given": 24576},
    })  # fmt: skip
    parts = [("ln_1", 128), ("attn.c_attn", 384), ("attn.c_proj", 128), ("ln_2", 128),
             ("mlp.c_fc", 512), ("mlp.c_proj", 128)]  # fmt: skip
    blocks = [(f"transformer.h.{i}.{name}", out) for i in range(4) for name, out in parts]
    rows = [
        {"name": name, "in": 128, "out": out, "method": "eig", "kappa_A": 48.0 + out,
         "kappa_G": 1.4 * out, "bytes": 2**20, "seconds": 0.01}
        for name, out in (("lm_head", 2048), *blocks, ("transformer.ln_f", 128))
    ]  # fmt: skip
    run.table("layers.csv", rows)
    row = {"length": 1.5, "distance": 0.25, "own_change": -0.02, "chosen": True}
    judged = {"judging_change": -0.0144, "judging_se": None}
    names = ("natural", "gradient", "sign")
    run.table("step_curve.csv", [{"direction": n, **row, **judged} for n in names])
    engines = ("lanczos/", "spectral/", "group_fisher/", "scan/", "plan/", "train/", "dist/")
    others = ("heldout_drawn", "heldout_best", "diverged", "ekfac_clipped_frac")
    keys = [k for k in labels.catalogue().metrics if "{" not in k and not k.startswith(engines)]
    run.metrics({k: 1.5 for k in keys if not k.endswith(others)})
    out = io.StringIO()
    summary.show(run, console=Console(file=out, width=80, highlight=False))
    lines = out.getvalue().splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines[:-1])) <= 80
    assert any(line.startswith("transformer.h.*.mlp.c_proj") for line in lines)


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
    assert labels.number(value, form) == text


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
    first, *lines = out.getvalue().splitlines()
    assert first == "Winner: natural gradient, 9.84 [7.71, 12] mnat a token ahead of sign (95 %)"
    assert "gradient: no step lowers the loss of the half that chooses" in lines
    (step,) = [line.split() for line in lines if line.startswith("natural gradient  ")]
    assert step[2:] == ["1.5", "0.25", "-20.00", "-14.40", "-"]
    assert not any("step/natural" in line for line in lines)
    assert max(len(line) for line in lines if str(tmp_path) not in line) <= 80


def test_the_first_line_names_no_winner_where_the_interval_holds_zero():
    open_ = {**STEP, "certain": False, "low": -0.0005, "edges": {"sign": "longest"}}
    line = summary.winner_line(open_)
    assert line == "No winner: natural gradient 9.84 [-0.5, 12] mnat a token ahead of sign (95 %)"
    (edge,) = summary.edge_lines(open_)
    assert edge == "sign: the loss still falls at the longest step that was tried"
    assert "too few held-out batches" in summary.winner_line({**open_, "low": None})
    assert summary.edge_lines({}) == []
    assert summary.answer({}, {}) == []


def test_the_first_line_puts_first_who_is_ahead_where_it_is_judged():
    turned = {**STEP, "certain": False, "margin": -0.002, "low": -0.0051, "high": 0.001}
    line = summary.winner_line(turned)
    assert line == "No winner: sign 2 [-1, 5.1] mnat a token ahead of natural gradient (95 %)"


@pytest.mark.parametrize(
    ("metrics", "line"),
    [
        ({"train/steps": 200, "loss/heldout": 3.2, "loss/baseline": 6.5},
         "Held-out loss 3.2000 nats a token after 200 steps; 6.5000 is the trivial model's"),
        ({"diverged": 1, "train/diverged_step": 7, "train/steps": 7, "loss/heldout": 9.0},
         "Diverged at step 7"),
        ({"plan/bytes": 2**20, "plan/flops_factor": 1.2e9, "plan/flops_apply": 3e8},
         "Factors: 1.00 MiB, 1.2e9 operations to factor and 3.0e8 to apply"),
    ],
)  # fmt: skip
def test_other_tasks_have_an_answer_too(metrics, line):
    assert [text.plain for text in summary.answer(metrics, {})] == [line]
