"""Figures show what the table says: their data are read back and compared with its cells."""

# pyright: reportOptionalMemberAccess=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportAttributeAccessIssue=false, reportIndexIssue=false

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest

from fisher_lab import cli
from fisher_lab.results import (
    curve_figures,
    figure_style,
    figures,
    finish,
    layer_figures,
    load,
    load_layers,
    load_table,
    tabulate,
)
from tests.results.run_directories import crossed, make_run, make_sweep, swept
from tests.sweeps.application import TEXT, TRAINING

DAMPINGS = [1e-5, 1e-4, 1e-3]


@pytest.fixture
def sweep(tmp_path):
    def measure(damping, policy, seed):
        auto = policy == "auto"
        numbers = {
            "ng/cosine": damping * 1e4 + 0.1 * seed + auto,
            "kfac/total_s": 1.0 + seed + auto,
        }
        return {**numbers, "kfac/peak_mb": 10.0 * seed + 5}

    axes = {"kfac.damping": DAMPINGS, "kfac.policy": ("all", "auto"), "seed": range(3)}
    return make_sweep(tmp_path / "s", crossed(axes, measure))


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
    assert axes.get_xlabel() == "damping λ"
    assert axes.get_ylabel() == "cosine, natural gradient and\ngradient"


def drawn_of(tmp_path, axes, measure, metric="ng/norm"):
    frame = swept(tmp_path, axes, lambda *values: {metric: measure(*values)})
    return figures.metric_figure(tabulate(frame, metrics=[metric]), metric, "kfac.damping")


def test_equal_lines_are_one_and_the_legend_says_how_equal(tmp_path):
    tiny = {"all": 0.0, "auto": 2e-15, "hybrid": 0.1}
    axes = {"kfac.damping": DAMPINGS, "kfac.policy": tiny}
    figure = drawn_of(tmp_path, axes, lambda d, p: (1 + d * 1e3) * (1 + tiny[p]))
    labels = [container.get_label() for container in figure.axes[0].containers]
    assert labels == ["policy=all|auto (identical to 2e-15)", "policy=hybrid"]
    nothing = drawn_of(tmp_path / "n", axes, lambda d, p: 1 + tiny[p] * (p != "hybrid"))
    assert nothing is None  # nothing varies beyond rounding


def test_many_lines_are_small_panels_of_one_scale_and_no_colour_comes_twice(tmp_path):
    policies, seqs = ("all", "auto", "hybrid"), (8, 16, 32, 64)
    axes = {"kfac.damping": DAMPINGS, "kfac.policy": policies, "data.seq_len": seqs}
    figure = drawn_of(
        tmp_path, axes, lambda d, p, n: d * 1e3 + policies.index(p) + n / 7, "ng/cosine"
    )
    assert [panel.get_title() for panel in figure.axes] == [f"policy={p}" for p in policies]
    assert len({panel.get_ylim() for panel in figure.axes}) == 1
    for panel in figure.axes:
        colours = [container[0].get_color() for container in panel.containers]
        assert len(set(colours)) == len(colours) == 4
    assert len(set(figure_style.COLOURS)) == figure_style.MOST_SERIES == 8


def test_one_value_far_beyond_the_others_leaves_these_readable(tmp_path):
    values = dict(zip(DAMPINGS, (-1.0, 1.5, 4000.0), strict=True))
    figure = drawn_of(tmp_path, {"kfac.damping": DAMPINGS}, values.__getitem__)
    assert figure.axes[0].get_yscale() == "symlog"
    near = dict(zip(DAMPINGS, (-1.0, 1.5, 4.0), strict=True))
    figure = drawn_of(tmp_path / "b", {"kfac.damping": DAMPINGS}, near.__getitem__)
    assert figure.axes[0].get_yscale() == "linear"


def test_the_alternative_text_says_what_is_seen(sweep):
    table = tabulate(load(sweep), metrics=["ng/cosine"])
    text = figures.metric_figure(table, "ng/cosine", "kfac.damping").get_label()
    assert text == (
        "Cosine, natural gradient and gradient against the damping: from 0.2000 at 1e-5 "
        "(policy=all) to 11.1000 at 0.001 (policy=auto)"
    )


