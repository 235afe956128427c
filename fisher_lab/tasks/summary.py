"""The printed summary of a finished run: the numbers that matter, and where the rest is.

It is the same for every task: those of the known numbers that the run has, in a fixed order, and
the table of layers. Eighty columns suffice, on a terminal and in a pipe.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from fisher_lab.runs.record import Run

PIPE_WIDTH = 80
"""Columns where standard output is no terminal that says its own width."""

MIN_NAME = 12
"""Columns that a layer's name gets at least."""

MAX_ROWS = 40
"""Rows of a table of layers that are shown; the file has all of them."""

NUMBERS: dict[str, dict[str, tuple[str, str]]] = {
    "Data and loss": {
        "tokens": ("tokens, of the layer with most", "d"),
        "loss": ("loss, nats a token", ".4f"),
        "loss/heldout": ("held-out loss", ".4f"),
        "loss/heldout_drawn": ("held-out loss, of a part drawn at random", ".4f"),
        "loss/heldout_best": ("best held-out loss", ".4f"),
        "loss/baseline": ("held-out loss of the trivial model", ".4f"),
        "train/steps": ("training steps", "d"),
        "diverged": ("diverged", "d"),
        "train/diverged_step": ("diverged at step", "d"),
        "train/target_steps": ("steps to the target loss", "d"),
        "train/target_s": ("seconds to the target loss", ".1f"),
    },
    "Natural gradient": {
        "ng/norm": ("norm of the natural gradient", "g"),
        "grad/norm": ("norm of the gradient", "g"),
        "ng/cosine": ("cosine between the two", ".4f"),
        "ng/decrement": ("decrement <dW, natural gradient>", "g"),
        "ng/eta": ("step whose quadratic term is 0.01 nats", "g"),
        "ng/heldout_loss": ("held-out loss before a step", ".4f"),
    },
    "K-FAC": {
        "kfac/coverage": ("trained parameters that it covers", ".1%"),
        "kfac/coverage_of_reached": ("of those that the batches reach", ".1%"),
        "kfac/woodbury_layers": ("layers by the Woodbury identity", "d"),
        "kfac/eig_layers": ("layers by eigendecomposition", "d"),
        "kfac/kappa_A_max": ("largest condition number of A", "g"),
        "kfac/kappa_G_max": ("largest condition number of G", "g"),
        "kfac/clipped_frac_A": ("eigenvalues of A raised to the floor", ".2%"),
        "kfac/clipped_frac_G": ("eigenvalues of G raised to the floor", ".2%"),
        "kfac/ekfac_clipped_frac": ("pairs that EKFAC raised to its floor", ".2%"),
    },
    "Spectra": {
        "spectral/largest_eigenvalue": ("largest eigenvalue of a block", "g"),
        "spectral/n_nonzero": ("nonzero eigenvalues of all blocks", "d"),
        "lanczos/eigenvalue_0": ("largest eigenvalue", "g"),
        "lanczos/trace": ("trace (95 % interval)", "g"),
        "lanczos/effective_dimension": ("effective dimension (95 % interval)", "g"),
        "lanczos/effective_dimension_bracket_low": ("  of it left open by Lanczos", "g"),
    },
    "Plan": {
        "plan/layers": ("layers", "d"),
        "plan/bytes": ("factors and decompositions, MiB", "mib"),
        "plan/flops_factor": ("operations to factor", ".2e"),
        "plan/flops_apply": ("operations to apply once", ".2e"),
    },
    "Cost": {
        "kfac/forward_backward_s": ("forward and backward alone, s", ".3f"),
        "kfac/collect_s": ("collect (with its own passes), s", ".3f"),
        "kfac/factor_s": ("factor, s", ".3f"),
        "kfac/apply_s": ("apply, s", ".3f"),
        "kfac/total_s": ("total, s", ".3f"),
        "kfac/peak_mb": ("peak memory growth, MiB", ".1f"),
        "dist/world_size": ("ranks", "d"),
        "dist/comm_s_max": ("moving data between ranks, s", ".3f"),
        "dist/sent_bytes_max": ("bytes sent by a rank, at most", "d"),
        "dist/received_bytes_max": ("bytes received by a rank, at most", "d"),
        "train/seconds": ("training, s", ".1f"),
        "train/tokens_per_s": ("training, tokens a second", "d"),
        "train/evaluation_s": ("held-out evaluations, s", ".1f"),
        "train/curvature_share": ("share of the training in curvature", ".0%"),
        "train/reduction_ratio": ("reduction ratio, median", ".3f"),
        "train/kl_scale": ("scale of the clipping, median", ".3g"),
    },
}
"""Section -> metric -> its words and its format."""

