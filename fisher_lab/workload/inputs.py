"""From a configuration to all that a model's training needs, but for its weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from torch import nn

from fisher_lab.config.errors import ConfigError
from fisher_lab.config.schema import Config
from fisher_lab.workload import cache, content_identity, corpus, models, objectives, text, tokenizer
from fisher_lab.workload.corpus import Corpus
from fisher_lab.workload.objectives import Causal, Masked, MaskTokens, Objective, Spans

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Item = TypeVar("Item")


class ProgressLike(Protocol):
    """What shows progress (`fisher_lab.tasks.progress.Progress`)."""

    def track(
        self, iterable: Iterable[Item], label: str, total: int | None = None
    ) -> Iterator[Item]:
        """Hand on the items and show how far it is."""
        ...


@dataclass(frozen=True)
class Inputs:
    """All but the model's weights; what a training needs.

    Attributes:
        cfg: The configuration.
        tokenizer: The model's.
        objective: Makes the batches.
        record: What is known so far for `Workload.record`.
        pretrained: The loaded model, where ``model.type`` is ``pretrained``.
        checkpoint_key: The checkpoint's name in the cache, for every other type.
    """

    cfg: Config
    tokenizer: PreTrainedTokenizerBase
    objective: Objective
    record: dict[str, Any]
    pretrained: nn.Module | None
    checkpoint_key: str | None

    def untrained(self, seed: int) -> nn.Module:
        """A new model with weights drawn from ``seed``."""
        return models.build(
            self.cfg.model, self.tokenizer, classes=self.objective.classes, seed=seed
        )


def prepare(cfg: Config) -> Inputs:
    """Read the text, load or train the tokenizer, and tokenize.

    Raises:
        ConfigError: Text or pretrained model cannot be had as configured.
    """
    content_identity.check_lengths(cfg)
    loaded = text.load(cfg.data)
    sides = text.split(loaded, cfg.data.heldout_fraction)
    pretrained: nn.Module | None = None
    checkpoint_key: str | None = None
    if cfg.model.type == "pretrained":
        kind = models.pretrained_task(cfg.model)
        pretrained, made = models.load_pretrained(cfg.model, kind)
        _check_positions(cfg, pretrained)
        about: dict[str, Any] = {"source": cfg.model.name_or_path}
    else:
        kind = models.OBJECTIVE_OF[cfg.model.type]
        tokenizer_key = tokenizer.key(sides[0], cfg.data.vocab_size)
        root = cache.directory(cfg.cache_dir)
        made = tokenizer.load(tokenizer.cached(sides[0], cfg.data.vocab_size, root))
        checkpoint_key = content_identity.checkpoint_key(
            cfg.model, loaded.sha256, cfg.data.heldout_fraction, tokenizer_key
        )
        about = {"key": tokenizer_key}
    tokens = corpus.encode(sides, made)
    classes = _asked(cfg, len(made)) if pretrained is None else _outputs(pretrained, len(made))
    objective = make_objective(kind, tokens, made, classes=classes, window=cfg.model.recipe.seq_len)
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
    return Inputs(cfg, made, objective, record, pretrained, checkpoint_key)


def make_objective(
    kind: str,
    tokens: Corpus,
    made: PreTrainedTokenizerBase,
    *,
    classes: int,
    window: int,
) -> Objective:
    """The objective of a kind (``causal``, ``masked``, ``spans``, ``topics``) with a tokenizer.

    Args:
        kind: One of the four.
        tokens: The text.
        made: The tokenizer.
        classes: Outputs of the model's head (the vocabulary for ``topics``).
        window: A document of fewer held-out tokens is no topic.

    Raises:
        ConfigError: The tokenizer lacks the special tokens that the objective needs.
    """
    match kind:
        case "causal":
            return Causal(tokens, classes)
        case "masked":
            special = MaskTokens(
                _needed(made.mask_token_id, "a mask token"),
                _single(made.cls_token_id),
                _single(made.sep_token_id),
            )
            return Masked(tokens, classes, special)
        case "spans":
            end = _needed(made.eos_token_id, "an end token")
            return Spans(tokens, classes, tokenizer.sentinels(made), end)
        case "topics":
            return objectives.Topics(tokens, classes, objectives.find(tokens, window))
    raise ConfigError.value("model.task", kind, "one of causal, masked, spans")


def _single(token: Any) -> int | None:
    return token if isinstance(token, int) else None


def _needed(token: Any, what: str) -> int:
    if not isinstance(token, int):
        raise ConfigError(f"model.name_or_path: its tokenizer has no {what}, and the task needs it")
    return token


def _asked(cfg: Config, tokens: int) -> int:
    """Width of the head of a model that is built here.

    Raises:
        ConfigError: Fewer outputs than the tokenizer has tokens.
    """
    outputs = cfg.model.outputs
    if outputs is not None and outputs < tokens:
        allowed = f"at least {tokens}, the tokens of data.vocab_size={cfg.data.vocab_size}, or null"
        raise ConfigError.value("model.outputs", outputs, allowed)
    return outputs or tokens


def _outputs(model: nn.Module, tokens: int) -> int:
    """Width of the head: some models pad it beyond the tokenizer's vocabulary."""
    config: Any = model.config
    return max(tokens, int(getattr(config.get_text_config(), "vocab_size", tokens)))


def _check_positions(cfg: Config, model: nn.Module) -> None:
    config: Any = model.config
    limit = getattr(config, "max_position_embeddings", None)
    if isinstance(limit, int) and cfg.data.seq_len > limit:
        raise ConfigError.value(
            "data.seq_len", cfg.data.seq_len, f"at most {limit}, the model's positions"
        )
