"""A layer is a use of a parameter by a linear operator, and its tokens are those of the batch.

The reference records what torch's own functions are given by replacing them for a pass over each
sequence alone, without padding. It shares nothing with the capture under test.
"""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fisher_lab import KFACNaturalGradient
from fisher_lab.curvature.errors import LayerError
from fisher_lab.curvature.losses import CrossEntropy

VOCAB, WIDTH = 11, 4


class Scaled(nn.Embedding):
    """Gemma's word embedding."""

    def forward(self, input):
        return super().forward(input) * 3.0


class Router(nn.Linear):
    """Llama 4's router, which returns a tuple."""

    def forward(self, input):  # type: ignore
        scores = super().forward(input)
        return torch.sigmoid(scores), scores


class Frame(nn.Module):
    """A causal language model of a word embedding, a part that varies, and a head."""

    def __init__(self, body: nn.Module | None = None, words: nn.Module | None = None) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCAB, WIDTH) if words is None else words
        self.body = nn.Identity() if body is None else body
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids, attention_mask=None):
        return self.head(torch.tanh(self.body(self.words(input_ids))))


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.up = Router(WIDTH, 2), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        weights, _ = self.router(x)
        return self.up(x) * weights.sum(-1, keepdim=True)


class Tied(nn.Module):
    """The word embedding's weight as a head, without a module for it."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCAB, WIDTH)
        self.up = nn.Linear(WIDTH, WIDTH)

    def forward(self, input_ids, attention_mask=None):
        return F.linear(torch.tanh(self.up(self.words(input_ids))), self.words.weight)


class LowRank(nn.Module):
    """DoRA: the adapter is also called with a unit matrix, to find the norm of a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.a = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2, bias=False)
        self.b, self.length = nn.Linear(2, WIDTH, bias=False), nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        delta = self.b(self.a(torch.eye(WIDTH, dtype=x.dtype))).T
        norm = (self.base.weight + delta).norm(dim=1).detach()
        return (self.base(x) + self.b(self.a(x))) * (self.length / norm)


class Heads(nn.Module):
    """Queries with a norm for each head, ``[B, H, S, d]``, and attention over the past."""

    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.out = nn.Linear(WIDTH, heads * 3), nn.Linear(heads * 3, WIDTH)
        self.norm = nn.LayerNorm(3)

    def forward(self, x):
        b, s, _ = x.shape
        q = self.norm(self.q(x).view(b, s, self.heads, 3).transpose(1, 2))
        scores = q @ q.transpose(-1, -2)
        past = torch.ones(s, s, dtype=torch.bool).tril()
        mixed = scores.masked_fill(~past, -torch.inf).softmax(-1) @ q
        return self.out(mixed.transpose(1, 2).reshape(b, s, -1))


class Experts(nn.Module):
    """Mixtral's: a stack of matrices, each for the tokens that were sent to it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 3, bias=False)
        self.up = nn.Parameter(torch.randn(3, 5, WIDTH) / 2)
        self.down = nn.Parameter(torch.randn(3, 5, WIDTH) / 2)

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        weights = self.gate(flat).softmax(-1)
        out = torch.zeros_like(flat)
        for expert in range(3):
            (rows,) = torch.where(weights.argmax(-1) == expert)
            hidden = torch.tanh(F.linear(flat[rows], self.up[expert])) @ self.down[expert]
            out.index_add_(0, rows, hidden * weights[rows, expert, None])
        return x + out.view_as(x)


class Grouped(nn.Module):
    """All experts in one operator: rows sorted by expert."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 3, bias=False)
        self.up = nn.Parameter(torch.randn(3, WIDTH, WIDTH) / 2)

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        weights = self.gate(flat).softmax(-1)
        expert = weights.argmax(-1)
        order = expert.argsort(stable=True)
        ends = torch.bincount(expert, minlength=3).cumsum(0).tolist()
        starts = [0, *ends[:-1]]
        most = max(e - s for s, e in zip(starts, ends, strict=True))
        parts = [
            F.pad(flat[order][s:e], (0, 0, 0, most - (e - s)))
            for s, e in zip(starts, ends, strict=True)
        ]
        out = torch.bmm(torch.stack(parts), self.up)
        back = torch.cat(
            [out[i, : e - s] for i, (s, e) in enumerate(zip(starts, ends, strict=True))]
        )
        return x + back[order.argsort()].view_as(x) * weights.amax(-1).view(*x.shape[:2], 1)


class Matrix(nn.Module):
    """A parameter that no module of torch's holds, stored as ``[in, out]``."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x):
        return torch.tanh(x @ self.matrix)


class Added(nn.Module):
    """RoCBert's input: what a linear layer gives is a view, and is added to in place."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        y = self.up(x)
        y += 0.5 * x
        return y


