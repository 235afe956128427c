# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportOptionalOperand=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportOptionalSubscript=false, reportIndexIssue=false
"""Training: exact resume for every optimiser, micro-batches, precision, divergence."""

import json
import math
import random

import pytest
import torch

from fisher_lab.config.errors import ConfigError
from fisher_lab.config.workload import OPTIMIZERS, OptimizerConfig, TrainConfig
from fisher_lab.runs.record import Run
from fisher_lab.tasks import train
from fisher_lab.workload import optimizers
from fisher_lab.workload.data_parallel import DataParallel
from tests.training import (
    Killed,
    config_of,
    die_at,
    inputs_of,
    text_in,
    trained,
    untrained,
    without_seconds,
)

STEPS = 8
KILLS = (1, 3, 4, 8)


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    directory = text_in(tmp_path_factory.mktemp("text"))

    def make(kind="gpt2", **sections):
        sections["model"] = {"dropout": 0.1, **sections.get("model", {})}
        sections["kfac"] = {"damping": 0.1, "update_freq": 3, **sections.get("kfac", {})}
        return config_of(directory, kind, steps=STEPS, batch_size=4, **sections)

    return make


def updater_of(config, model):
    """What makes the steps of a training, and its batches by number."""
    objective = inputs_of(config).objective

    def batch(k):
        return objective.batch("train", k, seed=0, batch_size=4, seq_len=16)

    return optimizers.make(model, objective.loss_fn, train.training_run(config, {})), batch


def parameters_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same_end(one, other):
    """The same weights, curve and held-out loss, to the bit."""
    (first, expected), (second, found) = one, other
    assert without_seconds(found.curve) == without_seconds(expected.curve)
    assert found.heldout_loss == expected.heldout_loss
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


OPTIONS = {
    "adamw": {},
    "sgd": {"lr": 0.1},
    "muon": {"lr": 0.01},
    "soap": {"lr": 0.01, "inverse_freq": 2},
    "shampoo": {"lr": 0.01, "inverse_freq": 2},
    "kfac": {"lr": 0.01, "damping_schedule": "lm", "inverse_freq": 2},
    "ekfac": {"lr": 0.01, "clip": "kl"},
}
KFAC = {"name": "kfac", "lr": 0.01}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_killed_at_any_step_it_ends_bit_identical(name, make, tmp_path):
    config = make(
        optimizer={"name": name, **OPTIONS[name]}, train={"eval_every": 3, "accumulation": 2}
    )
    whole = trained(config, tmp_path / "whole")
    assert [row["step"] for row in whole[1].curve.rows] == list(range(1, STEPS + 1))
    # Before, at and after a refresh of the factors (3) and of the inverses (2), and at the end.
    for step in KILLS:
        directory = tmp_path / str(step)
        with pytest.raises(Killed):
            trained(config, directory, after_step=die_at(step))
        again = trained(config, directory)
        assert again[1].resumed_at == step
        assert_same_end(whole, again)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_loss_falls(name, make, tmp_path):
    optimizer = {"name": name, **OPTIONS[name]}
    config = make(optimizer=optimizer, train={"steps": 40, "eval_every": 40})
    _, result = trained(config, tmp_path)
    rows = result.curve.rows
    assert result.diverged_at is None
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.3


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert", "t5", "mlp"])
def test_every_model_takes_a_curvature_step(kind, make, tmp_path):
    _, result = trained(make(kind, optimizer=KFAC, train={"steps": 4}), tmp_path)
    assert result.diverged_at is None
    assert {"kl_scale", "decrement", "curvature_seconds"} <= result.curve.rows[0].keys()
    assert math.isfinite(result.heldout_loss)


def test_micro_batches_add_up_to_the_batch(make):
    """In float64, with unequal numbers of labels (masked language model) and clipping."""
    rows = []
    for parts in (1, 2, 3):
        optimizer = {"name": "sgd", "lr": 0.1, "clip_norm": 0.5}
        config = make("bert", optimizer=optimizer, train={"accumulation": parts})
        model = untrained(config).double().eval()
        updater, batch = updater_of(config, model)
        row = updater.step(batch(0), 0.1, batch)  # further batches: none wanted
        rows.append((row, parameters_of(model)))
    for row, parameters in rows[1:]:
        for key in ("loss", "grad_norm"):
            assert row[key] == pytest.approx(rows[0][0][key], rel=1e-6)
        for name, value in parameters.items():
            torch.testing.assert_close(value, rows[0][1][name], rtol=1e-6, atol=1e-8)


