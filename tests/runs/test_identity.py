"""What changes a run's identity, and what does not."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json

import pytest

from fisher_lab.config.schema import Config, ResumeConfig, TrackerConfig
from fisher_lab.config.validate import all_keys
from fisher_lab.runs import identity
from fisher_lab.runs.identity import run_id
from tests.processes import python

CONTENT = {"data": {"sha256": "d"}, "model": {"checkpoint": "m"}}


def config(**changes: object) -> dict:
    plain = dataclasses.asdict(Config())
    for key, value in changes.items():
        set_key(plain, key.replace("__", "."), value)
    return plain


def set_key(plain: dict, key: str, value: object) -> None:
    *above, last = key.split(".")
    for part in above:
        plain = plain[part]
    assert last in plain
    plain[last] = value


NEUTRAL = (
    "progress",
    "cache_dir",
    "kfac.verify",
    "model.name",
    "data.name",
    "data.path",
    "data.pattern",
    "model.name_or_path",
    "distributed.timeout_s",
    "train.save_every_s",
    *(f"tracker.{item.name}" for item in dataclasses.fields(TrackerConfig)),
    *(key for key in all_keys() if key.startswith("sweep.")),
    *(f"resume.{item.name}" for item in dataclasses.fields(ResumeConfig)),
)


@pytest.mark.parametrize("key", sorted(all_keys()))
def test_every_key_counts_unless_it_cannot_change_a_result(key):
    plain = dataclasses.asdict(Config())
    changed = copy.deepcopy(plain)
    set_key(changed, key, "something else")
    same = run_id(plain, CONTENT) == run_id(changed, CONTENT)
    assert same == (key in NEUTRAL)


def test_a_run_of_the_defaults_is_the_one_that_it_was_before_later_keys_came():
    # Another one since the settings of Lanczos' estimates, whose numbers are others, count.
    # `kfac.update_freq` is 1 in Python since then, and still 10 in conf/config.yaml.
    assert run_id(config(kfac__update_freq=10), CONTENT) == "d33882778193b80a"


def test_every_key_that_came_later_is_left_out_with_the_value_that_it_was_before():
    """Else a new version would run every completed cell again: put new keys into `CAME_LATER`."""
    known = (*identity.CAME_LATER, *identity.LEFT_OUT)
    names = [identity.RENAMED.get(key, key) for key in all_keys()]
    first = [k for k in names if not any(f"{k}.".startswith(f"{one}.") for one in known)]
    text = "\n".join(sorted(first))
    assert (len(first), hashlib.sha256(text.encode()).hexdigest()[:16]) == FIRST
    for key, value in identity.CAME_LATER.items():
        assert run_id(config(**{key.replace(".", "__"): value})) == run_id(without(key)), key


FIRST = (150, "5ab40dff4866586c")
"""How many keys there were at first, and a digest of their names: neither ever changes."""


def test_what_was_renamed_is_the_same_run_under_its_new_name(monkeypatch):
    """A key that moved, alone in its new section, and a value; tables show the new names."""
    plain = config(kfac__damping=3e-5, kfac__policy="all")
    monkeypatch.setattr(identity, "RENAMED", {"solver.ridge": "kfac.damping"})
    monkeypatch.setattr(identity, "VALUES", {"kfac.policy": {"every": "all"}})
    old = run_id(plain, CONTENT)
    new = copy.deepcopy(plain)
    new["solver"] = {"ridge": new["kfac"].pop("damping")}
    new["kfac"]["policy"] = "every"
    assert run_id(new, CONTENT) == old
    assert run_id({**new, "solver": {"ridge": 1e-4}}, CONTENT) != old
    assert new["solver"] == {"ridge": 3e-5}  # what was given is as it was
    settings = {"kfac.damping": 3e-5, "kfac.policy": "all", "seed": 1}
    now = {"solver.ridge": 3e-5, "kfac.policy": "every", "seed": 1}
    assert identity.in_present_words(settings) == now == identity.in_present_words(now)


def test_names_of_earlier_runs_are_those_of_no_other_setting():
    assert not set(identity.RENAMED.values()) & set(all_keys())
    assert set(identity.RENAMED) | set(identity.VALUES) <= set(all_keys())


def without(key: str) -> dict:
    """The defaults of a version that did not have a key yet."""
    plain = dataclasses.asdict(Config())
    section = plain
    *above, last = key.split(".")
    for part in above:
        section = section[part]
    del section[last]
    return plain


def test_what_a_key_was_before_it_came():
    assert identity.before("kfac.sharing") == "expand"
    assert identity.before("model.lora.r") == 8
    assert identity.before("task.damping_scan") == []
    assert identity.before("kfac.damping") is None
    assert identity.before("seed") is None


def test_content_counts_and_paths_count_only_without_it():
    plain = config()
    assert run_id(plain, CONTENT) != run_id(plain, {**CONTENT, "data": {"sha256": "e"}})
    moved = config(data__path="elsewhere.txt")
    assert run_id(plain, CONTENT) == run_id(moved, CONTENT)
    assert run_id(plain, {}) != run_id(moved, {})


def test_numbers_count_as_numbers_and_neither_order_nor_hydras_own_node_does():
    plain = config(kfac__damping=1.0)
    turned = dict(reversed(config(kfac__damping=1).items()))
    turned["hydra"] = {"run": {"dir": "x"}, "launcher": "slurm"}
    assert run_id(plain, CONTENT) == run_id(turned, CONTENT)
    assert run_id(plain) != run_id(config(kfac__damping=float("inf")))


def test_the_same_in_every_process():
    script = (
        "import json,sys; from fisher_lab.runs.identity import run_id; "
        "print(run_id(*json.load(sys.stdin)))"
    )
    given = json.dumps([config(), CONTENT])
    found = {
        python("-c", script, text=given, environment={"PYTHONHASHSEED": seed}).stdout.strip()
        for seed in ("1", "2")
    }
    assert found == {run_id(config(), CONTENT)}
    assert len(found.pop()) == identity.LENGTH
