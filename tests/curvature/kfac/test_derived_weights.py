"""A weight that is made of parameters and constants gives each parameter a layer of its own.

Of ``s = W a`` with ``W = L theta R + const`` a parameter has the pair ``(R a, L^T g)``. Every body
below keeps its own ``a`` and ``s``, and states the pairs of its parameters as a formula; the
sequences are taken one by one, without padding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fisher_lab import KFACNaturalGradient
from fisher_lab.curvature.losses import CrossEntropy
from tests.curvature.kfac.test_layers_by_use import VOCAB, WIDTH, Frame, alone, batch_of

OUT, RANK, EXPERTS, LAM = 4, 2, 3, 1e-2
Pairs = dict[str, tuple[Tensor, Tensor]]


def matrix(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) / 2)


class Body(nn.Module):
    """Keeps what its operators read and give; ``pairs`` states the formula."""

    kept: Any = ()

    def keep(self, a: Tensor, s: Tensor) -> Tensor:
        if s.requires_grad:
            s.retain_grad()
        self.kept = (*self.kept, (a.detach(), s))
        return s

    def pairs(self, a: Tensor, g: Tensor, use: int) -> Pairs:
        raise NotImplementedError


class Merged(Body):
    """``W = W0 + B A / 2``, as a parametrisation of LoRA merges it, with a bias beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Parameter(torch.randn(OUT, WIDTH), requires_grad=False)
        self.down, self.up, self.bias = matrix(RANK, WIDTH), matrix(OUT, RANK), matrix(OUT)

    def forward(self, x):
        return self.keep(x, F.linear(x, self.base + 0.5 * self.up @ self.down, self.bias))

    def pairs(self, a, g, use):
        one = torch.ones(len(a), 1, dtype=a.dtype)
        return {
            "down": (a, 0.5 * g @ self.up),
            "up": (a @ self.down.T, 0.5 * g),
            "bias": (one, g),
        }


class Between(Body):
    """``W = L (theta - 1) R`` of two constants, given as ``[in, out]``."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Buffer(torch.randn(WIDTH, 3)), nn.Buffer(torch.randn(2, OUT))
        self.middle = matrix(3, 2)

    def forward(self, x):
        return self.keep(x, x @ ((self.left @ (1.0 - self.middle)) @ self.right))

    def pairs(self, a, g, use):
        return {"middle": ((a @ self.left), -g @ self.right.T)}


class OfUnitRows(Body):
    """A weight that is divided by the lengths of its rows, which count as constants."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = matrix(OUT, WIDTH)

    def forward(self, x):
        lengths = self.weight.detach().norm(dim=1, keepdim=True)
        return self.keep(x, F.linear(x, 3 * (self.weight / lengths).t().t()))

    def pairs(self, a, g, use):
        return {"weight": (a, 3 * g / self.weight.norm(dim=1))}


class Columns(Body):
    """Words of low rank: a look-up in the transpose of a factor, times the other (PEFT's LoRA)."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up = matrix(RANK, VOCAB), matrix(WIDTH, RANK)

    def forward(self, ids):
        return self.keep(ids, F.embedding(ids, self.table.T @ self.up.T))

    def pairs(self, a, g, use):
        hot = F.one_hot(a[:, 0], VOCAB).double()
        return {"table": (hot, g @ self.up), "up": (hot @ self.table.T, g)}


class Magnitude(Body):
    """DoRA's: a scale that is divided by constants, used on two vectors, once less one."""

    def __init__(self) -> None:
        super().__init__()
        self.magnitude, self.lengths = matrix(WIDTH), nn.Buffer(torch.rand(WIDTH) + 0.5)

    def forward(self, x):
        scale = (self.magnitude / self.lengths).view(1, -1)
        return self.keep(x, (scale - 1) * x) + self.keep(x.sin(), scale * x.sin())

    def pairs(self, a, g, use):
        return {"magnitude": (torch.ones_like(a[:, :1]), a * g / self.lengths)}


