"""Group Fisher of several ranks: the states are merged exactly, in the order of the ranks.

Chan et al. 1979: the merge of moments is that of all data together (``docs/math.md``, section 9).
Each rank's state travels by itself, so that a rank never holds more than two of them besides its
own. With ``unit="batch"`` a rank's batch is one datum: the joined state is that of all batches,
not that of a joined batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import CurvatureError
from ..reduce import Communicator, raise_others

if TYPE_CHECKING:
    from ..group import GroupFisher


def merged(own: GroupFisher, communicator: Communicator) -> GroupFisher:
    """Returns the collector of all ranks' data, the same on every rank; collective.

    Args:
        own: this rank's collector; it may have seen nothing yet. It stays as it is.
        communicator: of the ranks.

    Raises:
        CurvatureError: the ranks' collectors have other units, weights or shapes.
    """
    tensors, plain = own.state()
    shapes = {name: list(t.shape) for name, t in tensors.items()}
    told: list[dict[str, Any]] = communicator.share({"plain": plain, "shapes": shapes})
    result: GroupFisher | None = None
    problem: str | None = None
    for rank, other in enumerate(told):
        state: dict[str, Tensor] = {}
        for name, shape in other["shapes"].items():
            mine = tensors[name].cpu() if rank == communicator.rank else None
            empty = torch.empty(shape, dtype=torch.float64)
            state[name] = communicator.broadcast(empty if mine is None else mine, rank)
        one = type(own)(own.unit, sequence_weight=own.sequence_weight)
        one.restore(state, other["plain"])
        try:
            if result is None:
                result = one
            else:
                result.merge(one)
        except CurvatureError as error:
            problem = problem or str(error)  # the other ranks' states still have to be taken
    raise_others([problem])
    assert result is not None
    return result
