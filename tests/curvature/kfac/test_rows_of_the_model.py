"""Rows that a model fills in, makes of several tokens, or hides: which of them count.

The reference runs every sequence alone, without padding, and reads what the layers are given with
hooks of torch; it shares nothing with the capture under test.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fisher_lab import KFACNaturalGradient
from fisher_lab.curvature.losses import CrossEntropy
from tests.curvature.kfac.test_layers_by_use import VOCAB, WIDTH, Frame, alone, batch_of

HIDDEN = "which of its rows are padding cannot be told"


class Zeroed(nn.Embedding):
    """Words whose padding, the word 0, is zero."""

    def forward(self, input):
        return super().forward(input) * (input > 0)[..., None]


def frame(body: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return Frame(body, Zeroed(VOCAB, WIDTH)).double()


def collected(model: nn.Module, batch: dict[str, Tensor], **settings) -> KFACNaturalGradient:
    kfac = KFACNaturalGradient(damping=1e-2, track_diagonal=False, **settings)
    loss = CrossEntropy(shift=True)
    kfac.collect_kfac_factors(model, batch, loss=loss, keep_gradient=True, verify=True)
    return kfac


def rows_alone(
    model: nn.Module, batch: dict[str, Tensor], name: str
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """What a module reads and the gradients of what it gives, every sequence alone.

    Of a linear layer ``[T, features]``; of a convolution ``[T, channels, kernel]``, by location.
    Also the gradient of the mean loss.
    """
    module, a, g = model.get_submodule(name), [], []
    model.zero_grad()

    def note(_module, args, output):
        output.retain_grad()
        seen.append((args[0].detach(), output))

    handle = module.register_forward_hook(note)
    for single in alone(batch):
        seen: list[tuple[Tensor, Tensor]] = []
        logits = model(single["input_ids"])
        labels = single["labels"][:, 1:].reshape(-1)
        F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), labels, reduction="sum").backward()
        for x, out in seen:
            assert out.grad is not None
            if isinstance(module, nn.Conv1d):
                (k,), (step,) = module.kernel_size, module.stride
                x = F.pad(x, [int(n) for n in 2 * module.padding])
                for place in range(out.shape[-1]):
                    a.append(x[:, :, place * step : place * step + k])
                    g.append(out.grad[:, :, place])
            else:
                a.append(x.reshape(-1, x.shape[-1]))
                g.append(out.grad.reshape(-1, out.shape[-1]))
    handle.remove()
    labels = sum(int((s["labels"][:, 1:] != -100).sum()) for s in alone(batch))
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return torch.cat(a), torch.cat(g), {n: grad / labels for n, grad in grads.items()}


def assert_right(
    kfac: KFACNaturalGradient, model: nn.Module, batch: dict[str, Tensor], name: str
) -> int:
    """Compares a layer with the formulas; rows that are zero and that nothing reaches are none."""
    a, g, gradient = rows_alone(model, batch, name)
    keep = (a != 0).flatten(1).any(1) | (g != 0).any(1)
    a, g = a[keep], g[keep]
    factors = kfac.kfac_factors[name]
    assert factors.tokens == len(g), name
    ones = torch.ones(len(a), 1).double()
    module = model.get_submodule(name)
    if isinstance(module, nn.Conv1d) and module.groups > 1:
        blocks = []
        for channel in range(a.shape[1]):
            v = torch.cat([a[:, channel], ones], dim=1) * g[:, channel, None]
            blocks.append(v.T @ v / len(v))
        expected = torch.block_diag(*blocks)
    else:
        a = torch.cat([a.flatten(1), ones], dim=1)
        assert factors.A is not None
        torch.testing.assert_close(factors.A.to_dense(), a.T @ a / len(a), rtol=1e-9, atol=1e-13)
        expected = g.T @ g / len(g)
    torch.testing.assert_close(factors.G.to_dense(), expected, rtol=1e-9, atol=1e-13)
    own = kfac.own_gradients(model)
    for parameter, value in gradient.items():
        torch.testing.assert_close(own[parameter], value, rtol=1e-9, atol=1e-13)
    return factors.tokens


class Early(nn.Module):
    """Zaya's: two convolutions whose padding is added at once, so that windows lie in it alone."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(WIDTH, WIDTH, 2, groups=WIDTH)
        self.two = nn.Conv1d(WIDTH, WIDTH, 2)

    def forward(self, x):
        return self.two(self.one(F.pad(x.transpose(1, 2), (2, 0)))).transpose(1, 2)


