"""The same work on several ranks and, as truth, on their joined tokens.

`collect` runs on a rank: K-FAC of the rank's own batches, with everything recorded from outside.
`Joined` puts the recorded tokens of all ranks under one another and asks `tests.reference`.
"""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Self
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from fisher_lab import KFACNaturalGradient
from fisher_lab.curvature.collectives import Alone
from fisher_lab.curvature.kfac import accumulators, reduce
from fisher_lab.curvature.kfac.factors import Columns
from fisher_lab.curvature.losses import CrossEntropy
from tests import models, reference
from tests.capturing import engine, inputs_of, random_like
from tests.curvature.kfac.test_layers_by_use import Experts, Frame
from tests.distributed.rank_pool import said
from tests.reference import Damping, Record, Tokens, Truth

LABELS = (40, 0, 7)
"""Labels that count on ranks 0, 1, 2."""

LENGTHS = ((30, 24), (9,), (5, 8))
"""Sequence lengths of the ranks' batches: 76 tokens, between the widths of the layers."""


# Of the first two, outputs (32 to 128) lie on both sides of the joined token count.
BUILDS = {
    "gpt2": lambda: models.gpt2(width=32, layers=1),
    "llama": lambda: models.llama(width=32, inner=88),
    "bert": models.bert,
    "t5": models.t5,
    "tiny": models.gpt2,
    "tiny_llama": models.llama,
}


def model_of(name: str, dtype: torch.dtype) -> nn.Module:
    return models.seeded(BUILDS[name], dtype)


