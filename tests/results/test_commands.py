"""The sub-commands through the front command, and what is written at the end of a sweep."""

from __future__ import annotations

import json

import pytest

from fisher_lab import cli
from fisher_lab.results import at_end, diff, finish
from fisher_lab.results.values import ResultsError
from tests.results.run_directories import crossed, make_run, make_sweep

CLAIM = {"type": "equivalent", "text": "policies agree", "metric": "m", "margin": 0.5,
         "groups": {"kfac/policy": ["all", "auto"]}}  # fmt: skip


@pytest.fixture
def sweep(tmp_path):
    def measure(policy, seed):
        return {"m": seed * (1.01 if policy == "auto" else 1.0), "kfac/total_s": 1.0 + seed}

    cells = crossed({"kfac.policy": ("all", "auto"), "seed": range(3)}, measure)
    layers = [{"name": "h.0", "dim_A": 4, "clipped_A": 1, "kappa_A": 10.0}]
    make_run(tmp_path / "results" / "p" / "x", {"kfac.policy": "all", "seed": 9}, {"m": 9.0},
             layers=layers)  # fmt: skip
    return make_sweep(tmp_path / "results" / "p", cells, claims=[CLAIM], title="Policies")


@pytest.fixture
def command(capsys):
    def call(*arguments):
        capsys.readouterr()
        code = cli.main([str(a) for a in arguments])
        return code, *capsys.readouterr()

    return call


def test_table(command, sweep):
    code, out, err = command(
        "table", sweep, "--metrics", "m,kfac/total_s", "--baseline", "kfac/policy=all"
    )
    assert (code, err) == (0, "")
    assert "kfac.policy" in out
    assert "p (Holm)" in out
    assert "1 missing of 4" in out
    assert ", n 3" not in out
    assert "sd 1.0, n 3" in command("table", sweep, "--metrics", "m", "--sd")[1]


def test_table_formats_and_files(command, sweep, tmp_path):
    for name, beginning in (("t.csv", "kfac.policy,metric,n"), ("t.md", "**"), ("t.html", "<div"),
                            ("t.tex", "% needs: booktabs"), ("t.txt", "p")):  # fmt: skip
        assert command("table", sweep, "-o", name)[0] == 0
        assert (tmp_path / name).read_text().startswith(beginning)
    assert command("table", sweep, "--format", "tex", "--siunitx", "--standalone")[1].startswith(
        "\\documentclass"
    )
    assert command("table", sweep, "--format", "csv")[1] == (tmp_path / "t.csv").read_text()


BAD = [
    (["table"], "the following arguments are required: paths"),
    (["table", "nowhere"], "nowhere: there is no such directory"),
    (["table", "empty"], "empty: there is no run"),
    (["table", "results/p", "--rows", "kfac.polcy"], "did you mean kfac.policy?"),
    (["table", "results/p", "--where", "seed"], "--where seed: give it as key=value"),
    (["table", "results/p", "--format", "pdf"], "invalid choice"),
    (["table", "results/p", "--confidence", "2"], "confidence=2 is not allowed"),
    (["table", "results/p", "--metrics", "m", "--best", "m=most"], "best m=most is not allowed"),
    (["claims", "results/p", "--claims", "no.yaml"], "no.yaml: No such file"),
    (["diff", "results/p", "results/p"], "this is no run directory"),
    (["report"], "the following arguments are required: paths"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_input_is_one_line_and_exit_code_2(command, sweep, tmp_path, arguments, words):
    (tmp_path / "empty").mkdir()
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert len(err.strip().splitlines()) == 1


def test_claims(command, sweep, tmp_path):
    code, out, _ = command("claims", sweep)
    assert code == 0
    assert "inconclusive" in out  # one run of "auto" is missing
    assert "policies agree" in out
    code, out, _ = command("claims", sweep, "--json")
    assert json.loads(out)[0]["verdict"] == "inconclusive"
    (tmp_path / "c.yaml").write_text("claims:\n- {type: bounded, metric: m, at_most: 1e2}\n")
    assert "holds" in command("claims", sweep, "--claims", "c.yaml")[1]
    (tmp_path / "c.yaml").write_text("claims:\n- {type: boundd, metric: m, at_most: 1}\n")
    code, out, err = command("claims", sweep, "--claims", "c.yaml")
    assert code == 2
    assert "type=boundd is not allowed" in err


def test_diff_shows_only_what_differs(command, tmp_path):
    layers = [{"name": "h.0", "kappa_A": 10.0}, {"name": "h.1", "kappa_A": 5.0}]
    other = [{"name": "h.0", "kappa_A": 20.0}, {"name": "h.1", "kappa_A": 5.0}]
    make_run(tmp_path / "a", {"kfac.damping": 1e-5}, {"m": 1.0, "n": 2.0}, layers=layers)
    make_run(tmp_path / "b", {"kfac.damping": 1e-4}, {"m": 1.5, "n": 2.0}, layers=other)
    found = diff("a", "b")
    names = {part: [d.name for d in ds] for part, ds in found.parts.items()}
    assert names == {
        "outcome": ["run_id"],
        "configuration": ["kfac.damping"],
        "metrics": ["m"],
        "layers": ["h.0 · kappa_A"],
        "provenance": [],
    }
    assert found.parts["metrics"][0].ratio == 1.5
    assert diff("a", "b", tolerance=0.6).parts["metrics"] == []
    code, out, _ = command("diff", "a", "b")
    assert code == 0
    assert "kfac.damping" in out
    assert "h.1" not in out
    assert "nothing differs" in command("diff", "a", "a")[1]


def test_finish_writes_everything_and_again_only_what_changed(sweep):
    done = finish(sweep)
    names = {file.relative_to(sweep).as_posix() for file in done.files}
    assert {"table.csv", "table.md", "table.tex", "claims.json"} <= names
    assert any(name.startswith("figures/") and name.endswith(".pdf") for name in names)
    assert json.loads((sweep / "claims.json").read_text())[0]["text"] == "policies agree"
    assert finish(sweep).files == []
    (sweep / "table.md").unlink()
    assert sweep / "table.md" in finish(sweep).files
    make_run(sweep / "y", {"kfac.policy": "auto", "seed": 9}, {"m": 9.1})
    assert finish(sweep).files != []
    assert json.loads((sweep / "claims.json").read_text())[0]["verdict"] == "holds"
    assert [p.name for p in sweep.rglob("*.tmp")] == []


def test_the_end_of_a_sweep_never_fails(tmp_path, sweep, capsys):
    at_end(sweep)
    assert "policies agree" in capsys.readouterr().out
    at_end(tmp_path / "nowhere")
    assert "no table of" in capsys.readouterr().err
    with pytest.raises(ResultsError):
        finish("nowhere")


def test_looking_at_a_sweep_writes_nothing(command, sweep):
    before = sorted(sweep.rglob("*"))
    assert command("table", sweep)[0] == 0
    assert sorted(sweep.rglob("*")) == before
