"""Tiny random models of transformers' classes, in float64 and without noise."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PretrainedConfig

from benchmarks.zoo.inputs import CLASSES, END, HEADS, PAD, START, VOCAB

HEAD, WIDTH, INNER = 8, 8 * HEADS, 48
WIDEST = 1100
"""The largest dimension of a model that is taken, beside its positions."""

RULES: tuple[tuple[str, int], ...] = (
    (r".*token.*_id|.*_index|.*version.*", -1),
    (r"(.*_)?vocab(ulary)?(_size)?(_.*)?|n_tokens", VOCAB),
    (r"patch_size|image_patch_tokens", 4),
    (r"attention_window|sliding_window.*|block_size", 4),
    (r"(prompt|segment)_(types|length)", 4),
    (r"num_hash_buckets", VOCAB),
    (r"conv_kernel_size", 3),
    (r"d_rel|rel_extent|num_landmarks|segment_means_seq_len", 16),
    (r".*(position|ctx|context|bias_max).*|max_.*_len(gth)?|seq_length|max_sequence.*", 16),
    (r"num_(key_value|kv)_heads|(.*_)?num_key_value_heads|type_vocab_size|kv_n_heads", 2),
    (r"num_experts_per_tok(en)?|moe_topk|top_?k(_experts)?|.*_top_k|(mamba_)?n_?groups", 2),
    (r"n_group|topk_group|n_shared_experts|first_k_dense_replace|num_.*shared_experts", 1),
    (r"(encoder|decoder)_layers|num_(encoder|decoder)_layers|(mamba_)?expand|num_dense_layers", 1),
    (r".*(num|n)_(hidden_)?layers?|n_layers?|depth|.*num_.*blocks|num_self_attends_.*", 2),
    (r".*num_.*heads|n_(mamba_)?heads?|.*attention_heads|num_heads|.*_n_heads", HEADS),
    (r"num_query_groups|zero_expert_num", HEADS),
    (r"(num|n)_.*experts|num_experts|moe_num_experts", HEADS),
    (r".*(state_size|d_state|conv_kernel|d_conv|time_step_rank)", 4),
    (r"rotary_dim|.*conv_kernel_(dim|size)|num_expert_group", 4),
    (r".*(head_?dim|d_head|d_kv|dim_head|_rank|head_size)|.*chunk_size|kv_channels", HEAD),
    (r"num_layers_per_.*", 1),
    (r"qk_(rope|nope)_head_dim|.*multiple_of", HEAD),
    (r"(moe|shared_expert).*intermediate_size", 12),
    (r".*(intermediate|ffn|mlp|inner|d_ff|dff|feed_?forward|hidden_dim$|dim_ff).*", INNER),
    (
        r"d_.*|n_embd|.*(dim|dims|size|hidden|width|channels|features|d_ssm|latents)(_global)?",
        WIDTH,
    ),
)
"""What the options of a configuration become, by their names; -1 leaves them as they are."""
STACKED: tuple[tuple[str, int], ...] = (
    (r"attn_layer_period", 2),
    (r"attn_layer_offset", 1),
    (r"num_kv_shared_layers", 0),
)
"""The same where what an option says of the layers is left to the configuration."""

NO_NOISE = ("dropout", "drop_rate", "drop_path", "pdrop", "layerdrop", "_prob")
TOKENS = {
    "pad_token_id": PAD,
    "bos_token_id": START,
    "eos_token_id": END,
    "decoder_start_token_id": START,
}
FIRST = {"vocab_size": VOCAB, "default_language": "en_XX"}
"""Options that have no default and that a model cannot do without."""
WINDOWS = ("attention_window",)
"""Options with a size for each layer."""


class Exact(TorchFunctionMode):
    """Computes in float64 what a model's code wants in float32: norms, attention weights, losses.

    The model is another one by rounding only, and is the same for the engine and its reference.
    """

    def __enter__(self) -> Exact:
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)
        torch.set_default_dtype(self.before)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "float":
            func = torch.Tensor.double
        return func(*map(_double, args), **{k: _double(v) for k, v in (kwargs or {}).items()})


def _double(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


@dataclass(frozen=True)
class Shrinking:
    """A way to make a configuration tiny.

    Attributes:
        anew: whether the configuration is made anew of its tiny options, so that what it derives of
            them follows; otherwise they are set.
        fill: whether options without a value get one.
        repeats: how often every kind of layer comes.
        rules: what options become by their names.
    """

    anew: bool = False
    fill: bool = False
    repeats: int = 1
    rules: tuple[tuple[str, int], ...] = RULES

    def __call__(self, config: PretrainedConfig) -> PretrainedConfig:
        """Returns a tiny configuration like this one."""
        found = self._options(config)
        if self.anew:
            return type(config)(**found)
        for name, value in found.items():
            with suppress(Exception):  # a property, or a value that the configuration refuses
                setattr(config, name, value)
        return config

    def _options(self, config: PretrainedConfig) -> dict[str, Any]:
        names = [n for n in {**vars(config), **config.attribute_map} if not n.startswith("_")]
        given = {n: _get(config, n) for n in names}
        depth, found = given.get("num_hidden_layers"), {}
        for name, value in given.items():
            new = self.option(name, value)
            if new is not value:
                found[name] = new
        lists = {n: v for n, v in given.items() if isinstance(v, list) and len(v) == depth}
        numbers = {n: v for n, v in lists.items() if v == [*range(len(v))]}  # of layers
        lists = {n: v for n, v in lists.items() if n not in numbers}
        if self.fill and "layer_types" in given:
            lists["layer_types"] = [*(given["layer_types"] or ()), "full_attention"]
        layers = self.repeats * max([2, *(len(dict.fromkeys(map(str, v))) for v in lists.values())])
        if isinstance(depth, int) and (depth > 2 or lists):
            found["num_hidden_layers"] = layers
        for name, value in lists.items():
            kinds = [self.option(name, v) for v in {str(v): v for v in value}.values()]
            found[name] = (kinds * layers)[:layers]
        found |= {name: [n for n in value if n < layers] for name, value in numbers.items()}
        if given.get("is_encoder_decoder") and "decoder_start_token_id" not in given:
            found["decoder_start_token_id"] = START
        nope, rope = found.get("qk_nope_head_dim"), found.get("qk_rope_head_dim")
        if rope is not None:  # the rotated part is what such models call a head
            found |= {"head_dim": rope} if "head_dim" in given else {}
            found |= {"qk_head_dim": nope + rope} if "qk_head_dim" in given else {}
        if given.get("num_key_value_heads") == given.get("num_attention_heads") is not None:
            found["num_key_value_heads"] = found.get("num_attention_heads", HEADS)
        return found

    def option(self, name: str, value: Any) -> Any:
        """Returns what an option becomes."""
        if isinstance(value, PretrainedConfig):
            return self(value)
        if isinstance(value, float) and any(word in name for word in NO_NOISE):
            return 0.0
        if name in TOKENS and (value is None or (isinstance(value, int) and value >= VOCAB)):
            return TOKENS[name]
        if value is None and name in FIRST:
            return FIRST[name]
        if isinstance(value, list | tuple) and name in WINDOWS:
            return type(value)(self.option(name, v) for v in value)
        whole = isinstance(value, int) and not isinstance(value, bool)
        size = next((n for pattern, n in self.rules if re.fullmatch(pattern, name)), -1)
        if (not whole and not (value is None and self.fill)) or size < 0:
            return value
        return size if value is None else min(value, size)


@dataclass(frozen=True)
class Derived:
    """A configuration made anew of the options that have a value of their own, made tiny.

    What follows from them (kinds of layers, sizes of heads) is left to the configuration.

    Attributes:
        layers: how many there are.
        rules: about options, before all others.
    """

    layers: int
    rules: tuple[tuple[str, int], ...] = STACKED

    def __call__(self, config: PretrainedConfig) -> PretrainedConfig:
        """Returns a tiny configuration like this one."""
        shrinking, options = Shrinking(rules=(*self.rules, *RULES)), {}
        for field in dataclasses.fields(config):
            value = _get(config, field.name)
            if isinstance(value, PretrainedConfig):
                options[field.name] = self(value)
            elif field.init and field.default not in (None, dataclasses.MISSING):
                options[field.name] = shrinking.option(field.name, field.default)
            elif field.name in TOKENS:
                options[field.name] = TOKENS[field.name]
        kv, heads = "num_key_value_heads", "num_attention_heads"
        if getattr(type(config), kv, None) == getattr(type(config), heads, 0):
            options[kv] = options[heads]
        depth = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
        if isinstance(options.get(depth), int):
            options[depth] = self.layers
        return type(config)(**options)


SHRINKINGS = (
    Shrinking(),
    Shrinking(anew=True),
    Shrinking(fill=True),
    Shrinking(anew=True, fill=True),
    Shrinking(repeats=2),
    Shrinking(anew=True, repeats=2),
    *(Derived(layers) for layers in (2, 4, 6)),
    Derived(2, ((r"hidden_size_per_layer_input", 0), *STACKED)),
)


def _get(config: PretrainedConfig, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # it differs from layer to layer
        return None


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
    for shrinking in SHRINKINGS:
        try:
            config = shrinking(cls.config_class())
            settle(config)
            model = _made(cls, config)
            works(model)
            return model
        except Exception as error:
            first = first or error
    assert first is not None
    raise first


def settle_decoder(config: PretrainedConfig) -> None:
    """Asks for attention to the past only, where that is an option."""
    if _get(config, "is_decoder") is False:
        config.is_decoder = True


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
