"""What the engine's numbers of a batch are off the reference in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo.inputs import Batch
from benchmarks.zoo.reference import Reference
from fisher_lab import KFACNaturalGradient
from fisher_lab.curvature.losses import compute_loss, prepare

TOLERANCE = 1e-6
DAMPING, KAPPA = 1e-3, 1e6
POLICIES = ("all", "small_only")
KINDS = {
    "Embedding": "table",
    "Columns": "table",
    "Norm": "scale",
    "Bias": "shift",
    "Depthwise": "depthwise",
}


class Comparison:
    """Compares one engine's refresh with the reference of the same batch.

    Attributes:
        off: what is off, one line each.
        unchecked: layers of which the reference saw no use.
        layers: how many were compared.
    """

    def __init__(self, kfac: KFACNaturalGradient, model: nn.Module, expected: Reference) -> None:
        self.kfac, self.model, self.expected = kfac, model, expected
        self.off: list[str] = []
        self.unchecked: list[str] = []
        self.layers = 0

    def own_gradients(self) -> None:
        """The own gradient of every parameter against autograd's."""
        gradient = self.expected.gradient
        size = sum(float(g.square().sum()) for g in gradient.values()) ** 0.5
        own = self.kfac.own_gradients(self.model)
        for name, expected in gradient.items():
            error = float((own.get(name, torch.zeros(())) - expected).norm())
            if error > TOLERANCE * float(expected.norm()) + 1e-9 * size:
                share = error / max(float(expected.norm()), 1e-300)
                self.off.append(f"{name}: own gradient off by {share:.0e}")

    def factors(self) -> None:
        """Tokens, A, G and the natural gradient of every layer, and what is passed through."""
        generator = torch.Generator().manual_seed(3)
        vectors = {
            n: torch.randn(p.shape, generator=generator, dtype=p.dtype)
            for n, p in self.model.named_parameters()
            if p.requires_grad
        }
        natural = self.kfac.compute_natural_gradient(vectors, self.model)
        passed = dict(vectors)
        for name, factors in self.kfac.kfac_factors.items():
            layer = factors.layer
            for each in (layer.weight, layer.bias):
                passed.pop(base(each or ""), None)
            sides = self._sides(name, factors)
            if sides is not None:
                self.layers += 1
                self._natural(name, layer, sides, vectors, natural)
        for name, vector in passed.items():
            if not torch.equal(natural[name], vector):
                self.off.append(f"{name}: no layer's, but not passed through")

    def _sides(self, name: str, factors: Any) -> tuple[Tensor | None, Tensor] | None:
        layer = factors.layer
        key = (layer.weight, KINDS.get(str(layer.kind), "matrix"))
        pair, other = self.expected.tokens.get(key), self.expected.with_own.get(key)
        if other is not None and factors.tokens == len(other[1]):
            pair = other  # rows that are the same for every example, such as those of a dead unit
        if pair is None:
            self.unchecked.append(name)
            return None
        a, g = pair
        if factors.tokens != len(g):
            self.off.append(f"{name}: {factors.tokens} tokens for {len(g)}")
            return None
        if layer.kind == "Norm":
            a, g = None, torch.cat([a * g, g], 1) if layer.bias is not None else a * g
        elif layer.kind == "Bias":
            a = None
        elif layer.kind == "Depthwise":
            a = a.reshape(*g.shape, -1)
            a = torch.cat([a, torch.ones_like(a[..., :1])], -1) if layer.bias is not None else a
            blocks = torch.einsum("to,toi,toj->oij", g.square(), a, a) / len(g)
            self._side(f"{name}: G", factors.G.to_dense(), torch.block_diag(*blocks))
            return None, blocks
        elif layer.kind in ("Embedding", "Columns"):
            a = F.one_hot(a.long(), layer.n_in).double()
        elif layer.augmented:
            a = torch.cat([a, a.new_ones(len(a), 1)], dim=1)
        sides = (None if a is None else a.T @ a / len(a), g.T @ g / len(g))
        for side, factor, expected in zip("AG", (factors.A, factors.G), sides, strict=True):
            if expected is not None:
                self._side(f"{name}: {side}", factor.to_dense(), expected)
        return sides

    def _side(self, name: str, found: Tensor, expected: Tensor) -> None:
        if found.shape != expected.shape:
            self.off.append(f"{name} {tuple(found.shape)} for {tuple(expected.shape)}")
            return
        error = float((found - expected).norm())
        if error > TOLERANCE * float(expected.norm()) + 1e-14:
            self.off.append(f"{name} off by {error / max(float(expected.norm()), 1e-300):.0e}")

    def _natural(
        self,
        name: str,
        layer: Any,
        sides: tuple[Tensor | None, Tensor],
        vectors: Mapping[str, Tensor],
        natural: Mapping[str, Tensor],
    ) -> None:
        """``G^-1 dW A^-1`` with the damped and floored eigenvalues (``docs/math.md``, 2)."""
        matrix = _matrix(layer, vectors)
        if sides[1].dim() == 3:  # a block for each channel
            matrix = matrix.reshape(*sides[1].shape[:2], 1)
        expected = (inverse(sides[1]) @ matrix).reshape(-1, matrix.shape[-1])
        expected = expected if sides[0] is None else expected @ inverse(sides[0])
        error = float((_matrix(layer, natural) - expected).norm() / expected.norm())
        if not error <= TOLERANCE:
            self.off.append(f"{name}: natural gradient off by {error:.0e}")


