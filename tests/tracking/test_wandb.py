"""Real offline runs of W&B, read back; and everything that can go wrong with them."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import psutil
import pytest

from fisher_lab import cli, tracking
from fisher_lab.config import paths
from fisher_lab.config.schema import TrackerConfig
from fisher_lab.tracking import process
from fisher_lab.tracking.base import Guarded
from fisher_lab.tracking.wandb import Sink
from tests.processes import Clock, is_gone, until
from tests.tracking.wandb_files import files, png, read

SECRET = "0123456789abcdef0123456789abcdef01234567"


def whole_run(tracker, start) -> None:
    tracker.start(start)
    for step in range(1, 4):
        tracker.log({"loss": 1.0 / step, "nothing": None}, step)
    tracker.summary({"loss": 0.5, "loss/heldout": 0.25, "missing": None})
    tracker.finish("completed")


def test_an_offline_run_is_read_back(sink, start, tmp_path, caplog):
    tracker = sink(mode=None)
    tracker.start(start())
    for step in range(1, 4):
        tracker.log({"loss": 1.0 / step, "nothing": None}, step)
    tracker.summary({"loss": 0.5, "loss/heldout": 0.25, "steps": 3})
    rows = [{"name": "a", "eigenvalue": 1.0}, {"name": None, "eigenvalue": 10.0}]
    tracker.table("layers.csv", rows)
    (tmp_path / "figure.png").write_bytes(png())
    tracker.image("figure", tmp_path / "figure.png")
    (tmp_path / "layers.csv").write_text("name\na\n")
    tracker.artifact("layers.csv", tmp_path / "layers.csv", "tables")
    with caplog.at_level("INFO"):
        tracker.finish("completed")
    (file,) = files(tmp_path / "tracker")
    recorded = read(file)
    assert recorded.run["run_id"] == "abc-1234"
    assert recorded.run["run_group"] == "damping 2026/12"
    assert recorded.run["job_type"] == "train"
    assert recorded.run["display_name"] == "kfac.damping=1e-4"
    assert recorded.run["tags"] == ["a", "b"]
    assert recorded.run["project"] == "fisher_lab"
    assert recorded.config["kfac"] == {"damping": 1e-4}  # nested, as in the YAML
    assert (recorded.config["run_id"], recorded.config["attempt"]) == ("abc", 1)
    assert recorded.curve("loss") == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert recorded.summary["loss"] == 0.5
    assert recorded.summary["loss/heldout"] == 0.25
    assert recorded.summary["status"] == "completed"
    assert recorded.exit_code == 0
    assert "abc-1234-layers.csv" in {one["name"] for one in recorded.artifacts}
    logged = {key for row in recorded.history for key in row}
    assert any(key.startswith("table/layers") for key in logged)
    assert any(key.startswith("histogram/layers/log10_eigenvalue") for key in logged)
    assert any(key.startswith("figure/figure") for key in logged)


def test_the_cells_of_a_sweep_are_a_group_and_equal_their_metrics(small_task, tmp_path):
    code = small_task(
        "-m", "task=plan", "seed=0,1", "tracker=wandb", "tracker.budget_s=60",
        "sweep.dir=there",
    )  # fmt: skip
    assert code == 0
    found = {file: read(file) for file in files(tmp_path / "there")}
    assert len(found) == 2
    for file, recorded in found.items():
        cell = next(path for path in file.parents if (path / "run.json").exists())
        metrics = json.loads((cell / "metrics.json").read_text())
        assert recorded.run["run_group"] == cell.parent.name
        assert {name: recorded.summary.get(name) for name in metrics} == metrics
        record = json.loads((cell / "run.json").read_text())
        assert recorded.config["run_id"] == record["run_id"]
        assert recorded.config["kfac"] == record["config"]["kfac"]
        log = (cell / "fisher_lab.log").read_text()
        assert log.count("the run is written offline") == 1
        assert "WARNING" not in log
    assert sorted(one.config["seed"] for one in found.values()) == [0, 1]
    assert len({one.run["run_id"] for one in found.values()}) == 2


def test_no_key_or_token_is_recorded(sink, start, tmp_path, monkeypatch):
    """Neither the environment's, nor that of a git remote."""
    for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, SECRET)
    git = ["git", "-C", str(tmp_path)]
    subprocess.run([*git, "init", "-q"], check=True, timeout=30)
    url = f"https://user:{SECRET}@example.invalid/x.git"
    subprocess.run([*git, "remote", "add", "origin", url], check=True, timeout=30)
    whole_run(sink(mode="offline"), start())
    written = [path for path in (tmp_path / "tracker").rglob("*") if path.is_file()]
    assert files(tmp_path / "tracker")
    assert [path for path in written if SECRET.encode() in path.read_bytes()] == []


