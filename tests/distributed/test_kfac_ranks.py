"""K-FAC on 1, 2 and 3 ranks against the dense truth on their joined tokens.

The ranks have 40, 0 and 7 labels and different numbers of tokens.
"""

from typing import Any

import pytest
import torch

from fisher_lab.curvature.collectives import rank_seed
from tests import models, reference
from tests.capturing import POLICIES, inputs_of, random_like
from tests.curvature.kfac.test_damping_modes import split
from tests.curvature.kfac.test_layers_by_use import batch_of
from tests.distributed import ekfac_on_ranks, kfac_on_ranks
from tests.distributed.kfac_on_ranks import (
    LABELS,
    Joined,
    Setting,
    assert_all,
    batches_of,
    empty_batch,
    in_one,
    model_of,
    two_batches,
    with_labels,
)
from tests.distributed.rank_pool import Pool
from tests.reference import Damping, power

BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5}
MODES = ("gather", "gram")


def answers_of(ranks: Pool, name: str, size: int, settings: list[Setting], **more: Any) -> Any:
    """By setting: every rank's answer; `more`: arguments of `collect` and the ranks' batches."""
    batches = more.pop("batches", None) or batches_of(name, size)
    more = {"dtype": torch.float64, "name": name, "settings": settings, **more}
    found = ranks.run(kfac_on_ranks.collect, size, batches, **more)
    return [list(of_setting) for of_setting in zip(*found, strict=True)]


def one_process(ranks: Pool, setting: Setting, batches: list, wants: tuple[str, ...]) -> dict:
    """What one process answers that has the batches of all ranks."""
    whole = [in_one(batches)]
    return answers_of(ranks, "tiny_llama", 1, [setting], batches=whole, wants=wants)[0][0]


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_natural_gradient_and_products_are_those_of_the_joined_tokens(ranks, name, size, dtype):
    settings = [Setting(policy, mode) for policy in POLICIES for mode in MODES]
    labels = sum(LABELS[:size])
    found = answers_of(ranks, name, size, settings, dtype=dtype)
    for setting, answers in zip(settings, found, strict=True):
        one = Joined(name, dtype, answers, labels)
        assert all(answer["N"] == {labels} for answer in answers)
        tokens = {n: len(t.a) for n, t in one.truth.tokens.items() if n in answers[0]["T"]}
        assert all(answer["T"] == tokens for answer in answers)
        one.check(setting, BOUNDS[dtype])


def test_both_paths_and_both_forms_of_gram_are_among_the_layers(ranks):
    """76 tokens: more than some outputs (then a matrix is summed), fewer than others."""
    ((first, *_),) = answers_of(ranks, "gpt2", 3, [Setting("all", "gram")])
    assert set(first["reductions"].values()) >= {"", "lossless"}
    ((first, *_),) = answers_of(ranks, "gpt2", 3, [Setting("hybrid", "gram")])
    ((second, *_),) = answers_of(ranks, "gpt2", 3, [Setting("small_only", "gram")])
    assert "woodbury" in first["methods"].values()
    assert "woodbury" not in second["methods"].values()


def test_gradient_of_every_parameter_is_weighted_by_labels(ranks):
    """By autograd over all batches in one process, position embeddings included."""
    batches = batches_of("gpt2", 3)
    ((*answers,),) = answers_of(ranks, "gpt2", 3, [Setting()], batches=batches)
    model = model_of("gpt2", torch.float64)
    for (batch,) in batches:
        loss, _ = reference.summed_loss(model, model(**inputs_of(batch)).logits, batch)
        loss.backward()
    truth = {n: p.grad / sum(LABELS) for n, p in model.named_parameters() if p.grad is not None}
    assert "transformer.wpe.weight" in truth
    assert_all(answers, "own", truth, 1e-12)


