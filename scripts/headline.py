#!/usr/bin/env python3
"""The step curves of several runs side by side, as a page of Markdown.

    python -m fisher_lab -m +sweeps=headline
    python scripts/headline.py results/headline -o docs/headline.md

It reads the records only: for every seed the judged change of each direction with its standard
error, the margin of the natural gradient over the gradient with its interval, and the closing line.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from fisher_lab import results
from fisher_lab.results import labels
from fisher_lab.runs import atomic
from fisher_lab.runs.record import read
from fisher_lab.runs.status import Status
from fisher_lab.tasks.summary import winner_line

HEADING = """# The headline experiment

`python -m fisher_lab -m +sweeps=headline` runs the default configuration with several seeds, and
`python scripts/headline.py results/headline -o docs/headline.md` writes this page. A seed chooses
the batches of the factors and the held-out batches; the model is the same. Numbers are thousandths
of a nat a token (mnat), with the standard error over held-out batches; intervals are at 95 %
([math.md](math.md), section 10).

The checkpoint has seen the text that the factors' batches are from several times, and nothing of
the held-out text. Along the gradient of that text hardly anything is gained on the held-out text,
so that the length chosen for it may be 0; along the natural gradient of the same batches there is.
"""


def rows_of(paths: list[str]) -> list[dict[str, Any]]:
    """Returns the metrics and the note of every completed run, by seed."""
    frame = results.load(paths)
    rows = []
    for _, run in frame[frame["status"] == Status.COMPLETED].iterrows():
        note = read(Path(str(run["directory"])))["provenance"].get("step")
        if note is not None:
            rows.append({**run, "note": note})
    return sorted(rows, key=lambda row: row["seed"])


def page(rows: list[dict[str, Any]]) -> str:
    """Returns the page of some runs."""
    directions = labels.catalogue().words["direction"]
    names = [name for name in directions if f"step/{name}/heldout_change" in rows[0]]
    heads = [
        "seed",
        *(directions[name] for name in names),
        "margin over the gradient",
        "closing line",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|---:" * (len(heads) - 1) + "|---|"]
    ahead = 0
    for row in rows:
        low = 1e3 * row["step/natural/gain_low"]
        gain = 1e3 * row["step/natural/gain"]
        ahead += low > 0
        cells = [str(int(row["seed"]))]
        for name in names:
            change, se = (1e3 * row[f"step/{name}/{key}"] for key in ("heldout_change", "se"))
            cells.append(f"{change:.2f} ± {se:.2f}")
        cells += [f"{gain:.2f} [{low:.2f}, {2 * gain - low:.2f}]", winner_line(row["note"])]
        lines.append("| " + " | ".join(cells) + " |")
    said = (
        "The natural gradient lowers the held-out loss further than the gradient in "
        f"{ahead} of {len(rows)} seeds, at 95 % each."
    )
    return "\n".join([HEADING, *lines, "", said, ""])


def main() -> int:
    """Writes the page, or prints it."""
    parser = argparse.ArgumentParser(description="Writes the step curves of runs.")
    parser.add_argument("paths", nargs="+", help="directories of runs or sweeps")
    parser.add_argument("-o", "--output", type=Path, help="file to write; else it is printed")
    arguments = parser.parse_args()
    rows = rows_of(arguments.paths)
    if not rows:
        print("headline.py: no completed run with step curves", file=sys.stderr)
        return 2
    text = page(rows)
    if arguments.output is None:
        print(text)
    else:
        atomic.write_text(arguments.output, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
