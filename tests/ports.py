"""Ports for servers that another process opens a while later."""

import random
import socket

FIRST, LAST = 10_000, 32_000
"""Not from the kernel's range (32768 on, on Linux): what it gives away once it gives to any other
connection, of any other test, until the server is there."""


def free_ports(count: int = 1) -> int:
    """The first of so many ports in a row on which nobody listens; another one each time."""
    choose = random.SystemRandom()
    for _ in range(200):
        first = choose.randrange(FIRST, LAST - count)
        if all(map(_is_free, range(first, first + count))):
            return first
    raise AssertionError("no port is free")


def _is_free(port: int) -> bool:
    with socket.socket() as tried:
        try:
            tried.bind(("", port))
        except OSError:
            return False
        return True
