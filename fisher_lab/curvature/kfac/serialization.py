"""Factors as plain tensors and a JSON-able header, and back.

Nothing here touches a file: :mod:`fisher_lab.api` writes and reads safetensors. The header says
what the tensors are (structure, weight, T, N), under which conventions they were made, and which
model they belong to.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fisher_lab.config.kfac import KFACSettings
from fisher_lab.curvature.collectives import Communicator, Spread
from fisher_lab.curvature.errors import FactorFileError, LayerError
from fisher_lab.curvature.kfac.factors import Columns, Factor
from fisher_lab.curvature.kfac.layer_factors import LayerFactors
from fisher_lab.curvature.kfac.layers import Kind, Layer, Layers
from fisher_lab.curvature.kfac.policy import put_back
from fisher_lab.curvature.wrappers import device_of, unwrap

VERSION = 2
"""Of the layout; another version is refused."""

CONVENTIONS = "A=(1/T)sum aa^T; G=(1/T)sum gg^T; token-summed loss; row-major vec"
"""What the numbers mean (``docs/math.md``, section 1)."""


UNCOVERED = "//uncovered"
"""Under this come gradients and diagonal of parameters that belong to no layer."""

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
    layers = {name: _export_layer(name, f, tensors, owners) for name, f in factors.items()}
    header = {
        "version": VERSION,
        "conventions": CONVENTIONS,
        "model": model_fingerprint,
        "layers": layers,
    }
    return tensors, header


def _export_layer(
    name: str, f: LayerFactors, tensors: dict[str, Tensor], owners: dict[int, str]
) -> dict[str, Any]:
    """Puts a layer's tensors to the others; returns its entry of the header."""
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
            entry["rows_g"] = f.spread.communicator.all_gather_objects(len(f.tokens_g))
    for key in KEPT:
        value = f.gathered(key)
        if value is not None:
            tensors[f"{name}/{key}"] = value.detach().contiguous().clone()
    return entry


