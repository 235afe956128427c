"""The sub-commands ``table``, ``claims``, ``report`` and ``diff`` of ``fisher-lab``.

Each takes the arguments after its name and returns the exit status: 0, or 2 for bad input, with one
line on standard error. A claim that does not hold is a result and not an error.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Group, RenderableType
from rich.text import Text

from fisher_lab.results.values import ResultsError, label, same
from fisher_lab.runs import atomic
from fisher_lab.runs.record import RUN_FILE

if TYPE_CHECKING:
    import pandas as pd

    from fisher_lab.results.table import Table

OK, BAD_INPUT = 0, 2
FORMATS = ("terminal", "csv", "md", "tex", "html")


def guarded(command: Callable[[Sequence[str]], int]) -> Callable[[Sequence[str]], int]:
    """Decorator: bad input is one line on standard error and exit code 2."""

    @functools.wraps(command)
    def run(argv: Sequence[str]) -> int:
        try:
            return command(argv)
        except ResultsError as error:
            print(f"fisher_lab: {error}", file=sys.stderr)
            return BAD_INPUT
        except SystemExit as stop:  # --help
            return stop.code if isinstance(stop.code, int) else OK

    return run


def make_parser(name: str, what: str, *, paths: bool = True) -> argparse.ArgumentParser:
    """The parser of a sub-command, whose errors are one line; with ``paths`` as its arguments."""

    def fail(message: str) -> NoReturn:
        raise ResultsError(f"{name}: {message}")

    parser = argparse.ArgumentParser(prog=f"fisher-lab {name}", description=what)
    parser.error = fail
    if paths:
        parser.add_argument("paths", nargs="+", help="sweeps, runs, or directories that hold them")
    return parser


def _emit(text: str, output: str | None) -> None:
    if output is None:
        sys.stdout.write(text)
    else:
        atomic.write_text(output, text)


def _settings(texts: Sequence[str], flag: str) -> dict[str, Any]:
    """``key=value`` and ``key=a,b``."""
    settings: dict[str, Any] = {}
    for text in texts:
        key, sign, value = text.partition("=")
        if not sign or not key:
            raise ResultsError(f"{flag} {text}: give it as key=value")
        settings[key] = value.split(",") if "," in value else value
    return settings


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name for name in text.split(",") if name]


def _loaded(paths: Sequence[str]) -> pd.DataFrame:
    from fisher_lab.results.finishing import left_out_lines
    from fisher_lab.results.loading import load

    frame = load(paths)
    for line in left_out_lines(frame):
        print(f"fisher_lab: {line}", file=sys.stderr)
    if frame.empty:
        raise ResultsError(f"{', '.join(paths)}: there is no run")
    return frame


# ---- table ---------------------------------------------------------------------------------------


def _table_parser() -> argparse.ArgumentParser:
    parser = make_parser("table", "The table of a sweep: swept settings by metrics, over seeds.")
    add = parser.add_argument
    add("--rows", help="settings, comma-separated; default: what was swept")
    add("--cols", default="", help="settings whose values become columns")
    add("--metrics", help="names, comma-separated; default: a choice that suits the runs")
    add("--over", help="settings to average over; default: seed")
    add("--where", action="append", default=[], metavar="KEY=VALUE[,VALUE]", help="only these runs")
    add("--baseline", action="append", default=[], metavar="KEY=VALUE",
        help="compare every cell with this one, paired, Holm-corrected")  # fmt: skip
    add("--stat", default="auto", help="auto (median for times), mean or median")
    add("--interval", default="t", help="t or bootstrap")
    add("--confidence", type=float, default=0.95)
    add("--sd", action="store_true", help="show standard deviation and n in every cell")
    add("--best", action="append", default=[], metavar="METRIC=min|max|none")
    add("--title")
    add("--format", choices=FORMATS, help="default: the output's suffix, or terminal")
    add("--siunitx", action="store_true", help="LaTeX: numbers as \\num")
    add("--standalone", action="store_true", help="LaTeX: a document that compiles as it is")
    add("-o", "--output", help="write here instead of to standard output")
    return parser


@guarded
def table_command(argv: Sequence[str]) -> int:
    """Run ``fisher-lab table``."""
    args = _table_parser().parse_args(list(argv))
    from fisher_lab.results.hypotheses import claimed_metrics
    from fisher_lab.results.table import tabulate

    frame = _loaded(args.paths)
    table = tabulate(
        frame,
        rows=_names(args.rows),
        cols=_names(args.cols) or [],
        metrics=_names(args.metrics),
        over=_names(args.over),
        where=_settings(args.where, "--where"),
        baseline=_settings(args.baseline, "--baseline"),
        statistic=args.stat,
        interval=args.interval,
        confidence=args.confidence,
        directions=_settings(args.best, "--best"),
        first=claimed_metrics(frame),
        title=args.title,
        details=args.sd,
    )
    _print_table(table, args)
    return OK


def _print_table(table: Table, args: argparse.Namespace) -> None:
    from fisher_lab.results import export
    from fisher_lab.results.console import PIPE_WIDTH, standard_output

    suffix = Path(args.output).suffix.lstrip(".") if args.output else ""
    form = args.format or (suffix if suffix in FORMATS else "terminal")
    if form == "terminal" and args.output is None:
        console = standard_output()
        console.print(export.to_terminal(table, console.width))
        return
    if form == "tex":
        text = export.to_latex(table, siunitx=args.siunitx)
        text = export.document(text) if args.standalone else text
    else:
        makers = {"csv": export.to_csv, "md": export.to_markdown, "html": export.to_html}
        text = makers[form](table) if form in makers else export.to_text(table, PIPE_WIDTH)
    _emit(text, args.output)


# ---- claims --------------------------------------------------------------------------------------


@guarded
def claims_command(argv: Sequence[str]) -> int:
    """Run ``fisher-lab claims``."""
    parser = make_parser("claims", "The claims of the sweep files, tested with their runs.")
    parser.add_argument(
        "--claims", metavar="FILE", help="claims from this JSON or YAML file instead"
    )
    parser.add_argument("--json", action="store_true", help="all numbers, as claims.json has them")
    parser.add_argument("-o", "--output", help="write here instead of to standard output")
    args = parser.parse_args(list(argv))
    from fisher_lab.results.claims import INVALID, evaluate, evaluate_one, to_json, to_rich
    from fisher_lab.results.console import standard_output

    frame = _loaded(args.paths)
    if args.claims:
        verdicts = [
            evaluate_one(claim, frame, sweep=Path(args.claims).stem, number=number)
            for number, claim in enumerate(read_claims(Path(args.claims)), 1)
        ]
    else:
        verdicts = evaluate(frame)
    if not verdicts:
        raise ResultsError(f"{', '.join(args.paths)}: no sweep file states a claim")
    if args.json or args.output:
        _emit(to_json(verdicts), args.output)
    else:
        standard_output().print(to_rich(verdicts))
    invalid = [verdict for verdict in verdicts if verdict.verdict == INVALID]
    for verdict in invalid:
        print(f"fisher_lab: {verdict.sweep}: {verdict.why}", file=sys.stderr)
    return BAD_INPUT if invalid else OK


def read_claims(path: Path) -> list[Any]:
    """The claims of a file: a list, or a mapping that holds one under ``claims``.

    Raises:
        ResultsError: it cannot be read, or holds no claims.
    """
    import yaml

    try:
        about = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultsError(f"{path}: {error.strerror or error}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ResultsError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    claims = about.get("claims") if isinstance(about, dict) else about
    if not isinstance(claims, list):
        raise ResultsError(f"{path}: there are no claims in it")
    return claims


# ---- report --------------------------------------------------------------------------------------


@guarded
def report_command(argv: Sequence[str]) -> int:
    """Run ``fisher-lab report``."""
    parser = make_parser("report", "One self-contained HTML file, and the methods paragraph.")
    parser.add_argument("-o", "--output", default="report.html", help="default: report.html")
    parser.add_argument("--appendix", metavar="DIRECTORY", help="write appendix.tex with all of it")
    args = parser.parse_args(list(argv))
    from fisher_lab.results.console import standard_output
    from fisher_lab.results.report import write_report

    frame = _loaded(args.paths)
    files = write_report(frame, Path(args.output))
    if args.appendix:
        from fisher_lab.results.paper import write_appendix

        folder, page = Path(args.appendix), Path(args.output)
        inside = page.absolute().parent == folder.absolute()
        files.append(write_appendix(frame, folder, report=page if inside else None)[-1])
    for file in files:
        standard_output().print(Text(str(file)), soft_wrap=True)
    return OK


# ---- diff ----------------------------------------------------------------------------------------

MOST_LAYERS = 40
"""Differences of layers that are shown; the others are counted."""


@dataclass(frozen=True)
class Difference:
    """One thing that differs; None where a run does not have it."""

    name: str
    a: Any
    b: Any

    @property
    def ratio(self) -> float | None:
        """``b / a`` of two numbers, where that is one."""
        numbers = isinstance(self.a, int | float) and isinstance(self.b, int | float)
        if not numbers or isinstance(self.a, bool) or isinstance(self.b, bool) or self.a == 0:
            return None
        ratio = self.b / self.a
        return ratio if math.isfinite(ratio) else None


@dataclass
class Differences:
    """What differs between two runs, by part: ``configuration``, ``metrics``, ..."""

    a: Path
    b: Path
    parts: dict[str, list[Difference]] = field(default_factory=dict)

    @property
    def equal(self) -> bool:
        """Whether nothing differs but what always does."""
        return not any(self.parts.values())


def diff(
    a: str | os.PathLike[str], b: str | os.PathLike[str], *, tolerance: float = 0.0
) -> Differences:
    """Compare two runs.

    Args:
        a: a run directory.
        b: another one.
        tolerance: numbers of metrics and layers that differ by less than this fraction are equal.

    Raises:
        ResultsError: a path that is no run directory.
    """
    from fisher_lab.results.loading import read_run

    runs = []
    for path in map(Path, (a, b)):
        if not (path / RUN_FILE).is_file():
            raise ResultsError(f"{path}: this is no run directory: it has no {RUN_FILE}")
        try:
            run = read_run(path)
        except ResultsError as error:
            raise ResultsError(f"{path}: {error}") from error
        run["outcome"] = {name: run["meta"][name] for name in ("run_id", "status", "reason")}
        run["configuration"], run["layers"] = run["config"], _layers(path)
        run["provenance"].pop("provenance.pid", None)  # which differs between any two runs
        runs.append(run)
    one, other = runs
    measured: dict[str, float] = {"metrics": tolerance, "layers": tolerance}
    parts = ("outcome", "configuration", "metrics", "layers", "provenance")
    found = {part: _differ(one[part], other[part], measured.get(part, 0.0)) for part in parts}
    return Differences(Path(a), Path(b), found)


def _differ(
    left: Mapping[str, Any], right: Mapping[str, Any], tolerance: float
) -> list[Difference]:
    return [
        Difference(name, left.get(name), right.get(name))
        for name in dict.fromkeys((*left, *right))
        if name not in left or name not in right or not _equal(left[name], right[name], tolerance)
    ]


def _equal(a: Any, b: Any, tolerance: float) -> bool:
    if same(a, b):
        return True
    numbers = isinstance(a, int | float) and isinstance(b, int | float)
    return numbers and tolerance > 0 and math.isclose(a, b, rel_tol=tolerance)


def _layers(path: Path) -> dict[str, Any]:
    """The numbers of a run's layers, by the names of layer and column."""
    from fisher_lab.results.loading import load_layers

    found = {}
    skip = {"sweep", "directory", "run_id", "status", "row", "name"}
    for line in load_layers(path).to_dict("records"):
        layer = line.get("name", line["row"])
        found |= {f"{layer} · {key}": value for key, value in line.items() if key not in skip}
    return found


