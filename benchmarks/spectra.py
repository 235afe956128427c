"""Time and memory of the spectral engines compared with the direct method, in one run.

    python benchmarks/spectra.py [--samples 512] [--repeats 5] [--json FILE]

The model is a GPT-2 with 4 layers (width 128, 2048 tied tokens, random weights) on sequences of 128
tokens in float32. Every method runs in its own process, which gives its peak resident memory. Times
are wall clock, with CPU seconds for machines that are shared. `curvlinops` is measured if it is
installed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from fisher_lab.runs import provenance

LENGTH = 128


def make(samples: int) -> tuple[Any, dict[str, torch.Tensor]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=2048, n_embd=128, n_layer=4, n_head=4, n_positions=LENGTH + 1,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    # One more token than labels that are wanted: the first of a sequence is not predicted.
    ids = torch.randint(0, 2048, (math.ceil(samples / LENGTH), LENGTH + 1))
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def straightforward(samples: int) -> dict[str, Any]:
    """One backward pass a token over the whole batch, N x P kept, a Gram matrix a block."""
    from fisher_lab.curvature import losses
    from fisher_lab.curvature.spectra.blocks import parameter_blocks

    model, batch = make(samples)
    named = dict(model.named_parameters())
    values = losses.token_losses(losses.score(model, batch))
    rows = {name: torch.empty(len(values), p.numel()) for name, p in named.items()}
    for i in range(len(values)):
        grads = torch.autograd.grad(
            values[i], list(named.values()), retain_graph=True, allow_unused=True
        )
        for (name, p), grad in zip(named.items(), grads, strict=True):
            rows[name][i] = torch.zeros_like(p).flatten() if grad is None else grad.flatten()
    largest = {}
    for block, names in parameter_blocks(model, "layer").items():
        gram = torch.zeros(len(values), len(values), dtype=torch.float64)
        for name in names:
            matrix = rows[name].double()
            gram += matrix @ matrix.T
        largest[block] = float(torch.linalg.eigvalsh(gram / len(values))[-1])
    return {"largest": largest}


def spectrum(samples: int, **config: Any) -> dict[str, Any]:
    from fisher_lab.curvature.spectra.spectrum import FisherSpectral, SpectralConfig

    model, batch = make(samples)
    result = FisherSpectral(SpectralConfig(**config)).compute_fisher_spectrum(model, batch)
    return {"largest": {k: v["largest_eigenvalue"] for k, v in result["per_block"].items()}}


def best(run: Callable[[], Any], repeats: int = 5) -> float:
    """CPU seconds of the fastest of several calls: the one that was disturbed least."""
    run()
    found = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        found.append(time.process_time() - start)
    return min(found)


def products(samples: int) -> dict[str, Any]:
    """A product of each operator against one plain forward and backward pass."""
    from fisher_lab.curvature import losses
    from fisher_lab.curvature.evaluation_mode import isolated
    from fisher_lab.curvature.spectra.blocks import select_parameters
    from fisher_lab.curvature.spectra.operators import CurvatureOperator

    model, batch = make(samples)

    def plain() -> None:
        losses.summed_loss(losses.score(model, batch)).backward()
        model.zero_grad()

    seconds = {"forward+backward": best(plain)}
    with isolated(model, seed=0):
        for name in ("empirical", "true", "hessian"):
            for way in ("double_backward", "forward"):
                if (name, way) == ("hessian", "forward"):
                    continue
                matrix = CurvatureOperator(
                    name, model, batch, select_parameters(model, None), products=way
                )
                vector = torch.randn(matrix.n)
                seconds[f"{name}, {way}"] = best(lambda m=matrix, v=vector: m(v))
    unit = seconds["forward+backward"]
    return {"seconds": seconds, "ratio": {k: v / unit for k, v in seconds.items()}}


def lanczos(samples: int) -> dict[str, Any]:
    from fisher_lab.curvature.spectra.lanczos import FisherLanczos

    model, batch = make(samples)
    found = FisherLanczos(k=10, operator="true").top_eigenpairs(model, batch)
    return {"eigenvalues": found["eigenvalues"], "products": found["n_products"]}


def peer(samples: int) -> dict[str, Any]:
    """The eigsh of scipy over curvlinops' Gauss-Newton operator, with the same tolerance."""
    from curvlinops import GGNLinearOperator
    from scipy.sparse.linalg import LinearOperator, eigsh

    model, batch = make(samples)
    model.set_attn_implementation("eager")

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.inner(input_ids=ids, use_cache=False).logits[:, :-1].mT

    wrapped = Logits()
    # ".mT" puts the classes second, where cross_entropy looks for them.
    data = [(batch["input_ids"], batch["labels"][:, 1:])]
    parameters = [p for p in wrapped.parameters() if p.requires_grad]
    matrix = GGNLinearOperator(
        wrapped, torch.nn.CrossEntropyLoss(), parameters, data, check_deterministic=False
    )
    counted = {"products": 0}
    scipy_matrix = matrix.to_scipy()

    def product(vector: np.ndarray) -> np.ndarray:
        counted["products"] += 1
        return scipy_matrix @ vector.astype(np.float32)

    n = sum(p.numel() for p in parameters)
    operator = LinearOperator((n, n), matvec=product, dtype=np.float32)
    values = eigsh(operator, k=10, which="LA", tol=1e-6, return_eigenvectors=False)
    return {"eigenvalues": sorted(values.tolist(), reverse=True), **counted}


