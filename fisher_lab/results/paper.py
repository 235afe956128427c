"""What a paper takes from the results: the methods paragraph and the appendix.

The paragraph says nothing that the records of the runs do not say. A setting that differs between
runs is given with all its values. Several sweeps have one paragraph each, after one of what is the
same in all. Texts for readers on other machines name no directory of this one (:class:`Places`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from fisher_lab.results import claims, export, figures, labels, manifest
from fisher_lab.results.export import breakable, escape
from fisher_lab.results.figure_style import file_name
from fisher_lab.results.hypotheses import claimed_metrics
from fisher_lab.results.places import Places
from fisher_lab.results.table import Table, tabulate
from fisher_lab.results.values import (
    ResultsError,
    column,
    filter_runs,
    label,
    levels,
    metric_names,
    runs_of_sweep,
)
from fisher_lab.runs import atomic
from fisher_lab.runs.status import Status

FISHER = {
    "empirical": "the empirical Fisher matrix (labels from the data)",
    "mc": "Monte Carlo labels drawn from the model",
    "true": "the true Fisher matrix (expectation over the model's distribution)",
}

DAMPING_MODES = {
    "absolute": "",
    "relative": "in mean eigenvalues of each factor",
    "pi": "of the product, split by the factors' mean eigenvalues (Martens and Grosse 2015)",
}

NOTHING = "No run has completed."
UNLESS = "What a sweep says below replaces the sentence on the same matter here."


def paragraphs(frame: pd.DataFrame) -> list[tuple[str, list[str]]]:
    """The methods, sweep by sweep.

    Args:
        frame: from :func:`fisher_lab.results.load`.

    Returns:
        A heading and the sentences below it. One sweep has one paragraph without a heading. Several
        have first a paragraph without a heading, of what all have in common, and then one each.
    """
    sweeps = list(dict.fromkeys(frame["sweep"]))
    if len(sweeps) < 2:
        return [("", sentences(frame))]
    own = {sweep: _said(runs_of_sweep(frame, sweep)) for sweep in sweeps}
    usual = _usual([said for said in own.values() if NOTHING not in said.values()])
    groups: dict[tuple[str, ...], list[str]] = {}
    for sweep, said in own.items():
        rest = [text for kind, text in said.items() if usual.get(kind) != text]
        if NOTHING not in rest and (lacking := [kind for kind in usual if kind not in said]):
            rest.append(f"There is no {join(lacking, 'or')} in its records.")
        groups.setdefault(tuple(rest), []).append(sweep)
    own_words = [(join(names), list(rest)) for rest, names in groups.items() if rest]
    first = [UNLESS] if own_words and any(n > 1 for n in map(len, own.values())) else []
    return [*([("", [*first, *usual.values()])] if usual else []), *own_words]


def _usual(all_said: Sequence[dict[str, str]]) -> dict[str, str]:
    """Kind of a sentence -> the sentence that most sweeps share."""
    usual = {}
    for kind in dict.fromkeys(kind for said in all_said for kind in said):
        text, count = Counter(said[kind] for said in all_said if kind in said).most_common(1)[0]
        if count > 1:
            usual[kind] = text
    return usual


def markdown(frame: pd.DataFrame) -> str:
    """The methods for ``methods.md``."""

    def md(text: str) -> str:
        return text.replace("_", "\\_").replace("*", "\\*")

    return _joined(frame, lambda heading: f"### {md(heading)}\n\n", md)


def latex(frame: pd.DataFrame) -> str:
    """The methods for ``methods.tex``, a fragment."""
    return _joined(frame, lambda heading: f"\\paragraph{{{breakable(heading)}}}\n", breakable)


def _joined(frame: pd.DataFrame, heading: Callable[[str], str], text: Callable[[str], str]) -> str:
    parts = [
        (heading(name) if name else "") + " ".join(map(text, said))
        for name, said in paragraphs(frame)
    ]
    return "\n\n".join(parts) + "\n"


# ---- the sentences -------------------------------------------------------------------------------


def sentences(frame: pd.DataFrame) -> list[str]:
    """What was done in the completed runs of one sweep.

    Args:
        frame: from :func:`fisher_lab.results.load`.
    """
    return list(_said(frame).values())


def _said(frame: pd.DataFrame) -> dict[str, str]:
    """Kind of a sentence -> what was done in the completed runs of one sweep."""
    runs = filter_runs(frame, frame["status"] == Status.COMPLETED)
    if runs.empty:
        return {"": NOTHING}
    said = _models(runs) | _kfac(runs) | _numerics(runs) | _spectra(runs) | _machine(runs)
    lost = column(filter_runs(frame, frame["status"] != Status.COMPLETED), "status").value_counts()
    if len(lost):
        counts = join([f"{count} {status}" for status, count in lost.items()])
        said["lost run"] = f"Of {len(frame)} runs, {counts}; the tables show them as such."
    return said


def _has(runs: pd.DataFrame, *names: str) -> bool:
    return all(name in runs and column(runs, name).notna().any() for name in names)


def _values(runs: pd.DataFrame, name: str) -> list[Any]:
    return levels(column(runs, name)) if name in runs else []


def _list(runs: pd.DataFrame, name: str, null: str = "none") -> str:
    """All values of a setting: ``1e-5``, ``1e-5, 1e-4 and 1e-3``."""
    words = map(label, _values(runs, name))
    return join([null if word == "null" else word for word in words])


def join(words: Sequence[str], last: str = "and") -> str:
    """``a, b and c``."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"


