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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text
from typing_extensions import override

from fisher_lab.results import controls, labels, looks, registration, stats
from fisher_lab.results.comparisons import Sample, samples
from fisher_lab.results.fixed_tests import WORDS, Finding, judge
from fisher_lab.results.hypotheses import CHECKPOINT, FAILS, HOLDS, OPEN, Hypothesis, parse, text_of
from fisher_lab.results.looks import Course, course, known_looks
from fisher_lab.results.notebook import html_table
from fisher_lab.results.registration import EXPLORATORY, REGISTERED, Registration, claim_id
from fisher_lab.results.sequential import UNDECIDED
from fisher_lab.results.values import (
    SEED,
    ResultsError,
    filter_runs,
    levels,
    parse_value,
    select,
)
from fisher_lab.runs.record import strict

CLAIMS_FILE = "claims.json"
INVALID = "invalid"
"""The claim is malformed, or names a setting that the runs do not have."""

DROPPED = "dropped"
"""The claim is registered, and the sweep file does not state it any more."""

DECIDED = "decided"
"""What ``sweep.json`` has under ``until`` where seeds were run until the claims were decided."""


@dataclass(frozen=True, repr=False)
class Verdict:
    """The verdict on one claim.

    Attributes:
        sweep: name of the sweep.
        claim: as the sweep file states it.
        text: what the paper says.
        verdict: ``holds``, ``does not hold``, ``inconclusive``, ``undecided`` (by all the seeds
            that its design allows, or by so many that the rest will hardly decide), ``invalid``,
            or ``dropped`` for a registered claim that the sweep file does not state any more.
        why: the reason in a sentence, with the numbers.
        test: the test that was made.
        seeds: how many seeds (or runs) the smallest comparison has.
        seeds_needed: how many would decide if means and spreads stay as they are; None where none
            are missing or no number would.
        seeds_range: the numbers between which the right one lies (:func:`stats.seeds_range`); its
            second is None where it may be above :data:`stats.MAX_SEEDS`.
        findings: the comparisons.
        standing: ``registered`` or ``exploratory``.
        objection: why it is exploratory.
        id: of a claim and its design (:func:`registration.claim_id`).
        p: of the verdict, or of the one that is nearer where there is none: the smaller of the p
            of "holds" and of "does not hold"; NaN where no statistical test was made.
        q: share of wrong ones among the verdicts of all claims with a p up to this one's.
        scope: over what the verdict generalises, in words.
        course: the looks at a claim that was decided seed by seed.
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
    standing: str = EXPLORATORY
    objection: str = ""
    id: str = ""
    p: float = math.nan
    q: float = math.nan
    scope: str = ""
    course: Course | None = None

    @property
    def tested(self) -> str:
        """The test, and over what it generalises."""
        return "; ".join(filter(None, (self.test, self.scope)))

    @property
    def shown(self) -> str:
        """The verdict as a table shows it."""
        marked = self.standing == EXPLORATORY and self.verdict in (HOLDS, FAILS, OPEN, UNDECIDED)
        return f"{self.verdict} ({EXPLORATORY})" if marked else self.verdict

    @property
    def in_words(self) -> str:
        """The reason, with the words for settings and metrics in the place of their keys."""
        return labels.in_words(self.why)

    @property
    def explained(self) -> str:
        """The reason in words, and why the claim is exploratory."""
        parts = (self.in_words, self.objection and f"{EXPLORATORY}: {self.objection}")
        return "; ".join(filter(None, parts))

    @override
    def __repr__(self) -> str:
        return f"Verdict({self.verdict}: {self.text or self.claim}; {self.why})"

    def _repr_html_(self) -> str:
        rows = {"verdict": self.shown, "why": self.explained, "test": self.tested, "n": self.seeds}
        return html_table(self.text or str(self.claim), rows.items())

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values, for ``claims.json``."""
        names = ("sweep", "text", "verdict", "why", "test", "seeds", "seeds_needed", "seeds_range")
        about = {name: getattr(self, name) for name in (*names, "claim")}
        about |= {name: getattr(self, name) for name in ("id", "standing", "objection", "scope")}
        about |= {"p": self.p, "q": self.q}
        about["looks"] = None if self.course is None else [look.n for look in self.course.looks]
        names = ("about", "verdict", "n", "says", "p_holds", "p_fails", "needed", "between")
        names = (*names, "values", "lost")
        written = {
            "p_fails": "p_does_not_hold", "needed": "seeds_needed", "between": "seeds_range",
        }  # fmt: skip
        findings = [{written.get(n, n): getattr(f, n) for n in names} for f in self.findings]
        return strict({**about, "findings": findings})

    def entries(self) -> list[dict[str, Any]]:
        """The lines that the ledger of looks is to have about it."""
        if self.course is not None:
            return self.course.entries(self.id)
        if not self.id or not any(f.n for f in self.findings):
            return []
        names = ("about", "verdict", "n", "p_holds", "p_fails", "values")
        found = {"event": "look", "claim": self.id, "design": "fixed", "n": self.seeds}
        about = {
            "verdict": self.verdict,
            "runs": self.runs,
            "lost": any(f.lost for f in self.findings),
        }
        compared = [{name: getattr(f, name) for name in names} for f in self.findings]
        return [looks.line({**found, **about, "comparisons": compared})]

    @property
    def runs(self) -> int:
        """How many pairs or runs its comparisons rest on, together."""
        return sum(f.n for f in self.findings)


