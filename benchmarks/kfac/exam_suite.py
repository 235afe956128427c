"""curvlinops' own test cases as an exam: what its tests ask its K-FAC and EKFAC for, asked of both.

    make bench BENCH=benchmarks/kfac/exam_suite.py ARGS="SOURCES/test --out benchmarks/kfac/results"

``SOURCES`` is a checkout of curvlinops of the version that is installed; its tests are not in its
wheel, and no part of them is in this repository. pytest runs its ``test_kfac.py``,
``test_ekfac.py`` and ``test_inverse.py``. Whatever their K-FAC operators are constructed with
(model, loss, parameters, data, Fisher type, approximation, weights and biases apart or not) is kept
and nothing is computed. Then every distinct case is asked of both libraries in float64, and the
whole matrices are compared; what a test goes on to do with the matrix (its trace, its inverse) is
curvlinops' own. The exit code is 1 if a case is neither equal nor explained.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import argparse
import csv
import hashlib
import inspect
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from curvlinops import EKFACLinearOperator, KFACLinearOperator
from curvlinops._torch_base import CurvatureLinearOperator, PyTorchLinearOperator
from exam_matrices import Question
from exam_verdicts import VERDICTS, Outcome, answered, summary
from torch import Tensor

FILES = ("test_kfac.py", "test_ekfac.py", "test_inverse.py")


@dataclass
class Asked:
    """A distinct case of the suite: what was asked, and the tests that asked for it."""

    question: Question
    about: dict[str, str]
    tests: list[str] = field(default_factory=list)


class Recorder:
    """A plugin of pytest that keeps what K-FAC operators are constructed with."""

    def __init__(self) -> None:
        self.asked: dict[str, Asked] = {}
        self.test = ""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        """Notes which test runs; what it checks does not matter."""
        self.test = item.nodeid.rpartition("/")[2]
        try:
            yield
        except Exception:
            return

    def constructor(self, kind: type) -> Callable[..., None]:
        """What stands for the constructor of an operator of curvlinops."""
        made = kind.__init__
        signature = inspect.signature(made)

        def construct(operator: Any, *args: Any, **kwargs: Any) -> None:
            options = signature.bind(operator, *args, **kwargs)
            options.apply_defaults()
            if type(operator) is kind:
                self.note(kind, options.arguments)
            made(operator, *args, **{**kwargs, "check_deterministic": False})

        return construct

    def note(self, kind: type, options: Mapping[str, Any]) -> None:
        """Keeps one case, unless it was there before in another order of the parameters."""
        model, loss = options["model_func"], options["loss_func"]
        names = {id(p): name for name, p in model.named_parameters()}
        wanted = {names[id(p)] for p in options["params"]}
        exact = deepcopy(model).double().eval()
        question = Question(
            exact, loss, [(_double(x), _double(y)) for x, y in options["data"]],
            tuple(n for n in names.values() if n in wanted), plain(options["fisher_type"]),
            plain(options["kfac_approx"]), joint=not options["separate_weight_and_bias"],
            ekfac=kind is EKFACLinearOperator,
        )  # fmt: skip
        about = {
            "kind": "ekfac" if question.ekfac else "kfac",
            "loss": f"{type(loss).__name__}({loss.reduction})",
            "fisher": question.fisher,
            "sharing": question.sharing,
            "joint": str(question.joint),
            "parameters": " ".join(question.names),
            "model": " ".join(f"{m}" for m in exact.modules() if not [*m.children()]),
            "inputs": " ".join(str(_shape(x)) for x, _ in question.batches),
        }
        digest = hashlib.sha256(repr(about).encode())
        for tensor in (*exact.parameters(), *(t for x, y in question.batches for t in (_of(x), y))):
            digest.update(tensor.detach().numpy().tobytes())
        self.asked.setdefault(digest.hexdigest(), Asked(question, about)).tests.append(self.test)


def _of(x: Any) -> Tensor:
    return x if isinstance(x, Tensor) else x["x"]


def _shape(x: Any) -> list[int]:
    return list(_of(x).shape)


def _double(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.double() if x.is_floating_point() else x
    return {name: _double(value) for name, value in x.items()}


def plain(value: Any) -> str:
    """A string, or what an enumeration stands for."""
    return str(getattr(value, "value", value))


def recorded(folder: Path, select: str = "") -> dict[str, Asked]:
    """Runs the suite without computing anything, and returns its cases."""
    recorder = Recorder()
    sys.path.insert(0, str(folder.parent))
    nothing = mock.Mock(return_value=None)
    put = mock.patch.object
    with ExitStack() as stack:
        for kind in (KFACLinearOperator, EKFACLinearOperator):
            stack.enter_context(put(kind, "__init__", recorder.constructor(kind)))
        stack.enter_context(put(KFACLinearOperator, "compute_kronecker_factors", nothing))
        stack.enter_context(put(CurvatureLinearOperator, "_check_deterministic", nothing))
        stack.enter_context(put(PyTorchLinearOperator, "__matmul__", lambda _, other: other))
        paths = [str(folder / name) for name in FILES]
        options = ["-q", "--no-header", "--no-summary", "-p", "no:cacheprovider"]
        options += ["-k", select] if select else []
        pytest.main([*options, f"--rootdir={folder.parent}", *paths], plugins=[recorder])
    return recorder.asked


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("suite", type=Path, help="the folder `test` of curvlinops' sources")
    parser.add_argument("--select", default="", help="as pytest's -k")
    parser.add_argument("--minutes", type=float, default=60.0, help="the smallest cases come first")
    parser.add_argument("--out", type=Path, help="directory of exam_suite.csv and exam_suite.md")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = sorted(recorded(given.suite.resolve(), given.select).values(), key=size)
    results, start = [], time.monotonic()
    for asked in found:
        if time.monotonic() - start > 60 * given.minutes:
            break
        results.append((asked, answered(asked.question)))
        print(f"\r{len(results)} of {len(found)}", end="", file=sys.stderr)
    note = f" The largest {len(found) - len(results)} of {len(found)} were left out for time."
    chosen = f" Tests that match `{given.select}`." if given.select else ""
    report(results, given.out, chosen + (note if len(results) < len(found) else ""))
    return int(any(outcome.verdict == "different" for _, outcome in results))


def size(asked: Asked) -> int:
    """Numbers of a case's data and parameters."""
    question = asked.question
    data = sum(_of(x).numel() for x, _ in question.batches)
    return data + sum(p.numel() for p in question.model.parameters()) ** 2