def _range(runs: pd.DataFrame, name: str, form: str = ".3g") -> str:
    numbers = column(runs, name).dropna().astype(float)
    low, high = numbers.min(), numbers.max()
    return f"{low:{form}}" if low == high else f"{low:{form}} to {high:{form}}"


def _models(runs: pd.DataFrame) -> dict[str, str]:
    said: dict[str, str] = {}
    if _has(runs, "model.name"):
        size = "provenance.workbench.model.parameters"
        count = f" ({_range(runs, size, ',.0f')} parameters)" if _has(runs, size) else ""
        verb = "The models were" if len(_values(runs, "model.name")) > 1 else "The model was"
        said["model"] = f"{verb} {_list(runs, 'model.name')}{count}, on {_list(runs, 'data.name')}."
    trained = _trained(runs)
    analysed, trainings = filter_runs(runs, ~trained), filter_runs(runs, trained)
    if _has(analysed, "tokens", "data.seq_len"):
        count = _list(analysed, "kfac.n_batches")
        said["batch"] = (
            f"The factors were computed from {_range(analysed, 'tokens', ',.0f')} tokens "
            f"({count} {'batch' if count == '1' else 'batches'} of "
            f"{_list(analysed, 'data.batch_size')} sequences of "
            f"{_list(analysed, 'data.seq_len')} tokens)."
        )
    if _has(trainings, "tokens", "train/steps", "optimizer.name"):
        each = trainings.assign(step=trainings["tokens"] / trainings["train/steps"])
        rate = _list(trainings, "optimizer.lr", "of the recipe")
        said["training"] = (
            f"The training used the optimiser {_list(trainings, 'optimizer.name')} (learning rate "
            f"{rate}) for {_range(trainings, 'train/steps', ',.0f')} steps of "
            f"{_range(each, 'step', ',.0f')} tokens."
        )
    if _has(runs, "seed"):
        numbers = sorted(set(runs.groupby("sweep")["seed"].nunique().tolist()))
        words = "1 seed" if numbers == [1] else f"{join(list(map(str, numbers)))} seeds"
        more = ", depending on the sweep" if len(numbers) > 1 else ""
        said["seed"] = f"Every setting was run with {words}{more}."
    return said


def _trained(runs: pd.DataFrame) -> pd.Series:
    """Which runs are trainings."""
    if "task.name" not in runs:
        return pd.Series(False, index=runs.index)
    return column(runs, "task.name") == "train"