DETERMINISTIC = "chunked, deterministic"
CASES: dict[str, Callable[[int], dict[str, Any]]] = {
    "straightforward": straightforward,
    "chunked": spectrum,
    "chunked, no products": lambda n: spectrum(n, linear_gram="never"),
    DETERMINISTIC: lambda n: spectrum(n, use_deterministic=True),
    "chunked, 64 MiB": lambda n: spectrum(n, memory_budget_mb=64),
    "full": lambda n: spectrum(n, storage_mode="full"),
    "products": products,
    "lanczos": lanczos,
    "curvlinops + eigsh": peer,
}


def child(name: str, samples: int) -> None:
    make(LENGTH)  # imports and the model are no part of what is measured
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, cpu = time.perf_counter(), time.process_time()
    result = CASES[name](samples)
    result |= {
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
        "peak_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
    }
    print(json.dumps(result))


def measure(name: str, samples: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, "--child", name, "--samples", str(samples)],
        capture_output=True,
        text=True,
        timeout=3600,
        env=os.environ,
        check=False,
    )
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def alternating(samples: int, repeats: int) -> dict[str, Any]:
    """What determinism costs: both ways by turns, so that a slow spell of the machine hits both."""
    runs: dict[str, list[dict[str, Any]]] = {"chunked": [], DETERMINISTIC: []}
    for turn in range(repeats):
        # The one that is first changes, too.
        for name in list(runs)[:: 1 if turn % 2 == 0 else -1]:
            runs[name].append(measure(name, samples))
    failed = next((r for found in runs.values() for r in found if "error" in r), None)
    if failed is not None:
        return failed
    result: dict[str, Any] = {"repeats": repeats}
    for key in ("wall_s", "cpu_s"):
        plain, slow = ([r[key] for r in runs[name]] for name in runs)
        result |= {
            f"{key}_each": {"chunked": plain, DETERMINISTIC: slow},
            f"{key}_chunked": median(plain),
            f"{key}_deterministic": median(slow),
            f"{key}_ratio": median(slow) / median(plain),
        }
    return result


def machine() -> dict[str, Any]:
    """Describes the machine, without its name, and the versions of what is measured."""
    versions = {}
    for name in ("torch", "transformers", "numpy", "scipy", "curvlinops-for-pytorch"):
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    about = {"threads": torch.get_num_threads(), "versions": versions}
    return {**provenance.machine(), **about}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--child")
    parser.add_argument("--only", action="append", help="measure these cases alone")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=5, help="of each way, for determinism")
    parser.add_argument(
        "--series", type=int, nargs="*", default=[128, 256, 1024, 2048],
        help="further N for peak memory",
    )  # fmt: skip
    options = parser.parse_args()
    if options.child:
        child(options.child, options.samples)
        return
    if options.repeats < 3:
        parser.error("--repeats: 3 or more, for a median")
    results: dict[str, Any] = {
        "machine": machine(), "threads": torch.get_num_threads(), "samples": options.samples,
    }  # fmt: skip
    plan = [(name, options.samples) for name in CASES]
    # Peak memory against N: past the Gram matrices it should not grow.
    plan += [("chunked, 64 MiB", n) for n in options.series]
    for name, samples in plan:
        if options.only and name not in options.only:
            continue
        found = measure(name, samples)
        results[f"{name}, N={samples}"] = found
        shown = {k: round(v, 3) for k, v in found.items() if isinstance(v, float)}
        print(f"{name}, N={samples}: {shown or found}", flush=True)
        if "ratio" in found:
            for key, value in found["ratio"].items():
                print(f"    {key}: {value:.2f} x forward+backward")
    if not options.only or DETERMINISTIC in options.only:
        found = results["determinism"] = alternating(options.samples, options.repeats)
        shown = {k: round(v, 3) for k, v in found.items() if isinstance(v, float)}
        print(f"determinism, {options.repeats} of each by turns: {shown or found}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
