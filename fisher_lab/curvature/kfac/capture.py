"""One forward pass and its gradients, recorded layer by layer.

The only module that knows hooks. A :class:`Capture` keeps *references* to the inputs of the
layers and the graph edges of their outputs; the gradients ``g_t = dL/ds_t`` come from one
``torch.autograd.grad`` with respect to those edges, so no weight gradient is computed and
``.grad`` is never touched. Which positions are tokens is decided by the tensor's *origin*
(``docs/math.md``, section 1), not by its length.

Shapes: ``B`` sequences of ``S`` positions; a layer's tokens come out as ``[T, features]``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from fisher_lab.curvature.errors import BatchError, LayerError
from fisher_lab.curvature.kfac.accumulators import check_finite
from fisher_lab.curvature.kfac.layers import Kind, Layer, Layers, every_module
from fisher_lab.curvature.linalg import full_precision
from fisher_lab.curvature.losses import SummedLoss
from fisher_lab.curvature.wrappers import is_shard, unwrap

_OF_POSITIONS = ("position", "relative", "wpe")
"""Parts of the names of embeddings that look up positions or distances."""


class Origin(StrEnum):
    """Where the positions of a tensor come from."""

    TARGET = "target"  # the only sequence of a model, or the decoder's
    SOURCE = "source"  # the encoder's, in an encoder-decoder model


@dataclass
class Call:
    """One call of a layer in a forward pass.

    Attributes:
        a: its input (a reference; for an embedding the indices).
        origin: where its positions come from.
        edge: graph edge of its output; None where the output carries no gradient.
        output: shape of the output.
        grad: gradient of the output, where a re-computing backward pass has delivered it.
    """

    a: Tensor
    origin: Origin
    edge: GradientEdge | None
    output: torch.Size
    version: int
    grad: Tensor | None = None


@dataclass(frozen=True)
class TokenMasks:
    """Which positions of a batch are tokens.

    Attributes:
        masks: origin -> ``[B, S]`` bool, or None where every position is a token.
        tensors: the batch's own integer tensors (an embedding of one of them is a token layer).
        full: origins whose every position is a token (asked once a batch: it waits for a device).
    """

    masks: Mapping[Origin, Tensor | None]
    full: frozenset[Origin] = frozenset(Origin)
    tensors: tuple[Tensor, ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, model: nn.Module, batch: Any) -> TokenMasks:
        """Reads the masks of a prepared batch.

        Raises:
            BatchError: no position of the batch is active.
        """
        if not isinstance(batch, Mapping):
            values = batch if isinstance(batch, list | tuple) else [batch]
            ids = tuple(v for v in values if isinstance(v, Tensor) and not v.is_floating_point())
            return cls(dict.fromkeys(Origin), tensors=ids)
        masks: dict[Origin, Tensor | None] = {}
        double = is_encoder_decoder(model)
        names = {Origin.TARGET: "decoder_attention_mask" if double else "attention_mask"}
        names[Origin.SOURCE] = "attention_mask"
        for origin, name in names.items():
            mask = batch.get(name)
            masks[origin] = None
            if mask is None or mask.dim() != 2:
                continue
            masks[origin] = active = mask != 0
            if not bool(active.any()):
                raise BatchError(f"{name}: no active token in a batch of {tuple(mask.shape)}")
        ids = tuple(
            value
            for key, value in batch.items()
            if isinstance(value, Tensor)
            and not value.is_floating_point()
            and key not in ("labels", "position_ids", "attention_mask", "decoder_attention_mask")
        )
        full = frozenset(o for o, m in masks.items() if m is None or bool(m.all()))
        return cls(masks, full, ids)

    def select(self, x: Tensor, origin: Origin, name: str, *, trailing: int = 1) -> Tensor:
        """Returns the rows of ``x`` that are tokens, ``[T, features]`` (``[T]`` for indices).

        Args:
            x: ``[B, S, ..., features]``, ``[B, features]`` (a token an example) or, with
                ``trailing=0``, the same without features.
            origin: whose mask counts.
            name: of the layer, for the error.
            trailing: 1 for vectors, 0 for indices.

        Raises:
            LayerError: the leading dimensions do not fit the mask.
        """
        shape, mask = x.shape[: x.dim() - trailing], self.masks[origin]
        features = x.shape[x.dim() - trailing :]
        if mask is None or len(shape) == 0:
            return x.reshape(-1, *features)
        if len(shape) == 1:
            if shape[0] == mask.numel() and shape[0] != mask.shape[0]:
                return x[mask.reshape(-1)]
            return x
        if shape[:2] != mask.shape:
            raise LayerError(
                f"layer {name or '(the model)'}: positions {tuple(shape)} do not fit the "
                f"{origin} mask {tuple(mask.shape)}; exclude the layer if it sees no tokens"
            )
        if origin in self.full:
            return x.reshape(-1, *features)
        return x[mask].reshape(-1, *features)

    def looks_up_tokens(self, indices: Tensor, name: str) -> bool:
        """Says whether an embedding looks up something of each token, not of each position.

        Indices that are one of the batch's own tensors do. So do others with one index a token
        (token types that the model fills in itself), unless the layer's name says position:
        in a batch of one sequence the shapes are alike.
        """
        if any(indices.data_ptr() == t.data_ptr() for t in self.tensors):
            return True
        if any(word in name.lower() for word in _OF_POSITIONS):
            return False
        if any(indices.shape == t.shape and torch.equal(indices, t) for t in self.tensors):
            return True
        known = [t.shape for t in self.tensors if t.dim() == 2]
        return indices.dim() == 2 and indices.shape in known


def is_encoder_decoder(model: nn.Module) -> bool:
    """Says whether a model has an encoder whose positions are not the decoder's."""
    inner = unwrap(model)
    flag = getattr(getattr(inner, "config", None), "is_encoder_decoder", False)
    return bool(flag) and hasattr(inner, "get_encoder")


