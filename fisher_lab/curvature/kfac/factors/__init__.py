"""The structures of factors: dense, Woodbury, diagonal, with a low-rank part, block-diagonal.

Every factor is a positive semi-definite matrix ``M`` of dimension ``dim``. :meth:`Factor.damped`
gives its damped and clipped form, which applies any power of itself to a matrix.
"""

from fisher_lab.curvature.kfac.factors.base import (
    ColumnFactor,
    Damped,
    DenseFactor,
    Factor,
    FactorReport,
)
from fisher_lab.curvature.kfac.factors.block_diagonal import BlockDiagonalFactor
from fisher_lab.curvature.kfac.factors.columns import Columns, ShardedColumns
from fisher_lab.curvature.kfac.factors.diagonal import DiagonalFactor, DiagonalLowRankFactor
from fisher_lab.curvature.kfac.factors.woodbury import WoodburyFactor

__all__ = [
    "BlockDiagonalFactor",
    "ColumnFactor",
    "Columns",
    "Damped",
    "DenseFactor",
    "DiagonalFactor",
    "DiagonalLowRankFactor",
    "Factor",
    "FactorReport",
    "ShardedColumns",
    "WoodburyFactor",
]
