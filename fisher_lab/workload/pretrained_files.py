"""What the files of a pretrained model say before anything is loaded; without torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fisher_lab.config.errors import ConfigError
from fisher_lab.config.schema import Config
from fisher_lab.config.workload import TASKS, ModelConfig
from fisher_lab.workload.content_identity import CONFIG_FILE

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")
_TOKENIZERS = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "*.spm")
_TASK_OF = {
    "MaskedLM": "masked",
    "CausalLM": "causal",
    "LMHeadModel": "causal",
    "ImageClassification": "pictures",
}
"""Part of the name of an architecture -> the objective that it is for."""

NO_TOKENIZER = (
    "it comes without a tokenizer; give model.tokenizer=<a name on the hub or a directory>, or "
    "model.tokenizer=trained for one that is trained on the text"
)


def config_of(model: ModelConfig) -> dict[str, Any]:
    """The contents of a pretrained model's ``config.json``; that of the hub lies in the cache."""
    assert model.name_or_path is not None  # the schema's check
    path = Path(model.name_or_path).expanduser() / CONFIG_FILE
    if not path.is_file():
        from huggingface_hub import hf_hub_download

        path = Path(hf_hub_download(model.name_or_path, CONFIG_FILE, revision=model.revision))
    return json.loads(path.read_text(encoding="utf-8"))


def task_of(model: ModelConfig, config: Mapping[str, Any]) -> str:
    """The objective of a pretrained model: as configured, else from its own configuration.

    Args:
        model: What was configured.
        config: The contents of the model's ``config.json``.

    Raises:
        ConfigError: It names no known objective.
    """
    if model.task is not None:
        return model.task
    names = " ".join(config.get("architectures") or [])
    if "ConditionalGeneration" in names:
        return "spans" if config.get("is_encoder_decoder") else "causal"
    for part, task in _TASK_OF.items():
        if part in names:
            return task
    raise ConfigError(
        f"model.name_or_path={model.name_or_path}: its architecture ({names or 'none given'}) does "
        f"not say what it is for; model.task must be one of {', '.join(TASKS)} (a head that the "
        "checkpoint lacks is drawn at random, which is said)"
    )


def check(cfg: Config) -> None:
    """Check what can be known of a pretrained model without loading it.

    Raises:
        ConfigError: Something is wrong with it; the message says all that is.
    """
    found = list(_problems(cfg))
    if found:
        raise ConfigError("; also ".join(found))


def _problems(cfg: Config) -> Iterator[str]:
    model = cfg.model
    if model.adapter is not None and find_spec("peft") is None:
        yield (
            f"model.adapter={model.adapter} needs the package peft: pip install 'fisher-lab[lora]'"
        )
    if model.type != "pretrained":
        return
    config, task = config_of(model), None
    try:
        task = task_of(model, config)
    except ConfigError as error:
        yield str(error)
    if task is not None and (task == "pictures") != (cfg.data.type == "pictures"):
        wanted = "pictures" if task == "pictures" else "pydoc, text_file or hf"
        kind = "a model that tells pictures apart" if task == "pictures" else "a model of text"
        yield (
            f"data.type={cfg.data.type} is not allowed: data.type must be {wanted} for {kind} "
            f"(choose data={'pictures' if task == 'pictures' else 'pydoc'})"
        )
    directory = Path(model.name_or_path or "").expanduser()
    where = f"model.name_or_path={model.name_or_path}"
    if directory.is_dir() and not _has(directory, _WEIGHTS):
        yield f"{where}: there are no weights in it (*.safetensors or *.bin)"
    known = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    if model.tokenizer == "trained" and known and cfg.data.vocab_size > known:
        allowed = f"at most {known}, the tokens that the model knows"
        yield str(ConfigError.value("data.vocab_size", cfg.data.vocab_size, allowed))
    own = model.tokenizer is None and task != "pictures"
    if own and directory.is_dir() and not _has(directory, _TOKENIZERS):
        yield f"{where}: {NO_TOKENIZER}"


def _has(directory: Path, patterns: tuple[str, ...]) -> bool:
    return any(next(directory.glob(pattern), None) for pattern in patterns)
