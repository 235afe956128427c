"""The models, losses and batches of :mod:`exam`: tiny, in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

LOSSES = {"mse": nn.MSELoss, "bce": nn.BCEWithLogitsLoss, "ce": nn.CrossEntropyLoss}
ALL = tuple(LOSSES)
IGNORED = 99


@dataclass(frozen=True)
class Model:
    """A model of the exam.

    Attributes:
        about: what it shows.
        build: of a loss, the model.
        inputs: shape of one example.
        losses: for which it is asked.
        sizes: examples of each batch.
        biases: whether it has biases.
        shared: whether a layer is called several times in a pass.
        named: whether it takes a dictionary.
        ignored: label that does not count; None where there is none.
    """

    about: str
    build: Callable[[str], nn.Module]
    inputs: tuple[int, ...]
    losses: tuple[str, ...] = ALL
    sizes: tuple[int, ...] = (2, 3)
    biases: bool = True
    shared: bool = False
    named: bool = False
    ignored: int | None = None


class ClassesSecond(nn.Module):
    """``[B, ..., C]`` -> ``[B, C, ...]`` where the loss wants that."""

    def __init__(self, loss: str) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return x.movedim(-1, 1) if self.loss == "ce" else x


class ChannelsLast(ClassesSecond):
    """``[B, C, H, W]`` -> ``[B, H, W, C]``, but for a loss that has classes second."""

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return x if self.loss == "ce" else x.movedim(1, -1)


class Do(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.function(x)


class Named(nn.Module):
    """Takes its input out of a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))

    def forward(self, data: Any) -> Tensor:  # noqa: D102
        return self.net(data["x"])


class Attention(nn.Module):
    """Tokens of an example reach one another."""

    def __init__(self, loss: str) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 9), nn.Linear(3, 2)
        self.last = ClassesSecond(loss)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.last(self.out(torch.softmax(q @ k.mT, -1) @ v))