def _export_factor(factor: Factor, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    parts, entry = factor.state()
    for key, value in parts.items():
        tensors[f"{prefix}/{key}"] = value.detach().contiguous().clone()
    return {"structure": factor.structure, **entry}


def restore(
    tensors: Mapping[str, Tensor],
    header: Mapping[str, Any],
    model: nn.Module,
    layers: Layers,
    settings: KFACSettings,
    communicator: Communicator | None = None,
) -> dict[str, LayerFactors]:
    """Returns the factors that :func:`export` took apart; the model itself is not changed.

    Args:
        tensors: by name.
        header: as exported.
        model: the model that they are wanted for.
        layers: its K-FAC layers.
        settings: where columns are to live.
        communicator: of ranks that go on together: each takes the share again that it had, where
            they are as many as before, so that sums over the ranks come out to the same bit.

    Raises:
        FactorFileError: another version, other conventions, an entry of the header or a tensor is
            missing, or a tensor has another shape than the layer's.
        LayerError: a layer does not match; names it and both sides.
    """
    if header.get("version") != VERSION or header.get("conventions") != CONVENTIONS:
        raise FactorFileError(
            f"factors: version {header.get('version')!r}; allowed: {VERSION} with the conventions "
            f"{CONVENTIONS!r}"
        )
    result: dict[str, LayerFactors] = {}
    with reading():
        for name, entry in header["layers"].items():
            layer = layers.layers.get(name)
            _check_layer(name, entry, layer)
            assert layer is not None
            read = _Reader(tensors, settings, device_of(model))
            factors = _restore_layer(layer, entry, read, result)
            if communicator is not None and communicator.size > 1:
                _spread_again(factors, entry, communicator)
            result[name] = factors
    if header.get("model") != fingerprint(model):
        raise LayerError(
            f"factors: made for a model with fingerprint {header.get('model')}, this one has "
            f"{fingerprint(model)} (parameter names and shapes)"
        )
    return result


@contextmanager
def reading() -> Iterator[None]:
    """Turns what goes wrong in an incomplete header into an error that says so.

    Raises:
        FactorFileError: an entry is missing or is no such thing.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError) as error:
        raise FactorFileError(f"factors: the header is incomplete ({error!r})") from error


def uncovered(
    tensors: Mapping[str, Tensor], header: Mapping[str, Any], model: nn.Module, key: str
) -> dict[str, Tensor]:
    """Returns what a file has of parameters that belong to no layer.

    Args:
        tensors: by name.
        header: as exported.
        model: whose parameters they are.
        key: ``own`` (gradients) or ``diagonal``.

    Raises:
        FactorFileError: a tensor is missing or has another shape than its parameter.
    """
    parameters = dict(unwrap(model).named_parameters())
    read = _Reader(tensors, KFACSettings(), device_of(model))
    with reading():
        return {
            name: read.tensor(f"{UNCOVERED}/{key}/{name}", tuple(parameters[name].shape))
            for name in header[f"uncovered_{key}"]
        }


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
    read: _Reader,
    earlier: Mapping[str, LayerFactors],
) -> LayerFactors:
    name, dim_g = layer.name, layer.n_out
    if layer.kind is Kind.NORM:
        dim_g *= 1 if layer.bias is None else 2
    a = entry["A"]
    if a is not None and "same_as" in a:
        input_factor = earlier[a["same_as"]].A
    else:
        input_factor = None if a is None else read.factor(a, f"{name}/A", layer.dim_a)

    def kept(key: str, *shape: int | None) -> Tensor | None:
        missing = f"{name}/{key}" not in read.tensors
        return None if missing else read.tensor(f"{name}/{key}", shape)

    tokens_g = kept("tokens_g", None, layer.n_out)
    indices = layer.kind is Kind.EMBEDDING

    return LayerFactors(
        layer=layer,
        A=input_factor,
        G=read.factor(entry["G"], f"{name}/G", dim_g),
        method=entry["method"],
        tokens=entry["tokens"],
        n_labels=entry["n_labels"],
        n_draws=entry["n_draws"],
        fisher=entry["fisher"],
        push=entry["push"],
        storage_error=entry["storage_error"],
        a=kept("a", entry["tokens"], *(() if indices else (layer.n_in,))),
        own=kept("own", dim_g, 1 if layer.kind is Kind.NORM else layer.dim_a),
        tokens_g=tokens_g,
        order=kept("order", None if tokens_g is None else len(tokens_g)),
    )


def _spread_again(f: LayerFactors, entry: Mapping[str, Any], communicator: Communicator) -> None:
    """Cuts this rank's share out of what :func:`export` has put together."""
    if entry["G"].get("sharded"):
        f.G.shard(communicator)
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


@dataclass(frozen=True)
class _Reader:
    """Takes tensors out of a file, checked against the shapes of the layers."""

    tensors: Mapping[str, Tensor]
    settings: KFACSettings
    device: torch.device

    def raw(self, name: str, shape: Sequence[int | None]) -> Tensor:
        """Returns a tensor where it is; None in ``shape`` stands for any length."""
        if name not in self.tensors:
            raise FactorFileError(f"factors: the tensor {name} is missing")
        found = self.tensors[name]
        fits = len(shape) == found.dim() and all(
            wanted in (None, length) for wanted, length in zip(shape, found.shape, strict=True)
        )
        if not fits:
            told = " x ".join("any" if n is None else str(n) for n in shape)
            raise FactorFileError(
                f"factors: the tensor {name} has shape {tuple(found.shape)}; allowed: {told}"
            )
        return found

    def tensor(self, name: str, shape: Sequence[int | None]) -> Tensor:
        """Returns a tensor on the model's device."""
        return self.raw(name, shape).to(self.device)

    def factor(self, entry: Mapping[str, Any], prefix: str, dim: int) -> Factor:
        """Returns a factor of this dimension."""
        structure = entry["structure"]
        found = Factor.structures.get(structure)
        if found is None:
            raise FactorFileError(f"factors: {prefix} has the unknown structure {structure!r}")
        return found.restored(entry, dim, _FactorReader(self, prefix))


@dataclass(frozen=True)
class _FactorReader:
    """Takes the tensors of one factor out of a file."""

    read: _Reader
    prefix: str

    def tensor(self, key: str, *shape: int | None) -> Tensor:
        """Returns a tensor on the model's device."""
        return self.read.tensor(f"{self.prefix}/{key}", shape)

    def columns(self, entry: Mapping[str, Any], dim: int) -> tuple[Columns, torch.dtype]:
        """Returns columns, placed as the storage options say, and the core dtype."""
        data, core = (
            self.read.raw(f"{self.prefix}/columns", (None, dim)),
            _dtype(entry["core_dtype"]),
        )
        settings, device = self.read.settings, self.read.device
        return put_back(data, float(entry["scale"]), settings, core, device), core


def _dtype(name: str) -> torch.dtype:
    known = {"float64": torch.float64, "float32": torch.float32}
    if name not in known:
        raise FactorFileError(f"factors: core dtype {name!r}; allowed: {', '.join(known)}")
    return known[name]
