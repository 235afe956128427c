"""A comparison of the optimisers of ``task=train``: the tables of docs/training.md.

Every optimiser has the same tuning budget: ``--trials`` trainings on seed 0 over its own important
axes. The first trial is the option as it stands, the others are the points of a scrambled Sobol
sequence, the same in every run of this script. The best trial is then used with further seeds;
they are paired, with the same initial weights and batches for every optimiser. A finished cell is
written to a file and not repeated::

    python benchmarks/optimizers.py --steps 120 --trials 9 --seeds 5 --out outputs/optimizers

Seconds of cells that ran at different times cannot be compared. ``--rounds`` measures the time of
the steps separately: in every round each optimiser takes one step, in turn, and its CPU seconds are
divided by those of SGD's step of the same round::

    python benchmarks/optimizers.py --rounds 20 --threads 1

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
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from time import process_time
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from scipy import stats
from scipy.stats import qmc

from fisher_lab.config import paths, sweep_files
from fisher_lab.config.schema import Config
from fisher_lab.config.validate import validate
from fisher_lab.curvature import losses
from fisher_lab.runs import atomic
from fisher_lab.tasks import train
from fisher_lab.workload import build, models, optimizers, training_loop
from fisher_lab.workload.inputs import prepare

IDENTITY = 1e3
"""Damping of both factors in the control; a step is ``IDENTITY ** -2`` times the gradient's."""

Range = tuple[float, float]

KFAC: dict[str, Range] = {
    "optimizer.lr": (3e-3, 0.3),
    "optimizer.clip_limit": (2e-5, 1e-3),
    "kfac.damping": (3e-4, 3e-3),
}
LIBRARY: dict[str, Range] = {
    "optimizer.lr": (1e-3, 0.1),
    "1-optimizer.beta2": (0.005, 0.1),
    "optimizer.inverse_freq": (1, 10),
}
METHODS: dict[str, tuple[list[str], dict[str, Range]]] = {
    "sgd": (
        ["optimizer=sgd"],
        {"optimizer.lr": (0.03, 3.0), "1-optimizer.momentum": (0.03, 0.3),
         "optimizer.clip_norm": (0.3, 10.0)},
    ),
    "adamw": (
        ["optimizer=adamw"],
        {"optimizer.lr": (5e-4, 0.05), "1-optimizer.beta2": (0.005, 0.1),
         "optimizer.eps": (1e-9, 1e-5)},
    ),
    "muon": (
        ["optimizer=muon"],
        {"optimizer.lr": (1e-3, 0.1), "1-optimizer.momentum": (0.02, 0.2),
         "optimizer.weight_decay": (1e-3, 0.3)},
    ),
    "kfac": (["optimizer=kfac"], KFAC),
    "ekfac": (["optimizer=ekfac"], KFAC),
    "soap": (["optimizer=soap"], LIBRARY),
    "shampoo": (["optimizer=shampoo"], LIBRARY),
    "hidden-sgd": (
        [
            "optimizer=kfac",
            "optimizer.clip=none",
            f"optimizer.weight_decay={0.01 / IDENTITY**2}",  # times a rate IDENTITY ** 2 as large
            f"kfac.damping={IDENTITY}",
            "optimizer.damping_ratio=1",
            "kfac.norm_layers=false",  # they have one factor, and would step IDENTITY times as far
            "kfac.update_freq=1000000",
            f"optimizer.lr={1e-5 * IDENTITY**2}",
        ],
        {"optimizer.lr": (1e-5 * IDENTITY**2, 1e-2 * IDENTITY**2)},
    ),
}  # fmt: skip
"""Name -> overrides, and the axes that are tuned, each over a range on a logarithmic scale."""

POINTS = (0.25, 0.5, 0.75, 1.0)
"""Shares of the steps at which the held-out loss is looked at."""


@cache
def trials(name: str, count: int) -> list[dict[str, Any]]:
    """The settings of an optimiser's trials; the first are those of its option."""
    axes = METHODS[name][1]
    points = qmc.Sobol(len(axes), rng=0).random(count - 1) if count > 1 else []
    made: list[dict[str, Any]] = [{}]
    for point in points:
        settings: dict[str, Any] = {}
        for (key, (low, high)), share in zip(axes.items(), point, strict=True):
            value = float(f"{low * (high / low) ** share:.3g}")
            if key == "optimizer.inverse_freq":
                value = round(value)
            settings[key.removeprefix("1-")] = 1 - value if key.startswith("1-") else value
        made.append(settings)
    return made


def configured(name: str, settings: Mapping[str, Any], seed: int, steps: int, more: Any) -> Config:
    """The configuration of a cell."""
    overrides = [
        "task=train",
        "progress=false",
        *METHODS[name][0],
        *(f"{key}={value!r}" for key, value in settings.items()),
        f"seed={seed}",
        f"train.steps={steps}",
        f"train.eval_every={max(1, steps // 4)}",
        *more,
    ]
    with initialize_config_dir(str(paths.conf()), version_base="1.3"):
        return validate(compose("config", overrides))