class Halves(nn.Module):
    """One layer on both halves of the input."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3, bias=bias)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return torch.cat([self.linear(part) for part in x.chunk(2, -1)], -1)


class UnlikeBiases(nn.Module):
    """Two layers with one weight, each with a bias of its own or with none."""

    def __init__(self, *biases: bool) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(3, 3, bias=bias) for bias in biases)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        one, other = x.chunk(2, -1)
        return torch.cat([self.first(one), self.second(other)], -1)


def convolution(loss: str) -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 2, padding=1), ChannelsLast(loss))


def unet(loss: str) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 2, 3, padding=1, stride=2), nn.Conv2d(2, 2, 3, padding=1),
        nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(2, 3, 3, padding=1),
        ChannelsLast(loss),
    )  # fmt: skip


def cnn(_: str) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(2, 3, 3, bias=False), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(3, 4),
    )  # fmt: skip


def deep(n_out: int = 2, activation: Callable[[], nn.Module] = nn.ReLU) -> list[nn.Module]:
    return [nn.Linear(4, 6), activation(), nn.Linear(6, n_out)]


def net(*more: Callable[[], nn.Module], n_out: int = 2, activation: Any = nn.ReLU) -> Any:
    """A deep net with more modules behind it; classes come second where the loss wants that."""
    return lambda loss: nn.Sequential(
        *deep(n_out, activation), *(make() for make in more), ClassesSecond(loss)
    )


def mean() -> nn.Module:
    return Do(lambda x: x.flatten(1, -2).mean(1))


MODELS = {
    "linear": Model("one layer", lambda _: nn.Linear(4, 3), (4,)),
    "no_bias": Model("one layer without a bias", lambda _: nn.Linear(4, 3, bias=False), (4,),
                     biases=False),
    "deep_linear": Model("deep linear", net(activation=nn.Identity), (4,)),
    "mlp": Model("deep", net(), (4,)),
    "one_output": Model("deep, one output", net(n_out=1), (4,), losses=("mse", "bce")),
    "one_datum": Model("deep, one example", net(), (4,), sizes=(1,)),
    "in_place": Model("activations in place", net(activation=lambda: nn.ReLU(inplace=True)), (4,)),
    "named": Model("inputs in a dictionary", lambda _: Named(), (4,), named=True),
    "sequence": Model("sequences, a loss for each token", net(), (5, 4)),
    "square": Model("as many tokens as examples and features", net(), (4, 4), sizes=(4, 4)),
    "grid": Model("tokens in two dimensions", net(), (2, 3, 4)),
    "flat": Model("tokens one under the other in the output",
                  net(lambda: nn.Flatten(0, 1)), (5, 4)),
    "averaged": Model("the mean over tokens", net(mean), (5, 4)),
    "averaged_linear": Model("deep linear, the mean over tokens",
                             net(mean, activation=nn.Identity), (2, 3, 4)),
    "scaled": Model("outputs that are no layer's", net(lambda: Do(lambda x: 2 * x.tanh())), (4,)),
    "attention": Model("tokens that reach one another", Attention, (3, 4)),
    "convolved": Model("a convolution, a loss for each location", convolution, (2, 3, 3)),
    "convolved_averaged": Model("a convolution, averaged",
                                lambda _: nn.Sequential(nn.Conv2d(2, 3, 4, padding=2),
                                                        nn.AdaptiveAvgPool2d(1), nn.Flatten()),
                                (2, 4, 4)),
    "cnn": Model("convolutions, pooling, a layer", cnn, (1, 10, 10)),
    "unet": Model("convolutions of unlike numbers of locations", unet, (2, 4, 4)),
    "halves": Model("a layer that is called twice", lambda _: Halves(True), (6,), losses=("mse",),
                    sizes=(1,), shared=True),
    "halves_no_bias": Model("the same without a bias", lambda _: Halves(False), (6,),
                            losses=("mse",), sizes=(1,), biases=False, shared=True),
    "bias_and_none": Model("one weight, with a bias and without",
                           lambda _: UnlikeBiases(True, False), (6,), losses=("mse",), sizes=(1,),
                           shared=True),
    "two_biases": Model("one weight, two biases", lambda _: UnlikeBiases(True, True), (6,),
                        losses=("mse",), sizes=(1,), shared=True),
    "ignored": Model("labels in one dimension, some left out", net(n_out=3), (4,), losses=("ce",),
                     sizes=(4, 5), ignored=IGNORED),
}  # fmt: skip


# ---- the sizes that curvlinops' own tests have -------------------------------------------------


def straight(*widths: int, activation: Any = nn.Identity) -> Callable[[str], nn.Module]:
    """Layers of these widths in a row; classes come second where the loss wants that."""

    def build(loss: str) -> nn.Module:
        layers = [nn.Linear(n, m) for n, m in itertools.pairwise(widths)]
        between = [(layer, activation()) for layer in layers[:-1]]
        rest = [module for pair in between for module in pair]
        return nn.Sequential(*rest, layers[-1], ClassesSecond(loss))

    return build


def named_input(data: Any) -> Tensor:
    return data["x"]


def as_named(inner: Callable[[str], nn.Module]) -> Callable[[str], nn.Module]:
    """A model whose input is under a name."""
    return lambda loss: nn.Sequential(Do(named_input), inner(loss))


def then(*more: Callable[[], nn.Module], before: Callable[[str], nn.Module]) -> Any:
    """A model with more modules behind it."""
    return lambda loss: nn.Sequential(before(loss), *(make() for make in more))


def locations(loss: str) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 2, 4, padding=2), ChannelsLast(loss))


def pooled(_: str) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 2, 4, padding=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(start_dim=1)
    )


def lenet(_: str) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip


def published(about: str, build: Any, inputs: tuple[int, ...], sizes: tuple[int, ...],
              **more: Any) -> Model:  # fmt: skip
    return Model(about, build, inputs, sizes=sizes, **more)


MSE, REAL = ("mse",), ("mse", "bce")
FLAT = straight(5, 4, 3)
MODELS |= {
    "p_6_1": published("6-1", straight(6, 1), (6,), (5, 5), losses=REAL),
    "p_5_3": published("5-3", straight(5, 3), (5,), (7, 7)),
    "p_6_3_1": published("6-3-1", straight(6, 3, 1), (6,), (2, 5), losses=REAL),
    "p_5_4_3": published("5-4-3", FLAT, (5,), (1, 7)),
    "p_named": published("10-5-3, named", as_named(straight(10, 5, 3)), (10,), (1, 7), named=True),
    "p_one": published("5-4-3, one example", FLAT, (5,), (1,)),
    "p_4_3_2": published("4-3-2, one example", straight(4, 3, 2), (4,), (1,)),
    "p_10_5_3": published("10-5-3, ReLU", straight(10, 5, 3, activation=nn.ReLU), (10,), (3, 4)),
    "p_10_5_1": published("10-5-1, ReLU", straight(10, 5, 1, activation=nn.ReLU), (10,), (3, 4),
                          losses=REAL),
    "p_8_5_3": published("8-5-3, ReLU", straight(8, 5, 3, activation=nn.ReLU), (8,), (2, 6)),
    "p_tokens": published("10-5-3, ReLU, five tokens", straight(10, 5, 3, activation=nn.ReLU),
                          (5, 10), (3, 4)),
    "p_single": published("5-3, tokens in two dimensions", straight(5, 3), (4, 8, 5), (7, 7)),
    "p_grid": published("5-4-3, tokens in two dimensions", FLAT, (4, 8, 5), (2, 7)),
    "p_square": published("5-4-3, seven by five tokens", FLAT, (7, 5, 5), (2, 4)),
    "p_mean": published("5-4-3, the mean over tokens", then(mean, before=FLAT), (4, 8, 5), (1, 7),
                        losses=REAL),
    "p_conv": published("a convolution of 32 x 32", locations, (3, 32, 32), (2, 7), losses=MSE),
    "p_pooled": published("the same, averaged", pooled, (3, 32, 32), (1, 8)),
    "p_lenet": published("LeNet", lenet, (1, 28, 28), (5, 5), losses=("ce",)),
}  # fmt: skip


def loss_of(name: str, reduction: str, model: Model) -> nn.Module:
    """The loss module of a case."""
    if model.ignored is None:
        return LOSSES[name](reduction=reduction)
    return nn.CrossEntropyLoss(reduction=reduction, ignore_index=model.ignored)


def batches_of(made: Model, loss: str, model: nn.Module) -> list[tuple[Any, Tensor]]:
    """Two batches of unlike sizes, with targets of the outputs' shape."""
    batches = []
    for number, size in enumerate(made.sizes):
        x = torch.randn(size, *made.inputs, dtype=torch.float64)
        given = {"x": x} if made.named else x
        with torch.no_grad():
            f = model(given)
        if loss == "ce":
            y = torch.randint(f.shape[1], f.shape[:1] + f.shape[2:])
            if made.ignored is not None:
                y[: 1 + number] = made.ignored
        else:
            y = torch.rand_like(f) if loss == "mse" else torch.randint_like(f, 2)
        batches.append((given, y))
    return batches
