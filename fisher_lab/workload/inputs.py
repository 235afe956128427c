"""From a configuration to everything that the training of a model needs besides its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from fisher_lab.config.errors import ConfigError
from fisher_lab.config.schema import Config
from fisher_lab.workload import (
    cache,
    corpus,
    models,
    pretrained,
    pretrained_files,
    text,
    tokenizer,
)
from fisher_lab.workload.content_identity import content_identity
from fisher_lab.workload.corpus import Corpus
from fisher_lab.workload.objectives import Causal, Masked, Objective, Spans, Topics, find
from fisher_lab.workload.pictures import Pictures
from fisher_lab.workload.pretrained import Loaded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Inputs:
    """Everything that a training needs besides the model's weights.

    Attributes:
        cfg: The configuration.
        content: The hashes of text, tokenizer and model (`content_identity`).
        tokenizer: The model's tokenizer; None where there is no text.
        objective: Makes the batches.
        record: What `Workload.record` says about text, tokenizer and objective.
        pretrained: The model as loaded if ``model.type`` is ``pretrained``, else None.
    """

    cfg: Config
    content: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase | None
    objective: Objective
    record: dict[str, Any]
    pretrained: Loaded | None

    @property
    def checkpoint_key(self) -> str | None:
        """The checkpoint's name in the cache; a pretrained model has none."""
        return self.content["model"].get("checkpoint")

    def untrained(self, seed: int) -> nn.Module:
        """A new model with weights drawn from ``seed``."""
        assert self.tokenizer is not None  # only a pretrained model goes without
        return models.build(
            self.cfg.model, self.tokenizer, classes=self.objective.classes, seed=seed
        )


def prepare(cfg: Config) -> Inputs:
    """Read the text, load or train the tokenizer, and tokenize; load a pretrained model.

    Raises:
        ConfigError: The text or the pretrained model is not available as configured.
    """
    content = content_identity(cfg)
    kind = models.OBJECTIVE_OF.get(cfg.model.type)
    if kind is None:
        pretrained_files.check(cfg)
        kind = pretrained.task(cfg.model)
    if kind == "pictures":
        return _of_pictures(cfg, content)
    loaded = text.load(cfg.data)
    sides = text.split(loaded, cfg.data.heldout_fraction)
    made, about = _tokenizer(cfg, sides[0])
    model = None if cfg.model.type != "pretrained" else pretrained.load(cfg.model, kind)
    if model is None:
        classes = cfg.model.outputs or len(made)
        if classes < len(made):
            allowed = f"at least {len(made)}, the tokens of data.vocab_size={cfg.data.vocab_size}"
            raise ConfigError.value("model.outputs", classes, f"{allowed}, or null")
    else:
        classes = _checked_outputs(cfg, model.model, len(made))
    tokens = corpus.encode(sides, made)
    largest = max(int(tokens.side(side).ids.max(initial=0)) for side in ("train", "heldout"))
    if largest >= classes:
        key = "name_or_path" if cfg.model.tokenizer is None else "tokenizer"
        allowed = f"one whose tokens the model knows: it has {classes}, and the text has {largest}"
        raise ConfigError.value(f"model.{key}", getattr(cfg.model, key), allowed)
    objective = _objective(kind, tokens, made, classes, cfg.model.recipe.seq_len)
    record = {
        "data": {
            "type": cfg.data.type,
            "sha256": loaded.sha256,
            "documents": len(loaded.documents),
            "characters": loaded.characters,
            "train_tokens": len(tokens.train),
            "heldout_tokens": len(tokens.heldout),
        },
        "tokenizer": {**about, "sha256": tokenizer.sha256(made), "vocab_size": len(made)},
        "task": objective.name,
    }
    return Inputs(cfg, content, made, objective, record, model)


def _of_pictures(cfg: Config, content: dict[str, Any]) -> Inputs:
    model = pretrained.load(cfg.model, Pictures.name)
    objective = Pictures.of(model.model.config)
    data = {"type": cfg.data.type, "classes": objective.classes, "shape": list(objective.shape)}
    record = {"data": data, "task": objective.name}
    return Inputs(cfg, content, None, objective, record, model)


def _tokenizer(
    cfg: Config, train: Sequence[text.Passage]
) -> tuple[PreTrainedTokenizerBase, dict[str, Any]]:
    """The tokenizer, and what the record says of it; ``train`` is what it may be trained on."""
    if cfg.model.type == "pretrained" and cfg.model.tokenizer != "trained":
        source = cfg.model.tokenizer or cfg.model.name_or_path
        return pretrained.load_tokenizer(cfg.model), {"source": source}
    root = cache.directory(cfg.cache_dir)
    made = tokenizer.load(tokenizer.cached(train, cfg.data.vocab_size, root))
    return made, {"key": tokenizer.key(train, cfg.data.vocab_size)}


def _objective(
    kind: str, tokens: Corpus, made: PreTrainedTokenizerBase, classes: int, window: int
) -> Objective:
    """The objective of a kind; a document with fewer held-out tokens than ``window`` is no topic.

    Raises:
        ConfigError: The tokenizer lacks the special tokens that the objective needs.
    """
    match kind:
        case "causal":
            return Causal(tokens, classes)
        case "masked":
            mask = _needed(made.mask_token_id, "a mask token")
            frame = (made.cls_token_id, made.sep_token_id)
            first, last = (token if isinstance(token, int) else None for token in frame)
            return Masked(tokens, classes, mask, first, last)
        case "spans":
            end = _needed(made.eos_token_id, "an end token")
            return Spans(tokens, classes, tokenizer.sentinels(made), end)
        case "topics":
            return Topics(tokens, classes, find(tokens, window))
    raise ConfigError.value("model.task", kind, "one of causal, masked, spans")


def _needed(token: Any, what: str) -> int:
    if not isinstance(token, int):
        raise ConfigError(f"model.name_or_path: its tokenizer has no {what}, and the task needs it")
    return token


def _checked_outputs(cfg: Config, model: nn.Module, tokens: int) -> int:
    """Width of a pretrained model's head; some models pad it beyond the tokenizer's vocabulary.

    Raises:
        ConfigError: The configured sequences are longer than the model's positions, or the
            tokenizer that is trained here has more tokens than the model.
    """
    config: Any = model.config
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(limit, int) and cfg.data.seq_len > limit:
        raise ConfigError.value(
            "data.seq_len", cfg.data.seq_len, f"at most {limit}, the model's positions"
        )
    outputs = int(getattr(config.get_text_config(), "vocab_size", tokens))
    if cfg.model.tokenizer == "trained" and tokens > outputs:
        allowed = f"at most {outputs}, the tokens that the model knows"
        raise ConfigError.value("data.vocab_size", cfg.data.vocab_size, allowed)
    return outputs
