"""The text that everything is computed on: where it comes from, and what is held out of it."""

from __future__ import annotations

import dataclasses
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
"""The text is split into train and held-out pieces of about this size, at line ends."""


@dataclass(frozen=True)
class Text:
    """Documents in a fixed order.

    Attributes:
        documents: Name and content of each; none is empty.
        sha256: Hash of all names and contents.
    """

    documents: tuple[tuple[str, str], ...]
    sha256: str

    @property
    def characters(self) -> int:
        """Total length of the documents."""
        return sum(len(content) for _, content in self.documents)


@dataclass(frozen=True)
class Passage:
    """An unbroken stretch of one document, all of it on one side of the split.

    Attributes:
        document: The document's index.
        content: The text of the stretch.
    """

    document: int
    content: str


def load(data: DataConfig) -> Text:
    """Read the text that a configuration names; a second call with the same one reads nothing.

    Raises:
        ConfigError: The path does not exist, holds no text or cannot be read.
    """
    return _load(*dataclasses.astuple(data))


@functools.lru_cache(maxsize=4)
def _load(*fields: Any) -> Text:
    data = DataConfig(*fields)
    if data.type == "pydoc":
        from pydoc_data import topics

        documents = sorted(topics.topics.items())
    elif data.path is None:
        raise ConfigError.value("data.path", None, f"given with data.type={data.type}")
    elif data.type == "text_file":
        documents = _files(Path(data.path).expanduser(), data.pattern)
    else:
        documents = _data_set(data, data.path)
    documents = [(name, content) for name, content in documents if content.strip()]
    if not documents:
        raise ConfigError.value("data.path", data.path, "a place where there is some text")
    digest = hashlib.sha256()
    for part in itertools.chain.from_iterable(documents):
        encoded = part.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return Text(tuple(documents), digest.hexdigest())


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


def _data_set(data: DataConfig, path: str) -> list[tuple[str, str]]:
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
            rows = rows[data.split] if isinstance(rows, dict) else rows
        else:
            rows = datasets.load_dataset(
                path, data.subset, split=data.split, revision=data.revision
            )
    except Exception as error:  # the library raises errors of many types
        raise ConfigError(
            f"data.path={path} (data.subset={data.subset}, data.split={data.split}) cannot be "
            f"loaded: {type(error).__name__}: {error}"
        ) from error
    if data.column not in rows.column_names:
        allowed = "one of " + ", ".join(rows.column_names)
        raise ConfigError.value("data.column", data.column, allowed)
    return [(str(number), str(content)) for number, content in enumerate(rows[data.column])]


def split(text: Text, heldout_fraction: float) -> tuple[list[Passage], list[Passage]]:
    """Split a text into train and held-out passages, the same for every seed.

    Every document is cut into pieces at line ends. The held-out pieces are spread evenly through
    the text, so that both sides have passages of every document that is long enough.

    Returns:
        Train and held-out passages; neighbouring pieces of the same side form one passage.
    """
    size = min(PIECE_CHARACTERS, max(64, int(text.characters * heldout_fraction / 4)))
    sides: tuple[list[Passage], list[Passage]] = ([], [])
    number = itertools.count()
    for index, (_, content) in enumerate(text.documents):
        labelled = []
        for piece in _pieces(content, size):
            at = next(number)
            held = math.floor((at + 1) * heldout_fraction) > math.floor(at * heldout_fraction)
            labelled.append((held, piece))
        for held, run in itertools.groupby(labelled, key=lambda pair: pair[0]):
            sides[held].append(Passage(index, "".join(piece for _, piece in run)))
    return sides


def _pieces(content: str, size: int) -> Iterator[str]:
    """Cut at the first line end after ``size`` characters, at the latest after twice as many."""
    start = 0
    while start < len(content):
        end = content.find("\n", start + size, start + 2 * size)
        end = min(start + 2 * size, len(content)) if end < 0 else end + 1
        if len(content) - start <= size:
            end = len(content)
        yield content[start:end]
        start = end
