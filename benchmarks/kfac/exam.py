"""An exam: curvlinops' K-FAC, and the exact Gauss-Newton matrix, on a grid of small models.

    make bench BENCH=benchmarks/kfac/exam.py ARGS="--out benchmarks/kfac/results"

The grid follows what curvlinops' own tests vary: models x losses x reductions x Fisher types x
expand and reduce x which parameters, joint or apart. Every case compares the whole matrix
``(T/N) G (x) A`` (times ``N`` for a summed loss), all layers, in float64. Monte-Carlo cases feed
the same draws to both libraries. Where the two mean different things, the case names the reason,
and the reason's formula is computed and compared in its turn. The exit code is 1 if a case is
neither equal nor explained.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from curvlinops import KFACLinearOperator
from exam_models import LOSSES, MODELS, Model, batches_of, loss_of
from torch import Tensor, nn

from fisher_lab import KFACNaturalGradient
from fisher_lab.curvature.kfac import collect
from fisher_lab.curvature.likelihoods import Likelihood, Scored, understood

EXACT = 1e-9
DRAWS = 2

FISHER = {"type-2": "true", "mc": "mc", "empirical": "empirical"}
PARAMETERS = ("joint", "separate", "weights", "biases")

CROSS = (
    "type-2 sends one pass a class for all positions of an example at once, so that its outer "
    "products have cross terms between positions, which the expectation has not"
)
COUNT = "its mean counts the labels that ignore_index leaves out, which torch's mean does not"
UNSEEN = "its type-2 and mc do not look at the labels: those that ignore_index leaves out count"
CALLS = (
    "its A is summed over the calls of a shared layer but divided by the rows of one of them, and "
    "modules with one weight are layers of their own; such models are held to the exact "
    "Gauss-Newton matrix where K-FAC is exact (one example, squared error, expand)"
)
FORWARD = "forward-only sets G to the identity: that is no Fisher matrix, and it is not offered"


@dataclass(frozen=True)
class Case:
    """One cell of the grid."""

    model: str
    loss: str
    reduction: str
    fisher: str
    sharing: str
    parameters: str


@dataclass(frozen=True)
class Outcome:
    """What came out of a case: ``equal``, ``explained``, ``different`` or ``excluded``."""

    verdict: str
    error: float | None = None
    reason: str = ""


def cases() -> Iterator[Case]:
    """Yields the grid."""
    grid = itertools.product(
        MODELS, LOSSES, ("mean", "sum"), (*FISHER, "forward-only"), ("expand", "reduce"), PARAMETERS
    )
    for cell in grid:
        case = Case(*cell)
        if case.loss in MODELS[case.model].losses and (
            case.parameters == "joint" or MODELS[case.model].biases
        ):
            yield case


# ---- draws that both libraries see -------------------------------------------------------------


class Draws:
    """Targets drawn from outputs ``[M, C]``, the same in both libraries."""

    def __init__(self, loss: str) -> None:
        self.loss, self.number = loss, 0

    def __call__(self, outputs: Tensor) -> Tensor:
        """Returns the next targets."""
        generator = torch.Generator().manual_seed(self.number)
        self.number += 1
        if self.loss == "mse":
            noise = torch.randn(outputs.shape, generator=generator, dtype=outputs.dtype)
            return outputs + 0.5**0.5 * noise
        if self.loss == "bce":
            return torch.bernoulli(outputs.sigmoid(), generator=generator)
        return torch.multinomial(outputs.softmax(1), 1, generator=generator)[:, 0]


def with_draws(likelihood: Likelihood, draws: Draws) -> Likelihood:
    """A likelihood whose draws are those; its gradients at them come from autograd."""
    base: Any = type(likelihood)

    class Drawn(base):
        def drawn(self, outputs: Tensor, generator: Any, n: int) -> Iterator[Tensor]:
            for _ in range(n):
                f = outputs.detach().requires_grad_()
                none = torch.zeros(len(f), dtype=torch.int64)
                with torch.enable_grad():
                    total = self.total(Scored(f, draws(outputs), none, none, self))
                yield torch.autograd.grad(total, f)[0]

    return like(Drawn, likelihood)


class Curvlinops(KFACLinearOperator):
    """curvlinops with the draws of the exam."""

    draws: Draws

    def draw_label(self, output: Tensor) -> Tensor:
        """See the base class."""
        return self.draws(output.detach())


def at_once(likelihood: Likelihood) -> Likelihood:
    """A likelihood with one pass a class for all rows, as curvlinops' type-2 has."""
    base: Any = type(likelihood)

    class Together(base):
        def score(self, outputs: Any, batch: Any) -> Scored:
            scored = super().score(outputs, batch)
            return replace(scored, positions=torch.zeros_like(scored.positions))

    return like(Together, likelihood)


