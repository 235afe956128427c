"""The appendix of a paper: every table, claim and figure of some sweeps, and a document of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fisher_lab.results import claims, export, figures, latex, paper
from fisher_lab.results.finishing import CLAIMS_FILE, claimed_metrics, verdicts_text
from fisher_lab.results.places import Places
from fisher_lab.results.plotting import file_name
from fisher_lab.results.table import tabulate
from fisher_lab.results.values import Frame, ResultsError, only
from fisher_lab.runs import atomic

DOCUMENT = "appendix.tex"
PARAGRAPH = "\\par\\medskip\\noindent"


def write_appendix(frame: Frame, directory: Path, *, siunitx: bool = False) -> list[Path]:
    """Write ``appendix.tex``, which compiles in its directory, and everything that it shows.

    Args:
        frame: from :func:`fisher_lab.results.loading`.
        directory: made where it is missing; a directory for each sweep goes into it.
        siunitx: numbers by that package.

    Returns:
        The files that were written, ``appendix.tex`` last.
    """
    places = Places(frame)
    verdicts = claims.evaluate(places.reasons(frame))
    frame = places.shown(frame)
    files: list[Path] = []
    body = ["\\section{Methods}", "\\input{methods}"]
    texts = {"methods.tex": paper.latex(frame), "methods.md": paper.markdown(frame)}
    texts[CLAIMS_FILE] = verdicts_text(verdicts)
    if verdicts:
        texts["claims.tex"] = claims_table(verdicts)
        body += ["\\section{Claims}", "\\input{claims}"]
    for name, text in texts.items():
        atomic.write_text(directory / name, text)
        files.append(directory / name)
    for sweep in dict.fromkeys(frame["sweep"]):
        files += _sweep(only(frame, sweep), sweep, directory, body, siunitx, places)
    target = directory / DOCUMENT
    atomic.write_text(target, latex.document("\n".join(body), "Appendix"))
    return [*files, target]


def _sweep(
    frame: Frame, name: str, directory: Path, body: list[str], siunitx: bool, places: Places
) -> list[Path]:
    folder = file_name(name)
    titles = [str(s.about.get("title") or "") for s in frame.attrs.get("sweeps", {}).values()]
    words = "; ".join(dict.fromkeys(t for t in titles if t))
    heading = f"{words} ({name})" if words else name
    body += ["\\clearpage", f"\\section{{{latex.escape(heading)}}}"]
    try:
        table = tabulate(frame, first=claimed_metrics(frame), title=name)
    except ResultsError as error:
        body.append(latex.escape(places.short(f"No table: {error}")))
        return []
    texts = {
        "table.tex": latex.to_latex(table, siunitx=siunitx),
        "table.csv": export.to_csv(figures.complete(table, frame)),
        "table.md": export.to_markdown(table),
    }
    for file, text in texts.items():
        atomic.write_text(directory / folder / file, text)
    drawn = figures.draw(table, frame, directory / folder)
    body.append(f"\\input{{{folder}/table}}")
    body += _figures(drawn.shown, folder)
    body += [latex.escape(places.short(f"Not drawn: {p}.")) + "\n" for p in drawn.problems]
    return [*(directory / folder / file for file in texts), *drawn.files]


def _figures(shown: Sequence[figures.Shown], folder: str) -> list[str]:
    """Two figures in a line, wide ones in a line of their own; lines go over pages."""
    narrow = [_figure(one, folder, 0.49) for one in shown if not one.wide]
    pairs = [narrow[i : i + 2] for i in range(0, len(narrow), 2)]
    lines = [r"\hfill".join(pair) for pair in pairs]
    lines += [_figure(one, folder, 1.0) for one in shown if one.wide]
    return [PARAGRAPH + line + r"\par" for line in lines]


def _figure(one: figures.Shown, folder: str, width: float) -> str:
    # A name with dots needs braces, so that its end is not taken for the file's kind.
    return (
        f"\\begin{{minipage}}[t]{{{width}\\linewidth}}\\centering"
        f"\\includegraphics[width=\\linewidth,height=0.44\\textheight,keepaspectratio]"
        f"{{{{{folder}/{one.pdf.stem}}}.pdf}}\\\\"
        f"{{\\footnotesize {latex.breakable(one.words)}}}\\end{{minipage}}"
    )


def claims_table(verdicts: Sequence[claims.Verdict]) -> str:
    """The claims and their verdicts as a table that may run over several pages."""
    lines = [
        r"\begingroup\small",
        r"\begin{longtable}{@{}>{\raggedright\arraybackslash}p{0.27\linewidth}"
        r">{\raggedright\arraybackslash}p{0.13\linewidth}"
        r">{\raggedright\arraybackslash}p{0.45\linewidth}r@{}}",
        r"\toprule claim & verdict & numbers & n \\ \midrule \endhead \bottomrule \endfoot",
    ]
    for i, v in enumerate(verdicts):
        lines += [r"\addlinespace"] if i else []
        words = [latex.breakable(f"{v.sweep}: {v.text}"), latex.escape(v.verdict)]
        numbers = latex.breakable(f"{v.why} ({v.test})" if v.test else v.why)
        lines.append(" & ".join([*words, numbers, str(v.seeds)]) + r" \\")
    return "\n".join([*lines, r"\end{longtable}", r"\endgroup", ""])