@pytest.mark.parametrize("kappa", [1e2, None])
@pytest.mark.parametrize("size", [2, 3])
def test_clipping_and_what_is_derived(ranks, kappa, size):
    damping = Damping(A=1e-3, G=1e-3, kappa=kappa)
    settings = [Setting("all", mode, damping) for mode in MODES]
    wants = ("own", "natural", "derived")
    labels = sum(LABELS[:size])
    for answers in answers_of(ranks, "gpt2", size, settings, wants=wants):
        one = Joined("gpt2", torch.float64, answers, labels)
        one.check(settings[0], 1e-10)
        for answer in answers:
            found = answer["derived"]
            for name, counts in one.truth.clipped(damping).items():
                assert tuple(found["clipped"][name]) == counts
            for factors, tokens in one.truth.weight_factors().values():
                scale = factors.tokens / labels
                trace = scale * float(factors.A.trace() * factors.G.trace())
                assert found["trace"][tokens.name] == pytest.approx(trace, rel=1e-10)
                top = scale * torch.linalg.eigvalsh(factors.G)[-1] * torch.linalg.eigvalsh(
                    factors.A
                )[-1]  # fmt: skip
                assert found["top"][tokens.name][0] == pytest.approx(float(top), rel=1e-10)
            assert found == answers[0]["derived"]


@pytest.mark.parametrize("mode", ["relative", "pi"])
def test_dampings_that_follow_the_traces_follow_those_of_all_ranks(ranks, mode):
    damping = Damping(A=0.3, G=2e-2, kappa=None)
    settings = [
        Setting(policy, reduce, damping).also(damping_mode=mode)
        for policy in ("all", "small_only")
        for reduce in MODES
    ]
    numbers = {"damping_A": 0.3, "damping_G": 2e-2, "damping": 0.3 * 2e-2}
    wants = ("own", "natural", "general")

    def kronecker(factors, tokens, matrix):
        lam_a, lam_g = split(mode, factors.A, factors.G, **numbers)
        left, right = power(factors.G, -1, lam_g, None), power(factors.A, -1, lam_a, None)
        return left @ matrix @ right

    def block(F, tokens, vector):
        return power(F, -1, split(mode, None, F, **numbers)[1], None) @ vector

    for answers in answers_of(ranks, "llama", 3, settings, wants=wants):
        one = Joined("llama", torch.float64, answers, sum(LABELS))
        truth = one.truth._apply(one.own(), kronecker, block)
        for key in ("natural", "general"):
            assert_all(answers, key, truth, 1e-9)


@pytest.mark.parametrize("labels", [(0, 40, 7), (0, 7)])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_first_rank_without_labels(ranks, name, labels):
    """What the others take from the first rank that has something must not be rank 0's."""
    lengths = tuple({40: (30, 24), 0: (9,), 7: (5, 8)}[count] for count in labels)
    size = len(labels)
    batches = batches_of(name, size, labels, lengths)
    settings = [Setting(policy, mode) for policy in POLICIES for mode in MODES]
    settings += [Setting("all", mode).also(ekfac=True) for mode in MODES]
    found = answers_of(ranks, name, size, settings, batches=batches)
    for setting, answers in zip(settings, found, strict=True):
        Joined(name, torch.float64, answers, sum(labels)).check(setting, 1e-10)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_ekfac(ranks, name, size, dtype):
    settings = [Setting(policy, mode).also(ekfac=True) for policy in POLICIES for mode in MODES]
    batches = two_batches(batches_of(name, size))
    wants = ("own", "natural", "general")
    found = answers_of(ranks, name, size, settings, dtype=dtype, batches=batches, wants=wants)
    for setting, answers in zip(settings, found, strict=True):
        Joined(name, dtype, answers, sum(LABELS[:size])).check(setting, BOUNDS[dtype])


