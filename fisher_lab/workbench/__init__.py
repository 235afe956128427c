"""What is worked on: text, tokenizer, model and batches, built from a configuration.

`build` gives a `Bench`; `content_identity` says what it would be made of without building it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fisher_lab.config.schema import Config
    from fisher_lab.runs.signals import Watch

    from .bench import Bench
    from .materials import ProgressLike

__all__ = ["build", "content_identity"]


def build(cfg: Config, progress: ProgressLike | None = None, signals: Watch | None = None) -> Bench:
    """Build model, tokenizer and batches; see `fisher_lab.workbench.bench.build`."""
    from . import bench

    return bench.build(cfg, progress, signals)


def content_identity(cfg: Config) -> dict[str, Any]:
    """Hash data and model by content; see `fisher_lab.workbench.identity.content_identity`."""
    from . import identity

    return identity.content_identity(cfg)
