"""K-FAC-reduce: one row an example, held to explicit Jacobians and to loops over the examples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fisher_lab import KFACNaturalGradient
from fisher_lab.config.errors import SettingError
from fisher_lab.curvature.errors import BatchError
from fisher_lab.curvature.kfac.examples import NO_EXAMPLE
from fisher_lab.curvature.losses import BinaryCrossEntropy, CrossEntropy, SquaredError
from tests import models
from tests.reference import relative

DOUBLE, WIDTH = torch.float64, 4
SHAPES = [(3, 5), (4, 4), (1, 6)]


def engine(**settings) -> KFACNaturalGradient:
    return KFACNaturalGradient(
        **{"damping": 1e-2, "max_condition_number": None, "sharing": "reduce", **settings}
    )


def dense(factor: Any) -> Tensor:
    return factor.to_dense()


def mask_of(shape: tuple[int, int]) -> Tensor:
    """Examples of different lengths, with padding on both sides."""
    B, S = shape
    mask = torch.ones(shape, dtype=torch.long)
    for b in range(B):
        mask[b, : b % 2] = 0
        mask[b, S - (b % 3) :] = 0
    mask[-1] = 1
    return mask


class Pooled(nn.Module):
    """A deep linear net whose output is the mean over the tokens that are there."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 3), nn.Linear(3, 2)

    def forward(self, x, attention_mask=None):
        tokens = self.second(self.first(x))
        if attention_mask is None:
            return tokens.flatten(1, -2).mean(1)
        mask = attention_mask[..., None].to(x.dtype)
        return (tokens * mask).sum(1) / mask.sum(1)


def inputs_of(batch):
    return {k: v for k, v in batch.items() if k != "labels"}


def exact_blocks(model, outputs: Tensor, n: int) -> dict[str, Tensor]:
    """`(1/N) sum J^T (2 I) J` of each layer's weight and bias together, `[out, in + 1]` by row."""
    blocks = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        rows = []
        for f in outputs.flatten():
            weight, bias = torch.autograd.grad(f, [layer.weight, layer.bias], retain_graph=True)
            rows.append(torch.cat([weight, bias[:, None]], 1).flatten())
        J = torch.stack(rows)
        blocks[name] = 2.0 * J.T @ J / n
    return blocks


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("masked", [False, True])
def test_reduce_is_exact_for_a_linear_net_that_averages_its_tokens(shape, masked):
    torch.manual_seed(0)
    model = Pooled().double()
    batch = {"x": torch.randn(*shape, WIDTH, dtype=DOUBLE)}
    batch |= {"attention_mask": mask_of(shape)} if masked else {}
    batch["labels"] = torch.rand(shape[0], 2, dtype=DOUBLE)
    blocks = exact_blocks(model, model(**inputs_of(batch)), batch["labels"].numel())
    errors = {}
    for sharing in ("reduce", "expand"):
        kfac = engine(fisher="true", kfac_policy="small_only", sharing=sharing)
        kfac.collect_kfac_factors(model, batch, loss=SquaredError())
        for name, block in blocks.items():
            factors = kfac.kfac_factors[name]
            found = factors.ratio * torch.kron(factors.G.to_dense(), dense(factors.A))
            errors[sharing, name] = relative(found, block)
            assert factors.sharing == sharing
            assert factors.tokens == (
                shape[0] if sharing == "reduce" else int(mask_of(shape).sum()) if masked
                else shape[0] * shape[1]
            )  # fmt: skip
    assert max(errors["reduce", name] for name in blocks) < 1e-12
    assert min(errors["expand", name] for name in blocks) > 1e-2


def test_expand_is_exact_for_a_linear_net_with_a_loss_for_every_token():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 3), nn.Linear(3, 2)).double()
    x = torch.randn(3, 5, WIDTH, dtype=DOUBLE)
    kfac = engine(fisher="true", kfac_policy="small_only", sharing="expand")
    labels = torch.rand(3, 5, 2, dtype=DOUBLE)
    kfac.collect_kfac_factors(model, (x, labels), loss=SquaredError())
    for name, block in exact_blocks(model, model(x), 30).items():
        factors = kfac.kfac_factors[name]
        found = factors.ratio * torch.kron(factors.G.to_dense(), dense(factors.A))
        assert relative(found, block) < 1e-12