class Capture:
    """Records the calls of a model's K-FAC layers during a forward pass.

    Used as a context manager around the forward pass; then :meth:`gradients` runs the backward
    pass. Gradient checkpointing is counted once: without re-entry the first pass carries the
    graph; with re-entry it has none, and the calls are recorded as they are re-computed.

    Args:
        model: the model whose forward pass is about to run.
        layers: its K-FAC layers.
    """

    def __init__(self, model: nn.Module, layers: Layers) -> None:
        self.model = unwrap(model)
        self.layers = layers
        self.calls: dict[str, list[Call]] = {
            layer.name: [] for layer, _ in every_module(layers.layers.values())
        }
        self.outputs: list[Any] = []
        self._live: dict[int, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._pending: dict[nn.Module, list[Origin]] = {}
        self._in_encoder = False
        self._encoded: Tensor | None = None
        self._replaying = False

    def __enter__(self) -> Capture:
        for layer, module in every_module(self.layers.layers.values()):
            self._handles.append(
                module.register_forward_hook(self._hook_for(layer.name), with_kwargs=True)
            )
        self._handles.append(self.model.register_forward_hook(self._keep_output))
        self._handles.append(
            self.model.register_forward_pre_hook(self._take_encoded, with_kwargs=True)
        )
        self._watch_sharded()
        if is_encoder_decoder(self.model):
            encoder = self.model.get_encoder()  # type: ignore[operator]
            self._handles.append(encoder.register_forward_pre_hook(self._enter_encoder))
            self._handles.append(encoder.register_forward_hook(self._leave_encoder))
        return self

    def __exit__(self, *exc: object) -> None:
        if not self._pending or exc[0] is not None:
            self.close()

    def close(self) -> None:
        """Removes the hooks; what was recorded stays."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _watch_sharded(self) -> None:
        """FSDP2 puts whole parameters in the place of the sharded ones for the forward pass."""
        for module in self.model.modules():
            sharded = {n: p for n, p in module._parameters.items() if is_shard(p)}
            if sharded:
                self._handles.append(module.register_forward_pre_hook(self._keep_live(sharded)))

    def _keep_live(self, sharded: Mapping[str, Tensor]) -> Any:
        def hook(module: nn.Module, _args: object) -> None:
            for name, parameter in sharded.items():
                whole = module._parameters[name]
                if whole is not None:
                    self._live[id(parameter)] = whole

        return hook

    def live(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Returns the tensors that stood for these parameters in the forward pass."""
        return [self._live.get(id(parameter), parameter) for parameter in parameters]

    def _keep_output(self, _module: nn.Module, _args: object, output: Any) -> None:
        self.outputs.append(output)

    def _take_encoded(self, _module: nn.Module, _args: object, kwargs: dict[str, Any]) -> None:
        """Encoder outputs that the caller brings: the encoder itself will not be called."""
        given = kwargs.get("encoder_outputs")
        if given is not None:
            self._encoded = given if isinstance(given, Tensor) else given[0]

    def _enter_encoder(self, *_: object) -> None:
        self._in_encoder = True

    def _leave_encoder(self, _module: nn.Module, _args: object, output: Any) -> None:
        self._in_encoder = False
        first = output if isinstance(output, Tensor) else output[0]
        if not self._replaying:
            self._encoded = first

    def _origin(self, a: Tensor) -> Origin:
        if self._in_encoder:
            return Origin.SOURCE
        encoded = self._encoded
        if encoded is not None and a.is_floating_point():
            same = a.untyped_storage().data_ptr() == encoded.untyped_storage().data_ptr()
            return Origin.SOURCE if same else Origin.TARGET
        return Origin.TARGET

    def _hook_for(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
            a = args[0] if args else next(iter(kwargs.values()))
            if self._replaying:
                self._replay(name, module, a, output)
                return
            origin = self._origin(a)
            if not torch.is_grad_enabled():  # a re-entrant checkpoint: its replay has the graph
                self._pending.setdefault(module, []).append(origin)
                return
            self.calls[name].append(_call(a, origin, output))

        return hook

    def _replay(self, name: str, module: nn.Module, a: Tensor, output: Tensor) -> None:
        waiting = self._pending.get(module)
        if not waiting or not torch.is_grad_enabled() or not output.requires_grad:
            return
        call = _call(a, waiting.pop(), output)
        self.calls[name].append(call)
        output.register_hook(lambda grad: setattr(call, "grad", grad))

    @full_precision()
    def gradients(
        self,
        output: Tensor,
        grad_output: Tensor | None = None,
        *,
        retain_graph: bool = False,
        parameters: Sequence[Tensor] = (),
    ) -> tuple[dict[str, list[Tensor | None]], list[Tensor | None]]:
        """Runs the backward pass and returns the gradient of each call's output.

        Outside of autocast: operations then have the dtypes of the forward pass.

        Args:
            output: the token-summed loss, or the logits with ``grad_output``.
            grad_output: gradient to start from where ``output`` is no scalar.
            retain_graph: keep the graph for another draw.
            parameters: parameters whose gradients are wanted as well.

        Returns:
            Layer name -> gradients in the order of ``calls``, and the gradients of
            ``parameters``; None where there is none.

        Raises:
            LayerError: an input was changed in place after the layer had read it.
        """
        self._check_versions()
        parameters = self.live(parameters)
        if self._pending:
            return self._gradients_by_replay(output, grad_output, retain_graph, parameters)
        edges = [c.edge for calls in self.calls.values() for c in calls if c.edge is not None]
        if not (edges or parameters) or not output.requires_grad:
            none = {name: [None] * len(calls) for name, calls in self.calls.items()}
            return none, [None] * len(parameters)  # type: ignore[return-value]
        wanted: list[Any] = [*edges, *parameters]
        grads = torch.autograd.grad(
            output,
            wanted,
            grad_output,
            retain_graph=retain_graph,
            allow_unused=True,
        )
        given: Iterator[Tensor | None] = iter(grads)
        of_calls = {
            name: [None if c.edge is None else next(given) for c in calls]
            for name, calls in self.calls.items()
        }
        return of_calls, list(given)

    def _check_versions(self) -> None:
        for name, calls in self.calls.items():
            if any(c.a._version != c.version for c in calls):
                raise LayerError(
                    f"layer {name or '(the model)'}: its input was changed in place after the "
                    "layer had read it; make that operation out of place"
                )

    def _gradients_by_replay(
        self,
        output: Tensor,
        grad_output: Tensor | None,
        retain_graph: bool,
        parameters: Sequence[Tensor],
    ) -> tuple[dict[str, list[Tensor | None]], list[Tensor | None]]:
        """Re-entrant checkpoints want a plain ``backward``; ``.grad`` is put back afterwards."""
        if retain_graph:
            raise LayerError(
                "gradient checkpointing with use_reentrant=True gives one backward pass only; "
                "use use_reentrant=False for this Fisher kind"
            )
        kept = {p: p.grad for p in self.model.parameters()}
        for calls in self.calls.values():
            for call in calls:
                if call.edge is not None:
                    call.edge.node.register_prehook(partial(_receive, call))
        self._replaying = True
        try:
            for parameter in kept:
                parameter.grad = None
            output.backward(grad_output)
            wanted = [p.grad for p in parameters]
        finally:
            self._replaying = False
            for parameter, grad in kept.items():
                parameter.grad = grad
            self.close()
        return {name: [c.grad for c in calls] for name, calls in self.calls.items()}, wanted


def _receive(call: Call, grads: tuple[Tensor | None, ...]) -> None:
    call.grad = grads[call.edge.output_nr]  # type: ignore[union-attr]


def _call(a: Tensor, origin: Origin, output: Tensor) -> Call:
    # The edge is taken now: an in-place operation on the output later on would move the tensor
    # to another node of the graph, and with it the gradient.
    edge = get_gradient_edge(output) if output.requires_grad else None
    detached = a.detach()
    return Call(
        a=detached,
        origin=origin,
        edge=edge,
        output=output.shape,
        version=detached._version,
    )


def any_token(model: nn.Module, batch: Any) -> bool:
    """Says whether a prepared batch has an active token (a mask without one has not)."""
    if not isinstance(batch, Mapping):
        return True
    names = ["attention_mask"]
    if is_encoder_decoder(model):
        names.append("decoder_attention_mask")
    masks = [m for m in map(batch.get, names) if isinstance(m, Tensor) and m.dim() == 2]
    return all(bool((m != 0).any()) for m in masks)


def share_key(call: Call, augmented: bool) -> tuple:
    """Returns what two calls have in common exactly when they read the very same tensor."""
    a = call.a
    return (
        a.untyped_storage().data_ptr(),
        a.storage_offset(),
        tuple(a.shape),
        a.stride(),
        a.dtype,
        call.origin,
        augmented,
    )


def count_tokens(model: nn.Module, capture: Capture, batch: Any) -> dict[str, int]:
    """Returns the tokens that each layer saw in a captured forward pass.

    Args:
        model: the model.
        capture: of the pass.
        batch: the prepared batch.
    """
    masks = TokenMasks.of(unwrap(model), batch)
    live = token_calls(capture, capture.layers, masks)
    return {
        name: sum(
            masks.select(
                call.a, call.origin, name, trailing=int(layer.kind is not Kind.EMBEDDING)
            ).shape[0]
            for call in live[name]
        )
        for name, layer in capture.layers.layers.items()
    }


class BatchTokens:
    """Rows of activations and gradients that are tokens, of one backward pass.

    Layers that read the very same tensor share its selected rows.

    Args:
        capture: of the batch's forward pass.
        live: the calls of each layer that look at tokens, of :func:`token_calls`.
        masks: of the batch.
        batch: its index, for the errors.
    """

    def __init__(
        self, capture: Capture, live: Mapping[str, list[Call]], masks: TokenMasks, batch: int
    ) -> None:
        self.live = live
        self._every = capture.calls
        self._masks, self._batch = masks, batch
        self._selected: dict[tuple, Tensor] = {}

    def gradients(self, layer: Layer, given: Mapping[str, list[Tensor | None]]) -> Tensor | None:
        """Returns a layer's token gradients, ``[T, out]``; None where none reached it.

        Args:
            layer: the layer.
            given: by layer name, the gradient of each of its calls' outputs.

        Raises:
            LayerError: shapes and masks do not fit together.
        """
        pairs = zip(self._every[layer.name], given[layer.name], strict=True)
        every = {id(call): g for call, g in pairs}
        calls = self.live[layer.name]
        grads = [every[id(call)] for call in calls]
        like = next((g for g in grads if g is not None), None)
        if like is None:
            return None
        parts = []
        for call, g in zip(calls, grads, strict=True):
            g = like.new_zeros(call.output) if g is None else g
            parts.append(self._masks.select(g, call.origin, layer.name))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def inputs(self, layer: Layer) -> Tensor:
        """Returns a layer's token inputs, ``[T, in]`` (``[T]`` indices for an embedding).

        Raises:
            LayerError: shapes and masks do not fit together.
            NonFiniteError: they are not finite.
        """
        trailing = 0 if layer.kind is Kind.EMBEDDING else 1
        parts = []
        for call in self.live[layer.name]:
            key = share_key(call, False)
            if key not in self._selected:
                x = self._masks.select(call.a, call.origin, layer.name, trailing=trailing)
                if trailing:
                    check_finite(x, layer.name, self._batch, "activations")
                self._selected[key] = x
            parts.append(self._selected[key])
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def token_calls(capture: Capture, layers: Layers, masks: TokenMasks) -> dict[str, list[Call]]:
    """Returns the calls of each layer, tied partners too, that look at tokens.

    An embedding may look up positions or buckets instead; the model's input embedding does not.

    Args:
        capture: of the forward pass; with re-entrant checkpoints, after the backward pass.
        layers: the model's K-FAC layers.
        masks: of the batch.
    """
    live: dict[str, list[Call]] = {}
    for layer, _ in every_module(layers.layers.values()):
        calls = capture.calls[layer.name]
        if layer.kind is Kind.EMBEDDING and layer.name in layers.candidates:
            calls = [call for call in calls if masks.looks_up_tokens(call.a, layer.name)]
        live[layer.name] = calls
    return live


def find_non_finite(
    capture: Capture, layers: Sequence[Layer], masks: TokenMasks, batch: int, loss: SummedLoss
) -> None:
    """Names the first layer whose input is not finite, else the one whose output is not.

    Args:
        capture: of the forward pass.
        layers: in the model's order.
        masks: of the batch.
        batch: its index.
        loss: of the batch.

    Raises:
        NonFiniteError: there is one.
    """
    for layer in layers:
        if layer.kind is Kind.EMBEDDING:
            continue
        for call in capture.calls[layer.name]:
            x = masks.select(call.a, call.origin, layer.name)
            check_finite(x, layer.name, batch, "activations")
    # What no layer reads: the logits, not finite by the weights of the layer that made them.
    if loss.scored is not None:
        logits = loss.logits
        traced = logits is not None and logits.requires_grad
        edge = get_gradient_edge(logits) if logits is not None and traced else None
        calls = [(name, call) for name, found in capture.calls.items() for call in found]
        same = [name for name, call in calls if edge is not None and call.edge == edge]
        head = same[0] if same else "of the logits"
        check_finite(loss.scored.logits.detach(), head, batch, "outputs")
