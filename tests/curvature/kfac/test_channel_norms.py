"""Norms with a scale for each channel, and what a pass must leave as it was: running statistics."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fisher_lab import KFACNaturalGradient
from fisher_lab.curvature.errors import CurvatureError

NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "batch norm": (lambda: nn.BatchNorm1d(6), ()),
    "batch norm over a sequence": (lambda: nn.BatchNorm1d(6), (5,)),
    "batch norm of images": (lambda: nn.BatchNorm2d(6), (4, 3)),
    "group norm": (lambda: nn.GroupNorm(3, 6), (5,)),
    "group norm of images": (lambda: nn.GroupNorm(2, 6, eps=1e-3), (4, 3)),
    "instance norm": (lambda: nn.InstanceNorm2d(6, affine=True), (4, 3)),
}


class Net(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.up, self.norm, self.head = nn.Linear(3, 6), norm, nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.up(x).movedim(-1, 1)))
        return self.head(x.flatten(2).mean(-1) if x.dim() > 2 else x)


def net_of(name: str) -> tuple[Net, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    norm, positions = NORMS[name]
    net = Net(norm()).double()
    net.norm.weight.data += torch.rand(6)
    if getattr(net.norm, "running_mean", None) is not None:
        net.norm.running_mean += torch.rand(6)
    return net, (torch.randn(7, *positions, 3, dtype=torch.float64), torch.arange(7) % 3)


def loss_of(outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(outputs, batch[1], reduction="none")


def by_hand(norm: nn.Module, x: Tensor) -> Tensor:
    """What the norm scales, ``[N, channels, *positions]``, by its definition."""
    dims = tuple(range(2, x.dim()))
    if "Batch" in type(norm).__name__:
        if norm.training:
            mean = x.mean((0, *dims), keepdim=True)
            var = x.var((0, *dims), keepdim=True, unbiased=False)
        else:
            shape = (-1, *[1] * len(dims))
            mean, var = norm.running_mean.reshape(shape), norm.running_var.reshape(shape)
        return (x - mean) / (var + norm.eps).sqrt()
    groups = norm.num_groups if isinstance(norm, nn.GroupNorm) else x.shape[1]
    cut = x.reshape(len(x), groups, -1)
    mean, var = cut.mean(-1, keepdim=True), cut.var(-1, keepdim=True, unbiased=False)
    return ((cut - mean) / (var + norm.eps).sqrt()).reshape(x.shape)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NORMS)
def test_the_block_of_a_channel_norm_is_that_of_its_tokens(name, training):
    net, batch = net_of(name)
    net.train(training)
    kfac = KFACNaturalGradient(damping=1e-2, max_condition_number=None)
    kfac.collect_kfac_factors(net, batch, loss=loss_of, keep_gradient=True, verify=True)
    seen = {}

    def note(module: nn.Module, given: tuple[Tensor], out: Tensor) -> None:
        seen["x"] = given[0].detach()
        out.register_hook(lambda grad: seen.__setitem__("g", grad))

    net.norm.register_forward_hook(note)
    if hasattr(net.norm, "momentum"):
        net.norm.momentum = 0.0
    loss_of(net(batch[0]), batch).sum().backward()
    xhat, g = by_hand(net.norm, seen["x"]), seen["g"]
    v = torch.cat([g * xhat, g], dim=1).movedim(1, -1).reshape(-1, 12)
    factors = kfac.kfac_factors["norm"]
    assert factors.tokens == len(v)
    torch.testing.assert_close(factors.G.to_dense(), v.T @ v / len(v), rtol=1e-9, atol=1e-12)
    own = kfac.own_gradients(net)
    torch.testing.assert_close(own["norm.weight"], net.norm.weight.grad / 7, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(own["norm.bias"], net.norm.bias.grad / 7, rtol=1e-9, atol=1e-12)


def test_a_layer_norm_of_channels_goes_by_its_own_rows():
    class ChannelsFirst(nn.LayerNorm):
        """ConvNeXt's: transposed, normalised and transposed back."""

        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input.movedim(1, -1)).movedim(-1, 1)

    torch.manual_seed(0)
    net = Net(ChannelsFirst(6)).double()
    batch = (torch.randn(7, 5, 3, dtype=torch.float64), torch.arange(7) % 3)
    kfac = KFACNaturalGradient(damping=1e-2)
    kfac.collect_kfac_factors(net, batch, loss=loss_of, keep_gradient=True, verify=True)
    assert kfac.kfac_factors["norm"].tokens == 35
    assert kfac.coverage.share == 1.0


class Counting(nn.Module):
    """Keeps things of its passes in buffers: one is written to, the other is put in its place."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(3, 3).double()
        self.register_buffer("passes", torch.zeros(1))
        self.register_buffer("last", torch.zeros(7, 3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        self.last = x.detach()
        return self.up(x)


@pytest.mark.parametrize("ends", ["well", "in an error"])
@pytest.mark.parametrize("name", ["batch norm", "batch norm of images", "own buffers"])
def test_a_refresh_leaves_the_buffers_as_they_were(name, ends):
    net, batch = net_of("batch norm" if name == "own buffers" else name)
    net = Counting() if name == "own buffers" else net
    net.train()
    before = {k: (b, b.clone()) for k, b in net.named_buffers()}
    kfac = KFACNaturalGradient(damping=1e-2)
    if ends == "well":
        kfac.collect_kfac_factors(net, [batch, batch], loss=loss_of)
    else:
        with pytest.raises(CurvatureError, match="not finite"):
            kfac.collect_kfac_factors(net, batch, loss=lambda o, b: loss_of(o, b) * float("nan"))
    for key, buffer in net.named_buffers():
        assert buffer is before[key][0]
        assert torch.equal(buffer, before[key][1])


def test_the_callers_own_pass_moves_the_running_statistics_once():
    net, batch = net_of("batch norm")
    other, _ = net_of("batch norm")
    other(batch[0])
    kfac = KFACNaturalGradient(damping=1e-2)
    with kfac.capture(net):
        loss = loss_of(net(batch[0]), batch).mean()
    kfac.collect_kfac_factors(net, batch, loss, n_labels=7)
    torch.testing.assert_close(net.norm.running_mean, other.norm.running_mean, rtol=0, atol=0)