def shared_objection(verdicts: Sequence[Verdict]) -> str:
    """Why all verdicts are exploratory, where all are for the same reason."""
    objections = {verdict.objection for verdict in verdicts}
    return objections.pop() if len(objections) == 1 else ""


def metric_of(verdict: Verdict) -> str:
    """The metric that a claim is about; an empty text where it names none."""
    stated = verdict.claim
    return str(stated.get("metric") or "") if isinstance(stated, Mapping) else ""


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
        timed = controls.loaded(Path(directory))
        runs.attrs = {**frame.attrs, "sweeps": {directory: sweep}, "controls": timed}
        registered, problem = _registration(Path(directory))
        given = {"sweep": sweep.name, "design": sweep.design, "until": sweep.about.get("until")}
        stated = [
            evaluate_one(
                claim, runs, number=number, registered=registered, problem=problem, **given
            )
            for number, claim in enumerate(sweep.claims, 1)
        ]
        noted = known_looks(Path(directory))
        verdicts += [_looked_at(verdict, noted.get(verdict.id, [])) for verdict in stated]
        if registered is not None:
            known = {verdict.id for verdict in stated}
            verdicts += [_dropped(sweep.name, one) for one in registered.dropped(known)]
    q = stats.false_discovery([verdict.p for verdict in verdicts])
    return [replace(verdict, q=value) for verdict, value in zip(verdicts, q, strict=True)]


def note_looks(directory: Path, verdicts: Sequence[Verdict]) -> None:
    """Write the looks behind verdicts into the ledger of their sweep, those that are not there."""
    entries = [entry for verdict in verdicts for entry in verdict.entries()]
    if entries:
        looks.ledger(directory).append_new(entries)


def _looked_at(verdict: Verdict, noted: Sequence[Mapping[str, Any]]) -> Verdict:
    """A verdict by the tests for a fixed number of seeds, marked where runs came after a look.

    A look that was inconclusive because runs were lost could not have ended the sweep.
    """
    if verdict.course is not None or not verdict.id:
        return verdict
    earlier = [
        int(entry["n"])
        for entry in noted
        if entry.get("runs", 0) < verdict.runs
        and not (entry.get("lost") and entry["verdict"] == OPEN)
    ]
    if not earlier:
        return verdict
    numbers = ", ".join(map(str, sorted(set(earlier))))
    objections = filter(None, (verdict.objection, f"looked at with n = {numbers}"))
    return replace(verdict, standing=EXPLORATORY, objection="; ".join(objections))


