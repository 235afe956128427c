"""Figures of the spectral engines, as PDF and PNG, in colours that colour-blind readers tell apart.

Colours: Okabe and Ito 2008; every series also differs in its dashes. Matplotlib is used without
its global state, so that nothing of the caller's figures is touched, and imported for the first
figure: every worker and rank imports this module, and few draw.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fisher_lab.runs import atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":")


def decay(target: Path, result: Mapping[str, Any]) -> None:
    """Draws every block's eigenvalues against their rank, both logarithmic.

    Args:
        target: path without suffix.
        result: of ``compute_fisher_spectrum``.
    """
    figure, axes = _figure()
    blocks = {n: r for n, r in result["per_block"].items() if r["status"] == "ok"}
    # More curves than a reader can follow: the largest ones by trace.
    shown = sorted(blocks, key=lambda name: -blocks[name]["trace"])[:12]
    for i, name in enumerate(n for n in blocks if n in shown):
        values = [v for v in blocks[name]["eigenvalues"] if v > blocks[name]["threshold"]]
        axes.plot(
            range(1, len(values) + 1),
            values,
            color=COLOURS[i % len(COLOURS)],
            linestyle=DASHES[(i // len(COLOURS)) % len(DASHES)],
            linewidth=1.4,
            label=name,
        )
    axes.set(xscale="log", yscale="log", xlabel="rank", ylabel="eigenvalue of F")
    meta = result["metadata"]
    title = f"Fisher spectrum by {meta['block_structure']}, N = {meta['n_samples']}"
    if len(shown) < len(blocks):
        title += f"; {len(shown)} of {len(blocks)} blocks (largest traces)"
    axes.set_title(title, fontsize=9)
    if shown:
        axes.legend(fontsize=7, frameon=False)
    _save(figure, target)


def eigenvalues(target: Path, pairs: Mapping[str, Any]) -> None:
    """Draws the top eigenvalues with their residuals; open marks have not converged.

    Args:
        target: path without suffix.
        pairs: of ``top_eigenpairs``.
    """
    figure, axes = _figure()
    ranks = range(1, len(pairs["eigenvalues"]) + 1)
    axes.vlines(ranks, 0, pairs["eigenvalues"], color=COLOURS[0], linewidth=1)
    for rank, value, done in zip(ranks, pairs["eigenvalues"], pairs["converged"], strict=True):
        face = COLOURS[0] if done else "white"
        axes.plot(rank, value, "o", color=COLOURS[0], markerfacecolor=face)
    axes.errorbar(
        ranks, pairs["eigenvalues"], yerr=pairs["residuals"], fmt="none", ecolor=COLOURS[1]
    )
    axes.set(xlabel="rank", ylabel=f"eigenvalue ({pairs['operator']})")
    axes.set_title(f"Top {len(ranks)} by Lanczos, {pairs['n_products']} products")
    _save(figure, target)


def density(target: Path, found: Mapping[str, Any]) -> None:
    """Draws the spectral density with a band of one standard error.

    Args:
        target: path without suffix.
        found: of ``spectral_density``.
    """
    figure, axes = _figure()
    grid, values, error = (found[k] for k in ("grid", "density", "standard_error"))
    axes.plot(grid, values, color=COLOURS[0], linewidth=1.4)
    if error and error[0] == error[0]:
        low = [max(v - e, 0.0) for v, e in zip(values, error, strict=True)]
        high = [v + e for v, e in zip(values, error, strict=True)]
        axes.fill_between(grid, low, high, color=COLOURS[5], alpha=0.5, linewidth=0)
    positive = [v for v in values if v > 0]
    if positive:
        axes.set(yscale="log", ylim=(max(positive) * 1e-8, max(positive) * 3))
    unit = "log10 eigenvalue" if found["scale"] == "log10" else "eigenvalue"
    axes.set(xlabel=unit, ylabel="density")
    axes.set_title(
        f"Spectral density ({found['operator']}), {len(found['nodes'])} probes; "
        f"{found['mass_left_out']:.1%} at zero left out"
        if found["scale"] == "log10"
        else f"Spectral density ({found['operator']}), {len(found['nodes'])} probes",
        fontsize=9,
    )
    _save(figure, target)


def importance(target: Path, scores: Mapping[str, float]) -> None:
    """Draws a bar for each layer's importance.

    Args:
        target: path without suffix.
        scores: layer to score.
    """
    figure, axes = _figure()
    names = list(scores)
    axes.barh(range(len(names)), [scores[n] for n in names], color=COLOURS[2])
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.invert_yaxis()
    if any(value > 0 for value in scores.values()):
        axes.set_xscale("log")
    axes.set(xlabel="mean squared gradient of an element")
    axes.set_title("Importance by layer")
    _save(figure, target)


def _figure() -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Figure, target: Path) -> None:
    # Without dates in the files the same numbers give the same bytes.
    for suffix, about in (("pdf", {"CreationDate": None}), ("png", {"Software": None})):
        with atomic.writing(target.with_name(f"{target.name}.{suffix}")) as temporary:
            figure.savefig(temporary, format=suffix, dpi=150, metadata=about)
