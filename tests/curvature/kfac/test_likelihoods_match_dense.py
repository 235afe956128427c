"""Squared errors and (binary) cross-entropies: factors held to explicit Jacobians and Hessians.

The references differentiate the model's outputs by hand-picked tensors with
`torch.autograd.functional.jacobian`, write the Hessian of each loss from its formula, and share
nothing with the code under test.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fisher_lab import KFACNaturalGradient
from fisher_lab.config.errors import SettingError
from fisher_lab.curvature.errors import BatchError, LayerError, LossError
from fisher_lab.curvature.losses import BinaryCrossEntropy, CrossEntropy, SquaredError
from tests.reference import relative

WIDTH, OUT = 3, 2
LOSSES = {
    "squared": (SquaredError(), nn.MSELoss),
    "binary": (BinaryCrossEntropy(), nn.BCEWithLogitsLoss),
    "cross": (CrossEntropy(), nn.CrossEntropyLoss),
}


class Mixing(nn.Module):
    """Two layers with something between them that mixes the tokens of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 4), nn.Linear(4, OUT)

    def between(self, s: Tensor) -> Tensor:
        scores = torch.softmax(s @ s.mT, -1)
        return torch.tanh(scores @ s)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))


class Doubled(Mixing):
    """Its outputs are no layer's."""

    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * super().forward(x)


