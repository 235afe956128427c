"""Digests of the files of a run, recorded when it ends, and what of them no longer holds.

The entry ``digests`` of ``run.json`` has the SHA-256 of every file of the run directory, and under
``run.json`` that of the record itself without this entry. They show that somebody has changed a
file and has not thought of the digests; who changes both is found out by the journal of the sweep
and by the index of an appendix, which have the digest of ``run.json`` as a whole. Records of
earlier versions have none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fisher_lab.runs.status import Status

RUN_FILE = "run.json"
ENTRY = "digests"

ATTEMPTS = 2
"""To read a file: that of a network file system may fail once."""
OPEN = ("ranks", "tracker", "tensorboard", "wandb")
"""Directories to which others than the run write, also after its end."""


def of_file(path: Path) -> str:
    """The SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def of_record(record: Mapping[str, Any]) -> str:
    """The SHA-256 of a record without its digests, whatever its layout in the file."""
    kept = {key: value for key, value in record.items() if key != ENTRY}
    text = json.dumps(kept, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def entries(directory: Path) -> Iterator[tuple[str, Path]]:
    """Everything of a directory but directories, each with its relative name, in order.

    Symbolic links are among them and are not followed.
    """
    for folder, folders, files in os.walk(directory):
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        folders[:] = sorted(set(folders) - set(links))
        for name in sorted([*files, *links]):
            path = Path(folder, name)
            yield path.relative_to(directory).as_posix(), path


def _closed(directory: Path) -> Iterator[tuple[str, Path]]:
    """The entries of a run directory that nobody writes to after its end; ``run.json`` is left out.

    Logs go on, and what begins with a dot is Hydra's, or not yet a file.
    """
    for name, path in entries(directory):
        parts = name.split("/")
        hidden = any(part.startswith(".") for part in parts)
        if not (hidden or parts[0] in OPEN or name == RUN_FILE or name.endswith(".log")):
            yield name, path


def sealed(directory: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """A record as it is to be written: with digests, where the run has ended.

    A run that may come back (it was cancelled or preempted) has only that of the record: its files
    will change, and a scheduler that ends it leaves no time to read a large state.
    """
    bare = {key: value for key, value in record.items() if key != ENTRY}
    status = Status(record["status"])
    if not status.has_ended:
        return bare
    found = {RUN_FILE: of_record(bare)}
    if status.is_final:
        for name, path in _closed(Path(directory)):
            # Gone, or not to be read: no reason to lose the run.
            for _ in range(ATTEMPTS):
                with contextlib.suppress(OSError):
                    if path.is_file() and not path.is_symlink():
                        found[name] = of_file(path)
                    break
    return {**bare, ENTRY: found}


def broken(
    directory: Path, record: Mapping[str, Any], left_out: Mapping[str, str] | None = None
) -> Iterator[tuple[str, str]]:
    """What no longer is as it was when a run ended: names of files, and what is wrong with them.

    Args:
        directory: the run directory.
        record: the contents of its ``run.json``, with digests.
        left_out: files that are known to be left out of a copy of the run, with their digests.
    """
    known = record[ENTRY]
    if not isinstance(known, dict):
        yield RUN_FILE, "its digests cannot be read"
        return
    if known.get(RUN_FILE) != of_record(record):
        yield RUN_FILE, "changed after the run had ended"
    if not Status(record["status"]).is_final:
        return
    there = dict(_closed(directory))
    for name in sorted({*there, *known} - {RUN_FILE}):
        if name not in there:
            if (left_out or {}).get(name) != known[name]:
                yield name, "removed after the run had ended"
        elif there[name].is_symlink():
            yield name, "a symbolic link, which is not followed"
        elif name not in known:
            yield name, "added after the run had ended"
        elif of_file(there[name]) != known[name]:
            yield name, "changed after the run had ended"
