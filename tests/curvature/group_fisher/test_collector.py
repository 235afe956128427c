"""Group Fisher against sums over explicit gradients (docs/math.md, section 9)."""

import copy
import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fisher_lab.curvature import losses
from fisher_lab.curvature.errors import BatchError, CurvatureError, FactorFileError, NonFiniteError
from fisher_lab.curvature.group_fisher.collector import FisherCollector, active_tokens
from tests.curvature.spectra.reference import batch_of, labelled, tiny


def close(found, wanted, rtol=1e-12, scale=1e-300):
    """Entries of size eps next to ``scale`` (a key's bias: zero but for rounding) are let be."""
    torch.testing.assert_close(
        found.flatten(), wanted.flatten(), rtol=rtol, atol=1e-3 * rtol * scale
    )


def check_means(case, collector, wanted):
    """The collector's means against a function of the parameter's name."""
    for name in case.rows["token"]:
        close(collector.fisher_mean["t"][name], wanted(name), rtol_of(case), scale_of(case))


def rtol_of(case):
    return 1e-5 if case.rounds_to_float32 else 1e-9


def scale_of(case):
    return max(float(rows.square().max()) for rows in case.rows["sequence"].values())


def plain_moments(gradients, weights):
    """Weighted mean and sum of squares by numpy in extended precision."""
    x = np.asarray(gradients, dtype=np.longdouble) ** 2
    w = np.asarray(weights, dtype=np.longdouble)
    mean = (w[:, None] * x).sum(0) / w.sum()
    return mean, (w[:, None] * (x - mean) ** 2).sum(0), w.sum(), (w**2).sum()