class Skip(Body):
    """Mamba's: a scale and a shift of channels that lie before the positions."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = matrix(WIDTH), matrix(WIDTH)

    def forward(self, x):
        turned = x.transpose(1, 2)
        s = self.keep(turned, turned * self.scale.double()[None, :, None])
        return (s + 2 * self.shift[:, None]).transpose(1, 2)

    def pairs(self, a, g, use):
        a, g = a.transpose(-1, -2).reshape(-1, WIDTH), g.transpose(-1, -2).reshape(-1, WIDTH)
        one = torch.ones_like(a[:, :1])
        return {"scale": (one, a * g), "shift": (one, 2 * g)}


class Depthwise(Body):
    """Mamba's convolution, whose weight loses a dimension on its way to the function."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 2, groups=WIDTH, bias=False)

    def forward(self, x):
        weight, turned = self.conv.weight.squeeze(1), x.transpose(1, 2)
        s = F.conv1d(turned, weight.unsqueeze(1), None, padding=1, groups=WIDTH)
        return self.keep(turned, s)[..., : x.shape[1]].transpose(1, 2)


class Routed(Body):
    """PEFT's LoRA on a stack of experts: rows of one factor and columns of the other are each's."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Parameter(torch.randn(EXPERTS, OUT, WIDTH), requires_grad=False)
        self.down, self.up = matrix(RANK * EXPERTS, WIDTH), matrix(OUT, RANK * EXPERTS)

    def stack(self) -> Tensor:
        down = self.down.reshape(EXPERTS, -1, WIDTH)
        up = self.up.reshape(OUT, -1, EXPERTS).permute(2, 0, 1)
        return torch.baddbmm(self.base, up, down, alpha=0.5)

    def forward(self, x):
        stack, rows = self.stack(), x.reshape(-1, WIDTH)
        expert = (3 * rows[:, 0].sigmoid()).long()
        out = torch.zeros_like(rows)
        for number in range(EXPERTS):
            (mine,) = torch.where(expert == number)
            s = self.keep(rows[mine], F.linear(rows[mine], stack[number]))
            out = out.index_add(0, mine, s)
        return x + out.view_as(x)

    def pairs(self, a, g, use):
        expert = use % EXPERTS
        rows, columns = slice(expert * RANK, (expert + 1) * RANK), slice(expert, None, EXPERTS)
        down, up = self.down[rows], self.up[:, columns]
        return {
            f"down[{rows.start}:{rows.stop}]": (a, 0.5 * g @ up),
            f"up[:,{expert}:{RANK * EXPERTS}:{EXPERTS}]": (a @ down.T, 0.5 * g),
        }


class Stacked(Routed):
    """The same for experts that are stored as ``[in, out]``, in one product for all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Parameter(torch.randn(EXPERTS, WIDTH, OUT), requires_grad=False)

    def stack(self) -> Tensor:
        down = self.down.reshape(EXPERTS, -1, WIDTH).transpose(-2, -1)
        up = self.up.reshape(OUT, -1, EXPERTS).permute(2, 0, 1).transpose(-2, -1)
        return torch.baddbmm(self.base, down, up, alpha=0.5)

    def forward(self, x):
        rows = x.reshape(-1, WIDTH)
        every = torch.stack([rows, rows.sin(), rows.cos()])
        s = torch.bmm(every, self.stack())
        for number in range(EXPERTS):
            self.kept = (*self.kept, (every[number].detach(), s, number))
        if s.requires_grad:
            s.retain_grad()
        return s.mean(0).view_as(x)


class Fused(Body):
    """Rows of one product: two parameters with a constant between them."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = matrix(1, WIDTH), matrix(2, WIDTH)
        self.fixed = nn.Buffer(torch.randn(1, WIDTH))

    def forward(self, x):
        weight = torch.cat(tensors=[self.query, self.fixed, 2 * self.value])
        return self.keep(x, torch.matmul(input=x, other=weight.T))

    def pairs(self, a, g, use):
        return {"query": (a, g[:, :1]), "value": (a, 2 * g[:, 2:])}


class Beside(Body):
    """Columns of one product: what each parameter reads is a part of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.rest = matrix(OUT, 1), matrix(OUT, WIDTH - 1)

    def forward(self, x):
        return self.keep(x, F.linear(x, torch.hstack((self.first, self.rest))))

    def pairs(self, a, g, use):
        return {"first": (a[:, :1], g), "rest": (a[:, 1:], g)}


