"""K-FAC's training of two layers, by hand in float64: no engine, no optimizer, no autograd.

``logits = W2 tanh(W1 x + b1) + b2`` with the mean cross-entropy; a layer's parameters are one
matrix ``[W b]``. Everything follows the formulas of ``docs/math.md``, sections 1, 2, 6 and 9.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

Sides = tuple[Tensor, Tensor]


@dataclass
class Options:
    """Those of a training; the names are the optimizer's."""

    lr: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0
    clip: str = "none"
    limit: float = 1e-3
    update_freq: int = 1
    ekfac: bool = False
    lm: bool = False
    lam_a: float = 0.2
    lam_g: float = 0.05
    adamw: tuple[int, ...] = ()
    rest_lr: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    warmup: int = 0
    graft: str = "none"


def softmax(z: Tensor) -> Tensor:
    e = (z - z.max(dim=1, keepdim=True).values).exp()
    return e / e.sum(dim=1, keepdim=True)


@dataclass
class ByHand:
    """Two matrices ``[out, in + 1]`` and what their training remembers."""

    layers: list[Tensor]
    options: Options
    momenta: list[Tensor] = field(default_factory=list)
    steps: int = 0
    multiplier: float = 1.0

    def __post_init__(self) -> None:
        self.momenta = [torch.zeros_like(w) for w in self.layers]
        self.first = [torch.zeros_like(w) for w in self.layers]
        self.second = [torch.zeros_like(w) for w in self.layers]
        self.factors: list[Sides] = []
        self.tokens: list[Sides] = []

    # ---- the model ---------------------------------------------------------------------------

    def loss(self, x: Tensor, y: Tensor) -> float:
        return float(-softmax(self._forward(x)[-1]).log()[torch.arange(len(y)), y].mean())

    def _forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        one = x.new_ones(len(x), 1)
        a1 = torch.cat([x, one], dim=1)
        h = (a1 @ self.layers[0].T).tanh()
        a2 = torch.cat([h, one], dim=1)
        return a1, a2, a2 @ self.layers[1].T

    def passes(self, x: Tensor, y: Tensor) -> list[Sides]:
        """Inputs and gradients ``[T, ...]`` of both layers, of the summed loss."""
        a1, a2, z = self._forward(x)
        g2 = softmax(z)
        g2[torch.arange(len(y)), y] -= 1.0
        h = a2[:, :-1]
        g1 = (g2 @ self.layers[1][:, :-1]) * (1 - h * h)
        return [(a1, g1), (a2, g2)]

    # ---- the step ----------------------------------------------------------------------------

    def step(self, x: Tensor, y: Tensor) -> None:
        o, passes = self.options, self.passes(x, y)
        before, weights = self.loss(x, y), [w.clone() for w in self.layers]
        gradients = [g.T @ a / len(y) for a, g in passes]
        if self.steps % o.update_freq == 0:
            self.tokens = passes
            self.factors = [(a.T @ a / len(a), g.T @ g / len(g)) for a, g in passes]
        lr = o.lr * min(1.0, (self.steps + 1) / o.warmup) if o.warmup else o.lr
        covered = [k for k in range(2) if k not in o.adamw]
        natural = {k: self._natural(k, gradients[k]) for k in covered}
        inner = sum(float((gradients[k] * natural[k]).sum()) for k in covered)
        if o.graft != "none":
            natural = {k: self._grafted(k, u, gradients[k]) for k, u in natural.items()}
        scale = {
            "unit": inner**-0.5,
            "kl": min(1.0, (2 * o.limit / (lr * lr * inner)) ** 0.5),
        }.get(o.clip, 1.0)
        for k in covered:
            self.momenta[k] = o.momentum * self.momenta[k] + natural[k] * scale
        shorten = 1.0
        if o.clip == "trust":
            size = sum(self._quadratic(k, lr * self.momenta[k], damped=True) for k in covered)
            shorten = min(1.0, (2 * o.limit / size) ** 0.5)
        for k in range(2):
            decay = (lr if k in covered else o.rest_lr) * o.weight_decay
            self.layers[k][:, :-1] *= 1 - decay
            if k in covered:
                self.layers[k] -= lr * shorten * self.momenta[k]
            else:
                self._adamw(k, gradients[k])
        self.steps += 1
        if o.lm and (self.steps - 1) % o.update_freq == 0:
            self._levenberg_marquardt(x, y, before, weights, gradients, covered)

    def _lams(self) -> tuple[float, float]:
        return self.options.lam_a * self.multiplier, self.options.lam_g * self.multiplier

    def _natural(self, k: int, gradient: Tensor) -> Tensor:
        (a, g), (lam_a, lam_g) = self.factors[k], self._lams()
        if not self.options.ekfac:
            left = torch.linalg.inv(g + lam_g * torch.eye(len(g), dtype=g.dtype))
            right = torch.linalg.inv(a + lam_a * torch.eye(len(a), dtype=a.dtype))
            return left @ gradient @ right
        (m_a, v_a), (m_g, v_g) = torch.linalg.eigh(a), torch.linalg.eigh(g)
        moments = self._moments(k, v_a, v_g)
        moments = moments + lam_a * m_g[:, None] + lam_g * m_a[None, :] + lam_a * lam_g
        return v_g @ ((v_g.T @ gradient @ v_a) / moments) @ v_a.T

    def _grafted(self, k: int, natural: Tensor, gradient: Tensor) -> Tensor:
        """Weight and bias each with the norm of another method's step."""
        step = gradient
        if self.options.graft == "adam":
            decay = self.options.betas[1]
            self.second[k] = decay * self.second[k] + (1 - decay) * gradient**2
            root = (self.second[k] / (1 - decay ** (self.steps + 1))).sqrt()
            step = gradient / (root + self.options.eps)
        sizes = [
            step[:, part].norm() / natural[:, part].norm() for part in (slice(-1), slice(-1, None))
        ]
        return torch.cat([natural[:, :-1] * sizes[0], natural[:, -1:] * sizes[1]], dim=1)

    def _moments(self, k: int, v_a: Tensor, v_g: Tensor) -> Tensor:
        inputs, grads = self.tokens[k]
        return ((grads @ v_g) ** 2).T @ ((inputs @ v_a) ** 2) / len(inputs)

    def _quadratic(self, k: int, d: Tensor, *, damped: bool) -> float:
        (a, g), (lam_a, lam_g) = self.factors[k], self._lams()
        if damped:
            a = a + lam_a * torch.eye(len(a), dtype=a.dtype)
            g = g + lam_g * torch.eye(len(g), dtype=g.dtype)
        return float((d * (g @ d @ a)).sum())

    def _adamw(self, k: int, gradient: Tensor) -> None:
        o, t = self.options, self.steps + 1
        self.first[k] = o.betas[0] * self.first[k] + (1 - o.betas[0]) * gradient
        self.second[k] = o.betas[1] * self.second[k] + (1 - o.betas[1]) * gradient**2
        mean = self.first[k] / (1 - o.betas[0] ** t)
        root = (self.second[k] / (1 - o.betas[1] ** t)).sqrt()
        self.layers[k] -= o.rest_lr * mean / (root + o.eps)

    def _levenberg_marquardt(
        self,
        x: Tensor,
        y: Tensor,
        before: float,
        weights: list[Tensor],
        gradients: list[Tensor],
        covered: list[int],
    ) -> None:
        moved = [new - old for new, old in zip(self.layers, weights, strict=True)]
        predicted = sum(float((g * d).sum()) for g, d in zip(gradients, moved, strict=True))
        predicted += sum(self._quadratic(k, moved[k], damped=False) for k in covered) / 2
        ratio = (self.loss(x, y) - before) / predicted
        if ratio > 0.75:
            self.multiplier *= 0.77
        elif ratio < 0.25:
            self.multiplier /= 0.77
