"""Sweeps under faults by the thousand: ``python -m benchmarks.faults --seeds 10000 --out FOLDER``.

Launcher, worker, locks, records and journal of fisher_lab run as they are, on a simulated cluster
(`benchmarks/simulated`). A seed draws the faults, and gives the same course of events again:
``--seed 17`` replays one. Bugs that are planted say after how many seeds each would have been found
(``--planted``).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.simulated.course import Result, trial
from benchmarks.simulated.faults import KINDS
from fisher_lab.runs import atomic, digests, lock
from fisher_lab.runs.journal import Journal
from fisher_lab.runs.lock import Holder, Lock
from fisher_lab.runs.status import Status
from fisher_lab.sweeps import cell, slurm

PROMISES = (
    "none lost", "completed once", "one at a time", "right status", "no record torn",
    "within two polls", "no traceback",
)  # fmt: skip
CHUNK = 50
MOST_SEEDS = 1000
"""After which a planted bug counts as not found."""


@contextlib.contextmanager
def _in_place(path: Any) -> Iterator[Path]:
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    yield target


def _overwritten(self: Holder, path: Path) -> bool:
    with open(path, "w", encoding="utf-8") as file:
        json.dump({k: v for k, v in vars(self).items() if k != "touched"}, file)
    return True


def _states(jobs: Iterable[str], real: Any = slurm.states) -> dict[str, str]:
    wanted = list(jobs)
    known = real(wanted)
    return dict.fromkeys(wanted, slurm.GONE) if known is None else known


def _end_cell(cell: Any, job: str, state: str, real: Any = slurm.end_cell) -> Status:
    return real(cell, job, "FAILED" if state == "COMPLETED" else state)


def _end_record(self: Any, status: Status, reason: str, error: Any = None) -> None:
    about = {"run_id": self.run_id, "config": {}, "overrides": [], "provenance": {}}
    cell.record.end_from_outside(self.directory, status, reason, error=error, otherwise=about)


def _in_one_piece(self: Journal, entries: Any) -> None:
    with open(self.path, "ab", buffering=0) as file:
        for entry in entries:
            file.write((json.dumps({"time": "", **entry}) + "\n").encode())


PLANTED: dict[str, tuple[Any, str, Any]] = {
    "locks of the living count as stale": (Lock, "_are_stale", lambda *_: True),
    "the create of a lock is not exclusive": (Holder, "write", _overwritten),
    "a dead holder on this host is not seen": (Holder, "is_gone", lambda self: False),
    "records are written in place": (atomic, "writing", _in_place),
    "records are not flushed before the rename": (atomic, "_flush", lambda path: None),
    "a lock guards nothing once it is lost": (
        lock.atomic, "fenced", lambda *_: contextlib.nullcontext(),
    ),
    "who takes a lock sees what its host remembers": (Lock, "_look_afresh", lambda self: None),
    "the journal is written without its lock": (
        Journal, "_locked", lambda self: contextlib.nullcontext(),
    ),
    "the journal does not look whether its last line has an end": (
        Journal, "_write", _in_one_piece,
    ),
    "no answer of the controller means that jobs are gone": (slurm, "states", _states),
    "a job that found its cell held is a failure": (slurm, "end_cell", _end_cell),
    "a completed cell may be ended from outside": (cell.Cell, "end_record", _end_record),
    "a frozen cell that is not there yet is missing": (cell, "ARRIVES_S", 0.0),
    "a file that cannot be read at once has no digest": (digests, "ATTEMPTS", 1),
}  # fmt: skip
"""Bugs, and what each replaces; several were real until this benchmark found them."""


def planted(name: str) -> contextlib.AbstractContextManager[Any]:
    """Plant a bug."""
    return mock.patch.object(*PLANTED[name])


def find(name: str, most: int = MOST_SEEDS) -> tuple[int | None, str]:
    """After how many seeds a planted bug is found, and by which promise."""
    with planted(name):
        for seed in range(most):
            found = trial(seed).problems
            if found:
                return seed + 1, found[0][0]
    return None, ""


def run_seeds(seeds: Sequence[int]) -> list[Result]:
    """The courses of some seeds."""
    return [trial(seed) for seed in seeds]


def run_all(first: int, number: int, jobs: int, say: Callable[[str], None]) -> list[Result]:
    """The courses of many seeds, in several processes."""
    seeds = range(first, first + number)
    chunks = [seeds[at : at + CHUNK] for at in range(0, number, CHUNK)]
    found: list[Result] = []
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        for results in pool.map(run_seeds, chunks):
            found += results
            broken = sum(bool(one.problems) for one in found)
            say(f"{len(found)} of {number} seeds, {broken} broke a promise")
    return found


def table(results: Sequence[Result]) -> dict[str, Any]:
    """The figures of many courses."""
    kinds: dict[str, Counter[str]] = {kind.kind: Counter() for kind in KINDS}
    for one in results:
        broken = {promise for promise, _ in one.problems}
        for kind in set(one.kinds):
            kinds[kind].update(["courses", *broken])
    return {
        "seeds": [results[0].seed, results[-1].seed],
        "faults": sum(len(one.kinds) for one in results),
        "with_faults": sum(bool(one.kinds) for one in results),
        "calls": sum(one.calls for one in results),
        "simulated_hours": round(sum(one.seconds - 1000.0 for one in results) / 3600, 1),
        "recoveries": sum(len(one.recovery) for one in results),
        "slowest_recovery_s": round(max(max(r.recovery, default=0) for r in results), 2),
        "broken": [asdict(one) for one in results if one.problems],
        "kinds": {kind: dict(counted) for kind, counted in kinds.items()},
    }


def markdown(found: dict[str, Any], bugs: dict[str, tuple[int | None, str]]) -> str:
    """The tables of the documentation."""
    first, last = found["seeds"]
    lines = [
        f"Seeds {first} to {last}: {found['faults']} faults in {found['with_faults']} sweeps, "
        f"{found['calls'] / 1e6:.1f} million calls, {found['simulated_hours']} simulated hours; "
        f"{len(found['broken'])} sweeps broke a promise. {found['recoveries']} cells whose process "
        f"had died were taken up, the slowest {found['slowest_recovery_s']} s after that could be "
        "seen (two polls are 1 s).",
        "",
        f"| fault | sweeps | {' | '.join(PROMISES)} |",
        "|---" * (2 + len(PROMISES)) + "|",
    ]
    for kind, counted in found["kinds"].items():
        broken = " | ".join(str(counted.get(promise, 0)) for promise in PROMISES)
        lines.append(f"| {kind} | {counted.get('courses', 0)} | {broken} |")
    if bugs:
        lines += ["", "| planted bug | found after seeds | by the promise |", "|---|---|---|"]
        lines += [f"| {name} | {n or 'not found'} | {why} |" for name, (n, why) in bugs.items()]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the benchmark; the exit code is 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--seed", type=int, help="replay one, and say what was broken")
    parser.add_argument("--planted", action="store_true", help="also find planted bugs")
    parser.add_argument("--out", type=Path, help="folder of faults.json and faults.md")
    chosen = parser.parse_args()
    if os.environ.get("PYTHONHASHSEED") != "0":  # the order of a set is a part of a course
        given = [sys.executable, "-m", "benchmarks.faults", *sys.argv[1:]]
        os.execve(sys.executable, given, {**os.environ, "PYTHONHASHSEED": "0"})
    if chosen.seed is not None:
        one = trial(chosen.seed)
        print(json.dumps(asdict(one), indent=2))
        return int(bool(one.problems))
    results = run_all(
        chosen.first, chosen.seeds, chosen.jobs, lambda text: print(text, file=sys.stderr)
    )
    bugs = {name: find(name) for name in PLANTED} if chosen.planted else {}
    found = table(results)
    text = markdown(found, bugs)
    print(text)
    if chosen.out is not None:
        atomic.write_json(chosen.out / "faults.json", {**found, "planted": bugs})
        atomic.write_text(chosen.out / "faults.md", text)
    return int(bool(found["broken"]) or any(n is None for n, _ in bugs.values()))


if __name__ == "__main__":
    sys.exit(main())
