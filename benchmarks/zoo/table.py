"""The table of the zoo, from the rows that its command keeps."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.zoo.examine import CRASHED, NOT_BUILT, REFUSED, RIGHT, WRONG

HEAD = """# The zoo

`python -m benchmarks.zoo --jobs 2 --out benchmarks/results/zoo` builds every architecture of
transformers' mappings tiny, random and in float64, collects padded batches (four examples of four
positions with four heads, three of eight; padding on the right and on the left) under the policies
`all` and `small_only` with `verify`, and compares loss, labels, tokens, A, G, natural gradient and
own gradient with those of every example alone, without padding (`benchmarks/zoo/reference.py`,
which shares no code with the engine). Labels are the models' own.

*Right* is right in everything that is covered. *In part*: less than 90 % of the parameters that
the loss reaches are covered; the reasons are in the rows. *Coverage* is the share of all trained
parameters and, of those, that of the parameters that the loss reaches (a batch of text does not
reach a vision tower). Where a model lets padding into its loss or its logits (absolute positions
with the padding on the left, a scan that ignores the mask), the shape is compared without
padding, and the padded batch may only be refused.
"""
PART = "in part"


def status_of(row: Mapping[str, Any]) -> str:
    """The status of a row, with those that are right in part apart."""
    part = row["status"] == RIGHT and row["of_reached"] < 0.9
    return PART if part else row["status"]


def table(rows: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """The table as Markdown: task -> type of model -> row."""
    text = [HEAD, *_sources(rows), "", *_counts(rows)]
    for task, models in rows.items():
        text += [f"\n## {task}\n", "| model | status | coverage | reached | remarks |"]
        text.append("|---|---|---|---|---|")
        for kind, row in models.items():
            covered = "of_reached" in row
            shares = [f"{row[k]:.0%}" if covered else "" for k in ("coverage", "of_reached")]
            remarks = _remarks(row).replace("|", "/").replace("<", "&lt;")
            text.append(f"| {kind} | {status_of(row)} | {shares[0]} | {shares[1]} | {remarks} |")
    return "\n".join(text) + "\n"


def _sources(rows: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """Which code the rows come from; of several, how many come from each."""
    found = Counter(row.get("code", "unknown code") for m in rows.values() for row in m.values())
    if len(found) == 1:
        return [f"All rows: {next(iter(found))}."]
    return [f"Rows of several commits: {'; '.join(f'{n} of {c}' for c, n in found.items())}."]


def _counts(rows: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    names = (RIGHT, PART, REFUSED, WRONG, CRASHED, NOT_BUILT)
    text = [f"| mapping | {' | '.join(names)} | right of those built | coverage of 90 % |"]
    text.append("|---" * (len(names) + 3) + "|")
    everything = {(task, kind): row for task, m in rows.items() for kind, row in m.items()}
    for task in (*rows, "all"):
        some = [r for (t, _), r in everything.items() if task in (t, "all")]
        counts = Counter(map(status_of, some))
        built = len(some) - counts[NOT_BUILT]
        right = counts[RIGHT] + counts[PART]
        shares = [f"{n / max(built, 1):.1%}" for n in (right, counts[RIGHT])]
        text.append(
            f"| {task} | {' | '.join(str(counts[n]) for n in names)} | {' | '.join(shares)} |"
        )
    return text


def _remarks(row: Mapping[str, Any]) -> str:
    remarks = [row["why"]] if row["why"] else []
    if row.get("of_reached", 1.0) < 0.9:
        total = sum(row["passed"].values()) / max(1.0 - row["coverage"], 1e-9)
        largest = sorted(row["passed"].items(), key=lambda item: -item[1])[:3]
        remarks.append("not covered: " + ", ".join(f"{n / total:.0%} {why}" for why, n in largest))
    if row.get("unpadded"):
        remarks.append("padding reaches the loss: " + ", ".join(row["unpadded"]))
    if row.get("unchecked"):
        remarks.append("no reference for " + ", ".join(row["unchecked"][:3]))
    return "; ".join(remarks)


def write(folder: Path) -> None:
    """Writes the table of the rows in a folder beside it."""
    from benchmarks.zoo.mappings import TASKS

    files = {task: folder / f"{task}.json" for task in TASKS}
    rows = {task: json.loads(f.read_text()) for task, f in files.items() if f.is_file()}
    folder.with_suffix(".md").write_text(table(rows))
