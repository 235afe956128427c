#!/usr/bin/env python3
"""The W&B workspace and the appendix report of a project of fisher_lab runs.

::

    python scripts/wandb_dashboard.py --dump dashboard.json               # no login needed
    python scripts/wandb_dashboard.py --entity me --project fisher_lab --save
    python scripts/wandb_dashboard.py --aggregate results/train_damping   # mean, sd, interval

``--aggregate`` writes the sweep's table as a run of its own (job type ``aggregate``): one row
per cell, averaged over seeds (`fisher_lab.tracking.send`, which also sends it at the end of a sweep
with ``tracker=wandb``).
Needs ``pip install 'fisher-lab[dashboard]'`` but for ``--aggregate``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from fisher_lab.config.schema import TrackerConfig
from fisher_lab.results.values import ResultsError
from fisher_lab.runs import atomic
from fisher_lab.tracking import send

BUDGET_S = 60.0
"""Seconds that ``--aggregate`` waits: here nothing else does."""
ROWS = 12
"""Rows of an aggregate that get bars."""
CURVES = ("loss", "heldout_loss", "lr", "grad_norm", "reduction_ratio", "kl_scale")
METRICS = ("loss/heldout", "ng/heldout_loss_decrease", "kfac/total_s", "kfac/peak_mb")
SETTINGS = ("kfac.damping", "kfac.policy", "kfac.max_condition_number", "optimizer.name", "seed")


# ---- workspace and report ------------------------------------------------------------------------


def curve_panels() -> list[Any]:
    """A line for each cell, the mean over its seeds, with the deviation as a band."""
    import wandb_workspaces.reports.v2 as wr

    return [
        wr.LinePlot(
            title=name,
            x="curve/step",
            y=[f"curve/{name}"],
            groupby=wr.Config("cell"),
            groupby_aggfunc="mean",
            groupby_rangefunc="stddev",
            log_y=name in ("lr", "grad_norm"),
        )
        for name in CURVES
    ]


def aggregate_panels() -> list[Any]:
    """Bars of the means in an aggregate, each with the ends of its interval.

    W&B draws error bars over runs alone, and the runs of a sweep are not all of one cell.
    """
    import wandb_workspaces.reports.v2 as wr

    def bars(metric: str) -> Any:
        titles = {
            f"{send.GROUPS}/{row}/{metric}/{key}": f"row {row}, {what}"
            for row in range(ROWS)
            for key, what in (("mean", "mean"), ("low", "95 % from"), ("high", "95 % to"))
        }
        return wr.BarPlot(
            title=f"{metric}, mean and 95 % interval over seeds",
            metrics=[*titles],
            line_titles=titles,
            max_bars_to_show=len(titles),
        )

    return [bars(name) for name in METRICS]


def result_panels() -> list[Any]:
    """Damping against metric, parallel coordinates."""
    import wandb_workspaces.reports.v2 as wr

    scatter = [
        wr.ScatterPlot(
            title=f"damping against {name}",
            x=wr.Config("kfac.damping"),
            y=wr.SummaryMetric(name),
            log_x=True,
        )
        for name in METRICS[:2]
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
        "Aggregates": aggregate_panels(),
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

    table = f"table/{send.AGGREGATE}"

    def grid(panels: list[Any], kind: str) -> Any:
        filters = f"JobType {kind} '{send.AGGREGATE}'"
        runs = wr.Runset(entity=entity, project=project, filters=filters)
        return wr.PanelGrid(runsets=[runs], panels=panels)

    return wr.Report(
        entity=entity or "-",
        project=project,
        title="Appendix: every run",
        description="Made by scripts/wandb_dashboard.py.",
        blocks=[
            wr.TableOfContents(),
            wr.H1("Aggregates"),
            wr.P(
                "Means over seeds and the ends of their 95 % intervals (Student), from the "
                "aggregate of each sweep. A row's settings are in the table."
            ),
            grid([*aggregate_panels(), wr.WeavePanelSummaryTable(table_name=table)], "="),
            wr.H1("Results"),
            grid(result_panels(), "!="),
            wr.H1("Learning curves"),
            wr.P("Means over the seeds of a cell; the band is the standard deviation."),
            grid(curve_panels(), "!="),
            wr.H1("Settings that differ"),
            grid(comparison_panels(), "!="),
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--entity", default="", help="user or team")
    parser.add_argument("--project", default=TrackerConfig().project)
    parser.add_argument("--mode", choices=["online", "offline"], help="of --aggregate")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--dump", type=Path, metavar="FILE", help="write both as JSON")
    what.add_argument("--save", action="store_true", help="publish both (needs a login)")
    what.add_argument("--aggregate", type=Path, metavar="SWEEP", help="directory of a sweep")
    args = parser.parse_args(argv)
    if args.aggregate is not None:
        try:
            rows = send.aggregate(args.aggregate)
        except ResultsError as error:
            parser.error(f"--aggregate {args.aggregate}: {error}")
        if not rows:
            parser.error(f"--aggregate {args.aggregate}: there is no completed run in it")
        chosen = TrackerConfig(
            sinks=["wandb"],
            mode=args.mode,
            project=args.project,
            entity=args.entity or None,
            budget_s=BUDGET_S,
        )
        done = send.send_sweep(args.aggregate, chosen)
        print(f"{len(rows)} groups")
        return 0 if done else 1
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
