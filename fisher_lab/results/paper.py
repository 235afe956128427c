"""The methods paragraph of a paper, filled from the records of the runs.

It says nothing that they do not say. A setting that differs between runs is given with all values.
Of several sweeps there is a paragraph each, after one of what is the same in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from fisher_lab.results.latex import breakable
from fisher_lab.results.values import Frame, label, levels, only
from fisher_lab.runs.status import Status

WORDS = {
    "empirical": "the empirical Fisher matrix (labels from the data)",
    "mc": "Monte Carlo labels drawn from the model",
    "true": "the true Fisher matrix (expectation over the model's distribution)",
}

NOTHING = "No run has completed."


def paragraphs(frame: Frame) -> list[tuple[str, list[str]]]:
    """What was done, sweep by sweep.

    Args:
        frame: from :func:`fisher_lab.results.loading`.

    Returns:
        A heading and the sentences below it. Of one sweep there is one paragraph without a heading;
        of several, first what all say alike, without a heading, and then the rest of each.
    """
    sweeps = list(dict.fromkeys(frame["sweep"]))
    if len(sweeps) < 2:
        return [("", sentences(frame))]
    own = {sweep: sentences(only(frame, sweep)) for sweep in sweeps}
    done = [text for text in own.values() if text != [NOTHING]]
    alike = [s for s in done[0] if all(s in text for text in done)] if len(done) > 1 else []
    rest = [(sweep, [s for s in text if s not in alike]) for sweep, text in own.items()]
    return [*([("", alike)] if alike else []), *((sweep, text) for sweep, text in rest if text)]


def sentences(frame: Frame) -> list[str]:
    """What was done in the completed runs of one sweep, a sentence each.

    Args:
        frame: from :func:`fisher_lab.results.loading`.
    """
    runs = frame[frame["status"] == Status.COMPLETED]
    runs.attrs = frame.attrs
    if runs.empty:
        return [NOTHING]
    parts = [*_models(runs), *_kfac(runs), *_numerics(runs), *_spectra(runs), *_machine(runs)]
    lost = frame[frame["status"] != Status.COMPLETED]["status"].value_counts()
    if len(lost):
        told = ", ".join(f"{count} {status}" for status, count in lost.items())
        parts.append(f"Of {len(frame)} runs, {told} and are reported as such.")
    return [part for part in parts if part]


def markdown(frame: Frame) -> str:
    """The paragraph for ``methods.md``."""
    parts = []
    for heading, text in paragraphs(frame):
        parts += [f"### {_md(heading)}"] if heading else []
        parts.append(_md(" ".join(text)))
    return "\n\n".join(parts) + "\n"


def _md(text: str) -> str:
    return text.replace("_", "\\_").replace("*", "\\*")


def latex(frame: Frame) -> str:
    """The paragraph for ``methods.tex``, a fragment."""
    parts = []
    for heading, text in paragraphs(frame):
        start = f"\\paragraph{{{breakable(heading)}}}\n" if heading else ""
        parts.append(start + " ".join(map(breakable, text)))
    return "\n\n".join(parts) + "\n"


def _has(runs: Frame, *names: str) -> bool:
    return all(name in runs and runs[name].notna().any() for name in names)


def _values(runs: Frame, name: str) -> list[Any]:
    return levels(runs[name]) if name in runs else []


def _list(runs: Frame, name: str, null: str = "none") -> str:
    """All values of a setting: ``1e-5``, ``1e-5, 1e-4 and 1e-3``."""
    words = [null if label(v) == "null" else label(v) for v in _values(runs, name)]
    return join(words)


def join(words: Sequence[str]) -> str:
    """``a, b and c``."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _range(runs: Frame, name: str, form: str = ".3g") -> str:
    numbers = runs[name].dropna().astype(float)
    low, high = numbers.min(), numbers.max()
    return f"{low:{form}}" if low == high else f"{low:{form}} to {high:{form}}"


