"""K-FAC is right on models of images, sounds and speech, against references of their own."""

from __future__ import annotations

import pytest

from benchmarks.zoo.examine import RIGHT, examine

ARCHITECTURES = {
    "images": "vit dinov2 segformer swiftformer hiera",
    "sounds": "wav2vec2 whisper",
    "ctc": "lasr_ctc sew",
}
CASES = [(task, kind) for task, kinds in ARCHITECTURES.items() for kind in kinds.split()]


@pytest.mark.parametrize(("task", "kind"), CASES)
def test_an_architecture_that_perceives_is_right(task: str, kind: str):
    row = examine(task, kind)
    assert row["status"] == RIGHT, row["why"]
    assert row["of_reached"] > 0.85, row["passed"]
    assert not row["unchecked"]
