"""Where the configuration files are, in a checkout and in an installed wheel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
_FURTHER: list[Path] = []


def root() -> Path:
    """The directory that holds ``conf``: the package in a wheel, else its parent."""
    return _PACKAGE if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent


def conf() -> Path:
    """The directory of ``config.yaml`` and of the groups."""
    return root() / "conf"


def sweeps() -> Path:
    """The directory of the sweeps that come with the project (`fisher_lab.sweeps` is code)."""
    return root() / ("conf_sweeps" if root() == _PACKAGE else "sweeps")


@contextmanager
def further(folder: str | None) -> Iterator[None]:
    """Within it, Hydra also looks for options of groups in the folder of ``--config-dir``.

    The search-path plugin reads it, which is the one public way to Hydra's search path.

    Args:
        folder: a directory; None for none.
    """
    _FURTHER[:] = [] if folder is None else [Path(folder).resolve()]
    try:
        yield
    finally:
        _FURTHER.clear()


def further_folders() -> list[Path]:
    """The folders within :func:`further`."""
    return list(_FURTHER)
