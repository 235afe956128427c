"""Relative error of the natural gradient on the batch's own gradient, as a table.

    python benchmarks/kfac/accuracy.py [--out DIRECTORY]

The token gradients of the trained default model (trained on first use, then cached) are captured
once and given to every setting: damping 1e-3 to 1e-10, storage dtype, policy, clipping off and on.

The reference without clipping is computed with 64-bit mantissas (numpy's ``longdouble``), because
the relative error of dense float64 is about ``eps`` times the product of both condition numbers; a
column shows it. With clipping the condition numbers are at most 1e6, and the reference is dense
float64. Formulas: docs/math.md, sections 1 to 3.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir

import fisher_lab.curvature.losses as losses
from fisher_lab import KFACNaturalGradient
from fisher_lab.config.paths import conf
from fisher_lab.config.validate import validate
from fisher_lab.curvature.kfac.capture import Capture
from fisher_lab.workload.build import build

DAMPINGS = [10.0**-k for k in range(3, 11)]
STORAGE = ("fp64", "fp32", "bf16", "fp16")
POLICIES: dict[str, dict[str, Any]] = {
    "all": {"kfac_policy": "all"},
    "auto": {"kfac_policy": "auto"},
    "hybrid": {"kfac_policy": "hybrid", "kfac_big_threshold": 512},
    "small_only": {"kfac_policy": "small_only"},
}
KAPPA = 1e6


class Replay:
    """A captured pass whose gradients can be asked for again and again, bit for bit."""

    def __init__(self, capture: Capture, output: torch.Tensor) -> None:
        self.capture = capture
        parameters = list(capture.model.parameters())
        self.found, grads = capture.gradients(output, parameters=parameters)
        self.of = {id(p): grad for p, grad in zip(parameters, grads, strict=True)}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.capture, name)

    def gradients(self, *_: Any, parameters: Any = (), **__: Any) -> Any:
        """Returns the recorded gradients, of calls and of parameters."""
        return self.found, [self.of[id(p)] for p in parameters]

    def close(self) -> None:
        """There is no hook to take away."""


def bench() -> Any:
    """The default workbench: model and one batch of 4 x 128 tokens."""
    with initialize_config_dir(config_dir=str(conf()), version_base="1.3"):
        config = validate(compose("config"))
    found = build(config)
    return SimpleNamespace(model=found.model, batch=found.batches("train", 1, 0)[0])


def engine(policy: str, storage: str, damping: float, kappa: float | None) -> KFACNaturalGradient:
    """The engine with one setting."""
    return KFACNaturalGradient(
        damping=damping,
        max_condition_number=kappa,
        woodbury_dtype=storage,  # type: ignore[arg-type]
        norm_layers=False,
        exclude=["*wte*", "*wpe*"],
        track_diagonal=False,
        **POLICIES[policy],
    )


class Tokens:
    """Inputs with the bias column and gradients of every layer, float64, from one capture."""

    def __init__(self, replay: Replay, labels: int) -> None:
        self.labels = labels
        self.of: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for name, layer in replay.observe(full=True).layers.items():
            (call,) = replay.calls_of(layer)
            grad = replay.found[call.index]
            if grad is None:
                continue
            a = call.a.reshape(-1, call.a.shape[-1]).double().numpy()
            if layer.augmented:
                a = np.concatenate([a, np.ones((len(a), 1))], axis=1)
            self.of[name] = a, grad.reshape(-1, grad.shape[-1]).double().numpy()


def solve(matrix: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Solves a positive definite system by Cholesky in the precision of the input."""
    lower, n = matrix.copy(), len(matrix)
    for k in range(n):
        lower[k:, k] /= np.sqrt(lower[k, k])
        lower[k + 1 :, k + 1 :] -= np.outer(lower[k + 1 :, k], lower[k + 1 :, k])
    x = right.copy()
    for k in range(n):
        x[k] /= lower[k, k]
        x[k + 1 :] -= np.outer(lower[k + 1 :, k], x[k])
    for k in reversed(range(n)):
        x[k] = (x[k] - lower[k + 1 :, k] @ x[k + 1 :]) / lower[k, k]
    return x


def inverse_times(rows: np.ndarray, right: np.ndarray, lam: float) -> np.ndarray:
    """``(rows^T rows / T + lam I)^-1 right``; through the smaller of its two sides."""
    t, n = rows.shape
    if n <= t:
        matrix = rows.T @ rows / t
        matrix[np.diag_indices(n)] += lam
        return solve(matrix, right)
    kernel = rows @ rows.T / t
    kernel[np.diag_indices(t)] += lam
    return (right - rows.T @ solve(kernel, rows @ right) / t) / lam