class Pieces(Body):
    """One parameter whose halves, cut by one call, are used apart."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = matrix(2 * OUT, WIDTH)

    def forward(self, x):
        first, second = self.weight.chunk(2)
        return self.keep(x, F.linear(x, first)) + self.keep(x.sin(), x.sin() @ second.T)

    def pairs(self, a, g, use):
        return {f"weight[{use * OUT}:{(use + 1) * OUT}]": (a, g)}


def words_of(body: nn.Module) -> nn.Module:
    return Frame(words=body)


BUILDS: dict[str, Callable[[], nn.Module]] = {
    "merged": lambda: Frame(Merged()),
    "between constants": lambda: Frame(Between()),
    "of unit rows": lambda: Frame(OfUnitRows()),
    "columns": lambda: words_of(Columns()),
    "magnitude": lambda: Frame(Magnitude()),
    "skip": lambda: Frame(Skip()),
    "fused": lambda: Frame(Fused()),
    "beside": lambda: Frame(Beside()),
    "pieces": lambda: Frame(Pieces()),
    "experts": lambda: Frame(Routed()),
    "experts in one product": lambda: Frame(Stacked()),
}


def model_of(name: str) -> Any:
    torch.manual_seed(3)
    return BUILDS[name]().double()


def body_of(model: nn.Module) -> tuple[str, Body]:
    return next((n, m) for n, m in model.named_modules() if isinstance(m, Body))


def passes(model: nn.Module, batch: dict[str, Tensor], fisher: str):
    """The backward passes of every sequence by itself: of its loss, or of a root of the Hessian."""
    for single in alone(batch):
        _, body = body_of(model)
        body.kept = ()
        logits = model(single["input_ids"])
        labels = single["labels"][0, 1:]
        if fisher == "empirical":
            loss = F.cross_entropy(logits[0, :-1], labels, reduction="sum")
            yield body, lambda loss=loss: loss.backward(retain_graph=True)
            continue
        p = logits.detach()[0].softmax(-1)
        for position in range(logits.shape[1] - 1):
            for c in range(VOCAB):
                signal = torch.zeros_like(logits)
                row = p[position].clone()
                row[c] -= 1
                signal[0, position] = p[position, c].sqrt() * row
                yield body, lambda s=signal, x=logits: x.backward(s, retain_graph=True)


def pairs_of(model: nn.Module, batch: dict[str, Tensor], fisher: str = "empirical") -> Pairs:
    """Of every parameter of the body the pairs of all its tokens, and of every backward pass."""
    path, _ = body_of(model)
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for body, backward in passes(model, batch, fisher):
        for _, s, *_ in body.kept:
            s.grad = None
        backward()
        for use, (a, s, *own) in enumerate(body.kept):
            g = torch.zeros_like(s) if s.grad is None else s.grad.clone()
            g = g[own[0]] if own else g
            a = a[..., None] if not a.is_floating_point() else a
            if not isinstance(body, Skip):
                a, g = a.reshape(-1, a.shape[-1]), g.reshape(-1, g.shape[-1])
            for name, (x, y) in body.pairs(a, g, own[0] if own else use).items():
                found.setdefault(f"{path}.{name}", []).append((x.detach(), y.detach()))
    return {n: tuple(torch.cat(each) for each in zip(*p, strict=True)) for n, p in found.items()}  # type: ignore[misc]


def damped(x: Tensor) -> Tensor:
    return x + LAM * torch.eye(len(x), dtype=x.dtype)


def engine(**settings) -> KFACNaturalGradient:
    return KFACNaturalGradient(
        **{"damping": LAM, "max_condition_number": None, "track_diagonal": False, **settings}
    )


def collected(model: nn.Module, batch: dict[str, Tensor], **settings) -> KFACNaturalGradient:
    kfac = engine(**settings)
    loss = CrossEntropy(shift=True)
    kfac.collect_kfac_factors(model, batch, loss=loss, keep_gradient=True, verify=True)
    return kfac


CASES = [
    (name, lengths, side)
    for name in BUILDS
    for lengths, side in (((5, 2, 4), "right"), ((3, 5), "left"), ((4, 4), "right"))
]


@pytest.mark.parametrize("policy", ["all", "small_only"])
@pytest.mark.parametrize(("name", "lengths", "side"), CASES)
def test_factors_and_gradients_are_those_of_the_formula(name, lengths, side, policy):
    model, batch = model_of(name), batch_of(lengths, side)
    if name == "experts":
        batch["input_ids"][:, -1] = batch["input_ids"][:, 0]
    kfac = collected(model, batch, kfac_policy=policy)
    assert kfac.coverage.share == 1.0, kfac.coverage.passed
    labels = sum(n - 1 for n in lengths)
    model.zero_grad()
    expected = pairs_of(model, batch)
    own = kfac.own_gradients(model)
    for parameter, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(own[parameter], p.grad / labels, rtol=1e-10, atol=1e-14)
    vectors = {n: torch.randn_like(p) for n, p in model.named_parameters() if p.requires_grad}
    result = kfac.compute_natural_gradient(vectors, model)
    by_weight = {f.layer.weight: f for f in kfac.kfac_factors.values()}
    for weight, (a, g) in expected.items():
        factors = by_weight.pop(weight, None)
        if len(g) == 0:
            assert factors is None
            continue
        assert factors is not None, weight
        assert factors.tokens == len(g)
        A, G = a.T @ a / len(a), g.T @ g / len(g)
        torch.testing.assert_close(factors.G.to_dense(), G, rtol=1e-9, atol=1e-13)
        given, found = part(vectors, weight), part(result, weight)
        given, found = (x if x.dim() == 2 else x[:, None] for x in (given, found))
        wanted = torch.linalg.solve(damped(G), given)
        if factors.A is not None:
            torch.testing.assert_close(factors.A.to_dense(), A, rtol=1e-9, atol=1e-13)
            fisher = torch.kron(damped(G), damped(A))
            wanted = torch.linalg.solve(fisher, given.flatten()).reshape(given.shape)
        turned = factors.layer.transposed
        assert not turned or name == "between constants"
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-11)
    assert set(by_weight) <= {"words.weight", "words.up", "head.weight"}


def part(named: dict[str, Tensor], weight: str) -> Tensor:
    base, _, rest = weight.partition("[")
    if not rest:
        value = named[base]
        return value.T if base.endswith("middle") else value
    numbers = [int(n) for n in rest.strip(":,]").split(":")]
    return named[base][:, slice(*numbers)] if rest[0] == ":" else named[base][slice(*numbers)]


@pytest.mark.parametrize("name", ["merged", "columns", "magnitude", "experts"])
def test_the_true_fisher_is_the_expectation_over_all_classes(name):
    model, batch = model_of(name), batch_of((4, 3), "right")
    kfac = collected(model, batch, fisher="true")
    once = {w: len(g) for w, (_, g) in pairs_of(model, batch).items()}
    for weight, (_, g) in pairs_of(model, batch, "true").items():
        factors = next(f for f in kfac.kfac_factors.values() if f.layer.weight == weight)
        assert factors.tokens == once[weight]
        expected = g.T @ g / once[weight]
        torch.testing.assert_close(factors.G.to_dense(), expected, rtol=1e-9, atol=1e-13)


class Apart(Merged):
    """The same function as :class:`Merged` with every factor in a product of its own."""

    def forward(self, x):
        base = F.linear(x, self.base) + self.bias
        return base + 0.5 * F.linear(F.linear(x, self.down), self.up)


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


def same(kfac: KFACNaturalGradient, other: KFACNaturalGradient, rename: Callable[[str], str]):
    ours = {f.layer.weight: f for f in kfac.kfac_factors.values()}
    theirs = {rename(f.layer.weight): f for f in other.kfac_factors.values()}
    assert set(ours) == set(theirs)
    for weight, one in ours.items():
        assert one.tokens == theirs[weight].tokens
        for mine, its in ((one.A, theirs[weight].A), (one.G, theirs[weight].G)):
            assert (mine is None) == (its is None)
            if mine is not None and its is not None:
                dense = its.to_dense()
                torch.testing.assert_close(mine.to_dense(), dense, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize(
    "settings",
    [
        {"fisher": "mc", "n_samples": 2},
        {"fisher": "true"},
        {"sharing": "reduce"},
        {"ekfac": True},
        {"uncovered": "diagonal"},
    ],
    ids=lambda s: "-".join(map(str, s.values())),
)
def test_a_merged_weight_is_what_its_factors_are_apart(settings):
    torch.manual_seed(3)
    merged, batch = Frame(Merged()).double(), batch_of((5, 2, 4), "left")
    apart = Frame(Apart()).double()
    apart.load_state_dict(merged.state_dict())
    kfac, other = collected(merged, batch, **settings), collected(apart, batch, **settings)
    same(kfac, other, lambda name: name)
    vectors = {n: torch.randn_like(p) for n, p in merged.named_parameters() if p.requires_grad}
    expected = other.compute_natural_gradient(vectors, apart)
    for name, value in kfac.compute_natural_gradient(vectors, merged).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-8, atol=1e-12)
    own, expected = (
        kfac.compute_natural_gradient(None, merged),
        other.compute_natural_gradient(None, apart),
    )
    for name, value in own.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["merged", "magnitude", "skip", "experts"])
def test_a_checkpoint_changes_nothing(name, reentrant):
    model, batch = model_of(name), batch_of((5, 2, 4), "right")
    kfac = collected(model, batch)
    model.body = Checkpointed(model.body, reentrant)
    other = engine()
    loss = CrossEntropy(shift=True)
    other.collect_kfac_factors(model, batch, loss=loss, keep_gradient=True)
    same(kfac, other, lambda weight: weight.replace("body.inner", "body"))


@pytest.mark.parametrize("name", ["columns", "magnitude", "experts"])
def test_factors_come_back_from_a_file(name, tmp_path):
    model, batch = model_of(name), batch_of((5, 2, 4), "right")
    kfac, other = collected(model, batch), engine()
    kfac.save(tmp_path / "factors.safetensors", model)
    other.load(tmp_path / "factors.safetensors", model)
    gradient = kfac.own_gradients(model)
    expected = kfac.compute_natural_gradient(gradient, model)
    for parameter, value in other.compute_natural_gradient(gradient, model).items():
        torch.testing.assert_close(value, expected[parameter], rtol=1e-12, atol=1e-14)


def forgetting(body: Any) -> Any:
    body.kept = ()
    return body


def test_a_depthwise_convolution_by_function_is_that_of_its_module():
    torch.manual_seed(3)
    model: Any = Frame(Depthwise()).double()
    batch = batch_of((5, 2, 4), "right")
    kfac = collected(model, batch)
    factors = kfac.kfac_factors["body.conv"]
    assert (factors.layer.kind, factors.tokens) == ("Depthwise", 11)
    moments = torch.zeros(WIDTH, 2, 2, dtype=torch.float64)
    for single in alone(batch):
        body = forgetting(model.body)
        logits = model(single["input_ids"])
        labels = single["labels"][0, 1:]
        F.cross_entropy(logits[0, :-1], labels, reduction="sum").backward()
        ((a, s),) = body.kept
        padded = F.pad(a[0], (1, 1))
        for channel in range(WIDTH):
            for t in range(a.shape[-1]):
                v = s.grad[0, channel, t] * padded[channel, t : t + 2]
                moments[channel] += torch.outer(v, v)
    dense = torch.block_diag(*(moments / 11))
    torch.testing.assert_close(factors.G.to_dense(), dense, rtol=1e-9, atol=1e-13)


class Changed(Body):
    """A tensor that is changed in place is no longer what it was made of."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = matrix(OUT, WIDTH)

    def forward(self, x):
        weight = self.weight * 2
        weight[0] = 1.0
        other = self.weight * 2
        other.mul_(3.0)
        return F.linear(x, weight) + F.linear(x, other)