def test_null_stands_beyond_the_numbers_and_categories_in_a_row():
    places, log = figure_style.positions([1e5, 1e6, None])
    assert (places, log) == ([1e5, 1e6, 1e7], True)
    assert figure_style.positions(["all", "auto"]) == ([0.0, 1.0], False)
    assert figure_style.positions([1, 2, 3]) == ([1.0, 2.0, 3.0], False)


@pytest.mark.parametrize("error", [RuntimeError("x"), None])
def test_cells_without_a_number_have_no_point_and_are_counted(error, tmp_path):
    """The run failed, or its number is not finite."""
    cells = crossed({"kfac.damping": DAMPINGS}, lambda d: {"ng/cosine": d})
    root = make_sweep(tmp_path / "s", cells)
    make_run(root / "0", {"kfac.damping": DAMPINGS[0]}, {"ng/cosine": math.inf}, error=error)
    table = tabulate(load(root), metrics=["ng/cosine"])
    figure = figures.metric_figure(table, "ng/cosine", "kfac.damping")
    assert list(plotted(figure, 0)[0]) == DAMPINGS[1:]
    assert "1 of 3 cells without a number" in figure.axes[0].get_title()
    assert "single runs" in figure.axes[0].get_title()


def test_nothing_is_drawn_of_what_does_not_vary_nor_scaling_of_one_process(sweep):
    frame = load(sweep)
    table = tabulate(frame, metrics=["kfac/peak_mb"])
    assert figures.metric_figure(table, "kfac/peak_mb", "kfac.damping") is None
    assert figures.figure_makers(tabulate(frame), frame)["distributed-scaling"]() is None


def test_time_and_memory_are_the_cells(sweep):
    table = tabulate(load(sweep), metrics=["ng/cosine"])
    figure = figures.figure_makers(table, load(sweep))["time-and-memory"]()
    points = {c.get_label(): (c[0].get_xdata()[0], c[0].get_ydata()[0])
              for c in figure.axes[0].containers}  # fmt: skip
    assert len(points) == 6
    assert points["damping=1e-5, policy=all"] == (2.0, 15.0)
    assert points["damping=1e-5, policy=auto"] == (3.0, 15.0)


