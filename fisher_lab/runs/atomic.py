"""Files and directories that are either there in full or not there at all.

Everything is written under a temporary name beside its target, flushed to the disk, and renamed. A
process killed at any moment leaves the target as it was, plus at most one temporary name, which
begins with a dot and ends in ``.tmp`` (see `remove_leftovers`).
"""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, BinaryIO


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
        for folder, check in _FENCES.get():
            if target.is_relative_to(folder):
                check()
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush_directory(target.parent)


_FENCES: ContextVar[tuple[tuple[Path, Callable[[], None]], ...]] = ContextVar("fences", default=())


@contextlib.contextmanager
def fenced(folder: Path, check: Callable[[], None]) -> Iterator[None]:
    """Ask before every file of a folder that is replaced here, after its new content is written.

    Args:
        folder: and everything below it.
        check: raises where nothing is to be replaced.
    """
    before = _FENCES.set((*_FENCES.get(), (folder, check)))
    try:
        yield
    finally:
        _FENCES.reset(before)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data`` to ``path`` atomically."""
    with writing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` to ``path`` atomically, as UTF-8 with the newlines it has.

    Half of a pair of surrogates, as names of files may hold, is written as its escape.
    """
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Write ``obj`` to ``path`` atomically as indented JSON, keys in the order given.

    Raises:
        TypeError: Something in ``obj`` is not JSON-able.
        ValueError: A number is not finite (JSON has no way to say so).
    """
    write_text(path, json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


DISK_ERRORS = (
    errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOSPC, errno.EROFS, errno.ESTALE
)  # fmt: skip
"""What is wrong with a disk and not with what writes to it: another file would not fare better."""

MOST_BYTES = 256 * 2**20
"""A file of a run that is read whole is no larger than this."""


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file that anybody may have put there, for reading.

    A link, a pipe, a device and a directory are refused: nothing outside its directory is read,
    and nothing is waited for.

    Raises:
        OSError: there is no such file, or it is refused.
    """
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    # What has taken its place since is not followed or waited for.
    file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW), "rb")  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    return file


def read_text(
    path: str | os.PathLike[str], most: int = MOST_BYTES, *, errors: str = "strict"
) -> str:
    """The text of a file of :func:`open_regular`.

    Args:
        path: of the file.
        most: bytes.
        errors: what is done about what is not UTF-8, as for `bytes.decode`.

    Raises:
        OSError: as :func:`open_regular`, or it is larger.
        ValueError: it is not UTF-8.
    """
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"larger than {most / 2**20:g} MiB", os.fspath(path))
    return content.decode("utf-8", errors)


def read_object(path: str | os.PathLike[str], most: int = MOST_BYTES) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        OSError: as :func:`read_text`.
        ValueError: it is not one; the text says why, in one line.
    """
    try:
        found = json.loads(read_text(path, most))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON (line {error.lineno}: {error.msg})") from error
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    return found


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The object in a JSON file; an empty one where there is no file or it cannot be read."""
    try:
        return read_object(path)
    except (OSError, ValueError):
        return {}


def is_name(text: Any) -> bool:
    """Whether a text that was read is the name of something in a directory, and no way out."""
    return isinstance(text, str) and text not in ("", ".", "..") and not set("/\0") & set(text)


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
