"""Tiny models of four architectures, and dense references written from docs/math.md by loops."""

import copy
import json
import math

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fisher_lab.curvature.spectra import eigensolve
from fisher_lab.curvature.spectra.spectrum import FisherSpectral, SpectralConfig
from tests.models import built
from tests.reference import IGNORE, counting_labels, summed_loss

EXACT_MODES = ("full", "chunked", "streaming")
VOCAB = 13
Batch = dict[str, Tensor]
Rows = dict[str, Tensor]

TINY = {
    "gpt2": {
        "n_embd": 6, "n_layer": 2, "n_head": 2, "n_positions": 8, "bos_token_id": 0,
        "eos_token_id": 0,
    },
    "llama": {
        "hidden_size": 8, "intermediate_size": 10, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 8,
    },
    "bert": {
        "hidden_size": 6, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 10, "max_position_embeddings": 8,
    },
    "t5": {
        "d_model": 6, "d_kv": 3, "d_ff": 10, "num_layers": 2, "num_heads": 2,
        "decoder_start_token_id": 0, "pad_token_id": 0, "relative_attention_num_buckets": 4,
    },
}  # fmt: skip
ARCHITECTURES = tuple(TINY)


def tiny(architecture: str, *, tied: bool = True, seed: int = 0, **more: int) -> nn.Module:
    """A float64 model of two layers; its weights are spread out so that spectra are not flat."""
    torch.manual_seed(seed)
    tied = not tied if architecture == "llama" else tied
    sizes = {"vocab_size": VOCAB, "tie_word_embeddings": tied, **TINY[architecture], **more}
    model = built(architecture, None, **sizes).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    return model.train()


def batch_of(architecture: str, seed: int = 1) -> Batch:
    """Three sequences: padded right, padded left, full; some labels at -100."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, (3, 5), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 3:] = 0
    mask[1, :2] = 0
    if architecture == "t5":
        labels = torch.randint(1, VOCAB, (3, 3), generator=generator)
        labels[0, 2:] = -100
        labels[1, 1] = -100
    else:
        labels = ids.clone()
        labels[2, 1] = -100
        if architecture == "bert":
            labels[torch.rand(labels.shape, generator=generator) < 0.3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def labelled(model: nn.Module, batch: Batch) -> list[tuple[int, int, int]]:
    """(sequence, predicting position, label) of every token that has a loss."""
    labels = counting_labels(model, batch)
    return [(b, t, int(labels[b, t])) for b, t in (labels != IGNORE).nonzero().tolist()]


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    if model.config.is_encoder_decoder and "decoder_input_ids" not in batch:
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    with sdpa_kernel(SDPBackend.MATH):  # the other kernels have no second derivative
        return model(**inputs).logits


def flat_gradient(value: Tensor, parameters: list[Tensor], **options: bool) -> Tensor:
    """Gradient by all parameters in one row; zeros where unreached."""
    grads = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True, **options)
    pairs = zip(grads, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])


def rows_of(model: nn.Module, batches: list[Batch], unit: str = "token") -> Rows:
    """One backward pass a sample: the rows of J by parameter, ``[N, numel]``."""
    model = copy.deepcopy(model).eval()
    named, rows = dict(model.named_parameters()), []
    for batch in batches:
        logits, by_sample = logits_of(model, batch), {}
        for b, t, label in labelled(model, batch):
            loss = -torch.log_softmax(logits[b, t], -1)[label]
            sample = b if unit == "sequence" else (b, t)
            by_sample[sample] = by_sample.get(sample, 0) + loss
        rows += [flat_gradient(loss, list(named.values())) for loss in by_sample.values()]
    columns = torch.stack(rows).double().split([p.numel() for p in named.values()], 1)
    return dict(zip(named, columns, strict=True))


def matrix_of(rows: Rows, names: list[str], center: bool = False) -> Tensor:
    """J of a block, less its mean row if asked for."""
    matrix = torch.cat([rows[name] for name in names], dim=1)
    return matrix - matrix.mean(0) if center else matrix


def reference_fisher(rows: Rows, names: list[str], *, center: bool = False) -> Tensor:
    """The explicit ``P x P`` matrix ``(1/N) J^T J``."""
    matrix = matrix_of(rows, names, center)
    return matrix.T @ matrix / len(matrix)


def reference_spectrum(rows: Rows, names: list[str], *, center: bool = False) -> Tensor:
    """Eigenvalues of the Fisher matrix, descending, from the singular values of ``J/sqrt(N)``."""
    matrix = matrix_of(rows, names, center)
    return torch.linalg.svdvals(matrix / math.sqrt(len(matrix))).square()


def spectrum_of_pairs(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """As `reference_spectrum`, of a plain model of logits; labels of -100 do not count."""
    rows = [
        flat_gradient(-torch.log_softmax(model(x), -1)[y], list(model.parameters()))
        for x, y in zip(inputs, labels, strict=True)
        if y != IGNORE
    ]
    return torch.linalg.svdvals(torch.stack(rows) / math.sqrt(len(rows))).square()


def through(function: type[torch.autograd.Function], twice: bool = False) -> nn.Module:
    """Two linear layers with an operation between them; the first may be called twice."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"inner": nn.Linear(3, 3), "head": nn.Linear(3, 4)}).double()

    def forward(x: Tensor) -> Tensor:
        x = torch.tanh(model["inner"](x)) if twice else x
        return model["head"](function.apply(model["inner"](x)))

    model.forward = forward
    return model


