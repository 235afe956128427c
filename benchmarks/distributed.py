"""Time, bytes and memory of `gather` and `gram`, with the formulas of docs/math.md, section 7.

    python benchmarks/distributed.py [--ranks 1 2 4] [--widths 1024 4096] [--tokens 128 512]
                                     [--max-columns 768] [--out DIRECTORY]
    python benchmarks/distributed.py --plan     # the same formulas for 64 and 1024 GPUs

The workload is one linear layer (512 inputs, no bias) with a softmax loss and `--tokens` tokens per
rank; token gradients are float32, factors and products float64. The ranks use gloo on the loopback
device with one thread each. Every case runs in R fresh processes. With `--max-columns`, the widest
layer runs again with the most tokens and at most that many columns of the tokens of all ranks.

Seconds and memory are those of the slowest and of the largest rank. `sent` are the bytes that a
rank sends according to the counters (which know the algorithms, not the wire), and `formula` are
those of section 7; `kernel / sent` is the kernel's count for the loopback device divided by the sum
of `sent`, including headers and all other traffic of the device. The exit code is 1 if bytes and
formula, or the shares of `U` that a rank keeps in `gram` as R grows, differ by more than 10 %.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import sys
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, Literal

INPUTS = 512
MODES: tuple[Literal["gather", "gram"], ...] = ("gather", "gram")
STEPS = ("collect", "factor", "apply")
FLOAT, CORE = 4, 8  # bytes of a token gradient's entry, and of a factor's
MAX_COLUMNS, MAX_DENSE = 8192, 16384  # the defaults
TIMEOUT_S = 300
WITHIN = 0.1
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        mode: `gather` or `gram`.
        ranks: R.
        out: outputs of the layer.
        per_rank: tokens of each rank.
        most: columns kept of all ranks' tokens; None for the defaults.
        passes: factors, decompositions and one application each.
        inputs: of the layer.
    """

    mode: Literal["gather", "gram"]
    ranks: int
    out: int
    per_rank: int
    most: int | None = None
    passes: int = 1
    inputs: int = INPUTS

    @property
    def tokens(self) -> int:
        """T, of all ranks."""
        return self.ranks * self.per_rank

    @property
    def limits(self) -> dict[str, Any]:
        """Settings; columns are reduced only where the `out x out` matrix is too large."""
        if self.most is None:
            return {"max_columns": MAX_COLUMNS, "max_dense_dim": MAX_DENSE}
        return {"max_columns": self.most, "max_dense_dim": self.inputs}

    @property
    def matrix(self) -> bool:
        """Whether the summed `out x out` matrix is taken instead of columns."""
        most, dense = self.limits["max_columns"], self.limits["max_dense_dim"]
        wide = self.mode == "gram" and self.ranks > 1 and self.tokens > self.out
        return self.out <= dense and (wide or self.tokens > most)

    @property
    def columns(self) -> int:
        """Columns of `U` after any reduction, over all outputs."""
        return self.out if self.matrix else min(self.tokens, self.limits["max_columns"])


def expected_bytes(case: Case) -> dict[str, float]:
    """Bytes that a rank sends on average, by what they are for."""
    ranks, out, t, width = case.ranks, case.out, case.columns, case.inputs
    others, ring = ranks - 1, 2 * (ranks - 1) / ranks
    share = others / ranks
    # A decomposition comes from one rank: others copies over R ranks.
    found = {
        "A": ring * width**2 * CORE,
        "gradient": ring * out * width * CORE,
        "decompositions": share * (width**2 + t**2) * CORE,
    }
    if case.matrix:  # its columns, from its eigenvectors, are spread no more
        return {**found, "matrix": ring * out**2 * CORE, "eigenvectors": share * out**2 * CORE}
    whole = t == case.tokens
    if not whole:
        found["keys"] = share * case.tokens * CORE
    if case.mode == "gather":
        inputs = {"inputs": share * t * width * FLOAT} if whole else {}
        return {**found, **inputs, "columns": share * t * out * FLOAT}
    # The factors' own gradient goes by its tokens; any other by a product summed over the ranks.
    applied = share * t * width * CORE if whole else ring * t * width * CORE
    return {
        **found,
        "columns": share * t / ranks * out * FLOAT,
        "kernel": ring * t**2 * CORE,
        "applied": applied,
        "rows": share * out * width * CORE,
    }


