"""Models: built from a configuration, or loaded from the hub or a directory."""

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

LEARNED_POSITIONS = ("gpt2", "bert")
"""Built models that cannot take a sequence longer than ``positions``."""

BASE_WIDTH, BASE_DEVIATION = 768, 0.02
"""Width and spread of the initial weights of the published GPT-2 and BERT."""

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class TopicMLP(nn.Module):
    """A plain multi-layer perceptron: bag of tokens in, topic out.

    Args:
        vocabulary: Width of the bag.
        width: Width of the hidden layers.
        layers: Hidden layers.
        classes: Topics.
        dropout: After every hidden layer.
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
    """Build a model with initial weights drawn from ``seed``, in float32, in training mode.

    The process's own random numbers are left as they were.
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


def _transformers() -> Any:
    """The library, without its own progress bars: ours stand for the whole."""
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    return transformers


def positions(model: ModelConfig) -> int:
    """The longest sequence of a built model with learned positions."""
    return model.positions or model.recipe.seq_len


def _transformer(model: ModelConfig, tokenizer: PreTrainedTokenizerBase, classes: int) -> nn.Module:
    hf = _transformers()
    common: dict[str, Any] = {
        "vocab_size": classes,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": model.tied,
    }
    match model.type:
        case "gpt2":
            return hf.GPT2LMHeadModel(hf.GPT2Config(**_gpt2(model), **common))
        case "llama":
            return hf.LlamaForCausalLM(hf.LlamaConfig(**_llama(model), **common))
        case "bert":
            return hf.BertForMaskedLM(hf.BertConfig(**_bert(model), **common))
        case "t5":
            start = {"decoder_start_token_id": tokenizer.pad_token_id}
            return hf.T5ForConditionalGeneration(hf.T5Config(**_t5(model), **start, **common))
    raise ConfigError.value("model.type", model.type, "one of gpt2, llama, bert, t5, mlp")


def _inner_width(model: ModelConfig) -> int:
    return model.mlp_width or 4 * model.width


def _deviation(model: ModelConfig) -> float:
    """0.02 is too little for a narrow model: the spread goes with the root of the width."""
    return BASE_DEVIATION * math.sqrt(BASE_WIDTH / model.width)


def _gpt2(model: ModelConfig) -> dict[str, Any]:
    return {
        "n_positions": positions(model),
        "n_embd": model.width,
        "n_layer": model.layers,
        "n_head": model.heads,
        "n_inner": _inner_width(model),
        "resid_pdrop": model.dropout,
        "embd_pdrop": model.dropout,
        "attn_pdrop": model.dropout,
        # The same function as gelu_new, in one kernel.
        "activation_function": "gelu_pytorch_tanh",
        "initializer_range": _deviation(model),
    }


def _llama(model: ModelConfig) -> dict[str, Any]:
    return {
        "hidden_size": model.width,
        "intermediate_size": _inner_width(model),
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads or model.heads,
        "max_position_embeddings": model.positions or 2048,
        "attention_dropout": model.dropout,
        "initializer_range": _deviation(model),
    }


def _bert(model: ModelConfig) -> dict[str, Any]:
    return {
        "hidden_size": model.width,
        "intermediate_size": _inner_width(model),
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "max_position_embeddings": positions(model),
        "hidden_dropout_prob": model.dropout,
        "attention_probs_dropout_prob": model.dropout,
        "initializer_range": _deviation(model),
    }


def _t5(model: ModelConfig) -> dict[str, Any]:
    return {
        "d_model": model.width,
        "d_kv": model.width // model.heads,
        "d_ff": _inner_width(model),
        "num_layers": model.layers,
        "num_decoder_layers": model.layers,
        "num_heads": model.heads,
        "dropout_rate": model.dropout,
    }


# -- files -------------------------------------------------------------------------------------