def losses_of(config, directory):
    model, result = trained(config, directory)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    return [row["loss"] for row in result.curve.rows]


def test_checkpointed_activations_change_nothing(make, tmp_path):
    for name in ("adamw", "kfac"):
        plain, checkpointed = (
            losses_of(
                make(
                    optimizer={"name": name, "lr": 0.01},
                    train={"gradient_checkpointing": checkpointing, "steps": 4},
                ),
                tmp_path / f"{name}{checkpointing}",
            )
            for checkpointing in (False, True)
        )
        assert plain == pytest.approx(checkpointed, rel=1e-5)
    with pytest.raises(ConfigError, match=r"train\.gradient_checkpointing=true"):
        trained(make("mlp", train={"gradient_checkpointing": True}), tmp_path / "mlp")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["adamw", "kfac"])
def test_mixed_precision_is_near_to_full(name, precision, make, tmp_path):
    changes = {"model": {"dropout": 0.0}, "optimizer": {"name": name, "lr": 0.003}}
    full, mixed = (
        losses_of(make(train={"precision": one, "steps": 6}, **changes), tmp_path / one)
        for one in ("fp32", precision)
    )
    assert full != mixed
    assert full == pytest.approx(mixed, rel=0.02)


def test_an_overflow_of_fp16_skips_the_step(make):
    config = make(optimizer=KFAC, train={"precision": "fp16"})
    model = untrained(config)
    updater, batch = updater_of(config, model)
    updater.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    before = parameters_of(model)
    row = updater.step(batch(0), 0.01, batch)
    assert not math.isfinite(row["grad_norm"])
    assert "reduction_ratio" not in row
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert updater.scaler.get_scale() == 2.0**59


