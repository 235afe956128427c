"""What a refresh ended in, as tensors and a JSON-able header, and back.

:mod:`.state` has the layers' factors; here come the parameters that belong to no layer, and what
holds for the whole model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fisher_lab.config.kfac import KFACSettings
from fisher_lab.curvature.collectives import Communicator
from fisher_lab.curvature.errors import FactorFileError
from fisher_lab.curvature.kfac import serialization
from fisher_lab.curvature.kfac.layer_factors import Built, LayerFactors
from fisher_lab.curvature.kfac.layers import Layers


def export(
    built: Built, model: nn.Module, settings: KFACSettings
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns tensors and header; collective where ranks have shares.

    Args:
        built: what the refresh ended in.
        model: the model that it belongs to.
        settings: those that it was made with.
    """
    tensors, header = serialization.export(built.factors, serialization.fingerprint(model))
    rest = {"own": built.gradients, "diagonal": built.diagonal}
    for key, named in rest.items():
        for name, value in named.items():
            tensors[f"{serialization.UNCOVERED}/{key}/{name}"] = value.detach().contiguous().clone()
    header |= {
        "fisher": built.fisher,
        "uncovered": settings.uncovered,
        "skipped": built.skipped,
        "rank_counts": list(built.rank_counts),
        **{f"uncovered_{key}": sorted(named) for key, named in rest.items()},
    }
    return tensors, header


def restore(
    tensors: Mapping[str, Tensor],
    header: Mapping[str, Any],
    model: nn.Module,
    layers: Layers,
    settings: KFACSettings,
    communicator: Communicator,
) -> Built:
    """Returns what :func:`export` took apart; the model itself is not changed.

    Args:
        tensors: by name.
        header: as exported.
        model: the model that they are wanted for.
        layers: its K-FAC layers.
        settings: of the engine that wants them.
        communicator: of the ranks that go on together.

    Raises:
        FactorFileError: another version, incomplete, or made with settings that leave out what
            these need.
        LayerError: factors of another model.
    """
    found = serialization.restore(tensors, header, model, layers, settings, communicator)
    _check(found, header, settings)
    own, diagonal = (
        serialization.uncovered(tensors, header, model, key) for key in ("own", "diagonal")
    )
    with serialization.reading():
        return Built(
            factors=found,
            fisher=str(header["fisher"]),
            skipped=dict(header["skipped"]),
            gradients=own,
            diagonal=diagonal,
            called=frozenset(found),
            rank_counts=tuple(dict(counts) for counts in header["rank_counts"]),
        )


def _check(
    found: Mapping[str, LayerFactors], header: Mapping[str, Any], settings: KFACSettings
) -> None:
    """Checks that factors hold what the settings need of them.

    Raises:
        FactorFileError: EKFAC without the tokens, or no diagonal of what is uncovered.
    """
    for name, factors in found.items():
        kept = factors.tokens_g is not None or factors.method in ("norm", "true_head")
        if settings.ekfac and not kept:
            raise FactorFileError(
                f"factors: layer {name} was collected without ekfac; allowed: ekfac=False, or "
                "factors of an engine with ekfac=True"
            )
    wanted = settings.uncovered
    if wanted == "diagonal" and header.get("uncovered") != "diagonal":
        raise FactorFileError(
            f"factors: collected with uncovered={header.get('uncovered')!r}; allowed for "
            "uncovered='diagonal': factors of an engine with it"
        )
