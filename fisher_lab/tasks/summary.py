"""The printed summary of a finished run: the answer, the numbers that matter, where the rest is.

It is the same for every task: the answer in one line, a table of what it rests on, and those of the
known numbers that the run has. Forty lines of eighty columns suffice, on a terminal and in a pipe;
with ``--verbose`` all numbers and all layers are printed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from fisher_lab.results import labels
from fisher_lab.results.console import standard_output
from fisher_lab.results.labels import Entry, number
from fisher_lab.runs.record import Run
from fisher_lab.tasks.layer_table import MOST_ROWS, is_verbose, layer_table

PIPE_WIDTH = 80
"""Columns where standard output is no terminal that says its own width."""

LADDER_FILE = "ladder.csv"
STEP_FILE = "step_curve.csv"

HAVE_TABLES = ("step/", "ladder/")
"""How the metrics begin that tables of their own show."""

MAX_REASONS = 3
"""Reasons for which parameters pass through that are shown; ``uncovered.csv`` has all of them."""

MAX_VALUES = 8
"""Numbers of a list, such as eigenvalues, that are shown."""

LAYER_COLUMNS = ("name", "in", "out", "method", "kappa_A", "kappa_G", "bytes", "seconds")
"""Columns of ``layers.csv`` that are shown; the seconds with ``--verbose`` alone."""


def show(run: Run, *, console: Console | None = None) -> None:
    """Print the numbers of a finished run and the path of its directory."""
    out = console or standard_output(PIPE_WIDTH)
    out.print(render(run.record, run.values, run.tables, out.width))
    # Never wrapped or cut: the path is there to be copied.
    out.print(Text("run directory  ", style="bold") + Text(str(run.directory)), soft_wrap=True)


def render(
    record: Mapping[str, Any],
    metrics: Mapping[str, Any],
    tables: Mapping[str, list[dict[str, Any]]],
    width: int = PIPE_WIDTH,
    *,
    verbose: bool | None = None,
) -> RenderableType:
    """The table as something that rich can print.

    Args:
        record: the contents of ``run.json``.
        metrics: the contents of ``metrics.json``.
        tables: rows by file name; ``layers.csv`` is shown if it is there.
        width: columns that there are.
        verbose: whether nothing is left out; by default as ``--verbose`` says.
    """
    verbose = is_verbose() if verbose is None else verbose
    config = record.get("config", {})
    names = (config.get(part, {}).get("name") for part in ("task", "model", "data"))
    title = " · ".join([*filter(None, names), f"run {record['run_id']}"])
    step = record.get("provenance", {}).get("step") or {}
    parts: list[RenderableType] = [*answer(metrics, step), Text(title, style="dim")]
    workbench = record.get("provenance", {}).get("workbench") or {}
    drawn = (workbench.get("model") or workbench.get("initial") or {}).get("drawn")
    if drawn:
        first = ", ".join(drawn[:2]) + (f" and {len(drawn) - 2} more" if len(drawn) > 2 else "")
        parts.append(Text(f"drawn at random, since the checkpoint lacks them: {first}"))
    parts.append(Text())
    if tables.get(LADDER_FILE):
        parts += [_ladder_table(tables[LADDER_FILE], metrics, width, verbose), Text()]
    chosen = [row for row in tables.get(STEP_FILE, ()) if row["chosen"]]
    if chosen:
        parts += [_step_table(chosen), *map(Text, edge_lines(step)), Text()]
    if tables.get("layers.csv"):
        parts += [*_layers(tables["layers.csv"], width, verbose), Text()]
    parts += _coverage(record.get("provenance", {}).get("kfac") or {}, verbose)
    parts.append(_number_table(metrics, width, verbose))
    return Group(*parts)


def answer(metrics: Mapping[str, Any], step: Mapping[str, Any]) -> list[Text]:
    """What came out, in a line or two; nothing where a run has no single answer."""
    pattern = re.compile(r"ladder/(?!exact)(\w+)/error")
    found = {match[1]: metrics[name] for name in metrics if (match := pattern.fullmatch(name))}
    errors = {rung: value for rung, value in found.items() if value is not None}
    if errors:
        best = min(errors, key=errors.__getitem__)
        words = f"Nearest to the exact answer: {labels.words('rung', best)}"
        first = Text(f"{words}, relative error {errors[best]:.2g}", style="bold")
        return [first, *answer({}, step)]
    if step.get("rival"):
        line = winner_line(step)
        return [Text(line, style="bold green" if step.get("certain") else "bold yellow")]
    if metrics.get("diverged"):
        return [Text(f"Diverged at step {metrics.get('train/diverged_step')}", style="bold red")]
    if metrics.get("train/steps") and metrics.get("loss/heldout") is not None:
        line = (
            f"Held-out loss {metrics['loss/heldout']:.4f} nats a token after "
            f"{metrics['train/steps']:,} steps"
        )
        if metrics.get("loss/baseline") is not None:
            line += f"; {metrics['loss/baseline']:.4f} is the trivial model's"
        return [Text(line, style="bold")]
    if metrics.get("plan/bytes") is not None:
        line = (
            f"Factors: {number(metrics['plan/bytes'], 'mib')} MiB, "
            f"{metrics['plan/flops_factor']:.1e} operations to factor and "
            f"{metrics['plan/flops_apply']:.1e} to apply"
        )
        return [Text(line.replace("e+0", "e").replace("e+", "e"), style="bold")]
    return []


def _layers(rows: Sequence[Mapping[str, Any]], width: int, verbose: bool) -> list[RenderableType]:
    known = LAYER_COLUMNS if verbose else LAYER_COLUMNS[:-1]
    shown = [name for name in known if any(row.get(name) is not None for row in rows)]
    columns = [labels.column("layers.csv", name) for name in shown]
    methods = Counter(str(row["method"]) for row in rows if row.get("method"))
    counts = ", ".join(f"{count} {method}" for method, count in methods.most_common())
    words = f"{sum(methods.values())} layers: {counts}" if counts else ""
    if len(rows) > MOST_ROWS and not verbose:
        words += "; one by one in layers.csv, and with --verbose"
    table = layer_table(rows, columns, width, all_rows=verbose)
    return [table, Text(words, style="dim")]


def _coverage(about: Mapping[str, Any], verbose: bool) -> list[RenderableType]:
    """Which labels count, and what the factors cover."""
    parts: list[RenderableType] = []
    if about.get("labels"):
        found = about["labels"]
        words = f"labels: {found['labelling']}, {found['counted']:,} of {found['given']:,}"
        parts.append(Text(words))
    if about.get("coverage"):
        table = coverage_table(about["coverage"], about.get("skipped", {}), verbose)
        parts += [table, Text()]
    return parts


def _ladder_table(
    rows: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any], width: int, verbose: bool
) -> RenderableType:
    """Relative error of every rung, over all layers and in each; the cosines over all layers."""
    by_layer: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        by_layer.setdefault(row["layer"], {})[row["rung"]] = row
    whole = by_layer.pop("all")
    rungs = [name for name in whole if name != "exact"]
    columns = [Entry(key="name", label="Relative error", format="s")]
    columns += [Entry(key="share", label="share", format=".0%")]
    columns += [Entry(key=n, label=labels.words("heading", n), format=".2g") for n in rungs]

    def line(name: str, found: Mapping[str, Mapping[str, Any]], key: str) -> dict[str, Any]:
        return {"name": name, **{rung: found[rung][key] for rung in rungs}}

    lines = [line("all", whole, "error"), line("all, cosine", whole, "cosine")]
    most = sorted(by_layer, key=lambda name: -(by_layer[name]["exact"]["share"] or 0.0))
    kept = set(by_layer if verbose else most[:MOST_ROWS])
    for name, found in by_layer.items():
        if name in kept:
            lines.append({**line(name, found, "error"), "share": found["exact"]["share"]})
    said = (
        f"damping {number(metrics['ladder/damping'], 'g')}, exact to "
        f"{number(metrics['ladder/residual'], '.0e')} by {whole['exact']['products']} products; "
        "share: of |x*|^2"
    )
    if len(kept) < len(by_layer):
        said += f"; {len(kept)} of {len(by_layer)} layers, all in {LADDER_FILE}"
    return Group(layer_table(lines, columns, width, all_rows=True), Text(said, style="dim"))


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
        table.add_row(labels.words("direction", row["direction"]), *numbers, own, judged, error)
    return table


def edge_lines(step: Mapping[str, Any]) -> list[str]:
    """What was odd about the lengths of the steps.

    Args:
        step: the note of the run; empty where it has none.
    """
    said = {
        "zero": "no step lowers the loss of the half that chooses",
        "longest": "the loss still falls at the longest step that was tried",
    }
    return [
        f"{labels.words('direction', name)}: {said['zero' if edge == 'zero' else 'longest']}"
        for name, edge in step.get("edges", {}).items()
    ]


def winner_line(step: Mapping[str, Any]) -> str:
    """Which direction is ahead, and by how much of the held-out loss.

    Args:
        step: the note of a run with a rival.
    """
    if step.get("low") is None:
        return "No winner: too few held-out batches (task.heldout_batches) to judge"
    first, rival = (labels.words("direction", step[key]) for key in ("first", "rival"))
    ahead = [1e3 * step[key] for key in ("margin", "low", "high")]
    if not any(ahead):
        return "No winner: along no direction a step lowers the held-out loss"
    if ahead[0] < 0:  # the half that judges has them the other way round
        first, rival, ahead = rival, first, [-ahead[0], -ahead[2], -ahead[1]]
    margin, low, high = (f"{x:.3g}" for x in ahead)
    percent = f"({100 * step['confidence']:.0f} %)"
    who = f"Winner: {first}," if step["certain"] else f"No winner: {first}"
    return f"{who} {margin} [{low}, {high}] mnat a token ahead of {rival} {percent}"


def coverage_table(
    coverage: Mapping[str, Any], skipped: Mapping[str, str], verbose: bool = False
) -> RenderableType:
    """What the factors cover, what they leave to the plain gradient and why, and what is frozen.

    Args:
        coverage: ``covered``, ``passed`` (reason -> numbers), ``frozen`` and ``unreached``, as in
            the record.
        skipped: layer -> why it has no factors.
        verbose: whether every reason is named.
    """
    passed = sorted(coverage["passed"].items(), key=lambda item: -item[1])
    trained = coverage["covered"] + sum(count for _, count in passed)
    most = len(passed) if verbose else MAX_REASONS
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
    for reason, count in passed[:most]:
        layers = [name for name, why in skipped.items() if why == reason]
        add(count, f"pass through: {reason}{_in_layers(layers)}")
    if len(passed) > most:
        rest = passed[most:]
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


def _number_table(metrics: Mapping[str, Any], width: int, verbose: bool) -> Table:
    """Words and value of the main numbers; with ``verbose`` of all, beside their keys."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    rows = _number_rows(metrics, verbose)
    values = max((len(text) for own in rows.values() for _, text, _ in own), default=0)
    table.add_column("", overflow="fold", max_width=max(width - values - 4, 20))
    table.add_column("", justify="right", overflow="fold")
    table.add_column("", style="dim", overflow="fold")
    for title, own in rows.items():
        if verbose:
            table.add_row(Text(title, style="bold"))
        for words, text, name in own:
            table.add_row(f"  {words}" if verbose else words, text, name if verbose else "")
    return table


