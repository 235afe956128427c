"""K-FAC compared with other libraries: seconds, memory and error, in one run.

    python benchmarks/kfac/peers.py [--workload llama] [--repeats 5] [--out DIRECTORY]

In each round, every library runs once in its own process, with the same number of threads. Figures
are compared within a round, and the table shows medians. ``beyond`` is the time for factors (with
their forward and backward pass), inversion and one application, minus that of the forward and
backward pass alone. ``error`` is the relative error of the natural gradient of the batch's own
gradient in the worst layer, at damping 1e-3 and 1e-5, against dense float64 with the library's own
meaning of damping. If a side is too wide for a dense matrix, the system is solved by conjugate
gradients in float64 down to rounding, for some columns of the gradient.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from libraries import LIBRARIES, dampings, mean_gradient
from safetensors.torch import load_file, save_file
from workloads import WORKLOADS, Workload, describe

from fisher_lab.runs import provenance

STEPS = ("factors", "invert", "apply")
DAMPING = 1e-3
ERROR_DAMPINGS = (1e-3, 1e-5)
DENSE_LIMIT = 5000
"""Widest side that is solved by a dense float64 matrix, past it by conjugate gradients."""
COLUMNS_SOLVED = 256
"""Columns of a gradient on which a wider side is compared."""
RESIDUAL = 1e-13
ENTRIES_LIMIT = 10**8
"""Logits of a batch, outputs times tokens, past which no comparison is made."""


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def floor(workload: Workload) -> float:
    """Seconds of a forward and backward pass for all the weights."""
    workload.model.zero_grad()
    start = time.perf_counter()
    workload.loss().backward()
    seconds = time.perf_counter() - start
    workload.model.zero_grad()
    return seconds


def child(name: str, workload_name: str, save: str | None, damping: float) -> dict[str, Any]:
    """One library on one workload, in this process: medians of the passes after the first.

    Each pass has its own plain forward and backward before it, so that a machine that is slower
    for a while is so for both.
    """
    workload = WORKLOADS[workload_name]()
    loaded = peak_mib()
    floor(workload)
    before = peak_mib()
    library = LIBRARIES[name](workload, damping)
    passes: list[dict[str, float]] = []
    peak = 0.0
    result: dict[str, torch.Tensor] = {}
    # A first pass pays for what is set up once; a workload of minutes does not notice it.
    for _ in range(4):
        seconds = {"floor": floor(workload)}
        for step in STEPS:
            start = time.perf_counter()
            found = getattr(library, step)()
            seconds[step] = time.perf_counter() - start
            result = found or result
            del found
        seconds["total"] = sum(seconds[step] for step in STEPS)
        seconds["beyond"] = seconds["total"] - seconds["floor"]
        passes.append(seconds)
        # Later passes add what the allocator does not give back between blocks of other sizes.
        peak = peak or peak_mib()
        if seconds["total"] > 30:
            break
    if save:
        save_file({n: t.contiguous() for n, t in result.items()}, save)
    counted = passes[1:] or passes
    return {
        **{key: median(p[key] for p in counted) for key in counted[0]},
        "peak_mib": peak,
        "peak_later_mib": peak_mib(),
        "loaded_mib": loaded,
        "floor_mib": before,
        "convention": library.convention,
        **describe(workload),
    }


def dense(workload_name: str, conventions: list[str], directory: Path, damping: float) -> None:
    """The natural gradient in float64, from docs/math.md, sections 1 and 2."""
    workload = WORKLOADS[workload_name]()
    workload.model.double()
    if workload.inputs.is_floating_point():
        workload.inputs = workload.inputs.double()
    modules = dict(workload.model.named_modules())
    inputs: dict[str, torch.Tensor] = {}
    grads: dict[str, torch.Tensor] = {}
    for name in workload.layers:
        modules[name].register_forward_hook(_keep(name, inputs, grads))
    gradient = mean_gradient(workload)
    tokens = workload.labels.numel()
    answers: dict[str, dict[str, torch.Tensor]] = {c: {} for c in conventions}
    for name, weight in gradient.items():
        # The hook saw the gradient of the mean; the factors want that of the sum.
        x, tokens_g = inputs[name].reshape(tokens, -1), grads[name].reshape(tokens, -1) * tokens
        transposed = type(modules[name]).__name__ == "Conv1D"
        dw = weight.T if transposed else weight
        for convention in conventions:
            given = dw
            if convention.startswith("augmented") and modules[name].bias is not None:
                bias = grads[name].reshape(tokens, -1).sum(0)
                bias = bias if convention == "augmented, own" else torch.zeros_like(bias)
                given = torch.cat([dw, bias[:, None]], 1)
                a = torch.cat([x, x.new_ones(tokens, 1)], 1)
                y = _solve(convention, a, tokens_g, given, damping)[:, : dw.shape[1]]
            else:
                y = _solve(convention, x, tokens_g, dw, damping)
            answers[convention][name] = (y.T if transposed else y).contiguous()
    for convention, result in answers.items():
        save_file(result, directory / f"dense-{convention}-{damping:g}.safetensors")


def _keep(name: str, inputs: dict[str, torch.Tensor], grads: dict[str, torch.Tensor]) -> Any:
    def hook(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> None:
        inputs[name] = args[0].detach()
        output.register_hook(lambda grad: grads.__setitem__(name, grad.detach()))

    return hook


def _solve(convention: str, tokens_a: Any, tokens_g: Any, dw: Any, damping: float) -> torch.Tensor:
    """``(G + lam I)^-1 dW (A + lam I)^-1``, with the damping as the library has it."""
    tokens, out = tokens_g.shape
    a = tokens_a.T @ tokens_a / tokens
    wide = out > DENSE_LIMIT
    if convention == "product":
        if wide:
            raise SystemExit("no reference for a damped product with so many outputs")
        (sa, qa), (sg, qg) = (torch.linalg.eigh(x) for x in (a, tokens_g.T @ tokens_g / tokens))
        inner = (qg.T @ dw @ qa) / (torch.outer(sg, sa) + damping**2)
        return qg @ inner @ qa.T
    mean_g = float(tokens_g.square().sum()) / tokens / out
    lam_a, lam_g = dampings(convention, float(a.diagonal().mean()), mean_g, damping)
    a.diagonal().add_(lam_a)
    right = torch.linalg.solve(a, dw.T).T
    if wide:
        return _conjugate_gradients(tokens_g, right[:, :COLUMNS_SOLVED].contiguous(), lam_g)
    g = tokens_g.T @ tokens_g / tokens
    g.diagonal().add_(lam_g)
    return torch.linalg.solve(g, right).contiguous()


def _conjugate_gradients(tokens_g: Any, b: Any, damping: float) -> torch.Tensor:
    """``(G + lam I)^-1 b`` in float64 from products with the token gradients alone.

    Hestenes and Stiefel 1952, each column for itself; the residual at the end is computed anew.

    Raises:
        SystemExit: it does not come down to ``RESIDUAL``.
    """

    def times(v: torch.Tensor) -> torch.Tensor:
        return (tokens_g.T @ (tokens_g @ v)).div_(len(tokens_g)).add_(v, alpha=damping)

    x, r = torch.zeros_like(b), b.clone()
    p, rr = r.clone(), r.square().sum(0)
    first = rr.clone()
    for _ in range(1000):
        if bool((rr <= RESIDUAL**2 * first).all()):
            break
        ap = times(p)
        # A column that has come down stays as it is.
        alpha = torch.where(rr > RESIDUAL**2 * first, rr / (p * ap).sum(0), 0.0)
        x, r = x.add_(p * alpha), r.sub_(ap * alpha)
        rr, before = r.square().sum(0), rr
        p = p.mul_(rr / before.clamp_min(1e-300)).add_(r)
    left = float((times(x) - b).norm() / b.norm())
    if left > 100 * RESIDUAL:
        raise SystemExit(f"conjugate gradients stopped at a relative residual of {left:.1e}")
    return x


def errors(workload_name: str, names: list[str], timeout: float) -> dict[str, dict[str, float]]:
    """Worst relative error over the layers, by library and damping."""
    result: dict[str, dict[str, float]] = {name: {} for name in names}
    workload = WORKLOADS[workload_name]()
    modules = dict(workload.model.named_modules())
    widest = max(max(modules[name].weight.shape) for name in workload.layers)  # type: ignore[union-attr]
    too_many = widest * workload.labels.numel() > ENTRIES_LIMIT
    del workload, modules
    if too_many:
        return result
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        for damping in ERROR_DAMPINGS:
            conventions = {}
            for index, name in enumerate(names):
                path = directory / f"{index}.safetensors"
                found = run(name, workload_name, timeout, save=str(path), damping=damping)
                if "failed" not in found:
                    conventions[name] = found["convention"]
            dense(workload_name, sorted(set(conventions.values())), directory, damping)
            for index, name in enumerate(names):
                if name not in conventions:
                    continue
                truth = load_file(directory / f"dense-{conventions[name]}-{damping:g}.safetensors")
                given = load_file(directory / f"{index}.safetensors")
                result[name][f"error_{damping:g}"] = max(
                    float((given[n][:, : t.shape[1]].double() - t).norm() / t.norm())
                    for n, t in truth.items()
                )
    return result


def run(
    name: str, workload: str, timeout: float, *, save: str | None = None, damping: float = DAMPING
) -> dict[str, Any]:
    """Runs one library in a process of its own; a failure comes back as its reason."""
    command = [sys.executable, __file__, "--child", name, "--workload", workload]
    command += ["--damping", repr(damping), *(["--save", save] if save else [])]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, env=os.environ, check=False
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {timeout:.0f} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"failed": lines[-1][:160]}
    return json.loads(done.stdout.splitlines()[-1])


def machine() -> dict[str, Any]:
    """Describes the machine, without its name."""
    about = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    return {**provenance.machine(), **about}


COLUMNS = (
    "factors", "invert", "apply", "floor", "beyond", "total",
    "peak_mib", "peak_later_mib", "floor_mib",
)  # fmt: skip


def table(results: dict[str, list[dict[str, Any]]], found: dict[str, dict[str, float]]) -> str:
    """A Markdown table of medians; ratios are medians of the rounds' own ratios."""
    errors = [f"error_{damping:g}" for damping in ERROR_DAMPINGS]
    head = [
        *COLUMNS, *errors, "beyond / fastest peer's", "total / fastest peer's", "total / floor"
    ]  # fmt: skip
    lines = ["| library | " + " | ".join(head) + " |", "|" + "---|" * (len(head) + 1)]
    for name, rounds in results.items():
        good = [r for r in rounds if "failed" not in r]
        if not good:
            lines.append(f"| {name} | {rounds[0]['failed'].replace('|', '/')} |")
            continue
        cells = [middle([r[c] for r in good if c in r], c) for c in COLUMNS]
        cells += [f"{found[name][e]:.1e}" if e in found[name] else "" for e in errors]
        cells += [against_peers(results, rounds, quantity) for quantity in ("beyond", "total")]
        cells.append(f"{median(r['total'] / r['floor'] for r in good):.2f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def middle(values: list[float], column: str) -> str:
    """A cell: the median, MiB in whole numbers; empty without a value."""
    return f"{median(values):.{0 if column.endswith('mib') else 3}f}" if values else ""


def against_peers(
    results: dict[str, list[dict[str, Any]]], rounds: list[dict[str, Any]], quantity: str
) -> str:
    """The median over the rounds of a quantity in units of the fastest peer's of that round."""
    peers = [n for n in results if not n.startswith("fisher_lab")]
    ratios = []
    for index, r in enumerate(rounds):
        others = [results[p][index] for p in peers]
        others = [o[quantity] for o in others if "failed" not in o]
        if others and "failed" not in r:
            ratios.append(r[quantity] / min(others))
    return f"{median(ratios):.3f}" if ratios else ""


def write(directory: Path, everything: dict[str, Any]) -> None:
    """Writes ``peers.json`` and ``peers.md``; other workloads that are there already stay.

    Raises:
        SystemExit: what is there was measured on another machine.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "peers.json"
    if path.exists():
        before = json.loads(path.read_text())
        if before["machine"] != everything["machine"]:
            raise SystemExit(f"{path}: measured on another machine; take another --out")
        everything["workloads"] = before["workloads"] | everything["workloads"]
    path.write_text(json.dumps(everything, indent=1) + "\n")
    described = ", ".join(f"{key} {value}" for key, value in everything["machine"].items())
    text = [
        f"# K-FAC beside other libraries\n\nMachine: {described}.\n\nSeconds and MiB, medians. "
        "`peak_mib` is the process's peak after the first pass, `peak_later_mib` after all of them "
        "(an allocator does not give everything back), `floor_mib` after a plain pass.\n"
    ]
    for name, found in everything["workloads"].items():
        limits = (
            f"Rounds: {found['repeats']}; at most {found['timeout_s']:.0f} s and "
            f"{found['memory_gib']:.0f} GiB a process."
        )
        text.append(f"## {name}\n\n{limits}\n\n{table(found['rounds'], found['errors'])}\n")
    (directory / "peers.md").write_text("\n".join(text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", action="append", choices=WORKLOADS, default=None)
    parser.add_argument("--library", action="append", choices=LIBRARIES, default=None)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds a process may take")
    parser.add_argument("--memory-gib", type=float, default=20.0, help="limit of a process")
    parser.add_argument("--no-errors", action="store_true")
    parser.add_argument("--out", type=Path, help="folder for peers.json and peers.md")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--save", help=argparse.SUPPRESS)
    parser.add_argument("--damping", type=float, default=DAMPING, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        print(json.dumps(child(options.child, options.workload[0], options.save, options.damping)))
        return
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    torch.set_num_threads(options.threads)
    # A library that wants more fails by itself, instead of taking the machine down.
    limit = int(options.memory_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    everything: dict[str, Any] = {"machine": machine(), "workloads": {}}
    for workload in options.workload or ["llama", "llama+head"]:
        names = options.library or list(LIBRARIES)
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for index in range(options.repeats):
            for name in names:
                # What failed once fails again, and takes its time-out each time.
                if index and "failed" in results[name][0]:
                    results[name].append(results[name][0])
                    continue
                results[name].append(run(name, workload, options.timeout))
                print(f"{workload}, round {index}: {name}: {results[name][-1]}", flush=True)
        working = [n for n in names if "failed" not in results[n][0]]
        found = {n: {} for n in names}
        if not options.no_errors:
            # The dense reference clips nothing.
            exact = [n for n in working if "binds" not in n]
            found |= errors(workload, exact, options.timeout)
        everything["workloads"][workload] = {
            "repeats": options.repeats, "timeout_s": options.timeout,
            "memory_gib": options.memory_gib, "rounds": results, "errors": found,
        }  # fmt: skip
        print(f"{table(results, found)}\n", flush=True)
    if options.out:
        write(options.out, everything)


if __name__ == "__main__":
    main()
