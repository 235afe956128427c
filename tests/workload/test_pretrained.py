"""Real checkpoints: what they lack, tokenizers, adapters and pictures."""

# pyright: reportCallIssue=false, reportArgumentType=false

import json
import logging
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fisher_lab.config.errors import ConfigError
from fisher_lab.config.workload import DataConfig, LoraConfig, ModelConfig
from fisher_lab.results.console import standard_output
from fisher_lab.runs.record import Run
from fisher_lab.tasks import analyze, summary
from fisher_lab.workload import build, content_identity, models, pretrained_files
from fisher_lab.workload.pictures import Pictures

VIT = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 8, "patch_size": 4, "num_labels": 5,
}  # fmt: skip


@pytest.fixture(scope="module")
def bert(inputs, tmp_path_factory):
    """A directory with a BERT that has no head, as sentence encoders come."""
    directory = tmp_path_factory.mktemp("bert")
    made = inputs("bert")
    transformers.BertModel(made.untrained(3).config).save_pretrained(str(directory))
    made.tokenizer.save_pretrained(str(directory))
    return directory


@pytest.fixture(scope="module")
def gpt2(inputs, tmp_path_factory):
    directory = tmp_path_factory.mktemp("gpt2")
    models.save(inputs("gpt2").untrained(3), directory)
    inputs("gpt2").tokenizer.save_pretrained(str(directory))
    return directory


def of(config, directory, **model):
    cfg = config("gpt2")
    cfg.model = ModelConfig(
        name="pretrained", type="pretrained", name_or_path=str(directory), **model
    )
    return cfg


def copied(directory, target, *, without=()):
    target.mkdir()
    for file in directory.iterdir():
        if file.name not in without:
            (target / file.name).write_bytes(file.read_bytes())
    return target


def one_line(cfg, check=build.build):
    with pytest.raises(ConfigError) as caught:
        check(cfg)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- what a checkpoint lacks ---------------------------------------------------------------------


def test_a_head_that_the_checkpoint_lacks_is_said_and_has_no_heldout_loss_of_its_own(
    config, bert, tmp_path, caplog
):
    cfg = of(config, bert, task="masked")
    run = Run.start(tmp_path, config={})
    with caplog.at_level(logging.WARNING):
        analyze.run(cfg, run)
    head = "cls.predictions.transform.dense.weight"
    about = run.record["provenance"]["workbench"]["model"]
    assert head in about["drawn"]
    assert all(name.startswith("cls.") for name in about["drawn"])
    assert about["unused"] == ["pooler.dense.bias", "pooler.dense.weight"]
    assert "loss/heldout" not in run.values
    assert run.values["loss/heldout_drawn"] == about["heldout_loss"]
    said = caplog.text
    assert "the checkpoint lacks 5 parameters of BertForMaskedLM" in said
    assert "its losses are not the checkpoint's" in said
    assert "not used of the checkpoint: pooler.dense.bias, pooler.dense.weight" in said
    console = standard_output(summary.PIPE_WIDTH)
    with console.capture() as shown:
        console.print(summary.render(run.record, run.values, run.tables))
    assert "drawn at random, since the checkpoint lacks them: cls.predictions" in shown.get()


def test_a_checkpoint_that_has_everything_says_nothing(config, gpt2, caplog):
    with caplog.at_level(logging.WARNING):
        made = build.build(of(config, gpt2))
    assert caplog.text == ""
    assert {"drawn", "unused"} & set(made.record["model"]) == set()


def test_another_models_weights_and_other_shapes_are_refused(config, gpt2, tmp_path):
    other = copied(gpt2, tmp_path / "other")
    weights = load_file(gpt2 / "model.safetensors")
    renamed = {f"encoder.{name}": value for name, value in weights.items()}
    save_file(renamed, other / "model.safetensors", {"format": "pt"})
    said = one_line(of(config, other))
    assert "the checkpoint has 0% of the parameters of GPT2LMHeadModel" in said
    cut = dict(weights)
    for name, value in weights.items():
        if "c_fc.weight" in name:
            cut[name] = value[:, :8].contiguous()
    save_file(cut, other / "model.safetensors", {"format": "pt"})
    assert "c_fc.weight (16, 8) for (16, 64)" in one_line(of(config, other))
    (other / "model.safetensors").write_bytes(b"12345678901234567890")
    assert "cannot be loaded: SafetensorError" in one_line(of(config, other))
    (other / "model.safetensors").unlink()
    assert "there are no weights in it" in one_line(of(config, other), pretrained_files.check)


# ---- tokenizers ----------------------------------------------------------------------------------


def test_a_model_without_a_tokenizer_takes_another_ones_or_a_trained_one(config, gpt2, tmp_path):
    names = {file.name for file in gpt2.iterdir() if "token" in file.name}
    assert names
    bare = copied(gpt2, tmp_path / "bare", without=names)
    said = one_line(of(config, bare), pretrained_files.check)
    assert "model.tokenizer=<a name on the hub or a directory>" in said
    assert "model.tokenizer=trained" in said
    expected = build.build(of(config, gpt2))
    for given in (str(gpt2), "trained"):  # the same text, the same vocabulary
        made = build.build(of(config, bare, tokenizer=given))
        assert made.record["tokenizer"]["sha256"] == expected.record["tokenizer"]["sha256"]
        assert made.record["model"]["heldout_loss"] == expected.record["model"]["heldout_loss"]
    cfg = of(config, bare, tokenizer="trained")
    cfg.data.vocab_size = 401
    assert "data.vocab_size must be at most 400" in one_line(cfg, pretrained_files.check)
    assert "a directory with a tokenizer_config.json" in one_line(
        of(config, bare, tokenizer=str(bare)), content_identity.content_identity
    )


