"""Dense float64 truth, written from the formulas of `docs/math.md` alone.

Nothing here imports `fisher_lab`. `record` puts hooks of its own on a model and keeps every input
`a` and every output gradient `g` of *whatever* forward and backward passes run meanwhile; a test
runs the code under test inside it, so that both sides see one capture, bit for bit:

    with reference.record(model) as rec, kfac.capture(model):
        loss = ...
    kfac.collect_kfac_factors(model, batch, loss=loss)
    truth = reference.Truth(model, rec, [batch])

Shapes: `a` is `[T, in]` (`[T, in + 1]` with a bias), `g` is `[T, out]`, a weight and its gradient
are oriented `[out, in]` whatever the module stores. All of it is float64 and as plain as possible:
factors are formed whole, inverted whole, multiplied whole. Tiny models only.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import mpmath
import torch
from torch import Tensor, nn

IGNORE = -100
POSITIONS = ("wpe", "position_embeddings", "relative_attention_bias")


@dataclass
class Call:
    """One call of one module: its input, and the gradients that came back to its output."""

    name: str
    module: nn.Module
    sweep: int
    input: Tensor
    output_shape: torch.Size
    gradients: list[Tensor] = field(default_factory=list)


@dataclass
class Record:
    """All calls of the supported modules, in the order they were made."""

    calls: list[Call] = field(default_factory=list)
    sweeps: int = 0


def kind_of(module: nn.Module) -> str | None:
    """What sort of layer this is for K-FAC; None if it is none."""
    name = type(module).__name__
    if isinstance(module, nn.Linear):
        return "linear"
    if name == "Conv1D":
        return "conv1d"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.LayerNorm):
        return "layernorm"
    if name.endswith("RMSNorm") or name == "T5LayerNorm":
        return "rmsnorm"
    return None


@contextmanager
def record(model: nn.Module) -> Iterator[Record]:
    """Hook every supported module of `model`; tensor hooks keep what backward passes bring."""
    rec = Record()
    handles = []

    def start(module: nn.Module, args: tuple) -> None:
        rec.sweeps += 1

    def remember(name: str):
        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            call = Call(name, module, rec.sweeps - 1, args[0].detach().clone(), output.shape)
            rec.calls.append(call)
            if output.requires_grad:
                output.register_hook(lambda g: call.gradients.append(g.detach().clone()))

        return hook

    # The sweep counter's hook goes first: a bare layer is the model and the layer at once.
    handles.append(model.register_forward_pre_hook(start))
    for name, module in model.named_modules():
        if kind_of(module) is not None:
            handles.append(module.register_forward_hook(remember(name)))
    try:
        yield rec
    finally:
        for handle in handles:
            handle.remove()


def origin_mask(model: nn.Module, name: str, batch: Mapping[str, Tensor]) -> Tensor | None:
    """The mask of the tensor that reaches this module: by where it comes from, not its length.

    T5: everything in the encoder, and the cross-attention's k and v, see encoder positions; the
    rest of the decoder and the head see decoder positions.
    """
    config = getattr(model, "config", None)
    if config is not None and getattr(config, "is_encoder_decoder", False):
        cross = "EncDecAttention" in name and name.rsplit(".", 1)[-1] in ("k", "v")
        if name.startswith("encoder.") or cross:
            return batch.get("attention_mask")
        return batch.get("decoder_attention_mask")
    return batch.get("attention_mask")


def is_causal(model: nn.Module) -> bool:
    return type(model).__name__.endswith(("LMHeadModel", "ForCausalLM"))


def counting_labels(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Labels, aligned with the logits, -100 wherever one does not count. A copy."""
    labels = batch["labels"].clone()
    if labels.ndim == 1:
        return labels
    config = model.config
    mask = batch.get(
        "decoder_attention_mask" if config.is_encoder_decoder else "attention_mask",
    )
    if mask is not None:
        labels[mask == 0] = IGNORE
    if not is_causal(model):
        return labels
    shifted = torch.full_like(labels, IGNORE)
    shifted[:, :-1] = labels[:, 1:]
    if mask is not None:  # the predicting position is padding
        shifted[mask == 0] = IGNORE
    return shifted


def summed_loss(model: nn.Module, logits: Tensor, batch: Mapping[str, Tensor]) -> tuple:
    """Token-summed cross-entropy from the logits in their own dtype, and the label count N."""
    labels = counting_labels(model, batch)
    rows = labels != IGNORE
    chosen = logits[rows]
    picked = chosen.gather(1, labels[rows][:, None])[:, 0]
    return (torch.logsumexp(chosen, 1) - picked).sum(), int(rows.sum())