@pytest.mark.parametrize("fisher", ["empirical", "true", "head"])
@pytest.mark.parametrize("unit", ["token", "sequence"])
def test_ekfacs_units_and_its_head(ranks, unit, fisher):
    """Sequences and labelled tokens are some rank's own; the moments are those of all ranks."""
    whole = models.language_batch((4, 3, 5), share=0.7, seed=3)
    parts = [{k: v[i] for k, v in whole.items()} for i in (slice(0, 1), slice(1, 3))]
    more = {"ekfac_unit": unit, "fisher": "empirical" if fisher == "empirical" else "true"}
    more |= {"true_max_classes": 2, "n_samples": 1} if fisher == "head" else {}
    if fisher == "head":  # inner layers are drawn, by every rank on its own
        more |= {"include": ["lm_head"]}
    for policy, mode in (("all", "gram"), ("small_only", "gather"), ("all", "gather")):
        given = {"mode": mode, "kfac_policy": policy, **more}
        (alone,) = ranks.run(ekfac_on_ranks.of_ekfac, 1, [[whole]], **given)
        for answer in ranks.run(ekfac_on_ranks.of_ekfac, 2, [[part] for part in parts], **given):
            assert answer.keys() == alone.keys()
            for name, value in alone.items():
                torch.testing.assert_close(answer[name], value, rtol=1e-7, atol=1e-11)


@pytest.mark.parametrize(
    ("mode", "experts"),
    [(mode, kind) for mode in ("gather", "gram") for kind in ("each", "pooled")],
)
def test_experts_whose_tokens_are_spread_over_the_ranks(ranks, mode, experts):
    """Each expert, and all of them pooled, as in one process that has all sequences."""
    whole = batch_of((5, 2, 4, 1), "right")
    halves = [{k: v[i : i + 2] for k, v in whole.items()} for i in (0, 2)]
    for settings in ({}, {"kfac_policy": "small_only"}, {"ekfac": True}):
        given = {"mode": mode, "experts": experts, **settings}
        (alone,) = ranks.run(kfac_on_ranks.of_experts, 1, [[whole]], **given)
        for answer in ranks.run(kfac_on_ranks.of_experts, 2, [[h] for h in halves], **given):
            assert answer.keys() == alone.keys()
            for name, value in alone.items():
                torch.testing.assert_close(answer[name], value, rtol=1e-8, atol=1e-12)


def test_pooled_experts_whose_matrices_must_not_be_formed_are_refused_by_gram(ranks):
    whole = batch_of((5, 2, 4, 1), "right")
    given = {"mode": "gram", "experts": "pooled", "max_dense_dim": 4, "exclude": ["head", "*down*"]}
    with pytest.raises(AssertionError, match=r"experts='pooled' with .* beyond max_dense_dim=4"):
        ranks.run(kfac_on_ranks.of_experts, 2, [[whole]] * 2, **given)


KINDS = [
    ("llama", "mc", torch.float64),
    ("llama", "true", torch.float64),
    ("gpt2", "mc", torch.float64),
    ("gpt2", "true", torch.float64),
    ("llama", "true", torch.float32),
    ("gpt2", "mc", torch.float32),
]


@pytest.mark.parametrize(("name", "kind", "dtype"), KINDS)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_fisher_kinds(ranks, name, kind, dtype, size):
    more = {"fisher": kind, "n_samples": 2, "true_max_classes": 2}
    settings = [Setting("all", mode).also(**more) for mode in MODES]
    if kind == "mc":
        settings += [one.also(ekfac=True) for one in settings]
    found = answers_of(ranks, name, size, settings, dtype=dtype, wants=("own", "natural"))
    bound = BOUNDS[dtype]
    for setting, answers in zip(settings, found, strict=True):
        assert all(answer["fisher"] == "mc" for answer in answers)
        # The last backward pass is that of the data's own loss, for the gradient.
        sampled = [_passes(answer, slice(None, -1)) for answer in answers]
        data = [_passes(answer, slice(-1, None)) for answer in answers]
        labels = sum(LABELS[:size])
        own = Joined(name, dtype, data, labels).own()
        one = Joined(name, dtype, sampled, labels)
        assert_all(answers, "own", own, bound)
        if kind == "true":
            head = one.truth.tokens["lm_head"]
            logits = head.a @ head.module.get_parameter("weight").detach().T.to(head.a)
            scored = torch.cat([_scored(name, a) for a in batches_of(name, size)])
            G = reference.true_fisher_of_softmax(logits[scored], len(head.a))
            one.truth.G_override["lm_head"] = G
            truth = one.truth.true_head_natural_gradient(own, setting.damping, "lm_head")
        elif dict(setting.more).get("ekfac"):
            truth = one.truth.ekfac(own, setting.damping)
        else:
            truth = one.truth.natural_gradient(own, setting.damping)
        # Of norm layers the reference has the first draw only.
        skipped = {n for n in truth if "norm" in n or ".ln_" in n}
        truth = {n: value for n, value in truth.items() if n not in skipped}
        assert_all(answers, "natural", truth, bound)


