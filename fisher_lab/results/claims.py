"""Claims of a sweep file against its runs: holds, does not hold, or inconclusive.

A claim holds where every comparison holds (the intersection-union test: no correction is needed),
and does not where at least one is shown not to, after Holm's correction over its comparisons. Runs
that are lost leave a claim whose comparisons all hold inconclusive, and so with ``not``: nothing is
known of them. A claim that does not hold is a result.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from fisher_lab.results import stats
from fisher_lab.results.axes import select
from fisher_lab.results.hypotheses import Claim, check, parse
from fisher_lab.results.hypothesis_tests import FAILS, HOLDS, OPEN, TEST, Finding, findings
from fisher_lab.results.values import Frame, ResultsError
from fisher_lab.runs.record import strict

__all__ = ["INVALID", "Verdict", "check", "evaluate", "evaluate_one", "to_rich"]

INVALID = "invalid"
"""The claim cannot be read, or names a setting that the runs do not have."""


@dataclass(frozen=True)
class Verdict:
    """The answer to a claim.

    Attributes:
        sweep: name of the sweep.
        claim: as stated.
        text: what the paper says.
        verdict: ``holds``, ``does not hold``, ``inconclusive`` or ``invalid``.
        why: the answer in a sentence, with the numbers.
        test: what was done.
        seeds: seeds (or runs) of the comparison that has fewest.
        seeds_needed: how many would decide; None where nothing lacks or no number of them would.
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
    findings: tuple[Finding, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values, for ``claims.json``."""
        about = {
            "sweep": self.sweep,
            "text": self.text,
            "verdict": self.verdict,
            "why": self.why,
            "test": self.test,
            "seeds": self.seeds,
            "seeds_needed": self.seeds_needed,
            "claim": self.claim,
            "findings": [
                {
                    "about": f.about,
                    "verdict": f.verdict,
                    "n": f.n,
                    "says": f.says,
                    "p_holds": f.p_holds,
                    "p_does_not_hold": f.p_fails,
                    "seeds_needed": f.needed,
                    "values": dict(f.values or {}),
                    "lost": dict(f.lost or {}),
                }
                for f in self.findings
            ],
        }
        return strict(about)


def evaluate(frame: Frame) -> list[Verdict]:
    """Answer the claims of every sweep in a frame by its own runs.

    Args:
        frame: from :func:`fisher_lab.results.loading`.

    Returns:
        A verdict a claim, in the order of sweeps and claims.
    """
    verdicts = []
    for directory, sweep in frame.attrs.get("sweeps", {}).items():
        runs = _of_sweep(frame, sweep.name, directory)
        verdicts += [
            evaluate_one(claim, runs, sweep=sweep.name, number=number)
            for number, claim in enumerate(sweep.claims, 1)
        ]
    return verdicts


def _of_sweep(frame: Frame, name: str, directory: str) -> Frame:
    inside = frame["directory"].str.startswith(directory.rstrip("/") + "/")
    runs = frame[(frame["sweep"] == name) & inside]
    runs.attrs = {**frame.attrs, "sweeps": {directory: frame.attrs["sweeps"][directory]}}
    return runs


def evaluate_one(stated: Any, runs: Frame, *, sweep: str = "", number: int = 1) -> Verdict:
    """Answer one claim.

    Args:
        stated: the claim, a mapping.
        runs: of its sweep.
        sweep: the sweep's name.
        number: the claim's place in the file.
    """
    try:
        claim = parse(stated, number)
        chosen = select(runs, claim.get("where", {}))
        if claim.metric and claim.metric not in runs:
            return _answer(sweep, claim, OPEN, f"no run has the metric {claim.metric}", [])
        if chosen.empty:
            return _answer(sweep, claim, OPEN, "there are no runs that it is about", [])
        found = findings(claim, chosen)
    except ResultsError as error:
        text = str(stated.get("text") or stated.get("type")) if isinstance(stated, dict) else ""
        return Verdict(sweep, stated, text, INVALID, str(error))
    return _decide(sweep, claim, found)


def _answer(
    sweep: str, claim: Claim, verdict: str, why: str, found: Sequence[Finding], **more: Any
) -> Verdict:
    return Verdict(
        sweep, claim.stated, claim.text, verdict, why, _done(claim, found),
        min((f.n for f in found), default=0), findings=tuple(found), **more,
    )  # fmt: skip


def _done(claim: Claim, found: Sequence[Finding]) -> str:
    """The test that was made, in words; a t test only where one was."""
    words = TEST[claim.type]
    if "t test" not in words:
        return words
    exact = "pairs that do not vary compared as numbers" if any(f.exact for f in found) else ""
    if any(f.tested for f in found):
        return f"{words}; {exact}" if exact else words
    return f"no test: {exact}" if exact else "no test"


def _decide(sweep: str, claim: Claim, found: Sequence[Finding]) -> Verdict:
    corrected = _corrected(claim, found)
    verdict = _join([f.verdict for f in corrected])
    lost = _all_lost(corrected)
    incomplete = verdict == HOLDS and bool(lost)
    if incomplete:
        verdict = OPEN
    open_ones = [f for f in corrected if f.verdict == OPEN]
    enough = [f.needed for f in open_ones]
    most = max((n for n in enough if n is not None), default=None)
    decided = None if incomplete or None in enough else most
    if claim.get("not", False):
        verdict = {HOLDS: FAILS, FAILS: HOLDS}.get(verdict, verdict)
    unit = "runs" if claim.type in ("fails", "share") else "seeds"
    why = _why(corrected, verdict, lost, decided, open_ones, "" if incomplete else unit)
    needed = decided if verdict == OPEN else None
    return _answer(sweep, claim, verdict, why, corrected, seeds_needed=needed)


def _corrected(claim: Claim, found: Sequence[Finding]) -> list[Finding]:
    """The findings with Holm's correction for those that were tested and failed."""
    p = stats.holm([f.p_fails for f in found])
    many = sum(f.tested for f in found)
    out = []
    for finding, value in zip(found, p, strict=True):
        if finding.tested:
            verdict = finding.verdict
            if verdict == FAILS and value >= claim.alpha:
                verdict = OPEN
            open_one = verdict == OPEN and finding.seeds_at is not None
            needed = finding.seeds_at(many) if open_one and finding.seeds_at else finding.needed
            finding = replace(finding, verdict=verdict, p_fails=value, needed=needed)
        out.append(finding)
    return out


def _join(verdicts: Sequence[str]) -> str:
    if FAILS in verdicts:
        return FAILS
    return HOLDS if verdicts and set(verdicts) == {HOLDS} else OPEN


def _all_lost(found: Iterable[Finding]) -> dict[str, int]:
    """The most that any comparison lost: they may share cells, and so are not added up."""
    lost: dict[str, int] = {}
    for finding in found:
        for what, count in (finding.lost or {}).items():
            lost[what] = max(lost.get(what, 0), count)
    return lost


def _why(
    found: Sequence[Finding],
    verdict: str,
    lost: dict[str, int],
    needed: int | None,
    open_ones: Sequence[Finding],
    unit: str,
) -> str:
    """The comparison that decided, in words."""
    if not found:
        return "there is nothing to compare"
    failed = [f for f in found if f.verdict == FAILS]
    told = failed or open_ones or list(found)
    worst = max(told, key=_doubt)
    others = f" ({len(told)} of {len(found)} comparisons)" if len(found) > 1 else ""
    parts = [f"{worst.about}: {worst.says}{others}"]
    if lost:
        parts.append("runs lost: " + ", ".join(f"{n} {what}" for what, n in lost.items()))
    if verdict == OPEN and unit:
        if needed is not None:
            parts.append(f"about {needed} {unit} would decide")
        elif all(f.n > 1 for f in open_ones):
            parts.append(f"not decided by {stats.MAX_SEEDS} {unit} either")
    return "; ".join(parts)


def _doubt(finding: Finding) -> tuple[float, float]:
    """Orders comparisons: the one that is furthest from holding last."""
    if finding.n == 0 and finding.verdict == OPEN:
        return (math.inf, 0.0)  # no number of seeds makes up for what was not run
    p = 0.0 if math.isnan(finding.p_holds) else finding.p_holds
    values = finding.values or {}
    return p, abs(values.get("error", values.get("mean", 0.0)))


# ---- shown ---------------------------------------------------------------------------------------

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
