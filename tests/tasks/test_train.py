import dataclasses
import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from fisher_lab.config.errors import ConfigError
from fisher_lab.config.schema import KfacConfig
from fisher_lab.config.workload import ModelConfig, OptimizerConfig, TrainConfig
from fisher_lab.curvature.kfac.engine import KFACNaturalGradient
from fisher_lab.runs.record import Run
from fisher_lab.runs.signals import Interrupted
from fisher_lab.tasks import train
from fisher_lab.workload import training_loop
from fisher_lab.workload.build import build
from fisher_lab.workload.content_identity import content_identity
from tests.training import config_of, text_in


@pytest.fixture
def config(tmp_path):
    directory = text_in(tmp_path, lines=1500)

    def make(**sections):
        sections = {"train": TrainConfig(eval_every=2, save_every_s=0.0), **sections}
        return config_of(directory, steps=4, batch_size=2, seq_len=32, **sections)

    return make


def start(cfg, directory):
    run = Run.start(directory, config=dataclasses.asdict(cfg), identity=content_identity(cfg))
    train.run(cfg, run)
    return run


def test_a_run_leaves_curve_metrics_and_a_model(config, tmp_path):
    run = start(config(), tmp_path / "run")
    curve = training_loop.Curve.read(run.directory / "curve.csv", 4)
    metrics = json.loads((run.directory / "metrics.json").read_text())
    assert metrics["loss/heldout"] == curve.rows[-1]["heldout_loss"]
    assert metrics["loss"] == curve.rows[-1]["loss"]
    assert metrics["tokens"] == 4 * 2 * 32
    assert metrics["train/steps"] == 4
    assert metrics["loss/baseline"] > 0
    cfg = config(model=ModelConfig(type="pretrained", name_or_path=str(run.directory / "model")))
    loaded = build(cfg)
    assert loaded.record["model"]["heldout_loss"] == pytest.approx(metrics["loss/heldout"], rel=0.2)
    provenance = json.loads((run.directory / "run.json").read_text())["provenance"]
    assert len(provenance["weights_sha256"]) == 64
    assert provenance["workbench"]["task"] == "causal"


def test_the_checkpoint_is_what_this_task_trains(config, tmp_path):
    """One loop, two doors: with nothing else said the weights are the checkpoint's, to the bit."""
    run = start(config(), tmp_path / "run")
    trained = load_file(run.directory / "model" / "model.safetensors")
    model = build(config()).model
    assert trained
    for name, tensor in trained.items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_what_is_configured_is_what_is_done(config, tmp_path):
    cfg = config(
        seed=3,
        train=TrainConfig(steps=3, batch_size=1, seq_len=16, eval_every=1),
        optimizer=OptimizerConfig(lr=0.5, schedule="constant", warmup=0.0),
    )
    run = start(cfg, tmp_path / "run")
    rows = training_loop.Curve.read(run.directory / "curve.csv", 3).rows
    assert [row["tokens"] for row in rows] == [16, 32, 48]
    assert {row["lr"] for row in rows} == {0.5}
    assert all("heldout_loss" in row for row in rows)
    other = start(dataclasses.replace(cfg, seed=4), tmp_path / "other")
    assert (
        run.record["provenance"]["weights_sha256"] != other.record["provenance"]["weights_sha256"]
    )


def test_from_the_checkpoint(config, tmp_path):
    cfg = config(train=TrainConfig(steps=1, from_checkpoint=True, eval_every=1))
    cfg.model.recipe.steps = 40
    checkpoint = build(cfg).record["model"]
    run = start(cfg, tmp_path / "run")
    rows = training_loop.Curve.read(run.directory / "curve.csv", 1).rows
    assert rows[0]["loss"] < checkpoint["baseline_loss"]
    initial = run.record["provenance"]["workbench"]["initial"]
    assert initial["checkpoint_sha256"] == checkpoint["checkpoint_sha256"]


@pytest.mark.parametrize(
    ("signum", "status"), [(signal.SIGTERM, "cancelled"), (signal.SIGUSR2, "preempted")]
)
def test_stopped_and_started_again_in_the_same_directory(
    config, tmp_path, monkeypatch, signum, status
):
    whole = start(config(), tmp_path / "whole")
    cfg = config()
    run = Run.start(tmp_path / "run", config=dataclasses.asdict(cfg))
    loop = training_loop.train

    def with_signal(*arguments, **more):
        def after_step(done):
            if done == 2:
                os.kill(os.getpid(), signum)

        return loop(*arguments, **more, after_step=after_step)

    with monkeypatch.context() as patch, run.signals:
        patch.setattr(training_loop, "train", with_signal)
        with pytest.raises(Interrupted) as stop:
            train.run(cfg, run)
    run.end(stop.value.status, stop.value.signum.name)
    assert run.status == status
    assert not (run.directory / "model").exists()
    again = start(config(), tmp_path / "run")
    assert again.record["provenance"]["resumed_at"] == 3
    file = "model/model.safetensors"
    assert (again.directory / file).read_bytes() == (whole.directory / file).read_bytes()
    metrics = [json.loads((r.directory / "metrics.json").read_text()) for r in (whole, again)]
    assert metrics[0]["loss/heldout"] == metrics[1]["loss/heldout"]


def test_bad_lengths_are_refused_before_anything_is_trained(config, tmp_path):
    cfg = config(train=TrainConfig(seq_len=64))
    with pytest.raises(ConfigError, match=r"train\.seq_len=64 .* at most 32"):
        start(cfg, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_training_with_kfac_says_what_the_factors_cover_after_a_resume_too(config, tmp_path):
    cfg = config(optimizer=OptimizerConfig(name="kfac", lr=0.01))
    run = start(cfg, tmp_path / "run")
    about = run.record["provenance"]["kfac"]["coverage"]
    assert about["covered"] > 0
    assert about["passed"]["in exclude"] > 0  # embeddings and head are AdamW's
    total = about["covered"] + sum(about["passed"].values())
    assert run.values["kfac/coverage"] == about["covered"] / total
    again = start(cfg, tmp_path / "run")
    assert again.record["provenance"]["resumed_at"] == 4
    assert again.record["provenance"]["kfac"]["coverage"] == about


@pytest.mark.parametrize("verify", [True, False])
def test_the_first_refresh_of_a_training_is_compared_with_autograd(
    config, tmp_path, monkeypatch, verify
):
    asked = []
    collect = KFACNaturalGradient.collect_kfac_factors

    def recorded(engine, *args, verify=False, **more):
        asked.append(verify)
        return collect(engine, *args, verify=verify, **more)

    monkeypatch.setattr(KFACNaturalGradient, "collect_kfac_factors", recorded)
    kfac = KfacConfig(update_freq=2, verify=verify)
    start(config(optimizer=OptimizerConfig(name="kfac", lr=0.01), kfac=kfac), tmp_path / "run")
    assert asked == ([True] if verify else [])  # the others are of the step's own pass
