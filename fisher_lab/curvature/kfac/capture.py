"""One forward pass and its gradients, recorded use by use.

A :class:`Capture` keeps *references* to what the linear operators read (:mod:`.operators`) and the
graph edges of what they give; the gradients ``g_t = dL/ds_t`` come from one
``torch.autograd.grad`` with respect to those edges, so no weight gradient is computed and ``.grad``
is never touched. Which rows are tokens is decided by the tensor's *origin* (:mod:`.token_rows`;
``docs/math.md``, section 1), never by its shape.

Shapes: ``B`` sequences of ``S`` positions; a layer's tokens come out as ``[T, features]``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.checkpoint import CheckpointFunction
from torch.utils.hooks import RemovableHandle

from fisher_lab.config.kfac import KFACSettings
from fisher_lab.curvature.errors import LayerError
from fisher_lab.curvature.kfac.examples import NO_EXAMPLE, Examples
from fisher_lab.curvature.kfac.given import GivenInputs
from fisher_lab.curvature.kfac.layers import Kind, Layer
from fisher_lab.curvature.kfac.layers_by_use import (
    NO_NORMS,
    NOT_USED,
    Layers,
    UseOf,
    from_uses,
    readers_in,
    trains_bias_alone,
)
from fisher_lab.curvature.kfac.operators import OperatorWatch, Use, bias_alone, opened
from fisher_lab.curvature.kfac.parts import base_of, part_text
from fisher_lab.curvature.kfac.policy import wants_examples
from fisher_lab.curvature.kfac.token_ids import Fixed, Origin, is_one_value, with_features
from fisher_lab.curvature.kfac.token_rows import TokenRows
from fisher_lab.curvature.linalg import full_precision
from fisher_lab.curvature.wrappers import device_of, is_shard, unwrap

HIDDEN = "which of its rows are padding cannot be told"
"""Why a layer is left out whose rows an operation has hidden from the batch's masks."""


NO_LOOK_UP, SHARED = "not a look-up of tokens", "reads no tokens, but what all examples share"
"""Why a layer is left out whose rows are the model's own (``docs/math.md``, section 1)."""


@dataclass
class Call:
    """One use of a layer's weight in a forward pass.

    Attributes:
        use: which operator it was, with what it read.
        a: what it read, without a graph (a reference; for an embedding the indices).
        origin: which tokens the rows of ``a`` belong to.
        edge: graph edge of its output; None where the output carries no gradient.
        output: shape of the output.
        version: of ``a``, to see that nothing has changed it since.
        index: its place among the calls of the pass.
        grad: gradient of the output, where a re-computing backward pass has delivered it.
        reached: which rows count since a gradient reaches them (:mod:`.batch_tokens`), bool in
            their shape; None where no row depends on that.
    """

    use: Use
    a: Tensor
    origin: Origin
    edge: GradientEdge | None
    output: torch.Size
    version: int
    index: int
    grad: Tensor | None = None
    reached: Tensor | None = None

    @property
    def trailing(self) -> int:
        """How many dimensions of ``a`` are features."""
        return int(not self.use.kind.looks_up)

    @property
    def rows(self) -> torch.Size:
        """Shape of the rows, without that of the features; those of all parts of a weight."""
        layout = self.use.layout
        if layout is None:
            return self.a.shape[: self.a.dim() - self.trailing]
        axis = layout.axis + len(self.output)
        return self.output[:axis] + self.output[axis + 1 :]

    def inputs(self) -> Tensor:
        """Returns what the rows read, ``[*rows, features]`` (``[*rows]`` for an embedding)."""
        return self.a if self.use.layout is None else self.use.layout.inputs(self.a)


def is_encoder_decoder(model: nn.Module) -> bool:
    """Says whether a model has an encoder whose positions are not the decoder's."""
    inner = unwrap(model)
    flag = getattr(getattr(inner, "config", None), "is_encoder_decoder", False)
    return bool(flag) and hasattr(inner, "get_encoder")


