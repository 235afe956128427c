"""A refresh as plain tensors and a JSON-able header, in a file where wanted, and back.

The header says what the tensors are (structure, weight, T, N), under which conventions they were
made, and which model they belong to. :func:`write` and :func:`read` keep both in one safetensors
file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fisher_lab.config.kfac import KFACSettings
from fisher_lab.curvature.collectives import Communicator, Spread
from fisher_lab.curvature.errors import FactorFileError, LayerError
from fisher_lab.curvature.kfac.factors import ColumnFactor, Columns, Factor
from fisher_lab.curvature.kfac.layer_factors import LayerFactors
from fisher_lab.curvature.kfac.layers import Kind, Layer, kernel_of, layer_of, plain, sizes
from fisher_lab.curvature.kfac.layers_by_use import Layers
from fisher_lab.curvature.kfac.numerics import DTYPES
from fisher_lab.curvature.kfac.parts import base_of, value_of
from fisher_lab.curvature.kfac.policy import put_back, wants_sequences
from fisher_lab.curvature.kfac.refresh import Coverage, Refresh
from fisher_lab.curvature.wrappers import device_of, unwrap
from fisher_lab.runs import atomic

_HEADER = "fisher_lab.factors"
"""Key of the header in a file."""

VERSION = 2
"""Of the layout; another version is refused."""

CONVENTIONS = "A=(1/T)sum aa^T; G=(1/T)sum gg^T; token-summed loss; row-major vec"
"""What the numbers mean (``docs/math.md``, section 1)."""


UNCOVERED = "//uncovered"
"""Under this come gradients and diagonal of parameters that belong to no layer."""

PLAIN = (
    "method", "tokens", "n_labels", "n_draws", "fisher", "sharing", "push", "storage_error",
    "hessian",
)  # fmt: skip
"""Attributes of a layer's factors that the header has."""

KEPT = ("a", "own", "tokens_g", "order", "sequences")
"""What a layer keeps besides its factors."""


