"""An exam: curvlinops' K-FAC, and the exact Gauss-Newton matrix, on a grid of small models.

    make bench BENCH=benchmarks/kfac/exam.py ARGS="--out benchmarks/kfac/results"

The grid follows what curvlinops' own tests vary: models x losses x reductions x Fisher types x
expand and reduce x which parameters, joint or apart x K-FAC and EKFAC; the last models have their
sizes. Every case compares the whole matrix of all layers in float64: ``(T/N) G (x) A`` (times ``N``
for a summed loss), or EKFAC's. Monte-Carlo cases feed the same draws to both libraries. Where the
two mean different things, the case names the reason, and the reason's formula is computed and
compared in its turn. The exit code is 1 if a case is neither equal nor explained.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from exam_matrices import FISHER, Question
from exam_models import LOSSES, MODELS, batches_of, loss_of
from exam_verdicts import VERDICTS, Outcome, answered, summary

PARAMETERS = ("joint", "separate", "weights", "biases")


@dataclass(frozen=True)
class Case:
    """One cell of the grid."""

    model: str
    loss: str
    reduction: str
    fisher: str
    sharing: str
    parameters: str
    kind: str


def cases() -> Iterator[Case]:
    """Yields the grid."""
    grid = itertools.product(
        MODELS, LOSSES, ("mean", "sum"), (*FISHER, "forward-only"), ("expand", "reduce"),
        PARAMETERS, ("kfac", "ekfac"),
    )  # fmt: skip
    for cell in grid:
        case = Case(*cell)
        corrected = case.kind == "ekfac" and case.fisher != "forward-only"
        if (
            case.loss in MODELS[case.model].losses
            and (case.parameters == "joint" or MODELS[case.model].biases)
            and (case.kind == "kfac" or (corrected and not MODELS[case.model].shared))
        ):
            yield case


def sat(case: Case) -> Outcome:
    """Takes the exam in one case."""
    made = MODELS[case.model]
    torch.manual_seed(0)
    model = made.build(case.loss).double()
    batches = batches_of(made, case.loss, model)
    wanted = {"weights": "weight", "biases": "bias"}.get(case.parameters, "")
    names = tuple(name for name, _ in model.named_parameters() if name.endswith(wanted))
    asked = Question(
        model, loss_of(case.loss, case.reduction, made), batches, names, case.fisher, case.sharing,
        joint=case.parameters == "joint", ekfac=case.kind == "ekfac",
    )  # fmt: skip
    return answered(asked, made.ignored, made.shared)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="directory of exam.csv and exam.md")
    parser.add_argument("--only", default="", help="only models whose name has this in it")
    given = parser.parse_args()
    torch.set_num_threads(1)
    results = [(case, sat(case)) for case in cases() if given.only in case.model]
    report(results, given.out)
    return int(any(outcome.verdict == "different" for _, outcome in results))


def report(results: Sequence[tuple[Case, Outcome]], out: Path | None) -> None:
    """Prints the table, and writes it with every case."""
    lines = ["# curvlinops' exam", "", (__doc__ or "").split("\n\n")[2].strip(), ""]
    lines += [*summary(outcome for _, outcome in results), ""]
    for kind in ("kfac", "ekfac"):
        lines += [*_table([(c, o) for c, o in results if c.kind == kind], kind), ""]
    text = "\n".join(lines[:-1]) + "\n"
    sys.stdout.write(text)
    for case, outcome in results:
        if outcome.verdict == "different":
            sys.stdout.write(f"different: {case} {outcome.error:.2e}\n")
    if out is not None:
        (out / "exam.md").write_text(text)
        rows = [{**asdict(c), **asdict(o)} for c, o in results if o.verdict != "excluded"]
        with (out / "exam.csv").open("w", newline="") as file:
            writer = csv.DictWriter(
                file, list(rows[0])[:-1], extrasaction="ignore", lineterminator="\n"
            )
            writer.writeheader()
            writer.writerows({**row, "error": f"{row['error']:.1e}"} for row in rows)


def _table(results: Sequence[tuple[Case, Outcome]], kind: str) -> list[str]:
    columns = list(itertools.product(FISHER, ("expand", "reduce")))
    lines = [
        f"| {kind} | " + " | ".join(f"{f}, {s}" for f, s in columns) + " |",
        "|---" * (1 + len(columns)) + "|",
    ]
    for name, model in MODELS.items():
        cells = []
        for cell in columns:
            here = Counter(
                o.verdict for c, o in results if (c.model, (c.fisher, c.sharing)) == (name, cell)
            )
            cells.append(", ".join(f"{here[v]} {v}" for v in VERDICTS if here[v]))
        if any(cells):
            lines.append(f"| {model.about} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