def report(results: list[tuple[Asked, Outcome]], out: Path | None, note: str = "") -> None:
    """Prints the table, and writes it with every case."""
    tests = {test for asked, _ in results for test in asked.tests}
    version = metadata.version("curvlinops-for-pytorch")
    lines = ["# curvlinops' own cases", "", *(__doc__ or "").split("\n\n")[2].split("\n")]
    lines += [
        "",
        f"curvlinops {version}; {len(tests)} of its tests ask for a matrix.{note} They have:",
        "",
    ]
    lines += summary(outcome for _, outcome in results)
    by_test: dict[str, set[str]] = {}
    for asked, outcome in results:
        for test in asked.tests:
            by_test.setdefault(test, set()).add(outcome.verdict)
    kinds = {
        test: next(v for v in reversed(VERDICTS) if v in found) for test, found in by_test.items()
    }
    counts = Counter((test.partition("[")[0], kind) for test, kind in kinds.items())
    lines += ["", "By test, the worst of its cases:", ""]
    lines += ["| test | " + " | ".join(VERDICTS) + " |", "|---" * (1 + len(VERDICTS)) + "|"]
    for name in dict.fromkeys(test.partition("[")[0] for test in by_test):
        cells = [str(counts[name, v] or "") for v in VERDICTS]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    text = "\n".join(lines) + "\n"
    sys.stdout.write(text)
    for asked, outcome in results:
        if outcome.verdict == "different":
            sys.stdout.write(f"different: {outcome.error:.2e} {asked.about} {asked.tests[0]}\n")
    if out is not None:
        (out / "exam_suite.md").write_text(text)
        with (out / "exam_suite.csv").open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([*results[0][0].about, "tests", "verdict", "error"])
            for asked, outcome in results:
                error = "" if outcome.error is None else f"{outcome.error:.1e}"
                about = [" ".join(value.split()) for value in asked.about.values()]
                writer.writerow([*about, len(asked.tests), outcome.verdict, error])


if __name__ == "__main__":
    sys.exit(main())