class Cube(Body):
    """A weight that is no product with constants."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = matrix(OUT, WIDTH)

    def forward(self, x):
        return F.linear(x, 2 * self.weight**3)


class Length(Body):
    """A weight that is divided by a length of its own, which follows it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = matrix(OUT, WIDTH)

    def forward(self, x):
        return F.linear(x, self.weight / self.weight.norm())


class Square(Length):
    """A weight that is multiplied by itself."""

    def forward(self, x):
        return F.linear(x, self.weight * (2 * self.weight))


class Sum(Length):
    """A weight that something is added to that is made of it."""

    def forward(self, x):
        return F.linear(x, self.weight + self.weight.exp())


@pytest.mark.parametrize("body", [Changed, Cube, Length, Square, Sum])
def test_what_is_not_linear_in_a_parameter_keeps_the_gradient_of_autograd(body):
    torch.manual_seed(3)
    model: Any = Frame(body()).double()
    batch = batch_of((5, 4), "right")
    kfac = collected(model, batch)
    assert "body" not in {n.partition(".")[0] for n in kfac.kfac_factors}
    (reason,) = kfac.coverage.passed
    assert reason.startswith("its use by ")
    loss = CrossEntropy(shift=True)(model(batch["input_ids"]), batch).mean()
    (expected,) = torch.autograd.grad(loss, [model.body.weight])
    found = kfac.own_gradients(model)["body.weight"]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


