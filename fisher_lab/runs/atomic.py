"""Files and directories that are either there in full or not there at all.

Everything is written under a temporary name beside its target, flushed to the disk, and renamed. A
process killed at any moment leaves the target as it was, plus at most one temporary name, which
begins with a dot and ends in ``.tmp`` (see `remove_leftovers`).
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the target's directory; on success it becomes the target.

    Args:
        path: The file to be written or replaced. Missing parent directories are made.

    Yields:
        A path that does not exist yet; the caller writes the file there.

    Raises:
        FileNotFoundError: The caller left without writing the temporary file.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(target)
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush_directory(target.parent)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data`` to ``path`` atomically."""
    with writing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` to ``path`` atomically, as UTF-8 with the newlines it has."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Write ``obj`` to ``path`` atomically as indented JSON, keys in the order given.

    Raises:
        TypeError: Something in ``obj`` is not JSON-able.
        ValueError: A number is not finite (JSON has no way to say so).
    """
    write_text(path, json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The object in a JSON file; an empty one where there is no file or it cannot be read."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@contextlib.contextmanager
def directory(path: str | os.PathLike[str], *, keep_existing: bool = False) -> Iterator[Path]:
    """Yield a temporary directory beside the target; on success it is renamed to the target.

    Args:
        path: The directory to be made. Missing parent directories are made.
        keep_existing: What to do where the target exists at the end: drop the new one quietly
            (right for caches named by their content), or raise.

    Yields:
        An empty directory for the caller to fill.

    Raises:
        FileExistsError: The target exists and ``keep_existing`` is false.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(target)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _flush(file)
        _flush_directory(temporary)
        try:
            if target.exists():  # a rename would replace an empty directory
                raise FileExistsError(f"{target} exists already")
            os.rename(temporary, target)
        except OSError:
            if not (keep_existing and target.exists()):
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _flush_directory(target.parent)


def remove_leftovers(folder: str | os.PathLike[str], name: str | None = None) -> None:
    """Remove what killed writers left behind; nobody else may write there meanwhile.

    Args:
        folder: The directory in which they wrote.
        name: Of the one target whose temporary names are removed; None for every target in the
            directory and in those below it. Targets themselves are not touched.
    """
    pattern = "**/.*.tmp" if name is None else f".{glob.escape(name)}.*.tmp"
    for entry in list(Path(folder).glob(pattern)):
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def _temporary_name(target: Path) -> Path:
    return target.parent / f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_directory(path: Path) -> None:
    # Some network file systems refuse fsync on a directory; the rename is still atomic there.
    with contextlib.suppress(OSError):
        _flush(path)
