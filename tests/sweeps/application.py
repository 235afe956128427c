"""The application in a process of its own, and what tests ask of the sweep that it leaves."""

from __future__ import annotations

import csv
import subprocess
from pathlib import Path
from typing import IO, Any

from fisher_lab import cli
from fisher_lab.config import compose
from fisher_lab.sweeps import plan
from fisher_lab.sweeps.directory import Layout
from tests.processes import start_python

TRIVIAL_WORKER = Path(__file__).with_name("trivial_worker.py")
ORDERED_WORKER = Path(__file__).with_name("ordered_worker.py")


def launch(
    *arguments: str,
    worker: Path | None = None,
    identity: dict[str, str] | None = None,
    output: int | IO[str] = subprocess.PIPE,
) -> subprocess.Popen[str]:
    """Start ``fisher-lab ARGUMENTS``.

    Args:
        arguments: of the command line.
        worker: script that the launcher, also a detached one, runs for a cell; None: the real one.
        identity: hashes of text and model that cells are planned with; None: the real ones.
        output: where standard output and error go.
    """
    chosen = ""
    if worker is not None:
        chosen = (
            "from fisher_lab.sweeps import run, work, worker_process; "
            f"work.WORK = worker_process.WORKER = ({str(worker)!r},); "
        )
        background = f"{chosen}run.main(sys.argv[1:])"
        chosen += f"run.BACKGROUND = ('-c', {'import sys; ' + background!r}); "
    if identity is not None:
        chosen += "from fisher_lab.tasks import preflight; "
        chosen += f"preflight.preflight = lambda config: {identity!r}; "
    script = f"import sys; from fisher_lab import cli; {chosen}sys.exit(cli.main(sys.argv[1:]))"
    return start_python("-c", script, *arguments, stdout=output, stderr=subprocess.STDOUT)


def launch_trivial(*arguments: str) -> subprocess.Popen[str]:
    """Start it with the worker whose task costs nothing."""
    return launch(*arguments, worker=TRIVIAL_WORKER, identity={"data": "abc"})


def own_sweep(name: str, text: str) -> None:
    """Write a sweep file of the user's."""
    Path("sweeps").mkdir(exist_ok=True)
    Path("sweeps", f"{name}.yaml").write_text(text)


CONTENT = {"data": "x"}
"""The identity of the text that `planned` plans with."""


def planned(*arguments: str) -> list[plan.SweepPlan]:
    """What ``fisher-lab -m ARGUMENTS`` would run."""
    args = cli._parse(["-m", *arguments])
    with cli.config_loader(args) as loader:
        cfg = compose.load(loader, args.overrides, multirun=True)
        return plan.make(loader, cfg, args.overrides, lambda config: CONTENT)


def by_seed(runs) -> dict[int, dict[str, Any]]:
    """The record of each run that the fixture ``runs`` finds."""
    return {record["config"]["seed"]: record for _, record in runs()}


def statuses(runs) -> dict[int, str]:
    """The status of each run, by its seed."""
    return {seed: record["status"] for seed, record in by_seed(runs).items()}


def the_sweep() -> Layout:
    """The only sweep under the working directory."""
    (file,) = Path.cwd().glob("results/*/sweep.json")
    return Layout(file.parent)


def count(sweep: Layout, event: str) -> int:
    """How often something has happened, by the journal."""
    return sum(entry["event"] == event for entry in sweep.journal.read())


ON_TEXT = [
    *("model=mlp", "model.width=8", "model.layers=1", "data=text_file", "data.path=text.txt"),
    *("data.vocab_size=293", "data.seq_len=8", "threads=1"),
]
"""The smallest model on ``text.txt``."""
ANALYSIS = [
    *("task=analyze", *ON_TEXT, "model.init=random", "task.heldout_batches=1"),
    "kfac/damping=paper",
]
TEXT = "The quick brown fox jumps over the lazy dog. " * 400
TRAINING = [
    *("task=train", *ON_TEXT, "train.seq_len=8", "train.batch_size=2", "train.steps=400"),
    *("train.save_every_s=0.1", "train.eval_every=1000000", "deterministic=true"),
]
"""A training of seconds on ``text.txt``, which saves its state all the time."""


def curve(directory: Path) -> list[dict[str, str]]:
    """The learning curve of a run without its times."""
    with (directory / "curve.csv").open() as file:
        return [
            {name: value for name, value in row.items() if "seconds" not in name}
            for row in csv.DictReader(file)
        ]