class Nothing(Body):
    """Rows of several origins, of which none is taken: a chunk past the end, an idle expert."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = matrix(OUT, WIDTH)

    def forward(self, x):
        mixed = x[:, :0] + x[:, 1:1].flip(1)
        return F.linear(x, self.weight) + F.linear(mixed, self.weight).sum()


def test_no_rows_of_several_tokens_are_no_rows():
    torch.manual_seed(3)
    kfac = collected(Frame(Nothing()).double(), batch_of((5, 4), "right"))
    (name,) = (n for n in kfac.kfac_factors if n.startswith("body"))
    assert kfac.kfac_factors[name].tokens == 9


def test_names_are_sorted_by_their_numbers():
    from fisher_lab.curvature.kfac.parts import in_order

    names = ["up[10]", "up[2]", "h.11.up", "h.2.up", "up", "up[8:12]", "up[0:4]"]
    expected = ["h.2.up", "h.11.up", "up", "up[0:4]", "up[2]", "up[8:12]", "up[10]"]
    assert sorted(names, key=in_order) == expected


def test_a_use_that_makes_no_layer_is_said_to_be_one():
    """Not "not used": a function that gives several tensors, and one that is mapped over rows."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.up = nn.LSTMCell(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)

        def forward(self, x):
            state: Any = None
            for position in range(x.shape[1]):
                state = self.cell(x[:, position], state)
            return x + torch.vmap(self.up)(state[0])[:, None]

    torch.manual_seed(3)
    model: Any = Frame(Recurrent()).double()
    batch = batch_of((4, 4), "right")
    kfac = engine(exclude=["words"])
    kfac.collect_kfac_factors(model, batch, loss=CrossEntropy(shift=True))
    reasons = kfac.coverage.passed
    cell = sum(p.numel() for p in model.body.cell.parameters())
    assert reasons["its use by lstm_cell makes no layer"] == cell
    assert not any(reason.startswith("not used") for reason in reasons)
    assert kfac.coverage.share_of_reached == kfac.coverage.share


