"""Edits of a finished appendix and of its runs, each of which ``fisher-lab verify`` has to name.

    python -m benchmarks.verify_edits [--out benchmarks/results]

Two small sweeps are run by the command line, with a task that computes its numbers from the seed
at once; a cell of each fails. The appendix is written, copied, edited in one place and checked,
once for every edit; first as it is.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from fisher_lab import cli
from fisher_lab.results import verify
from fisher_lab.results.values import ResultsError
from fisher_lab.runs import digests
from fisher_lab.tasks import preflight, runner

SWEEP = """\
title: {title}
params:
  kfac.damping: {dampings}
  seed: 0,1,2
{claims}"""
CLAIMS = """\
claims:
  - type: stable
    text: Robust.
    metric: ng/cosine
    axis: kfac.damping
    margin: 0.2
  - type: bounded
    text: Small.
    metric: ng/norm
    at_most: 5
  - type: share
    text: Mostly positive.
    metric: ng/cosine
    above: 0
    at_least: 0.2
"""
FAILS_AT = (1e-3, 2)

Edit = Callable[["Place"], None]
EDITS: dict[str, tuple[Edit, str]] = {}
"""What is done -> the edit, and a part of a line that has to name it."""


def edit(names: str) -> Callable[[Edit], Edit]:
    """Decorator: an edit that a line with these words has to name."""

    def register(function: Edit) -> Edit:
        EDITS[function.__name__.replace("_", " ")] = (function, names)
        return function

    return register


class Place:
    """An appendix and its runs."""

    def __init__(self, root: Path) -> None:
        self.appendix, self.results = root / "appendix", root / "results"
        self.sweep = self.results / "one"
        records = sorted(self.sweep.glob("*/run.json"))
        done = [file.parent for file in records if read(file)["status"] == "completed"]
        self.run, self.other = done[:2]
        self.failed = next(file.parent for file in records if file.parent not in done)


def read(file: Path) -> Any:
    return json.loads(file.read_text())


def change(file: Path, function: Callable[[Any], Any]) -> None:
    """Change the content of a JSON file in place, or by what the function returns."""
    content = read(file)
    result = function(content)
    file.write_text(json.dumps(content if result is None else result, indent=2) + "\n")


def digit(file: Path, after: str = "") -> None:
    """Change the last digit of the first number with a point behind some text."""
    text = file.read_text()
    start = text.index(after) + len(after)
    found = re.compile(r"\d+\.\d+").search(text, start)
    assert found is not None, file
    last = str((int(found[0][-1]) + 1) % 10)
    file.write_text(text[: found.end() - 1] + last + text[found.end() :])


def replace(file: Path, old: str, new: str) -> None:
    """Replace the first occurrence of a text, which is there."""
    text = file.read_text()
    assert old in text, (file, old)
    file.write_text(text.replace(old, new, 1))


def reseal(run: Path) -> None:
    """Give a run the digests of what it is now, as somebody would who knows of them."""
    record = read(run / "run.json")
    (run / "run.json").write_text(json.dumps(digests.sealed(run, record), indent=2) + "\n")


# ---- the appendix --------------------------------------------------------------------------------


def in_text(name: str, after: str = "") -> None:
    """An edit of a digit in a file of the appendix."""

    def function(place: Place) -> None:
        digit(place.appendix / name, after)

    EDITS[f"a digit in {name}"] = (function, f"{name}, line ")


in_text("one/table.tex", "\\midrule")
in_text("one/table.md", "| ---")
in_text("one/table.csv")
in_text("two/table.tex", "\\midrule")
in_text("claims.tex", "difference")
in_text("claims.json", "p_holds")
in_text("methods.tex", "damping was")
in_text("methods.md", "PyTorch")
in_text("appendix.tex", "linewidth")
in_text("report.html", "<td")


@edit("claims.json, line ")
def a_verdict_in_claims_json(place: Place) -> None:
    replace(place.appendix / "claims.json", '"verdict": "inconclusive"', '"verdict": "holds"')


@edit("claims.tex, line ")
def a_verdict_in_claims_tex(place: Place) -> None:
    replace(place.appendix / "claims.tex", "& inconclusive &", "& holds &")


@edit("claims.json, line ")
def a_margin_in_claims_json(place: Place) -> None:
    replace(place.appendix / "claims.json", '"margin": 0.2', '"margin": 0.1')


@edit("claims.json, line ")
def a_claim_s_words_in_claims_json(place: Place) -> None:
    replace(place.appendix / "claims.json", "Robust.", "Very robust.")


@edit("claims.json, line ")
def a_claim_left_out_of_claims_json(place: Place) -> None:
    change(place.appendix / "claims.json", lambda claims: claims[1:])


@edit("table.tex, line ")
def a_row_left_out_of_a_table(place: Place) -> None:
    file = place.appendix / "one" / "table.tex"
    lines = file.read_text().splitlines(keepends=True)
    rows = [i for i, line in enumerate(lines) if "&" in line]
    del lines[rows[-1]]
    file.write_text("".join(lines))


@edit("table.md, line ")
def a_lost_run_hidden_in_a_table(place: Place) -> None:
    replace(place.appendix / "one" / "table.md", "1 failed of 3", "")


@edit("appendix.tex, line ")
def a_table_left_out_of_the_document(place: Place) -> None:
    replace(place.appendix / "appendix.tex", "\\input{two/table}", "")


@edit("appendix.tex, line ")
def a_sentence_added_to_the_document(place: Place) -> None:
    replace(place.appendix / "appendix.tex", "\\section{Claims}", "All hold.\n\\section{Claims}")


def a_figure(place: Place, suffix: str) -> Path:
    return min((place.appendix / "one").glob(f"*.{suffix}"))


@edit(".pdf: changed")
def a_figure_with_another_byte(place: Place) -> None:
    file = a_figure(place, "pdf")
    file.write_bytes(file.read_bytes().replace(b"1", b"2", 1))


@edit(".png: changed")
def a_picture_of_another_sweep(place: Place) -> None:
    file = a_figure(place, "png")
    file.write_bytes(file.read_bytes() + b"\0")


@edit(".pdf: removed")
def a_figure_removed(place: Place) -> None:
    a_figure(place, "pdf").unlink()


@edit("two/table.csv: removed")
def a_table_removed(place: Place) -> None:
    (place.appendix / "two" / "table.csv").unlink()


@edit("extra.tex: added")
def a_file_added(place: Place) -> None:
    (place.appendix / "one" / "extra.tex").write_text("0.5\n")


@edit("table.tex: a symbolic link")
def a_link_in_the_place_of_a_table(place: Place) -> None:
    file = place.appendix / "one" / "table.tex"
    file.rename(place.appendix.parent / "table.tex")
    file.symlink_to(place.appendix.parent / "table.tex")


@edit("table.csv, line ")
def a_digit_and_its_digest_in_the_index(place: Place) -> None:
    file = place.appendix / "one" / "table.csv"
    digit(file)
    index = place.appendix / "appendix.json"

    def seal(content: Any) -> Any:
        content["files"]["one/table.csv"] = digests.of_file(file)
        return {**content, "digests": digests.of_record(content)}

    change(index, seal)


@edit("appendix.json: changed")
def a_state_in_the_index(place: Place) -> None:
    replace(place.appendix / "appendix.json", '"status": "failed"', '"status": "completed"')


@edit("completed by the index")
def a_state_and_the_digest_of_the_index(place: Place) -> None:
    file = place.appendix / "appendix.json"
    replace(file, '"status": "failed"', '"status": "completed"')
    change(file, lambda content: {**content, "digests": digests.of_record(content)})


# ---- runs ----------------------------------------------------------------------------------------


@edit("metrics.json: changed after")
def a_digit_in_metrics(place: Place) -> None:
    digit(place.run / "metrics.json")


@edit("metrics.json: changed after")
def a_metric_removed(place: Place) -> None:
    change(place.run / "metrics.json", lambda metrics: metrics.pop("ng/norm") and None)


@edit("metrics.json: changed after")
def a_metric_added(place: Place) -> None:
    change(place.run / "metrics.json", lambda metrics: metrics.update(new=1.0))


@edit("metrics.json: changed after")
def a_metric_made_infinite(place: Place) -> None:
    change(place.run / "metrics.json", lambda metrics: metrics.update({"ng/norm": None}))


@edit("metrics.json: removed after")
def the_metrics_removed(place: Place) -> None:
    (place.run / "metrics.json").unlink()


@edit("run.json: not as it was when the journal noted")
def a_digit_in_metrics_and_their_digest(place: Place) -> None:
    digit(place.run / "metrics.json")
    reseal(place.run)


@edit("layers.csv: changed after")
def a_digit_in_a_table_of_a_run(place: Place) -> None:
    digit(place.run / "layers.csv")


@edit("layers.csv: removed after")
def a_table_of_a_run_removed(place: Place) -> None:
    (place.run / "layers.csv").unlink()


@edit("more.csv: added after")
def a_file_added_to_a_run(place: Place) -> None:
    (place.run / "more.csv").write_text("a\n1\n")


@edit("metrics.json: changed after")
def the_metrics_of_two_runs_exchanged(place: Place) -> None:
    one, other = (run / "metrics.json" for run in (place.run, place.other))
    first = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(first)


def in_record(name: str, function: Callable[[Any], Any], failed: bool = False) -> None:
    """An edit of the record of a run."""

    def of_place(place: Place) -> None:
        change((place.failed if failed else place.run) / "run.json", function)

    EDITS[name] = (of_place, "run.json: changed after")


in_record("a seed in a record", lambda r: r["config"].update(seed=7))
in_record("a damping in a record", lambda r: r["config"]["kfac"].update(damping=7e-4))
in_record("a commit in a record", lambda r: r["provenance"].update(git={"commit": "0" * 40}))
in_record("a time in a record", lambda r: r.update(finished=r["started"]))
in_record("a failed run made completed", lambda r: r.update(status="completed"), True)
in_record("an error taken out of a record", lambda r: r.update(error=None), True)


@edit("run.json: not as it was when the journal noted")
def the_digests_taken_out_of_a_record(place: Place) -> None:
    change(place.run / "run.json", lambda record: record.pop("digests") and None)


@edit("the journal has it as failed")
def a_failed_run_deleted(place: Place) -> None:
    shutil.rmtree(place.failed)


@edit("completed when this was written, and it is gone")
def a_completed_run_deleted(place: Place) -> None:
    shutil.rmtree(place.run)


@edit("the journal has it as failed")
def a_failed_run_deleted_here_and_in_the_index(place: Place) -> None:
    def seal(content: Any) -> Any:
        content["runs"] = {k: v for k, v in content["runs"].items() if place.failed.name not in k}
        return {**content, "digests": digests.of_record(content)}

    change(place.appendix / "appendix.json", seal)
    shutil.rmtree(place.failed)


@edit("a run that was not there when this was written")
def a_run_copied(place: Place) -> None:
    shutil.copytree(place.run, place.sweep / ("0" * 16))


@edit("the journal of the sweep does not know of this run")
def a_run_renamed(place: Place) -> None:
    place.run.rename(place.sweep / ("f" * 16))


@edit("metrics.json: a symbolic link")
def a_link_in_the_place_of_metrics(place: Place) -> None:
    file = place.run / "metrics.json"
    file.rename(place.results.parent / "metrics.json")
    file.symlink_to(place.results.parent / "metrics.json")


@edit("two: the sweep is gone")
def a_sweep_deleted(place: Place) -> None:
    shutil.rmtree(place.results / "two")


# ---- what lies beside the runs -------------------------------------------------------------------


def in_sweep(name: str, function: Callable[[Any], Any]) -> None:
    """An edit of the file of a sweep."""

    def of_place(place: Place) -> None:
        change(place.sweep / "sweep.json", function)

    EDITS[name] = (of_place, "sweep.json: changed since")


in_sweep("a margin in a sweep", lambda s: s["claims"][0].update(margin=0.9))
in_sweep("a level in a sweep", lambda s: s["claims"][0].update(alpha=0.2))
in_sweep("a claim turned round", lambda s: s["claims"][0].update({"not": True}))
in_sweep("a claim taken out of a sweep", lambda s: s["claims"].pop() and None)
in_sweep("a claim added to a sweep", lambda s: s["claims"].append(dict(s["claims"][1])))
in_sweep("a cell taken out of a sweep", lambda s: s["cells"].pop() and None)
in_sweep("a title of a sweep", lambda s: s.update(title="Another"))


@edit("events.jsonl: lines that were there")
def a_failure_taken_out_of_the_journal(place: Place) -> None:
    file = place.sweep / "events.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(line for line in lines if '"failed"' not in line))


@edit("sweep.json: removed since")
def the_file_of_a_sweep_removed(place: Place) -> None:
    (place.sweep / "sweep.json").unlink()


@edit("table.csv: changed since the sweep was finished")
def a_digit_in_a_table_beside_the_runs(place: Place) -> None:
    digit(place.sweep / "table.csv")


# ---- making and checking -------------------------------------------------------------------------


def _task(config: Any, run: Any) -> None:
    """Numbers of the damping and the seed, or a failure."""
    damping, seed = config.kfac.damping, config.seed
    if (damping, seed) == FAILS_AT:
        raise RuntimeError(f"no numbers for the seed {seed}")
    value = 0.25 + 0.0625 * seed + 80 * damping
    run.table("layers.csv", [{"name": "h.0", "width": 4.5}])
    run.metrics({"ng/cosine": value, "ng/norm": 3.5, "kfac/total_s": 1.5})


@contextlib.contextmanager
def _small_task() -> Iterator[None]:
    module = types.ModuleType("small_task")
    module.__dict__["run"] = _task
    sys.modules["small_task"] = module
    with (
        mock.patch.object(runner, "TASKS", dict.fromkeys(runner.TASKS, "small_task")),
        mock.patch.object(runner, "_content", return_value=({"data": "abc"}, None)),
        mock.patch.object(preflight, "preflight", return_value={"data": "abc"}),
        mock.patch.object(runner, "prepare", return_value={"device": "cpu", "threads": 1}),
    ):
        yield


def make(root: Path) -> Place:
    """Run the two sweeps and write their appendix, all below a directory."""
    (root / "sweeps").mkdir(parents=True)
    for name, dampings, claims in (("one", "1e-4,3e-4,1e-3", CLAIMS), ("two", "1e-3", "")):
        text = SWEEP.format(title=f"The sweep {name}", dampings=dampings, claims=claims)
        (root / "sweeps" / f"{name}.yaml").write_text(text)
    with contextlib.chdir(root), _small_task():
        assert cli.main(["-m", "+sweeps=[one,two]"]) == 1  # a cell fails in each
        report = ["report", "results/one", "results/two", "-o", "appendix/report.html"]
        assert cli.main([*report, "--appendix", "appendix"]) == 0
    return Place(root)


def named(place: Place) -> list[str]:
    """The lines of ``verify`` on an appendix; bad input has one."""
    try:
        return list(map(str, verify.verify(place.appendix).deviations))
    except ResultsError as error:
        return [str(error)]


def results(root: Path) -> Iterator[tuple[str, bool, list[str]]]:
    """Every edit, whether it was named, and what was said; first of no edit."""
    original = make(root / "original")
    lines = named(original)
    yield "nothing", not lines, lines
    for name, (function, words) in EDITS.items():
        copy = root / "copy"
        shutil.copytree(root / "original", copy)
        place = Place(copy)
        function(place)
        lines = named(place)
        yield name, any(words in line for line in lines), lines
        shutil.rmtree(copy)


def main() -> None:
    """Print the table, and write it where that is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="directory for verify_edits.md")
    args = parser.parse_args()
    table = ["# Edits, and what `fisher-lab verify` says of them", ""]
    table += ["| edit | named | lines | the first |", "|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as root:
        for name, is_right, lines in results(Path(root)):
            words = "yes" if is_right and lines else "-" if is_right else "**no**"
            first = lines[0].replace("|", "\\|") if lines else ""
            first = re.sub(r"(\.\./)*[^ ]*/(copy|original)/", "", first)
            table.append(f"| {name} | {words} | {len(lines)} | {first} |")
            print(table[-1], flush=True)
    if args.out:
        (args.out / "verify_edits.md").write_text("\n".join(table) + "\n")


if __name__ == "__main__":
    main()
