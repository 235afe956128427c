"""Run directories with known numbers, written by the same code that real runs are written by."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pandas import DataFrame

from fisher_lab.results import load
from fisher_lab.runs.record import Run

PROVENANCE = {
    "git": {"commit": "0123456789abcdef", "dirty": False},
    "versions": {"python": "3.11.7", "fisher-lab": "0.1.0", "torch": "2.13.0"},
    "host": {"cpu": "a processor"},
    "device": "cpu",
    "threads": 1,
}

DEFAULTS = {
    "kfac.damping": 1e-4,
    "kfac.policy": "auto",
    "kfac.max_condition_number": 1e6,
    "kfac.fisher": "empirical",
    "kfac.update_freq": 10,
    "kfac.reduce": "gram",
    "kfac.ekfac": False,
    "kfac.core_dtype": "float64",
    "kfac.apply_dtype": "float64",
    "kfac.woodbury_dtype": "auto",
    "kfac.n_batches": 1,
    "kfac.include": [],
    "model.name": "gpt2",
    "model.width": 128,
    "data.name": "pydoc",
    "data.batch_size": 4,
    "data.seq_len": 128,
    "seed": 0,
}


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """``{"a.b": 1}`` as ``{"a": {"b": 1}}``."""
    out: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, last = key.split(".")
        inner = out
        for name in parents:
            inner = inner.setdefault(name, {})
        inner[last] = value
    return out


def make_run(
    directory: Path,
    settings: Mapping[str, Any],
    metrics: Mapping[str, float] | None = None,
    *,
    status: str = "completed",
    error: BaseException | None = None,
    layers: Sequence[Mapping[str, Any]] = (),
    tables: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> Run:
    """One run directory; ``settings`` go over the defaults and into the overrides."""
    run = Run.start(
        directory,
        config=nested({**DEFAULTS, **settings}),
        overrides=[f"{key}={'null' if v is None else v}" for key, v in settings.items()],
        provenance=PROVENANCE,
    )
    run.metrics(metrics or {})
    if layers:
        run.table("layers.csv", layers)
    for name, rows in (tables or {}).items():
        run.table(name, rows)
    if error is not None:
        run.fail(error)
    elif status == "completed":
        run.complete()
    elif status != "running":
        run.end(status, "because")
    return run


Cell = tuple[Mapping[str, Any], Mapping[str, float]]
"""The settings of a run, and its metrics."""


def crossed(
    axes: Mapping[str, Iterable[Any]],
    measure: Callable[..., Mapping[str, float]] = lambda *values: {},
) -> list[Cell]:
    """A cell for each combination of the values of settings, with what ``measure`` makes of it."""
    return [
        (dict(zip(axes, values, strict=True)), measure(*values))
        for values in itertools.product(*axes.values())
    ]


def make_sweep(
    directory: Path,
    cells: Iterable[Cell],
    *,
    claims: Sequence[Mapping[str, Any]] = (),
    **more: Any,
) -> Path:
    """A sweep directory with ``sweep.json`` and a run for each pair of settings and metrics."""
    directory.mkdir(parents=True, exist_ok=True)
    for i, (settings, metrics) in enumerate(cells):
        make_run(directory / str(i), settings, metrics)
    about = {"name": directory.name, "claims": list(claims), **more}
    (directory / "sweep.json").write_text(json.dumps(about))
    return directory


def swept(
    root: Path,
    axes: Mapping[str, Iterable[Any]],
    measure: Callable[..., Mapping[str, float]] = lambda *values: {},
) -> DataFrame:
    """The runs of a sweep ``s`` below a directory, as `crossed` makes them, loaded."""
    return load(make_sweep(root / "s", crossed(axes, measure)))