def fingerprint(model: nn.Module) -> str:
    """Returns a hash of the model's parameter names and shapes (not of their values)."""
    lines = [f"{n} {tuple(p.shape)}" for n, p in unwrap(model).named_parameters()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def write(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Writes an export to a safetensors file: under a temporary name, then renamed."""
    from safetensors.torch import save

    metadata = {_HEADER: json.dumps(header)}
    atomic.write_bytes(path, save(dict(tensors), metadata=metadata))


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns tensors and header of a file of :func:`write`.

    Raises:
        FactorFileError: there is no such file, or it is cut short or another kind of file.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FactorFileError(f"factor file {path}: does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[_HEADER])
            return {key: file.get_tensor(key) for key in file.keys()}, header  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError) as error:
        raise FactorFileError(f"factor file {path}: cut short or not one ({error})") from error


def export(
    last: Refresh, model: nn.Module, settings: KFACSettings
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns a refresh as tensors and a header; factors that layers share are kept once.

    What ranks hold slices of is put together, so all of them have to call it.
    """
    found: dict[str, Tensor] = {}
    owners: dict[int, str] = {}
    layers = {name: _export_layer(name, f, found, owners) for name, f in last.factors.items()}
    rest = {"own": last.gradients, "diagonal": last.diagonal}
    for key, named in rest.items():
        found |= {f"{UNCOVERED}/{key}/{name}": value for name, value in named.items()}
    tensors = {key: value.detach().contiguous().clone() for key, value in found.items()}
    header = {
        "version": VERSION,
        "conventions": CONVENTIONS,
        "model": fingerprint(model),
        "layers": layers,
        "fisher": last.fisher,
        "uncovered": settings.uncovered,
        "skipped": last.skipped,
        "coverage": asdict(last.coverage),
        "rank_counts": list(last.rank_counts),
        **{f"uncovered_{key}": sorted(named) for key, named in rest.items()},
    }
    return tensors, header


def _export_layer(
    name: str, f: LayerFactors, tensors: dict[str, Tensor], owners: dict[int, str]
) -> dict[str, Any]:
    """Puts a layer's tensors to the others; returns its entry of the header."""
    entry: dict[str, Any] = {
        **{key: getattr(f, key) for key in PLAIN},
        "augmented": f.layer.augmented,
        "layer": plain(f.layer),
        "in": f.layer.n_in,
        "out": f.layer.n_out,
        "G": _export_factor(f.G, f"{name}/G", tensors),
        "A": None,
    }
    if f.A is not None and id(f.A) in owners:
        entry["A"] = {"same_as": owners[id(f.A)]}
    elif f.A is not None:
        entry["A"] = _export_factor(f.A, f"{name}/A", tensors)
        owners[id(f.A)] = name
    if f.spread is not None:
        entry["rows"] = list(f.spread.rows)
        if f.tokens_g is not None:
            entry["rows_g"] = f.spread.communicator.all_gather_objects(len(f.tokens_g))
    for key in KEPT:
        value = f.gathered(key)
        if value is not None:
            tensors[f"{name}/{key}"] = value
    return entry


def _export_factor(factor: Factor, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    parts, entry = factor.state()
    tensors |= {f"{prefix}/{key}": value for key, value in parts.items()}
    return {"structure": factor.structure, **entry}


def restore(
    tensors: Mapping[str, Tensor],
    header: Mapping[str, Any],
    model: nn.Module,
    layers: Layers,
    settings: KFACSettings,
    communicator: Communicator,
) -> Refresh:
    """Returns what :func:`export` took apart; the model itself is not changed.

    Args:
        tensors: by name.
        header: as exported.
        model: the model that they are wanted for.
        layers: its K-FAC layers.
        settings: of the engine that wants them.
        communicator: of ranks that go on together: each takes the slice again that it had, where
            they are as many as before, so that sums over the ranks come out to the same bit.

    Raises:
        FactorFileError: another version, other conventions, an entry of the header or a tensor is
            missing, a tensor has another shape than the layer's, or the factors were made with
            settings that leave out what these need.
        LayerError: a layer does not match; names it and both sides.
    """
    if header.get("version") != VERSION or header.get("conventions") != CONVENTIONS:
        raise FactorFileError(
            f"factors: version {header.get('version')!r}; allowed: {VERSION} with the conventions "
            f"{CONVENTIONS!r}"
        )
    factors: dict[str, LayerFactors] = {}
    read = _Reader(tensors, settings, device_of(model))
    try:
        for name, entry in header["layers"].items():
            layer = _checked_layer(name, entry, _layer_of(name, entry, model, layers))
            factors[name] = _restore_layer(layer, entry, read, factors)
            if communicator.size > 1:
                _spread_again(factors[name], entry, communicator)
        if header.get("model") != fingerprint(model):
            raise LayerError(
                f"factors: made for a model with fingerprint {header.get('model')}, this one has "
                f"{fingerprint(model)} (parameter names and shapes)"
            )
        _check_needs(factors, header, settings)
        return Refresh(
            factors=factors,
            fisher=str(header["fisher"]),
            skipped=dict(header["skipped"]),
            coverage=Coverage.restored(header["coverage"]) if "coverage" in header else Coverage(),
            gradients=_uncovered(read, header, model, "own"),
            diagonal=_uncovered(read, header, model, "diagonal"),
            rank_counts=tuple(dict(counts) for counts in header["rank_counts"]),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise FactorFileError(f"factors: the header is incomplete ({error!r})") from error


def _layer_of(
    name: str, entry: Mapping[str, Any], model: nn.Module, layers: Layers
) -> Layer | None:
    """The layer of an entry: one that the modules promise, or one that a forward pass showed."""
    use, promised = entry.get("layer"), layers.layers.get(name)
    if use is None:
        return promised
    if promised is not None:
        return replace(promised, tied=use["tied"])
    parameters = dict(unwrap(model).named_parameters())
    if base_of(use["weight"]) not in parameters:
        return None
    if use["kind"] not in set(Kind):
        raise FactorFileError(f"factors: layer {name} is of an unknown kind {use['kind']!r}")
    shown = layer_of(use)
    value = value_of(parameters, shown.weight)
    n_in, n_out = sizes(shown.kind, value)
    return replace(shown, n_in=n_in, n_out=n_out, kernel=kernel_of(shown.kind, value))


def _uncovered(
    read: _Reader, header: Mapping[str, Any], model: nn.Module, key: str
) -> dict[str, Tensor]:
    """What an export has of parameters that belong to no layer."""
    parameters = dict(unwrap(model).named_parameters())
    return {
        name: read.tensor(f"{UNCOVERED}/{key}/{name}", *parameters[name].shape)
        for name in header[f"uncovered_{key}"]
    }


def _check_needs(
    found: Mapping[str, LayerFactors], header: Mapping[str, Any], settings: KFACSettings
) -> None:
    """Refuses EKFAC without the tokens, and factors without the diagonal of what is uncovered."""
    for name, factors in found.items():
        if settings.ekfac and not factors.correctable and factors.A is not None:
            raise FactorFileError(
                f"factors: layer {name} was collected without ekfac; allowed: ekfac=False, or "
                "factors of an engine with ekfac=True"
            )
        needed = wants_sequences(settings, factors.layer.kind) and not factors.hessian
        if needed and factors.sequences is None:
            raise FactorFileError(
                f"factors: layer {name} was collected with ekfac_unit='token'; allowed for "
                "ekfac_unit='sequence': factors of an engine with it"
            )
    if settings.uncovered == "diagonal" and header.get("uncovered") != "diagonal":
        raise FactorFileError(
            f"factors: collected with uncovered={header.get('uncovered')!r}; allowed for "
            "uncovered='diagonal': factors of an engine with it"
        )


def _checked_layer(name: str, entry: Mapping[str, Any], layer: Layer | None) -> Layer:
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
    return layer


def _restore_layer(
    layer: Layer, entry: Mapping[str, Any], read: _Reader, earlier: Mapping[str, LayerFactors]
) -> LayerFactors:
    indices = layer.kind.looks_up
    read = replace(read, prefix=f"{layer.name}/")
    a = entry["A"]
    if a is not None and "same_as" in a:
        input_factor = earlier[a["same_as"]].A
    else:
        input_factor = None if a is None else read.factor("A", a, layer.dim_a)
    tokens_g = read.kept("tokens_g", None, layer.n_out)
    return LayerFactors(
        layer=layer,
        A=input_factor,
        G=read.factor("G", entry["G"], layer.dim_g),
        **{key: entry[key] for key in PLAIN if key in entry},  # no sharing in older files
        a=read.kept("a", entry["tokens"], *(() if indices else (layer.width,))),
        own=read.kept("own", layer.dim_g, 1 if layer.one_block else layer.dim_a),
        tokens_g=tokens_g,
        order=read.kept("order", None if tokens_g is None else len(tokens_g)),
        sequences=read.kept("sequences", None if tokens_g is None else len(tokens_g))
        if wants_sequences(read.settings, layer.kind)
        else None,
    )


def _spread_again(f: LayerFactors, entry: Mapping[str, Any], communicator: Communicator) -> None:
    """Cuts this rank's share out of what :func:`export` has put together."""
    if entry["G"].get("sharded") and isinstance(f.G, ColumnFactor):
        f.G.columns = f.G.columns.shard(communicator)
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
    if f.sequences is not None and rows_g is not None:
        f.sequences = f.sequences.split(rows_g)[rank].clone()


@dataclass(frozen=True)
class _Reader:
    """Takes tensors out of an export, checked against the shapes of the layers.

    ``prefix`` is that of the names that are asked for; ``settings`` say where columns are kept.
    """

    tensors: Mapping[str, Tensor]
    settings: KFACSettings
    device: torch.device
    prefix: str = ""

    def _raw(self, key: str, *shape: int | None) -> Tensor:
        name = self.prefix + key
        if name not in self.tensors:
            raise FactorFileError(f"factors: the tensor {name} is missing")
        found = self.tensors[name]
        fits = len(shape) == found.dim() and all(
            wanted in (None, length) for wanted, length in zip(shape, found.shape, strict=True)
        )
        if not fits:
            allowed = " x ".join("any" if n is None else str(n) for n in shape)
            raise FactorFileError(
                f"factors: the tensor {name} has shape {tuple(found.shape)}; allowed: {allowed}"
            )
        return found

    def tensor(self, key: str, *shape: int | None) -> Tensor:
        """Returns a tensor on the model's device; None in ``shape`` stands for any length."""
        return self._raw(key, *shape).to(self.device)

    def kept(self, key: str, *shape: int | None) -> Tensor | None:
        """Returns a tensor on the model's device, or None where the export has none."""
        return self.tensor(key, *shape) if self.prefix + key in self.tensors else None

    def factor(self, side: str, entry: Mapping[str, Any], dim: int) -> Factor:
        """Returns the factor ``A`` or ``G``, of this dimension."""
        read, structure = replace(self, prefix=f"{self.prefix}{side}/"), entry["structure"]
        found = Factor.structures.get(structure)
        if found is None:
            raise FactorFileError(f"factors: {read.prefix} has the unknown structure {structure!r}")
        return found.restored(entry, dim, read)

    def columns(self, entry: Mapping[str, Any], dim: int) -> tuple[Columns, torch.dtype]:
        """Returns columns, placed as the storage options say, and the core dtype."""
        name = entry["core_dtype"]
        if name not in DTYPES:
            raise FactorFileError(f"factors: core dtype {name!r}; allowed: {', '.join(DTYPES)}")
        data, scale = self._raw("columns", None, dim), float(entry["scale"])
        return put_back(data, scale, self.settings, DTYPES[name], self.device), DTYPES[name]
