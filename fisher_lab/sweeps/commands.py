"""``fisher-lab status SWEEP`` and ``fisher-lab cancel SWEEP``."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fisher_lab.config.errors import ConfigError
from fisher_lab.runs.arguments import raise_errors
from fisher_lab.runs.status import Status
from fisher_lab.sweeps import slurm
from fisher_lab.sweeps import status as stand
from fisher_lab.sweeps.cell import CANCELLED_FILE, FrozenCell
from fisher_lab.sweeps.directory import Layout
from fisher_lab.sweeps.status import CellStatus
from fisher_lab.sweeps.worker_process import ask_holder

PIPE_WIDTH = 160
STAMP = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ")
STYLES = {
    Status.COMPLETED: "green",
    Status.FAILED: "red",
    Status.RUNNING: "cyan",
    Status.QUEUED: "cyan",
    Status.INTERRUPTED: "yellow",
}


def _parser(name: str, description: str) -> ArgumentParser:
    prog = f"fisher-lab {name}"
    parser = ArgumentParser(prog, description=description)
    raise_errors(parser, lambda text: ConfigError(f"{text}; {prog} --help shows what is allowed"))
    parser.add_argument("sweep", help="a sweep's directory, or its name under results/")
    return parser


def status(arguments: Sequence[str]) -> int:
    """Show the cells of a sweep; returns the exit code.

    Raises:
        ConfigError: there is no such sweep, or an argument is not allowed.
    """
    parser = _parser("status", "How the cells of a sweep stand.")
    parser.add_argument(
        "--watch", action="store_true", help="again and again, until nothing runs or waits any more"
    )
    parser.add_argument("--every", type=float, default=2.0, metavar="SECONDS")
    parser.add_argument("--metrics", default="loss,loss/heldout", metavar="A,B")
    parser.add_argument("--json", action="store_true", help="everything, for programs")
    chosen = parser.parse_args(list(arguments))
    layout = stand.find(chosen.sweep)
    metrics = [name for name in chosen.metrics.split(",") if name]
    if chosen.json:
        print(json.dumps([cell.to_json() for cell in _settled(layout)], indent=2))
        return 0
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PIPE_WIDTH)
    cells = _settled(layout)
    if not chosen.watch:
        console.print(_screen(layout, cells, metrics))
        _finish(layout)
        return 0
    with contextlib.suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
        while True:
            live.update(_screen(layout, cells, metrics), refresh=True)
            if stand.is_over(layout, cells):
                break
            time.sleep(max(0.1, chosen.every))
            cells = stand.settle(layout, cells)
    _finish(layout)
    return 0


def _settled(layout: Layout) -> list[CellStatus]:
    """How the cells stand; where a job has left no result, after a second look."""
    cells = stand.look(layout)
    if any(cell.state is Status.LOST for cell in cells):
        time.sleep(stand.LOOK_AGAIN_S)
        cells = stand.settle(layout, cells)
    return cells


def _finish(layout: Layout) -> None:
    """Tables of a sweep whose launcher was gone when its last cell ended."""
    from fisher_lab.results.finishing import finish_if_due, standard_output

    done = finish_if_due(layout.directory, console=standard_output())
    if done is not None and not done.files:  # else the table says so
        print(f"table, claims and figures in {layout.directory}")


def _screen(layout: Layout, cells: Sequence[CellStatus], metrics: Sequence[str]) -> RenderableType:
    table = Table(box=None, pad_edge=False, header_style="bold")
    metrics = [name for name in metrics if any(name in cell.metrics for cell in cells)]
    table.add_column("cell", overflow="fold", min_width=20)
    table.add_column("state", no_wrap=True, min_width=len("interrupted"))
    table.add_column("s", justify="right", no_wrap=True, min_width=4)
    for name in metrics:
        table.add_column(name, justify="right", no_wrap=True, min_width=8)
    table.add_column("log", overflow="fold", min_width=16)
    table.add_column("last line, or why it failed", overflow="ellipsis", no_wrap=True, ratio=1)
    for cell in cells:
        table.add_row(
            Text(cell.label),
            Text(cell.state, style=STYLES.get(cell.state, "")),
            "" if cell.seconds is None else f"{cell.seconds:.0f}",
            *(_number(cell.metrics.get(name)) for name in metrics),
            Text(str(Path(cell.log).relative_to(layout.directory)) if cell.log else ""),
            Text(cell.reason or STAMP.sub("", cell.last_line)),
        )
    counted = ", ".join(f"{number} {state}" for state, number in stand.counts(cells).items())
    left = stand.eta_s(cells)
    foot = f"{len(cells)} cells: {counted}" + (
        "" if left is None else f"; about {_time(left)} left"
    )
    return Group(Text(f"{layout.directory.name}: {layout.directory}"), table, Text(foot))


def _number(value: object) -> str:
    return f"{value:.5g}" if isinstance(value, int | float) else ""


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def cancel(arguments: Sequence[str]) -> int:
    """Cancel what runs and what waits of a sweep; returns the exit code.

    Launchers and workers find the mark that is left in their submissions; processes of this machine
    and jobs of SLURM are signalled at once. Cells save their state, and the same sweep can be run
    again.

    Raises:
        ConfigError: there is no such sweep, or an argument is not allowed.
    """
    parser = _parser("cancel", "End the running cells of a sweep.")
    layout = stand.find(parser.parse_args(list(arguments)).sweep)
    before = stand.look(layout)
    open_cells = [cell for cell in before if cell.state in (Status.RUNNING, Status.QUEUED)]
    for submission in sorted(layout.submissions.iterdir()):
        (submission / CANCELLED_FILE).touch()
    layout.journal.append("cancel", cells=[cell.run_id for cell in open_cells])
    jobs = [cell.job for cell in before if cell.job is not None]
    if not slurm.cancel(jobs):
        print(f"fisher_lab: scancel failed for {', '.join(jobs)}", file=sys.stderr)
        return 1
    frozen = layout.frozen()
    asked = sum(
        ask_holder(layout, cell.run_id, FrozenCell.load(frozen[cell.run_id]).stale_after_s)
        for cell in open_cells
        if cell.job is None and cell.run_id in frozen
    )
    print(
        f"cancelled {len(open_cells)} cells of {layout.directory.name}: {len(jobs)} jobs of "
        f"SLURM, {asked} processes on this machine"
    )
    return 0