def _registration(directory: Path) -> tuple[Registration | None, str]:
    """The registration of a sweep, or why there is none."""
    try:
        found = registration.read(directory)
    except ResultsError as error:
        return None, str(error)
    return found, "" if found else f"the sweep has no {registration.REGISTRATION_FILE}"


def _dropped(sweep: str, entry: Mapping[str, Any]) -> Verdict:
    claim = entry["claim"]
    why = "it is registered, and the sweep file does not state it any more in these words"
    return Verdict(
        sweep, claim, text_of(claim), DROPPED, why, standing=REGISTERED, id=str(entry["id"])
    )


def evaluate_one(
    claim: Any,
    runs: pd.DataFrame,
    *,
    sweep: str = "",
    number: int = 1,
    design: Any = None,
    registered: Registration | None = None,
    problem: str = "it is not a claim of the sweep",
    until: str | None = None,
) -> Verdict:
    """The verdict on one claim.

    Args:
        claim: as stated, a mapping.
        runs: of its sweep.
        sweep: the sweep's name.
        number: the claim's place in the file.
        design: of the claims of the sweep that state none.
        registered: the registration of the sweep.
        problem: why there is none.
        until: ``decided`` where seeds were run until the claims were decided.
    """
    try:
        hypothesis = parse(claim, number, design)
        chosen = select(runs, hypothesis.get("where", {}))
        why = "there are no runs that it is about" if chosen.empty else ""
        if hypothesis.metric and hypothesis.metric not in runs:
            why = f"no run has the metric {hypothesis.metric}"
        found = [] if why else samples(hypothesis, chosen)
        if until == DECIDED and registered is None:
            raise ResultsError(f"it was to be decided seed by seed, and {problem}")
    except ResultsError as error:
        text = str(claim.get("text") or claim.get("type")) if isinstance(claim, dict) else ""
        return Verdict(sweep, claim, text, INVALID, str(error))
    objection = registered.objection(hypothesis) if registered else problem
    if until == DECIDED and registered is not None:
        verdict = _of_course(sweep, course(hypothesis, found, registered.seeds), why)
    else:
        verdict = _decide(sweep, hypothesis, [judge(hypothesis, one) for one in found], why)
    if hypothesis.type == "faster" and found and (known := runs.attrs.get("controls")):
        about = (hypothesis.metric, hypothesis.get("a"), hypothesis.alpha)
        words = controls.in_words(*about, chosen, known[0])
        verdict = replace(verdict, why=f"{verdict.why}; {words}")
    return replace(
        verdict,
        standing=EXPLORATORY if objection else REGISTERED,
        objection=objection,
        id=claim_id(hypothesis),
        scope=_scope(hypothesis, found, chosen),
    )


def _scope(hypothesis: Hypothesis, found: Sequence[Sample], runs: pd.DataFrame) -> str:
    """Over what a verdict generalises: only over what its runs vary in and its test counts."""
    if not found:
        return ""
    if hypothesis.type in ("matches", "bounded"):
        return "these runs alone"
    over = [name for name in found[0].over if name != CHECKPOINT]
    words = {SEED: "seeds (batches and sampling)"}
    parts = [f"new {words[name]}" if name in words else name for name in over]
    if CHECKPOINT in found[0].over:
        return f"over {' and '.join([*parts, f'new checkpoints ({CHECKPOINT})'])}"
    used = frozenset[str]().union(*(sample.run_ids for sample in found))
    known = runs.loc[runs["run_id"].isin(sorted(used)), CHECKPOINT] if CHECKPOINT in runs else []
    count = len(levels(v for v in known if parse_value(v) is not None))
    which = {0: "", 1: " of one checkpoint"}.get(count, f" of {count} checkpoints, each by itself")
    return f"over {' and '.join(parts)}{which}"