@given(
    n=st.integers(1, 25), scale=st.sampled_from([1e-6, 1.0, 1e4]), offset=st.floats(0, 100),
    cuts=st.lists(st.integers(0, 25), max_size=4), seed=st.integers(0, 10**6),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_any_split_and_merge_gives_the_moments(n, scale, offset, cuts, seed):
    generator = np.random.default_rng(seed)
    gradients = (generator.standard_normal((n, 3)) + offset) * scale
    weights = generator.integers(1, 200, n).astype(float)
    bounds = [0, *sorted(min(cut, n) for cut in cuts), n]
    whole = FisherCollector()
    for start, stop in pairwise(bounds):
        part = FisherCollector()
        for i in range(start, stop):
            part.update_fisher_welford("t", {"w": torch.tensor(gradients[i])}, weights[i])
        whole.merge(part)
    mean, m2, w, w2 = plain_moments(gradients, weights)
    assert whole.token_total["t"] == w
    assert whole.fisher_mean["t"]["w"].dtype == torch.float64
    np.testing.assert_allclose(whole.fisher_mean["t"]["w"].numpy(), mean.astype(float), rtol=1e-12)
    # The spread of nearly equal numbers is known to eps times their size squared.
    slack = 1e-14 * float(w) * float(mean.max()) ** 2
    variance = (m2 / max(w - 1, 1)).astype(float)
    np.testing.assert_allclose(
        whole.fisher_variance["t"]["w"].numpy(), variance, rtol=1e-12, atol=slack / max(w - 1, 1)
    )
    if n > 1:
        general = (m2 / (w - w2 / w)).astype(float)
        np.testing.assert_allclose(
            whole.variance("t", "general")["w"].numpy(),
            general, rtol=1e-12, atol=slack / float(w - w2 / w),
        )  # fmt: skip


def test_weights_are_frequencies():
    repeated, weighted = FisherCollector(), FisherCollector()
    for value, times in ((1.0, 3), (2.0, 1), (0.5, 4)):
        gradient = {"w": torch.tensor([value, -value])}
        weighted.update_fisher_welford("t", gradient, times)
        for _ in range(times):
            repeated.update_fisher_welford("t", gradient, 1)
    close(weighted.fisher_mean["t"]["w"], repeated.fisher_mean["t"]["w"])
    close(weighted.fisher_variance["t"]["w"], repeated.fisher_variance["t"]["w"])
    assert weighted.token_total == repeated.token_total == {"t": 8.0}


def test_float32_gradients_are_accumulated_in_float64():
    collector = FisherCollector()
    for _ in range(1000):
        collector.update_fisher_welford("t", {"w": torch.tensor([0.1])}, 1)
    square = float(torch.tensor(0.1).double()) ** 2
    assert float(collector.fisher_mean["t"]["w"]) == pytest.approx(square, rel=1e-13)


def test_a_refused_update_changes_nothing():
    collector = FisherCollector()
    collector.update_fisher_welford("t", {"a": torch.ones(2), "b": torch.ones(2)}, 2)
    before = json.dumps(collector.state()[1])
    for gradients, weight, error in (
        ({"a": torch.ones(2), "b": torch.tensor([1.0, float("nan")])}, 1, NonFiniteError),
        ({"a": torch.ones(2), "b": torch.ones(3)}, 1, CurvatureError),
        ({"a": torch.ones(2)}, 0, CurvatureError),
        ({"a": torch.ones(2)}, -1, CurvatureError),
        ({"a": torch.ones(2)}, float("inf"), CurvatureError),
    ):
        with pytest.raises(error):
            collector.update_fisher_welford("t", gradients, weight)
    assert json.dumps(collector.state()[1]) == before
    assert collector.fisher_mean["t"]["a"].tolist() == [1.0, 1.0]


def test_token_unit_is_the_diagonal_of_the_fisher_matrix(case):
    collector = FisherCollector("token", chunk_size=3)
    collector.collect(case.model, case.batch, "t")
    squares = {name: rows.square() for name, rows in case.rows["token"].items()}
    check_means(case, collector, lambda name: squares[name].mean(0))
    for name, found in collector.fisher_variance["t"].items():
        close(found, squares[name].var(0), 10 * rtol_of(case), scale_of(case) ** 2)
    assert collector.fisher_variance["t"].keys() == squares.keys()
    assert collector.token_total["t"] == len(labelled(case.model, case.batch))


@pytest.mark.parametrize("weight", ["tokens", "one"])
def test_sequence_unit_weighs_sequences(case, weight):
    collector = FisherCollector("sequence", sequence_weight=weight)
    collector.collect(case.model, case.batch, "t")
    lengths = {"t5": [2.0, 2.0, 3.0]}.get(case.architecture, [3.0, 3.0, 5.0])
    w = torch.tensor(lengths if weight == "tokens" else [1.0] * 3, dtype=torch.float64)
    rows = case.rows["sequence"]
    assert {len(one) for one in rows.values()} == {3}
    check_means(case, collector, lambda n: (w[:, None] * rows[n].square()).sum(0) / w.sum())
    assert collector.token_total["t"] == float(w.sum())


def test_batch_unit_is_the_squared_mean_gradient(case):
    collector = FisherCollector("batch")
    batches = [case.batch, {key: value[:2] for key, value in case.batch.items()}]
    collector.collect(case.model, batches, "t")
    short = sum(1 for row, _, _ in labelled(case.model, case.batch) if row < 2)
    one, two = (float(active_tokens(case.model, b)) for b in batches)

    def wanted(name):
        rows = case.rows["token"][name]
        values = one * rows.mean(0).square() + two * rows[:short].mean(0).square()
        return values / (one + two)

    check_means(case, collector, wanted)
    assert collector.export("t")["unit"] == "batch"


def test_active_tokens_are_the_mask_of_the_side_with_the_loss():
    assert active_tokens(tiny("gpt2"), batch_of("gpt2")) == 11
    assert active_tokens(tiny("bert"), batch_of("bert")) == 11
    assert active_tokens(tiny("t5"), batch_of("t5")) == 7
    without = {key: value for key, value in batch_of("gpt2").items() if key != "attention_mask"}
    assert active_tokens(tiny("gpt2"), without) == 15


def test_model_and_batch_are_left_alone(case):
    model = copy.deepcopy(case.model).train()
    before = {key: value.clone() for key, value in case.batch.items()}
    for unit in ("batch", "sequence", "token"):
        FisherCollector(unit).collect(model, case.batch)
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(case.batch[key], before[key]) for key in before)


