#!/usr/bin/env python3
"""The W&B workspace and the appendix report of a project of fisher_lab runs.

::

    python scripts/wandb_dashboard.py --dump dashboard.json               # no login needed
    python scripts/wandb_dashboard.py --entity me --project fisher_lab --save

Needs ``pip install 'fisher-lab[dashboard]'``.
"""

from __future__ import annotations

# pyright: reportPrivateImportUsage=false
import argparse
import json
import sys
from pathlib import Path
from typing import Any

from fisher_lab.config.schema import TrackerConfig
from fisher_lab.results import labels
from fisher_lab.runs import atomic

CURVES = ("loss", "heldout_loss", "lr", "grad_norm", "reduction_ratio", "kl_scale")
METRICS = ("loss/heldout", "step/natural/heldout_change")
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


def result_panels() -> list[Any]:
    """Damping against metric, parallel coordinates."""
    import wandb_workspaces.reports.v2 as wr

    scatter = [
        wr.ScatterPlot(
            title=f"{labels.metric(name).with_unit} against the damping",
            x=wr.Config("kfac.damping"),
            y=wr.SummaryMetric(name),
            log_x=True,
        )
        for name in METRICS
    ]
    columns = [wr.ParallelCoordinatesPlotColumn(wr.Config(key)) for key in SETTINGS]
    columns.append(wr.ParallelCoordinatesPlotColumn(wr.SummaryMetric(METRICS[0])))
    return [*scatter, wr.ParallelCoordinatesPlot(title="settings", columns=columns)]


def comparison_panels() -> list[Any]:
    """What differs between runs."""
    import wandb_workspaces.reports.v2 as wr

    return [wr.RunComparer(diff_only="split")]


def workspace(entity: str, project: str) -> Any:
    """The project's workspace."""
    import wandb_workspaces.workspaces as ws

    sections = {
        "Results": result_panels(),
        "Learning curves": curve_panels(),
        "Settings that differ": comparison_panels(),
    }
    return ws.Workspace(
        entity=entity,
        project=project,
        name="fisher_lab",
        sections=[
            ws.Section(name=name, panels=panels, is_open=True) for name, panels in sections.items()
        ],
    )


def report(entity: str, project: str) -> Any:
    """The report for a paper's appendix."""
    import wandb_workspaces.reports.v2 as wr

    def grid(panels: list[Any]) -> Any:
        return wr.PanelGrid(runsets=[wr.Runset(entity=entity, project=project)], panels=panels)

    return wr.Report(
        entity=entity or "-",
        project=project,
        title="Appendix: every run",
        description="Made by scripts/wandb_dashboard.py.",
        blocks=[
            wr.TableOfContents(),
            wr.H1("Results"),
            grid(result_panels()),
            wr.H1("Learning curves"),
            wr.P("Means over the seeds of a cell; the band is the standard deviation."),
            grid(curve_panels()),
            wr.H1("Settings that differ"),
            grid(comparison_panels()),
        ],
    )


def dumped(entity: str, project: str) -> dict[str, Any]:
    """Both as JSON, without a login; the report's runs are bound to the project by ``--save``."""

    def plain(one: Any) -> Any:
        return json.loads(one._to_model().model_dump_json(by_alias=True))

    view = workspace(entity or "-", project)
    return {"workspace": plain(view), "report": plain(report("", project))}


# ---- the command line ----------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    """Do what was asked for; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--entity", default="", help="user or team")
    parser.add_argument("--project", default=TrackerConfig().project)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--dump", type=Path, metavar="FILE", help="write both as JSON")
    what.add_argument("--save", action="store_true", help="publish both (needs a login)")
    args = parser.parse_args(argv)
    try:
        import wandb_workspaces  # noqa: F401
    except ModuleNotFoundError:
        parser.error("wandb-workspaces is missing: pip install 'fisher-lab[dashboard]'")
    if args.dump is not None:
        atomic.write_json(args.dump, dumped(args.entity, args.project))
        print(args.dump)
        return 0
    if not args.entity:
        parser.error("--save needs --entity")
    for one in (workspace(args.entity, args.project), report(args.entity, args.project)):
        one.save()
        print(one.url)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