def in_the_csv(directory):
    """The number that stands for a cell in ``table.csv``, by metric and the cell's words."""
    with (directory / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = list(rows[0])[: list(rows[0]).index("metric")]
    found = {}
    for row in rows:
        words = ", ".join(f"{name.rpartition('.')[2]}={row[name]}" for name in names)
        found[row["metric"], words] = float(row[row["statistic"]] or "nan")
    return found


def test_every_point_of_every_figure_of_cells_is_in_the_csv(tmp_path):
    """Also where the claims fill the table, so that what ranks cost has no column in it."""
    metrics = [f"m{i}" for i in range(7)]
    axes = {"kfac.reduce": ("none", "gather"), "kfac.damping": DAMPINGS, "seed": range(3)}
    cells = crossed(axes, lambda mode, d, s: {
        **{m: i + s + d for i, m in enumerate(metrics)}, "kfac/total_s": 2.0 + s + (s - d) ** 2,
        "kfac/peak_mb": 8.0 + s * d, "dist/world_size": 2, "dist/comm_s_max": len(mode) + s,
        "dist/sent_bytes_max": 100.0 * len(mode) + s,
    })  # fmt: skip
    claimed = [{"type": "bounded", "metric": m, "at_most": 9} for m in metrics]
    root = make_sweep(tmp_path / "s", cells, claims=claimed)
    done = finish(root)
    assert done.table.metrics == metrics
    known = in_the_csv(root)
    plans = figures.figure_makers(done.table, done.frame)
    trade, scaling = plans["time-and-memory"](), plans["distributed-scaling"]()
    drawn = {}
    for container in trade.axes[0].containers:
        (x,), (y,) = container[0].get_data()
        drawn["kfac/total_s", container.get_label()] = x
        drawn["kfac/peak_mb", container.get_label()] = y
    assert len(drawn) == 12
    assert [axes.get_label() for axes in scaling.axes] == list(figures.SCALING)
    for axes in scaling.axes:
        modes = [text.get_text() for text in axes.get_xticklabels()]
        for container in axes.containers:
            for mode, y in zip(modes, container[0].get_ydata(), strict=True):
                damping = container.get_label()
                drawn[axes.get_label(), f"{damping}, reduce={mode}"] = y
                drawn[axes.get_label(), f"reduce={mode}, {damping}"] = y
    expected = {key: value for key, value in known.items() if not key[0].startswith("m")}
    assert len(expected) == 4 * 6
    for key, value in expected.items():
        assert drawn[key] == value, key


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
    values = layer_figures.layer_values(load_layers(root), names, "clipped")
    assert list(values["A"].index) == ["h.0", "h.1", "lm_head"]
    assert list(values["A"].columns) == ["damping=1e-5", "damping=1e-4"]
    assert values["A"].loc["h.1"].tolist() == pytest.approx([0.3, 0.2])
    figure = layer_figures.layer_figure(load_layers(root), names, "clipped")
    drawn = figure.axes[0].get_images()[0].get_array()
    np.testing.assert_allclose(drawn, values["A"].to_numpy())
    kappa = layer_figures.layer_values(load_layers(root), names, "kappa")
    assert kappa["A"].loc["h.1"].tolist() == pytest.approx([3.0, 3.0])
    assert "G" not in kappa


def test_a_heat_map_of_many_layers_has_kinds_as_rows_and_one_scale_of_colours(tmp_path):
    rows = [
        {"name": f"h.{i}.{part}", "dim_A": 10, "kappa_A": 10.0 ** (1 + i % 3), "dim_G": 5,
         "kappa_G": 10.0 ** (4 + i % 3)}
        for i in range(30) for part in ("k", "q")
    ]  # fmt: skip
    make_run(tmp_path / "s" / "0", {"seed": 0}, {"m": 1.0}, layers=rows)
    layers = load_layers(tmp_path / "s")
    figure = layer_figures.layer_figure(layers, dict.fromkeys(layers["directory"], "a"), "kappa")
    (axes,) = figure.axes  # one cell: a profile over depth
    assert [text.get_text() for text in axes.get_xticklabels()] == ["h.*.k (30)", "h.*.q (30)"]
    drawn = {line.get_label(): line.get_ydata().tolist() for line in axes.lines}
    assert drawn == {"factor A": [2.0, 2.0], "factor G": [5.0, 5.0]}
    for row in rows:
        row["kappa_A"] *= 10
    make_run(tmp_path / "s" / "1", {"seed": 0, "kfac.damping": 1.0}, {"m": 1.0}, layers=rows)
    layers = load_layers(tmp_path / "s")
    cells = dict(zip(dict.fromkeys(layers["directory"]), ("d=1, p=a", "d=2, p=a"), strict=True))
    figure = layer_figures.layer_figure(layers, cells, "kappa")
    names = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert names == ["h.*.k (30)", "h.*.q (30)"]
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["1, a", "2, a"]
    assert figure.axes[0].get_xlabel() == "d, p"
    images = [axes.get_images()[0] for axes in figure.axes[:2]]
    assert {image.get_clim() for image in images} == {(2.0, 5.0)}
    np.testing.assert_allclose(images[0].get_array(), [[2.0, 3.0], [2.0, 3.0]])


def test_cells_of_the_same_colours_are_one_column_and_nothing_is_drawn_of_one(tmp_path):
    for i, kappa in enumerate((1e3, 1e3 * (1 + 1e-6), 1e5)):
        rows = [{"name": f"h.{n}.k", "dim_A": 10, "kappa_A": kappa * 10**n} for n in range(3)]
        settings = {"seed": 0, "kfac.damping": i + 1.0}
        make_run(tmp_path / "s" / str(i), settings, {"m": 1.0}, layers=rows)
    layers = load_layers(tmp_path / "s")
    cells = {d: f"damping={i}" for i, d in enumerate(dict.fromkeys(layers["directory"]))}
    figure = layer_figures.layer_figure(layers, cells, "kappa")
    assert figure.axes[0].get_images()[0].get_array().shape == (3, 2)
    assert "are one column: damping=0|1 (identical to" in str(figure.get_label())
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["0.k", "1.k", "2.k"]
    equal = layers[layers["directory"] != list(cells)[2]]
    assert layer_figures.layer_figure(equal, cells, "kappa") is None


def test_nothing_is_drawn_where_nothing_was_clipped(tmp_path):
    rows = [{"name": n, "dim_A": 10, "clipped_A": 0, "kappa_A": 10.0} for n in ("h.0", "h.1")]
    make_run(tmp_path / "s" / "0", {"seed": 0}, {"m": 1.0}, layers=rows)
    layers = load_layers(tmp_path / "s")
    cells = dict.fromkeys(layers["directory"], "a cell")
    assert layer_figures.layer_figure(layers, cells, "clipped") is None
    assert layer_figures.layer_figure(layers, cells, "kappa") is not None
    assert layer_figures.layer_figure(layers[layers["name"] == "h.0"], cells, "kappa") is None


def test_curves_are_means_over_runs(tmp_path):
    root = tmp_path / "s"
    for seed in range(2):
        rows = [{"step": i, "heldout_loss": i * (seed + 1.0)} for i in range(4)]
        make_run(root / str(seed), {"seed": seed}, {"m": 1.0}, tables={"curve.csv": rows})
    frame = load(root)
    names = figures.cell_names(tabulate(frame, metrics=["m"]), frame)
    curves = load_table(root, "curve.csv")
    figure = curve_figures.line_figure(curves, names, "step", "heldout_loss")
    assert figure.axes[0].lines[0].get_ydata().tolist() == [0.0, 1.5, 3.0, 4.5]
    assert curve_figures.line_figure(curves, names, "step", "other") is None


def test_learning_curves_of_a_real_training(tmp_path):
    """The columns are those of ``task=train``; steps without an evaluation are left out."""
    (tmp_path / "text.txt").write_text(TEXT)
    steps = ["train.steps=4", "train.eval_every=2"]
    for seed in (0, 1):
        assert cli.main([*TRAINING, *steps, f"seed={seed}", f"hydra.run.dir=s/{seed}"]) == 0
    root = tmp_path / "s"
    frame = load(root)
    figure = figures.figure_makers(tabulate(frame), frame)["learning-curves"]()
    (line,) = figure.axes[0].lines
    curves = load_table(root, "curve.csv")
    for step, drawn in zip([2, 4], line.get_ydata(), strict=True):
        of_both = curves[curves["step"] == step]["heldout_loss"]
        assert len(of_both) == 2
        assert drawn == pytest.approx(of_both.mean(), rel=1e-12)
    assert line.get_xdata().tolist() == [2.0, 4.0]
    assert line.get_ydata()[-1] == pytest.approx(frame["loss/heldout"].mean(), rel=1e-12)


def ranked(tmp_path, ranks, modes):
    """Runs of several ranks; one process alone has nothing to say of ranks."""

    def measure(n, mode, seed):
        i = modes.index(mode)
        numbers = {"kfac/total_s": 4.0 / n + i + 0.1 * seed, "kfac/peak_mb": 100.0 / n + i}
        sent = {"dist/world_size": n, "dist/sent_bytes_max": 1e6 * n * (i + 1)}
        return numbers | ({**sent, "dist/comm_s_max": 0.1 * n + 0.01 * seed} if n > 1 else {})

    axes = {"distributed.nproc": ranks, "kfac.reduce": modes, "seed": range(3)}
    frame = swept(tmp_path, axes, measure)
    return frame, tabulate(frame)


def test_scaling_over_ranks_is_the_cells(tmp_path):
    frame, table = ranked(tmp_path, [1, 2, 4], ["gather", "gram"])
    figure = figures.figure_makers(table, frame)["distributed-scaling"]()
    assert [axes.get_label() for axes in figure.axes] == list(figures.SCALING)
    for axes in figure.axes:
        metric = axes.get_label()
        cells = tabulate(frame, metrics=[metric], rows=table.row_names)
        assert axes.get_xlabel() == "ranks"
        assert list(axes.get_xticks()) == [1, 2, 4]
        for container, mode in zip(axes.containers, ["gather", "gram"], strict=True):
            assert container.get_label() == f"reduce={mode}"
            expected = {n: cells.point(((n, mode), metric, ()))[0] for n in (1, 2, 4)}
            expected = {n: y for n, y in expected.items() if math.isfinite(y)}
            assert (1 in expected) == metric.startswith("kfac/")
            assert dict(zip(*container[0].get_data(), strict=True)) == expected


def test_scaling_without_ranks_is_by_the_way_they_are_joined(tmp_path):
    frame, table = ranked(tmp_path, [2], ["none", "gather", "gram"])
    figure = figures.figure_makers(table, frame)["distributed-scaling"]()
    # All modes take the same time to communicate in these runs, so that there is no such panel.
    panels = [metric for metric in figures.SCALING if metric != "dist/comm_s_max"]
    assert [axes.get_label() for axes in figure.axes] == panels
    for axes, metric in zip(figure.axes, panels, strict=True):
        assert axes.get_xlabel() == "reduce"
        cells, words = tabulate(frame, metrics=[metric]), axes.get_xticklabels()
        expected = [cells.point(((word.get_text(),), metric, ()))[0] for word in words]
        assert axes.containers[0][0].get_ydata().tolist() == expected


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
    assert figure_style.file_name("../a/b c%d") == "a_b_c_d"
    assert figure_style.file_name("///") == "figure"


def test_dollars_in_names_are_no_mathematics(tmp_path):
    name = "a$b_{$%"
    axes = {"kfac.damping": DAMPINGS, "seed": range(3)}
    frame = swept(tmp_path, axes, lambda d, s: {name: d * s + s})
    drawn = figures.draw(tabulate(frame), frame, tmp_path / "out")
    assert drawn.problems == []
    assert drawn.files


def spectra(directory, seed, scale):
    """A run with two blocks' spectra and a density, as ``task=analyze`` leaves them."""
    density = [{"grid": x + seed, "density": max(1.0 - abs(x), 0.0)} for x in (-1.0, 0.0, 1.0, 2.0)]
    settings = {"deterministic": scale > 1, "seed": seed}
    make_run(directory, settings, {"spectral/bytes": 100.0}, tables={"density.csv": density})
    block = {"status": "ok", "threshold": 1e-9}
    values = {
        "h.0": {**block, "eigenvalues": [scale * 10.0**-i * (1 + seed) for i in range(3)] + [0.0]},
        "lm_head": {**block, "eigenvalues": [5.0, 4.0]},
        "none": {"status": "degenerate", "eigenvalues": []},
    }
    (directory / "lanczos.json").write_text(json.dumps({"density": {"scale": "log10"}}))
    (directory / "spectral.json").write_text(json.dumps({"per_block": values}))


def test_the_decay_of_every_block_holds_the_eigenvalues_of_the_runs(tmp_path):
    for seed in range(2):
        for scale in (1.0, 7.0):
            spectra(tmp_path / "s" / f"{seed}-{scale}", seed, scale)
    frame = load(tmp_path / "s")
    plans = figures.figure_makers(tabulate(frame), frame)
    figure = plans["spectra-decay"]()
    assert [axes.get_title() for axes in figure.axes] == ["h.0", "lm_head"]
    axes = figure.axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    drawn = {line.get_label(): line.get_xydata() for line in axes.lines}
    for words, scale in (("deterministic=false", 1.0), ("deterministic=true", 7.0)):
        expected = [(i + 1, scale * 10.0**-i * 1.5) for i in range(3)]  # zero is not drawn
        np.testing.assert_allclose(drawn[words], expected, rtol=1e-12)
    assert figure.get_figwidth() == figure_style.PAGE
    (tmp_path / "s" / "0-1.0" / "spectral.json").write_text("[]")
    (problem,) = figures.draw(tabulate(frame), frame, tmp_path / "out").problems
    assert "spectral.json cannot be read" in problem


def test_densities_of_runs_with_grids_of_their_own_are_averaged_as_curves(tmp_path):
    for seed in range(2):  # a triangle at 0, and one at 1
        spectra(tmp_path / "s" / str(seed), seed, 1.0)
    frame = load(tmp_path / "s")
    figure = figures.figure_makers(tabulate(frame), frame)["spectral-density"]()
    assert figure.axes[0].get_xlabel() == "log10 eigenvalue"
    (line,) = figure.axes[0].lines
    x, y = line.get_data()
    np.testing.assert_allclose(x, np.linspace(-1.0, 3.0, 4))
    # At 1/3 the first is at 2/3, and the second at 1/3.
    np.testing.assert_allclose(y, [0.0, 0.5, 1 / 6, 0.0], atol=1e-12)
