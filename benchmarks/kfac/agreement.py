"""K-FAC factors, Monte-Carlo and exact Fisher, and EKFAC against curvlinops, on small models.

    python benchmarks/kfac/agreement.py

The models are an MLP with biases and a LLaMA of four layers, in float64. Empirical and exact Fisher
agree to rounding. Monte-Carlo draws differ between the libraries, so that both are compared with
the exact Fisher for growing numbers of draws. The exit code is 1 if a bound does not hold.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import math
from typing import Any

import torch
from curvlinops import EKFACLinearOperator, KFACLinearOperator
from torch import Tensor, nn
from workloads import Workload, llama

from fisher_lab import KFACNaturalGradient
from fisher_lab.curvature.losses import CrossEntropy

EXACT = 1e-10
LAMBDA = 1e-3


def mlp() -> Workload:
    """Three linear layers with biases, 6 classes, 40 examples."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 6))
    return Workload(model, torch.randn(40, 9), torch.randint(0, 6, (40,)), ["0", "2", "4"])


def small_llama(batch: int = 2, length: int = 7) -> Workload:
    """The benchmark's LLaMA with a vocabulary of 11, head included."""
    return llama(head=True, batch=batch, length=length, vocabulary=11)


def in_float64(work: Workload) -> Workload:
    """The same in float64."""
    work.model.double()
    if work.inputs.is_floating_point():
        work.inputs = work.inputs.double()
    return work


def ours(work: Workload, **settings: Any) -> KFACNaturalGradient:
    """Collected factors of this project."""
    kfac = KFACNaturalGradient(
        damping=LAMBDA, max_condition_number=None, include=work.layers, norm_layers=False,
        track_diagonal=False, true_max_classes=64, **settings,
    )  # fmt: skip

    kfac.collect_kfac_factors(work.model, (work.inputs, work.labels), CrossEntropy())
    return kfac


def operator(work: Workload, kind: str, cls: Any = KFACLinearOperator, **options: Any) -> Any:
    """Collected factors of curvlinops, bias columns with their weights."""
    modules = dict(work.model.named_modules())
    parameters = [p for name in work.layers for p in modules[name].parameters()]
    return cls(
        work.model, nn.CrossEntropyLoss(reduction="sum"), parameters,
        [(work.inputs, work.labels)], check_deterministic=False, fisher_type=kind,
        num_data=len(work.inputs),
        num_per_example_loss_terms=work.labels.numel() // len(work.inputs),
        separate_weight_and_bias=False, **options,
    )  # fmt: skip


def dense(factor: Any) -> Tensor:
    """A factor as a matrix."""
    return factor.multiply(torch.eye(factor.dim, dtype=torch.float64))


def relative(x: Tensor, y: Tensor) -> float:
    return float((x - y).norm() / y.norm())


def factor_errors(work: Workload, kind: str, theirs: str, **settings: Any) -> float:
    """The largest relative difference of ``A (x) G`` over the layers, by both factors."""
    kfac, other = ours(work, fisher=kind, **settings), operator(work, theirs)
    other.compute_kronecker_factors()
    worst = 0.0
    for name in work.layers:
        found = kfac.kfac_factors[name]
        a, g = dense(found.A), dense(found.G)
        their_a, their_g = other._input_covariances[name], other._gradient_covariances[name]
        # A scale may sit on either factor: each is compared up to it, and then their product.
        worst = max(worst, relative(a / a.trace(), their_a / their_a.trace()))
        worst = max(worst, relative(g / g.trace(), their_g / their_g.trace()))
        product = float(a.trace() * g.trace()) * work.labels.numel()
        worst = max(worst, abs(product / float(their_a.trace() * their_g.trace()) - 1))
    return worst


def monte_carlo(work: Workload) -> list[tuple[int, float]]:
    """Distance of the Monte-Carlo G from the exact one, over growing numbers of draws."""
    exact = ours(work, fisher="true").kfac_factors
    rows = []
    for n in (16, 256, 4096):
        drawn = ours(work, fisher="mc", n_samples=n, kfac_policy="small_only").kfac_factors
        rows.append((n, max(relative(dense(drawn[x].G), dense(exact[x].G)) for x in work.layers)))
    return rows


def ekfac_error(work: Workload) -> float:
    """EKFAC's eigenvalues and bases, as the operator on a seeded vector."""
    kfac = ours(work, fisher="empirical", ekfac=True, ekfac_unit="sequence")
    other = operator(work, "empirical", EKFACLinearOperator)
    modules = dict(work.model.named_modules())
    generator = torch.Generator().manual_seed(1)
    named = {p: n for n, p in work.model.named_parameters()}
    parameters = [p for name in work.layers for p in modules[name].parameters()]
    vectors = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    # No damping: ours adds it to both factors, theirs to the product. power 1 needs none.
    kfac.with_damping(0.0, 0.0)
    found = kfac.compute_powered_natural_gradient(
        {named[p]: v for p, v in zip(parameters, vectors, strict=True)}, work.model, 1.0
    )
    expected = other @ vectors
    scale = work.labels.numel()
    ours_flat = torch.cat([found[named[p]].flatten() for p in parameters]) * scale
    return relative(ours_flat, torch.cat([e.flatten() for e in expected]))


def main() -> None:
    bad = 0

    def show(what: str, value: float, bound: float) -> None:
        nonlocal bad
        bad += not value <= bound
        print(f"{what:58s} {value:9.1e}  (allowed {bound:.0e}) {'' if value <= bound else 'NO'}")

    for name, make in (("MLP", mlp), ("LLaMA", small_llama)):
        work = in_float64(make())
        for policy in ("all", "small_only"):
            show(
                f"{name}: empirical Fisher, factors, {policy}",
                factor_errors(work, "empirical", "empirical", kfac_policy=policy),
                EXACT,
            )
        if name == "MLP":  # a loss an example: theirs takes the classes of a batch in one pass
            show(f"{name}: exact Fisher, factors", factor_errors(work, "true", "type-2"), EXACT)
            for n, value in monte_carlo(work):
                what = f"{name}: Monte-Carlo against exact Fisher, {n} draws"
                show(what, value, 4 / math.sqrt(n))
        # Theirs has the moments of sequences (docs/math.md, section 6).
        show(f"{name}: EKFAC of sequences as an operator", ekfac_error(work), 1e-8)
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
