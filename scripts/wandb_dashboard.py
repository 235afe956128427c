#!/usr/bin/env python3
"""The W&B workspace and the appendix report of a project of fisher_lab runs.

::

    python scripts/wandb_dashboard.py --dump dashboard.json               # no login needed
    python scripts/wandb_dashboard.py --entity me --project fisher_lab --save
    python scripts/wandb_dashboard.py --entity me --claims appendix/claims.json --save

Needs ``pip install 'fisher-lab[dashboard]'``.
"""

from __future__ import annotations

# pyright: reportPrivateImportUsage=false
import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fisher_lab.config.schema import TrackerConfig
from fisher_lab.results import labels
from fisher_lab.runs import atomic

CURVES = ("loss", "heldout_loss", "lr", "grad_norm", "reduction_ratio", "kl_scale")
METRICS = ("loss/heldout", "step/natural/heldout_change", "step/natural/gain", "kfac/total_s")
FIGURES = {
    "spectra": ("spectral_decay", "lanczos_eigenvalues", "lanczos_density"),
    "steps and layers": ("step_curve", "damping_scan", "ladder", "group_fisher_layers"),
}
"""Title of a panel -> the figures of a run that it shows."""
SPECTRA = ("spectral/largest_eigenvalue", "spectral/effective_rank", "lanczos/eigenvalue_0")
TABLES = ("metrics", "layers", "spectrum")
SETTINGS = ("kfac.damping", "kfac.policy", "kfac.max_condition_number", "optimizer.name", "seed")


# ---- workspace and report ------------------------------------------------------------------------


def curve_panels() -> list[Any]:
    """A line for each cell, the mean over its seeds, with the deviation as a band."""
    import wandb_workspaces.reports.v2 as wr

    return [
        wr.LinePlot(
            title=labels.column("curve.csv", name).with_unit,
            x="curve/step",
            y=[f"curve/{name}"],
            groupby=wr.Config("cell"),
            groupby_aggfunc="mean",
            groupby_rangefunc="stddev",
            log_y=name in ("lr", "grad_norm"),
        )
        for name in CURVES
    ]


def bars(names: Iterable[str]) -> list[Any]:
    """A bar for each cell, named by its settings: the mean over its seeds with its error."""
    import wandb_workspaces.reports.v2 as wr

    return [
        wr.BarPlot(
            title=labels.metric(name).heading,
            metrics=[wr.SummaryMetric(name)],
            groupby=wr.Config("cell"),
            groupby_aggfunc="mean",
            groupby_rangefunc="stderr",
        )
        for name in names
    ]


def result_panels() -> list[Any]:
    """Bars named by settings, damping against metric, parallel coordinates."""
    import wandb_workspaces.reports.v2 as wr

    scatter = [
        wr.ScatterPlot(
            title=f"{labels.metric(name).with_unit} against the damping",
            x=wr.Config("kfac.damping"),
            y=wr.SummaryMetric(name),
            log_x=True,
        )
        for name in METRICS[:2]
    ]
    columns = [wr.ParallelCoordinatesPlotColumn(wr.Config(key)) for key in SETTINGS]
    columns.append(wr.ParallelCoordinatesPlotColumn(wr.SummaryMetric(METRICS[0])))
    return [*bars(METRICS), *scatter, wr.ParallelCoordinatesPlot(title="settings", columns=columns)]


def figure_panels() -> list[Any]:
    """The figures of the analyses, and the tables of layers and eigenvalues."""
    import wandb_workspaces.reports.v2 as wr

    shown = [
        wr.MediaBrowser(title=title, media_keys=[f"figure/{name}" for name in names])
        for title, names in FIGURES.items()
    ]
    return [*shown, *(wr.WeavePanelSummaryTable(table_name=f"table/{name}") for name in TABLES)]


def comparison_panels() -> list[Any]:
    """What differs between runs."""
    import wandb_workspaces.reports.v2 as wr

    return [wr.RunComparer(diff_only="split")]


def panels() -> dict[str, list[Any]]:
    """Name of a section -> its panels."""
    return {
        "Results": result_panels(),
        "Figures and layers": figure_panels(),
        "Spectra": bars(SPECTRA),
        "Learning curves of trainings": curve_panels(),
        "Settings that differ": comparison_panels(),
    }


def workspace(entity: str, project: str) -> Any:
    """The project's workspace."""
    import wandb_workspaces.workspaces as ws

    sections = panels()
    return ws.Workspace(
        entity=entity,
        project=project,
        name="fisher_lab",
        sections=[
            ws.Section(name=name, panels=panels, is_open=True) for name, panels in sections.items()
        ],
    )


def claims_table(verdicts: Sequence[Mapping[str, Any]]) -> str:
    """The claims with their verdicts as a table in Markdown."""
    rows = [
        (v["sweep"], v["text"], f"**{v['verdict']}**", labels.in_words(v["why"]), v["seeds"])
        for v in verdicts
    ]
    lines = [("sweep", "claim", "verdict", "numbers", "n"), ("---",) * 5, *rows]
    cells = ([" ".join(str(c).split()).replace("|", "\\|") for c in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def report(entity: str, project: str, verdicts: Sequence[Mapping[str, Any]] = ()) -> Any:
    """The report for a paper's appendix, with the claims of ``claims.json``."""
    import wandb_workspaces.reports.v2 as wr

    runs = wr.Runset(entity=entity, project=project)
    blocks: list[Any] = [wr.TableOfContents()]
    if verdicts:
        blocks += [wr.H1("Claims"), wr.MarkdownBlock(claims_table(verdicts))]
    for name, own in panels().items():
        blocks += [wr.H1(name), wr.PanelGrid(runsets=[runs], panels=own)]
    return wr.Report(
        entity=entity or "-",
        project=project,
        title="Appendix: every run",
        description="Made by scripts/wandb_dashboard.py. Bars are means over the seeds of a cell "
        "with their standard error, curves with their standard deviation.",
        blocks=blocks,
    )


def dumped(entity: str, project: str, verdicts: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """Both as JSON, without a login; the report's runs are bound to the project by ``--save``."""

    def plain(one: Any) -> Any:
        return json.loads(one._to_model().model_dump_json(by_alias=True))

    view = workspace(entity or "-", project)
    return {"workspace": plain(view), "report": plain(report("", project, verdicts))}


# ---- the command line ----------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    """Do what was asked for; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--entity", default="", help="user or team")
    parser.add_argument("--project", default=TrackerConfig().project)
    parser.add_argument("--claims", type=Path, metavar="FILE", help="claims.json, for the report")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--dump", type=Path, metavar="FILE", help="write both as JSON")
    what.add_argument("--save", action="store_true", help="publish both (needs a login)")
    args = parser.parse_args(argv)
    try:
        import wandb_workspaces  # noqa: F401
    except ModuleNotFoundError:
        parser.error("wandb-workspaces is missing: pip install 'fisher-lab[dashboard]'")
    try:
        verdicts = [] if args.claims is None else json.loads(args.claims.read_bytes())
        claims_table(verdicts)
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"--claims {args.claims}: no claims.json: {error}")
    if args.dump is not None:
        atomic.write_json(args.dump, dumped(args.entity, args.project, verdicts))
        print(args.dump)
        return 0
    if not args.entity:
        parser.error("--save needs --entity")
    place = (args.entity, args.project)
    for one in (workspace(*place), report(*place, verdicts)):
        one.save()
        print(one.url)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
