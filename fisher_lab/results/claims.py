"""The verdicts on the claims of a sweep: holds, does not hold, or inconclusive.

A claim holds if every comparison holds (the intersection-union test, which needs no correction). It
does not hold if at least one comparison fails after Holm's correction over its comparisons. If all
comparisons hold but runs are lost, the claim is inconclusive, also with ``not``: nothing is known
about these runs. A claim that does not hold is a result.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text
from typing_extensions import override

from fisher_lab.results import controls, stats
from fisher_lab.results.hypotheses import (
    FAILS,
    HOLDS,
    OPEN,
    TESTS,
    Finding,
    Hypothesis,
    findings,
    parse,
)
from fisher_lab.results.notebook import html_table
from fisher_lab.results.values import ResultsError, filter_runs, select
from fisher_lab.runs.record import strict

CLAIMS_FILE = "claims.json"
INVALID = "invalid"
"""The claim is malformed, or names a setting that the runs do not have."""


@dataclass(frozen=True, repr=False)
class Verdict:
    """The verdict on one claim.

    Attributes:
        sweep: name of the sweep.
        claim: as the sweep file states it.
        text: what the paper says.
        verdict: ``holds``, ``does not hold``, ``inconclusive`` or ``invalid``.
        why: the reason in a sentence, with the numbers.
        test: the test that was made.
        seeds: how many seeds (or runs) the smallest comparison has.
        seeds_needed: how many would decide if means and spreads stay as they are; None where none
            are missing or no number would.
        seeds_range: the numbers between which the right one lies (:func:`stats.seeds_range`); its
            second is None where it may be above :data:`stats.MAX_SEEDS`.
        findings: the comparisons.
    """

    sweep: str
    claim: Any
    text: str
    verdict: str
    why: str
    test: str = ""
    seeds: int = 0
    seeds_needed: int | None = None
    seeds_range: stats.Range | None = None
    findings: tuple[Finding, ...] = ()

    @override
    def __repr__(self) -> str:
        return f"Verdict({self.verdict}: {self.text or self.claim}; {self.why})"

    def _repr_html_(self) -> str:
        rows = {"verdict": self.verdict, "why": self.why, "test": self.test, "n": self.seeds}
        return html_table(self.text or str(self.claim), rows.items())

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values, for ``claims.json``."""
        names = ("sweep", "text", "verdict", "why", "test", "seeds", "seeds_needed", "seeds_range")
        about = {name: getattr(self, name) for name in (*names, "claim")}
        names = ("about", "verdict", "n", "says", "p_holds", "p_fails", "needed", "between")
        names = (*names, "values", "lost")
        written = {
            "p_fails": "p_does_not_hold", "needed": "seeds_needed", "between": "seeds_range",
        }  # fmt: skip
        findings = [{written.get(n, n): getattr(f, n) for n in names} for f in self.findings]
        return strict({**about, "findings": findings})


def evaluate(frame: pd.DataFrame) -> list[Verdict]:
    """The verdicts on the claims of every sweep in a frame, each by the sweep's own runs.

    Args:
        frame: from :func:`fisher_lab.results.load`.

    Returns:
        One verdict per claim, in the order of sweeps and claims.
    """
    verdicts = []
    for directory, sweep in frame.attrs.get("sweeps", {}).items():
        inside = frame["directory"].str.startswith(directory.rstrip("/") + "/")
        runs = filter_runs(frame, (frame["sweep"] == sweep.name) & inside)
        found = controls.loaded(Path(directory))
        runs.attrs = {**frame.attrs, "sweeps": {directory: sweep}, "controls": found}
        verdicts += [
            evaluate_one(claim, runs, sweep=sweep.name, number=number)
            for number, claim in enumerate(sweep.claims, 1)
        ]
    return verdicts


def evaluate_one(claim: Any, runs: pd.DataFrame, *, sweep: str = "", number: int = 1) -> Verdict:
    """The verdict on one claim.

    Args:
        claim: as stated, a mapping.
        runs: of its sweep.
        sweep: the sweep's name.
        number: the claim's place in the file.
    """
    try:
        hypothesis = parse(claim, number)
        chosen = select(runs, hypothesis.get("where", {}))
        why = "there are no runs that it is about" if chosen.empty else ""
        if hypothesis.metric and hypothesis.metric not in runs:
            why = f"no run has the metric {hypothesis.metric}"
        found = [] if why else findings(hypothesis, chosen)
    except ResultsError as error:
        text = str(claim.get("text") or claim.get("type")) if isinstance(claim, dict) else ""
        return Verdict(sweep, claim, text, INVALID, str(error))
    verdict = _decide(sweep, hypothesis, found, why)
    if hypothesis.type == "faster" and found and (known := runs.attrs.get("controls")):
        about = (hypothesis.metric, hypothesis.get("a"), hypothesis.alpha)
        words = controls.in_words(*about, chosen, known[0])
        verdict = replace(verdict, why=f"{verdict.why}; {words}")
    return verdict


def _test_made(hypothesis: Hypothesis, found: Sequence[Finding]) -> str:
    """The test that was made, in words; a t test only where one was made."""
    _, words = TESTS[hypothesis.type]
    if "t test" not in words:
        return words
    ties = any(f.exact and f.tested for f in found)
    exact = "pairs that do not vary compared as numbers" if any(f.exact for f in found) else ""
    exact += ", with the chance of ties of a coarse metric" if ties else ""
    if any(f.tested and not f.exact for f in found):
        return f"{words}; {exact}" if exact else words
    return f"{'' if ties else 'no test: '}{exact}" if exact else "no test"