def with_labels(model: nn.Module, batch: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """The batch with exactly `count` labels that count, the first ones."""
    labels = batch["labels"]
    full = {**batch, "labels": torch.where(labels < 0, 5, labels)}
    if labels.ndim == 1:
        return {**batch, "labels": torch.where(torch.arange(len(labels)) < count, labels, -100)}
    counted = reference.counting_labels(model, full) != reference.IGNORE
    if reference.is_causal(model):  # from predicting to predicted positions
        counted = counted.roll(1, 1)
    order = counted.flatten().cumsum(0).view_as(counted)
    chosen = counted & (order <= count)
    if int(chosen.sum()) != count:
        raise AssertionError(f"{int(chosen.sum())} labels, wanted {count}")
    return {**full, "labels": torch.where(chosen, full["labels"], -100)}


def batches_of(
    name: str,
    size: int,
    labels: tuple[int, ...] = LABELS,
    every: tuple[tuple[int, ...], ...] = LENGTHS,
) -> list[list[dict]]:
    """Every rank's batches, one each; `every`: the lengths of the ranks' sequences."""
    model = model_of(name, torch.float64)
    result = []
    for rank, lengths in enumerate(every[:size]):
        if name == "t5":
            batch = models.t5_batch(lengths, tuple(max(2, n - 3) for n in lengths), seed=rank + 3)
        else:
            side = "left" if rank == 2 else "right"
            batch = models.language_batch(lengths, side, share=1.0, seed=rank + 3)
        result.append([with_labels(model, batch, labels[rank])])
    return result


def two_batches(batches: list[list[dict]]) -> list[list[dict]]:
    """Rank 0's sequences as two batches of one."""
    first = batches[0][0]
    halves = [{key: value[i : i + 1] for key, value in first.items()} for i in range(2)]
    return [halves, *batches[1:]]


def in_one(batches: list[list[dict]]) -> list[dict]:
    """The batches of all ranks: those of rank 0, then those of rank 1, and so on."""
    return [batch for own in batches for batch in own]


def empty_batch() -> dict[str, Tensor]:
    """A batch of padding alone."""
    batch = models.language_batch((4, 3), share=1.0)
    return {**batch, "attention_mask": torch.zeros_like(batch["attention_mask"])}


DAMPING = Damping(A=1e-3, G=1e-3, kappa=1e6)


@dataclass(frozen=True)
class Setting:
    """One way to compute, as plain data that can be sent to a rank."""

    policy: str = "all"
    reduce: str = "gram"
    damping: Damping = DAMPING
    more: tuple[tuple[str, Any], ...] = ()

    def engine(self, communicator: Any = None) -> KFACNaturalGradient:
        return engine(
            self.policy, self.damping, kfac_distributed_reduce=self.reduce,
            communicator=communicator, track_diagonal=False, **dict(self.more),
        )  # fmt: skip

    def also(self, **more: Any) -> Self:
        return replace(self, more=(*self.more, *more.items()))


def collect(
    comm: Any,
    name: str,
    dtype: torch.dtype,
    settings: list[Setting],
    batches: list[dict],
    wants: tuple[str, ...] = ("own", "natural", "general", "power", "product"),
) -> list[dict[str, Any]]:
    """Runs on a rank: for each setting, what the engine gives and what was recorded."""
    model = model_of(name, dtype)
    return [one_setting(comm, model, setting, batches, wants) for setting in settings]


def one_setting(
    comm: Any, model: nn.Module, setting: Setting, batches: list[dict], wants: tuple[str, ...]
) -> dict[str, Any]:
    inner = getattr(model, "module", model)
    kfac = setting.engine(comm)
    with reference.record(inner) as rec:
        kfac.collect_kfac_factors(model, batches, keep_gradient=True)
    tokens = {} if "no tokens" in wants else tokens_of(inner, rec, batches)
    result: dict[str, Any] = {
        "tokens": {n: (t.kind, t.a, t.g) for n, t in tokens.items()},
        "methods": {n: f.method for n, f in kfac.kfac_factors.items()},
        "reductions": {n: f["reduction"] for n, f in kfac.kfac_factors.items()},
        "discarded": {n: f["discarded"] for n, f in kfac.kfac_factors.items()},
        "T": {n: f.tokens for n, f in kfac.kfac_factors.items()},
        "N": {f.n_labels for f in kfac.kfac_factors.values()},
        "fisher": kfac.last.fisher,
    }
    own = kfac.own_gradients(model)
    numbers = {
        "own": lambda: own,
        "natural": lambda: kfac.compute_natural_gradient(None, model),
        "general": lambda: kfac.compute_natural_gradient(own, model),
        "power": lambda: kfac.compute_powered_natural_gradient(own, model, -0.5),
        "product": lambda: kfac.compute_fisher_vector_product(random_like(own), model),
        "derived": lambda: derived(kfac),
        "traces": lambda: {n: f.G.trace() for n, f in kfac.kfac_factors.items()},
        "storage": lambda: {n: f.storage_error for n, f in kfac.kfac_factors.items()},
    }
    return result | {key: numbers[key]() for key in wants if key in numbers}


def derived(kfac: KFACNaturalGradient) -> dict[str, Any]:
    reports = {r.factors.layer.name: r for r in kfac.reports()}
    return {
        "trace": kfac.trace(),
        "logdet": kfac.log_determinant(),
        "top": {n: t.tolist() for n, t in kfac.top_eigenvalues(3).items()},
        "clipped": {n: (r.A and r.A.clipped, r.G.clipped) for n, r in reports.items()},
        "kappa": {n: r.G.kappa_after for n, r in reports.items()},
    }


class LocalGrams(Columns):
    """The mistake that must not come back: every rank's own columns, their Grams added up."""

    def __init__(self, local: Columns, out: int, communicator: Any) -> None:
        super().__init__(local.data, local.scale, local.device)
        self.communicator = communicator

    def gram(self, dtype: torch.dtype) -> Tensor:
        return self.communicator.all_reduce(super().gram(dtype))

    def times(self, y: Tensor) -> Tensor:
        return self.communicator.all_reduce(super().times(y))

    def transposed_times(self, z: Tensor) -> Tensor:
        return self.communicator.all_reduce(super().transposed_times(z))


def with_local_grams(comm: Any, **arguments: Any) -> list[dict[str, Any]]:
    """`collect` with the mode `gram` replaced by the sum of the ranks' own Gram matrices."""
    with (
        patch.object(accumulators, "ShardedColumns", LocalGrams),
        patch.object(reduce, "exchange_tokens_for_outputs", lambda x, rows, communicator: x),
    ):
        return collect(comm, **arguments)


def wrapped(comm: Any, model: nn.Module, kind: str) -> nn.Module:
    """The model in DDP, or with every block and the rest under `fully_shard`."""
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model, process_group=comm.group)
    mesh = DeviceMesh.from_group(comm.group, "cpu")
    inner = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    for block in inner:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def in_wrapper(
    comm: Any, kind: str, name: str, dtype: torch.dtype, setting: Setting, batches: list[dict]
) -> dict[str, Any]:
    """`one_setting` on a wrapped model, and the loss of a forward pass that the caller makes."""
    model = wrapped(comm, model_of(name, dtype), kind)
    result = one_setting(comm, model, setting, batches, ("own", "natural", "general", "product"))
    kfac = setting.engine(comm)
    (batch,) = batches
    inner = getattr(model, "module", model)
    with kfac.capture(model):
        loss, labels = reference.summed_loss(inner, model(**inputs_of(batch)).logits, batch)
    kfac.collect_kfac_factors(
        model, batch, loss=loss, n_labels=labels, loss_reduction="sum", keep_gradient=True
    )
    result["captured"] = kfac.compute_natural_gradient(None, model)
    result["names"] = sorted(result["own"])
    if kind == "fsdp":
        result |= in_shards(kfac, model, result["own"])
    return result


