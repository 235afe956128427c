"""`task=plan` and `task=analyze` on the kinds of models that users bring, from directories."""

import pytest
import transformers

from fisher_lab.config.schema import Config
from fisher_lab.config.workload import DataConfig, LoraConfig, ModelConfig
from fisher_lab.runs.record import Run
from fisher_lab.tasks import analyze, plan, summary
from fisher_lab.workload import pretrained_files, text, tokenizer

VOCABULARY = 300
TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip
EXPERTS = {
    "moe_intermediate_size": 8, "n_routed_experts": 4, "n_group": 2, "topk_group": 1,
    "num_experts_per_tok": 2, "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 2,
}  # fmt: skip
SEES = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 8, "patch_size": 4, "num_labels": 5,
}  # fmt: skip


def gemma():
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**TEXT, head_dim=8))


def mixtral():
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2)
    )


def deepseek():
    return transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**{**TEXT, **EXPERTS}))


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT))


def vit():
    return transformers.ViTForImageClassification(transformers.ViTConfig(**SEES))


LORA = {"adapter": "lora", "lora": LoraConfig(r=2)}
DORA = {"adapter": "lora", "lora": LoraConfig(r=2, dora=True)}
KINDS = {
    "gemma": (gemma, {}, 0.99),
    "mixtral": (mixtral, {}, 0.99),
    "deepseek": (deepseek, {}, 0.99),
    "vit": (vit, {}, 0.5),
    "lora": (llama, LORA, 0.99),
    "dora": (llama, DORA, 0.8),
}
"""Kind -> the model, options of it, and the least share of its trained parameters in layers."""


@pytest.fixture(scope="module")
def words():
    sides = text.split(text.load(DataConfig()), 0.1)
    return tokenizer.train(sides[0][:50], VOCABULARY)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_planned_and_analysed_and_both_say_what_is_covered(
    kind, tmp_path, words, capsys
):
    build, options, least = KINDS[kind]
    build().save_pretrained(str(tmp_path / "model"))
    data = DataConfig(batch_size=2, seq_len=16)
    if kind == "vit":
        data = DataConfig(type="pictures", batch_size=4)
    else:
        words.save_pretrained(str(tmp_path / "model"))
    model = ModelConfig(type="pretrained", name_or_path=str(tmp_path / "model"), **options)
    cfg = Config(model=model, data=data, progress=False, device="cpu")
    cfg.kfac.damping = 0.1
    pretrained_files.check(cfg)
    runs = []
    for task in (plan, analyze):
        runs.append(Run.start(tmp_path / task.__name__, config={"task": {"name": kind}}))
        task.run(cfg, runs[-1])
    planned, found = runs
    assert found.values["kfac/coverage"] >= least
    assert planned.values["kfac/coverage"] == found.values["kfac/coverage"]
    for one in runs:
        summary.show(one)
    lines = [x for x in capsys.readouterr().out.splitlines() if "run directory" not in x]
    assert max(map(len, lines)) <= 80
    about = found.record["provenance"]["kfac"]["coverage"]
    assert planned.record["provenance"]["kfac"]["coverage"] == about
    trained = about["covered"] + sum(about["passed"].values())
    said = found.record["provenance"]["workbench"]["model"]
    assert trained + about["frozen"] == said["parameters"]
    if options:
        assert trained == said["adapter"]["trained_parameters"] < about["frozen"]
