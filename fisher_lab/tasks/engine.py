"""From a configuration to the engines of ``fisher_lab.api``."""

from __future__ import annotations

from typing import Any

from fisher_lab.api import KFACNaturalGradient
from fisher_lab.config.schema import Config
from fisher_lab.curvature.collectives import Communicator
from fisher_lab.tasks.progress import Progress


def kfac_engine(
    config: Config,
    progress: Progress | None = None,
    communicator: Communicator | None = None,
) -> KFACNaturalGradient:
    """Returns the K-FAC engine that a configuration describes.

    Args:
        config: the validated configuration.
        progress: shows the engine's loops.
        communicator: the ranks that join their tokens; None: those of the default process group.
    """
    k: Any = config.kfac
    return KFACNaturalGradient(
        damping=k.damping,
        damping_A=k.damping_A,
        damping_G=k.damping_G,
        max_condition_number=k.max_condition_number,
        kfac_use_woodbury=k.use_woodbury,
        kfac_policy=k.policy,
        kfac_big_threshold=k.big_threshold,
        kfac_auto_rho=k.auto_rho,
        kfac_auto_t_max=k.auto_t_max,
        kfac_true_fisher_head=k.true_fisher_head,
        kfac_eps=k.eps,
        woodbury_store_device=k.store_device,
        woodbury_dtype=k.woodbury_dtype,
        use_eigenvalue_correction=k.eigenvalue_correction,
        update_freq=k.update_freq,
        ema_decay=k.ema_decay,
        kfac_distributed_reduce=k.reduce,
        core_dtype=k.core_dtype,
        apply_dtype=k.apply_dtype,
        push_through=k.push_through,
        fisher=k.fisher,
        n_samples=k.n_samples,
        seed=config.seed,
        true_max_classes=k.true_max_classes,
        fisher_scale=k.fisher_scale,
        ekfac=k.ekfac,
        max_columns=k.max_columns,
        max_dense_dim=k.max_dense_dim,
        column_reduction=k.column_reduction,
        store_limit_mb=k.store_limit_mb,
        include=k.include,
        exclude=k.exclude,
        tied=k.tied,
        norm_layers=k.norm_layers,
        uncovered=k.uncovered,
        track_diagonal=False,
        progress=None if progress is None else progress.track,
        communicator=communicator,
    )
