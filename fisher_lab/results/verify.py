"""``fisher-lab verify``: whether an appendix, or what lies beside a sweep's runs, is of its runs.

Three things are compared, and nothing is written but into a temporary directory. Every file of a
run with the digest that was recorded when the run ended; the runs that are there, and the files of
their sweeps, with the index of the folder and the journals of the sweeps; and every file of the
folder with what the same code makes of the runs now. What is read is neither evaluated nor
unpickled, and no symbolic link is followed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import pandas as pd
from rich.text import Text

from fisher_lab.results import finishing, manifest, paper, report
from fisher_lab.results.commands import OK, guarded, make_parser
from fisher_lab.results.figure_style import TYPES
from fisher_lab.results.loading import CONTROLS, SWEEP_FILE, controls_of, find, load
from fisher_lab.results.manifest import APPENDIX_FILE, FINISHED_FILE
from fisher_lab.results.values import ResultsError
from fisher_lab.runs import atomic, digests
from fisher_lab.runs.record import RUN_FILE
from fisher_lab.runs.status import Status

DIFFERENT = 1
EVENTS_FILE = "events.jsonl"
CAPSULE_FILE = "capsule.json"
"""Of a capsule: what was left out of the copies of its runs."""

ROUNDING = 1e-9
"""Numbers of a file that nobody has edited may differ by this fraction where other versions or
another processor compute them."""

COMPILED = ("pdf", "aux", "log", "out", "toc", "fls", "fdb_latexmk", "synctex.gz")
"""What LaTeX makes of ``appendix.tex``."""

MOST_LINES, MOST_SHOWN, LONGEST = 12, 40, 60


@dataclass(frozen=True)
class Deviation:
    """One thing that is not as the runs, or the records of them, say.

    Attributes:
        file: that is wrong, as it is reached from where the command was typed.
        what: what is wrong with it, in words.
        line: its line; None where the whole file is meant.
    """

    file: str
    what: str
    line: int | None = None

    def __str__(self) -> str:
        return f"{self.file}{'' if self.line is None else f', line {self.line}'}: {self.what}"


@dataclass
class Verified:
    """What came of checking some folders.

    Attributes:
        deviations: all that is wrong.
        notes: what could not be checked, and why.
        runs: how many runs were looked at.
        files: how many files were compared with what the runs give.
    """

    deviations: list[Deviation] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    runs: int = 0
    files: int = 0

    def differs(self, file: Path, what: str, line: int | None = None) -> None:
        """Note something that is wrong, once."""
        one = Deviation(os.path.relpath(file), what, line)
        if one not in self.deviations:
            self.deviations.append(one)


def verify(path: str | os.PathLike[str], runs: str | os.PathLike[str] | None = None) -> Verified:
    """Check an appendix, a sweep, or a directory of sweeps.

    Args:
        path: the folder that ``fisher-lab report --appendix`` has written, or one with runs.
        runs: where the sweeps lie now, if not where the index of an appendix says.

    Raises:
        ResultsError: there is nothing to be checked, or the runs are not there.
    """
    root, found = Path(path), Verified()
    if not root.is_dir():
        raise ResultsError(f"{root}: there is no such directory")
    if (root / APPENDIX_FILE).exists() or (root / paper.DOCUMENT).exists():
        _check_appendix(root, None if runs is None else Path(runs), found)
        return found
    if runs is not None:
        raise ResultsError(f"--runs goes with an appendix, and {root} is none")
    sweeps = dict.fromkeys(one.sweep for one in find(root)[0])
    if (root / SWEEP_FILE).exists():
        sweeps = {root: None}
    if not sweeps:
        raise ResultsError(f"{root}: there is neither an appendix nor a run in it")
    for sweep in sweeps:
        _check_runs(sweep, found)
        _check_finished(sweep, found)
    return found


# ---- runs ----------------------------------------------------------------------------------------


def _check_runs(sweep: Path, found: Verified) -> None:
    """The files of every run of a sweep against their digests, and the sweep's journal."""
    left_out, controls = _left_out_of(sweep), sweep / CONTROLS
    if controls.is_dir():
        _check_runs(controls, found)
    known, unreadable = find(sweep)
    older = 0
    for one in known:
        found.runs += 1
        file = one.directory / RUN_FILE
        record = {} if file.is_symlink() else atomic.read_json(file)
        if digests.ENTRY in record and record.get("status") in list(Status):
            own = f"{sweep.resolve().name}/{one.directory.name}"
            for name, what in digests.broken(one.directory, record, left_out.get(own)):
                found.differs(one.directory / name, what)
        elif not record:
            found.differs(file, "cannot be read as a record")
        elif record.get("status") != Status.RUNNING:
            older += 1
    for one in unreadable:
        found.differs(Path(one.directory), one.reason)
    if older:
        found.notes.append(
            f"{sweep}: {older} of {len(known)} runs have no digests; versions before recorded none"
        )
    _check_journal(sweep, {one.directory.name: one.directory for one in known}, found)


