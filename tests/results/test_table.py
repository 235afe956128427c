"""The ablation table: what stands in a cell, what is marked, and what every output says."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalOperand=false
# pyright: reportOptionalMemberAccess=false, reportOperatorIssue=false, reportOptionalIterable=false

from __future__ import annotations

import csv
import io
import json
import math
import os
import shutil
import subprocess

import numpy as np
import pytest
from scipy import stats as scipy_stats

from fisher_lab.results import export, load, tabulate
from fisher_lab.results.export import breakable, document, escape, to_latex
from fisher_lab.results.values import ResultsError
from tests.results.run_directories import crossed, make_run, make_sweep, swept

VALUES = {  # (policy, damping) -> a number a seed
    ("all", 1e-5): [1.0, 1.2, 1.1],
    ("all", 1e-4): [2.0, 2.2, 2.1],
    ("auto", 1e-5): [1.01, 1.19, 1.12],
    ("auto", 1e-4): [3.0, 3.3, 3.1],
}


@pytest.fixture
def sweep(tmp_path):
    def measure(policy, damping, seed):
        value = VALUES[policy, damping][seed]
        return {"ng/cosine": value, "kfac/total_s": 1 / value}

    axes = {"kfac.policy": ("all", "auto"), "kfac.damping": (1e-5, 1e-4), "seed": range(3)}
    return make_sweep(tmp_path / "s", crossed(axes, measure))


def key(table, policy, damping, metric="ng/cosine"):
    at = {"kfac.policy": policy, "kfac.damping": damping}
    row, col = (tuple(map(at.get, names)) for names in (table.row_names, table.col_names))
    return row, metric, col


def cell(table, policy, damping):
    return table.cells[key(table, policy, damping)]


def test_axes_are_found_and_cells_are_over_seeds(sweep):
    table = tabulate(load(sweep))
    assert sorted(table.row_names) == ["kfac.damping", "kfac.policy"]
    assert (table.col_names, table.over) == ([], ["seed"])
    assert len(table.rows) == 4
    for (policy, damping), numbers in VALUES.items():
        s = cell(table, policy, damping).summary
        assert (s.n, s.mean) == (3, pytest.approx(np.mean(numbers)))
        ends = scipy_stats.t.interval(0.95, 2, np.mean(numbers), scipy_stats.sem(numbers))
        assert (s.low, s.high) == pytest.approx(ends)


def test_rows_and_columns_as_asked(sweep):
    asked = {"rows": ["kfac/damping"], "cols": ["kfac/policy"], "metrics": ["ng/cosine"]}
    table = tabulate(load(sweep), **asked)
    assert table.rows == [(1e-5,), (1e-4,)]
    assert table.cols == [("all",), ("auto",)]
    assert export.grid(table).names == ["damping λ", "cosine, all", "cosine, auto"]


def test_a_setting_that_was_forgotten_becomes_a_row_and_is_not_averaged(sweep):
    table = tabulate(load(sweep), rows=["kfac.policy"], metrics=["ng/cosine"])
    assert table.row_names == ["kfac.policy", "kfac.damping"]
    assert any("kfac.damping varies too" in note for note in table.notes)
    over = tabulate(load(sweep), rows=["kfac.policy"], over=["seed", "kfac.damping"])
    assert cell(over, "all", 1e-5).summary.n == 6


def test_times_are_medians_with_quartiles(sweep):
    table = tabulate(load(sweep))
    assert table.statistic == {"ng/cosine": "mean", "kfac/total_s": "median"}
    text = export.to_text(table, 120)
    assert "0.909 [0.871, 0.955]" in text  # 1, 1/1.1, 1/1.2


def test_best_and_ties_are_marked(sweep):
    table = tabulate(load(sweep), metrics=["ng/cosine"], directions={"ng/cosine": "max"})
    assert len(table.cells) == 4
    assert table.best == {key(table, "auto", 1e-4)}
    assert table.ties == set()
    least = tabulate(load(sweep), metrics=["ng/cosine"], directions={"ng/cosine": "min"})
    (best,), (tie,) = least.best, least.ties
    assert {best, tie} == {key(least, policy, 1e-5) for policy in ("all", "auto")}
    none = tabulate(load(sweep), directions={"kfac/total_s": "none"}, metrics=["kfac/total_s"])
    assert none.best == set()
    assert tabulate(load(sweep), metrics=["kfac/total_s"]).best != set()
    assert tabulate(load(sweep), metrics=["ng/cosine"]).best == set()  # no cosine is better


def test_the_confidence_goes_for_marks_and_differences_too(sweep):
    """The others are told from the best at 95 %, and not at 99.9 %."""
    frame = load(sweep)
    marked = {}
    for confidence in (0.95, 0.999):
        table = tabulate(frame, metrics=["ng/cosine"], baseline={"kfac.policy": "all"},
                         confidence=confidence, directions={"ng/cosine": "max"})  # fmt: skip
        marked[confidence] = len(table.ties)
        d = table.comparisons[key(table, "auto", 1e-4)].difference
        known = scipy_stats.ttest_rel(VALUES["auto", 1e-4], VALUES["all", 1e-4])
        assert (d.low, d.high) == pytest.approx(tuple(known.confidence_interval(confidence)))
        text = export.to_text(table)
        percent = {0.95: "95%", 0.999: "99.9%"}[confidence]
        assert f"mean ± half the {percent} interval; over seed, n = 3" in text
        assert f"mean ± half the {percent} interval, paired t test" in text
    assert marked == {0.95: 0, 0.999: 3}


def marks(tmp_path, metric, cells, **more):
    """Which mark stands at each value of kfac.damping."""
    axes = {"kfac.damping": cells, "seed": range(len(cells[1e-5]))}
    frame = swept(tmp_path, axes, lambda d, s: {metric: cells[d][s]})
    table = tabulate(frame, metrics=[metric], **more)
    return {row[0]: export.cell_text(table, (row, metric, ())).mark for row in table.rows}


def test_what_no_reader_can_see_is_no_better(tmp_path):
    """Every seed gains 3e-7 of the size: significant, and nothing."""
    gains = [-33.0, -35.0, -31.0, -34.0]
    slightly = [v * (1 - 3e-7 - 1e-9 * i) for i, v in enumerate(gains)]
    worse = [v - 20.0 - i for i, v in enumerate(gains)]
    cells = {1e-5: gains, 1e-4: slightly, 1e-3: worse}
    assert marks(tmp_path, "ng/heldout_loss_decrease", cells) == {1e-5: "~", 1e-4: "*", 1e-3: ""}
    two = {1e-5: gains, 1e-4: slightly}
    assert set(marks(tmp_path / "two", "ng/heldout_loss_decrease", two).values()) == {""}
    # More than 1e-6, but the digits that are shown are the same.
    shown = {1e-5: gains, 1e-4: [v + 1e-3 for v in gains], 1e-3: worse}
    assert marks(tmp_path / "c", "step/natural/gain", shown) == {1e-5: "~", 1e-4: "*", 1e-3: ""}


def test_a_clipped_share_has_no_best(tmp_path):
    cells = {1e-5: [0.25, 0.26, 0.27], 1e-4: [0.0, 0.0, 0.0]}
    for side in "AG":
        name = f"kfac/clipped_frac_{side}"
        assert set(marks(tmp_path / side, name, cells).values()) == {""}
        least = marks(tmp_path / side, name, cells, directions={name: "min"})
        assert least == {1e-5: "", 1e-4: "*"}


def test_the_best_of_a_target_is_the_nearest_to_it(tmp_path):
    near, far = [1.02, 0.97, 1.01], [0.5, 0.52, 0.49]
    cells = {1e-5: far, 1e-4: near, 1e-3: [1.8, 1.9, 1.85]}
    assert marks(tmp_path, "train/reduction_ratio", cells) == {1e-5: "", 1e-4: "*", 1e-3: ""}
    beyond = {1e-5: [0.98, 0.97, 1.02], 1e-4: near}
    assert set(marks(tmp_path / "tie", "train/reduction_ratio", beyond).values()) == {"*", "~"}


def test_times_are_tied_by_what_they_show(tmp_path):
    """One slow run makes any mean of the differences, and no median."""
    fast = [0.546, 0.54, 0.55, 0.56, 0.53, 0.545, 0.548]
    slow = [0.683, 0.679, 0.681, 0.732, 0.684, 0.68, 40.0]
    near = [0.55, 0.538, 0.553, 0.557, 0.535, 0.547, 0.549]
    cells = {1e-5: fast, 1e-4: slow, 1e-3: near}
    assert marks(tmp_path / "a", "kfac/total_s", cells) == {1e-5: "*", 1e-4: "", 1e-3: "~"}
    means = marks(tmp_path / "a", "kfac/total_s", cells, statistic="mean")
    assert means[1e-4] == "~"


def test_the_mean_of_times_has_an_interval_from_logarithms(tmp_path):
    """It is not symmetric, and so both ends are shown."""
    times = [1.0, 2.0, 6.0]
    frame = swept(tmp_path, {"seed": range(3)}, lambda s: {"kfac/total_s": times[s]})
    table = tabulate(frame, statistic="mean")
    (key,) = table.cells
    s = table.cells[key].summary
    logs = np.log(times)
    m, v = logs.mean(), logs.var(ddof=1)
    half = scipy_stats.t.ppf(0.975, 2) * math.sqrt(v / 3 + v**2 / 4)
    assert (s.low, s.high) == pytest.approx(tuple(np.exp([m + v / 2 - half, m + v / 2 + half])))
    shown = export.cell_text(table, key)
    assert shown.plain.startswith("3.0 [")
    assert "from logarithms] of times" in table.notes[0]
    assert "[" in export.to_latex(table)


def test_times_are_compared_with_a_baseline_by_their_ratio(tmp_path):
    values = {"all": [1.0, 1.5, 2.5], "auto": [2.1, 2.9, 5.2]}
    axes = {"kfac.policy": values, "seed": range(3)}
    frame = swept(tmp_path, axes, lambda p, s: {"kfac/total_s": values[p][s]})
    table = tabulate(frame, baseline={"kfac.policy": "all"})
    (found,) = (c.difference for c in table.comparisons.values() if not c.is_baseline)
    known = scipy_stats.ttest_1samp(np.log(values["auto"]) - np.log(values["all"]), 0.0)
    ends = known.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((math.exp(ends.low), math.exp(ends.high)))
    assert found.p == pytest.approx(known.pvalue)
    (row,) = export.differences(table).rows
    assert row[2] == f"{found.mean:.3g} times [{found.low:.3g}, {found.high:.3g}]"
    (line,) = [r for r in csv.DictReader(io.StringIO(export.to_csv(table)))
               if r["kfac.policy"] == "auto"]  # fmt: skip
    assert (float(line["ratio"]), line["difference"]) == (found.mean, "")
    assert any("of times the ratio" in note for note in table.notes)


def test_the_bootstrap_is_refused_for_few_runs(tmp_path):
    axes = {"kfac.policy": ("all",), "seed": range(9)}
    frame = swept(tmp_path, axes, lambda p, s: {"ng/cosine": math.sqrt(s + 1)})
    with pytest.raises(ResultsError, match="there are 9 runs, and a bootstrap interval needs 10"):
        tabulate(frame, interval="bootstrap")
    axes = {"kfac.policy": ("auto",), "seed": range(10)}
    more = crossed(axes, lambda p, s: {"ng/cosine": math.sqrt(s + 1)})
    make_sweep(tmp_path / "s" / "more", more)
    table = tabulate(load(tmp_path / "s"), interval="bootstrap")
    widths = {row[0]: table.cells[row, "ng/cosine", ()].summary.half_width for row in table.rows}
    assert math.isnan(widths["all"])
    assert widths["auto"] > 0
    assert any("cells with fewer runs have no interval" in note for note in table.notes)


def test_standard_deviation_and_n_are_shown_on_demand(sweep):
    frame = load(sweep)
    plain, table = tabulate(frame), tabulate(frame, details=True)
    at, time = key(table, "all", 1e-4), key(table, "all", 1e-4, "kfac/total_s")
    assert export.cell_text(plain, at).plain == "2.10 ± 0.25"
    assert export.cell_text(table, at).plain == "2.10 ± 0.25 (sd 0.10, n 3)"
    assert export.cell_text(table, time).plain == "0.476 [0.465, 0.488] (n 3)"
    for text in (export.to_text(table, 120), export.to_markdown(table), export.to_html(table)):
        assert "2.10 ± 0.25 (sd 0.10, n 3)" in text
        assert "sd is the standard deviation" in text
    assert r"$2.10 \pm 0.25$ {\footnotesize (sd $0.10$, n 3)}" in to_latex(table)
    assert r"{\footnotesize (sd \num[separate-uncertainty]{0.10}, n 3)}" in to_latex(
        table, siunitx=True
    )
    assert export.to_csv(table) == export.to_csv(plain)


def test_a_difference_of_rounding_reads_identical(tmp_path):
    values = {"all": [0.3, 0.6], "auto": [0.1 + 0.2, 0.6]}
    axes = {"kfac.policy": values, "seed": range(2)}
    frame = swept(tmp_path, axes, lambda p, s: {"ng/cosine": values[p][s]})
    table = tabulate(frame, baseline={"kfac.policy": "all"})
    (found,) = (c.difference for c in table.comparisons.values() if not c.is_baseline)
    assert 0 < found.mean < 1e-16
    assert export.differences(table).rows == [["auto", "cosine", "identical", "", "", "2"]]


def test_differences_to_a_baseline_are_paired_and_corrected(sweep):
    table = tabulate(load(sweep), baseline={"kfac.policy": "all"}, metrics=["ng/cosine"])
    p = []
    for damping in (1e-5, 1e-4):
        a, b = VALUES["auto", damping], VALUES["all", damping]
        comparison = table.comparisons[key(table, "auto", damping)]
        known = scipy_stats.ttest_rel(a, b)
        assert comparison.difference.p == pytest.approx(known.pvalue)
        assert comparison.difference.mean == pytest.approx(np.mean(a) - np.mean(b))
        p.append((known.pvalue, comparison.p_holm))
    low, high = sorted(p)
    assert low[1] == pytest.approx(2 * low[0])
    assert high[1] == pytest.approx(max(high[0], 2 * low[0]))


@pytest.fixture
def lost(tmp_path):
    root = tmp_path / "s"
    no_room = MemoryError("no room")
    for policy, outcomes in {
        "all": [0.0, 0.1, 0.2],
        "auto": [0.9, math.nan, no_room],
        "hybrid": [no_room] * 3,
        "small_only": [0.5, "running"],
    }.items():
        for seed, outcome in enumerate(outcomes):
            name = {float: "metrics", str: "status"}.get(type(outcome), "error")
            value = {"ng/cosine": outcome} if name == "metrics" else outcome
            settings = {"kfac.policy": policy, "seed": seed}
            make_run(root / f"{policy}-{seed}", settings, **{name: value})
    return root


def test_what_is_lost_is_shown_and_never_averaged_away(lost):
    table = tabulate(load(lost), metrics=["ng/cosine"])
    shown = {row[0]: export.cell_text(table, (row, "ng/cosine", ())).plain for row in table.rows}
    assert shown["all"].startswith("0.10 ± 0.25")
    assert shown["auto"] == "0.9000 (1 diverged, 1 failed of 3)"
    assert shown["hybrid"] == "failed"
    assert shown["small_only"] == "0.5000 (1 running, 1 missing of 3)"
    assert table.cells[("hybrid",), "ng/cosine", ()].reasons == ("MemoryError: no room",)
    assert table.best == set()  # only one cell is whole
    details = tabulate(load(lost), metrics=["ng/cosine"], details=True)
    part = export.cell_text(details, (("auto",), "ng/cosine", ()))
    assert part.plain == "0.9000 (n 1; 1 diverged, 1 failed of 3)"
    assert any("3 of 4 cells lack runs" in note for note in table.notes)


def test_one_seed_gives_no_interval_and_says_so(tmp_path):
    frame = swept(tmp_path, {"kfac.damping": (0.01, 0.02)}, lambda d: {"ng/cosine": 10 * d})
    table = tabulate(frame)
    assert table.notes[0] == "one run per cell: no interval can be given"
    assert "±" not in export.to_text(table).replace(table.notes[0], "")


def test_two_runs_are_two_numbers_without_an_interval(tmp_path):
    axes = {"kfac.damping": (0.01, 0.02), "seed": range(2)}
    table = tabulate(swept(tmp_path, axes, lambda d, s: {"m": d * 100 + 10.0 * s, "t_s": d + s}))
    assert export.cell_text(table, ((0.01,), "m", ())).plain == "1, 11"
    assert export.cell_text(table, ((0.01,), "t_s", ())).plain == "0.01000, 1.010"
    assert all(math.isnan(end) for end in table.point(((0.01,), "m", ()))[1:])
    assert table.notes[0] == "of two runs both numbers; over seed, n = 2"
    assert "$1$, $11$" in to_latex(table)
    assert "±" not in export.to_text(table) + export.to_markdown(table)


def test_a_seed_that_was_run_twice_counts_once_and_a_later_failure_hides_nothing(sweep):
    settings = {"kfac.policy": "all", "kfac.damping": 1e-5, "seed": 0}
    make_run(sweep / "failed", settings, error=RuntimeError("x"))
    assert cell(tabulate(load(sweep), metrics=["ng/cosine"]), "all", 1e-5).complete
    make_run(sweep / "repeated", settings, {"ng/cosine": 5.0})
    table = tabulate(load(sweep), metrics=["ng/cosine"])
    found = cell(table, "all", 1e-5)
    assert sorted(found.values) == [1.1, 1.2, 5.0]
    assert any("repeat settings" in note for note in table.notes)


def test_a_grid_with_a_hole(sweep):
    for name in os.listdir(sweep):
        if name.isdecimal() and int(name) >= 9:
            os.remove(sweep / name / "run.json")
    table = tabulate(load(sweep), cols=["kfac.policy"], metrics=["ng/cosine"])
    shown = export.cell_text(table, ((1e-4,), "ng/cosine", ("auto",)))
    assert shown.plain == "missing"


def test_where_and_errors(sweep):
    frame = load(sweep)
    table = tabulate(frame, where={"kfac.damping": "1e-5"}, metrics=["ng/cosine"])
    assert table.row_names == ["kfac.policy"]
    for wrong, words in (
        ({"where": {"kfac.damping": "7"}}, "there are no runs that match"),
        ({"metrics": ["ng/cosin"]}, "ng/cosin: no run has this metric; did you mean"),
        ({"statistic": "mode"}, "statistic=mode is not allowed"),
        ({"rows": ["kfac.policy"], "cols": ["kfac.policy"]}, "cannot stand in two places"),
        ({"baseline": {"kfac.policy": "hybrid"}}, "no run has kfac.policy=hybrid; there are all, "),
        ({"baseline": {"seed": 0}}, "baseline: seed is neither a row nor a column"),
    ):
        with pytest.raises(ResultsError, match=words):
            tabulate(frame, **wrong)


# ---- outputs -------------------------------------------------------------------------------------

NASTY = "<script>alert(1)</script> a_b 50% $x$ {y} \\z & #1 ~ ^ |"


@pytest.fixture
def nasty(tmp_path):
    names = (NASTY, "=1+1", "mlp")
    axes = {"model.name": names, "seed": range(3)}
    cells = crossed(axes, lambda name, s: {"a_b/100%": s + names.index(name) / 7.0})
    frame = load(make_sweep(tmp_path / NASTY.replace("/", ""), cells))
    return tabulate(frame, metrics=["a_b/100%"])


def test_csv_holds_all_numbers_in_full_and_is_the_same_when_made_again(sweep):
    table, again = (tabulate(load(sweep), baseline={"kfac.policy": "all"}) for _ in range(2))
    text = export.to_csv(table)
    assert export.to_csv(again) == text
    lines = list(csv.DictReader(io.StringIO(text)))
    assert len(lines) == 8
    for line in lines:
        key = tuple(float(line[n]) if n == "kfac.damping" else line[n] for n in table.row_names)
        s = table.cells[key, line["metric"], ()].summary
        assert float(line["mean"]) == s.mean
        assert float(line["low"]) == s.low
        assert int(line["n"]) == 3
    assert {line["difference"] for line in lines if line["kfac.policy"] == "all"} == {"baseline"}


def test_every_output_is_escaped(nasty):
    assert "'=1+1" in export.to_csv(nasty)  # no formula
    text = export.to_html(nasty)
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert 'data-sort="1.0"' in text
    text = export.to_markdown(nasty)
    assert "<script" not in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    bars = {len([c for i, c in enumerate(r) if c == "|" and r[i - 1] != "\\"]) for r in rows}
    assert bars == {3}


def test_latex_is_escaped():
    assert escape("a_b & 50% #1 {x} $y$") == r"a\_b \& 50\% \#1 \{x\} \$y\$"
    assert escape("\\~^") == r"\textbackslash{}$\sim$\textasciicircum{}"
    assert escape("naïve \u4e2d\n") == "naïve ? "
    assert breakable("a/b_c") == r"a/\allowbreak{}b\_\allowbreak{}c"


def test_outputs_name_settings_and_metrics_by_their_words(sweep):
    table = tabulate(load(sweep), metrics=["kfac/total_s"])
    assert "K-FAC's time (s) ↓" in export.to_markdown(table)
    assert r"(s) $\downarrow$" in to_latex(table)
    assert r"damping $\lambda$" in to_latex(table)
    assert escape("κ_max and a_b") == r"$\kappa_{\mathrm{max}}$ and a\_b"
    assert "damping λ" in export.to_html(table)
    assert export.to_csv(table).startswith("kfac.policy,kfac.damping,metric,n")
    assert "kfac/total_s" in export.to_csv(table)


def test_a_table_shows_itself_and_its_picture(sweep):
    table = tabulate(load(sweep))
    assert "K-FAC's time" in repr(table)
    assert table._repr_html_().startswith("<div")
    assert table.plot("ng/cosine", "kfac.damping").axes[0].get_label() == "ng/cosine"
    with pytest.raises(ResultsError, match="ng/norm: the table has"):
        table.plot("ng/norm")


def test_latex_is_booktabs_and_siunitx_on_demand(sweep):
    table = tabulate(load(sweep), metrics=["ng/cosine"])
    plain, units = to_latex(table), to_latex(table, siunitx=True)
    assert r"\toprule" in plain
    assert r"$1.10 \pm 0.25" in plain
    assert r"\num[separate-uncertainty]{1.10 \pm 0.25}" in units
    assert document(plain).startswith(r"\documentclass")


def test_wide_tables_are_split_in_latex_and_on_the_terminal(tmp_path):
    names = [f"kfac/a_rather_long_name_{i}" for i in range(8)]
    frame = swept(tmp_path, {"seed": range(3)}, lambda s: dict.fromkeys(names, s / 3))
    table = tabulate(frame, metrics=names)
    assert max(map(len, export.to_text(table, 100).splitlines())) <= 100
    assert to_latex(table).count(r"\begin{tabular}{@{}r") > 1
    assert to_latex(table).count(r"\caption") == 1  # they are one table
    assert all(export.to_text(table, 100).count(name) == 1 for name in names)


def test_infinite_and_missing_metrics_are_no_numbers(tmp_path):
    root = tmp_path / "s"
    for seed in range(2):
        make_run(root / str(seed), {"seed": seed, "kfac.policy": "all"}, {"a": 1.0, "b": 2.0})
        (root / str(seed) / "metrics.json").write_text(
            json.dumps({"a": math.inf, "b": 2.0}) if seed else '{"b": 2.0}'
        )
    table = tabulate(load(root), metrics=["a", "b"])
    (row,) = table.rows
    assert export.cell_text(table, (row, "a", ())).plain == "1 not measured, 1 diverged of 2"
    assert export.cell_text(table, (row, "b", ())).plain == "2"


def test_runs_of_an_earlier_version_lack_later_keys_and_are_the_same(tmp_path):
    """A key with the value that it was before it came makes no other row."""
    make_run(tmp_path / "s" / "0", {"seed": 0}, {"a": 1.0})
    new = {"seed": 1, "kfac.sharing": "expand", "kfac.damping_mode": "absolute"}
    make_run(tmp_path / "s" / "1", new, {"a": 2.0})
    frame = load(tmp_path / "s")
    assert frame["kfac.sharing"].tolist() == ["expand", "expand"]
    table = tabulate(frame, metrics=["a"])
    assert (table.rows, [cell.summary.n for cell in table.cells.values()]) == ([()], [2])


def test_disjoint_seeds_of_two_sweeps_lack_nothing(tmp_path):
    for name, damping, seeds in (("a", 1e-3, range(3)), ("b", 1e-4, range(3, 5))):
        runs = [({"kfac.damping": damping, "seed": s}, {"m": float(s)}) for s in seeds]
        make_sweep(tmp_path / name, runs)
    table = tabulate(load(tmp_path), rows=["kfac.damping"], metrics=["m"])
    assert [(cell.summary.n, cell.expected) for cell in table.cells.values()] == [(2, 2), (3, 3)]
    assert not [note for note in table.notes if "lack runs" in note]
    # Within one sweep a seed that one cell lacks is missing.
    make_run(tmp_path / "b" / "9", {"kfac.damping": 1e-2, "seed": 3}, {"m": 1.0})
    table = tabulate(load(tmp_path), rows=["kfac.damping"], metrics=["m"])
    assert sorted((c.summary.n, c.expected) for c in table.cells.values()) == [
        (1, 2), (2, 2), (3, 3)
    ]  # fmt: skip


def test_a_table_of_several_versions_of_the_code_says_so_and_splits_by_them(tmp_path):
    for seed in range(4):
        directory = make_run(tmp_path / "s" / str(seed), {"seed": seed}, {"m": seed}).directory
        record = json.loads((directory / "run.json").read_text())
        record["provenance"]["code"] = "0123456789ab" if seed < 3 else "0123456789ab+feed"
        (directory / "run.json").write_text(json.dumps(record))
    frame = load(tmp_path / "s")
    (note,) = [one for one in tabulate(frame, metrics=["m"]).notes if "versions of the code" in one]
    assert "0123456789ab (3 runs), 0123456789ab+feed (1 runs)" in note
    split = tabulate(frame, rows=["code"], metrics=["m"])
    assert [cell.summary.n for cell in split.cells.values()] == [3, 1]
    assert not [one for one in split.notes if "versions of the code" in one]


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="there is no LaTeX here")
def test_a_row_that_begins_with_a_bracket_compiles(tmp_path):
    for number, text in enumerate(("[1]", "*", "[x]y", "é [", "a]b*")):
        make_run(tmp_path / "s" / str(number), {"kfac.include": text}, {"m": 1.0 + number})
    table = tabulate(load(tmp_path / "s"), rows=["kfac.include"], metrics=["m"])
    (tmp_path / "t.tex").write_text(document(to_latex(table)))
    done = subprocess.run(
        ["pdflatex", "-interaction=batchmode", "-halt-on-error", "t.tex"],
        cwd=tmp_path, timeout=60, check=False, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, (tmp_path / "t.log").read_text()[-2000:]