def _kfac(runs: pd.DataFrame) -> dict[str, str]:
    if "optimizer.name" in runs:  # other optimisers have no use for the section kfac
        runs = filter_runs(runs, ~_trained(runs) | runs["optimizer.name"].isin(["kfac", "ekfac"]))
    if not _has(runs, "kfac.policy"):
        return {}
    trainings = filter_runs(runs, _trained(runs))
    kinds = [FISHER.get(str(kind), str(kind)) for kind in _values(runs, "kfac.fisher")]
    kappa = _list(runs, "kfac.max_condition_number", "none (no floor)")
    said = {
        "curvature": f"The curvature was K-FAC with {join(kinds)}; layers used the Woodbury "
        f"identity according to the policy {_list(runs, 'kfac.policy')}.",
        "damping": f"Tikhonov damping was {_damping(runs, trainings)}; damped eigenvalues were "
        f"clamped from below at lambda_max / kappa, kappa = {kappa}{_clipped(runs)}.",
    }
    if "reduce" in map(label, _values(runs, "kfac.sharing")):
        said["sharing"] = f"Tokens shared weights by K-FAC-{_list(runs, 'kfac.sharing')}."
    if _has(trainings, "kfac.update_freq"):
        which = "" if len(trainings) == len(runs) else " in the trainings"
        freq = _list(trainings, "kfac.update_freq")
        said["refresh"] = f"The factors were refreshed every {freq} steps{which}."
    if _has(runs, "kfac.reduce", "dist/world_size"):
        said["reduction"] = f"Several ranks were reduced by {_list(runs, 'kfac.reduce')}."
    chosen = list(map(label, _values(runs, "kfac.ekfac")))
    if "true" in chosen:
        corrected = filter_runs(runs, column(runs, "kfac.ekfac").astype(bool))
        said["eigenvalue correction"] = (
            f"{'In some runs, e' if 'false' in chosen else 'E'}igenvalues were corrected in the "
            "Kronecker eigenbasis (EKFAC) by the gradients of each "
            f"{' or '.join(map(label, _values(corrected, 'kfac.ekfac_unit'))) or 'token'}."
        )
    return said


def _damping(runs: pd.DataFrame, trainings: pd.DataFrame) -> str:
    """``1e-4 on each factor``, or what each side has; with its unit."""
    sides = {}
    for side in ("A", "G"):
        own = f"kfac.damping_{side}"
        common = column(runs, "kfac.damping")
        sides[side] = column(runs, own).fillna(common) if own in runs else common
    same = sides["A"].equals(sides["G"])
    shown = runs.assign(**sides)
    words = (
        f"{_list(shown, 'A')} on each factor"
        if same
        else f"{_list(shown, 'A')} on A and {_list(shown, 'G')} on G"
    )
    modes = [DAMPING_MODES[mode] for mode in map(label, _values(runs, "kfac.damping_mode"))]
    words += f" ({', or '.join(modes)})" if any(modes) else ""
    ratios = [r for r in _values(trainings, "optimizer.damping_ratio") if r != 1]
    if ratios and same:
        times = join(list(map(label, ratios)))
        words += f", in the trainings {times} times as much on the A side"
    return words


def _clipped(runs: pd.DataFrame) -> str:
    fractions = [
        f"{_range(runs, f'kfac/clipped_frac_{side}', '.2%')} of {side}"
        for side in ("A", "G")
        if _has(runs, f"kfac/clipped_frac_{side}")
    ]
    return f", which clipped {join(fractions)}" if fractions else ""


