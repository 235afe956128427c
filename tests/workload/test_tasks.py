import math

import numpy as np
import pytest
import torch

from fisher_lab.config.errors import ConfigError
from fisher_lab.curvature.losses import IGNORE_INDEX
from fisher_lab.workload import corpus, evaluation, objectives
from fisher_lab.workload.corpus import Corpus, Stream
from fisher_lab.workload.objectives import Causal

SIZE = {"seed": 3, "batch_size": 2, "seq_len": 32}
KINDS = ["gpt2", "bert", "t5", "mlp"]


def numbered(train=1000, heldout=200, documents=1):
    """A corpus whose tokens are their own positions (the held-out ones from 10000 on)."""

    def stream(first, count):
        document = np.arange(count) * documents // count
        return Stream(np.arange(first, first + count), document)

    return Corpus(stream(0, train), stream(10_000, heldout))


def test_windows_are_unbroken_and_from_their_side():
    drawn = corpus.windows(numbered(), "train", 5, seed=1, count=50, length=20)
    assert drawn.shape == (50, 20)
    assert (np.diff(drawn, axis=1) == 1).all()
    assert drawn.min() >= 0
    assert drawn.max() < 1000
    assert len(np.unique(drawn[:, 0])) > 30


def test_heldout_windows_show_all_of_the_side_once_and_then_begin_again():
    tokens = numbered(heldout=205)
    first = [corpus.windows(tokens, "heldout", i, seed=1, count=2, length=20) for i in range(5)]
    assert sorted(np.concatenate(first).ravel()) == list(range(10_000, 10_200))
    again = corpus.windows(tokens, "heldout", 5, seed=1, count=2, length=20)
    np.testing.assert_array_equal(again, first[0])


def test_a_batch_is_a_function_of_side_seed_and_number():
    tokens = numbered()

    def draw(side="train", seed=1, index=0):
        return corpus.windows(tokens, side, index, seed=seed, count=8, length=16).tolist()

    assert draw() == draw()
    assert draw(seed=2) != draw()
    assert draw(index=1) != draw()
    assert draw(side="heldout") != draw(side="heldout", seed=2)


def test_too_little_text_and_unknown_sides():
    with pytest.raises(ConfigError, match=r"data.seq_len=300 is not allowed.*200 tokens.*heldout"):
        corpus.windows(numbered(), "heldout", 0, seed=0, count=1, length=300)
    with pytest.raises(ValueError, match="split='test'"):
        numbered().side("test")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_batches_repeat_and_differ(inputs, kind):
    task = inputs(kind).objective
    one = task.batch("train", 0, **SIZE)
    again = task.batch("train", 0, **SIZE)
    assert one.keys() == again.keys()
    assert all(torch.equal(one[key], again[key]) for key in one)
    for other in (
        task.batch("train", 1, **SIZE),
        task.batch("heldout", 0, **SIZE),
        task.batch("train", 0, **{**SIZE, "seed": 4}),
    ):
        assert not all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("kind", KINDS)
def test_the_baseline_is_no_better_than_the_labels_own_entropy(inputs, kind):
    task = inputs(kind).objective
    size = {"batch_size": 2, "seq_len": 32}
    loss = evaluation.baseline_loss(task, **size)
    batches = range(task.heldout_batches(**size))
    seen = torch.cat(
        [task.targets(task.batch("heldout", i, seed=evaluation.SEED, **size)) for i in batches]
    )
    shares = torch.bincount(seen) / len(seen)
    entropy = -(shares * shares.clamp_min(1e-12).log()).sum().item()
    assert entropy <= loss < math.log(task.classes) + 0.1  # the sides are drawn apart


def test_the_baseline_of_labels_that_are_all_alike():
    tokens = Corpus(
        Stream(np.zeros(500, dtype=np.int64), np.zeros(500, dtype=np.int64)),
        Stream(np.zeros(100, dtype=np.int64), np.zeros(100, dtype=np.int64)),
    )
    task = Causal(tokens, classes=4)
    counted = 18 * math.ceil(evaluation.BASELINE_LABELS / 18)
    expected = -math.log((counted + 1) / (counted + 4))
    assert evaluation.baseline_loss(task, batch_size=2, seq_len=10) == pytest.approx(expected)


def test_causal_labels_are_the_inputs():
    batch = Causal(numbered(), 20_000).batch("train", 0, **SIZE)
    assert batch["input_ids"].shape == (2, 32)
    assert torch.equal(batch["labels"], batch["input_ids"])
    assert batch["labels"].data_ptr() != batch["input_ids"].data_ptr()
    assert batch["attention_mask"].eq(1).all()
    assert Causal(numbered(), 20_000).targets(batch).tolist() == (
        batch["input_ids"][:, 1:].flatten().tolist()
    )


def test_masks_hide_15_percent_of_every_row_as_bert_does():
    text = np.arange(100, 2100)[None].repeat(20, axis=0)
    inputs, labels = objectives.mask(text, np.random.default_rng(0), mask_token=2, classes=50)
    chosen = labels != IGNORE_INDEX
    assert (chosen.sum(axis=1) == 300).all()
    np.testing.assert_array_equal(labels[chosen], text[chosen])
    np.testing.assert_array_equal(inputs[~chosen], text[~chosen])
    masked = (inputs == 2)[chosen].mean()
    kept = (inputs == text)[chosen].mean()
    assert masked == pytest.approx(0.8, abs=0.02)
    assert kept == pytest.approx(0.1, abs=0.02)
    assert not np.array_equal(chosen[0], chosen[1])


