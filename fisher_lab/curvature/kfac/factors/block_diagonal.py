"""Block-diagonal factors, with blocks of one size.

The Fisher matrix of a depthwise convolution, a block for each output (``docs/math.md``, section 1).
Nothing ``dim x dim`` is formed.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from fisher_lab.curvature.kfac.factors.base import Damped, Factor, Reader
from fisher_lab.curvature.kfac.factors.columns import Columns
from fisher_lab.curvature.kfac.numerics import Numerics
from fisher_lab.curvature.linalg import Cholesky, symmetric_eigen


class BlockDiagonalFactor(Factor):
    """``M = diag(M_1, ..., M_n)``, with ``blocks`` ``[n, k, k]`` in the core dtype.

    Eigenvectors are those of the blocks, ``[n, k, k]``; the eigenvalues are ``[n k]``.
    """

    structure = "block_diagonal"

    def __init__(self, blocks: Tensor) -> None:
        self.blocks = blocks
        self.dim = blocks.shape[0] * blocks.shape[1]

    @override
    def to_dense(self) -> Tensor:
        return torch.block_diag(*self.blocks)

    @override
    def multiply(self, y: Tensor) -> Tensor:
        return times(self.blocks.to(y), y)

    @override
    def trace(self) -> float:
        return float(self.blocks.diagonal(dim1=1, dim2=2).double().sum())

    @property
    @override
    def core(self) -> Tensor:  # type: ignore[override]
        """The blocks: each is decomposed by itself."""
        return self.blocks

    @override
    def eigen(self, *, on_host: bool = False) -> tuple[Tensor, Tensor]:
        if self._eigen is None:
            found = [symmetric_eigen(block, on_host=on_host) for block in self.blocks]
            values, vectors = (torch.stack(parts) for parts in zip(*found, strict=True))
            self._eigen = values.flatten(), vectors
        return self._eigen

    @override
    def basis(self, numerics: Numerics) -> tuple[Tensor, Columns | None]:
        values, vectors = self.eigen(on_host=numerics.on_host)
        return values, Columns(torch.block_diag(*vectors).T, 1.0, vectors.device)

    @override
    def _top(self, k: int) -> Tensor:
        return self.spectrum()[0].double().sort(descending=True).values[:k]

    @override
    def damped(self, lam: float, kappa_max: float | None, numerics: Numerics) -> DampedBlocks:
        return DampedBlocks(self, lam, kappa_max, numerics)

    @override
    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {"blocks": self.blocks}, {}

    @classmethod
    @override
    def restored(cls, entry: Mapping[str, Any], dim: int, read: Reader) -> BlockDiagonalFactor:
        blocks = read.tensor("blocks", None, None, None)
        side = blocks.shape[1]
        return cls(read.tensor("blocks", dim // max(side, 1), side, side))


class DampedBlocks(Damped[BlockDiagonalFactor]):
    """A damped and clipped block-diagonal factor, by the eigendecompositions of its blocks."""

    @cached_property
    @override
    def cholesky(self) -> Cholesky | None:
        """None: every block is decomposed into eigenvectors."""
        return None

    @override
    def _power(self, y: Tensor, p: float) -> Tensor:
        used, vectors = self.clipped.used.to(y), self.eigen()[1].to(y)
        return times(vectors, used.pow(p)[:, None] * times(vectors.mT, y))


def times(blocks: Tensor, y: Tensor) -> Tensor:
    """Returns ``diag(blocks) y`` for ``y`` of shape ``[n k, m]``."""
    n, _, k = blocks.shape
    return (blocks @ y.reshape(n, k, -1)).reshape(y.shape)