def _check_journal(sweep: Path, runs: Mapping[str, Path], found: Verified) -> None:
    """The runs of a sweep against how they ended by its journal."""
    file = sweep / EVENTS_FILE
    if file.is_symlink() or not file.is_file():
        return
    last: dict[str, dict[str, Any]] = {}
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            event = json.loads(line)
        except ValueError:  # a writer that was killed leaves a line without an end
            continue
        if isinstance(event, dict) and isinstance(event.get("run_id"), str):
            last[event["run_id"]] = event
    for run_id, event in last.items():
        status, directory = str(event.get("event")), sweep / run_id
        if run_id not in runs:
            when = event.get("time")
            found.differs(
                directory, f"the journal has it as {status} ({when}); there is no such run"
            )
        elif (known := event.get("record")) and digests.of_file(directory / RUN_FILE) != known:
            found.differs(directory / RUN_FILE, f"not as it was when the journal noted: {status}")
    for name in runs.keys() - last.keys() if last else ():
        found.differs(runs[name], "the journal of the sweep does not know of this run")


def _left_out_of(folder: Path) -> dict[str, Any]:
    """What a capsule has left out of its runs: the last two names of a run -> file -> digest."""
    above = next((p for p in folder.absolute().parents if (p / CAPSULE_FILE).is_file()), None)
    left_out = atomic.read_json(above / CAPSULE_FILE).get("left_out") if above else None
    return left_out if isinstance(left_out, dict) else {}


# ---- an index ------------------------------------------------------------------------------------


def _check_index(
    folder: Path,
    index: Mapping[str, Any],
    paths: Sequence[Path],
    where: Mapping[str, Path],
    states: Mapping[str, str],
    found: Verified,
) -> None:
    """The runs that are there, and the files of their sweeps, against an index.

    Args:
        folder: with the index.
        index: what it says.
        paths: where it says that its runs are.
        where: how the index names a sweep -> its directory.
        states: real path of a run -> its state now, where they were read.
        found: gets what is wrong.
    """
    names = {os.path.realpath(sweep): name for name, sweep in where.items()}
    here = {}
    for one in [*find(paths)[0], *controls_of(where.values())]:
        sweep, run = map(os.path.realpath, (one.sweep, one.directory))
        here[f"{names.get(sweep)}/{os.path.relpath(run, sweep)}"] = one.directory
    known = index["runs"]
    for name, about in known.items():
        if name not in here:
            sweep = next((s for s in where if name.startswith(f"{s}/")), None)
            rest = "" if sweep is None else name[len(sweep) + 1 :]
            place = manifest.resolved(folder, name) if sweep is None else where[sweep] / rest
            found.differs(place, f"{about.get('status')} when this was written, and it is gone")
        elif digests.of_file(here[name] / RUN_FILE) != about.get(RUN_FILE):
            found.differs(here[name] / RUN_FILE, "changed since this was written")
        elif (state := states.get(os.path.realpath(here[name]), "")) != about["status"] and state:
            words = f"{state}, and {about['status']} by the index of {folder}"
            found.differs(here[name] / RUN_FILE, words)
    for name in here.keys() - known.keys():
        found.differs(here[name], "a run that was not there when this was written")
    for name, sweep in where.items():
        _check_beside(sweep, index["sweeps"][name], found)


