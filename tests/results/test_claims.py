"""Claims: a fixture for each type, verdict and lost cell, against tests done by hand."""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalOperand=false
# pyright: reportOptionalMemberAccess=false, reportOperatorIssue=false, reportOptionalIterable=false

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats as scipy_stats

from fisher_lab.results import evaluate, load
from fisher_lab.results.claims import INVALID, evaluate_one
from fisher_lab.results.hypotheses import FAILS, HOLDS, OPEN, TYPES, parse
from fisher_lab.results.values import ResultsError
from tests.results.run_directories import crossed, make_run, make_sweep, swept

A, B = {"kfac.policy": "all"}, {"kfac.policy": "auto"}


ERRORS = {"failed": RuntimeError("no"), "broke": FloatingPointError("layer h.0: not finite")}


def sweep_of(root: Path, groups: dict[str, list[float | str | None]]) -> Path:
    """A run for each number (``nan`` diverges, a text is a status, None was never run)."""
    for policy, numbers in groups.items():
        for seed, value in enumerate(numbers):
            settings = {"kfac.policy": policy, "seed": seed}
            more = {"error": ERRORS.get(value)} if value in ERRORS else {"status": value}
            if isinstance(value, float):
                more = {"metrics": {"m": value}}
            if value is not None:
                make_run(root / f"{policy}-{seed}", settings, **more)
    return root


EQUIVALENT = {"type": "equivalent", "metric": "m", "groups": {"kfac.policy": ["all", "auto"]}}
CLOSE = {**EQUIVALENT, "margin": 0.1}
STABLE = {"type": "stable", "metric": "m", "axis": "kfac/policy"}
STEADY = {**STABLE, "factor": 1.5}
OF_DAMPING = {"type": "stable", "metric": "m", "axis": "kfac.damping"}
FASTER = {"type": "faster", "metric": "m", "a": B, "b": A, "at_least": 1.2}
SMALLER = {**FASTER, "type": "smaller"}
MATCHES = {"type": "matches", "metric": "m", "a": B, "b": A, "tolerance": 1e-3}
VALUE = {"type": "matches", "metric": "m", "value": 100.0, "tolerance": 0.1}
BOUNDED = {"type": "bounded", "metric": "m", "at_most": 10.0}
BROKEN = {"type": "fails", "cells": B, "metric": "m", "above": 5.0}
SHARE = {"type": "share", "metric": "m", "above": 0.0, "at_most": 0.5}

NEAR, SAME, FAR = [1.01, 1.19, 1.12, 1.0], [1.0, 1.2, 1.1, 1.0], [2.0, 2.5, 2.2, 1.9]
NOISY = [0.6, 1.7, 0.4, 1.9]
FINE = [1.0123746182, 2.0371829467]
"""Too many digits to differ by the same number by chance."""

