"""Which of transformers' mappings are compared, and what a model of each is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PretrainedConfig
from transformers.models.auto import modeling_auto

from benchmarks.zoo import beside, perception
from benchmarks.zoo.adapters import ADAPTERS, adapted
from benchmarks.zoo.inputs import (
    SHAPES,
    WINDOWS,
    Builder,
    Shape,
    answers,
    choices,
    classified,
    every_position,
    paired,
    pretrained,
    tagged,
)
from benchmarks.zoo.tiny import settle_classes, settle_decoder

AUTO: Any = modeling_auto


@dataclass(frozen=True)
class Task:
    """A mapping of transformers.

    Attributes:
        classes: type of model -> name of its class.
        batch: makes a model's batch.
        shapes: of the batches.
        windows: of the batches of a model that fills up windows of positions.
        settle: sets what the task asks of a configuration.
        adapt: what becomes of the model of a type before it is compared.
    """

    classes: Mapping[str, str]
    batch: Builder
    shapes: tuple[Shape, ...] = SHAPES
    windows: tuple[Shape, ...] = WINDOWS
    settle: Callable[[PretrainedConfig], None] = lambda _: None
    adapt: Mapping[str, Callable[[nn.Module], nn.Module]] = field(default_factory=dict)


def _first(classes: Mapping[str, Any]) -> dict[str, str]:
    """Of several classes of a type the first."""
    return {kind: name if isinstance(name, str) else name[0] for kind, name in classes.items()}


def _others() -> dict[str, str]:
    """The classes for pretraining that are in no other mapping."""
    known = (
        AUTO.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        AUTO.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        AUTO.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        AUTO.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        AUTO.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    )
    taken = {name for names in map(_first, known) for name in names.values()}
    every = _first(AUTO.MODEL_FOR_PRETRAINING_MAPPING_NAMES)
    return {kind: name for kind, name in every.items() if name not in taken}


TASKS = {
    "causal": Task(AUTO.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, every_position, settle=settle_decoder),
    "masked": Task(AUTO.MODEL_FOR_MASKED_LM_MAPPING_NAMES, every_position),
    "seq2seq": Task(AUTO.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, every_position),
    "sequences": Task(
        AUTO.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        classified,
        settle=settle_classes,
    ),
    "tokens": Task(
        AUTO.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES, tagged, settle=settle_classes
    ),
    "answers": Task(AUTO.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES, answers),
    "choices": Task(AUTO.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES, choices),
    "sentences": Task(AUTO.MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING_NAMES, paired),
    "pretraining": Task(_others(), pretrained, SHAPES[::2]),
    "image_text": Task(
        AUTO.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        beside.pictured,
        settle=beside.settle_beside,
    ),
    "images": Task(
        _first(AUTO.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES),
        perception.images,
        perception.IMAGES,
        (),
        perception.settle_images,
    ),
    "segments": Task(
        AUTO.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,
        perception.segments,
        perception.IMAGES,
        (),
        perception.settle_images,
    ),
    "films": Task(
        AUTO.MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES,
        perception.films,
        perception.IMAGES,
        (),
        perception.settle_images,
    ),
    "frames": Task(
        AUTO.MODEL_FOR_AUDIO_FRAME_CLASSIFICATION_MAPPING_NAMES,
        perception.frames,
        perception.SOUNDS[1:],
        perception.WINDOWS[1:],
        perception.settle_sounds,
    ),
    "voices": Task(
        AUTO.MODEL_FOR_AUDIO_XVECTOR_MAPPING_NAMES,
        perception.sounds,
        perception.SOUNDS,
        perception.WINDOWS,
        perception.settle_sounds,
    ),
    "sounds": Task(
        AUTO.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
        perception.sounds,
        perception.SOUNDS,
        perception.WINDOWS,
        perception.settle_sounds,
    ),
    "speech": Task(
        AUTO.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
        perception.heard,
        perception.SOUNDS,
        perception.WINDOWS,
        perception.settle_sounds,
    ),
    "ctc": Task(
        AUTO.MODEL_FOR_CTC_MAPPING_NAMES,
        perception.transcribed,
        perception.SOUNDS,
        perception.WINDOWS,
        perception.settle_sounds,
    ),
    "adapters": Task(
        {name: adapter.base for name, adapter in ADAPTERS.items()},
        adapted,
        settle=settle_classes,
        adapt=ADAPTERS,
    ),
}
