"""What was fixed of a sweep before its first result: claims, their designs, cells and code.

``registration.json`` in the sweep's directory is written by the first launch, or before it by
``fisher-lab register``. As long as there is no result it may be written anew; after that it stays
as it is. A claim that it has word for word, with the same design, is *registered*. One that was
added or changed later is *exploratory*, and one that is no longer stated is *dropped*.

The file is ``{schema, registered, sweep, results_before, until, seeds, axes, overrides, cells,
claims: [{id, claim, design}], code: {git, versions}, sha256}``. ``sha256`` is that of all else, as
JSON with sorted keys and no spaces; the journal of the sweep (``events.jsonl``, event
``registered``) and every ``launch.json`` repeat it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fisher_lab.results.hypotheses import Hypothesis, text_of
from fisher_lab.results.values import ResultsError
from fisher_lab.runs import atomic, provenance
from fisher_lab.runs.lock import Lock
from fisher_lab.runs.record import METRICS_FILE, RUN_FILE, status_of, strict

REGISTRATION_FILE = "registration.json"
SCHEMA = "fisher_lab.registration/1"
REGISTERED, EXPLORATORY = "registered", "exploratory"

LOCK_TIMEOUT_S = 30.0


def _hash(content: Mapping[str, Any]) -> str:
    text = json.dumps(strict(content), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def digest(content: Mapping[str, Any]) -> str:
    """The SHA-256 of a registration: of everything in it but the entry ``sha256``."""
    return _hash({key: value for key, value in content.items() if key != "sha256"})


def claim_id(hypothesis: Hypothesis) -> str:
    """12 hexadecimal digits that change with a claim's words, its numbers or its design.

    What an appendix calls it (``name``) makes no difference.
    """
    stated = {key: value for key, value in hypothesis.stated.items() if key != "name"}
    return _hash({"claim": stated, "design": dataclasses.asdict(hypothesis.design)})[:12]


@dataclass(frozen=True)
class Registration:
    """The contents of a ``registration.json``.

    Attributes:
        content: as the file has it.
    """

    content: Mapping[str, Any]

    @property
    def is_intact(self) -> bool:
        """Whether the file's SHA-256 is that of what it says."""
        return self.content.get("sha256") == digest(self.content)

    @property
    def claims(self) -> dict[str, dict[str, Any]]:
        """Identity of a claim -> its entry ``{id, claim, design}``."""
        return {str(one["id"]): one for one in self.content["claims"]}

    @property
    def seeds(self) -> list[int]:
        """The seeds in the order in which they are looked at; further ones follow the largest."""
        return [int(seed) for seed in self.content["seeds"]]

    def objection(self, hypothesis: Hypothesis) -> str:
        """Why a claim is not registered, in words; empty where it is."""
        if not self.is_intact:
            return f"{REGISTRATION_FILE} was edited: its SHA-256 is another"
        if before := self.content["results_before"]:
            return f"registered after {before} result{'' if before == 1 else 's'}"
        if claim_id(hypothesis) in self.claims:
            return ""
        texts = [text_of(one["claim"]) for one in self.claims.values()]
        what = "changed" if hypothesis.text in texts else "added"
        return f"{what} after the registration"

    def dropped(self, stated: Container[str]) -> list[dict[str, Any]]:
        """The entries of claims whose identity is not among those that are stated now."""
        return [one for name, one in self.claims.items() if name not in stated]


def read(directory: Path) -> Registration | None:
    """The registration of a sweep's directory; None where there is none.

    Raises:
        ResultsError: the file cannot be read as one.
    """
    path = Path(directory) / REGISTRATION_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        wanted = {"claims": list, "seeds": list, "cells": list, "results_before": int}
        if content["schema"] != SCHEMA:
            raise ValueError(f"schema {content['schema']!r} is not {SCHEMA}")
        for key, kind in wanted.items():
            if not isinstance(content[key], kind):
                raise ValueError(f"{key} is not a {kind.__name__}")
        found = Registration(content)
        _ = found.claims, found.seeds
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResultsError(f"{path} cannot be read as a registration: {error!r}") from error
    return found


def results_in(directory: Path) -> int:
    """How many runs of a sweep's directory have measured something, or have come to an end."""
    runs = [file.parent for file in Path(directory).glob(f"*/{RUN_FILE}")]
    return sum(_has_result(run) for run in runs)


def _has_result(run: Path) -> bool:
    status = status_of(run)
    return (status is not None and status.is_final) or (run / METRICS_FILE).is_file()


def register(
    directory: Path, claims: Sequence[Hypothesis], about: Mapping[str, Any]
) -> tuple[Registration, bool]:
    """Write ``registration.json``, unless it is there and results are too.

    Args:
        directory: of the sweep; made where it is missing.
        claims: of the sweep file.
        about: ``sweep``, ``until``, ``seeds``, ``axes``, ``overrides`` and ``cells``.

    Returns:
        The registration that counts, and whether it was written now.

    Raises:
        ResultsError: the file that is there cannot be read.
        TimeoutError: another process held the lock for :data:`LOCK_TIMEOUT_S` seconds.
    """
    code = {"git": provenance.git(), "versions": provenance.versions()}
    stated = [
        {"id": claim_id(one), "claim": one.stated, "design": dataclasses.asdict(one.design)}
        for one in claims
    ]
    lock = Lock(Path(directory) / ".sweep" / "locks" / REGISTRATION_FILE)
    if not lock.acquire_within(LOCK_TIMEOUT_S):
        raise TimeoutError(f"{directory / REGISTRATION_FILE} is held by {lock.holder()}")
    with lock:
        before, results = read(directory), results_in(directory)
        fixed: dict[str, Any] = strict({**about, "claims": stated, "code": code})
        same = before and {key: before.content.get(key) for key in fixed} == fixed
        if before is not None and (results or same):
            return before, False
        content = {
            "schema": SCHEMA,
            "registered": datetime.now(UTC).isoformat(timespec="seconds"),
            "results_before": results,
            **fixed,
        }
        content["sha256"] = digest(content)
        atomic.write_json(Path(directory) / REGISTRATION_FILE, content)
        return Registration(content), True
