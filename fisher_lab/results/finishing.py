"""The files that are written beside the runs of a sweep when its last cell has ended.

They are ``table.csv``, ``table.md``, ``table.tex``, ``claims.json`` and ``figures/``. They are
written again whenever the runs have changed, each file atomically. Two processes that finish the
same sweep at once write the same files.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.text import Text

from fisher_lab.results import claims, export, manifest
from fisher_lab.results.console import standard_output
from fisher_lab.results.figures import complete, draw
from fisher_lab.results.hypotheses import claimed_metrics
from fisher_lab.results.loading import load
from fisher_lab.results.table import Table, tabulate
from fisher_lab.results.values import ResultsError
from fisher_lab.runs import atomic

STAMP_FILE = manifest.FINISHED_FILE
"""Records the state of the runs that the files were made from."""

WRITTEN = re.compile(r"table\.\w+|claims\.json|figures/.*")
"""The names of what is written."""

MOST_LEFT_OUT = 5


@dataclass
class Finished:
    """What came of a sweep.

    Attributes:
        directory: of the sweep.
        table: None where no table could be made.
        verdicts: on its claims.
        files: that were written; empty where they were up to date.
        frame: the runs.
        problems: what could not be made, in words.
    """

    directory: Path
    table: Table | None
    verdicts: list[claims.Verdict]
    files: list[Path]
    frame: pd.DataFrame
    problems: list[str] = field(default_factory=list)


def finish(directory: str | os.PathLike[str], *, console: Console | None = None) -> Finished:
    """Write table, claims and figures beside the runs of a sweep; print table and verdicts.

    It may be called any number of times: nothing is written where nothing has changed.

    Args:
        directory: of the sweep.
        console: where table and verdicts are printed; None: nothing is printed.

    Raises:
        ResultsError: the directory does not exist or holds no run.
    """
    root = Path(directory)
    frame = load(root)
    if frame.empty:
        raise ResultsError(f"{root}: there is no run")
    done = judge(root, frame)
    claims.note_looks(root, done.verdicts)  # before anybody sees them
    if console is not None:
        show(done, console)
    stamp = _stamp(frame)
    if not _is_up_to_date(root, stamp):
        write(done, root)
        about = manifest.of(frame, root, done.files)
        manifest.write(root, STAMP_FILE, {"stamp": stamp, **about})
    return done


def judge(root: Path, frame: pd.DataFrame) -> Finished:
    """The table and the verdicts of the runs of a sweep; nothing is written."""
    done = Finished(root, None, claims.evaluate(frame), [], frame)
    try:
        done.table = tabulate(frame, first=claimed_metrics(frame))
    except ResultsError as error:
        done.problems.append(str(error))
    return done


def at_end(directory: str | os.PathLike[str]) -> None:
    """Finish a sweep whose last cell has ended and print its table.

    An error is printed as one line and not raised.
    """
    try:
        finish(directory, console=standard_output())
    except Exception as error:  # a table that fails must not fail a sweep that is done
        print(f"fisher_lab: no table of {directory}: {error}", file=sys.stderr)


def show(done: Finished, console: Console) -> None:
    """Print the table, the verdicts, and the directories that were left out."""
    if done.table is not None:
        console.print(export.to_terminal(done.table, console.width))
    if done.verdicts:
        console.print()
        console.print(claims.to_rich(done.verdicts))
    for line in (*done.problems, *left_out_lines(done.frame)):
        console.print(Text(line, style="yellow"), soft_wrap=True)
    console.print(Text(f"table, claims and figures in {done.directory}"), soft_wrap=True)


def left_out_lines(frame: pd.DataFrame) -> list[str]:
    """The first directories that could not be read and the reasons, one line each."""
    left = frame.attrs.get("left_out", [])
    lines = [f"left out {one.directory}: {one.reason}" for one in left[:MOST_LEFT_OUT]]
    more = len(left) - MOST_LEFT_OUT
    return [*lines, f"left out {more} more"] if more > 0 else lines


def write(done: Finished, root: Path) -> None:
    """Write table, claims and figures into a directory."""
    atomic.write_text(root / claims.CLAIMS_FILE, claims.to_json(done.verdicts))
    done.files.append(root / claims.CLAIMS_FILE)
    if done.table is not None:
        full = complete(done.table, done.frame)
        done.files += export.write_table(done.table, full, root)
        drawn = draw(done.table, done.frame, root / "figures")
        done.files += drawn.files
        done.problems += drawn.problems


def _stamp(frame: pd.DataFrame) -> str:
    """A hash that changes with any run's end, metrics or status, and with what lies beside them."""
    columns = ["directory", "run_id", "status", "finished", "not_finite"]
    runs = frame[[*columns, *frame.attrs.get("metrics", [])]].to_csv()
    beside = [manifest.sweep_files(Path(d)) for d in frame.attrs.get("sweeps", {})]
    text = runs + json.dumps(beside)
    return hashlib.sha256(text.encode()).hexdigest()


def _is_up_to_date(root: Path, stamp: str) -> bool:
    """Whether the files were made of these runs and claims, and are all there."""
    try:
        noted = json.loads((root / STAMP_FILE).read_bytes())
        return noted["stamp"] == stamp and all((root / name).is_file() for name in noted["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
