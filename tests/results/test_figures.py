"""Figures show what the table says: their data are read back and compared with its cells."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fisher_lab.results import figures, load, load_layers, load_table, plotting, tabulate
from tests.results.made import make_run, make_sweep

DAMPINGS = [1e-5, 1e-4, 1e-3]


@pytest.fixture
def sweep(tmp_path):
    cells = [
        ({"kfac.damping": d, "kfac.policy": p, "seed": s},
         {"ng/cosine": d * 1e4 + 0.1 * s + (p == "auto"), "kfac/total_s": 1.0 + s + (p == "auto"),
          "kfac/peak_mb": 10.0 * s + 5})
        for d in DAMPINGS for p in ("all", "auto") for s in range(3)
    ]  # fmt: skip
    return make_sweep(tmp_path / "s", cells)


def plotted(figure, i):
    """x, y, low and high of the i-th series, as drawn."""
    (container,) = [figure.axes[0].containers[i]]
    line, _, (bars,) = container
    ends = np.array([segment[:, 1] for segment in bars.get_segments()])
    return line.get_xdata(), line.get_ydata(), ends[:, 0], ends[:, 1], container.get_label()


@pytest.mark.parametrize("metric", ["ng/cosine", "kfac/total_s"])
def test_every_point_is_its_cell(sweep, metric):
    table = tabulate(load(sweep), rows=["kfac.damping"], cols=["kfac.policy"], metrics=[metric])
    figure = figures.metric_figure(table, metric, "kfac.damping")
    assert figure is not None
    assert len(figure.axes[0].containers) == 2
    for i, policy in enumerate(("all", "auto")):
        x, y, low, high, label = plotted(figure, i)
        points = [table.point(((d,), metric, (policy,))) for d in DAMPINGS]
        assert label == f"policy={policy}"
        assert list(x) == DAMPINGS
        assert list(y) == [p[0] for p in points]
        assert list(low) == pytest.approx([p[1] for p in points])
        assert list(high) == pytest.approx([p[2] for p in points])


def test_ticks_are_the_swept_values_on_a_logarithmic_axis(sweep):
    table = tabulate(load(sweep), metrics=["ng/cosine"])
    axes = figures.metric_figure(table, "ng/cosine", "kfac.damping").axes[0]
    assert axes.get_xscale() == "log"
    assert list(axes.get_xticks()) == DAMPINGS
    assert [t.get_text() for t in axes.get_xticklabels()] == ["1e-5", "1e-4", "0.001"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("kfac.damping", "ng/cosine")


def test_null_stands_beyond_the_numbers_and_categories_in_a_row():
    places, log = plotting.positions([1e5, 1e6, None])
    assert (places, log) == ([1e5, 1e6, 1e7], True)
    assert plotting.positions(["all", "auto"]) == ([0.0, 1.0], False)
    assert plotting.positions([1, 2, 3]) == ([1.0, 2.0, 3.0], False)


def test_cells_without_a_number_have_no_point_and_are_counted(tmp_path):
    root = tmp_path / "s"
    for i, d in enumerate(DAMPINGS):
        error = RuntimeError("x") if i == 0 else None
        make_run(
            root / str(i), {"kfac.damping": d, "seed": 0}, {"ng/cosine": float(i)}, error=error
        )
    table = tabulate(load(root), metrics=["ng/cosine"])
    figure = figures.metric_figure(table, "ng/cosine", "kfac.damping")
    assert list(plotted(figure, 0)[0]) == DAMPINGS[1:]
    assert "1 of 3 cells without a number" in figure.axes[0].get_title()
    assert "single runs" in figure.axes[0].get_title()


def test_nothing_is_drawn_of_what_does_not_vary(sweep):
    table = tabulate(load(sweep), metrics=["kfac/peak_mb"])
    assert figures.metric_figure(table, "kfac/peak_mb", "kfac.damping") is None


def test_time_and_memory_are_the_cells(sweep):
    table = tabulate(load(sweep), metrics=["ng/cosine"])
    figure = figures.trade_figure(table, load(sweep))
    points = {c.get_label(): (c[0].get_xdata()[0], c[0].get_ydata()[0])
              for c in figure.axes[0].containers}  # fmt: skip
    assert len(points) == 6
    assert points["damping=1e-5, policy=all"] == (2.0, 15.0)
    assert points["damping=1e-5, policy=auto"] == (3.0, 15.0)


def layered(root):
    for seed, d in [(0, 1e-5), (1, 1e-5), (0, 1e-4)]:
        rows = [
            {"name": name, "dim_A": 10, "clipped_A": 2 * seed + i, "kappa_A": 10.0 ** (i + 1),
             "dim_G": 5, "clipped_G": 0, "kappa_G": None}
            for i, name in enumerate(("lm_head", "h.0", "h.1"))
        ]  # fmt: skip
        make_run(root / f"{seed}-{d:g}", {"kfac.damping": d, "seed": seed}, {"m": 1.0}, layers=rows)
    return root


def test_the_heat_map_holds_the_means_of_the_layers(tmp_path):
    root = layered(tmp_path / "s")
    frame = load(root)
    names = figures.cell_names(tabulate(frame, metrics=["m"]), frame)
    values = figures.layer_values(load_layers(root), names, "clipped")
    assert list(values["A"].index) == ["h.0", "h.1", "lm_head"]
    assert list(values["A"].columns) == ["damping=1e-5", "damping=1e-4"]
    assert values["A"].loc["h.1"].tolist() == pytest.approx([0.3, 0.2])
    figure = figures.layer_figure(load_layers(root), names, "clipped")
    drawn = figure.axes[0].get_images()[0].get_array()
    np.testing.assert_allclose(drawn, values["A"].to_numpy())
    kappa = figures.layer_values(load_layers(root), names, "kappa")
    assert kappa["A"].loc["h.1"].tolist() == pytest.approx([3.0, 3.0])
    assert "G" not in kappa


def test_curves_are_means_over_runs(tmp_path):
    root = tmp_path / "s"
    for seed in range(2):
        rows = [{"step": i, "heldout_loss": i * (seed + 1.0)} for i in range(4)]
        make_run(root / str(seed), {"seed": seed}, {"m": 1.0}, tables={"curve.csv": rows})
    frame = load(root)
    names = figures.cell_names(tabulate(frame, metrics=["m"]), frame)
    curves = load_table(root, "curve.csv")
    figure = figures.line_figure(curves, names, "step", "heldout_loss")
    assert figure.axes[0].lines[0].get_ydata().tolist() == [0.0, 1.5, 3.0, 4.5]
    assert figures.line_figure(curves, names, "step", "other") is None


def test_files_are_pdf_and_png_at_column_width_and_the_same_every_time(sweep, tmp_path):
    frame = load(sweep)
    table = tabulate(frame, metrics=["ng/cosine"])
    first = figures.draw(table, frame, tmp_path / "a")
    again = figures.draw(table, frame, tmp_path / "b")
    assert first.problems == []
    assert {f.suffix for f in first.files} == {".pdf", ".png"}
    assert "ng_cosine_by_kfac.damping.pdf" in {f.name for f in first.files}
    assert [f.read_bytes() for f in first.files] == [f.read_bytes() for f in again.files]
    assert next(f for f in first.files if f.suffix == ".pdf").read_bytes().startswith(b"%PDF")


def test_names_that_are_no_names_for_files():
    assert plotting.file_name("../a/b c%d") == "a_b_c_d"
    assert plotting.file_name("///") == "figure"


def test_dollars_in_names_are_no_mathematics(tmp_path):
    name = "a$b_{$%"
    cells = [
        ({"kfac.damping": d, "seed": s}, {name: d * s + s}) for d in DAMPINGS for s in range(3)
    ]
    frame = load(make_sweep(tmp_path / "s", cells))
    drawn = figures.draw(tabulate(frame), frame, tmp_path / "out")
    assert drawn.problems == []
    assert drawn.files


def test_what_is_not_finite_is_not_drawn(tmp_path):
    cells = [({"kfac.damping": d, "seed": 0}, {"m": math.inf if d < 1e-4 else d}) for d in DAMPINGS]
    table = tabulate(load(make_sweep(tmp_path / "s", cells)))
    figure = figures.metric_figure(table, "m", "kfac.damping")
    assert list(plotted(figure, 0)[0]) == DAMPINGS[1:]
