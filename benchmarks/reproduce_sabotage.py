"""Whether ``fisher-lab reproduce`` finds one changed option in a copy of the code.

    python -m benchmarks.reproduce_sabotage [--untouched 20] [--out benchmarks/results]

A sweep of small models is run with the code as it is. Then one line is changed in a copy of the
package, and that copy runs a cell of the sweep again: a damping that is 3 % off, another seed, a
token that is left out, and their like, each with another sample. Untouched copies do the same.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("fisher_lab", "hydra_plugins", "conf", "sweeps")
SMALL = [
    "model.init=random", "model.layers=1", "model.width=16", "model.heads=2", "data.vocab_size=300",
    "data.seq_len=32", "data.batch_size=4", "kfac.n_batches=2", "task.heldout_batches=4",
    "threads=1",
]  # fmt: skip
SEEDS = 5

DAMPING, ANALYZE = "fisher_lab/curvature/kfac/damping.py", "fisher_lab/tasks/analyze.py"
CORPUS, BUILD = "fisher_lab/workload/corpus.py", "fisher_lab/workload/build.py"
OBJECTIVES, STEPS = "fisher_lab/workload/objectives.py", "fisher_lab/tasks/steps.py"
_LAMBDAS = "lam_a, lam_g = settings.lam_A, settings.lam_G"
_BATCHES = "batches = [own for own in parts if own is not None]\n"
_SEQUENCES = "    inputs = torch.from_numpy(ids)\n"
_WINDOWS = "return stream.ids[starts[:, None] + np.arange(length)]"
_SIDE, _MODEL_SEED, _NONE = "_SIDE_NUMBER[side]", "model.train_seed", "IGNORE_INDEX"
_EARLIER = "starts = np.maximum(starts - 1, 0)"
_ENGINE = "engine = KFACNaturalGradient(\n        config.kfac, seed"


def _kfac(change: str) -> tuple[str, str, str]:
    """A change of a setting of K-FAC, where the engine gets it."""
    given = f"dataclasses.replace(config.kfac, {change}), seed"
    new = f"import dataclasses\n    engine = KFACNaturalGradient(\n        {given}"
    return ANALYZE, _ENGINE, new


_ZERO = "parts = ranks.own_parts(workload.batches('train', config.kfac.n_batches, 0))"
_SHORTER = "batches[0] = {k: v[:-1] for k, v in batches[0].items()}"


def _after(file: str, line: str, *more: str) -> tuple[str, str, str]:
    """Further lines after one of a file."""
    return file, line, line + "".join(f"    {one}\n" for one in more)


SABOTAGE: dict[str, tuple[str, str, str]] = {
    "damping of A 3 % too large": (DAMPING, _LAMBDAS, f"{_LAMBDAS}; lam_a *= 1.03"),
    "damping of A 3 % too small": (DAMPING, _LAMBDAS, f"{_LAMBDAS}; lam_a *= 0.97"),
    "damping of G 3 % too large": (DAMPING, _LAMBDAS, f"{_LAMBDAS}; lam_g *= 1.03"),
    "damping of G 3 % too small": (DAMPING, _LAMBDAS, f"{_LAMBDAS}; lam_g *= 0.97"),
    "both 3 % too large": (DAMPING, _LAMBDAS, f"{_LAMBDAS}; lam_a *= 1.03; lam_g *= 1.03"),
    "seed of the batches + 1": (ANALYZE, "n_batches, config.seed)", "n_batches, config.seed + 1)"),
    "seed of the held-out batches + 1": (STEPS, "n, config.seed)", "n, config.seed + 1)"),
    "seed of the windows + 1": (CORPUS, f"[seed, {_SIDE}, i", f"[seed + 1, {_SIDE}, i"),
    "seed of the weights + 1": (BUILD, f"d({_MODEL_SEED})", f"d({_MODEL_SEED} + 1)"),
    "seed fixed at 0": _after(ANALYZE, _BATCHES, _ZERO, _BATCHES.strip()),
    "a label of each sequence left out": _after(OBJECTIVES, _SEQUENCES, f"labels[:, 1] = {_NONE}"),
    "a label of a batch left out": _after(OBJECTIVES, _SEQUENCES, f"labels[0, 5] = {_NONE}"),
    "a token masked": _after(ANALYZE, _BATCHES, "batches[0]['attention_mask'][0, -1] = 0"),
    "a token replaced": _after(ANALYZE, _BATCHES, "batches[0]['input_ids'][0, 3] = 7"),
    "a sequence left out": _after(ANALYZE, _BATCHES, _SHORTER),
    "a batch left out": _after(ANALYZE, _BATCHES, "batches = batches[:-1]"),
    "windows moved by one token": (CORPUS, _WINDOWS, f"{_EARLIER}\n    {_WINDOWS}"),
    "condition number 3 % too small": _kfac("max_condition_number=0.97e6"),
    "another Fisher kind": _kfac("fisher='mc'"),
    "decomposed in float32": _kfac("core_dtype='float32'"),
}  # fmt: skip
"""What is wrong -> the file, a piece of it, and what stands in its place."""


def copied(root: Path, change: tuple[str, str, str] | None) -> Path:
    """A copy of the package, with one change or with none."""
    for part in PARTS:
        shutil.copytree(ROOT / part, root / part, ignore=shutil.ignore_patterns("__pycache__"))
    if change is not None:
        name, old, new = change
        text = (root / name).read_text()
        assert text.count(old) == 1, f"{name} has {text.count(old)} of {old!r}"
        (root / name).write_text(text.replace(old, new))
    return root


def call(code: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line of a copy of the code."""
    environment = {**os.environ, "PYTHONPATH": str(code), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "fisher_lab", *arguments],
        cwd=folder, env=environment, text=True, capture_output=True, timeout=3600, check=False,
    )  # fmt: skip