def like(kind: type[Likelihood], likelihood: Likelihood) -> Likelihood:
    """An object of a subclass with the options of a likelihood."""
    made = kind.__new__(kind)
    vars(made).update(vars(likelihood))
    return made


# ---- the matrices ------------------------------------------------------------------------------


def trained(model: nn.Module, parameters: str) -> dict[str, nn.Parameter]:
    """The parameters of a case, in the model's order; the others are frozen."""
    named = dict(model.named_parameters())
    wanted = {"weights": "weight", "biases": "bias"}.get(parameters, "")
    return {name: p for name, p in named.items() if name.endswith(wanted)}


def theirs(case: Case, model: nn.Module, batches: Sequence[Any], **options: Any) -> Tensor:
    """The matrix of curvlinops."""
    loss = loss_of(case.loss, case.reduction, MODELS[case.model])
    operator = Curvlinops(
        model, loss, list(trained(model, case.parameters).values()), batches,
        fisher_type=case.fisher, kfac_approx=case.sharing, check_deterministic=False,
        separate_weight_and_bias=case.parameters != "joint",
        mc_samples=DRAWS if case.fisher == "mc" else 1,
        batch_size_fn=lambda x: len(x["x"] if isinstance(x, dict) else x), **options,
    )  # fmt: skip
    operator.draws = Draws(case.loss)
    size = sum(p.numel() for p in trained(model, case.parameters).values())
    return operator @ torch.eye(size, dtype=torch.float64)


def factors(
    case: Case, model: nn.Module, batches: Sequence[Any], change: Callable[[Any], Any]
) -> KFACNaturalGradient:
    """This project's factors."""
    loss = change(understood(loss_of(case.loss, case.reduction, MODELS[case.model])))
    if case.fisher == "mc":
        loss = with_draws(loss, Draws(case.loss))
    names = trained(model, "weights" if case.parameters == "weights" else "joint")
    for name, p in model.named_parameters():
        p.requires_grad_(name in names)
    kfac = KFACNaturalGradient(
        fisher=FISHER[case.fisher], sharing=case.sharing, n_samples=DRAWS,
        kfac_policy="small_only", track_diagonal=False,
    )  # fmt: skip
    kfac.collect_kfac_factors(model, list(batches), loss=loss)
    for p in model.parameters():
        p.requires_grad_(True)
    if kfac.skipped:
        raise RuntimeError(f"{case}: {kfac.skipped}")
    return kfac


