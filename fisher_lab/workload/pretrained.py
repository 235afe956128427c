"""Models and tokenizers from the hub or a directory: what they lack is said; adapters."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

from fisher_lab.config.errors import ConfigError
from fisher_lab.config.workload import ModelConfig
from fisher_lab.workload import models
from fisher_lab.workload.pretrained_files import NO_TOKENIZER, task_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_LEAST = 0.1
"""A model of which the checkpoint has less than this share of the parameters is another one's."""

_SHOWN = 3
"""Names of parameters in a message; the record has all of them."""


@dataclass(frozen=True)
class Loaded:
    """A model as loaded, and what its checkpoint lacked.

    Attributes:
        model: In evaluation mode, on the CPU.
        drawn: Names of the parameters that the checkpoint lacks, and that are drawn at random.
        unused: Names of its tensors that the model has no place for.
    """

    model: nn.Module
    drawn: list[str]
    unused: list[str]

    @property
    def about(self) -> dict[str, Any]:
        """For the record; nothing where the checkpoint is the model's own."""
        return {key: names for key in ("drawn", "unused") if (names := getattr(self, key))}


def task(model: ModelConfig) -> str:
    """The objective of a pretrained model, by the library's own reading of its configuration.

    Raises:
        ConfigError: The configuration cannot be loaded or names no known objective.
    """
    if model.task is not None:
        return model.task
    return task_of(model, _from_pretrained("AutoConfig", model).to_dict())


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """Load a pretrained model's tokenizer, or the one that was named in its place.

    Raises:
        ConfigError: It cannot be loaded, or has no token but special ones.
    """
    made = _from_pretrained("AutoTokenizer", model, name=model.tokenizer)
    if len(made) <= len(made.all_special_tokens):  # what the library makes of no files at all
        key = "name_or_path" if model.tokenizer is None else "tokenizer"
        raise ConfigError(f"model.{key}={getattr(model, key)}: {NO_TOKENIZER}")
    return made


def load(model: ModelConfig, objective: str) -> Loaded:
    """Load a pretrained model by the library's Auto classes.

    What the checkpoint lacks is drawn at random, what it has too much is left out, and both are
    said in the log and on standard error.

    Raises:
        ConfigError: The model cannot be loaded, tensors have other shapes than its parameters, or
            the checkpoint is another model's.
    """
    with _quiet():
        loaded, info = _from_pretrained(
            models.auto_class(objective, _from_pretrained("AutoConfig", model)),
            model,
            **models.load_options(model),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    where = f"model.name_or_path={model.name_or_path}"
    wrong = sorted(info["mismatched_keys"])
    if wrong:
        listed = [f"{name} {tuple(saved)} for {tuple(own)}" for name, saved, own in wrong]
        raise ConfigError(f"{where}: its tensors have other shapes than the model: {_some(listed)}")
    # A bias that is tied to another one goes by both names, and is one parameter.
    named = dict(loaded.named_parameters())
    drawn = sorted(name for name in info["missing_keys"] if name in named)
    kind = type(loaded).__name__
    total = sum(p.numel() for p in named.values())
    share = sum(named[name].numel() for name in drawn) / max(total, 1)
    if share > 1 - _LEAST:
        raise ConfigError(
            f"{where}: the checkpoint has {1 - share:.0%} of the parameters of {kind}; it lacks "
            f"{_some(drawn)}, and has {_some(sorted(info['unexpected_keys']))} instead"
        )
    found = Loaded(loaded, drawn, sorted(info["unexpected_keys"]))
    if drawn:
        log.warning(
            "the checkpoint lacks %d parameters of %s (%.1f%% of its numbers), which are drawn at "
            "random: %s; its losses are not the checkpoint's", len(drawn), kind, 100 * share,
            _some(drawn),
        )  # fmt: skip
    if found.unused:
        log.warning("not used of the checkpoint: %s", _some(found.unused))
    return found


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more if names else "nothing"


@contextmanager
def _quiet() -> Iterator[None]:
    """The library's own report of what a checkpoint lacks takes a line for each name."""
    from transformers.utils import logging as library

    before = library.get_verbosity()
    library.set_verbosity_error()
    try:
        yield
    finally:
        library.set_verbosity(before)


def _from_pretrained(
    auto_class: str, model: ModelConfig, *, name: str | None = None, **options: Any
) -> Any:
    key, given = ("tokenizer", name) if name is not None else ("name_or_path", model.name_or_path)
    assert given is not None  # the schema's check
    path = Path(given).expanduser()
    try:
        return getattr(models.transformers(), auto_class).from_pretrained(
            str(path) if path.is_dir() else given,
            revision=(model.revision if name is None else None) or "main",
            trust_remote_code=model.trust_remote_code,
            **options,
        )
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        if model.attn_implementation is not None and "attention" in str(error).lower():
            raise models.bad_attention(model.attn_implementation, error) from error
        raise ConfigError(
            f"model.{key}={given} (model.revision={model.revision}) cannot be loaded: "
            f"{type(error).__name__}: {error}"
        ) from error


# ---- adapters ------------------------------------------------------------------------------------


def with_adapter(model: nn.Module, config: ModelConfig) -> tuple[nn.Module, dict[str, Any]]:
    """Puts a new or a trained adapter on a model, which is frozen by it.

    Returns:
        The model of the package peft and what the record says of it; without an adapter the model
        itself.

    Raises:
        ConfigError: No module has a name that was asked for, or the adapter cannot be loaded.
    """
    if config.adapter is None:
        return model, {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", "fan_in_fan_out")  # it is set as it must be
            made = (
                _new_adapter(model, config)
                if config.adapter == "lora"
                else _saved_adapter(model, config.adapter)
            )
    except (OSError, ValueError, TypeError, RuntimeError, KeyError, SafetensorError) as error:
        raise ConfigError(
            f"model.adapter={config.adapter} does not go with {type(model).__name__}: "
            f"{type(error).__name__}: {error}"
        ) from error
    trained = sum(p.numel() for p in made.parameters() if p.requires_grad)
    kinds: Mapping[str, Any] = made.peft_config
    about = {"adapter": config.adapter, "kind": [str(c.peft_type) for c in kinds.values()]}
    return made, {"adapter": {**about, "trained_parameters": trained}}


def _saved_adapter(model: nn.Module, name: str) -> Any:
    import peft

    path = Path(name).expanduser()
    place = str(path) if path.is_dir() else name
    return peft.PeftModel.from_pretrained(model, place, is_trainable=True)  # type: ignore[arg-type]


def _new_adapter(model: nn.Module, config: ModelConfig) -> Any:
    import peft

    options = peft.LoraConfig(
        r=config.lora.r,
        lora_alpha=config.lora.alpha,  # type: ignore[arg-type]
        target_modules=config.lora.targets or "all-linear",
        use_dora=config.lora.dora,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train_seed)
        return peft.get_peft_model(model, options)  # type: ignore[arg-type]
