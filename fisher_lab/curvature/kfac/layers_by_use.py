"""Makes layers of the uses of a model's weights: which are taken, and which of them join.

The uses are those that modules promise (:mod:`.layers_by_module`) or a forward pass shows
(:mod:`.capture`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from torch import Tensor, nn

from fisher_lab.config.kfac import KFACSettings
from fisher_lab.curvature.kfac.layers import Kind, Layer, kernel_of, sizes
from fisher_lab.curvature.kfac.parts import base_of, form_of, value_of
from fisher_lab.curvature.wrappers import unwrap

NOT_INCLUDED, EXCLUDED, NO_NORMS = "not in include", "in exclude", "norm_layers=false"
SHARED_BIAS = "a bias that several layers add"
NOT_USED, NO_TOKEN = "not used in the forward pass", "no token with a gradient in this batch"
UNREACHED = (NOT_USED, NO_TOKEN)
"""Why a parameter has no part in the loss of these batches: another part of the model has."""
LEFT_OUT_BY_CHOICE = (NOT_INCLUDED, EXCLUDED, NO_NORMS)
"""Why a layer is left out that the caller does not want."""


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


def trains_bias_alone(weight: Tensor, bias: Tensor | None) -> bool:
    """Says whether of a weight and the bias beside it only the bias is trained."""
    return bias is not None and bias.requires_grad and not weight.requires_grad


def from_uses(
    model: nn.Module,
    uses: Iterable[UseOf],
    settings: KFACSettings,
    unexplained: Collection[str] = (),
) -> Layers:
    """Makes layers of the uses of a model's weights.

    Args:
        model: any module; wrappers are looked through.
        uses: in the order of the layers.
        settings: which layers to take, and how those that share a weight join.
        unexplained: parameters that have other uses too, of which no layer is made. Rows or columns
            of those make none either: which of the others such a use takes is not known.
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
        elif reason is None and _is_mixed(use.weight, divided, unexplained):
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
        if layer.kind.looks_up and id(parameters[base_of(layer.weight)]) not in known
    }
    reasons = dict.fromkeys(shared, SHARED_BIAS)
    return Layers({layer.name: layer for layer in layers}, skipped, frozenset(candidates), reasons)


def readers_in(output: Tensor, wanted: Collection[int]) -> dict[int, str]:
    """Returns the functions of a graph that read parameters: what no watched operator shows.

    A ``torch.autograd.Function`` is not dispatched as other functions are; its node names it.

    Args:
        output: whose graph is looked at; what a re-entrant checkpoint hides is not seen.
        wanted: identities of parameters.

    Returns:
        Identity of a parameter that the graph reaches -> name of a function that reads it.
    """
    found: dict[int, str] = {}
    waiting, seen = [output.grad_fn], set()
    while waiting and len(found) < len(wanted):
        node = waiting.pop()
        for before, _ in () if node is None else node.next_functions:
            identity = id(getattr(before, "variable", None))
            if identity in wanted and node is not None:
                found.setdefault(identity, node.name().removesuffix("Backward"))
            elif before is not None and before not in seen:
                seen.add(before)
                waiting.append(before)
    return found


def _is_mixed(name: str, divided: Collection[str], unexplained: Collection[str]) -> bool:
    """Whether a weight is a part, and its parameter has parts of other kinds or other uses."""
    base, form = base_of(name), form_of(name)
    if form is None:
        return False
    return base in divided or (form[0] != "element" and base in unexplained)


def _unlike_parts(names: Iterable[str]) -> set[str]:
    """The parameters that are used in parts of unlike sizes, or as a whole too."""
    forms: dict[str, set[tuple | None]] = {}
    for name in names:
        forms.setdefault(base_of(name), set()).add(form_of(name))
    return {name for name, sizes in forms.items() if len(sizes) > 1}


def _shared_biases(uses: Iterable[UseOf]) -> set[str]:
    """The biases that several weights' layers add: no layer's tokens give all of their gradient."""
    added_with: dict[str, set[str]] = {}
    for use in uses:
        name = use.weight if use.kind is Kind.BIAS else use.bias
        if name is not None:
            added_with.setdefault(name, set()).add(use.weight)
    return {name for name, weights in added_with.items() if len(weights) > 1}


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
    if use.kind.looks_up:
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


def _join_group(group: list[Layer], tied: str, skipped: dict[str, str]) -> list[Layer]:
    if len(group) == 1:
        return group
    embeddings = _pool([layer for layer in group if layer.kind.looks_up], skipped)
    heads = _pool([layer for layer in group if not layer.kind.looks_up], skipped)
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
