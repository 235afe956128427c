"""Which samples are the rows of J, whatever the order, the process and the hash seed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fisher_lab.curvature.spectra.samples import draw_samples
from tests.curvature.spectra.reference import (
    assert_same_spectrum,
    batch_of,
    reference_spectrum,
    spectrum,
    tiny,
)


def test_subsample_depends_on_content_not_on_order(case):
    order = torch.tensor([2, 0, 1])
    shuffled = {key: value[order] for key, value in case.batch.items()}

    def draw(batch, seed=42):
        return draw_samples(case.model, batch, unit="token", n_samples=5, seed=seed)

    assert sorted(draw(case.batch).keys) == sorted(draw(shuffled).keys)
    assert draw(case.batch).subsample_hash != draw(case.batch, seed=43).subsample_hash
    rows = case.rows["token"]
    kept = [i for i, key in enumerate(all_keys(case)) if key in set(draw(case.batch).keys)]
    wanted = reference_spectrum({name: rows[name][kept] for name in rows}, list(rows))
    found = spectrum(case.model, case.batch, n_samples=5, structure="full")
    assert found["metadata"]["n_samples"] == 5
    assert_same_spectrum(found["global"]["eigenvalues"], wanted)


def all_keys(case):
    return draw_samples(case.model, case.batch, unit="token", n_samples=None, seed=0).keys


def test_repeated_sequences_are_samples_of_their_own():
    model, batch = tiny("gpt2"), batch_of("gpt2")
    twice = {key: torch.cat([value, value]) for key, value in batch.items()}
    samples = draw_samples(model, twice, unit="token", n_samples=None, seed=0)
    assert len(set(samples.keys)) == samples.n


ROOT = Path(__file__).parents[3]
_PROCESS = """
import json, sys
import torch
torch.set_num_threads(1)
from fisher_lab.curvature.spectra.spectrum import FisherSpectral, SpectralConfig
from tests.curvature.spectra.reference import batch_of, tiny
config = SpectralConfig(use_deterministic=bool(int(sys.argv[1])))
result = FisherSpectral(config).compute_fisher_spectrum(tiny("gpt2"), batch_of("gpt2"), 6)
print(json.dumps(result))
"""


def with_hash_seeds(deterministic):
    outputs = []
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", _PROCESS, str(int(deterministic))],
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        outputs.append(json.loads(done.stdout.splitlines()[-1]))
    assert outputs[0]["metadata"]["n_samples"] == 6
    return outputs


def test_processes_with_other_hash_seeds_agree_bit_for_bit():
    first, second = with_hash_seeds(deterministic=True)
    assert first == second


def test_processes_with_other_hash_seeds_choose_the_same_samples():
    first, second = with_hash_seeds(deterministic=False)
    assert first["metadata"] == second["metadata"]
    assert list(first["per_block"]) == list(second["per_block"])
    for name, record in first["per_block"].items():
        values = second["per_block"][name]["eigenvalues"]
        assert record["eigenvalues"] == pytest.approx(values, rel=1e-9, abs=0)