def ours(
    case: Case, model: nn.Module, batches: Sequence[Any], change: Callable[[Any], Any] = lambda x: x
) -> Tensor:
    """The matrix of this project: the blocks of its layers at their parameters' places."""
    kfac = factors(case, model, batches, change)
    places, start = {}, 0
    for name, p in trained(model, case.parameters).items():
        places[name] = torch.arange(start, start + p.numel()).reshape(p.shape)
        start += p.numel()
    total = torch.zeros(start, start, dtype=torch.float64)
    for f in kfac.kfac_factors.values():
        scale = f.ratio * (f.n_labels if case.reduction == "sum" else 1)
        assert f.A is not None
        block = scale * torch.kron(f.G.to_dense(), f.A.to_dense())
        columns = f.A.dim
        index = torch.arange(f.G.dim * columns).reshape(f.G.dim, columns)
        of_weight = index[:, : f.layer.n_in].flatten()
        parts = [(of_weight, places.get(f.layer.weight))]
        for k, bias in enumerate(f.layer.biases):
            parts.append((index[:, f.layer.n_in + k], places.get(bias)))
        kept = [(rows, place.flatten()) for rows, place in parts if place is not None]
        for (rows, at), (others, to) in itertools.product(kept, kept):
            if case.parameters == "joint" or rows is others:
                total[at[:, None], to] = block[rows[:, None], others]
    return total


def gauss_newton(case: Case, model: nn.Module, batches: Sequence[Any]) -> Tensor:
    """The exact matrix ``sum J^T H J`` by explicit Jacobians, block-diagonal by layer."""
    named = trained(model, case.parameters)
    loss = loss_of(case.loss, "sum", MODELS[case.model])
    size, n = sum(p.numel() for p in named.values()), 0
    total = torch.zeros(size, size, dtype=torch.float64)
    for x, y in batches:
        f = model(x)
        rows = [torch.autograd.grad(one, list(named.values()), retain_graph=True)
                for one in f.flatten()]  # fmt: skip
        jacobian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
        flat = f.detach().flatten()
        curvature = torch.autograd.functional.hessian(
            lambda v, shape=f.shape, y=y: loss(v.reshape(shape), y), flat
        )
        total += jacobian.T @ curvature @ jacobian
        n += y.numel()
    owner = torch.cat([
        torch.full((p.numel(),), k if case.parameters == "separate" else 0)
        for k, p in enumerate(named.values())
    ])  # fmt: skip
    total = total * (owner[:, None] == owner)
    return total if case.reduction == "sum" else total / n


# ---- verdicts ----------------------------------------------------------------------------------


def relative(found: Tensor, expected: Tensor) -> float:
    """Relative error in the Frobenius norm."""
    return float((found - expected).norm() / expected.norm())


def sat(case: Case) -> Outcome:
    """Takes the exam in one case."""
    if case.fisher == "forward-only":
        return Outcome("excluded", reason=FORWARD)
    made: Model = MODELS[case.model]
    torch.manual_seed(0)
    model = made.build(case.loss).double()
    batches = batches_of(made, case.loss, model)
    found = ours(case, model, batches)
    if made.shared:
        exact = case.fisher == "type-2" and case.sharing == "expand" and case.loss == "mse"
        if not exact:
            return Outcome("excluded", reason=CALLS)
        error = relative(found, gauss_newton(case, model, batches))
        return Outcome("equal" if error < EXACT else "different", error, "the exact Gauss-Newton")
    expected = theirs(case, model, batches)
    error = relative(found, expected)
    if error < EXACT:
        return Outcome("equal", error)
    return explained(case, model, batches, expected, error)


def explained(
    case: Case, model: nn.Module, batches: Sequence[Any], expected: Tensor, error: float
) -> Outcome:
    """Looks for the reason of a difference, and computes what it says."""
    if case.fisher == "type-2":
        handle = model.register_forward_hook(
            lambda *given: given[-1] * 1.0
        )  # then there is no head
        with mock.patch(f"{collect.__name__}.by_example", lambda loss, *_: loss):
            again = relative(ours(case, model, batches, at_once), expected)
        handle.remove()
        if again < EXACT:
            return Outcome("explained", error, CROSS)
    ignored = MODELS[case.model].ignored
    if ignored is not None and case.fisher != "empirical":
        every = [(x, y.masked_fill(y == ignored, 0)) for x, y in batches]
        if relative(ours(case, model, every), expected) < EXACT:
            return Outcome("explained", error, UNSEEN)
    elif ignored is not None and case.reduction == "mean":
        # Of a batch with n labels, k of which count, its gradients are n/k times those of the sum.
        total = sum(y.numel() for _, y in batches)
        sizes = [(y.numel(), int((y != ignored).sum())) for _, y in batches]
        weights = [(n / k) ** 2 / total for n, k in sizes]
        if relative(weighted(case, model, batches, weights), expected) < EXACT:
            return Outcome("explained", error, COUNT)
    return Outcome("different", error)


