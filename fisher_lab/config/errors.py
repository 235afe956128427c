"""What bad configuration and bad arguments raise."""

from __future__ import annotations

import math
from typing import Any


def show(value: Any) -> str:
    """The way a value is written on the command line: ``null``, ``true``, ``1e-05``, ``[a,b]``."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and math.isnan(value):
        return "nan"
    if isinstance(value, list | tuple):
        return "[" + ",".join(show(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{show(item)}" for key, item in value.items()) + "}"
    return str(value)


class ConfigError(ValueError):
    """A value, a key or an option that is not allowed. Its text is one line.

    Args:
        message: what is wrong, what was given and what is allowed. Line breaks become spaces.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))

    @classmethod
    def value(cls, key: str, value: Any, allowed: str) -> ConfigError:
        """A known key with a value that is not allowed.

        Args:
            key: the full key, ``kfac.damping``.
            value: what was given.
            allowed: what is allowed, such as ``a finite number above 0``.
        """
        return cls(f"{key}={show(value)} is not allowed: {key} must be {allowed}")


class SettingError(ValueError):
    """An argument is out of range or misspelt; one line with name, value and what is allowed."""