class Block(nn.Module):
    """Everything through which a row can be followed: most models do some of it."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(7, WIDTH), nn.LayerNorm(WIDTH)
        self.cls = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.qk, self.flat = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.turned, self.twice = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.scale = nn.LayerNorm(2)
        self.up = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, input_ids, attention_mask=None):
        x = self.norm(self.words(input_ids))
        B, S, _ = x.shape
        bias = torch.zeros(B, 1, S, dtype=x.dtype)
        if attention_mask is not None:
            bias = bias.masked_fill(attention_mask[:, None] == 0, -1e9)
        heads = self.scale(self.qk(x).reshape(B, S, 2, 2).transpose(1, 2))
        mixed = torch.softmax(heads @ heads.mT + bias[:, None], -1) @ heads
        x = x + mixed.transpose(1, 2).reshape(B, S, WIDTH)
        x = x + torch.tanh(self.flat(x.reshape(-1, WIDTH))).reshape(B, S, WIDTH)
        x = x + torch.tanh(self.turned(x.transpose(0, 1))).transpose(0, 1)
        x = self.twice(torch.tanh(self.twice(x)))
        rows = x.reshape(-1, WIDTH)
        out = torch.zeros_like(rows)
        chosen = rows[:, 0] > 0
        for number, expert in enumerate(self.up):
            index = (chosen == bool(number)).nonzero()[:, 0]
            out = out.index_add(0, index, torch.tanh(expert(rows[index])))
        x = torch.cat([self.cls.expand(B, 1, WIDTH), out.reshape(B, S, WIDTH)], 1)
        x = self.head(torch.tanh(x))
        if attention_mask is not None:
            x = x * torch.cat([torch.ones(B, 1), attention_mask], 1)[..., None]
        return x.sum(1)


class Recorder:
    """Inputs and output gradients of every call of every layer, of one example alone."""

    def __init__(self, model: nn.Module) -> None:
        self.calls: dict[str, list] = {}
        self.handles = []
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.LayerNorm):
                self.handles.append(module.register_forward_hook(self._hook(name)))

    def _hook(self, name):
        def hook(module, args, output):
            entry = [args[0].detach(), None]
            self.calls.setdefault(name, []).append(entry)
            output.register_hook(lambda g: entry.__setitem__(1, g))

        return hook

    def rows(self, name: str) -> tuple[Tensor, Tensor]:
        pairs = [(a.flatten(0, -2), g.flatten(0, -2)) for a, g in self.calls[name]]
        return torch.cat([a for a, _ in pairs]), torch.cat([g for _, g in pairs])


def one_by_one(model, batch, summed_loss) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Each layer's tokens, example by example: each runs alone, without its padding."""
    found: dict[str, list] = {}
    for b in range(len(batch["input_ids"])):
        keep = batch["attention_mask"][b].bool()
        recorder = Recorder(model)
        summed_loss(
            model(batch["input_ids"][b : b + 1, keep]), batch["labels"][b : b + 1]
        ).backward()
        for handle in recorder.handles:
            handle.remove()
        for name in recorder.calls:
            found.setdefault(name, []).append(recorder.rows(name))
    return found


def block_batch(shape: tuple[int, int]) -> dict[str, Tensor]:
    labels = torch.randint(3, (shape[0],))
    ids = torch.randint(7, shape)
    return {"input_ids": ids, "attention_mask": mask_of(shape), "labels": labels}


def cross_entropy(outputs, labels):
    return nn.functional.cross_entropy(outputs, labels, reduction="sum")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("policy", ["all", "small_only"])
def test_factors_are_sums_over_examples(shape, policy):
    """Attention, several calls, flattened, transposed and gathered rows, a class token, padding."""
    torch.manual_seed(1)
    model, batch = Block().double(), block_batch(shape)
    kfac = engine(kfac_policy=policy)
    kfac.collect_kfac_factors(model, batch, loss=CrossEntropy(), keep_gradient=True, verify=True)
    assert not kfac.skipped
    for name, examples in one_by_one(model, batch, cross_entropy).items():
        factors, layer = kfac.kfac_factors[name], model.get_submodule(name)
        assert factors.tokens == len(examples)
        if isinstance(layer, nn.LayerNorm):
            rows = []
            for a, g in examples:
                x = nn.functional.layer_norm(a, a.shape[-1:], eps=layer.eps)
                rows.append(torch.cat([(g * x).sum(0), g.sum(0)]))
            V = torch.stack(rows)
            assert relative(factors.G.to_dense(), V.T @ V / len(V)) < 1e-12
            continue
        a = torch.stack([a.mean(0) for a, _ in examples])
        g = torch.stack([g.sum(0) for _, g in examples])
        if layer.bias is not None:
            a = torch.cat([a, torch.ones(len(a), 1, dtype=DOUBLE)], 1)
        assert relative(dense(factors.A), a.T @ a / len(a)) < 1e-12
        assert relative(factors.G.to_dense(), g.T @ g / len(g)) < 1e-12
    assert kfac.kfac_factors["words"].sharing == "expand"
    assert kfac.kfac_factors["words"].tokens == int(batch["attention_mask"].sum())


