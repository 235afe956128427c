"""Which modules of a model are K-FAC layers, and how their parameters form one matrix.

A layer is ``s = W a + b`` with ``W`` of shape ``[out, in]``. Hugging Face's ``Conv1D`` and
``nn.Embedding`` store the transpose, a convolution ``[out, in, *kernel]``; results go back in the
stored layout. A layer is known by its module's path, its parameters by *identity*, under their
name in ``named_parameters()`` (``docs/math.md``, section 1).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from fisher_lab.config.kfac import KFACSettings
from fisher_lab.curvature.errors import LayerError
from fisher_lab.curvature.wrappers import class_name, is_conv1d, unwrap

NOT_INCLUDED, EXCLUDED, NO_NORMS = "not in include", "in exclude", "norm_layers=false"
SHARED_BIAS = "a bias that several layers add"
LEFT_OUT_BY_CHOICE = (NOT_INCLUDED, EXCLUDED, NO_NORMS)
"""Why a layer is left out that the caller does not want."""


class Kind(StrEnum):
    """What a layer is; the names appear in ``layers.csv``."""

    LINEAR = "Linear"
    CONV1D = "Conv1D"
    EMBEDDING = "Embedding"
    NORM = "Norm"
    CONV = "Conv"
    DEPTHWISE = "Depthwise"
    BIAS = "Bias"


_CONVOLUTIONS = (Kind.CONV, Kind.DEPTHWISE)


@dataclass(frozen=True)
class Layer:
    """A K-FAC layer of a model.

    Attributes:
        name: path of the module ("" for a bare module).
        kind: what it is.
        labels: names of the modules whose uses of the weight add up: several where they share it.
        weight: name of its weight in ``named_parameters()``.
        bias: name of its bias, or None.
        n_in: inputs, without the bias column; of a convolution the numbers under its kernel.
        n_out: outputs.
        kernel: shape of one output's weights, as they are stored, of a convolution.
        tied: whether another use of the weight is not among these modules (embedding and head
            share it, or the other use is excluded): its gradient is more than these tokens'.
        partner: the other use of a tied weight where both are pooled (``tied=sum``).
        marked: names of the biases where the weight's uses have unlike ones, or some none: each has
            a column in the inputs, 1 in the rows of its uses and else 0; ``bias`` is None then.
    """

    name: str
    kind: Kind
    labels: tuple[str, ...] = field(repr=False)
    weight: str
    bias: str | None
    n_in: int
    n_out: int
    kernel: tuple[int, ...] = ()
    tied: bool = False
    partner: Layer | None = field(default=None, repr=False)
    marked: tuple[str, ...] = ()

    @property
    def biases(self) -> tuple[str, ...]:
        """Names of the biases that are added to its outputs, all or some."""
        return self.marked if self.bias is None else (self.bias,)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of its weight and its biases."""
        return (self.weight, *self.biases)

    @property
    def elementwise(self) -> bool:
        """Whether it scales and shifts, or only shifts, feature by feature."""
        return self.kind in (Kind.NORM, Kind.BIAS)

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored as ``[in, out]``."""
        return self.kind in (Kind.CONV1D, Kind.EMBEDDING)

    @property
    def one_block(self) -> bool:
        """Whether all of its numbers have one factor G, and there is no A."""
        return self.elementwise or self.kind is Kind.DEPTHWISE

    @property
    def augmented(self) -> bool:
        """Whether A carries a row and a column for the bias."""
        return self.bias is not None and not self.one_block

    @property
    def n_parameters(self) -> int:
        """Numbers in its weight and its bias."""
        weight = self.n_out if self.elementwise else self.n_out * self.n_in
        return weight + self.n_out * len(self.biases)

    @property
    def width(self) -> int:
        """Numbers in each row of its inputs: a bias that only some rows have is one of them."""
        return self.n_in + len(self.marked)

    @property
    def dim_a(self) -> int:
        """Dimension of the A factor."""
        return self.width + int(self.augmented)

    @property
    def dim_g(self) -> int:
        """Dimension of the G factor."""
        if not self.one_block:
            return self.n_out
        each = self.n_in if self.kind is Kind.DEPTHWISE else 1
        return self.n_out * (each + int(self.bias is not None))

    @property
    def stored(self) -> tuple[int, ...]:
        """Shape of the weight as it is stored."""
        if self.elementwise:
            return (self.n_out,)
        if self.kernel:
            return (self.n_in if self.transposed else self.n_out, *self.kernel)
        return (self.n_in, self.n_out) if self.transposed else (self.n_out, self.n_in)

    def to_matrix(self, named: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Returns the gradients as ``[out, in]``, with a column more for each bias.

        Of a norm layer scale, then shift, as ``[n, 1]`` or ``[2n, 1]``; of a bias by itself
        ``[n, 1]``; of a depthwise convolution the weights and the bias of each output, one output
        after the other, as a column as well.

        Args:
            named: by parameter; a bias without a gradient counts as zero.
            dtype: of the result.
        """
        matrix = named[self.weight].detach().to(dtype)
        biases = [named.get(name) for name in self.biases]
        zero = matrix.new_zeros(self.n_out)
        columns = [zero if bias is None else bias.detach().to(matrix) for bias in biases]
        if self.elementwise:
            return torch.cat([matrix, *columns])[:, None]
        matrix = matrix.flatten(1)
        matrix = matrix.T if self.transposed else matrix
        if columns:
            matrix = torch.cat([matrix, torch.stack(columns, dim=1)], dim=1)
        return matrix.reshape(-1, 1) if self.one_block else matrix

    def from_matrix(self, matrix: Tensor) -> dict[str, Tensor]:
        """Cuts a matrix of :meth:`to_matrix`'s shape into weight and biases, by name, as stored."""
        if self.elementwise:
            parts = matrix[:, 0].split(self.n_out)
            return dict(zip(self.names, parts, strict=True))
        matrix = matrix.reshape(self.n_out, -1) if self.one_block else matrix
        weight = matrix[:, : self.n_in]
        weight = weight.T if self.transposed else weight
        biases = {name: matrix[:, self.n_in + k] for k, name in enumerate(self.biases)}
        return {self.weight: weight.reshape(self.stored) if self.kernel else weight} | biases


