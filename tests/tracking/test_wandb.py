"""Real offline runs of W&B, read back; and everything that can go wrong with them."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
import types

import psutil
import pytest

from fisher_lab import cli, tracking
from fisher_lab.config.schema import TrackerConfig
from fisher_lab.tracking import process
from fisher_lab.tracking.base import Guarded
from fisher_lab.tracking.wandb import Sink
from tests.processes import Clock, is_gone, python, until
from tests.sweeps.application import ON_TEXT, TEXT
from tests.tracking.conftest import assert_complete
from tests.tracking.wandb_files import files, png, read

SECRET = "0123456789abcdef0123456789abcdef01234567"


CURVE = [(1, 1.0), (2, 0.5), (3, 1 / 3)]


def begin(tracker, start) -> None:
    tracker.start(start)
    for step, loss in CURVE:
        tracker.log({"loss": loss, "nothing": None}, step)
    tracker.summary({"loss": 0.5, "loss/heldout": 0.25, "missing": None})


def whole_run(tracker, start) -> None:
    begin(tracker, start)
    tracker.finish("completed")


def test_an_offline_run_is_read_back(sink, start, tmp_path):
    tracker = sink(mode=None)
    begin(tracker, start())
    rows = [{"name": "a", "eigenvalue": 1.0}, {"name": None, "eigenvalue": 10.0}]
    tracker.table("layers.csv", rows)
    (tmp_path / "figure.png").write_bytes(png())
    tracker.image("figure", tmp_path / "figure.png")
    (tmp_path / "layers.csv").write_text("name\na\n")
    tracker.artifact("layers.csv", tmp_path / "layers.csv", "tables")
    tracker.finish("completed")
    (file,) = files(tmp_path / "tracker")
    recorded = read(file)
    about = {
        "run_id": "abc-1234", "run_group": "damping 2026/12", "job_type": "train",
        "display_name": "kfac.damping=1e-4", "tags": ["a", "b"], "project": "fisher_lab",
    }  # fmt: skip
    assert recorded.run == {**recorded.run, **about}
    nested = {"kfac": {"damping": 1e-4}}  # as in the YAML
    assert recorded.config == {**recorded.config, **nested, "run_id": "abc", "attempt": 1}
    assert recorded.curve("loss") == CURVE
    ended = {"loss": 0.5, "loss/heldout": 0.25, "status": "completed"}
    assert recorded.summary == {**recorded.summary, **ended}
    assert recorded.exit_code == 0
    assert "abc-1234-layers.csv" in {one["name"] for one in recorded.artifacts}
    logged = " ".join(key for row in recorded.history for key in row)
    for name in ("table/layers", "histogram/layers/log10_eigenvalue", "figure/figure"):
        assert name in logged


def test_the_cells_of_a_sweep_are_a_group_and_equal_their_metrics(small_task, tmp_path):
    sweep = ("-m", "task=plan", "seed=0,1", "sweep.dir=there")
    assert small_task(*sweep, "tracker=wandb", "tracker.budget_s=60") == 0
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
    *("task=train", *ON_TEXT, "train.seq_len=8", "train.batch_size=2", "train.save_every_s=0"),
    *("train.eval_every=5", "train.steps=12", "tracker=wandb", "tracker.mode=offline"),
    *("tracker.budget_s=60", "hydra.run.dir=here"),
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
    (tmp_path / "text.txt").write_text(TEXT)
    killed = python("-c", KILLED, *TRAIN)
    assert killed.returncode == -signal.SIGKILL
    child = int(killed.stdout.splitlines()[-1])
    until(lambda: is_gone(child))
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
    answer = python("-c", FINISHED, str(tmp_path))
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


@pytest.mark.parametrize(
    ("name", "error"), [("wandb", "NotADirectoryError"), ("tensorboard", "Error")]
)
def test_an_unwritable_directory_is_one_warning(name, error, small_task, tmp_path):
    pytest.importorskip(name)
    (tmp_path / "file").write_text("")
    given = [f"tracker={name}", "tracker.directory=file/below", "tracker.budget_s=60"]
    assert small_task("task=plan", *given, "hydra.run.dir=here") == 0
    assert_complete(tmp_path / "here", f"the tracker {name} failed", error)


def test_a_full_disk_is_one_warning(small_task, tmp_path, monkeypatch):
    """Files of the tracker may not grow past 4 KiB: the kernel refuses the write, as when full."""
    limited = ("bash", "-c", 'trap "" XFSZ; ulimit -f 4; exec "$@"', "-")
    monkeypatch.setattr(process, "COMMAND", (*limited, *process.COMMAND))
    began = time.monotonic()
    assert small_task("task=plan", "tracker=wandb", "hydra.run.dir=here") == 0
    assert time.monotonic() - began < 20
    assert_complete(tmp_path / "here", "wandb")


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
    assert_complete(tmp_path / "here", "wandb")


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
    assert recorded.curve("loss") == CURVE
    assert recorded.summary["loss/heldout"] == 0.25
    (warning,) = warnings_of()
    assert "W&B does not answer (" in warning
    assert "the run is written offline" in warning


@pytest.mark.parametrize(("key", "reason"), [(None, " (No API key"), ("too-short", "")])
def test_online_without_a_login_that_is_accepted_is_offline_with_the_right_reason(
    key, reason, sink, start, tmp_path, monkeypatch, warnings_of
):
    if key is not None:
        monkeypatch.setenv("WANDB_API_KEY", key)
    whole_run(sink(mode="online"), start())
    (file,) = files(tmp_path / "tracker")
    assert file.parent.name.startswith("offline-run-")
    assert read(file).curve("loss") == CURVE
    (warning,) = warnings_of()
    assert f"W&B does not accept the login{reason}" in warning
    assert "the run is written offline" in warning
    assert "too-short" not in warning


@pytest.mark.parametrize(
    ("name", "victim", "words"),
    [
        ("wandb", "service", "the tracker wandb"),
        ("wandb", "process", "the tracker wandb"),
        ("tensorboard", "process", "its process ended before the run did"),
    ],
)
def test_a_run_whose_sink_or_service_is_killed_completes_with_one_warning(
    name, victim, words, small_task, service, tmp_path
):
    def kill() -> None:
        (sink,) = tracking.active().sinks  # type: ignore[attr-defined]
        found = psutil.Process(sink.child.pid)
        if name == "wandb":
            of_library = service(sink)  # the sink has come that far
            found = of_library if victim == "service" else found
        found.kill()
        until(lambda: is_gone(found.pid))
        until(lambda: victim == "service" or sink.problem)
        killed.append(time.monotonic())

    pytest.importorskip(name)
    killed: list[float] = []
    small_task.after[2] = kill
    assert small_task("task=plan", f"tracker={name}", "hydra.run.dir=here") == 0
    assert time.monotonic() - killed[0] < 20
    assert_complete(tmp_path / "here", words)


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
    assert_complete(tmp_path / "here")
