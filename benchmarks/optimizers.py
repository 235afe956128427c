"""A comparison of the optimisers of ``task=train``: the table of docs/training.md.

Each optimiser gets its learning rate from a grid of seven over three decades (half a decade apart)
on seed 0. Further seeds follow at the best rate; they are paired, with the same initial weights and
batches for every optimiser. A finished cell is written to a file and not repeated::

    python benchmarks/optimizers.py --steps 400 --seeds 3 --out outputs/optimizers

Seconds of cells that ran at different times cannot be compared. ``--rounds`` measures the time of
the steps separately, by one short training of each optimiser per round, at its best rate::

    python benchmarks/optimizers.py --steps 120 --rounds 3 --timed-steps 40

``hidden-sgd`` is a control: it is ``kfac`` without clipping and with a damping so large that the
preconditioner is a multiple of the identity, which is SGD in the hidden layers and AdamW where
``kfac`` uses AdamW.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from scipy import stats

from fisher_lab.config import paths, sweep_files
from fisher_lab.config.schema import Config
from fisher_lab.config.validate import validate
from fisher_lab.runs import atomic
from fisher_lab.tasks import train
from fisher_lab.workload import build, models, training_loop
from fisher_lab.workload.inputs import prepare

IDENTITY = 1e3
"""Damping of both factors in the control; a step is ``IDENTITY ** -2`` times the gradient's."""

METHODS: dict[str, tuple[list[str], list[float]]] = {
    "sgd": (["optimizer=sgd"], [3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0]),
    "kfac": (["optimizer=kfac"], [1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0]),
    "hidden-sgd": (
        [
            "optimizer=kfac",
            "optimizer.clip=none",
            "optimizer.ratio=false",
            f"optimizer.weight_decay={0.01 / IDENTITY**2}",  # times a rate IDENTITY ** 2 as large
            f"kfac.damping={IDENTITY}",
            "optimizer.damping_ratio=1",
            "kfac.norm_layers=false",  # they have one factor, and would step IDENTITY times as far
            "kfac.update_freq=1000000",
        ],
        [r * IDENTITY**2 for r in (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)],
    ),
    "adamw": (["optimizer=adamw"], [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1]),
    "ekfac": (["optimizer=ekfac"], [1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0]),
    "muon": (["optimizer=muon"], [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1]),
}
"""Name -> overrides, learning rates."""

POINTS = (0.25, 0.5, 0.75, 1.0)
"""Shares of the steps at which the held-out loss is looked at."""


def configured(name: str, lr: float, seed: int, steps: int, more: Iterable[str]) -> Config:
    """The configuration of a cell."""
    overrides = [
        "task=train",
        "progress=false",
        *METHODS[name][0],
        f"optimizer.lr={lr!r}",
        f"seed={seed}",
        f"train.steps={steps}",
        f"train.eval_every={max(1, steps // 8)}",
        *more,
    ]
    with initialize_config_dir(str(paths.conf()), version_base="1.3"):
        return validate(compose("config", overrides))


