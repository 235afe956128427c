"""``task=plan``: what each policy would choose and what it would cost, before anything is spent.

One forward pass over the batches counts the tokens of each layer; there is no backward pass, and
a model that would have to be trained first is taken as initialised (its sizes are the same).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.text import Text

from fisher_lab.config.kfac import POLICIES
from fisher_lab.config.schema import Config
from fisher_lab.curvature import losses
from fisher_lab.curvature.errors import LayerError
from fisher_lab.curvature.kfac.batch_tokens import count_tokens
from fisher_lab.curvature.kfac.capture import Capture
from fisher_lab.curvature.kfac.layers import Layer
from fisher_lab.curvature.kfac.layers_by_module import discover
from fisher_lab.curvature.kfac.layers_by_use import Layers
from fisher_lab.curvature.kfac.numerics import EngineSettings
from fisher_lab.curvature.kfac.policy import (
    Cost,
    check,
    cost_a,
    cost_block,
    cost_g,
    method,
    storage_dtype,
)
from fisher_lab.curvature.kfac.refresh import Coverage
from fisher_lab.results import labels
from fisher_lab.results.console import standard_output
from fisher_lab.results.labels import Entry
from fisher_lab.runs.record import Run
from fisher_lab.tasks.analyze import record_uncovered
from fisher_lab.tasks.layer_table import MOST_ROWS, is_verbose, layer_table
from fisher_lab.tasks.progress import Progress
from fisher_lab.tasks.summary import PIPE_WIDTH
from fisher_lab.workload.build import Workload, build

PLAN_FILE = "plan.csv"

_SHORT = {"woodbury": "W", "error": "!"}


def run(config: Config, run: Run) -> None:
    """Print and record the plan.

    Args:
        config: the validated configuration.
        run: the run's record; gets ``plan.csv`` and totals in ``metrics.json``.

    Raises:
        ConfigError: text or model cannot be had as configured.
        LayerError: no supported layer.
    """
    untrained = dataclasses.replace(config.model, init="random")
    track = Progress(config.progress).track
    workload = build(dataclasses.replace(config, model=untrained), track)
    run.note(workbench=workload.record)
    settings = EngineSettings.of(config.kfac, seed=config.seed)
    found, tokens = _tokens(workload, settings, config)
    rows = [_row(found.layers[n], count, settings, config) for n, count in tokens.items() if count]
    if not rows:
        raise LayerError(f"model: no K-FAC layer sees a token{_why(found.skipped)}")
    run.table(PLAN_FILE, rows)
    coverage = _coverage(workload, found, [row["name"] for row in rows])
    record_uncovered(coverage, run)
    run.note(kfac={"coverage": coverage.summed(), "skipped": found.skipped})
    total = _total(rows)
    tokens = {"tokens": max(row["tokens"] for row in rows)}
    shares = {
        "kfac/coverage": coverage.share,
        "kfac/coverage_of_reached": coverage.share_of_reached,
    }
    run.metrics({**tokens, **shares, **total})
    _show(rows, config.kfac.policy)


def _why(skipped: Mapping[str, str]) -> str:
    reasons = Counter(skipped.values()).most_common(3)
    return ": " + "; ".join(f"{count} {reason}" for reason, count in reasons) if reasons else ""


def _coverage(workload: Workload, found: Layers, used: Sequence[str]) -> Coverage:
    """What the factors of the layers with tokens would cover."""
    named = dict(workload.model.named_parameters())
    trained = {name: p for name, p in named.items() if p.requires_grad}
    frozen = sum(p.numel() for p in named.values() if not p.requires_grad)
    return Coverage.of(trained, frozen, [found.layers[name] for name in used], found.reasons)


def _tokens(
    workload: Workload, settings: EngineSettings, config: Config
) -> tuple[Layers, dict[str, int]]:
    """The layers, and the tokens of each over the batches that the factors would be built from."""
    promised = discover(workload.model, settings)
    layers: dict[str, Layer] = {}
    skipped: dict[str, str] = {}
    reasons: dict[str, str] = {}
    totals: dict[str, int] = {}
    for batch in workload.batches("train", config.kfac.n_batches, config.seed):
        prepared = losses.prepare(workload.model, batch, workload.loss_fn)
        with torch.enable_grad(), Capture(workload.model, promised, settings) as recording:
            losses.forward(workload.model, prepared)
        found, counts = count_tokens(recording, prepared)
        layers |= found.layers
        skipped, reasons = {**found.skipped, **skipped}, {**found.reasons, **reasons}
        totals = {name: totals.get(name, 0) + counts.get(name, 0) for name in layers}
    skipped = {name: why for name, why in skipped.items() if name not in layers}
    place = {name: n for n, name in enumerate(promised.layers)}
    totals = {n: totals[n] for n in sorted(totals, key=lambda n: (place.get(n, len(place)), n))}
    return Layers(layers, skipped, frozenset(), reasons), totals


def _row(layer: Layer, tokens: int, settings: EngineSettings, config: Config) -> dict[str, Any]:
    columns = tokens * (config.kfac.n_samples if config.kfac.fisher == "mc" else 1)
    row: dict[str, Any] = {
        "name": layer.name,
        "type": str(layer.kind),
        "in": layer.n_in,
        "out": layer.n_out,
        "tokens": tokens,
        "tied": layer.tied,
        "method": _method(settings, settings.policy_in_use, layer, columns),
    }
    row |= {name: _method(settings, name, layer, columns) for name in POLICIES}
    costs = _costs(layer, row["method"], tokens, columns, settings)
    for side, cost in zip("AG", costs, strict=True):
        row |= {f"{name}_{side}": value for name, value in vars(cost).items()}
    return row


def _method(settings: EngineSettings, name: Any, layer: Layer, columns: int) -> str:
    other = dataclasses.replace(settings, policy=name, use_woodbury=True)
    try:
        check(other, layer)
    except LayerError:
        return "error"
    return method(other, layer, columns)


def _costs(
    layer: Layer, chosen: str, tokens: int, columns: int, settings: EngineSettings
) -> tuple[Cost, Cost]:
    core = torch.empty(0, dtype=settings.numerics.core_dtype).element_size()
    if layer.one_block:
        return Cost(0, 0.0, 0.0), cost_block(layer, tokens, core_itemsize=core)
    kept = min(columns, settings.max_columns) if chosen == "woodbury" else columns
    stored = storage_dtype(settings, torch.float32, (kept, layer.n_out))
    return cost_a(layer, tokens, core_itemsize=core), cost_g(
        layer, chosen, kept, itemsize=stored.itemsize, core_itemsize=core
    )


def _total(rows: list[dict[str, Any]]) -> dict[str, float]:
    kinds = ("bytes", "flops_factor", "flops_apply")
    total = {f"plan/{kind}": sum(r[f"{kind}_A"] + r[f"{kind}_G"] for r in rows) for kind in kinds}
    return {**total, "plan/layers": len(rows)}


def _show(rows: list[dict[str, Any]], policy: str) -> None:
    """Prints the table: Woodbury as ``W``, a layer that a policy refuses as ``!``."""
    console = standard_output(PIPE_WIDTH)
    same = len({row["tokens"] for row in rows}) == 1
    first = ("name", "in", "out") if same else ("name", "in", "out", "tokens")
    choices = [Entry(key=n, label=n.removesuffix("_only"), format="s") for n in POLICIES]
    shown = []
    for row in rows:
        flops = sum(row[f"flops_{kind}_{side}"] for kind in ("factor", "apply") for side in "AG")
        costs = {"bytes": row["bytes_A"] + row["bytes_G"], "flops": flops / 1e9}
        shown.append({**row, **{n: _SHORT.get(row[n], row[n]) for n in POLICIES}, **costs})
    before, costs = (
        [labels.column(PLAN_FILE, n) for n in names] for names in (first, ("bytes", "flops"))
    )
    columns = [*before, *choices, *costs]
    console.print(layer_table(shown, columns, console.width, all_rows=is_verbose()))
    words = f"policy {policy}; W: Woodbury, !: refused, GF: 1e9 operations to factor and apply once"
    if len(rows) > MOST_ROWS and not is_verbose():
        words += f"; one by one in {PLAN_FILE}, and with --verbose"
    console.print(Text(words, style="dim"))
