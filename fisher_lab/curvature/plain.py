"""A model without its wrappers, for engines that make passes of their own on each rank.

A forward pass under FSDP2 (``fully_shard``) is collective, and its backward pass puts parameters
away again; neither goes with per-sample gradients, forward-mode products or ranks that have
different numbers of sequences.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn

from .losses import is_sharded, unwrap


def plain(model: nn.Module) -> nn.Module:
    """Returns the module inside DDP and ``torch.compile``; a whole copy of one that is sharded.

    The copy has the same names, modes and buffers (these are shared), and parameters of its own,
    whole and in the dtype in which they are kept: as much memory as the model takes on one
    process. A mixed-precision policy of ``fully_shard`` has no part in it.

    Args:
        model: any module; where it is sharded, the call is collective over its ranks.
    """
    inner = unwrap(model)
    sharded = [module for module in inner.modules() if is_sharded(module)]
    if not sharded:
        return inner
    for module in sharded:  # a pass may have left parameters whole, in another dtype
        module.reshard()  # type: ignore[operator]
    return _Copy().of(inner)


class _Copy:
    """Copies a tree of modules; what has several places in it keeps them."""

    def __init__(self) -> None:
        self._modules: dict[int, nn.Module] = {}
        self._parameters: dict[int, nn.Parameter] = {}

    def of(self, module: nn.Module) -> nn.Module:
        if id(module) in self._modules:
            return self._modules[id(module)]
        cls = _class_before(module)
        copy: nn.Module = cls.__new__(cls)
        self._modules[id(module)] = copy
        state = {key: _without_fsdp(value) for key, value in vars(module).items()}
        parameters = module._parameters.items()
        children = module._modules.items()
        state["_parameters"] = {n: p if p is None else self._whole(p) for n, p in parameters}
        state["_modules"] = {n: m if m is None else self.of(m) for n, m in children}
        state["_buffers"] = dict(module._buffers)
        vars(copy).update(state)
        return copy

    def _whole(self, parameter: nn.Parameter) -> nn.Parameter:
        if id(parameter) not in self._parameters:
            value: Tensor = parameter.detach()
            gather = getattr(value, "full_tensor", None)  # a DTensor's
            value = value if gather is None else gather()
            whole = nn.Parameter(value, requires_grad=parameter.requires_grad)
            self._parameters[id(parameter)] = whole
        return self._parameters[id(parameter)]


def _class_before(module: nn.Module) -> type[nn.Module]:
    """The module's class before ``fully_shard`` put one of its own in its place."""
    cls = type(module)
    return cls.__mro__[getattr(cls, "_orig_cls_mro_index", 2)] if is_sharded(module) else cls


def _without_fsdp(value: Any) -> Any:
    """A module's entry; of a dictionary of hooks those that are not FSDP's."""
    if type(value) is not OrderedDict:
        return value
    return OrderedDict((k, v) for k, v in value.items() if not _is_fsdp(v))


def _is_fsdp(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp")


__all__ = ["plain"]
