"""``fisher-lab capsule``: what a reader needs of an appendix or of sweeps, in one zip file.

It has the run directories without weights and logs, the files of their sweeps, the appendix, pinned
versions, a README with two commands, and an RO-Crate description (``ro-crate-metadata.json``). That
is written by hand: it is one list of files, and the library for it takes ten packages.

An anonymous capsule names no user, host, home directory, e-mail, git remote or W&B entity. Its
texts are changed, sealed anew and the appendix written again; every byte is searched before the
file is there, and a name that is left is an error.
"""

from __future__ import annotations

import argparse
import getpass
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from fisher_lab.results import finishing, manifest, paper, report, verify
from fisher_lab.results.commands import OK, guarded, make_parser
from fisher_lab.results.loading import CONTROLS, SWEEP_FILE, WRITTEN_HERE, controls_of, find, load
from fisher_lab.results.manifest import APPENDIX_FILE, FINISHED_FILE
from fisher_lab.results.values import ResultsError
from fisher_lab.runs import atomic, digests
from fisher_lab.runs.record import RUN_FILE

SCHEMA = "fisher_lab.capsule/1"
APPENDIX, RESULTS = "appendix", "results"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
EPOCH = (1980, 1, 1, 0, 0, 0)
"""The date of every file in the zip, so that the same content gives the same bytes."""

README = """\
# {title}

The runs behind {what}: configurations, metrics and tables of {runs} runs, what was claimed of
them, and what came out. Weights and logs are left out.

Install Python {python} and fisher-lab {version}{commit} with the versions of `constraints.txt`
(`pip install -c constraints.txt fisher-lab`), unpack this file, and type in its directory:

```sh
fisher-lab verify {first}
fisher-lab reproduce {first} --sample 5
```

The first command computes every number again from the runs, and checks their files against the
digests that were recorded when they ended. The second runs five cells again and compares their
numbers.
"""


def pack(path: Path, output: Path, *, anonymous: bool = False) -> Path:
    """Write the capsule of an appendix, a sweep, or a directory of sweeps.

    Args:
        path: an appendix, or a directory with runs.
        output: the zip file.
        anonymous: whether names of people and machines are taken out.

    Returns:
        ``output``.

    Raises:
        ResultsError: there are no runs, or an anonymous capsule cannot be made of them.
    """
    sweeps = _sweeps_of(path)
    if anonymous and (wrong := verify.verify(path).deviations):
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ResultsError(
            f"{path} is not as its runs were, which would be hidden: {wrong[0]}{more}"
        )
    with tempfile.TemporaryDirectory(prefix="fisher_lab-capsule-") as folder:
        root = Path(folder)
        places = _named(sweeps)
        left_out: dict[str, dict[str, str]] = {}
        for sweep, name in places.items():
            _copy_sweep(sweep, root / RESULTS / name, left_out)
        is_appendix = (path / APPENDIX_FILE).is_file()
        if is_appendix:
            _copy_appendix(path, root / APPENDIX, places)
        about: dict[str, Any] = {"schema": SCHEMA, "anonymous": anonymous, "left_out": left_out}
        if anonymous:
            _make_anonymous(root, Names.here(sweeps), about)
        atomic.write_json(root / verify.CAPSULE_FILE, about)
        _describe(root, path.resolve().name, is_appendix, anonymous)
        _zip(root, output)
    return output


def _sweeps_of(path: Path) -> list[Path]:
    """The directories of the sweeps behind a path.

    Raises:
        ResultsError: there are none, or one of them is gone.
    """
    if not path.is_dir():
        raise ResultsError(f"{path}: there is no such directory")
    if (path / APPENDIX_FILE).is_file():
        sweeps = manifest.sweeps_of(path)
    elif (path / SWEEP_FILE).is_file():
        sweeps = [path]
    else:
        sweeps = list(dict.fromkeys(one.sweep for one in find(path)[0]))
    for sweep in sweeps:
        if not sweep.is_dir():
            raise ResultsError(f"{sweep}: the runs of {path} are not there")
    if not sweeps:
        raise ResultsError(f"{path}: there is neither an appendix nor a run in it")
    return sweeps


