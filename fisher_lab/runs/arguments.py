"""Errors of the command line as the exceptions of their package, in one line."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable
from typing import NoReturn


def raise_errors(parser: ArgumentParser, error: Callable[[str], Exception]) -> None:
    """Make a parser raise where argparse prints the usage and ends the process.

    Args:
        parser: whose errors they are.
        error: makes the exception from argparse's message.
    """

    def fail(message: str) -> NoReturn:
        raise error(message)

    parser.error = fail
