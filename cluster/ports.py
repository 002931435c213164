"""TCP ports of a stack, chosen so that stacks on one machine never share one.

A free port can be taken between the look and the use, and HAProxy even listens on a port that
another HAProxy has (SO_REUSEPORT), which would mix two stacks' requests. So a stack claims its
ports first, by binding a name in the kernel's abstract socket namespace: atomic, for all users, in
the same network namespace as the ports themselves, and gone with the process that claimed.
"""

from __future__ import annotations

import random
import socket

LOOPBACK = "127.0.0.1"
BLOCK_SIZE = 256
"""Ports for the internals of one stack: HAProxy's own pages, the fallback proxy, replicas."""

# Below the range from which the kernel takes ports for outgoing connections.
_BLOCKS_FROM, _BLOCKS_UNTIL = 18_432, 32_768


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody uses now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def port_is_free(port: int, host: str = LOOPBACK) -> bool:
    """True if a server could listen on this port now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True


class PortClaims:
    """The claims of one stack; they end with `release` or with the process."""

    def __init__(self) -> None:
        self._held: list[socket.socket] = []

    def take(self, port: int, host: str = LOOPBACK) -> bool:
        """Claim one port; False if another stack holds it or somebody listens on it."""
        claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            claim.bind(f"\0lakebus-port-{port}")
        except OSError:
            claim.close()
            return False
        if not port_is_free(port, host):
            claim.close()
            return False
        self._held.append(claim)
        return True

    def take_block(self, wanted: int = 0) -> int | None:
        """Claim a block of `BLOCK_SIZE` ports and return its first, or None if none is free.

        :param wanted: the block to try first; the only one to try if it lies off the grid.
        """
        blocks = list(range(_BLOCKS_FROM, _BLOCKS_UNTIL - BLOCK_SIZE + 1, BLOCK_SIZE))
        random.shuffle(blocks)
        if wanted:
            blocks = [wanted, *blocks] if wanted in blocks else [wanted]
        for first in blocks:
            if self.take(first) and all(
                port_is_free(port) for port in range(first, first + BLOCK_SIZE)
            ):
                return first
        return None

    def release(self) -> None:
        while self._held:
            self._held.pop().close()