class Capture:
    """Records the uses of a model's parameters during a forward pass.

    Used as a context manager around the forward pass; then :meth:`gradients` runs the backward
    pass. Gradient checkpointing is counted once: without re-entry the first pass carries the
    graph; with re-entry it has none, and the calls are recorded as they are re-computed.

    Args:
        model: the model whose forward pass is about to run.
        layers: the K-FAC layers that its modules promise.
        settings: which layers to take.

    Attributes:
        outputs: what the model returned, each time it was called.
        rows: which tokens the rows of the pass's tensors belong to.
        given: what the model was given, and its masks.
    """

    running = 0
    """How many forward passes are being recorded in this process."""

    def __init__(self, model: nn.Module, layers: Layers, settings: KFACSettings) -> None:
        self.model = unwrap(model)
        self.device = device_of(self.model)
        self.promised, self.settings = layers, settings
        self.outputs: list[Any] = []
        self.rows = TokenRows([*self.model.parameters(), *self.model.buffers()])
        self.given = GivenInputs(self.rows)
        self._calls: dict[UseOf, list[Call]] = {}
        self._names = {id(p): name for name, p in self.model.named_parameters()}
        self._parameters = {id(p): p for p in self.model.parameters()}
        self._holders = _holders(self.model)
        self._inside: list[str] = []
        self._watch = OperatorWatch(self.model, self.rows, self._found)
        self._live: dict[int, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._pending: dict[UseOf, list[Origin]] = {}
        self._depth = 0
        self._replaying = False

    # ---- the forward pass --------------------------------------------------------------------

    def __enter__(self) -> Capture:
        add = self._handles.append
        add(self.model.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True))
        add(self.model.register_forward_hook(self._end))
        if is_encoder_decoder(self.model) and hasattr(self.model, "get_decoder"):
            decoder = self.model.get_decoder()  # type: ignore[operator]
            add(decoder.register_forward_pre_hook(self.given.take_decoder, with_kwargs=True))
        self._watch_modules()
        self._watch.__enter__()
        Capture.running += 1
        return self

    def __exit__(self, *exc: Any) -> None:
        self.pause(*exc)
        self.close()

    def pause(self, *exc: Any) -> None:
        """Records no more; the hooks stay until :meth:`close`."""
        Capture.running -= 1
        self._watch.__exit__(*exc)

    def close(self) -> None:
        """Removes the hooks, which nothing but the pass needs; what was recorded stays."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _watch_modules(self) -> None:
        for path, module in self.model.named_modules():
            self._watch_module(path, module)

    def _watch_module(self, path: str, module: nn.Module) -> None:
        """Notes which of several holders of a parameter runs, and what FSDP2 puts in its place."""
        held = [self._holders[id(p)] for p in module._parameters.values() if p is not None]
        if any(len(paths) > 1 for paths in held):

            def enter(*_: object) -> None:
                self._inside.append(path)

            def leave(*_: object) -> None:
                self._inside.pop()

            self._handles.append(module.register_forward_pre_hook(enter))
            self._handles.append(module.register_forward_hook(leave, always_call=True))
        sharded = {n: p for n, p in module._parameters.items() if p is not None and is_shard(p)}
        if sharded:
            self._handles.append(
                module.register_forward_pre_hook(partial(self._keep_live, sharded))
            )

    def _keep_live(self, sharded: Mapping[str, Tensor], module: nn.Module, _args: object) -> None:
        for name, parameter in sharded.items():
            whole = module._parameters[name]
            if whole is not None:
                self._live[id(parameter)] = whole
                self._watch.stands_for(whole, parameter)

    def live(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Returns the tensors that stood for these parameters in the forward pass."""
        return [self._live.get(id(parameter), parameter) for parameter in parameters]

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._depth += 1
        if self._depth > 1 or self._replaying:
            return
        self.given.take(module, args, kwargs)

    def _end(self, _module: nn.Module, _args: object, output: Any) -> None:
        self._depth -= 1
        if not self._replaying:
            self.outputs.append(output)

    def _found(self, use: Use, output: Tensor) -> None:
        added = self._parameters.get(use.bias or 0)
        if added is not None and trains_bias_alone(self._parameters[use.weight], added):
            rows = use.part if isinstance(use.part, tuple) else None
            use = bias_alone(use, rows[1] - rows[0] if rows else len(added), rows)
        part = part_text(use.part)
        weight, bias = self._names[use.weight] + part, self.bias_of(use)
        key = UseOf(self._label(use) + part, use.kind, weight, bias)
        origin = self._origin(use, output)
        waits = origin is Fixed.CONSTANT and is_one_value(use.a)
        if use.kind.looks_up and self.rows.is_coarse(origin, use.a.shape):
            origin, waits = Fixed.UNKNOWN, True
        if self._replaying:
            self._replay(key, use, output)
        elif not torch.is_grad_enabled():
            if _in_checkpoint():  # its replay has the graph
                self._pending.setdefault(key, []).append(origin)
        else:
            call = self._call(use, origin, output)
            self._calls.setdefault(key, []).append(call)
            if use.kind.looks_up and waits:
                self.rows.wait(output, partial(_align, call))

    def bias_of(self, use: Use) -> str | None:
        """Returns the name of the bias that a use adds, as a layer has it."""
        bias = self._names.get(use.bias or 0)
        return bias + part_text(use.part) if bias and isinstance(use.part, tuple) else bias

    def _origin(self, use: Use, output: Tensor) -> Origin:
        """The tokens of a use's rows; those of a convolution are its locations."""
        if use.layout is None:
            origin = self.rows.of(use.a)
            if origin is not Fixed.UNKNOWN or not use.a.is_floating_point():
                return origin
            origin = self.rows.name(use.a)
            self.rows.mark(output, with_features(origin, use.features))
            return origin
        origin, axis = self.rows.of(output), use.layout.axis
        return origin if isinstance(origin, Fixed) else tuple(i.movedim(axis, -1) for i in origin)

    def _replay(self, key: UseOf, use: Use, output: Tensor) -> None:
        waiting = self._pending.get(key)
        if not waiting or not torch.is_grad_enabled() or not output.requires_grad:
            return
        call = self._call(use, waiting.pop(), output)
        self._calls.setdefault(key, []).append(call)
        _await(call)

    def _call(self, use: Use, origin: Origin, output: Tensor) -> Call:
        # The edge is taken now: an in-place operation on the output later on would move the tensor
        # to another node of the graph, and with it the gradient.
        edge = edge_of(output)
        a = use.a.detach()
        index = sum(map(len, self._calls.values()))
        rows, features = output.shape[: -use.features], output.shape[-use.features :]
        shape = torch.Size((*rows, features.numel()))
        return Call(use, a, origin, edge, shape, a._version, index)

    def _label(self, use: Use) -> str:
        """The name of the layer: of the module that holds the weight and runs, or could."""
        holders = self._holders[use.weight]
        if self._inside and (running := self._inside[-1]) in holders:
            return _label(running, holders[running])
        tables = {
            path: name
            for path, name in holders.items()
            if isinstance(self.model.get_submodule(path), nn.Embedding) == (use.kind.looks_up)
        }
        path, name = next(iter((tables or holders).items()))
        return _label(path, name) + ("" if tables else f" ({use.kind})")

    # ---- what was found ----------------------------------------------------------------------

    @property
    def inputs(self) -> list[tuple[str, torch.Size, int]]:
        """Side of the model, shape and first id of the tokens that it was given."""
        return self.given.inputs

    def examples(
        self, size: int | None = None, segments: Tensor | None = None, axis: int = 0
    ) -> Examples:
        """Returns the examples of the pass's tokens; arguments as for :class:`Examples`."""
        return Examples(self.rows, self.inputs, self.device, size, segments, axis)

    @property
    def replays(self) -> bool:
        """Whether a re-entrant checkpoint runs parts of the pass once more, for one backward."""
        return bool(self._pending)

    def reached(self, part: Tensor, places: Examples) -> set[int]:
        """Returns the places of the tokens at which a scalar of the pass's graph has a gradient."""
        grads, _ = self.gradients(part, retain_graph=True)
        found: set[int] = set()
        for call in (call for calls in self._calls.values() for call in calls):
            g, use = grads.get(call.index), call.use
            where = places.of(call.origin, call.trailing)
            if g is None or where is None or use.layout is not None or use.rows is not None:
                continue
            some = g.ne(0).any(-1)
            if where.dim() == some.dim():
                found |= set(where.expand(some.shape)[some].unique().tolist())
        return found - {-1}

    def observe(
        self,
        known: Callable[[Origin, int], bool],
        examples: Examples | None = None,
        loss: Tensor | None = None,
    ) -> Layers:
        """Returns the K-FAC layers that the forward pass showed, and why others are left out.

        Args:
            known: says of an origin, and of how many dimensions are features, whether it can be
                told which of the rows are padding.
            examples: of the tokens, where a layer has one row an example.
            loss: whose graph names what else reads parameters.
        """
        self._look_in_graph(loss)
        order = {name: n for n, (name, _) in enumerate(self.model.named_modules())}
        uses = sorted({*self._calls, *self._pending}, key=lambda u: order.get(u.label, len(order)))
        reasons = {use.label: r for use in uses if (r := self._why_not(use, known, examples))}
        besides = {self._names[identity] for identity in self._watch.unexplained}
        kept = [use for use in uses if use.label not in reasons]
        found = from_uses(self.model, kept, self.settings, besides)
        seen = {
            *found.skipped,
            *found.layers,
            *reasons,
            *(x for y in found.layers.values() for x in y.labels),
        }
        unused = {**found.skipped, **reasons}
        # Whoever uses a weight besides these calls has a part in its gradient.
        if not self.settings.norm_layers:
            unused |= {use.label: NO_NORMS for use in uses if use.kind is Kind.NORM}
        why = {
            base_of(name): unused[use.label]
            for use in uses
            if use.label in unused
            for name in (use.weight, use.bias)
            if name is not None
        }
        for identity, function in self._watch.unexplained.items():
            why[self._names[identity]] = f"its use by {function} makes no layer"
        covered = {layer.weight for layer in found.layers.values()}
        absent = {
            name: why.get(layer.weight, NOT_USED)
            for name, layer in self.promised.layers.items()
            if name not in seen and layer.weight not in covered
        }
        mixed = {*why, *(use.weight for use in uses if self._constant(use))}
        layers = {
            name: replace(layer, tied=True) if mixed & _names_of(layer) else layer
            for name, layer in found.layers.items()
        }
        skipped = {**self.promised.skipped, **absent, **found.skipped, **reasons}
        return Layers(layers, skipped, frozenset(), {**why, **found.reasons})

    def _look_in_graph(self, loss: Tensor | None) -> None:
        """Notes parameters that the loss depends on, and that no watched function has read."""
        if loss is None:
            return
        read = {x for use in (*self._calls, *self._pending) for x in (use.weight, use.bias) if x}
        seen = {*map(base_of, read), *(self._names[x] for x in self._watch.unexplained)}
        trained = {x for x, p in self._parameters.items() if p.requires_grad}
        unseen = {x for x in trained if self._names[x] not in seen}
        if unseen:
            self._watch.unexplained |= readers_in(loss, unseen)

    def _origins(self, use: UseOf) -> list[Origin]:
        calls = self._calls.get(use, [])
        return [call.origin for call in calls] + self._pending.get(use, [])

    def _constant(self, use: UseOf) -> bool:
        return Fixed.CONSTANT in self._origins(use)

    def _why_not(
        self,
        use: UseOf,
        known: Callable[[Origin, int], bool],
        examples: Examples | None,
    ) -> str | None:
        """Why a use makes no layer, as far as its inputs say."""
        origins = self._origins(use)
        if all(origin is Fixed.CONSTANT for origin in origins):
            return NO_LOOK_UP if use.kind.looks_up else SHARED
        rows = [o for o in origins if o is not Fixed.CONSTANT]
        if not all(known(o, int(not use.kind.looks_up)) for o in rows):
            return HIDDEN
        if examples is not None and wants_examples(self.settings, use.kind):
            trailing = int(not use.kind.looks_up)
            return NO_EXAMPLE if any(examples.of(o, trailing) is None for o in rows) else None
        return None

    def calls_of(self, layer: Layer) -> list[Call]:
        """Returns the calls of a layer that look at tokens, in the order of the forward pass."""
        calls = [
            call
            for use, found in self._calls.items()
            if use.label in layer.labels and (use.weight, use.kind) == (layer.weight, layer.kind)
            for call in found
            if call.origin is not Fixed.CONSTANT
        ]
        return sorted(calls, key=lambda call: call.index)

    # ---- the backward pass -------------------------------------------------------------------

    @full_precision()
    def gradients(
        self,
        output: Tensor,
        grad_output: Tensor | None = None,
        *,
        retain_graph: bool = False,
        parameters: Sequence[Tensor] = (),
    ) -> tuple[dict[int, Tensor | None], list[Tensor | None]]:
        """Runs the backward pass and returns the gradient of each call's output.

        Outside of autocast: operations then have the dtypes of the forward pass.

        Args:
            output: the token-summed loss, or the logits with ``grad_output``.
            grad_output: gradient to start from where ``output`` is no scalar.
            retain_graph: keep the graph for another draw.
            parameters: parameters whose gradients are wanted as well.

        Returns:
            Index of a call -> the gradient of its output, and the gradients of ``parameters``;
            None where there is none.

        Raises:
            LayerError: an input was changed in place after the layer had read it.
        """
        self.check_unchanged()
        parameters = self.live(parameters)
        if self._pending:
            return self._gradients_by_replay(output, grad_output, retain_graph, parameters)
        calls = [call for found in self._calls.values() for call in found if call.edge is not None]
        wanted: list[Any] = [*(call.edge for call in calls), *parameters]
        if not wanted or not output.requires_grad:
            return {}, [None] * len(parameters)
        grads = torch.autograd.grad(
            output,
            wanted,
            grad_output,
            retain_graph=retain_graph,
            allow_unused=True,
        )
        of_calls: dict[int, Tensor | None] = {}
        for call, grad in zip(calls, grads, strict=False):
            of_calls[call.index] = None if grad is None else grad.reshape(call.output)
        return of_calls, list(grads[len(calls) :])

    def await_gradients(self) -> dict[int, Tensor]:
        """Returns where a backward pass of the caller's leaves the gradients of calls' outputs.

        To be called after the forward pass. By the index of a call; what is not reached is absent.
        """
        grads: dict[int, Tensor] = {}  # the hooks hold nothing that holds the graph
        for call in (call for calls in self._calls.values() for call in calls):
            if call.edge is not None:
                keep = partial(_keep, grads, call.index, call.output, call.edge.output_nr)
                call.edge.node.register_prehook(keep)
        return grads

    def check_unchanged(self) -> None:
        """Checks that what the layers read has not been changed in place.

        Raises:
            LayerError: it has.
        """
        for use, calls in self._calls.items():
            if any(call.a._version != call.version for call in calls):
                raise LayerError(
                    f"layer {use.label or '(the model)'}: its input was changed in place after the "
                    "layer had read it; make that operation out of place"
                )

    def _gradients_by_replay(
        self,
        output: Tensor,
        grad_output: Tensor | None,
        retain_graph: bool,
        parameters: Sequence[Tensor],
    ) -> tuple[dict[int, Tensor | None], list[Tensor | None]]:
        """Re-entrant checkpoints want a plain ``backward``; ``.grad`` is put back afterwards."""
        if retain_graph:
            raise LayerError(
                "gradient checkpointing with use_reentrant=True gives one backward pass only; "
                "use use_reentrant=False for this Fisher kind"
            )
        kept = {p: p.grad for p in self.model.parameters()}
        for calls in self._calls.values():
            for call in calls:
                _await(call)
        self._replaying = True
        self._watch_modules()
        try:
            for parameter in kept:
                parameter.grad = None
            with self._watch:
                opened(torch.autograd.backward)(output, grad_output)
            wanted = [p.grad for p in parameters]
        finally:
            self._replaying = False
            for parameter, grad in kept.items():
                parameter.grad = grad
            self.close()
        return {call.index: call.grad for calls in self._calls.values() for call in calls}, wanted


