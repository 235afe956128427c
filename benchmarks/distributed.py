"""Time, bytes and memory of `gather` against `gram`, beside the formulas of docs/math.md, 7.

    python benchmarks/distributed.py [--ranks 1 2 4] [--out 4096 16384] [--tokens 256] [--json F]
    python benchmarks/distributed.py --plan     # the same formulas for 64 and 1024 GPUs

One linear layer (512 inputs, no bias) under a softmax loss, `--tokens` a rank, token gradients in
float32, factors and products in float64; gloo on the loopback device. Every case runs in R fresh
processes. `bytes` are those that a rank sends; `formula` is what section 7 gives for them.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

INPUTS = 512
FLOAT, CORE = 4, 8  # bytes of a token gradient's entry, and of a factor's
TIMEOUT_S = 900


def expected_bytes(mode: str, ranks: int, out: int, tokens: int) -> dict[str, float]:
    """Bytes that a rank sends on average, by what they are for.

    Args:
        mode: `gather` or `gram`.
        ranks: R.
        out: outputs of the layer.
        tokens: T, of all ranks.
    """
    others, ring = ranks - 1, 2 * (ranks - 1) / ranks
    own = tokens / ranks
    # Each of the two decompositions comes from one rank: others copies over R ranks.
    found = {
        "A": ring * INPUTS**2 * CORE,
        "gradient": ring * out * INPUTS * CORE,
        "decompositions": others / ranks * (INPUTS**2 + min(tokens, out) ** 2) * CORE,
    }
    if mode == "gather":
        inputs = others * own * INPUTS * FLOAT
        return {**found, "columns": others * own * out * FLOAT, "inputs": inputs}
    if tokens > out:  # the all-reduced out x out matrix takes over; its columns are spread no more
        return {**found, "matrix": ring * out**2 * CORE}
    return {
        **found,
        "columns": others / ranks * own * out * FLOAT,
        "kernel": ring * tokens**2 * CORE,
        "inputs": others * own * INPUTS * CORE,
        "rows": others * out / ranks * INPUTS * CORE,
    }


def columns_bytes(mode: str, ranks: int, out: int, tokens: int) -> float:
    """Bytes of token columns that a rank keeps: `out x T`, or `(out / R) x T`."""
    if mode == "gram" and tokens > out:
        return out * out * CORE
    return out * tokens * FLOAT / (ranks if mode == "gram" else 1)


def one_rank(mode: str, out: int, per_rank: int) -> dict[str, Any]:
    import torch

    from fisher_lab import KFACNaturalGradient
    from fisher_lab.curvature.losses import CrossEntropy
    from fisher_lab.distributed.communicator import world
    from fisher_lab.distributed.session import session
    from fisher_lab.tasks.memory import PeakMemory

    torch.set_num_threads(1)
    with session("gloo", "cpu", timeout_s=TIMEOUT_S) as communicator:
        torch.manual_seed(0)
        model = torch.nn.Linear(INPUTS, out, bias=False)
        torch.manual_seed(1 + communicator.rank)
        batch = (torch.randn(per_rank, INPUTS), torch.randint(0, out, (per_rank,)))
        kfac = KFACNaturalGradient(1e-3, kfac_distributed_reduce=mode, track_diagonal=False)
        marks = [perf_counter()]
        ranks = world()
        communicator.reset()
        with PeakMemory(torch.device("cpu")) as memory:
            kfac.collect_kfac_factors(model, batch, loss=CrossEntropy(), keep_gradient=True)
            marks.append(perf_counter())
            kfac.engine.prepare_inverses()
            marks.append(perf_counter())
            natural = kfac.compute_natural_gradient(None, model)
            marks.append(perf_counter())
        traffic = {} if ranks is None else dict(ranks.traffic)
        own = {
            "collect_s": marks[1] - marks[0],
            "factor_s": marks[2] - marks[1],
            "apply_s": marks[3] - marks[2],
            "comm_s": sum(t.seconds for t in traffic.values()),
            "sent": sum(t.sent for t in traffic.values()),
            "peak_mb": memory.growth_mib,
            "columns": kfac.kfac_factors[""].G.nbytes(),
            "norm": float(natural["weight"].double().norm()),
        }
        every = communicator.share(own)
    return {
        **{key: max(one[key] for one in every) for key in own},
        "sent": sum(one["sent"] for one in every) / len(every),
    }


def case(mode: str, ranks: int, out: int, per_rank: int) -> dict[str, Any]:
    """Runs one case in fresh processes; the numbers are the largest of a rank, bytes the mean."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = str(Path(__file__).resolve().parents[1])
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    shared["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, __file__, "--rank", mode, "--out", str(out)]
    command += ["--tokens", str(per_rank)]
    processes = [
        subprocess.Popen(
            command, env={**shared, "RANK": str(r), "LOCAL_RANK": str(r)},
            stdout=subprocess.PIPE, text=True,
        )
        for r in range(ranks)
    ]  # fmt: skip
    try:
        answers = [process.communicate(timeout=TIMEOUT_S)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    found = json.loads(answers[0])
    tokens = ranks * per_rank
    formula = sum(expected_bytes(mode, ranks, out, tokens).values())
    kept = columns_bytes(mode, ranks, out, tokens)
    return {
        "mode": mode, "ranks": ranks, "out": out, "tokens": tokens, **found,
        "formula": formula, "columns_formula": kept,
    }  # fmt: skip


def show(rows: list[dict[str, Any]]) -> None:
    heads = [
        "mode",
        "R",
        "out",
        "T",
        "collect_s",
        "factor_s",
        "apply_s",
        "moving_s",
        "sent_MB",
        "formula_MB",
    ]
    heads += ["columns_MB", "formula_MB", "peak_MiB"]
    print("| " + " | ".join(heads) + " |")
    print("|---|" + "---:|" * 12)
    for r in rows:
        seconds = [f"{r[key]:.2f}" for key in ("collect_s", "factor_s", "apply_s", "comm_s")]
        kept = [f"{r[key] / 1e6:.1f}" for key in ("sent", "formula", "columns", "columns_formula")]
        head = [r["mode"], str(r["ranks"]), str(r["out"]), str(r["tokens"])]
        print("| " + " | ".join([*head, *seconds, *kept, f"{r['peak_mb']:.0f}"]) + " |")


PLAN_LAYERS = {"head": (131072, 4096), "MLP": (14336, 4096), "attention": (4096, 4096)}
MAX_COLUMNS, MAX_DENSE = 8192, 16384  # the defaults
HALF = 2  # bytes of a token gradient in bfloat16


def planned(mode: str, ranks: int, out: int, inputs: int, tokens: int) -> dict[str, Any]:
    """Costs of the G side of one layer on one rank, from the formulas alone.

    Returns:
        `form`; `columns` kept; `sent` a refresh, `kept` (bytes); `kernel` (multiplications of the
        Gram or moment product); `apply` (bytes sent for one gradient that is not the factors' own).
    """
    share, ring = (ranks - 1) / ranks, 2 * (ranks - 1) / ranks
    if out <= MAX_DENSE and (tokens > MAX_COLUMNS or (mode == "gram" and tokens > out)):
        size = out * out * CORE
        return {
            "form": "out x out", "columns": out, "sent": ring * size, "kept": 2 * size,
            "kernel": out * out * tokens / ranks, "apply": 0.0,
        }  # fmt: skip
    t = min(tokens, MAX_COLUMNS)
    form = "columns" if t == tokens else f"{t} of {tokens} columns"
    core = 2 * t * t * CORE
    if mode == "gather":
        return {
            "form": form, "columns": t, "sent": share * t * out * HALF,
            "kept": out * t * HALF + core, "kernel": out * t * t, "apply": 0.0,
        }  # fmt: skip
    return {
        "form": form, "columns": t,
        "sent": share / ranks * t * out * HALF + ring * t * t * CORE,
        "kept": out * t * HALF / ranks + core,
        "kernel": out * t * t / ranks,
        "apply": ring * t * inputs * CORE + share * out * inputs * CORE,
    }  # fmt: skip


def show_plan() -> None:
    print("| tokens a rank | R | layer | mode | form | sent GB | kept GB | product, Tflop |"
          " apply, GB sent |")  # fmt: skip
    print("|---:|---:|---|---|---|---:|---:|---:|---:|")
    for per_rank in (8192, 64, 8):
        for ranks in (64, 1024):
            for layer, (out, inputs) in PLAN_LAYERS.items():
                for mode in ("gather", "gram"):
                    r = planned(mode, ranks, out, inputs, per_rank * ranks)
                    cells = [str(per_rank), str(ranks), layer, mode, r["form"]]
                    cells += [f"{r['sent'] / 1e9:.2f}", f"{r['kept'] / 1e9:.2f}"]
                    cells += [f"{2 * r['kernel'] / 1e12:.2f}", f"{r['apply'] / 1e9:.2f}"]
                    print("| " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--out", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--tokens", type=int, nargs="+", default=[256])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rank", choices=("gather", "gram"), help=argparse.SUPPRESS)
    parser.add_argument("--plan", action="store_true", help="only print the formulas' table")
    given = parser.parse_args()
    if given.plan:
        show_plan()
        return
    if given.rank:
        print(json.dumps(one_rank(given.rank, given.out[0], given.tokens[0])))
        return
    rows = [
        case(mode, ranks, out, tokens)
        for out in given.out
        for tokens in given.tokens
        for ranks in given.ranks
        for mode in ("gather", "gram")
    ]
    show(rows)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