@pytest.mark.parametrize("policy", ["all", "small_only"])
@pytest.mark.parametrize("ekfac", [False, True])
def test_the_own_gradient_is_autograds_and_no_push_through_replaces_it(policy, ekfac):
    torch.manual_seed(1)
    model, batch = Block().double(), block_batch((3, 5))
    kfac = engine(kfac_policy=policy, ekfac=ekfac)
    kfac.collect_kfac_factors(model, batch, loss=CrossEntropy(), keep_gradient=True)
    model.zero_grad()
    (cross_entropy(model(**inputs_of(batch)), batch["labels"]) / 3).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(expected) == len(list(model.parameters()))
    own = kfac.own_gradients(model)
    for name, gradient in expected.items():
        assert relative(own[name], gradient) < 1e-12
    natural, again = (kfac.compute_natural_gradient(g, model) for g in (None, expected))
    for name in expected:
        assert relative(natural[name], again[name]) < 1e-9


def test_ekfac_has_the_moments_of_the_examples_rows():
    torch.manual_seed(1)
    model, batch = Block().double(), block_batch((4, 4))
    kfac = engine(kfac_policy="small_only", ekfac=True, damping=1e-3)
    kfac.collect_kfac_factors(model, batch, loss=CrossEntropy())
    y = torch.randn(WIDTH, WIDTH, dtype=DOUBLE)
    vectors = {"up.0.weight": y}
    found = kfac.compute_natural_gradient(vectors, model)["up.0.weight"]
    examples = one_by_one(model, batch, cross_entropy)["up.0"]
    a = torch.stack([a.mean(0) for a, _ in examples])
    g = torch.stack([g.sum(0) for _, g in examples])
    m_a, v_a = torch.linalg.eigh(a.T @ a / len(a))
    m_g, v_g = torch.linalg.eigh(g.T @ g / len(g))
    s = ((g @ v_g) ** 2).T @ ((a @ v_a) ** 2) / len(a)
    s = s + 1e-3 * m_g[:, None] + 1e-3 * m_a + 1e-6
    expected = v_g @ ((v_g.T @ y @ v_a) / s) @ v_a.T
    assert relative(found, expected) < 1e-9


class Tokens(nn.Module):
    """A loss for every token, with attention between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(WIDTH, 3), nn.Linear(3, 2)

    def between(self, s):
        return torch.tanh(torch.softmax(s @ s.mT, -1) @ s)

    def forward(self, x):
        return self.head(self.between(self.first(x)))


@pytest.mark.parametrize("loss", [CrossEntropy(), BinaryCrossEntropy()])
def test_true_fisher_of_rows_that_are_examples(loss):
    """`(1/B) sum_n sum_u J_nu^T H_nu J_nu`, J being the derivative by a shift of all tokens."""
    torch.manual_seed(2)
    model, x = Tokens().double(), torch.randn(3, 4, WIDTH, dtype=DOUBLE)
    cross = isinstance(loss, CrossEntropy)
    labels = torch.randint(2, (3, 4)) if cross else torch.rand(3, 4, 2, dtype=DOUBLE)
    kfac = engine(fisher="true", kfac_policy="small_only")
    kfac.collect_kfac_factors(model, (x, labels), loss=loss)
    first, head = torch.zeros(3, 3, dtype=DOUBLE), torch.zeros(2, 2, dtype=DOUBLE)
    for row in model.first(x).detach():
        shift = torch.zeros(3, dtype=DOUBLE)
        J = torch.autograd.functional.jacobian(
            lambda d, s=row: model.head(model.between(s + d)), shift
        )
        for u, f in enumerate(model.head(model.between(row)).detach()):
            p = torch.softmax(f, 0) if cross else torch.sigmoid(f)
            H = torch.diag(p) - torch.outer(p, p) if cross else torch.diag(p * (1 - p))
            first += J[u].T @ H @ J[u]
            head += H
    for name, expected in {"first": first, "head": head}.items():
        factors = kfac.kfac_factors[name]
        assert factors.tokens == 3
        assert relative(factors.G.to_dense(), expected / 3) < 1e-12
    assert kfac.kfac_factors["head"].method == "true_head"


class AcrossExamples(nn.Module):
    """A layer that reads the mean over the examples: its row belongs to all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.everyone, self.head = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        x = x + x.mean(1, keepdim=True)
        return self.head(torch.tanh(self.own(x) + self.everyone(x.mean(0, keepdim=True))))


