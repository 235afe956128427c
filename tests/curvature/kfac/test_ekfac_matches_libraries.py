"""EKFAC against curvlinops and kronfluence (the extra `bench`): both units, every Fisher kind.

Both libraries take second moments of the gradients of sequences. Tokens are on their own where a
sequence has one of them, in a model without positions.
"""

# pyright: reportMissingImports=false

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from fisher_lab import KFACNaturalGradient
from fisher_lab.curvature.losses import CrossEntropy
from tests.capturing import random_like
from tests.reference import relative

DOUBLE = torch.float64
LAYERS = ["first", "second", "head"]
SEQUENCES, POSITIONS, CLASSES, DRAWS = 6, 5, 3, 2
BOUND = 1e-10


class Attentive(nn.Module):
    """Tokens that see each other, and a prediction for each of them, or one for a sequence."""

    def __init__(self, per_token: bool) -> None:
        super().__init__()
        self.per_token = per_token
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        s = torch.tanh(self.first(x))
        s = torch.tanh(self.second(torch.softmax(s @ s.mT, -1) @ s))
        return self.head(s).reshape(-1, CLASSES) if self.per_token else self.head(s.mean(1))


class PerExample(nn.Module):
    """Layers over examples without positions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Case(SimpleNamespace):
    """A model in float64, its inputs and its labels; `positions` of each example have a label."""


def case(name: str) -> Case:
    torch.manual_seed(0)
    model = PerExample() if name == "examples" else Attentive(name == "tokens")
    n = 20 if name == "examples" else SEQUENCES
    x = torch.randn(n, 4) if name == "examples" else torch.randn(n, POSITIONS, 4)
    positions = POSITIONS if name == "tokens" else 1
    labels = torch.randint(CLASSES, (n * positions,))
    return Case(model=model.double(), x=x.double(), labels=labels, n=n, positions=positions)


def ours(one: Case, unit: str, fisher: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The Fisher-vector product of EKFAC with a seeded vector, and that vector."""
    kfac = KFACNaturalGradient(
        ekfac=True, ekfac_unit=unit, fisher=fisher, n_samples=DRAWS, track_diagonal=False, seed=5
    )
    kfac.collect_kfac_factors(one.model, (one.x, one.labels), CrossEntropy())
    assert kfac.last.fisher == fisher
    vectors = random_like({n: p.detach() for n, p in one.model.named_parameters()})
    return kfac.compute_fisher_vector_product(vectors, one.model), vectors


def drawn(one: Case) -> list[Tensor]:
    """The labels that our engine draws with the seed 5: where the gradient `p - y` is negative."""
    generator = torch.Generator().manual_seed(5)
    logits = one.model(one.x).detach()
    return [s.argmin(1) for s in CrossEntropy().drawn(logits, generator, DRAWS)]


def by_curvlinops(one: Case, fisher: str, vectors: dict[str, Tensor]) -> dict[str, Tensor]:
    curvlinops = pytest.importorskip("curvlinops")
    labels = drawn(one) if fisher == "mc" else [one.labels]
    parameters = [p for name in LAYERS for p in one.model.get_submodule(name).parameters()]
    operator = curvlinops.EKFACLinearOperator(
        one.model, nn.CrossEntropyLoss(reduction="sum"), parameters,
        [(one.x, y) for y in labels], check_deterministic=False,
        fisher_type="type-2" if fisher == "true" else "empirical", num_data=one.n * len(labels),
        num_per_example_loss_terms=one.positions, separate_weight_and_bias=False,
    )  # fmt: skip
    names = [n for n, _ in one.model.named_parameters()]
    found = operator @ [vectors[n] for n in names]
    return {n: v / (len(one.labels) * len(labels)) for n, v in zip(names, found, strict=True)}


