"""K-FAC is right on models of images, sounds and speech, against references of their own."""

from __future__ import annotations

import pytest

from benchmarks.zoo.examine import RIGHT, examined
from benchmarks.zoo.mappings import TASKS
from benchmarks.zoo.tiny import Exact, build

ARCHITECTURES = {
    "images": "vit dinov2 segformer hiera",
    "sounds": "wav2vec2 whisper",
    "ctc": "lasr_ctc sew",
    "speech": "speech_to_text speecht5",
}
CASES = [(task, kind) for task, kinds in ARCHITECTURES.items() for kind in kinds.split()]


@pytest.mark.parametrize(("task", "kind"), CASES)
def test_an_architecture_that_perceives_is_right(task: str, kind: str):
    about = TASKS[task]
    with Exact():
        row = examined(build(about.classes[kind], settle=about.settle), about)
    assert row["status"] == RIGHT, row["why"]
    assert row["of_reached"] > 0.85, row["passed"]
    assert not row["unchecked"]
