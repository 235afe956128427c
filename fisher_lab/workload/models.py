"""Models that are built from a configuration, saved and loaded again."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fisher_lab.config.errors import ConfigError
from fisher_lab.config.workload import ModelConfig
from fisher_lab.runs import atomic

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OBJECTIVE_OF = {
    "gpt2": "causal",
    "llama": "causal",
    "bert": "masked",
    "t5": "spans",
    "mlp": "topics",
}
"""Built model -> its objective on the text."""

_CLASSES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "bert": "BertForMaskedLM",
    "t5": "T5ForConditionalGeneration",
}
_AUTO_CLASSES = {
    "causal": ("AutoModelForCausalLM", "AutoModelForImageTextToText"),
    "masked": ("AutoModelForMaskedLM",),
    "spans": ("AutoModelForSeq2SeqLM",),
    "pictures": ("AutoModelForImageClassification",),
}
"""Objective -> the library's classes that load a model for it."""

BASE_WIDTH, BASE_DEVIATION = 768, 0.02
"""Width, and standard deviation of the initial weights, of the published GPT-2 and BERT."""


class TopicMLP(nn.Module):
    """A multi-layer perceptron from a bag of tokens to a topic.

    Args:
        vocabulary: Width of the bag.
        width: Width of the hidden layers.
        layers: Number of hidden layers.
        classes: Number of topics.
        dropout: Dropout after every hidden layer.
    """

    def __init__(
        self, vocabulary: int, width: int, layers: int, classes: int, dropout: float
    ) -> None:
        super().__init__()
        self.sizes = {
            "vocabulary": vocabulary,
            "width": width,
            "layers": layers,
            "classes": classes,
            "dropout": dropout,
        }
        inner = [vocabulary, *[width] * layers]
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(inner))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, classes)

    def forward(self, bag: Tensor) -> Tensor:
        """Logits ``[B, classes]`` for bags ``[B, vocabulary]``."""
        features = bag.to(self.head.weight.dtype)
        for layer in self.hidden:
            features = self.dropout(torch.relu(layer(features)))
        return self.head(features)


def build(
    model: ModelConfig, tokenizer: PreTrainedTokenizerBase, *, classes: int, seed: int
) -> nn.Module:
    """Build a model with initial weights drawn from ``seed``, in float32 and training mode.

    The random state of the process does not change.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if model.type == "mlp":
            built: nn.Module = TopicMLP(
                len(tokenizer), model.width, model.layers, classes, model.dropout
            )
        else:
            built = _transformer(model, tokenizer, classes)
    return built.float().train()


def transformers() -> Any:
    """The library, without its own progress bars."""
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    return transformers


def _transformer(model: ModelConfig, tokenizer: PreTrainedTokenizerBase, classes: int) -> nn.Module:
    hf = transformers()
    common = {
        "vocab_size": classes,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": model.tied,
    }
    if model.type == "t5":
        common["decoder_start_token_id"] = tokenizer.pad_token_id
    return getattr(hf, _CLASSES[model.type])(_configuration(hf, model, common))


def _configuration(hf: Any, model: ModelConfig, common: dict[str, Any]) -> Any:
    inner = model.mlp_width or 4 * model.width
    # 0.02 is too little for a narrow model: the deviation scales as 1 / sqrt(width).
    deviation = BASE_DEVIATION * math.sqrt(BASE_WIDTH / model.width)
    match model.type:
        case "gpt2":
            return hf.GPT2Config(
                n_positions=model.positions or model.recipe.seq_len,
                n_embd=model.width,
                n_layer=model.layers,
                n_head=model.heads,
                n_inner=inner,
                resid_pdrop=model.dropout,
                embd_pdrop=model.dropout,
                attn_pdrop=model.dropout,
                activation_function="gelu_pytorch_tanh",  # the same as gelu_new, in one kernel
                initializer_range=deviation,
                **common,
            )
        case "t5":
            return hf.T5Config(
                d_model=model.width,
                d_kv=model.width // model.heads,
                d_ff=inner,
                num_layers=model.layers,
                num_decoder_layers=model.layers,
                num_heads=model.heads,
                dropout_rate=model.dropout,
                **common,
            )
    return _llama_or_bert(hf, model, {"initializer_range": deviation, **common})


def _llama_or_bert(hf: Any, model: ModelConfig, common: dict[str, Any]) -> Any:
    sizes = {
        "hidden_size": model.width,
        "intermediate_size": model.mlp_width or 4 * model.width,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
    }
    if model.type == "bert":
        return hf.BertConfig(
            max_position_embeddings=model.positions or model.recipe.seq_len,
            hidden_dropout_prob=model.dropout,
            attention_probs_dropout_prob=model.dropout,
            **sizes,
            **common,
        )
    return hf.LlamaConfig(
        num_key_value_heads=model.kv_heads or model.heads,
        max_position_embeddings=model.positions or 2048,
        attention_dropout=model.dropout,
        **sizes,
        **common,
    )


# -- files -------------------------------------------------------------------------------------


def save(model: nn.Module, directory: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Write a model into an existing directory: ``config.json`` and ``model.safetensors``.

    Args:
        model: The model.
        directory: The directory.
        weights: The whole state dict of a model that itself has only shards.
    """
    if isinstance(model, TopicMLP):
        atomic.write_json(directory / "config.json", {"model_type": "topic_mlp", **model.sizes})
        with atomic.writing(directory / "model.safetensors") as temporary:
            save_file(dict(model.state_dict() if weights is None else weights), temporary)
        return
    model.save_pretrained(str(directory), state_dict=weights)  # type: ignore[operator]


def load(directory: Path, model: ModelConfig, task: str) -> nn.Module:
    """Load what `save` wrote."""
    if model.type == "mlp":
        sizes = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        sizes.pop("model_type")
        loaded = TopicMLP(**sizes)
        loaded.load_state_dict(load_file(directory / "model.safetensors"))
    else:
        loader = getattr(transformers(), _AUTO_CLASSES[task][0])
        loaded = loader.from_pretrained(str(directory), **load_options(model))
    return with_dtype(loaded, model.dtype)


def with_dtype(model: nn.Module, dtype: str) -> nn.Module:
    """Convert the weights, unless ``dtype`` is ``auto``."""
    return model if dtype == "auto" else model.to(getattr(torch, dtype))


def set_attention(model: nn.Module, implementation: str | None) -> None:
    """Choose the attention of a model that was built here, if it has one.

    Raises:
        ConfigError: The library does not know the implementation, or the model cannot use it.
    """
    if implementation is None or not hasattr(model, "set_attn_implementation"):
        return
    try:
        model.set_attn_implementation(implementation)  # type: ignore[operator]
    except (ValueError, ImportError, KeyError) as error:
        raise bad_attention(implementation, error) from error


def auto_class(task: str, config: Any) -> str:
    """The name of the library's class that loads a model with this configuration for a task."""
    names = _AUTO_CLASSES[task]
    known = (n for n in names if type(config) in getattr(transformers(), n)._model_mapping)
    return next(known, names[0])


def load_options(model: ModelConfig) -> dict[str, Any]:
    """The options of a model that is loaded: its dtype and its attention."""
    dtype = "auto" if model.dtype == "auto" else getattr(torch, model.dtype)
    attention = model.attn_implementation
    return {"dtype": dtype} | ({} if attention is None else {"attn_implementation": attention})


def bad_attention(implementation: str, error: Exception) -> ConfigError:
    """The error for an implementation of attention that a model cannot use."""
    return ConfigError(
        f"model.attn_implementation={implementation} is not allowed for this model: {error}"
    )