LADDER_FILE = "ladder.csv"
LADDER_COLUMNS = {
    "blocks": "blocks", "ekfac_sequence": "EK seq", "ekfac_token": "EK tok", "kfac": "expand",
    "kfac_reduce": "reduce", "diagonal": "diag", "identity": "ident", "kfac_split": "own",
}  # fmt: skip
"""Rung of the ladder -> the heading of its column."""

HAVE_TABLES = ("step/", "ladder/")
"""How the metrics begin that tables of their own show."""

STEP_FILE = "step_curve.csv"

DIRECTIONS = {
    "natural": "natural gradient",
    "ekfac": "EKFAC",
    "gradient": "gradient",
    "sign": "sign",
    "exact": "exact Fisher",
    "blocks": "block-diagonal",
    "ekfac_sequence": "EKFAC, sequences",
    "ekfac_token": "EKFAC, tokens",
    "kfac": "K-FAC, expand",
    "kfac_reduce": "K-FAC, reduce",
    "diagonal": "diagonal",
    "identity": "identity",
    "kfac_split": "K-FAC, own damping",
}
"""Direction of a step curve -> its words."""

MAX_REASONS = 6
"""Reasons for which parameters pass through that are shown; the file has all of them."""

MAX_OTHERS = 20
"""Numbers without words of their own that are shown; metrics.json has all of them."""

LAYER_COLUMNS: dict[str, tuple[str, str]] = {
    "name": ("layer", "s"),
    "type": ("type", "s"),
    "in": ("in", "d"),
    "out": ("out", "d"),
    "tokens": ("tokens", "d"),
    "method": ("method", "s"),
    "kappa_A": ("kappa A", ".1e"),
    "kappa_G": ("kappa G", ".1e"),
    "bytes": ("MiB", "mib"),
    "seconds": ("s", ".3f"),
}
"""Column of ``layers.csv`` -> its heading and its format."""


def show(run: Run, *, console: Console | None = None) -> None:
    """Print the numbers of a finished run and the path of its directory."""
    out = console or stdout_console()
    out.print(render(run.record, run.values, run.tables, out.width))
    # Never wrapped or cut: the path is there to be copied.
    out.print(Text("run directory  ", style="bold") + Text(str(run.directory)), soft_wrap=True)


def render(
    record: Mapping[str, Any],
    metrics: Mapping[str, Any],
    tables: Mapping[str, list[dict[str, Any]]],
    width: int = PIPE_WIDTH,
) -> RenderableType:
    """The table as something that rich can print.

    Args:
        record: the contents of ``run.json``.
        metrics: the contents of ``metrics.json``.
        tables: rows by file name; ``layers.csv`` is shown if it is there.
        width: columns that there are.
    """
    config = record.get("config", {})
    names = (config.get(part, {}).get("name") for part in ("task", "model", "data"))
    title = " · ".join([*filter(None, names), f"run {record['run_id']}"])
    parts: list[RenderableType] = [Text(title, style="bold")]
    workbench = record.get("provenance", {}).get("workbench") or {}
    drawn = (workbench.get("model") or workbench.get("initial") or {}).get("drawn")
    if drawn:
        first = ", ".join(drawn[:2]) + (f" and {len(drawn) - 2} more" if len(drawn) > 2 else "")
        parts.append(Text(f"drawn at random, since the checkpoint lacks them: {first}"))
    layers = tables.get("layers.csv")
    if layers:
        methods = Counter(str(row["method"]) for row in layers if row.get("method"))
        counts = ", ".join(f"{count} {method}" for method, count in methods.most_common())
        summed = f"{sum(methods.values())} layers: {counts}" if counts else ""
        parts += [_layer_table(layers, width), Text(summed), Text()]
    about = record.get("provenance", {}).get("kfac") or {}
    if about.get("labels"):
        labels = about["labels"]
        words = f"labels: {labels['labelling']}, {labels['counted']:,} of {labels['given']:,}"
        parts += [Text(words), Text()]
    if about.get("coverage"):
        parts += [coverage_table(about["coverage"], about.get("skipped", {})), Text()]
    parts += [_number_table(metrics, width), Text()]
    if tables.get(LADDER_FILE):
        parts += [_ladder_table(tables[LADDER_FILE], metrics, width), Text()]
    chosen = [row for row in tables.get(STEP_FILE, ()) if row["chosen"]]
    if chosen:
        parts += [_step_table(chosen), Text()]
    step = record.get("provenance", {}).get("step")
    return Group(*parts, *(Text(line) for line in step_lines(step or {})))


