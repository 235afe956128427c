"""What is worked on: the sections ``model``, ``data``, ``optimizer`` and ``train``.

A model that is not ``pretrained`` is trained by its recipe (``model.recipe``) with the default
`OptimizerConfig`, whatever ``optimizer`` and ``train`` say, so that the checkpoint under analysis
does not change with them. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from fisher_lab.config.fields import (
    Problems,
    above,
    at_least,
    fraction,
    null,
    one_of,
    section,
    setting,
    whole,
)

MODEL_TYPES = ("gpt2", "llama", "bert", "t5", "mlp", "pretrained")
DATA_TYPES = ("pydoc", "text_file", "hf", "pictures")
MODEL_DTYPES = ("auto", "float64", "float32", "bfloat16", "float16")
TASKS = ("causal", "masked", "spans", "pictures")
SPECIAL_TOKENS = 37
"""Tokens of the trained tokenizer that stand for no text; it needs these and 256 bytes at least."""


@dataclass
class RecipeConfig:
    """How the checkpoint of a built model is trained; all of it enters the checkpoint's hash."""

    steps: int = setting(400, "Steps; a fixed number, with no early stop.", whole(1))
    batch_size: int = setting(8, "Sequences a step.", whole(1))
    seq_len: int = setting(128, "Tokens a sequence.", whole(8))
    lr: float = setting(3e-3, "Peak learning rate.", above(0))


@dataclass
class LoraConfig:
    """A new adapter (Hu et al. 2021), by the package peft; the model itself is frozen."""

    r: int = setting(8, "Rank of the update of each weight.", whole(1))
    alpha: float = setting(16.0, "The update is multiplied by alpha / r.", above(0))
    targets: list[str] = setting(
        [], "Ends of the names of the modules that get one; empty: all linear ones but the head."
    )
    dora: bool = setting(False, "Also train the length of each column (DoRA, Liu et al. 2024).")


@dataclass
class ModelConfig:
    """The model."""

    name: str = setting("gpt2", "A label for tables.")
    type: str = setting("gpt2", "What is built, each with its own task.", one_of(*MODEL_TYPES))
    init: str = setting(
        "trained",
        "`trained`: by the recipe, cached; `random`: as initialised from `model.train_seed`.",
        one_of("trained", "random"),
    )
    layers: int = setting(
        4, "Transformer blocks (of encoder and decoder each), hidden layers.", whole(1)
    )
    width: int = setting(128, "Width of the residual stream.", whole(2))
    heads: int = setting(4, "Attention heads; they divide the width.", whole(1))
    kv_heads: int | None = setting(
        None, "Key and value heads of llama; they divide the heads; null: as many.", whole(1) | null
    )
    mlp_width: int | None = setting(
        None, "Inner width of the MLP blocks; null: four times the width.", whole(1) | null
    )
    outputs: int | None = setting(
        None,
        "Outputs of the head of a text model and rows of its embedding; null: as many as the "
        "tokenizer has tokens. Further ones are padding: no text has them.",
        whole(1) | null,
    )
    positions: int | None = setting(
        None,
        "Longest sequence of gpt2 and bert (their positions are learned); null: the recipe's.",
        whole(8) | null,
    )
    tied: bool = setting(True, "Embedding and head share one weight.")
    dropout: float = setting(0.0, "Dropout everywhere the model has one.", fraction())
    recipe: RecipeConfig = section(RecipeConfig)
    train_seed: int = setting(
        0,
        "Seed of the checkpoint: initial weights and batches of its training.",
        whole(0, 2**32 - 1),
    )
    name_or_path: str | None = setting(
        None, "`pretrained` only: a name on the hub or a local directory."
    )
    revision: str | None = setting(None, "`pretrained` only: branch, tag or commit on the hub.")
    task: str | None = setting(
        None,
        "`pretrained` only: what it is used for; null: as its configuration says.",
        one_of(*TASKS) | null,
    )
    trust_remote_code: bool = setting(
        False, "`pretrained` only: run code that comes with the model."
    )
    dtype: str = setting(
        "auto",
        "Dtype of the weights; auto: float32, or what a pretrained model was saved in.",
        one_of(*MODEL_DTYPES),
    )
    attn_implementation: str | None = setting(
        None, "`eager`, `sdpa`, or whatever the library offers; null: the library's choice."
    )
    tokenizer: str | None = setting(
        None,
        "`pretrained` only: a name on the hub or a local directory; `trained`: the tokenizer that "
        "is trained on the text, with `data.vocab_size` tokens; null: the model's own.",
    )
    adapter: str | None = setting(
        None,
        "`lora`: a new adapter of `model.lora`, drawn from `model.train_seed`; else a trained one, "
        "a name on the hub or a local directory; null: none.",
    )
    lora: LoraConfig = section(LoraConfig)

    def check(self) -> Problems:
        """Yield what concerns more than one key."""
        kind, width, heads = self.type, self.width, self.heads
        if self.adapter != "lora" and self.lora != LoraConfig():
            yield "adapter", "lora where model.lora is given"
        if self.adapter is not None and kind == "mlp":
            yield "adapter", "null with model.type=mlp"
        if kind != "pretrained" and self.tokenizer is not None:
            yield "tokenizer", f"null with model.type={kind} (choose model=pretrained)"
        if kind == "pretrained":
            if not self.name_or_path:
                where = "a name on the hub or a local directory"
                yield "name_or_path", f"{where} with model.type=pretrained"
            return
        if self.name_or_path is not None:
            yield "name_or_path", f"null with model.type={kind} (choose model=pretrained)"
        if kind == "mlp" and self.outputs is not None:
            yield "outputs", "null with model.type=mlp (its outputs are topics)"
        if kind != "mlp" and width % heads:
            yield "heads", f"a divisor of model.width={width}"
        if kind == "t5" and not self.tied:
            yield "tied", "true with model.type=t5 (the library always ties it)"
        if self.kv_heads is not None and heads % self.kv_heads:
            yield "kv_heads", f"a divisor of model.heads={heads}"
        if kind == "llama" and width // heads % 2:
            yield "heads", f"such that model.width={width} over it is even (rotary positions)"
        if self.positions is not None and self.positions < self.recipe.seq_len:
            yield "positions", f"at least model.recipe.seq_len={self.recipe.seq_len}"


