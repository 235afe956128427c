"""`fisher_lab.check`: coverage, labels and the comparison with autograd in one call."""

import pytest
import torch
from torch import nn

import fisher_lab
from fisher_lab.curvature.errors import LayerError
from fisher_lab.curvature.kfac.engine import KFACNaturalGradient
from fisher_lab.curvature.losses import CrossEntropy
from tests import models
from tests.models import gpt2, language_batch, seeded


def test_it_says_what_is_covered_and_what_counts_and_changes_nothing():
    model, batch = models.seeded(models.gpt2, torch.float64), models.language_batch()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = fisher_lab.check(model, batch, exclude=["*c_fc"])
    kfac = KFACNaturalGradient(exclude=["*c_fc"])
    kfac.collect_kfac_factors(model, batch)
    assert found.coverage == kfac.coverage
    assert found.layers == {name: f.tokens for name, f in kfac.kfac_factors.items()}
    assert found.n_labels == next(iter(kfac.kfac_factors.values())).n_labels
    text = str(found)
    assert str(kfac.coverage) in text
    assert f"labels: shifted, {found.n_labels} of {found.given}\n" in text
    assert "left out: 2 in exclude (transformer.h.0.mlp.c_fc)" in text
    sizes = [f.trace() / f.dim for one in kfac.kfac_factors.values() for f in [one.G]]
    assert found.mean_eigenvalues["G"] == pytest.approx((min(sizes), max(sizes)))
    assert found.bytes > sum(one.nbytes() for one in kfac.kfac_factors.values())
    assert min(found.passes_s, found.factor_s) > 0
    assert "damping_mode=relative damping=0.1" in text
    assert "<td>coverage</td>" in found._repr_html_()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
        assert p.grad is None


class PaddingInTheLoss(nn.Module):
    """Its loss looks at the padded positions too, which are no tokens."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 4)

    def forward(self, x, attention_mask=None, labels=None):
        return self.inner(x)


def test_a_layer_whose_tokens_are_not_all_of_its_gradient_is_named():
    torch.manual_seed(0)
    model = PaddingInTheLoss().double()
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    batch = {"x": torch.randn(2, 3, 3).double(), "attention_mask": mask, "labels": mask}

    def everything(outputs, batch):
        return outputs.square().sum()

    with pytest.raises(LayerError, match=r"verify: .* inner\.weight \(off by"):
        fisher_lab.check(model, batch, everything, n_labels=6, loss_reduction="sum")


@pytest.mark.parametrize("how", ["float16", "bfloat16", "autocast"])
def test_sixteen_bits_are_compared_with_their_own_rounding(how):
    model = seeded(gpt2, torch.float32 if how == "autocast" else getattr(torch, how))
    batch = language_batch((9, 6))
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        assert fisher_lab.check(model, batch).coverage.share > 0.9
        weight = model.get_parameter("transformer.h.0.mlp.c_fc.weight")
        weight.register_hook(lambda gradient: 1.5 * gradient)
        with pytest.raises(LayerError, match=r"verify: .* transformer\.h\.0\.mlp\.c_fc\.weight"):
            fisher_lab.check(model, batch)


def test_a_gradient_that_is_rounding_is_no_fault():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 1), nn.LayerNorm(1), nn.Linear(1, 3)).double()
    x, labels = 3 * (3 + torch.randn(40, 4).double()), torch.randint(3, (40,))
    assert fisher_lab.check(model, (x, labels), CrossEntropy()).coverage.share == 1