def true_fisher(model: nn.Module, batches: list[Batch], block: str = "") -> Tensor:
    """``(1/N) sum_n E_{y ~ p_n} [g g^T]``, ``g = grad log p_n(y)``, by one block's parameters."""
    model = copy.deepcopy(model).eval()
    parameters = [p for name, p in model.named_parameters() if name.startswith(block)]
    rows, n = [], 0
    for batch in batches:
        logits = logits_of(model, batch)
        for b, t, _ in labelled(model, batch):
            n += 1
            for logp in torch.log_softmax(logits[b, t], -1):
                rows.append(flat_gradient(logp, parameters) * (logp.detach() / 2).exp())
    stacked = torch.stack(rows)
    return stacked.T @ stacked / n


def hessian(model: nn.Module, batches: list[Batch], block: str) -> Tensor:
    """Second derivative of the mean loss by a block's parameters, one row at a time.

    Not ``torch.func``: on GPT-2 and BERT (torch 2.13) forward over reverse is asymmetric by 3 %,
    and 2 to 5 % off finite differences; reverse over reverse in a batch did not agree either.
    """
    model = copy.deepcopy(model).eval()
    parameters = [p for name, p in model.named_parameters() if name.startswith(block)]
    sums = [summed_loss(model, logits_of(model, batch), batch) for batch in batches]
    loss = sum(loss for loss, _ in sums) / sum(labels for _, labels in sums)
    first = flat_gradient(loss, parameters, create_graph=True)
    return torch.stack([flat_gradient(entry, parameters) for entry in first])


def assert_same_spectrum(
    found: list[float], wanted: Tensor | list[float], relative: float = 1e-8
) -> None:
    """Every eigenvalue to ``relative``; those below 1e-7 of the largest against that largest.

    A float64 matrix product fixes an eigenvalue only to about 1e-16 of the largest, so a relative
    1e-8 can be asked of those above 1e-7 of it.
    """
    values = torch.tensor(found, dtype=torch.float64)
    wanted = torch.as_tensor(wanted, dtype=torch.float64)
    assert len(values) == len(wanted), (len(values), len(wanted))
    scale = wanted.clamp(min=1e-7 * float(wanted[0]))
    worst = float(((values - wanted).abs() / scale).max())
    assert worst <= relative, worst


def assert_values(
    found: list[float], truth: Tensor | list[float], bound: float, what: str = ""
) -> None:
    """Every eigenvalue within `bound` of the largest; relatively those above 1e-4 of it."""
    truth = torch.as_tensor(truth, dtype=torch.float64)
    assert len(found) == len(truth), what
    scale = torch.where(truth > 1e-4 * truth[0], truth, truth[0])
    off = (torch.tensor(found, dtype=torch.float64) - truth).abs()
    assert float((off / scale).max()) <= bound, what


def spectrum(model, batch, *, structure="layer", center=False, n_samples=None, **config):
    config = SpectralConfig(**{"chunk_size": 4, **config})
    return FisherSpectral(config).compute_fisher_spectrum(
        model, batch, n_samples, structure, center
    )


def assert_no_number(record):
    assert record["status"] == "degenerate"
    assert record["eigenvalues"] == []
    assert record["reason"]
    assert all(record[key] is None for key in eigensolve.NUMBERS)
    json.dumps(record, allow_nan=False)