def test_a_layer_whose_rows_are_of_no_single_example_is_left_out():
    torch.manual_seed(0)
    model, x = AcrossExamples().double(), torch.randn(3, 4, WIDTH, dtype=DOUBLE)
    kfac = engine()
    labels = torch.randint(WIDTH, (3, 4))
    kfac.collect_kfac_factors(model, (x, labels), loss=CrossEntropy(), keep_gradient=True)
    assert kfac.skipped == {"everyone": NO_EXAMPLE}
    assert set(kfac.kfac_factors) == {"own", "head"}
    gradient = torch.autograd.grad(cross_entropy(model(x).flatten(0, 1), labels.flatten()) / 12,
                                   model.everyone.weight)  # fmt: skip
    assert relative(kfac.own_gradients(model)["everyone.weight"], gradient[0]) < 1e-12


def test_pooled_factors_of_a_tied_weight_are_refused():
    model = models.seeded(models.gpt2, DOUBLE)
    with pytest.raises(SettingError, match="sharing=reduce"):
        engine(tied="sum").collect_kfac_factors(model, models.language_batch((3, 5)))


@pytest.mark.parametrize("build", [models.gpt2, models.bert, models.t5])
def test_reduce_of_transformers(build):
    """All layers have a row an example; the own gradient stays autograd's."""
    model = models.seeded(build, DOUBLE)
    batch = models.t5_batch((8, 5), (4, 7)) if build is models.t5 else models.language_batch((3, 5))
    kfac = engine()
    kfac.collect_kfac_factors(model, batch, keep_gradient=True, verify=True)
    assert not {n: why for n, why in kfac.skipped.items() if why == NO_EXAMPLE}
    rows = {f.tokens for f in kfac.kfac_factors.values() if f.sharing == "reduce"}
    assert rows == {len(batch["input_ids"])}


class Convolved(nn.Module):
    """Convolutions whose locations are averaged: linear in the weights, an example at a time."""

    def __init__(self, groups: int, nonlinear: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, stride=2, groups=groups)
        self.norm = nn.GroupNorm(2, 4) if nonlinear else nn.Identity()
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).mean((2, 3)))


def gradients_by_example(model, x, labels, loss_fn) -> list[dict[str, Tensor]]:
    found = []
    for one, label in zip(x, labels, strict=True):
        loss = loss_fn(model(one[None]), label[None])
        grads = torch.autograd.grad(loss, list(model.parameters()))
        found.append(dict(zip(dict(model.named_parameters()), grads, strict=True)))
    return found


@pytest.mark.parametrize("shape", [(4, 4), (5, 7)])
def test_reduce_is_exact_for_a_convolution_that_is_averaged(shape):
    torch.manual_seed(0)
    model, x = Convolved(1, False).double(), torch.randn(4, 4, *shape, dtype=DOUBLE)
    labels = torch.rand(4, 2, dtype=DOUBLE)
    kfac = engine(fisher="true", kfac_policy="small_only")
    kfac.collect_kfac_factors(model, (x, labels), loss=nn.MSELoss())
    factors, rows = kfac.kfac_factors["conv"], []
    for f in list(model(x).flatten()):
        weight, bias = torch.autograd.grad(f, list(model.conv.parameters()), retain_graph=True)
        rows.append(torch.cat([weight.flatten(1), bias[:, None]], 1).flatten())
    J = torch.stack(rows)
    found = factors.ratio * torch.kron(factors.G.to_dense(), dense(factors.A))
    assert factors.tokens == 4
    assert relative(found, 2.0 * J.T @ J / 8) < 1e-12


