"""Claims about times of a cell against itself: how often they are called different.

    python -m benchmarks.timing_controls [--claims 200] [--seeds 5] [--out benchmarks/results]

A claim has a pair of processes for each seed, in the order A B, B A, A B, ... as a sweep with
``alone: true`` runs them, and each process times the same decompositions once. A pair is measured
again (twice at most) where other processes took more of the machine from one of them. The pairs are
judged as the control of a claim of the type ``faster`` is. With ``--plain`` the order is always A B
and no pair is repeated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from fisher_lab.results import stats
from fisher_lab.results.controls import is_different
from fisher_lab.runs import provenance
from fisher_lab.sweeps.pairs import APART, MOST

TIMED = """
import json, sys, time
import numpy as np
from fisher_lab.runs.load import Load
load = Load()
x = np.random.default_rng(int(sys.argv[2])).standard_normal((int(sys.argv[1]),) * 2)
start = time.perf_counter()
for _ in range(5):
    np.linalg.eigh(x @ x.T)
print(json.dumps([time.perf_counter() - start, load.about()["others"]]))
"""
"""What a process does: five decompositions, and the load beside them."""


def measure(work: int, seed: int) -> tuple[float, float]:
    """Seconds of one process, and processors that others took meanwhile."""
    command = [sys.executable, "-c", TIMED, str(work), str(seed)]
    done = subprocess.run(command, text=True, capture_output=True, timeout=300, check=True)
    seconds, others = json.loads(done.stdout)
    return seconds, others


def pair(work: int, seed: int, plain: bool) -> tuple[float, float, int]:
    """Seconds of A and of B, and how often the pair was measured again."""
    turned = seed % 2 == 1 and not plain
    again = 0
    while True:
        (first, load), (second, other) = measure(work, seed), measure(work, seed)
        if plain or abs(load - other) <= APART or again == MOST:
            break
        turned, again = not turned, again + 1
    return (second, first, again) if turned else (first, second, again)


def claims(count: int, seeds: int, work: int, plain: bool) -> Iterator[tuple[stats.Paired, int]]:
    """The comparison of every claim, and how many of its pairs were measured again."""
    for _ in range(count):
        pairs = [pair(work, seed, plain) for seed in range(seeds)]
        a, b, again = zip(*pairs, strict=True)
        yield stats.paired_ratio(a, b), sum(again)


def main() -> None:
    """Print the rate, and write it where that is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--claims", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--work", type=int, default=300, help="side of the matrix")
    parser.add_argument("--alpha", type=float, default=0.05)
    parser.add_argument("--plain", action="store_true", help="always A B, and no pair again")
    parser.add_argument("--out", type=Path, help="directory for timing_controls.md")
    args = parser.parse_args()
    different = again = 0
    sizes = []
    began = time.monotonic()
    for number, (found, repeated) in enumerate(
        claims(args.claims, args.seeds, args.work, args.plain), 1
    ):
        different += is_different(found, args.alpha)
        again += repeated
        sizes.append(abs(found.mean - 1))
        print(f"{number}: {found.mean:.3f}, {different} called different", flush=True)
    high = stats.proportion_interval(different, args.claims, 0.05)[1]
    machine = ", ".join(f"{key} {value}" for key, value in provenance.machine().items())
    lines = [
        "# Claims about times of a cell against itself",
        "",
        f"{args.claims} claims of {args.seeds} pairs of processes each, "
        f"{'always A B' if args.plain else 'A B, B A'}; {machine}.",
        "",
        "| called different | share | upper end (95 %) | median of abs(ratio - 1) | pairs again |",
        "|---|---|---|---|---|",
        f"| {different} of {args.claims} | {different / args.claims:.1%} | {high:.1%} | "
        f"{sorted(sizes)[len(sizes) // 2]:.2%} | {again} of {args.claims * args.seeds} |",
        "",
        f"It took {(time.monotonic() - began) / 60:.0f} minutes.",
    ]
    print("\n".join(lines))
    if args.out:
        (args.out / "timing_controls.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