def test_a_batch_without_examples_or_labels_is_an_error_in_every_unit():
    model, batch = tiny("gpt2"), batch_of("gpt2")
    unlabelled = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    for unit in ("batch", "sequence", "token"):
        for empty in ([], {key: value[:0] for key, value in batch.items()}, unlabelled):
            collector = FisherCollector(unit)
            with pytest.raises(BatchError, match=r"^task default: no (label|batch).*$"):
                collector.collect(model, empty)
            assert collector.tasks == []


def test_a_loss_that_reaches_only_frozen_parameters_has_zero_moments():
    model = tiny("gpt2").requires_grad_(False)
    model.transformer.h[0].register_parameter("idle", nn.Parameter(torch.ones(2)))
    for unit in ("batch", "token"):
        collector = FisherCollector(unit)
        collector.collect(model, batch_of("gpt2"))
        means = collector.fisher_mean["default"]
        assert {name: mean.tolist() for name, mean in means.items()} == {
            "transformer.h.0.idle": [0.0, 0.0]
        }


@pytest.fixture(scope="module")
def collected(case):
    collector = FisherCollector("token")
    collector.collect(case.model, case.batch, "t")
    return collector


def test_groups_add_up_to_the_whole(case, collected):
    means = collected.fisher_mean["t"]
    total = sum(float(m.sum()) for m in means.values())
    for group in ("layer", "parameter"):
        scores = collected.importance("t", group, reduce="sum")
        assert sum(scores.values()) == pytest.approx(total, rel=1e-12)
    linear = {
        id(m.weight): (m.weight, m.bias)
        for m in case.model.modules()
        if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"
    }
    owned = {id(p) for pair in linear.values() for p in pair if p is not None}
    wanted = sum(
        float(means[name].sum()) for name, p in case.model.named_parameters() if id(p) in owned
    )
    neurons = collected.importance("t", "neuron", reduce="sum")
    assert sum(neurons.values()) == pytest.approx(wanted, rel=1e-9)


