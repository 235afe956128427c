"""``fisher-lab reproduce``: the same cells again, and what is said of their numbers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from fisher_lab import cli
from fisher_lab.config.schema import Config
from fisher_lab.runs import atomic
from fisher_lab.runs.record import Run
from fisher_lab.sweeps import reproduce, worker_process
from fisher_lab.sweeps.reproduce import Answer, Repeated, compare, sample, verdict

HERE = {"device": "cpu", "threads": 1, "host": {"cpu": "x"}, "versions": {"torch": "1"}}


def make(directory: Path, seed: int, numbers: dict, rows=(), **settings) -> Path:
    config = dataclasses.asdict(Config(seed=seed, **settings))
    run = Run.start(directory, config=config, overrides=[f"seed={seed}"], provenance=HERE)
    run.metrics(numbers)
    if rows:
        run.table("layers.csv", rows)
    run.complete()
    return directory


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    """Five seeds of one cell, and one of another."""
    losses = (1.0, 1.1, 0.9, 1.2, 0.8)
    cells = [make(tmp_path / "s" / str(i), i, {"loss": x}) for i, x in enumerate(losses)]
    make(tmp_path / "s" / "other", 0, {"loss": 50.0}, threads=3)
    return cells


@pytest.mark.parametrize(
    ("number", "here", "answer"),
    [
        (1.0, True, "equal to the bit"),
        (1.0 + 1e-15, True, "equal to rounding"),
        (1.001, True, "different"),  # however far inside the interval of the seeds that is
        (1.001, False, "equal to rounding"),  # a hundredth of their standard deviation
        (1.1, False, "inside the interval of the seeds"),
        (1.6, False, "different"),  # and the cell of 50 is none of these seeds
        (None, True, "different"),
        (None, False, "different"),
    ],
)
def test_one_number_by_where_it_was_computed(number, here, answer, runs, tmp_path):
    again = make(tmp_path / "again", 0, {"loss": number})
    found = compare(runs[0], again, here)
    assert found.answer == answer
    assert found.compared == 1
    assert ("loss" in found.why) == (answer != "equal to the bit")


def test_without_seeds_there_is_no_interval(tmp_path):
    run = make(tmp_path / "s" / "0", 0, {"loss": 1.0})
    assert compare(run, make(tmp_path / "a", 0, {"loss": 1.1}), False).answer is Answer.DIFFERENT
    near = make(tmp_path / "b", 0, {"loss": 1.00001})
    assert compare(run, near, False).answer is Answer.ROUNDING


def test_times_and_memory_are_not_compared_but_every_other_number_is(tmp_path):
    before = {"loss": 1.0, "kfac/total_s": 3.0, "kfac/peak_mb": 7.0, "dist/comm_s_max": 1.0,
              "train/tokens_per_s": 5.0, "spectral/bytes": 9, "kfac/factor_bytes": 64}  # fmt: skip
    now = dict.fromkeys(before, 2.0) | {"loss": 1.0, "kfac/factor_bytes": 64, "new": 1.0}
    rows = [{"name": "h.0", "kappa_A": 2.0, "seconds": 1.0}, {"name": "h.1", "kappa_A": ""}]
    run = make(tmp_path / "s" / "0", 0, before, rows)
    rows[0]["seconds"] = 9.0
    again = make(tmp_path / "a", 0, now, rows)
    assert compare(run, again, True).answer is Answer.BITS
    assert set(reproduce.numbers(run)) == {
        "loss", "kfac/factor_bytes", "layers.csv · 0 · name", "layers.csv · 0 · kappa_A",
        "layers.csv · 1 · name", "layers.csv · 1 · kappa_A",
    }  # fmt: skip
    rows[1]["kappa_A"] = "3.5"
    found = compare(run, make(tmp_path / "b", 0, now, rows), True)
    assert found.answer is Answer.DIFFERENT
    assert found.why == "layers.csv · 1 · kappa_A: 3.5, and no number in the run"


def test_a_number_that_is_gone_is_different(tmp_path):
    run = make(tmp_path / "s" / "0", 0, {"loss": 1.0, "ng/norm": 2.0})
    found = compare(run, make(tmp_path / "a", 0, {"loss": 1.0}), True)
    assert found.answer is Answer.DIFFERENT
    assert found.why == "ng/norm: nothing, and 2.0 in the run"


def test_the_sample_is_the_same_for_a_seed_and_another_for_another(tmp_path):
    paths = [tmp_path / "sweep" / f"{i:016x}" for i in range(40)]
    first = sample(paths, 5, 0)
    assert len(first) == 5
    assert sample(paths[::-1], 5, 0) == first
    moved = [Path("elsewhere") / "sweep" / path.name for path in paths]
    assert [path.name for path in sample(moved, 5, 0)] == [path.name for path in first]
    assert sample(paths, 5, 1) != first
    assert set(sample(paths, 99, 0)) == set(paths)


@pytest.mark.parametrize(
    ("answers", "words", "is_same"),
    [
        ("BITS BITS", "reproduced: each equal to the bit", True),
        ("BITS ROUNDING", "reproduced: at worst equal to rounding", True),
        ("INSIDE BITS", "reproduced: at worst inside the interval of the seeds", True),
        ("DIFFERENT BITS NOT_RUN", "not reproduced: 1 of 3 are different", False),
        ("NOT_RUN BITS", "not decided: 1 of 2 could not be run here", False),
    ],
)
def test_one_verdict_over_all(answers, words, is_same):
    cells = [Repeated(Path("r"), Answer[name]) for name in answers.split()]
    assert verdict(cells) == (words, is_same)


@pytest.fixture
def sweep(tmp_path, monkeypatch) -> Path:
    """A cell that a worker has run."""
    from tests.sweeps import reproduced_worker

    script = Path(reproduced_worker.__file__)
    monkeypatch.setattr(worker_process, "WORKER", (str(script),))
    monkeypatch.chdir(tmp_path)
    numbers = {"loss": 1.0 + (Config().kfac.damping or 0.0), "kfac/total_s": 1.0}
    run = make(tmp_path / "s" / "0", 0, numbers)
    found = atomic.read_json(run / "run.json")
    found["provenance"]["content"] = {"data": "abc"}
    atomic.write_json(run / "run.json", found)
    return tmp_path / "s"


def test_cells_are_run_again_in_processes_of_their_own(sweep, monkeypatch, capsys):
    assert cli.main(["reproduce", "s", "-o", "again"]) == 0
    out = capsys.readouterr().out
    assert "1 numbers" in out
    assert out.splitlines()[-1] == "reproduced: each equal to the bit"
    assert len(list(Path("again").rglob("metrics.json"))) == 1
    monkeypatch.setenv("REPRODUCED_OFFSET", "0.001")
    assert cli.main(["reproduce", "s", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["reproduced"] is False
    monkeypatch.setenv("REPRODUCED_OFFSET", "nan")
    assert cli.main(["reproduce", "s"]) == 1
    assert "failed: RuntimeError: no numbers any more" in capsys.readouterr().out


def test_another_text_is_no_other_number(sweep, capsys):
    run = sweep / "0" / "run.json"
    found = atomic.read_json(run)
    found["provenance"]["content"] = {"data": "another"}
    atomic.write_json(run, found)
    assert cli.main(["reproduce", "s"]) == 1
    assert "not decided: 1 of 1 could not be run here" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "nowhere: there is no such directory"),
        (["s"], "s: there is no completed run"),
        (["s", "--sample", "0"], "--sample=0 is not allowed"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s").mkdir()
    assert cli.main(["reproduce", *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.strip().splitlines())) == ("", 1)
    assert words in err
