"""``fisher-lab reproduce``: some completed cells are run again, and their numbers compared.

Times and memory are no numbers that come back; every other metric and every column of the tables
is compared. On the same processor (or device), with the same versions and threads, they are to be
equal to the bit, and what differs by more than rounding is different, however little that is beside
the spread of the seeds. Where any of these differs, rounding is larger and may grow on its way
through a run: then a metric that is off by more may still lie inside the interval of the seeds,
which says less, and the verdict says so.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import hashlib
import json
import math
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from rich.text import Text

from fisher_lab.config.errors import ConfigError
from fisher_lab.config.schema import Config, ResumeConfig, SweepConfig, TrackerConfig
from fisher_lab.config.validate import build
from fisher_lab.results import manifest
from fisher_lab.results.commands import OK, guarded, make_parser
from fisher_lab.results.loading import find
from fisher_lab.results.values import ResultsError
from fisher_lab.runs import atomic, record
from fisher_lab.runs.identity import LEFT_OUT
from fisher_lab.runs.record import METRICS_FILE
from fisher_lab.runs.signals import Watch
from fisher_lab.runs.status import Status
from fisher_lab.sweeps.cell import RUN_DIRECTORY, Cell
from fisher_lab.sweeps.directory import RUN_LOG, Layout
from fisher_lab.sweeps.worker_process import WorkerProcess

NOT_REPRODUCED = 1
GRACE_S, PAUSE_S = 30.0, 0.05

MEASURED = re.compile(
    r"(.*[_/])?(s|seconds|s_max|mb|mib|per_s|speedup|efficiency)|.*peak.*|spectral/bytes"
)
"""Metrics and columns that are measured anew in every run: times and memory, and the size of a file
that holds some."""


@dataclass(frozen=True)
class Rounding:
    """How far apart two numbers may be that differ by rounding alone.

    Attributes:
        relative: of their size.
        spread: of the standard deviation over the seeds, for numbers that are small differences of
            large ones.
    """

    relative: float
    spread: float


HERE, ELSEWHERE = Rounding(1e-6, 1e-3), Rounding(1e-4, 1e-2)
"""With the same versions, processor and threads as the run, and with others."""


class Answer(StrEnum):
    """What a cell that was run again says."""

    BITS = "equal to the bit"
    ROUNDING = "equal to rounding"
    INSIDE = "inside the interval of the seeds"
    DIFFERENT = "different"
    NOT_RUN = "not run"

    @property
    def is_same(self) -> bool:
        """Whether the numbers are those of the run."""
        return self in (Answer.BITS, Answer.ROUNDING)


@dataclass(frozen=True)
class Repeated:
    """One cell that was run again.

    Attributes:
        run: the directory of the run.
        answer: in a word.
        why: the number that is furthest off, or why it was not run.
        here: whether processor, versions and threads were those of the run.
        compared: how many numbers were compared.
        seconds: that it took.
    """

    run: Path
    answer: Answer
    why: str = ""
    here: bool = True
    compared: int = 0
    seconds: float = 0.0


def verdict(cells: Sequence[Repeated]) -> tuple[str, bool]:
    """The verdict over all cells, and whether they were reproduced."""
    answers = [cell.answer for cell in cells]
    different, left = answers.count(Answer.DIFFERENT), answers.count(Answer.NOT_RUN)
    if different:
        return f"not reproduced: {different} of {len(cells)} are different", False
    if left:
        return f"not decided: {left} of {len(cells)} could not be run here", False
    worst = max(answers, key=list(Answer).index)
    return f"reproduced: {'each' if len(set(answers)) == 1 else 'at worst'} {worst}", True


# ---- the sample ----------------------------------------------------------------------------------


def completed(path: Path) -> list[Path]:
    """The directories of the completed runs of an appendix, a sweep, or a directory of these.

    Raises:
        ResultsError: there is none.
    """
    is_appendix = (path / manifest.APPENDIX_FILE).is_file()
    paths = manifest.sweeps_of(path) if is_appendix else [path]
    found = [one.directory for one in find(paths)[0]]
    done = [run for run in found if record.status_of(run) is Status.COMPLETED]
    if not done:
        raise ResultsError(f"{path}: there is no completed run")
    return done


def sample(runs: Iterable[Path], count: int, seed: int) -> list[Path]:
    """Some of the runs, the same for a seed wherever they lie and whatever others there are."""

    def draw(run: Path) -> str:
        name = f"{seed}/{run.parent.resolve().name}/{run.name}"
        return hashlib.sha256(name.encode()).hexdigest()

    return sorted(runs, key=draw)[:count]


# ---- one cell ------------------------------------------------------------------------------------


def again(run: Path, layout: Layout) -> Repeated:
    """Run one cell again, in a process of its own below a directory, and compare its numbers."""
    known = record.read(run)
    try:
        cell = _cell(known, layout)
    except ConfigError as error:
        return Repeated(run, Answer.NOT_RUN, str(error))
    began = time.monotonic()
    threads = known["provenance"].get("threads")
    outcome = _run(cell, threads if isinstance(threads, int) else None)
    seconds = time.monotonic() - began
    if outcome is not Status.COMPLETED:
        why = record.brief(cell.directory)
        # Another text, another model or no device is no other number.
        is_missing = re.match(r"(InputsChanged|ConfigError|ImportError|ModuleNotFoundError)", why)
        answer = Answer.NOT_RUN if is_missing else Answer.DIFFERENT
        return Repeated(run, answer, f"{outcome}: {why}", seconds=seconds)
    here = _setting(known) == _setting(record.read(cell.directory))
    return dataclasses.replace(compare(run, cell.directory, here), seconds=seconds)


def _cell(known: Mapping[str, Any], layout: Layout) -> Cell:
    """The cell of a record, with what cannot change a result as it is here.

    Raises:
        ConfigError: this version or this machine cannot run it.
    """
    config = build(Config, known["config"])
    if config.distributed.nodes > 1:
        raise ConfigError("distributed.nodes: the run was one of several nodes")
    own = Config(sweep=SweepConfig(), resume=ResumeConfig(), tracker=TrackerConfig())
    cache = config.cache_dir if config.cache_dir and Path(config.cache_dir).is_dir() else None
    config = dataclasses.replace(
        config, sweep=own.sweep, resume=own.resume, tracker=own.tracker, progress=False,
        cache_dir=cache,
    )  # fmt: skip
    content = known["provenance"].get("content") or {}
    overrides = [str(one) for one in known.get("overrides") or []]
    logging = {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"plain": {"format": "[%(asctime)s][%(name)s][%(levelname)s] %(message)s"}},
        "handlers": {
            "file": {
                "class": "logging.FileHandler",
                "formatter": "plain",
                "filename": f"{RUN_DIRECTORY}/{RUN_LOG}",
            }
        },
        "root": {"handlers": ["file"], "level": "INFO"},
    }
    cell = Cell(layout, str(known["run_id"]), overrides, {}, config, content)
    return cell.freeze("reproduce", logging)


def _run(cell: Cell, threads: int | None) -> Status:
    """Run a cell to its end; a signal asks its process to end."""
    with Watch().deferred() as pending:
        process = WorkerProcess(cell, threads=threads, grace_s=GRACE_S)
        while (outcome := process.poll()) is None:
            if signum := pending():
                process.ask(signum)
            time.sleep(PAUSE_S)
    return outcome.status


_VERSIONS = ("python", "torch", "transformers", "tokenizers", "numpy", "scipy")


def _setting(known: Mapping[str, Any]) -> list[Any]:
    """What the last bits of a result depend on beside the code and the configuration."""
    about = known["provenance"]
    host, versions = about.get("host") or {}, about.get("versions") or {}
    names = ("device", "device_name", "cuda", "threads", "default_dtype")
    return [
        *(host.get(name) for name in ("machine", "cpu")),
        *(versions.get(name) for name in _VERSIONS),
        *(about.get(name) for name in names),
    ]


# ---- numbers -------------------------------------------------------------------------------------

Numbers = dict[str, float | str | None]


def numbers(run: Path) -> Numbers:
    """All that a run has computed and not measured: its metrics, and the cells of its tables."""
    found: Numbers = dict(atomic.read_json(run / METRICS_FILE))
    for file in sorted(run.glob("*.csv")):
        if not file.is_symlink():
            found.update(_cells(file))
    return {name: value for name, value in found.items() if not _is_measured(name)}


def _is_measured(name: str) -> bool:
    return MEASURED.fullmatch(name.rpartition(" · ")[2]) is not None


def _cells(file: Path) -> Iterator[tuple[str, float | str | None]]:
    with file.open(encoding="utf-8", newline="") as lines:
        for number, row in enumerate(csv.DictReader(lines)):
            for column, text in row.items():
                yield f"{file.name} · {number} · {column}", _value(text)


def _value(text: str | None) -> float | str | None:
    try:
        return float(text or "nan") if text else None
    except ValueError:
        return text


def _seeds(run: Path) -> list[Numbers]:
    """The numbers of all completed runs of a sweep that differ from one in nothing but the seed."""

    def settings(directory: Path) -> dict[str, Any]:
        config = {**record.read(directory)["config"], "seed": None}
        return {key: value for key, value in config.items() if key not in LEFT_OUT}

    own = settings(run)
    others = (one.directory for one in find(run.parent)[0])
    return [
        numbers(other)
        for other in others
        if record.status_of(other) is Status.COMPLETED and settings(other) == own
    ]


def compare(run: Path, repeated: Path, here: bool) -> Repeated:
    """The numbers of a run against those of its repetition.

    Args:
        run: the directory of the run.
        repeated: that of its repetition.
        here: whether processor, versions and threads were those of the run.
    """
    before, now = numbers(run), numbers(repeated)
    apart = [name for name, value in before.items() if name not in now or now[name] != value]
    if not apart:
        return Repeated(run, Answer.BITS, "", here, len(before))
    seeds = _seeds(run)
    judged = [(_judge(name, before, now, seeds, here), name) for name in apart]
    (answer, _), name = max(judged, key=lambda one: (list(Answer).index(one[0][0]), one[0][1]))
    value = label(now[name]) if name in now else "nothing"
    why = f"{name}: {value}, and {label(before[name])} in the run"
    if len(apart) > 1:
        why += f" ({len(apart)} of {len(before)} numbers are not equal)"
    return Repeated(run, answer, why, here, len(before))


def label(value: float | str | None) -> str:
    """A number in words, to the last digit."""
    return "no number" if value is None else repr(value) if isinstance(value, float) else str(value)


def _judge(
    name: str, before: Numbers, now: Numbers, seeds: Sequence[Numbers], here: bool
) -> tuple[Answer, float]:
    """How one number that is not equal is to be taken, and how far off it is."""
    a, b = before[name], now.get(name)
    if not (isinstance(a, int | float) and isinstance(b, int | float)):
        return Answer.DIFFERENT, math.inf
    values = [v for one in seeds if isinstance(v := one.get(name), int | float)]
    spread = statistics.stdev(values) if len(values) > 2 else 0.0
    size, off = max(abs(a), abs(b)), abs(a - b)
    allowed = HERE if here else ELSEWHERE
    if off <= max(allowed.relative * size, allowed.spread * spread):
        return Answer.ROUNDING, off / size
    # The interval for one more seed; the run itself is one of those that it is made of.
    if not here and off and spread and abs(b - statistics.fmean(values)) <= _half(values, spread):
        return Answer.INSIDE, off / spread
    return Answer.DIFFERENT, off / size


def _half(values: Sequence[float], spread: float) -> float:
    """Half the width of the 95 % interval for a further value (Student's t)."""
    from scipy import stats

    n = len(values)
    return float(stats.t.ppf(0.975, n - 1)) * spread * math.sqrt(1 + 1 / n)


# ---- the command ---------------------------------------------------------------------------------


def reproduce(path: Path, count: int, seed: int, output: Path) -> Iterator[Repeated]:
    """Run a sample of the completed cells of an appendix or a sweep again, one after the other.

    Args:
        path: an appendix, a sweep, or a directory of sweeps.
        count: how many cells.
        seed: of the sample.
        output: a directory for the repeated runs.

    Raises:
        ResultsError: there is no completed run.
    """
    for run in sample(completed(path), count, seed):
        # A directory for each: a run that is repeated twice is computed twice.
        yield again(run, Layout(Path(tempfile.mkdtemp(prefix=f"{run.parent.name}-", dir=output))))


@guarded
def reproduce_command(argv: Sequence[str]) -> int:
    """Run ``fisher-lab reproduce``."""
    what = "Run some completed cells again, and say whether their numbers are the same."
    parser = make_parser("reproduce", what, paths=False)
    parser.add_argument("path", help="an appendix, a sweep, or a directory of sweeps")
    parser.add_argument("--sample", type=int, default=5, metavar="N", help="cells; default: 5")
    parser.add_argument("--seed", type=int, default=0, help="of the sample; default: 0")
    parser.add_argument("-o", "--output", metavar="DIRECTORY", help="keep the repeated runs here")
    parser.add_argument("--json", action="store_true", help="everything that was found, as JSON")
    args: argparse.Namespace = parser.parse_args(list(argv))
    if args.sample < 1:
        raise ResultsError(f"--sample={args.sample} is not allowed: 1 or more")
    path = Path(args.path)
    completed(path)  # before a directory is made
    with tempfile.TemporaryDirectory(prefix="fisher_lab-reproduce-") as temporary:
        output = Path(args.output or temporary)
        output.mkdir(parents=True, exist_ok=True)
        cells = []
        for cell in reproduce(path, args.sample, args.seed, output):
            cells.append(cell)
            if not args.json:
                _show(cell)
    words, is_same = verdict(cells)
    if args.json:
        listed = [{**vars(cell), "run": str(cell.run)} for cell in cells]
        print(json.dumps({"verdict": words, "reproduced": is_same, "cells": listed}, indent=2))
    else:
        print(words)
    return OK if is_same else NOT_REPRODUCED


def _show(cell: Repeated) -> None:
    from fisher_lab.results.finishing import standard_output

    style = (
        "green" if cell.answer.is_same else "red" if cell.answer is Answer.DIFFERENT else "yellow"
    )
    place = "" if cell.here else "; other versions, threads or processor than the run's"
    line = Text(f"{cell.answer:<18}", style=style)
    details = f"{cell.compared} numbers, {cell.seconds:.1f} s{place}" if cell.compared else ""
    line.append(f"  {cell.run.parent.name}/{cell.run.name}  ", style="bold")
    line.append("; ".join(part for part in (details, cell.why) if part))
    standard_output().print(line, soft_wrap=True)
    sys.stdout.flush()
