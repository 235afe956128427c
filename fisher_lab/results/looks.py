"""Looks at a claim after every seed, by its registered design, and the ledger of all looks.

What is decided is a function of the completed runs and of the registration alone: the look with n
seeds is at the first n seeds of the registered order, and it is made once all of them are there. A
sweep that was killed, or that two launchers ran, therefore comes to the same looks and verdicts.

``.sweep/looks.jsonl`` in the sweep's directory is the ledger, append-only. A line is a look: time,
claim (its identity), design (``sequential`` or ``fixed``), n, verdict, and for each comparison the
statistics and what they had to reach.
"""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fisher_lab.results import fixed_tests, sequential
from fisher_lab.results.coarse import ROUNDING
from fisher_lab.results.comparisons import Sample
from fisher_lab.results.hypotheses import FAILS, HOLDS, Hypothesis
from fisher_lab.results.sequential import OPEN, UNDECIDED, Design, conclude
from fisher_lab.results.values import SEED, ResultsError, label, order, parse_value
from fisher_lab.runs.journal import Journal
from fisher_lab.runs.record import strict
from fisher_lab.runs.status import UNFINISHED, Status

LEDGER_FILE = "looks.jsonl"
WAITING = (*UNFINISHED, Status.CANCELLED)
"""States of a run that may still come to a number without being asked to run again."""

SEQUENTIAL = (
    "paired t tests that may be looked at after every seed (Lan and DeMets)",
    "tests of a share that may be looked at after every run (Lan and DeMets)",
)
"""The test in words, of means and of shares."""


def ledger(directory: Path) -> Journal:
    """The ledger of a sweep's directory."""
    return Journal(directory / ".sweep" / LEDGER_FILE, directory / ".sweep" / "locks")


@dataclass(frozen=True)
class Look:
    """A look at a claim with some seeds.

    Attributes:
        n: seeds, or runs of a share.
        verdict: ``go on``, ``holds``, ``does not hold`` or ``undecided``, of the claim as it is
            stated but for its ``not``.
        answers: of each comparison, in their order: its path, or the verdict of a comparison of
            numbers with the reason.
    """

    n: int
    verdict: str
    answers: tuple[sequential.Path | tuple[str, str], ...]

    def entry(self, claim: str, abouts: Iterable[str]) -> dict[str, Any]:
        """The line of the ledger."""
        compared = [
            {"about": about, **_numbers(answer)}
            for about, answer in zip(abouts, self.answers, strict=True)
        ]
        found = {"event": "look", "claim": claim, "design": "sequential", "n": self.n}
        found["verdict"] = self.verdict
        return line({**found, "comparisons": compared})