def _check_beside(sweep: Path, known: Mapping[str, Any], found: Verified) -> None:
    """The files beside the runs of a sweep against an index."""
    now = manifest.sweep_files(sweep)
    for name in sorted({*known, *now}):
        file, noted = sweep / name, known.get(name)
        if name not in now:
            found.differs(file, "removed since this was written")
        elif noted is None:
            found.differs(file, "added since this was written")
        elif isinstance(noted, list):
            if manifest.beginning(file, noted[0]) != noted[1]:
                found.differs(file, "lines that were there when this was written have changed")
        elif now[name] != noted:
            found.differs(file, "changed since this was written")


# ---- an appendix ---------------------------------------------------------------------------------


def _read_index(folder: Path, name: str, found: Verified) -> dict[str, Any]:
    """The index of a folder, which has a digest of its own.

    Raises:
        ResultsError: there is none, or it is not whole.
    """
    file = folder / name
    index = {} if file.is_symlink() else atomic.read_json(file)
    kinds = {"files": dict, "runs": dict, "sweeps": dict, "paths": list, "software": dict}
    if not index:
        raise ResultsError(
            f"{folder}: it has no {name} that can be read, as versions before wrote none; write it "
            "again with fisher-lab report, or check its sweeps"
        )
    if index.get("schema") != manifest.SCHEMA or not all(
        isinstance(index.get(key), kind) for key, kind in kinds.items()
    ):
        raise ResultsError(f"{file}: this is no index of {manifest.SCHEMA}")
    if index.get(digests.ENTRY) != digests.of_record(index):
        found.differs(file, "changed since it was written")
    return index


def _check_appendix(folder: Path, runs: Path | None, found: Verified) -> None:
    index = _read_index(folder, APPENDIX_FILE, found)
    where = {name: manifest.resolved(folder, name) for name in index["sweeps"]}
    paths = [manifest.resolved(folder, path) for path in index["paths"]]
    if runs is not None:
        where = {name: runs / directory.name for name, directory in where.items()}
        paths = list(where.values())
    for path in dict.fromkeys([*paths, *where.values()]):
        if (not path.is_dir() and runs is not None) or not path.parent.is_dir():
            raise ResultsError(f"{path}: the runs are not there; give their directory with --runs")
    for sweep in where.values():
        if sweep.is_dir():
            _check_runs(sweep, found)
            _check_digests(sweep, found)
        else:
            found.differs(sweep, "the sweep is gone")
    there = [path for path in paths if path.is_dir()]
    if not there or _leads_out(where.values(), found):
        _check_index(folder, index, there, where, {}, found)
    else:
        frame = load(there)
        _check_index(folder, index, there, where, _states(frame), found)
        places = paper.Places(frame, roots=manifest.recognised(frame, index))
        with tempfile.TemporaryDirectory(prefix="fisher_lab-verify-") as again:
            _write_again(frame, Path(again), index, places)
            _compare(folder, Path(again), index, found)


def _write_again(
    frame: pd.DataFrame, again: Path, index: Mapping[str, Any], places: paper.Places
) -> None:
    options = index.get("options") or {}
    paper.write_appendix(frame, again, siunitx=options.get("siunitx") is True, places=places)
    page = options.get("report")
    if isinstance(page, str) and page == Path(page).name:
        atomic.write_text(again / page, report.page(frame, places))


def _states(frame: pd.DataFrame) -> dict[str, str]:
    """Real path of a run directory -> its state."""
    left = {os.path.realpath(one.directory): "left out" for one in frame.attrs["left_out"]}
    states = zip(map(os.path.realpath, frame["directory"]), map(str, frame["status"]), strict=True)
    return left | dict(states)


def _leads_out(sweeps: Iterable[Path], found: Verified) -> bool:
    """Whether the runs are not to be read because a symbolic link among them leads out."""
    leads = False
    for sweep in sweeps:
        for _, path in digests.entries(sweep):
            if path.is_symlink() and not path.resolve().is_relative_to(sweep.resolve()):
                found.differs(path, "a symbolic link that leads out of the sweep")
                leads = True
    if leads:
        found.notes.append("no number was computed again, as symbolic links are not followed")
    return leads