def _named(sweeps: Iterable[Path]) -> dict[Path, str]:
    """The directories of sweeps -> their names in the capsule, each another one."""
    found: dict[Path, str] = {}
    for sweep in sweeps:
        name = own = sweep.resolve().name
        for number in itertools.count(2):
            if name not in found.values():
                break
            name = f"{own}-{number}"
        found[sweep] = name
    return found


# ---- copies --------------------------------------------------------------------------------------


def _copy_sweep(sweep: Path, target: Path, left_out: dict[str, dict[str, str]]) -> None:
    """Copy what a reader needs of a sweep; note the digests of what runs had beside."""
    target.mkdir(parents=True)
    found = [*find(sweep)[0], *controls_of([sweep])]
    runs = {one.directory.resolve() for one in found}
    is_sweep = (sweep / SWEEP_FILE).exists()
    for name, path in digests.entries(sweep):
        parts = name.split("/")
        run = next((p for p in path.parents if p.resolve() in runs), None)
        inside = path.relative_to(run).as_posix() if run else ""
        kept = name in (FINISHED_FILE, manifest.LEDGER)
        hidden = any(part.startswith(".") for part in parts) and not kept
        if path.is_symlink() or hidden or name.endswith(".log"):
            continue
        if run is None and not (is_sweep and (kept or len(parts) == 1 or parts[0] in WRITTEN_HERE)):
            continue
        if run and inside.split("/")[0] in digests.OPEN:
            continue
        if run and path.suffix in WEIGHTS:
            known = atomic.read_json(run / RUN_FILE).get(digests.ENTRY) or {}
            above = target.name if run.parent == sweep else run.parent.name
            key = f"{above}/{run.name}"
            left_out.setdefault(key, {})[inside] = known.get(inside) or digests.of_file(path)
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / name)


def _copy_appendix(folder: Path, target: Path, places: Mapping[Path, str]) -> None:
    """Copy an appendix; its index names the runs where they are in the capsule."""
    for name, path in digests.entries(folder):
        if not path.is_symlink():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / name)
    index = atomic.read_json(folder / APPENDIX_FILE)
    own = {path: name for name in index["sweeps"] if (path := manifest.resolved(folder, name))}
    new = {own[sweep]: f"../{RESULTS}/{name}" for sweep, name in places.items()}
    intact = index.get(digests.ENTRY) == digests.of_record(index)

    def moved(name: str) -> str:
        sweep = next((s for s in new if name == s or name.startswith(f"{s}/")), None)
        return name if sweep is None else new[sweep] + name[len(sweep) :]

    paths = []
    for path in index["paths"]:
        there = manifest.resolved(folder, path)
        below = [s for s in new if there in manifest.resolved(folder, s).parents]
        paths += [new[s] for s in below] if below else [moved(path)]
    index |= {"paths": paths}
    index |= {key: {moved(n): v for n, v in index[key].items()} for key in ("sweeps", "runs")}
    if intact:
        index[digests.ENTRY] = digests.of_record(index)
    atomic.write_json(target / APPENDIX_FILE, index)


# ---- anonymous -----------------------------------------------------------------------------------

GENERIC = ("root", "user", "users", "admin", "ubuntu", "debian", "runner", "docker", "nobody",
           "localhost", "home")  # fmt: skip
"""Names that tell nobody from anybody."""

EMAIL = re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+")
REMOTE = re.compile(r"(?:ssh://|git\+ssh://)?[\w.-]+@[\w.-]+[:/][\w./~-]+|"
                    r"(?:https?|ssh|git)://[^\s\"'<>]+\.git\b")  # fmt: skip
HOME = re.compile(r"/(?:home|Users)/([\w.-]+)")
_HEXADECIMAL = re.compile(r"[0-9a-f]+")