def test_heads_are_the_slices_that_the_attention_uses(case, collected):
    means = collected.fisher_mean["t"]
    scores = collected.importance("t", "head", reduce="sum")
    mean_scores = collected.importance("t", "head", reduce="mean")
    if case.architecture == "gpt2":
        site, width, heads = "transformer.h.1.attn", 6, 2
        weight, bias = means[f"{site}.c_attn.weight"], means[f"{site}.c_attn.bias"]
        out = means[f"{site}.c_proj.weight"]
        for h in range(heads):
            columns = [c for c in range(3 * width) if (c % width) // (width // heads) == h]
            rows = columns[: width // heads]
            parts = (weight[:, columns], bias[columns], out[rows])
            own = sum(float(part.sum()) for part in parts)
            count = sum(part.numel() for part in parts)
            assert scores[f"{site}.head.{h}"] == pytest.approx(own, rel=1e-12)
            assert mean_scores[f"{site}.head.{h}"] == pytest.approx(own / count, rel=1e-12)
    elif case.architecture == "llama":
        site = "model.layers.0.self_attn"
        q, o = means[f"{site}.q_proj.weight"], means[f"{site}.o_proj.weight"]
        for h in range(2):
            own = float(q[4 * h : 4 * h + 4].sum() + o[:, 4 * h : 4 * h + 4].sum())
            assert scores[f"{site}.head.{h}"] == pytest.approx(own, rel=1e-12)
        both = float(means[f"{site}.k_proj.weight"].sum() + means[f"{site}.v_proj.weight"].sum())
        assert scores[f"{site}.kv_head.0"] == pytest.approx(both, rel=1e-12)
    elif case.architecture == "bert":
        site = "bert.encoder.layer.1.attention"
        own = sum(
            float(means[f"{site}.self.{part}.{kind}"][3:].sum())
            for part in ("query", "key", "value")
            for kind in ("weight", "bias")
        ) + float(means[f"{site}.output.dense.weight"][:, 3:].sum())
        assert scores[f"{site}.head.1"] == pytest.approx(own, rel=1e-12)
    else:
        site = "decoder.block.1.layer.1.EncDecAttention"
        own = sum(float(means[f"{site}.{part}.weight"][:3].sum()) for part in "qkv") + float(
            means[f"{site}.o.weight"][:, :3].sum()
        )
        assert scores[f"{site}.head.0"] == pytest.approx(own, rel=1e-12)
        assert len({key.rpartition(".head")[0] for key in scores}) == 6


def test_a_neuron_is_a_row_and_its_bias():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, bias=False)).double()
    collector = FisherCollector()
    gradients = {
        n: torch.arange(p.numel()).view(p.shape) + 1.0 for n, p in model.named_parameters()
    }
    collector.update_fisher_welford("t", gradients, 1)
    with pytest.raises(CurvatureError, match="describe"):
        collector.importance("t", "neuron")
    collector.describe(model)
    scores = collector.importance("t", "neuron", reduce="sum")
    assert scores["0.neuron.0"] == 1 + 4 + 9 + 1
    assert scores["0.neuron.1"] == 16 + 25 + 36 + 4
    assert scores["1.neuron.1"] == 9 + 16
    assert collector.importance("t", "neuron")["0.neuron.1"] == 81 / 4
    assert collector.top_k("t", 2, "neuron") == [("0.neuron.1", 20.25), ("1.neuron.1", 12.5)]
    with pytest.raises(CurvatureError, match="none that is known"):
        collector.importance("t", "head")


@given(
    values=st.lists(st.floats(0, 1e3, width=32), min_size=2, max_size=30),
    share=st.floats(0.01, 1.0),
)
@settings(max_examples=60, deadline=None)
def test_overlap_with_itself_is_one(values, share):
    collector = FisherCollector()
    for task in ("a", "b"):
        collector.update_fisher_welford(task, {"w": torch.tensor(values)}, 1)
    found = collector.overlap("a", "b", share=share)
    if max(values) ** 2 == 0:
        assert found == {"cosine": None, "jaccard": None}
    else:
        assert found["cosine"] == pytest.approx(1.0, abs=1e-12)
        assert found["jaccard"] == 1.0


@given(left=st.integers(1, 9), share=st.floats(0.01, 1.0))
@settings(max_examples=40, deadline=None)
def test_overlap_of_disjoint_supports_is_zero(left, share):
    collector = FisherCollector()
    first, second = torch.zeros(10), torch.zeros(10)
    first[:left], second[left:] = 2.0, 3.0
    collector.update_fisher_welford("a", {"w": first}, 1)
    collector.update_fisher_welford("b", {"w": second}, 1)
    assert collector.overlap("a", "b", share=share) == {"cosine": 0.0, "jaccard": 0.0}


def test_overlap_in_between_and_by_group():
    collector = FisherCollector()
    collector.update_fisher_welford("a", {"v": torch.tensor([2.0, 1, 0]), "w": torch.ones(1)}, 1)
    collector.update_fisher_welford("b", {"v": torch.tensor([2.0, 0, 1]), "w": torch.ones(1)}, 1)
    found = collector.overlap("a", "b", share=0.5)
    assert found["cosine"] == pytest.approx(17 / 18)
    assert found["jaccard"] == pytest.approx(1 / 3)
    assert collector.overlap("a", "b", group="parameter")["cosine"] == pytest.approx(1.0)
    with pytest.raises(CurvatureError, match="share: 0"):
        collector.overlap("a", "b", share=0)
    with pytest.raises(CurvatureError, match="task: 'c'; there are: a, b"):
        collector.overlap("a", "c")


