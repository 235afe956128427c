import itertools
import os
import random
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from fisher_lab.config.errors import ConfigError
from fisher_lab.config.schema import Config
from fisher_lab.config.workload import OptimizerConfig
from fisher_lab.runs.signals import Interrupted, Watch
from fisher_lab.tasks import preflight
from fisher_lab.workload import optimizers, snapshot, training_loop
from fisher_lab.workload.snapshot import SnapshotError
from fisher_lab.workload.training_run import TrainingRun
from tests.training import Killed, die_at, without_seconds

STEPS = 9


def training_run(**changes):
    fields = {"seed": 5, "optimizer": OptimizerConfig(), "eval_every": 4, **changes}
    return TrainingRun(**{"steps": STEPS, "batch_size": 2, "seq_len": 32, "lr": 1e-2, **fields})


def fresh(inputs, kind="gpt2", dropout=0.3):
    """A new model; with dropout, so that the random numbers matter."""
    made = inputs(kind)
    made = replace(made, cfg=replace(made.cfg, model=replace(made.cfg.model, dropout=dropout)))
    return made.untrained(1), made.objective


def trained(inputs, directory, kind="gpt2", *, steps=STEPS, **options):
    """Weights and result of a training from the beginning, or from what the directory has."""
    model, task = fresh(inputs, kind)
    run = training_run(steps=steps)
    result = training_loop.train(model, task, run, directory, **options)
    return weights(model), result


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory):
    return trained(inputs, tmp_path_factory.mktemp("undisturbed"))


def assert_same_end(one, other):
    assert_same(one[0], other[0])
    assert without_seconds(one[1].curve) == without_seconds(other[1].curve)
    assert one[1].heldout_loss == other[1].heldout_loss


@pytest.mark.parametrize("save_every_s", [0.0, 1e9])
def test_an_interrupted_training_ends_bit_identical(inputs, undisturbed, tmp_path, save_every_s):
    """With a save at every step, and with none but the one at the start of it all."""
    for step in (3, 7):
        with pytest.raises(Killed):
            trained(inputs, tmp_path, save_every_s=save_every_s, after_step=die_at(step))
    random.seed(99)
    torch.manual_seed(99)
    found = trained(inputs, tmp_path)
    assert found[1].resumed_at == (7 if save_every_s == 0 else 0)
    assert_same_end(found, undisturbed)


def test_a_finished_training_is_not_repeated(inputs, undisturbed, tmp_path):
    trained(inputs, tmp_path)
    calls = []
    again = trained(inputs, tmp_path, after_step=calls.append)
    assert calls == []
    assert again[1].resumed_at == STEPS
    assert_same_end(again, undisturbed)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert", "t5", "mlp"])
def test_every_model_trains_and_resumes(inputs, tmp_path, kind):
    before = weights(fresh(inputs, kind)[0])
    whole, result = trained(inputs, tmp_path / "whole", kind, steps=4)
    assert result.heldout_loss > 0
    assert not all(torch.equal(before[name], tensor) for name, tensor in whole.items())
    options = {"steps": 4, "save_every_s": 0}
    with pytest.raises(Killed):
        trained(inputs, tmp_path / "part", kind, after_step=die_at(2), **options)
    resumed, _ = trained(inputs, tmp_path / "part", kind, steps=4)
    assert_same(resumed, whole)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_saves_at_the_next_step_and_ends(inputs, undisturbed, tmp_path, signum):
    def send(done):
        if done == 4:
            os.kill(os.getpid(), signum)

    with Watch() as signals, pytest.raises(Interrupted) as stop:
        trained(inputs, tmp_path, save_every_s=1e9, signals=signals, after_step=send)
    assert stop.value.status == ("cancelled" if signum == signal.SIGTERM else "preempted")
    assert snapshot.load(tmp_path / training_loop.STATE_FILE)["steps"] == 5
    found, result = trained(inputs, tmp_path)
    assert result.resumed_at == 5
    assert_same(found, undisturbed[0])


def test_the_curve(undisturbed, tmp_path):
    result = undisturbed[1]
    rows = result.curve.rows
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["step"] for row in rows if "heldout_loss" in row] == [4, 8, 9]
    assert rows[-1]["tokens"] == STEPS * 64
    assert rows[-1]["heldout_loss"] == result.heldout_loss
    assert result.best_heldout_loss == min(r["heldout_loss"] for r in rows if "heldout_loss" in r)
    result.curve.write(tmp_path / "curve.csv")
    assert training_loop.Curve.read(tmp_path / "curve.csv", STEPS) == result.curve
    assert training_loop.Curve.read(tmp_path / "curve.csv", 3).rows == rows[:3]
    with pytest.raises(SnapshotError, match="does not have the steps 1 to 12"):
        training_loop.Curve.read(tmp_path / "curve.csv", 12)
    with pytest.raises(SnapshotError, match="cannot be read as a learning curve"):
        training_loop.Curve.read(tmp_path / "none.csv", 1)