CASES = [
    # type and case, claim, numbers of the groups, verdict, words of the answer
    ("equivalent holds", CLOSE, {"all": SAME, "auto": NEAR}, HOLDS, "diff"),
    ("equivalent ratio", {**EQUIVALENT, "ratio": 1.1}, {"all": SAME, "auto": NEAR}, HOLDS, "rat"),
    ("equivalent exact", CLOSE, {"all": SAME, "auto": SAME}, HOLDS, "exact to 0"),
    ("equivalent constant shift", {**EQUIVALENT, "margin": 0.5},
     {"all": FINE, "auto": [v + 0.25 for v in FINE]}, HOLDS, "exact to 0.25"),
    ("equivalent exact outside", CLOSE,
     {"all": FINE, "auto": [v + 0.25 for v in FINE]}, FAILS, "0.25, exact"),
    ("equivalent coarse", {**EQUIVALENT, "margin": 0.5},
     {"all": [1.0, 2.0], "auto": [1.0, 2.0]}, OPEN, "may be chance: a coarse metric; 5 seeds"),
    ("equivalent coarse enough", {**EQUIVALENT, "margin": 0.5},
     {"all": [1.0, 2.0] * 3, "auto": [1.0, 2.0] * 3}, HOLDS, "exact to 0"),
    ("equivalent fails", CLOSE, {"all": SAME, "auto": FAR}, FAILS, "diff"),
    ("equivalent open", {**EQUIVALENT, "margin": 0.5}, {"all": SAME, "auto": NOISY}, OPEN,
     "seeds would decide"),
    ("equivalent failed cell", CLOSE,
     {"all": SAME, "auto": [*NEAR[:3], "failed"]}, OPEN, "1 failed"),
    ("equivalent diverged cell", CLOSE,
     {"all": SAME, "auto": [*NEAR[:3], math.nan]}, OPEN, "1 diverged"),
    ("equivalent missing cell", CLOSE, {"all": SAME, "auto": [*NEAR[:3], None]}, OPEN, "1 missing"),
    ("equivalent one seed", CLOSE, {"all": [1.0], "auto": [1.0]}, OPEN,
     "one seed, no test; 2 or more seeds would decide"),
    ("equivalent no pairs", CLOSE, {"all": SAME, "auto": ["failed"] * 4},
     OPEN, "nothing to compare"),
    ("stable holds", STEADY, {"all": SAME, "auto": NEAR, "hybrid": SAME}, HOLDS, "exact to 0"),
    ("stable identical", STEADY, {"all": [0.0, FINE[0]], "auto": [0.0, FINE[0]]},
     HOLDS, "identical"),
    ("stable zeros", STEADY, {"all": [0.0] * 4, "auto": [0.0] * 4}, OPEN, "give a margin"),
    ("stable fails", STEADY, {"all": SAME, "auto": FAR}, FAILS, "ratio"),
    ("stable open", STEADY, {"all": SAME, "auto": NOISY}, OPEN, "would decide"),
    ("stable sign", STEADY, {"all": SAME, "auto": [-1.0, -1.1, -0.9, -1.0]},
     FAILS, "the sign changes"),
    ("stable zero", STEADY, {"all": SAME, "auto": [0.0, 1.0, 1.0, 1.0]}, OPEN, "give a margin"),
    ("stable margin", {**STABLE, "margin": 0.2}, {"all": [-v for v in SAME],
     "auto": [-v for v in NEAR]}, HOLDS, "difference"),
    ("stable failed cell", STEADY, {"all": SAME, "auto": [*NEAR[:3], "failed"]}, OPEN, "1 failed"),
    ("stable broken cell", STEADY, {"all": SAME, "auto": [*NEAR[:3], "broke"]},
     FAILS, "1 diverged within the range"),
    ("stable diverged cell", {**STABLE, "factor": 2}, {"all": SAME, "auto": [*NEAR[:3], math.inf]},
     FAILS, "1 diverged within the range"),
    ("stable running cell", {**STABLE, "factor": 2}, {"all": SAME, "auto": [*NEAR[:3], "running"]},
     OPEN, "1 running"),
    ("faster holds", FASTER, {"all": [2.0, 2.1, 2.2], "auto": [1.0, 1.1, 1.05]}, HOLDS, "ratio"),
    ("faster fails", FASTER, {"all": [1.0, 1.1, 1.05], "auto": [1.0, 1.09, 1.06]}, FAILS, "ratio"),
    ("faster open", FASTER, {"all": [1.0, 1.9, 1.6], "auto": [1.0] * 3}, OPEN, "would decide"),
    ("faster zero", FASTER, {"all": [1.0, 1.0], "auto": [0.0, 1.0]}, OPEN, "no ratio"),
    ("faster exact", FASTER, {"all": [2 * v for v in FINE], "auto": FINE}, HOLDS, "ratio 2, exact"),
    ("faster failed cell", FASTER, {"all": [2.0, 2.1, "failed"], "auto": [1.0, 1.1, 1.05]}, OPEN,
     "1 failed"),
    ("smaller holds", SMALLER, {"all": [200.0] * 3, "auto": [1.0] * 3}, HOLDS, "exact"),
    ("smaller fails", SMALLER, {"all": [4096.0] * 3, "auto": [4096.0] * 3}, FAILS, "1, exact"),
    ("smaller coarse", SMALLER, {"all": [3.0] * 2, "auto": [2.0] * 2}, OPEN, "which may be chance"),
    ("smaller open", SMALLER, {"all": [3.0, 1.2, 1.1], "auto": [1.0] * 3}, OPEN, "would decide"),
    ("smaller failed cell", SMALLER, {"all": ["failed"] * 3, "auto": [1.0] * 3}, OPEN, "3 failed"),
    ("matches holds", MATCHES, {"all": [1.0, 2.0], "auto": [1.0001, 2.0]}, HOLDS, "to 0.0001"),
    ("matches fails", MATCHES, {"all": [1.0, 2.0], "auto": [1.01, 2.0]}, FAILS, "error 0.01"),
    ("matches open", MATCHES, {"all": [1.0, 2.0], "auto": [None, None, 3.0]}, OPEN, "nothing"),
    ("matches failed", MATCHES, {"all": [1.0, 2.0], "auto": ["failed", 2.0]}, OPEN, "1 failed"),
    ("matches value holds", VALUE, {"all": [95.0, 105.0]}, HOLDS, "exact to 0.05"),
    ("matches value fails", VALUE, {"all": [95.0, 125.0]}, FAILS, "relative error 0.25"),
    ("matches value lost", VALUE, {"all": [95.0, "failed"]}, OPEN, "1 failed"),
    ("bounded holds", BOUNDED, {"all": [1.0, 9.0]}, HOLDS, "from 1 to 9"),
    ("bounded fails", BOUNDED, {"all": [1.0, 11.0]}, FAILS, "from 1 to 11"),
    ("bounded lost", BOUNDED, {"all": [1.0, "failed"]}, OPEN, "1 failed"),
    ("bounded none", BOUNDED, {"all": [math.nan, "failed"]}, OPEN, "nothing to compare"),
    ("fails holds", BROKEN, {"auto": [6.0, math.nan, "failed", 9.0, 7.0], "all": SAME}, HOLDS,
     "5 of 5 failed or diverged"),
    ("fails does not", BROKEN, {"auto": [1.0] * 5, "all": SAME}, FAILS, "0 of 5"),
    ("fails open", BROKEN, {"auto": [6.0, 6.0, 6.0], "all": SAME}, OPEN, "5 to over 1000 runs"),
    ("fails running", BROKEN, {"auto": [6.0] * 5 + ["running"], "all": SAME}, OPEN, "1 missing"),
    ("share holds", SHARE, {"all": [0.0] * 8}, HOLDS, "0 of 8"),
    ("share fails", SHARE, {"all": [1.0] * 8}, FAILS, "8 of 8"),
    ("share open", SHARE, {"all": [0.0, 1.0, 0.0]}, OPEN, "runs would decide"),
    ("share lost", SHARE, {"all": [*[0.0] * 8, "failed"]}, OPEN, "1 failed"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("claim", "groups", "verdict", "words"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_verdicts(tmp_path, claim, groups, verdict, words):
    answer = evaluate_one(claim, load(sweep_of(tmp_path / "s", groups)))
    assert answer.verdict == verdict, answer.why
    assert words in answer.why
    json.dumps(answer.as_dict(), allow_nan=False)
    opposite = evaluate_one({**claim, "not": True}, load(tmp_path / "s"))
    assert opposite.verdict == {HOLDS: FAILS, FAILS: HOLDS, OPEN: OPEN}[verdict]


def test_every_type_has_every_verdict_among_the_cases():
    seen = {(claim["type"], verdict) for _, claim, _, verdict, _ in CASES}
    assert seen == {(kind, verdict) for kind in TYPES for verdict in (HOLDS, FAILS, OPEN)}


def test_the_p_values_are_those_of_the_two_one_sided_tests(tmp_path):
    frame = load(sweep_of(tmp_path / "s", {"all": SAME, "auto": NEAR}))
    (found,) = evaluate_one(CLOSE, frame).findings
    d = np.array(NEAR) - np.array(SAME)
    p = max(
        scipy_stats.ttest_1samp(d, -0.1, alternative="greater").pvalue,
        scipy_stats.ttest_1samp(d, 0.1, alternative="less").pvalue,
    )
    assert found.p_holds == pytest.approx(p)
    assert found.n == 4


def test_other_settings_are_strata_and_holm_spans_them(tmp_path):
    """One stratum of eight is off by what would be significant alone, and is not among eight."""
    rng = np.random.default_rng(3)
    bases = rng.normal(size=(8, 4))
    values = {"all": bases, "auto": bases + rng.normal(0, 0.01, (8, 4))}
    axes = {"kfac.policy": values, "kfac.damping": [10.0**-i for i in range(8)], "seed": range(4)}
    frame = swept(tmp_path, axes, lambda p, d, s: {"m": values[p][round(-math.log10(d)), s]})
    answer = evaluate_one({**EQUIVALENT, "margin": 0.2}, frame)
    assert (answer.verdict, len(answer.findings)) == (HOLDS, 8)
    tiny = evaluate_one({**EQUIVALENT, "margin": 1e-9}, frame)
    raw = [
        2 * min(scipy_stats.ttest_1samp(difference, s * 1e-9, alternative=a).pvalue
                for s, a in ((1, "greater"), (-1, "less")))
        for difference in values["auto"] - values["all"]
    ]  # fmt: skip
    assert sorted(f.p_fails for f in tiny.findings)[0] == pytest.approx(min(min(raw) * 8, 1))


def test_a_range_of_an_axis(tmp_path):
    axes = {"kfac.damping": (1e-5, 1e-4, 3e-4, 1e-3), "seed": range(3)}
    frame = swept(tmp_path, axes, lambda d, s: {"m": (100.0 if d < 1e-4 else 1.0) + 0.01 * s})
    stable = {**OF_DAMPING, "factor": 2}
    robust = evaluate_one({**stable, "from": "1e-4", "to": "1e-3"}, frame)
    whole = evaluate_one(stable, frame)
    assert (robust.verdict, len(robust.findings)) == (HOLDS, 3)
    assert (whole.verdict, len(whole.findings)) == (FAILS, 6)
    assert evaluate_one({**stable, "from": 7}, frame).verdict == OPEN
    named = evaluate_one({**stable, "values": ["1e-4", 1e-3]}, frame)
    assert (named.verdict, len(named.findings)) == (HOLDS, 1)


def test_a_range_that_was_not_run_to_its_ends_is_open(tmp_path):
    """Nothing at 1e-5: what holds from 1e-4 on is not known to hold from 1e-5 on."""
    axes = {"kfac.damping": (1e-4, 1e-3), "seed": range(3)}
    frame = swept(tmp_path, axes, lambda d, s: {"m": 1.0 + 0.01 * s})
    stable = {**OF_DAMPING, "factor": 2}
    assert evaluate_one({**stable, "from": "1e-4", "to": "1e-3"}, frame).verdict == HOLDS
    for ends, absent in (
        ({"from": "1e-5", "to": "1e-3"}, "1e-5"),
        ({"from": "1e-4", "to": "1e-2"}, "0.01"),
        ({"from": "1e-5"}, "1e-5"),
    ):
        answer = evaluate_one({**stable, **ends}, frame)
        assert (answer.verdict, answer.seeds_needed) == (OPEN, None)
        assert answer.why == f"kfac.damping={absent}: nothing was run there (1 of 2 comparisons)"
    # A range that was left on the way is left, whatever its ends.
    far = crossed({"kfac.damping": [5e-4], "seed": range(3)}, lambda d, s: {"m": 100 + 0.01 * s})
    make_sweep(tmp_path / "s" / "more", far)
    frame = load(tmp_path / "s")
    assert evaluate_one({**stable, "from": "1e-5", "to": "1e-3"}, frame).verdict == FAILS


def unstable(root: Path, lost: dict[float, BaseException | None], **more: object) -> str:
    """The verdict on "not stable" of two dampings that agree, where one run of each may be lost.

    An error is what the run failed with; None stands for one whose metric is NaN.
    """
    for damping in (1e-5, 1e-4):
        for seed in range(4):
            settings = {"kfac.damping": damping, "seed": seed}
            gone = seed == 3 and damping in lost
            error = lost[damping] if gone else None
            value = math.nan if gone else 1.0 + 0.1 * seed + 0.001 * seed * (damping == 1e-5)
            make_run(root / f"{damping}-{seed}", settings, {"m": value}, error=error)
    claim = {**OF_DAMPING, "not": True, "values": ["1e-5", "1e-4"], "margin": 0.05, **more}
    return evaluate_one(claim, load(root)).verdict


LOST = [
    # lost runs, further keys of the claim, verdict on "unstable at 1e-5"
    ({}, {}, FAILS),
    ({}, {"at": "1e-5"}, FAILS),
    ({1e-4: MemoryError("no room")}, {}, OPEN),
    ({1e-5: MemoryError("no room")}, {"at": 1e-5}, OPEN),
    ({1e-5: TimeoutError("ran longer than sweep.timeout_s=3")}, {}, OPEN),
    ({1e-5: None}, {}, HOLDS),
    ({1e-5: None}, {"at": "1e-5"}, HOLDS),
    ({1e-5: FloatingPointError("not finite")}, {"at": "1e-5"}, HOLDS),
    ({1e-4: None}, {"at": "1e-5"}, OPEN),
    ({1e-4: None}, {}, HOLDS),
    ({1e-4: MemoryError("no room"), 1e-5: None}, {"at": "1e-5"}, HOLDS),
]


@pytest.mark.parametrize(("lost", "more", "verdict"), LOST)
def test_a_lost_run_proves_no_instability_unless_it_diverged_there(tmp_path, lost, more, verdict):
    assert unstable(tmp_path / "s", lost, **more) == verdict


def test_at_compares_one_value_with_the_others(tmp_path):
    axes = {"kfac.damping": (1e-5, 1e-4, 1e-3), "seed": range(3)}
    frame = swept(tmp_path, axes, lambda d, s: {"m": (9.0 if d == 1e-3 else 1.0) + 0.01 * s})
    stable = {**OF_DAMPING, "margin": 0.1}
    at = evaluate_one({**stable, "at": "1e-4"}, frame)
    assert [f.about for f in at.findings] == [
        "kfac.damping: 1e-4 against 1e-5", "kfac.damping: 0.001 against 1e-4"
    ]  # fmt: skip
    assert evaluate_one({**stable, "at": "1e-5", "values": [1e-5, 1e-4]}, frame).verdict == HOLDS
    nowhere = evaluate_one({**stable, "at": "1e-6"}, frame)
    assert (nowhere.verdict, "kfac.damping=1e-6: nothing was run" in nowhere.why) == (OPEN, True)


def test_shares_are_corrected_over_the_comparisons(tmp_path):
    """3 of 5 above is shown to be more than a tenth alone, and not among twenty settings."""
    axes = {"kfac.damping": [10.0**-i for i in range(20)], "seed": range(5)}
    frame = swept(tmp_path, axes, lambda d, s: {"m": float(d == 1.0 and s < 3)})
    claim = {"type": "share", "metric": "m", "at_most": 0.1}
    alone = evaluate_one({**claim, "where": {"kfac.damping": 1}}, frame)
    (found,) = alone.findings
    known = scipy_stats.binomtest(3, 5, 0.1, alternative="greater").pvalue
    assert (alone.verdict, found.p_fails) == (FAILS, pytest.approx(known))
    among = evaluate_one({**claim, "by": ["kfac.damping"]}, frame)
    assert max(f.verdict == FAILS for f in among.findings) == 0
    worst = min(among.findings, key=lambda f: f.p_fails)
    assert (worst.verdict, worst.p_fails) == (OPEN, pytest.approx(20 * known))
    assert among.verdict == OPEN
    assert worst.needed is not None
    enough = scipy_stats.binomtest(round(0.6 * worst.needed), worst.needed, 0.1, "greater")
    assert enough.pvalue < 0.05 / 20
    broken = {"type": "fails", "metric": "m", "above": 0.5, "share": 0,
              "cells": {"kfac.damping": "1e-1"}}  # fmt: skip
    assert evaluate_one(broken, frame).verdict == OPEN  # none of five is not "more than none"


def test_the_answer_names_the_test_that_was_made_and_its_interval(tmp_path):
    tested = evaluate_one(CLOSE, load(sweep_of(tmp_path / "a", {"all": SAME, "auto": NEAR})))
    assert tested.test == "two one-sided paired t tests"
    assert ", 90% interval [" in tested.why
    strict = evaluate_one({**CLOSE, "alpha": 0.01}, load(tmp_path / "a"))
    assert ", 98% interval [" in strict.why
    exact = evaluate_one(CLOSE, load(sweep_of(tmp_path / "b", {"all": SAME, "auto": SAME})))
    assert exact.test.endswith("as numbers, with the chance of ties of a coarse metric")
    fine = {"all": FINE, "auto": FINE}
    exact = evaluate_one(CLOSE, load(sweep_of(tmp_path / "f", fine)))
    assert exact.test == "no test: pairs that do not vary compared as numbers"
    both = {**CLOSE, "groups": {"kfac.policy": ["all", "auto", "hybrid"]}}
    groups = {"all": SAME, "auto": SAME, "hybrid": NEAR}
    mixed = evaluate_one(both, load(sweep_of(tmp_path / "c", groups)))
    assert mixed.test.startswith("two one-sided paired t tests; pairs that do not vary")
    none = evaluate_one(CLOSE, load(sweep_of(tmp_path / "d", {"all": SAME, "auto": ["failed"]})))
    assert none.test == "no test"
    share = evaluate_one(SHARE, load(tmp_path / "a"))
    assert "8 of 8 above 0: 100%, 90% interval [69%, 100%]" in share.why


def test_claims_of_a_sweep_are_about_its_own_runs(tmp_path):
    axes = {"kfac.policy": ("all", "auto"), "seed": (1, 2)}
    cells = crossed(axes, lambda p, s: {"m": s / 7919.0})
    make_sweep(tmp_path / "r" / "one", cells, claims=[{**EQUIVALENT, "margin": 1, "text": "same"}])
    make_sweep(tmp_path / "r" / "two", [({"seed": 0}, {"m": 99.0})], claims=[BOUNDED])
    verdicts = evaluate(load(tmp_path / "r"))
    assert [(v.sweep, v.verdict) for v in verdicts] == [("one", HOLDS), ("two", FAILS)]
    assert verdicts[0].text == "same"


def test_a_range_of_seeds_is_named_and_of_many_comparisons_the_one_that_decides(tmp_path):
    """Ten comparisons that lean to fail: the quickest one decides the claim, not the slowest."""
    gains = {f"{i}": 0.3 + 0.2 * i for i in range(10)}
    rng = np.random.default_rng(3)
    axes = {"kfac.policy": ["base", *gains], "seed": range(3)}
    frame = swept(tmp_path, axes, lambda p, s: {"m": gains.get(p, 0.0) + rng.normal(0, 1)})
    claim = {**STABLE, "margin": 0.1, "at": "base"}
    answer = evaluate_one(claim, frame)
    undecided = [f for f in answer.findings if f.verdict == OPEN]
    assert answer.verdict == OPEN
    assert answer.seeds_needed == min(f.needed or math.inf for f in undecided if f.p_holds > 0.5)
    assert answer.seeds_needed < max(f.needed or math.inf for f in undecided)
    low, high = answer.seeds_range or (None, None)
    assert low <= answer.seeds_needed <= (high or math.inf)
    assert f"{low} to " in answer.why
    written = answer.as_dict()
    assert written["seeds_range"] == [low, high]
    # Where all have to hold, the slowest one decides.
    answer = evaluate_one({**claim, "margin": 6.0}, frame)
    undecided = [f for f in answer.findings if f.verdict == OPEN]
    assert all(f.p_holds < 0.5 for f in undecided)
    assert answer.seeds_needed == max(f.needed for f in undecided)


def test_where_narrows_and_nothing_left_is_open(tmp_path):
    frame = load(sweep_of(tmp_path / "s", {"all": [1.0, 20.0], "auto": [1.0, 2.0]}))
    assert evaluate_one({**BOUNDED, "where": B}, frame).verdict == HOLDS
    nothing = evaluate_one({**BOUNDED, "where": {"kfac.policy": "hybrid"}}, frame)
    assert (nothing.verdict, nothing.why) == (OPEN, "there are no runs that it is about")
    unknown = evaluate_one({**BOUNDED, "metric": "z"}, frame)
    assert (unknown.verdict, unknown.why) == (OPEN, "no run has the metric z")
    wrong = evaluate_one({**BOUNDED, "where": {"kfac.polcy": "all"}}, frame)
    assert (wrong.verdict, "did you mean kfac.policy" in wrong.why) == (INVALID, True)


WRONG = [
    ("text", "is not a mapping"),
    ({"type": "fast"}, "type=fast is not allowed: one of equivalent"),
    ({**EQUIVALENT}, "give exactly one of margin and ratio"),
    ({**EQUIVALENT, "margin": 1, "ratio": 2}, "give exactly one of margin and ratio"),
    ({**EQUIVALENT, "margin": 0}, "margin=0 is not allowed: above 0"),
    ({**EQUIVALENT, "margin": "much"}, "margin=much is not a number"),
    ({**EQUIVALENT, "ratio": 1}, "ratio=1 is not allowed: above 1"),
    (
        {**EQUIVALENT, "margin": 1, "name": "a b"},
        "name=a b is not allowed: letters, digits and hyphens",
    ),
    ({**EQUIVALENT, "margin": 1, "name": "7"}, "name=7 is not allowed"),
    ({**EQUIVALENT, "margn": 1}, "there is no key margn; did you mean margin?"),
    ({**EQUIVALENT, "margin": 1, "groups": {"a": ["b"]}}, "two values or more"),
    ({**EQUIVALENT, "margin": 1, "alpha": 0.7}, "alpha=0.7 is not allowed"),
    ({"type": "faster", "metric": "m", "a": A}, "b is missing"),
    ({**FASTER, "at_most": 1.1}, "at_least must be above 0 and below at_most"),
    ({**MATCHES, "value": 3}, "give exactly one of b and value"),
    ({"type": "matches", "metric": "m", "value": 3, "tolerance": 1, "a": A}, "give a and b"),
    ({"type": "bounded", "metric": "m"}, "give one of at_most and at_least"),
    ({"type": "fails", "cells": B, "above": 1}, "above needs a metric"),
    ({**STABLE, "margin": 1, "at": 3, "values": [1, 2]}, "at=3 is not among its values"),
    ({**FASTER, "not": "yes"}, "not=yes is not allowed: true or false"),
]


@pytest.mark.parametrize(("claim", "words"), WRONG, ids=[w for _, w in WRONG])
def test_claims_that_are_wrong_say_so_in_one_line(claim, words):
    with pytest.raises(ResultsError, match="claim 1") as caught:
        parse(claim)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