def base(name: str) -> str:
    """The parameter behind ``experts.up[3]``."""
    return name.partition("[")[0]


def _matrix(layer: Any, named: Mapping[str, Tensor]) -> Tensor:
    """The weight of a layer as ``[out, in]`` with its bias as a column; of a norm, as a column."""
    weight = _part(named, layer.weight)
    if weight.dim() == 3 and layer.kind in ("Linear", "Conv1D"):  # heads are kept apart
        weight = weight.flatten(1)
    if layer.kind == "Bias":
        return weight[:, None]
    if layer.kind == "Norm":
        shift = [] if layer.bias is None else [named[layer.bias]]
        return torch.cat([weight, *shift])[:, None]
    turned = str(layer.kind) in ("Conv1D", "Embedding")
    weight = weight.T if turned else weight.flatten(1)
    if layer.bias is not None:
        weight = torch.cat([weight, _part(named, layer.bias)[:, None]], 1)
    return weight.reshape(-1, 1) if layer.kind == "Depthwise" else weight


def _part(named: Mapping[str, Tensor], name: str) -> Tensor:
    """``experts.up[3]``, ``conv.weight[4:8]``, ``lora_B[:,1:12:4]`` of the parameter behind it."""
    if "[:," in name:
        return named[base(name)][:, slice(*map(int, name.partition("[:,")[2][:-1].split(":")))]
    numbers = [int(n) for n in name.partition("[")[2].rstrip("]").split(":") if n]
    whole = named[base(name)]
    return (
        whole if not numbers else whole[numbers[0]] if len(numbers) == 1 else whole[slice(*numbers)]
    )


def inverse(matrix: Tensor) -> Tensor:
    """The inverse with Tikhonov damping and a floor under the eigenvalues."""
    values, vectors = torch.linalg.eigh(matrix)
    values = values + DAMPING
    return vectors / values.clamp(min=float(values.max()) / KAPPA)[..., None, :] @ vectors.mT


def compare(model: nn.Module, batch: Batch, expected: Reference) -> dict[str, Any]:
    """Collects a batch under every policy and compares: what is off, how much is covered."""
    off, found = [], {}
    given = prepare(model, dict(batch.values))
    loss = compute_loss(model, given, n_labels=batch.n_labels)
    if loss.n_labels != expected.labels:
        off.append(f"{loss.n_labels} labels for {expected.labels}")
    if abs(float(loss.loss) - expected.loss) > TOLERANCE * abs(expected.loss):
        off.append(f"loss {float(loss.loss):.6g} for {expected.loss:.6g}")
    for policy in POLICIES:
        kfac = KFACNaturalGradient(
            damping=DAMPING, max_condition_number=KAPPA, kfac_policy=policy, track_diagonal=False
        )
        kfac.collect_kfac_factors(
            model,
            dict(batch.values),
            n_labels=batch.n_labels,
            keep_gradient=True,
            verify=True,
        )
        comparison = Comparison(kfac, model, expected)
        comparison.own_gradients()
        comparison.factors()
        off += [f"{line} ({policy})" for line in comparison.off]
        found = {
            "coverage": kfac.coverage.share,
            "of_reached": kfac.coverage.covered / max(expected.reached, 1),
            "passed": dict(kfac.coverage.passed),
            "layers": comparison.layers,
            "unchecked": comparison.unchecked,
        }
    return {"off": off, **found}
