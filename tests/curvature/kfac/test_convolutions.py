"""Convolutions are K-FAC layers: every location of their output is a token.

The reference forms patches and sums in explicit loops over locations, groups and kernel positions,
in float64, and takes the gradients of outputs from hooks on modules. It shares nothing with the
code under test.
"""

from __future__ import annotations

import itertools
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fisher_lab import KFACNaturalGradient
from fisher_lab.curvature.errors import LayerError
from fisher_lab.curvature.losses import CrossEntropy

LAM = 1e-2
CASES = {
    "1d": (nn.Conv1d(3, 4, 3), (3, 9)),
    "1d, stride and padding": (nn.Conv1d(3, 4, 4, stride=2, padding=2), (3, 9)),
    "1d, same": (nn.Conv1d(3, 4, 4, padding="same", dilation=2), (3, 9)),
    "1d, a kernel of one": (nn.Conv1d(3, 4, 1, bias=False), (3, 9)),
    "1d, groups": (nn.Conv1d(4, 6, 3, groups=2), (4, 9)),
    "1d, depthwise": (nn.Conv1d(3, 3, 3, groups=3, padding=1), (3, 9)),
    "1d, depthwise with a multiplier": (nn.Conv1d(2, 4, 3, groups=2, bias=False), (2, 9)),
    "2d": (nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(0, 1)), (2, 7, 5)),
    "2d, patches": (nn.Conv2d(2, 4, 2, stride=2), (2, 6, 4)),
    "2d, dilation": (nn.Conv2d(2, 4, 2, dilation=(1, 3), padding=1), (2, 6, 5)),
    "2d, circular": (nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), (2, 5, 4)),
    "2d, depthwise": (nn.Conv2d(3, 3, 3, groups=3, padding="same"), (3, 5, 4)),
    "3d": (nn.Conv3d(2, 3, 2, padding=(1, 0, 0)), (2, 3, 4, 3)),
}


class Net(nn.Module):
    """A convolution between two operations, and a head over the mean of its locations."""

    def __init__(self, conv: nn.Module, channels: int) -> None:
        super().__init__()
        self.conv, self.head = conv, nn.Linear(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(x)).flatten(2).mean(-1))


def both_of(conv: nn.Module, shape: tuple[int, ...]) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    net = Net(deepcopy(conv), conv.weight.shape[0]).double()
    for p in net.parameters():
        p.data = torch.randn_like(p) / 2
    return net, (torch.randn(4, *shape, dtype=torch.float64), torch.tensor([0, 2, 1, 2]))


