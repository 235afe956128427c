"""Data and model identified by content, before anything is built or trained; without torch."""

from __future__ import annotations

import dataclasses
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fisher_lab.config.errors import ConfigError
from fisher_lab.config.schema import Config
from fisher_lab.config.workload import ModelConfig, OptimizerConfig
from fisher_lab.workload import cache, text, tokenizer

RECIPE = 1
"""Raised when the same configuration gives another checkpoint than before."""

_NOT_IN_CHECKPOINT = {
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
    loaded = text.load(cfg.data)
    identity: dict[str, Any] = {"data": {"sha256": loaded.sha256}}
    if cfg.model.type == "pretrained":
        return {**identity, "model": _pretrained(cfg.model)}
    _check_lengths(cfg)
    train, _ = text.split(loaded, cfg.data.heldout_fraction)
    identity["tokenizer"] = tokenizer.key(train, cfg.data.vocab_size)
    key = _checkpoint_key(cfg, loaded.sha256, identity["tokenizer"])
    return {**identity, "model": {"init": cfg.model.init, "checkpoint": key}}


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
            "versions": {name: version(name) for name in ("torch", "transformers")},
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


def _pretrained(model: ModelConfig) -> dict[str, Any]:
    """The files of a directory by content, or the commit of a name on the hub.

    The commit comes from the hub or, offline, from its local cache.
    """
    name = model.name_or_path
    assert name is not None  # the schema's check
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            allowed = "a directory with a config.json, as save_pretrained writes it"
            raise ConfigError.value("model.name_or_path", name, allowed)
        files = sorted({file for pattern in WEIGHTS for file in path.glob(pattern)})
        return {"files": cache.sha256_of(*files)}
    if path.exists() or name.startswith((".", "/", "~")):
        raise _no_model(model, "there is no such directory")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        file = hf_hub_download(name, "config.json", revision=model.revision)
    except (OSError, HFValidationError, HfHubHTTPError) as error:
        raise _no_model(model, f"{type(error).__name__}: {error}") from error
    return {"hub": name, "commit": Path(file).parent.name}


def _no_model(model: ModelConfig, why: str) -> ConfigError:
    revision = "" if model.revision is None else f" (model.revision={model.revision})"
    return ConfigError(
        f"model.name_or_path={model.name_or_path}{revision} is not allowed: model.name_or_path "
        f"must be a local directory or a name on the hub that can be reached: {why}"
    )
