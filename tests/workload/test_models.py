import re
from dataclasses import replace

import pytest
import torch

from fisher_lab.config.errors import ConfigError
from fisher_lab.config.workload import ModelConfig
from fisher_lab.curvature import losses
from fisher_lab.workload import build, content_identity, models, pretrained_files
from fisher_lab.workload import pretrained as loading
from fisher_lab.workload.inputs import prepare

KINDS = ["gpt2", "llama", "bert", "t5", "mlp"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_configured_is_built(config, inputs, kind):
    made = inputs(kind)
    model = replace(config(kind).model, layers=2, mlp_width=24)
    built = models.build(model, made.tokenizer, classes=made.objective.classes, seed=0)
    shapes = [tuple(p.shape) for p in built.parameters()]
    names = [name for name, _ in built.named_parameters()]
    if kind == "mlp":
        assert shapes == [(16, 400), (16,), (16, 16), (16,), (made.objective.classes, 16),
                          (made.objective.classes,)]  # fmt: skip
        return
    assert (400, 16) in shapes
    assert any(24 in shape for shape in shapes)
    assert sum("lm_head.weight" in name or "decoder.weight" in name for name in names) == 0
    if kind == "t5":  # always tied
        assert [key for key, _ in replace(model, tied=False).check()] == ["tied"]
        return
    untied = models.build(
        replace(model, tied=False), made.tokenizer, classes=made.objective.classes, seed=0
    )
    extra = sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in built.parameters())
    assert extra == 400 * (17 if kind == "bert" else 16)  # the bias of BERT's head is tied too


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert", "t5"])
def test_a_head_may_be_wider_than_the_tokenizer(config, kind):
    asked = config(kind)
    made = prepare(replace(asked, model=replace(asked.model, outputs=421)))
    assert (len(made.tokenizer), made.objective.classes) == (400, 421)
    shapes = {tuple(p.shape) for p in made.untrained(0).parameters()}
    assert (421, 16) in shapes
    assert (400, 16) not in shapes
    assert made.checkpoint_key != prepare(asked).checkpoint_key
    with pytest.raises(ConfigError, match=r"model\.outputs=399 is not allowed: .* at least 400"):
        prepare(replace(asked, model=replace(asked.model, outputs=399)))