def _passes(answer: dict, which: slice) -> dict:
    tokens = {}
    for name, (kind, a, g) in answer["tokens"].items():
        # A rank without labels makes one pass, which is all of its passes at once.
        tokens[name] = (kind, a, g[which] if len(g) > 1 else g)
    return {**answer, "tokens": tokens}


def _scored(name: str, batches: list[dict]) -> torch.Tensor:
    """Which tokens of a rank carry a label, in the order of the tokens."""
    model = model_of(name, torch.float64)
    (batch,) = batches
    counted = reference.counting_labels(model, batch) != reference.IGNORE
    return counted[batch["attention_mask"].bool()]


@pytest.mark.parametrize("stored", ["bf16", "fp16"])
def test_columns_of_16_bits(ranks, stored):
    settings = [Setting("all", mode).also(woodbury_dtype=stored) for mode in MODES]
    dtype = torch.float32
    wants = ("own", "natural", "storage")
    found = answers_of(ranks, "gpt2", 3, settings, dtype=dtype, wants=wants)
    one = Joined("gpt2", dtype, found[0], sum(LABELS))
    natural = one.truth.natural_gradient(one.own(), settings[0].damping)
    for answers in found:
        assert_all(answers, "natural", natural, 2e-2)  # what 16 bits cost
        assert max(e for e in answers[0]["storage"].values() if e is not None) > 1e-5
        assert all(answer["storage"] == answers[0]["storage"] for answer in answers)
    together = zip(found[0], found[1], strict=True)
    for gathered, spread in together:
        wide = [n for n, r in spread["reductions"].items() if r == ""]
        same = {n: gathered["storage"][n] for n in wide if gathered["storage"][n] is not None}
        assert same
        for name, error in same.items():
            assert spread["storage"][name] == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_several_batches_norms_and_other_families(ranks, mode):
    for name in ("bert", "t5", "tiny"):
        labels = LABELS if name != "t5" else (20, 0, 5)
        batches = two_batches(batches_of(name, 3, labels))
        (answers,) = answers_of(ranks, name, 3, [Setting("all", mode)], batches=batches)
        assert any("norm" in n.lower() or "ln" in n for n in answers[0]["natural"])
        # The gradient of a key's bias is zero in exact arithmetic.
        Joined(name, torch.float64, answers, sum(labels)).check(Setting(), 1e-10, noise=1e-12)


@pytest.mark.parametrize("tied", ["embedding", "sum"])
@pytest.mark.parametrize("mode", MODES)
def test_tied_weights(ranks, tied, mode):
    kappa = Damping(A=1e-3, G=1e-3, kappa=None)  # the pooled structure has no floor
    setting = Setting("all", mode, kappa).also(tied=tied)
    (answers,) = answers_of(ranks, "tiny", 3, [setting], wants=("own", "natural", "product"))
    one = Joined("tiny", torch.float64, answers, sum(LABELS), tied=tied)
    truth = one.truth.natural_gradient(one.own(), kappa)
    assert_all(answers, "natural", truth, 1e-9)
    assert_all(answers, "product", one.truth.fisher_vector_product(
        random_like(answers[0]["own"])), 1e-10)  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("nothing", ["padding", "no batch"])
def test_a_rank_without_any_token(ranks, mode, nothing):
    batches = batches_of("gpt2", 3)
    batches[1] = [empty_batch()] if nothing == "padding" else []
    (answers,) = answers_of(ranks, "gpt2", 3, [Setting("all", mode)], batches=batches)
    if nothing == "padding":
        assert all(len(a) == 0 for _, a, _ in answers[1]["tokens"].values())
    Joined("gpt2", torch.float64, answers, sum(LABELS)).check(Setting(), 1e-10)