def is_norm(module: nn.Module) -> bool:
    """Says whether a module is a norm layer with a scale for each feature.

    Known are ``nn.LayerNorm`` over the last dimension, the norms of torch by channel, and the RMS
    norms, those by class name (``LlamaRMSNorm``, ``T5LayerNorm``, ``nn.RMSNorm``): each
    architecture has its own class.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1:
        return False
    name = class_name(module)
    known = isinstance(module, nn.LayerNorm | nn.GroupNorm | _NormBase)
    return known or name.endswith("RMSNorm") or name == "T5LayerNorm"


def _kind_of(module: nn.Module) -> Kind | None:
    if isinstance(module, nn.Linear):
        return Kind.LINEAR
    if is_conv1d(module):
        return Kind.CONV1D
    if isinstance(module, nn.Embedding):
        return Kind.EMBEDDING
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return groups_of(module.weight.shape, module.groups)[0]
    return Kind.NORM if is_norm(module) else None


def groups_of(shape: Sequence[int], groups: int) -> tuple[Kind, Sequence[tuple[int, int] | None]]:
    """Returns what layers a convolution makes, and which rows of its weight are each one's.

    Where a group reads one channel (a depthwise convolution) all groups are one layer, else each
    is a layer of its own.

    Args:
        shape: of the weight, ``[out, in / groups, *kernel]``.
        groups: how many there are.
    """
    if groups == 1:
        return Kind.CONV, [None]
    if shape[1] == 1:
        return Kind.DEPTHWISE, [None]
    size = shape[0] // groups
    return Kind.CONV, [(start, start + size) for start in range(0, shape[0], size)]


def part_text(part: int | tuple[int, int] | None) -> str:
    """Returns what stands behind a parameter's name for a part of it: ``[3]``, ``[8:12]``."""
    if part is None:
        return ""
    return f"[{part}]" if isinstance(part, int) else f"[{part[0]}:{part[1]}]"


def plain(layer: Layer) -> dict[str, Any]:
    """Returns a layer as strings, numbers and lists, for files and for other ranks."""
    values = {f.name: getattr(layer, f.name) for f in fields(layer)}
    partner = None if layer.partner is None else plain(layer.partner)
    lists = {name: list(getattr(layer, name)) for name in ("labels", "kernel", "marked")}
    return {**values, **lists, "kind": str(layer.kind), "partner": partner}


