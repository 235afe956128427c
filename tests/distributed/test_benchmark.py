"""Bytes that the ranks send and keep are those of the benchmark's formulas (`docs/distributed.md`).

Columns, the summed matrix where `T > out`, and columns that `max_columns` leaves of all tokens.
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest


def benchmark() -> Any:
    """`benchmarks/distributed.py`, as a module."""
    name = "benchmark_of_ranks"
    if name not in sys.modules:
        path = Path(__file__).resolve().parents[2] / "benchmarks" / "distributed.py"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def measured(comm: Any, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    module = benchmark()
    return [module.measured(module.Case(**case), comm) for case in cases]


SIZES: list[dict[str, Any]] = [
    {"out": 200, "per_rank": 48, "inputs": 128},
    {"out": 64, "per_rank": 48, "inputs": 128},
    {"out": 200, "per_rank": 48, "inputs": 128, "most": 64},
]


@pytest.mark.parametrize("size", [2, 3])
def test_bytes_are_those_of_the_formulas(ranks, size):
    module = benchmark()
    cases = [{"mode": m, "ranks": size, **one} for one in SIZES for m in ("gather", "gram")]
    found = ranks.run(measured, size, cases=cases)
    forms = set()
    for case, answers in zip(cases, zip(*found, strict=True), strict=True):
        one = module.Case(**case)
        forms.add("matrix" if one.matrix else one.columns < one.tokens)
        formula = sum(module.expected_bytes(one).values())
        sent = sum(answer["sent"] for answer in answers) / size
        assert sent == pytest.approx(formula, rel=0.05), case
        for answer in answers:
            # The loss's gradients add up to zero over the outputs: the matrix lacks a rank.
            assert answer["kept"] == pytest.approx(module.columns_bytes(one), rel=0.02), case
            assert answer["K"] == pytest.approx(one.columns**2 * 8, rel=0.04), case
            assert answer["norm"] == pytest.approx(answers[0]["norm"], rel=1e-12)
    for gathered, spread in zip(found[0][::2], found[0][1::2], strict=True):
        assert spread["norm"] == pytest.approx(gathered["norm"], rel=1e-6)
    assert forms == {"matrix", True, False}


def row(mode: str, ranks: int, **more: Any) -> dict[str, Any]:
    plain = {"out": 8, "tokens": 4 * ranks, "per_rank": 4, "columns": 4 * ranks, "matrix": False}
    same = {"sent": 100.0, "sent_formula": 100.0, "kept": 64, "kept_formula": 64.0}
    return {"mode": mode, "ranks": ranks, **plain, **same, **more}


def test_what_is_off_by_more_than_a_tenth_is_told():
    failures = benchmark().failures
    assert failures([row("gather", 2), row("gram", 1), row("gram", 2)]) == []
    (text,) = failures([row("gather", 2), row("gram", 4, sent=111.0)])
    assert text == "gram, R=4, out=8, T=16: sent 111 bytes, by the formula 100"
    (text,) = failures([row("gram", 1), row("gram", 2, kept=72, kept_formula=72.0)])
    assert text == "gram, out=8, 4 tokens a rank: share of U by R: {1: 64, 2: 72}"
    # Neither the matrix nor columns that were left out say anything about the share.
    others = [row("gram", 2, matrix=True, kept=90, kept_formula=90.0)]
    others.append(row("gram", 4, columns=3, kept=9, kept_formula=9.0))
    assert failures([row("gram", 1), *others]) == []
