"""A refresh leaves the model as it was: buffers, caches and hooks; layers that come and go."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fisher_lab import KFACNaturalGradient
from fisher_lab.curvature.errors import LayerError
from fisher_lab.curvature.losses import CrossEntropy, prepare
from tests.curvature.kfac.test_reduce_matches_dense import dense
from tests.models import VOCAB, language_batch
from tests.reference import relative

DOUBLE = torch.float64
X = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
LABELS = torch.arange(6) % 3


# ---- buffers and caches --------------------------------------------------------------------------


class Counts(nn.Module):
    """A running mean by assignment, a count in a number, and a cache that was None."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 5), nn.Linear(5, 3)
        self.register_buffer("mean", torch.zeros(5, dtype=DOUBLE))
        self.register_buffer("seen", None)
        self.steps, self.cache = 0, None

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        self.steps += 1
        self.seen = torch.tensor(self.steps)
        self.cache = x.detach()
        if "late" not in self._buffers:
            self.register_buffer("late", torch.ones(()))
        return self.head(torch.tanh(x - self.mean))


def test_what_a_pass_leaves_in_a_module_is_taken_away():
    torch.manual_seed(0)
    model = Counts().double().train()
    KFACNaturalGradient().collect_kfac_factors(model, (X, LABELS), loss=CrossEntropy())
    assert model.steps == 0
    assert model.cache is None
    assert model.seen is None
    assert set(model._buffers) == {"mean", "seen"}
    assert bool((model.mean == 0).all())


def test_the_power_iteration_of_a_spectral_norm_does_not_go_on():
    torch.manual_seed(0)
    first = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 5))
    model = nn.Sequential(first, nn.Tanh(), nn.Linear(5, 3)).double().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kfac = KFACNaturalGradient()
    kfac.collect_kfac_factors(model, (X, LABELS), loss=CrossEntropy(), keep_gradient=True)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert set(kfac.kfac_factors) >= {"2"}
    assert kfac.coverage.by_parameter["0.parametrizations.weight.original"][0] == 20


def test_a_rotary_embedding_that_grows_with_its_inputs_goes_back():
    """Its frequencies are a buffer, and the length that they are for a number."""
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=8,
        rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).double()
    ids = torch.arange(24).reshape(2, 12) % VOCAB
    KFACNaturalGradient().collect_kfac_factors(model, language_batch((16, 16)))
    fresh = transformers.LlamaForCausalLM(config).double()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(model(ids).logits, fresh(ids).logits)


# ---- hooks and captures that are never collected -------------------------------------------------


def hooks(model: nn.Module) -> list[int]:
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [len(getattr(m, kind)) for m in model.modules() for kind in kinds]


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.first, x.clone().requires_grad_(), use_reentrant=True)
        return self.head(torch.tanh(x))


@pytest.mark.parametrize("ends", ["never", "another", "error", "failed refresh"])
def test_a_capture_leaves_no_hook_however_it_ends(ends):
    torch.manual_seed(0)
    model, kfac = Checkpointed().double(), KFACNaturalGradient()
    before = hooks(model)
    for _ in range(3):
        if ends == "error":
            with pytest.raises(ZeroDivisionError), kfac.capture(model):
                model(X)
                raise ZeroDivisionError
            continue
        with kfac.capture(model):
            loss = F.cross_entropy(model(X), LABELS)
        if ends == "another":
            kfac.collect_kfac_factors(model, (X, LABELS), loss=CrossEntropy())
        if ends == "failed refresh":
            with pytest.raises(LayerError):
                kfac.collect_kfac_factors(
                    nn.Linear(4, 3).double().requires_grad_(False), (X, LABELS), loss=loss
                )
    assert hooks(model) == before


def test_a_capture_that_is_replaced_frees_its_pass():
    torch.manual_seed(0)
    model, kfac = Checkpointed().double(), KFACNaturalGradient()
    with kfac.capture(model) as capture:
        model(X)
    gone = weakref.ref(capture)
    del capture
    with kfac.capture(model):
        model(X)
    gc.collect()
    assert gone() is None


def test_a_capture_inside_another_is_its_own():
    """A second engine watches the same pass; each has what it would have alone."""
    torch.manual_seed(0)
    model = Checkpointed().double()
    outer, inner = KFACNaturalGradient(), KFACNaturalGradient()
    alone = KFACNaturalGradient()
    alone.collect_kfac_factors(model, (X, LABELS), loss=CrossEntropy())
    before = hooks(model)
    with outer.capture(model), inner.capture(model):
        loss = F.cross_entropy(model(X), LABELS)
    inner.collect_kfac_factors(model, (X, LABELS), loss=loss)
    for name, factors in alone.kfac_factors.items():
        found = inner.kfac_factors[name]
        assert relative(dense(found.A), dense(factors.A)) < 1e-12
        assert relative(found.G.to_dense(), factors.G.to_dense()) < 1e-12
    assert hooks(model) == before