def test_another_trainings_state_is_refused(inputs, tmp_path):
    model, task = fresh(inputs)
    training_loop.train(model, task, training_run(steps=2), tmp_path)
    for other in (
        training_run(steps=3),
        training_run(steps=2, seed=6),
        training_run(steps=2, origin={"text": "another"}),
    ):
        with pytest.raises(SnapshotError, match="state of another training"):
            training_loop.train(model, task, other, tmp_path)


def test_a_state_cut_short_is_an_error_that_names_it(inputs, tmp_path):
    trained(inputs, tmp_path, steps=2)
    path = tmp_path / training_loop.STATE_FILE
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SnapshotError, match=r"state\.safetensors cannot be read as the state"):
        trained(inputs, tmp_path, steps=2)


def test_snapshots_keep_types_and_bits(tmp_path):
    shared = torch.randn(3, dtype=torch.float64)
    state = {
        "tensors": [shared, shared, torch.tensor(7, dtype=torch.uint8), torch.zeros(0)],
        "numbers": {0: (0.1, 1 / 3), "b": [None, True, 2**60]},
    }
    snapshot.save(tmp_path / "s", state)
    loaded = snapshot.load(tmp_path / "s")
    assert loaded["numbers"] == state["numbers"]
    assert isinstance(loaded["numbers"][0], tuple)
    for one, other in zip(state["tensors"], loaded["tensors"], strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    with pytest.raises(TypeError, match="a/0: a object cannot be saved"):
        snapshot.save(tmp_path / "t", {"a": [object()]})
    assert not (tmp_path / "t").exists()


def test_random_numbers_go_on_where_they_were(tmp_path):
    snapshot.save(tmp_path / "s", snapshot.random_state())

    def draw():
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    expected = draw()
    draw()
    snapshot.restore_random_state(snapshot.load(tmp_path / "s"))
    assert draw() == expected


def test_rates_rise_and_fall():
    config = OptimizerConfig(warmup=0.1, final_lr=0.1)
    rates = [optimizers.rate(step, 100, 2.0, config) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[9] == max(rates) == 2.0
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(0.2, rel=0.01)
    straight = OptimizerConfig(warmup=0.0, schedule="linear", final_lr=0.0)
    assert [optimizers.rate(i, 4, 1.0, straight) for i in range(4)] == [1, 0.75, 0.5, 0.25]
    constant = OptimizerConfig(schedule="constant")
    assert optimizers.rate(99, 100, 1.5, constant) == 1.5


def test_one_step_of_adamw_is_the_librarys(inputs):
    """On the mean loss, cut at the norm, decaying matrices alone."""
    model, task = fresh(inputs, dropout=0.0)
    reference, _ = fresh(inputs, dropout=0.0)
    config = OptimizerConfig(clip_norm=0.05, weight_decay=0.5, eps=1e-4)
    batch = task.batch("train", 0, seed=0, batch_size=2, seq_len=32)
    updater = optimizers.make(model, None, training_run(optimizer=config))
    row = updater.step(batch, 0.1, lambda k: batch)
    loss = reference(**batch).loss
    loss.backward()
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-6)
    norm = torch.stack([p.grad.norm() for p in reference.parameters()]).norm()
    assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    assert norm > 0.05
    for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
        gradient = theirs.grad * (0.05 / norm)
        decay = 0.1 * 0.5 if theirs.dim() >= 2 else 0.0
        expected = theirs * (1 - decay) - 0.1 * gradient / (gradient.abs() + 1e-4)
        torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-4, msg=name)


def test_an_unknown_optimizer_is_named(inputs):
    model, _ = fresh(inputs)
    with pytest.raises(ConfigError, match=r"optimizer\.name=lion .*one of adamw"):
        optimizers.make(model, None, training_run(optimizer=OptimizerConfig(name="lion")))