@dataclass
class Tokens:
    """The tokens of one layer over everything recorded.

    `a` is `[T, in]` without the bias column, or `[T]` token ids for an embedding, or the
    normalised input of a norm; `g` is a list over backward passes of `[T, out]`.
    """

    name: str
    kind: str
    module: nn.Module
    a: Tensor
    g: list[Tensor]

    @property
    def bias(self) -> nn.Parameter | None:
        return getattr(self.module, "bias", None)

    @property
    def count(self) -> int:
        return len(self.a)

    @property
    def augmented(self) -> Tensor:
        return self.a if self.bias is None else nn.functional.pad(self.a, (0, 1), value=1.0)


def _normalised(module: nn.Module, x: Tensor) -> Tensor:
    """The normalised input exactly as the module computes it: its own output at unit scale."""
    unit = {"weight": torch.ones_like(module.weight)}
    if getattr(module, "bias", None) is not None:
        unit["bias"] = torch.zeros_like(module.bias)
    return torch.func.functional_call(module, unit, (x,))


def tokens_of(
    model: nn.Module, rec: Record, batches: Sequence[Mapping[str, Tensor]]
) -> dict[str, Tokens]:
    """Active tokens of every layer that a gradient reached; several calls are pooled."""
    found: dict[str, list[Tokens]] = {}
    for call in rec.calls:
        kind = kind_of(call.module)
        if not call.gradients or call.name.rsplit(".", 1)[-1] in POSITIONS:
            continue
        x = call.input
        # An embedding's input has no feature axis; only [batch, position, ...] can be masked.
        is_sequence = x.ndim == (2 if kind == "embedding" else 3)
        lead = x.shape if kind == "embedding" else x.shape[:-1]
        active = torch.ones(lead, dtype=torch.bool)
        if is_sequence and isinstance(batches[call.sweep], Mapping):
            mask = origin_mask(model, call.name, batches[call.sweep])
            if mask is not None:
                active = mask.bool()
        if kind in ("layernorm", "rmsnorm"):
            x = _normalised(call.module, x)
        a = x[active] if kind == "embedding" else x[active].double()
        g = [gradient[active].double() for gradient in call.gradients]
        found.setdefault(call.name, []).append(Tokens(call.name, kind, call.module, a, g))
    return {name: _pooled(parts) for name, parts in found.items()}


def _pooled(parts: list[Tokens]) -> Tokens:
    first = parts[0]
    draws = {len(part.g) for part in parts}
    if len(draws) != 1:
        raise AssertionError(f"{first.name}: calls saw different numbers of backward passes")
    return replace(
        first,
        a=torch.cat([part.a for part in parts]),
        g=[torch.cat([part.g[i] for part in parts]) for i in range(draws.pop())],
    )


@dataclass(frozen=True)
class Damping:
    """The numbers that a result depends on besides the tokens."""

    A: float = 1e-4
    G: float = 1e-4
    kappa: float | None = 1e6


def used_eigenvalues(m: Tensor, lam: float, kappa: float | None) -> tuple[Tensor, int]:
    """Damped, then floored eigenvalues, and how many the floor raised."""
    damped = m + lam
    if kappa is None:
        return damped, 0
    floor = damped.max() / kappa
    return torch.maximum(damped, floor), int((damped < floor).sum())


def power(M: Tensor, p: float, lam: float, kappa: float | None) -> Tensor:
    """`M^p` with the used eigenvalues, as a dense matrix."""
    m, V = torch.linalg.eigh(M)
    used, _ = used_eigenvalues(m, lam, kappa)
    return (V * used**p) @ V.T


def clipped(M: Tensor, lam: float, kappa: float | None) -> int:
    return used_eigenvalues(torch.linalg.eigvalsh(M), lam, kappa)[1]


def moment(rows: Tensor) -> Tensor:
    """`(1/T) sum_t x_t x_t^T` of `[T, d]` rows."""
    return rows.T @ rows / len(rows)


@dataclass(frozen=True)
class Factors:
    """One Kronecker-factored parameter: `A` `[in, in]`, `G` `[out, out]`, tokens and scale."""

    A: Tensor
    G: Tensor
    tokens: int
    bias_column: bool