def _decide(sweep: str, hypothesis: Hypothesis, found: Sequence[Finding], why: str) -> Verdict:
    """Join the findings into one verdict; ``why`` says why there are none."""
    corrected = _corrected(hypothesis, found)
    verdicts = {f.verdict for f in corrected}
    verdict = FAILS if FAILS in verdicts else HOLDS if verdicts == {HOLDS} else OPEN
    # Comparisons may share cells, so that their lost runs are not added up.
    lost: Counter[str] = Counter()
    for finding in corrected:
        lost |= Counter(finding.lost)
    incomplete = verdict == HOLDS and bool(lost)
    if incomplete:
        verdict = OPEN
    unit = "runs" if hypothesis.type in ("fails", "share") else "seeds"
    following = None if incomplete else _next_decided([f for f in corrected if f.verdict == OPEN])
    if hypothesis.get("not", False):
        verdict = {HOLDS: FAILS, FAILS: HOLDS}.get(verdict, verdict)
    return Verdict(
        sweep,
        hypothesis.stated,
        hypothesis.text,
        verdict,
        why or _why(corrected, verdict, lost, following, "" if incomplete else unit),
        _test_made(hypothesis, corrected),
        min((f.n for f in corrected), default=0),
        following.needed if following and verdict == OPEN else None,
        following.between if following and verdict == OPEN else None,
        tuple(corrected),
    )


def _next_decided(undecided: Sequence[Finding]) -> Finding | None:
    """The comparison whose number of seeds decides the claim, None where no number is known to.

    One that fails is enough, so that of those that lean to it the quickest counts; all have to
    hold, so that else the slowest one does.
    """

    def seeds(finding: Finding) -> float:
        return math.inf if finding.needed is None else finding.needed

    failing = [f for f in undecided if f.p_holds > 0.5]  # what was measured lies outside
    found = min(failing, key=seeds) if failing else max(undecided, key=seeds, default=None)
    return found if found and (found.needed or found.between) else None


def _corrected(hypothesis: Hypothesis, found: Sequence[Finding]) -> list[Finding]:
    """The findings with Holm's correction for those that were tested and failed."""
    p = stats.holm([f.p_fails for f in found])
    many = sum(f.tested for f in found)
    corrected = []
    for finding, value in zip(found, p, strict=True):
        if finding.tested:
            verdict, needed, between = finding.verdict, finding.needed, None
            if verdict == FAILS and value >= hypothesis.alpha:
                verdict = OPEN
            if verdict == OPEN and finding.seeds_at:
                needed, between = finding.seeds_at(many)
            changed = {"verdict": verdict, "p_fails": value, "needed": needed, "between": between}
            finding = replace(finding, **changed)
        corrected.append(finding)
    return corrected


def _why(
    found: Sequence[Finding],
    verdict: str,
    lost: dict[str, int],
    following: Finding | None,
    unit: str,
) -> str:
    """The comparison that decided, in words."""
    if not found:
        return "there is nothing to compare"
    failed, undecided = ([f for f in found if f.verdict == v] for v in (FAILS, OPEN))
    deciding = failed or undecided or found
    worst = max(deciding, key=_doubt)
    others = f" ({len(deciding)} of {len(found)} comparisons)" if len(found) > 1 else ""
    parts = [f"{worst.about}: {worst.says}{others}"]
    if lost:
        parts.append("runs lost: " + ", ".join(f"{n} {state}" for state, n in lost.items()))
    if verdict == OPEN and unit:
        guess = following and seeds_words(following.needed, following.between)
        if guess:
            parts.append(f"{guess} {unit} would decide")
        elif all(f.n > 1 for f in undecided):
            parts.append(f"not decided by {stats.MAX_SEEDS} {unit} either")
    return "; ".join(parts)


def seeds_words(needed: int | None, between: stats.Range | None) -> str:
    """How many seeds would decide, in words: ``6 to 40``; empty where nothing is known."""
    if between is None:
        return "" if needed is None else f"{needed} or more"
    least, most = between
    if least is None:
        return ""
    if least == most:
        return str(least)
    return f"{least} to {most}" if most else f"{least} to over {stats.MAX_SEEDS}"


def _doubt(finding: Finding) -> tuple[float, float]:
    """A key to sort by: the comparison that is furthest from holding comes last."""
    if finding.n == 0 and finding.verdict == OPEN:
        return (math.inf, 0.0)  # no number of seeds replaces a value that was not run
    p = 0.0 if math.isnan(finding.p_holds) else finding.p_holds
    return p, abs(finding.values.get("error", finding.values.get("mean", 0.0)))


def to_json(verdicts: Sequence[Verdict]) -> str:
    """The contents of ``claims.json``: all numbers of the verdicts."""
    values = [verdict.as_dict() for verdict in verdicts]
    return json.dumps(values, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


# ---- terminal ------------------------------------------------------------------------------------

STYLES = {HOLDS: "green", FAILS: "red", OPEN: "yellow", INVALID: "magenta"}


def to_rich(verdicts: Sequence[Verdict]) -> RenderableType:
    """The verdicts for a terminal."""
    parts: list[RenderableType] = []
    for v in verdicts:
        head = Text(f"{v.verdict:<14} ", style=f"bold {STYLES[v.verdict]}")
        parts += [head + Text(f"{v.sweep}: {v.text}", style="bold"), _indented(v.why)]
        if v.test:
            parts.append(_indented(f"{v.test}; n = {v.seeds}", style="dim"))
    counts = {name: sum(v.verdict == name for v in verdicts) for name in STYLES}
    parts.append(Text(", ".join(f"{n} {name}" for name, n in counts.items() if n)))
    return Group(*parts)


def _indented(text: str, style: str = "") -> RenderableType:
    return Padding(Text(text, style=style), (0, 0, 0, 15))
