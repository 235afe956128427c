"""Models under FSDP2 (``fully_shard``): whole tensors from shards, and back.

K-FAC works on whole matrices; the names and shapes of ``named_parameters()`` are those of the
unwrapped model under ``fully_shard``, so nothing has to be mapped back but the shards.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.distributed.tensor as dtensor
from torch import Tensor, nn

from fisher_lab.curvature.losses import unwrap


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns whole tensors in the place of shards; collective where there are any."""
    return {
        name: t.full_tensor() if isinstance(t, dtensor.DTensor) else t
        for name, t in tensors.items()
    }


def as_given(
    result: Mapping[str, Tensor],
    given: Mapping[str, Tensor] | None,
    model: nn.Module,
    shards: bool | None = None,
) -> dict[str, Tensor]:
    """Returns results as whole tensors or as shards like the model's parameters.

    Args:
        result: whole tensors by parameter name, the same on all ranks.
        given: the gradients that they were made from.
        model: whose parameters say how shards lie.
        shards: whether shards are wanted; None: where shards were given.
    """
    parameters = dict(unwrap(model).named_parameters()) if shards is not False else {}
    found: dict[str, Tensor] = {}
    for name, value in result.items():
        like = parameters.get(name)
        wanted = shards or isinstance((given or {}).get(name), dtensor.DTensor)
        if wanted and isinstance(like, dtensor.DTensor):
            mesh, places = like.device_mesh, like.placements
            # Every rank has the whole tensor already: its shard is cut out, nothing is sent.
            found[name] = dtensor.distribute_tensor(value, mesh, places, src_data_rank=None)
        else:
            found[name] = value
    return found