def factors_of(tokens: Tokens) -> Factors:
    """A and G of one layer. An embedding's A is the dense form of `diag(counts) / T`."""
    G = sum(moment(g) for g in tokens.g) / len(tokens.g)
    if tokens.kind == "embedding":
        size = tokens.module.num_embeddings
        counts = torch.bincount(tokens.a.flatten(), minlength=size).double()
        return Factors(torch.diag(counts / tokens.count), G, tokens.count, False)
    return Factors(moment(tokens.augmented), G, tokens.count, tokens.bias is not None)


def pooled(head: Factors, table: Factors) -> Factors:
    """Both uses of a tied weight: factors averaged by the traces of the blocks, section 1.

    Of the sum of both blocks it has the trace; `A` has that of the head's.
    """
    width = torch.zeros_like(head.A)
    n = len(table.G)
    width[:n, :n] = table.G
    t_h = head.tokens * head.A.trace() * head.G.trace()
    t_e = table.tokens * table.A.trace() * table.G.trace()
    w = t_h / (t_h + t_e)
    A = w * head.A / head.A.trace() + (1 - w) * width / width.trace()
    G = w * head.G / head.G.trace() + (1 - w) * table.A / table.A.trace()
    unit = head.A.trace()
    return Factors(A * unit, G * (t_h + t_e) / head.tokens / unit, head.tokens, head.bias_column)


def norm_block(tokens: Tokens) -> Tensor:
    """`(1/T) sum_t v_t v_t^T`, `v_t = [g xhat; g]` (no shift: `g xhat`) of a norm layer."""
    return moment(norm_rows(tokens))


def norm_rows(tokens: Tokens) -> Tensor:
    g = tokens.g[0]
    scale = g * tokens.a
    return torch.cat([scale, g], 1) if tokens.bias is not None else scale


def true_fisher_of_softmax(logits: Tensor, tokens: int) -> Tensor:
    """Section 5: `(1/T) sum over labelled t of diag(p_t) - p_t p_t^T`; logits `[N, C]`."""
    p = torch.softmax(logits.double(), 1)
    return (torch.diag(p.sum(0)) - p.T @ p) / tokens