@dataclass
class DataConfig:
    """The text (or pictures), and the batches made of it."""

    name: str = setting("pydoc", "A label for tables.")
    type: str = setting(
        "pydoc",
        "Where the text comes from; `pictures`: no text, but a made-up pattern for each class "
        "under noise, for a pretrained model that tells pictures apart.",
        one_of(*DATA_TYPES),
    )
    path: str | None = setting(
        None,
        "`text_file`: a UTF-8 file or a directory of them; "
        "`hf`: a data set's name on the hub or a directory that `save_to_disk` wrote.",
    )
    pattern: str = setting("*.txt", "`text_file`: which files of a directory, at any depth.")
    subset: str | None = setting(None, "`hf` only: the data set's configuration.")
    split: str = setting("train", "`hf` only: the split whose text is used.")
    column: str = setting("text", "`hf` only: the column that holds the text.")
    revision: str | None = setting(None, "`hf` only: branch, tag or commit on the hub.")
    vocab_size: int = setting(
        2048,
        "Vocabulary of the byte-level BPE trained on the text (a pretrained model brings its own).",
        whole(256 + SPECIAL_TOKENS),
    )
    heldout_fraction: float = setting(
        0.1, "Share of the text that nothing is trained on.", fraction(0.001, 0.9)
    )
    batch_size: int = setting(4, "Sequences (or pictures) a batch.", whole(1))
    seq_len: int = setting(128, "Tokens a sequence (of the encoder in t5).", whole(8))

    def check(self) -> Problems:
        """Yield what concerns more than one key."""
        if self.type == "pydoc" and self.path is not None:
            yield "path", "null with data.type=pydoc (choose data=text_file or data=hf)"
        if self.type == "pictures" and self.path is not None:
            yield "path", "null with data.type=pictures"
        if self.type == "text_file" and not self.path:
            yield "path", "a UTF-8 file or a directory of them with data.type=text_file"
        if self.type == "hf" and not self.path:
            yield "path", "a name on the hub or a saved data set with data.type=hf"


CURVATURE_OPTIMIZERS = ("kfac", "ekfac")
"""Those that take the section ``kfac`` too."""
MATRIX_OPTIMIZERS = ("muon", "soap", "shampoo")
"""Those of libraries whose steps are those of whole matrices; the rest is AdamW's."""
OPTIMIZERS = ("adamw", "sgd", *MATRIX_OPTIMIZERS, *CURVATURE_OPTIMIZERS)


