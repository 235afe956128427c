"""K-FAC on tiny random models of transformers' architectures, against references of its own.

    python benchmarks/zoo.py [--mapping causal] [--side right|left] [--out FILE] [NAME ...]

Every architecture of a mapping is built tiny, in float64, and collects a padded batch once. The
reference runs each sequence alone, without padding, and records what torch's functions are given;
it shares no code with the engine. Compared are the own gradient of every parameter with autograd's,
and of every layer the tokens, A and G. An architecture is ``right`` (with its coverage), ``wrong``,
``refused`` (one line of error of the project), ``crashed``, or ``not built``.
"""

from __future__ import annotations

import argparse
import inspect
import json
import signal
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig
from transformers.models.auto import modeling_auto

from fisher_lab import KFACNaturalGradient
from fisher_lab.curvature.errors import CurvatureError
from fisher_lab.curvature.losses import CrossEntropy

VOCAB, WIDTH = 53, 16
LENGTHS = (5, 8, 3)
TOLERANCE = 1e-6
SECONDS = 90

MAPPINGS = {"causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}

SIZES: dict[int, str] = {
    VOCAB: "vocab_size",
    WIDTH: "hidden_size d_model n_embd dim embed_dim embedding_size emb_dim word_embed_proj_dim "
    "pooler_hidden_size projection_dim",
    1: "encoder_layers decoder_layers num_decoder_layers num_encoder_layers n_group topk_group "
    "n_shared_experts first_k_dense_replace",
    2: "num_hidden_layers n_layer n_layers num_layers num_attention_heads n_head n_heads num_heads "
    "encoder_attention_heads decoder_attention_heads num_key_value_heads num_kv_heads "
    "attention_heads type_vocab_size num_experts_per_tok num_experts_per_token moe_topk",
    4: "num_experts n_routed_experts num_local_experts moe_num_experts qk_rope_head_dim "
    "qk_nope_head_dim rotary_dim state_size time_step_rank conv_kernel mamba_d_state mamba_d_conv",
    8: "d_kv d_head head_dim attention_head_dim dim_head q_lora_rank kv_lora_rank v_head_dim "
    "chunk_size mamba_chunk_size mamba_d_head",
    12: "moe_intermediate_size shared_expert_intermediate_size",
    24: "intermediate_size ffn_dim d_ff n_inner encoder_ffn_dim decoder_ffn_dim hidden_dim d_inner "
    "inner_dim ffn_hidden_size",
    64: "max_position_embeddings n_positions max_target_positions n_ctx max_sequence_length",
}
VALUES = {name: size for size, names in SIZES.items() for name in names.split()}
NO_NOISE = ("dropout", "drop_rate", "drop_path", "pdrop", "layerdrop", "_prob")
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def shrink(config: PretrainedConfig) -> None:
    """Makes a configuration tiny, without noise, in place; those inside it too."""
    for name in [*vars(config), *config.attribute_map]:
        value = getattr(config, name, None)
        if isinstance(value, PretrainedConfig):
            shrink(value)
        elif name in VALUES and isinstance(value, int) and not isinstance(value, bool):
            _set(config, name, VALUES[name])
        elif isinstance(value, float) and any(word in name for word in NO_NOISE):
            _set(config, name, 0.0)
    for name, value in TOKENS.items():
        given = getattr(config, name, value)
        if given is None or (isinstance(given, int) and given >= VOCAB):
            _set(config, name, value)
    if hasattr(config, "qk_rope_head_dim"):  # the rotated part is what such models call a head
        _set(config, "head_dim", config.qk_rope_head_dim)
    kinds = getattr(config, "layer_types", None)
    if isinstance(kinds, list):
        layers = getattr(config, "num_hidden_layers", None) or 2
        _set(config, "layer_types", (list(dict.fromkeys(kinds)) * layers)[:layers])


def _set(config: PretrainedConfig, name: str, value: Any) -> None:
    try:
        setattr(config, name, value)
    except Exception:  # a property, or a value that the configuration refuses
        return


def build(name: str) -> nn.Module:
    """Returns a tiny random model of a class of transformers, less symmetrical than a fresh one."""
    cls = getattr(transformers, name)
    config = cls.config_class()
    shrink(config)
    for each in [config, *(getattr(config, s, None) for s in config.sub_configs)]:
        if each is not None:
            each._attn_implementation = "eager"
            each._experts_implementation = "eager"  # a grouped product has no float64 on a CPU
    torch.manual_seed(0)
    model = cls(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batch_of(side: str) -> dict[str, Tensor]:
    """A batch of ids, padded on a side, with positions where the padding is on the left."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        mask[row, :length] = 1
    mask = mask if side == "right" else mask.flip(1)
    ids = torch.randint(3, VOCAB, mask.shape, generator=generator) * mask
    counts = mask * mask.roll(1, 1)
    counts[:, 0] = 0
    labels = torch.randint(3, VOCAB, mask.shape, generator=generator)
    batch = {"input_ids": ids, "attention_mask": mask}
    if side == "left":
        batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return {**batch, "labels": labels.masked_fill(counts == 0, -100)}


class Reference(TorchFunctionMode):
    """Records what ``linear``, ``addmm``, ``matmul``, ``embedding`` and their like are given."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.sizes = dict(model.named_parameters())
        self.seen: list[tuple[str, bool, Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if isinstance(out, Tensor) and out.requires_grad:
            values = [t for t in (*args, *(kwargs or {}).values()) if isinstance(t, Tensor)]
            self._note(name, values, out)
        return out

    def _note(self, name: str, values: list[Tensor], out: Tensor) -> None:
        if name == "embedding":
            ids = next(t for t in values if not t.is_floating_point())
            table = next(t for t in values if t.is_floating_point())
            found = self._parameter(table)
            if found is not None:
                self._keep(found, True, ids.reshape(-1), out)
        elif name in ("linear", "addmm", "matmul", "__matmul__", "mm"):
            a, weight = values[1:3] if name == "addmm" else values[:2]
            found = self._parameter(weight)
            if found is not None and weight.dim() == 2:
                self._keep(found, False, a.detach().reshape(-1, a.shape[-1]), out)
        elif name in ("bmm", "matmul") and len(values) == 2 and values[1].dim() == 3:
            found = self._parameter(values[1])
            for part in range(len(values[1])) if found is not None else ():
                self._keep(f"{found}[{part}]", False, values[0].detach()[part], out, part)

    def _parameter(self, tensor: Tensor) -> str | None:
        """The parameter, or the part of a stack, that starts where a tensor does."""
        for name, parameter in self.sizes.items():
            start = tensor.data_ptr() - parameter.data_ptr()
            size = parameter[0].numel() * parameter.element_size() if parameter.dim() == 3 else 0
            if start == 0 and tensor.numel() == parameter.numel():
                return name
            part = size and tensor.dim() == 2 and tensor.numel() == parameter[0].numel()
            if part and 0 <= start < size * len(parameter) and start % size == 0:
                return f"{name}[{start // size}]"
        return None

    def _keep(
        self, name: str, looked_up: bool, a: Tensor, out: Tensor, part: int | None = None
    ) -> None:
        index = len(self.seen)
        self.seen.append((name, looked_up, a, torch.zeros(0)))

        def note(grad: Tensor) -> None:
            grad = grad.detach() if part is None else grad.detach()[part]
            self.seen[index] = (name, looked_up, a, grad.reshape(-1, grad.shape[-1]))

        out.register_hook(note)


def alone(model: nn.Module, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict]:
    """The gradient of the mean loss, and every layer's tokens, of each sequence without padding."""
    parameters = inspect.signature(model.forward).parameters
    total = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    tokens: dict[tuple[str, bool], list[tuple[Tensor, Tensor]]] = {}
    labels = 0
    for row, mask in enumerate(batch["attention_mask"].bool()):
        single = {k: v[row][mask][None] for k, v in batch.items()}
        given = {k: v for k, v in single.items() if k in parameters and k != "labels"}
        given |= {"use_cache": False} if "use_cache" in parameters else {}
        with Reference(model) as reference:
            logits = model(**given).logits
        targets = single["labels"][:, 1:].reshape(-1)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="sum")
        grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        labels += int((targets != -100).sum())
        for name, grad in zip(total, grads, strict=True):
            total[name] += 0.0 if grad is None else grad
        for name, looked_up, a, g in reference.seen:
            if len(g):
                tokens.setdefault((name, looked_up), []).append((a, g))
    return {n: g / labels for n, g in total.items()}, tokens


def differences(kfac: KFACNaturalGradient, model: nn.Module, batch: dict[str, Tensor]) -> list[str]:
    """What the engine's numbers are off the reference in, one line each."""
    gradient, tokens = alone(model, batch)
    size = sum(float(g.square().sum()) for g in gradient.values()) ** 0.5
    own, found = kfac.own_gradients(model), []
    for name, expected in gradient.items():
        error = float((own.get(name, torch.zeros(())) - expected).norm())
        if error > TOLERANCE * float(expected.norm()) + 1e-9 * size:
            found.append(f"{name}: own gradient off by {error / float(expected.norm()):.0e}")
    for name, factors in kfac.kfac_factors.items():
        layer = factors.layer
        pairs = tokens.get((layer.weight, layer.kind == "Embedding"))
        if factors.A is None or pairs is None:
            continue
        a, g = torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])
        if layer.kind == "Embedding":
            a = nn.functional.one_hot(a, layer.n_in).double()
        elif layer.augmented:
            a = torch.cat([a, a.new_ones(len(a), 1)], dim=1)
        if factors.tokens != len(g):
            found.append(f"{name}: {factors.tokens} tokens for {len(g)}")
            continue
        for side, factor, x in (("A", factors.A, a), ("G", factors.G, g)):
            expected = x.T @ x / len(x)
            error = float((factor.to_dense() - expected).norm() / expected.norm())
            if error > TOLERANCE:
                found.append(f"{name}: {side} off by {error:.0e}")
    return found


def examine(name: str, side: str) -> dict[str, Any]:
    """Builds an architecture and compares it with its reference."""
    try:
        model = build(name)
    except Exception as error:
        return {"status": "not built", "why": f"{type(error).__name__}: {error}"[:200]}
    batch = batch_of(side)
    parameters = inspect.signature(model.forward).parameters
    wanted = {"input_ids", "attention_mask", "labels", *parameters}
    kfac = KFACNaturalGradient(damping=1e-3, track_diagonal=False)
    try:
        alone(model, batch)
    except Exception as error:
        return {"status": "not built", "why": f"{type(error).__name__}: {error}"[:200]}
    try:
        given = {k: v for k, v in batch.items() if k in wanted}
        loss = CrossEntropy(shift=True)
        kfac.collect_kfac_factors(model, given, loss=loss, keep_gradient=True)
        wrong = differences(kfac, model, batch)
    except CurvatureError as error:
        return {"status": "refused", "why": str(error)[:200]}
    except Exception as error:
        return {"status": "crashed", "why": f"{type(error).__name__}: {error}"[:200]}
    about = {"coverage": kfac.coverage.share, "passed": kfac.coverage.passed}
    return {"status": "wrong" if wrong else "right", "why": "; ".join(wrong[:3]), **about}


def main() -> None:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="types of models; all without any")
    parser.add_argument("--mapping", choices=MAPPINGS, default="causal")
    parser.add_argument("--side", choices=("right", "left"), default="right")
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    options = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {}

    def late(*_: object) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    for kind, name in MAPPINGS[options.mapping].items():
        if options.names and kind not in options.names:
            continue
        signal.alarm(SECONDS)
        rows[kind] = examine(name, options.side)
        signal.alarm(0)
        row = rows[kind]
        share = f"{row['coverage']:.0%}" if "coverage" in row else ""
        print(f"{kind:28} {row['status']:10} {share:>5} {row['why'][:60]}", flush=True)
    print(dict(Counter(row["status"] for row in rows.values())))
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
