"""Made-up pictures with labels, for models that tell pictures apart: a pattern under noise."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from fisher_lab.config.errors import ConfigError
from fisher_lab.curvature.losses import CrossEntropy
from fisher_lab.workload.corpus import Corpus, Side, Stream, generator
from fisher_lab.workload.objectives import HELDOUT_BATCHES, Batch, Objective

COARSE = 4
"""A pattern is drawn on this many squares a side, and so has no detail finer than these."""

NOISE = 1.0
"""Standard deviation of the noise on every pixel; that of the pattern is one too."""


class Pictures(Objective):
    """The class of a picture: a pattern of its class, drawn once, under Gaussian noise.

    Every class is as likely as any other. Pixels have mean zero and variance two, as normalised
    pictures nearly have.

    Args:
        classes: Number of classes.
        channels: Channels of a picture.
        height: Pixels.
        width: Pixels.
    """

    name: ClassVar[str] = "pictures"
    baseline: ClassVar[str] = "class frequencies"
    loss_fn: ClassVar[CrossEntropy | None] = CrossEntropy()

    def __init__(self, classes: int, channels: int, height: int, width: int) -> None:
        nothing = Stream(np.zeros(0, np.int64), np.zeros(0, np.int64))
        super().__init__(Corpus(nothing, nothing), classes)
        self.shape = (channels, height, width)
        coarse = np.random.default_rng(0).standard_normal((classes, channels, COARSE, COARSE))
        rows, columns = (np.arange(n) * COARSE // n for n in (height, width))
        self._patterns = coarse[:, :, rows][:, :, :, columns]

    @classmethod
    def of(cls, config: Any) -> Pictures:
        """The pictures that a model takes, by its configuration.

        Raises:
            ConfigError: The configuration does not say how large they are.
        """
        size = getattr(config, "image_size", None)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        channels, classes = getattr(config, "num_channels", 3), config.num_labels
        if not isinstance(height, int) or not isinstance(width, int):
            raise ConfigError(
                "data.type=pictures: the model's configuration has no image_size "
                f"({type(config).__name__}); allowed: a model with one"
            )
        return cls(classes, channels, height, width)

    def _labels(self, side: Side, index: int, seed: int, count: int) -> np.ndarray:
        return generator(side, seed, index).integers(0, self.classes, size=count)

    @override
    def batch(self, side: Side, index: int, *, seed: int, batch_size: int, seq_len: int) -> Batch:
        labels = self._labels(side, index, seed, batch_size)
        noise = generator(side, seed, index).spawn(1)[0].standard_normal((batch_size, *self.shape))
        pixels = (self._patterns[labels] + NOISE * noise).astype(np.float32)
        return {
            "pixel_values": torch.from_numpy(pixels),
            "labels": torch.from_numpy(labels.astype(np.int64)),
        }

    @override
    def heldout_batches(self, batch_size: int, seq_len: int) -> int:
        return HELDOUT_BATCHES

    @override
    def distinct_batches(self, batch_size: int, seq_len: int) -> None:
        return None

    @override
    def label_batch(
        self, side: Side, index: int, *, seed: int, batch_size: int, seq_len: int
    ) -> Tensor:
        return torch.from_numpy(self._labels(side, index, seed, batch_size).astype(np.int64))
