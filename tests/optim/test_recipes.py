"""Every snippet of the documentation is run, and trains."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fisher_lab import KFACNaturalGradient, KFACOptimizer
from tests import models

ROOT = Path(__file__).resolve().parents[2]
STEPS = 30
WITH_RANKS = "FSDP2"
"""Its snippet is run by tests/distributed/test_optimizer_ranks.py."""


def snippets() -> dict[str, str]:
    """The recipes by their headings, and those of other pages by the page."""
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    found = {}
    for part in page.split("\n## ")[1:]:
        heading, _, text = part.partition("\n")
        code = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
        found |= {heading: code[0]} if code else {}
    training = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", training, flags=re.DOTALL)):
        found[f"training.md {number}"] = code
    lines = (KFACOptimizer.__doc__ or "").partition("::\n\n")[2].splitlines()
    code = []
    for line in lines:
        if line.strip() and not line.startswith("        "):
            break
        code.append(line[8:])
    found["docstring"] = "from fisher_lab import KFACOptimizer\n" + "\n".join(code)
    return found


def texts(count: int, rows: int = 8, length: int = 24) -> list[dict[str, torch.Tensor]]:
    """Texts of a chain: every token says which two can follow."""
    draws = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        ids = torch.randint(0, models.VOCAB, (rows, 1), generator=draws)
        for _ in range(length - 1):
            more = torch.randint(0, 2, (rows, 1), generator=draws)
            ids = torch.cat([ids, (3 * ids[:, -1:] + 7 * more + 1) % models.VOCAB], dim=1)
        made.append({"input_ids": ids, "labels": ids.clone()})
    return made


def language_model() -> Any:
    torch.manual_seed(0)
    return models.gpt2(width=32).train()


def loss_of(model: Any) -> float:
    with torch.no_grad():
        return sum(float(model(**batch).loss) for batch in texts(40)[-4:]) / 4


class Network(nn.Module):
    """A classifier whose loss is the caller's affair."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(7, 32), nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def micro_batches(batch: dict[str, torch.Tensor], parts: int) -> list[dict[str, torch.Tensor]]:
    return [{k: v.tensor_split(parts)[i] for k, v in batch.items()} for i in range(parts)]


class Texts(torch.utils.data.Dataset):
    """The rows of the batches one by one."""

    def __init__(self) -> None:
        self.rows = [part for batch in texts(STEPS) for part in micro_batches(batch, 8)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {key: value[0] for key, value in self.rows[index].items()}


@pytest.mark.parametrize("name", [name for name in snippets() if name != WITH_RANKS])
def test_a_snippet_trains(name, tmp_path):
    if name == "Lightning":
        pytest.importorskip("lightning")
    torch.manual_seed(0)
    model, network = language_model(), Network()
    x = torch.randn(STEPS, 16, 7)
    weight = torch.randn(7, 4)
    rows = [(one, (one @ weight).argmax(dim=1)) for one in x]
    before = loss_of(model), nn.functional.cross_entropy(network(x[0]), rows[0][1])
    world: dict[str, Any] = {
        "model": model, "network": network, "batches": texts(STEPS), "rows": rows, "steps": STEPS,
        "micro_batches": micro_batches, "backend": "eager", "directory": str(tmp_path / "out"),
        "file": str(tmp_path / "state"), "dataset": Texts(),
        "loader": torch.utils.data.DataLoader(Texts(), batch_size=8),
    }  # fmt: skip
    exec(compile(snippets()[name], name, "exec"), world)
    if name == "A model without a loss":
        after = nn.functional.cross_entropy(network(x[0]), rows[0][1])
        assert float(after) < float(before[1].detach()) - 0.3
        return
    assert loss_of(model) < before[0] - 0.8
    optimizer = world["trainer"].optimizers[0] if name == "Lightning" else world["optimizer"]
    assert getattr(optimizer, "optimizer", optimizer).kfac.kfac_factors


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("engine", [{}, {"damping": 1e-3}, {"ekfac": True}])
def test_the_defaults_of_the_library_train(engine, seed):
    """Of an engine without a word about the damping, too: no loss on the way is far above it."""
    torch.manual_seed(seed)
    model = models.gpt2(width=32).train()
    optimizer = KFACOptimizer(model, KFACNaturalGradient(**engine))
    losses = []
    for batch in texts(40):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert max(losses) < losses[0] + 0.2
    assert losses[-1] < losses[0] - 0.8


def test_a_resumed_trainer_goes_on_exactly(tmp_path):
    from transformers import Trainer, TrainingArguments, get_cosine_schedule_with_warmup

    def trained(directory: Path, resume: bool, last: int) -> dict[str, torch.Tensor]:
        model = language_model()
        optimizer = KFACOptimizer(model, KFACNaturalGradient(damping=0.1, update_freq=3))
        schedule = get_cosine_schedule_with_warmup(optimizer, 1, 8)
        arguments = TrainingArguments(
            output_dir=str(directory), max_steps=last, per_device_train_batch_size=4, save_steps=4,
            save_strategy="steps", report_to=[], use_cpu=True, disable_tqdm=True, max_grad_norm=0.0,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=Texts(), optimizers=(optimizer, schedule))
        trainer.train(resume_from_checkpoint=resume)
        return {name: p.detach().clone() for name, p in model.named_parameters()}

    whole = trained(tmp_path / "whole", False, 8)
    trained(tmp_path / "part", False, 4)
    again = trained(tmp_path / "part", True, 8)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_unfreezing_callbacks_find_what_is_new():
    """As Lightning's ``BackboneFinetuning`` does it."""
    model = language_model()
    model.transformer.h[0].requires_grad_(False)
    optimizer = KFACOptimizer(model)
    batches = texts(6)
    for step, batch in enumerate(batches):
        if step == 3:
            model.transformer.h[0].requires_grad_(True)
            known = {id(p) for g in optimizer.param_groups for p in g["params"]}
            new = [p for p in model.transformer.h[0].parameters() if id(p) not in known]
            rate = optimizer.param_groups[0]["lr"] / 10
            optimizer.add_param_group({"params": new, "lr": rate})
        before = copy.deepcopy(model.transformer.h[0].state_dict())
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        same = [torch.equal(before[n], v) for n, v in model.transformer.h[0].state_dict().items()]
        assert all(same) if step < 3 else not any(same)
    assert [g["name"] for g in optimizer.param_groups] == ["kfac", "adamw", "kfac_1"]