class BiasedExperts(nn.Module):
    """GPT-OSS: rows of a table of biases are added to the products of a stack."""

    def __init__(self, function: bool = False) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(2, WIDTH, WIDTH))
        self.shift, self.function = nn.Parameter(torch.randn(2, WIDTH)), function

    def forward(self, x):
        first = x[..., 0] > 0
        out = torch.zeros_like(x)
        for expert, chosen in enumerate((first, ~first)):
            weight, bias = self.up[expert], self.shift[expert]
            y = F.linear(x[chosen], weight, bias) if self.function else x[chosen] @ weight + bias
            out[chosen] = y
        return out


class Sorted(BiasedExperts):
    """The same with a look-up of each row's bias."""

    def forward(self, x):
        chosen = (x[..., 0] > 0).long()
        y = torch.where(chosen[..., None] > 0, x @ self.up[1], x @ self.up[0])
        return y + self.shift[chosen]


class ByHand(nn.Module):
    """A norm layer that is written out."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(WIDTH))

    def forward(self, x):
        return self.scale * (x - x.mean(-1, keepdim=True)) + self.shift


class ByHeads(nn.Module):
    """XLNet's projections: products by ``einsum`` with weights that keep heads apart."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(WIDTH, 2, 3)) for _ in range(2))

    def forward(self, x):
        heads = torch.tanh(torch.einsum("bih,hnd->bind", x, self.up)).transpose(0, 1)
        return torch.einsum("ibnd,hnd->ibh", heads, self.down).transpose(0, 1)


class Buffered(nn.Module):
    """Experts with a capacity: rows are copied into a buffer with room for more."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        buffer = rows.new_zeros(2 * len(rows), x.shape[-1])
        places = 2 * torch.arange(len(rows)) + 1
        buffer = buffer.index_copy(0, places, rows)
        return self.up(buffer)[places].reshape(x.shape)


class OwnToken(nn.Module):
    """A class token that is written into the first place of a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.up = nn.Parameter(torch.randn(WIDTH)), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        whole = x.new_zeros(len(x), x.shape[1] + 1, x.shape[2])
        whole[:, 0] = self.own
        whole[:, 1:] = x
        y = self.up(whole)
        return y[:, 1:] + y[:, :1]


class RmsPlusOne(nn.Module):
    """Gemma's norm: the scale is ``1 + w``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH) / 2)

    def forward(self, x):
        return (
            x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1.0 + self.weight.double())
        )


class ScaleAndShift(nn.Module):
    """DeBERTa's norm, which adds its bias by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(WIDTH))

    def forward(self, x):
        return self.weight * (x - x.mean(-1, keepdim=True)) + self.bias


class TimeShift(nn.Module):
    """RWKV's: every token's vector is mixed with that of the one before it."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.up = nn.ZeroPad2d((0, 0, 1, -1)), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return torch.tanh(self.up(0.3 * x + 0.7 * self.shift(x)))


class Summary(nn.Module):
    """A query of the model's own looks at what each token has: its result is the token's."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.up = nn.Parameter(torch.randn(WIDTH)), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        both = torch.stack([x, x.square()], dim=2)
        query = self.query.view(1, WIDTH).expand(*x.shape[:2], 1, WIDTH)
        mixed = F.scaled_dot_product_attention(query, both, both)
        return torch.tanh(self.up(mixed.unbind(2)[0]))


class Scan(nn.Module):
    """A recurrence that takes the positions one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        state, found = torch.zeros_like(x[:, 0]), []
        for position in range(x.shape[1]):
            state = torch.tanh(self.up(x[:, position]) + 0.5 * state)
            found.append(state)
        return torch.stack(found, dim=1)


class Joined(nn.Module):
    """MobileBERT's head: the word embedding's weight beside another matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCAB, WIDTH)
        self.up = nn.Linear(WIDTH, WIDTH + 2)
        self.more = nn.Parameter(torch.randn(2, VOCAB))

    def forward(self, input_ids, attention_mask=None):
        head = torch.cat([self.words.weight.t(), self.more])
        return torch.tanh(self.up(self.words(input_ids))) @ head


def hooked() -> nn.Module:
    linear = nn.Linear(WIDTH, WIDTH)
    linear.register_forward_hook(lambda _module, _args, output: output * 2.0)  # type: ignore
    return linear