def _ladder_table(
    rows: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any], width: int
) -> RenderableType:
    """Relative error of every rung, over all layers and in each; the cosines over all layers."""
    by_layer: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        by_layer.setdefault(row["layer"], {})[row["rung"]] = row
    rungs = [name for name in LADDER_COLUMNS if name in by_layer["all"]]
    headings = ["Relative error", "share", *(LADDER_COLUMNS[name] for name in rungs)]
    cells = [
        [layer, number(found["exact"]["share"], ".0%"), *(_near(found[n]["error"]) for n in rungs)]
        for layer, found in by_layer.items()
    ]
    cosines = [_near(by_layer["all"][name]["cosine"]) for name in rungs]
    cells.insert(1, ["all, cosine", "", *cosines])
    fit_names(cells, headings, width)
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for heading in headings:
        left = heading == headings[0]
        table.add_column(heading, justify="left" if left else "right", no_wrap=True)
    for row in cells[: MAX_ROWS + 2]:
        table.add_row(*row)
    if len(cells) > MAX_ROWS + 2:
        table.add_row(f"... {len(cells) - MAX_ROWS - 2} more")
    exact = by_layer["all"]["exact"]
    said = (
        f"damping {number(metrics['ladder/damping'], 'g')}, exact to "
        f"{number(metrics['ladder/residual'], '.0e')} by {exact['products']} products; share: of "
        "|x*|^2"
    )
    return Group(table, Text(said))


def _near(value: float | None) -> str:
    """An error or a cosine in six characters."""
    if value is None or value != value:
        return "-"
    if value == 0:
        return "0"
    return f"{value:.3f}" if 1e-3 <= abs(value) < 100 else f"{value:.0e}".replace("e-0", "e-")


def _step_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A line for every direction: the step that was chosen, and what it did to the loss."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("Step along", no_wrap=True)
    for heading in ("length", "distance", "own batches", "held-out, mnat", "s.e."):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        changes = (row[name] for name in ("own_change", "judging_change", "judging_se"))
        mnat = (None if value is None else 1e3 * value for value in changes)
        numbers = (number(row["length"], "g"), number(row["distance"], "g"))
        own, judged, error = (number(value, ".2f") for value in mnat)
        table.add_row(
            DIRECTIONS.get(row["direction"], row["direction"]), *numbers, own, judged, error
        )
    return table


def step_lines(step: Mapping[str, Any]) -> list[str]:
    """The closing lines of the step curves: what was odd, and which direction is ahead.

    Args:
        step: the note of the run; empty where it has none.
    """
    lines = []
    for name, edge in step.get("edges", {}).items():
        said = DIRECTIONS.get(name, name)
        if edge == "zero":
            lines.append(f"{said}: no step lowers the loss of the half that chooses")
        else:
            lines.append(f"{said}: the loss still falls at the longest step that was tried")
    if not step.get("rival"):
        return lines
    first, rival = (DIRECTIONS.get(step[key], step[key]) for key in ("first", "rival"))
    if step.get("low") is None:
        return [*lines, "No winner: too few held-out batches (task.heldout_batches) to judge"]
    ahead = [1e3 * step[key] for key in ("margin", "low", "high")]
    if not any(ahead):
        return [*lines, "No winner: along no direction a step lowers the held-out loss"]
    if ahead[0] < 0:  # the half that judges has them the other way round
        first, rival, ahead = rival, first, [-ahead[0], -ahead[2], -ahead[1]]
    margin, low, high = (f"{x:.3g}" for x in ahead)
    percent = f"({100 * step['confidence']:.0f} %)"
    who = f"Winner: {first}," if step["certain"] else f"No winner: {first}"
    return [*lines, f"{who} {margin} [{low}, {high}] mnat ahead of {rival} {percent}"]