def test_a_tokenizer_of_a_larger_model_is_refused(config, gpt2, tmp_path):
    cfg = of(config, gpt2, tokenizer="trained")
    cfg.data.vocab_size = 600
    from fisher_lab.workload import text, tokenizer

    sides = text.split(text.load(cfg.data), cfg.data.heldout_fraction)
    tokenizer.train(sides[0], 600).save_pretrained(str(tmp_path))
    said = one_line(of(config, gpt2, tokenizer=str(tmp_path)))
    assert "whose tokens the model knows: it has 400" in said


# ---- adapters ------------------------------------------------------------------------------------


def test_a_new_adapter_freezes_the_model_and_is_drawn_from_the_seed(config, gpt2):
    plain = build.build(of(config, gpt2))
    made = build.build(of(config, gpt2, adapter="lora", lora=LoraConfig(r=3, targets=["c_attn"])))
    trained = {n: p for n, p in made.model.named_parameters() if p.requires_grad}
    assert all("lora_" in name and "c_attn" in name for name in trained)
    assert {tuple(p.shape) for p in trained.values()} == {(3, 16), (48, 3)}
    about = made.record["model"]["adapter"]
    assert about["trained_parameters"] == sum(p.numel() for p in trained.values()) == 192
    # The update starts at zero: the model is what it was.
    assert made.record["model"]["heldout_loss"] == plain.record["model"]["heldout_loss"]
    again = build.build(of(config, gpt2, adapter="lora", lora=LoraConfig(r=3, targets=["c_attn"])))
    for one, other in zip(made.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_built_model_takes_an_adapter_too_and_its_checkpoint_stays(config):
    cfg = config("llama")
    with_adapter = replace(cfg, model=replace(cfg.model, adapter="lora"))
    one, other = (content_identity.content_identity(c) for c in (cfg, with_adapter))
    assert one == other
    made = build.build(with_adapter)
    names = [n for n, p in made.model.named_parameters() if p.requires_grad]
    assert all("lora_" in name for name in names)
    assert not any("lm_head" in name for name in names)
    assert any("down_proj" in name for name in names)


def test_a_trained_adapter_is_loaded_and_known_by_its_content(config, gpt2, tmp_path):
    import peft

    base = transformers.AutoModelForCausalLM.from_pretrained(str(gpt2))
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["c_fc"]))
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.fill_(0.5)
    adapted.save_pretrained(str(tmp_path))
    cfg = of(config, gpt2, adapter=str(tmp_path))
    before = content_identity.content_identity(cfg)["adapter"]
    made = build.build(cfg)
    trained = [p for p in made.model.parameters() if p.requires_grad]
    assert any(bool((p == 0.5).all()) for p in trained)
    plain = build.build(of(config, gpt2)).record["model"]["heldout_loss"]
    assert made.record["model"]["heldout_loss"] != plain
    with torch.no_grad():
        trained[0].add_(1.0)
    made.model.save_pretrained(str(tmp_path))
    assert content_identity.content_identity(cfg)["adapter"] != before
    said = one_line(of(config, tmp_path), content_identity.content_identity)
    assert f"with model.adapter={tmp_path}" in said


def test_what_does_not_go_with_an_adapter_is_said_in_one_line(config, gpt2, monkeypatch):
    asked = of(config, gpt2, adapter="lora", lora=LoraConfig(targets=["nothing"]))
    assert "model.adapter=lora does not go with GPT2LMHeadModel" in one_line(asked)
    assert [key for key, _ in ModelConfig(lora=LoraConfig(r=2)).check()] == ["adapter"]
    assert [key for key, _ in ModelConfig(type="mlp", adapter="lora").check()] == ["adapter"]
    monkeypatch.setattr(pretrained_files, "find_spec", lambda name: None)
    said = one_line(asked, pretrained_files.check)
    assert "model.adapter=lora needs the package peft: pip install 'fisher-lab[lora]'" in said


# ---- pictures ------------------------------------------------------------------------------------


def test_pictures_are_functions_of_their_number_and_tell_their_class():
    made = Pictures(3, 2, 8, 6)
    size = {"seed": 1, "batch_size": 500, "seq_len": 1}
    batch, again = (made.batch("train", 4, **size) for _ in range(2))
    assert batch["pixel_values"].shape == (500, 2, 8, 6)
    assert torch.equal(batch["pixel_values"], again["pixel_values"])
    assert torch.equal(batch["labels"], made.label_batch("train", 4, **size))
    other = made.batch("heldout", 4, **size)
    assert not torch.equal(batch["labels"], other["labels"])
    means = [batch["pixel_values"][batch["labels"] == c].mean(dim=0) for c in range(3)]
    distances = [(other["pixel_values"] - m).square().sum(dim=(1, 2, 3)) for m in means]
    found = torch.stack(distances).argmin(dim=0)
    assert float((found == other["labels"]).float().mean()) > 0.99


def test_a_model_of_pictures_needs_pictures_and_gets_them(config, tmp_path):
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**VIT))
    model.save_pretrained(str(tmp_path))
    cfg = of(config, tmp_path)
    said = one_line(cfg, pretrained_files.check)
    assert "data.type must be pictures for a model that tells pictures apart" in said
    cfg.data = DataConfig(name="pictures", type="pictures", batch_size=3)
    pretrained_files.check(cfg)
    made = build.build(cfg)
    assert made.record["task"] == "pictures"
    assert made.record["model"]["baseline_loss"] == pytest.approx(1.609, abs=0.02)
    assert made.batches("train", 1, 0)[0]["pixel_values"].shape == (3, 3, 8, 8)
    assert json.dumps(made.record)
    text = config("gpt2")
    text.data = cfg.data
    assert "pictures need model=pretrained" in one_line(text, content_identity.content_identity)