@pytest.mark.parametrize("name", ["muon", "soap", "shampoo"])
def test_the_librarys_optimisers_have_the_hidden_matrices_and_adamw_the_rest(inputs, name):
    model, task = fresh(inputs, dropout=0.0)
    config = OptimizerConfig(name=name, lr=0.01, rest_lr=0.002, beta2=0.9, inverse_freq=3)
    updater = optimizers.make(model, None, training_run(optimizer=config))
    hidden, rest = updater.optimizers
    names = {id(p): n for n, p in model.named_parameters()}
    own = {names[id(p)] for group in hidden.param_groups for p in group["params"]}
    blocks = {n for n, p in model.named_parameters() if ".h." in n and p.dim() == 2}
    assert own == blocks
    others = {names[id(p)] for group in rest.param_groups for p in group["params"]}
    assert others == set(names.values()) - own
    batch = task.batch("train", 0, seed=0, batch_size=2, seq_len=32)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(3):
        updater.step(batch, 0.01, lambda k: batch)
    assert [g["lr"] for g in hidden.param_groups] == [0.01]
    assert {g["lr"] for g in rest.param_groups} == {0.002}
    assert all(not torch.equal(before[n], p) for n, p in model.named_parameters() if n in own)


def test_soap_in_a_basis_of_its_first_gradient_is_adam_in_it():
    """The package's step against Adam by hand on the rotated gradient, before a refresh."""
    shampoo = pytest.importorskip("fisher_lab.workload.shampoo")
    draws = torch.Generator().manual_seed(0)
    start, *grads = torch.randn(5, 5, 5, generator=draws, dtype=torch.float64)
    weight = torch.nn.Parameter(start.clone())
    config = OptimizerConfig(name="soap", weight_decay=0.0, eps=1e-12)
    soap = shampoo.make([weight], config)
    soap.param_groups[0]["lr"] = 0.1
    left, right = (torch.linalg.eigh(m).eigenvectors for m in (grads[0] @ grads[0].T,
                                                             grads[0].T @ grads[0]))  # fmt: skip
    first = second = torch.zeros_like(start)
    expected = start.clone()
    for k, gradient in enumerate(grads):
        weight.grad = gradient.clone()
        soap.step()
        if k == 0:  # the first gradient makes the basis and no step
            continue
        first = 0.9 * first + 0.1 * gradient
        second = 0.95 * second + 0.05 * (left.T @ gradient @ right) ** 2
        mean, root = left.T @ first @ right / (1 - 0.9**k), (second / (1 - 0.95**k)).sqrt()
        expected = expected - 0.1 * left @ (mean / root) @ right.T
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-8, atol=1e-8)


def test_shampoo_takes_fourth_roots_of_its_averages_and_the_length_of_rmsprop():
    """The package's step by hand, in float64."""
    shampoo = pytest.importorskip("fisher_lab.workload.shampoo")
    draws = torch.Generator().manual_seed(0)
    start, *grads = torch.randn(5, 5, 5, generator=draws, dtype=torch.float64)
    weight = torch.nn.Parameter(start.clone())
    config = OptimizerConfig(name="shampoo", weight_decay=0.0, beta2=0.8, inverse_freq=1)
    found = shampoo.make([weight], config)
    found.param_groups[0]["lr"] = 0.1
    sides = [1e-6 * torch.eye(n, dtype=torch.float64) for n in start.shape]
    second = momentum = torch.zeros_like(start)
    expected = start.clone()
    for gradient in grads:
        weight.grad = gradient.clone()
        found.step()
        second = 0.8 * second + 0.2 * gradient**2
        sides = [
            0.8 * side + 0.2 * product
            for side, product in zip(sides, (gradient @ gradient.T, gradient.T @ gradient),
                                     strict=True)
        ]  # fmt: skip
        roots = []
        for side in sides:
            values, vectors = torch.linalg.eigh(side + 1e-6 * side.norm(2) * torch.eye(len(side)))
            roots.append(vectors @ torch.diag(values**-0.25) @ vectors.T)
        step = roots[0] @ gradient @ roots[1]
        step = step * (gradient / second.sqrt()).norm() / step.norm()
        momentum = 0.9 * momentum + 0.1 * step
        expected = expected - 0.1 * momentum
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-3, atol=1e-3)


def test_a_package_that_is_missing_is_named_before_anything_is_built(monkeypatch):
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    config = Config(optimizer=OptimizerConfig(name="soap"))
    config.task.name = "train"
    with pytest.raises(ConfigError, match=r"optimizer=soap needs .*fisher-lab\[optimizers\]"):
        preflight.check_optimizer(config)
    config.task.name = "analyze"
    assert preflight.check_optimizer(config) is None