def test_none_is_every_rank_on_its_own(ranks):
    batches = batches_of("gpt2", 3, (40, 3, 7))
    (answers,) = answers_of(ranks, "gpt2", 3, [Setting("all", "none")], batches=batches)
    for answer, labels in zip(answers, (40, 3, 7), strict=True):
        one = Joined("gpt2", torch.float64, [answer], labels)
        natural = one.truth.natural_gradient(one.own(), Setting().damping)
        assert_all([answer], "natural", natural, 1e-10)
    errors = reference.errors(answers[1]["natural"], answers[0]["natural"])
    assert max(errors.values()) > 0.1


def test_the_sum_of_local_grams_is_wrong(ranks):
    """Even where all ranks have as many tokens, so that the sizes match (`docs/math.md`, 7)."""
    lengths, labels = (13, 10), (12, 7)
    model = model_of("llama", torch.float64)
    batches = [
        [with_labels(model, models.language_batch(lengths, share=1.0, seed=rank), count)]
        for rank, count in enumerate(labels)
    ]
    settings = [Setting("all", "gram")]
    arguments = {"name": "llama", "dtype": torch.float64, "settings": settings}
    wants = ("own", "general")
    right = ranks.run(kfac_on_ranks.collect, 2, batches, **arguments)
    wrong = ranks.run(kfac_on_ranks.with_local_grams, 2, batches, wants=wants, **arguments)
    answers = [found[0] for found in right]
    one = Joined("llama", torch.float64, answers, sum(labels))
    truth = one.truth.natural_gradient(one.own(), settings[0].damping)
    wide = {n: v for n, v in truth.items() if "gate_proj" in n or "lm_head" in n}
    assert len(wide) == 2  # 46 tokens are fewer than their outputs: columns, not a matrix
    assert_all(answers, "general", wide, 1e-10)
    for found in wrong:
        assert min(reference.errors(found[0]["general"], wide).values()) > 0.1
        with pytest.raises(AssertionError, match="relative error over"):
            assert_all([found[0]], "general", wide, 1e-10)


@pytest.mark.parametrize("size", [2, 3])
def test_subsampled_columns_are_uniform_over_all_tokens(ranks, size):
    """The head keeps 20 of all tokens: those with the smallest keys of all ranks."""
    more = {"max_columns": 20, "max_dense_dim": 30, "seed": 5}
    settings = [Setting("all", mode).also(**more) for mode in MODES]
    found = answers_of(ranks, "tiny_llama", size, settings)
    for setting, answers in zip(settings, found, strict=True):
        assert answers[0]["reductions"]["lm_head"] == "subsample"
        one = Joined("tiny_llama", torch.float64, answers, sum(LABELS[:size]))
        head = one.truth.tokens["lm_head"]
        counts = [len(answer["tokens"]["lm_head"][1]) for answer in answers]
        chosen = _smallest_keys(counts, 20, 5)
        assert answers[0]["discarded"]["lm_head"] == pytest.approx(1 - 20 / sum(counts))
        one.truth.G_override["lm_head"] = reference.moment(head.g[0][chosen])
        one.check(setting, 1e-10)


def _smallest_keys(counts: list[int], most: int, seed: int) -> torch.Tensor:
    keys = [
        torch.rand(n, generator=torch.Generator().manual_seed(rank_seed(seed, r)),
                   dtype=torch.float64)
        for r, n in enumerate(counts)
    ]  # fmt: skip
    return torch.cat(keys).argsort()[:most].sort().values


def test_compressed_columns_lose_what_is_told(ranks):
    more = {"max_columns": 20, "max_dense_dim": 30, "column_reduction": "lowrank"}
    settings = [Setting("all", mode).also(**more) for mode in MODES]
    wants = ("own", "natural", "traces")
    gathered, spread = answers_of(ranks, "tiny_llama", 3, settings, wants=wants)
    one = Joined("tiny_llama", torch.float64, gathered, sum(LABELS))
    whole = float(reference.factors_of(one.truth.tokens["lm_head"]).G.trace())
    for answers in (gathered, spread):
        for answer in answers:
            kept, lost = answer["traces"]["lm_head"], answer["discarded"]["lm_head"]
            assert 0 < lost < 0.5
            assert kept / (1 - lost) == pytest.approx(whole, rel=1e-10)
    assert_all(spread, "natural", gathered[0]["natural"], 1e-10)