def reproduced(
    folder: Path, results: Path, seed: int, change: tuple[str, str, str] | None
) -> dict[str, Any]:
    """What a copy of the code says of one cell."""
    with tempfile.TemporaryDirectory(dir=folder) as code:
        copy = copied(Path(code) / "code", change)
        arguments = ["reproduce", str(results), "--sample", "1", "--seed", str(seed), "--json"]
        done = call(copy, folder, *arguments)
    if not done.stdout:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


def main() -> None:
    """Print the table, and write it where that is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--untouched", type=int, default=20, help="copies without a change")
    parser.add_argument("--only", help="sabotage whose words hold this text")
    parser.add_argument("--out", type=Path, help="directory for reproduce_sabotage.md")
    args = parser.parse_args()
    lines = ["# Sabotage, and what `fisher-lab reproduce` says of it", ""]
    lines += ["| what is wrong | answer | the number that is furthest off |", "|---|---|---|"]
    found = same = 0
    chosen = {k: v for k, v in SABOTAGE.items() if args.only is None or args.only in k}
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        sweep = ["-m", *SMALL, f"seed=range({SEEDS})", "kfac.damping=1e-3,1e-2", "sweep.name=s"]
        done = call(ROOT, folder, *sweep, "sweep.dir=results")
        assert done.returncode == 0, done.stderr
        jobs = [*chosen.items(), *[("nothing", None)] * args.untouched]
        for number, (words, change) in enumerate(jobs):
            about = reproduced(folder, folder / "results" / "s", number, change)
            (cell,) = about["cells"]
            found += change is not None and not about["reproduced"]
            same += change is None and about["reproduced"]
            lines.append(f"| {words} | {cell['answer']} | {cell['why']} |")
            print(lines[-1], flush=True)
    lines += [
        "",
        f"Found: {found} of {len(chosen)}; untouched and the same: {same} of {args.untouched}.",
    ]
    print(lines[-1])
    if args.out:
        (args.out / "reproduce_sabotage.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
