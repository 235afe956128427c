"""Time and memory of the Woodbury side of a head as functions of outputs and of tokens.

    python benchmarks/kfac/cost.py [--out DIRECTORY]

Builds, decomposes and applies the G factor of a head of width 256 in float32, and fits exponents
on the upper half of each range. docs/math.md, section 4, says: forming K costs out T^2, decomposing
it T^3, applying it out T in, keeping it out T + T^2.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl
import numpy as np
import torch

from fisher_lab.curvature.kfac.factors import Columns, WoodburyFactor
from fisher_lab.curvature.kfac.numerics import Numerics

WIDTH = 256
OUTS = (4096, 8192, 16384, 32768, 65536, 131072)
TOKENS = (256, 512, 1024, 2048, 4096)
FIXED_OUT, FIXED_TOKENS = 16384, 512
STEPS = ("kernel", "decomposition", "application")


def timed(work: Callable[..., Any], *arguments: Any) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


def measure(out: int, tokens: int, repeats: int = 3) -> dict[str, Any]:
    """Median seconds of the three steps, and the bytes that are kept."""
    numerics = Numerics(core_dtype=torch.float32, apply_dtype=torch.float32, eps=1e-6)
    g = torch.randn(tokens, out, generator=torch.Generator().manual_seed(0))
    y = torch.randn(out, WIDTH, generator=torch.Generator().manual_seed(1))
    seconds: dict[str, list[float]] = {step: [] for step in STEPS}
    kept = 0
    for _ in range(repeats + 1):
        factor = WoodburyFactor(Columns(g, 1.0, g.device), 1 / tokens, torch.float32)
        damped = factor.damped(1e-3, None, numerics)
        seconds["kernel"].append(timed(getattr, factor, "kernel"))
        seconds["decomposition"].append(timed(damped.prepare))
        seconds["application"].append(timed(damped.power, y, -1))
        kept = factor.nbytes() + 2 * tokens**2 * 4
    # The first round pays for memory that the later ones find mapped.
    return {
        "out": out, "tokens": tokens, "bytes": kept,
        **{step: median(values[1:]) for step, values in seconds.items()},
    }  # fmt: skip


def exponent(rows: list[dict[str, Any]], axis: str, quantity: str) -> float:
    """Slope of the logarithms over the upper half of the range."""
    upper = rows[len(rows) // 2 :]
    x = np.log([row[axis] for row in upper])
    return float(np.polyfit(x, np.log([row[quantity] for row in upper]), 1)[0])


EXPECTED = {
    "out": {"kernel": 1, "decomposition": 0, "application": 1, "bytes": 1},
    "tokens": {"kernel": 2, "decomposition": 3, "application": 1, "bytes": 1},
}


def plot(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Seconds of the three steps against both axes."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullLocator

    figure, axes = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
    for axis, (name, rows) in zip(axes, found.items(), strict=True):
        for step, colour in zip(STEPS, ("#0072b2", "#d55e00", "#009e73"), strict=True):
            slope = exponent(rows, name, step)
            axis.loglog(
                [row[name] for row in rows], [row[step] for row in rows], "o-", color=colour,
                label=f"{step}: exponent {slope:.2f}",
            )  # fmt: skip
        fixed = f"T = {FIXED_TOKENS}" if name == "out" else f"out = {FIXED_OUT}"
        axis.set(xlabel="outputs" if name == "out" else "tokens T", ylabel="seconds", title=fixed)
        values = [row[name] for row in rows]
        axis.set_xticks(values, [str(v) for v in values], fontsize=8)
        axis.xaxis.set_minor_locator(NullLocator())
        axis.legend(fontsize=8, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="folder for cost.json and cost.png")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = {
        "out": [measure(out, FIXED_TOKENS) for out in OUTS],
        "tokens": [measure(FIXED_OUT, tokens) for tokens in TOKENS],
    }
    for name, rows in found.items():
        for row in rows:
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
        for quantity, expected in EXPECTED[name].items():
            slope = exponent(rows, name, quantity)
            print(f"{quantity} against {name}: {slope:.2f} (expected {expected})")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "cost.json").write_text(json.dumps(found, indent=1))
        plot(found, options.out / "cost.png")


if __name__ == "__main__":
    main()
