"""A dense symmetric factor: the A side, and the G side on the eigendecomposition path."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

from fisher_lab.curvature.kfac.factors.base import Factor


class DenseFactor(Factor):
    """``M`` as a matrix.

    Args:
        matrix: ``[dim, dim]`` in the core dtype.
    """

    structure = "dense"

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.dim = matrix.shape[0]

    @override
    def to_dense(self) -> Tensor:
        return self.matrix

    @classmethod
    @override
    def from_dense(cls, matrix: Tensor) -> DenseFactor:
        return cls(matrix)
