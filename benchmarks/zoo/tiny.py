"""Tiny random models of transformers' classes, in float64 and without noise in their forward pass."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig

from benchmarks.zoo.inputs import CLASSES, END, HEADS, PAD, START, VOCAB

HEAD, WIDTH, INNER = 8, 8 * HEADS, 48
WIDEST = 600
"""The largest dimension of a model that is taken, beside its positions."""

RULES: tuple[tuple[str, int], ...] = (
    (r".*token.*_id|.*_index|.*version.*", -1),
    (r"(.*_)?vocab(ulary)?_size(_.*)?|n_tokens", VOCAB),
    (r".*(position|ctx|context).*|max_.*_length|seq_length|max_sequence.*", 64),
    (r"num_(key_value|kv)_heads|(.*_)?num_key_value_heads|type_vocab_size", 2),
    (r"num_experts_per_tok(en)?|moe_topk|top_?k(_experts)?|.*_top_k", 2),
    (r"n_group|topk_group|n_shared_experts|first_k_dense_replace|num_.*shared_experts", 1),
    (r"(encoder|decoder)_layers|num_(encoder|decoder)_layers", 1),
    (r".*(num|n)_(hidden_)?layers?|n_layers?|depth|.*num_.*blocks", 2),
    (r".*num_.*heads|n_heads?|.*attention_heads|num_heads|.*_n_heads", HEADS),
    (r"(num|n)_.*experts|moe_num_experts", HEADS),
    (r".*(state_size|d_state|conv_kernel|d_conv|time_step_rank)", 4),
    (r"rotary_dim|.*conv_kernel_dim", 4),
    (r".*(head_dim|d_head|d_kv|dim_head|_rank|head_size)|.*chunk_size", HEAD),
    (r"qk_(rope|nope)_head_dim", HEAD),
    (r"(moe|shared_expert).*intermediate_size", 12),
    (r".*(intermediate|ffn|mlp|inner|d_ff|feed_?forward|hidden_dim$).*", INNER),
    (r"d_model|n_embd|.*(dim|dims|size|hidden|width|channels|features)", WIDTH),
)
"""What the options of a configuration become, by their names; -1 leaves them as they are."""

NO_NOISE = ("dropout", "drop_rate", "drop_path", "pdrop", "layerdrop", "_prob")
TOKENS = {"pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END}


class Exact(TorchFunctionMode):
    """Computes in float64 what a model's code wants in float32: norms, attention weights, losses.

    The model is another one by rounding only, and is the same for the engine and its reference.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "float":
            func = torch.Tensor.double
        return func(*map(_double, args), **{k: _double(v) for k, v in (kwargs or {}).items()})


def _double(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def tiny(name: str, value: int) -> int:
    """What an option of a configuration becomes that has a value."""
    size = next((n for pattern, n in RULES if re.fullmatch(pattern, name)), -1)
    return value if size < 0 else min(value, size)


def shrink(config: PretrainedConfig) -> None:
    """Makes a configuration tiny, without noise, in place; those inside it too."""
    for name in [*vars(config), *config.attribute_map]:
        value = getattr(config, name, None)
        if isinstance(value, PretrainedConfig):
            shrink(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            _set(config, name, tiny(name, value))
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


def configurations(cls: Any) -> Iterator[PretrainedConfig]:
    """Yields tiny configurations of a model's class, the one that fits most of them first."""
    config = cls.config_class()
    shrink(config)
    yield config


def build(
    name: str,
    works: Callable[[nn.Module], object] = lambda _: None,
    settle: Callable[[PretrainedConfig], None] = lambda _: None,
) -> nn.Module:
    """Returns a tiny random model of a class of transformers, less symmetrical than a fresh one.

    Args:
        name: of the class.
        works: tries the model; what it raises rules the configuration out.
        settle: sets what the task asks of a configuration.

    Raises:
        Exception: that of the first configuration, where none works.
    """
    cls = getattr(transformers, name)
    first: Exception | None = None
    for config in configurations(cls):
        try:
            settle(config)
            model = _made(cls, config)
            works(model)
            return model
        except Exception as error:
            first = first or error
    assert first is not None
    raise first


def settle_classes(config: PretrainedConfig) -> None:
    """Asks for few classes."""
    config.num_labels = CLASSES


def _check_size(cls: Any, config: PretrainedConfig) -> None:
    """Refuses a model that is not tiny before its memory is taken."""
    try:
        with torch.device("meta"):
            shapes = {n: p.shape for n, p in cls(deepcopy(config)).named_parameters()}
    except Exception:
        return  # it reads numbers as it is made
    wide = {n: s for n, s in shapes.items() if max(s, default=0) > WIDEST and "pos" not in n}
    for name, shape in wide.items():
        raise ValueError(f"{name} has shape {tuple(shape)} with tiny options; allowed: {WIDEST}")


def _made(cls: Any, config: PretrainedConfig) -> nn.Module:
    for each in [config, *(getattr(config, s, None) for s in config.sub_configs)]:
        if each is not None:
            each._attn_implementation = "eager"
            each._experts_implementation = "eager"  # a grouped product has no float64 on a CPU
    torch.manual_seed(0)
    _check_size(cls, config)
    with Exact():
        model = cls(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model
