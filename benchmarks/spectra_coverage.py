"""Density, effective dimension and the coverage of every interval, against all eigenvalues.

    python benchmarks/spectra_coverage.py [--sets 100] [--out benchmarks/results]

Two models on the text that every Python carries: the default one (1.07 million parameters, 508
labelled tokens) and one of 10.6 million (254 tokens). The truth is the matrix of the samples,
``(1/N) J J^T`` in float64, that ``FisherSpectral`` decomposes with ``block_structure=full``.

- *engine*: what ``FisherLanczos.analyze`` says, with the products of the float32 model: ``auto`` as
  it decides itself (it forms the matrix where this takes fewer products), ``probes`` by probes.
- *coverage*: how many of 100 sets of ten probes have the truth in their interval. The probes of a
  set are drawn for the matrix itself, in float64: in the space of the samples this is the matrix
  above; in that of the parameters any matrix ``V diag(l) V^T`` with the same eigenvalues and ``V``
  ``[n, N]`` orthonormal serves, and ``n = 2000`` is enough.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from fisher_lab.config.schema import Config
from fisher_lab.curvature.spectra import eigensolve, estimates, matrix_free
from fisher_lab.curvature.spectra.estimates import Estimate
from fisher_lab.curvature.spectra.lanczos import FisherLanczos
from fisher_lab.curvature.spectra.quadrature import (
    Closing,
    Probing,
    damped_share,
    log_share,
    quadrature,
)
from fisher_lab.curvature.spectra.spectrum import FisherSpectral, SpectralConfig
from fisher_lab.workload.build import build

CPU: dict[str, Any] = {"dtype": torch.float64, "device": torch.device("cpu")}
SIZE, KNOWN = 2000, 10
DAMPINGS = (1e-1, 1e-2, 1e-4)
DECADES = (-4.0, -3.0, -2.0, -1.0, 0.0)


def workload(name: str) -> tuple[Any, list[Any]]:
    config = Config()
    config.model.name = "gpt2"
    if name == "wide":
        config.model.width, config.model.layers, config.model.heads = 320, 8, 5
        config.model.recipe.steps, config.data.batch_size = 30, 2
    made = build(config)
    return made.model, list(made.batches("train", 1, 0))


def samples_matrix(model: Any, batches: list[Any]) -> Tensor:
    """The matrix whose eigenvalues ``spectral=full`` records."""
    kept: list[Tensor] = []
    solve = eigensolve.solve

    def keep(matrix: Tensor, *args: Any, **options: Any) -> Any:
        kept.append(matrix.clone())
        return solve(matrix, *args, **options)

    eigensolve.solve = keep  # type: ignore[assignment]
    try:
        engine = FisherSpectral(SpectralConfig(chunk_size=16))
        engine.compute_fisher_spectrum(model, batches, None, "full")
    finally:
        eigensolve.solve = solve
    return kept[0]


def engine(
    model: Any, batches: list[Any], values: Tensor, ways: list[str]
) -> Iterator[dict[str, Any]]:
    """The engine's own numbers beside the truth."""
    for way in ways:
        matrix_free.MOST_ROWS = 4096 if way == "auto" else 0
        start = perf_counter()
        lanczos = FisherLanczos(k=KNOWN, say=lambda line: None)
        found = lanczos.analyze(model, batches, lam=1e-2, n_probes=10, steps=20)
        seconds = perf_counter() - start
        dimension, density = found["effective_dimension"], found["density"]
        edges = [10.0**d for d in DECADES]
        below = [
            sum(
                sum(w for x, w in zip(nodes, weights, strict=True) if x <= edge)
                for nodes, weights in zip(density["nodes"], density["weights"], strict=True)
            )
            / len(density["nodes"])
            for edge in edges
        ]
        n = density["n_params"]
        yield {
            "way": way, "seconds": seconds, "products": found["trace"]["n_products"],
            "dimension": dimension, "trace": found["trace"],
            "zero_floor": density["zero_floor"], "noise": density["noise"],
            "nonzero": n * (1 - density["mass_at_zero"]),
            "above": [n * (1 - share) for share in below],
            "true_dimension": float(damped_share(values, 1e-2).sum()),
            "true_trace": float(values.sum()),
            "true_above": [int((values > edge).sum()) for edge in edges],
        }  # fmt: skip