def coverage_table(coverage: Mapping[str, Any], skipped: Mapping[str, str]) -> RenderableType:
    """What the factors cover, what they leave to the plain gradient and why, and what is frozen.

    Args:
        coverage: ``covered``, ``passed`` (reason -> numbers), ``frozen`` and ``unreached``, as in
            the record.
        skipped: layer -> why it has no factors.
    """
    passed = sorted(coverage["passed"].items(), key=lambda item: -item[1])
    trained = coverage["covered"] + sum(count for _, count in passed)
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for justify in ("right", "right", "left"):
        table.add_column("", justify=justify, no_wrap=justify == "right")

    def add(count: int, words: str) -> None:
        table.add_row(f"  {count:,}", f"{count / max(trained, 1):.1%}", words)

    add(coverage["covered"], "of the trained parameters are covered")
    if unreached := coverage.get("unreached", 0):
        reached = trained - unreached
        share = f"{coverage['covered'] / max(reached, 1):.1%}"
        table.add_row(
            f"  {reached:,}", share, "are reached by these batches, and of these are covered"
        )
    for reason, count in passed[:MAX_REASONS]:
        layers = [name for name, why in skipped.items() if why == reason]
        add(count, f"pass through: {reason}{_in_layers(layers)}")
    if len(passed) > MAX_REASONS:
        rest = passed[MAX_REASONS:]
        add(sum(count for _, count in rest), f"pass through, for {len(rest)} more reasons")
    if coverage["frozen"]:
        table.add_row(f"  {coverage['frozen']:,}", "", "more are frozen")
    return Group(Text("Coverage", style="bold"), table)


def _in_layers(names: Sequence[str]) -> str:
    """The first of the layers that a reason holds for, and how many more there are."""
    if not names:
        return ""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f" ({names[0] or 'the model'}{more})"


def _number_table(metrics: Mapping[str, Any], width: int) -> Table:
    """Words, value and name of every number; the name gives way where a line is too narrow."""
    sections = _number_sections(metrics)
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    columns = list(zip(*(row for rows in sections.values() for row in rows), strict=True))
    words, values, _ = (max(map(len, column)) for column in columns or [("",)] * 3)
    table.add_column("", no_wrap=True, min_width=min(words + 2, width - values - 4))
    table.add_column("", justify="right", no_wrap=True, min_width=values)
    left = width - words - values - 6
    table.add_column("", style="dim", no_wrap=True, max_width=max(left, 1))
    for title, rows in sections.items():
        if table.row_count:
            table.add_row()
        table.add_row(Text(title, style="bold"))
        for line, text, name in rows:
            table.add_row(f"  {line}", text, name)
    return table


def _number_sections(metrics: Mapping[str, Any]) -> dict[str, list[tuple[str, str, str]]]:
    """Section -> (words, value, name) of every number that the run has."""
    sections = {
        title: [
            (words, _with_ends(metrics, name, form), name)
            for name, (words, form) in numbers.items()
            if metrics.get(name) is not None
        ]
        for title, numbers in NUMBERS.items()
    }
    known = {name + end for numbers in NUMBERS.values() for name in numbers for end in ENDS}
    others = [
        name
        for name, value in metrics.items()
        if name not in known and not name.startswith(HAVE_TABLES) and value is not None
    ]
    sections["Others"] = [(name, number(metrics[name], "g"), "") for name in others[:MAX_OTHERS]]
    if len(others) > MAX_OTHERS:
        sections["Others"].append((f"... {len(others) - MAX_OTHERS} more", "", ""))
    return {title: rows for title, rows in sections.items() if rows}


