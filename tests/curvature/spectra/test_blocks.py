"""Parameters fall into blocks, and linear layers come as products where that is cheaper."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fisher_lab.curvature.spectra import per_sample_gradients
from fisher_lab.curvature.spectra.blocks import architecture_of, parameter_blocks
from fisher_lab.curvature.spectra.per_sample_gradients import (
    PerSampleGradients,
    choose_factored,
    factored_is_cheaper,
)
from fisher_lab.curvature.spectra.samples import draw_samples
from tests.curvature.spectra.reference import batch_of, rows_of, tiny


@pytest.mark.parametrize(
    ("architecture", "layers"),
    [
        ("gpt2", ["transformer.h.0", "transformer.h.1"]),
        ("bert", ["bert.encoder.layer.0", "bert.encoder.layer.1"]),
        ("llama", ["model.layers.0", "model.layers.1"]),
        ("t5", ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"]),
    ],
)
def test_layers_by_architecture(architecture, layers):
    model = tiny(architecture)
    assert architecture_of(model) == architecture
    blocks = parameter_blocks(model, "layer")
    assert [name for name in blocks if name in layers] == layers
    for name in layers:
        assert all(member.startswith(f"{name}.") for member in blocks[name])
    for structure in ("layer", "module", "parameter", "full"):
        members = [name for names in parameter_blocks(model, structure).values() for name in names]
        assert sorted(members) == sorted(name for name, _ in model.named_parameters())


def test_llama_modules_and_generic_models():
    modules = parameter_blocks(tiny("llama"), "module")
    assert {f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up", "down")} <= set(modules)
    stack = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})
    assert list(parameter_blocks(stack, "layer")) == ["blocks.0", "blocks.1"]
    assert list(parameter_blocks(nn.Linear(2, 2), "layer")) == ["model"]
    assert architecture_of(stack) == "generic"


@given(
    n=st.integers(1, 600), s=st.integers(1, 300), b=st.integers(1, 8),
    d_in=st.integers(1, 600), d_out=st.integers(1, 600),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_products_are_chosen_where_positions_are_fewer_than_inputs(n, s, b, d_in, d_out):
    cheaper = factored_is_cheaper(n, s, s * b, d_in, d_out)
    if s == 1 and b == 1 and d_in > 3 and d_out > 3:
        assert cheaper
    if s > d_in and b > 1 and n >= s * b:
        assert not cheaper


def test_a_shared_weight_never_comes_as_a_product(monkeypatch):
    monkeypatch.setattr(per_sample_gradients, "factored_is_cheaper", lambda *_: True)
    model, batch = tiny("gpt2"), batch_of("gpt2")
    samples = draw_samples(model, batch, unit="token", n_samples=None, seed=0)
    names = [name for name, _ in model.named_parameters()]
    chosen = choose_factored(model, samples, names)
    assert "transformer.wte.weight" not in chosen
    assert "transformer.h.0.mlp.c_fc.weight" in chosen
    parameters = dict(model.named_parameters())
    rows = {}
    for chunk in PerSampleGradients(model.eval(), samples, parameters, factored=chosen):
        for name, one in chunk.factored.items():
            rows.setdefault(name, []).append(one.dense())
    wanted = rows_of(model, [batch])
    for name, parts in rows.items():
        torch.testing.assert_close(torch.cat(parts), wanted[name], rtol=1e-9, atol=1e-12)