def test_topics_are_no_vocabulary(config):
    model = replace(config("mlp").model, outputs=500)
    assert [key for key, _ in model.check()] == ["outputs"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_decides_the_weights_and_nothing_else_is_touched(inputs, kind):
    made = inputs(kind)
    torch.manual_seed(7)
    before = torch.get_rng_state()

    def first(seed):
        return next(iter(made.untrained(seed).parameters())).detach()

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_a_model_computes_the_same(inputs, tmp_path, kind):
    made = inputs(kind)
    built = made.untrained(0).eval()
    models.save(built, tmp_path)
    loaded = models.load(tmp_path, made.cfg.model, made.objective.name).eval()
    batch = made.objective.batch("train", 0, seed=0, batch_size=2, seq_len=32)
    one, other = (losses.score(m, batch, made.objective.loss_fn).logits for m in (built, loaded))
    assert torch.equal(one, other)
    double = models.load(tmp_path, replace(made.cfg.model, dtype="float64"), made.objective.name)
    assert {p.dtype for p in double.parameters()} == {torch.float64}
    assert losses.score(double.eval(), batch, made.objective.loss_fn).logits.dtype == torch.float64


def test_attention_can_be_chosen(inputs):
    built = inputs("gpt2").untrained(0)
    models.set_attention(built, "eager")
    assert built.config._attn_implementation == "eager"
    with pytest.raises(ConfigError, match=r"model\.attn_implementation=psychic is not allowed"):
        models.set_attention(built, "psychic")
    models.set_attention(torch.nn.Linear(1, 1), "eager")


def test_llama_can_share_key_and_value_heads(config, inputs):
    made = inputs("llama")
    built = models.build(
        replace(config("llama").model, kv_heads=1), made.tokenizer, classes=400, seed=0
    )
    assert built.model.layers[0].self_attn.k_proj.weight.shape == (8, 16)


@pytest.fixture(scope="module", params=["gpt2", "bert", "t5"])
def saved(request, inputs, tmp_path_factory):
    """A local directory as save_pretrained writes it, with what was saved."""
    made = inputs(request.param)
    directory = tmp_path_factory.mktemp(request.param)
    built = made.untrained(3)
    models.save(built, directory)
    made.tokenizer.save_pretrained(str(directory))
    return directory, built, made.objective.name


def pretrained(config, directory, **model):
    cfg = config("gpt2")
    cfg.model = ModelConfig(
        name="pretrained", type="pretrained", name_or_path=str(directory), **model
    )
    return cfg


def test_a_pretrained_directory_is_used_for_what_it_is(config, saved):
    directory, built, task = saved
    made = build.build(pretrained(config, directory))
    assert made.objective.name == task
    assert type(made.model) is type(built)
    assert not made.model.training
    for (name, ours), theirs in zip(made.model.named_parameters(), built.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    record = made.record["model"]
    assert record["init"] == "pretrained"
    assert record["baseline"] == "unigram model"
    assert 0 < record["baseline_loss"] < record["heldout_loss"] + 1
    batch = made.batches("train", 1, 0)[0]
    assert losses.score(made.model, batch, made.loss_fn).n_labels > 0


def test_a_pretrained_model_in_another_dtype_and_attention(config, saved):
    directory, _, task = saved
    attention = {} if task == "spans" else {"attn_implementation": "eager"}
    made = build.build(pretrained(config, directory, dtype="bfloat16", **attention))
    assert {p.dtype for p in made.model.parameters()} == {torch.bfloat16}
    if attention:
        assert made.model.config._attn_implementation == "eager"


def test_the_identity_of_a_directory_is_its_content(config, saved):
    directory, built, _ = saved
    cfg = pretrained(config, directory)
    before = content_identity.content_identity(cfg)["model"]
    assert before == content_identity.content_identity(cfg)["model"]
    with torch.no_grad():
        next(iter(built.parameters()))[0, 0] += 1
    models.save(built, directory)
    assert content_identity.content_identity(cfg)["model"] != before


def one_line(cfg):
    with pytest.raises(ConfigError) as caught:
        content_identity.content_identity(cfg)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_models_that_are_not_there_are_named_in_one_line(config, tmp_path):
    assert "model.name_or_path=./none is not allowed" in one_line(pretrained(config, "./none"))
    assert "there is no such directory" in one_line(pretrained(config, tmp_path / "none"))
    (tmp_path / "file").write_text("x")
    assert "there is no such directory" in one_line(pretrained(config, tmp_path / "file"))
    (tmp_path / "empty").mkdir()
    assert "a directory with a config.json" in one_line(pretrained(config, tmp_path / "empty"))
    nowhere = one_line(pretrained(config, "nobody/no-such-model", revision="v1"))
    assert "model.name_or_path=nobody/no-such-model (model.revision=v1)" in nowhere
    assert "a name on the hub that can be reached" in nowhere
    assert "a name on the hub that can be reached" in one_line(pretrained(config, "a/b/c"))


def test_a_model_that_does_not_say_what_it_is_for(config, tmp_path, inputs):
    models.save(inputs("gpt2").untrained(0), tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace("GPT2LMHeadModel", "GPT2Model"))
    cfg = pretrained(config, tmp_path)
    with pytest.raises(ConfigError) as caught:  # all that is wrong, in one line
        pretrained_files.check(cfg)
    assert re.search(r"GPT2Model.*model\.task must be one of causal", str(caught.value))
    assert "comes without a tokenizer; give model.tokenizer=" in str(caught.value)
    assert loading.task(replace(cfg.model, task="causal")) == "causal"
    with pytest.raises(ConfigError, match="comes without a tokenizer"):
        build.build(pretrained(config, tmp_path, task="causal"))


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_sequences_longer_than_the_positions_are_refused(config, kind):
    cfg = config(kind)
    cfg.data.seq_len = 33
    assert one_line(cfg) == (
        f"data.seq_len=33 is not allowed: data.seq_len must be at most 32 (model.positions) "
        f"with model.type={kind}"
    )
    cfg.model.positions = 64
    assert content_identity.content_identity(cfg)["model"]["init"] == "trained"
