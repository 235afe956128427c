"""``sweep.until=decided``: exactly the cells that open claims need, with the same looks always."""

from __future__ import annotations

import json
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fisher_lab.results import evaluate, load
from fisher_lab.sweeps.directory import Layout
from tests.cli.conftest import install_task
from tests.processes import start_python
from tests.sweeps.application import own_sweep
from tests.sweeps.deciding_application import OFFSETS

APPLICATION = Path(__file__).with_name("deciding_application.py")
SWEEP = """
params: {kfac.policy: 'all,auto,hybrid', seed: '0,1,2,3,4'}
design: {max_seeds: 10, give_up: 1}
claims:
- {type: equivalent, metric: m, groups: {kfac.policy: [all, auto]}, margin: 1.0, text: Close.}
- {type: equivalent, metric: m, groups: {kfac.policy: [all, hybrid]}, margin: 0.2, text: Apart.}
- {type: equivalent, metric: m, groups: {kfac.policy: [auto, hybrid]}, margin: 0.95, text: Near.}
- {type: bounded, metric: m, at_most: 9, where: {kfac.policy: all}, text: Bounded.}
"""
OWN = Path("results/own")
TIMEOUT_S = 120


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Policy and seed of every run, in their order."""
    cells: list[tuple[str, int]] = []

    def run(config: Any, run: Any) -> None:
        policy = config.kfac.policy
        cells.append((policy, config.seed))
        if config.seed == 99:
            raise RuntimeError("no")
        noise = np.random.default_rng([config.seed, len(policy)]).normal()
        run.metrics({"m": 5.0 + OFFSETS[policy] + 0.25 * float(noise)})

    install_task(monkeypatch, run)
    return cells


def looks(directory: Path = OWN) -> dict[str, list[dict[str, Any]]]:
    """Claim -> its lines in the ledger, without their times."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in (directory / ".sweep" / "looks.jsonl").read_text().splitlines():
        if line.endswith("}"):  # one that was torn has none
            entry = json.loads(line)
            del entry["time"]
            found[entry["claim"]].append(entry)
    return dict(found)


def verdicts() -> dict[str, tuple[str, int]]:
    return {v.text: (v.verdict, v.seeds) for v in evaluate(load(OWN))}


def test_a_sweep_runs_what_open_claims_need_until_they_are_decided(door, ran):
    own_sweep("own", SWEEP)
    answer = door("-m", "+sweeps=own", "sweep.until=decided")
    assert answer.code == 0, answer.err
    found = verdicts()
    assert [found[text][0] for text in ("Close.", "Apart.", "Near.", "Bounded.")] == [
        "holds", "does not hold", "undecided", "holds"
    ]  # fmt: skip
    needed = {"Close.": ("all", "auto"), "Apart.": ("all", "hybrid"), "Near.": ("auto", "hybrid"),
              "Bounded.": ("all",)}  # fmt: skip
    first = {(policy, seed) for policy in OFFSETS for seed in range(3)}
    wanted = {
        (p, seed) for text, (_, n) in found.items() for seed in range(n) for p in needed[text]
    }
    assert set(ran) == first | wanted
    assert len(ran) == len(set(ran)) < 3 * 10
    # Each claim was looked at with every number of seeds from three until it was decided.
    ns = {tuple(entry["n"] for entry in entries) for entries in looks().values()}
    assert ns == {tuple(range(3, n + 1)) for _, n in found.values()}
    assert {v.standing for v in evaluate(load(OWN))} == {"registered"}
    content = json.loads((OWN / "sweep.json").read_text())
    assert len(content["cells"]) == len(ran)
    assert content["until"] == "decided"
    assert "undecided" in answer.out
    assert "missing" not in answer.out.rpartition("cells completed")[0].splitlines()[-1]


def test_again_runs_and_looks_at_nothing(door, ran):
    own_sweep("own", SWEEP)
    door("-m", "+sweeps=own", "sweep.until=decided")
    count, ledger = len(ran), (OWN / ".sweep" / "looks.jsonl").read_bytes()
    assert door("decide", "own").code == 0
    assert len(ran) == count
    assert (OWN / ".sweep" / "looks.jsonl").read_bytes() == ledger
    # Nor does the plain command change what its verdicts are.
    found = verdicts()
    door("-m", "+sweeps=own", "seed=0,1,2")
    assert verdicts() == found