def truth(tokens: Tokens, lam: float) -> dict[str, np.ndarray]:
    """Natural gradients with 64-bit mantissas, no clipping."""
    result = {}
    for name, (a, g) in tokens.of.items():
        a, g = a.astype(np.longdouble), g.astype(np.longdouble)
        left = inverse_times(g, g.T @ a / tokens.labels, np.longdouble(lam))
        result[name] = inverse_times(a, left.T, np.longdouble(lam)).T.astype(float)
    return result


class Dense:
    """Dense float64: both factors as matrices, decomposed once."""

    def __init__(self, tokens: Tokens) -> None:
        self.tokens = tokens
        self.eigen = {
            name: [np.linalg.eigh(x.T @ x / len(x)) for x in (a, g)]
            for name, (a, g) in tokens.of.items()
        }

    def natural(self, lam: float, kappa: float | None) -> dict[str, np.ndarray]:
        """Natural gradients; without clipping by Cholesky, as anyone would write it."""
        result = {}
        for name, (a, g) in self.tokens.of.items():
            dw = g.T @ a / self.tokens.labels
            if kappa is None:
                big_a, big_g = a.T @ a / len(a), g.T @ g / len(g)
                big_a[np.diag_indices(len(big_a))] += lam
                big_g[np.diag_indices(len(big_g))] += lam
                result[name] = np.linalg.solve(big_a, np.linalg.solve(big_g, dw).T).T
                continue
            inverse_a, inverse_g = (_floored(*x, lam, kappa) for x in self.eigen[name])
            result[name] = inverse_g @ dw @ inverse_a
        return result


def _floored(values: np.ndarray, vectors: np.ndarray, lam: float, kappa: float) -> np.ndarray:
    used = np.maximum(values, 0) + lam
    used = np.maximum(used, used.max() / kappa)
    return (vectors / used) @ vectors.T


def worst(given: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """The largest relative error of a layer."""
    return max(float(np.linalg.norm(given[n] - x) / np.linalg.norm(x)) for n, x in expected.items())


def measured(kfac: KFACNaturalGradient, replay: Replay, work: Any, loss: Any) -> dict[str, Any]:
    """The engine's natural gradient of its own gradient, as matrices by layer."""
    kfac.captured = replay  # type: ignore[assignment]
    kfac.collect_kfac_factors(
        work.model, work.batch, loss=loss, n_labels=work.labels, loss_reduction="sum",
        keep_gradient=True,
    )  # fmt: skip
    natural = kfac.compute_natural_gradient(None, work.model)
    result = {}
    for name, factors in kfac.kfac_factors.items():
        layer = factors.layer
        bias = natural.get(layer.bias) if layer.bias else None
        result[name] = layer.to_matrix(natural[layer.weight], bias, torch.float64).numpy()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for accuracy.json and accuracy.md")
    options = parser.parse_args()
    work = bench()
    kfac = engine("all", "fp32", 1e-3, None)
    with kfac.capture(work.model) as capture:
        scored = losses.score(work.model, losses.prepare(work.model, work.batch))
        loss = losses.summed_loss(scored)
    work.labels = scored.n_labels
    replay = Replay(capture, loss)
    loss = loss.detach()
    tokens = Tokens(replay, work.labels)
    dense = Dense(tokens)
    rows = []
    for kappa in (None, KAPPA):
        for damping in DAMPINGS:
            expected = truth(tokens, damping) if kappa is None else dense.natural(damping, kappa)
            row: dict[str, Any] = {"clipping": kappa is not None, "damping": damping}
            if kappa is None:
                row["dense float64"] = worst(dense.natural(damping, None), expected)
            for policy in POLICIES:
                for storage in STORAGE if policy != "small_only" else ("fp64",):
                    given = measured(engine(policy, storage, damping, kappa), replay, work, loss)
                    row[f"{policy} {storage}"] = worst(given, {n: expected[n] for n in given})
            rows.append(row)
            print(row, flush=True)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "accuracy.json").write_text(json.dumps(rows, indent=1))
        (options.out / "accuracy.md").write_text(markdown(rows))


def markdown(rows: list[dict[str, Any]]) -> str:
    """Two tables: clipping off and on."""
    text = []
    for clipping in (False, True):
        chosen = [row for row in rows if row["clipping"] is clipping]
        names = [name for name in chosen[0] if name not in ("clipping", "damping")]
        text.append(f"Clipping at 1e6: {'on' if clipping else 'off'}\n")
        text.append("| damping | " + " | ".join(names) + " |")
        text.append("|" + "---|" * (len(names) + 1))
        for row in chosen:
            cells = " | ".join(f"{row[name]:.0e}" for name in names)
            text.append(f"| {row['damping']:.0e} | {cells} |")
        text.append("")
    return "\n".join(text)


if __name__ == "__main__":
    main()
