"""Training: exact resume for every optimiser, micro-batches, precision, divergence."""

from __future__ import annotations

import dataclasses
import json
import math
import random

import pytest
import torch

from fisher_lab.config.errors import ConfigError
from fisher_lab.config.schema import Config
from fisher_lab.config.workload import (
    OPTIMIZERS,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RecipeConfig,
    TrainConfig,
)
from fisher_lab.runs.record import Run
from fisher_lab.tasks import train
from fisher_lab.workload import optimizers, training_loop
from fisher_lab.workload.data_parallel import DataParallel
from fisher_lab.workload.inputs import prepare

STEPS = 8
KILLS = (1, 3, 4, 8)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("text")
    (directory / "text.txt").write_text(
        "\n".join(f"line {n} of {n % 7} and {n * n % 11}" for n in range(400))
    )
    made = {}

    def make(kind="gpt2", **changes):
        config = Config(
            device="cpu",
            progress=False,
            cache_dir=str(directory / "cache"),
            model=ModelConfig(
                name=kind,
                type=kind,
                layers=1,
                width=16,
                heads=2,
                dropout=0.1,
                recipe=RecipeConfig(steps=STEPS, batch_size=4, seq_len=16, lr=1e-2),
            ),
            data=DataConfig(
                type="text_file",
                path=str(directory / "text.txt"),
                vocab_size=300,
                heldout_fraction=0.2,
                batch_size=2,
                seq_len=16,
            ),
        )
        config.kfac.damping, config.kfac.update_freq = 0.1, 3
        for section, values in changes.items():
            value = dataclasses.replace(getattr(config, section), **values)
            setattr(config, section, value)
        if kind not in made:
            made[kind] = prepare(config)
        return config, made[kind]

    return make


class Killed(BaseException):
    """Stands for a death between two steps: nothing is saved on the way out."""


def go(config, inputs, directory, die_at=None, **more):
    model = inputs.untrained(1)

    def after_step(done):
        if done == die_at:
            raise Killed

    result = training_loop.train(
        model,
        inputs.objective,
        train.training_run(config, {}),
        directory,
        save_every_s=0.0,
        after_step=after_step,
        **more,
    )
    return model, result


def without_seconds(curve):
    return [
        {key: value for key, value in row.items() if not key.endswith("seconds")}
        for row in curve.rows
    ]