def weighted(
    case: Case, model: nn.Module, batches: Sequence[Any], weights: Sequence[float]
) -> Tensor:
    """The matrix of a summed loss with the batches' gradient covariances weighted."""
    loss = understood(loss_of(case.loss, "sum", MODELS[case.model]))
    base: Any = type(loss)
    left = iter(weights)

    class OfBatch(base):
        def total(self, scored: Scored) -> Tensor:
            return super().total(scored) * next(left) ** 0.5

    scaled = like(OfBatch, loss)
    return ours(replace(case, reduction="sum"), model, batches, lambda _: scaled)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="directory of exam.csv and exam.md")
    parser.add_argument("--only", default="", help="only models whose name has this in it")
    given = parser.parse_args()
    torch.set_num_threads(1)
    results = [(case, sat(case)) for case in cases() if given.only in case.model]
    report(results, given.out)
    return int(any(outcome.verdict == "different" for _, outcome in results))


def report(results: Sequence[tuple[Case, Outcome]], out: Path | None) -> None:
    """Prints the table, and writes it with every case."""
    verdicts = ("equal", "explained", "different", "excluded")
    lines = ["# curvlinops' exam", "", __doc__.split("\n\n")[2].strip(), ""]
    counts = Counter(outcome.verdict for _, outcome in results)
    lines.append(", ".join(f"{counts[v]} {v}" for v in verdicts) + f" of {len(results)} cases.")
    worst = max((o.error or 0.0 for _, o in results if o.verdict == "equal"), default=0.0)
    lines += ["", f"Largest relative error of an equal case: {worst:.1e} (bound {EXACT:g}).", ""]
    kinds = (*FISHER,)
    lines += [
        "| model | " + " | ".join(f"{k}, {s}" for k in kinds for s in ("expand", "reduce")) + " |",
        "|---" * (1 + 2 * len(kinds)) + "|",
    ]
    for name, model in MODELS.items():
        cells = []
        for kind, sharing in itertools.product(kinds, ("expand", "reduce")):
            here = Counter(
                o.verdict for c, o in results
                if (c.model, c.fisher, c.sharing) == (name, kind, sharing)
            )  # fmt: skip
            cells.append(", ".join(f"{here[v]} {v}" for v in verdicts if here[v]))
        if any(cells):
            lines.append(f"| {model.about} | " + " | ".join(cells) + " |")
    lines += ["", "Reasons:", ""]
    reasons = Counter((o.verdict, o.reason) for _, o in results if o.reason)
    lines += [f"- {n} {verdict}: {reason}." for (verdict, reason), n in reasons.items()]
    text = "\n".join(lines) + "\n"
    sys.stdout.write(text)
    for case, outcome in results:
        if outcome.verdict == "different":
            sys.stdout.write(f"different: {case} {outcome.error:.2e}\n")
    if out is not None:
        (out / "exam.md").write_text(text)
        rows = [{**asdict(c), **asdict(o)} for c, o in results if o.verdict != "excluded"]
        with (out / "exam.csv").open("w", newline="") as file:
            writer = csv.DictWriter(
                file, list(rows[0])[:-1], extrasaction="ignore", lineterminator="\n"
            )
            writer.writeheader()
            writer.writerows({**row, "error": f"{row['error']:.1e}"} for row in rows)


if __name__ == "__main__":
    sys.exit(main())
