"""What a rank does in the tests of EKFAC on ranks."""

from typing import Any

import torch
from torch import Tensor

from fisher_lab import KFACNaturalGradient
from tests import models
from tests.capturing import random_like


def of_ekfac(comm: Any, batches: list[dict], mode: str, **settings: Any) -> dict[str, Tensor]:
    """Natural gradient, product and trace of EKFAC, and what its file gives again."""
    model = models.seeded(lambda: models.gpt2(tied=False, layers=1), torch.float64)
    kfac = KFACNaturalGradient(
        damping=1e-2, communicator=comm, kfac_distributed_reduce=mode, track_diagonal=False,
        ekfac=True, **settings,
    )  # fmt: skip
    kfac.collect_kfac_factors(model, batches)
    vectors = random_like({n: p.detach() for n, p in model.named_parameters()})
    natural = kfac.compute_natural_gradient(vectors, model)
    product = kfac.compute_fisher_vector_product(vectors, model)
    trace = {f"{n}/trace": torch.tensor(t) for n, t in kfac.trace().items()}
    kfac.load_state_dict(kfac.state_dict(model), model)
    again = kfac.compute_natural_gradient(vectors, model)
    found = {"natural": natural, "product": product, "again": again}
    named = {f"{n}/{key}": x for key, values in found.items() for n, x in values.items()}
    return {**named, **trace, "kind": torch.tensor(kfac.last.fisher == "true")}