@pytest.mark.parametrize(
    ("argument", "code"),
    [("+hydra.job.env_set.WANDB_API_KEY", 0), ("+x.api_key", 2), ("+tracker.api_key", 2)],
)
def test_no_key_on_the_command_line_is_recorded(argument, code, small_task, tmp_path):
    given = [f"{argument}={SECRET}", "tracker.mode=offline", "tracker.budget_s=60"]
    assert small_task("task=plan", "tracker=wandb", *given, "hydra.run.dir=here") == code
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert bool(files(tmp_path)) is (code == 0)
    assert [path for path in written if SECRET.encode() in path.read_bytes()] == []


@pytest.mark.parametrize(
    ("configured", "environment", "online"),
    [
        (None, None, True),
        (None, "dryrun", False),
        (None, "run", True),
        (None, "sometimes", False),
        ("online", "offline", True),
        ("offline", "online", False),
    ],
)
def test_the_mode_is_that_of_the_configuration_or_else_that_of_the_environment(
    configured, environment, online, start, monkeypatch
):
    """A value that the library does not know uploads nothing."""
    modes: list[str] = []
    run = types.SimpleNamespace(define_metric=lambda *_, **__: None)
    wandb = types.SimpleNamespace(
        init=lambda mode, **_: modes.append(mode) or run, Settings=lambda **_: None
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    if environment:
        monkeypatch.setenv("WANDB_MODE", environment)
    Sink(TrackerConfig(mode=configured)).start(start())
    assert modes == ["online" if online else "offline"]


TRAIN = [
    *("task=train", "model=mlp", "model.width=8", "model.layers=1", "data=text_file"),
    *("data.path=text.txt", "data.vocab_size=293", "data.seq_len=8", "train.seq_len=8"),
    *("train.batch_size=2", "train.save_every_s=0", "train.eval_every=5", "train.steps=12"),
    *("threads=1", "tracker=wandb", "tracker.mode=offline", "tracker.budget_s=60"),
    "hydra.run.dir=here",
]

KILLED = """
import os, signal, sys
from fisher_lab import cli, tracking
from fisher_lab.workload import training_loop as training

save, train = training._Loop.save, training.train


def after_step(done):
    if done == 7:
        (sink,) = tracking.active().sinks
        sink._calls.join()
        print(sink.child.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)


training._Loop.save = lambda self, steps: save(self, steps) if steps == 4 else None
training.train = lambda *given, **more: train(*given, **more, after_step=after_step)
cli.main(sys.argv[1:])
"""


def test_a_killed_training_that_goes_on_is_read_back_as_its_curve(tmp_path):
    """Killed at step 7, three after its last save: steps 5 to 7 are made twice and sent once."""
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 400)
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *TRAIN],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(paths.root())},
        timeout=120,
    )
    assert killed.returncode == -signal.SIGKILL
    child = int(killed.stdout.splitlines()[-1])
    until(lambda: is_gone(child), 90)
    assert cli.main(TRAIN) == 0
    record = json.loads((tmp_path / "here" / "run.json").read_text())
    assert record["provenance"]["resumed_at"] == 4
    attempts = [read(file) for file in files(tmp_path / "here")]
    assert len({one.run["run_id"] for one in attempts}) == 1
    assert [one.summary["status"] for one in attempts] == ["killed", "completed"]
    assert [one.exit_code for one in attempts] == [1, 0]
    assert [one.config["attempt"] for one in attempts] == [1, 2]
    assert attempts[0].curve("loss")[-1][0] == 7  # all that it had logged
    sent = [row for one in attempts for row in one.history if "curve/step" in row]
    assert [row["curve/step"] for row in sent] == list(range(1, 13))
    with (tmp_path / "here" / "curve.csv").open() as file:
        expected = list(csv.DictReader(file))
    for row, wanted in zip(sent, expected, strict=True):
        found = {n.removeprefix("curve/"): v for n, v in row.items() if n.startswith("curve/")}
        numbers = {name: float(text) for name, text in wanted.items() if text}
        assert found.keys() == numbers.keys()
        del found["seconds"], numbers["seconds"]  # of two clocks where a step was made twice
        assert found == numbers
    assert {"loss", "lr", "grad_norm", "tokens"} <= numbers.keys()


