"""The case that the tests of the spectra are about: one model per architecture and its rows."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.curvature.spectra.reference import ARCHITECTURES, batch_of, reference_rows, tiny


@pytest.fixture(scope="module", params=ARCHITECTURES)
def case(request):
    model, batch = tiny(request.param), batch_of(request.param)
    rows = {
        unit: reference_rows(model, batch, request.param, unit)[1] for unit in ("token", "sequence")
    }
    return SimpleNamespace(architecture=request.param, model=model, batch=batch, rows=rows)
