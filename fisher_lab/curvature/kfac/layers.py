"""Which modules of a model are K-FAC layers, and how their parameters form one matrix.

A layer is ``s = W a + b`` with ``W`` of shape ``[out, in]``. Hugging Face's ``Conv1D`` and
``nn.Embedding`` store the transpose; results go back in the stored layout. A layer is known by
its module's path, its parameters by *identity*, under their name in ``named_parameters()``
(``docs/math.md``, section 1).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from fisher_lab.config.kfac import KFACSettings
from fisher_lab.curvature.errors import LayerError
from fisher_lab.curvature.wrappers import class_name, is_conv1d, unwrap


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
        modules: the modules whose calls add up: more than one where they share a weight.
        weight: name of its weight in ``named_parameters()``.
        bias: name of its bias, or None.
        n_in: inputs, without the bias column.
        n_out: outputs.
        tied: whether another use of the weight is not among these modules (embedding and head
            share it, or the other module is excluded): its gradient is more than these tokens'.
        partner: the other use of a tied weight where both are pooled (``tied=sum``).
    """

    name: str
    kind: Kind
    modules: tuple[nn.Module, ...] = field(repr=False)
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


def _sizes(kind: Kind, weight: Tensor) -> tuple[int, int]:
    if kind is Kind.NORM:
        return weight.numel(), weight.numel()
    rows, columns = weight.shape
    return (columns, rows) if kind is Kind.LINEAR else (rows, columns)


@dataclass(frozen=True)
class Layers:
    """The K-FAC layers of a model, with what was left out and why.

    Attributes:
        layers: by name, in the order of ``named_modules()``.
        skipped: name of a supported layer that is left out -> reason.
        candidates: names among ``layers`` (embeddings) that only a forward pass can confirm.
    """

    layers: dict[str, Layer]
    skipped: dict[str, str]
    candidates: frozenset[str]


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
    """Finds the K-FAC layers of a model.

    Args:
        model: any module; wrappers are looked through.
        settings: which layers to take.

    Raises:
        LayerError: no supported layer is found.
    """
    settings = settings or KFACSettings()
    names, skipped = parameter_names(model), {}
    found: list[Layer] = []
    for name, module in unwrap(model).named_modules():
        kind = _kind_of(module)
        if kind is None or (kind is Kind.NORM and not settings.norm_layers):
            continue
        reason = _why_not(name, module, kind, settings)
        if reason is not None:
            skipped[name] = reason
            continue
        n_in, n_out = _sizes(kind, module.weight)  # type: ignore[arg-type]
        bias = getattr(module, "bias", None)
        found.append(
            Layer(
                name=name,
                kind=kind,
                modules=(module,),
                weight=names[id(module.weight)],
                bias=None if bias is None else names[id(bias)],
                n_in=n_in,
                n_out=n_out,
            )
        )
    layers = _mark_shared(model, _join_shared(found, settings.tied, skipped))
    if not any(layer.kind is not Kind.NORM for layer in layers):
        raise LayerError(_nothing_found(model, settings, skipped))
    known = input_embeddings(model)
    candidates = {
        layer.name
        for layer in layers
        if layer.kind is Kind.EMBEDDING and id(layer.modules[0].weight) not in known
    }
    return Layers({layer.name: layer for layer in layers}, skipped, frozenset(candidates))


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


def _why_not(name: str, module: nn.Module, kind: Kind, settings: KFACSettings) -> str | None:
    if not module.weight.requires_grad:  # type: ignore[union-attr]
        return "frozen"
    if settings.include and not any(fnmatchcase(name, p) for p in settings.include):
        return "not in include"
    if any(fnmatchcase(name, p) for p in settings.exclude):
        return "in exclude"
    if kind is Kind.EMBEDDING:
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


def _mark_shared(model: nn.Module, layers: list[Layer]) -> list[Layer]:
    """Marks layers whose weight or bias another module has too, which is not theirs."""
    holders: dict[int, set[int]] = {}
    for module in unwrap(model).modules():
        # A module that names its layer's bias as its own (BERT's head) is not another use of it.
        alone = getattr(module, "weight", None) is None
        for name, parameter in module.named_parameters(recurse=False):
            if not (alone and name == "bias"):
                holders.setdefault(id(parameter), set()).add(id(module))
    marked = []
    for layer in layers:
        own = {id(module) for _, module in every_module([layer])}
        held = (getattr(layer.modules[0], name, None) for name in ("weight", "bias"))
        elsewhere = any(holders.get(id(p), own) - own for p in held if p is not None)
        marked.append(replace(layer, tied=True) if elsewhere else layer)
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
    modules = tuple(m for layer in layers for m in layer.modules)
    return replace(first, modules=modules)


def every_module(layers: Iterable[Layer]) -> list[tuple[Layer, nn.Module]]:
    """Returns each layer (tied partners too) with each of its modules."""
    pairs: list[tuple[Layer, nn.Module]] = []
    for layer in layers:
        pairs += [(layer, module) for module in layer.modules]
        if layer.partner is not None:
            pairs += [(layer.partner, module) for module in layer.partner.modules]
    return pairs


def every_layer(layers: Iterable[Layer]) -> list[Layer]:
    """Returns each layer once, tied partners too, in the order in which they come."""
    return list({layer.name: layer for layer, _ in every_module(layers)}.values())