def _differences(found: Differences) -> RenderableType:
    """The differences for a terminal."""
    from fisher_lab.results.export import NONE, rich_table

    parts: list[RenderableType] = [
        Text(f"A  {found.a}", overflow="fold"),
        Text(f"B  {found.b}", overflow="fold"),
        Text(),
    ]
    if found.equal:
        return Group(*parts, Text("nothing differs"))
    for name, differences in found.parts.items():
        if not differences:
            continue
        table = rich_table([name, "A", "B"], ["B / A"])
        most = MOST_LAYERS if name == "layers" else len(differences)
        for d in differences[:most]:
            words = [NONE if value is None else label(value) for value in (d.a, d.b)]
            ratio = "" if d.ratio is None else f"{d.ratio:.4g}"
            table.add_row(*map(Text, (d.name, *words, ratio)))
        if len(differences) > most:
            table.add_row(f"... {len(differences) - most} more")
        parts += [table, Text()]
    return Group(*parts)


@guarded
def diff_command(argv: Sequence[str]) -> int:
    """Run ``fisher-lab diff``."""
    parser = make_parser("diff", "What differs between two runs.", paths=False)
    parser.add_argument("a", metavar="RUN_A")
    parser.add_argument("b", metavar="RUN_B")
    words = "numbers that differ by less than this fraction are equal"
    parser.add_argument("--tolerance", type=float, default=0.0, help=words)
    args = parser.parse_args(list(argv))
    from fisher_lab.results.console import standard_output

    standard_output().print(_differences(diff(args.a, args.b, tolerance=args.tolerance)))
    return OK