def by_kronfluence(one: Case, fisher: str, vectors: dict[str, Tensor]) -> dict[str, Tensor]:
    pytest.importorskip("kronfluence")
    from kronfluence.analyzer import prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.factor.covariance import fit_covariance_matrices_with_loader
    from kronfluence.factor.eigen import (
        fit_lambda_matrices_with_loader,
        perform_eigendecomposition,
    )
    from kronfluence.task import Task
    from kronfluence.utils.state import State

    class Loss(Task):
        def compute_train_loss(self, batch, model, sample=False):
            x, labels, expected = batch
            log_p = torch.log_softmax(model(x), -1)
            log_p = log_p.gather(1, labels[:, None])[:, 0]
            # A term of the expectation over the labels of one position: independent ones.
            weights = torch.where(expected, log_p.detach().exp().sqrt(), 0.0)
            return -(log_p * weights).sum() if fisher == "true" else -log_p.sum()

        def compute_measurement(self, batch, model):
            raise NotImplementedError

        def get_influence_tracked_modules(self):
            return LAYERS

    everywhere = torch.ones_like(one.labels, dtype=torch.bool)
    batches = [(one.x, one.labels, everywhere)]
    if fisher == "mc":
        batches = [(one.x, y, everywhere) for y in drawn(one)]
    if fisher == "true":
        position = torch.arange(len(one.labels)) % one.positions
        terms = [(p, c) for p in range(one.positions) for c in range(CLASSES)]
        batches = [(one.x, torch.full_like(one.labels, c), position == p) for p, c in terms]
    task, state = Loss(), State(cpu=True)
    model = prepare_model(copy.deepcopy(one.model), task)
    kinds = ["activation_covariance", "gradient_covariance", "per_sample_gradient", "lambda"]
    arguments = FactorArguments(
        strategy="ekfac", use_empirical_fisher=True, eigendecomposition_dtype=DOUBLE,
        **{f"{kind}_dtype": DOUBLE for kind in kinds},
    )  # fmt: skip
    _, covariances = fit_covariance_matrices_with_loader(
        model, state, task, batches, arguments, disable_tqdm=True
    )
    eigen = perform_eigendecomposition(covariances, model, state, arguments, disable_tqdm=True)
    _, found = fit_lambda_matrices_with_loader(
        model, state, task, batches, arguments, eigen_factors=eigen, disable_tqdm=True
    )
    result = {}
    scale = len(one.labels) * (DRAWS if fisher == "mc" else 1)
    for name in LAYERS:
        v_a = eigen["activation_eigenvectors"][name].double()
        v_g = eigen["gradient_eigenvectors"][name].double()
        y = torch.cat([vectors[f"{name}.weight"], vectors[f"{name}.bias"][:, None]], 1)
        inside = (v_g.T @ y @ v_a) * found["lambda_matrix"][name].double() / scale
        y = v_g @ inside @ v_a.T
        result |= {f"{name}.weight": y[:, :-1], f"{name}.bias": y[:, -1]}
    return result


LIBRARIES = {"curvlinops": by_curvlinops, "kronfluence": by_kronfluence}
CASES = [
    ("curvlinops", "tokens", "sequence", "empirical"),
    ("curvlinops", "tokens", "sequence", "mc"),
    ("curvlinops", "sequences", "sequence", "empirical"),
    ("curvlinops", "sequences", "sequence", "mc"),
    ("curvlinops", "sequences", "sequence", "true"),  # of positions its passes have cross terms
    *(("curvlinops", "examples", "token", kind) for kind in ("empirical", "mc", "true")),
    *(
        ("kronfluence", name, unit, kind)
        for name, unit in (("tokens", "sequence"), ("sequences", "sequence"), ("examples", "token"))
        for kind in ("empirical", "mc", "true")
    ),
]


@pytest.mark.parametrize(("library", "name", "unit", "fisher"), CASES)
def test_agrees(library, name, unit, fisher):
    """The Fisher-vector product of every layer, the head included."""
    one = case(name)
    found, vectors = ours(one, unit, fisher)
    expected = LIBRARIES[library](one, fisher, vectors)
    for key, value in expected.items():
        assert relative(found[key], value) < BOUND, key
    if name != "examples":
        other, _ = ours(one, "token", fisher)
        assert max(relative(other[key], value) for key, value in expected.items()) > 1e-3