def layer_of(entry: Mapping[str, Any]) -> Layer:
    """Returns a layer from what :func:`plain` made of it."""
    partner = entry["partner"]
    return Layer(
        **{
            **entry,
            "kind": Kind(entry["kind"]),
            "labels": tuple(entry["labels"]),
            "kernel": tuple(entry.get("kernel", ())),
            "marked": tuple(entry.get("marked", ())),
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


def is_element(name: str) -> bool:
    """Says whether a name is that of one matrix of a stack, ``experts.up[3]``."""
    return base_of(name) != name and isinstance(_index(name), int)


def _index(name: str) -> int | slice:
    """Which part of its parameter a name says: ``[3]`` an element, ``[8:12]`` rows."""
    start, colon, stop = name.partition("[")[2][:-1].partition(":")
    return slice(int(start), int(stop)) if colon else int(start)


def _pieces(name: str, length: int) -> list[str]:
    """The names of all parts of a parameter of which ``name`` is one."""
    base, index = base_of(name), _index(name)
    if isinstance(index, int):
        return [f"{base}{part_text(n)}" for n in range(length)]
    size = index.stop - index.start
    return [f"{base}{part_text((n, n + size))}" for n in range(0, length, size)]


def value_of(named: Mapping[str, Tensor], name: str) -> Tensor:
    """Returns what stands for a layer's weight in a mapping by parameter: all of it, or its part.

    Raises:
        KeyError: the parameter is not in the mapping.
    """
    whole = named[base_of(name)]
    return whole if base_of(name) == name else whole[_index(name)]


def in_parts(named: Mapping[str, Tensor], layers: Iterable[Layer]) -> dict[str, Tensor]:
    """Returns the mapping with every parameter cut up that layers have parts of (experts).

    Args:
        named: by parameter.
        layers: the layers.
    """
    names = [name for x in layers for name in x.names]
    cut = {base_of(name): name for name in names if base_of(name) != name}
    found: dict[str, Tensor] = {}
    for name, value in named.items():
        pieces = _pieces(cut[name], len(value)) if name in cut else []
        found |= {piece: value[_index(piece)] for piece in pieces} or {name: value}
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
        found[base][_index(name)] = value
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
        LayerError: no supported layer is found, and no pass can show one.
    """
    settings = settings or KFACSettings()
    names, named = parameter_names(model), dict(unwrap(model).named_parameters())
    uses = []
    for name, module in unwrap(model).named_modules():
        kind = _kind_of(module)
        weight = None if kind is None else names.get(id(module.weight))
        if kind is None or weight is None:  # a weight that others are made into has no name
            continue
        bias = names.get(id(getattr(module, "bias", None)))
        alone = bias is not None and trains_bias_alone(named[weight], named[bias])
        parts: Sequence[tuple[int, int] | None] = [None]
        if kind is Kind.CONV:
            parts = groups_of(module.weight.shape, module.groups)[1]  # type: ignore[arg-type]
        for text in map(part_text, parts):
            added = None if bias is None else bias + text
            uses.append(UseOf(name + text, kind, weight + text, None if alone else added))
            if alone and added is not None:
                label = f"{name}.bias{text}" if name else f"bias{text}"
                uses.append(UseOf(label, Kind.BIAS, added, None))
    layers = from_uses(model, uses, settings)
    known = {name for use in uses for name in (use.weight, use.bias)}
    others = [n for n, p in named.items() if p.requires_grad and n not in known]
    if not others and all(layer.kind is Kind.NORM for layer in layers.layers.values()):
        raise LayerError(_nothing_found(model, settings, layers.skipped))
    marked = _mark_shared(model, layers.layers.values())
    return replace(layers, layers={layer.name: layer for layer in marked})


def trains_bias_alone(weight: Tensor, bias: Tensor | None) -> bool:
    """Says whether of a weight and the bias beside it only the bias is trained."""
    return bias is not None and bias.requires_grad and not weight.requires_grad


def from_uses(model: nn.Module, uses: Iterable[UseOf], settings: KFACSettings) -> Layers:
    """Makes layers of the uses of a model's weights.

    Args:
        model: any module; wrappers are looked through.
        uses: in the order of the layers.
        settings: which layers to take, and how those that share a weight join.
    """
    skipped: dict[str, str] = {}
    parameters = dict(unwrap(model).named_parameters())
    modules = dict(unwrap(model).named_modules())
    found: list[Layer] = []
    uses = list(uses)
    shared, divided = _shared_biases(uses), _unlike_parts(use.weight for use in uses)
    for use in uses:
        if use.kind is Kind.NORM and not settings.norm_layers:
            continue
        weight = parameters[base_of(use.weight)]
        bias = None if use.bias in shared else use.bias
        if bias is not None and not parameters[base_of(bias)].requires_grad:
            bias = None
        reason = _why_not(use, weight, modules.get(use.label), settings)
        if reason is None and use.weight in shared:
            reason = SHARED_BIAS
        elif reason is None and base_of(use.weight) in divided - {use.weight}:
            reason = "a part of a weight that is used in another way too"
        if reason is not None:
            skipped[use.label] = reason
            continue
        value = value_of(parameters, use.weight)
        n_in, n_out = sizes(use.kind, value)
        kernel = kernel_of(use.kind, value)
        found.append(
            Layer(use.label, use.kind, (use.label,), use.weight, bias, n_in, n_out, kernel)
        )
    layers = _join_shared(found, settings.tied, skipped)
    known = input_embeddings(model)
    candidates = {
        layer.name
        for layer in layers
        if layer.kind is Kind.EMBEDDING and id(parameters[base_of(layer.weight)]) not in known
    }
    reasons = dict.fromkeys(shared, SHARED_BIAS)
    return Layers({layer.name: layer for layer in layers}, skipped, frozenset(candidates), reasons)


def _unlike_parts(names: Iterable[str]) -> set[str]:
    """The parameters that are used in parts of unlike sizes, or as a whole too."""
    forms: dict[str, set[int | None]] = {}
    for name in names:
        index = None if base_of(name) == name else _index(name)
        size = index.stop - index.start if isinstance(index, slice) else 1
        forms.setdefault(base_of(name), set()).add(None if index is None else size)
    return {name for name, sizes in forms.items() if len(sizes) > 1}


def _shared_biases(uses: Iterable[UseOf]) -> set[str]:
    """The biases that several weights' layers add: no layer's tokens give all of their gradient."""
    added_with: dict[str, set[str]] = {}
    for use in uses:
        name = use.weight if use.kind is Kind.BIAS else use.bias
        if name is not None:
            added_with.setdefault(name, set()).add(use.weight)
    return {name for name, weights in added_with.items() if len(weights) > 1}


def sizes(kind: Kind, weight: Tensor) -> tuple[int, int]:
    """Inputs and outputs of a layer."""
    if kind in (Kind.NORM, Kind.BIAS):
        return weight.numel(), weight.numel()
    rows, columns = weight.flatten(1).shape
    return (rows, columns) if kind in (Kind.CONV1D, Kind.EMBEDDING) else (columns, rows)


def kernel_of(kind: Kind, weight: Tensor) -> tuple[int, ...]:
    """Shape of what lies under one index of a weight's first dimension, where it is no vector."""
    matrix = weight.dim() <= 2 and kind not in _CONVOLUTIONS
    return () if matrix else tuple(weight.shape[1:])


def _nothing_found(model: nn.Module, settings: KFACSettings, skipped: dict[str, str]) -> str:
    kind = type(unwrap(model)).__name__
    reasons = "; ".join(
        f"{name or '(the model)'}: {why}" for name, why in list(skipped.items())[:3]
    )
    return (
        f"model: no K-FAC layer found in {kind} (linear layers, convolutions and embeddings are "
        "supported; "
        f"include={settings.include}, exclude={settings.exclude})"
        + (f"; left out: {reasons}" if reasons else "")
    )


def _why_not(
    use: UseOf, weight: Tensor, module: nn.Module | None, settings: KFACSettings
) -> str | None:
    if not weight.requires_grad:
        return "frozen"
    names = {use.label, base_of(use.label)}
    if settings.include and not any(fnmatchcase(n, p) for p in settings.include for n in names):
        return NOT_INCLUDED
    if any(fnmatchcase(n, p) for p in settings.exclude for n in names):
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
        labels = (*layer.labels, *(layer.partner.labels if layer.partner else ()))
        own = set(map(base_of, labels))
        held = (parameters[base_of(name)] for name in layer.names)
        shared = any(holders.get(id(p), own) - own for p in held)
        marked.append(replace(layer, tied=True) if shared else layer)
    return marked


def _join_group(group: list[Layer], tied: str, skipped: dict[str, str]) -> list[Layer]:
    if len(group) == 1:
        return group
    embeddings = _pool([layer for layer in group if layer.kind is Kind.EMBEDDING], skipped)
    heads = _pool([layer for layer in group if layer.kind is not Kind.EMBEDDING], skipped)
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


def _pool(layers: list[Layer], skipped: dict[str, str]) -> Layer | None:
    """One layer whose modules are all of these (they share weight and kind)."""
    if not layers:
        return None
    first = layers[0]
    alike = [layer for layer in layers if layer.kind is first.kind]
    if len(alike) < len(layers):  # a weight that is used in two ways: autograd adds them up
        first = replace(first, tied=True)
    if len({layer.bias for layer in alike}) > 1:
        if first.one_block:
            skipped |= {layer.name: "one weight with unlike biases" for layer in alike}
            return None
        given = (layer.bias for layer in alike if layer.bias is not None)
        first = replace(first, bias=None, marked=tuple(dict.fromkeys(given)))
    return replace(first, labels=tuple(dict.fromkeys(x for layer in alike for x in layer.labels)))


def every_layer(layers: Iterable[Layer]) -> list[Layer]:
    """Returns each layer once, tied partners too, in the order in which they come."""
    pairs = ((layer, layer.partner) for layer in layers)
    return [layer for pair in pairs for layer in pair if layer is not None]