class Wide(nn.Module):
    """One convolution whose output is longer than its input, and is looked at as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(WIDTH, WIDTH, 2, padding=3)

    def forward(self, x):
        y = self.one(x.transpose(1, 2)).transpose(1, 2)
        return x + y[:, : x.shape[1]] * y[:, 1 : x.shape[1] + 1]


class Squeezed(nn.Module):
    """SEW's: pairs of positions become one and two again, and an odd one is filled in."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs, self.up = nn.Conv1d(WIDTH, WIDTH, 2, stride=2), nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x):
        y = self.up(self.pairs(x.transpose(1, 2)).transpose(1, 2))
        y = y.reshape(len(x), -1, WIDTH)
        return F.pad(y, (0, 0, x.shape[1] - y.shape[1], 0))


class Blocks(nn.Module):
    """Attention within blocks of three that are filled up, over what is filled in or not."""

    def __init__(self, masked: bool) -> None:
        super().__init__()
        self.keys, self.masked = nn.Linear(WIDTH, WIDTH), masked

    def forward(self, x):
        b, s, _ = x.shape
        filled = F.pad(x, (0, 0, 0, -s % 3)).view(b, -1, 3, WIDTH)
        y = self.keys(filled)
        scores = filled @ y.transpose(-1, -2)
        if self.masked:
            real = (filled != 0).any(-1)
            scores = scores.masked_fill(~real[:, :, None], torch.finfo(scores.dtype).min)
        return (scores.softmax(-1) @ y).view(b, -1, WIDTH)[:, :s]


@pytest.mark.parametrize("settings", [{}, {"fisher": "mc"}, {"fisher": "true"}])
@pytest.mark.parametrize("side", ["right", "left"])
def test_windows_in_nothing_but_padding_count_where_their_bias_reaches_the_loss(side, settings):
    model, batch = frame(Early()), batch_of((5, 2, 4), side)
    kfac = collected(model, batch, **settings)
    if settings:
        # Two windows of a sequence begin before it; as many as the words come after them.
        counts = {name: kfac.kfac_factors[name].tokens for name in ("body.one", "body.two")}
        assert counts == {"body.one": 14, "body.two": 11}
        return
    assert assert_right(kfac, model, batch, "body.one") == 14
    assert assert_right(kfac, model, batch, "body.two") == 11


