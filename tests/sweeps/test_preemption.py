"""A training that is preempted and goes on ends as the one that was left alone, to the last bit."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest

from fisher_lab.runs import record
from fisher_lab.sweeps import worker
from fisher_lab.sweeps.directory import Layout
from tests.processes import start_python, until
from tests.sweeps.application import ORDERED_WORKER, TEXT, TRAINING, curve


def start(frozen: Path) -> subprocess.Popen[str]:
    silent = dict.fromkeys(("stdout", "stderr"), subprocess.DEVNULL)
    return start_python(str(ORDERED_WORKER), str(frozen), **silent)


@pytest.mark.timeout(600)
def test_usr2_and_a_second_start_change_no_bit(door):
    Path("text.txt").write_text(TEXT)
    answer = door(*TRAINING, "-m", "seed=3", "sweep.name=alone")
    assert answer.code == 0, answer.err
    (alone,) = Path("results/alone").glob("*/model")
    (frozen,) = Path("results/alone/.sweep").glob("submissions/*/cells/*.json")
    moved = Path("results/preempted/.sweep/submissions/now/cells", frozen.name).resolve()
    moved.parent.mkdir(parents=True)
    moved.write_bytes(frozen.read_bytes())
    layout = Layout(Path("results/preempted").resolve())
    directory = layout.run_directory(frozen.stem)

    Path("hold").touch()
    first = start(moved)
    until(lambda: first.poll() is not None or Path("held").exists())
    assert first.poll() is None
    first.send_signal(signal.SIGUSR2)
    assert first.wait(timeout=120) == worker.PREEMPTED
    found = record.read(directory)
    assert (found["status"], found["reason"]) == ("preempted", "SIGUSR2")
    assert start(moved).wait(timeout=120) == worker.COMPLETED
    assert 0 < record.read(directory)["provenance"]["resumed_at"] < 400

    weights = "model.safetensors"
    assert (directory / "model" / weights).read_bytes() == (alone / weights).read_bytes()
    assert curve(directory) == curve(alone.parent)
    ours, theirs = (
        json.loads((one / "metrics.json").read_text()) for one in (directory, alone.parent)
    )
    same = [name for name in ours if "_s" not in name and "seconds" not in name]
    assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}
    assert start(moved).wait(timeout=120) == worker.COMPLETED  # and is not run a third time
    events = [entry["event"] for entry in layout.journal.read()]
    assert events == ["started", "preempted", "started", "completed"]
