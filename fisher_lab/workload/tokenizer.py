"""The byte-level BPE tokenizer that is trained on the text, and its place in the cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fisher_lab.config.errors import ConfigError
from fisher_lab.config.workload import SPECIAL_TOKENS
from fisher_lab.runs import atomic, lock
from fisher_lab.workload import cache
from fisher_lab.workload.text import Passage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PAD, EOS, MASK, CLS, SEP = "<pad>", "<eos>", "<mask>", "<cls>", "<sep>"
SENTINELS = tuple(f"<extra_id_{number}>" for number in range(SPECIAL_TOKENS - 5))
SPECIALS = (PAD, EOS, MASK, CLS, SEP, *SENTINELS)
"""The special tokens of all models, so that one tokenizer serves all of them."""

RECIPE = 1
"""Raised when the same text gives another tokenizer than before."""


def key(passages: Sequence[Passage], vocab_size: int) -> str:
    """The tokenizer's name in the cache: a hash of everything that its training depends on."""
    digest = hashlib.sha256()
    for passage in passages:
        digest.update(passage.content.encode("utf-8", "surrogatepass") + b"\0")
    return cache.key_of(
        {
            "recipe": RECIPE,
            "text": digest.hexdigest(),
            "vocab_size": vocab_size,
            "specials": SPECIALS,
            "tokenizers": version("tokenizers"),
        }
    )


def cached(passages: Sequence[Passage], vocab_size: int, cache_directory: Path) -> Path:
    """Train the tokenizer unless the cache has it.

    Args:
        passages: The training text, without held-out passages.
        vocab_size: Number of tokens, including the special ones.
        cache_directory: Root of the cache.

    Returns:
        A directory that ``AutoTokenizer.from_pretrained`` loads.
    """
    target = cache_directory / "tokenizers" / key(passages, vocab_size)

    def build(path: Path) -> None:
        with atomic.directory(path, keep_existing=True) as temporary:
            train(passages, vocab_size).save_pretrained(str(temporary))

    lock.once(target, build)
    return target


def load(directory: Path) -> PreTrainedTokenizerBase:
    """Load a cached tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(directory))


def sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of the vocabulary with its numbers and special tokens."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda pair: (pair[1], pair[0]))
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


def sentinels(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The numbers of ``<extra_id_0>``, ``<extra_id_1>`` and so on.

    Raises:
        ConfigError: There is none.
    """
    vocabulary, found = tokenizer.get_vocab(), []
    while (name := f"<extra_id_{len(found)}>") in vocabulary:
        found.append(vocabulary[name])
    if not found:
        raise ConfigError(
            "model.name_or_path: its tokenizer has no <extra_id_0>, and span corruption needs it"
        )
    return found


def train(passages: Sequence[Passage], vocab_size: int) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE tokenizer, which encodes and restores any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((passage.content for passage in passages), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=EOS,
        eos_token=EOS,
        mask_token=MASK,
        cls_token=CLS,
        sep_token=SEP,
        additional_special_tokens=list(SENTINELS),
        clean_up_tokenization_spaces=False,
    )
