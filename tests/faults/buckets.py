"""A proxy before an S3 server that makes the faults of a network and of a busy service.

It reads whole requests, so a fault strikes at a request: by its method, and, of a put, before or
after its effect. Each request has a connection of its own on both sides.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Self


class BucketFault(StrEnum):
    #: The answer comes after `slow_s`.
    SLOW = "slow"
    #: 500, and nothing happened.
    ERROR = "error"
    #: 503 SlowDown, and nothing happened.
    THROTTLED = "throttled"
    #: 403, and nothing happened.
    FORBIDDEN = "forbidden"
    #: The connection is reset before the server hears of the request.
    RESET = "reset"
    #: The server does it, and the connection is reset instead of the answer.
    LOST_ANSWER = "lost_answer"
    #: The connection is reset, and the request arrives at the server `slow_s` later.
    LATE_EFFECT = "late_effect"
    #: The request comes without its condition, as at a server that ignores it.
    UNCONDITIONAL = "unconditional"
    #: The last byte of the answer's body is another one.
    DAMAGED = "damaged"
    #: The connection ends in the middle of the answer's body.
    CUT = "cut"


_ANSWERS = {
    BucketFault.ERROR: (500, "InternalError"),
    BucketFault.THROTTLED: (503, "SlowDown"),
    BucketFault.FORBIDDEN: (403, "AccessDenied"),
}


@dataclass(slots=True)
class BucketProxy:
    """`requests`: method, target and fault of each, in order. `always`: what meets every request
    that nothing was armed for."""

    upstream_port: int
    slow_s: float = 0.05
    always: BucketFault | None = None
    requests: list[tuple[str, str, BucketFault | None]] = field(default_factory=list)
    _armed: dict[str, deque[BucketFault | None]] = field(default_factory=dict)
    _server: asyncio.Server | None = None
    _late: set[asyncio.Task[bytes]] = field(default_factory=set)

    def on(self, method: str, *faults: BucketFault | None) -> Self:
        """The next requests of a method meet these, in order."""

        self._armed.setdefault(method, deque()).extend(faults)
        return self

    def count(self, method: str) -> int:
        return sum(one == method for one, _, _ in self.requests)

    @property
    def port(self) -> int:
        assert self._server is not None
        return int(self._server.sockets[0].getsockname()[1])

    async def settle(self) -> None:
        """Waits until every late effect has happened."""

        while self._late:
            await asyncio.gather(*self._late)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 20)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        await self.settle()
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            lines = head.decode("latin-1").split("\r\n")
            method, target, _ = lines[0].split(" ", 2)
            body = await reader.readexactly(_length(lines))
            armed = self._armed.get(method)
            fault = armed.popleft() if armed else self.always
            self.requests.append((method, target, fault))
            await self._answer(writer, fault, lines, body)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client has gone
        finally:
            writer.close()

    async def _answer(
        self,
        writer: asyncio.StreamWriter,
        fault: BucketFault | None,
        lines: list[str],
        body: bytes,
    ) -> None:
        if fault in _ANSWERS:
            writer.write(_error(*_ANSWERS[fault]))
            await writer.drain()
            return
        if fault is BucketFault.RESET:
            _reset(writer)
            return
        if fault is BucketFault.LATE_EFFECT:
            task = asyncio.ensure_future(self._forward(lines, body, after_s=self.slow_s))
            self._late.add(task)
            task.add_done_callback(self._late.discard)
            _reset(writer)
            return
        if fault is BucketFault.UNCONDITIONAL:
            lines = [line for line in lines if not line.lower().startswith("if-none-match:")]
        answer = await self._forward(
            lines, body, after_s=self.slow_s if fault is BucketFault.SLOW else 0.0
        )
        if fault is BucketFault.LOST_ANSWER:
            _reset(writer)
            return
        if fault is BucketFault.DAMAGED:
            answer = answer[:-1] + bytes([answer[-1] ^ 0xFF])
        if fault is BucketFault.CUT:
            answer = answer[: answer.index(b"\r\n\r\n") + 5]
        writer.write(answer)
        await writer.drain()

    async def _forward(self, lines: list[str], body: bytes, *, after_s: float) -> bytes:
        if after_s:
            await asyncio.sleep(after_s)
        kept = [line for line in lines if line and not line.lower().startswith("connection:")]
        reader, writer = await asyncio.open_connection("127.0.0.1", self.upstream_port)
        try:
            writer.write("\r\n".join([*kept, "Connection: close", "", ""]).encode("latin-1") + body)
            await writer.drain()
            return await reader.read()
        finally:
            writer.close()


def _length(lines: list[str]) -> int:
    for line in lines:
        name, _, value = line.partition(":")
        if name.lower() == "content-length":
            return int(value)
    return 0


def _error(status: int, code: str) -> bytes:
    body = f"<Error><Code>{code}</Code><Message>as told</Message></Error>".encode()
    head = f"HTTP/1.1 {status} {code}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return head.encode() + body


def _reset(writer: asyncio.StreamWriter) -> None:
    """A reset and not an orderly end: the client sees that something went wrong."""

    transport = writer.transport
    transport.abort()
