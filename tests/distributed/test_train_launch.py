"""`task=train distributed.nproc=2` from the command line: killed, signalled, and one in the end."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.runs_on_ranks import (
    SMALL,
    finished,
    metrics_of,
    program,
    record_of,
    rows_of,
)
from tests.processes import until

STEPS = 60
TRAIN = (
    *SMALL, "task=train", "distributed.nproc=2", "optimizer=kfac", "kfac.update_freq=4",
    "model.dropout=0.1", f"train.steps={STEPS}", "train.batch_size=4", "train.seq_len=16",
    "train.eval_every=25", "train.save_every_s=0", "progress=false",
)  # fmt: skip
START_S = 280


def curve_of(directory: Path) -> list[dict[str, str]]:
    """The learning curve, without what no two runs have in common."""
    path = directory / "curve.csv"
    found = rows_of(path) if path.exists() else []
    return [{k: v for k, v in row.items() if not k.endswith("seconds")} for row in found]


def at_step(process: Any, directory: Path, step: int) -> None:
    def reached() -> bool:
        if process.poll() is not None:
            raise AssertionError(process.communicate()[0])
        return len(curve_of(directory)) >= step

    until(reached, START_S)


def complete(directory: Path, *more: str) -> None:
    code, out = finished(*TRAIN, *more, f"hydra.run.dir={directory}", timeout=START_S)
    assert (code, record_of(directory)["status"]) == (0, "completed"), out


@pytest.mark.slow
@pytest.mark.longest
@pytest.mark.timeout(1800)
def test_preempted_killed_and_started_again_it_ends_as_if_left_alone(tmp_path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    complete(whole)
    arguments = (*TRAIN, f"hydra.run.dir={part}")
    with program(*arguments) as process:
        at_step(process, part, 3)
        pids = [r["pid"] for r in record_of(part)["provenance"]["distributed"]["ranks"]]
        os.kill(pids[1], signal.SIGUSR2)  # the other rank is told of it by this one
        out, _ = process.communicate(timeout=START_S)
    assert process.returncode == 128 + signal.SIGUSR2, out
    assert record_of(part)["status"] == "preempted"
    done = len(curve_of(part))
    assert 3 <= done < STEPS
    with program(*arguments) as process:
        at_step(process, part, done + 3)
        everyone = [*psutil.Process(process.pid).children(recursive=True), process]
        for one in everyone:
            one.kill()
        process.communicate(timeout=60)
        psutil.wait_procs([p for p in everyone if isinstance(p, psutil.Process)], timeout=60)
    assert len(curve_of(part)) < STEPS
    complete(part)
    assert done < record_of(part)["provenance"]["resumed_at"] < STEPS
    assert curve_of(part) == curve_of(whole)
    model = Path("model", "model.safetensors")
    assert (part / model).read_bytes() == (whole / model).read_bytes()
    assert metrics_of(part)["loss/heldout"] == metrics_of(whole)["loss/heldout"]
    ranks = rows_of(whole / "ranks.csv")
    assert [int(row["tokens"]) for row in ranks] == [STEPS * 2 * 16] * 2
    assert [int(row["labels"]) for row in ranks] == [STEPS * 2 * 15] * 2
    assert all(int(row["exchange_sent"]) > 0 for row in ranks)
    assert metrics_of(whole)["dist/world_size"] == 2
    assert metrics_of(whole)["tokens"] == STEPS * 4 * 16
    assert not list((whole / "ranks").glob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_shards_leave_a_whole_model(tmp_path):
    """The model that is written is the plain one, as under DDP."""
    found, about = {}, {}
    for wrapper in ("ddp", "fsdp"):
        directory = tmp_path / wrapper
        complete(directory, f"distributed.wrapper={wrapper}", "train.steps=4", "model.dropout=0")
        found[wrapper] = load_file(directory / "model" / "model.safetensors")
        about[wrapper] = json.loads((directory / "model" / "config.json").read_text())
    assert about["fsdp"] == about["ddp"]
    assert found["fsdp"].keys() == found["ddp"].keys()
    for name, tensor in found["ddp"].items():
        torch.testing.assert_close(found["fsdp"][name], tensor, rtol=1e-4, atol=1e-5, msg=name)
