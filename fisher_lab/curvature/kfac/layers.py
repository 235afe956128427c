"""Which modules of a model are K-FAC layers, and how their parameters form one matrix.

A layer is ``s = W a + b`` with ``W`` of shape ``[out, in]``. Hugging Face's ``Conv1D`` and
``nn.Embedding`` store the transpose; results go back in the stored layout. A layer is known by
its module's path, its parameters by *identity*, under their name in ``named_parameters()``
(``docs/math.md``, section 1).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from fisher_lab.config.kfac import KFACSettings
from fisher_lab.curvature.errors import LayerError
from fisher_lab.curvature.wrappers import class_name, is_conv1d, unwrap

NOT_INCLUDED, EXCLUDED, NO_NORMS = "not in include", "in exclude", "norm_layers=false"
LEFT_OUT_BY_CHOICE = (NOT_INCLUDED, EXCLUDED, NO_NORMS)
"""Why a layer is left out that the caller does not want."""


class Kind(StrEnum):
    """What a layer is; the names appear in ``layers.csv``."""

    LINEAR = "Linear"
    CONV1D = "Conv1D"
    EMBEDDING = "Embedding"
    NORM = "Norm"


@dataclass(frozen=True)
class Layer:
    """A K-FAC layer of a model.

    Attributes:
        name: path of the module ("" for a bare module).
        kind: what it is.
        labels: names of the modules whose uses of the weight add up: several where they share it.
        weight: name of its weight in ``named_parameters()``.
        bias: name of its bias, or None.
        n_in: inputs, without the bias column.
        n_out: outputs.
        tied: whether another use of the weight is not among these modules (embedding and head
            share it, or the other use is excluded): its gradient is more than these tokens'.
        partner: the other use of a tied weight where both are pooled (``tied=sum``).
    """

    name: str
    kind: Kind
    labels: tuple[str, ...] = field(repr=False)
    weight: str
    bias: str | None
    n_in: int
    n_out: int
    tied: bool = False
    partner: Layer | None = field(default=None, repr=False)

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored as ``[in, out]``."""
        return self.kind in (Kind.CONV1D, Kind.EMBEDDING)

    @property
    def augmented(self) -> bool:
        """Whether A carries a row and a column for the bias."""
        return self.bias is not None and self.kind is not Kind.NORM

    @property
    def n_parameters(self) -> int:
        """Numbers in its weight and its bias."""
        weight = self.n_out if self.kind is Kind.NORM else self.n_out * self.n_in
        return weight + (self.n_out if self.bias is not None else 0)

    @property
    def dim_a(self) -> int:
        """Dimension of the A factor."""
        return self.n_in + int(self.augmented)

    def to_matrix(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Returns the gradient as ``[out, in]``, or ``[out, in + 1]`` where there is a bias.

        Of a norm layer scale, then shift, as ``[n, 1]`` or ``[2n, 1]``. A bias that exists but has
        no gradient counts as zero.
        """
        matrix = weight.detach().to(dtype)
        if self.kind is Kind.NORM:
            if self.bias is None:
                return matrix[:, None]
            shift = torch.zeros_like(matrix) if bias is None else bias.detach().to(matrix)
            return torch.cat([matrix, shift])[:, None]
        matrix = matrix.T if self.transposed else matrix
        if not self.augmented:
            return matrix
        column = matrix.new_zeros(self.n_out) if bias is None else bias.detach().to(matrix)
        return torch.cat([matrix, column[:, None]], dim=1)

    def from_matrix(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """Splits a matrix of :meth:`to_matrix`'s shape into weight and bias, as stored."""
        if self.kind is Kind.NORM:
            shift = matrix[self.n_out :, 0] if self.bias is not None else None
            return matrix[: self.n_out, 0], shift
        weight = matrix[:, : self.n_in]
        weight = weight.T if self.transposed else weight
        bias = matrix[:, self.n_in] if self.augmented else None
        return weight, bias


def is_norm(module: nn.Module) -> bool:
    """Says whether a module is a norm layer with a scale for each feature.

    Known are ``nn.LayerNorm`` over the last dimension and the RMS norms, those by class name
    (``LlamaRMSNorm``, ``T5LayerNorm``, ``nn.RMSNorm``): each architecture has its own class.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1:
        return False
    name = class_name(module)
    return isinstance(module, nn.LayerNorm) or name.endswith("RMSNorm") or name == "T5LayerNorm"


def _kind_of(module: nn.Module) -> Kind | None:
    if isinstance(module, nn.Linear):
        return Kind.LINEAR
    if is_conv1d(module):
        return Kind.CONV1D
    if isinstance(module, nn.Embedding):
        return Kind.EMBEDDING
    return Kind.NORM if is_norm(module) else None


def plain(layer: Layer) -> dict[str, Any]:
    """Returns a layer as strings, numbers and lists, for files and for other ranks."""
    values = {f.name: getattr(layer, f.name) for f in fields(layer)}
    partner = None if layer.partner is None else plain(layer.partner)
    return {**values, "kind": str(layer.kind), "labels": list(layer.labels), "partner": partner}


def layer_of(entry: Mapping[str, Any]) -> Layer:
    """Returns a layer from what :func:`plain` made of it."""
    partner = entry["partner"]
    return Layer(
        **{
            **entry,
            "kind": Kind(entry["kind"]),
            "labels": tuple(entry["labels"]),
            "partner": None if partner is None else layer_of(partner),
        }
    )


@dataclass(frozen=True)
class UseOf:
    """One use of a weight, from which a layer is made.

    Attributes:
        label: name of the module that holds the weight.
        kind: what layer it makes.
        weight: name of the weight in ``named_parameters()``.
        bias: name of the bias that is added with it, or None.
    """

    label: str
    kind: Kind
    weight: str
    bias: str | None


@dataclass(frozen=True)
class Layers:
    """The K-FAC layers of a model, with what was left out and why.

    Attributes:
        layers: by name, in the order of ``named_modules()``.
        skipped: name of a supported layer that is left out -> reason.
        candidates: names among ``layers`` (embeddings) that only a forward pass can confirm.
        reasons: name of a parameter that no layer covers, or not alone -> why.
    """

    layers: dict[str, Layer]
    skipped: dict[str, str]
    candidates: frozenset[str]
    reasons: dict[str, str] = field(default_factory=dict)


def base_of(name: str) -> str:
    """Returns the parameter behind a layer's weight: of ``experts.up[3]``, ``experts.up``."""
    return name.partition("[")[0]


def value_of(named: Mapping[str, Tensor], name: str) -> Tensor:
    """Returns what stands for a layer's weight in a mapping by parameter: all of it, or its part.

    Raises:
        KeyError: the parameter is not in the mapping.
    """
    base, _, part = name.partition("[")
    return named[base][int(part[:-1])] if part else named[base]


def in_parts(named: Mapping[str, Tensor], layers: Iterable[Layer]) -> dict[str, Tensor]:
    """Returns the mapping with every parameter cut up that layers have parts of (experts).

    Args:
        named: by parameter.
        layers: the layers.
    """
    cut = {base_of(x.weight) for x in layers if base_of(x.weight) != x.weight} & set(named)
    found: dict[str, Tensor] = {}
    for name, value in named.items():
        parts = {f"{name}[{n}]": part for n, part in enumerate(value)} if name in cut else {}
        found |= parts or {name: value}
    return found


def whole_again(named: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Returns a mapping by parameter of one with parts; where there is no part, zeros.

    Args:
        named: by parameter, or by part of one.
        shapes: of the parameters that are cut up.
    """
    found: dict[str, Tensor] = {}
    for name, value in named.items():
        base = base_of(name)
        if base == name:
            found[name] = value
            continue
        if base not in found:
            found[base] = value.new_zeros(shapes[base])
        found[base][int(name[len(base) + 1 : -1])] = value
    return found


def parameter_names(model: nn.Module) -> dict[int, str]:
    """Returns the identity of each parameter -> its name in ``named_parameters()``."""
    return {id(p): name for name, p in unwrap(model).named_parameters()}


def input_embeddings(model: nn.Module) -> set[int]:
    """Returns the identities of the weights that turn token ids into vectors."""
    getter = getattr(unwrap(model), "get_input_embeddings", None)
    if getter is None:
        return set()
    try:
        module = getter()
    except (NotImplementedError, AttributeError):
        return set()
    return {id(module.weight)} if isinstance(module, nn.Embedding) else set()


def discover(model: nn.Module, settings: KFACSettings | None = None) -> Layers:
    """Finds the K-FAC layers that a model's modules promise, before a forward pass shows them.

    Args:
        model: any module; wrappers are looked through.
        settings: which layers to take.

    Raises:
        LayerError: no supported layer is found.
    """
    settings = settings or KFACSettings()
    names = parameter_names(model)
    uses = []
    for name, module in unwrap(model).named_modules():
        kind = _kind_of(module)
        weight = None if kind is None else names.get(id(module.weight))
        if kind is None or weight is None:  # a weight that others are made into has no name
            continue
        uses.append(UseOf(name, kind, weight, names.get(id(getattr(module, "bias", None)))))
    layers = from_uses(model, uses, settings)
    if not any(layer.kind is not Kind.NORM for layer in layers.layers.values()):
        raise LayerError(_nothing_found(model, settings, layers.skipped))
    marked = _mark_shared(model, layers.layers.values())
    return replace(layers, layers={layer.name: layer for layer in marked})


def from_uses(model: nn.Module, uses: Iterable[UseOf], settings: KFACSettings) -> Layers:
    """Makes layers of the uses of a model's weights.

    Args:
        model: any module; wrappers are looked through.
        uses: in the order of the layers.
        settings: which layers to take, and how those that share a weight join.

    Raises:
        LayerError: one weight is used with different biases.
    """
    skipped: dict[str, str] = {}
    parameters = dict(unwrap(model).named_parameters())
    modules = dict(unwrap(model).named_modules())
    found: list[Layer] = []
    for use in uses:
        if use.kind is Kind.NORM and not settings.norm_layers:
            continue
        weight = parameters[base_of(use.weight)]
        bias = use.bias if use.bias is None or parameters[use.bias].requires_grad else None
        reason = _why_not(use, weight, modules.get(use.label), settings)
        if reason is not None:
            skipped[use.label] = reason
            continue
        n_in, n_out = sizes(use.kind, value_of(parameters, use.weight))
        found.append(Layer(use.label, use.kind, (use.label,), use.weight, bias, n_in, n_out))
    layers = _join_shared(found, settings.tied, skipped)
    known = input_embeddings(model)
    candidates = {
        layer.name
        for layer in layers
        if layer.kind is Kind.EMBEDDING and id(parameters[base_of(layer.weight)]) not in known
    }
    return Layers({layer.name: layer for layer in layers}, skipped, frozenset(candidates))


def sizes(kind: Kind, weight: Tensor) -> tuple[int, int]:
    """Inputs and outputs of a layer."""
    if kind is Kind.NORM:
        return weight.numel(), weight.numel()
    rows, columns = weight.shape
    return (columns, rows) if kind is Kind.LINEAR else (rows, columns)


def _nothing_found(model: nn.Module, settings: KFACSettings, skipped: dict[str, str]) -> str:
    kind = type(unwrap(model)).__name__
    reasons = "; ".join(
        f"{name or '(the model)'}: {why}" for name, why in list(skipped.items())[:3]
    )
    return (
        f"model: no K-FAC layer found in {kind} (Linear, Conv1D and Embedding are supported; "
        f"include={settings.include}, exclude={settings.exclude})"
        + (f"; left out: {reasons}" if reasons else "")
    )


def _why_not(
    use: UseOf, weight: Tensor, module: nn.Module | None, settings: KFACSettings
) -> str | None:
    if not weight.requires_grad:
        return "frozen"
    if settings.include and not any(fnmatchcase(use.label, p) for p in settings.include):
        return NOT_INCLUDED
    if any(fnmatchcase(use.label, p) for p in settings.exclude):
        return EXCLUDED
    if use.kind is Kind.EMBEDDING:
        options = ("max_norm", "scale_grad_by_freq", "sparse")
        used = [o for o in options if getattr(module, o, None)]
        return f"uses {used[0]}" if used else None
    return None


def _join_shared(found: Sequence[Layer], tied: str, skipped: dict[str, str]) -> list[Layer]:
    """Makes one layer of those that share a weight; ``tied`` says how embedding and head join."""
    groups: dict[str, list[Layer]] = {}
    for layer in found:
        groups.setdefault(layer.weight, []).append(layer)
    return [layer for group in groups.values() for layer in _join_group(group, tied, skipped)]


def _mark_shared(model: nn.Module, layers: Iterable[Layer]) -> list[Layer]:
    """Marks layers whose weight or bias another module has too, which is not theirs."""
    parameters = dict(unwrap(model).named_parameters())
    holders: dict[int, set[str]] = {}
    for path, module in unwrap(model).named_modules():
        # A module that names its layer's bias as its own (BERT's head) is not another use of it.
        alone = getattr(module, "weight", None) is None
        for name, parameter in module.named_parameters(recurse=False):
            if not (alone and name == "bias"):
                holders.setdefault(id(parameter), set()).add(path)
    marked = []
    for layer in layers:
        own = set(layer.labels) | set(layer.partner.labels if layer.partner else ())
        held = (parameters[name] for name in (layer.weight, layer.bias) if name is not None)
        shared = any(holders.get(id(p), own) - own for p in held)
        marked.append(replace(layer, tied=True) if shared else layer)
    return marked


def _join_group(group: list[Layer], tied: str, skipped: dict[str, str]) -> list[Layer]:
    if len(group) == 1:
        return group
    embeddings = _pool([layer for layer in group if layer.kind is Kind.EMBEDDING])
    heads = _pool([layer for layer in group if layer.kind is not Kind.EMBEDDING])
    if embeddings is None or heads is None:
        return [layer for layer in (embeddings, heads) if layer is not None]
    match tied:
        case "head":
            skipped[embeddings.name] = f"tied to {heads.name}"
            return [replace(heads, tied=True)]
        case "embedding":
            skipped[heads.name] = f"tied to {embeddings.name}"
            return [replace(embeddings, tied=True)]
        case _:
            return [replace(heads, tied=True, partner=replace(embeddings, tied=True))]


def _pool(layers: list[Layer]) -> Layer | None:
    """One layer whose modules are all of these (they share weight and kind)."""
    if not layers:
        return None
    first = layers[0]
    biases = {layer.bias for layer in layers}
    if len(biases) > 1:
        names = ", ".join(layer.name for layer in layers)
        raise LayerError(f"layers {names}: one weight but different biases; exclude all but one")
    return replace(first, labels=tuple(dict.fromkeys(x for layer in layers for x in layer.labels)))


def every_layer(layers: Iterable[Layer]) -> list[Layer]:
    """Returns each layer once, tied partners too, in the order in which they come."""
    pairs = ((layer, layer.partner) for layer in layers)
    return [layer for pair in pairs for layer in pair if layer is not None]