@pytest.mark.parametrize("groups", [2, 4])
def test_grouped_and_depthwise_convolutions_and_their_norms_have_a_row_an_example(groups):
    torch.manual_seed(0)
    model, x = Convolved(groups, True).double(), torch.randn(4, 4, 5, 5, dtype=DOUBLE)
    labels = torch.randint(2, (4,))
    kfac = engine(kfac_policy="small_only")
    kfac.collect_kfac_factors(model, (x, labels), loss=CrossEntropy(), keep_gradient=True)
    examples = gradients_by_example(model, x, labels, cross_entropy)
    assert {f.tokens for f in kfac.kfac_factors.values()} == {4}
    V = torch.stack([torch.cat([g["norm.weight"], g["norm.bias"]]) for g in examples])
    assert relative(kfac.kfac_factors["norm"].G.to_dense(), V.T @ V / 4) < 1e-12
    if groups == 4:  # exact for every channel: no product of factors stands between
        blocks = []
        for c in range(4):
            rows = [
                torch.cat([g["conv.weight"][c].flatten(), g["conv.bias"][c : c + 1]])
                for g in examples
            ]
            blocks.append(torch.stack(rows).T @ torch.stack(rows) / 4)
        dense = torch.block_diag(*blocks)
        assert relative(kfac.kfac_factors["conv"].G.to_dense(), dense) < 1e-12
        return
    for part in ("conv[0:2]", "conv[2:4]"):
        start = int(part[5])
        g = torch.stack([e["conv.bias"][start : start + 2] for e in examples])
        assert relative(kfac.kfac_factors[part].G.to_dense(), g.T @ g / 4) < 1e-12


def packed(batch: dict[str, Tensor], way: str) -> dict[str, Tensor]:
    """The sequences of a batch one after the other in one row, and who attends to whom in it."""
    mask = batch["attention_mask"].bool()
    of = (torch.arange(len(mask)) + 1)[:, None].expand(mask.shape)[mask][None]
    places = torch.arange(mask.shape[1]).expand(mask.shape)[mask][None]
    row = {name: batch[name][mask][None] for name in ("input_ids", "labels")}
    row["labels"][0, places[0] == 0] = -100
    attends = (of[:, :, None] == of[:, None, :]) & torch.ones(of.numel(), of.numel()).tril().bool()
    added = torch.zeros(attends.shape, dtype=DOUBLE).masked_fill(~attends, -1e9)
    row |= {"attention_mask": added[:, None], "position_ids": places}
    return row | ({"token_mask": of} if way == "numbered" else {})


@pytest.mark.parametrize("way", ["numbered", "blocks"])
def test_sequences_that_are_packed_into_one_row_are_examples(way):
    model = models.seeded(models.gpt2, DOUBLE)
    batch = models.language_batch((5, 3, 4), share=1.0)
    settings = {"kfac_policy": "small_only", "norm_layers": False, "uncovered": "diagonal"}
    apart, kfac = engine(**settings), engine(**settings)
    apart.collect_kfac_factors(model, batch)
    kfac.collect_kfac_factors(model, packed(batch, way), verify=True)
    assert {f.tokens for f in kfac.kfac_factors.values() if f.sharing == "reduce"} == {3}
    for name, factors in apart.kfac_factors.items():
        found = kfac.kfac_factors[name]
        assert relative(found.G.to_dense(), factors.G.to_dense()) < 1e-10
        assert relative(dense(found.A), dense(factors.A)) < 1e-10
    for name, diagonal in apart.last.diagonal.items():
        assert relative(kfac.last.diagonal[name], diagonal) < 1e-10


class SequenceFirst(nn.Module):
    """Attention along the first dimension: inputs and outputs are `[S, B, ...]`."""

    def __init__(self, pooled: bool) -> None:
        super().__init__()
        self.mixes = nn.MultiheadAttention(WIDTH, 2)
        self.head, self.pooled = nn.Linear(WIDTH, 3), pooled

    def forward(self, x):
        x = x + self.mixes(x, x, x, need_weights=False)[0]
        return self.head(torch.tanh(x.mean(0) if self.pooled else x))


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("shape", [(5, 3), (4, 4)])
def test_examples_along_the_second_dimension_are_refused_where_they_matter(shape, pooled):
    torch.manual_seed(0)
    model, x = SequenceFirst(pooled).double(), torch.randn(*shape, WIDTH, dtype=DOUBLE)
    labels = torch.randint(3, shape[1:] if pooled else shape)
    asked = [{}, {"sharing": "expand", "fisher": "true"}]
    asked += [{"sharing": "expand", "uncovered": "diagonal"}]
    for settings in asked:
        with pytest.raises(BatchError, match=r"batch: its examples lie along the second dimension"):
            engine(**settings).collect_kfac_factors(model, (x, labels), loss=CrossEntropy())
    kfac = engine(sharing="expand")
    kfac.collect_kfac_factors(model, (x, labels), loss=CrossEntropy(), verify=True)
    model.mixes.batch_first = True
    if not pooled:
        engine().collect_kfac_factors(model, (x, labels), loss=CrossEntropy(), verify=True)