def test_decide_goes_on_from_a_sweep_of_some_seeds(door, ran):
    """The seeds that were given come first, in their order; then those above them."""
    own_sweep("own", SWEEP)
    assert door("-m", "+sweeps=own", "seed=8,2,4").code == 0
    assert len(ran) == 9
    answer = door("decide", str(OWN))
    assert answer.code == 0, answer.err
    assert list(dict.fromkeys(seed for _, seed in ran))[:6] == [8, 2, 4, 9, 10, 11]
    assert all(verdict != "inconclusive" for verdict, _ in verdicts().values())


def test_a_lost_run_stops_its_claims_and_a_retry_goes_on(door, ran):
    own_sweep("own", SWEEP)
    answer = door("-m", "+sweeps=own", "seed=97,98,99,100", "sweep.until=decided")
    assert answer.code == 1
    assert {seed for _, seed in ran} == {97, 98, 99}  # nothing further was of any use
    assert set(verdicts().values()) == {("inconclusive", 0)}
    assert "a run with seed=99 is lost (failed)" in " ".join(answer.out.split())
    count = len(ran)
    door("decide", "own")
    assert [seed for _, seed in ran[count:]] == [99] * 3


def application(*arguments: str) -> subprocess.Popen[str]:
    return start_python(
        str(APPLICATION), *arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def run_application(*arguments: str) -> int:
    process = application(*arguments)
    out, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode in (0, -9), out
    return process.returncode


UNTIL = ("-m", "+sweeps=own", "sweep.until=decided", "resume.stale_after_s=2")


def test_killed_three_times_it_comes_to_the_looks_of_an_undisturbed_sweep(door, ran):
    own_sweep("own", SWEEP)
    door(*UNTIL, "sweep.name=quiet")
    for order in ("kill-in-task-11", "kill-in-ledger-2", "kill-after-3"):
        Path(order).touch()
        assert run_application(*UNTIL) == -9
        assert not Path(order).exists()
    assert run_application(*UNTIL) == 0
    assert looks() == looks(Path("results/quiet"))
    ids = {file.parent.name for file in OWN.glob("*/metrics.json")}
    assert ids == {file.parent.name for file in Path("results/quiet").glob("*/metrics.json")}
    assert len(ids) == len(set(ran))


def test_two_launchers_together_come_to_the_same_looks(door, ran):
    own_sweep("own", SWEEP)
    door(*UNTIL, "sweep.name=quiet")
    both = [application(*UNTIL) for _ in range(2)]
    outputs = [process.communicate(timeout=TIMEOUT_S)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert looks() == looks(Path("results/quiet"))
    completed = [e["run_id"] for e in Layout(OWN).journal.read() if e["event"] == "completed"]
    assert sorted(completed) == sorted(set(completed))
    assert len(completed) == len(set(ran))


REFUSED = [
    # overrides, words
    (["sweep.until=decided", "seed=1,2"], "sweep.until=decided is not allowed"),
    (["sweep.until=never", "+sweeps=own"], "sweep.until=never is not allowed"),
    (["sweep.until=decided", "+sweeps=own", "sweep.detach=true"], "sweep.detach"),
]


@pytest.mark.parametrize(("overrides", "words"), REFUSED)
def test_what_cannot_be_decided_is_refused(overrides, words, door, ran):
    own_sweep("own", SWEEP)
    assert words in door("-m", *overrides).refusal
    assert not Path("results").exists()
    assert ran == []


def test_a_sweep_of_an_earlier_version_cannot_be_decided_by_its_name(door, ran):
    own_sweep("own", SWEEP)
    door("-m", "+sweeps=own")
    file = OWN / "sweep.json"
    content = json.loads(file.read_text())
    del content["arguments"]
    file.write_text(json.dumps(content))
    assert "does not say how the sweep was started" in door("decide", "own").refusal
