"""What a paper takes from the results: the methods paragraph and the appendix.

The paragraph says nothing that the records of the runs do not say. A setting that differs between
runs is given with all its values. Several sweeps have one paragraph each, after one of what is the
same in all. Texts for readers on other machines name no directory of this one (:class:`Places`).
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from fisher_lab.results import claims, export, figures, manifest
from fisher_lab.results.export import breakable, escape
from fisher_lab.results.figure_style import file_name
from fisher_lab.results.hypotheses import claimed_metrics
from fisher_lab.results.table import tabulate
from fisher_lab.results.values import (
    ResultsError,
    Shared,
    column,
    filter_runs,
    label,
    levels,
    runs_of_sweep,
)
from fisher_lab.runs import atomic
from fisher_lab.runs.identity import LEFT_OUT
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
    own = {sweep: sentences(runs_of_sweep(frame, sweep)) for sweep in sweeps}
    done = [text for text in own.values() if text != [NOTHING]]
    alike = [s for s in done[0] if all(s in text for text in done)] if len(done) > 1 else []
    rest = [(sweep, [s for s in text if s not in alike]) for sweep, text in own.items()]
    return [*([("", alike)] if alike else []), *((sweep, text) for sweep, text in rest if text)]


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
    runs = filter_runs(frame, frame["status"] == Status.COMPLETED)
    if runs.empty:
        return [NOTHING]
    said = [*_models(runs), *_kfac(runs), *_numerics(runs), *_spectra(runs), *_machine(runs)]
    lost = column(filter_runs(frame, frame["status"] != Status.COMPLETED), "status").value_counts()
    if len(lost):
        counts = join([f"{count} {status}" for status, count in lost.items()])
        said.append(f"Of {len(frame)} runs, {counts}; the tables show them as such.")
    return [sentence for sentence in said if sentence]


def _has(runs: pd.DataFrame, *names: str) -> bool:
    return all(name in runs and column(runs, name).notna().any() for name in names)


def _values(runs: pd.DataFrame, name: str) -> list[Any]:
    return levels(column(runs, name)) if name in runs else []


def _list(runs: pd.DataFrame, name: str, null: str = "none") -> str:
    """All values of a setting: ``1e-5``, ``1e-5, 1e-4 and 1e-3``."""
    words = map(label, _values(runs, name))
    return join([null if word == "null" else word for word in words])


def join(words: Sequence[str]) -> str:
    """``a, b and c``."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _range(runs: pd.DataFrame, name: str, form: str = ".3g") -> str:
    numbers = column(runs, name).dropna().astype(float)
    low, high = numbers.min(), numbers.max()
    return f"{low:{form}}" if low == high else f"{low:{form}} to {high:{form}}"


def _models(runs: pd.DataFrame) -> list[str]:
    said = []
    if _has(runs, "model.name"):
        size = "provenance.workbench.model.parameters"
        count = f" ({_range(runs, size, ',.0f')} parameters)" if _has(runs, size) else ""
        verb = "The models were" if len(_values(runs, "model.name")) > 1 else "The model was"
        said.append(f"{verb} {_list(runs, 'model.name')}{count}, on {_list(runs, 'data.name')}.")
    trained = _trained(runs)
    analysed, trainings = filter_runs(runs, ~trained), filter_runs(runs, trained)
    if _has(analysed, "tokens", "data.seq_len"):
        count = _list(analysed, "kfac.n_batches")
        said.append(
            f"The factors were computed from {_range(analysed, 'tokens', ',.0f')} tokens "
            f"({count} {'batch' if count == '1' else 'batches'} of "
            f"{_list(analysed, 'data.batch_size')} sequences of "
            f"{_list(analysed, 'data.seq_len')} tokens)."
        )
    if _has(trainings, "tokens", "train/steps", "optimizer.name"):
        each = trainings.assign(step=trainings["tokens"] / trainings["train/steps"])
        rate = _list(trainings, "optimizer.lr", "of the recipe")
        said.append(
            f"The training used the optimiser {_list(trainings, 'optimizer.name')} (learning rate "
            f"{rate}) for {_range(trainings, 'train/steps', ',.0f')} steps of "
            f"{_range(each, 'step', ',.0f')} tokens."
        )
    if _has(runs, "seed"):
        numbers = sorted(set(runs.groupby("sweep")["seed"].nunique().tolist()))
        words = "1 seed" if numbers == [1] else f"{join(list(map(str, numbers)))} seeds"
        more = ", depending on the sweep" if len(numbers) > 1 else ""
        said.append(f"Every setting was run with {words}{more}.")
    return said


