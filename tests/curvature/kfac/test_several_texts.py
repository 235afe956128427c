"""Batches of several texts for each example, and masks that a model makes of its ids in place."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fisher_lab import KFACNaturalGradient
from fisher_lab.curvature.losses import CrossEntropy

VOCAB, WIDTH = 11, 4
LENGTHS = (3, 1, 4)


class Choosing(nn.Module):
    """Scores each of several texts by the mean of its words, as heads for multiple choice do."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.body = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.score = nn.Linear(WIDTH, 1)

    def inside(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """What the layer reads and gives."""
        x = self.words(ids)
        return x, self.body(x)

    def read(self, y: Tensor, mask: Tensor) -> Tensor:
        """The scores of the texts of what the layer gives."""
        weights = mask[..., None].to(y)
        pooled = (torch.tanh(y) * weights).sum(-2) / weights.sum(-2)
        return self.score(pooled).squeeze(-1)

    def forward(self, input_ids, attention_mask):
        flat, mask = (x.flatten(0, 1) for x in (input_ids, attention_mask))
        return self.read(self.inside(flat)[1], mask).view(input_ids.shape[:2])


class Asked(nn.Module):
    """Tells a question from what follows it, by a mask that is turned in place."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.kinds = nn.Embedding(VOCAB, WIDTH), nn.Embedding(2, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)

    def kind(self, ids: Tensor) -> Tensor:
        """Which words are before the largest id of each text."""
        ends = ids.argmax(dim=1)
        ends.unsqueeze_(1)
        return (torch.arange(ids.shape[1])[None] < ends).long()

    def forward(self, input_ids, attention_mask=None):
        return self.head(torch.tanh(self.words(input_ids) + self.kinds(self.kind(input_ids))))


def padded(lengths: tuple[int, ...], longest: int) -> Tensor:
    return (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()


@pytest.mark.parametrize("policy", ["all", "small_only"])
def test_several_texts_for_each_example_have_a_mask_of_the_shape_of_the_ids(policy: str):
    torch.manual_seed(0)
    model = Choosing().double()
    mask = torch.stack([padded(LENGTHS, 4), padded(LENGTHS[::-1], 4)], dim=1)
    ids = torch.randint(1, VOCAB, mask.shape) * mask
    labels = torch.tensor([0, 1, 1])
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    kfac = KFACNaturalGradient(kfac_policy=policy, track_diagonal=False)
    kfac.collect_kfac_factors(model, batch, loss=CrossEntropy(), verify=True)
    factors = kfac.kfac_factors["body"]

    x, y = model.inside(ids)
    y.retain_grad()
    F.cross_entropy(model.read(y, mask), labels, reduction="sum").backward()
    assert y.grad is not None
    a, g = x.detach()[mask.bool()], y.grad[mask.bool()]
    a = torch.cat([a, a.new_ones(len(a), 1)], dim=1)
    assert (factors.tokens, factors.n_labels) == (16, 3)
    assert factors.A is not None
    torch.testing.assert_close(factors.A.to_dense(), a.T @ a / 16)
    torch.testing.assert_close(factors.G.to_dense(), g.T @ g / 16)


def test_an_index_that_is_turned_in_place_keeps_its_examples():
    torch.manual_seed(0)
    model = Asked().double()
    mask = padded((3, 4), 4)
    ids = torch.tensor([[3, 9, 2, 0], [1, 2, 3, 7]])
    labels = torch.randint(VOCAB, mask.shape)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    kfac = KFACNaturalGradient(track_diagonal=False)
    kfac.collect_kfac_factors(model, batch, loss=CrossEntropy(), verify=True)
    factors = kfac.kfac_factors["kinds"]
    rows = F.one_hot(model.kind(ids)[mask.bool()], 2).double()
    assert factors.tokens == 7
    assert factors.A is not None
    torch.testing.assert_close(factors.A.to_dense(), rows.T @ rows / 7)