# ---- a sweep -------------------------------------------------------------------------------------


def _check_digests(sweep: Path, found: Verified) -> None:
    """The tables and figures beside the runs against their index, where there is one."""
    noted = atomic.read_json(sweep / FINISHED_FILE)
    files = noted.get("files") if noted.get("schema") == manifest.SCHEMA else None
    for name, digest in files.items() if isinstance(files, dict) else ():
        file = sweep / name
        if not file.is_file() or file.is_symlink():
            found.differs(file, "removed since the sweep was finished")
        elif digests.of_file(file) != digest:
            found.differs(file, "changed since the sweep was finished")


def _check_finished(sweep: Path, found: Verified) -> None:
    """What was written at the end of a sweep."""
    file = sweep / FINISHED_FILE
    if not file.exists():
        found.notes.append(f"{sweep}: no table was written at its end")
        return
    if (noted := atomic.read_json(file)) and "schema" not in noted:
        found.notes.append(f"{sweep}: its tables were written by a version without an index")
        return
    try:
        index = _read_index(sweep, FINISHED_FILE, found)
    except ResultsError:
        found.differs(file, "cannot be read as an index")
        return
    if _leads_out([sweep], found):
        return
    frame = load(sweep)
    _check_index(sweep, index, [sweep], {".": sweep}, _states(frame), found)
    if frame.empty:
        return
    with tempfile.TemporaryDirectory(prefix="fisher_lab-verify-") as again:
        finishing.write(finishing.judge(sweep, frame), Path(again))
        _compare(sweep, Path(again), index, found, only=finishing.WRITTEN)


# ---- files ---------------------------------------------------------------------------------------


def _compare(
    folder: Path,
    again: Path,
    index: Mapping[str, Any],
    found: Verified,
    only: re.Pattern[str] | None = None,
) -> None:
    """Every file of a folder against what the runs give, and against its digest.

    Args:
        folder: that is checked.
        again: the folder that was written just now.
        index: of the former.
        found: gets what is wrong.
        only: names of the files that are looked at; by default all.
    """
    there = dict(digests.entries(folder))
    now = dict(digests.entries(again))
    same = index["software"] == {**index["software"], **manifest.software()}
    if not same:
        found.notes.append(
            f"{folder}: written by other versions or on another processor; figures were compared "
            f"with their digests, and numbers may differ by {ROUNDING:g} of their size"
        )
    for name in sorted({*there, *now, *index["files"]} - {APPENDIX_FILE}):
        file = folder / name
        if only is not None and not only.fullmatch(name):
            continue
        if name not in there:
            found.differs(file, "removed: the runs give it")
        elif file.is_symlink():
            found.differs(file, "a symbolic link, which is not followed")
        elif name not in now and name not in index["files"]:
            if name in [f"{Path(paper.DOCUMENT).stem}.{suffix}" for suffix in COMPILED]:
                found.notes.append(f"{file}: made by LaTeX, and not checked")
            else:
                found.differs(file, "added: the runs do not give it")
        else:
            found.files += 1
            intact = digests.of_file(file) == index["files"].get(name)
            _compare_file(file, now.get(name), intact, same, found)


def _compare_file(file: Path, now: Path | None, intact: bool, same: bool, found: Verified) -> None:
    """One file against what the runs give.

    Args:
        file: in the folder.
        now: the same file as it is written now; None where it is not.
        intact: whether its digest is that of the index.
        same: whether the versions are those that it was written by.
        found: gets what is wrong.
    """
    if now is None:
        found.differs(file, "the runs do not give it any more")
        return
    if file.read_bytes() == now.read_bytes():
        if not intact:
            found.differs(file, f"its digest in {APPENDIX_FILE} is another one")
        return
    if file.suffix in TYPES:
        if not intact:
            found.differs(file, "changed since it was written")
        elif same:
            found.differs(file, "the runs give another figure")
        return
    try:
        lines = [one.read_text(encoding="utf-8").splitlines() for one in (file, now)]
    except UnicodeDecodeError:
        found.differs(file, "not a text any more")
        return
    if intact and not same and all(map(_is_rounding, *lines)) and len(lines[0]) == len(lines[1]):
        return
    many = 0
    for number, what in _line_differences(*lines):
        many += 1
        if many <= MOST_LINES:
            found.differs(file, what, number)
    if many > MOST_LINES:
        found.differs(file, f"{many - MOST_LINES} more lines")
    if not many:
        found.differs(file, "its ends of lines have changed")