def test_a_subsampled_true_head_is_that_of_one_process(ranks):
    more = {"max_columns": 20, "kfac_true_fisher_head": True}
    settings = [Setting("small_only", mode).also(**more) for mode in MODES]
    batches = batches_of("tiny_llama", 3)
    wants = ("own", "natural")
    alone = one_process(ranks, settings[0], batches, wants)
    for answers in answers_of(ranks, "tiny_llama", 3, settings, batches=batches, wants=wants):
        assert_all(answers, "natural", alone["natural"], 1e-10)


@pytest.mark.parametrize("mode", MODES)
def test_diagonal_of_uncovered_parameters(ranks, mode):
    more = {"norm_layers": False, "uncovered": "diagonal"}
    setting = Setting("all", mode).also(**more)
    batches = batches_of("tiny_llama", 3)
    wants = ("own", "natural", "no tokens")
    alone = one_process(ranks, setting, batches, wants)
    (answers,) = answers_of(ranks, "tiny_llama", 3, [setting], batches=batches, wants=wants)
    norms = {n: v for n, v in alone["natural"].items() if "norm" in n}
    assert norms
    assert_all(answers, "natural", norms, 1e-10)


@pytest.mark.parametrize("size", [2, 3])
def test_matrices_in_the_place_of_columns_are_decomposed_once(ranks, size):
    """With `T > out` in `gram`: each `out x out` matrix on one rank, by cost, for all."""
    batches, arguments = batches_of("gpt2", size), {"name": "gpt2", "setting": Setting()}
    found = ranks.run(kfac_on_ranks.counted_decompositions, size, batches, **arguments)
    tokens = sum(sum(lengths) for lengths in kfac_on_ranks.LENGTHS[:size])
    layers = model_of("gpt2", torch.float64).named_modules()
    outputs = [
        m.get_parameter("weight").shape[1] for _, m in layers if type(m).__name__ == "Conv1D"
    ]
    narrow = sorted(out for out in [*outputs, models.VOCAB] if out < tokens)
    assert narrow
    assert sorted(n for sizes, _ in found for n in sizes) == narrow
    assert max(len(sizes) for sizes, _ in found) == -(-len(narrow) // size)
    for _, natural in found:
        assert all(torch.equal(value, found[0][1][name]) for name, value in natural.items())
    texts = ranks.run(kfac_on_ranks.fails_on_one, size, batches, **arguments)
    for rank, text in enumerate(texts):
        assert text == ("" if rank == 1 else "RankError: rank 1: ") + "ValueError: no room"


def test_errors_of_one_rank_reach_all(ranks):
    batches = batches_of("tiny", 3, (40, 3, 7))
    found = ranks.run(kfac_on_ranks.not_finite_on_one, 3, batches, name="tiny")
    assert found[1][0].startswith(("NonFiniteError: layer", "BatchError: batch 0"))
    for rank in (0, 2):
        assert found[rank][0].startswith("RankError: rank 1: ")
    assert all(kept for _, kept in found)
    for text in ranks.run(kfac_on_ranks.different_gradients, 3, batches, name="tiny"):
        assert "gradients: those of rank 1" in text
    for text in ranks.run(kfac_on_ranks.different_settings, 2, batches, name="tiny"):
        assert "rank 1: its covered layers, K-FAC settings" in text


@pytest.mark.parametrize("more", [{}, {"ekfac": True}, {"kfac_true_fisher_head": True}])
def test_exported_factors_are_whole(ranks, more):
    """Any rank's export serves one process; all ranks export the same."""
    setting = Setting("all", "gram").also(**more)
    batches = batches_of("llama", 3)
    found = ranks.run(kfac_on_ranks.saved, 3, batches, name="llama", setting=setting)
    for answer in found:
        reference.assert_close(answer["after"], answer["before"], 1e-9)
        assert set(answer["tensors"]) == set(found[0]["tensors"])
        for name, tensor in answer["tensors"].items():
            assert torch.equal(tensor, found[0]["tensors"][name]), name