def cell(name: str, lr: float, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Run a cell, or read it where it was run."""
    file = args.out / f"{name}_{lr:g}_{seed}_{args.steps}.json"
    if file.exists():
        return json.loads(file.read_text())
    content = trained(name, lr, seed, args.steps, args)
    atomic.write_text(file, json.dumps(content))
    print(f"{name:10s} lr {lr:<8g} seed {seed}: {content['loss']}", flush=True)
    return content


def trained(
    name: str, lr: float, seed: int, steps: int, args: argparse.Namespace
) -> dict[str, Any]:
    """Train once; what a cell's file holds."""
    config = configured(name, lr, seed, steps, args.more)
    if args.inputs is None:
        args.inputs = prepare(config)
    model = models.with_dtype(args.inputs.untrained(seed), config.model.dtype)
    run = train.training_run(config, {})
    with tempfile.TemporaryDirectory() as directory:
        result = training_loop.train(
            model.to(build.device_of(config)),
            args.inputs.objective,
            run,
            Path(directory),
            save_every_s=math.inf,
        )
    content = {
        "optimizer": name,
        "lr": lr,
        "seed": seed,
        "metrics": train.metrics(result, None),
        "heldout": [
            [row["step"], row["heldout_loss"], row["seconds"]]
            for row in result.curve.rows
            if "heldout_loss" in row
        ],
    }
    loss = content["metrics"]["loss/heldout"]
    content["loss"] = loss if math.isfinite(loss) and not content["metrics"]["diverged"] else None
    return content


def best(cells: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The cell with the lowest final loss; None where all diverged."""
    done = [c for c in cells if c["loss"] is not None]
    return min(done, key=lambda c: c["loss"], default=None)


def tuned(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The cells of the best learning rate, a seed each; the grid is run for it."""
    grid = [cell(name, lr, 0, args) for lr in METHODS[name][1]]
    chosen = best(grid)
    if chosen is None:
        return []
    return [cell(name, chosen["lr"], seed, args) for seed in range(args.seeds)]


def shown_rate(name: str, lr: float) -> str:
    """A learning rate as the table shows it: the control's per unit of gradient."""
    return f"{lr / IDENTITY**2:g}" if name == "hidden-sgd" else f"{lr:g}"


def grid_table(args: argparse.Namespace) -> str:
    """Final held-out loss over the grid, seed 0."""
    lines = ["| optimiser | final held-out loss at each learning rate | best |", "|---|---|---|"]
    for name in args.optimizers:
        cells = [cell(name, lr, 0, args) for lr in METHODS[name][1]]
        shown = ", ".join(
            f"{shown_rate(name, c['lr'])}: "
            + ("diverged" if c["loss"] is None else f"{c['loss']:.3f}")
            for c in cells
        )
        chosen = best(cells)
        where = "none"
        if chosen is not None:
            inside = chosen["lr"] not in (METHODS[name][1][0], METHODS[name][1][-1])
            where = shown_rate(name, chosen["lr"]) + ("" if inside else " (at the edge)")
        lines.append(f"| {name} | {shown} | {where} |")
    return "\n".join(lines)


def seeds_table(args: argparse.Namespace) -> str:
    """Mean over the seeds against steps, and the paired difference from SGD."""
    heads = "".join(f" loss at {share:.0%} |" for share in POINTS)
    lines = [
        f"| optimiser | rate |{heads} less SGD's (95 %) |",
        "|---|---|" + "---|" * (len(POINTS) + 1),
    ]
    reference = tuned("sgd", args)
    for name in args.optimizers:
        cells = tuned(name, args)
        if not cells or any(c["loss"] is None for c in cells):
            lines.append(f"| {name} | diverged |" + " |" * (len(POINTS) + 1))
            continue
        losses = [_at(cells, share, args.steps) for share in POINTS]
        final = [c["loss"] for c in cells]
        spread = statistics.stdev(final) if len(final) > 1 else math.nan
        middle = "".join(f" {loss:.3f} |" for loss in losses[:-1])
        middle += f" {losses[-1]:.3f} ± {spread:.3f} |"
        rate = shown_rate(name, cells[0]["lr"])
        lines.append(f"| {name} | {rate} |{middle} {_less(final, reference)} |")
    return "\n".join(lines)


def _at(cells: list[dict[str, Any]], share: float, steps: int) -> float:
    """Mean held-out loss of the evaluation nearest to a share of the steps."""
    return statistics.fmean(
        min(c["heldout"], key=lambda row: abs(row[0] - share * steps))[1] for c in cells
    )


def _less(final: list[float], reference: list[dict[str, Any]]) -> str:
    differences = [a - r["loss"] for a, r in zip(final, reference, strict=True)]
    mean = statistics.fmean(differences)
    if len(differences) < 2 or not any(differences):
        return f"{mean:+.3f}"
    half = stats.sem(differences) * stats.t.ppf(0.975, len(differences) - 1)
    return f"{mean:+.3f} ± {half:.3f}"


def timed_table(args: argparse.Namespace) -> str:
    """Seconds of a step, the optimisers in turn: medians, and ratios to SGD's of the same round."""
    rates = {name: tuned(name, args)[0]["lr"] for name in dict.fromkeys(["sgd", *args.optimizers])}
    taken: dict[str, list[float]] = {name: [] for name in rates}
    for _ in range(args.rounds):
        for name, lr in rates.items():
            metrics = trained(name, lr, 0, args.timed_steps, args)["metrics"]
            taken[name].append(metrics["train/seconds"] / args.timed_steps)
    lines = [
        "| optimiser | ms a step | of SGD's | s to SGD's final loss, of SGD's |",
        "|---|---|---|---|",
    ]
    goal = max(c["loss"] for c in tuned("sgd", args))
    whole = _steps_to(tuned("sgd", args), goal)
    for name in args.optimizers:
        ratio = statistics.median(t / s for t, s in zip(taken[name], taken["sgd"], strict=True))
        steps = _steps_to(tuned(name, args), goal)
        share = f"{ratio * steps / whole:.2f}" if math.isfinite(steps) else "not reached"
        middle = 1000 * statistics.median(taken[name])
        lines.append(f"| {name} | {middle:.0f} | {ratio:.2f} | {share} |")
    return "\n".join(lines)


def _steps_to(cells: list[dict[str, Any]], goal: float) -> float:
    """Median of the steps until an evaluation is at or under a loss."""
    found = (
        next((step for step, loss, _ in c["heldout"] if loss <= goal), math.inf) for c in cells
    )
    return statistics.median(found)


def main() -> None:
    """Run what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=0, help="time the steps, in so many rounds")
    parser.add_argument("--timed-steps", type=int, default=40, help="steps of a timed training")
    parser.add_argument("--out", type=Path, default=Path("outputs/optimizers"))
    parser.add_argument("--optimizers", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("more", nargs="*", help="further overrides, for every cell")
    args = parser.parse_args()
    args.inputs = None
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    sweep_files.register()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.optimizers:
        tuned(name, args)
    print(f"\n{args.steps} steps, {torch.get_num_threads()} threads; grid, seed 0:\n")
    print(grid_table(args))
    print(f"\nat the best rate, {args.seeds} seeds:\n")
    print(seeds_table(args))
    if args.rounds:
        print(f"\ntimed apart, {args.rounds} rounds of {args.timed_steps} steps:\n")
        print(timed_table(args))


if __name__ == "__main__":
    main()