class Names:
    """Names of people, machines and services, and what stands in their place.

    Args:
        homes: home directories.
        people: names of users and machines, which are taken out inside longer words too; but not
            inside digests, if they could be a part of one.
        others: remotes, entities and the like, which are taken out where they are whole.
    """

    def __init__(
        self, homes: Iterable[str], people: Iterable[str], others: Iterable[str] = ()
    ) -> None:
        known: dict[str, tuple[str, str]] = {}
        for name in filter(None, others):
            known[name] = ("private", rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])")
        for name in {one.lower() for one in people} - {"", *GENERIC}:
            word = re.escape(name)
            whole = len(name) < 3 or _HEXADECIMAL.fullmatch(name)
            bounded = rf"(?<![a-z0-9]){word}(?![a-z0-9])"
            known[name] = ("somebody", f"(?i:{bounded if whole else word})")
        for name in filter(lambda home: len(home) > 1, homes):
            known[name] = ("~", rf"{re.escape(name)}(?![\w.-])")
        ordered = sorted(known.items(), key=lambda item: -len(item[0]))
        self._patterns = [(re.compile(pattern), new) for _, (new, pattern) in ordered]
        self._bytes = [name.encode() for name in known if len(name) > 3]

    @classmethod
    def here(cls, sweeps: Sequence[Path]) -> Names:
        """Those of this machine and this user, and those that runs have recorded."""
        homes, people = {str(Path.home())}, {getpass.getuser(), Path.home().name}
        hosts = {socket.gethostname(), os.uname().nodename}
        others = {os.environ.get("WANDB_ENTITY", ""), *_of_git()}
        for one in [*find(list(sweeps))[0], *controls_of(sweeps)]:
            for _, path in digests.entries(one.directory):
                text = _text(path) or ""
                homes |= {found[0] for found in HOME.finditer(text)}
                people |= set(HOME.findall(text))
            record = atomic.read_json(one.directory / RUN_FILE)
            about = record.get("provenance") or {}
            hosts |= {*_values(about, ("host", "hostname"))}
            hosts |= {*_values({"host": about.get("host")}, ("name",))}
            others |= set(_values(record.get("config"), ("entity",)))
        people |= hosts | {host.partition(".")[0] for host in hosts}
        return cls(homes, people, others)

    def out_of(self, text: str) -> str:
        """A text without them."""
        text = EMAIL.sub("private", REMOTE.sub("private", text))
        for pattern, instead in self._patterns:
            text = pattern.sub(instead, text)
        return text

    def left_in(self, path: Path) -> str | None:
        """A name that a file holds, if it holds one."""
        text = _text(path)
        if text is None:
            data = path.read_bytes()
            return next((name.decode() for name in self._bytes if name in data), None)
        found = (one.search(text) for one in (EMAIL, *(p for p, _ in self._patterns)))
        return next((one[0] for one in found if one), None)


def _text(path: Path) -> str | None:
    """The content of a file, or None where that is no text."""
    if path.is_symlink():
        return None
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


def _rewrite(path: Path, names: Names) -> None:
    """Take names out of a file; in JSON out of the values, so that keys stay what they are."""
    text = _text(path)
    if text is None:
        return
    if path.suffix == ".json":
        atomic.write_json(path, _out_of_values(json.loads(text), names))
    elif path.suffix == ".jsonl":
        lines = [json.dumps(_out_of_values(json.loads(x), names)) for x in text.splitlines() if x]
        atomic.write_text(path, "".join(f"{line}\n" for line in lines))
    else:
        atomic.write_text(path, names.out_of(text))


