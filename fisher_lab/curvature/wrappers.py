"""Looks through what wraps a model: ``torch.compile``, data parallelism, FSDP2.

:func:`plain` gives a model without its wrappers to engines that make passes of their own on each
rank; the rest goes between whole tensors and shards. A forward pass under FSDP2 (``fully_shard``)
is collective, and its backward pass puts parameters away again; neither goes with per-sample
gradients, forward-mode products or ranks that have different numbers of sequences.
"""

from __future__ import annotations

import math
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fisher_lab.curvature.linalg import all_finite

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


def unwrap(model: nn.Module) -> nn.Module:
    """Returns the module inside ``torch.compile`` and data-parallel wrappers, or the model."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        else:
            return model


def class_name(module: nn.Module) -> str:
    """Returns the name of a module's class; FSDP2 puts a class of its own before it."""
    name = type(module).__name__
    return name.removeprefix("FSDP") if is_sharded(module) else name


def is_sharded(module: nn.Module) -> bool:
    """Says whether ``fully_shard`` was applied to this very module."""
    return any(base.__name__ == "FSDPModule" for base in type(module).__mro__[1:])


def group_of_passes(model: nn.Module) -> dist.ProcessGroup | None:
    """Returns the ranks that a forward pass moves data between; they have to make it together.

    None where each rank's passes are its own.
    """
    at_rest(model)  # a pass may have left shards whole
    shard = next((p for p in model.parameters() if is_shard(p)), None)
    parallel = nn.parallel.DistributedDataParallel
    found = [m.process_group for m in model.modules() if isinstance(m, parallel)]
    if shard is not None:
        mesh = shard.device_mesh
        found = [mesh.get_group() if mesh.ndim == 1 else dist.group.WORLD]
    return found[0] if found and dist.get_world_size(found[0]) > 1 else None


def uncompiled(model: nn.Module) -> AbstractContextManager[Any]:
    """Compiled blocks run as they were written, so that hooks on what is inside them are called."""
    compiled = any(
        hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) is not None
        for m in model.modules()
    )
    # Only then: the import of the compiler takes two seconds.
    if compiled and hasattr(torch.compiler, "set_stance"):
        return torch.compiler.set_stance("force_eager")
    return nullcontext()


def is_shard(tensor: object) -> TypeGuard[DTensor]:
    """Says whether this is a shard; where nobody has imported what makes them there is none.

    The import takes 0.4 s, and hardly any process has shards.
    """
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def device_of(model: nn.Module) -> torch.device:
    """Returns the device of the model's first parameter (CPU for a model without any)."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def is_conv1d(module: nn.Module) -> bool:
    """Says whether a module is a linear layer that stores its weight as ``[in, out]``.

    Hugging Face's ``Conv1D`` is known by its class name, so that nothing imports it.
    """
    weight = getattr(module, "weight", None)
    return class_name(module) == "Conv1D" and isinstance(weight, Tensor) and weight.dim() == 2


def plain(model: nn.Module) -> nn.Module:
    """Returns the module inside DDP and ``torch.compile``; a whole copy of one that is sharded.

    The copy has the same names, modes and buffers (these are shared), and parameters of its own,
    whole and in the dtype in which they are kept: as much memory as the model takes on one
    process. A mixed-precision policy of ``fully_shard`` has no part in it.

    Args:
        model: any module; where it is sharded, the call is collective over its ranks.
    """
    inner = unwrap(model)
    if not any(is_sharded(module) for module in inner.modules()):
        return inner
    at_rest(inner)  # a pass may have left parameters whole, in another dtype
    return _whole_copy(inner, {})


def _whole_copy(module: nn.Module, known: dict[int, Any]) -> Any:
    """Copies a tree of modules; what has several places in it (``known``) keeps them."""
    if id(module) in known:
        return known[id(module)]
    cls: type[nn.Module] = type(module)
    if is_sharded(module):  # fully_shard put a class of its own in the place of this one
        cls = cls.__mro__[getattr(cls, "_orig_cls_mro_index", 2)]
    copy = known[id(module)] = cls.__new__(cls)
    state = {key: _without_fsdp(value) for key, value in vars(module).items()}
    for parameter in module._parameters.values():
        if parameter is not None and id(parameter) not in known:
            value: Tensor = parameter.detach()
            gather = getattr(value, "full_tensor", None)  # a DTensor's
            value = value if gather is None else gather()
            whole = nn.Parameter(value, requires_grad=parameter.requires_grad)
            known[id(parameter)] = whole
    state["_parameters"] = {n: known.get(id(p)) for n, p in module._parameters.items()}
    children = module._modules.items()
    state["_modules"] = {n: m if m is None else _whole_copy(m, known) for n, m in children}
    state["_buffers"] = dict(module._buffers)
    vars(copy).update(state)
    return copy


def _without_fsdp(value: Any) -> Any:
    """A module's entry; of a dictionary of hooks those that are not FSDP's."""
    if type(value) is not OrderedDict:
        return value
    kept = OrderedDict(value)
    for key, hook in value.items():
        if str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp"):
            del kept[key]
    return kept


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns whole tensors in the place of shards; collective where there are any."""
    return {name: t.full_tensor() if is_shard(t) else t for name, t in tensors.items()}