# ---- layers that come and go ---------------------------------------------------------------------


class Towers(nn.Module):
    """Two towers, of which a batch uses those that it has inputs for."""

    def __init__(self) -> None:
        super().__init__()
        self.reads, self.sees = nn.Embedding(7, 5), nn.Linear(4, 5)
        self.head, self.watched = nn.Linear(5, 3), nn.Linear(5, 2)
        self.frozen = nn.Linear(5, 5)

    def forward(self, input_ids=None, pictures=None):
        x = 0.0
        if input_ids is not None:
            x = x + self.reads(input_ids)
        if pictures is not None:
            x = x + self.sees(pictures)
        with torch.no_grad():
            fixed = self.frozen(x)
        x = x + 0.1 * fixed
        self.watched(x)  # its output goes nowhere
        return self.head(torch.tanh(x))


def tower_batch(*names: str) -> dict[str, Tensor]:
    every = {"input_ids": torch.arange(6) % 7, "pictures": X}
    return {**{name: every[name] for name in names}, "labels": LABELS}


def test_towers_that_the_first_batch_does_not_use_come_with_the_second():
    torch.manual_seed(0)
    model, loss = Towers().double(), CrossEntropy()
    batches = [tower_batch("input_ids"), tower_batch("pictures"), tower_batch("input_ids")]
    kfac = KFACNaturalGradient(damping=1e-2)
    kfac.collect_kfac_factors(model, batches, loss=loss, keep_gradient=True, verify=True)
    tokens = {name: f.tokens for name, f in kfac.kfac_factors.items()}
    assert tokens == {"reads": 12, "sees": 6, "head": 18}
    total = torch.zeros((), dtype=DOUBLE)
    for b in batches:
        outputs = model(**{k: v for k, v in b.items() if k != "labels"})
        total = total + F.cross_entropy(outputs, b["labels"], reduction="sum")
    for name in ("reads.weight", "sees.weight", "head.bias"):
        (gradient,) = torch.autograd.grad(total / 18, model.get_parameter(name), retain_graph=True)
        assert relative(kfac.own_gradients(model)[name], gradient) < 1e-12


def test_layers_without_a_part_in_the_loss_are_left_out_with_their_reasons():
    torch.manual_seed(0)
    kfac, model = KFACNaturalGradient(), Towers().double()
    kfac.collect_kfac_factors(model, tower_batch("pictures"), loss=CrossEntropy())
    assert kfac.skipped["reads"] == "not used in the forward pass"
    assert kfac.skipped["watched"] == "no token with a gradient in this batch"
    assert "frozen" in kfac.skipped
    assert set(kfac.kfac_factors) == {"sees", "head"}


def test_a_layer_that_the_user_named_and_no_batch_uses_is_an_error_of_that_layer_alone():
    torch.manual_seed(0)
    kfac = KFACNaturalGradient(include=["reads", "sees", "head"])
    with pytest.raises(LayerError, match=r"^include: reads: not used in the forward pass; allowed"):
        kfac.collect_kfac_factors(Towers().double(), tower_batch("pictures"), loss=CrossEntropy())


class Dropped(nn.Module):
    """Layers that training leaves out at random, one pass at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCAB, 5)
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(3))
        self.head, self.passes = nn.Linear(5, VOCAB), 0
        self.order = [[0], [1, 0], []]

    def forward(self, input_ids, attention_mask=None):
        x = self.words(input_ids)
        for index in self.order[int(input_ids[0, 0]) % 3]:
            x = x + torch.tanh(self.layers[index](x))
        return self.head(x)


def test_layers_that_are_dropped_have_the_tokens_of_the_passes_that_they_were_in():
    torch.manual_seed(0)
    model, kfac = Dropped().double(), KFACNaturalGradient(damping=1e-2)
    batches = []
    for first in (3, 4, 5):
        batch = language_batch((4, 3), share=1.0, seed=first)
        batch["input_ids"][0, 0] = first
        batches.append(prepare(model, batch, CrossEntropy()))
    kfac.collect_kfac_factors(model, batches, loss=CrossEntropy(), keep_gradient=True, verify=True)
    tokens = {name: f.tokens for name, f in kfac.kfac_factors.items()}
    assert tokens == {"words": 21, "layers.0": 14, "layers.1": 7, "head": 21}
    assert kfac.skipped == {"layers.2": "not used in the forward pass"}