_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_IMAGE = re.compile(r"data:image/png;base64,[A-Za-z0-9+/=]*")


def _is_rounding(was: str, now: str) -> bool:
    """Whether two lines are the same but for the rounding of numbers, and but for images."""
    was, now = _IMAGE.sub("", was), _IMAGE.sub("", now)
    if was == now:
        return True
    if _NUMBER.split(was) != _NUMBER.split(now):
        return False
    pairs = zip(map(float, _NUMBER.findall(was)), map(float, _NUMBER.findall(now)), strict=True)
    return all(abs(a - b) <= ROUNDING * max(abs(a), abs(b)) for a, b in pairs)


def _line_differences(was: list[str], now: list[str]) -> Iterator[tuple[int | None, str]]:
    """Numbers of lines, from 1, and how each differs from what the runs give."""
    for kind, i, end, j, to in SequenceMatcher(None, was, now, autojunk=False).get_opcodes():
        if kind == "equal":
            continue
        for n in range(max(end - i, to - j)):
            if i + n >= end:
                yield min(i + n, len(was)) or None, f"missing here: {_short(now[j + n])}"
            elif j + n >= to:
                yield i + n + 1, f"{_short(was[i + n])} is not what the runs give"
            else:
                ours, theirs = _apart(was[i + n], now[j + n])
                yield i + n + 1, f"{ours}, and the runs give {theirs}"


def _apart(was: str, now: str) -> tuple[str, str]:
    """The parts in which two lines differ, whole numbers and words."""
    words = [re.findall(r"[\w.+-]+|\s+|.", line) for line in (was, now)]
    one, other = words
    while one and other and one[0] == other[0]:
        one, other = one[1:], other[1:]
    while one and other and one[-1] == other[-1]:
        one, other = one[:-1], other[:-1]
    return _short("".join(one)), _short("".join(other))


def _short(text: str) -> str:
    text = text.strip()
    return f"`{text}`" if len(text) <= LONGEST else f"`{text[: LONGEST - 1]}…`"


# ---- the command ---------------------------------------------------------------------------------


@guarded
def verify_command(argv: Sequence[str]) -> int:
    """Run ``fisher-lab verify``."""
    what = "Whether every number of an appendix, or beside a sweep's runs, is that of the runs."
    parser = make_parser("verify", what, paths=False)
    parser.add_argument("path", help="an appendix, a sweep, or a directory of sweeps")
    parser.add_argument("--runs", metavar="DIRECTORY", help="where the sweeps of an appendix are")
    parser.add_argument("--json", action="store_true", help="everything that was found, as JSON")
    args: argparse.Namespace = parser.parse_args(list(argv))
    found = verify(args.path, args.runs)
    if args.json:
        about = {
            "equal": not found.deviations,
            "deviations": [vars(one) for one in found.deviations],
            **{name: getattr(found, name) for name in ("notes", "runs", "files")},
        }
        sys.stdout.write(json.dumps(about, indent=2, ensure_ascii=False) + "\n")
    else:
        _show(found)
    return DIFFERENT if found.deviations else OK


def _show(found: Verified) -> None:
    out = finishing.standard_output()
    for one in found.deviations[:MOST_SHOWN]:
        out.print(Text(str(one), style="red"), soft_wrap=True)
    more = len(found.deviations) - MOST_SHOWN
    if more > 0:
        out.print(Text(f"... {more} more; --json shows all", style="red"))
    for note in found.notes:
        out.print(Text(note, style="yellow"), soft_wrap=True)
    count = len(found.deviations)
    words = f"{count} thing{'' if count == 1 else 's'} differ{'s' if count == 1 else ''}"
    end = "nothing differs" if not count else words
    out.print(Text(f"{found.runs} runs, {found.files} files: {end}"))