class Truth:
    """Natural gradients, powers, products and EKFAC of everything recorded.

    Args:
        model: The model that was recorded.
        rec: What `record` yielded, after the backward passes.
        batches: One batch per forward pass, in order.
        tied: `head`, `embedding` or `sum`: whose factors precondition a tied weight.
        norms: Whether LayerNorm and RMSNorm are covered.
        labels: N over all batches, for the `T / N` of Fisher-vector products.
    """

    def __init__(self, model, rec, batches, *, tied="head", norms=True, labels=None) -> None:
        self.model = model
        self.tokens = tokens_of(model, rec, batches)
        self.tied = tied
        self.norms = norms
        self.labels = labels
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.G_override: dict[str, Tensor] = {}

    def name_of(self, parameter: nn.Parameter) -> str:
        return self.names[id(parameter)]

    # ---- what belongs to one weight

    def _by_weight(self) -> dict[str, list[Tokens]]:
        groups: dict[str, list[Tokens]] = {}
        for tokens in self.tokens.values():
            groups.setdefault(self.name_of(tokens.module.weight), []).append(tokens)
        return groups

    def weight_factors(self) -> dict[str, tuple[Factors, Tokens]]:
        """By weight name: the factors in `[out, in]` orientation, and the layer they are of."""
        result = {}
        for name, group in self._by_weight().items():
            lines = [t for t in group if t.kind in ("linear", "conv1d")]
            tables = [t for t in group if t.kind == "embedding"]
            if not lines and not tables:
                continue
            head = self._factors(lines) if lines else None
            table = self._factors(tables) if tables else None
            if head is not None and (table is None or self.tied == "head"):
                result[name] = (head, lines[0])
            elif table is not None and (head is None or self.tied == "embedding"):
                result[name] = (table, tables[0])
            elif head is not None and table is not None:
                result[name] = (pooled(head, table), lines[0])
        return result

    def _factors(self, group: list[Tokens]) -> Factors:
        factors = factors_of(_pooled(group))
        override = self.G_override.get(group[0].name)
        return factors if override is None else replace(factors, G=override)

    def covered(self) -> set[str]:
        """Parameter names that K-FAC covers."""
        names = set()
        layers = [tokens for _, tokens in self.weight_factors().values()]
        for tokens in layers + (self._norm_layers() if self.norms else []):
            names.add(self.name_of(tokens.module.weight))
            if tokens.bias is not None:
                names.add(self.name_of(tokens.bias))
        return names

    def _norm_layers(self) -> list[Tokens]:
        return [t for t in self.tokens.values() if t.kind in ("layernorm", "rmsnorm")]

    # ---- the batch's own gradient

    def own_gradient(self, labels: int, *, unrounded: bool = False) -> dict[str, Tensor]:
        """Gradient of the mean loss, `sum_t g_t a_t^T / N`, every use of a weight added up.

        Each in its parameter's shape and dtype, as autograd would leave it in `.grad`;
        `unrounded` keeps float64, so that it stays in the span of the token gradients.
        """
        gradient: dict[str, Tensor] = {}

        def add(parameter: nn.Parameter, value: Tensor) -> None:
            name = self.name_of(parameter)
            gradient[name] = gradient.get(name, 0) + value / labels

        for tokens in self.tokens.values():
            g = tokens.g[0]
            if tokens.kind == "embedding":
                table = torch.zeros(tokens.module.weight.shape, dtype=torch.float64)
                add(tokens.module.weight, table.index_add(0, tokens.a.flatten(), g))
                continue
            if tokens.kind in ("layernorm", "rmsnorm"):
                add(tokens.module.weight, (g * tokens.a).sum(0))
            else:
                product = g.T @ tokens.a
                add(tokens.module.weight, product.T if tokens.kind == "conv1d" else product)
            if tokens.bias is not None:
                add(tokens.bias, g.sum(0))
        if unrounded:
            return gradient
        dtypes = {name: p.dtype for name, p in self.model.named_parameters()}
        return {name: value.to(dtypes[name]) for name, value in gradient.items()}

    # ---- applying an operator to all covered parameters

    def _apply(self, vectors, kronecker, block) -> dict[str, Tensor]:
        """`kronecker(factors, tokens, dW)` on weights (with bias column), `block` on norms."""
        result: dict[str, Tensor] = {}
        for name, (factors, tokens) in self.weight_factors().items():
            # A pooled or embedding weight is [V, d]; factors are oriented out = rows of dW.
            if name not in vectors:
                continue
            matrix = vectors[name].double()
            if tokens.kind == "conv1d":
                matrix = matrix.T
            if tokens.kind == "embedding":
                matrix = matrix.T  # out = d, in = V
            bias_name = None
            if factors.bias_column:
                bias_name = self.name_of(tokens.bias)
                column = vectors.get(bias_name)
                column = torch.zeros(len(matrix)) if column is None else column
                matrix = torch.cat([matrix, column.double()[:, None]], 1)
            answer = kronecker(factors, tokens, matrix)
            if bias_name is not None:
                if bias_name in vectors:
                    result[bias_name] = answer[:, -1]
                answer = answer[:, :-1]
            transposed = tokens.kind in ("conv1d", "embedding")
            result[name] = answer.T if transposed else answer
        if self.norms:
            for tokens in self._norm_layers():
                self._apply_norm(tokens, vectors, block, result)
        return result

    def _apply_norm(self, tokens, vectors, block, result) -> None:
        names = [self.name_of(tokens.module.weight)]
        if tokens.bias is not None:
            names.append(self.name_of(tokens.bias))
        if not any(name in vectors for name in names):
            return
        size = len(tokens.module.weight)
        zero = torch.zeros(size, dtype=torch.float64)
        stacked = torch.cat([vectors.get(name, zero).double() for name in names])
        answer = block(norm_block(tokens), tokens, stacked)
        for i, name in enumerate(names):
            if name in vectors:
                result[name] = answer[i * size : (i + 1) * size]

    def powered(self, vectors, p: float, damping: Damping) -> dict[str, Tensor]:
        """`G^p dW A^p` with the used eigenvalues."""
        return self._powered(vectors, p, damping, unfloored=None)

    def natural_gradient(self, gradients, damping: Damping) -> dict[str, Tensor]:
        return self.powered(gradients, -1.0, damping)

    def true_head_natural_gradient(self, gradients, damping: Damping, head: str):
        """As `natural_gradient`, but no floor on the G side of `head` (section 5)."""
        return self._powered(gradients, -1.0, damping, unfloored=head)

    def _powered(self, vectors, p: float, damping: Damping, unfloored: str | None):
        def kronecker(factors, tokens, matrix):
            kappa = None if tokens.name == unfloored else damping.kappa
            left = power(factors.G, p, damping.G, kappa)
            return left @ matrix @ power(factors.A, p, damping.A, damping.kappa)

        return self._apply(vectors, kronecker, _block_power(p, damping))

    def fisher_vector_product(self, vectors) -> dict[str, Tensor]:
        """`(T / N) G V A`: no damping, no floor."""

        def kronecker(factors, tokens, matrix):
            return factors.tokens / self.labels * (factors.G @ matrix @ factors.A)

        def block(F, tokens, vector):
            return tokens.count / self.labels * (F @ vector)

        return self._apply(vectors, kronecker, block)

    def ekfac(self, gradients, damping: Damping) -> dict[str, Tensor]:
        """Section 6, for Kronecker-factored layers; norms as in `natural_gradient`."""

        def kronecker(factors, tokens, matrix):
            mA, VA = torch.linalg.eigh(factors.A)
            mG, VG = torch.linalg.eigh(factors.G)
            if tokens.kind == "embedding":
                a = torch.nn.functional.one_hot(tokens.a, len(mA)).double()
            else:
                a = tokens.augmented
            S = sum(((g @ VG) ** 2).T @ ((a @ VA) ** 2) for g in tokens.g)
            S = S / (tokens.count * len(tokens.g))
            S = S + damping.A * mG[:, None] + damping.G * mA[None] + damping.A * damping.G
            if damping.kappa is not None:
                S = torch.maximum(S, S.max() / damping.kappa**2)
            return VG @ ((VG.T @ matrix @ VA) / S) @ VA.T

        return self._apply(gradients, kronecker, _block_power(-1, damping))

    def clipped(self, damping: Damping) -> dict[str, tuple[int, int]]:
        """By layer name: eigenvalues that the floor raised on the A and on the G side."""
        return {
            tokens.name: (
                clipped(factors.A, damping.A, damping.kappa),
                clipped(factors.G, damping.G, damping.kappa),
            )
            for factors, tokens in self.weight_factors().values()
        }