def _batches(runs: Frame) -> str:
    count = _list(runs, "kfac.n_batches")
    return f"{count} batch" if count == "1" else f"{count} batches"


def _models(runs: Frame) -> list[str]:
    parts = []
    if _has(runs, "model.name"):
        size = "provenance.workbench.model.parameters"
        count = f" ({_range(runs, size, ',.0f')} parameters)" if _has(runs, size) else ""
        parts.append(f"Models: {_list(runs, 'model.name')}{count}, on {_list(runs, 'data.name')}.")
    trained = _trained(runs)
    analysed = runs[~trained]
    if _has(analysed, "tokens", "data.seq_len"):
        parts.append(
            f"Factors were built from {_range(analysed, 'tokens', ',.0f')} tokens "
            f"({_batches(analysed)} of {_list(analysed, 'data.batch_size')} sequences of "
            f"{_list(analysed, 'data.seq_len')} tokens)."
        )
    parts += _training(runs[trained])
    if _has(runs, "seed"):
        numbers = sorted({own["seed"].nunique() for _, own in runs.groupby("sweep")})
        words = "1 seed" if numbers == [1] else f"{join([str(n) for n in numbers])} seeds"
        more = ", depending on the sweep" if len(numbers) > 1 else ""
        parts.append(f"Every setting was run with {words}{more}.")
    return parts


def _trained(runs: Frame) -> pd.Series:
    """Which runs are trainings."""
    if "task.name" not in runs:
        return pd.Series(False, index=runs.index)
    return runs["task.name"] == "train"


def _training(runs: Frame) -> list[str]:
    if not _has(runs, "tokens", "train/steps", "optimizer.name"):
        return []
    each = runs.assign(step=runs["tokens"] / runs["train/steps"])
    rate = _list(runs, "optimizer.lr", "of the recipe")
    steps, tokens = _range(runs, "train/steps", ",.0f"), _range(each, "step", ",.0f")
    return [
        f"Trained with the optimiser {_list(runs, 'optimizer.name')} (learning rate {rate}) for "
        f"{steps} steps of {tokens} tokens."
    ]


def _kfac(runs: Frame) -> list[str]:
    trained = _trained(runs)
    if "optimizer.name" in runs:  # other optimisers have no use for the section kfac
        runs = runs[~trained | runs["optimizer.name"].isin(["kfac", "ekfac"])]
    if not _has(runs, "kfac.damping"):
        return []
    kinds = [WORDS.get(str(k), str(k)) for k in _values(runs, "kfac.fisher")]
    sides = [
        f"{_list(runs, key)} on the {side} side"
        for side, key in (("A", "kfac.damping_A"), ("G", "kfac.damping_G"))
        if _has(runs, key)
    ]
    more = f" ({join(sides)} where set apart)" if sides else ""
    ratios = [r for r in _values(runs[_trained(runs)], "optimizer.damping_ratio") if r != 1]
    if ratios:
        more += f", in the trainings {join([label(r) for r in ratios])} times that on the A side"
    parts = [
        f"Curvature is K-FAC with {join(kinds)}; which layers take the Woodbury identity on the G "
        f"side was decided by the policy {_list(runs, 'kfac.policy')}.",
        f"Tikhonov damping was {_list(runs, 'kfac.damping')} on each factor{more}, with damped "
        f"eigenvalues raised to the largest over kappa = "
        f"{_list(runs, 'kfac.max_condition_number', 'none (no floor)')}" + _clipped(runs) + ".",
    ]
    about = [_refreshed(runs)]
    if _has(runs, "kfac.reduce", "dist/world_size"):
        about.append(f"ranks are joined by {_list(runs, 'kfac.reduce')}")
    if _has(runs, "kfac.ekfac"):
        about.append(_ekfac(runs))
    told = "; ".join(filter(None, about))
    return [*parts, f"{told[:1].upper()}{told[1:]}." if told else ""]