OPTIONS = {
    "adamw": {},
    "sgd": {"lr": 0.1},
    "muon": {"lr": 0.01},
    "kfac": {"lr": 0.01, "damping_schedule": "lm", "inverse_freq": 2},
    "ekfac": {"lr": 0.01, "clip": "kl"},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_killed_at_any_step_it_ends_bit_identical(name, inputs, tmp_path):
    config, made = inputs(
        optimizer={"name": name, **OPTIONS[name]}, train={"eval_every": 3, "accumulation": 2}
    )
    whole, expected = go(config, made, tmp_path / "whole")
    assert [row["step"] for row in expected.curve.rows] == list(range(1, STEPS + 1))
    # Before, at and after a refresh of the factors (3) and of the inverses (2), and at the end.
    for step in KILLS:
        directory = tmp_path / str(step)
        with pytest.raises(Killed):
            go(config, made, directory, die_at=step)
        again, result = go(config, made, directory)
        assert result.resumed_at == step
        assert without_seconds(result.curve) == without_seconds(expected.curve)
        assert result.heldout_loss == expected.heldout_loss
        for one, other in zip(again.parameters(), whole.parameters(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_loss_falls(name, inputs, tmp_path):
    config, made = inputs(
        optimizer={"name": name, **OPTIONS[name]}, train={"steps": 40, "eval_every": 40}
    )
    _, result = go(config, made, tmp_path)
    rows = result.curve.rows
    assert result.diverged_at is None
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.3


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert", "t5", "mlp"])
def test_every_model_takes_a_curvature_step(kind, inputs, tmp_path):
    config, made = inputs(kind, optimizer={"name": "kfac", "lr": 0.01}, train={"steps": 4})
    _, result = go(config, made, tmp_path)
    assert result.diverged_at is None
    assert {"kl_scale", "decrement", "curvature_seconds"} <= result.curve.rows[0].keys()
    assert math.isfinite(result.heldout_loss)


def test_micro_batches_add_up_to_the_batch(inputs, tmp_path):
    """In float64, with unequal numbers of labels (masked language model) and clipping."""
    rows = []
    for parts in (1, 2, 3):
        config, made = inputs(
            "bert",
            optimizer={"name": "sgd", "lr": 0.1, "clip_norm": 0.5},
            train={"accumulation": parts},
        )
        model = made.untrained(1).double().eval()
        run = train.training_run(config, {})
        updater = optimizers.make(model, made.objective.loss_fn, run)
        batch = made.objective.batch("train", 0, seed=0, batch_size=4, seq_len=16)
        row = updater.step(batch, 0.1, made.objective.batch)  # further batches: none wanted
        rows.append((row, [p.detach().clone() for p in model.parameters()]))
    for row, parameters in rows[1:]:
        assert row["loss"] == pytest.approx(rows[0][0]["loss"], rel=1e-6)
        assert row["grad_norm"] == pytest.approx(rows[0][0]["grad_norm"], rel=1e-6)
        for one, other in zip(parameters, rows[0][1], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


def test_checkpointed_activations_change_nothing(inputs, tmp_path):
    for name in ("adamw", "kfac"):
        curves = []
        for checkpointing in (False, True):
            config, made = inputs(
                optimizer={"name": name, "lr": 0.01},
                train={"gradient_checkpointing": checkpointing, "steps": 4},
            )
            _, result = go(config, made, tmp_path / f"{name}{checkpointing}")
            curves.append([row["loss"] for row in result.curve.rows])
        assert curves[0] == pytest.approx(curves[1], rel=1e-5)
    config, made = inputs("mlp", train={"gradient_checkpointing": True})
    with pytest.raises(ConfigError, match=r"train\.gradient_checkpointing=true"):
        go(config, made, tmp_path / "mlp")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["adamw", "kfac"])
def test_mixed_precision_is_near_to_full(name, precision, inputs, tmp_path):
    results = []
    for one in ("fp32", precision):
        config, made = inputs(
            model={"dropout": 0.0},
            optimizer={"name": name, "lr": 0.003},
            train={"precision": one, "steps": 6},
        )
        model, result = go(config, made, tmp_path / one)
        results.append([row["loss"] for row in result.curve.rows])
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert results[0] != results[1]
    assert results[0] == pytest.approx(results[1], rel=0.02)


def test_an_overflow_of_fp16_skips_the_step(inputs):
    config, made = inputs(optimizer={"name": "kfac", "lr": 0.01}, train={"precision": "fp16"})
    model = made.untrained(1)
    run = train.training_run(config, {})
    updater = optimizers.make(model, made.objective.loss_fn, run)
    updater.gradient.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    batch = made.objective.batch("train", 0, seed=0, batch_size=4, seq_len=16)
    before = [p.detach().clone() for p in model.parameters()]
    row = updater.step(batch, 0.01, made.objective.batch)
    assert not math.isfinite(row["grad_norm"])
    assert "reduction_ratio" not in row
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert updater.gradient.scaler.get_scale() == 2.0**59


@pytest.mark.parametrize("name", ["sgd", "kfac"])
def test_a_divergence_ends_the_run_and_is_a_result(name, inputs, tmp_path):
    config, _ = inputs(
        optimizer={"name": name, "lr": 1e4, "clip": "none", "clip_norm": None, "warmup": 0.0},
        train={"eval_every": 100, "target_loss": 0.01, "divergence_factor": 1.5},
    )
    run = Run.start(tmp_path / "run", config={}, overrides=[], identity={})
    train.run(config, run)
    metrics = json.loads((run.directory / "metrics.json").read_text())
    assert metrics["diverged"] == 1
    assert 1 < metrics["train/diverged_step"] == metrics["train/steps"] < STEPS
    assert metrics["train/target_steps"] is None
    assert (run.directory / "model").is_dir()
    # Started again, it is over: a result is not tried again.
    again = Run.start(tmp_path / "run", config={}, overrides=[], identity={})
    train.run(config, again)
    second = json.loads((run.directory / "metrics.json").read_text())
    assert second["train/diverged_step"] == metrics["train/diverged_step"]
    assert second["tokens"] == metrics["tokens"]


def test_metrics_of_a_curvature_run(inputs, tmp_path):
    config, made = inputs(
        optimizer={"name": "kfac", "lr": 0.01},
        train={"target_loss": 100.0, "eval_every": 3},
        kfac={"n_batches": 2},
    )
    rows = []
    _, result = go(config, made, tmp_path, on_row=rows.append)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows == result.curve.rows
    metrics = train.metrics(result, 100.0)
    assert metrics["train/target_steps"] == 3
    assert metrics["train/target_s"] == result.curve.rows[2]["seconds"]
    assert 0 < metrics["train/curvature_share"] < 1
    assert metrics["train/damping_multiplier"] == 1.0
    assert math.isfinite(metrics["train/reduction_ratio"])
    assert metrics["diverged"] == 0
    measured = [row["step"] for row in result.curve.rows if "reduction_ratio" in row]
    assert measured == [1, 4, 7]
    assert metrics["tokens"] == STEPS * 4 * 16


def test_factors_come_from_the_batches_to_come(inputs, tmp_path):
    config, made = inputs(optimizer={"name": "kfac", "lr": 0.01}, kfac={"n_batches": 3})
    model = made.untrained(1)
    run = train.training_run(config, {})
    updater = optimizers.make(model, made.objective.loss_fn, run)
    asked = []

    def further(k):
        asked.append(k)
        return made.objective.batch("train", k, seed=0, batch_size=4, seq_len=16)

    updater.step(further(0), 0.01, further)
    assert asked == [0, 1, 2]
    (tokens,) = {f.tokens for f in updater.optimizer.kfac.kfac_factors.values()}
    assert tokens == 3 * 4 * 16


def test_embeddings_and_head_go_to_adamw_unless_asked_for(inputs):
    for outer, expected in (("adamw", False), ("kfac", True)):
        config, made = inputs(optimizer={"name": "kfac", "outer": outer})
        model = made.untrained(1)
        run = train.training_run(config, {})
        updater = optimizers.make(model, made.objective.loss_fn, run)
        assert ("transformer.wte.weight" in updater.optimizer._names) is expected


def test_rates_of_what_is_left_to_adamw():
    config = OptimizerConfig(lr=0.1, rest_lr=0.02)
    assert optimizers.rest_factor(config) == pytest.approx(0.2)
    assert optimizers.rest_factor(OptimizerConfig()) == 1.0


def test_decoupled_decay_of_sgd(inputs):
    config, made = inputs(
        optimizer={"name": "sgd", "lr": 0.1, "weight_decay": 0.5, "clip_norm": None}
    )
    model = made.untrained(1).eval()
    run = train.training_run(config, {})
    updater = optimizers.make(model, made.objective.loss_fn, run)
    batch = made.objective.batch("train", 0, seed=0, batch_size=4, seq_len=16)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    updater.step(batch, 0.1, lambda k: batch)
    for name, parameter in model.named_parameters():
        decay = 1 - 0.1 * 0.5 if parameter.dim() >= 2 else 1.0
        expected = decay * before[name] - 0.1 * parameter.grad
        torch.testing.assert_close(parameter.detach(), expected)
    assert TrainConfig().divergence_factor == 2.0


def test_the_ratio_is_that_of_the_gradient_before_the_cut(inputs):
    """A gradient that ``clip_norm`` has made a hundredth of itself promises no less by it."""
    for limit in (0.01, None):
        config, made = inputs(
            model={"dropout": 0.0},
            optimizer={
                "name": "kfac", "lr": 1e-4, "rest_lr": 1e-6, "clip": "none", "clip_norm": limit,
                "momentum": 0.0, "warmup": 0.0,
            },
        )  # fmt: skip
        model = made.untrained(1).double()
        run = train.training_run(config, {})
        updater = optimizers.make(model, made.objective.loss_fn, run)
        batch = made.objective.batch("train", 0, seed=0, batch_size=4, seq_len=16)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        row = updater.step(batch, 1e-4, made.objective.batch)  # no further ones
        optimizer = updater.optimizer
        cut = 1.0 if limit is None else limit / row["grad_norm"]
        assert updater.gradient.cut == pytest.approx(cut, rel=1e-4)
        change = {n: p.detach() - before[n] for n, p in model.named_parameters()}
        linear = sum(float((p.grad * change[n]).sum()) / cut for n, p in model.named_parameters())
        covered = {n: change[n] for n in optimizer._names}
        product = optimizer.kfac.compute_fisher_vector_product(covered, model)
        quadratic = sum(float((covered[n] * product[n]).sum()) for n in covered)
        assert row["predicted"] == pytest.approx(linear + quadratic / 2, rel=1e-4)
        assert row["reduction_ratio"] == pytest.approx(1.0, abs=0.02)


class Seldom(DataParallel):
    """Saves after some steps alone, whatever the clock says."""

    def __init__(self, saved) -> None:
        super().__init__()
        self.saved, self.done = set(saved), 0

    def agree(self, signum, due):
        self.done += 1
        return signum, self.done in self.saved


@pytest.mark.parametrize("seed", range(3))
def test_killed_long_after_the_last_save_it_ends_bit_identical(seed, inputs, tmp_path):
    """Steps are made again: more than one, over a refresh of factors or inverses."""
    config, made = inputs(optimizer={"name": "kfac", **OPTIONS["kfac"]}, train={"eval_every": 3})
    whole, expected = go(config, made, tmp_path / "whole")
    draw = random.Random(seed)
    kill = draw.randint(4, STEPS - 1)
    saved = draw.sample(range(1, kill - 1), k=draw.randint(1, 2))
    sent = []
    with pytest.raises(Killed):
        go(config, made, tmp_path / "cut", die_at=kill, parallel=Seldom(saved), on_row=sent.append)
    again, result = go(config, made, tmp_path / "cut")
    assert len(sent) == kill
    assert result.resumed_at == max(saved) < kill - 1
    assert without_seconds(result.curve) == without_seconds(expected.curve)
    assert result.heldout_loss == expected.heldout_loss
    for one, other in zip(again.parameters(), whole.parameters(), strict=True):
        assert torch.equal(one, other)