def estimators(matrix: Tensor) -> Iterator[tuple[str, float, Callable[[int], Estimate]]]:
    """Name, truth, and the estimate of a seed."""
    values, vectors = (x.flip(-1) for x in torch.linalg.eigh(matrix))
    values = values.clamp(min=0)
    n, known = len(values), values[:KNOWN]
    top = vectors[:, :KNOWN].T.contiguous()
    generator = torch.Generator().manual_seed(1)
    wide = torch.randn(SIZE, n, dtype=torch.float64, generator=generator)
    wide = torch.linalg.qr(wide).Q
    wide_top = wide[:, :KNOWN].T.contiguous()

    def samples(v: Tensor) -> Tensor:
        return matrix @ v

    def parameters(v: Tensor) -> Tensor:
        return wide @ (values * (wide.T @ v))

    def by_rule(seed: int, name: str, lam: float) -> Estimate:
        function = partial(damped_share if name == "dimension" else log_share, lam=lam)
        rule = quadrature(
            samples, n, Probing(10, 20, 200), seed=seed, deflate=top, normalized=True,
            closing=Closing.of(function, known, 0.01), **CPU,
        )  # fmt: skip
        limit = n if name == "dimension" else float("inf")
        return rule.with_known(known).bracket_of(function, floor=rule.noise, limit=limit)

    def in_parameters(seed: int, lam: float) -> Estimate:
        function = partial(damped_share, lam=lam)
        rule = quadrature(
            parameters, SIZE, Probing(10, 30), seed=seed, deflate=wide_top,
            closing=Closing.of(function, known, 0.01), **CPU,
        )  # fmt: skip
        return rule.with_known(known).bracket_of(function, floor=rule.noise, limit=n)

    for lam in DAMPINGS:
        truth = float(damped_share(values, lam).sum())
        yield f"effective dimension, {lam:g}", truth, partial(by_rule, name="dimension", lam=lam)
        yield f"the same, parameters, {lam:g}", truth, partial(in_parameters, lam=lam)
    truth = float(log_share(values, 1e-2).sum())
    yield "log-determinant, 0.01", truth, partial(by_rule, name="log", lam=1e-2)
    trace, norm = float(values.sum()), float(values.norm())

    def deflated(seed: int) -> Estimate:
        rule = quadrature(
            samples, n, Probing(10, 20), seed=seed, deflate=top, normalized=True, **CPU
        )
        return rule.with_known(known).trace()

    yield "trace, samples", trace, deflated
    yield (
        "trace, parameters, slq",
        trace,
        lambda seed: quadrature(parameters, SIZE, Probing(10, 1), seed=seed, **CPU).trace(),
    )
    yield (
        "trace, Hutch++, 30 products",
        trace,
        lambda seed: estimates.hutch_plus_plus(parameters, SIZE, n_products=30, seed=seed, **CPU),
    )
    yield (
        "trace, XTrace, 20 products",
        trace,
        lambda seed: estimates.xtrace(parameters, SIZE, n_products=20, seed=seed, **CPU),
    )
    yield (
        "Frobenius norm, 40 products",
        norm,
        lambda seed: estimates.frobenius_norm(
            estimates.hutch_plus_plus(
                parameters, SIZE, n_products=40, seed=seed, squared=True, **CPU
            )
        ),
    )


def coverage(matrix: Tensor, sets: int) -> Iterator[dict[str, Any]]:
    for name, truth, run in estimators(matrix):
        found = [run(seed) for seed in range(sets)]
        slack = 1e-9 * abs(truth)
        yield {
            "what": name,
            "truth": truth,
            "mean": sum(x.value for x in found) / sets,
            "half_width": sum(x.high - x.low for x in found) / 2 / sets,
            "covered": sum(x.low - slack <= truth <= x.high + slack for x in found) / sets,
        }


def engine_table(one: dict[str, Any]) -> list[str]:
    lines = [
        "| engine | products | effective dimension, 0.01 | bracket | truth | trace | truth |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in one["engine"]:
        d, t = row["dimension"], row["trace"]
        ends = "-"
        if d["bracket_low"] is not None:
            ends = f"{d['bracket_low']:.2f} to {d['bracket_high']:.2f}"
        lines.append(
            f"| {row['way']} | {row['products']} | {d['value']:.2f} ({d['low']:.2f} to "
            f"{d['high']:.2f}) | {ends} | {row['true_dimension']:.2f} | {t['value']:.1f} "
            f"({t['low']:.1f} to {t['high']:.1f}) | {row['true_trace']:.1f} |"
        )
    heads = " | ".join(f"above 1e{d:.0f}" for d in DECADES)
    lines += ["", f"| eigenvalues | nonzero | {heads} |", "|---" * (len(DECADES) + 2) + "|"]
    for row in one["engine"]:
        cells = " | ".join(f"{x:.1f}" for x in row["above"])
        lines.append(f"| {row['way']} | {row['nonzero']:.1f} | {cells} |")
    cells = " | ".join(str(x) for x in one["engine"][0]["true_above"])
    lines += [f"| truth | {one['n_nonzero']} | {cells} |", ""]
    return lines


def table(results: dict[str, Any]) -> str:
    lines = ["# Intervals, densities and effective dimensions against all eigenvalues", ""]
    lines += [(__doc__ or "").split("\n\n", 2)[2].strip(), ""]
    for name, one in results.items():
        lines += [f"## {name}: {one['n_params']:,} parameters, {one['n_samples']} samples", ""]
        if one["engine"]:
            lines += engine_table(one)
        lines += ["| interval | truth | mean | half a width | covered |", "|---|---|---|---|---|"]
        lines += [
            f"| {row['what']} | {row['truth']:.2f} | {row['mean']:.2f} | {row['half_width']:.2g} "
            f"| {row['covered']:.2f} |"
            for row in one["coverage"]
        ]
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", type=int, default=100)
    parser.add_argument("--models", nargs="*", default=["default", "wide"])
    parser.add_argument("--ways", nargs="*", default=["auto", "probes"])
    parser.add_argument("--keep", type=Path, help="a directory for the matrices, to be used again")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    file = options.out / "spectra_coverage.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    for name in options.models:
        model, batches = workload(name)
        kept = None if options.keep is None else options.keep / f"{name}.pt"
        if kept is None or not kept.is_file():
            matrix = samples_matrix(model, batches)
            if kept is not None:
                torch.save({"K": matrix}, kept)
        else:
            matrix = torch.load(kept, weights_only=True)["K"]
        values = torch.linalg.eigvalsh(matrix).flip(0).clamp(min=0)
        results[name] = {
            "n_params": sum(p.numel() for p in model.parameters()),
            "n_samples": len(matrix),
            "n_nonzero": int((values > 1e-13 * values[0]).sum()),
            "coverage": list(coverage(matrix, options.sets)),
            "engine": list(engine(model, batches, values, options.ways)),
        }
        file.write_text(json.dumps(results, indent=1))
        (options.out / "spectra_coverage.md").write_text(table(results))


if __name__ == "__main__":
    main()