def _refreshed(runs: Frame) -> str:
    """How often a training makes its factors anew; ``task=analyze`` makes them once."""
    trained = runs[_trained(runs)]
    if trained.empty or "kfac.update_freq" not in runs:
        return ""
    which = "" if len(trained) == len(runs) else " in the trainings"
    return f"factors are refreshed every {_list(trained, 'kfac.update_freq')} steps{which}"


def _ekfac(runs: Frame) -> str:
    words = "eigenvalues are corrected in the Kronecker eigenbasis (EKFAC)"
    chosen = [label(v) for v in _values(runs, "kfac.ekfac")]
    if chosen == ["false"]:
        return ""
    return words if chosen == ["true"] else f"with and without EKFAC: {words} or not"


def _clipped(runs: Frame) -> str:
    shares = [
        f"{_range(runs, f'kfac/clipped_frac_{side}', '.2%')} of {side}"
        for side in ("A", "G")
        if _has(runs, f"kfac/clipped_frac_{side}")
    ]
    return f", which clipped {join(shares)}" if shares else ""


def _numerics(runs: Frame) -> list[str]:
    if not _has(runs, "kfac.core_dtype"):
        return []
    stored = [
        "their own dtype" if label(v) == "auto" else label(v)
        for v in _values(runs, "kfac.woodbury_dtype")
    ] or ["their own dtype"]
    text = (
        f"Token gradients were stored in {join(stored)}, decomposed in "
        f"{_list(runs, 'kfac.core_dtype')} and applied in {_list(runs, 'kfac.apply_dtype')}"
    )
    if _has(runs, "kfac/storage_error_max"):
        text += f" (largest error of storage {_range(runs, 'kfac/storage_error_max')})"
    parts = [text + "."]
    if _has(runs, "kfac/jitter_events", "kfac/fallbacks"):
        jitter, fallbacks = runs["kfac/jitter_events"], runs["kfac/fallbacks"]
        parts.append(
            f"A Cholesky factorisation needed jitter in {int((jitter > 0).sum())} of {len(runs)} "
            f"runs ({int(jitter.sum())} times) and fell back to an eigendecomposition in "
            f"{int((fallbacks > 0).sum())}."
        )
    return parts


def _spectra(runs: Frame) -> list[str]:
    if "spectral.enabled" not in runs or not runs["spectral.enabled"].astype(bool).any():
        return []
    on = runs[runs["spectral.enabled"].astype(bool)]
    return [
        f"Spectra are of the block-diagonal empirical Fisher matrix by "
        f"{_list(on, 'spectral.block_structure')}, one sample a "
        f"{_list(on, 'spectral.sample_unit')}, by the {_list(on, 'spectral.storage_mode')} method."
    ]


def _machine(runs: Frame) -> list[str]:
    names = {
        "fisher_lab": "provenance.versions.fisher-lab",
        "Python": "provenance.versions.python",
        "PyTorch": "provenance.versions.torch",
        "Transformers": "provenance.versions.transformers",
    }
    versions = [f"{name} {_list(runs, key)}" for name, key in names.items() if _has(runs, key)]
    parts = [f"Software: {', '.join(versions)}."] if versions else []
    if _has(runs, "provenance.git.commit"):
        commits = [str(c)[:12] for c in _values(runs, "provenance.git.commit") if c]
        dirty = runs.get("provenance.git.dirty")
        changed = dirty is not None and (dirty == True).any()  # noqa: E712 - None is neither
        note = ", with uncommitted changes in some runs" if changed else ""
        parts.append(f"Commit {join(commits)}{note}.")
    if _has(runs, "provenance.device"):
        cpu = "provenance.host.cpu"
        where = f" ({_list(runs, cpu)})" if _has(runs, cpu) else ""
        threads = "provenance.threads"
        counts = _list(runs, threads) if _has(runs, threads) else ""
        with_threads = f", {counts} thread{'' if counts == '1' else 's'}" if counts else ""
        parts.append(f"Device: {_list(runs, 'provenance.device')}{where}{with_threads}.")
    return parts
