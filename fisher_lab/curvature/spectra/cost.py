"""When a linear layer's Gram matrix is cheaper without its per-sample gradients.

A sample's gradient of a weight is ``J_n = g_n^T a`` with ``g_n`` ``[S, out]`` (its loss by the
layer's outputs) and ``a`` ``[S, in]`` (the layer's inputs in that sequence). The Gram matrix needs
only ``<J_n, J_m> = sum_{t,t'} (g_nt . g_mt') (a_t . a_t')``.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LinearCost:
    """Multiplications of both ways for one weight, and the numbers that each has to keep.

    Attributes:
        dense_flops: form the ``N`` gradients, then their Gram matrix's lower triangle.
        factored_flops: input products, output gradients mixed by them, then the same triangle.
        dense_numbers: elements kept, ``N in out``.
        factored_numbers: elements kept, ``N S out + T in``.
    """

    dense_flops: float
    factored_flops: float
    dense_numbers: int
    factored_numbers: int

    @property
    def factored_is_cheaper(self) -> bool:
        """Whether the factored way takes fewer multiplications."""
        return self.factored_flops < self.dense_flops


def linear_cost(n: int, positions: int, total: int, d_in: int, d_out: int) -> LinearCost:
    """Counts the multiplications of both ways.

    Args:
        n: samples, ``N``.
        positions: positions of one sequence at this layer, ``S``.
        total: positions of all sequences, ``T``.
        d_in: inputs of the layer.
        d_out: outputs of the layer.

    Returns:
        Dense ``N S in out + N^2 in out / 2`` against factored
        ``T^2 in / 2 + N T S out / 2 + N^2 S out / 2``.
    """
    return LinearCost(
        dense_flops=n * positions * d_in * d_out + n * n * d_in * d_out / 2,
        factored_flops=(total * total * d_in + n * total * positions * d_out) / 2
        + n * n * positions * d_out / 2,
        dense_numbers=n * d_in * d_out,
        factored_numbers=n * positions * d_out + total * d_in,
    )
