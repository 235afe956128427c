"""What the benchmarks by simulation have in common: their options, and a table a part."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

Part = tuple[str, Sequence[str], Callable[[int], Iterable[Sequence[str]]]]
"""A title, the names of the columns, and from a number of sweeps to the rows."""


def simulated(
    name: str, about: str, sweeps: int, head: Callable[[int], list[str]], parts: Sequence[Part]
) -> None:
    """Simulates every part, prints its table and writes it.

    Args:
        name: of the file that is written, without its suffix.
        about: what is simulated, for ``--help``.
        sweeps: without ``--sweeps``.
        head: from the number of sweeps to the lines above the tables.
        parts: in the order of the tables.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--sweeps", type=int, default=sweeps)
    parser.add_argument("--out", type=Path, help=f"directory for {name}.md")
    args = parser.parse_args()
    lines = head(args.sweeps)
    for title, names, rows in parts:
        lines += ["", f"## {title}", "", f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
        for row in rows(args.sweeps):
            lines.append(f"| {' | '.join(row)} |")
            print(lines[-1], flush=True)
    if args.out:
        (args.out / f"{name}.md").write_text("\n".join(lines) + "\n")