def columns_bytes(case: Case) -> float:
    """Bytes of token columns that a rank keeps: `out x T`, or `(out / R) x T`."""
    if case.matrix:
        return case.out * case.columns * CORE
    return case.out * case.columns * FLOAT / (case.ranks if case.mode == "gram" else 1)


# ---- a case --------------------------------------------------------------------------------------


def loopback_bytes() -> int | None:
    """Bytes that the kernel has sent on the loopback device so far; None where it does not say."""
    try:
        lines = Path("/proc/net/dev").read_text().splitlines()
    except OSError:
        return None
    found = [line.split(":")[1].split() for line in lines if line.strip().startswith("lo:")]
    return int(found[0][8]) if found else None


def one_rank(case: Case, rank: int, port: int, answer: Connection) -> None:
    """Runs on a rank: measures, and sends what it found."""
    import torch

    from fisher_lab.distributed.process_group import session

    size = str(case.ranks)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size}
    os.environ |= {"LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with session("gloo", "cpu", timeout_s=TIMEOUT_S) as communicator:
        answer.send(measured(case, communicator))


def measured(case: Case, communicator: Any) -> dict[str, Any]:
    """Measures a case on this rank; collective.

    The first pass loads and connects what there is, the next one is measured for bytes and memory,
    the others for seconds; a single one is all of these.
    """
    import torch

    from fisher_lab.tasks.memory import PeakMemory

    torch.manual_seed(0)
    model = torch.nn.Linear(case.inputs, case.out, bias=False)
    torch.manual_seed(1 + communicator.rank)
    batch = (torch.randn(case.per_rank, case.inputs), torch.randint(case.out, (case.per_rank,)))
    if case.passes > 1:
        one_pass(case, communicator, model, batch)
    communicator.all_gather_objects(None)
    before = loopback_bytes()
    with PeakMemory(torch.device("cpu")) as memory:
        first, kfac, natural = one_pass(case, communicator, model, batch)
    traffic = {name: t.sent for name, t in communicator.traffic.items()}
    communicator.all_gather_objects(None)
    after = loopback_bytes()
    g = kfac.kfac_factors[""].G
    core = vars(g).get("core")  # where it was computed
    found = {
        "sent": sum(traffic.values()),
        "by_collective": traffic,
        "loopback": None if before is None or after is None else after - before,
        "peak_mib": memory.growth_mib,
        "kept": g.nbytes(),
        "K": 0 if core is None else core.numel() * core.element_size(),
        "norm": float(natural["weight"].double().norm()),
    }
    del kfac, g, core
    rest = [one_pass(case, communicator, model, batch)[0] for _ in range(case.passes - 2)]
    timed = rest or [first]
    return {**{key: median(one[key] for one in timed) for key in first}, **found}


def one_pass(
    case: Case, communicator: Any, model: Any, batch: Any
) -> tuple[dict[str, float], Any, dict[str, Any]]:
    """Factors, decompositions and one application: seconds, the engine and its answer."""
    from fisher_lab import KFACNaturalGradient
    from fisher_lab.curvature.losses import CrossEntropy

    kfac = KFACNaturalGradient(
        damping=1e-3, kfac_distributed_reduce=case.mode, track_diagonal=False,
        communicator=communicator, **case.limits,
    )  # fmt: skip
    communicator.all_gather_objects(None)  # all begin together
    communicator.reset()
    marks = [perf_counter()]
    kfac.collect_kfac_factors(model, batch, loss=CrossEntropy(), keep_gradient=True)
    marks.append(perf_counter())
    kfac.prepare_inverses()
    marks.append(perf_counter())
    natural = kfac.compute_natural_gradient(None, model)
    marks.append(perf_counter())
    seconds = {f"{step}_s": marks[i + 1] - marks[i] for i, step in enumerate(STEPS)}
    moving = sum(t.seconds for t in communicator.traffic.values())
    return {**seconds, "moving_s": moving}, kfac, natural


def run(case: Case, context: Any) -> dict[str, Any]:
    """Runs a case in fresh processes: the largest number of a rank, bytes sent their mean.

    Raises:
        SystemExit: a rank failed or did not answer in time.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ends, processes = [], []
    for rank in range(case.ranks):
        mine, theirs = context.Pipe(duplex=False)
        process = context.Process(target=one_rank, args=(case, rank, port, theirs), daemon=True)
        process.start()
        theirs.close()
        ends.append(mine)
        processes.append(process)
    try:
        every = [_answer(case, end) for end in ends]
        for process in processes:
            process.join(TIMEOUT_S)
    finally:
        for process in processes:
            process.kill()
    if len({f"{one['norm']:.9g}" for one in every}) > 1:
        raise SystemExit(f"{case}: the ranks' natural gradients differ")
    sent = sum(one["sent"] for one in every)
    most = {key: max(one[key] for one in every) for key in every[0] if key.endswith(("_s", "_mib"))}
    seen = every[0]["loopback"]
    return {
        **asdict(case), "tokens": case.tokens, "columns": case.columns, "matrix": case.matrix,
        **most, "sent": sent / case.ranks, "sent_formula": sum(expected_bytes(case).values()),
        "parts": expected_bytes(case), "by_collective": [one["by_collective"] for one in every],
        "seen_by_kernel": seen / sent if sent and seen is not None else None,
        "kept": max(one["kept"] for one in every), "kept_formula": columns_bytes(case),
        "K": max(one["K"] for one in every), "K_formula": case.columns**2 * CORE,
        "norm": every[0]["norm"],
    }  # fmt: skip


def _answer(case: Case, end: Connection) -> dict[str, Any]:
    if not wait([end], TIMEOUT_S):
        raise SystemExit(f"{case}: no answer within {TIMEOUT_S} s")
    try:
        return end.recv()
    except EOFError:
        raise SystemExit(f"{case}: a rank has failed") from None


# ---- what comes of it ----------------------------------------------------------------------------


def failures(rows: list[dict[str, Any]]) -> list[str]:
    """What does not hold: bytes beside their formula, and the flat share of `U` in `gram`."""
    found = []
    for r in rows:
        of = f"{r['mode']}, R={r['ranks']}, out={r['out']}, T={r['tokens']}"
        for key in ("sent", "kept"):
            measured, formula = r[key], r[f"{key}_formula"]
            if formula and abs(measured / formula - 1) > WITHIN:
                found.append(f"{of}: {key} {measured:.4g} bytes, by the formula {formula:.4g}")
    for (out, per_rank), kept in shares(rows).items():
        if max(kept.values()) > (1 + WITHIN) * min(kept.values()):
            found.append(f"gram, out={out}, {per_rank} tokens a rank: share of U by R: {kept}")
    return found


def shares(rows: list[dict[str, Any]]) -> dict[tuple[int, int], dict[int, int]]:
    """By width and tokens a rank: R -> bytes of `U` on a rank in `gram`, while it is columns."""
    found: dict[tuple[int, int], dict[int, int]] = {}
    for r in rows:
        if r["mode"] == "gram" and not r["matrix"] and r["columns"] == r["tokens"]:
            found.setdefault((r["out"], r["per_rank"]), {})[r["ranks"]] = r["kept"]
    return found


HEADS = (
    "mode", "R", "out", "T", "form", "collect s", "factor s", "apply s", "moving s", "sent MB",
    "formula", "kernel / sent", "U MB", "formula", "K MB", "formula", "peak MiB",
)  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """The Markdown table of all cases."""
    lines = ["| " + " | ".join(HEADS) + " |", "|---|---:|---:|---:|---|" + "---:|" * 12]
    for r in rows:
        form = f"{r['columns']} columns" if r["columns"] < r["tokens"] else "columns"
        cells = [r["mode"], str(r["ranks"]), str(r["out"]), str(r["tokens"])]
        cells.append("out x out" if r["matrix"] else form)
        cells += [f"{r[key]:.2f}" for key in ("collect_s", "factor_s", "apply_s", "moving_s")]
        cells += [f"{r[key] / 1e6:.1f}" for key in ("sent", "sent_formula")]
        seen = r["seen_by_kernel"]
        cells.append("" if seen is None else f"{seen:.3f}")
        kept = ("kept", "kept_formula", "K", "K_formula")
        cells += [f"{r[key] / 1e6:.1f}" for key in kept]
        lines.append("| " + " | ".join([*cells, f"{r['peak_mib']:.0f}"]) + " |")
    return "\n".join(lines)


def growth(rows: list[dict[str, Any]]) -> str:
    """The Markdown table of what a rank keeps in `gram` as R grows, tokens a rank fixed."""
    lines = [
        "| out | tokens a rank | R | T | U MB | K MB | K, in those of the first R |",
        "|" + "---:|" * 7,
    ]
    first: dict[tuple[int, int], int] = {}
    for r in rows:
        if r["mode"] != "gram" or r["most"] is not None:
            continue
        base = first.setdefault((r["out"], r["per_rank"]), r["K"])
        cells = [r["out"], r["per_rank"], r["ranks"], r["tokens"]]
        cells += [f"{r['kept'] / 1e6:.1f}", f"{r['K'] / 1e6:.1f}", f"{r['K'] / base:.1f}"]
        note = " (`out x out`)" if r["matrix"] else ""
        lines.append("| " + " | ".join(map(str, cells)) + note + " |")
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """Describes the machine, without its name."""
    import torch

    from fisher_lab.runs import provenance

    return {**provenance.machine(), "torch": torch.__version__, "threads a rank": 1}


def write(directory: Path, rows: list[dict[str, Any]], failed: list[str], seconds: float) -> None:
    """Writes `distributed.json` and `distributed.md`."""
    about = machine()
    directory.mkdir(parents=True, exist_ok=True)
    everything = {"machine": about, "seconds": round(seconds, 1), "failed": failed, "rows": rows}
    (directory / "distributed.json").write_text(json.dumps(everything, indent=1) + "\n")
    described = ", ".join(f"{key} {value}" for key, value in about.items())
    outcome = "\n".join(f"- {text}" for text in failed) or (
        f"Bytes sent and kept are within {WITHIN:.0%} of their formulas, and the share of `U` in "
        f"`gram` is flat within {WITHIN:.0%} as R grows."
    )
    text = (
        f"# `gather` against `gram`\n\nMachine: {described}. {seconds:.0f} s in all.\n\n"
        f"One layer of {INPUTS} inputs, gloo. Seconds (medians) and MiB of the slowest and largest "
        "rank; MB sent by a rank as counted; `kernel / sent`: what the kernel saw on the loopback "
        "device.\n\n"
        f"{table(rows)}\n\n## What a rank keeps in `gram`\n\n{growth(rows)}\n\n"
        f"## Checks\n\n{outcome}\n"
    )
    (directory / "distributed.md").write_text(text)


# ---- the plan ------------------------------------------------------------------------------------

PLAN_LAYERS = {"head": (131072, 4096), "MLP": (14336, 4096), "attention": (4096, 4096)}
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


def cases(given: argparse.Namespace) -> list[Case]:
    """All cases, both modes of a size one after the other."""
    sizes = [(out, tokens, None) for out in given.widths for tokens in given.tokens]
    if given.max_columns:
        sizes.append((max(given.widths), max(given.tokens), given.max_columns))
    return [
        Case(mode, ranks, out, tokens, most, given.passes)
        for out, tokens, most in sizes
        for ranks in given.ranks
        if most is None or ranks * tokens > most
        for mode in MODES
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--widths", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512], help="of each rank")
    parser.add_argument("--max-columns", type=int, default=768, help="0 leaves that case out")
    parser.add_argument("--passes", type=int, default=5, help="seconds: medians after two")
    parser.add_argument("--out", type=Path, help="folder for distributed.json and distributed.md")
    parser.add_argument("--plan", action="store_true", help="only print the formulas' table")
    given = parser.parse_args()
    if given.plan:
        show_plan()
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path.insert(0, str(ROOT))
    # Every rank is a fresh process, forked from one that has only imported what they need.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch", "torch.distributed", "fisher_lab.curvature.kfac.engine"]
    )
    start, rows = perf_counter(), []
    for case in cases(given):
        rows.append(run(case, context))
        print(f"{perf_counter() - start:.0f} s: {case}", file=sys.stderr, flush=True)
    failed = failures(rows)
    print(f"{table(rows)}\n\n{growth(rows)}")
    if given.out:
        write(given.out, rows, failed, perf_counter() - start)
    for text in failed:
        print(f"more than {WITHIN:.0%} apart: {text}", file=sys.stderr)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