Line = tuple[str, str, str]
"""Words, value and key of a number."""


def _number_rows(metrics: Mapping[str, Any], verbose: bool) -> dict[str, list[Line]]:
    """Section -> the numbers that the run has, in the order of the catalogue."""
    catalogue = labels.catalogue()
    by_key: dict[str | None, list[str]] = {}
    for name, value in metrics.items():
        if value is not None and (verbose or not name.startswith(HAVE_TABLES)):
            by_key.setdefault(catalogue.key_of(name), []).append(name)
    found: dict[str, list[Line]] = {}
    for key, entry in catalogue.metrics.items():
        if key in by_key and (verbose or entry.main):
            found.setdefault(entry.group, []).extend(_lines(metrics, by_key[key]))
    others = [name for name in by_key.get(None, ()) if catalogue.find(name) is None]
    if others:
        found["Others"] = [(name, number(metrics[name], "g"), "") for name in others]
    return found


def _lines(metrics: Mapping[str, Any], names: Sequence[str]) -> list[Line]:
    """The numbers of an entry: one line each, or one for all of a list."""
    entry = labels.metric(names[0])
    if len(names) > 1 and all(re.search(r"_\d+$", name) for name in names):
        shown = [entry.text(metrics[name]) for name in names[:MAX_VALUES]]
        if len(names) > MAX_VALUES:
            shown += ["...", entry.text(metrics[names[-1]])]
        words = re.sub(r" \d+", "s", entry.label, count=1)  # eigenvalue 0 and so on
        return [(f"{len(names)} {words}", " ".join(shown), names[0])]
    lines: list[Line] = []
    for name in names:
        entry = labels.metric(name)
        lines.append((_with_unit(entry), _with_ends(metrics, name, entry.format), name))
        low, high = (metrics.get(f"{name}_bracket_{end}") for end in ("low", "high"))
        if low is not None and high is not None:
            text = f"{entry.text(low)} to {entry.text(high)}"
            lines.append(("  of it left open by Lanczos", text, f"{name}_bracket_low"))
    return lines


def _with_unit(entry: Entry) -> str:
    unit = "MiB" if entry.format == "mib" else entry.unit
    return f"{entry.label}, {unit}" if unit else entry.label


def _with_ends(metrics: Mapping[str, Any], name: str, form: str) -> str:
    """A number, with its interval where it has one."""
    text = number(metrics[name], form)
    low, high = (metrics.get(f"{name}_{end}") for end in ("low", "high"))
    if low is None or high is None:
        return text
    return f"{text} ({'exact' if low == high else f'{number(low, form)} to {number(high, form)}'})"
