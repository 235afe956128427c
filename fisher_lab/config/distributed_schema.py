"""The section ``distributed`` of the schema."""

from __future__ import annotations

from dataclasses import dataclass

from .fields import above, one_of, setting, whole


@dataclass
class DistributedConfig:
    """Several ranks: how many, where, and how long they wait for each other."""

    nproc: int = setting(
        1, "Ranks on each node; more than one are started by the run itself.", whole(1)
    )
    nodes: int = setting(
        1, "Nodes; which one this is comes from SLURM or `NODE_RANK`, `MASTER_ADDR`.", whole(1)
    )
    backend: str = setting(
        "auto",
        "What moves the data; auto: nccl between CUDA devices, else gloo.",
        one_of("auto", "gloo", "nccl"),
    )
    wrapper: str = setting(
        "ddp",
        "`task=train`: `ddp`: every rank has the whole model; `fsdp`: each has shards of it "
        "(`fully_shard`).",
        one_of("ddp", "fsdp"),
    )
    timeout_s: float = setting(
        1800.0, "A collective that waits for another rank longer than this ends the run.", above(0)
    )
