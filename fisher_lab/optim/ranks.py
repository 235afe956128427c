"""Products of the engine that ranks with factors of their own agree on."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from fisher_lab.curvature import wrappers
from fisher_lab.curvature.collectives import Communicator
from fisher_lab.curvature.errors import CurvatureError
from fisher_lab.curvature.kfac.engine import KFACNaturalGradient

Compute = Callable[[Mapping[str, Tensor], nn.Module], dict[str, Tensor]]


def of_all_ranks(
    compute: Compute,
    given: Mapping[str, Tensor],
    model: nn.Module,
    kfac: KFACNaturalGradient,
    ranks: Communicator,
) -> dict[str, Tensor]:
    """Returns the engine's result for the layers that have factors; others are left out.

    With factors of each rank's own, the result is the mean over the ranks, weighted by the labels
    behind their factors; collective.

    Args:
        compute: of the engine.
        given: what it is applied to, by parameter name.
        model: the model.
        kfac: the engine.
        ranks: those with factors of their own; one process alone otherwise.

    Raises:
        CurvatureError: no rank has factors, or one rank fails; the same on all ranks.
    """
    if ranks.size == 1:
        result, missing = compute(given, model), set(kfac.uncovered)
        return {name: value for name, value in result.items() if name not in missing}
    whole = wrappers.whole(given)
    own: dict[str, Tensor] = {}
    weight, problem = 0, None
    if kfac.kfac_factors:
        try:
            own = compute(whole, model)
            weight = max(f.n_labels for f in kfac.kfac_factors.values())
        except CurvatureError as error:
            problem = str(error)
    covered = [name for name in own if name not in set(kfac.uncovered)]
    found = ranks.all_gather_objects([weight, problem, covered])
    for rank, (_, text, _) in enumerate(found):
        if text is not None:
            raise CurvatureError(f"rank {rank}: {text}")
    weights = {n: sum(w for w, _, names in found if n in names) for n in whole}
    if not any(weights.values()):
        raise CurvatureError("factors: none collected yet, on any rank")
    mean = {}
    for name, total in weights.items():
        if total == 0:
            continue
        if name in covered:
            part = (own[name] * (weight / total)).double()
        else:
            part = torch.zeros_like(whole[name], dtype=torch.float64)
        mean[name] = ranks.all_reduce(part)
    return wrappers.as_given(mean, given, model)