def _numerics(runs: pd.DataFrame) -> dict[str, str]:
    if not _has(runs, "kfac.core_dtype"):
        return {}
    stored = _values(runs, "kfac.woodbury_dtype") or ["auto"]
    own = [word.replace("auto", "their own dtype") for word in map(label, stored)]
    error = "kfac/storage_error_max"
    said = {
        "arithmetic": f"Token gradients were stored in {join(own)}, decomposed in "
        f"{_list(runs, 'kfac.core_dtype')} and applied in {_list(runs, 'kfac.apply_dtype')}"
        + (f" (the largest storage error was {_range(runs, error)})." if _has(runs, error) else ".")
    }
    if _has(runs, "kfac/jitter_events", "kfac/fallbacks"):
        jitter, fallbacks = (column(runs, f"kfac/{k}") for k in ("jitter_events", "fallbacks"))
        needed, fell_back = int((jitter > 0).sum()), int((fallbacks > 0).sum())
        said["count of fallbacks"] = (
            f"Cholesky factorisations needed jitter in {needed} of {len(runs)} runs "
            f"({int(jitter.sum())} times) and fell back to an eigendecomposition in {fell_back}."
            if needed or fell_back
            else "No Cholesky factorisation needed jitter or a fallback."
        )
    return said


def _spectra(runs: pd.DataFrame) -> dict[str, str]:
    if "spectral.enabled" not in runs:
        return {}
    on = filter_runs(runs, column(runs, "spectral.enabled").astype(bool))
    if on.empty:
        return {}
    return {
        "spectrum": "The spectra are those of the empirical Fisher matrix with one block per "
        f"{_list(on, 'spectral.block_structure')} and one sample per "
        f"{_list(on, 'spectral.sample_unit')}, by the {_list(on, 'spectral.storage_mode')} method."
    }


def _machine(runs: pd.DataFrame) -> dict[str, str]:
    names = {"fisher_lab": "fisher-lab", "Python": "python", "PyTorch": "torch",
             "Transformers": "transformers"}  # fmt: skip
    keys = {name: f"provenance.versions.{key}" for name, key in names.items()}
    versions = [f"{name} {_list(runs, key)}" for name, key in keys.items() if _has(runs, key)]
    said = {"software": f"The software was {join(versions)}."} if versions else {}
    if _has(runs, "provenance.git.commit"):
        commits = [str(c)[:12] for c in _values(runs, "provenance.git.commit") if c]
        dirty = "true" in map(label, _values(runs, "provenance.git.dirty"))
        note = ", with uncommitted changes in some runs" if dirty else ""
        said["commit"] = f"The code was at commit {join(commits)}{note}."
    if _has(runs, "provenance.device"):
        cpu, threads = "provenance.host.cpu", "provenance.threads"
        model = f" ({_list(runs, cpu)})" if _has(runs, cpu) else ""
        count = _list(runs, threads) if _has(runs, threads) else ""
        with_threads = f" with {count} thread{'' if count == '1' else 's'}" if count else ""
        said["device"] = f"The device was {_list(runs, 'provenance.device')}{model}{with_threads}."
    return said


# ---- the appendix --------------------------------------------------------------------------------

DOCUMENT = "appendix.tex"
MACROS = "claim-macros.tex"
BESIDE = 0.6
"""Part of a line: a narrower figure that is alone on it has its caption beside it."""

LAYOUT = r"""% Tables stand where they are, figures where there is room; no page is left half empty.
\makeatletter
\renewenvironment{table}[1][]{\par\addvspace{2ex}\noindent\begin{minipage}{\linewidth}%
  \def\@captype{table}\footnotesize}{\end{minipage}\par\addvspace{2ex}}
\setlength{\@fptop}{0pt}
\makeatother
\renewcommand{\topfraction}{0.95}\renewcommand{\bottomfraction}{0.9}
\renewcommand{\textfraction}{0.05}\renewcommand{\floatpagefraction}{0.8}
\setcounter{topnumber}{9}\setcounter{bottomnumber}{9}\setcounter{totalnumber}{9}
\renewcommand{\paragraph}[1]{\par\smallskip\noindent\textbf{#1}\quad}
\raggedbottom"""