def _in_checkpoint() -> bool:
    """Whether a re-entrant checkpoint runs; other passes without a graph are no uses."""
    frame = sys._getframe()
    while frame is not None and frame.f_code is not CheckpointFunction.forward.__code__:
        frame = frame.f_back
    return frame is not None


def _names_of(layer: Layer) -> set[str]:
    """What a layer's parameters are called, whole and in part."""
    return {*layer.names, *map(base_of, layer.names)}


def _align(call: Call, origin: Origin) -> None:
    """A row that is added to the vector of every token is looked up by every token."""
    if not isinstance(origin, Fixed):
        call.origin = tuple(ids[..., 0] for ids in origin if ids.size(-1) == 1)


def edge_of(tensor: Tensor) -> GradientEdge | None:
    """Returns where a tensor's gradient arrives in the graph; None where it has none.

    That of a view of a whole tensor is the whole's: what is written into a view later on is written
    into the whole, and the view's own place is no longer on the way. Shapes may differ.
    """
    base = tensor._base
    if base is not None and base.requires_grad and base.numel() == tensor.numel():
        tensor = base if base.is_contiguous() and tensor.is_contiguous() else tensor
    return get_gradient_edge(tensor) if tensor.requires_grad else None


def _await(call: Call) -> None:
    """Keeps the gradient of a call's output as a backward pass comes to it."""
    if call.edge is not None:
        call.edge.node.register_prehook(partial(_receive, call, call.edge.output_nr))


def _receive(call: Call, number: int, grads: tuple[Tensor | None, ...]) -> None:
    grad = grads[number]
    call.grad = None if grad is None else grad.reshape(call.output)


def _keep(
    kept: dict[int, Tensor],
    index: int,
    shape: torch.Size,
    number: int,
    grads: tuple[Tensor | None, ...],
) -> None:
    grad = grads[number]
    if grad is not None:
        kept[index] = grad.reshape(shape)


def _holders(model: nn.Module) -> dict[int, dict[str, str]]:
    """Identity of a parameter -> path of each module that holds it -> its name there."""
    found: dict[int, dict[str, str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            found.setdefault(id(parameter), {})[path] = name
    return found


def _label(path: str, name: str) -> str:
    """A layer's name: its module's; where the module's parameter is not ``weight``, that too."""
    if name == "weight":
        return path
    return f"{path}.{name}" if path else name