def line(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A line of the ledger as JSON has it; its numbers to 12 digits, in which machines agree."""
    return json.loads(
        json.dumps(strict(entry)), parse_float=lambda text: float(f"{float(text):.12g}")
    )


def _numbers(answer: sequential.Path | tuple[str, str]) -> dict[str, Any]:
    """Statistics and boundaries of a look; what is not finite is null."""
    if isinstance(answer, tuple):
        return {"verdict": answer[0], "why": answer[1]}
    at = len(answer.n) - 1
    return {
        "lower": float(answer.lower[at]),
        "upper": float(answer.upper[at]),
        "holds": [float(one[at]) for one in answer.holds_at],
        "fails": [float(one[at]) for one in answer.fails_at],
    }


@dataclass(frozen=True)
class Course:
    """All looks at a claim that its runs allow.

    Attributes:
        hypothesis: the claim.
        samples: its comparisons.
        looks: in their order; the last one decides, if any does.
        verdict: of the last look; ``go on`` where there is none.
        waits: why no further look can be made now, and running further seeds alone does not help;
            empty where it does.
    """

    hypothesis: Hypothesis
    samples: tuple[Sample, ...]
    looks: tuple[Look, ...]
    verdict: str
    waits: str = ""

    @property
    def n(self) -> int:
        """Seeds of the last look."""
        return self.looks[-1].n if self.looks else 0

    @property
    def goes_on(self) -> bool:
        """Whether further seeds can decide it."""
        return self.verdict == OPEN and not self.waits

    @property
    def run_ids(self) -> frozenset[str]:
        """The runs that it is about."""
        return frozenset[str]().union(*(sample.run_ids for sample in self.samples))

    def entries(self, claim: str) -> list[dict[str, Any]]:
        """The lines of the ledger."""
        abouts = [sample.about for sample in self.samples]
        return [look.entry(claim, abouts) for look in self.looks]

    def expected(self) -> int:
        """How many further seeds decide it, if means and spreads stay as they are; at least 1."""
        design = self.hypothesis.design
        last = self.looks[-1].answers if self.looks else ()
        trends = [
            _projected(sample, answer)
            for sample, answer in zip(self.samples, last, strict=False)
            if isinstance(answer, sequential.Path)
        ]
        if not trends:
            return max(design.first - self.n, 1)
        held, failed = (np.stack(side) for side in zip(*trends, strict=True))
        decided = held.all(axis=0) | failed.any(axis=0)
        return int(decided.argmax()) + 1 if decided.any() else max(design.max_seeds - self.n, 1)


def _projected(sample: Sample, path: sequential.Path) -> tuple[np.ndarray, np.ndarray]:
    """Whether a comparison holds, or fails, at each look to come if its trend goes on."""
    looks = len(path.n)
    ahead = np.arange(1, len(path.holds_at[0]) - looks + 1) + path.n[-1]
    grown = (ahead / path.n[-1]) ** (1.0 if sample.kind == "share" else 0.5)
    lower, upper = float(path.lower[-1]) * grown, float(path.upper[-1]) * grown
    above = lower >= path.holds_at[0][looks:]
    below = upper <= path.holds_at[1][looks:]
    failed = (lower <= path.fails_at[0][looks:]) | (upper >= path.fails_at[1][looks:])
    return above & below | bool(path.held[-1]), failed


# ---- the course ----------------------------------------------------------------------------------


def seeds_in_order(registered: Sequence[int], many: int) -> list[int]:
    """The first seeds of the order in which they are looked at.

    Those that are registered come first; whole numbers from above the largest of them follow.
    """
    following = max(registered, default=-1) + 1
    return [*registered, *range(following, following + many)][:many]


def course(hypothesis: Hypothesis, samples: Sequence[Sample], registered: Sequence[int]) -> Course:
    """All looks at a claim that its runs allow, until one decides it.

    Args:
        hypothesis: the claim.
        samples: its comparisons.
        registered: seeds, in the order in which they are looked at.
    """
    design, samples = hypothesis.design, tuple(samples)
    if why := _unfit(samples):
        return Course(hypothesis, samples, (), OPEN, why)
    seeds = seeds_in_order(registered, design.max_seeds)
    units = [_units(sample, seeds) for sample in samples]
    ready, waits = min(
        (_ready(sample, keys) for sample, keys in zip(samples, units, strict=True)),
        key=lambda found: found[0],
    )
    looks: list[Look] = []
    for n in range(design.first, min(ready, design.max_seeds) + 1):
        looks.append(_look(hypothesis, samples, units, n))
        if looks[-1].verdict != OPEN:
            return Course(hypothesis, samples, tuple(looks), looks[-1].verdict)
    return Course(hypothesis, samples, tuple(looks), OPEN, waits)


def _unfit(samples: Sequence[Sample]) -> str:
    """Why a claim cannot be looked at seed by seed, in words; empty where it can."""
    if not samples:
        return "there is nothing to compare"
    over = samples[0].over
    if SEED not in over:
        return f"it runs over {', '.join(over)} and not over seeds, so that no look follows another"
    if samples[0].kind != "share" and len(over) > 1:
        others = ", ".join(name for name in over if name != SEED)
        return f"it runs over seeds and {others}, which are tested for a fixed number of runs"
    return ""


def _units(sample: Sample, seeds: Sequence[int]) -> list[Hashable]:
    """The pairing keys in the order of the looks: by seed, then by what is pooled."""
    at = sample.over.index(SEED)
    known: list[Any] = [*sample.keys, *sample.without, *sample.diverged]
    rests = {(*key[:at], *key[at + 1 :]) for key in known}
    ordered = sorted(rests, key=lambda rest: [order(value) for value in rest])
    if sample.kind == "absent":
        ordered = [()]
    return [(*rest[:at], parse_value(seed), *rest[at:]) for seed in seeds for rest in ordered]


def _ready(sample: Sample, units: Sequence[Hashable]) -> tuple[int, str]:
    """How many units from the first one on can be looked at, and why the next one cannot."""
    if sample.kind == "absent":
        return len(units), ""
    there = {*sample.keys, *sample.diverged}
    for count, unit in enumerate(units):
        if unit in there:
            continue
        state = sample.without.get(unit, Status.MISSING)
        assert isinstance(unit, tuple)
        which = ", ".join(f"{name}={label(v)}" for name, v in zip(sample.over, unit, strict=True))
        return count, "" if state in WAITING else f"a run with {which} is lost ({state})"
    return len(units), ""


def _look(
    hypothesis: Hypothesis, samples: Sequence[Sample], units: Sequence[Sequence[Hashable]], n: int
) -> Look:
    """The look with the first n units."""
    many = len(samples)
    answers = tuple(
        _answer(hypothesis, sample, keys[:n], many)
        for sample, keys in zip(samples, units, strict=True)
    )
    paths = [one for one in answers if isinstance(one, sequential.Path)]
    settled = {one[0] for one in answers if isinstance(one, tuple)}
    verdict = str(conclude(paths, hypothesis.design)[0]) if paths else HOLDS
    if FAILS in settled:
        verdict = FAILS
    elif UNDECIDED in settled and verdict != FAILS:
        verdict = UNDECIDED
    return Look(n, verdict, answers)


def _answer(
    hypothesis: Hypothesis, sample: Sample, keys: Sequence[Hashable], many: int
) -> sequential.Path | tuple[str, str]:
    """What a look sees of one comparison."""
    if sample.kind == "absent":
        return UNDECIDED, sample.words
    if broken := set(keys) & set(sample.diverged):
        return FAILS, f"{len(broken)} diverged within the range"
    part, design = sample.of(keys), hypothesis.design
    if sample.kind == "share":
        lower, upper = share_bounds(sample)
        return sequential.shares(part.x.to_numpy(), lower, upper, design, many)
    if sample.kind in ("match", "range"):
        found = fixed_tests.judge(hypothesis, part)
        return found.verdict, found.says
    found = fixed_tests.differences(part)
    if isinstance(found, tuple):
        verdict, why = found
        return (verdict if verdict in (HOLDS, FAILS) else UNDECIDED), why
    d = found.d
    if np.ptp(d) <= ROUNDING * found.scale:  # rounding is no spread
        d = np.full_like(d, d.mean())
    return sequential.means(d, *sample.bounds, design, many, found.step)


def share_bounds(sample: Sample) -> tuple[float, float]:
    """The bounds of a share; minus and plus infinity where there is none."""
    lower, upper = sample.bounds
    low, high = (
        min(max(bound, sequential.CERTAIN), 1 - sequential.CERTAIN) for bound in (lower, upper)
    )
    return (low if lower >= 0 else -math.inf), (high if upper < 1 else math.inf)


def findings(found: Course) -> list[fixed_tests.Finding]:
    """The comparisons as the last look saw them."""
    if not found.looks:
        return []
    last = found.looks[-1]
    return [
        fixed_tests.Finding(
            sample.about,
            answer[0] if isinstance(answer, tuple) else _verdict(answer),
            last.n,
            _text(sample, answer),
            values={} if isinstance(answer, tuple) else _last(answer),
        )
        for sample, answer in zip(found.samples, last.answers, strict=True)
    ]


def _verdict(path: sequential.Path) -> str:
    return FAILS if path.failed[-1] else HOLDS if path.held[-1] else OPEN


def _last(path: sequential.Path) -> dict[str, float]:
    return {"lower": float(path.lower[-1]), "upper": float(path.upper[-1])}


# ---- p values and words --------------------------------------------------------------------------


def p_value(found: Course) -> float:
    """P of the verdict of a claim that was decided; NaN where no statistical test decided it.

    "Holds": the largest p of the comparisons and of their bounds, each where it passed its boundary
    first. "Does not hold": the smallest, times the comparisons and bounds that share the level.
    """
    if found.verdict not in (HOLDS, FAILS):
        return math.nan
    answers = found.looks[-1].answers
    if any(isinstance(one, tuple) and one[0] == found.verdict for one in answers):
        return math.nan
    known = [
        value
        for sample, path in zip(found.samples, answers, strict=True)
        if isinstance(path, sequential.Path)
        for value in _sides(sample, path, found.hypothesis.design, len(answers), found.verdict)
    ]
    return min(1.0, max(known) if found.verdict == HOLDS else min(known)) if known else math.nan


def _sides(
    sample: Sample, path: sequential.Path, design: Design, many: int, verdict: str
) -> list[float]:
    """P of each bound of a comparison that has been passed, inwards or outwards."""
    bounds = share_bounds(sample) if sample.kind == "share" else sample.bounds
    real = [math.isfinite(bound) for bound in bounds]
    holds = verdict == HOLDS
    part = 1 if holds else max(sum(real), 1) * many
    found = []
    for side, (bound, statistics) in enumerate(zip(bounds, (path.lower, path.upper), strict=True)):
        limits = (path.holds_at if holds else path.fails_at)[side][: len(path.n)]
        upwards = (side == 0) == holds
        passed = statistics >= limits if upwards else statistics <= limits
        if not real[side] or not passed.any():
            continue
        at = int(passed.argmax())
        n, value, level = int(path.n[at]), float(statistics[at]), design.alpha / part
        if sample.kind == "share":
            count = int(value) if upwards else n - int(value)
            share = bound if upwards else 1 - bound
            p = sequential.share_p_value(design, share, count, n, level)
        else:
            p = sequential.t_p_value(design, value if upwards else -value, n, level)
        found.append(part * p)
    return found


def words(found: Course) -> str:
    """What a claim has come to, with the comparison that decided it or that is furthest from it."""
    design, unit = found.hypothesis.design, "runs" if _counts_runs(found) else "seeds"
    if not found.looks:
        return found.waits or f"the first look is with {design.first} {unit}"
    last = found.looks[-1]
    abouts = [sample.about for sample in found.samples]
    texts = [_text(*one) for one in zip(found.samples, last.answers, strict=True)]
    worst = deciding(found)
    assert worst is not None
    said = [f"{abouts[worst]}: {texts[worst]}, n = {last.n}"]
    if len(texts) > 1:
        said[0] += f" (of {len(texts)} comparisons)"
    if found.verdict == OPEN:
        said.append(found.waits or f"goes on to at most {design.max_seeds} {unit}")
    elif found.verdict == UNDECIDED and isinstance(last.answers[worst], sequential.Path):
        over = last.n == design.max_seeds
        why = "all that were allowed" if over else f"more, up to {design.max_seeds}, will hardly do"
        said.append(f"undecided by {last.n} {unit}: {why}")
    return "; ".join(said)


def deciding(found: Course) -> int | None:
    """The comparison that decided, or that is furthest from holding; None without a look."""
    if not found.looks:
        return None
    answers = found.looks[-1].answers
    return max(range(len(answers)), key=lambda i: _doubt(answers[i], found.verdict))


def _counts_runs(found: Course) -> bool:
    return any(sample.kind == "share" for sample in found.samples)


def _doubt(answer: sequential.Path | tuple[str, str], verdict: str) -> tuple[float, float]:
    """A key to sort by: the comparison that decided, or that is furthest from holding, is last."""
    if isinstance(answer, tuple):
        return (2.0 if answer[0] != HOLDS else 0.0), 0.0
    if verdict == FAILS:
        return (1.5 if answer.failed[-1] else 0.0), 0.0
    held = int(answer.held.argmax()) if answer.held.any() else len(answer.held)
    margin = min(float(np.nan_to_num(answer.lower[-1])), -float(np.nan_to_num(answer.upper[-1])))
    return held / (len(answer.held) + 1), -margin


def _text(sample: Sample, answer: sequential.Path | tuple[str, str]) -> str:
    """A comparison at its last look in words."""
    if isinstance(answer, tuple):
        return answer[1]
    count = int(answer.n[-1])
    if sample.kind == "share":
        return f"{int(answer.lower[-1])} of {count} {sample.words}"
    sides = zip(("lower", "upper"), (answer.lower, answer.upper), sample.bounds, strict=True)
    return " and ".join(
        f"t = {float(statistic[-1]):.3g} from the {name} bound"
        for name, statistic, bound in sides
        if math.isfinite(bound)
    )


def known_looks(directory: Path) -> dict[str, list[Mapping[str, Any]]]:
    """Identity of a claim -> the lines of the ledger about it.

    Raises:
        ResultsError: the ledger cannot be read.
    """
    found: dict[str, list[Mapping[str, Any]]] = {}
    try:
        for entry in ledger(directory).read():
            found.setdefault(str(entry.get("claim")), []).append(entry)
    except OSError as error:
        raise ResultsError(f"{LEDGER_FILE} cannot be read: {error.strerror or error}") from error
    return found