@dataclass
class OptimizerConfig:
    """The optimiser of ``task=train``; with these defaults also of every checkpoint."""

    name: str = setting("adamw", "The optimiser.", one_of(*OPTIMIZERS))
    lr: float | None = setting(
        None, "Peak learning rate; null: `model.recipe.lr`.", above(0) | null
    )
    beta1: float = setting(0.9, "AdamW, `soap`, `shampoo`: decay of the first moment.", fraction())
    beta2: float = setting(
        0.95,
        "AdamW, `soap`, `shampoo`: decay of the second moment, and of the matrices' statistics.",
        fraction(),
    )
    eps: float = setting(
        1e-8, "AdamW, `soap`, `shampoo`: added to the root of the second moment.", above(0)
    )
    momentum: float = setting(
        0.9, "`sgd`, `muon`, `kfac`, `ekfac`: decay of the running sum of steps.", fraction()
    )
    weight_decay: float = setting(0.01, "Decoupled, on matrices alone.", at_least(0))
    clip_norm: float | None = setting(
        1.0, "The gradient's norm is cut to this; null: not at all.", above(0) | null
    )
    warmup: float = setting(0.05, "Share of the steps in which the rate rises.", fraction())
    schedule: str = setting(
        "cosine", "The rate after the warm-up.", one_of("cosine", "linear", "constant")
    )
    final_lr: float = setting(
        0.02, "Share of the peak rate that the schedule ends at.", fraction(0.0, 1.0)
    )
    rest_lr: float | None = setting(
        None,
        "All but `adamw` and `sgd`: peak rate of AdamW, for the parameters that they leave to it; "
        "null: `model.recipe.lr`.",
        above(0) | null,
    )
    outer: str = setting(
        "adamw",
        "`kfac`, `ekfac`: what changes embeddings and head, whose factors are the largest and the "
        "least well known: `adamw`, or `kfac` as everything else.",
        one_of("adamw", "kfac"),
    )
    clip: str = setting(
        "unit",
        "`kfac`, `ekfac`: what bounds a step. `unit`: the natural gradient is scaled to length 1 "
        "in its own metric, so that the predicted divergence of a step is lr^2/2; `kl`: it is cut "
        "to `optimizer.clip_limit`; `trust`: the whole step is, with momentum, by K-FAC's "
        "damped Fisher-vector product; `none`: nothing.",
        one_of("unit", "kl", "trust", "none"),
    )
    clip_limit: float = setting(
        1e-3,
        "`kl`, `trust`: the bound on the predicted divergence of a step, in nats a label.",
        above(0),
    )
    graft: str = setting(
        "none",
        "`kfac`, `ekfac`: the length of the natural gradient of each tensor: its own (`none`), "
        "that of the gradient (`sgd`), or that of Adam's step without momentum (`adam`).",
        one_of("none", "sgd", "adam"),
    )
    damping_ratio: float = setting(
        1.0,
        "`kfac`, `ekfac`: damping of A over that of G, `kfac.damping`, unless `kfac.damping_A` and "
        "`kfac.damping_G` say otherwise.",
        above(0),
    )
    damping_schedule: str = setting(
        "constant",
        "`kfac`, `ekfac`: how `kfac.damping` moves; `lm`: Levenberg-Marquardt by the reduction "
        "ratio.",
        one_of("constant", "lm"),
    )
    lm_factor: float = setting(
        0.77, "`lm`: the damping is multiplied or divided by this.", fraction(0.01)
    )
    inverse_freq: int | None = setting(
        None,
        "`kfac`, `ekfac`: steps between two refreshes of the inverses and looks at the reduction "
        "ratio; null: `kfac.update_freq`, that is with the factors. `soap`, `shampoo`: of the "
        "eigenbases, of the roots; null: 10.",
        whole(1) | null,
    )
    refresh_below: float | None = setting(
        None,
        "`kfac`, `ekfac`: a reduction ratio below this refreshes the factors at the next step, "
        "beside `kfac.update_freq`; null: it does not.",
        above(0) | null,
    )
    ratio: bool = setting(
        True,
        "`kfac`, `ekfac`: measure the reduction ratio, which costs a forward pass each time.",
    )

    def check(self) -> Problems:
        """Yield what concerns more than one key."""
        if self.damping_schedule == "lm" and not self.ratio:
            yield "ratio", "true with optimizer.damping_schedule=lm"
        if self.refresh_below is not None and not self.ratio:
            yield "ratio", "true with optimizer.refresh_below"
        curvature = self.name in CURVATURE_OPTIMIZERS
        if curvature and self.graft != "none" and self.clip not in ("none", "trust"):
            yield "clip", f"none or trust with optimizer.graft={self.graft}"


@dataclass
class TrainConfig:
    """``task=train``: how long, from where, and what is looked at on the way."""

    steps: int | None = setting(None, "Steps; null: `model.recipe.steps`.", whole(1) | null)
    batch_size: int | None = setting(
        None, "Sequences a step; null: `model.recipe.batch_size`.", whole(1) | null
    )
    seq_len: int | None = setting(
        None, "Tokens a sequence; null: `model.recipe.seq_len`.", whole(8) | null
    )
    from_checkpoint: bool = setting(
        False, "Start from the model's checkpoint; a pretrained model always does."
    )
    accumulation: int = setting(
        1, "Micro-batches that a step's batch is cut into; their gradients add up.", whole(1)
    )
    precision: str = setting(
        "fp32",
        "Of the forward passes, under autocast (`bf16`, `fp16`); `fp32`: the weights' own dtype.",
        one_of("fp32", "bf16", "fp16"),
    )
    gradient_checkpointing: bool = setting(
        False, "Recompute activations in the backward pass (Hugging Face models)."
    )
    divergence_factor: float | None = setting(
        2.0,
        "A loss over this many times the first one ends the training, as one that is not finite "
        "does; null: only the latter.",
        above(1) | null,
    )
    target_loss: float | None = setting(
        None,
        "Held-out loss; steps and seconds until it is reached are recorded.",
        above(0) | null,
    )
    eval_every: int = setting(50, "Steps between two held-out evaluations.", whole(1))
    save_every_s: float = setting(
        5.0, "Seconds between two saves of what an exact resume needs.", at_least(0)
    )