def _block_power(p: float, damping: Damping):
    """Of the block of a norm layer, which is damped by `damping.G`."""
    return lambda F, tokens, vector: power(F, p, damping.G, damping.kappa) @ vector


def many_digits_own(tokens: Tokens, damping: Damping, labels: int, digits: int = 50) -> Tensor:
    """`G^-1 dW A^-1` of a layer's own gradient, without clipping, in `digits` decimal digits.

    In the span of the tokens dense float64 itself is wrong by about `eps` times the product of
    both condition numbers: 3e-3 at damping 1e-8 for 13 tokens (measured against this).
    """
    with mpmath.workdps(digits):
        a = mpmath.matrix(tokens.augmented.tolist())
        g = mpmath.matrix(tokens.g[0].tolist())
        A = a.T * a / tokens.count + mpmath.mpf(damping.A) * mpmath.eye(a.cols)
        G = g.T * g / tokens.count + mpmath.mpf(damping.G) * mpmath.eye(g.cols)
        answer = mpmath.inverse(G) * (g.T * a / labels) * mpmath.inverse(A)
        rows = [[float(answer[i, j]) for j in range(answer.cols)] for i in range(answer.rows)]
    return torch.tensor(rows, dtype=torch.float64)


def relative(given: Tensor, truth: Tensor) -> float:
    """`|given - truth| / |truth|` in float64; nan and inf count as infinitely wrong."""
    given, truth = given.detach().double(), truth.double()
    if given.shape != truth.shape:
        raise AssertionError(f"shape {tuple(given.shape)}, expected {tuple(truth.shape)}")
    error = float((given - truth).norm() / truth.norm().clamp_min(1e-300))
    return error if error == error else float("inf")


def errors(given: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> dict[str, float]:
    """Relative error per parameter of `truth`; a parameter that is missing is an error."""
    missing = sorted(set(truth) - set(given))
    if missing:
        raise AssertionError(f"no result for {missing}")
    return {name: relative(given[name], value) for name, value in truth.items()}


def assert_close(given, truth, bound: float, what: str = "") -> None:
    """Every parameter of `truth` within `bound`; the message names the worst ones."""
    if not truth:
        raise AssertionError("nothing to compare")
    found = errors(given, truth)
    worst = sorted(found.items(), key=lambda item: -item[1])[:4]
    if worst[0][1] > bound:
        shown = ", ".join(f"{name} {error:.1e}" for name, error in worst)
        raise AssertionError(f"{what} relative error over {bound:.0e}: {shown}")
