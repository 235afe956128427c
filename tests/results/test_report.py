"""The report, the methods paragraph and the appendix; in a real browser and a real LaTeX."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from fisher_lab.config import paths
from fisher_lab.results import load, paper, write_report
from fisher_lab.results.paper import write_appendix
from fisher_lab.results.report import page
from tests.results.browser import Browser, executable
from tests.results.run_directories import crossed, make_run, make_sweep

NASTY = "<script>alert('x')</script>_50%&$x"
CLAIMS = [
    {"type": "bounded", "metric": "ng/cosine", "at_most": 10, "text": f"bounded {NASTY}"},
    {"type": "bounded", "metric": "ng/cosine", "at_most": 0.1, "text": "does not hold"},
    {"type": "nonsense"},
]


@pytest.fixture
def results(tmp_path):
    root = tmp_path / "results"
    axes = {"kfac.damping": (1e-5, 1e-4), "model.name": ("gpt2", NASTY), "seed": range(3)}
    cells = crossed(axes, lambda d, m, s: {
        "ng/cosine": d * 1e4 + 0.1 * s, "kfac/total_s": 1.0 + s, "kfac/peak_mb": 3.0,
        "kfac/clipped_frac_A": 0.25, "kfac/clipped_frac_G": 0.0, "kfac/jitter_events": s == 0,
        "kfac/fallbacks": 0, "tokens": 512,
    })  # fmt: skip
    make_sweep(root / "damping", cells, claims=CLAIMS, title=f"A title {NASTY}")
    make_run(root / "damping" / "bad", {"kfac.damping": 1e-3, "model.name": "gpt2", "seed": 0},
             error=MemoryError(f"no room for {NASTY}"))  # fmt: skip
    make_sweep(root / "other_50%", cells[:6])
    return root


class Checker(HTMLParser):
    """Tags that are opened and closed, and what a page would load."""

    VOID = ("meta", "img", "link", "br")

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.loads: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.stack.append(tag)
        self.scripts += tag == "script"
        self.loads += [v for k, v in attrs if k in ("src", "href") and v]

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag


def test_the_report_is_one_file_that_loads_nothing(results, tmp_path):
    files = write_report(load(results), tmp_path / "report.html")
    assert [f.name for f in files] == ["report.html", "methods.md", "methods.tex"]
    text = files[0].read_text()
    page = Checker()
    page.feed(text)
    assert page.stack == []
    assert page.scripts == 1
    assert all(load.startswith(("#", "data:image/png;base64,")) for load in page.loads)
    assert "alert('x')</script>" not in text
    for words in ("Claims", "does not hold", "invalid", "MemoryError: no room", "Provenance",
                  "python -m fisher_lab", "What all runs have in common"):  # fmt: skip
        assert words in text
    assert len([load for load in page.loads if load.startswith("data:")]) == 3


def test_the_methods_paragraph_says_what_the_records_say(results):
    text = " ".join(paper.sentences(load(results / "damping")))
    for words in (
        "Tikhonov damping was 1e-5 and 1e-4",
        "kappa = 1e6, which clipped 25.00% of A and 0.00% of G",
        "the empirical Fisher matrix",
        "policy auto",
        "decomposed in float64 and applied in float64",
        "jitter in 4 of 12 runs (4 times)",
        "512 tokens",
        "3 seeds",
        "PyTorch 2.13.0",
        "at commit 0123456789ab",
        "Of 13 runs, 1 failed",
    ):
        assert words in text
    assert "\\_" in paper.markdown(load(results))


def test_a_training_is_told_as_one_and_other_optimisers_have_no_curvature(tmp_path):
    kfac = {"optimizer.name": "kfac", "optimizer.lr": 0.03, "optimizer.damping_ratio": 300.0}
    sgd = {**kfac, "optimizer.name": "sgd"}
    numbers = {"tokens": 5120.0, "train/steps": 5}
    for name, settings in {"kfac": kfac, "sgd": sgd}.items():
        make_run(tmp_path / name / "0", {"task.name": "train", "seed": 0, **settings}, numbers)
    text = " ".join(paper.sentences(load(tmp_path / "kfac")))
    assert "optimiser kfac (learning rate 0.03) for 5 steps of 1,024 tokens." in text
    assert "on each factor, in the trainings 300 times as much on the A side;" in text
    assert "factors were computed from" not in text
    assert "K-FAC" not in " ".join(paper.sentences(load(tmp_path / "sgd")))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kfac.damping": None, "kfac.damping_A": 0.3, "kfac.damping_G": 1e-3},
         "damping was 0.3 on A and 0.001 on G;"),
        ({"kfac.damping_A": 0.3}, "damping was 0.3 on A and 1e-4 on G;"),
        ({"kfac.damping_mode": "relative"},
         "damping was 1e-4 on each factor (in mean eigenvalues of each factor);"),
        ({"kfac.ekfac": True, "kfac.ekfac_unit": "sequence"},
         "Kronecker eigenbasis (EKFAC) by the gradients of each sequence."),
    ],
)  # fmt: skip
def test_the_methods_name_the_damping_of_each_side_and_ekfacs_unit(settings, said, tmp_path):
    make_run(tmp_path / "s" / "0", {**settings, "seed": 0})
    assert said in " ".join(paper.sentences(load(tmp_path / "s")))


@pytest.mark.parametrize(
    ("tasks", "said"),
    [
        (["analyze", "analyze"], None),  # makes its factors once
        (["train", "train"], "The factors were refreshed every 10 steps."),
        (["analyze", "train"], "The factors were refreshed every 10 steps in the trainings."),
    ],
)
def test_factors_are_refreshed_in_trainings_alone(tasks, said, tmp_path):
    for i, task in enumerate(tasks):
        settings = {"task.name": task, "optimizer.name": "kfac", "kfac.ekfac": True}
        make_run(tmp_path / "s" / str(i), {**settings, "seed": i})
    text = " ".join(paper.sentences(load(tmp_path / "s")))
    assert "(EKFAC) by the gradients of each token." in text
    assert said in text if said else "refreshed" not in text


def test_several_sweeps_have_a_paragraph_each_after_what_they_share(tmp_path):
    for name, damping in (("one", 1e-3), ("two_x", 1e-2)):
        for seed in range(2):
            make_run(tmp_path / name / str(seed), {"kfac.damping": damping, "seed": seed})
    make_run(tmp_path / "void" / "0", {}, error=RuntimeError("x"))
    frame = load(tmp_path)
    (first, shared), *rest = paper.paragraphs(frame)
    assert first == ""
    assert "Every setting was run with 2 seeds." in shared
    assert any("PyTorch 2.13.0" in text for text in shared)
    assert [heading for heading, _ in rest] == ["one", "two_x", "void"]
    for (_, text), damping in zip(rest, ("0.001", "0.01"), strict=False):
        (sentence,) = text
        assert sentence.startswith(f"Tikhonov damping was {damping} on each factor")
    assert rest[2][1] == ["No run has completed."]
    assert "\n\n### two\\_x\n\nTikhonov" in paper.markdown(frame)
    assert "\\paragraph{two" in paper.latex(frame)
    assert "<h3>one</h3><p>Tikhonov damping was 0.001 on" in page(frame)


def test_the_methods_say_once_what_most_sweeps_have_and_what_differs(tmp_path):
    for name, damping, seeds in (("a", 1e-3, 2), ("b", 1e-3, 2), ("c", 1e-2, 2), ("d", 1e-3, 1)):
        for seed in range(seeds):
            make_run(tmp_path / name / str(seed), {"kfac.damping": damping, "seed": seed})
    (first, shared), *rest = paper.paragraphs(load(tmp_path))
    assert first == ""
    assert shared[0] == paper.UNLESS
    assert sum(sentence.startswith("Tikhonov damping was 0.001") for sentence in shared) == 1
    assert [heading for heading, _ in rest] == ["c", "d"]
    assert [text[0].partition(" on ")[0] for _, text in rest] == [
        "Tikhonov damping was 0.01", "Every setting was run with 1 seed.",
    ]  # fmt: skip


def test_the_report_in_a_real_browser(results, tmp_path):
    if executable() is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    report = write_report(load(results), tmp_path / "report.html")[0]
    with Browser(tmp_path / "profile") as page:
        grounds = {}
        for width in (390, 1280):
            for dark in (False, True):
                page.open(report, width, 900, dark)
                assert page.complaints == []
                assert page.ask("document.documentElement.scrollWidth <= innerWidth")
                grounds[dark] = page.ask("getComputedStyle(document.body).backgroundColor")
                shades = "getComputedStyle(document.images[0]).filter"
                assert ("invert" in page.ask(shades)) == dark  # figures follow the scheme
                tables = "[...document.querySelectorAll('.scroll')]"
                fits = f"{tables}.slice(0, 3).every(t => t.scrollWidth <= t.clientWidth)"
                assert width < 1280 or page.ask(fits)  # claims, and the tables of both sweeps
                images = "[...document.images].every(i => i.complete && i.naturalWidth > 100)"
                assert page.ask(images)
        assert grounds == {False: "rgb(255, 255, 255)", True: "rgb(20, 24, 29)"}
        check_sorting(page)


def check_sorting(page: Browser) -> None:
    """The numbers of a column go up, then down; cells without one stay at the end."""
    table = "document.querySelector('#sweep-0 ~ .scroll table')"
    column = f"[...{table}.tBodies[0].rows].map(r => r.cells[2].dataset.sort ?? null)"
    click = f"{table}.tHead.rows[0].cells[2].querySelector('button').click()"
    page.ask(click)
    up = page.ask(column)
    page.ask(click)
    down = page.ask(column)
    numbers = [float(v) for v in up if v is not None]
    assert len(numbers) == 4
    assert numbers == sorted(numbers)
    assert [float(v) for v in down if v is not None] == numbers[::-1]
    assert up[-1] is None
    assert down[-1] is None


def compiles(*files):
    """What the check script says of some files; the test is skipped where there is no LaTeX."""
    script = paths.root() / "scripts" / "check_latex.sh"
    done = subprocess.run([script, *files], capture_output=True, text=True, timeout=300)
    if done.returncode == 3:
        pytest.skip(done.stdout.strip())
    return done


@pytest.mark.parametrize("siunitx", [False, True])
def test_the_appendix_compiles_and_nothing_is_wider_than_the_page(results, tmp_path, siunitx):
    """Figures side by side beyond the margin would be lost without an error."""
    files = write_appendix(load(results), tmp_path / "appendix", siunitx=siunitx)
    before = set((tmp_path / "appendix").rglob("*"))
    done = compiles("--pdf", files[-1], files[-1].parent / "damping" / "table.tex")
    assert done.returncode == 0, done.stderr
    too_wide = re.findall(r"Overfull \\hbox \((\d+\.\d+)pt too wide\)", done.stdout)
    assert [float(points) for points in too_wide if float(points) > 5] == []
    assert set((tmp_path / "appendix").rglob("*")) - before == {files[-1].with_suffix(".pdf")}
    assert (files[-1].parent / "appendix.pdf").stat().st_size > 10_000
    names = {f.relative_to(tmp_path / "appendix").as_posix() for f in files}
    assert {"damping/table.tex", "other_50/table.csv", "claims.tex", "methods.tex"} <= names


def test_the_appendix_has_the_verdicts_of_all_sweeps_and_its_latex_is_balanced(results, tmp_path):
    claim = {"type": "bounded", "metric": "m", "at_most": 2}
    make_sweep(results / "third", [({"seed": 0}, {"m": 1.0})], claims=[claim])
    files = write_appendix(load(results), tmp_path / "appendix")
    assert tmp_path / "appendix" / "claims.json" in files
    found = json.loads((tmp_path / "appendix" / "claims.json").read_text())
    assert [(v["sweep"], v["verdict"]) for v in found] == [
        ("damping", "inconclusive"), ("damping", "does not hold"), ("damping", "invalid"),
        ("third", "holds"),
    ]  # fmt: skip
    for file in (tmp_path / "appendix").rglob("*.tex"):
        text = re.sub(r"\\[{}%\\]", "", file.read_text())
        assert text.count("{") == text.count("}"), file
        begun = re.findall(r"\\begin\{(\w+)\}", text)
        ended = re.findall(r"\\end\{(\w+)\}", text)
        assert sorted(begun) == sorted(ended), file


def test_a_paper_cites_claims_sections_tables_and_figures(tmp_path):
    claims = [
        {"type": "bounded", "metric": "ng/cosine", "at_most": 10, "text": "small", "name": "small"},
        {"type": "bounded", "metric": "ng/cosine", "at_most": 0.1, "text": "tiny"},
    ]
    axes = {"kfac.damping": (1e-5, 1e-4, 1e-3), "seed": range(3)}
    numbers = crossed(axes, lambda d, s: {"ng/cosine": d * 1e3 + s, "kfac/clipped_frac_A": 0.0})
    make_sweep(tmp_path / "damping_x", numbers, claims=claims, title="The damping")
    folder = tmp_path / "appendix"
    write_appendix(load(tmp_path / "damping_x"), folder)
    text = (folder / "appendix.tex").read_text()
    for word in ("sec:methods", "sec:damping_x", "fig:damping_x-metrics_by_kfac.damping"):
        assert f"\\label{{{word}}}" in text
    assert "Damping_x" not in text  # the title is the heading
    table = (folder / "damping_x" / "table.tex").read_text()
    assert r"\label{tab:damping-x}" in table
    words = "A row for each damping. The same in all rows, to the digits shown: clipped of A (0)."
    assert f"The damping. {words}" in table
    assert r"1 $\times$ holds and 1 $\times$ does not hold (Table~\ref{tab:claims})." in table
    macros = (folder / "claim-macros.tex").read_text()
    assert "csname fisherlab-claim-damping-x-small\\endcsname{holds (cosine, natural" in macros
    assert "csname fisherlab-verdict-damping-x-2\\endcsname{does not hold}" in macros
    claims_tex = (folder / "claims.tex").read_text()
    assert "ng/cosine" not in claims_tex + macros + table
    assert "All verdicts are exploratory: the sweep has no registration.json." in claims_tex
    (folder / "mine.tex").write_text(
        "\\documentclass{article}\\begin{document}\\input{claim-macros}"
        "\\claim{damping-x-small}, \\claimverdict{damping-x-2}, \\claim{none}\\end{document}"
    )
    assert compiles(folder / "mine.tex").returncode == 0


FAKE = """#!/bin/sh
for word in "$@"; do case $word in -output-directory=*) cd "${word#*=}" || exit 1 ;; esac; done
base=$(basename "$word" .tex)
for kind in aux out pdf; do echo "$kind" >"$base.$kind"; done
echo 'Overfull \\hbox (9.5pt too wide) in paragraph at lines 1--2' >"$base.log"
"""


@pytest.mark.parametrize("kept", [False, True])
def test_a_check_leaves_nothing_but_the_pdf_that_was_asked_for(kept, tmp_path, monkeypatch):
    """By an engine that writes what LaTeX does, so that it needs none."""
    tools, texts = tmp_path / "bin", tmp_path / "texts"
    tools.mkdir()
    texts.mkdir()
    for name, text in (("pdflatex", FAKE), ("kpsewhich", "#!/bin/sh\n")):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    for name in ("bash", "sh", "grep", "basename", "dirname", "mktemp", "rm", "mkdir", "mv", "cat",
                 "tail"):  # fmt: skip
        (tools / name).symlink_to(shutil.which(name))
    monkeypatch.setenv("PATH", str(tools))  # whatever is installed is not seen
    (texts / "whole.tex").write_text("\\documentclass{article}\n")
    (texts / "part.tex").write_text("words\n")
    done = compiles(*(["--pdf"] if kept else []), texts / "whole.tex", texts / "part.tex")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("(9.5pt too wide)") == 2
    left = {"whole.tex", "part.tex"} | ({"whole.pdf"} if kept else set())
    assert {file.name for file in texts.iterdir()} == left
    assert compiles("--all").returncode == 2


def test_a_file_that_does_not_compile_is_told_with_the_reason(tmp_path):
    broken = tmp_path / "broken.tex"
    broken.write_text("\\begin{tabular}{l} \\nosuchcommand \\end{tabular}\n")
    done = compiles(broken)
    assert done.returncode == 1
    assert "broken.tex: does not compile" in done.stderr
    assert "Undefined control sequence" in done.stderr
