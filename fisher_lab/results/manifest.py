"""The index of an appendix or of a finished sweep: what was written, of which runs, by what.

``appendix.json`` and ``.finished.json`` hold the digest of every file beside them, of the record of
every run that they show, and of the files of its sweep; also the settings with which they can be
written again. They name no directory of this machine: paths are relative, and the directories that
were shortened in texts are told by their hashes (:func:`recognised`).
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd

from fisher_lab.results.loading import controls_of
from fisher_lab.runs import atomic, digests, provenance
from fisher_lab.runs.record import RUN_FILE

APPENDIX_FILE, FINISHED_FILE = "appendix.json", ".finished.json"
SCHEMA = "fisher_lab.index/1"
JOURNALS = ".jsonl"
"""How the files end to which lines are only ever added."""

Roots = dict[str, tuple[str, bool]]
"""Directory -> what a text shows instead, and whether commands are typed from it."""

_DRAWN_BY = ("matplotlib", "numpy", "pandas", "scipy", "statsmodels")
LEDGER = ".sweep/looks.jsonl"
"""Of the looks at the claims (`looks.py`)."""
_OUTPUTS = re.compile(r"table\.\w+|claims\.json|\..*|.*\.log")
"""Files beside the runs of a sweep that are made of the runs, or are nobody's result."""


def of(
    frame: pd.DataFrame,
    folder: Path,
    files: Iterable[Path],
    roots: Roots | None = None,
) -> dict[str, Any]:
    """The index of a folder that was written from the runs of a frame.

    Args:
        frame: from :func:`fisher_lab.results.load`.
        folder: that was written to.
        files: that were written.
        roots: the directories that texts of the folder show in short.
    """
    names = {file.relative_to(folder).as_posix(): digests.of_file(file) for file in files}
    commit = provenance.collect()["git"]["commit"]
    return {
        "schema": SCHEMA,
        "software": {"fisher-lab": commit, **software()},
        "roots": {_hash(root): list(short) for root, short in (roots or {}).items()},
        "paths": [reference(folder, path) for path in frame.attrs["paths"]],
        "sweeps": {
            reference(folder, directory): sweep_files(Path(directory))
            for directory in frame.attrs["sweeps"]
        },
        "runs": {
            run_name(folder, directory, frame.attrs["sweeps"]): {
                "status": str(status),
                RUN_FILE: digest,
            }
            for directory, status in _listed(frame)
            if (digest := _digest(Path(directory, RUN_FILE))) is not None
        },
        "files": dict(sorted(names.items())),
    }


def _listed(frame: pd.DataFrame) -> Iterator[tuple[str, str]]:
    """The directories of runs with their states, and those that could not be read."""
    yield from zip(frame["directory"], frame["status"], strict=True)
    yield from ((one.directory, "left out") for one in frame.attrs["left_out"])
    for one in controls_of(map(Path, frame.attrs["sweeps"])):
        yield str(one.directory), str(atomic.read_json(one.directory / RUN_FILE).get("status"))


def write(folder: Path, name: str, index: Mapping[str, Any]) -> Path:
    """Write an index with a digest of its own.

    Files that an earlier index names, that are as they were then and are no longer written, are
    removed.
    """
    known = atomic.read_json(folder / name).get("files")
    for old, digest in known.items() if isinstance(known, dict) else ():
        file = folder / str(old)
        inside = ".." not in PurePosixPath(old).parts and not os.path.isabs(old)
        is_stale = old not in index["files"] and inside and not file.is_symlink()
        if is_stale and _digest(file) == digest:
            file.unlink()
    atomic.write_json(folder / name, {**index, digests.ENTRY: digests.of_record(index)})
    return folder / name


def software() -> dict[str, str]:
    """What the bytes of a figure depend on beside its numbers."""
    known = provenance.versions(_DRAWN_BY)
    return {**known, "processor": provenance.machine()["processor"] or platform.machine()}


def sweep_files(directory: Path) -> dict[str, Any]:
    """The digests of what lies beside the runs of a sweep; of a journal that of its beginning."""
    if not directory.is_dir():
        return {}
    found = {}
    for path in [*sorted(directory.iterdir()), directory / LEDGER]:
        if path.is_symlink() or not path.is_file() or _OUTPUTS.fullmatch(path.name):
            continue
        is_journal = path.suffix == JOURNALS
        size = path.stat().st_size if is_journal else None
        name = path.relative_to(directory).as_posix()
        found[name] = [size, beginning(path, size)] if is_journal else digests.of_file(path)
    return found


def beginning(path: Path, size: int | None) -> str:
    """The SHA-256 of the first bytes of a file."""
    with path.open("rb") as file:
        return hashlib.sha256(file.read(size)).hexdigest()


def _digest(path: Path) -> str | None:
    return digests.of_file(path) if path.is_file() else None


# ---- paths ---------------------------------------------------------------------------------------


def reference(folder: Path, path: str | os.PathLike[str]) -> str:
    """A path as an index in a folder names it: relative, or below ``~`` where the folder is not."""
    target, home = os.path.abspath(path), str(Path.home())
    inside = f"{home.rstrip('/')}/"
    if target.startswith(inside) and not f"{os.path.abspath(folder)}/".startswith(inside):
        return f"~/{target[len(inside) :]}"
    return Path(os.path.relpath(target, os.path.abspath(folder))).as_posix()


def run_name(folder: Path, run: str | os.PathLike[str], sweeps: Iterable[str]) -> str:
    """How an index in a folder names a run: by its sweep, where it is one of some directories."""
    real = os.path.realpath(run)
    inside = [s for s in sweeps if real.startswith(f"{os.path.realpath(s)}/")]
    if not inside:
        return reference(folder, run)
    sweep = max(inside, key=len)
    return f"{reference(folder, sweep)}/{os.path.relpath(real, os.path.realpath(sweep))}"


def resolved(folder: Path, path: str) -> Path:
    """The path that :func:`reference` has named."""
    return Path(os.path.normpath(Path(os.path.abspath(folder), os.path.expanduser(path))))


def sweeps_of(folder: Path) -> list[Path]:
    """The directories of the sweeps that the index of an appendix names."""
    noted = atomic.read_json(folder / APPENDIX_FILE).get("sweeps")
    return [resolved(folder, name) for name in (noted if isinstance(noted, dict) else {})]


def _hash(root: str) -> str:
    return hashlib.sha256(root.encode()).hexdigest()[:32]


_PATH = re.compile(r"/[^\s'\"`,;:()<>\[\]{}|=]+")


def recognised(frame: pd.DataFrame, index: Mapping[str, Any]) -> Roots:
    """The directories that an index knows by their hashes, among those that the runs name."""
    noted = index.get("roots", {})
    texts = [str(one.reason) for one in frame.attrs["left_out"]]
    for name in frame.columns:
        texts += [v for v in set(filter(_is_text, frame[name])) if "/" in v]
    found: Roots = {}
    for path in {match for text in texts for match in _PATH.findall(text)}:
        for parent in map(str, [PurePosixPath(path), *PurePosixPath(path).parents]):
            if parent not in found and (known := noted.get(_hash(parent))):
                found[parent] = (str(known[0]), bool(known[1]))
    return found


def _is_text(value: object) -> bool:
    return isinstance(value, str)