def cell(name: str, trial: int, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Run a cell, or read it where it was run."""
    file = args.out / f"{name}_{trial}_{seed}_{args.steps}.json"
    if file.exists():
        return json.loads(file.read_text())
    settings = trials(name, args.trials)[trial]
    result, content = trained(name, settings, seed, args.steps, args)
    content |= {"optimizer": name, "trial": trial, "settings": settings, "seed": seed}
    content["heldout"] = [
        [row["step"], row["heldout_loss"]] for row in result.curve.rows if "heldout_loss" in row
    ]
    atomic.write_text(file, json.dumps(content))
    print(f"{name:10s} trial {trial} {settings} seed {seed}: {content['loss']}", flush=True)
    return content


def trained(
    name: str, settings: Mapping[str, Any], seed: int, steps: int, args: argparse.Namespace
) -> tuple[training_loop.Result, dict[str, Any]]:
    """Train once; the result, and ``metrics`` and ``loss`` (None: it diverged)."""
    config = configured(name, settings, seed, steps, args.more)
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
    metrics = train.metrics(result, None)
    loss = metrics["loss/heldout"]
    fine = loss is not None and math.isfinite(loss) and not metrics["diverged"]
    return result, {"metrics": metrics, "loss": loss if fine else None}


def tuned(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The cells of the best trial, a seed each; the trials are run for it."""
    done = [cell(name, trial, 0, args) for trial in range(args.trials)]
    done = [one for one in done if one["loss"] is not None]
    if not done:
        return []
    best = min(done, key=lambda one: one["loss"])["trial"]
    return [cell(name, best, seed, args) for seed in range(args.seeds)]


def trials_table(args: argparse.Namespace) -> str:
    """Final held-out loss of every trial, seed 0."""
    lines = ["| optimiser | held-out loss of each trial | the best |", "|---|---|---|"]
    for name in args.optimizers:
        cells = [cell(name, trial, 0, args) for trial in range(args.trials)]
        shown = ", ".join("diverged" if c["loss"] is None else f"{c['loss']:.3f}" for c in cells)
        best = tuned(name, args)
        settings = best[0]["settings"] if best else None
        words = "none" if settings is None else "the option's"
        if settings:
            words = ", ".join(f"`{key}={value:.4g}`" for key, value in settings.items())
        lines.append(f"| `{name}` | {shown} | {words} |")
    return "\n".join(lines)


def seeds_table(args: argparse.Namespace) -> str:
    """Mean over the seeds against steps, and the paired difference from the first optimiser."""
    first = args.optimizers[0]
    heads = "".join(f" loss at {share:.0%} |" for share in POINTS)
    lines = [
        f"| optimiser |{heads} less `{first}`'s (95 %) |",
        "|---|" + "---|" * (len(POINTS) + 1),
    ]
    reference = tuned(first, args)
    for name in args.optimizers:
        cells = tuned(name, args)
        if not cells or any(c["loss"] is None for c in cells):
            lines.append(f"| `{name}` | diverged |" + " |" * len(POINTS))
            continue
        curve = [_at(cells, share, args.steps) for share in POINTS]
        final = [c["loss"] for c in cells]
        spread = statistics.stdev(final) if len(final) > 1 else math.nan
        middle = "".join(f" {loss:.3f} |" for loss in curve[:-1])
        middle += f" {statistics.fmean(final):.3f} ± {spread:.3f} |"
        lines.append(f"| `{name}` |{middle} {_less(final, reference)} |")
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
    """CPU seconds of a step, in turn: medians, and ratios to SGD's step of the same round."""
    names = list(dict.fromkeys(["sgd", *args.optimizers]))
    steps = {name: _stepping(name, tuned(name, args)[0]["settings"], args) for name in names}
    taken: dict[str, list[float]] = {name: [] for name in names}
    for number in range(args.rounds + 1):
        for name in names if number % 2 else reversed(names):
            began = process_time()
            steps[name](number)
            taken[name].append(process_time() - began)
    lines = ["| optimiser | ms a step | of SGD's (quartiles) |", "|---|---|---|"]
    for name in args.optimizers:
        pairs = list(zip(taken[name], taken["sgd"], strict=True))[1:]  # the first warms up
        low, middle, high = statistics.quantiles([a / b for a, b in pairs], n=4)
        shown = f"{1000 * statistics.median(a for a, _ in pairs):.0f}"
        lines.append(f"| `{name}` | {shown} | {middle:.2f} ({low:.2f} to {high:.2f}) |")
    return "\n".join(lines)


def _stepping(
    name: str, settings: Mapping[str, Any], args: argparse.Namespace
) -> Callable[[int], Any]:
    """One training of an optimiser; calling it with a number makes the step of that number."""
    config = configured(name, settings, 0, args.steps, args.more)
    args.inputs = args.inputs or prepare(config)
    model = models.with_dtype(args.inputs.untrained(0), config.model.dtype).train()
    run, objective = train.training_run(config, {}), args.inputs.objective
    updater = optimizers.make(model, objective.loss_fn, run)
    size: dict[str, Any] = {"batch_size": run.batch_size, "seq_len": run.seq_len, "seed": 0}

    def batch(number: int) -> Any:
        return losses.prepare(model, objective.batch("train", number, **size), objective.loss_fn)

    return lambda number: updater.step(batch(number), run.lr / 10, lambda k: batch(number + k))


def main() -> None:
    """Run what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--trials", type=int, default=9, help="trainings to tune an optimiser by")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=0, help="time the steps, in so many rounds")
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
    print(f"\n{args.steps} steps, {torch.get_num_threads()} threads; trials, seed 0:\n")
    print(trials_table(args))
    print(f"\nthe best trial, {args.seeds} seeds:\n")
    print(seeds_table(args))
    if args.rounds:
        print(f"\ntimed apart, {args.rounds} rounds of one step each:\n")
        print(timed_table(args))


if __name__ == "__main__":
    main()