def test_locations_before_the_first_position_count_where_others_look_at_them():
    model, batch = frame(Wide()), batch_of((5, 5), "right")
    kfac = collected(model, batch)
    a, g, gradient = rows_alone(model, batch, "body.one")
    # Two locations lie before the first word, and one, which nobody looks at, behind the last.
    keep = torch.cat([torch.arange(len(g) // 2) < 7] * 2)
    a, g = torch.cat([a.flatten(1), torch.ones(len(a), 1)], dim=1)[keep], g[keep]
    assert bool((g[[0, 1, 7, 8]] != 0).any(1).all())
    factors = kfac.kfac_factors["body.one"]
    assert factors.tokens == len(g) == 14
    assert factors.A is not None
    torch.testing.assert_close(factors.A.to_dense(), a.T @ a / len(a), rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(factors.G.to_dense(), g.T @ g / len(g), rtol=1e-9, atol=1e-13)
    for name, value in gradient.items():
        torch.testing.assert_close(kfac.own_gradients(model)[name], value, rtol=1e-9, atol=1e-13)


def test_a_position_that_is_filled_in_counts_where_it_predicts():
    model, batch = frame(Squeezed()), batch_of((5, 5), "right")
    kfac = collected(model, batch)
    assert assert_right(kfac, model, batch, "head") == 10
    assert assert_right(kfac, model, batch, "body.up") == 4


@pytest.mark.parametrize(
    ("masked", "lengths", "tokens"), [(True, (5, 2, 4), 11), (False, (5, 5), 12)]
)
def test_what_fills_up_a_block_counts_where_others_look_at_it(masked, lengths, tokens):
    model, batch = frame(Blocks(masked)), batch_of(lengths, "right")
    kfac = collected(model, batch)
    assert assert_right(kfac, model, batch, "body.keys") == tokens
    reduced = collected(model, batch, sharing="reduce")
    assert reduced.kfac_factors["body.keys"].tokens == len(lengths)


class Hidden(nn.Module):
    """An operation hides which token a row is, before layers whose result is added to them."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.up, self.down, self.way = nn.Linear(WIDTH, 6), nn.Linear(6, WIDTH), way

    def forward(self, x):
        values, order = x.sort(dim=1)
        hidden = values.gather(1, order.argsort(dim=1))  # as before
        match self.way:
            case "added":
                return x + self.down(torch.tanh(self.up(hidden)))
            case "times":
                return x * torch.sigmoid(self.down(torch.tanh(self.up(hidden))))
            case "by heads":
                y = self.up(hidden).view(*x.shape[:2], 2, 3).transpose(1, 2)
                return self.down(torch.tanh(y).transpose(1, 2).flatten(2)) + x
            case "never":
                return x + self.down(self.up(hidden)).mean(1, keepdim=True) * 0.0
            case _:
                y = self.down(torch.tanh(self.up(hidden)))
                return x + y + 0.0 * x.flip(1) * y


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("way", ["added", "times", "by heads"])
def test_rows_are_those_of_the_tokens_to_which_they_are_added(way, side):
    model, batch = frame(Hidden(way)), batch_of((5, 2, 4), side)
    kfac = collected(model, batch)
    for name in ("body.up", "body.down", "head"):
        assert assert_right(kfac, model, batch, name) == 11
    assert collected(model, batch, sharing="reduce").kfac_factors["body.up"].tokens == 3


@pytest.mark.parametrize("way", ["never", "to several"])
def test_rows_that_no_token_names_or_several_do_are_left_out(way):
    model, batch = frame(Hidden(way)), batch_of((5, 2, 4), "right")
    kfac = collected(model, batch)
    assert kfac.skipped["body.up"] == kfac.skipped["body.down"] == HIDDEN
    whole = batch_of((4, 4), "right")
    assert collected(model, whole).kfac_factors["body.up"].tokens == 8


class Patched(nn.Module):
    """BLT's: words are gathered into patches of two, which go through a layer of their own."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.up, self.how = nn.Linear(WIDTH, WIDTH), how

    def forward(self, x):
        b, s, d = x.shape
        index = (torch.arange(s) // 2).expand(b, s)[..., None].expand(x.shape)
        empty = torch.zeros(b, s // 2 + 2, d, dtype=x.dtype)
        if self.how == "sum":
            patches = empty.scatter_add(1, index, x)
        else:
            patches = empty.scatter_reduce(1, index, x, reduce="amax", include_self=False)
        y = torch.tanh(self.up(patches))
        return x + y.gather(1, index).roll(1, 1) * torch.arange(s).clamp(max=1)[:, None]


@pytest.mark.parametrize("how", ["sum", "most"])
def test_rows_that_are_gathered_up_count_by_what_was_sent_to_them(how):
    model, batch = frame(Patched(how)), batch_of((6, 2, 4), "right")
    kfac = collected(model, batch)
    assert assert_right(kfac, model, batch, "body.up") == 3 + 1 + 2


class Halved(nn.Module):
    """Granite's: a mean over pairs is added to a convolution that takes every second position."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up = nn.Conv1d(WIDTH, WIDTH, 3, 2, 1), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        y = x.unfold(1, 2, 2).mean(-1)
        y = y + self.conv(x.transpose(1, 2)).transpose(1, 2)[:, : y.shape[1]]
        return self.up(torch.tanh(y)).repeat_interleave(2, dim=1)


def test_a_row_that_is_made_in_two_ways_counts_where_both_say_so():
    model, batch = frame(Halved()), batch_of((6, 2, 4), "right")
    kfac = collected(model, batch)
    assert assert_right(kfac, model, batch, "body.up") == 3 + 1 + 2


def test_a_constant_row_that_stands_beside_the_vectors_of_tokens_is_looked_up_by_each():
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shape, self.up = nn.Embedding(3, 2), nn.Linear(WIDTH + 2, WIDTH)

        def forward(self, x):
            shape = self.shape(torch.zeros(x.shape[:2], dtype=torch.long))
            return self.up(torch.cat([x, shape], dim=-1))

    model, batch = frame(Beside()), batch_of((5, 2, 4), "left")
    kfac = collected(model, batch)
    assert kfac.coverage.share == 1.0
    assert kfac.kfac_factors["body.shape"].tokens == 11
    assert assert_right(kfac, model, batch, "body.up") == 11


class Delayed(nn.Module):
    """A layer that reads the token before, behind a constant."""

    def __init__(self, before: str) -> None:
        super().__init__()
        self.up, self.before = nn.Linear(WIDTH, WIDTH), before
        if before == "a parameter":
            self.first = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x):
        match self.before:
            case "zeros":
                delayed = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
            case "padding":
                delayed = F.pad(x, (0, 0, 1, -1))
            case _:
                delayed = torch.cat([self.first.expand(len(x), 1, -1), x[:, :-1]], dim=1)
        return x * self.up(delayed)


CASES = [(b, s) for b in ("zeros", "padding", "a parameter") for s in ("right", "left")]


@pytest.mark.parametrize(("before", "side"), CASES[:-1])
def test_rows_that_a_time_shift_moves_count_by_their_places(before, side):
    model, batch = frame(Delayed(before)), batch_of((5, 2, 4), side)
    kfac = collected(model, batch)
    for name in ("body.up", "head"):
        assert assert_right(kfac, model, batch, name) == 11
