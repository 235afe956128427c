"""Models of which only a part is trained: PEFT's adapters, biases alone, weights alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from benchmarks.zoo.inputs import Batch, Shape, classified, every_position, tagged


@dataclass(frozen=True)
class Adapter:
    """What becomes of a model before it is compared.

    Attributes:
        base: name of the class of transformers.
        options: of PEFT's ``LoraConfig``; None for none.
        trained: says of a parameter's name whether it is trained, where PEFT does not.
    """

    base: str
    options: dict[str, Any] | None = field(default_factory=dict)
    trained: Callable[[str], bool] | None = None

    def __call__(self, model: nn.Module) -> nn.Module:
        """Returns the model with its adapters, which are not zero."""
        if self.trained is not None:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(self.trained(name))
        if self.options is None:
            return model
        from peft import LoraConfig, get_peft_model

        options = {"r": 3, "target_modules": "all-linear", **self.options}
        adapted = get_peft_model(model, LoraConfig(**options)).double().eval()
        torch.manual_seed(4)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return adapted


EXPERTS = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
ADAPTERS = {
    "llama-lora": Adapter("LlamaForCausalLM"),
    "gpt2-lora": Adapter("GPT2LMHeadModel"),
    "gemma3-rslora": Adapter("Gemma3ForCausalLM", {"use_rslora": True}),
    "mistral-dora": Adapter("MistralForCausalLM", {"use_dora": True}),
    "bert-dora": Adapter("BertForMaskedLM", {"use_dora": True}),
    "t5-lora": Adapter("T5ForConditionalGeneration"),
    "bart-lora": Adapter("BartForConditionalGeneration", {"target_modules": ["q_proj", "fc1"]}),
    "qwen3-moe-experts": Adapter("Qwen3MoeForCausalLM", EXPERTS),
    "mixtral-experts": Adapter("MixtralForCausalLM", EXPERTS),
    "opt-embedding": Adapter("OPTForCausalLM", {"target_modules": ["embed_tokens", "q_proj"]}),
    "falcon-lora-bias": Adapter("FalconForCausalLM", {"bias": "lora_only"}),
    "roberta-saved": Adapter(
        "RobertaForSequenceClassification",
        {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]},
    ),
    "deberta-v2-lora": Adapter("DebertaV2ForTokenClassification"),
    "bert-biases": Adapter("BertForMaskedLM", None, lambda name: name.endswith("bias")),
    "bert-weights": Adapter("BertForMaskedLM", None, lambda name: not name.endswith("bias")),
    "gpt2-half": Adapter("GPT2LMHeadModel", None, lambda name: ".h.0." not in name),
}


def adapted(model: nn.Module, shape: Shape) -> Batch:
    """The batch of the task that the adapted model is for."""
    base: Any = getattr(model, "get_base_model", lambda: model)
    name = type(base()).__name__
    if name.endswith("ForSequenceClassification"):
        return classified(model, shape)
    if name.endswith("ForTokenClassification"):
        return tagged(model, shape)
    return every_position(model, shape)
