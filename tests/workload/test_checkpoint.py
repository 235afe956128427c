import math
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fisher_lab.runs.signals import Interrupted, Watch
from fisher_lab.workload import cache, checkpoint, training_loop
from fisher_lab.workload.build import build
from fisher_lab.workload.checkpoint import CheckpointError
from fisher_lab.workload.content_identity import content_identity


@pytest.fixture
def fresh_config(config, cache_directory, tmp_path):
    """A configuration whose cache has the tokenizer, and no checkpoint."""

    def make(kind="gpt2", **more):
        cfg = config(kind, **more)
        cfg.cache_dir = str(tmp_path / "cache")
        if not (tmp_path / "cache").exists() and (cache_directory / "tokenizers").exists():
            shutil.copytree(cache_directory / "tokenizers", tmp_path / "cache" / "tokenizers")
        return cfg

    return make


def checkpoints(cfg):
    directory = Path(cfg.cache_dir) / "checkpoints"
    return sorted(directory.iterdir()) if directory.exists() else []


def same_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_trained_once_and_found_ever_after(fresh_config, monkeypatch):
    cfg = fresh_config()
    first = build(cfg)
    (directory,) = checkpoints(cfg)
    assert sorted(p.name for p in directory.iterdir()) == [
        "config.json", "curve.csv", "generation_config.json", "model.safetensors", "record.json",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    monkeypatch.setattr(training_loop, "train", lambda *a, **k: pytest.fail("trained again"))
    second = build(cfg)
    assert same_weights(first.model, second.model)
    assert first.record == second.record
    record = second.record
    assert record["model"]["checkpoint"] == directory.name.removeprefix("gpt2-")
    assert record["model"]["checkpoint_sha256"] == cache.sha256_of(directory / "model.safetensors")
    assert record["model"]["baseline"] == "unigram model"
    assert record["model"]["steps"] == 2
    assert len(record["data"]["sha256"]) == len(record["tokenizer"]["sha256"]) == 64
    assert not second.model.training


def test_what_comes_after_cannot_tell_whether_it_was_trained_here(fresh_config):
    cfg = fresh_config(dropout=0.1)
    drawn = []
    for _ in range(2):
        torch.manual_seed(11)
        build(cfg)
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


def test_the_seed_of_the_run_is_not_the_checkpoints(fresh_config):
    cfg = fresh_config()
    key = content_identity(cfg)["model"]["checkpoint"]
    cfg.seed, cfg.data.batch_size, cfg.data.seq_len, cfg.model.dtype = 9, 3, 16, "float64"
    cfg.optimizer.lr, cfg.train.steps, cfg.model.name = 1.0, 77, "mine"
    assert content_identity(cfg)["model"]["checkpoint"] == key
    keys = {key}
    for change in ("train_seed", "layers", "width"):
        setattr(cfg.model, change, 4)
        keys.add(content_identity(cfg)["model"]["checkpoint"])
    cfg.model.recipe.steps = 3
    keys.add(content_identity(cfg)["model"]["checkpoint"])
    cfg.data.vocab_size = 401
    keys.add(content_identity(cfg)["model"]["checkpoint"])
    assert len(keys) == 6


def test_random_weights_need_no_training(fresh_config, monkeypatch):
    monkeypatch.setattr(training_loop, "train", lambda *a, **k: pytest.fail("trained"))
    cfg = fresh_config(init="random", dtype="float64", attn_implementation="eager")
    made = build(cfg)
    assert checkpoints(cfg) == []
    assert made.record["model"]["init"] == "random"
    assert made.record["model"]["heldout_loss"] == pytest.approx(math.log(400), rel=0.1)
    assert next(made.model.parameters()).dtype == torch.float64
    assert made.model.config._attn_implementation == "eager"


def test_batches_of_the_bench(fresh_config):
    made = build(fresh_config(init="random"))
    first = made.batches("train", 3, seed=1)
    assert [b["input_ids"].shape for b in first] == [(2, 32)] * 3
    assert all(
        torch.equal(a["input_ids"], b["input_ids"])
        for a, b in zip(first, made.batches("train", 2, seed=1), strict=False)
    )
    assert not torch.equal(first[0]["input_ids"], made.batches("train", 1, 2)[0]["input_ids"])
    heldout = torch.cat([b["input_ids"].flatten() for b in made.batches("heldout", 2, 0)])
    assert heldout.numel() == 128


def test_changed_weights_are_found_out(fresh_config):
    cfg = fresh_config()
    build(cfg)
    (directory,) = checkpoints(cfg)
    path = directory / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="has changed since it was saved; remove"):
        build(cfg)


def stop_at(monkeypatch, step):
    """Have SIGTERM sent to this process after a step of whatever trains next."""
    train = training_loop.train

    def with_signal(*arguments, **more):
        def after_step(done):
            if done == step:
                os.kill(os.getpid(), signal.SIGTERM)

        return train(*arguments, **more, after_step=after_step)

    monkeypatch.setattr(training_loop, "train", with_signal)


def stopped(cfg, monkeypatch):
    """What a training leaves that is stopped after its second step."""
    with monkeypatch.context() as patch, Watch() as signals:
        stop_at(patch, 2)
        with pytest.raises(Interrupted):
            build(cfg, signals=signals)
    (partial,) = checkpoints(cfg)
    return partial


def test_a_stopped_training_frees_its_claim_and_goes_on(fresh_config, config, monkeypatch):
    cfg = fresh_config(steps=6, dropout=0.2)
    assert stopped(cfg, monkeypatch).name.endswith(".partial")
    resumed = build(cfg)
    assert len(checkpoints(cfg)) == 1
    undisturbed = build(config(steps=6, dropout=0.2))
    assert same_weights(resumed.model, undisturbed.model)


def test_a_broken_state_is_dropped_and_the_training_begins_again(fresh_config, monkeypatch):
    cfg = fresh_config(steps=6)
    (stopped(cfg, monkeypatch) / training_loop.STATE_FILE).write_bytes(b"broken")
    build(cfg)
    (directory,) = checkpoints(cfg)
    assert checkpoint.verified_record(directory)["steps"] == 6


CHILD = """
import os, pickle, signal, sys
from fisher_lab.workload import training_loop
from fisher_lab.workload.build import build
config, kill_at, train = pickle.load(sys.stdin.buffer), int(sys.argv[1]), training_loop.train
def after_step(done):
    if done == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
def killed(*arguments, **more):
    return train(*arguments, **{**more, "save_every_s": 0.0}, after_step=after_step)
training_loop.train = killed
build(config)
"""


def test_a_checkpoint_training_that_was_killed_goes_on(fresh_config, config, monkeypatch):
    kill_at = random.randrange(1, 6)
    cfg = fresh_config(steps=6, dropout=0.2)
    command = [sys.executable, "-c", CHILD, str(kill_at)]
    child = subprocess.run(command, input=pickle.dumps(cfg), timeout=240)
    assert child.returncode == -signal.SIGKILL
    begun = []
    train = training_loop.train

    def noted(*arguments, **more):
        result = train(*arguments, **more)
        begun.append(result.resumed_at)
        return result

    monkeypatch.setattr(training_loop, "train", noted)
    resumed = build(cfg)
    assert begun == [kill_at]
    undisturbed = build(config(steps=6, dropout=0.2))
    assert same_weights(resumed.model, undisturbed.model)
    assert len(checkpoints(cfg)) == 1
