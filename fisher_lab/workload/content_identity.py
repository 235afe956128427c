"""What data and model *are*, by content, before anything is built or trained. No torch here."""

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
"""Raised when the same configuration would give another checkpoint than before."""

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
"""Keys of the optimiser that the recipe's AdamW reads: new ones for others change no checkpoint."""

WEIGHTS = ("*.safetensors", "*.bin", "*.json", "*.model", "*.txt", "*.py")
"""Files of a local pretrained model that can change a result."""


def content_identity(cfg: Config) -> dict[str, Any]:
    """Hashes of the text, the tokenizer and the model, for a run's identity.

    Raises:
        ConfigError: The text or the model does not exist, or sequences are longer than the model.
    """
    loaded = text.load(cfg.data)
    train, _ = text.split(loaded, cfg.data.heldout_fraction)
    identity: dict[str, Any] = {"data": {"sha256": loaded.sha256}}
    if cfg.model.type == "pretrained":
        return {**identity, "model": _pretrained(cfg.model)}
    check_lengths(cfg)
    tokenizer_key = tokenizer.key(train, cfg.data.vocab_size)
    return {
        **identity,
        "tokenizer": tokenizer_key,
        "model": {
            "init": cfg.model.init,
            "checkpoint": checkpoint_key(
                cfg.model, loaded.sha256, cfg.data.heldout_fraction, tokenizer_key
            ),
        },
    }


def checkpoint_key(
    model: ModelConfig, text_sha256: str, heldout_fraction: float, tokenizer_key: str
) -> str:
    """The checkpoint's name in the cache: a hash of all that its training depends on.

    The versions of torch and transformers are among it, since both change the last bits; the
    number of threads does so too, and is left to the checkpoint's own record.
    """
    fields = dataclasses.asdict(model)
    if model.outputs is None:  # the key is younger than many a checkpoint
        del fields["outputs"]
    return cache.key_of(
        {
            "recipe": RECIPE,
            "model": {key: fields[key] for key in fields if key not in _NOT_IN_CHECKPOINT},
            "optimizer": {key: getattr(OptimizerConfig(), key) for key in _RECIPE_OPTIMIZER},
            "text": text_sha256,
            "heldout_fraction": heldout_fraction,
            "tokenizer": tokenizer_key,
            "versions": {name: version(name) for name in ("torch", "transformers")},
        }
    )


def check_lengths(cfg: Config) -> None:
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
    assert model.name_or_path is not None  # the schema's check
    path = Path(model.name_or_path).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError.value(
                "model.name_or_path",
                model.name_or_path,
                "a directory with a config.json, as save_pretrained writes it",
            )
        files = sorted({file for pattern in WEIGHTS for file in path.glob(pattern)})
        return {"files": cache.sha256_of(*files)}
    if path.exists() or model.name_or_path.startswith((".", "/", "~")):
        raise _no_model(model, "there is no such directory")
    return {"hub": model.name_or_path, "commit": _commit(model)}


def _commit(model: ModelConfig) -> str:
    """The commit that a name on the hub stands for; asks the hub, or its local cache offline."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    assert model.name_or_path is not None
    try:
        file = hf_hub_download(model.name_or_path, "config.json", revision=model.revision)
    except (OSError, HFValidationError, HfHubHTTPError) as error:
        raise _no_model(model, f"{type(error).__name__}: {error}") from error
    return Path(file).parent.name


def _no_model(model: ModelConfig, why: str) -> ConfigError:
    revision = "" if model.revision is None else f" (model.revision={model.revision})"
    return ConfigError(
        f"model.name_or_path={model.name_or_path}{revision} is not allowed: model.name_or_path "
        f"must be a local directory or a name on the hub that can be reached: {why}"
    )