FINISHED = """
import os, psutil, sys
from pathlib import Path
from fisher_lab.config.schema import TrackerConfig
from fisher_lab.tracking.base import Start
from fisher_lab.tracking.wandb import Sink

sink = Sink(TrackerConfig(mode="offline"))
sink.start(Start("abc", "abc-1", 1, {}, Path(sys.argv[1])))
sink.log({"loss": 0.5}, 1)
before = len(psutil.Process().children(recursive=True))
sink.finish("completed")
print(before, len(psutil.Process().children(recursive=True)), flush=True)
os._exit(0)
"""


def test_the_service_is_through_when_finish_returns(tmp_path):
    """It gives up what it has yet to write when the process that started it ends."""
    answer = subprocess.run(
        [sys.executable, "-c", FINISHED, str(tmp_path)],
        capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(paths.root())},
    )  # fmt: skip
    before, after = map(int, answer.stdout.split()[-2:])
    assert (before > 0, after) == (True, 0), answer.stderr
    (file,) = files(tmp_path)
    assert read(file).curve("loss") == [(1, 0.5)]


@pytest.mark.slow
def test_eight_runs_write_into_one_directory(sink, start, tmp_path):
    sinks = [sink() for _ in range(8)]
    for number, one in enumerate(sinks):
        one.start(start(tracker_id=f"abc-{number}", config={"seed": number}))
        for step in range(1, 51):
            one.log({"loss": number / step}, step)
    for one in sinks:
        one.finish("completed")
    recorded = [read(file) for file in files(tmp_path)]
    assert sorted(one.config["seed"] for one in recorded) == list(range(8))
    for one in recorded:
        seed = one.config["seed"]
        assert one.run["run_id"] == f"abc-{seed}"
        assert one.curve("loss") == [(step, seed / step) for step in range(1, 51)]


# ---- what goes wrong -----------------------------------------------------------------------------


def assert_complete(directory: Path) -> None:
    record = json.loads((directory / "run.json").read_text())
    metrics = json.loads((directory / "metrics.json").read_text())
    assert record["status"] == "completed"
    assert metrics == {"loss": 0.5, "kfac/total_s": 0.25, "loss/heldout": None}


def warned(directory: Path) -> list[str]:
    lines = (directory / "fisher_lab.log").read_text().splitlines()
    return [line for line in lines if " WARNING " in line]


def test_an_unwritable_directory_is_one_warning(small_task, tmp_path):
    (tmp_path / "file").write_text("")
    code = small_task(
        "task=plan", "tracker=wandb", "tracker.directory=file/below", "tracker.budget_s=60",
        "hydra.run.dir=here",
    )  # fmt: skip
    assert code == 0
    assert_complete(tmp_path / "here")
    (warning,) = warned(tmp_path / "here")
    assert "the tracker wandb failed" in warning
    assert "NotADirectoryError" in warning


def test_a_full_disk_is_one_warning(small_task, tmp_path, monkeypatch):
    """Files of the tracker may not grow past 4 KiB: the kernel refuses the write, as when full."""
    limited = ("bash", "-c", 'trap "" XFSZ; ulimit -f 4; exec "$@"', "-")
    monkeypatch.setattr(process, "COMMAND", (*limited, *process.COMMAND))
    began = time.monotonic()
    assert small_task("task=plan", "tracker=wandb", "hydra.run.dir=here") == 0
    assert time.monotonic() - began < 20
    assert_complete(tmp_path / "here")
    assert len(warned(tmp_path / "here")) == 1


