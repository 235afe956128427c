"""Data and model identified by content, before anything is built or trained; without torch."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from fisher_lab.config.errors import ConfigError
from fisher_lab.config.schema import Config
from fisher_lab.config.workload import ModelConfig, OptimizerConfig
from fisher_lab.runs import provenance
from fisher_lab.workload import cache, text, tokenizer

RECIPE = 1
"""Raised when the same configuration gives another checkpoint than before."""

PICTURES = 1
"""Raised when the same configuration gives other pictures than before."""

CONFIG_FILE, ADAPTER_FILE = "config.json", "adapter_config.json"

_NOT_IN_CHECKPOINT = {
    "adapter",
    "lora",
    "tokenizer",
    "name",
    "init",
    "name_or_path",
    "revision",
    "task",
    "trust_remote_code",
    "dtype",
    "attn_implementation",
}
"""Keys of the model that a built checkpoint does not depend on."""

_RECIPE_OPTIMIZER = (
    "name",
    "lr",
    "beta1",
    "beta2",
    "eps",
    "weight_decay",
    "clip_norm",
    "warmup",
    "schedule",
    "final_lr",
)
"""Keys of the optimiser that the recipe's AdamW reads; no other key changes a checkpoint."""

WEIGHTS = ("*.safetensors", "*.bin", "*.json", "*.model", "*.txt", "*.py")
"""Files of a local pretrained model that can change a result."""


def content_identity(cfg: Config) -> dict[str, Any]:
    """Hashes of the text, the tokenizer and the model, for a run's identity.

    Raises:
        ConfigError: The text or the model does not exist, or sequences are longer than the model.
    """
    identity: dict[str, Any] = {}
    if cfg.model.adapter not in (None, "lora"):
        identity["adapter"] = _place("model.adapter", cfg.model.adapter, None, ADAPTER_FILE)
    if cfg.model.type == "pretrained":
        return identity | _of_pretrained(cfg, cfg.model)
    if cfg.data.type == "pictures":
        allowed = f"a text with model.type={cfg.model.type} (pictures need model=pretrained)"
        raise ConfigError.value("data.type", "pictures", allowed)
    loaded = text.load(cfg.data)
    identity["data"] = {"sha256": loaded.sha256}
    _check_lengths(cfg)
    train, _ = text.split(loaded, cfg.data.heldout_fraction)
    identity["tokenizer"] = tokenizer.key(train, cfg.data.vocab_size)
    key = _checkpoint_key(cfg, loaded.sha256, identity["tokenizer"])
    return {**identity, "model": {"init": cfg.model.init, "checkpoint": key}}


def _of_pretrained(cfg: Config, model: ModelConfig) -> dict[str, Any]:
    assert model.name_or_path is not None  # the schema's check
    found = _place("model.name_or_path", model.name_or_path, model.revision, CONFIG_FILE)
    if cfg.data.type == "pictures":
        return {"data": {"pictures": PICTURES}, "model": found}
    loaded = text.load(cfg.data)
    identity: dict[str, Any] = {"data": {"sha256": loaded.sha256}, "model": found}
    if model.tokenizer == "trained":
        train, _ = text.split(loaded, cfg.data.heldout_fraction)
        identity["tokenizer"] = tokenizer.key(train, cfg.data.vocab_size)
    elif model.tokenizer is not None:
        name = model.tokenizer
        identity["tokenizer"] = _place("model.tokenizer", name, None, "tokenizer_config.json")
    return identity


def _checkpoint_key(cfg: Config, text_sha256: str, tokenizer_key: str) -> str:
    """The checkpoint's name in the cache: a hash of everything that its training depends on.

    This includes the versions of torch and transformers, since both change the last bits. The
    number of threads does so too, and is left to the checkpoint's own record.
    """
    fields = dataclasses.asdict(cfg.model)
    if cfg.model.outputs is None:  # most checkpoints are older than this key
        del fields["outputs"]
    return cache.key_of(
        {
            "recipe": RECIPE,
            "model": {key: fields[key] for key in fields if key not in _NOT_IN_CHECKPOINT},
            "optimizer": {key: getattr(OptimizerConfig(), key) for key in _RECIPE_OPTIMIZER},
            "text": text_sha256,
            "heldout_fraction": cfg.data.heldout_fraction,
            "tokenizer": tokenizer_key,
            "versions": {name: provenance.version(name) for name in ("torch", "transformers")},
        }
    )


def _check_lengths(cfg: Config) -> None:
    """Refuse sequences that a model with learned positions cannot take.

    Raises:
        ConfigError: ``data.seq_len`` or ``train.seq_len`` is over the model's positions.
    """
    if cfg.model.type not in ("gpt2", "bert"):
        return
    limit = cfg.model.positions or cfg.model.recipe.seq_len
    for key, value in (("data.seq_len", cfg.data.seq_len), ("train.seq_len", cfg.train.seq_len)):
        if value is not None and value > limit:
            raise ConfigError.value(
                key, value, f"at most {limit} (model.positions) with model.type={cfg.model.type}"
            )


def _place(key: str, name: str, revision: str | None, needed: str) -> dict[str, Any]:
    """The files of a directory by content, or the commit of a name on the hub.

    The commit comes from the hub or, offline, from its local cache.

    Args:
        key: Where the name was given.
        name: A local directory, or a name on the hub.
        revision: Branch, tag or commit on the hub.
        needed: A file that has to be there.

    Raises:
        ConfigError: It is not.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / needed).is_file():
            adapter = path / ADAPTER_FILE
            if needed == CONFIG_FILE and adapter.is_file():
                base = json.loads(adapter.read_text(encoding="utf-8")).get(
                    "base_model_name_or_path"
                )
                allowed = f"the model ({base}) that this adapter is for, with model.adapter={name}"
            else:
                allowed = f"a directory with a {needed}, as save_pretrained writes it"
            raise ConfigError.value(key, name, allowed)
        files = sorted({file for pattern in WEIGHTS for file in path.glob(pattern)})
        return {"files": cache.sha256_of(*files)}
    if path.exists() or name.startswith((".", "/", "~")):
        raise _not_there(key, name, revision, "there is no such directory")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        file = hf_hub_download(name, needed, revision=revision)
    except (OSError, HFValidationError, HfHubHTTPError) as error:
        raise _not_there(key, name, revision, f"{type(error).__name__}: {error}") from error
    return {"hub": name, "commit": Path(file).parent.name}


def _not_there(key: str, name: str, revision: str | None, why: str) -> ConfigError:
    given = "" if revision is None else f" (model.revision={revision})"
    return ConfigError(
        f"{key}={name}{given} is not allowed: {key} must be a local directory or a name on the hub "
        f"that can be reached: {why}"
    )