def as_given(
    result: Mapping[str, Tensor],
    given: Mapping[str, Tensor] | None,
    model: nn.Module,
    shards: bool | None = None,
) -> dict[str, Tensor]:
    """Returns whole tensors by parameter name as such, or as shards like the model's parameters.

    Args:
        result: the same on all ranks.
        given: the gradients that they were made from.
        model: whose parameters say how shards lie.
        shards: whether shards are wanted; None: where shards were given.
    """
    parameters = dict(unwrap(model).named_parameters()) if shards is not False else {}
    found: dict[str, Tensor] = dict(result)
    for name, value in result.items():
        like = parameters.get(name)
        if is_shard(like) and (shards or is_shard((given or {}).get(name))):
            found[name] = _cut(value, like)
    return found


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shards a model, the same on all ranks, over a one-dimensional mesh in place.

    First the elements of each ``ModuleList``, then what remains. Every part is put away after its
    forward pass, the outermost too: outside of passes the parameters are shards, whatever was
    computed before.
    """
    from torch.distributed.fsdp import fully_shard  # not in every torch that K-FAC runs on

    for block in _blocks(model):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The elements of the outermost lists that have parameters."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from (block for block in child if next(block.parameters(), None) is not None)
        else:
            yield from _blocks(child)


def at_rest(model: nn.Module) -> None:
    """Puts away what a pass without an end, such as that of the factors, has left whole."""
    for module in model.modules():
        if is_sharded(module):
            module.reshard()  # type: ignore[operator]


def like(value: Tensor, model: Tensor) -> Tensor:
    """Returns this rank's shard of a whole tensor, as ``model`` lies; nothing is sent."""
    return _cut(value.to(model.device), model) if is_shard(model) else value


def _cut(value: Tensor, like: DTensor) -> Tensor:
    """Every rank has the whole tensor already: its shard is cut out, nothing is sent."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def gathered(state: Any, keep: bool) -> Any:
    """Returns nested mappings and sequences with whole tensors on the CPU; collective.

    A rank that does not ``keep`` them has None in the place of every tensor.
    """
    if is_shard(state):
        full = state.full_tensor().detach()
        return full.cpu() if keep else None
    if isinstance(state, Tensor):
        return state if keep else None
    if isinstance(state, Mapping):
        return {key: gathered(value, keep) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(gathered(value, keep) for value in state)
    return state


def scattered(state: Mapping[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
    """Returns the ``state_dict`` of an optimiser with shards in the place of whole tensors.

    ``parameters`` are in the order of its groups.
    """
    entries = {
        index: {
            key: like(value, parameters[int(index)])
            if isinstance(value, Tensor) and value.shape == parameters[int(index)].shape
            else value
            for key, value in entry.items()
        }
        for index, entry in state["state"].items()
    }
    return {**state, "state": entries}


def finite(tensors: Mapping[str, Tensor]) -> bool:
    """Says whether tensors hold neither NaN nor infinity; collective where sharded."""
    here = {name: t.to_local() if is_shard(t) else t for name, t in tensors.items()}
    sums = (0.0 if all_finite(t) else math.nan for t in here.values())
    found = sum(sums)
    mesh = next((t.device_mesh for t in tensors.values() if is_shard(t)), None)
    if mesh is not None:
        found = _over(mesh, found)
    return math.isfinite(found)


def inner(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """Returns ``<left, right>`` over the names of both, in float64; collective where sharded."""
    total, part, mesh = 0.0, 0.0, None
    for name, one in left.items():
        if name not in right:
            continue
        other = right[name]
        if is_shard(one) and is_shard(other):
            mesh = one.device_mesh
            part += float((one.to_local().double() * other.to_local().double()).sum())
        else:
            total += float((one.double() * other.double()).sum())
    return total if mesh is None else total + _over(mesh, part)


def _over(mesh: DeviceMesh, part: float) -> float:
    """The sum of a number over the ranks that hold shards; collective."""
    from torch.distributed.tensor import DTensor, Partial

    device = torch.device(mesh.device_type)
    sums = torch.tensor(part, dtype=torch.float64, device=device)
    joined = DTensor.from_local(sums, mesh, [Partial()])
    return float(joined.full_tensor())
