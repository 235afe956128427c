"""What is written before the first result, and what becomes of claims that change after it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fisher_lab.results import evaluate, load, registration
from fisher_lab.results.claims import DROPPED
from tests.cli.conftest import install_task
from tests.sweeps.application import own_sweep

BOUNDED = "{type: bounded, metric: loss, at_most: %s, text: The loss is small.}"
ANOTHER = "{type: bounded, metric: tokens, at_least: 1, text: There are tokens.}"
OWN = Path("results/own")


def state(*claims: str, seeds: str = "1,2", design: str = "{}") -> None:
    own_sweep(
        "own", f"params: {{seed: '{seeds}'}}\ndesign: {design}\nclaims: [{', '.join(claims)}]\n"
    )


def registered() -> dict[str, Any]:
    return json.loads((OWN / "registration.json").read_text())


def standings() -> dict[str, tuple[str, str]]:
    """Words of a claim -> its verdict and standing."""
    return {v.text: (v.verdict, v.standing) for v in evaluate(load(OWN))}


def test_a_sweep_is_registered_before_its_first_run(door, monkeypatch):
    """By the first launch; whoever runs a cell finds it."""
    state(BOUNDED % 2, design="{first: 4, max_seeds: 9}")
    seen_by_a_run: list[bool] = []

    def run(config: Any, run: Any) -> None:
        seen_by_a_run.append((OWN / "registration.json").is_file())
        run.metrics({"loss": 1.0})

    install_task(monkeypatch, run)
    assert door("-m", "+sweeps=own").code == 0
    assert seen_by_a_run == [True, True]
    content = registered()
    (claim,) = content["claims"]
    assert (claim["design"]["first"], claim["design"]["max_seeds"]) == (4, 9)
    assert (content["results_before"], content["seeds"]) == (0, [1, 2])
    assert set(content["cells"]) == {file.parent.name for file in OWN.glob("*/run.json")}
    assert content["sha256"] == registration.digest(content)
    events = [json.loads(line) for line in (OWN / "events.jsonl").read_text().splitlines()]
    assert [e["sha256"] for e in events if e["event"] == "registered"] == [content["sha256"]]
    (launch,) = OWN.glob(".sweep/submissions/*/launch.json")
    assert json.loads(launch.read_text())["registration"] == content["sha256"]


def test_register_writes_it_and_runs_nothing_and_a_launch_keeps_it(door, seen):
    state(BOUNDED % 2)
    answer = door("register", "own", "seed=1,2,3")
    assert (answer.code, seen) == (0, [])
    before = registered()
    assert before["sha256"] in answer.out
    assert len(before["cells"]) == 3
    assert door("register", "own").code == 0  # the command of the directory, as it was typed
    assert door("-m", "+sweeps=own", "seed=1,2,3").code == 0
    assert registered() == before
    assert [config.seed for config in seen] == [1, 2, 3]


def test_claims_may_be_changed_until_there_is_a_result(door, seen):
    state(BOUNDED % 2)
    door("register", "own")
    state(BOUNDED % 3, ANOTHER)
    door("-m", "+sweeps=own")
    assert [one["claim"].get("at_most") for one in registered()["claims"]] == [3, None]
    assert set(standings().values()) == {("holds", "registered")}


def test_a_claim_that_comes_or_changes_after_a_result_is_exploratory_and_one_that_goes_is_listed(
    door, seen
):
    state(BOUNDED % 2)
    door("-m", "+sweeps=own")
    first = registered()
    state(BOUNDED % 2, ANOTHER)
    answer = door("-m", "+sweeps=own")
    assert "exploratory: added after the registration" in " ".join(answer.out.split())
    assert registered() == first
    assert standings() == {
        "The loss is small.": ("holds", "registered"),
        "There are tokens.": ("holds", "exploratory"),
    }
    state(BOUNDED % 3)  # another margin
    door("-m", "+sweeps=own")
    verdicts = evaluate(load(OWN))
    assert [(v.verdict, v.standing, v.objection) for v in verdicts] == [
        ("holds", "exploratory", "changed after the registration"),
        (DROPPED, "registered", ""),
    ]
    assert json.loads((OWN / "claims.json").read_text())[1]["verdict"] == DROPPED
    state(BOUNDED % 2, design="{max_seeds: 60}")  # another design
    door("-m", "+sweeps=own")
    assert standings()["The loss is small."] == (DROPPED, "registered")
    state()  # no claims at all
    door("-m", "+sweeps=own")
    assert standings() == {"The loss is small.": (DROPPED, "registered")}


def test_a_sweep_that_has_results_is_registered_as_such(door, seen):
    state()
    door("-m", "+sweeps=own")
    assert not (OWN / "registration.json").exists()
    state(BOUNDED % 2)
    door("-m", "+sweeps=own")
    assert registered()["results_before"] == 2
    (verdict,) = evaluate(load(OWN))
    assert (verdict.standing, verdict.objection) == ("exploratory", "registered after 2 results")


def test_a_registration_that_was_edited_registers_nothing(door, seen):
    state(BOUNDED % 2)
    door("-m", "+sweeps=own")
    content = registered()
    content["claims"][0]["claim"]["at_most"] = 1
    (OWN / "registration.json").write_text(json.dumps(content))
    (verdict,) = [v for v in evaluate(load(OWN)) if v.verdict != DROPPED]
    assert verdict.standing == "exploratory"
    assert "SHA-256" in verdict.objection
    (OWN / "registration.json").write_text("{}")
    (verdict,) = evaluate(load(OWN))
    assert "cannot be read as a registration" in verdict.objection


WRONG = [
    # claims, design, words of the refusal
    ("{type: bounded, metric: loss}", "{}", "claim 1 (bounded): give one of at_most and at_least"),
    (BOUNDED % 2, "{frist: 3}", "a design has no key frist; did you mean first?"),
    (BOUNDED % 2, "{first: 1}", "first=1 is not allowed: from 2 to max_seeds"),
    (BOUNDED % 2, "{first: 3.5}", "first=3.5 is not a whole number"),
    (BOUNDED % 2, "{max_seeds: 1000000}", "max_seeds=1000000 is not allowed"),
    (BOUNDED % 2, "[3]", "design must be a mapping"),
    ("{type: bounded, metric: loss, at_most: 2, design: 3}", "{}", "a mapping such as"),
    ("{type: bounded, metric: loss, at_most: 2, alpha: 0.1, design: {alpha: 0.01}}", "{}",
     "alpha is given twice"),
]  # fmt: skip


@pytest.mark.parametrize(("claim", "design", "words"), WRONG)
def test_a_claim_or_design_that_cannot_be_is_refused_before_anything_runs(
    claim, design, words, door, seen
):
    state(claim, design=design)
    for command in (["-m", "+sweeps=own"], ["-m", "+sweeps=own", "sweep.dry_run=true"]):
        assert words in door(*command).refusal
    assert words in door("register", "own").refusal
    assert not Path("results").exists()
    assert seen == []


@pytest.mark.parametrize("name", ["nothing", "."])
def test_register_needs_a_sweep(name, door):
    assert "is no sweep" in door("register", name).refusal
