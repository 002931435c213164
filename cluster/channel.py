"""Messages between `lakebus up` and its Ray host: JSON lines over a socket of their own.

Standard output is left to Ray, which prints what it likes. The end of the connection is a message
too: the other side is gone.
"""

from __future__ import annotations

import json
import select
import socket
from typing import Any


class ChannelClosed(Exception):
    """The other side is gone."""


class Channel:
    """The blocking end, for the host."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lines = connection.makefile("r", encoding="utf-8")

    def send(self, kind: str, **members: Any) -> None:
        line = json.dumps({"kind": kind, **members}) + "\n"
        try:
            self._connection.sendall(line.encode())
        except OSError as error:
            raise ChannelClosed from error

    def waiting(self, timeout_s: float) -> bool:
        """True when there is a message, or the end, to receive; False after the time."""
        # The sender waits for an answer between messages, so no line is left in the buffer.
        return bool(select.select([self._connection], [], [], timeout_s)[0])

    def receive(self) -> dict[str, Any]:
        """Wait for the next message; raises ChannelClosed at the end."""
        line = self._lines.readline()
        if not line:
            raise ChannelClosed
        message: dict[str, Any] = json.loads(line)
        return message