def _test_made(hypothesis: Hypothesis, found: Sequence[Finding]) -> str:
    """The test that was made, in words; a t test only where one was made."""
    words = WORDS[hypothesis.type]
    if "t test" not in words:
        return words
    ties = any(f.exact and f.tested for f in found)
    exact = "pairs that do not vary compared as numbers" if any(f.exact for f in found) else ""
    exact += ", with the chance of ties of a coarse metric" if ties else ""
    if any(f.tested and not f.exact for f in found):
        return f"{words}; {exact}" if exact else words
    return f"{'' if ties else 'no test: '}{exact}" if exact else "no test"


def _of_course(sweep: str, found: Course, why: str) -> Verdict:
    """The verdict of the looks at a claim, after every seed."""
    hypothesis, design = found.hypothesis, found.hypothesis.design
    verdict = OPEN if found.verdict == looks.OPEN else found.verdict
    if hypothesis.get("not", False):
        verdict = {HOLDS: FAILS, FAILS: HOLDS}.get(verdict, verdict)
    test = WORDS[hypothesis.type]
    ended = found.verdict in (HOLDS, FAILS)
    tested = any(sample.kind not in ("match", "range", "absent") for sample in found.samples)
    if tested:
        test = f"{looks.SEQUENTIAL[found.samples[0].kind == 'share']}, looked at from n = "
        test += f"{design.first} to at most {design.max_seeds}, alpha = {design.alpha:g}"
    return Verdict(
        sweep,
        hypothesis.stated,
        hypothesis.text,
        verdict,
        why or looks.words(found),
        test,
        found.n,
        found.n + found.expected() if found.goes_on and not why else None,
        findings=tuple(looks.findings(found)),
        # One that is undecided is counted among the claims of which some may be wrong.
        p=min(1.0, 2 * looks.p_value(found)) if ended else 1.0 if tested else math.nan,
        course=found,
    )


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
        p=_p_value(corrected),
    )


def _p_value(found: Sequence[Finding]) -> float:
    """The smaller p of both verdicts, twice, as the runs said which of them is meant."""
    tested = [f for f in found if f.tested]
    if not tested or any(f.verdict == FAILS and not f.tested for f in found):
        return math.nan
    return min(1.0, 2 * min(max(f.p_holds for f in tested), min(f.p_fails for f in tested)))


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
        elif all(f.n > 1 and "df" not in f.values for f in undecided):
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


DISCOVERY = (
    "q is a false discovery rate (Benjamini and Hochberg) over all claims here that were tested "
    "statistically: of the verdicts with at most this q, a share of at most q is expected to be "
    "wrong. Exact comparisons and bounds have none."
)


def false_discovery_words(verdict: Verdict) -> str:
    """The false discovery rate of a verdict that was decided; empty for others."""
    decided = verdict.verdict in (HOLDS, FAILS) and not math.isnan(verdict.q)
    return f"{verdict.q:.2g}" if decided else ""


# ---- terminal ------------------------------------------------------------------------------------

STYLES = {HOLDS: "green", FAILS: "red", OPEN: "yellow", UNDECIDED: "yellow",
          INVALID: "magenta", DROPPED: "cyan"}  # fmt: skip


def to_rich(verdicts: Sequence[Verdict]) -> RenderableType:
    """The verdicts for a terminal."""
    parts: list[RenderableType] = []
    for v in verdicts:
        head = Text(f"{v.verdict:<14} ", style=f"bold {STYLES[v.verdict]}")
        parts += [head + Text(f"{v.sweep}: {v.text}", style="bold"), _indented(v.explained)]
        if v.test:
            parts.append(_indented(f"{v.tested}; n = {v.seeds}", style="dim"))
    counts = {name: sum(v.verdict == name for v in verdicts) for name in STYLES}
    parts.append(Text(", ".join(f"{n} {name}" for name, n in counts.items() if n)))
    return Group(*parts)


def _indented(text: str, style: str = "") -> RenderableType:
    return Padding(Text(text, style=style), (0, 0, 0, 15))
