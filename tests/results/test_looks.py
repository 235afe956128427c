"""Looks at claims: a function of the runs and of the registered order, and what is said of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from fisher_lab.results import evaluate, load, paper, registration, report, sequential
from fisher_lab.results.claims import DROPPED, note_looks
from fisher_lab.results.comparisons import samples
from fisher_lab.results.hypotheses import FAILS, HOLDS, OPEN, parse
from fisher_lab.results.look_figures import path_figure
from fisher_lab.results.looks import Course, course, ledger, seeds_in_order
from fisher_lab.results.sequential import UNDECIDED, Design
from tests.results.run_directories import crossed, make_run, make_sweep

DESIGN = {"max_seeds": 12}
CLOSE = {
    "type": "equivalent", "metric": "m", "groups": {"kfac.policy": ["all", "auto"]}, "margin": 1.0,
    "design": DESIGN,
}  # fmt: skip
FASTER = {"type": "faster", "metric": "m", "a": {"kfac.policy": "auto"},
          "b": {"kfac.policy": "all"}, "at_least": 1.2, "design": DESIGN}  # fmt: skip
OPEN_YET = sequential.OPEN


def noisy(shift: float = 0.0, spread: float = 0.3) -> Callable[..., Mapping[str, float]]:
    def measure(policy: str, seed: int) -> Mapping[str, float]:
        rng = np.random.default_rng([seed, len(policy)])
        return {"m": 5.0 + shift * (policy == "auto") + spread * float(rng.normal())}

    return measure


def sweep(
    root: Path,
    claims: Sequence[Mapping[str, Any]],
    seeds: Sequence[int],
    measure: Callable[..., Mapping[str, float]],
    *,
    until: str | None = "decided",
    registered: Sequence[int] = (0, 1, 2),
) -> Path:
    """A sweep over two policies that was registered before it was run."""
    registration.register(root, list(map(parse, claims)), {"seeds": list(registered), "cells": []})
    cells = crossed({"kfac.policy": ["all", "auto"], "seed": seeds}, measure)
    axes = {"kfac.policy": ["all", "auto"], "seed": list(map(str, seeds))}
    return make_sweep(root, cells, claims=claims, axes=axes, until=until)


def course_of(claim: Mapping[str, Any], directory: Path, seeds: Sequence[int] = (0, 1)) -> Course:
    hypothesis = parse(claim)
    return course(hypothesis, samples(hypothesis, load(directory)), seeds)


def verdict_and_n(found: Course) -> tuple[str, int]:
    return found.verdict, found.n


def test_a_course_is_that_of_the_sequential_test_with_the_seeds_in_their_order(tmp_path):
    """Whatever the order in which runs lie in the directory, and whatever came after a look."""
    seeds = [7, 3, 0, *range(8, 17)]
    directory = sweep(tmp_path / "s", [CLOSE], sorted(seeds, reverse=True), noisy())
    measure = noisy()
    d = np.array([measure("auto", s)["m"] - measure("all", s)["m"] for s in seeds])
    design = Design(max_seeds=12)
    verdict, n = sequential.conclude([sequential.means(d, -1.0, 1.0, design)], design)
    found = course_of(CLOSE, directory, [7, 3, 0])
    assert verdict_and_n(found) == (verdict, n) == (HOLDS, n)
    assert 3 < n < 12
    path = found.looks[-1].answers[0]
    assert isinstance(path, sequential.Path)
    assert path.lower == pytest.approx(
        [scipy_stats.ttest_1samp(d[:k], -1.0).statistic for k in range(3, n + 1)]  # pyright: ignore[reportAttributeAccessIssue]
    )
    # With fewer runs: the same looks, as far as they go.
    for k in (3, n - 1):
        shorter = sweep(tmp_path / str(k), [CLOSE], seeds[:k], noisy())
        part = course_of(CLOSE, shorter, [7, 3, 0])
        assert part.entries("x") == found.entries("x")[: k - 2]
        assert (part.verdict, part.goes_on) == (OPEN_YET, True)
    assert course_of(CLOSE, sweep(tmp_path / "2", [CLOSE], seeds[:2], noisy()), seeds[:3]).n == 0


def test_the_order_goes_on_above_the_registered_seeds():
    assert seeds_in_order([5, 2], 5) == [5, 2, 6, 7, 8]
    assert seeds_in_order([0, 1, 2, 3], 2) == [0, 1]
    assert seeds_in_order([], 2) == [0, 1]


def test_a_seed_that_is_not_there_ends_the_looks_and_a_lost_one_says_so(tmp_path):
    gap = sweep(tmp_path / "gap", [CLOSE], [0, 1, 2, 4, 5, 6], noisy(spread=2.0))
    found = course_of(CLOSE, gap, [0, 1, 2])
    assert (found.n, found.goes_on) == (3, True)
    make_run(gap / "x", {"kfac.policy": "all", "seed": 3}, error=RuntimeError("no"))
    make_run(gap / "y", {"kfac.policy": "auto", "seed": 3}, {"m": 5.0})
    found = course_of(CLOSE, gap, [0, 1, 2])
    assert (found.n, found.goes_on) == (3, False)
    assert found.waits == "a run with seed=3 is lost (failed)"


def test_a_run_that_diverged_violates_stability_at_its_look_and_not_before(tmp_path):
    claim = {"type": "stable", "metric": "m", "axis": "kfac.policy", "margin": 9.0,
             "design": {"first": 4, "max_seeds": 12}}  # fmt: skip
    for at, verdict in ((4, (FAILS, 5)), (9, (HOLDS, 4))):
        directory = sweep(tmp_path / str(at), [claim], [s for s in range(12) if s != at], noisy())
        make_run(directory / "x", {"kfac.policy": "all", "seed": at}, {"m": math.nan})
        make_run(directory / "y", {"kfac.policy": "auto", "seed": at}, {"m": 5.0})
        if at == 4:  # not decided before it
            claim = {**claim, "margin": 0.2}
        assert verdict_and_n(course_of(claim, directory)) == verdict
        claim = {**claim, "margin": 9.0}


SHARE = {"type": "share", "metric": "m", "above": 0.0, "design": DESIGN}
CASES = [
    # claim, what the runs measure, verdict and n
    (CLOSE, noisy(3.0), (FAILS, 3)),
    (CLOSE, noisy(1.0, 3.0), (UNDECIDED, 7)),
    (CLOSE, lambda policy, seed: {"m": 1.0 + math.pi * seed}, (HOLDS, 3)),
    ({**CLOSE, "groups": {"kfac.policy": ["all", "auto"]}, "margin": None, "ratio": 1.1},
     lambda policy, seed: {"m": (-1.0) ** (policy == "all") * math.e}, (FAILS, 3)),
    ({**CLOSE, "margin": None, "ratio": 1.1},
     lambda policy, seed: {"m": (seed > 0 or policy == "auto") * math.e}, (UNDECIDED, 3)),
    (FASTER, lambda policy, seed: {"m": (2.0 if policy == "all" else 1.0) + 0.01 * seed},
     (HOLDS, 3)),
    ({"type": "bounded", "metric": "m", "at_most": 9, "design": DESIGN}, noisy(), (HOLDS, 3)),
    ({"type": "bounded", "metric": "m", "at_most": 4, "design": DESIGN}, noisy(), (FAILS, 3)),
    ({**SHARE, "at_least": 0.5}, lambda policy, seed: {"m": 1.0}, (HOLDS, 6)),
    ({**SHARE, "at_least": 0.5}, lambda policy, seed: {"m": -1.0}, (FAILS, 6)),
    # A share of 0 as a bound is a bound: one run above it is enough, none shows nothing.
    ({"type": "fails", "cells": {"kfac.policy": "all"}, "metric": "m", "above": 5, "share": 0,
      "design": DESIGN}, lambda policy, seed: {"m": 4.0 + 3 * (seed == 4)}, (HOLDS, 5)),
    ({**SHARE, "at_most": 0}, lambda policy, seed: {"m": 0.0}, (UNDECIDED, 12)),
]  # fmt: skip


@pytest.mark.parametrize(("claim", "measure", "expected"), CASES)
def test_verdicts_of_the_types(tmp_path, claim, measure, expected):
    found = course_of(claim, sweep(tmp_path / "s", [claim], range(12), measure))
    assert verdict_and_n(found) == expected
    (answer,) = evaluate(load(tmp_path / "s"))
    assert (answer.verdict, answer.seeds, answer.standing) == (*expected, "registered")
    json.dumps(answer.as_dict(), allow_nan=False)
    figure = path_figure(found)
    tested = isinstance(found.looks[-1].answers[0], sequential.Path)
    assert (figure is not None) == tested
    if figure is not None:
        assert figure.get_label()
        assert len(figure.axes) in (1, 2)


def test_what_cannot_be_looked_at_seed_by_seed_is_said(tmp_path):
    directory = sweep(tmp_path / "s", [CLOSE], range(5), noisy())
    pooled = course_of({**CLOSE, "over": ["seed", "data.batch_size"]}, directory)
    assert (pooled.looks, pooled.goes_on) == ((), False)
    assert "over seeds and data.batch_size" in pooled.waits
    without = course_of(
        {**SHARE, "at_least": 0.5, "by": ["seed"], "over": ["data.batch_size"]}, directory
    )
    assert "not over seeds" in without.waits


def test_p_values_are_honest_and_end_at_the_level():
    """By simulation on the bound: a p of at most x comes up with a chance of at most x."""
    design, sweeps = Design(max_seeds=8), 4000
    x = np.random.default_rng(3).normal(size=(sweeps, 8))
    path = sequential.means(x, 0.0, math.inf, design)
    crossed_at = path.lower >= sequential.t_boundary(design)
    first = np.where(crossed_at.any(1), crossed_at.argmax(1), -1)
    p = np.array([
        sequential.t_p_value(design, round(float(path.lower[i, k]), 2), int(path.n[k]))
        for i, k in enumerate(first) if k >= 0
    ])  # fmt: skip
    assert p.max() <= design.alpha + 1e-3
    for level in (0.01, 0.02, 0.04):
        low, high = scipy_stats.binom.interval(0.9998, sweeps, level)
        assert low <= (p <= level).sum() <= high
    one = sequential.t_p_value(design, 40.0, 3)
    assert one == pytest.approx(scipy_stats.t.sf(40.0, 2))
    assert sequential.t_p_value(design, math.inf, 3) == pytest.approx(0.0, abs=1e-9)


def test_p_values_of_shares_are_enumerated():
    design, share = Design(max_seeds=8), 0.3
    _, more = sequential.share_boundary(design, share)
    runs = np.array(np.meshgrid(*[[0, 1]] * 8)).reshape(8, -1).T
    weight = share ** runs.sum(1) * (1 - share) ** (8 - runs.sum(1))
    counts = np.cumsum(runs, 1)[:, 2:]
    reached = counts >= more
    at = np.where(reached.any(1), reached.argmax(1), 99)
    for k, n in enumerate(design.looks):
        count = int(more[k])
        if count > n:
            continue
        ended = (at < k) | ((at == k) & (counts[:, min(k, 5)] >= count))
        assert sequential.share_p_value(design, share, count, n) == pytest.approx(
            weight[ended].sum()
        )


def test_the_false_discovery_rate_is_that_of_benjamini_and_hochberg(tmp_path):
    """Over all claims, those without a p left out; by the definition, claim by claim."""
    claims = [{**CLOSE, "margin": margin} for margin in (0.05, 0.3, 0.5, 1.0, 2.0)]
    bounded = {"type": "bounded", "metric": "m", "at_most": 9}
    make_sweep(
        tmp_path / "s", crossed({"kfac.policy": ["all", "auto"], "seed": range(8)}, noisy(0.2)),
        claims=[*claims, bounded],
    )  # fmt: skip
    verdicts = evaluate(load(tmp_path / "s"))
    p = [v.p for v in verdicts[:-1]]
    assert math.isnan(verdicts[-1].p)
    assert math.isnan(verdicts[-1].q)
    ranked = sorted(p)
    for v in verdicts[:-1]:
        expected = min(min(1.0, 5 * ranked[i] / (i + 1)) for i in range(5) if ranked[i] >= v.p)
        assert v.q == pytest.approx(expected)
    holds = [f.p_holds for v in verdicts[:-1] for f in v.findings]
    assert p[3] == pytest.approx(2 * holds[3])  # the runs said in which direction


def test_a_look_before_runs_were_added_marks_the_fixed_verdict(tmp_path):
    """Looks with all runs of now are none; nor is one that lost runs had left open."""
    directory = tmp_path / "s"
    measure = noisy(spread=1.0)

    def judged(seeds: Sequence[int]) -> Any:
        (verdict,) = evaluate(load(sweep(directory, [CLOSE], seeds, measure, until=None)))
        return verdict

    first = judged(range(3))
    assert (first.standing, first.objection) == ("registered", "")
    note_looks(directory, [first])
    assert judged(range(3)).standing == "registered"
    second = judged(range(5))
    assert (second.standing, second.objection) == ("exploratory", "looked at with n = 3")
    assert "(exploratory)" in second.shown
    note_looks(directory, [second])
    note_looks(directory, [second])
    assert judged(range(6)).objection == "looked at with n = 3, 5"
    assert [entry["n"] for entry in ledger(directory).read()] == [3, 5]


def test_runs_that_were_repaired_are_no_second_look(tmp_path):
    directory = sweep(tmp_path / "s", [CLOSE], range(7), noisy(), until=None)
    make_run(directory / "x", {"kfac.policy": "all", "seed": 7}, error=RuntimeError("no"))
    make_run(directory / "y", {"kfac.policy": "auto", "seed": 7}, {"m": 5.0})
    (verdict,) = evaluate(load(directory))
    assert verdict.verdict == OPEN
    note_looks(directory, [verdict])
    make_run(directory / "x", {"kfac.policy": "all", "seed": 7}, {"m": 5.1})
    (verdict,) = evaluate(load(directory))
    assert (verdict.verdict, verdict.standing) == (HOLDS, "registered")


def test_a_sweep_to_be_decided_without_its_registration_is_invalid(tmp_path):
    directory = sweep(tmp_path / "s", [CLOSE], range(4), noisy())
    (directory / "registration.json").unlink()
    (verdict,) = evaluate(load(directory))
    assert (verdict.verdict, "registration.json" in verdict.why) == ("invalid", True)


def test_expected_seeds_follow_the_trend(tmp_path):
    """A claim that is far from its bound is expected to end sooner than one that is near."""
    directory = sweep(tmp_path / "s", [CLOSE], range(3), noisy(0.0, 0.6))
    far, near = (
        course_of({**CLOSE, "margin": margin}, directory).expected() for margin in (3.0, 1.2)
    )
    assert 1 <= far < near <= 9


def test_pandas_is_not_asked_for_tuples(tmp_path):
    """Pairing keys of one setting and of several are looked up as they are."""
    claim = {**SHARE, "at_least": 0.5}
    (sample,) = samples(parse(claim), load(sweep(tmp_path / "s", [claim], range(4), noisy())))
    part = sample.of([(1.0, "auto"), (0.0, "all")])
    assert list(part.x) == [1.0, 1.0]
    assert isinstance(part.x.index, pd.Index)


def test_report_and_appendix_show_looks_standings_and_rates(tmp_path):
    claims = [{**CLOSE, "text": "Close."}, {**SHARE, "at_least": 0.5, "text": "Mostly above."}]
    directory = sweep(tmp_path / "s", claims, range(12), noisy())
    about = json.loads((directory / "sweep.json").read_text())
    about["claims"][1]["at_least"] = 0.4  # after the registration
    (directory / "sweep.json").write_text(json.dumps(about))
    frame = load(directory)
    page = report.page(frame)
    verdicts = evaluate(frame)
    assert [(v.verdict, v.standing) for v in verdicts] == [
        (HOLDS, "registered"), (HOLDS, "exploratory"), (DROPPED, "registered"),
    ]  # fmt: skip
    for v in verdicts[:2]:
        assert f'<img alt="{v.text} ({v.findings[0].about}; holds)"' in page
        assert 0 < v.p <= 0.1
        assert v.p <= v.q <= 2 * v.p
    assert "changed after the registration" in page
    assert page.count('class="dim">q is a false discovery rate') == 1
    table = paper.claims_table(verdicts)
    assert "holds (exploratory)" in table
    assert "over new seeds" in table
    assert "dropped" in table