def _out_of_values(value: Any, names: Names) -> Any:
    if isinstance(value, dict):
        return {key: _out_of_values(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [_out_of_values(item, names) for item in value]
    return names.out_of(value) if isinstance(value, str) else value


def _values(value: Any, names: Sequence[str]) -> Iterator[str]:
    """The texts under some keys, wherever they are."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key in names and isinstance(item, str):
                yield item
            yield from _values(item, names)
    elif isinstance(value, list):
        for item in value:
            yield from _values(item, names)


def _of_git() -> Iterator[str]:
    """Remotes, name and address that git knows here."""
    for folder in (Path.cwd(), Path(__file__).parent):
        command = [
            "git",
            "-C",
            str(folder),
            "config",
            "--get-regexp",
            r"(remote\..*\.url|user\..*)",
        ]
        try:
            text = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
        except (OSError, subprocess.SubprocessError):
            continue
        yield from (line.partition(" ")[2].strip() for line in text.splitlines())


def _make_anonymous(root: Path, names: Names, about: dict[str, Any]) -> None:
    """Take names out of everything in a capsule, and seal and write anew what was made of it.

    Raises:
        ResultsError: a file still holds a name, or the runs are no longer what their sweeps say.
    """
    atomic.write_json(root / verify.CAPSULE_FILE, about)
    index = atomic.read_json(root / APPENDIX / APPENDIX_FILE)
    sweeps = sorted((root / RESULTS).iterdir())
    for one in [*find(root / RESULTS)[0], *controls_of(sweeps)]:
        for _, path in digests.entries(one.directory):
            _rewrite(path, names)
        record = atomic.read_json(one.directory / RUN_FILE)
        if digests.ENTRY in record:
            sealed = digests.sealed(one.directory, record)
            name = f"{one.directory.parent.name}/{one.directory.name}"
            sealed[digests.ENTRY] |= about["left_out"].get(name, {})
            atomic.write_json(one.directory / RUN_FILE, sealed)
    for sweep in sweeps:
        was_finished = (sweep / FINISHED_FILE).exists()
        (sweep / FINISHED_FILE).unlink(missing_ok=True)
        shutil.rmtree(sweep / "figures", ignore_errors=True)
        beside = [*sweep.iterdir(), sweep / CONTROLS / verify.EVENTS_FILE]
        for path in (p for p in beside if p.is_file()):
            _rewrite(path, names)
        for journal in (sweep, sweep / CONTROLS):
            _seal_journal(journal)
        if was_finished:
            finishing.finish(sweep)
    if index:
        shutil.rmtree(root / APPENDIX)
        _write_appendix_again(root / APPENDIX, index)
    for name, path in digests.entries(root):
        if (left := names.left_in(path)) is not None:
            raise ResultsError(
                f"{name} holds {left}, which cannot be taken out: no capsule is made"
            )
    wrong = verify.verify(root / (APPENDIX if index else RESULTS)).deviations
    if wrong:
        raise ResultsError(f"without its names the capsule is not of its runs: {wrong[0]}")


def _seal_journal(sweep: Path) -> None:
    """Give the journal of a sweep the digests of the records that runs have now."""
    file = sweep / verify.EVENTS_FILE
    if not file.exists():
        return
    events = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    last = {event.get("run_id"): event for event in events}
    for run_id, event in last.items():
        if event.get("record"):
            event["record"] = digests.of_file(sweep / str(run_id) / RUN_FILE)
    atomic.write_text(file, "".join(f"{json.dumps(event)}\n" for event in events))


def _write_appendix_again(folder: Path, index: Mapping[str, Any]) -> None:
    frame = load([manifest.resolved(folder, path) for path in index["paths"]])
    places = paper.Places(frame, roots={})
    options = index.get("options") or {}
    page = folder / str(options["report"]) if options.get("report") else None
    if page is not None:
        atomic.write_text(page, report.page(frame, places))
    paper.write_appendix(
        frame, folder, siunitx=options.get("siunitx") is True, places=places, report=page
    )


# ---- description and zip -------------------------------------------------------------------------


def _describe(root: Path, name: str, is_appendix: bool, anonymous: bool) -> None:
    """Write the README, the pinned versions and the RO-Crate description."""
    version = metadata.version("fisher-lab")
    index = atomic.read_json(root / APPENDIX / APPENDIX_FILE)
    commit = (index.get("software") or {}).get("fisher-lab")
    sweeps = sorted(path.name for path in (root / RESULTS).iterdir())
    title = "Runs of an appendix" if anonymous else f"Runs of {name}"
    about = {
        "title": title,
        "what": f"an appendix ({len(sweeps)} sweeps)" if is_appendix else ", ".join(sweeps),
        "runs": len(find(root / RESULTS)[0]),
        "python": ".".join(manifest.software()["python"].split(".")[:2]),
        "version": version,
        "commit": f" (commit {commit[:12]})" if commit else "",
        "first": APPENDIX if is_appendix else RESULTS,
    }
    atomic.write_text(root / "README.md", README.format(**about))
    atomic.write_text(root / "constraints.txt", "".join(f"{x}\n" for x in sorted(_versions())))
    files = [file for file, _ in digests.entries(root)]
    atomic.write_json(root / "ro-crate-metadata.json", _crate(root, title, version, sweeps, files))


def _versions() -> Iterator[str]:
    """The installed distributions that fisher-lab needs, and that these need, with versions."""
    waiting, seen = ["fisher-lab"], set[str]()
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # for another system, or an extra
            continue
        if name != "fisher-lab":
            yield f"{name}=={found.version}"
        needs = [one for one in found.requires or [] if "extra ==" not in one]
        waiting += [match[0] for one in needs if (match := re.match(r"[\w.-]+", one))]


MEDIA_TYPES = {".json": "application/json", ".csv": "text/csv", ".tex": "application/x-tex",
               ".md": "text/markdown", ".pdf": "application/pdf", ".png": "image/png",
               ".html": "text/html", ".txt": "text/plain",
               ".jsonl": "application/jsonl"}  # fmt: skip


def _crate(
    root: Path, title: str, version: str, sweeps: Sequence[str], files: Sequence[str]
) -> dict[str, Any]:
    """The description of a capsule by RO-Crate 1.1 (https://w3id.org/ro/crate/1.1)."""
    folders = [f"{RESULTS}/{sweep}/" for sweep in sweeps]
    entities: list[dict[str, Any]] = [
        {
            "@id": "ro-crate-metadata.json",
            "@type": "CreativeWork",
            "conformsTo": {"@id": "https://w3id.org/ro/crate/1.1"},
            "about": {"@id": "./"},
        },
        {
            "@id": "./",
            "@type": "Dataset",
            "name": title,
            "description": "Run directories, claims and tables; README.md says how to check them.",
            "datePublished": datetime.now(UTC).date().isoformat(),
            "license": "not stated",
            "mentions": {"@id": "#fisher-lab"},
            "hasPart": [{"@id": one} for one in (*folders, *files)],
        },
        {
            "@id": "#fisher-lab",
            "@type": "SoftwareApplication",
            "name": "fisher-lab",
            "softwareVersion": version,
        },
    ]
    for sweep, folder in zip(sweeps, folders, strict=True):
        words = str(atomic.read_json(root / folder / SWEEP_FILE).get("title") or sweep)
        parts = [{"@id": file} for file in files if file.startswith(folder)]
        entities.append({"@id": folder, "@type": "Dataset", "name": words, "hasPart": parts})
    for file in files:
        path = root / file
        about = {"@id": file, "@type": "File", "name": path.name}
        about |= {"contentSize": str(path.stat().st_size)}
        if path.suffix in MEDIA_TYPES:
            about["encodingFormat"] = MEDIA_TYPES[path.suffix]
        entities.append(about)
    return {"@context": "https://w3id.org/ro/crate/1.1/context", "@graph": entities}


def _zip(root: Path, output: Path) -> None:
    with atomic.writing(output) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, path in digests.entries(root):
            about = zipfile.ZipInfo(name, EPOCH)
            about.compress_type = zipfile.ZIP_DEFLATED
            about.external_attr = 0o644 << 16
            archive.writestr(about, path.read_bytes())


# ---- the command ---------------------------------------------------------------------------------


@guarded
def capsule_command(argv: Sequence[str]) -> int:
    """Run ``fisher-lab capsule``."""
    what = "One zip file with what a reader needs: runs, claims, versions, and how to check them."
    parser = make_parser("capsule", what, paths=False)
    parser.add_argument("path", help="an appendix, a sweep, or a directory of sweeps")
    parser.add_argument("-o", "--output", default="capsule.zip", help="default: capsule.zip")
    parser.add_argument("--anonymous", action="store_true",
        help="no user, host, home directory, e-mail, git remote or W&B entity")  # fmt: skip
    args: argparse.Namespace = parser.parse_args(list(argv))
    output = pack(Path(args.path), Path(args.output), anonymous=args.anonymous)
    size = output.stat().st_size / 2**20
    finishing.standard_output().print(f"{output}  {size:.1f} MiB", soft_wrap=True, markup=False)
    return OK