BUILDS: dict[str, Callable[[], nn.Module]] = {
    "scaled words": lambda: Frame(words=Scaled(VOCAB, WIDTH)),
    "a router's tuple": lambda: Frame(Routed()),
    "head by function": Tied,
    "called with a constant": lambda: Frame(LowRank()),
    "heads": lambda: Frame(Heads()),
    "as many heads as positions": lambda: Frame(Heads(5)),
    "experts": lambda: Frame(Experts()),
    "experts in one product": lambda: Frame(Grouped()),
    "a bare parameter": lambda: Frame(Matrix()),
    "biases of experts": lambda: Frame(BiasedExperts()),
    "biases of experts by function": lambda: Frame(BiasedExperts(function=True)),
    "a look-up of biases": lambda: Frame(Sorted()),
    "a norm by hand": lambda: Frame(ByHand()),
    "added to in place": lambda: Frame(Added()),
    "a scale of one plus w": lambda: Frame(RmsPlusOne()),
    "a norm that adds its bias itself": lambda: Frame(ScaleAndShift()),
    "shifted in time": lambda: Frame(TimeShift()),
    "joined with another matrix": Joined,
    "one by one in time": lambda: Frame(Scan()),
    "looked at by a query of its own": lambda: Frame(Summary()),
    "rescaled by a hook": lambda: Frame(hooked()),
    "padding_idx": lambda: Frame(words=nn.Embedding(VOCAB, WIDTH, padding_idx=2)),
}
LENGTHS = {"rows as positions": (5, 2, 4, 3, 1), "two rows": (3, 5)}


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    return BUILDS[name]().double()