def in_shards(kfac: KFACNaturalGradient, model: nn.Module, own: dict[str, Tensor]) -> dict:
    """Gradients in shards give the natural gradient in shards of the same layout."""
    parameters = dict(model.named_parameters())
    gradients = {
        n: distribute_tensor(g, parameters[n].device_mesh, parameters[n].placements)
        for n, g in own.items()
    }
    answer = kfac.compute_natural_gradient(gradients, model)
    asked = kfac.compute_natural_gradient(None, model, shards=True)
    whole = kfac.compute_natural_gradient(gradients, model, shards=False)
    local = {n: tuple(parameters[n].to_local().shape) for n in own}
    for given in (answer, asked):
        for n, value in given.items():
            if tuple(value.to_local().shape) != local[n]:
                raise AssertionError(f"{n}: shard {tuple(value.to_local().shape)}, {local[n]}")
    if any(isinstance(value, DTensor) for value in whole.values()):
        raise AssertionError("shards were not asked for")
    full = {n: value.full_tensor() for n, value in answer.items()}
    return {"shards": full, "asked": {n: v.full_tensor() for n, v in asked.items()}}


def not_finite_on_one(comm: Any, name: str, batches: list[dict]) -> tuple[str, bool]:
    """Rank 1 has a weight that is not a number: every rank must say so, and keep its factors."""
    model = model_of(name, torch.float64)
    kfac = Setting().engine(comm)
    kfac.collect_kfac_factors(model, batches)
    before = kfac.kfac_factors
    if comm.rank == 1:
        with torch.no_grad():
            next(model.parameters())[5] = torch.nan
    text = said(lambda: kfac.collect_kfac_factors(model, batches))
    return text, kfac.kfac_factors is before


def different_gradients(comm: Any, name: str, batches: list[dict]) -> str:
    model = model_of(name, torch.float64)
    kfac = Setting().engine(comm)
    kfac.collect_kfac_factors(model, batches, keep_gradient=True)
    own = kfac.own_gradients(model)
    gradients = {n: g * (1 + comm.rank) for n, g in own.items()}
    return said(lambda: kfac.compute_natural_gradient(gradients, model))


def different_settings(comm: Any, name: str, batches: list[dict]) -> str:
    kfac = Setting("all" if comm.rank == 0 else "small_only").engine(comm)
    return said(lambda: kfac.collect_kfac_factors(model_of(name, torch.float64), batches))


def saved(comm: Any, name: str, batches: list[dict], setting: Setting) -> dict[str, Any]:
    """What every rank exports, and what a single process makes of it."""
    model = model_of(name, torch.float64)
    kfac = setting.engine(comm)
    kfac.collect_kfac_factors(model, batches, keep_gradient=True)
    own = kfac.own_gradients(model)
    before = kfac.compute_natural_gradient(own, model)
    state = kfac.state_dict(model)
    alone = setting.engine(Alone())
    alone.load_state_dict(state, model)
    after = alone.compute_natural_gradient(own, model)
    return {"before": before, "after": after, "tensors": state["tensors"]}


def counted_decompositions(
    comm: Any, name: str, setting: Setting, batches: list[dict]
) -> tuple[list[int], dict[str, Tensor]]:
    """Sides of the matrices that this rank decomposed for its factors, and what came of it."""
    model = model_of(name, torch.float64)
    kfac, sizes, solve = setting.engine(comm), [], torch.linalg.eigh

    def counting(matrix: Tensor) -> Any:
        sizes.append(len(matrix))
        return solve(matrix)

    with patch("torch.linalg.eigh", counting):
        kfac.collect_kfac_factors(model, batches, keep_gradient=True)
    return sizes, kfac.compute_natural_gradient(None, model)


