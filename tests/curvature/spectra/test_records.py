"""What the engines return is a mapping with attributes, a text, a table and a picture."""

import json

import pytest
import torch

from fisher_lab.curvature.spectra.lanczos import FisherLanczos
from fisher_lab.curvature.spectra.spectrum import FisherSpectral
from fisher_lab.runs.record import strict
from tests import models


@pytest.fixture(scope="module")
def setting():
    return models.seeded(models.gpt2, torch.float64), models.language_batch()


def test_a_spectrum_has_attributes_beside_its_keys(setting):
    found = FisherSpectral().compute_fisher_spectrum(*setting)
    assert set(found) == {"metadata", "per_block", "global"}
    assert found.union is found["global"]
    assert found.union.trace == found["global"]["trace"]
    block = found.per_block["transformer.h.0"]
    assert block.eigenvalues == found["per_block"]["transformer.h.0"]["eigenvalues"]
    assert json.loads(json.dumps(strict(found)))["global"]["trace"] == found.union.trace
    assert "trace=" in repr(found)
    assert len(repr(found)) < 400
    assert "<td>samples</td>" in found._repr_html_()
    assert "trace" in dir(found.union)
    with pytest.raises(AttributeError, match="BlockSpectrum has no 'tarce'; there are "):
        _ = found.union.tarce
    assert len(found.plot().axes[0].lines) == len(found.per_block)


def test_what_lanczos_finds_has_attributes_and_pictures(setting):
    engine = FisherLanczos(k=2, max_vectors=20)
    found = engine.analyze(*setting, lam=1e-3, n_probes=3, steps=6)
    assert found.top.eigenvalues == found["top"]["eigenvalues"]
    assert found.effective_dimension.value == found["effective_dimension"]["value"]
    assert f"{found.trace.value:.4g}" in repr(found)
    assert found.plot().axes[0].lines
    pairs = engine.top_eigenpairs(*setting)
    assert (pairs.operator, len(pairs.eigenvalues)) == ("empirical", 2)
    assert pairs.plot().axes[0].get_title().startswith("top 2 by Lanczos")