def write_appendix(
    frame: pd.DataFrame,
    directory: Path,
    *,
    siunitx: bool = False,
    places: Places | None = None,
    report: Path | None = None,
) -> list[Path]:
    """Write ``appendix.tex``, which compiles in its directory, and everything that it shows.

    Args:
        frame: from :func:`fisher_lab.results.load`.
        directory: made where it is missing; each sweep has a directory in it.
        siunitx: whether LaTeX formats the numbers by that package.
        places: how paths are shortened; by default by the working and the home directory.
        report: the page that was written into the directory before, if one was.

    Returns:
        The files that were written: ``appendix.json``, by which ``fisher-lab verify`` checks the
        others, last but one, ``appendix.tex`` last.
    """
    places, measured = places or Places(frame), frame
    verdicts = claims.evaluate(places.reasons(frame))
    frame = places.shown(frame)
    texts = {"methods.tex": latex(frame), "methods.md": markdown(frame)}
    texts[claims.CLAIMS_FILE] = claims.to_json(verdicts)
    body = [LAYOUT, "\\section{Methods}", "\\label{sec:methods}", "{\\small\\input{methods}}"]
    if verdicts:
        texts[MACROS] = claim_macros(verdicts)
        texts["claims.tex"] = claims_table(verdicts, titles(frame))
        body.insert(0, f"\\input{{{Path(MACROS).stem}}}")
        body += ["\\section{Claims}", "\\input{claims}"]
    files = _write(directory, texts)
    for sweep in dict.fromkeys(frame["sweep"]):
        own = [verdict for verdict in verdicts if verdict.sweep == sweep]
        runs = runs_of_sweep(frame, sweep)
        lines, written = _section(runs, sweep, directory, siunitx, places, own)
        body += lines
        files += written
    document = export.document("\n".join(body), "Appendix")
    last = _write(directory, {DOCUMENT: document})
    page = [report] if report is not None else []
    about = manifest.of(measured, directory, [*files, *last, *page], places.roots)
    about["options"] = {"siunitx": siunitx, "report": report.name if report else None}
    return [*files, manifest.write(directory, manifest.APPENDIX_FILE, about), *last]


def _write(directory: Path, texts: dict[str, str]) -> list[Path]:
    for name, text in texts.items():
        atomic.write_text(directory / name, text)
    return [directory / name for name in texts]


def _section(
    frame: pd.DataFrame,
    name: str,
    directory: Path,
    siunitx: bool,
    places: Places,
    verdicts: Sequence[claims.Verdict],
) -> tuple[list[str], list[Path]]:
    """The lines about one sweep, and the files that they include."""
    folder, title = file_name(name), titles(frame).get(name, name)
    body = [f"\\section{{{escape(title)}}}", f"\\label{{sec:{folder}}}"]
    try:
        table = tabulate(frame, first=claimed_metrics(frame), title=name)
    except ResultsError as error:
        return [*body, escape(places.short(f"No table: {error}"))], []
    full, outcome = figures.complete(table, frame), _outcome(table, verdicts)
    given = {"siunitx": siunitx, "about": title, "outcome": outcome}
    files = export.write_table(table, full, directory / folder, **given)
    plans = _printed(figures.figure_makers(table, frame, joint=True), table, frame)
    drawn = figures.draw(table, frame, directory / folder, plans)
    body += [f"\\input{{{folder}/{export.TABLE_FILE}}}", *_lines(drawn.figures, folder, title)]
    body += [escape(places.short(f"Not drawn: {problem}.")) + "\n" for problem in drawn.problems]
    return body, [*files, *drawn.files]


def titles(frame: pd.DataFrame) -> dict[str, str]:
    """Name of a sweep -> its title, or its name."""
    found: dict[str, dict[str, None]] = {}
    for sweep in frame.attrs.get("sweeps", {}).values():
        found.setdefault(sweep.name, {})[str(sweep.about.get("title") or "")] = None
    return {name: "; ".join(filter(None, words)) or name for name, words in found.items()}


