"""K-FAC is right on forty architectures of transformers, padded and under adapters.

Every one is built tiny, random and in float64; loss, labels, tokens, A, G, the natural gradient
under two policies and the own gradient are those of every example alone, without padding
(``benchmarks/zoo``). The whole of the mappings is the benchmark's.
"""

from __future__ import annotations

import pytest

from benchmarks.zoo.examine import RIGHT, examine

ARCHITECTURES = {
    "causal": (
        "llama gpt2 gemma3_text mixtral qwen3_moe gpt_oss deepseek_v3 llama4_text mamba rwkv "
        "falcon bloom opt phi3 olmo2 jetmoe cohere2 qwen3_next biogpt bart xlnet mpt"
    ),
    "masked": "bert modernbert deberta deberta-v2 mobilebert roformer esm xlm",
    "seq2seq": "t5 bart longt5 marian",
    "sequences": "gpt_neo electra",
    "tokens": "distilbert qwen2",
    "adapters": (
        "llama-lora mistral-dora qwen3-moe-experts opt-embedding roberta-saved bert-weights"
    ),
}
PART = {"xlnet"}
"""Those of which the greater part of what is trained is left out, with a reason."""

CASES = [(task, kind) for task, kinds in ARCHITECTURES.items() for kind in kinds.split()]


@pytest.mark.parametrize(("task", "kind"), CASES)
def test_an_architecture_is_right(task: str, kind: str):
    row = examine(task, kind)
    assert row["status"] == RIGHT, row["why"]
    assert row["of_reached"] > (0.85 if kind not in PART else 0.1), row["passed"]
    assert not row["unchecked"]
