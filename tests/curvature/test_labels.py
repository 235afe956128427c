"""How a model aligns labels with logits is measured against its own loss."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BartConfig, BartForCausalLM, XLNetConfig, XLNetLMHeadModel

from fisher_lab import KFACNaturalGradient
from fisher_lab.curvature.losses import compute_loss, prepare, shift_of
from tests.models import VOCAB, gpt2, language_batch, seeded


def bart() -> BartForCausalLM:
    """A decoder alone, whose class says causal and whose loss does not shift."""
    config = BartConfig(
        vocab_size=VOCAB, d_model=16, decoder_layers=1, decoder_attention_heads=2,
        decoder_ffn_dim=24, max_position_embeddings=40, dropout=0.0, is_decoder=True,
        is_encoder_decoder=False,
    )  # fmt: skip
    return BartForCausalLM(config)


def xlnet() -> XLNetLMHeadModel:
    """Labels in place; nothing in the class says so."""
    config = XLNetConfig(vocab_size=VOCAB, d_model=16, n_layer=1, n_head=2, d_inner=24, dropout=0.0)
    return XLNetLMHeadModel(config)


class Adapted(nn.Module):
    """A wrapper like PEFT's: another class, the same arguments."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.config = base, base.config

    def get_base_model(self) -> nn.Module:
        return self.base

    def forward(self, *args, **kwargs):
        return self.base(*args, **kwargs)


MODELS = {"bart": (bart, False), "xlnet": (xlnet, False), "gpt2": (gpt2, True)}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "wrapped"])
def test_the_loss_is_the_models_own(name, wrapped):
    build, shift = MODELS[name]
    model = seeded(build, torch.float64)
    model = Adapted(model) if wrapped else model
    batch = language_batch((7, 7))
    loss = compute_loss(model, prepare(model, batch))
    assert shift_of(model) is shift
    labels = batch["labels"][:, 1:] if shift else batch["labels"]
    count = int((labels != -100).sum())
    own = model(**batch).loss
    assert loss.n_labels == count
    # Hugging Face computes the loss in float32.
    torch.testing.assert_close(float(loss.loss), float(own * count), rtol=1e-6, atol=0)


def test_a_loss_that_is_no_mean_of_the_labels_is_the_models_own():
    class Smoothed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.config = gpt2().double(), gpt2().config
            self.loss_type = "ForCausalLM"

        def loss_function(self) -> None: ...

        def forward(self, input_ids, attention_mask=None, labels=None):
            logits = self.base(input_ids=input_ids, attention_mask=attention_mask).logits
            if labels is None:
                return SimpleNamespace(logits=logits, loss=None)
            inner = logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1)
            loss = F.cross_entropy(*inner, label_smoothing=0.2)
            return SimpleNamespace(logits=logits, loss=loss)

    model, batch = Smoothed(), language_batch((7, 7))
    found = compute_loss(model, prepare(model, batch))
    assert shift_of(model) is None
    assert found.n_labels == int((batch["labels"][:, 1:] != -100).sum())
    torch.testing.assert_close(found.loss, model(**batch).loss * found.n_labels)


def test_the_measurement_leaves_no_trace():
    model = gpt2().train()
    model.transformer.h[0].eval()
    before = torch.get_rng_state()
    prepare(model, language_batch((7, 5)))
    assert torch.equal(before, torch.get_rng_state())
    assert model.training
    assert not model.transformer.h[0].training
    assert all(p.grad is None for p in model.parameters())


def test_a_captured_pass_is_not_repeated():
    model, batch, calls = seeded(gpt2, torch.float64), language_batch((7, 5)), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    kfac = KFACNaturalGradient(damping=1e-3)
    with kfac.capture(model):
        loss = model(**batch).loss
    kfac.collect_kfac_factors(model, batch, loss=loss)
    assert len(calls) == 1