class Twice(torch.autograd.Function):
    """A function with a backward pass of its own, which its forward pass does not show."""

    @staticmethod
    def forward(ctx, weight):
        return 2 * weight

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return 3 * grad_outputs[0]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_function_with_its_own_backward_pass_is_seen_in_the_graph(checkpointed):
    class Own(Body):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.idle = matrix(WIDTH, WIDTH), matrix(3, 3)

        def forward(self, x):
            def run(x):
                return F.linear(x, Twice.apply(self.weight))

            return checkpoint(run, x, use_reentrant=False) if checkpointed else run(x)

    torch.manual_seed(3)
    model: Any = Frame(Own()).double()
    kfac = engine(exclude=["words"])
    kfac.collect_kfac_factors(model, batch_of((4, 4), "right"), loss=CrossEntropy(shift=True))
    sizes = kfac.coverage.passed
    assert sizes["its use by Twice makes no layer"] == WIDTH**2
    assert sizes["not used in the forward pass"] == 9
    assert kfac.coverage.unreached == 9


@pytest.mark.parametrize("cut", ["split", "index"])
def test_pieces_of_unlike_sizes_leave_the_whole_parameter_out(cut):
    """Two pieces of the third's length would be parts, and the third none."""

    class Unlike(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.shift = matrix(4 * OUT, WIDTH), matrix(4 * OUT)

        def forward(self, x):
            sizes = [OUT, OUT, 2 * OUT]
            w, b = self.weight, self.shift
            if cut == "split":
                ws, bs = w.split(sizes), b.split(sizes)
            else:
                at = (slice(OUT), slice(OUT, 2 * OUT), slice(2 * OUT, None))
                ws, bs = [w[i] for i in at], [b[i] for i in at]
            first, second, wide = (x @ one.T + own for one, own in zip(ws, bs, strict=True))
            return first * second + wide[..., :OUT] * wide[..., OUT:]

    torch.manual_seed(3)
    model: Any = Frame(Unlike()).double()
    batch = batch_of((5, 4), "right")
    kfac = collected(model, batch)  # verified
    assert not any(name.startswith("body") for name in kfac.kfac_factors)
    assert kfac.coverage.covered == sum(p.numel() for p in model.parameters()) - 4 * OUT * (
        WIDTH + 1
    )
    own = kfac.own_gradients(model)
    model.zero_grad()
    labels = batch["labels"][:, 1:]
    logits = model(batch["input_ids"], batch["attention_mask"])[:, :-1]
    F.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(own[name], parameter.grad, rtol=1e-10, atol=1e-14)