def test_without_a_network_a_run_waits_no_longer_than_the_budget(small_task, tmp_path, monkeypatch):
    """A login, and a service that cannot be reached: five seconds at most, and one warning."""
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    waited, call = [], Guarded._call

    def timed(*arguments):
        clock = Clock()
        call(*arguments)
        waited.append(clock())

    monkeypatch.setattr(Guarded, "_call", timed)
    code = small_task("task=plan", "tracker=wandb", "tracker.mode=online", "hydra.run.dir=here")
    assert code == 0
    assert len(waited) > 5
    assert sum(waited) < 5.0
    assert_complete(tmp_path / "here")
    (warning,) = warned(tmp_path / "here")
    assert "wandb" in warning


IMPATIENT = """
from fisher_lab.tracking import process, wandb

wandb.INIT_S = 1.0
process.main()
"""


def test_a_service_that_never_answers_leaves_the_whole_run_offline(
    sink, start, tmp_path, monkeypatch, warnings_of
):
    """The library's service holds the run that has timed out; its id must be free again."""
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(process, "COMMAND", (sys.executable, "-c", IMPATIENT))
    tracker = sink(mode="online")
    whole_run(tracker, start())
    assert tracker.problem is None
    written = [read(file) for file in files(tmp_path / "tracker")]
    (recorded,) = [one for one in written if one.exit_code == 0]
    assert recorded.run["run_id"] == "abc-1234"
    assert recorded.curve("loss") == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert recorded.summary["loss/heldout"] == 0.25
    (warning,) = warnings_of()
    assert "W&B does not answer (" in warning
    assert "the run is written offline" in warning


def test_online_without_a_login_is_offline_with_the_right_reason(
    sink, start, tmp_path, warnings_of
):
    whole_run(sink(mode="online"), start())
    (file,) = files(tmp_path / "tracker")
    assert file.parent.name.startswith("offline-run-")
    assert read(file).curve("loss") == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    (warning,) = warnings_of()
    assert "W&B does not accept the login (No API key" in warning
    assert "the run is written offline" in warning


def test_a_login_that_is_refused_is_named_as_the_reason(
    sink, start, tmp_path, monkeypatch, warnings_of
):
    monkeypatch.setenv("WANDB_API_KEY", "too-short")
    whole_run(sink(mode="online"), start())
    (file,) = files(tmp_path / "tracker")
    assert len(read(file).curve("loss")) == 3
    (warning,) = warnings_of()
    assert "W&B does not accept the login" in warning
    assert "too-short" not in warning


@pytest.mark.parametrize("victim", ["service", "process"])
def test_a_run_whose_sink_or_service_is_killed_completes_with_one_warning(
    victim, small_task, service, tmp_path
):
    def kill() -> None:
        (sink,) = tracking.active().sinks  # type: ignore[attr-defined]
        found = service(sink) if victim == "service" else psutil.Process(sink.child.pid)
        if victim == "process":
            service(sink)  # it has come that far
        found.kill()
        until(lambda: is_gone(found.pid))
        killed.append(time.monotonic())

    killed: list[float] = []
    small_task.after[2] = kill
    assert small_task("task=plan", "tracker=wandb", "hydra.run.dir=here") == 0
    assert time.monotonic() - killed[0] < 20
    assert_complete(tmp_path / "here")
    (warning,) = warned(tmp_path / "here")
    assert "the tracker wandb" in warning


def test_a_process_that_stops_reading_holds_up_nothing(sink, start, monkeypatch, warnings_of):
    sleeper = (sys.executable, "-c", "import threading; threading.Event().wait(60)")
    monkeypatch.setattr(process, "COMMAND", sleeper)
    monkeypatch.setattr(process, "QUEUE_SIZE", 2000)
    inner = sink(budget_s=1.0)
    tracker = Guarded(inner)
    clock = Clock()
    tracker.start(start())
    for step in range(5000):
        tracker.log({"loss": 1.0}, step)
    tracker.finish("completed")
    assert clock() < 5
    (warning,) = warnings_of()
    assert "no longer takes what the run sends" in warning


@pytest.mark.parametrize("by", ["configuration", "environment"])
def test_disabled_starts_nothing(by, small_task, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    chosen = ["tracker.mode=disabled"]
    if by == "environment":
        monkeypatch.setenv("WANDB_MODE", "disabled")
        chosen = []
    assert small_task("task=plan", "tracker=wandb", *chosen, "hydra.run.dir=here") == 0
    assert not (tmp_path / "here" / "tracker").exists()
    assert warned(tmp_path / "here") == []