def test_save_load_and_resume_end_where_one_run_ends(case, tmp_path):
    batches = [{key: value[i : i + 1] for key, value in case.batch.items()} for i in range(3)]
    straight = FisherCollector("batch")
    straight.collect(case.model, batches, "t")
    stopped = FisherCollector("batch")
    stopped.collect(case.model, batches[:1], "t")
    stopped.save(tmp_path / "state")
    resumed = FisherCollector.load(tmp_path / "state")
    resumed.collect(case.model, batches[1:], "t")
    resumed.save(tmp_path / "state")
    again = FisherCollector.load(tmp_path / "state")
    for name, mean in straight.fisher_mean["t"].items():
        assert torch.equal(again.fisher_mean["t"][name], mean)
        assert torch.equal(again.fisher_variance["t"][name], straight.fisher_variance["t"][name])
    assert again.token_total == straight.token_total
    assert again.importance("t", "layer") == straight.importance("t", "layer")
    assert len(list((tmp_path / "state").iterdir())) == 2


def test_damaged_files_are_found_out(tmp_path):
    collector = FisherCollector()
    collector.update_fisher_welford("t", {"w": torch.ones(4)}, 1)
    collector.save(tmp_path)
    tensors = next(tmp_path.glob("*.safetensors"))
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-3])
    with pytest.raises(FactorFileError, match="not the file that"):
        FisherCollector.load(tmp_path)
    tensors.unlink()
    with pytest.raises(FactorFileError, match="no saved group Fisher"):
        FisherCollector.load(tmp_path)
    (tmp_path / "group_fisher.json").write_text("{")
    with pytest.raises(FactorFileError, match="no saved group Fisher"):
        FisherCollector.load(tmp_path)


def test_export_narrows_and_says_its_unit(case, collected):
    exported = collected.export("t", torch.float16)
    assert exported["unit"] == "token"
    assert {m.dtype for m in exported["mean"].values()} == {torch.float16}
    assert {m.dtype for m in collected.fisher_mean["t"].values()} == {torch.float64}
    assert collected.export("t")["variance"].keys() == collected.fisher_mean["t"].keys()


def test_a_refused_merge_changes_nothing():
    mine, other = FisherCollector(), FisherCollector()
    for collector, size in ((mine, 2), (other, 3)):
        collector.update_fisher_welford("a", {"w": torch.ones(2)}, 2)
        collector.update_fisher_welford("b", {"v": torch.ones(1), "w": torch.ones(size)}, 2)
    other.update_fisher_welford("a", {"w": 3 * torch.ones(2)}, 5)
    other.update_fisher_welford("b", {"v": 3 * torch.ones(1)}, 5)
    before = json.dumps(mine.state()[1])
    with pytest.raises(CurvatureError, match="task b: w has another shape"):
        mine.merge(other)
    assert json.dumps(mine.state()[1]) == before
    assert mine.fisher_mean["a"]["w"].tolist() == [1.0, 1.0]
    assert mine.fisher_mean["b"]["v"].tolist() == [1.0]


def test_states_of_other_units_do_not_merge():
    with pytest.raises(CurvatureError, match="unit: 'token' cannot be merged"):
        FisherCollector("batch").merge(FisherCollector("token"))
    with pytest.raises(CurvatureError, match="unit: 'word'"):
        FisherCollector("word")


def test_a_pair_as_batch():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    collector = FisherCollector("token", loss_fn=losses.CrossEntropy())
    collector.collect(model, (torch.randn(5, 3), torch.tensor([0, 1, 1, -100, 0])))
    assert collector.token_total["default"] == 4.0