ENDS = ("", "_se", "_low", "_high", "_bracket_low", "_bracket_high")
"""What follows the name of a number in the names of its standard error, interval and bracket."""


def _with_ends(metrics: Mapping[str, Any], name: str, form: str) -> str:
    """A number, with its interval where it has one; of a bracket both ends."""
    text = number(metrics[name], form)
    if name.endswith("_bracket_low"):
        return f"{text} to {number(metrics[name.removesuffix('low') + 'high'], form)}"
    low, high = (metrics.get(f"{name}_{end}") for end in ("low", "high"))
    if low is None or high is None:
        return text
    return f"{text} ({'exact' if low == high else f'{number(low, form)} to {number(high, form)}'})"


def fit_names(
    cells: Sequence[list[str]], headings: Sequence[str], width: int, place: int = 0
) -> None:
    """Shortens the names in one column of a table, in place, so that its lines fit.

    Args:
        cells: rows of the table.
        headings: of its columns, each of which has one blank to its right.
        width: columns that there are.
        place: of the names.
    """
    widths = [max(map(len, column)) for column in zip(headings, *cells, strict=True)]
    limit = max(width - (sum(widths) - widths[place]) - len(widths), MIN_NAME)
    for row in cells:
        row[place] = short(row[place], limit)


def _layer_table(rows: list[dict[str, Any]], width: int) -> Table:
    columns = []
    for name in LAYER_COLUMNS:
        values = {row.get(name) for row in rows}
        # A number of tokens that all layers share stands among the numbers of the run.
        if values != {None} and not (name == "tokens" and len(values) == 1):
            columns.append(name)
    cells = [[number(row.get(name), LAYER_COLUMNS[name][1]) for name in columns] for row in rows]
    headings = [LAYER_COLUMNS[name][0] for name in columns]
    if "name" in columns:
        fit_names(cells, headings, width, columns.index("name"))
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for name, heading in zip(columns, headings, strict=True):
        justify = "left" if LAYER_COLUMNS[name][1] == "s" else "right"
        table.add_column(heading, justify=justify, no_wrap=True)
    for row in cells[:MAX_ROWS]:
        table.add_row(*row)
    if len(rows) > MAX_ROWS:
        table.add_row(f"... {len(rows) - MAX_ROWS} more")
    return table


def short(name: str, limit: int) -> str:
    """Returns a layer's name in at most ``limit`` characters, told apart from its neighbours'.

    Parts of the path become the first letters of their words, from the left, until the rest fits;
    numbers stay, and of the last part beginning and end. ``model.layers.0.self_attn.q_proj`` may
    become ``m.l.0.self_attn.q_proj`` or ``m.l.0.sa.q_proj``.
    """
    parts = name.split(".")
    for place, part in enumerate(parts[:-1]):
        if len(".".join(parts)) <= limit:
            break
        if not part.isdigit():
            parts[place] = "".join(word[0] for word in part.split("_") if word) or part
    fitted = ".".join(parts)
    if len(fitted) <= limit:
        return fitted
    left = limit - len(fitted) + len(parts[-1]) - 1
    if left < 4:
        return "…" + fitted[len(fitted) - limit + 1 :]
    path, last = fitted[: len(fitted) - len(parts[-1])], parts[-1]
    return f"{path}{last[: left // 2]}…{last[len(last) - left + left // 2 :]}"


def number(value: Any, form: str) -> str:
    """A value as it stands in a table: ``g`` is four digits, ``mib`` bytes in MiB."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool | str) or form == "s":
        return str(value)
    if form == "mib":
        return f"{value / 2**20:.2f}"
    if form == "d":
        return f"{round(value):,}"
    return format(value, ".4g" if form == "g" else form)


def stdout_console(pipe_width: int = PIPE_WIDTH) -> Console:
    """Returns a console for standard output.

    Args:
        pipe_width: columns where standard output is no terminal.
    """
    width = None if Console(file=sys.stdout).is_terminal else pipe_width
    return Console(file=sys.stdout, highlight=False, markup=False, width=width)