def loss_of(outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(outputs, batch[1], reduction="none")


def padded(conv: nn.Module, x: Tensor) -> Tensor:
    """What the convolution reads, with its padding written out, position by position."""
    n = x.dim() - 2
    around = []
    for d in range(n):
        if conv.padding == "same":
            total = conv.dilation[d] * (conv.kernel_size[d] - 1)
            around.append((total // 2, total - total // 2))
        else:
            around.append((conv.padding[d],) * 2)
    size = [x.shape[2 + d] + sum(around[d]) for d in range(n)]
    out = x.new_zeros(*x.shape[:2], *size)
    for place in itertools.product(*map(range, size)):
        source = [p - before for p, (before, _) in zip(place, around, strict=True)]
        if conv.padding_mode == "circular":
            source = [p % m for p, m in zip(source, x.shape[2:], strict=True)]
        if all(0 <= p < m for p, m in zip(source, x.shape[2:], strict=True)):
            out[(..., *place)] = x[(..., *source)]
    return out


def tokens_of(net: Net, batch: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """``a [T, in (+ 1)]`` and ``g [T, out]`` of every group, location by location."""
    conv, seen = net.conv, {}

    def note(module: nn.Module, given: tuple[Tensor], out: Tensor) -> None:
        seen["x"] = given[0].detach()
        out.register_hook(lambda grad: seen.__setitem__("g", grad.detach()))

    handle = conv.register_forward_hook(note)
    loss_of(net(batch[0]), batch).sum().backward()
    handle.remove()
    x, g, groups = padded(conv, seen["x"]), seen["g"], conv.groups
    found = []
    for group in range(groups):
        inner, outer = x.shape[1] // groups, g.shape[1] // groups
        rows, grads = [], []
        for example in range(len(x)):
            for place in itertools.product(*map(range, g.shape[2:])):
                row = []
                for channel in range(group * inner, (group + 1) * inner):
                    for offset in itertools.product(*map(range, conv.kernel_size)):
                        at = [
                            p * s + o * d
                            for p, s, o, d in zip(
                                place, conv.stride, offset, conv.dilation, strict=True
                            )
                        ]
                        row.append(float(x[(example, channel, *at)]))
                rows.append([*row, *([1.0] if conv.bias is not None else [])])
                outs = range(group * outer, (group + 1) * outer)
                grads.append([float(g[(example, o, *place)]) for o in outs])
        found.append(
            (torch.tensor(rows, dtype=torch.float64), torch.tensor(grads, dtype=torch.float64))
        )
    return found


def second(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def damped(matrix: Tensor) -> Tensor:
    return matrix + LAM * torch.eye(len(matrix), dtype=matrix.dtype)


def natural(tokens: list[tuple[Tensor, Tensor]], depthwise: bool) -> list[Tensor]:
    """The damped natural gradient of each group's ``[out, in (+ 1)]``, by its dense matrix."""
    found, labels = [], 4
    for a, g in tokens:
        dw = g.T @ a / labels
        if depthwise:
            blocks = [damped(second(g[:, out, None] * a)) for out in range(g.shape[1])]
            found.append(torch.linalg.solve(torch.stack(blocks), dw))
            continue
        fisher = torch.kron(damped(second(g)), damped(second(a)))
        found.append(torch.linalg.solve(fisher, dw.flatten()).reshape(dw.shape))
    return found


def engine(**options) -> KFACNaturalGradient:
    return KFACNaturalGradient(damping=LAM, max_condition_number=None, **options)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("policy", ["all", "small_only"])
def test_factors_and_natural_gradient_are_those_of_loops_over_locations(name, policy):
    net, batch = both_of(*CASES[name])
    conv, expected = net.conv, tokens_of(*both_of(*CASES[name]))
    depthwise = conv.groups > 1 and conv.weight.shape[1] == 1
    kfac = engine(kfac_policy=policy)
    kfac.collect_kfac_factors(net, batch, loss=loss_of, keep_gradient=True, verify=True)
    layers = [f for n, f in kfac.kfac_factors.items() if n.startswith("conv")]
    assert len(layers) == (1 if depthwise else conv.groups)
    assert kfac.coverage.share == 1.0
    for found, (a, g) in zip(layers, expected, strict=not depthwise):
        assert found.tokens == len(g)
        if not depthwise:
            torch.testing.assert_close(found.A.to_dense(), second(a), rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(found.G.to_dense(), second(g), rtol=1e-10, atol=1e-12)
    if depthwise:
        whole = [second(g[:, o, None] * a) for a, g in expected for o in range(g.shape[1])]
        dense = layers[0].G.to_dense()
        torch.testing.assert_close(dense, torch.block_diag(*whole), rtol=1e-10, atol=1e-12)
    wanted = torch.cat(natural(expected, depthwise))
    for given in (None, kfac.own_gradients(net)):
        result = kfac.compute_natural_gradient(given, net)
        rows = result["conv.weight"].flatten(1)
        if conv.bias is not None:
            rows = torch.cat([rows, result["conv.bias"][:, None]], dim=1)
        torch.testing.assert_close(rows, wanted, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_the_own_gradient_is_autograds(name):
    net, batch = both_of(*CASES[name])
    kfac = engine()
    kfac.collect_kfac_factors(net, batch, loss=loss_of, keep_gradient=True)
    loss_of(net(batch[0]), batch).mean().backward()
    own = kfac.own_gradients(net)
    for parameter, p in net.named_parameters():
        torch.testing.assert_close(own[parameter], p.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["1d, groups", "2d", "2d, depthwise"])
def test_factors_come_back_from_a_file(name, tmp_path):
    net, batch = both_of(*CASES[name])
    kfac, other = engine(), engine()
    kfac.collect_kfac_factors(net, batch, loss=loss_of, keep_gradient=True)
    gradient = kfac.own_gradients(net)
    kfac.save(tmp_path / "factors", net)
    other.load(tmp_path / "factors", net)
    expected = kfac.compute_natural_gradient(gradient, net)
    for parameter, value in other.compute_natural_gradient(gradient, net).items():
        assert torch.equal(value, expected[parameter])


def test_ekfac_corrects_the_eigenvalues_of_a_convolution():
    net, batch = both_of(*CASES["2d"])
    kfac = engine(ekfac=True)
    kfac.collect_kfac_factors(net, batch, loss=loss_of, keep_gradient=True)
    ((a, g),) = tokens_of(net, batch)
    va, vg = torch.linalg.eigh(second(a))[1], torch.linalg.eigh(second(g))[1]
    ma, mg = torch.linalg.eigh(second(a))[0], torch.linalg.eigh(second(g))[0]
    moments = ((g @ vg).square().T @ (a @ va).square()) / len(g)
    damped = moments + LAM * (mg[:, None] + ma[None, :]) + LAM**2
    expected = vg @ ((vg.T @ (g.T @ a / 4) @ va) / damped) @ va.T
    result = kfac.compute_natural_gradient(None, net)
    rows = torch.cat([result["conv.weight"].flatten(1), result["conv.bias"][:, None]], dim=1)
    torch.testing.assert_close(rows, expected, rtol=1e-7, atol=1e-9)


def test_a_group_is_left_out_by_the_name_of_its_module():
    net, batch = both_of(*CASES["1d, groups"])
    kfac = engine(exclude=["conv"])
    kfac.collect_kfac_factors(net, batch, loss=loss_of, keep_gradient=True)
    assert list(kfac.kfac_factors) == ["head"]
    assert set(kfac.skipped) == {"conv[0:3]", "conv[3:6]"}
    gradient = kfac.own_gradients(net)
    result = kfac.compute_natural_gradient(gradient, net)
    assert torch.equal(result["conv.weight"], gradient["conv.weight"])


def test_a_frozen_bias_has_no_column():
    net, batch = both_of(nn.Conv1d(4, 6, 3, groups=2), (4, 9))
    net.conv.bias.requires_grad_(False)
    kfac = engine()
    kfac.collect_kfac_factors(net, batch, loss=loss_of, keep_gradient=True, verify=True)
    assert kfac.kfac_factors["conv[0:3]"].A.dim == 6


# ---- which locations are tokens ------------------------------------------------------------------


class Stack(nn.Module):
    """A language model over convolutions, causal by padding on the left."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.words, self.body, self.head = nn.Embedding(11, 4), body, nn.Linear(4, 11)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.words(input_ids)
        if attention_mask is not None:
            x = x * attention_mask[..., None].to(x)
        return self.head(torch.tanh(self.body(x.transpose(1, 2)).transpose(1, 2)))


class Causal(nn.Module):
    """Mamba's: padded on both sides and cut off."""

    def __init__(self, groups: int = 1, size: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, size, padding=size - 1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)[..., : x.shape[-1]]


class PaddedBefore(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (2, 0)))


BODIES = {
    "a kernel of one": lambda: nn.Conv1d(4, 4, 1),
    "cut off": Causal,
    "cut off, depthwise": lambda: Causal(4),
    "padded before": PaddedBefore,
    "two": lambda: nn.Sequential(Causal(), PaddedBefore()),
    "on both sides": lambda: nn.Conv1d(4, 4, 3, padding=1),
}
LENGTHS = (5, 8, 3)


def text(n: int = 8) -> dict[str, Tensor]:
    mask = torch.tensor([[int(p < length) for p in range(n)] for length in LENGTHS])
    ids = torch.randint(1, 11, mask.shape, generator=torch.Generator().manual_seed(0)) * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


@pytest.mark.parametrize("body", BODIES)
def test_locations_are_tokens_where_the_position_is_one(body):
    torch.manual_seed(0)
    model, batch = Stack(BODIES[body]()).double(), text()
    kfac = engine()
    kfac.collect_kfac_factors(
        model, batch, loss=CrossEntropy(shift=True), keep_gradient=True, verify=True
    )
    assert not kfac.skipped
    assert {f.tokens for f in kfac.kfac_factors.values()} == {sum(LENGTHS)}


class Speech(nn.Module):
    """Wav2Vec2's: unpadded convolutions with strides over samples, and a mask of what is left."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv1d(1, 4, 4, stride=2), nn.Conv1d(4, 4, 3, stride=2)])
        self.head = nn.Linear(4, 3)

    def forward(self, input_values: Tensor, attention_mask: Tensor) -> Tensor:
        x, lengths = input_values[:, None], attention_mask.sum(-1)
        for conv in self.convs:
            x = torch.tanh(conv(x))
            lengths = (lengths - conv.kernel_size[0]) // conv.stride[0] + 1
        real = torch.arange(x.shape[-1]) < lengths[:, None]
        return self.head((x * real[:, None]).sum(-1))


def test_an_unpadded_location_is_a_token_where_its_whole_window_is():
    torch.manual_seed(0)
    model, lengths, n = Speech().double(), (20, 31, 14), 31
    mask = torch.tensor([[int(p < length) for p in range(n)] for length in lengths])
    batch = {
        "input_values": torch.randn(3, n, dtype=torch.float64) * mask,
        "attention_mask": mask,
        "labels": torch.tensor([0, 1, 2]),
    }
    kfac = engine()
    kfac.collect_kfac_factors(
        model,
        batch,
        loss=lambda o, b: F.cross_entropy(o, b["labels"], reduction="none"),
        keep_gradient=True,
        verify=True,
    )
    first = [(length - 4) // 2 + 1 for length in lengths]
    second = [(length - 3) // 2 + 1 for length in first]
    tokens = {name: f.tokens for name, f in kfac.kfac_factors.items()}
    assert tokens == {"convs.0": sum(first), "convs.1": sum(second), "head": 3}


def test_a_convolution_over_padding_that_reaches_the_loss_is_refused_by_verify():
    class Unmasked(Stack):
        def forward(self, input_ids, attention_mask=None):
            return super().forward(input_ids)

    torch.manual_seed(0)
    model = Unmasked(nn.Conv1d(4, 4, 3, padding=1)).double()
    with pytest.raises(LayerError, match="verify"):
        engine().collect_kfac_factors(model, text(), loss=CrossEntropy(shift=False), verify=True)


def test_a_transposed_convolution_is_left_out_with_its_reason():
    net, batch = both_of(nn.ConvTranspose1d(3, 3, 2), (3, 9))
    kfac = engine()
    kfac.collect_kfac_factors(net, batch, loss=loss_of)
    assert list(kfac.kfac_factors) == ["head"]
    assert "conv_transpose1d" in next(iter(kfac.coverage.passed))


def test_one_weight_in_two_kinds_of_use_keeps_autograds_gradient():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(torch.tanh(self.up(x)) + torch.tanh(x @ self.up.weight))

    torch.manual_seed(0)
    net = Twice().double()
    batch = (torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 2, 1, 2, 0]))
    kfac = engine()
    kfac.collect_kfac_factors(net, batch, loss=loss_of, keep_gradient=True)
    loss_of(net(batch[0]), batch).mean().backward()
    torch.testing.assert_close(kfac.own_gradients(net)["up.weight"], net.up.weight.grad)


class Gated(nn.Module):
    """A conformer's: gated by half of the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv1d(4, 8, 1), nn.Conv1d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.glu(self.up(x), dim=1))


class ByHeads(nn.Module):
    """``F.multi_head_attention_forward``'s order: heads beside examples, after the positions."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.out = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        n, _, length = x.shape
        q = self.q(x.permute(2, 0, 1)).view(length, n * 2, 2).transpose(0, 1)
        past = torch.ones(length, length, dtype=torch.bool).tril()
        mixed = torch.bmm((q @ q.mT).masked_fill(~past, -torch.inf).softmax(-1), q)
        mixed = mixed.transpose(0, 1).contiguous().view(length * n, 4)
        return self.out(mixed).view(length, n, 4).permute(1, 2, 0)


@pytest.mark.parametrize("body", [Gated, ByHeads])
def test_rows_stay_known_through_gates_and_heads(body):
    torch.manual_seed(0)
    model, batch = Stack(body()).double(), text()
    kfac = engine()
    kfac.collect_kfac_factors(
        model, batch, loss=CrossEntropy(shift=True), keep_gradient=True, verify=True
    )
    assert not kfac.skipped
    assert {f.tokens for f in kfac.kfac_factors.values()} == {sum(LENGTHS)}