def test_masked_batches_are_framed_and_the_frame_is_never_predicted(inputs):
    task = inputs("bert").objective
    batch = task.batch("heldout", 0, **SIZE)
    ids, labels = batch["input_ids"], batch["labels"]
    assert ids.shape == labels.shape == (2, 32)
    assert ids[:, 0].eq(task.first).all()
    assert ids[:, -1].eq(task.last).all()
    assert labels[:, [0, -1]].eq(IGNORE_INDEX).all()
    assert labels.ne(IGNORE_INDEX).sum(dim=1).tolist() == [round(0.15 * 30)] * 2


def test_a_tokenizer_without_a_frame_gets_none():
    task = objectives.Masked(numbered(), 20_000, 2, None, None)
    assert task.batch("train", 0, **SIZE)["input_ids"].shape == (2, 32)
    assert task.heldout_batches(2, 32) == 3


@pytest.mark.parametrize("length", [8, 32, 128, 512, 2000])
def test_the_encoder_is_filled_and_the_decoder_is_shorter(length):
    shape = objectives.SpanLengths.of_encoder(length, 32)
    assert shape.encoder <= length < objectives.SpanLengths.of_text(shape.text + 1, 32).encoder + 1
    assert length - shape.encoder <= 1
    assert shape.decoder < shape.encoder
    assert 1 <= shape.spans <= min(32, shape.noise)
    assert shape.noise / shape.text == pytest.approx(0.15, abs=0.05)


def put_back(source, target, sentinels, end):
    """The text again, from encoder input and decoder labels."""
    assert source[-1] == target[-1] == end
    found, current = {}, None
    for token in target[:-1]:
        if token in sentinels:
            current = token
            found[current] = []
        else:
            found[current].append(token)
    text = []
    for token in source[:-1]:
        text += found.pop(token) if token in found else [token]
    assert not found
    return text


@pytest.mark.parametrize("length", [2, 9, 50, 300])
def test_corruption_can_be_undone(length):
    sentinels, end = list(range(9000, 9032)), 9999
    shape = objectives.SpanLengths.of_text(length, len(sentinels))
    for seed in range(20):
        text = np.arange(length)
        source, target = objectives.corrupt(
            text, shape, np.random.default_rng(seed), sentinels, end
        )
        assert (len(source), len(target)) == (shape.encoder, shape.decoder)
        assert put_back(source.tolist(), target.tolist(), sentinels, end) == text.tolist()
        used = [token for token in target if token in sentinels]
        assert used == sentinels[: shape.spans]


def test_span_batches_have_two_lengths_and_no_padding(inputs):
    task = inputs("t5").objective
    batch = task.batch("train", 0, **SIZE)
    shape = objectives.SpanLengths.of_encoder(32, 32)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, shape.encoder)
    assert batch["labels"].shape == (2, shape.decoder)
    assert shape.encoder != shape.decoder
    assert task.targets(batch).shape == (2 * shape.decoder,)
    drawn = corpus.windows(task.corpus, "train", 0, seed=3, count=2, length=shape.text)
    for row in range(2):
        text = put_back(
            batch["input_ids"][row].tolist(),
            batch["labels"][row].tolist(),
            task.sentinels,
            task.end,
        )
        assert text == drawn[row].tolist()


def test_bags_count_tokens():
    bags = objectives.bag(np.array([[0, 2, 2], [1, 1, 1]]), 4)
    np.testing.assert_allclose(np.expm1(bags), [[1, 0, 2, 0], [0, 3, 0, 0]], rtol=1e-6)
    assert bags.dtype == np.float32


def test_topics_are_documents_and_examples_are_theirs():
    tokens = numbered(documents=5)
    found = objectives.find(tokens, 32)
    assert found["train"].shape == found["heldout"].shape == (5, 2)
    task = objectives.Topics(tokens, 20_000, found)
    for side, per_document, first in (("train", 200, 0), ("heldout", 40, 10_000)):
        batch = task.batch(side, 0, **SIZE)
        assert batch["bag"].shape == (64, 20_000)
        assert batch["labels"].unique().numel() == 5
        for row, label in zip(batch["bag"], batch["labels"], strict=True):
            seen = row.nonzero().flatten() - first
            assert len(seen) == 32
            assert seen.div(per_document, rounding_mode="floor").eq(label).all()


def test_one_long_document_has_stretches_for_topics():
    found = objectives.find(numbered(), 32)
    assert found["train"].shape == (objectives.STRETCHES, 2)
    assert found["train"].flatten()[[0, -1]].tolist() == [0, 1000]
    assert found["heldout"].flatten()[[0, -1]].tolist() == [0, 200]
    with pytest.raises(ConfigError, match="5 held-out tokens are too few"):
        objectives.find(numbered(heldout=5), 32)
