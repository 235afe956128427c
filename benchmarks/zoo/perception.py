"""Images, sounds and speech for tiny models, and what such models ask of a configuration."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from benchmarks.zoo.inputs import CLASSES, VOCAB, Batch, Shape, takes

IMAGES = (Shape("right", (1, 1, 1)),)
SOUNDS = (Shape("right", (70, 90, 58)), Shape("right", (70, 70)))
WINDOWS = (Shape("right", (128, 256, 128)), Shape("right", (128, 128)))
SIDE = 32
FRAMES = 64
CONVOLUTIONS = {"conv_dim": [16, 24], "conv_kernel": [5, 3], "conv_stride": [3, 2]}


def settle_images(config: PretrainedConfig) -> None:
    """Asks for few classes, small images, and narrow and shallow stages."""
    both: tuple[Any, Any] = (config, getattr(config, "vision_config", None))
    for each in both:
        if each is None:
            continue
        fields = getattr(each, "__dataclass_fields__", {}).values()
        fresh = type(each)()
        options = {f.name: getattr(fresh, f.name, None) for f in fields if f.init}
        if any(name in options for name in STAGED) or _whole(options.get("embed_dim")):
            each.__init__(
                **{name: _narrow(name, value, options) for name, value in options.items()}
            )
        elif isinstance(getattr(each, "patch_size", None), int):
            each.patch_size = SIDE // 4
        if getattr(each, "image_size", None) is not None:
            each.image_size = [SIDE, SIDE] if isinstance(each.image_size, list | tuple) else SIDE
    if hasattr(config, "width_coefficient"):  # EfficientNet's last width
        config.hidden_dim = int(1280 * config.width_coefficient)
    config.num_labels = CLASSES


STAGED = ("depths", "hidden_sizes", "embed_dims", "depth_multiplier", "width_coefficient")
STAGED += ("width_multiplier", "num_block_repeats", "block_configs")
"""Options of models in stages, which say how wide or deep these are."""


FIXED = {"class_expand": 64, "aspp_out_channels": 64, "num_groups": 4, "key_dim": [4, 4, 4]}
FIXED |= {"finegrained_output": False, "window_size": 2}


def _narrow(name: str, value: Any, options: dict[str, Any]) -> Any:
    """An option of a model in stages: widths by an eighth, at most two layers each."""
    if name in ("depth_multiplier", "width_coefficient", "width_multiplier"):
        return 0.25
    if name in FIXED:
        return FIXED[name]
    if re.search("depths|^depth$|blocks|repeats|layers$", name) and _whole(value):
        return [min(v, 2) for v in value]
    if name == "dilations":
        return [list(v)[:2] for v in value]
    if name == "patch_size" and "window_size" in options:  # the last stage has a window left
        return 2
    if "block_configs" in options and name in ("scale", "stem_channels"):
        return 0.5 if name == "scale" else value
    width = re.search(
        "sizes$|decoder_hidden_size|dims?$|channels$|embedding_size|groups_width", name
    )
    if not width or re.search("patch|kernel|stride|unit|key|num_|window", name):
        return value
    step = 8 if isinstance(options.get("num_attention_heads"), int) else 1
    if isinstance(value, int):
        return _eighth(value, step)
    return [_eighth(v, step) for v in value] if _whole(value) else value


def _eighth(value: int, step: int) -> int:
    return -(-(value // 8) // step) * step if value >= 16 else value


def _whole(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(v, int) for v in value)


def settle_sounds(config: PretrainedConfig) -> None:
    """Asks for few classes, short convolutions, and features whose padding stays where it is."""
    config.num_labels, config.ctc_loss_reduction = CLASSES, "mean"
    for each in _all_of(config):
        if isinstance(getattr(each, "conv_dim", None), list | tuple):
            for name, value in CONVOLUTIONS.items():
                setattr(each, name, list(value))
            each.num_feat_extract_layers = len(CONVOLUTIONS["conv_dim"])
            each.feat_extract_norm = "layer"
            each.num_conv_pos_embeddings, each.num_conv_pos_embedding_groups = 8, 4
        sizes = {"num_mel_bins": 8, "max_source_positions": FRAMES // 2, "max_length": FRAMES}
        for name, size in sizes.items():
            if isinstance(getattr(each, name, None), int):
                setattr(each, name, size)
        if isinstance(getattr(each, "tdnn_dim", None), list | tuple):
            each.tdnn_dim, each.xvector_output_dim = [16] * len(each.tdnn_dim), 16
        for name in (n for n in vars(each) if n.endswith(("encoder_layers", "decoder_layers"))):
            setattr(each, name, 1)


def _all_of(config: PretrainedConfig) -> Iterator[Any]:
    yield config
    for value in vars(config).values():
        if isinstance(value, PretrainedConfig):
            yield from _all_of(value)


def noise(*shape: int) -> Tensor:
    """Standard normal numbers."""
    generator = torch.Generator().manual_seed(4)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _labels(n: int) -> Tensor:
    return torch.arange(n) % CLASSES


def images(model: nn.Module, shape: Shape, plain: bool = False) -> Batch:
    """Images with a class each, in a form that the model takes; or plain ones."""
    config = model.config
    config = getattr(config, "vision_config", config)
    channels = getattr(config, "num_channels", 3)
    side = getattr(config, "image_size", SIDE) or SIDE
    height, width = side if isinstance(side, list | tuple) else (side, side)
    n = len(shape.lengths)
    labels = {"labels": _labels(n)}
    values = {"pixel_values": noise(n, channels, height, width), **labels}
    if plain:
        return Batch(values)
    wide = {"pixel_values": noise(n, channels, 2 * height, 2 * width), **labels}
    colours = {"input_ids": torch.arange(16 * n).reshape(n, 16), **labels}
    found = [Batch(values), Batch(wide), _patches(model, values), Batch(colours)]
    return first_that_runs(model, found)


def _patches(model: nn.Module, values: dict[str, Tensor]) -> Batch:
    """Images that come as patches already."""
    config = getattr(model.config, "vision_config", model.config)
    size, n = getattr(config, "patch_size", 4) or 4, len(values["labels"])
    size = size[0] if isinstance(size, list | tuple) else size
    rows, columns = 3, 4
    features = noise(n, rows * columns, 3 * size * size)
    mask = torch.ones(n, rows * columns, dtype=torch.long)
    shapes = torch.tensor([[rows, columns]] * n)
    more = {"pixel_attention_mask": mask, "spatial_shapes": shapes}
    return Batch({"pixel_values": features, **more, "labels": values["labels"]})


def segments(model: nn.Module, shape: Shape) -> Batch:
    """Images with a class for every pixel."""
    batch = images(model, shape, plain=True)
    pixels = batch.values["pixel_values"]
    size = (len(pixels), *pixels.shape[2:])
    labels = torch.randint(0, CLASSES, size, generator=torch.Generator().manual_seed(6))
    return Batch({"pixel_values": pixels, "labels": labels}, n_labels=labels.numel())


def films(model: nn.Module, shape: Shape) -> Batch:
    """A few pictures after each other, with a class for all of them."""
    config: Any = model.config
    n = len(shape.lengths)
    side = int(getattr(config, "image_size", None) or config.crop_size)
    frames = int(getattr(config, "num_frames", 4))
    name = "pixel_values" if "pixel_values" in takes(model) else "pixel_values_videos"
    return Batch({name: noise(n, frames, 3, side, side), "labels": _labels(n)})


def sounds(model: nn.Module, shape: Shape) -> Batch:
    """Samples or spectra with their mask, and a class each."""
    return _heard(model, shape, {"labels": _labels(len(shape.lengths))}, {})


def frames(model: nn.Module, shape: Shape) -> Batch:
    """Samples or spectra, and classes of every frame of the model."""
    batch = _heard(model, shape, {}, {})
    with torch.no_grad():
        n = model(**batch.values).logits.shape[1]
    classes = (torch.arange(n) + torch.arange(len(shape.lengths))[:, None]) % CLASSES
    labels = nn.functional.one_hot(classes, CLASSES)
    return Batch({**batch.values, "labels": labels}, batch.masks, n_labels=classes.numel())


def transcribed(model: nn.Module, shape: Shape) -> Batch:
    """Samples or spectra, and as many symbols for each: a loss is a mean over symbols."""
    labels = torch.arange(4) % 2 + 3 + torch.arange(len(shape.lengths))[:, None]
    return replace(_heard(model, shape, {"labels": labels}, {}), n_labels=labels.numel())


def heard(model: nn.Module, shape: Shape) -> Batch:
    """Samples or spectra, and what was said: a text of another length for each."""
    n = len(shape.lengths)
    mask = Shape("right", tuple(4 + (3 * i) % 4 for i in range(n))).mask()
    drawn = torch.Generator().manual_seed(2)
    labels = torch.randint(3, VOCAB, tuple(mask.shape), generator=drawn)
    return _heard(model, shape, {"labels": labels.masked_fill(mask == 0, -100)}, {"labels": mask})


def _heard(
    model: nn.Module, shape: Shape, labels: dict[str, Tensor], kept: dict[str, Tensor]
) -> Batch:
    n, mask = len(shape.lengths), shape.mask()
    longest = mask.shape[1]
    name = "input_features" if "input_features" in takes(model) else "input_values"
    masked = {"attention_mask": mask}
    masks = {name: "attention_mask", "attention_mask": "attention_mask"}
    if kept:
        masked["decoder_attention_mask"] = kept["labels"]
        masks |= dict.fromkeys(("labels", "decoder_attention_mask"), "decoder_attention_mask")
    found = []
    rest = {k: v for k, v in masked.items() if k != "attention_mask"}
    ways = {k: v for k, v in masks.items() if v != "attention_mask"}
    for channels in dict.fromkeys(_channels(model.config)):
        wave = noise(n, longest, channels) * mask[..., None]
        found.append(Batch({name: wave, **masked, **labels}, masks))
        found.append(Batch({name: noise(n, FRAMES, channels), **rest, **labels}, ways))
    many = Shape("right", tuple(16 * length for length in shape.lengths)).mask()
    samples = [
        Batch({name: noise(*m.shape) * m, **masked, "attention_mask": m, **labels}, masks)
        for m in (mask, many)
    ]
    found = [*samples, *found] if name == "input_values" else [*found, *samples]
    for channels in dict.fromkeys(_channels(model.config)):
        for length in (FRAMES, longest):
            found.append(Batch({name: noise(n, channels, length), **rest, **labels}, ways))
    return first_that_runs(model, found)


def _channels(config: Any) -> Iterator[int]:
    names = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "n_mels")
    for each in _all_of(config):
        for name in (*names, "feature_size", "input_dim", "d_model", "hidden_size"):
            if isinstance(getattr(each, name, None), int):
                yield getattr(each, name)


def first_that_runs(model: nn.Module, batches: list[Batch]) -> Batch:
    """The first batch that a model can be run with.

    Raises:
        Exception: that of the first, where none can.
    """
    first: Exception | None = None
    for batch in batches:
        given = {k: v for k, v in batch.values.items() if k in takes(model)}
        try:
            with torch.no_grad():
                loss = model(**given).loss if "labels" in given else torch.zeros(())
            if loss is None or not bool(torch.isfinite(loss).all()):
                raise ValueError("its loss is none, or not finite")
        except Exception as error:
            first = first or error
            continue
        return Batch(given, {k: v for k, v in batch.masks.items() if k in given})
    assert first is not None
    raise first