def _trained(runs: pd.DataFrame) -> pd.Series:
    """Which runs are trainings."""
    if "task.name" not in runs:
        return pd.Series(False, index=runs.index)
    return column(runs, "task.name") == "train"


def _kfac(runs: pd.DataFrame) -> list[str]:
    if "optimizer.name" in runs:  # other optimisers have no use for the section kfac
        runs = filter_runs(runs, ~_trained(runs) | runs["optimizer.name"].isin(["kfac", "ekfac"]))
    if not _has(runs, "kfac.policy"):
        return []
    trainings = filter_runs(runs, _trained(runs))
    kinds = [FISHER.get(str(kind), str(kind)) for kind in _values(runs, "kfac.fisher")]
    kappa = _list(runs, "kfac.max_condition_number", "none (no floor)")
    said = [
        f"The curvature was K-FAC with {join(kinds)}; layers used the Woodbury identity according "
        f"to the policy {_list(runs, 'kfac.policy')}.",
        f"Tikhonov damping was {_damping(runs, trainings)}; damped eigenvalues were clamped from "
        f"below at lambda_max / kappa, kappa = {kappa}{_clipped(runs)}.",
    ]
    if "reduce" in map(label, _values(runs, "kfac.sharing")):
        said.append(f"Tokens shared weights by K-FAC-{_list(runs, 'kfac.sharing')}.")
    if _has(trainings, "kfac.update_freq"):
        which = "" if len(trainings) == len(runs) else " in the trainings"
        freq = _list(trainings, "kfac.update_freq")
        said.append(f"The factors were refreshed every {freq} steps{which}.")
    if _has(runs, "kfac.reduce", "dist/world_size"):
        said.append(f"Several ranks were reduced by {_list(runs, 'kfac.reduce')}.")
    chosen = list(map(label, _values(runs, "kfac.ekfac")))
    if "true" in chosen:
        corrected = filter_runs(runs, column(runs, "kfac.ekfac").astype(bool))
        said.append(
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


def _numerics(runs: pd.DataFrame) -> list[str]:
    if not _has(runs, "kfac.core_dtype"):
        return []
    stored = _values(runs, "kfac.woodbury_dtype") or ["auto"]
    own = [word.replace("auto", "their own dtype") for word in map(label, stored)]
    error = "kfac/storage_error_max"
    said = [
        f"Token gradients were stored in {join(own)}, decomposed in "
        f"{_list(runs, 'kfac.core_dtype')} and applied in {_list(runs, 'kfac.apply_dtype')}"
        + (f" (the largest storage error was {_range(runs, error)})." if _has(runs, error) else ".")
    ]
    if _has(runs, "kfac/jitter_events", "kfac/fallbacks"):
        jitter, fallbacks = (column(runs, f"kfac/{k}") for k in ("jitter_events", "fallbacks"))
        needed, fell_back = int((jitter > 0).sum()), int((fallbacks > 0).sum())
        said.append(
            f"Cholesky factorisations needed jitter in {needed} of {len(runs)} runs "
            f"({int(jitter.sum())} times) and fell back to an eigendecomposition in {fell_back}."
            if needed or fell_back
            else "No Cholesky factorisation needed jitter or a fallback."
        )
    return said


def _spectra(runs: pd.DataFrame) -> list[str]:
    if "spectral.enabled" not in runs:
        return []
    on = filter_runs(runs, column(runs, "spectral.enabled").astype(bool))
    if on.empty:
        return []
    return [
        "The spectra are those of the empirical Fisher matrix with one block per "
        f"{_list(on, 'spectral.block_structure')} and one sample per "
        f"{_list(on, 'spectral.sample_unit')}, by the {_list(on, 'spectral.storage_mode')} method."
    ]


def _machine(runs: pd.DataFrame) -> list[str]:
    names = {"fisher_lab": "fisher-lab", "Python": "python", "PyTorch": "torch",
             "Transformers": "transformers"}  # fmt: skip
    keys = {name: f"provenance.versions.{key}" for name, key in names.items()}
    versions = [f"{name} {_list(runs, key)}" for name, key in keys.items() if _has(runs, key)]
    said = [f"The software was {join(versions)}." if versions else ""]
    if _has(runs, "provenance.git.commit"):
        commits = [str(c)[:12] for c in _values(runs, "provenance.git.commit") if c]
        dirty = "true" in map(label, _values(runs, "provenance.git.dirty"))
        note = ", with uncommitted changes in some runs" if dirty else ""
        said.append(f"The code was at commit {join(commits)}{note}.")
    if _has(runs, "provenance.device"):
        cpu, threads = "provenance.host.cpu", "provenance.threads"
        model = f" ({_list(runs, cpu)})" if _has(runs, cpu) else ""
        count = _list(runs, threads) if _has(runs, threads) else ""
        with_threads = f" with {count} thread{'' if count == '1' else 's'}" if count else ""
        said.append(f"The device was {_list(runs, 'provenance.device')}{model}{with_threads}.")
    return said


# ---- paths ---------------------------------------------------------------------------------------

# Two parts at least, and not the rest of a relative path, of a URL or of a unit ("tokens /s").
ABSOLUTE = re.compile(r"(?<![\w.~:/$}-])(?:/[^\s/'\"`,;:()<>\[\]{}|=]+){2,}/?")
SWEEPS = "sweeps="


class Places:
    """Shortens the paths in texts for readers on another machine.

    A path is shown relative to the results directory, the working directory or the home directory;
    of any other absolute path only the file's name is shown.

    Args:
        frame: of runs; the directories above its sweeps are the results directories.
        home: the home directory; by default that of the user.
        roots: the directories that were the working and the home directory of whoever wrote a
            text first, in the place of those of now.
    """

    def __init__(
        self, frame: pd.DataFrame, home: Path | None = None, roots: manifest.Roots | None = None
    ) -> None:
        above = {Path(directory).absolute().parent for directory in frame.attrs.get("sweeps", {})}
        if roots is None:
            user = str(Path.home() if home is None else home)
            roots = {str(Path.cwd()): (".", True), user: ("~", True)}
        self.roots = dict.fromkeys(map(str, above), (".", False)) | roots
        self._typed = {root: short for root, (short, typed) in roots.items() if typed}
        longest = sorted(self.roots.items(), key=lambda item: -len(item[0]))
        self._roots = [(root, short) for root, (short, _) in longest if root != os.sep]

    def run(self, directory: str) -> str:
        """A run directory, relative to the results directory."""
        return self.short(os.path.abspath(directory))

    def short(self, text: str) -> str:
        """A text with its paths shortened."""
        for root, instead in self._roots:
            inside = "" if instead == "." else f"{instead}/"
            path = rf"(?<![\w.~/-]){re.escape(root)}"
            text = re.sub(rf"{path}/(?=[\w.~-])", inside, text)
            text = re.sub(rf"{path}/?(?![\w./-])", instead, text)
        return ABSOLUTE.sub(lambda found: Path(found[0]).name, text)

    def reasons(self, frame: pd.DataFrame) -> pd.DataFrame:
        """The runs, and the directories that were left out, with shortened reasons."""
        shown = frame.assign(
            reason=frame["reason"].map(lambda r: self.short(r) if isinstance(r, str) else r)
        )
        left = [
            replace(one, directory=self.run(one.directory), reason=self.short(one.reason))
            for one in frame.attrs.get("left_out", [])
        ]
        shown.attrs = {**frame.attrs, "left_out": Shared(left)}
        return shown

    def shown(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Like :meth:`reasons`, with the settings that are paths shortened too.

        Claims must not be tested with these runs: a claim names settings in full.
        """
        shown = self.reasons(frame)
        for name in frame.attrs.get("config", []):
            values = [v for v in dict.fromkeys(frame[name]) if isinstance(v, str) and "/" in v]
            if values:
                shown[name] = frame[name].replace(self._distinct(values))
        return shown

    def _distinct(self, values: Sequence[str]) -> dict[str, str]:
        """Value -> its short form, with a number where two would be the same."""
        found: dict[str, str] = {}
        for value in values:
            short = text = self.short(value)
            taken = set(found.values())
            for number in itertools.count(2):
                if text not in taken:
                    break
                text = f"{short} ({number})"
            found[value] = text
        return found

    def command(self, overrides: str) -> str:
        """The command that runs one cell again, and nothing else.

        Args:
            overrides: of its run, quoted for a shell. A cell of a sweep file names that file; the
                cell's own values replace the file's axes.
        """
        words = shlex.split(overrides)
        sweep = any(word.lstrip("+").startswith(SWEEPS) for word in words)
        kept = [self._word(word) for word in words if not _is_a_place(word)]
        return " ".join(["python -m fisher_lab", *(["-m"] if sweep else []), *kept])

    def _word(self, word: str) -> str:
        key, sign, value = word.partition("=")
        for root, instead in self._typed.items():  # from where a command is typed
            if value.startswith(f"{root}/"):
                rest = shlex.quote(value[len(root) + 1 :])
                return shlex.quote(key) + sign + (rest if instead == "." else f'"$HOME"/{rest}')
        return shlex.quote(word)


def _is_a_place(word: str) -> bool:
    """Whether an override only says where something is kept, by a path of its machine."""
    key, _, value = word.partition("=")
    name = key.lstrip("+").replace("/", ".")
    return value.startswith("/") and any(name == o or name.startswith(f"{o}.") for o in LEFT_OUT)


# ---- the appendix --------------------------------------------------------------------------------

DOCUMENT = "appendix.tex"
PARAGRAPH = "\\par\\medskip\\noindent"


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
    body = ["\\section{Methods}", "\\input{methods}"]
    if verdicts:
        texts["claims.tex"] = claims_table(verdicts)
        body += ["\\section{Claims}", "\\input{claims}"]
    files = _write(directory, texts)
    for sweep in dict.fromkeys(frame["sweep"]):
        lines, written = _section(runs_of_sweep(frame, sweep), sweep, directory, siunitx, places)
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
    frame: pd.DataFrame, name: str, directory: Path, siunitx: bool, places: Places
) -> tuple[list[str], list[Path]]:
    """The lines about one sweep, and the files that they include."""
    folder = file_name(name)
    titles = [str(s.about.get("title") or "") for s in frame.attrs.get("sweeps", {}).values()]
    words = "; ".join(dict.fromkeys(filter(None, titles)))
    heading = f"{words} ({name})" if words else name
    body = ["\\clearpage", f"\\section{{{escape(heading)}}}"]
    try:
        table = tabulate(frame, first=claimed_metrics(frame), title=name)
    except ResultsError as error:
        return [*body, escape(places.short(f"No table: {error}"))], []
    full = figures.complete(table, frame)
    files = export.write_table(table, full, directory / folder, siunitx=siunitx)
    drawn = figures.draw(table, frame, directory / folder)
    body.append(f"\\input{{{folder}/{export.TABLE_FILE}}}")
    # Two figures in a line, wide ones in a line of their own; lines may go over pages.
    narrow = [_figure(one, folder, 0.49) for one in drawn.figures if not one.wide]
    lines = [r"\hfill".join(narrow[i : i + 2]) for i in range(0, len(narrow), 2)]
    lines += [_figure(one, folder, 1.0) for one in drawn.figures if one.wide]
    body += [PARAGRAPH + line + r"\par" for line in lines]
    body += [escape(places.short(f"Not drawn: {problem}.")) + "\n" for problem in drawn.problems]
    return body, [*files, *drawn.files]


def _figure(one: figures.DrawnFigure, folder: str, width: float) -> str:
    # A name with dots needs braces, so that LaTeX does not take its end for the file's type.
    return (
        f"\\begin{{minipage}}[t]{{{width}\\linewidth}}\\centering"
        f"\\includegraphics[width=\\linewidth,height=0.44\\textheight,keepaspectratio]"
        f"{{{{{folder}/{one.files[0].stem}}}.pdf}}\\\\"
        f"{{\\footnotesize {breakable(one.words)}}}\\end{{minipage}}"
    )


def claims_table(verdicts: Sequence[claims.Verdict]) -> str:
    """The claims and their verdicts as a table that may run over several pages."""
    rows = []
    for v in verdicts:
        numbers = breakable(f"{v.explained} ({v.tested})" if v.test else v.explained)
        q = claims.false_discovery_words(v)
        words = [breakable(f"{v.sweep}: {v.text}"), escape(v.shown), numbers, str(v.seeds), q]
        rows.append(" & ".join(words) + r" \\")
    return "\n".join(
        [
            r"\begingroup\small",
            r"\begin{longtable}{@{}>{\raggedright\arraybackslash}p{0.27\linewidth}"
            r">{\raggedright\arraybackslash}p{0.13\linewidth}"
            r">{\raggedright\arraybackslash}p{0.40\linewidth}rr@{}}",
            r"\toprule claim & verdict & numbers & n & q \\ \midrule \endhead \bottomrule \endfoot",
            "\n\\addlinespace\n".join(rows),
            r"\end{longtable}",
            rf"\noindent {escape(claims.DISCOVERY)}\par",
            r"\endgroup",
            "",
        ]
    )