@pytest.mark.parametrize("part", ["wte.weight", "c_attn.weight"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_gradient_that_is_not_finite_ends_the_run_before_its_step(name, part, make, tmp_path):
    """With a finite loss, in the last step, of what AdamW changes and of a hidden layer."""
    config = make(optimizer={"name": name, **OPTIONS[name]}, train={"steps": 3, "eval_every": 9})
    found = {}

    def begin(model):
        found["model"] = model

    def after_step(done):
        if done == 2:
            model = found["model"]
            found["weights"] = parameters_of(model)
            (parameter,) = (p for n, p in model.named_parameters() if n.endswith(part))
            parameter.register_hook(lambda grad: grad * math.nan)

    model, result = trained(config, tmp_path, begin, after_step=after_step)
    assert result.diverged_at == 3
    assert math.isfinite(result.curve.rows[-1]["loss"])
    assert train.metrics(result, None)["diverged"] == 1
    assert all(torch.equal(found["weights"][n], p) for n, p in model.named_parameters())


@pytest.mark.parametrize(("fisher", "passes"), [("empirical", 1), ("mc", 2)])
def test_a_step_makes_as_many_passes_as_its_factors_need(fisher, passes, make):
    """In micro-batches, with as many sequences each; what is verified takes a second one."""
    config = make(
        optimizer={**KFAC, "ratio": False}, train={"accumulation": 2},
        kfac={"fisher": fisher, "update_freq": 1},
    )  # fmt: skip
    model = untrained(config)
    updater, batch = updater_of(config, model)
    sizes = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    for verified in (True, False):
        updater._verify = verified
        sizes.clear()
        updater.step(batch(0), 0.01, batch)
        assert sizes == [2] * (4 if verified else 2 * passes)


def test_factors_of_the_steps_own_passes_are_those_of_a_second_one(make, monkeypatch):
    """In micro-batches with unlike numbers of labels, in float64."""
    every = []
    for one_pass in (False, True):
        config = make("bert", optimizer={**KFAC, "ratio": False}, train={"accumulation": 3})
        model = untrained(config).double().eval()
        updater, batch = updater_of(config, model)
        updater._verify = one_pass
        if not one_pass:
            monkeypatch.setattr(type(updater), "_one_pass", False)
        updater.step(batch(0), 0.01, batch)
        monkeypatch.undo()
        kfac = updater.optimizer.kfac.kfac_factors
        every.append({name: (f.A, f.G, f.tokens, f.n_labels) for name, f in kfac.items()})
    one, two = every
    assert one.keys() == two.keys()
    for name, (a, g, *counts) in one.items():
        other_a, other_g, *other_counts = two[name]
        assert counts == other_counts
        torch.testing.assert_close(g.to_dense(), other_g.to_dense(), rtol=1e-9, atol=1e-12)
        if a is not None:
            torch.testing.assert_close(a.to_dense(), other_a.to_dense(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["sgd", "kfac"])
def test_a_divergence_ends_the_run_and_is_a_result(name, make, tmp_path):
    config = make(
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


def test_metrics_of_a_curvature_run(make, tmp_path):
    config = make(
        optimizer=KFAC, train={"target_loss": 100.0, "eval_every": 3}, kfac={"n_batches": 2}
    )
    rows = []
    _, result = trained(config, tmp_path, on_row=rows.append)
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


def test_factors_come_from_the_batches_to_come(make, tmp_path):
    config = make(optimizer=KFAC, kfac={"n_batches": 3})
    updater, batch = updater_of(config, untrained(config))
    asked = []

    def further(k):
        asked.append(k)
        return batch(k)

    updater.step(further(0), 0.01, further)
    assert asked == [0, 1, 2]
    (tokens,) = {f.tokens for f in updater.optimizer.kfac.kfac_factors.values()}
    assert tokens == 3 * 4 * 16


def test_embeddings_and_head_go_to_adamw_unless_asked_for(make):
    for outer, expected in (("adamw", False), ("kfac", True)):
        config = make(optimizer={"name": "kfac", "outer": outer})
        updater, _ = updater_of(config, untrained(config))
        assert ("transformer.wte.weight" in updater.optimizer._names) is expected


def test_rates_of_what_is_left_to_adamw():
    config = OptimizerConfig(lr=0.1, rest_lr=0.02)
    assert optimizers.rest_factor(config) == pytest.approx(0.2)
    assert optimizers.rest_factor(OptimizerConfig()) == 1.0


def test_decoupled_decay_of_sgd(make):
    config = make(optimizer={"name": "sgd", "lr": 0.1, "weight_decay": 0.5, "clip_norm": None})
    model = untrained(config).eval()
    updater, batch = updater_of(config, model)
    before = parameters_of(model)
    updater.step(batch(0), 0.1, batch)
    for name, parameter in model.named_parameters():
        decay = 1 - 0.1 * 0.5 if parameter.dim() >= 2 else 1.0
        expected = decay * before[name] - 0.1 * parameter.grad
        torch.testing.assert_close(parameter.detach(), expected)
    assert TrainConfig().divergence_factor == 2.0


def test_the_ratio_is_that_of_the_gradient_before_the_cut(make):
    """A gradient that ``clip_norm`` has made a hundredth of itself promises no less by it."""
    for limit in (0.01, None):
        config = make(
            model={"dropout": 0.0},
            optimizer={
                "name": "kfac", "lr": 1e-4, "rest_lr": 1e-6, "clip": "none", "clip_norm": limit,
                "momentum": 0.0, "warmup": 0.0,
            },
        )  # fmt: skip
        model = untrained(config).double()
        updater, batch = updater_of(config, model)
        before = parameters_of(model)
        row = updater.step(batch(0), 1e-4, batch)  # no further ones
        optimizer = updater.optimizer
        cut = 1.0 if limit is None else limit / row["grad_norm"]
        assert updater.cut == pytest.approx(cut, rel=1e-4)
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
def test_killed_long_after_the_last_save_it_ends_bit_identical(seed, make, tmp_path):
    """Steps are made again: more than one, over a refresh of factors or inverses."""
    config = make(optimizer={"name": "kfac", **OPTIONS["kfac"]}, train={"eval_every": 3})
    whole = trained(config, tmp_path / "whole")
    draw = random.Random(seed)
    kill = draw.randint(4, STEPS - 1)
    saved = draw.sample(range(1, kill - 1), k=draw.randint(1, 2))
    sent = []
    options = {"after_step": die_at(kill), "parallel": Seldom(saved), "on_row": sent.append}
    with pytest.raises(Killed):
        trained(config, tmp_path / "cut", **options)
    again = trained(config, tmp_path / "cut")
    assert len(sent) == kill
    assert again[1].resumed_at == max(saved) < kill - 1
    assert_same_end(whole, again)
