"""The text that everything is done on: where it comes from, and what is held out of it."""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fisher_lab.config.errors import ConfigError
from fisher_lab.config.workload import DataConfig

PIECE_CHARACTERS = 2048
"""The text is split into train and held-out in pieces of about this size, at line ends."""


@dataclass(frozen=True)
class Text:
    """Documents in a fixed order.

    Attributes:
        documents: Name and content of each, none empty.
        sha256: Hash of all names and contents.
    """

    documents: tuple[tuple[str, str], ...]
    sha256: str

    @property
    def characters(self) -> int:
        """Length of all documents together."""
        return sum(len(content) for _, content in self.documents)


@dataclass(frozen=True)
class Passage:
    """An unbroken stretch of one document, all of it on one side of the split.

    Attributes:
        document: The document's index.
        content: The stretch itself.
    """

    document: int
    content: str


def load(data: DataConfig) -> Text:
    """Read the text that a configuration names; a second call with the same one is free.

    Raises:
        ConfigError: The path does not exist, holds no text or cannot be read.
    """
    return _load(
        data.type, data.path, data.pattern, data.subset, data.split, data.column, data.revision
    )


@functools.lru_cache(maxsize=4)
def _load(
    kind: str,
    path: str | None,
    pattern: str,
    subset: str | None,
    split: str,
    column: str,
    revision: str | None,
) -> Text:
    if kind == "pydoc":
        documents = _pydoc()
    elif path is None:
        raise ConfigError.value("data.path", path, f"given with data.type={kind}")
    elif kind == "text_file":
        documents = _files(Path(path).expanduser(), pattern)
    else:
        documents = _data_set(path, subset, split, column, revision)
    documents = [(name, content) for name, content in documents if content.strip()]
    if not documents:
        raise ConfigError.value("data.path", path, "a place where there is some text")
    return Text(tuple(documents), _hash(documents))


def _hash(documents: list[tuple[str, str]]) -> str:
    digest = hashlib.sha256()
    for part in itertools.chain.from_iterable(documents):
        encoded = part.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return digest.hexdigest()


def _pydoc() -> list[tuple[str, str]]:
    from pydoc_data import topics

    return sorted(topics.topics.items())


def _files(path: Path, pattern: str) -> list[tuple[str, str]]:
    if path.is_dir():
        files = sorted(file for file in path.rglob(pattern) if file.is_file())
        if not files:
            raise ConfigError.value(
                "data.path", str(path), f"a directory with files that match data.pattern={pattern}"
            )
    elif path.is_file():
        files, path = [path], path.parent
    else:
        raise ConfigError.value("data.path", str(path), "a file or directory that exists")
    return [(str(file.relative_to(path)), _read(file)) for file in files]


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"data.path: {file} is not UTF-8 text (byte {error.start}: {error.reason})"
        ) from error
    except OSError as error:
        raise ConfigError(f"data.path: {file} cannot be read: {error.strerror}") from error


def _data_set(
    path: str, subset: str | None, split: str, column: str, revision: str | None
) -> list[tuple[str, str]]:
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            "data.type=hf needs the package `datasets`, which is not installed: "
            "pip install 'fisher-lab[hf]'"
        ) from error
    directory = Path(path).expanduser()
    if not directory.exists() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise ConfigError.value("data.path", path, "a directory that exists or a name on the hub")
    try:
        if directory.is_dir():
            rows: Any = datasets.load_from_disk(str(directory))
            rows = rows[split] if isinstance(rows, dict) else rows
        else:
            rows = datasets.load_dataset(path, subset, split=split, revision=revision)
    except Exception as error:  # the library's errors are of many kinds; all mean this
        raise ConfigError(
            f"data.path={path} (data.subset={subset}, data.split={split}) cannot be loaded: "
            f"{type(error).__name__}: {error}"
        ) from error
    if column not in rows.column_names:
        raise ConfigError.value("data.column", column, "one of " + ", ".join(rows.column_names))
    return [(str(number), str(content)) for number, content in enumerate(rows[column])]


def split(text: Text, heldout_fraction: float) -> tuple[list[Passage], list[Passage]]:
    """Split a text into train and held-out passages, the same for every seed.

    Every document is cut into pieces at line ends; the held-out ones are spread evenly through the
    text, so that both sides have passages of every document that is long enough.

    Returns:
        Train and held-out passages; neighbouring pieces of the same side are one passage.
    """
    size = min(PIECE_CHARACTERS, max(64, int(text.characters * heldout_fraction / 4)))
    sides: tuple[list[Passage], list[Passage]] = ([], [])
    number = 0
    for index, (_, content) in enumerate(text.documents):
        labelled = []
        for piece in _pieces(content, size):
            held = math.floor((number + 1) * heldout_fraction) > math.floor(
                number * heldout_fraction
            )
            labelled.append((held, piece))
            number += 1
        for held, run in itertools.groupby(labelled, key=lambda pair: pair[0]):
            sides[held].append(Passage(index, "".join(piece for _, piece in run)))
    return sides


def _pieces(content: str, size: int) -> Iterator[str]:
    """Cut at the first line end after ``size`` characters, or at twice that where there is none."""
    start = 0
    while start < len(content):
        end = content.find("\n", start + size, start + 2 * size)
        end = min(start + 2 * size, len(content)) if end < 0 else end + 1
        if len(content) - start <= size:
            end = len(content)
        yield content[start:end]
        start = end