def _printed(plans: figures.Plans, table: Table, frame: pd.DataFrame) -> figures.Plans:
    """The figures of a page: the table has the numbers of a setting that is no scale.

    Time against memory is shown where a claim is about what something costs, and no figure of
    ranks has it. What was clipped is in the table.
    """
    stated = [c for sweep in frame.attrs.get("sweeps", {}).values() for c in sweep.claims]
    claimed = [c.get("metric") for c in stated if isinstance(c, dict) and "a" in c and "b" in c]
    costs = any(str(metric).startswith("kfac/") for metric in claimed)
    axis, ranks = figures.main_axis(table), figures.rank_axis(table, metric_names(frame))
    is_scale = axis is not None and figures.is_scale(table, axis)
    left_out = {figures.CLIPPED, *([] if costs and ranks is None else [figures.TRADE])}
    left_out |= set() if is_scale else figures.joint_makers(table).keys()
    return {name: make for name, make in plans.items() if name not in left_out}


def _outcome(table: Table, verdicts: Sequence[claims.Verdict]) -> str:
    """What came out, for the caption of a table: the best settings, and the verdicts."""
    names = [*table.row_names, *table.col_names]
    best = [
        f"{labels.metric(metric).short} at {figures.settings_words(names, (*row, *col))}"
        for row, metric, col in sorted(table.best, key=lambda key: table.metrics.index(key[1]))
    ]
    said = [escape(f"Best: {'; '.join(best)}.")] if best and names else []
    counts = Counter(verdict.verdict for verdict in verdicts)
    if counts:
        words = join([f"{count} \u00d7 {verdict}" for verdict, count in counts.items()])
        said.append(f"Verdicts on its claims: {escape(words)} (Table~\\ref{{tab:claims}}).")
    return " ".join(said)


def _lines(drawn: Sequence[figures.DrawnFigure], folder: str, title: str) -> list[str]:
    """The figures, as many beside one another as fit on a line."""
    rows: list[list[figures.DrawnFigure]] = []
    for one in drawn:
        if rows and sum(known.width for known in rows[-1]) + one.width <= 1:
            rows[-1].append(one)
        else:
            rows.append([one])
    return [
        "\n".join(
            [
                "\\begin{figure}[!htbp]",
                "\\centering\\footnotesize",
                "\\hfill\n".join(
                    _figure(one, folder, title, len(row) == 1 and one.width < BESIDE) for one in row
                ),
                "\\end{figure}",
            ]
        )
        for row in rows
    ]


def _figure(one: figures.DrawnFigure, folder: str, title: str, beside: bool) -> str:
    """A figure with its caption below or beside it."""
    # A name with dots needs braces, so that LaTeX does not take its end for the file's type.
    stem, size = one.files[0].stem, max(0.49, one.width - 0.01)
    caption = f"\\caption{{{breakable(f'{title}. {one.words}.')}}}\\label{{fig:{folder}-{stem}}}"
    rest = (
        f"\\hfill\\begin{{minipage}}[c]{{{0.97 - size:.3g}\\linewidth}}{caption}\\end{{minipage}}"
    )
    return (
        f"\\begin{{minipage}}[{'c' if beside else 't'}]{{{size:.3g}\\linewidth}}\\centering"
        f"\\includegraphics[width={min(one.width / size, 1.0):.3g}\\linewidth,"
        f"height=0.85\\textheight,keepaspectratio]{{{{{folder}/{stem}}}.pdf}}\n"
        f"{'' if beside else caption}\\end{{minipage}}{rest if beside else ''}"
    )


# ---- claims --------------------------------------------------------------------------------------


def claim_keys(verdicts: Sequence[claims.Verdict]) -> list[str]:
    r"""What ``\claim`` calls the claims: the sweep, and the claim's name or its place there."""
    keys: list[str] = []
    for verdict in verdicts:
        number = 1 + sum(key.startswith(f"{verdict.sweep} ") for key in keys)
        stated = verdict.claim.get("name") if isinstance(verdict.claim, dict) else None
        own = f"{verdict.sweep} {stated or number}"
        keys.append(own if own not in keys else f"{verdict.sweep} {number}")
    return [re.sub(r"[^A-Za-z0-9]+", "-", key) for key in keys]