def fails_on_one(comm: Any, name: str, setting: Setting, batches: list[dict]) -> str:
    """Rank 1 fails in its decompositions: every rank must say so."""
    kfac, model = setting.engine(comm), model_of(name, torch.float64)
    step = "fisher_lab.curvature.kfac.accumulators.symmetric_eigen"
    with patch(step, side_effect=ValueError("no room")) if comm.rank == 1 else nullcontext():
        return said(lambda: kfac.collect_kfac_factors(model, batches))


def tokens_of(model: nn.Module, rec: Record, batches: list[dict]) -> dict[str, Tokens]:
    """The reference's tokens; it looks at norm layers, whose parameters it needs whole."""
    sharded = [m for m in model.modules() if isinstance(m, FSDPModule)]
    for module in sharded:
        module.unshard()
    try:
        return reference.tokens_of(model, rec, batches)
    finally:
        for module in sharded:
            module.reshard()


NATURAL = ("natural", "general", "captured", "shards", "asked")
"""Answers that are the natural gradient of the own gradient, by whichever way."""


class Joined:
    """The truth on the tokens of all ranks.

    `answers` are those of `collect` on every rank, for one setting; `labels` is N.
    """

    def __init__(
        self, name: str, dtype: torch.dtype, answers: list[dict], labels: int, **truth: Any
    ) -> None:
        self.answers = answers
        self.model = model_of(name, dtype)
        self.labels = labels
        self.truth = Truth(self.model, Record(), [], labels=labels, **truth)
        modules = dict(self.model.named_modules())
        names = list(dict.fromkeys(n for answer in answers for n in answer["tokens"]))
        for layer in names:
            parts = [answer["tokens"][layer] for answer in answers if layer in answer["tokens"]]
            draws = {len(g) for _, a, g in parts if len(a)}
            most = max(draws, default=1)
            self.truth.tokens[layer] = Tokens(
                layer,
                parts[0][0],
                modules[layer],
                torch.cat([a for _, a, _ in parts]),
                [torch.cat([_draw(g, i, a) for _, a, g in parts]) for i in range(most)],
            )

    def own(self) -> dict[str, Tensor]:
        return self.truth.own_gradient(self.labels, unrounded=True)

    def check(self, setting: Setting, bound: float, noise: float = 0.0) -> None:
        """Everything that the ranks answer; gradients that are less than `noise` are let be."""
        own, ekfac = self.own(), dict(setting.more).get("ekfac")
        solve = self.truth.ekfac if ekfac else self.truth.natural_gradient
        natural = solve(own, setting.damping)
        truths = {"own": own, **dict.fromkeys(NATURAL, natural)}
        if not ekfac:
            vectors = random_like(self.answers[0]["own"])
            truths["power"] = self.truth.powered(own, -0.5, setting.damping)
            truths["product"] = self.truth.fisher_vector_product(vectors)
        kept = {name for name, value in own.items() if float(value.norm()) >= noise}
        for key in truths.keys() & self.answers[0].keys():
            truth = {n: value for n, value in truths[key].items() if n in kept}
            assert_all(self.answers, key, truth, bound)


def _draw(g: list[Tensor], index: int, a: Tensor) -> Tensor:
    return g[index] if index < len(g) else torch.zeros(len(a), g[0].shape[1], dtype=torch.float64)


def assert_all(answers: list[dict], key: str, truth: dict[str, Tensor], bound: float) -> None:
    """Every rank's result against the truth."""
    for rank, answer in enumerate(answers):
        reference.assert_close(answer[key], truth, bound, f"rank {rank}, {key}:")


def of_experts(comm: Any, batches: list[dict], mode: str, **settings: Any) -> dict[str, Tensor]:
    """The natural gradient of a model with experts, and how many tokens each layer saw."""
    model = models.seeded(lambda: Frame(Experts()), torch.float64)
    kfac = KFACNaturalGradient(
        damping=1e-2, communicator=comm, kfac_distributed_reduce=mode, track_diagonal=False,
        **settings,
    )  # fmt: skip
    loss = CrossEntropy(shift=True)
    kfac.collect_kfac_factors(model, batches, loss=loss, keep_gradient=True)
    tokens = {n: torch.tensor(f.tokens) for n, f in kfac.kfac_factors.items()}
    return {**kfac.compute_natural_gradient(None, model), **tokens}
