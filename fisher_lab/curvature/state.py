"""Factors as plain tensors and a JSON-able header, and back.

Nothing here touches a file: :mod:`fisher_lab.api` writes and reads safetensors. The header says
what the tensors are (structure, weight, T, N), under which conventions they were made, and which
model they belong to.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .build import LayerFactors
from .errors import FactorFileError, LayerError
from .factors import (
    Columns,
    DenseFactor,
    DiagonalFactor,
    DiagonalLowRankFactor,
    Factor,
    GramFactor,
    ShardedColumns,
)
from .join import Spread
from .layers import Layer, Layers
from .losses import device_of, unwrap
from .reduce import Communicator, share

VERSION = 1
"""Of the layout; another version is refused."""

CONVENTIONS = "A=(1/T)sum aa^T; G=(1/T)sum gg^T; token-summed loss; row-major vec"
"""What the numbers mean (``docs/math.md``, section 1)."""


KEPT = ("a", "own", "tokens_g", "order")
"""What a layer keeps besides its factors."""


def fingerprint(model: nn.Module) -> str:
    """Returns a hash of the model's parameter names and shapes (not of their values)."""
    lines = [f"{n} {tuple(p.shape)}" for n, p in unwrap(model).named_parameters()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def export(
    factors: Mapping[str, LayerFactors], model_fingerprint: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns tensors and header of a set of factors; factors that layers share are kept once.

    What ranks have shares of is put together, so all of them have to call it.

    Args:
        factors: by layer name.
        model_fingerprint: of the model that they belong to.
    """
    tensors: dict[str, Tensor] = {}
    owners: dict[int, str] = {}
    layers: dict[str, Any] = {}
    for name, f in factors.items():
        entry: dict[str, Any] = {
            "method": f.method,
            "tokens": f.tokens,
            "n_labels": f.n_labels,
            "n_draws": f.n_draws,
            "fisher": f.fisher,
            "push": f.push,
            "storage_error": f.storage_error,
            "augmented": f.layer.augmented,
            "in": f.layer.n_in,
            "out": f.layer.n_out,
            "G": _export_factor(f.G, f"{name}/G", tensors),
            "A": None,
        }
        if f.A is not None:
            owner = owners.get(id(f.A))
            entry["A"] = {"same_as": owner} if owner else _export_factor(f.A, f"{name}/A", tensors)
            owners.setdefault(id(f.A), name)
        if f.spread is not None:
            entry["rows"] = list(f.spread.rows)
            if f.tokens_g is not None:
                entry["rows_g"] = f.spread.communicator.share(len(f.tokens_g))
        for key in KEPT:
            value = f.gathered(key)
            if value is not None:
                tensors[f"{name}/{key}"] = value.detach().contiguous().clone()
        layers[name] = entry
    header = {
        "version": VERSION,
        "conventions": CONVENTIONS,
        "model": model_fingerprint,
        "layers": layers,
    }
    return tensors, header


def _export_factor(factor: Factor, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    parts = factor.tensors()
    entry: dict[str, Any] = {"structure": factor.structure}
    if isinstance(factor, GramFactor | DiagonalLowRankFactor):
        columns = factor.columns.whole()
        parts["columns"] = columns.data
        entry |= {
            "weight": factor.weight,
            "scale": columns.scale,
            "sharded": isinstance(factor.columns, ShardedColumns),
            "core_dtype": str(factor.core_dtype).removeprefix("torch."),
        }
    for key, value in parts.items():
        tensors[f"{prefix}/{key}"] = value.detach().contiguous().clone()
    if isinstance(factor, GramFactor):
        entry |= {"discarded": factor.discarded, "reduction": factor.reduction}
    if isinstance(factor, DiagonalLowRankFactor):
        entry["sign"] = factor.sign
    return entry


def restore(
    tensors: Mapping[str, Tensor],
    header: Mapping[str, Any],
    model: nn.Module,
    layers: Layers,
    communicator: Communicator | None = None,
) -> dict[str, LayerFactors]:
    """Returns the factors that :func:`export` took apart; the model itself is not changed.

    Args:
        tensors: by name.
        header: as exported.
        model: the model that they are wanted for.
        layers: its K-FAC layers.
        communicator: of ranks that go on together: each takes the share again that it had, where
            they are as many as before, so that sums over the ranks come out to the same bit.

    Raises:
        FactorFileError: another version, other conventions, or a tensor is missing.
        LayerError: a layer does not match; names it and both sides.
    """
    if header.get("version") != VERSION or header.get("conventions") != CONVENTIONS:
        raise FactorFileError(
            f"factors: version {header.get('version')!r}; allowed: {VERSION} with the conventions "
            f"{CONVENTIONS!r}"
        )
    result: dict[str, LayerFactors] = {}
    for name, entry in header["layers"].items():
        layer = layers.layers.get(name)
        _check_layer(name, entry, layer)
        assert layer is not None
        factors = _restore_layer(layer, entry, tensors, result, device_of(model))
        if communicator is not None and communicator.size > 1:
            _spread_again(factors, entry, communicator)
        result[name] = factors
    if header.get("model") != fingerprint(model):
        raise LayerError(
            f"factors: made for a model with fingerprint {header.get('model')}, this one has "
            f"{fingerprint(model)} (parameter names and shapes)"
        )
    return result


def _check_layer(name: str, entry: Mapping[str, Any], layer: Layer | None) -> None:
    if layer is None:
        raise LayerError(
            f"layer {name}: the factors have it ({entry['out']} x {entry['in']}), the model's "
            "covered layers do not"
        )
    given = (entry["out"], entry["in"], entry["augmented"])
    here = (layer.n_out, layer.n_in, layer.augmented)
    if given != here:
        raise LayerError(
            f"layer {name}: factors for (out, in, bias column) = {given}, the model's layer has "
            f"{here}"
        )


def _restore_layer(
    layer: Layer,
    entry: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    earlier: Mapping[str, LayerFactors],
    device: torch.device,
) -> LayerFactors:
    name = layer.name
    a = entry["A"]
    if a is not None and "same_as" in a:
        input_factor = earlier[a["same_as"]].A
    else:
        input_factor = None if a is None else _restore_factor(a, f"{name}/A", tensors, device)

    def kept(key: str) -> Tensor | None:
        found = tensors.get(f"{name}/{key}")
        return None if found is None else found.to(device)

    return LayerFactors(
        layer=layer,
        A=input_factor,
        G=_restore_factor(entry["G"], f"{name}/G", tensors, device),
        method=entry["method"],
        tokens=entry["tokens"],
        n_labels=entry["n_labels"],
        n_draws=entry["n_draws"],
        fisher=entry["fisher"],
        push=entry["push"],
        storage_error=entry["storage_error"],
        a=kept("a"),
        own=kept("own"),
        tokens_g=kept("tokens_g"),
        order=kept("order"),
    )


def _spread_again(f: LayerFactors, entry: Mapping[str, Any], communicator: Communicator) -> None:
    """Cuts this rank's share out of what :func:`export` has put together."""
    g = f.G
    if entry["G"].get("sharded") and isinstance(g, GramFactor | DiagonalLowRankFactor):
        whole = g.columns
        mine = share(whole.shape[1], communicator.rank, communicator.size)
        local = Columns(whole.data[:, mine].contiguous(), whole.scale, whole.device)
        g.columns = ShardedColumns(local, whole.shape[1], communicator)
    rows = entry.get("rows")
    if rows is None or len(rows) != communicator.size:
        return
    rank, rows_g = communicator.rank, entry.get("rows_g")
    f.spread = Spread(communicator, tuple(rows))
    if f.a is not None:
        f.a = f.a.split(rows)[rank].clone()
    if f.tokens_g is not None and f.order is not None and rows_g is not None:
        f.tokens_g = f.tokens_g.split(rows_g)[rank].clone()
        f.order = f.order.split(rows_g)[rank] - sum(rows[:rank])


def _restore_factor(
    entry: Mapping[str, Any], prefix: str, tensors: Mapping[str, Tensor], device: torch.device
) -> Factor:
    def get(key: str) -> Tensor:
        try:
            return tensors[f"{prefix}/{key}"].to(device)
        except KeyError:
            raise FactorFileError(f"factors: the tensor {prefix}/{key} is missing") from None

    def columns() -> Columns:
        return Columns(get("columns"), float(entry["scale"]), device)

    match entry["structure"]:
        case "dense":
            return DenseFactor(get("matrix"))
        case "diagonal":
            return DiagonalFactor(get("diagonal"))
        case "woodbury":
            return GramFactor(
                columns(),
                float(entry["weight"]),
                _dtype(entry["core_dtype"]),
                discarded=float(entry["discarded"]),
                reduction=entry["reduction"],
            )
        case "diagonal_low_rank":
            return DiagonalLowRankFactor(
                get("diagonal"),
                columns(),
                float(entry["weight"]),
                int(entry["sign"]),
                _dtype(entry["core_dtype"]),
            )
        case other:
            raise FactorFileError(f"factors: {prefix} has the unknown structure {other!r}")


def _dtype(name: str) -> torch.dtype:
    known = {"float64": torch.float64, "float32": torch.float32}
    if name not in known:
        raise FactorFileError(f"factors: core dtype {name!r}; allowed: {', '.join(known)}")
    return known[name]