def seeded(build, *shape: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return build().double(), torch.randn(*shape, dtype=torch.float64)


def targets_of(kind: str, outputs: Tensor) -> Tensor:
    if kind == "cross":
        return torch.randint(outputs.shape[-1], outputs.shape[:-1])
    return torch.rand(outputs.shape, dtype=torch.float64)


def hessian(kind: str, f: Tensor) -> Tensor:
    """Of the loss of one row of outputs, from its formula."""
    if kind == "squared":
        return 2.0 * torch.eye(len(f), dtype=f.dtype)
    p = torch.sigmoid(f)
    if kind == "binary":
        return torch.diag(p * (1 - p))
    p = torch.softmax(f, 0)
    return torch.diag(p) - torch.outer(p, p)


def expected_g(model: Mixing, kind: str, x: Tensor, scale: float = 1.0) -> Tensor:
    """`sum_t sum_u J_ut^T H_u J_ut` of the first layer, whose output t reaches every output u."""
    s = model.first(x).detach()
    total = torch.zeros(4, 4, dtype=x.dtype)
    for row in s:
        outputs = lambda one: scale * model.second(model.between(one))  # noqa: E731
        jacobian = torch.autograd.functional.jacobian(outputs, row)  # [S, OUT, S, 4]
        for u, f in enumerate(outputs(row).detach()):
            for t in range(len(row)):
                total += jacobian[u, :, t].T @ hessian(kind, f) @ jacobian[u, :, t]
    return total


def dense(kfac: KFACNaturalGradient, name: str) -> tuple[Tensor, Tensor]:
    factors = kfac.kfac_factors[name]
    assert factors.A is not None
    return factors.A.to_dense(), factors.G.to_dense()


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("build", [Mixing, Doubled])
def test_true_fisher_where_layers_mix_tokens(kind, build):
    """Also where the outputs are no layer's: then the last layer gets passes as the inner ones."""
    model, x = seeded(build, 3, 4, WIDTH)
    scale = 2.0 if build is Doubled else 1.0
    outputs = model(x).detach()
    batch = {"x": x, "labels": targets_of(kind, outputs)}
    kfac = KFACNaturalGradient(fisher="true", kfac_policy="small_only", track_diagonal=False)
    kfac.collect_kfac_factors(model, batch, loss=LOSSES[kind][0], keep_gradient=True)
    _, g = dense(kfac, "first")
    assert relative(g, expected_g(model, kind, x, scale) / 12) < 1e-12
    _, g = dense(kfac, "second")
    expected = sum(hessian(kind, f) for f in outputs.reshape(-1, OUT)) * scale**2 / 12
    assert relative(g, expected) < 1e-12
    assert (kfac.kfac_factors["second"].method == "true_head") == (build is Mixing)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_module_of_torch_is_understood(kind, reduction):
    """Own gradient and N are those of the module's mean, whatever it reduces by."""
    likelihood, module = LOSSES[kind]
    model, x = seeded(Mixing, 3, 4, WIDTH)
    flat = nn.Sequential(model, nn.Flatten(0, 1)) if kind == "cross" else model
    labels = targets_of(kind, flat(x).detach())
    found = []
    for loss in (likelihood, module(reduction=reduction)):
        kfac = KFACNaturalGradient(damping=1e-3)
        kfac.collect_kfac_factors(flat, (x, labels), loss=loss, keep_gradient=True, verify=True)
        found.append(kfac)
    gradients = torch.autograd.grad(module()(flat(x), labels), list(flat.parameters()))
    for kfac in found:
        own = kfac.own_gradients(flat)
        for (name, _), gradient in zip(flat.named_parameters(), gradients, strict=True):
            assert relative(own[name], gradient) < 1e-12
    n = {f.n_labels for kfac in found for f in kfac.kfac_factors.values()}
    assert n == {labels.numel()}


@pytest.mark.parametrize("kind", ["squared", "binary", "cross"])
@pytest.mark.parametrize("fisher", ["true", "empirical"])
def test_one_linear_layer_is_exact(kind, fisher):
    """`(T/N) G (x) A` is the whole Fisher matrix of the mean loss where the Hessian is constant.

    Of a squared error for any number of rows; of the others for one.
    """
    rows = 5 if kind == "squared" and fisher == "true" else 1
    model, x = seeded(lambda: nn.Linear(WIDTH, OUT), rows, WIDTH)
    labels = targets_of(kind, model(x).detach())
    kfac = KFACNaturalGradient(fisher=fisher, track_diagonal=False)
    kfac.collect_kfac_factors(model, (x, labels), loss=LOSSES[kind][0])
    factors = kfac.kfac_factors[""]
    a, g = dense(kfac, "")
    found = factors.ratio * torch.kron(g, a)
    expected = torch.zeros_like(found)
    for row, label in zip(x, labels, strict=True):
        a = torch.cat([row, torch.ones(1, dtype=x.dtype)])
        jacobian = torch.kron(torch.eye(OUT, dtype=x.dtype), a[None])  # of W a, row by row of W
        f = model(row).detach().requires_grad_()
        curvature = hessian(kind, f.detach())
        if fisher == "empirical":
            summed = LOSSES[kind][1](reduction="sum")
            (score,) = torch.autograd.grad(summed(f, label), f)
            curvature = torch.outer(score, score)
        expected += jacobian.T @ curvature @ jacobian
    assert relative(found, expected / labels.numel()) < 1e-12


@pytest.mark.parametrize("kind", LOSSES)
def test_draws_have_the_hessian_as_their_second_moment(kind):
    """Every entry within five standard deviations, which would tell a wrong variance apart."""
    torch.manual_seed(0)
    f, n = torch.randn(1, 3, dtype=torch.float64), 4000
    likelihood = LOSSES[kind][0]
    draws = torch.cat(list(likelihood.drawn(f, torch.Generator().manual_seed(0), n)))
    outer = draws[:, :, None] * draws[:, None, :]
    deviation = outer.std(0) / n**0.5
    assert bool(((outer.mean(0) - hessian(kind, f[0])).abs() <= 5 * deviation + 1e-12).all())
    assert float(deviation.max()) < 0.06 * float(hessian(kind, f[0]).max())
    columns = [likelihood.root(f)(c) for c in range(3)]
    assert relative(sum(c.T @ c for c in columns), hessian(kind, f[0])) < 1e-12


class Twice(nn.Module):
    """A layer whose second call gives the outputs; its first one has a gradient as well."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(torch.tanh(self.shared(x)))


def test_a_layer_whose_second_call_gives_the_logits_is_no_head():
    model, x = seeded(Twice, 4, WIDTH)
    labels = torch.randint(WIDTH, (4,))
    kfac = KFACNaturalGradient(fisher="true", kfac_policy="small_only", track_diagonal=False)
    kfac.collect_kfac_factors(model, (x, labels), loss=CrossEntropy())
    total = torch.zeros(WIDTH, WIDTH, dtype=x.dtype)
    for s in model.shared(x).detach():
        jacobian = torch.autograd.functional.jacobian(lambda s: model.shared(torch.tanh(s)), s)
        h = hessian("cross", model.shared(torch.tanh(s)).detach())
        total += h + jacobian.T @ h @ jacobian
    assert relative(dense(kfac, "shared")[1], total / 8) < 1e-12


def test_a_head_that_was_asked_for_and_is_not_there_is_one_line():
    model, x = seeded(Doubled, 3, 4, WIDTH)
    kfac = KFACNaturalGradient(kfac_true_fisher_head=True)
    with pytest.raises(LayerError, match="no covered layer is the logits"):
        kfac.collect_kfac_factors(model, (x, torch.randint(OUT, (3, 4))), loss=CrossEntropy())


class Flattened(Mixing):
    """Sequences one under the other in the output, as a loss over classes wants them."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).reshape(-1, OUT)


def test_rows_of_one_sequence_get_passes_of_their_own_where_the_output_is_flat():
    model, x = seeded(Flattened, 3, 4, WIDTH)
    kfac = KFACNaturalGradient(fisher="true", kfac_policy="small_only", track_diagonal=False)
    labels = torch.randint(OUT, (12,))
    kfac.collect_kfac_factors(model, (x, labels), loss=nn.CrossEntropyLoss())
    assert relative(dense(kfac, "first")[1], expected_g(model, "cross", x) / 12) < 1e-12


class Channels(Mixing):
    """Classes in the second dimension, as torch's cross-entropy has them."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).movedim(-1, 1)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_torchs_cross_entropy_with_classes_second_and_labels_left_out(smoothing):
    model, x = seeded(Channels, 3, 4, WIDTH)
    labels = torch.randint(OUT, (3, 4))
    labels[0, 1] = labels[2, 3] = 7
    module = nn.CrossEntropyLoss(ignore_index=7, label_smoothing=smoothing)
    kfac = KFACNaturalGradient(damping=1e-3)
    kfac.collect_kfac_factors(model, (x, labels), loss=module, keep_gradient=True)
    assert {f.n_labels for f in kfac.kfac_factors.values()} == {10}
    gradients = torch.autograd.grad(module(model(x), labels), list(model.parameters()))
    own = kfac.own_gradients(model)
    for (name, _), gradient in zip(model.named_parameters(), gradients, strict=True):
        assert relative(own[name], gradient) < 1e-12


def test_padding_does_not_count_in_a_squared_error_of_positions():
    model, x = seeded(Mixing, 3, 4, WIDTH)

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(WIDTH, OUT)

        def forward(self, x, attention_mask=None):
            return self.net(x)

    model = Masked().double()
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [1, 0, 0, 0]])
    labels = torch.rand(3, 4, OUT, dtype=torch.float64)
    kfac = KFACNaturalGradient(damping=1e-3)
    batch = {"x": x, "attention_mask": mask, "labels": labels}
    kfac.collect_kfac_factors(model, batch, loss=SquaredError(), keep_gradient=True, verify=True)
    keep = mask.bool()
    expected = F.mse_loss(model(x)[keep], labels[keep])
    (gradient,) = torch.autograd.grad(expected, model.net.weight)
    assert relative(kfac.own_gradients(model)["net.weight"], gradient) < 1e-12
    assert kfac.kfac_factors["net"].tokens == 7
    assert kfac.kfac_factors["net"].n_labels == 14


@pytest.mark.parametrize(
    ("loss", "error"),
    [
        (nn.CrossEntropyLoss(weight=torch.ones(OUT)), "CrossEntropyLoss with weight"),
        (nn.BCEWithLogitsLoss(pos_weight=torch.ones(OUT)), "BCEWithLogitsLoss with pos_weight"),
        (nn.L1Loss(), "L1Loss; allowed: nn.CrossEntropyLoss"),
    ],
)
def test_a_module_that_is_no_likelihood_is_one_line(loss, error):
    model, x = seeded(Mixing, 3, 4, WIDTH)
    with pytest.raises(LossError, match=error):
        KFACNaturalGradient().collect_kfac_factors(model, (x, x), loss=loss)


def test_shapes_that_torch_would_broadcast_are_refused():
    model, x = seeded(lambda: nn.Linear(WIDTH, OUT), 4, WIDTH)
    with pytest.raises(BatchError, match="does not fit outputs of shape"):
        KFACNaturalGradient().collect_kfac_factors(
            model, (x, torch.zeros(4, 1, dtype=torch.float64)), loss=nn.MSELoss()
        )


def test_a_loss_of_the_callers_own_has_no_draws():
    model, x = seeded(lambda: nn.Linear(WIDTH, OUT), 4, WIDTH)
    with pytest.raises(SettingError, match="SquaredError"):
        KFACNaturalGradient(fisher="mc").collect_kfac_factors(
            model, (x, x), loss=lambda outputs, batch: outputs.square().sum(-1)
        )


@pytest.mark.parametrize("kind", ["squared", "binary"])
@pytest.mark.parametrize("columns", [1, 3])
def test_the_own_loss_of_real_valued_labels_is_measured(kind, columns):
    """Regression and labels of many classes: the own loss gives draws and expectations too."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    problem = {"squared": "regression", "binary": "multi_label_classification"}[kind]
    config = BertConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, num_labels=columns, problem_type=problem,
    )  # fmt: skip
    model = BertForSequenceClassification(config).double().eval()
    ids = torch.randint(11, (3, columns))  # as many tokens as labels
    labels = torch.rand(3, columns, dtype=torch.float64)
    mask = torch.ones_like(ids)
    mask[0, 1:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    kfac = KFACNaturalGradient(fisher="true", kfac_policy="small_only", track_diagonal=False)
    kfac.collect_kfac_factors(model, batch, keep_gradient=True)
    factors = kfac.kfac_factors["classifier"]
    f = model(input_ids=ids, attention_mask=mask).logits.detach()
    expected = sum(hessian(kind, row) for row in f) / 3
    assert relative(factors.G.to_dense(), expected) < 1e-12
    assert factors.n_labels == 3 * columns
    gradient = torch.autograd.grad(model(**batch).loss, model.classifier.weight)[0]
    assert relative(kfac.own_gradients(model)["classifier.weight"], gradient) < 1e-12
