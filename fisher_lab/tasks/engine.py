"""From a configuration to the engines of ``fisher_lab.api``."""

from __future__ import annotations

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
    return KFACNaturalGradient(
        config.kfac,
        seed=config.seed,
        track_diagonal=False,
        progress=None if progress is None else progress.track,
        communicator=communicator,
    )
