"""The engines have the options and the defaults of the command line."""

import inspect

import pytest
import torch

from fisher_lab.config.spectra import (
    GroupFisherConfig,
    GroupFisherSection,
    LanczosConfig,
    LanczosSection,
    SpectralSection,
    options_of,
)
from fisher_lab.curvature.group_fisher.collector import FisherCollector
from fisher_lab.curvature.losses import CrossEntropy
from fisher_lab.curvature.spectra.lanczos import FisherLanczos
from fisher_lab.curvature.spectra.spectrum import FisherSpectral, SpectralConfig


def defaults(function):
    return {name: p.default for name, p in inspect.signature(function).parameters.items()}


def test_methods_have_the_defaults_of_the_sections():
    spectral, lanczos, group = SpectralSection(), LanczosSection(), GroupFisherSection()
    found = defaults(FisherSpectral.compute_fisher_spectrum)
    for name in ("n_samples", "block_structure", "center_gradients"):
        assert found[name] == getattr(spectral, name)
    found = defaults(FisherLanczos.analyze)
    assert found["block"] == lanczos.block
    assert found["n_probes"] == lanczos.density_probes
    assert found["steps"] == lanczos.density_steps
    assert found["lam"] == lanczos.dimension_damping
    assert defaults(FisherCollector.overlap)["share"] == group.share
    assert FisherCollector().unit == group.unit


def test_an_engine_takes_its_options_out_of_a_section():
    section = LanczosSection(k=3, enabled=True, vector_dtype="float32")
    assert options_of(section, LanczosConfig) == LanczosConfig(3, vector_dtype=torch.float32)
    spectral = options_of(SpectralSection(top_k=2), SpectralConfig, use_deterministic=True)
    assert spectral == SpectralConfig(top_k=2, use_deterministic=True)
    group = options_of(GroupFisherSection(unit="token"), GroupFisherConfig)
    assert group == GroupFisherConfig("token")


def test_lanczos_takes_options_by_position_by_name_and_as_an_object():
    by_position = FisherLanczos(3, None, "true", 1e-3, 7, False)
    by_name = FisherLanczos(
        k=3, max_vectors=None, operator="true", tol=1e-3, seed=7, reorthogonalize=False
    )
    assert by_position.config == by_name.config
    as_object = FisherLanczos(config=by_name.config)
    assert as_object.config == by_name.config
    with pytest.raises(TypeError, match="pairs"):
        FisherLanczos(pairs=3)


def test_an_engine_keeps_a_copy_of_its_options():
    config = SpectralConfig(chunk_size=4)
    engine = FisherSpectral(config)
    config.chunk_size = 0
    assert engine.config.chunk_size == 4


def test_options_of_lanczos_are_attributes_for_one_more_release():
    engine = FisherLanczos(3)
    with pytest.warns(DeprecationWarning, match="config.k"):
        assert engine.k == 3
    with pytest.warns(DeprecationWarning, match="config.seed"):
        engine.seed = 5
    assert engine.config == LanczosConfig(3, seed=5)


def test_keep_rows_is_accepted_for_one_more_release():
    batch = (torch.ones(3, 2), torch.tensor([0, 1, 1]))
    engine = FisherSpectral(loss_fn=CrossEntropy())
    with pytest.warns(DeprecationWarning, match="keep_rows"):
        cache = engine.collect_gradients(torch.nn.Linear(2, 2), batch, keep_rows=True)
    assert len(cache) == 3
