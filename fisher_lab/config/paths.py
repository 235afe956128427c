"""Where the configuration files are, in a checkout and in an installed wheel."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def root() -> Path:
    """The directory that holds ``conf`` and ``sweeps``: the package in a wheel, else its parent."""
    return _PACKAGE if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent


def conf() -> Path:
    """The directory of ``config.yaml`` and of the groups."""
    return root() / "conf"


def sweeps() -> Path:
    """The directory of the sweeps that come with the project."""
    return root() / "sweeps"