def claim_macros(verdicts: Sequence[claims.Verdict]) -> str:
    r"""LaTeX that defines ``\claim{KEY}`` as a verdict with its numbers."""
    head = [
        r"% \claim{KEY}: the verdict on a claim, its number and interval; \claimverdict{KEY} alone",
        r"\newcommand{\claim}[1]{\claimof{#1}{claim}}",
        r"\newcommand{\claimverdict}[1]{\claimof{#1}{verdict}}",
        r"\newcommand{\claimof}[2]{\ifcsname fisherlab-#2-#1\endcsname"
        r"\csname fisherlab-#2-#1\endcsname\else\textbf{??}"
        r"\GenericWarning{}{There is no claim #1}\fi}",
    ]
    lines = []
    for key, v in zip(claim_keys(verdicts), verdicts, strict=True):
        words = breakable(f"{v.verdict} ({v.in_words}; n = {v.seeds})")
        for kind, text in (("claim", words), ("verdict", escape(v.verdict))):
            name = rf"\expandafter\def\csname fisherlab-{kind}-{key}\endcsname"
            lines.append(f"{name}{{{text}}}")
    return "\n".join([*head, *lines]) + "\n"


ALLOWED = r"-\allowbreak{}"


def claims_table(verdicts: Sequence[claims.Verdict], headings: Mapping[str, str] = {}) -> str:
    """The claims and their verdicts as a table that may run over several pages.

    Args:
        verdicts: of all sweeps.
        headings: name of a sweep -> its title.
    """
    common = claims.shared_objection(verdicts)
    notes: dict[str, int] = {}
    rows, keys = [], claim_keys(verdicts)
    for sweep in dict.fromkeys(v.sweep for v in verdicts):
        title = breakable(headings.get(sweep, sweep))
        rows.append(rf"\multicolumn{{6}}{{@{{}}l@{{}}}}{{\emph{{{title}}}}} \\*")
        for key, v in zip(keys, verdicts, strict=True):
            if v.sweep != sweep:
                continue
            said = filter(None, [v.tested, v.objection if not common else ""])
            marks = ",".join(str(notes.setdefault(text, len(notes) + 1)) for text in said)
            words = [
                rf"\texttt{{{key.replace('-', ALLOWED)}}}", breakable(v.text),
                escape(v.verdict if common else v.shown),
                breakable(v.in_words) + (f"$^{{{marks}}}$" if marks else ""),
                str(v.seeds), claims.false_discovery_words(v),
            ]  # fmt: skip
            rows.append(" & ".join(words) + r" \\")
    caption = "The claims that the sweeps state, and their verdicts by the runs. "
    caption += "n is the number of seeds of the smallest comparison (of a share that of runs). "
    caption += f"All verdicts are {claims.EXPLORATORY}: {common}. " if common else ""
    listed = [f"$^{{{number}}}$ {breakable(text)}" for text, number in notes.items()]
    return "\n".join(
        [
            r"\begingroup\footnotesize\setlength{\tabcolsep}{4pt}"
            r"\setlength{\LTcapwidth}{\linewidth}",
            r"\begin{longtable}{@{}>{\raggedright\arraybackslash}p{0.11\linewidth}"
            r">{\raggedright\arraybackslash}p{0.28\linewidth}"
            r">{\raggedright\arraybackslash}p{0.10\linewidth}"
            r">{\raggedright\arraybackslash}p{0.35\linewidth}rr@{}}",
            rf"\caption{{{escape(caption)}\texttt{{\textbackslash{{}}claim\{{key\}}}} is a verdict "
            r"with its numbers.}\label{tab:claims}\\",
            r"\toprule key & claim & verdict & numbers & n & q \\ \midrule \endfirsthead",
            r"\toprule key & claim & verdict & numbers & n & q \\ \midrule \endhead",
            r"\bottomrule \endfoot",
            "\n".join(rows),
            r"\end{longtable}",
            rf"\noindent {'; '.join(listed)}. {escape(claims.DISCOVERY)}\par",
            r"\endgroup",
            "",
        ]
    )
