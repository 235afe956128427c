"""Training on ranks: what one process does with the joined batch, resumed to the bit, agreed on."""

import signal
from pathlib import Path
from typing import Any

import pytest

from fisher_lab.config.errors import ConfigError
from fisher_lab.tasks import train
from tests.distributed import trained
from tests.distributed.rank_pool import Pool
from tests.distributed.trained import config_of
from tests.training import text_in, untrained

KFAC = {"name": "kfac", "lr": 0.03, "clip": "kl", "damping_schedule": "lm", "clip_limit": 1e-2}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"eps": 1e-4},
    "sgd": {"lr": 0.5},
    "muon": {"lr": 0.02},
    "soap": {"lr": 0.01, "inverse_freq": 2},
    "shampoo": {"lr": 0.01, "inverse_freq": 2},
    "kfac": KFAC,
    "ekfac": {**KFAC, "clip": "trust"},
}
MICRO = {"accumulation": 2, "eval_every": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return text_in(tmp_path_factory.mktemp("text"))


def furthest(one: dict[str, Any], other: dict[str, Any]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def config(data: str, name: str, *, clip_norm: float | None = 0.1, **sections: Any) -> Any:
    optimizer = {"name": name, **OPTIMIZERS[name], "clip_norm": clip_norm}
    return config_of(data, **{"optimizer": optimizer, "train": MICRO, **sections})


def one_and_ranks(
    ranks: Pool, made: Any, directory: Path, size: int = 2, **arguments: Any
) -> tuple[dict[str, Any], list[dict]]:
    """What one process answers, and what each of the ranks does."""
    one = trained.trained(None, made, str(directory / "one"))
    run = str(directory / "ranks")
    return one, ranks.run(trained.trained, size, config=made, run=run, **arguments)


def assert_like_one(one: dict[str, Any], answers: list[dict], bound: float) -> None:
    """Weights, every number of the curve, and the loss in the end, on every rank."""
    for answer in answers:
        assert furthest(one["weights"], answer["weights"]) < bound
        for mine, theirs in zip(one["curve"], answer["curve"], strict=True):
            assert mine.keys() == theirs.keys()
            for key, value in mine.items():
                assert theirs[key] == pytest.approx(value, rel=bound, abs=bound), key
        assert answer["heldout"] == answers[0]["heldout"]
        assert furthest(answers[0]["weights"], answer["weights"]) == 0.0


@pytest.mark.parametrize(
    ("name", "wrapper", "mode"),
    [
        ("adamw", "ddp", "gram"), ("adamw", "fsdp", "gram"), ("sgd", "ddp", "gram"),
        ("sgd", "fsdp", "gram"), ("muon", "ddp", "gram"), ("kfac", "ddp", "gram"),
        ("kfac", "fsdp", "gram"), ("kfac", "ddp", "gather"), ("ekfac", "ddp", "gram"),
        ("ekfac", "fsdp", "gather"), ("shampoo", "ddp", "gram"),
    ],
)  # fmt: skip
def test_two_ranks_do_what_one_process_does(ranks, data, tmp_path, name, wrapper, mode):
    """Five sequences a step, in micro-batches, with the gradient's norm cut."""
    made = config(data, name, kfac={"reduce": mode, "damping": 0.1, "update_freq": 2})
    start = trained.whole(untrained(made))
    one, answers = one_and_ranks(ranks, made, tmp_path, wrapper=wrapper)
    assert furthest(start, one["weights"]) > 1e-3
    assert one["curve"][0]["grad_norm"] > 0.1
    assert_like_one(one, answers, 1e-10)
    assert answers[0]["files"] == ["curve.csv", "state.safetensors"]
    assert answers[1]["files"] == []
    assert [answer["seen"] for answer in answers] == [(240, 225), (160, 150)]


@pytest.mark.parametrize(("name", "wrapper"), [("kfac", "ddp"), ("adamw", "fsdp")])
def test_single_precision(ranks, data, tmp_path, name, wrapper):
    optimizer = {"name": name, **OPTIMIZERS[name]}
    made = config_of(data, "float32", optimizer=optimizer, train=MICRO)
    one, answers = one_and_ranks(ranks, made, tmp_path, wrapper=wrapper)
    assert furthest(one["weights"], answers[0]["weights"]) < 1e-4
    assert answers[0]["heldout"] == pytest.approx(one["heldout"], rel=1e-4)
    assert furthest(answers[0]["weights"], answers[1]["weights"]) == 0.0


@pytest.mark.parametrize(
    ("name", "wrapper", "kind"),
    [("adamw", "ddp", "t5"), ("adamw", "fsdp", "bert"), ("kfac", "ddp", "llama")],
)
def test_a_rank_without_a_sequence(ranks, data, tmp_path, name, wrapper, kind):
    """Two sequences for three ranks, labels in masked positions only where the model is one."""
    made = config(data, name, train={"batch_size": 2, "eval_every": 2})
    made.model.type = kind
    one, answers = one_and_ranks(ranks, made, tmp_path, 3, wrapper=wrapper)
    # The norms of t5 and llama are float32 in a float64 model, and three ranks scale the loss by 3:
    # no power of two, so that gradients round another way there.
    assert_like_one(one, answers, 1e-10 if kind == "bert" else 1e-6)
    assert answers[2]["seen"] == (0, 0)


def test_factors_of_each_ranks_own_are_another_step_and_still_one(ranks, data, tmp_path):
    made = config(data, "kfac", kfac={"reduce": "none", "damping": 0.1, "update_freq": 2})
    one, (first, second) = one_and_ranks(ranks, made, tmp_path)
    assert furthest(first["weights"], second["weights"]) == 0.0
    assert first["curve"] == second["curve"]
    assert first["curve"][0]["loss"] == pytest.approx(one["curve"][0]["loss"], rel=1e-12)
    assert furthest(first["weights"], one["weights"]) > 1e-6


@pytest.mark.parametrize(
    ("name", "wrapper", "mode", "size"),
    [
        ("adamw", "ddp", "gram", 3), ("adamw", "fsdp", "gram", 2), ("kfac", "ddp", "gram", 2),
        ("kfac", "fsdp", "gram", 2), ("kfac", "ddp", "none", 2), ("ekfac", "ddp", "gram", 3),
        ("ekfac", "ddp", "gather", 2),
    ],
)  # fmt: skip
def test_ranks_that_died_go_on_to_the_bit(ranks, data, tmp_path, name, wrapper, mode, size):
    """Dropout, momentum, factors between two refreshes, a damping that has moved."""
    made = config(data, name, kfac={"reduce": mode, "damping": 0.1, "update_freq": 2})
    made.model.dropout, made.model.dtype = 0.2, "float32"
    made.optimizer.inverse_freq = 1
    given = {"config": made, "wrapper": wrapper}
    whole = ranks.run(trained.trained, size, run=str(tmp_path / "whole"), **given)
    again = ranks.run(trained.resumed, size, run=str(tmp_path / "part"), step=3, **given)
    for one, other in zip(whole, again, strict=True):
        assert other["resumed_at"] == 3
        assert furthest(one["weights"], other["weights"]) == 0.0
        assert one["curve"] == other["curve"]
        assert one["heldout"] == other["heldout"]


@pytest.mark.parametrize("signum", [signal.SIGUSR2, signal.SIGTERM])
def test_a_signal_to_one_rank_ends_all_at_one_step(ranks, data, tmp_path, signum):
    answers = ranks.run(
        trained.signalled, 2, config=config(data, "adamw"), run=str(tmp_path), rank=1,
        signum=signum,
    )  # fmt: skip
    assert answers == [{"signal": signum, "steps": 3}] * 2


@pytest.mark.parametrize("name", ["sgd", "kfac"])
def test_a_divergence_is_one_of_all_ranks(ranks, data, tmp_path, name):
    made = config(data, name, clip_norm=None)
    made.optimizer.lr, made.optimizer.warmup, made.optimizer.clip = 1e3, 0.0, "none"
    made.train.divergence_factor = 1.5
    one, answers = one_and_ranks(ranks, made, tmp_path)
    assert one["diverged_at"] is not None
    assert [answer["diverged_at"] for answer in answers] == [one["diverged_at"]] * 2


def test_weights_that_differ_are_an_error(ranks, data, tmp_path):
    answers = ranks.run(trained.unlike, 2, config=config(data, "adamw"), run=str(tmp_path))
    assert all("Error: weights: transformer.wte.weight of rank" in answer for answer in answers)


def test_what_shards_cannot_do_is_refused(data):
    for name in ("muon", "soap", "shampoo"):
        whole = config(data, name, distributed={"wrapper": "fsdp"})
        with pytest.raises(ConfigError, match=rf"optimizer\.name={name} .*wrapper=fsdp"):
            train.check_ranks(whole, batch_size=4, ranks=2)
    kfac = config(data, "kfac", distributed={"wrapper": "fsdp"})
    with pytest.raises(ConfigError, match=r"train\.batch_size=1 .*at least 2, the ranks"):
        train.check_ranks(kfac, batch_size=1, ranks=2)
    train.check_ranks(kfac, batch_size=2, ranks=2)
    kfac.distributed.wrapper = "ddp"
    train.check_ranks(kfac, batch_size=1, ranks=2)


@pytest.mark.parametrize(
    ("name", "mode", "size", "wrapper"),
    [
        ("adamw", "gram", 3, "fsdp"), ("kfac", "gram", 1, "ddp"), ("kfac", "gram", 3, "ddp"),
        ("kfac", "gram", 3, "fsdp"), ("kfac", "none", 3, "ddp"), ("ekfac", "gram", 3, "ddp"),
    ],
)  # fmt: skip
def test_a_training_on_two_ranks_goes_on_on_others(
    ranks, data, tmp_path, name, mode, size, wrapper
):
    """Between two refreshes; ranks with factors of their own make new ones."""
    made = config(data, name, kfac={"reduce": mode, "damping": 0.1, "update_freq": 2})
    run = str(tmp_path)
    whole = trained.trained(None, made, str(tmp_path / "one"))
    ranks.run(trained.killed, 2, config=made, run=run, step=3)
    again = ranks.run(trained.trained, size, config=made, run=run, wrapper=wrapper)
    assert again[0]["resumed_at"] == 3
    bound = 1e-10 if mode == "gram" else 1.0
    assert all(furthest(whole["weights"], one["weights"]) < bound for one in again)
    assert all(furthest(again[0]["weights"], one["weights"]) == 0.0 for one in again)
    assert len(again[0]["curve"]) == 5