def save(model: nn.Module, directory: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Write a model into an existing directory: ``config.json`` and ``model.safetensors``.

    Args:
        model: The model.
        directory: Where to.
        weights: Its whole state dict, where the model itself has shards only.
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
        loaded = _auto_class(task).from_pretrained(str(directory), **_options(model))
    return with_dtype(loaded, model.dtype)


def with_dtype(model: nn.Module, dtype: str) -> nn.Module:
    """Convert the weights, unless ``dtype`` is ``auto``."""
    return model if dtype == "auto" else model.to(DTYPES[dtype])


def set_attention(model: nn.Module, implementation: str | None) -> None:
    """Switch the attention of a model that was built here, where it has one.

    Raises:
        ConfigError: The library does not know the implementation, or the model cannot use it.
    """
    if implementation is None or not hasattr(model, "set_attn_implementation"):
        return
    try:
        model.set_attn_implementation(implementation)  # type: ignore[operator]
    except (ValueError, ImportError, KeyError) as error:
        raise _bad_attention(implementation, error) from error


def _options(model: ModelConfig) -> dict[str, Any]:
    options: dict[str, Any] = {"dtype": "auto" if model.dtype == "auto" else DTYPES[model.dtype]}
    if model.attn_implementation is not None:
        options["attn_implementation"] = model.attn_implementation
    return options


def _auto_class(task: str) -> Any:
    hf = _transformers()

    return {
        "causal": hf.AutoModelForCausalLM,
        "masked": hf.AutoModelForMaskedLM,
        "spans": hf.AutoModelForSeq2SeqLM,
    }[task]


# -- pretrained --------------------------------------------------------------------------------


def pretrained_task(model: ModelConfig) -> str:
    """What a pretrained model is for: as configured, else as its own configuration says.

    Raises:
        ConfigError: The configuration cannot be loaded or names no language model that we know.
    """
    if model.task is not None:
        return model.task
    config = _pretrained_config(model)
    names = " ".join(getattr(config, "architectures", None) or [])
    if "ConditionalGeneration" in names and getattr(config, "is_encoder_decoder", False):
        return "spans"
    if "MaskedLM" in names:
        return "masked"
    if "CausalLM" in names or "LMHeadModel" in names:
        return "causal"
    raise ConfigError(
        f"model.name_or_path={model.name_or_path}: its architecture ({names or 'none given'}) "
        "does not say what it is for; model.task must be one of causal, masked, spans"
    )


def load_pretrained(model: ModelConfig, task: str) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Load a pretrained model and its tokenizer by the library's Auto classes.

    Raises:
        ConfigError: One of them cannot be loaded.
    """
    hf = _transformers()

    where = {"revision": model.revision or "main", "trust_remote_code": model.trust_remote_code}
    name = _local_or_name(model)
    try:
        tokenizer = hf.AutoTokenizer.from_pretrained(name, **where)
        loaded = _auto_class(task).from_pretrained(name, **where, **_options(model))
    except (OSError, ValueError, ImportError, KeyError) as error:
        if model.attn_implementation is not None and "attention" in str(error).lower():
            raise _bad_attention(model.attn_implementation, error) from error
        raise _not_loaded(model, error) from error
    if len(tokenizer) < 2:  # what the library makes of a directory without tokenizer files
        raise ConfigError(f"model.name_or_path={model.name_or_path} comes without a tokenizer")
    return loaded, tokenizer


def _pretrained_config(model: ModelConfig) -> Any:
    hf = _transformers()

    try:
        return hf.AutoConfig.from_pretrained(
            _local_or_name(model),
            revision=model.revision or "main",
            trust_remote_code=model.trust_remote_code,
        )
    except (OSError, ValueError, KeyError) as error:
        raise _not_loaded(model, error) from error


def _local_or_name(model: ModelConfig) -> str:
    assert model.name_or_path is not None  # the schema's check
    path = Path(model.name_or_path).expanduser()
    return str(path) if path.is_dir() else model.name_or_path


def _not_loaded(model: ModelConfig, error: Exception) -> ConfigError:
    return ConfigError(
        f"model.name_or_path={model.name_or_path} (model.revision={model.revision}) cannot be "
        f"loaded: {type(error).__name__}: {error}"
    )


def _bad_attention(implementation: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"model.attn_implementation={implementation} is not allowed for this model: {error}"
    )
