"""Which parameters form a block of the block-diagonal Fisher matrix."""

from __future__ import annotations

import re

from torch import nn

from fisher_lab.config.spectra import STRUCTURES
from fisher_lab.curvature.errors import CurvatureError, check_one_of

# The pattern's match, from the start of a parameter's name, is the name of its transformer block.
# A wrapper may prefix it (``bert.encoder.layer.0``); the shortest prefix wins, so that the
# sub-layers of a T5 block (``encoder.block.0.layer.1``) stay inside it.
_ARCHITECTURES: dict[str, re.Pattern[str]] = {
    "gpt2": re.compile(r"(?:.*?\.)??h\.\d+(?=\.)"),
    "bert": re.compile(r"(?:.*?\.)??encoder\.layer\.\d+(?=\.)"),
    "t5": re.compile(r"(?:.*?\.)??(?:encoder|decoder)\.block\.\d+(?=\.)"),
    "llama": re.compile(r"(?:.*?\.)??layers\.\d+(?=\.)"),
}
_GENERIC = re.compile(r"(?:.*?\.)??(?:h|layers?|blocks?|encoders?|decoders?)\.\d+(?=\.)")
_SIGNATURES: dict[str, re.Pattern[str]] = {
    "gpt2": re.compile(r"(?:^|\.)h\.\d+\.(?:attn\.c_attn|mlp\.c_fc)\."),
    "bert": re.compile(r"(?:^|\.)encoder\.layer\.\d+\.attention\."),
    "t5": re.compile(r"(?:^|\.)(?:encoder|decoder)\.block\.\d+\.layer\.\d+\."),
    "llama": re.compile(r"(?:^|\.)layers\.\d+\.(?:self_attn|mlp)\.(?:gate|up|down|q|k|v|o)_proj\."),
}


def architecture_of(model: nn.Module) -> str:
    """Returns ``gpt2``, ``bert``, ``llama``, ``t5`` or ``generic``, from the parameters' names."""
    names = [name for name, _ in model.named_parameters()]
    for architecture, signature in _SIGNATURES.items():
        if any(signature.search(name) for name in names):
            return architecture
    return "generic"


def parameter_blocks(model: nn.Module, structure: str) -> dict[str, list[str]]:
    """Groups the parameters of a model into blocks.

    ``structure`` is ``layer`` (a transformer block; what lies outside of one is a block for each
    leaf module), ``module`` (a leaf module), ``parameter`` or ``full``. A tied parameter appears
    once, under its name in ``named_parameters()`` (``docs/math.md``, section 1).

    Returns:
        Block name to the names of its parameters that require a gradient, in the model's order; a
        block whose parameters are all frozen is there with an empty list.

    Raises:
        CurvatureError: the structure has another name, or the model has no parameter.
    """
    check_one_of("block_structure", structure, STRUCTURES)
    pattern = _ARCHITECTURES.get(architecture_of(model), _GENERIC)
    blocks: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters():
        members = blocks.setdefault(_block_of(name, structure, pattern), [])
        if parameter.requires_grad:
            members.append(name)
    if not blocks:
        raise CurvatureError(f"model: {type(model).__name__} has no parameter")
    return blocks


def _block_of(name: str, structure: str, pattern: re.Pattern[str]) -> str:
    match structure:
        case "full":
            return "full"
        case "parameter":
            return name
        case "layer" if found := pattern.match(name):
            return found.group()
        case _:
            return name.rpartition(".")[0] or "model"


def select_parameters(model: nn.Module, block: str | None) -> dict[str, nn.Parameter]:
    """Returns the trainable parameters of a block, by name.

    ``block`` is None for the whole model, else a block's name in any structure
    (``transformer.h.0``, ``transformer.h.0.attn.c_attn``, a parameter's name).

    Raises:
        CurvatureError: no trainable parameter belongs to such a block.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if block is not None and block != "full":
        named = {n: p for n, p in named.items() if n == block or n.startswith(f"{block}.")}
    if not named:
        some = ", ".join(list(parameter_blocks(model, "layer"))[:6])
        raise CurvatureError(f"block: no trainable parameter in {block!r}; there are {some}, ...")
    return named