def batch_of(lengths: tuple[int, ...], side: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, n in enumerate(lengths):
        mask[row, :n] = 1
    mask = mask if side == "right" else mask.flip(1)
    ids = torch.randint(1, VOCAB, mask.shape, generator=generator) * mask
    counts = mask * mask.roll(1, 1)
    counts[:, 0] = 0  # nothing predicts the first token
    labels = torch.where(counts > 0, ids, torch.full_like(ids, -100))
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def alone(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    masks = batch["attention_mask"].bool()
    return [{k: v[row][m][None] for k, v in batch.items()} for row, m in enumerate(masks)]


class Recorder:
    """What ``F.linear``, ``@``, ``bmm`` and ``F.embedding`` are given, and the gradients of it."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def wrap(self, function: Callable[..., Tensor], weight: int, a: int) -> Callable[..., Tensor]:
        def recorded(*args, **kwargs):
            out = function(*args, **kwargs)
            if out.requires_grad:
                out.retain_grad()
                self.seen.append((args[weight], args[a].detach(), out))
            return out

        return recorded


def recorded_pass(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Recorder]:
    recorder = Recorder()
    linear, embedding = recorder.wrap(F.linear, 1, 0), recorder.wrap(F.embedding, 1, 0)
    product, stacked = recorder.wrap(Tensor.__matmul__, 1, 0), recorder.wrap(torch.bmm, 1, 0)
    with (
        mock.patch.object(F, "linear", linear),
        mock.patch.object(F, "embedding", embedding),
        mock.patch.object(Tensor, "__matmul__", product),
        mock.patch.object(torch, "bmm", stacked),
    ):
        logits = model(batch["input_ids"])
    labels = batch["labels"][:, 1:].reshape(-1)
    loss = F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), labels, reduction="sum")
    return loss, recorder


def summed_gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    for single in alone(batch):
        recorded_pass(model, single)[0].backward()
    return {
        n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()
    }


def tokens_of(
    model: nn.Module, batch: dict[str, Tensor], weight: str, looked_up: bool
) -> tuple[Tensor, Tensor]:
    """Every token's ``a`` and ``g`` of a weight, as a table or as a matrix."""
    name, _, part = weight.partition("[")
    parameter = dict(model.named_parameters())[name]
    wanted = parameter if not part else parameter[int(part[:-1])]
    a, g = [], []
    for single in alone(batch):
        loss, recorder = recorded_pass(model, single)
        loss.backward()
        for used, inputs, out in recorder.seen:
            same = used.data_ptr() == wanted.data_ptr() and used.numel() == wanted.numel()
            stacked = used.data_ptr() == parameter.data_ptr() and used.dim() == 3 and part
            head = isinstance(model, Joined) and used.shape == (WIDTH + 2, VOCAB)
            if head and name in ("words.weight", "more"):
                rows = slice(None, WIDTH) if name == "words.weight" else slice(WIDTH, None)
                inputs, same = inputs[..., rows], True
            constant = inputs.shape == (WIDTH, WIDTH) and torch.equal(
                inputs, torch.eye(WIDTH).double()
            )
            if (not same and not stacked) or out.grad is None or constant:
                continue
            if inputs.is_floating_point() is looked_up:
                continue
            pick = int(part[:-1]) if stacked else slice(None)
            inputs, grad = inputs[pick], out.grad[pick]
            a.append(inputs.reshape(-1) if looked_up else inputs.reshape(-1, inputs.shape[-1]))
            g.append(grad.reshape(-1, grad.shape[-1]))
    return torch.cat(a), torch.cat(g)


# The test's own attention and shift do not look at the mask: padding has to lie after the tokens.
CASES = [
    (name, side)
    for name in BUILDS
    for side in ("right", "left")
    if side == "right" or not ("heads" in name or "time" in name)
]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("name", "side"), CASES)
def test_factors_and_own_gradient_are_those_of_each_sequence_alone(name, lengths, side):
    model, batch = model_of(name), batch_of(LENGTHS[lengths], side)
    kfac = KFACNaturalGradient(damping=1e-3, track_diagonal=False)
    loss = CrossEntropy(shift=True)
    kfac.collect_kfac_factors(model, batch, loss=loss, keep_gradient=True, verify=True)
    labels = sum(max(int(m.sum()) - 1, 0) for m in batch["attention_mask"])
    own = kfac.own_gradients(model)
    checked = 0
    for parameter, total in summed_gradients(model, batch).items():
        torch.testing.assert_close(own[parameter], total / labels, rtol=1e-10, atol=1e-14)
    for factors in kfac.kfac_factors.values():
        layer = factors.layer
        if factors.A is None or layer.weight == "body.shift":
            continue
        a, g = tokens_of(model, batch, layer.weight, layer.kind == "Embedding")
        if layer.kind == "Embedding":
            keep = a != 2 if name == "padding_idx" else torch.ones_like(a, dtype=torch.bool)
            a, g = F.one_hot(a[keep], VOCAB).double(), g[keep]
        if "one product" in name and "[" in layer.weight:
            a, g = a[(a != 0).any(1)], g[(a != 0).any(1)]  # the test pads its groups
        if layer.augmented:
            a = torch.cat([a, torch.ones(len(a), 1)], dim=1)
        assert factors.tokens == len(g), layer.name
        torch.testing.assert_close(factors.A.to_dense(), a.T @ a / len(a), rtol=1e-9, atol=1e-13)
        torch.testing.assert_close(factors.G.to_dense(), g.T @ g / len(g), rtol=1e-9, atol=1e-13)
        checked += 1
    assert checked >= 2
    result = kfac.compute_natural_gradient(own, model)
    assert {n: r.shape for n, r in result.items()} == {n: p.shape for n, p in own.items()}


def bias_of_the_body(model: nn.Module) -> str:
    return next(n for n, _ in model.named_parameters() if n in ("body.shift", "body.bias"))


@pytest.mark.parametrize(
    "body",
    [BiasedExperts, ByHand, lambda: nn.Linear(WIDTH, WIDTH), lambda: nn.LayerNorm(WIDTH)],
    ids=["experts", "norm by hand", "linear", "norm"],
)
def test_a_bias_by_itself_is_a_layer_of_its_gradients(body):
    torch.manual_seed(0)
    model, batch = Frame(body()).double(), batch_of((5, 2, 4), "left")
    name = bias_of_the_body(model)
    for other, parameter in model.named_parameters():
        parameter.requires_grad = other == name
    kfac = KFACNaturalGradient(damping=1e-2, track_diagonal=False)
    loss = CrossEntropy(shift=True)
    kfac.collect_kfac_factors(model, batch, loss=loss, keep_gradient=True, verify=True)
    assert kfac.coverage.share == 1.0
    moments = []
    for single in alone(batch):
        for position in range(single["input_ids"].shape[1]):
            moments.append(gradient_at(model, name, single, position))
    given = dict(model.named_parameters())[name].detach()
    result = kfac.compute_natural_gradient({name: given}, model)[name]
    rows = torch.stack(moments).reshape(len(moments), -1, WIDTH)
    expected = torch.zeros_like(given).reshape(-1, WIDTH)
    for part in range(rows.shape[1]):
        own = rows[:, part][rows[:, part].abs().sum(-1) > 0]
        block = own.T @ own / tokens_of_part(model, batch, part, rows.shape[1])
        damped = block + 1e-2 * torch.eye(WIDTH).double()
        expected[part] = torch.linalg.solve(damped, given.reshape(-1, WIDTH)[part])
    torch.testing.assert_close(result, expected.reshape(given.shape), rtol=1e-8, atol=1e-12)


def gradient_at(model: nn.Module, name: str, single: dict[str, Tensor], position: int) -> Tensor:
    """The gradient of a bias that is another parameter at every position, at one of them."""
    words = model.words(single["input_ids"])  # type: ignore
    parameters = {n.removeprefix("body."): p for n, p in model.named_parameters() if "body." in n}
    short, length = name.removeprefix("body."), words.shape[1]
    here = parameters[short].detach().clone().requires_grad_()
    rows = []
    for t in range(length):
        given = {**parameters, short: here if t == position else parameters[short].detach()}
        read = (words[:, t : t + 1],)
        rows.append(torch.func.functional_call(model.body, given, read))  # type: ignore
    logits = model.head(torch.tanh(torch.cat(rows, dim=1)))  # type: ignore
    labels = single["labels"][:, 1:].reshape(-1)
    loss = F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), labels, reduction="sum")
    return torch.autograd.grad(loss, here)[0]


def tokens_of_part(model: nn.Module, batch: dict[str, Tensor], part: int, parts: int) -> int:
    rows = torch.cat([model.words(s["input_ids"])[0] for s in alone(batch)])  # type: ignore
    return len(rows) if parts == 1 else int(((rows[:, 0] > 0) == (part == 0)).sum())


