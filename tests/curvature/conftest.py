"""The case that the tests of the spectra are about: one model per architecture and its truths."""

from functools import cached_property

import pytest

from tests.curvature.spectra.reference import (
    ARCHITECTURES,
    batch_of,
    hessian,
    reference_fisher,
    rows_of,
    tiny,
    true_fisher,
)

BLOCKS = {
    "gpt2": "transformer.h.1",
    "llama": "model.layers.1",
    "bert": "bert.encoder.layer.1",
    "t5": "decoder.block.1",
}


class Case:
    def __init__(self, architecture: str) -> None:
        self.architecture, self.block = architecture, BLOCKS[architecture]
        self.model, self.batch = tiny(architecture), batch_of(architecture)
        # LLaMA and T5 normalise in float32, whatever the model's dtype: 1e-7 is theirs.
        self.rounds_to_float32 = architecture in ("llama", "t5")

    @cached_property
    def rows(self):
        return {unit: rows_of(self.model, [self.batch], unit) for unit in ("token", "sequence")}

    @cached_property
    def matrices(self):
        rows = self.rows["token"]
        true = true_fisher(self.model, [self.batch])
        return {"empirical": reference_fisher(rows, list(rows)), "true": true}

    @cached_property
    def hessian(self):
        return hessian(self.model, [self.batch], f"{self.block}.")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def case(request):
    return Case(request.param)