@pytest.mark.parametrize("settings", [{}, {"kfac_policy": "small_only"}, {"ekfac": True}])
@pytest.mark.parametrize("name", ["experts", "experts in one product", "biases of experts"])
def test_pooled_experts_share_the_factors_of_all_their_tokens(name, settings):
    model, batch, lam = model_of(name), batch_of((5, 2, 4, 4), "left"), 1e-2
    settings = {"damping": lam, "max_condition_number": None, "track_diagonal": False, **settings}
    kfac = KFACNaturalGradient(experts="pooled", **settings)
    each = KFACNaturalGradient(experts="each", **{**settings, "ekfac": False})
    for engine in (kfac, each):
        loss = CrossEntropy(shift=True)
        engine.collect_kfac_factors(model, batch, loss=loss, keep_gradient=True, verify=True)
    own, result = kfac.own_gradients(model), kfac.compute_natural_gradient(None, model)
    stacks = {n for n, p in model.named_parameters() if p.dim() == 3 or n == "body.shift"}
    for stack in stacks:
        parts = [f for f in each.kfac_factors.values() if f.layer.weight.startswith(f"{stack}[")]
        assert len(parts) > 1
        tokens = sum(f.tokens for f in parts)
        common = sum(f.G.to_dense() * f.tokens for f in parts) / tokens
        read = [f.A.to_dense() * f.tokens for f in parts if f.A is not None]
        shared = sum(read) / tokens if read else torch.eye(1).double() * (1 - lam)
        for f in parts:
            mine = kfac.kfac_factors[f.layer.name]
            assert mine.tokens == f.tokens
            assert not mine.push
            torch.testing.assert_close(mine.G.to_dense(), common, rtol=1e-9, atol=1e-13)
            number = int(f.layer.weight.partition("[")[2][:-1])
            given = f.layer.to_matrix({f.layer.weight: own[stack][number]}, torch.float64)
            found = f.layer.to_matrix({f.layer.weight: result[stack][number]}, torch.float64)
            (m_g, v_g), (m_a, v_a) = torch.linalg.eigh(common), torch.linalg.eigh(shared)
            values = (m_g[:, None] + lam) * (m_a + lam)
            if mine.tokens_g is not None:  # the moments in the common basis are its own tokens'
                assert mine.a is not None
                products = (mine.tokens_g @ v_g).square().T @ (mine.a @ v_a).square()
                values += products / f.tokens - m_g[:, None] * m_a
            expected = v_g @ (v_g.T @ given @ v_a / values) @ v_a.T
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("kind", ["UMT5ForTokenClassification", "BartForSequenceClassification"])
def test_an_encoder_alone_and_a_decoder_of_the_same_words_have_the_mask_of_the_words(kind):
    small = {"vocab_size": 53, "d_model": 16, "num_labels": 3}
    sizes = {"d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
    sides = ("encoder", "decoder")
    sizes |= {f"{s}_{k}": n for s in sides for k, n in (("layers", 1), ("attention_heads", 2))}
    cls = getattr(transformers, kind)
    model = cls(cls.config_class(**small, **sizes, dropout=0.0)).double().eval()
    batch = batch_of((4, 3, 2), "right")
    batch["input_ids"] = (batch["input_ids"] + 3) * batch["attention_mask"]
    batch["input_ids"][:, 0] = 5
    ends = torch.arange(4) == batch["attention_mask"].sum(1, keepdim=True) - 1
    batch["input_ids"] = batch["input_ids"].masked_fill(ends, model.config.eos_token_id)
    tags = torch.where(batch["attention_mask"] > 0, batch["input_ids"] % 3, -100)
    batch["labels"] = tags if "Token" in kind else torch.tensor([0, 1, 2])
    kfac = KFACNaturalGradient(track_diagonal=False)
    kfac.collect_kfac_factors(model, batch, verify=True)
    inside = {f.tokens for name, f in kfac.kfac_factors.items() if ".0." in name}
    assert inside == {9}


class WithPictures(nn.Module):
    """A text beside pictures, whose patches are as many as the words."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.patches = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids, pixel_values, attention_mask=None, pixel_attention_mask=None):
        seen = self.patches(pixel_values)
        if pixel_attention_mask is not None:
            seen = seen * pixel_attention_mask.reshape(len(seen), -1, 1)
        return self.head(torch.tanh(self.words(input_ids) + seen.sum(1, keepdim=True)))


@pytest.mark.parametrize(
    ("mask", "tokens"),
    [(None, 10), (torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]]), 6), ("square", None)],
    ids=["no mask", "a mask of patches", "a mask of another shape"],
)
def test_pictures_beside_a_text_have_a_mask_of_their_own(mask, tokens):
    torch.manual_seed(0)
    model, batch = WithPictures().double(), batch_of((5, 2), "right")
    batch["pixel_values"] = torch.randn(2, 5, WIDTH).double()
    if mask == "square":
        mask = torch.ones(2, 5, 1).long()
        mask[0, 3:] = 0
    if mask is not None:
        batch["pixel_attention_mask"] = mask
    kfac = KFACNaturalGradient(track_diagonal=False)
    kfac.collect_kfac_factors(model, batch, loss=CrossEntropy(shift=True), verify=True)
    assert kfac.kfac_factors["head"].tokens == 7
    if tokens is None:
        assert "cannot be told" in kfac.skipped["patches"]
    else:
        assert kfac.kfac_factors["patches"].tokens == tokens


@pytest.mark.parametrize("settings", [{}, {"kfac_policy": "small_only"}, {"ekfac": True}])
def test_products_by_einsum_are_those_of_linear_layers(settings):
    torch.manual_seed(0)
    model, batch = Frame(ByHeads()).double(), batch_of((5, 2, 4), "left")
    up, down = nn.Linear(WIDTH, 6, bias=False), nn.Linear(6, WIDTH, bias=False)
    other = Frame(nn.Sequential(up, nn.Tanh(), down)).double()
    other.words, other.head = model.words, model.head
    stacks = model.body.up.flatten(1), model.body.down.flatten(1)  # type: ignore
    up.weight.data, down.weight.data = stacks[0].T, stacks[1]
    found = []
    for one in (model, other):
        kfac = KFACNaturalGradient(damping=1e-2, track_diagonal=False, **settings)
        loss = CrossEntropy(shift=True)
        kfac.collect_kfac_factors(one, batch, loss=loss, keep_gradient=True, verify=True)
        assert kfac.coverage.share == 1.0
        found.append(kfac.compute_natural_gradient(None, one))
    here, there = found
    pairs = [("body.up", there["body.0.weight"].T), ("body.down", there["body.2.weight"])]
    for name, expected in pairs:
        assert here[name].shape == (WIDTH, 2, 3)
        torch.testing.assert_close(here[name].flatten(1), expected, rtol=1e-9, atol=1e-13)


def test_an_index_into_a_table_is_a_look_up():
    torch.manual_seed(0)
    model, batch = Frame(Sorted()).double(), batch_of((5, 2, 4), "left")
    kfac = KFACNaturalGradient(track_diagonal=False)
    kfac.collect_kfac_factors(model, batch, loss=CrossEntropy(shift=True))
    factors = kfac.kfac_factors["body.shift (Embedding)"]
    counts = torch.tensor([tokens_of_part(model, batch, 1 - n, 2) for n in range(2)]).double()
    assert factors.A is not None
    torch.testing.assert_close(factors.A.to_dense(), torch.diag(counts / counts.sum()))
    assert factors.tokens == 11


def test_a_row_of_a_matrix_that_is_used_as_a_whole_too_is_no_layer():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(WIDTH, WIDTH, bias=False)

        def forward(self, x):
            return self.up(x) + self.up.weight[1]

    model, batch = Frame(Both()).double(), batch_of((5, 2), "right")
    kfac = KFACNaturalGradient(track_diagonal=False)
    loss = CrossEntropy(shift=True)
    kfac.collect_kfac_factors(model, batch, loss=loss, keep_gradient=True, verify=True)
    assert kfac.kfac_factors["body.up"].layer.tied
    assert "used in another way" in kfac.skipped["body.up[1]"]
    own = kfac.own_gradients(model)
    for name, total in summed_gradients(model, batch).items():
        torch.testing.assert_close(own[name], total / 5, rtol=1e-10, atol=1e-14)


def test_a_bias_that_two_layers_add_is_left_out():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            self.two.bias = self.one.bias

        def forward(self, x):
            return self.two(torch.tanh(self.one(x)))

    model, batch = Frame(Both()).double(), batch_of((5, 2), "right")
    kfac = KFACNaturalGradient(track_diagonal=False)
    kfac.collect_kfac_factors(
        model, batch, loss=CrossEntropy(shift=True), keep_gradient=True, verify=True
    )
    assert {"body.one", "body.two"} <= set(kfac.kfac_factors)
    assert kfac.coverage.passed == {"a bias that several layers add": WIDTH}
    own = kfac.own_gradients(model)
    labels = sum(n - 1 for n in (5, 2))
    for name, total in summed_gradients(model, batch).items():
        torch.testing.assert_close(own[name], total / labels, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("lengths", [(5, 5), (5, 2)], ids=["full", "padded"])
@pytest.mark.parametrize(
    ("body", "extra"), [(Buffered, 0), (OwnToken, 2)], ids=["capacity", "class token"]
)
def test_places_of_a_buffer_count_by_what_is_written_to_them(body, extra, lengths):
    torch.manual_seed(0)
    model, batch = Frame(body()).double(), batch_of(lengths, "right")
    kfac = KFACNaturalGradient(track_diagonal=False)
    kfac.collect_kfac_factors(model, batch, loss=CrossEntropy(shift=True), verify=True)
    assert kfac.kfac_factors["body.up"].tokens == sum(lengths) + extra


def test_the_parts_of_a_stack_are_layers_of_their_own():
    model, batch = model_of("experts"), batch_of((5, 4), "right")
    kfac = KFACNaturalGradient(damping=1e-2, track_diagonal=False)
    kfac.collect_kfac_factors(model, batch, loss=CrossEntropy(shift=True), keep_gradient=True)
    used = [name for name in kfac.kfac_factors if name.startswith("body.up")]
    assert used
    gradient = kfac.own_gradients(model)
    result = kfac.compute_natural_gradient(gradient, model)["body.up"]
    for expert in range(3):
        name = f"body.up[{expert}]"
        given = gradient["body.up"][expert]
        if name not in used:
            assert torch.equal(result[expert], given)
            continue
        factors = kfac.kfac_factors[name]
        eye_g, eye_a = torch.eye(5).double() * 1e-2, torch.eye(WIDTH).double() * 1e-2
        left = torch.linalg.solve(factors.G.to_dense() + eye_g, given)
        expected = torch.linalg.solve(factors.A.to_dense() + eye_a, left.T).T  # type: ignore
        torch.testing.assert_close(result[expert], expected, rtol=1e-9, atol=1e-13)


def test_a_layer_that_is_never_used_is_left_out_with_its_reason():
    model, batch = Frame().double(), batch_of((5, 4), "right")
    model.unused = nn.Linear(2, 2).double()
    kfac = KFACNaturalGradient(damping=1e-3)
    kfac.collect_kfac_factors(model, batch, loss=CrossEntropy(shift=True))
    assert kfac.skipped["unused"] == "not used in the forward pass"
    named = KFACNaturalGradient(damping=1e-3, include=["head", "unused"])
    with pytest.raises(LayerError, match=r"include: unused: not used in the forward pass"):
        named.collect_kfac_factors(model, batch, loss=CrossEntropy(shift=True))


def test_a_frozen_bias_has_no_part_in_the_factors():
    model, batch = Frame().double(), batch_of((5, 4), "right")
    model.head.bias.requires_grad_(False)
    kfac = KFACNaturalGradient(damping=1e-3, track_diagonal=False)
    kfac.collect_kfac_factors(model, batch, loss=CrossEntropy(shift=True), keep_gradient=True)
    factors = kfac.kfac_factors["head"]
    assert factors.A is not None
    assert factors.A.to_dense().shape == (WIDTH, WIDTH)
    assert "head.bias" not in kfac.compute_natural_gradient(None, model)


def test_rows_that_an_operation_hides_are_left_out_where_there_is_padding():
    class Shuffled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            hidden = torch.fft.ifft(torch.fft.fft(x, dim=1), dim=1).real.cumsum(1)
            return x + self.up(torch.sort(hidden, dim=1).values).mean(1, keepdim=True)

    model = Frame(Shuffled()).double()
    kfac = KFACNaturalGradient(damping=1e-3, track_diagonal=False)
    padded = batch_of((5, 4), "right")
    kfac.collect_kfac_factors(model, padded, loss=CrossEntropy(shift=True), keep_gradient=True)
    assert kfac.skipped["body.up"] == "which of its rows are padding cannot be told"
    loss = CrossEntropy(shift=True)
    masked = padded["labels"].masked_fill(padded["attention_mask"] == 0, -100)
    mean = loss(model(padded["input_ids"]), {"labels": masked}).mean()
    (expected,) = torch.autograd.grad(mean, [model.body.up.weight])  # type: ignore
    torch.testing.assert_close(kfac.own_gradients(model)["body.up.weight"], expected)
    kfac.collect_kfac_factors(model, batch_of((5, 5), "right"), loss=loss)
    assert kfac.kfac_factors["body.up"].tokens == 10


class Double(torch.autograd.Function):
    """``x W``, whose use of ``W`` no function of torch's shows."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx, grad):  # type: ignore
        x, weight = ctx.saved_tensors
        return grad @ weight.T, (x.transpose(-1, -2) @ grad).sum(0)


def test_verify_names_a_weight_with_a_use_that_nobody_sees():
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return self.up(x) + Double.apply(x, self.up.weight)

    model, batch = Frame(Hidden()).double(), batch_of((5, 4), "right")
    loss = CrossEntropy(shift=True)
    kfac = KFACNaturalGradient(damping=1e-3, track_diagonal=False)
    with pytest.raises(LayerError, match=r"verify: .*body\.up\.weight \(off by [\d.]+%\)"):
        kfac.collect_kfac_factors(model, batch, loss=loss, verify=True)
    assert not kfac.kfac_factors
    other = KFACNaturalGradient(damping=1e-3, exclude=["body.up"], track_diagonal=False)
    other.collect_kfac_factors(model, batch, loss=loss, verify=True)
    assert set(other.kfac_factors) == {"words", "head"}


def test_verify_refuses_padding_that_reaches_the_loss():
    class Pooled(nn.Module):
        def forward(self, x):
            return x + x.mean(dim=1, keepdim=True)

    model, batch = Frame(Pooled()).double(), batch_of((5, 2), "right")
    kfac = KFACNaturalGradient(damping=1e-3)
    with pytest.raises(LayerError, match=r"verify: .*words\.weight"):
        kfac.collect_kfac_factors(model, batch, loss=CrossEntropy(shift=True), verify=True)
    kfac.collect_kfac_factors(
        model, batch_of((4, 4), "right"), loss=CrossEntropy(shift=True), verify=True
    )


def test_factors_of_layers_that_no_module_promises_travel_in_files(tmp_path):
    model, batch = model_of("experts"), batch_of((5, 4), "right")
    kfac = KFACNaturalGradient(damping=1e-2, track_diagonal=False)
    kfac.collect_kfac_factors(model, batch, loss=CrossEntropy(shift=True), keep_gradient=True)
    kfac.save(tmp_path / "factors.safetensors", model)
    other = KFACNaturalGradient(damping=1e-2, track_diagonal=False)
    other.load(tmp_path / "factors.safetensors", model)
    gradient = kfac.own_gradients(model)
    expected = kfac.compute_natural_gradient(gradient, model)
    for name, value in other.compute_natural_gradient(gradient, model).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("options", [{}, {"exclude": ["head"]}, {"norm_layers": False}])
def test_coverage_counts_parameters_and_says_why_not_more(options, caplog):
    class Scanned(nn.Module):
        """A parameter whose use makes no layer, larger than all others together."""

        def __init__(self) -> None:
            super().__init__()
            self.decay, self.norm = nn.Parameter(torch.zeros(50, WIDTH)), nn.LayerNorm(WIDTH)
            self.up = nn.Linear(WIDTH, WIDTH, bias=False)

        def forward(self, x):
            return self.norm(self.up(x) * self.decay.exp().mean(0))

    model, batch = Frame(Scanned()).double(), batch_of((5, 4), "right")
    model.words.weight.requires_grad_(False)
    kfac = KFACNaturalGradient(damping=1e-3, track_diagonal=False, **options)
    with caplog.at_level("INFO", logger="fisher_lab.curvature.kfac.engine"):
        kfac.collect_kfac_factors(model, batch, loss=CrossEntropy(shift=True))
        kfac.collect_kfac_factors(model, batch, loss=CrossEntropy(shift=True))
    head, norm, up = VOCAB * WIDTH + VOCAB, 2 * WIDTH, WIDTH * WIDTH
    expected = {"its use by exp makes no layer": 50 * WIDTH}
    expected |= {"in exclude": head} if "exclude" in options else {}
    expected |= {"norm_layers=false": norm} if "norm_layers" in options else {}
    assert kfac.coverage.passed == expected
    assert kfac.coverage.covered == 50 * WIDTH + head + norm + up - sum(expected.values())
    assert kfac.coverage.frozen == VOCAB * WIDTH
    (said,) = [r for r in caplog.records if "K-FAC covers" in r.message]
    assert said.levelname == "WARNING"


@pytest.mark.parametrize("reentrant", [False, True])
def test_an_output_that_is_written_to_has_its_gradient_from_before(reentrant):
    """Wav2Vec2's heads set what is padding to zero in place, in a view of what was computed."""

    class Zeroed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.head = nn.Linear(WIDTH, 5), nn.Linear(5, 3)

        def zeroed(self, x: Tensor, mask: Tensor) -> Tensor:
            x = self.up(x)
            x[mask == 0] = 0
            return x

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            if reentrant:
                y = checkpoint(self.zeroed, x, attention_mask, use_reentrant=True)
            else:
                y = self.zeroed(x, attention_mask)
            return self.head(y.sum(1))

    torch.manual_seed(0)
    model = Zeroed().double()
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    x = torch.randn(2, 3, WIDTH, dtype=torch.float64, requires_grad=True)
    batch = {"x": x, "attention_mask": mask, "labels": torch.tensor([0, 1])}
    kfac = KFACNaturalGradient(damping=1e-2)
    kfac.collect_kfac_factors(
        model,
        batch,
        loss=lambda out, b: F.cross_entropy(out, b["labels"], reduction="none"),
        keep_gradient=True,
        verify=not reentrant,
    )
    assert {name: f.tokens for name, f in kfac.kfac_factors.items()} == {"up": 5, "head": 2}
    F.cross_entropy(model(x, mask), batch["labels"]).backward()
    torch.testing.assert_close(kfac.own_gradients(model)["up.weight"], model.up.weight.grad)
